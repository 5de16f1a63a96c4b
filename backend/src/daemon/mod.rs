//! The daemon as a value: started from settings, asked through a handle, stopped.

#[cfg(test)]
mod tests;

use crate::control::{Control, Entrance, Setup};
use crate::copy_plan;
use crate::core::{Identity, Snapshot};
use crate::doorbell::{self, Doorbell, Message};
use crate::engine::set::EngineSet;
use crate::fabric::Fabric;
use crate::hub::DEFAULT_SOCKET_MODE;
use crate::keep::{KeepError, Kept};
use crate::mover::Mover;
use crate::report::Report;
use crate::settings::{Endpoint, Settings, SettingsError, reserved_huge_pages};
use crate::socket::{Socket, SocketError};
use crate::topology::Topology;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

/// Why a daemon does not start, or did not end well.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The settings contradict themselves.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A socket cannot be made.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A descriptor that was handed over is no connected vhost-user socket.
    #[error("the descriptor of device {0} is not a connected UNIX stream socket")]
    Descriptor(String),
    /// What another worker left cannot be taken over.
    #[error(transparent)]
    Keep(#[from] KeepError),
    /// The operating system refused.
    #[error("the daemon cannot run: {0}")]
    Io(#[from] io::Error),
    /// A thread ended by a panic: a bug.
    #[error("the control thread panicked; this is a bug")]
    Panic,
}

/// A running daemon. Dropping it stops it.
#[derive(Debug)]
pub struct Daemon {
    handle: Handle,
    thread: Option<JoinHandle<Result<(), Error>>>,
    _revision: copy_plan::Revision,
}

/// Reaches a daemon from any thread.
#[derive(Debug, Clone)]
pub struct Handle {
    doorbell: Doorbell,
}

impl Daemon {
    /// Starts a daemon: its sockets are there when this returns.
    pub fn start(settings: Settings) -> Result<Daemon, Error> {
        Daemon::start_with(settings, None)
    }

    /// As [`start`](Self::start), as the worker of the keeper at the other end of this socket: the daemon goes on where the one before
    /// it ended.
    pub fn start_kept(settings: Settings, keeper: OwnedFd) -> Result<Daemon, Error> {
        Daemon::start_with(settings, Some(keeper))
    }

    fn start_with(settings: Settings, keeper: Option<OwnedFd>) -> Result<Daemon, Error> {
        crate::notify::prepare();
        settings.check()?;
        raise_descriptor_limit();
        if let Some(size) = settings.pool.huge_pages.filter(|size| reserved_huge_pages(*size) == Some(0)) {
            tracing::warn!(
                "no huge pages of {} KiB are set aside, and until some are there are no DMBs: see \
                 /proc/sys/vm/nr_hugepages",
                size >> 10
            );
        }
        let keeping = keeper.map(Kept::take_over).transpose()?;
        let bind =
            |path: &Path, mode| match keeping.as_ref().and_then(|(kept, heirs)| kept.listener(path, heirs)) {
                Some(socket) => Ok(socket),
                None => Socket::bind(path, mode),
            };
        let hub = match settings.hub {
            Some(hub) => {
                let socket = bind(&hub.socket, hub.mode)?;
                Some((hub, socket))
            }
            None => None,
        };
        let mut devices = Vec::with_capacity(settings.devices.len());
        for mut device in settings.devices {
            let entrance = match std::mem::replace(&mut device.endpoint, Endpoint::Path(Default::default())) {
                Endpoint::Path(path) => Entrance::Socket(bind(&path, DEFAULT_SOCKET_MODE)?),
                Endpoint::Fd(fd) => {
                    let stream = std::os::unix::net::UnixStream::from(fd);
                    if stream.peer_addr().is_err() {
                        return Err(Error::Descriptor(device.name));
                    }
                    Entrance::Stream(stream)
                }
            };
            devices.push((device, entrance));
        }
        // Before the engines, which copy by it.
        let known = keeping.as_ref().and_then(|(kept, _)| kept.copy_plan());
        let revision = copy_plan::start(known)?;
        let topology = Topology::of_host();
        let engines = EngineSet::start(&settings.engines, &topology)?;
        let movers: Vec<Mover> = (0..settings.movers)
            .map(|number| Mover::start(number, engines.mover()))
            .collect::<Result<_, _>>()?;
        let (doorbell, inbox) = doorbell::pair()?;
        let setup = Setup {
            identity: Identity { fabric_id: settings.fabric_id, system_eid: settings.system_eid },
            fabric: Fabric::new(settings.pool, topology),
            movers,
            engines,
            devices,
            hub,
            keeping,
            doorbell: doorbell.clone(),
            inbox,
        };
        let thread = std::thread::Builder::new()
            .name("dmb-control".into())
            .spawn(move || Control::new(setup)?.run())?;
        Ok(Daemon { handle: Handle { doorbell }, thread: Some(thread), _revision: revision })
    }

    /// For asking and stopping.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits for the end: because of [`Handle::stop`], or because there is nothing left to serve.
    pub fn join(mut self) -> Result<(), Error> {
        self.wait()
    }

    fn wait(&mut self) -> Result<(), Error> {
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| Error::Panic)?,
            None => Ok(()),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.handle.stop();
        let _ = self.wait();
    }
}

impl Handle {
    /// How things are, or `None` if the daemon has ended.
    pub fn report(&self) -> Option<Report> {
        let (sender, receiver) = sync_channel(1);
        self.doorbell
            .ring(Message::Report(sender))
            .then(|| receiver.recv().ok())
            .flatten()
            .map(Snapshot::finish)
    }

    /// Asks the daemon to end.
    pub fn stop(&self) {
        self.doorbell.ring(Message::Stop);
    }
}

/// Each device takes about a dozen descriptors; the usual soft limit is for programs that use `select`.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        tracing::warn!("the limit of open descriptors stays at {soft}: {error}");
    }
}
