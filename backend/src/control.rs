//! The control thread: owns sessions and fabric, waits for whatever happens to them, and never for one of them.
//!
//! Why `epoll` directly and not `event-manager`: the latter's subscribers are registered objects that own what they
//! react with; here thousands of descriptors come and go that all act on one state, and the kicks have to be watched
//! edge-triggered and are never read (so a front-end cannot make a read block, and a kick costs no system call).

use crate::doorbell::{Doorbell, Inbox, Message};
use crate::fabric::{Attempt, DeviceId, Effect, Fabric, Joining};
use crate::frontend::{Channel, MapOutcome};
use crate::gate::{self, Arrival};
use crate::handler::Handler;
use crate::hub::{HubSettings, PeerCredentials};
use crate::mover::Mover;
use crate::notify::EventFile;
use crate::port::{Port, SessionId};
use crate::report::Report;
use crate::session::{Origin, Service, Session, Suspended};
use crate::settings::{DeviceSettings, Limits};
use crate::socket::Socket;
use crate::vring::{Broken, Chain};
use dmbridge_proto::config::CONFIG_SIZE;
use dmbridge_proto::control::{Command, HEADER_SIZE, Reply, Request, Response};
use dmbridge_proto::event::GoneReason;
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::Gid;
use dmbridge_proto::shm::CopyPlan;
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE};
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures as Protocol};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use zerocopy::IntoBytes;

/// Messages or commands of one session before others have their turn.
const TURN: usize = 64;
/// The largest configuration space of a virtio device that a front-end may ask for; ours is followed by zeroes.
const MAX_CONFIG_SIZE: usize = 256;
/// When a connection could not be taken because descriptors ran out, it is tried again after this long.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Something that a front-end asks for and that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// Features that were not offered.
    #[error("features {0:#x} were accepted that are not offered")]
    Features(u64),
    /// A queue that does not exist.
    #[error("there is no queue {0}")]
    Queue(u32),
    /// A change to a queue that is being served.
    #[error("queue {0} is in service and cannot be changed")]
    Busy(u32),
    /// A part of the configuration space that does not exist.
    #[error("the configuration space has no {1} bytes at {0}")]
    Config(usize, usize),
    /// A descriptor of the wrong kind, or that the system refuses.
    #[error("the descriptor for queue {0} cannot be used: {1}")]
    Descriptor(u32, io::Error),
    /// The session ended.
    #[error("the session has ended")]
    Ended,
}

/// What an epoll event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Inbox,
    Listener(usize),
    Socket(SessionId),
    Channel(SessionId),
    Kick(SessionId, u16),
}

impl Source {
    const SESSION_BITS: u32 = 44;

    fn to_bits(self) -> u64 {
        let (kind, ring, id) = match self {
            Source::Inbox => (0u64, 0, 0),
            Source::Listener(number) => (1, 0, number as u64),
            Source::Socket(id) => (2, 0, id.0),
            Source::Channel(id) => (3, 0, id.0),
            Source::Kick(id, ring) => (4, ring, id.0),
        };
        kind << 60 | u64::from(ring) << Source::SESSION_BITS | id
    }

    fn from_bits(bits: u64) -> Option<Source> {
        let id = bits & ((1 << Source::SESSION_BITS) - 1);
        let ring = (bits >> Source::SESSION_BITS) as u16;
        Some(match bits >> 60 {
            0 => Source::Inbox,
            1 => Source::Listener(id as usize),
            2 => Source::Socket(SessionId(id)),
            3 => Source::Channel(SessionId(id)),
            4 => Source::Kick(SessionId(id), ring),
            _ => return None,
        })
    }
}

/// Something to do without waiting for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Work {
    /// Messages of a front-end.
    Read(SessionId),
    /// Commands of a driver.
    Commands(SessionId),
    /// Replies of a front-end that are overdue.
    Expire(SessionId),
    /// Connections.
    Accept(usize),
}

/// Where front-ends connect.
#[derive(Debug)]
enum Listener {
    /// One at a time, always the same device.
    Device { number: usize, socket: Socket },
    /// Any number, each a fresh device.
    Hub { hub: HubSettings, socket: Socket },
}

/// A configured device, whether its front-end is connected or not.
#[derive(Debug)]
struct Configured {
    name: Arc<str>,
    group: Arc<str>,
    gid: Gid,
    limits: Limits,
    session: Option<SessionId>,
    listener: Option<usize>,
}

