//! The real `dmbridged` as a child process in a private folder.

use crate::build::build;
use crate::deadline::{DEADLINE, until};
use dmbridged::report::Report;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use tempfile::TempDir;

pub use dmbridge_vm::machine::end_with_this_thread;

/// The program: what the environment variable `DMBRIDGED` names, else what is built now.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("DMBRIDGED") {
        Some(path) => path.into(),
        None => build("dmbridged", "dmbridged"),
    })
}

/// What a process holds: it has to be no more after than before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdings {
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// Mappings of files: the allocator's own come and go.
    pub file_mappings: usize,
    /// Size of all extents, in bytes.
    pub extent_bytes: u64,
    /// Devices.
    pub devices: usize,
}

impl Holdings {
    /// Whether nothing is more than in `before`. Less can be: what had ended just before was still on its way out.
    pub fn is_within(&self, before: &Holdings) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.file_mappings <= before.file_mappings
            && self.extent_bytes <= before.extent_bytes
            && self.devices <= before.devices
    }
}

/// A daemon that ends with the test, however the test ends.
pub struct TestDaemon {
    child: Child,
    folder: TempDir,
    expect_alive: bool,
}

impl TestDaemon {
    /// A daemon with a hub and the defaults.
    pub fn start() -> TestDaemon {
        TestDaemon::start_with(&[], "")
    }

    /// A daemon with a hub, these flags, and this configuration; in both, `@` stands for the daemon's folder.
    pub fn start_with(flags: &[&str], configuration: &str) -> TestDaemon {
        let folder = tempfile::tempdir().expect("a folder for the daemon");
        // A daemon that many tests share is never dropped.
        crate::vm::shared::remove_at_exit(folder.path());
        let here = folder.path().to_str().expect("a folder with a plain name");
        let file = folder.path().join("dmbridged.toml");
        fs::write(&file, configuration.replace('@', here)).expect("a configuration file");
        let log = File::create(folder.path().join("log")).expect("a log file");
        let mut command = Command::new(program());
        command.arg("--config").arg(file).args(["--log", "debug"]);
        command.arg("--hub").arg(folder.path().join("hub.sock"));
        command.arg("--control").arg(folder.path().join("control.sock"));
        command.args(flags.iter().map(|flag| flag.replace('@', here)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        end_with_this_thread(&mut command);
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program().display()));
        let mut daemon = TestDaemon { child, folder, expect_alive: true };
        until("the daemon answers on its control socket", || {
            if let Some(status) = daemon.child.try_wait().expect("wait") {
                panic!("the daemon ended at once, {status}");
            }
            daemon.get("/v1/health").ok()
        });
        daemon
    }

    /// A path in the daemon's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The hub's socket.
    pub fn hub(&self) -> PathBuf {
        self.path("hub.sock")
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The worker that a daemon with a keeper has now, if it has one.
    pub fn worker(&self) -> Option<u32> {
        let pid = self.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Ends the worker by SIGKILL. The keeper starts another.
    pub fn kill_worker(&self) {
        let worker = until("there is a worker", || self.worker());
        let pid = nix::unistd::Pid::from_raw(worker as i32);
        // It may be gone already.
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }

    /// What the daemon reports.
    pub fn report(&self) -> Report {
        let body = self.get("/v1/report").expect("the control API answers");
        serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error} in {body}"))
    }

    /// The body of an answer of the control API.
    pub fn get(&self, resource: &str) -> std::io::Result<String> {
        let mut stream = UnixStream::connect(self.path("control.sock"))?;
        stream.set_read_timeout(Some(DEADLINE))?;
        write!(stream, "GET {resource} HTTP/1.1\r\nHost: dmbridged\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").ok_or(std::io::ErrorKind::UnexpectedEof)?;
        Ok(body.to_string())
    }

    /// What the process holds now.
    pub fn holdings(&self) -> Holdings {
        let report = self.report();
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        let count = |name: &str| fs::read_dir(process.join(name)).expect("/proc").count();
        let maps = fs::read_to_string(process.join("maps")).expect("/proc");
        Holdings {
            descriptors: count("fd"),
            threads: count("task"),
            file_mappings: maps.lines().filter(|line| line.contains("memfd:")).count(),
            extent_bytes: report.pool.extent_bytes,
            devices: report.devices.len(),
        }
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Ends it by SIGKILL.
    pub fn kill(&mut self) {
        self.expect_alive = false;
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Sends a signal and waits until it has ended.
    pub fn stop(&mut self, signal: nix::sys::signal::Signal) -> ExitStatus {
        self.expect_alive = false;
        let pid = nix::unistd::Pid::from_raw(self.pid() as i32);
        nix::sys::signal::kill(pid, signal).expect("kill");
        self.wait()
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        self.expect_alive = false;
        until("the daemon ends", || self.child.try_wait().expect("wait"))
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        let ended = self.child.try_wait().ok().flatten();
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "---- log of the daemon ({}) ----",
                ended.map_or("alive".into(), |status| status.to_string())
            );
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            lines[lines.len().saturating_sub(100)..].iter().for_each(|line| eprintln!("{line}"));
            eprintln!("---- end of the log ----");
        } else if self.expect_alive {
            assert!(ended.is_none(), "the daemon ended during the test, {ended:?}:\n{}", self.log());
        }
    }
}
