//! A daemon of one's own for one run, in a private folder.

use anyhow::{Result, anyhow, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::control;
use crate::process::{BoundChild, find_program};
use crate::scratch::{self, Scratch};

/// How long it may take to start.
const START: Duration = Duration::from_secs(10);

/// A running daemon, ended when dropped.
pub struct Daemon {
    child: BoundChild,
    hub: PathBuf,
}

impl Daemon {
    /// Starts it with a hub, and waits until it serves.
    pub fn start(scratch: &Scratch) -> Result<Daemon> {
        Daemon::with_sockets(scratch, &[])
    }

    /// The same, with a device at each of these sockets.
    pub fn with_sockets(scratch: &Scratch, sockets: &[PathBuf]) -> Result<Daemon> {
        let sockets = sockets.iter().map(|socket| format!("--socket-path={}", socket.display()));
        Daemon::launch(scratch, sockets.collect())
    }

    /// The same, with a device for each of these engines, which copies its moves; where they connect,
    /// [`engine_socket`] says.
    pub fn with_engines(scratch: &Scratch, engines: &[&str]) -> Result<Daemon> {
        let config = scratch.file("engines.toml");
        let group = format!("uid-{}", nix::unistd::geteuid());
        let device = |engine: &&str| {
            let socket = engine_socket(scratch, engine);
            format!(
                "[[device]]\nname = \"{engine}\"\nsocket = {socket:?}\ngroup = \"{group}\"\nengine = \"{engine}\"\n"
            )
        };
        scratch::write(&config, engines.iter().map(device).collect::<String>())?;
        Daemon::launch(scratch, vec![format!("--config={}", config.display())])
    }

    fn launch(scratch: &Scratch, flags: Vec<String>) -> Result<Daemon> {
        let program = find_program("dmbridged").ok_or_else(|| {
            anyhow!(
                "dmbridged was found neither next to this program nor in PATH; build it with `cargo build --release \
                 --workspace`, or install it"
            )
        })?;
        let hub = scratch.file("hub.sock");
        let control = scratch.file("control.sock");
        if control.as_os_str().len() > 107 {
            bail!("{} is too long a path for a socket; name a shorter folder in TMPDIR", control.display());
        }
        let mut command = Command::new(&program);
        command.arg("--hub").arg(&hub).arg("--control").arg(&control).args(["--log", "error"]);
        command.args(flags);
        let mut child = BoundChild::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()))?;
        let deadline = Instant::now() + START;
        // It says nothing when it is ready, but answers.
        while !hub.exists() || control::get(&control, "/v1/health").is_err() {
            if let Some(status) = child.get_mut().try_wait()? {
                bail!("{} ended while it started: {status}", program.display());
            }
            if Instant::now() > deadline {
                bail!(
                    "{} did not serve {} within {} seconds",
                    program.display(),
                    hub.display(),
                    START.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Daemon { child, hub })
    }

    /// Where devices come from.
    pub fn hub(&self) -> &Path {
        &self.hub
    }

    /// Its process.
    pub fn pid(&self) -> nix::unistd::Pid {
        self.child.pid()
    }
}

/// Where the device connects whose moves are copied by this engine, of a daemon that was started with it.
pub fn engine_socket(scratch: &Scratch, engine: &str) -> PathBuf {
    scratch.file(&format!("{engine}.sock"))
}
