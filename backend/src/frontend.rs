//! Requests to a front-end: map and unmap extents in its window, over the backend channel. Never blocks.
//!
//! `vhost`'s own `Backend` sends a request and blocks for the reply; a front-end that does not reply would stop the
//! daemon. Here one request is under way at a time, others queue, and the event loop reads the reply when it comes. A
//! front-end that takes longer than [`REPLY_DEADLINE`] is stalled: what waits fails, and so does what comes, until the
//! late reply arrives; if that says that something was mapped after all, it is unmapped first.
//!
//! # Stock QEMU must not find a request after it has stopped the device
//!
//! QEMU (11.1) reads requests in its main loop, stops a device in whatever thread the driver, the guest or a person makes it
//! do so, and dies of a request that it reads afterwards ([`Manner::Guarded`] is for it). Whoever stops the device holds
//! QEMU's big lock; so does the main loop from before it reads the first byte of a request until the request is done, and it
//! waits for the rest of a request that has begun. So a request is sent in two parts: its first byte, and when QEMU
//! has taken that, the rest. In between nobody can stop the device. If it was stopped before, the rest makes of it a
//! message that does nothing, and the request is sent again when the device is started again, if anybody still wants it.
//!
//! QEMU also replies before the guest can see what was mapped. A second message, which does nothing and is in two parts
//! as well, tells: when its first byte is taken, the request before it is over and done.

use crate::fabric::DeviceId;
use crate::gate;
use crate::keep;
use crate::pool::memfile::{Borrower, MemFile};
use dmbridge_proto::WINDOW_SHMID;
use dmbridge_proto::ids::ExtentId;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{BackendReq, VhostUserHeaderFlag, VhostUserMMap, VhostUserMMapFlags};
use vm_memory::ByteValued;

/// How long a front-end may take for a reply.
pub const REPLY_DEADLINE: Duration = Duration::from_secs(5);
/// Version 1 of the protocol, in a message's flags.
const VERSION: u32 = 1;
const HEADER_SIZE: usize = 12;
/// Bytes of a reply.
pub const REPLY_SIZE: usize = HEADER_SIZE + size_of::<u64>();
const MESSAGE_SIZE: usize = HEADER_SIZE + size_of::<VhostUserMMap>();
/// Makes of a request code one that means nothing, without a change of its first byte; QEMU says so on its standard error.
const NOTHING: u32 = 0xff00;
/// What the kernel counts as unread while it tells that nothing is.
const NOTHING_UNREAD: libc::c_int = 1;

/// What a front-end is asked to do.
#[derive(Debug, Clone)]
pub struct MapRequest {
    /// The started device whose window it is.
    pub device: DeviceId,
    /// The extent.
    pub extent: ExtentId,
    /// The memory to map, and as whose; `None` to unmap. Without memory: another worker has sent it, and it is gone.
    pub file: Option<(Option<Arc<MemFile>>, Borrower)>,
    /// Where in the window.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A request that ended.
#[derive(Debug)]
pub struct MapOutcome {
    /// The request.
    pub request: MapRequest,
    /// Whether the front-end did it.
    pub done: bool,
}

/// The channel cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The front-end closed it.
    #[error("the front-end closed the backend channel")]
    Closed,
    /// It sent something that is no reply to what was asked.
    #[error("the front-end sent something else than a reply on the backend channel")]
    Unexpected,
    /// The system refused.
    #[error("the backend channel failed: {0}")]
    Io(#[from] io::Error),
}

/// How a front-end is to be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// It may be asked at any time, and has done what it says.
    Plain,
    /// As QEMU: see the head of this file.
    Guarded,
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its first byte was sent.
    Begun,
    /// All of it was sent.
    Asked,
    /// It was done, and the first byte of the message that shows the end of it was sent.
    Settling,
}

