//! A program of a measurement: found, started one way or the other, asked, and ended so that what it used is counted.

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::plan::Transport;
use crate::process::{BoundChild, find_program};

/// How long a server may take to start, and to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// How the programs of one measurement are run.
pub struct App<'a> {
    /// Over TCP, or by `dmbridge-run`.
    pub way: Transport,
    /// Where `dmbridge-run` is.
    pub runner: &'a Path,
    /// The daemon's hub.
    pub hub: &'a Path,
    /// A folder for the programs' files.
    pub folder: &'a Path,
    /// For how long to measure.
    pub seconds: u32,
}

impl App<'_> {
    /// The command that runs a program this way.
    pub fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let path = program_path(program).ok_or_else(|| anyhow!("{program} is gone"))?;
        let mut command = if self.way == Transport::DmbridgeRun {
            let mut command = Command::new(self.runner);
            command.arg("--hub").arg(self.hub).arg("--").arg(path);
            command
        } else {
            Command::new(path)
        };
        command.args(args).stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::null());
        // This process has blocked the signals by which servers are ended.
        // SAFETY: one system call, which is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
        Ok(command)
    }

    /// Starts a server, and waits until it listens. Not by connecting: iperf3 serves one connection.
    pub fn serve(&self, program: &str, args: &[&str], port: u16) -> Result<Server> {
        let mut child = BoundChild::spawn(&mut self.command(program, args)?)?;
        let end = Instant::now() + PATIENCE;
        while !is_listening(port) {
            if let Some(status) = child.get_mut().try_wait()? {
                bail!("{program} ended at once: {status}");
            }
            ensure!(Instant::now() < end, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Server(child))
    }

    /// Runs a client to its end, which has to be a good one: what it printed.
    pub fn ask(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program, args)?.stdout(Stdio::piped()).stderr(Stdio::piped()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program}: {}\n{text}{error}", output.status);
        Ok(text)
    }
}

/// A server, ended when dropped.
pub struct Server(BoundChild);

impl Server {
    /// Its process.
    pub fn pid(&self) -> Pid {
        self.0.pid()
    }

    /// Ends it well, so that what it used is counted.
    pub fn stop(mut self) -> Result<()> {
        let _ = kill(self.0.pid(), Signal::SIGTERM);
        let end = Instant::now() + PATIENCE;
        while self.0.get_mut().try_wait()?.is_none() {
            ensure!(Instant::now() < end, "a server does not end by SIGTERM");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// Where a program is: in the `PATH`, or where Debian puts servers.
pub fn program_path(name: &str) -> Option<PathBuf> {
    let system = Path::new("/usr/sbin").join(name);
    let postgresql = || {
        let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
        versions.flatten().map(|version| version.path().join("bin").join(name)).find(|path| path.is_file())
    };
    find_program(name).or_else(|| system.is_file().then_some(system)).or_else(postgresql)
}

/// A port that nobody uses.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr().context("a port has no number")?.port())
}

fn is_listening(port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
        std::fs::read_to_string(table).unwrap_or_default().lines().skip(1).any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|own| own.ends_with(&port)) && words.nth(1) == Some("0A")
        })
    })
}
