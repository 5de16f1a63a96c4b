//! What threads share of one front-end: its memory, its event queue, the DMBs that it may write, its counters.
//!
//! Locks are taken in this order, and none twice by one thread: a target's place, the event queue, a memory table. The
//! control thread takes each alone when it writes, so it waits only for the piece of work that is under way.

use crate::doorbell::Doorbell;
use crate::engine::table::Kind;
use crate::events::{Events, Full};
use crate::keep::book::Cell;
use crate::memory::SharedMemory;
use crate::pool::memfile::MemFile;
use crate::topology::NodeId;
use dmbridge_proto::event::Event;
use dmbridge_proto::extent::LINE_SIZE;
use dmbridge_proto::ids::{Gid, Token};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// The number of a front-end's connection, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// What the threads of the daemon share of one front-end.
#[derive(Debug)]
pub struct Port {
    /// Whose it is.
    pub session: SessionId,
    /// The front-end's memory.
    pub memory: SharedMemory,
    /// What the device did for its driver.
    pub counters: Counters,
    /// The kind of engine that copies what the device moves, if that is configured.
    pub engine: Option<Kind>,
    /// The device's NUMA node, as the control thread knows it; none: `u32::MAX`.
    node: AtomicU32,
    events: Mutex<Events>,
    targets: RwLock<HashMap<Token, Arc<Target>>>,
    /// The front-end has stopped the device and may start it again as it was: its memory is left alone meanwhile.
    paused: AtomicBool,
    doorbell: Doorbell,
    /// Where it notes that the book does not know everything of its events.
    told: OnceLock<Told>,
}

/// Ports of whose events the book does not know everything.
pub type Told = Arc<Mutex<HashSet<SessionId>>>;

/// Counts for people. On cache lines of their own, so that devices do not slow each other down.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    /// Moves done.
    pub moves: AtomicU64,
    /// Moves refused.
    pub refused: AtomicU64,
    /// Bytes moved.
    pub bytes: AtomicU64,
    /// Signals for RAM DMBs that woke somebody.
    pub rung: AtomicU64,
    /// Signals for RAM DMBs that had no need to.
    pub suppressed: AtomicU64,
}

impl Counters {
    /// Adds to a counter.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }

    /// Reads a counter.
    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

impl Port {
    /// The port of a new connection, whose moves are copied by `engine` if one is given.
    pub fn new(session: SessionId, doorbell: Doorbell, engine: Option<Kind>) -> Port {
        Port {
            session,
            memory: SharedMemory::default(),
            counters: Counters::default(),
            engine,
            node: AtomicU32::new(u32::MAX),
            events: Mutex::default(),
            targets: RwLock::default(),
            paused: AtomicBool::new(false),
            doorbell,
            told: OnceLock::new(),
        }
    }

    /// Its events are written down before they are told.
    pub fn keep(&self, cell: Cell, told: Told) {
        self.events().keep(cell);
        let _ = self.told.set(told);
    }

    fn note(&self, events: &Events) {
        if let Some(told) = self.told.get().filter(|_| events.has_changed()) {
            told.lock().unwrap_or_else(PoisonError::into_inner).insert(self.session);
        }
    }

    /// The device's NUMA node, if it is known.
    pub fn node(&self) -> Option<NodeId> {
        NodeId::new(self.node.load(Ordering::Relaxed))
    }

    /// Where the device was found, or that it was not.
    pub fn set_node(&self, node: Option<NodeId>) {
        self.node.store(node.map_or(u32::MAX, NodeId::get), Ordering::Relaxed);
    }

    /// The event queue.
    pub fn events(&self) -> MutexGuard<'_, Events> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the device is paused, or not any more.
    pub fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    /// Whether the device is paused.
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// Tells the driver something.
    pub fn tell(&self, event: Event) -> Result<(), Full> {
        let mut events = self.events();
        let memory = self.memory.read();
        let result = events.push(event, &memory);
        self.note(&events);
        if memory.vanished() {
            self.expel();
        }
        result
    }

    /// The driver may have posted buffers for events.
    pub fn flush_events(&self) {
        let mut events = self.events();
        let memory = self.memory.read();
        events.flush(&memory);
        self.note(&events);
    }

