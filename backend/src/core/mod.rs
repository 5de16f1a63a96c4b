//! The state of the control thread: sessions, the fabric, and what is still to be done. What happens to it is in the
//! modules of this one; when, `control.rs` decides.

mod admission;
mod commands;
mod entries;
mod keeping;
mod mapping;
mod pause;
mod report;
mod rings;
mod takeover;

pub use admission::Arrived;
pub use report::Snapshot;

use crate::doorbell::Doorbell;
use crate::engine::set::EngineSet;
use crate::fabric::{DeviceId, Fabric};
use crate::mover::Mover;
use crate::port::SessionId;
use crate::session::{Ring, Session};
use crate::vring::Chain;
use admission::{Configured, Listener};
use dmbridge_proto::EVENT_QUEUE;
use dmbridge_proto::ids::Gid;
use keeping::Keeping;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

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
pub enum Source {
    /// A message of another thread.
    Inbox,
    /// A connection at the listener with this number.
    Listener(usize),
    /// A message of a front-end, or its end.
    Socket(SessionId),
    /// A reply of a front-end, or it has taken a part of a request.
    Channel(SessionId),
    /// A kick of the driver for this queue.
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

    /// What an epoll event's datum stands for.
    pub fn from_bits(bits: u64) -> Option<Source> {
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

/// How often devices are looked for that may have moved to another NUMA node.
const LOCATE: Duration = Duration::from_secs(1);

/// Something to do without waiting for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// Messages of a front-end.
    Read(SessionId),
    /// Commands of a driver.
    Commands(SessionId),
    /// Replies of a front-end that are overdue.
    Expire(SessionId),
    /// Connections.
    Accept(usize),
    /// Whether a device that is paused is still that.
    Watch(SessionId),
    /// On which NUMA nodes the devices are now.
    Locate,
}

/// What the fabric of a daemon is called, for configuration spaces and reports.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// The fabric, below 0xFF00.
    pub fabric_id: u16,
    /// The host's EID.
    pub system_eid: [u8; 32],
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
    /// Makes room for a connection that is only closed, when there are no descriptors left.
    spare: Option<File>,
    /// GIDs that are somebody's, started or not.
    gids: HashSet<Gid>,
    hub_sessions: usize,
    hub_sessions_of: HashMap<u32, usize>,
    epoll: Epoll,
    doorbell: Doorbell,
    movers: Vec<Mover>,
    /// What the movers copy with.
    engines: EngineSet,
    next_session: u64,
    hub_connections: u64,
    work: VecDeque<Work>,
    queued: HashSet<Work>,
    timers: BTreeSet<(Instant, Work)>,
    chain: Chain,
    request: Vec<u8>,
    keeping: Option<Keeping>,
    /// With a keeper: sessions with an answer to give or requests to send, and with events to tell, as soon as that is written down.
    to_perform: HashSet<SessionId>,
    to_release: HashSet<SessionId>,
}

impl Core {
    /// A core with nobody in it. It watches the inbox.
    pub fn new(
        identity: Identity,
        fabric: Fabric,
        movers: Vec<Mover>,
        engines: EngineSet,
        doorbell: Doorbell,
        inbox: RawFd,
    ) -> io::Result<Core> {
        let mut core = Core {
            identity,
            fabric,
            sessions: HashMap::new(),
            started: HashMap::new(),
            configured: Vec::new(),
            listeners: Vec::new(),
            spare: admission::spare(),
            gids: HashSet::new(),
            hub_sessions: 0,
            hub_sessions_of: HashMap::new(),
            epoll: Epoll::new()?,
            doorbell,
            movers,
            engines,
            next_session: 0,
            hub_connections: 0,
            work: VecDeque::new(),
            queued: HashSet::new(),
            timers: BTreeSet::new(),
            chain: Chain::default(),
            request: Vec::new(),
            keeping: None,
            to_perform: HashSet::new(),
            to_release: HashSet::new(),
        };
        core.watch(inbox, Source::Inbox)?;
        if !core.fabric.topology().is_single() {
            core.locate();
        }
        Ok(core)
    }

    /// Looks where devices are that may have moved, now and again.
    pub fn locate(&mut self) {
        self.fabric.locate_again();
        self.timers.insert((Instant::now() + LOCATE, Work::Locate));
    }

    /// The session with this number.
    pub fn session(&self, id: SessionId) -> Result<&Session, Refusal> {
        self.sessions.get(&id).ok_or(Refusal::Ended)
    }

    /// The session with this number, to be changed.
    pub fn session_mut(&mut self, id: SessionId) -> Result<&mut Session, Refusal> {
        self.touch(id);
        self.sessions.get_mut(&id).ok_or(Refusal::Ended)
    }

    fn watch(&self, fd: RawFd, source: Source) -> io::Result<()> {
        let mut what = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        if matches!(source, Source::Channel(_)) {
            // Each time that the front-end takes something.
            what |= EventSet::OUT;
        }
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(what, source.to_bits()))
    }

    fn unwatch(&self, fd: RawFd) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// To be done soon, once.
    pub fn queue(&mut self, work: Work) {
        if self.queued.insert(work) {
            self.work.push_back(work);
        }
    }

    fn ring_mut(&mut self, id: SessionId, index: u32) -> Result<&mut Ring, Refusal> {
        let rings = &mut self.session_mut(id)?.rings;
        rings.get_mut(index as usize).ok_or(Refusal::Queue(index))
    }

    /// Waits for something to happen.
    pub fn wait(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        self.epoll.wait(self.timeout(), events)
    }

    /// Takes the next piece of work.
    pub fn next_work(&mut self) -> Option<Work> {
        let work = self.work.pop_front()?;
        self.queued.remove(&work);
        Some(work)
    }

    /// How much work there is now.
    pub fn backlog(&self) -> usize {
        self.work.len()
    }

    /// Something happened.
    pub fn notice(&mut self, source: Source) {
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
    pub fn due(&mut self) {
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
    pub fn is_idle_for_good(&self) -> bool {
        self.listeners.is_empty() && self.sessions.is_empty()
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