/// The request that is under way.
#[derive(Debug)]
pub struct Pending {
    /// What was asked.
    pub request: MapRequest,
    /// How far it has come.
    pub stage: Stage,
    /// When it fails.
    pub deadline: Instant,
    /// Nobody waits for the reply any more.
    pub abandoned: bool,
    /// It is overdue: nothing else is accepted before it comes.
    pub overdue: bool,
}

/// Something to send, once it is written down that it is.
#[derive(Debug, Clone)]
pub struct Part {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// With the file of the request that is under way.
    pub file: bool,
}

/// Counts of requests sent.
#[derive(Debug, Default, Clone, Copy)]
pub struct Sent {
    /// `SHMEM_MAP`.
    pub maps: u64,
    /// `SHMEM_UNMAP`.
    pub unmaps: u64,
}

/// The backend channel of one front-end.
#[derive(Debug)]
pub struct Channel {
    socket: UnixStream,
    /// The number under which a keeper has the socket.
    pub number: u64,
    /// How the front-end is asked.
    pub manner: Manner,
    /// Requests that wait for their turn.
    pub queue: VecDeque<MapRequest>,
    /// The one that is under way.
    pub pending: Option<Pending>,
    /// With a keeper nothing is sent from here: this is what is to be sent.
    pub outbox: VecDeque<Part>,
    kept: bool,
    reply: [u8; REPLY_SIZE],
    received: usize,
    /// Requests are sent only while the driver has the device started: stock QEMU crashes otherwise.
    pub open: bool,
    sent: Sent,
}

impl Channel {
    /// The channel over this socket.
    pub fn new(socket: OwnedFd, manner: Manner) -> Channel {
        Channel {
            socket: socket.into(),
            number: keep::number(),
            manner,
            queue: VecDeque::new(),
            pending: None,
            outbox: VecDeque::new(),
            kept: false,
            reply: [0; REPLY_SIZE],
            received: 0,
            open: false,
            sent: Sent::default(),
        }
    }

    /// From now on what is to be sent is left in the outbox.
    pub fn keep(&mut self) {
        self.kept = true;
    }

    /// What was sent so far.
    pub fn sent(&self) -> Sent {
        self.sent
    }

    /// When the request under way fails, if one is.
    pub fn deadline(&self) -> Option<Instant> {
        self.pending.as_ref().filter(|p| !p.overdue).map(|p| p.deadline)
    }

    /// Sends a request, now or after those before it. What fails at once is put into `outcomes`.
    pub fn request(&mut self, request: MapRequest, now: Instant, outcomes: &mut Vec<MapOutcome>) {
        if self.pending.as_ref().is_some_and(|p| p.overdue) {
            outcomes.push(MapOutcome { request, done: false });
            return;
        }
        self.queue.push_back(request);
        self.pump(now, outcomes);
    }

    /// The driver started the device: requests may be sent.
    pub fn open(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) {
        self.open = true;
        self.pump(now, outcomes);
    }

    /// The device is stopped, and may be started again as it was: no request may be sent until then.
    pub fn pause(&mut self) {
        self.open = false;
    }

    /// The device was reset: its window is empty, and no request may be sent. Nobody waits for what is under way.
    pub fn close(&mut self) {
        self.open = false;
        self.queue.clear();
        if let Some(pending) = &mut self.pending {
            pending.abandoned = true;
        }
    }

    fn pump(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) {
        while self.open && self.pending.is_none() {
            let Some(request) = self.queue.pop_front() else { return };
            let message = message(&request);
            let (part, stage) = match self.manner {
                Manner::Plain => (&message[..], Stage::Asked),
                Manner::Guarded => (&message[..1], Stage::Begun),
            };
            // At most one request is unanswered, so it fits the socket's buffer unless the front-end plays tricks.
            match self.send(part, request.file.as_ref()) {
                Ok(()) => {
                    match request.file {
                        Some(_) => self.sent.maps += 1,
                        None => self.sent.unmaps += 1,
                    }
                    let deadline = now + REPLY_DEADLINE;
                    self.pending =
                        Some(Pending { request, stage, deadline, abandoned: false, overdue: false });
                }
                Err(error) => {
                    tracing::warn!("a request to a front-end could not be sent: {error}");
                    outcomes.push(MapOutcome { request, done: false });
                }
            }
        }
    }

