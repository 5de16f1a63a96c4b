//! The program `dmbridged`: command line, signals, log. What it serves is in the library of this crate.

mod args;
mod capabilities;
mod config_file;
mod control_api;
mod size;

use args::Args;
use clap::Parser;
use dmbridged::hub::DEFAULT_SOCKET_MODE;
use dmbridged::keep::KeepError;
use dmbridged::keep::keeper::{self, Ended, Program};
use dmbridged::settings::Settings;
use dmbridged::socket::Socket;
use dmbridged::{Daemon, Error};
use nix::sys::signal::{SigSet, Signal};
use std::io::{IsTerminal, Write, stderr, stdout};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

/// Exit codes: 0 when told to end, 1 for a failure, 2 for something that was asked for and cannot be.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    if Args::wants_capabilities() {
        return say(&capabilities::json());
    }
    let args = Args::parse();
    let (log, check, keep, kept_by) = (args.log, args.check, args.keep, args.kept_by);
    let keeper = match kept_by.map(args::take_keeper).transpose() {
        Ok(keeper) => keeper,
        Err(error) => {
            eprintln!("dmbridged: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if keep && keeper.is_none() && !check {
        start_log(log);
        return match keep_worker() {
            Ok(Ended(code)) => ExitCode::from(code),
            Err(error) => {
                eprintln!("dmbridged: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let settings = match args.settings() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("dmbridged: {error}");
            return ExitCode::from(USAGE);
        }
    };
    if check {
        return say(&format!("the configuration is good: {}", summary(&settings)));
    }
    start_log(log);
    match serve(settings, keeper) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmbridged: {error}");
            match error.downcast_ref() {
                Some(Error::Keep(KeepError::Book(_) | KeepError::Entry(..))) => {
                    ExitCode::from(keeper::REFUSED)
                }
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Answers what was asked on the command line, if somebody still reads it.
fn say(answer: &str) -> ExitCode {
    match writeln!(stdout(), "{answer}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmbridged: standard output cannot be written: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(level: tracing_subscriber::filter::LevelFilter) {
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
}

/// Starts workers of what is at this program's path, one after the other.
fn keep_worker() -> std::io::Result<Ended> {
    let path = std::env::current_exe()?;
    keeper::run(Program { path, arguments: std::env::args_os().skip(1).collect() })
}

/// Serves until a signal says stop, or there is nothing left to serve.
fn serve(settings: Settings, keeper: Option<OwnedFd>) -> Result<(), Box<dyn std::error::Error>> {
    let is_kept = keeper.is_some();
    if is_kept {
        // SAFETY: a number, which asks for a signal when the keeper ends: without it nobody would replace this worker.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) };
    }
    // Before any thread starts, so that none of them is ended by one.
    let stop_signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    stop_signals.thread_block()?;
    let control =
        settings.control.as_ref().map(|path| Socket::bind(path, DEFAULT_SOCKET_MODE)).transpose()?;
    let daemon = match keeper {
        Some(keeper) => Daemon::start_kept(settings, keeper)?,
        None => Daemon::start(settings)?,
    };
    let handle = daemon.handle();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut stopping = false;
        while let Ok(signal) = stop_signals.wait() {
            if is_kept && signal == Signal::SIGHUP {
                // The keeper's.
                continue;
            }
            if stopping {
                // Whoever asks a second time does not want to wait.
                std::process::exit(1);
            }
            stopping = true;
            tracing::info!("{signal}: stopping");
            handle.stop();
        }
    })?;
    if let Some(socket) = &control {
        let handle = daemon.handle();
        control_api::start(socket, move || handle.report())?;
    }
    Ok(daemon.join()?)
}

/// What a configuration serves, in a few words.
fn summary(settings: &Settings) -> String {
    let devices = settings.devices.len();
    let hub =
        settings.hub.as_ref().map_or("no hub".into(), |hub| format!("a hub at {}", hub.socket.display()));
    format!("{devices} configured device{}, {hub}", if devices == 1 { "" } else { "s" })
}