    /// Forgets what waits: the device was reset.
    pub fn clear_events(&self) {
        let mut events = self.events();
        events.clear();
        self.note(&events);
    }

    /// What is to be told is written down: tells it.
    pub fn release_events(&self) {
        let mut events = self.events();
        let memory = self.memory.read();
        events.release(&memory);
        self.note(&events);
        if memory.vanished() {
            self.expel();
        }
    }

    /// The DMB with this token, if the device is its peer.
    pub fn target(&self, token: Token) -> Option<Arc<Target>> {
        self.targets.read().unwrap_or_else(PoisonError::into_inner).get(&token).cloned()
    }

    /// From now on the device may move into this DMB.
    pub fn add_target(&self, target: Arc<Target>) {
        self.targets.write().unwrap_or_else(PoisonError::into_inner).insert(target.token, target);
    }

    /// The end of that.
    pub fn remove_target(&self, token: Token) {
        self.targets.write().unwrap_or_else(PoisonError::into_inner).remove(&token);
    }

    /// Asks the control thread to expel the device if some of its memory is gone.
    pub fn check_memory(&self) {
        if self.memory.read().vanished() {
            self.expel();
        }
    }

    fn expel(&self) {
        self.doorbell.expel(self.session, "memory of the front-end has vanished");
    }
}

/// Where a DMB lies.
#[derive(Debug)]
pub enum Home {
    /// In the pool.
    Pool {
        /// Its extent's memory.
        file: Arc<MemFile>,
        /// Offset of the DMB in the extent.
        offset: u64,
        /// Offset of the control line in the extent.
        line_offset: u64,
    },
    /// In its owner's memory.
    Ram {
        /// Guest address of the control line.
        line_addr: u64,
        /// The pieces: offset in the DMB, guest address, length.
        segments: Box<[RamSegment]>,
    },
}

/// A piece of a RAM DMB.
#[derive(Debug, Clone, Copy)]
pub struct RamSegment {
    /// Where it starts in the DMB.
    pub offset: u64,
    /// Guest address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A DMB as its peer's moves see it.
#[derive(Debug)]
pub struct Target {
    /// Its name.
    pub token: Token,
    /// The owner's number for it.
    pub index: u32,
    /// Its size, in bytes.
    pub size: u64,
    /// The peer.
    pub sender: Gid,
    /// The owner.
    pub owner: Arc<Port>,
    home: RwLock<Option<Home>>,
}

impl Target {
    /// An open target.
    pub fn new(token: Token, index: u32, size: u64, sender: Gid, owner: Arc<Port>, home: Home) -> Target {
        Target { token, index, size, sender, owner, home: RwLock::new(Some(home)) }
    }

    /// Where it lies, or `None` if it is closed. While this is held it is not closed, and [`close`](Self::close) waits.
    pub fn open(&self) -> RwLockReadGuard<'_, Option<Home>> {
        self.home.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until what is being written is written.
    pub fn settle(&self) {
        drop(self.home.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// Whether it must not be written now: it lies in the memory of a device that is paused. To be asked while it is
    /// held [open](Self::open).
    pub fn is_paused(&self, home: &Home) -> bool {
        matches!(home, Home::Ram { .. }) && self.owner.is_paused()
    }

    /// Ends it: nothing writes there any more when this returns.
    pub fn close(&self) {
        *self.home.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Home {
    /// Does something with the control line, unless it is not there any more.
    pub fn with_line<T>(
        &self,
        owner: &Port,
        act: impl FnOnce(&dmbridge_proto::line::ControlLine) -> T,
    ) -> Option<T> {
        match self {
            Home::Pool { file, line_offset, .. } => Some(act(file.line(*line_offset))),
            Home::Ram { line_addr, .. } => {
                let memory = owner.memory.read();
                let (ptr, len) = memory.host(*line_addr, LINE_SIZE)?;
                if len < LINE_SIZE || !ptr.addr().is_multiple_of(LINE_SIZE as usize) {
                    return None;
                }
                // SAFETY: aligned, and mapped for 64 bytes as long as the memory table is held; others are guests.
                Some(act(unsafe { dmbridge_proto::line::ControlLine::from_ptr(ptr) }))
            }
        }
    }
}