    fn send(&mut self, bytes: &[u8], file: Option<&(Option<Arc<MemFile>>, Borrower)>) -> io::Result<()> {
        if self.kept {
            self.outbox.push_back(Part { bytes: bytes.to_vec(), file: file.is_some() });
            return Ok(());
        }
        self.send_now(bytes, file)
    }

    /// Sends the first part of the outbox if that goes with a file.
    pub fn send_file(&mut self) -> io::Result<()> {
        let Some(part) = self.outbox.pop_front() else { return Ok(()) };
        let file = self.pending.as_ref().and_then(|pending| pending.request.file.clone());
        self.send_now(&part.bytes, file.as_ref())
    }

    fn send_now(&self, bytes: &[u8], file: Option<&(Option<Arc<MemFile>>, Borrower)>) -> io::Result<()> {
        let lend = |(file, borrower): &(Option<Arc<MemFile>>, Borrower)| match file {
            Some(file) => file.lend(*borrower),
            None => Err(io::ErrorKind::NotFound.into()),
        };
        let file = file.map(lend).transpose()?;
        let fd = file.as_ref().map(|file| [file.as_raw_fd()]);
        let fds = fd.as_ref().map(|fd| ControlMessage::ScmRights(fd));
        // The front-end's end shares the flags of the socket, so that the call has to say for itself that it does not block.
        let sent = sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(bytes)],
            fds.as_slice(),
            MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The front-end may have taken what was sent: sends the rest of what was begun.
    pub fn advance(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) -> Result<(), ChannelError> {
        while let Some(Pending { request, stage, abandoned, .. }) = &self.pending {
            if *stage == Stage::Asked || !self.outbox.is_empty() || !is_taken(&self.socket)? {
                return Ok(());
            }
            let go_on = self.open && !abandoned;
            match stage {
                Stage::Begun if go_on => {
                    let rest = message(request);
                    self.send(&rest[1..], None)?;
                    if let Some(pending) = &mut self.pending {
                        pending.stage = Stage::Asked;
                    }
                }
                Stage::Begun => {
                    let rest = nothing(code(request) | NOTHING);
                    self.send(&rest[1..], None)?;
                    if let Some(Pending { request, abandoned: false, .. }) = self.pending.take() {
                        self.queue.push_front(request);
                    }
                }
                Stage::Settling => {
                    self.send(&settle()[1..], None)?;
                    self.finish(true, outcomes);
                }
                Stage::Asked => {}
            }
            self.pump(now, outcomes);
        }
        Ok(())
    }

    /// The request under way is over.
    fn finish(&mut self, done: bool, outcomes: &mut Vec<MapOutcome>) {
        let Some(Pending { request, abandoned, .. }) = self.pending.take() else { return };
        if !abandoned {
            outcomes.push(MapOutcome { request, done });
        } else if done && request.file.is_some() {
            // It was mapped after all, and nobody knows it any more.
            self.queue.push_front(MapRequest { file: None, ..request });
        }
    }

