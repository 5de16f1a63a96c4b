//! Requests to front-ends and their answers: from the fabric to the backend channel of a session, and back.

use super::{Core, Source, Work};
use crate::fabric::Effect;
use crate::frontend::{Channel, Manner, MapOutcome};
use crate::gate;
use crate::port::SessionId;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};

impl Core {
    /// Does what the fabric left to be done, and what follows from it.
    pub fn settle(&mut self) {
        loop {
            let effects = self.fabric.effects();
            if effects.is_empty() {
                return;
            }
            for effect in effects {
                match effect {
                    Effect::Resume(device, attempt) => self.resume(device, attempt),
                    Effect::Ask(request) => {
                        let Some(id) = self.started.get(&request.device).copied() else { continue };
                        self.touch(id);
                        let mut outcomes = Vec::new();
                        let channel = self.sessions.get_mut(&id).and_then(|s| s.channel.as_mut());
                        match channel {
                            Some(channel) => channel.request(request, Instant::now(), &mut outcomes),
                            None => outcomes.push(MapOutcome { request, done: false }),
                        }
                        self.watch_deadline(id);
                        self.map_outcomes(outcomes);
                    }
                }
            }
        }
    }

    pub(super) fn map_outcomes(&mut self, outcomes: Vec<MapOutcome>) {
        for outcome in outcomes {
            self.fabric.mapped(&outcome);
        }
    }

    pub(super) fn watch_deadline(&mut self, id: SessionId) {
        let channel = self.sessions.get(&id).and_then(|s| s.channel.as_ref());
        if let Some(when) = channel.and_then(Channel::deadline) {
            self.timers.insert((when, Work::Expire(id)));
        }
    }

    /// The backend channel may have something to say, or has taken something.
    pub(super) fn read_channel(&mut self, id: SessionId) {
        if self.is_kept() {
            return self.read_kept_channel(id);
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(channel) = &mut session.channel else { return };
        let mut outcomes = Vec::new();
        let now = Instant::now();
        let result = channel.receive(now, &mut outcomes).and_then(|()| channel.advance(now, &mut outcomes));
        if let Err(error) = result {
            tracing::debug!(device = %session.name, "{error}");
            channel.fail(&mut outcomes);
            let fd = channel.as_raw_fd();
            session.channel = None;
            self.unwatch(fd);
        }
        self.watch_deadline(id);
        self.map_outcomes(outcomes);
        self.settle();
    }

    /// A reply may be overdue.
    pub fn expire(&mut self, id: SessionId) {
        self.touch(id);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(channel) = &mut session.channel else { return };
        let mut outcomes = Vec::new();
        channel.expire(Instant::now(), &mut outcomes);
        if !outcomes.is_empty() {
            tracing::warn!(device = %session.name, "the front-end does not answer requests to map");
        }
        self.watch_deadline(id);
        self.map_outcomes(outcomes);
        self.settle();
    }

    /// Takes `SET_BACKEND_REQ_FD`, which is at the gate. `vhost` would hand over a channel that blocks, and whose
    /// descriptor it hides.
    pub fn take_channel(&mut self, id: SessionId, socket: BorrowedFd<'_>) -> io::Result<()> {
        let kept = self.is_kept();
        let (header, fds) = receive_with_fds(socket)?;
        let session = self.sessions.get_mut(&id).ok_or(io::ErrorKind::NotConnected)?;
        let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| invalid("it needs one descriptor"))?;
        if !session.protocol.contains(Protocol::BACKEND_REQ) {
            return Err(invalid("its feature was not negotiated"));
        }
        let stream = UnixStream::from(fd);
        let is_stream = nix::sys::socket::getsockopt(&stream, nix::sys::socket::sockopt::SockType)
            .is_ok_and(|kind| kind == nix::sys::socket::SockType::Stream);
        if stream.local_addr().is_err() || !is_stream {
            return Err(invalid("its descriptor is not a UNIX stream socket"));
        }
        let manner = if session.is_qemu() { Manner::Guarded } else { Manner::Plain };
        let mut channel = Channel::new(stream.into(), manner);
        if kept {
            channel.keep();
        }
        let mut outcomes = Vec::new();
        if let Some(mut old) = session.channel.take() {
            old.fail(&mut outcomes);
        }
        if session.is_running() {
            channel.open(Instant::now(), &mut outcomes);
        }
        let fd = channel.as_raw_fd();
        let acknowledge = header.need_reply && session.protocol.contains(Protocol::REPLY_ACK);
        session.channel = Some(channel);
        self.watch(fd, Source::Channel(id))?;
        self.map_outcomes(outcomes);
        self.settle();
        if acknowledge {
            acknowledge_ok(socket, u32::from(FrontendReq::SET_BACKEND_REQ_FD))?;
        }
        Ok(())
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

struct RawHeader {
    need_reply: bool,
}

/// Receives a message without a body that carries descriptors.
fn receive_with_fds(socket: BorrowedFd<'_>) -> io::Result<(RawHeader, Vec<OwnedFd>)> {
    use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
    use std::os::fd::FromRawFd;
    const NEED_REPLY: u32 = 1 << 3;
    let mut bytes = [0u8; gate::HEADER_SIZE];
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut fds = Vec::new();
    let n = {
        let mut iov = [io::IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                // SAFETY: the kernel just made these descriptors for us.
                fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        message.bytes
    };
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if n != bytes.len() || word(8) != 0 {
        return Err(invalid("it has no body"));
    }
    Ok((RawHeader { need_reply: word(4) & NEED_REPLY != 0 }, fds))
}

/// Says that a request with `NEED_REPLY` was done.
fn acknowledge_ok(socket: BorrowedFd<'_>, code: u32) -> io::Result<()> {
    use nix::sys::socket::{MsgFlags, send};
    const VERSION_AND_REPLY: u32 = 1 | 1 << 2;
    let mut message = [0u8; gate::HEADER_SIZE + 8];
    for (at, word) in [code, VERSION_AND_REPLY, 8].into_iter().enumerate() {
        message[4 * at..4 * at + 4].copy_from_slice(&word.to_ne_bytes());
    }
    send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}
