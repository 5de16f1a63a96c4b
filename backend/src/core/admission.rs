//! Who comes and who goes: connections to configured devices and to the hub.

use super::{Core, Source, Work};
use crate::hub::{HubSettings, PeerCredentials};
use crate::placement::NumaSettings;
use crate::port::{Port, SessionId};
use crate::session::{Origin, Session};
use crate::settings::{DeviceSettings, Limits};
use crate::socket::Socket;
use dmbridge_proto::event::GoneReason;
use dmbridge_proto::ids::Gid;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// When a connection could not be taken because descriptors ran out, it is tried again after this long.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Whether there is a connection to be taken: without descriptors left, `accept` fails whether there is one or not.
fn somebody_waits(socket: &Socket) -> bool {
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) == Ok(1)
}

/// A descriptor of nothing.
pub(super) fn spare() -> Option<File> {
    File::open("/dev/null").ok()
}

/// Where front-ends connect.
#[derive(Debug)]
pub(super) enum Listener {
    /// One at a time, always the same device.
    Device { number: usize, socket: Socket },
    /// Any number, each a fresh device.
    Hub { hub: HubSettings, socket: Socket },
}

/// A configured device, whether its front-end is connected or not.
#[derive(Debug)]
pub(super) struct Configured {
    pub name: Arc<str>,
    pub group: Arc<str>,
    pub gid: Gid,
    pub limits: Limits,
    pub numa: NumaSettings,
    pub session: Option<SessionId>,
    pub listener: Option<usize>,
}

/// A front-end that connected and has no handler yet.
pub struct Arrived {
    /// Its session.
    pub id: SessionId,
    /// Its socket.
    pub stream: UnixStream,
}

impl Core {
    /// GIDs that configured devices have are nobody else's.
    pub fn reserve_gids(&mut self, gids: impl Iterator<Item = Gid>) {
        self.gids.extend(gids);
    }

    /// A configured device whose front-end connects at `socket`.
    pub fn add_listening(&mut self, device: DeviceSettings, socket: Socket) -> io::Result<()> {
        let number = self.configure(device)?;
        self.configured[number].listener = Some(self.listeners.len());
        self.listen(socket, |socket| Listener::Device { number, socket })
    }

    /// A configured device whose front-end is connected.
    pub fn add_connected(&mut self, device: DeviceSettings, stream: UnixStream) -> io::Result<Arrived> {
        let number = self.configure(device)?;
        self.admit_configured(number, stream)
    }

    /// The hub.
    pub fn add_hub(&mut self, hub: HubSettings, socket: Socket) -> io::Result<()> {
        self.listen(socket, |socket| Listener::Hub { hub, socket })
    }

    fn configure(&mut self, device: DeviceSettings) -> io::Result<usize> {
        let DeviceSettings { name, group, gid, limits, numa, .. } = device;
        let known = || self.keeping.as_ref()?.gid_of(&name);
        let gid = match gid.or_else(known) {
            Some(gid) => gid,
            None => self.fresh_gid()?,
        };
        if let Some(keeping) = &mut self.keeping {
            keeping.keep_gid(&name, gid);
        }
        self.gids.insert(gid);
        let (name, group) = (name.into(), group.into());
        self.configured.push(Configured { name, group, gid, limits, numa, session: None, listener: None });
        Ok(self.configured.len() - 1)
    }