/// What the fabric of a daemon is called, for configuration spaces and reports.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The fabric, below 0xFF00.
    pub fabric_id: u16,
    /// The host's EID.
    pub system_eid: [u8; 32],
    /// How bytes are copied fastest here.
    pub copy_plan: CopyPlan,
}

/// Sessions, fabric, and what the control thread knows besides.
#[derive(Debug)]
pub struct Core {
    identity: Identity,
    fabric: Fabric,
    sessions: HashMap<SessionId, Session>,
    /// Sessions of started devices.
    started: HashMap<DeviceId, SessionId>,
    configured: Vec<Configured>,
    listeners: Vec<Listener>,
    /// GIDs that are somebody's, started or not.
    gids: HashSet<Gid>,
    hub_sessions: usize,
    hub_sessions_of: HashMap<u32, usize>,
    epoll: Epoll,
    doorbell: Doorbell,
    movers: Vec<Mover>,
    next_session: u64,
    hub_connections: u64,
    work: VecDeque<Work>,
    queued: HashSet<Work>,
    timers: BTreeSet<(Instant, Work)>,
    chain: Chain,
    request: Vec<u8>,
}

/// A front-end that connected and has no handler yet.
struct Arrived {
    id: SessionId,
    stream: UnixStream,
}

impl Core {
    /// The session with this number.
    pub fn session(&self, id: SessionId) -> Result<&Session, Refusal> {
        self.sessions.get(&id).ok_or(Refusal::Ended)
    }

    /// The session with this number, to be changed.
    pub fn session_mut(&mut self, id: SessionId) -> Result<&mut Session, Refusal> {
        self.sessions.get_mut(&id).ok_or(Refusal::Ended)
    }