    /// The socket may be readable: takes the replies that are there.
    pub fn receive(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) -> Result<(), ChannelError> {
        loop {
            let room = &mut self.reply[self.received..];
            // SAFETY: `room` is writable for its length.
            let n = unsafe {
                libc::recv(self.socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), libc::MSG_DONTWAIT)
            };
            match n {
                0 => return Err(ChannelError::Closed),
                ..0 => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error.into()),
                },
                n => {
                    self.received += n as usize;
                    if self.received == REPLY_SIZE {
                        self.received = 0;
                        self.replied(now, outcomes)?;
                    }
                }
            }
        }
    }

    /// The next reply, if all of it has come; it stays where it is.
    pub fn peek_reply(&self) -> Result<Option<[u8; REPLY_SIZE]>, ChannelError> {
        let mut reply = [0; REPLY_SIZE];
        let hung_up = gate::has_hung_up(self.socket.as_fd())?;
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.as_raw_fd(), &mut reply, flags) {
            Ok(REPLY_SIZE) => Ok(Some(reply)),
            // All that will ever come had come.
            Ok(_) if hung_up => Err(ChannelError::Closed),
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    /// This is the next reply.
    pub fn take_reply(
        &mut self,
        reply: [u8; REPLY_SIZE],
        now: Instant,
        outcomes: &mut Vec<MapOutcome>,
    ) -> Result<(), ChannelError> {
        self.reply = reply;
        self.replied(now, outcomes)
    }

    fn replied(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) -> Result<(), ChannelError> {
        let word = |at: usize| {
            u32::from_ne_bytes([self.reply[at], self.reply[at + 1], self.reply[at + 2], self.reply[at + 3]])
        };
        let pending = self.pending.as_mut().filter(|p| p.stage == Stage::Asked);
        let pending = pending.ok_or(ChannelError::Unexpected)?;
        let is_reply = word(4) & VhostUserHeaderFlag::REPLY.bits() != 0 && word(4) & 3 == VERSION;
        if word(0) != code(&pending.request) || !is_reply || word(8) != size_of::<u64>() as u32 {
            return Err(ChannelError::Unexpected);
        }
        let done = word(12) == 0 && word(16) == 0;
        if done && self.manner == Manner::Guarded && pending.request.file.is_some() {
            pending.stage = Stage::Settling;
            return Ok(self.send(&settle()[..1], None)?);
        }
        self.finish(done, outcomes);
        self.pump(now, outcomes);
        Ok(())
    }

    /// Fails what is overdue.
    pub fn expire(&mut self, now: Instant, outcomes: &mut Vec<MapOutcome>) {
        let Some(pending) = self.pending.as_mut().filter(|p| !p.overdue && p.deadline <= now) else { return };
        pending.overdue = true;
        if !std::mem::replace(&mut pending.abandoned, true) {
            outcomes.push(MapOutcome { request: pending.request.clone(), done: false });
        }
        self.fail_queue(outcomes);
    }

    /// The channel is broken: everything fails.
    pub fn fail(&mut self, outcomes: &mut Vec<MapOutcome>) {
        self.outbox.clear();
        if let Some(pending) = self.pending.take().filter(|p| !p.abandoned) {
            outcomes.push(MapOutcome { request: pending.request, done: false });
        }
        self.fail_queue(outcomes);
    }

    fn fail_queue(&mut self, outcomes: &mut Vec<MapOutcome>) {
        outcomes.extend(self.queue.drain(..).map(|request| MapOutcome { request, done: false }));
    }
}

fn code(request: &MapRequest) -> u32 {
    u32::from(match request.file {
        Some(_) => BackendReq::SHMEM_MAP,
        None => BackendReq::SHMEM_UNMAP,
    })
}

fn header(code: u32, flags: u32, size: usize) -> [u8; HEADER_SIZE] {
    let mut header = [0; HEADER_SIZE];
    for (word, value) in header.chunks_exact_mut(4).zip([code, VERSION | flags, size as u32]) {
        word.copy_from_slice(&value.to_ne_bytes());
    }
    header
}