    fn listen(&mut self, socket: Socket, listener: impl FnOnce(Socket) -> Listener) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        if let Some(keeping) = &mut self.keeping {
            keeping.keep_listener(&socket);
        }
        self.watch(socket.as_fd().as_raw_fd(), Source::Listener(self.listeners.len()))?;
        self.listeners.push(listener(socket));
        Ok(())
    }

    /// Takes the connections that wait at a listener.
    pub fn accept(&mut self, number: usize, arrived: &mut Vec<Arrived>) {
        // Another thread may have been quicker the last time.
        self.spare = self.spare.take().or_else(spare);
        loop {
            let Some(listener) = self.listeners.get(number) else { return };
            let socket = match listener {
                Listener::Device { number, .. } if self.configured[*number].session.is_some() => return,
                Listener::Device { socket, .. } | Listener::Hub { socket, .. } => socket,
            };
            if !somebody_waits(socket) {
                return;
            }
            match socket.accept() {
                Ok((stream, _)) => {
                    let result = match listener {
                        Listener::Device { number, .. } => self.admit_configured(*number, stream).map(Some),
                        Listener::Hub { .. } => self.admit_to_hub(number, stream),
                    };
                    match result {
                        Ok(Some(new)) => arrived.push(new),
                        Ok(None) => {}
                        Err(error) => tracing::warn!("a front-end could not be admitted: {error}"),
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
                    ) => {}
                // Who comes to the hub is told at once, and not kept waiting for as long as others hold them all.
                Err(error) if matches!(listener, Listener::Hub { .. }) && self.spare.take().is_some() => {
                    tracing::warn!("the hub refuses a front-end: {error}");
                    drop(socket.accept());
                    self.spare = spare();
                }
                Err(error) => {
                    tracing::warn!("a connection cannot be taken: {error}");
                    self.timers.insert((Instant::now() + ACCEPT_AGAIN, Work::Accept(number)));
                    return;
                }
            }
        }
    }

    fn admit_configured(&mut self, number: usize, stream: UnixStream) -> io::Result<Arrived> {
        let device = &self.configured[number];
        let (name, group, gid, limits, numa) =
            (device.name.clone(), device.group.clone(), device.gid, device.limits, device.numa);
        let peer = PeerCredentials::of(&stream).ok();
        let arrived = self.admit(Origin::Configured(number), name, group, gid, limits, numa, peer, stream)?;
        self.configured[number].session = Some(arrived.id);
        Ok(arrived)
    }

    fn admit_to_hub(&mut self, listener: usize, stream: UnixStream) -> io::Result<Option<Arrived>> {
        let Listener::Hub { hub, .. } = &self.listeners[listener] else { return Ok(None) };
        let peer = PeerCredentials::of(&stream)?;
        let of_user = self.hub_sessions_of.get(&peer.uid).copied().unwrap_or(0);
        let group = hub
            .group_for(&peer)
            .filter(|_| self.hub_sessions < hub.max_devices && of_user < hub.max_devices_per_user);
        let Some(group) = group else {
            tracing::info!(pid = peer.pid, uid = peer.uid, "the hub refuses a front-end");
            return Ok(None);
        };
        let (limits, numa) = (hub.limits, hub.numa);
        let gid = self.fresh_gid()?;
        self.hub_connections += 1;
        let name = format!("hub-{}", self.hub_connections).into();
        let uid = peer.uid;
        let arrived = self.admit(Origin::Hub, name, group.into(), gid, limits, numa, Some(peer), stream)?;
        self.hub_sessions += 1;
        *self.hub_sessions_of.entry(uid).or_default() += 1;
        Ok(Some(arrived))
    }

    #[expect(clippy::too_many_arguments, reason = "each is one field of what is made")]
    fn admit(
        &mut self,
        origin: Origin,
        name: Arc<str>,
        group: Arc<str>,
        gid: Gid,
        limits: Limits,
        numa: NumaSettings,
        peer: Option<PeerCredentials>,
        stream: UnixStream,
    ) -> io::Result<Arrived> {
        stream.set_nonblocking(false)?;
        self.next_session += 1;
        let id = SessionId(self.next_session);
        tracing::debug!(device = %name, %gid, %group, "a front-end connected");
        let port = Arc::new(Port::new(id, self.doorbell.clone(), numa.engine));
        let mut session = Session::new(name, origin, peer, gid, group, limits, numa, port);
        let watched = stream.as_raw_fd();
        let stream = if self.is_kept() { self.keep_session(&mut session, stream)? } else { stream };
        let watched = session.kept.as_ref().map_or(watched, |kept| kept.socket.as_raw_fd());
        self.watch(watched, Source::Socket(id))?;
        self.gids.insert(gid);
        self.sessions.insert(id, session);
        self.touch(id);
        self.queue(Work::Read(id));
        Ok(Arrived { id, stream })
    }

    /// Ends a session, whose socket is this one; it is closed with its handler.
    pub fn end(&mut self, id: SessionId, socket: RawFd, reason: GoneReason) {
        self.reset(id, reason);
        let Some(session) = self.sessions.remove(&id) else { return };
        self.unwatch(session.kept.as_ref().map_or(socket, |kept| kept.socket.as_raw_fd()));
        self.forget_session(id, &session);
        tracing::debug!(device = %session.name, ?reason, "the front-end is gone");
        if let Some(channel) = &session.channel {
            self.unwatch(channel.as_raw_fd());
        }
        match session.origin {
            Origin::Configured(number) => {
                self.configured[number].session = None;
                if let Some(listener) = self.configured[number].listener {
                    self.queue(Work::Accept(listener));
                }
            }
            Origin::Hub => {
                self.gids.remove(&session.gid);
                self.hub_sessions -= 1;
                let uid = session.peer.map(|peer| peer.uid);
                if let Some(Entry::Occupied(mut count)) = uid.map(|uid| self.hub_sessions_of.entry(uid)) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
            }
        }
    }

    /// A GID that nobody has.
    fn fresh_gid(&self) -> io::Result<Gid> {
        loop {
            let gid = Gid::from_u64(getrandom::u64().map_err(io::Error::other)?);
            if !gid.is_none() && !self.gids.contains(&gid) {
                return Ok(gid);
            }
        }
    }
}