    fn watch(&self, fd: RawFd, source: Source) -> io::Result<()> {
        let what = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(what, source.to_bits()))
    }

    fn unwatch(&self, fd: RawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn queue(&mut self, work: Work) {
        if self.queued.insert(work) {
            self.work.push_back(work);
        }
    }

    fn ring_mut(&mut self, id: SessionId, index: u32) -> Result<&mut crate::session::Ring, Refusal> {
        let rings = &mut self.session_mut(id)?.rings;
        rings.get_mut(index as usize).ok_or(Refusal::Queue(index))
    }

    /// A ring that is not in service, to be changed.
    pub fn idle_ring(&mut self, id: SessionId, index: u32) -> Result<&mut crate::session::Ring, Refusal> {
        let ring = self.ring_mut(id, index)?;
        match ring.service {
            Service::None | Service::Broken => Ok(ring),
            _ => Err(Refusal::Busy(index)),
        }
    }

    /// `SET_FEATURES`.
    pub fn set_features(&mut self, id: SessionId, features: u64) -> Result<(), Refusal> {
        let session = self.session_mut(id)?;
        if features & !session.offered() != 0 {
            return Err(Refusal::Features(features & !session.offered()));
        }
        session.features = features;
        let protocol = vhost::vhost_user::VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & protocol == 0 {
            // Without the protocol features there is no message that enables rings: they are from the start.
            session.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.update_rings(id)
    }

    /// `GET_CONFIG`.
    pub fn config(&self, id: SessionId, offset: usize, size: usize) -> Result<Vec<u8>, Refusal> {
        let Identity { fabric_id, system_eid, copy_plan } = self.identity;
        let config = self.session(id)?.config(fabric_id, system_eid, copy_plan);
        let mut bytes = [0; MAX_CONFIG_SIZE];
        bytes[..CONFIG_SIZE].copy_from_slice(config.as_bytes());
        let range = offset..offset.saturating_add(size);
        bytes.get(range).map(<[u8]>::to_vec).ok_or(Refusal::Config(offset, size))
    }

    /// `SET_VRING_KICK`.
    pub fn set_kick(&mut self, id: SessionId, index: u32, fd: Option<File>) -> Result<(), Refusal> {
        self.ring_mut(id, index)?;
        self.pause_ring(id, index);
        self.ring_mut(id, index)?.kick = fd;
        self.update_rings(id)
    }

    /// `SET_VRING_CALL`.
    pub fn set_call(&mut self, id: SessionId, index: u32, fd: Option<File>) -> Result<(), Refusal> {
        let call = event_file(index, fd)?;
        let session = self.session_mut(id)?;
        let ring = session.rings.get_mut(index as usize).ok_or(Refusal::Queue(index))?;
        ring.call = call.clone();
        match &mut ring.service {
            Service::None | Service::Broken => {}
            Service::Control(vring) => vring.set_call(call),
            Service::Event => session.port.events().set_call(call),
            Service::Move(_, served) => served.queue().set_call(call),
        }
        Ok(())
    }

    /// `SET_VRING_ERR`. It counts from the next start of the ring on.
    pub fn set_err(&mut self, id: SessionId, index: u32, fd: Option<File>) -> Result<(), Refusal> {
        let err = event_file(index, fd)?;
        self.ring_mut(id, index)?.err = err;
        Ok(())
    }

    /// `SET_VRING_ENABLE`.
    pub fn enable_ring(&mut self, id: SessionId, index: u32, enable: bool) -> Result<(), Refusal> {
        self.ring_mut(id, index)?.enabled = enable;
        if enable {
            self.update_rings(id)
        } else {
            self.pause_ring(id, index);
            Ok(())
        }
    }

    /// `GET_VRING_BASE`: ends a ring, and with the control queue the device.
    pub fn stop_ring(&mut self, id: SessionId, index: u32) -> Result<u16, Refusal> {
        self.ring_mut(id, index)?;
        if index == u32::from(CONTROL_QUEUE) {
            self.reset(id, GoneReason::Reset);
        } else {
            self.pause_ring(id, index);
        }
        let ring = self.ring_mut(id, index)?;
        ring.service = Service::None;
        ring.kick = None;
        Ok(ring.base)
    }

    /// `RESET_DEVICE`.
    pub fn reset_device(&mut self, id: SessionId) -> Result<(), Refusal> {
        self.reset(id, GoneReason::Reset);
        for ring in &mut self.session_mut(id)?.rings {
            ring.service = Service::None;
            ring.enabled = false;
            ring.kick = None;
            ring.base = 0;
        }
        Ok(())
    }

    /// Takes a ring out of service.
    fn pause_ring(&mut self, id: SessionId, index: u32) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(ring) = session.rings.get_mut(index as usize) else { return };
        if matches!(ring.service, Service::None | Service::Broken) {
            return;
        }
        let kick = ring.kick.as_ref().map(AsRawFd::as_raw_fd);
        let base = match std::mem::take(&mut ring.service) {
            Service::Move(mover, served) => self.movers[mover].withdraw(served).map(|vring| vring.base()),
            Service::Event => session.port.events().stop().map(|vring| vring.base()),
            Service::Control(vring) => Some(vring.base()),
            Service::None | Service::Broken => None,
        };
        if let Some(base) = base {
            ring.base = base;
        }
        if let Some(kick) = kick.filter(|_| index < u32::from(FIRST_MOVE_QUEUE)) {
            self.unwatch(kick);
        }
    }

    /// Puts every ring into service that is ready for it: the control queue first, because it starts the device.
    pub fn update_rings(&mut self, id: SessionId) -> Result<(), Refusal> {
        let session = self.session(id)?;
        if !session.accepted().contains(Features::VERSION_1) {
            return Ok(());
        }
        for index in 0..session.rings.len() {
            let session = self.session(id)?;
            if session.rings[index].ready() && (index == 0 || session.device.is_some()) {
                self.start_ring(id, index as u32)?;
            }
        }
        Ok(())
    }

    fn start_ring(&mut self, id: SessionId, index: u32) -> Result<(), Refusal> {
        let refuse = |error| Refusal::Descriptor(index, error);
        let session = self.sessions.get_mut(&id).ok_or(Refusal::Ended)?;
        let features = session.accepted();
        let ring = session.rings.get_mut(index as usize).ok_or(Refusal::Queue(index))?;
        let kick = ring.kick.as_ref().ok_or(Refusal::Queue(index))?.as_raw_fd();
        let vring = match ring.vring(&session.port, features) {
            Ok(vring) => vring,
            Err(broken) => {
                tracing::warn!(device = %session.name, queue = index, "{broken}; the queue is not served");
                ring.fail();
                return Ok(());
            }
        };
        let port = session.port.clone();
        if index >= u32::from(FIRST_MOVE_QUEUE) {
            let mover = (id.0 as usize + index as usize) % self.movers.len();
            let served = self.movers[mover].serve(port, &session.limits, vring, kick).map_err(refuse)?;
            ring.service = Service::Move(mover, served);
            return Ok(());
        }
        self.watch(kick, Source::Kick(id, index as u16)).map_err(refuse)?;
        let session = self.session_mut(id)?;
        let ring = &mut session.rings[index as usize];
        if index == u32::from(EVENT_QUEUE) {
            ring.service = Service::Event;
            let mut events = port.events();
            let memory = port.memory.read();
            events.start(vring, &memory);
        } else {
            ring.service = Service::Control(Box::new(vring));
            if session.device.is_none() {
                self.start(id)?;
            }
            self.resume_after_pause(id);
            self.queue(Work::Commands(id));
        }
        Ok(())
    }

    /// The driver started the device.
    fn start(&mut self, id: SessionId) -> Result<(), Refusal> {
        let session = self.sessions.get_mut(&id).ok_or(Refusal::Ended)?;
        let device = self.fabric.join(Joining {
            gid: session.gid,
            group: session.group.clone(),
            limits: session.limits,
            capabilities: session.capabilities(),
            port: session.port.clone(),
        });
        session.device = Some(device);
        self.started.insert(device, id);
        tracing::debug!(device = %session.name, gid = %session.gid, "started");
        let mut outcomes = Vec::new();
        if let Some(channel) = &mut session.channel {
            channel.open(Instant::now(), &mut outcomes);
        }
        self.map_outcomes(outcomes);
        Ok(())
    }

    /// Ends what the device is and has in the fabric (`docs/device.md`, 11). Nothing writes into its memory afterwards.
    fn reset(&mut self, id: SessionId, reason: GoneReason) {
        let Some(session) = self.sessions.get(&id) else { return };
        for index in (0..session.rings.len() as u32).rev() {
            self.pause_ring(id, index);
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.suspended = None;
        if let Some(channel) = &mut session.channel {
            channel.close();
        }
        if let Some(device) = session.device.take() {
            tracing::debug!(device = %session.name, gid = %session.gid, ?reason, "stopped");
            let port = session.port.clone();
            self.started.remove(&device);
            self.fabric.leave(device, reason);
            port.events().clear();
        }
    }

    /// Serves commands, for one turn.
    fn serve_commands(&mut self, id: SessionId) {
        for turn in 0.. {
            let Some(session) = self.sessions.get_mut(&id) else { return };
            let Service::Control(_) = session.rings[0].service else { return };
            if session.suspended.is_some() {
                break;
            }
            let now = Instant::now();
            if let Some(when) = session.throttle.wait(now) {
                self.timers.insert((when, Work::Commands(id)));
                break;
            }
            if turn == TURN {
                self.queue(Work::Commands(id));
                break;
            }
            match self.next_command(id) {
                Ok(true) => {}
                Ok(false) => break,
                Err(broken) => return self.break_control(id, &broken),
            }
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Service::Control(vring) = &mut session.rings[0].service else { return };
        let notified = vring.notify(session.port.memory.read().guest());
        session.port.check_memory();
        if let Err(broken) = notified {
            self.break_control(id, &broken);
        }
    }

    fn break_control(&mut self, id: SessionId, broken: &Broken) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        tracing::warn!(device = %session.name, queue = "control", "{broken}; the queue is stopped");
        // A ring whose memory has vanished reads as zeroes, and cannot be followed either.
        session.port.check_memory();
        let kick = session.rings[0].kick.as_ref().map(AsRawFd::as_raw_fd);
        session.rings[0].fail();
        if let Some(kick) = kick {
            self.unwatch(kick);
        }
    }

    /// Does one command. False if there is none.
    fn next_command(&mut self, id: SessionId) -> Result<bool, Broken> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(false) };
        let Service::Control(vring) = &mut session.rings[0].service else { return Ok(false) };
        let Some(device) = session.device else { return Ok(false) };
        let chain = &mut self.chain;
        {
            let memory = session.port.memory.read();
            vring.disable_kicks(memory.guest())?;
            if !vring.pop(memory.guest(), chain)? {
                return Ok(vring.enable_kicks(memory.guest())?);
            }
            session.throttle.count(Instant::now());
            if chain.malformed
                || !chain.takes_response(&memory, HEADER_SIZE)
                || !read_request(&memory, chain, session.limits.max_segments, &mut self.request)
            {
                vring.push(memory.guest(), chain.head, 0)?;
                return Ok(true);
            }
        }
        let fits = |command: Command| {
            let body = self.request.len() >= HEADER_SIZE + command.body_size();
            let size = HEADER_SIZE + command.reply_size();
            if body && chain.takes_response(&session.port.memory.read(), size) {
                Ok(())
            } else {
                Err(Status::Invalid)
            }
        };
        let request = Command::parse(&self.request)
            .and_then(fits)
            .and_then(|()| Request::parse(&self.request, session.limits.max_segments));
        let result = match request {
            Ok(request) => self.fabric.execute(device, &request, Attempt::First),
            Err(status) => Some(Err(status)),
        };
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(false) };
        match result {
            Some(result) => answer(session, &self.chain, result)?,
            None => {
                session.suspended = Some(Suspended {
                    request: self.request.clone(),
                    head: self.chain.head,
                    writable: self.chain.writable.clone(),
                    answer: None,
                });
            }
        }
        self.settle();
        Ok(true)
    }

    /// Goes on with the command that waited.
    fn resume(&mut self, device: DeviceId, attempt: Attempt) {
        let Some(&id) = self.started.get(&device) else { return };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(mut suspended) = session.suspended.take() else { return };
        if !matches!(session.rings[0].service, Service::Control(_)) {
            suspended.answer = Some(attempt);
            session.suspended = Some(suspended);
            return;
        }
        let result = match Request::parse(&suspended.request, session.limits.max_segments) {
            Ok(request) => self.fabric.execute(device, &request, attempt),
            Err(status) => Some(Err(status)),
        };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(result) = result else {
            session.suspended = Some(suspended);
            return;
        };
        let chain = Chain { head: suspended.head, writable: suspended.writable, ..Chain::default() };
        if let Err(broken) = answer(session, &chain, result) {
            self.break_control(id, &broken);
        }
        self.queue(Work::Commands(id));
    }

    /// The control queue is served again: what came meanwhile for the command that waits is taken up.
    fn resume_after_pause(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let attempt = session.suspended.as_mut().and_then(|suspended| suspended.answer.take());
        if let (Some(attempt), Some(device)) = (attempt, session.device) {
            self.resume(device, attempt);
        }
    }

    /// Does what the fabric left to be done, and what follows from it.
    fn settle(&mut self) {
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

    fn map_outcomes(&mut self, outcomes: Vec<MapOutcome>) {
        for outcome in outcomes {
            self.fabric.mapped(&outcome);
        }
    }

    fn watch_deadline(&mut self, id: SessionId) {
        let channel = self.sessions.get(&id).and_then(|s| s.channel.as_ref());
        if let Some(when) = channel.and_then(Channel::deadline) {
            self.timers.insert((when, Work::Expire(id)));
        }
    }

    /// The backend channel may have something to say.
    fn read_channel(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(channel) = &mut session.channel else { return };
        let mut outcomes = Vec::new();
        if let Err(error) = channel.receive(Instant::now(), &mut outcomes) {
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

    fn expire(&mut self, id: SessionId) {
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
    fn take_channel(&mut self, id: SessionId, socket: BorrowedFd<'_>) -> io::Result<()> {
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
        let mut channel = Channel::new(stream.into());
        let mut outcomes = Vec::new();
        if let Some(mut old) = session.channel.take() {
            old.fail(&mut outcomes);
        }
        if session.device.is_some() {
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

    /// Takes the connections that wait at a listener.
    fn accept(&mut self, number: usize, arrived: &mut Vec<Arrived>) {
        loop {
            let Some(listener) = self.listeners.get(number) else { return };
            let socket = match listener {
                Listener::Device { number, .. } if self.configured[*number].session.is_some() => return,
                Listener::Device { socket, .. } | Listener::Hub { socket, .. } => socket,
            };
            match socket.accept() {
                Ok((stream, _)) => {
                    let result = match listener {
                        Listener::Device { number, .. } => self.admit_configured(*number, stream),
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
                Err(error) => {
                    tracing::warn!("a connection cannot be taken: {error}");
                    self.timers.insert((Instant::now() + ACCEPT_AGAIN, Work::Accept(number)));
                    return;
                }
            }
        }
    }

    fn admit_configured(&mut self, number: usize, stream: UnixStream) -> io::Result<Option<Arrived>> {
        let device = &self.configured[number];
        let (name, group, gid, limits) =
            (device.name.clone(), device.group.clone(), device.gid, device.limits);
        let peer = PeerCredentials::of(&stream).ok();
        let arrived = self.admit(Origin::Configured(number), name, group, gid, limits, peer, stream)?;
        self.configured[number].session = Some(arrived.id);
        Ok(Some(arrived))
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
        let limits = hub.limits;
        let gid = self.fresh_gid()?;
        self.hub_connections += 1;
        let name = format!("hub-{}", self.hub_connections).into();
        let uid = peer.uid;
        let arrived = self.admit(Origin::Hub, name, group.into(), gid, limits, Some(peer), stream)?;
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
        peer: Option<PeerCredentials>,
        stream: UnixStream,
    ) -> io::Result<Arrived> {
        stream.set_nonblocking(false)?;
        self.next_session += 1;
        let id = SessionId(self.next_session);
        self.watch(stream.as_raw_fd(), Source::Socket(id))?;
        tracing::debug!(device = %name, %gid, %group, "a front-end connected");
        let port = Arc::new(Port::new(id, self.doorbell.clone()));
        self.gids.insert(gid);
        self.sessions.insert(id, Session::new(name, origin, peer, gid, group, limits, port));
        self.queue(Work::Read(id));
        Ok(Arrived { id, stream })
    }

    fn fresh_gid(&self) -> io::Result<Gid> {
        fresh_gid(&self.gids)
    }

    /// Ends a session. Its socket is closed with its handler.
    fn end(&mut self, id: SessionId, reason: GoneReason) {
        self.reset(id, reason);
        let Some(session) = self.sessions.remove(&id) else { return };
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
                if let Some(peer) = session.peer {
                    if let Some(count) = self.hub_sessions_of.get_mut(&peer.uid) {
                        *count -= 1;
                        if *count == 0 {
                            self.hub_sessions_of.remove(&peer.uid);
                        }
                    }
                }
            }
        }
    }

    fn report(&self) -> Report {
        report::report(self)
    }
}

#[path = "control_report.rs"]
mod report;

/// A GID that nobody has.
fn fresh_gid(taken: &HashSet<Gid>) -> io::Result<Gid> {
    loop {
        let gid = Gid::from_u64(getrandom::u64().map_err(io::Error::other)?);
        if !gid.is_none() && !taken.contains(&gid) {
            return Ok(gid);
        }
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn event_file(index: u32, fd: Option<File>) -> Result<Option<Arc<EventFile>>, Refusal> {
    let file = fd.map(EventFile::new).transpose().map_err(|error| Refusal::Descriptor(index, error))?;
    Ok(file.map(Arc::new))
}

/// Copies what the device may need of a command's readable bytes. False if that is not all guest memory.
fn read_request(
    memory: &crate::memory::DeviceMemory,
    chain: &Chain,
    max_segments: u32,
    request: &mut Vec<u8>,
) -> bool {
    const SEGMENT: usize = 16;
    let most = HEADER_SIZE + Command::Register.body_size() + SEGMENT * max_segments as usize;
    request.clear();
    for piece in &chain.readable {
        let at = request.len();
        let len = (piece.len as usize).min(most - at);
        request.resize(at + len, 0);
        if len != 0 && !memory.read(piece.addr, &mut request[at..]) {
            return false;
        }
    }
    true
}

/// Answers a command.
fn answer(session: &mut Session, chain: &Chain, result: Result<Reply, Status>) -> Result<(), Broken> {
    let Service::Control(vring) = &mut session.rings[0].service else { return Ok(()) };
    let response = Response::from(result);
    let memory = session.port.memory.read();
    let len = if chain.respond(&memory, response.as_bytes()) { response.as_bytes().len() } else { 0 };
    session.commands += 1;
    vring.push(memory.guest(), chain.head, len as u32)
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

/// The control thread's own: the state, and the handlers, which reach into it.
pub struct Control {
    core: Rc<RefCell<Core>>,
    handlers: HashMap<SessionId, BackendReqHandler<Handler>>,
    inbox: Inbox,
}

/// What a control thread is made of; it is put together in the thread, because it stays there.
#[derive(Debug)]
pub struct Setup {
    /// For configuration spaces.
    pub identity: Identity,
    /// The fabric, empty.
    pub fabric: Fabric,
    /// The threads that move.
    pub movers: Vec<Mover>,
    /// The configured devices, with their listening sockets or connections.
    pub devices: Vec<(DeviceSettings, Entrance)>,
    /// The hub.
    pub hub: Option<(HubSettings, Socket)>,
    /// How to reach the thread.
    pub doorbell: Doorbell,
    /// Where it is reached.
    pub inbox: Inbox,
}

/// How the front-end of a configured device comes.
#[derive(Debug)]
pub enum Entrance {
    /// It connects here.
    Socket(Socket),
    /// It is connected.
    Stream(UnixStream),
}

impl Control {
    /// Puts everything together and watches everything.
    pub fn new(setup: Setup) -> io::Result<Control> {
        let Setup { identity, fabric, movers, devices, hub, doorbell, inbox } = setup;
        let mut core = Core {
            identity,
            fabric,
            sessions: HashMap::new(),
            started: HashMap::new(),
            configured: Vec::new(),
            listeners: Vec::new(),
            gids: devices.iter().filter_map(|(device, _)| device.gid).collect(),
            hub_sessions: 0,
            hub_sessions_of: HashMap::new(),
            epoll: Epoll::new()?,
            doorbell,
            movers,
            next_session: 0,
            hub_connections: 0,
            work: VecDeque::new(),
            queued: HashSet::new(),
            timers: BTreeSet::new(),
            chain: Chain::default(),
            request: Vec::new(),
        };
        core.watch(inbox.as_raw_fd(), Source::Inbox)?;
        let mut arrived = Vec::new();
        for (number, (device, entrance)) in devices.into_iter().enumerate() {
            let gid = match device.gid {
                Some(gid) => gid,
                None => core.fresh_gid()?,
            };
            core.gids.insert(gid);
            let DeviceSettings { name, group, limits, .. } = device;
            core.configured.push(Configured {
                name: name.into(),
                group: group.into(),
                gid,
                limits,
                session: None,
                listener: None,
            });
            match entrance {
                Entrance::Stream(stream) => arrived.extend(core.admit_configured(number, stream)?),
                Entrance::Socket(socket) => {
                    core.configured[number].listener = Some(core.listeners.len());
                    core.listen(socket, |socket| Listener::Device { number, socket })?;
                }
            }
        }
        if let Some((hub, socket)) = hub {
            core.listen(socket, |socket| Listener::Hub { hub, socket })?;
        }
        let mut control = Control { core: Rc::new(RefCell::new(core)), handlers: HashMap::new(), inbox };
        control.add_handlers(arrived);
        Ok(control)
    }

    fn add_handlers(&mut self, arrived: Vec<Arrived>) {
        for Arrived { id, stream } in arrived {
            #[expect(
                clippy::arc_with_non_send_sync,
                reason = "`vhost` asks for an Arc; it stays in this thread"
            )]
            let handler = Arc::new(Handler::new(self.core.clone(), id));
            self.handlers.insert(id, BackendReqHandler::from_stream(stream, handler));
        }
    }

    /// Serves until it is told to stop or nothing is left to serve.
    pub fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 128];
        loop {
            let timeout = self.core.borrow().timeout();
            // Nobody else holds the core while this thread waits.
            let waited = self.core.borrow().epoll.wait(timeout, &mut events);
            let count = match waited {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error),
            };
            for event in &events[..count] {
                match Source::from_bits(event.data()) {
                    Some(Source::Inbox) => {
                        if self.read_inbox() {
                            return Ok(());
                        }
                    }
                    Some(source) => self.core.borrow_mut().notice(source),
                    None => {}
                }
            }
            self.work();
            if self.core.borrow().is_idle_for_good() {
                return Ok(());
            }
        }
    }

    /// True if it is time to stop.
    fn read_inbox(&mut self) -> bool {
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Stop => return true,
                Message::Report(asker) => {
                    let _ = asker.send(self.core.borrow().report());
                }
                Message::Expel(id, why) => {
                    if let Some(session) = self.core.borrow().sessions.get(&id) {
                        tracing::warn!(device = %session.name, "expelled: {why}");
                    }
                    self.end(id, GoneReason::Expelled);
                }
            }
        }
        false
    }

    fn work(&mut self) {
        self.core.borrow_mut().due();
        let turns = self.core.borrow().work.len();
        for _ in 0..turns {
            let work = {
                let mut core = self.core.borrow_mut();
                let Some(work) = core.work.pop_front() else { return };
                core.queued.remove(&work);
                work
            };
            match work {
                Work::Read(id) => self.read(id),
                Work::Commands(id) => self.core.borrow_mut().serve_commands(id),
                Work::Expire(id) => self.core.borrow_mut().expire(id),
                Work::Accept(number) => {
                    let mut arrived = Vec::new();
                    self.core.borrow_mut().accept(number, &mut arrived);
                    self.add_handlers(arrived);
                }
            }
        }
    }

    /// Reads messages of a front-end, for one turn.
    fn read(&mut self, id: SessionId) {
        for _ in 0..TURN {
            let Some(handler) = self.handlers.get_mut(&id) else { return };
            // SAFETY: the handler owns the socket and lives through the borrow.
            let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
            let result = match gate::look(socket) {
                Ok(Arrival::Nothing) => return,
                Ok(Arrival::End) => return self.end(id, GoneReason::Left),
                Ok(Arrival::Message(code)) if code == u32::from(FrontendReq::SET_BACKEND_REQ_FD) => self
                    .core
                    .borrow_mut()
                    .take_channel(id, socket)
                    .map_err(|error| format!("SET_BACKEND_REQ_FD: {error}")),
                Ok(Arrival::Message(_)) => match handler.handle_request() {
                    Err(VhostError::Disconnected) => return self.end(id, GoneReason::Left),
                    Err(VhostError::SocketBroken(_)) => return self.end(id, GoneReason::Left),
                    result => result.map_err(|error| error.to_string()),
                },
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = result {
                if let Some(session) = self.core.borrow().sessions.get(&id) {
                    tracing::warn!(device = %session.name, "expelled: {why}");
                }
                return self.end(id, GoneReason::Expelled);
            }
            self.core.borrow_mut().settle();
        }
        self.core.borrow_mut().queue(Work::Read(id));
    }

    fn end(&mut self, id: SessionId, reason: GoneReason) {
        let Some(handler) = self.handlers.remove(&id) else { return };
        let mut core = self.core.borrow_mut();
        core.unwatch(handler.as_raw_fd());
        core.end(id, reason);
        core.settle();
    }
}

impl Core {
    fn listen(&mut self, socket: Socket, listener: impl FnOnce(Socket) -> Listener) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        self.watch(socket.as_fd().as_raw_fd(), Source::Listener(self.listeners.len()))?;
        self.listeners.push(listener(socket));
        Ok(())
    }

    /// Something happened.
    fn notice(&mut self, source: Source) {
        match source {
            Source::Inbox => {}
            Source::Listener(number) => self.queue(Work::Accept(number)),
            Source::Socket(id) => self.queue(Work::Read(id)),
            Source::Channel(id) => self.read_channel(id),
            Source::Kick(id, ring) if ring == EVENT_QUEUE => {
                if let Some(session) = self.sessions.get(&id) {
                    session.port.flush_events();
                    session.port.check_memory();
                }
            }
            Source::Kick(id, _) => self.queue(Work::Commands(id)),
        }
    }

    /// Queues what is due.
    fn due(&mut self) {
        let now = Instant::now();
        while let Some((when, work)) = self.timers.first().copied() {
            if when > now {
                return;
            }
            self.timers.pop_first();
            self.queue(work);
        }
    }

    /// How long there is nothing to do, in milliseconds, rounded up.
    fn timeout(&self) -> i32 {
        if !self.work.is_empty() {
            return 0;
        }
        let Some((when, _)) = self.timers.first() else { return -1 };
        let left = when.saturating_duration_since(Instant::now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    /// Nobody is connected, and nobody can connect.
    fn is_idle_for_good(&self) -> bool {
        self.listeners.is_empty() && self.sessions.is_empty()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Handlers and core hold each other.
        for id in self.handlers.keys().copied().collect::<Vec<_>>() {
            self.end(id, GoneReason::Left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_survives_epoll() {
        let id = SessionId((1 << 44) - 1);
        for source in [
            Source::Inbox,
            Source::Listener(7),
            Source::Socket(id),
            Source::Channel(id),
            Source::Kick(id, u16::MAX),
        ] {
            assert_eq!(Source::from_bits(source.to_bits()), Some(source));
        }
    }
}