fn message(request: &MapRequest) -> [u8; MESSAGE_SIZE] {
    let flags = match request.file {
        Some(_) => VhostUserMMapFlags::WRITABLE,
        None => VhostUserMMapFlags::empty(),
    };
    let body = VhostUserMMap {
        shmid: WINDOW_SHMID,
        shm_offset: request.offset,
        len: request.len,
        flags: flags.bits(),
        ..VhostUserMMap::default()
    };
    let mut message = [0; MESSAGE_SIZE];
    let header = header(code(request), VhostUserHeaderFlag::NEED_REPLY.bits(), size_of::<VhostUserMMap>());
    message[..HEADER_SIZE].copy_from_slice(&header);
    message[HEADER_SIZE..].copy_from_slice(body.as_slice());
    message
}

/// A message that does nothing and is not answered.
fn nothing(code: u32) -> [u8; HEADER_SIZE] {
    header(code, 0, 0)
}

/// Another one, of which QEMU says nothing: it belongs to a feature that was not negotiated.
fn settle() -> [u8; HEADER_SIZE] {
    nothing(BackendReq::VRING_HOST_NOTIFIER_MSG.into())
}

/// Whether the other side has taken all that was sent to it.
fn is_taken(socket: &UnixStream) -> io::Result<bool> {
    let mut unread: libc::c_int = 0;
    // SAFETY: the request writes one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(unread <= NOTHING_UNREAD)
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    struct World {
        channel: Channel,
        theirs: UnixStream,
        outcomes: Vec<MapOutcome>,
        now: Instant,
    }

    impl World {
        fn new() -> World {
            World::with(Manner::Plain)
        }

        fn with(manner: Manner) -> World {
            let (ours, theirs) = UnixStream::pair().unwrap();
            theirs.set_nonblocking(true).unwrap();
            let channel = Channel::new(ours.into(), manner);
            World { channel, theirs, outcomes: Vec::new(), now: Instant::now() }
        }

        fn open() -> World {
            let mut world = World::new();
            world.channel.open(world.now, &mut world.outcomes);
            world
        }

        fn request(&mut self, extent: u32, map: bool) {
            let file = map.then(|| {
                let file = MemFile::new(1 << 20, None, &Default::default()).unwrap();
                (Some(Arc::new(file)), Borrower::Owner)
            });
            let request = MapRequest {
                device: DeviceId::for_tests(1),
                extent: ExtentId::new(extent).unwrap(),
                file,
                offset: u64::from(extent) << 21,
                len: 1 << 20,
            };
            self.channel.request(request, self.now, &mut self.outcomes);
        }

        /// What the front-end finds: request code and window offset.
        fn arrived(&mut self) -> Option<(u32, u64)> {
            let mut bytes = [0; MESSAGE_SIZE];
            self.theirs.read_exact(&mut bytes).ok()?;
            let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!((word(4), word(8)), (1 | 8, 40));
            assert_eq!(bytes[HEADER_SIZE], WINDOW_SHMID);
            Some((word(0), u64::from_ne_bytes(bytes[28..36].try_into().unwrap())))
        }

        fn reply(&mut self, code: u32, value: u64) -> Result<(), ChannelError> {
            let mut bytes = Vec::new();
            for word in [code, 1 | 4, 8] {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(value.to_ne_bytes());
            self.theirs.write_all(&bytes).unwrap();
            self.channel.receive(self.now, &mut self.outcomes)
        }

        /// The front-end takes the first byte of a message, and then what has come of the rest.
        fn begin(&mut self) -> u8 {
            let mut byte = [0];
            self.theirs.read_exact(&mut byte).unwrap();
            assert!(self.theirs.read(&mut [0]).is_err(), "the rest waits");
            self.channel.advance(self.now, &mut self.outcomes).unwrap();
            byte[0]
        }

        fn rest<const N: usize>(&mut self, first: u8) -> [u8; N] {
            let mut bytes = [first; N];
            self.theirs.read_exact(&mut bytes[1..]).unwrap();
            bytes
        }

        fn ended(&mut self) -> Vec<(u32, bool)> {
            self.outcomes.drain(..).map(|o| (o.request.extent.get(), o.done)).collect()
        }
    }

    #[test]
    fn nothing_is_sent_before_the_device_is_started() {
        let mut world = World::new();
        world.request(1, true);
        assert_eq!(world.arrived(), None);
        world.channel.open(world.now, &mut world.outcomes);
        assert_eq!(world.arrived(), Some((9, 1 << 21)));
        assert!(world.ended().is_empty());
    }

    #[test]
    fn one_request_is_under_way_at_a_time() {
        let mut world = World::open();
        for extent in 1..4 {
            world.request(extent, extent != 2);
        }
        assert_eq!((world.arrived(), world.arrived()), (Some((9, 1 << 21)), None));
        world.reply(9, 0).unwrap();
        assert_eq!((world.arrived(), world.arrived()), (Some((10, 2 << 21)), None));
        world.reply(10, 1).unwrap();
        assert_eq!(world.arrived(), Some((9, 3 << 21)));
        world.reply(9, 0).unwrap();
        assert_eq!(world.ended(), [(1, true), (2, false), (3, true)]);
        assert_eq!((world.channel.sent().maps, world.channel.sent().unmaps), (2, 1));
    }

    #[test]
    fn a_front_end_that_does_not_answer_fails_what_waits_and_what_comes() {
        let mut world = World::open();
        world.request(1, true);
        world.request(2, true);
        world.channel.expire(world.now, &mut world.outcomes);
        assert!(world.ended().is_empty());
        let deadline = world.channel.deadline().unwrap();
        world.channel.expire(deadline, &mut world.outcomes);
        assert_eq!(world.ended(), [(1, false), (2, false)]);
        world.request(3, true);
        assert_eq!(world.ended(), [(3, false)]);
        assert_eq!(world.channel.deadline(), None);
        // It answers at last: what it mapped is unmapped, and all is well again.
        assert_eq!(world.arrived(), Some((9, 1 << 21)));
        world.reply(9, 0).unwrap();
        assert_eq!(world.arrived(), Some((10, 1 << 21)));
        world.request(4, true);
        world.reply(10, 0).unwrap();
        assert_eq!(world.arrived(), Some((9, 4 << 21)));
        world.reply(9, 0).unwrap();
        assert_eq!(world.ended().last(), Some(&(4, true)));
    }

    #[test]
    fn after_a_reset_what_was_under_way_is_undone_and_told_to_nobody() {
        let mut world = World::open();
        world.request(1, true);
        world.request(2, true);
        assert_eq!(world.arrived(), Some((9, 1 << 21)));
        world.channel.close();
        world.reply(9, 0).unwrap();
        assert_eq!(world.arrived(), None);
        world.channel.open(world.now, &mut world.outcomes);
        assert_eq!(world.arrived(), Some((10, 1 << 21)));
        world.reply(10, 1).unwrap();
        assert!(world.ended().iter().all(|(extent, _)| *extent == 1));
        world.request(3, true);
        assert_eq!(world.arrived(), Some((9, 3 << 21)));
        // What comes after a reset waits for the reply that is under way, as long as that is not overdue.
        world.channel.close();
        world.channel.open(world.now, &mut world.outcomes);
        world.request(4, true);
        assert_eq!((world.ended().len(), world.arrived()), (0, None));
        world.reply(9, 1).unwrap();
        assert_eq!(world.arrived(), Some((9, 4 << 21)));
    }

    #[test]
    fn what_a_guarded_front_end_did_not_get_before_a_pause_it_gets_after() {
        let mut world = World::with(Manner::Guarded);
        world.channel.open(world.now, &mut world.outcomes);
        world.request(1, true);
        world.channel.pause();
        let first = world.begin();
        assert_eq!(code_of_nothing(world.rest(first)), 0xff09);
        assert!(world.theirs.read(&mut [0]).is_err() && world.ended().is_empty());
        world.channel.open(world.now, &mut world.outcomes);
        let first = world.begin();
        let _: [u8; MESSAGE_SIZE] = world.rest(first);
        world.reply(9, 0).unwrap();
        world.begin();
        assert_eq!(world.ended(), [(1, true)]);
    }

    /// The code of a message that does nothing, which follows its first byte.
    fn code_of_nothing(bytes: [u8; HEADER_SIZE]) -> u32 {
        assert_eq!(bytes[4..], [1, 0, 0, 0, 0, 0, 0, 0]);
        u32::from_ne_bytes(bytes[..4].try_into().unwrap())
    }

    #[test]
    fn a_guarded_front_end_gets_a_request_when_it_has_begun_to_read_it() {
        let mut world = World::with(Manner::Guarded);
        world.channel.open(world.now, &mut world.outcomes);
        world.request(1, true);
        world.request(2, false);
        let first = world.begin();
        let request: [u8; MESSAGE_SIZE] = world.rest(first);
        assert_eq!(u32::from_ne_bytes(request[..4].try_into().unwrap()), 9);
        world.reply(9, 0).unwrap();
        assert!(world.ended().is_empty(), "it may not be over yet");
        let first = world.begin();
        assert_eq!(code_of_nothing(world.rest(first)), 3);
        assert_eq!(world.ended(), [(1, true)]);
        // There is nothing to wait for after a mapping was removed, nor after one that was refused.
        let first = world.begin();
        let _: [u8; MESSAGE_SIZE] = world.rest(first);
        world.reply(10, 0).unwrap();
        assert_eq!(world.ended(), [(2, true)]);
        world.request(3, true);
        let first = world.begin();
        let _: [u8; MESSAGE_SIZE] = world.rest(first);
        world.reply(9, 1).unwrap();
        assert_eq!(world.ended(), [(3, false)]);
    }

    #[test]
    fn a_guarded_front_end_that_stopped_the_device_gets_nothing() {
        let mut world = World::with(Manner::Guarded);
        world.channel.open(world.now, &mut world.outcomes);
        world.request(1, true);
        world.channel.close();
        world.channel.open(world.now, &mut world.outcomes);
        world.request(2, true);
        // It was asked by the driver before, and takes it under the next one's reign.
        let first = world.begin();
        assert_eq!(code_of_nothing(world.rest(first)), 0xff09);
        let first = world.begin();
        let request: [u8; MESSAGE_SIZE] = world.rest(first);
        assert_eq!(u64::from_ne_bytes(request[28..36].try_into().unwrap()), 2 << 21);
        world.reply(9, 0).unwrap();
        world.begin();
        assert_eq!(world.ended(), [(2, true)]);
    }

    #[test]
    fn what_is_no_reply_ends_the_channel() {
        for (code, sent) in [(9, false), (10, true), (77, true)] {
            let mut world = World::open();
            if sent {
                world.request(1, true);
            }
            assert!(matches!(world.reply(code, 0), Err(ChannelError::Unexpected)));
        }
        let mut world = World::open();
        world.request(1, true);
        world.theirs.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(matches!(
            world.channel.receive(world.now, &mut world.outcomes),
            Err(ChannelError::Closed | ChannelError::Io(_))
        ));
        world.channel.fail(&mut world.outcomes);
        assert_eq!(world.ended(), [(1, false)]);
    }

    #[test]
    fn a_reply_in_pieces_is_a_reply() {
        let mut world = World::open();
        world.request(1, true);
        let mut bytes = [0; REPLY_SIZE];
        bytes[..4].copy_from_slice(&9u32.to_ne_bytes());
        bytes[4..8].copy_from_slice(&5u32.to_ne_bytes());
        bytes[8..12].copy_from_slice(&8u32.to_ne_bytes());
        for byte in bytes {
            assert!(world.ended().is_empty());
            world.theirs.write_all(&[byte]).unwrap();
            world.channel.receive(world.now, &mut world.outcomes).unwrap();
        }
        assert_eq!(world.ended(), [(1, true)]);
    }
}
