//! Running programs with and without `dmbridge-run`.

use crate::build::build;
use crate::daemon::{TestDaemon, end_with_this_thread};
use crate::deadline::until;
use crate::namespaces::Namespace;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

/// The program `dmbridge-run`: what the environment variable `DMBRIDGE_RUN` names, else what is built now. The library is
/// next to it.
pub fn runner() -> &'static Path {
    static RUNNER: OnceLock<PathBuf> = OnceLock::new();
    RUNNER.get_or_init(|| match std::env::var_os("DMBRIDGE_RUN") {
        Some(path) => path.into(),
        None => build("dmbridge-preload", "dmbridge-run"),
    })
}

/// A daemon in whose hub all users find each other.
pub fn daemon() -> TestDaemon {
    use std::os::unix::fs::PermissionsExt;
    let hub = "[hub]\nsocket = \"@/hub.sock\"\nmode = 0o666\n[[hub.rule]]\ngroup = \"all\"\n";
    let daemon = TestDaemon::start_with(&[], hub);
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(daemon.path("."), everybody).expect("permissions of the daemon's folder");
    daemon
}

/// How programs are run.
#[derive(Clone, Copy)]
pub enum Way<'a> {
    /// As they are.
    Plain,
    /// By `dmbridge-run`.
    Dmbridge(&'a TestDaemon),
    /// By `dmbridge-run`, in a network namespace, with the name of a network if it is not empty.
    Within(&'a TestDaemon, &'a Namespace, &'a str),
}

impl Way<'_> {
    /// The command that runs a program this way.
    pub fn command(self, program: &str, args: &[&str]) -> Command {
        let program = find(program);
        let mut command = match self {
            Way::Plain => Command::new(&program),
            Way::Dmbridge(daemon) | Way::Within(daemon, ..) => {
                let mut command = Command::new(runner());
                command.arg("--hub").arg(daemon.hub()).arg("--stats");
                command
            }
        };
        if let Way::Within(_, namespace, network) = self {
            namespace.enter(&mut command);
            if !network.is_empty() {
                command.args(["--network", network]);
            }
        }
        if !matches!(self, Way::Plain) {
            command.arg("--").arg(program);
        }
        command.args(args).stdin(Stdio::null());
        end_with_this_thread(&mut command);
        command
    }

    /// Runs a program to its end, which has to be a good one: what it printed.
    pub fn run(self, program: &str, args: &[&str]) -> Ran {
        let mut command = self.command(program, args);
        let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
        let ran = Ran::new(&output);
        assert!(output.status.success(), "{program} {args:?}: {}\n{}\n{}", output.status, ran.out, ran.err);
        ran
    }

    /// Starts a server, and waits until it accepts connections at the port.
    pub fn serve(self, program: &str, args: &[&str], port: u16) -> Server {
        let mut command = self.command(program, args);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|error| panic!("{program}: {error}"));
        let pid = child.id();
        until(&format!("{program} listens at port {port}"), || is_listening(pid, port).then_some(()));
        Server(child)
    }
}

/// Whether somebody listens in a process's network namespace. Not by connecting: some servers serve one connection only.
fn is_listening(pid: u32, port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let table = format!("/proc/{pid}/net/{table}");
        std::fs::read_to_string(table).unwrap_or_default().lines().skip(1).any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|own| own.ends_with(&port)) && words.nth(1) == Some("0A")
        })
    })
}

/// A port that nobody uses.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its number").port()
}

/// A program in the PATH.
///
/// # Panics
///
/// If it is missing: says what to do.
pub fn find(program: &str) -> PathBuf {
    if program.contains('/') {
        return program.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    folders.map(|folder| folder.join(program)).find(|at| at.is_file()).unwrap_or_else(|| {
        panic!("{program} is missing; `cargo xtask test` installs what the tests need, on Debian and as root")
    })
}

/// What a program printed.
#[derive(Debug)]
pub struct Ran {
    /// On standard output.
    pub out: String,
    /// On standard error.
    pub err: String,
}

impl Ran {
    fn new(output: &Output) -> Ran {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran { out: text(&output.stdout), err: text(&output.stderr) }
    }

    /// One of the counters of `dmbridge-run --stats`; 0 if it is not there.
    pub fn counter(&self, text: &str) -> u64 {
        let line = self.err.lines().find(|line| line.starts_with("dmbridge-run:") && line.ends_with(text));
        line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0)
    }

    /// Bytes that went through DMBs, in both directions.
    pub fn moved(&self) -> u64 {
        self.counter("bytes sent through DMBs") + self.counter("bytes received through DMBs")
    }
}

/// A server under test.
pub struct Server(Child);

impl Server {
    /// Ends it by SIGTERM, and says what it printed.
    pub fn stop(mut self) -> Ran {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        self.finish()
    }

    /// Waits until it ends by itself.
    pub fn finish(&mut self) -> Ran {
        use std::io::Read;
        let (mut out, mut err) = (String::new(), String::new());
        if let Some(mut pipe) = self.0.stdout.take() {
            let _ = pipe.read_to_string(&mut out);
        }
        if let Some(mut pipe) = self.0.stderr.take() {
            let _ = pipe.read_to_string(&mut err);
        }
        let _ = self.0.wait();
        Ran { out, err }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a connection to a port works, for what has to be waited for by itself.
pub fn answers(port: u16) -> bool {
    TcpStream::connect(("127.0.0.1", port)).is_ok()
}
