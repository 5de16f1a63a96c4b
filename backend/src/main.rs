//! The program `dmbridged`: command line, signals, log. What it serves is in the library of this crate.

mod args;
mod capabilities;
mod config_file;
mod control_api;
mod size;

use args::Args;
use clap::Parser;
use dmbridged::Daemon;
use dmbridged::hub::DEFAULT_SOCKET_MODE;
use dmbridged::settings::Settings;
use dmbridged::socket::Socket;
use nix::sys::signal::{SigSet, Signal};
use std::io::{IsTerminal, Write, stderr, stdout};
use std::process::ExitCode;

/// Exit codes: 0 when told to end, 1 for a failure, 2 for something that was asked for and cannot be.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    if Args::wants_capabilities() {
        return say(&capabilities::json());
    }
    let args = Args::parse();
    let (log, check) = (args.log, args.check);
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
    tracing_subscriber::fmt()
        .with_max_level(log)
        .with_writer(stderr)
        .with_ansi(stderr().is_terminal())
        .init();
    match serve(settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmbridged: {error}");
            ExitCode::FAILURE
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

/// Serves until a signal says stop, or there is nothing left to serve.
fn serve(settings: Settings) -> Result<(), Box<dyn std::error::Error>> {
    // Before any thread starts, so that none of them is ended by one.
    let stop_signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    stop_signals.thread_block()?;
    let control =
        settings.control.as_ref().map(|path| Socket::bind(path, DEFAULT_SOCKET_MODE)).transpose()?;
    let daemon = Daemon::start(settings)?;
    let handle = daemon.handle();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let mut stopping = false;
        while let Ok(signal) = stop_signals.wait() {
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
