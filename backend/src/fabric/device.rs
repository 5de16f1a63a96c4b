//! A started device, as the fabric knows it.

use super::Fabric;
use crate::placement::NumaSettings;
use crate::placement::locate::{Whereabouts, locate};
use crate::pool::ranges::Ranges;
use crate::port::Port;
use crate::settings::Limits;
use crate::topology::Topology;
use crate::tracked::Tracked;
use dmbridge_proto::ids::{ExtentId, Gid, Token};
use dmbridge_proto::line::LineStats;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A device from start to reset. Never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u64);

#[cfg(test)]
impl DeviceId {
    /// Any device.
    pub fn for_tests(number: u64) -> DeviceId {
        DeviceId(number)
    }
}

/// What driver and front-end of a device can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// The front-end can map, and the driver wants it to.
    pub map: bool,
    /// The driver registers DMBs in its own memory.
    pub ram: bool,
    /// The driver can wait on and wake a futex.
    pub futex: bool,
    /// The driver meets others by keys.
    pub rendezvous: bool,
    /// Its driver may ask for control lines that are alone in their page.
    pub private_line: bool,
}

/// What a device brings along when it is started.
#[derive(Debug)]
pub struct Joining {
    /// Its name for others.
    pub gid: Gid,
    /// The devices that it can see are those of the same group.
    pub group: Arc<str>,
    /// What it may use.
    pub limits: Limits,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Its memory and queues.
    pub port: Arc<Port>,
    /// On which NUMA node it is, and its extents are to lie.
    pub numa: NumaSettings,
    /// Process id of its front-end; 0 if it is not known.
    pub pid: i32,
}

/// A started device.
#[derive(Debug)]
pub struct Device {
    /// Its name here.
    pub id: DeviceId,
    /// Its name for others.
    pub gid: Gid,
    /// Its group.
    pub group: Arc<str>,
    /// What it may use.
    pub limits: Limits,
    /// What it can do.
    pub capabilities: Capabilities,
    /// Its memory and queues.
    pub port: Arc<Port>,
    /// On which NUMA node it is, and its extents are to lie.
    pub numa: NumaSettings,
    pid: i32,
    /// Where it was when somebody looked last.
    pub whereabouts: Option<Whereabouts>,
    /// When that was.
    looked: Instant,
}

impl Device {
    pub(super) fn new(id: DeviceId, joining: Joining) -> Device {
        let Joining { gid, group, limits, capabilities, port, numa, pid } = joining;
        let looked = Instant::now();
        Device { id, gid, group, limits, capabilities, port, numa, pid, whereabouts: None, looked }
    }

    /// Looks where it is now: it may have moved. No lock of its memory may be held.
    pub(super) fn locate(&mut self, topology: &Topology) -> Option<Whereabouts> {
        self.whereabouts = locate(topology, self.numa.node, &self.port.memory.read(), self.pid);
        self.port.set_node(self.whereabouts.map(|at| at.node));
        self.looked = Instant::now();
        self.whereabouts
    }

    /// How long ago that was.
    pub(super) fn since_located(&self) -> Duration {
        self.looked.elapsed()
    }
}

/// What a started device uses; for people.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// DMBs that it owns.
    pub dmbs: u32,
    /// Their sizes together, in bytes.
    pub dmb_bytes: u64,
    /// DMBs of others that it has attached.
    pub attached: u32,
    /// Extents in its window.
    pub extents: u32,
    /// Their sizes together, in bytes.
    pub mapped_bytes: u64,
    /// Signals as counted in the control lines of the DMBs that it writes or wrote.
    pub signals: LineStats,
}

/// Adds what guests counted: any numbers.
pub(super) fn sum(a: LineStats, b: LineStats) -> LineStats {
    LineStats { rung: a.rung.saturating_add(b.rung), suppressed: a.suppressed.saturating_add(b.suppressed) }
}

/// An extent's place in a device's window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    pub offset: u64,
    pub size: u64,
    pub owned: bool,
    pub other: Gid,
    pub state: SlotState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SlotState {
    /// The front-end was asked to map it.
    Mapping,
    /// As before, and the extent is gone meanwhile.
    Doomed,
    /// It is there.
    Mapped,
    /// The front-end was asked to unmap it.
    Unmapping,
}

/// Numbers for DMBs: the lowest that is free.
#[derive(Debug, Default)]
pub(super) struct Indices {
    free: BinaryHeap<Reverse<u32>>,
    next: u32,
}

impl Indices {
    /// All but these are free.
    pub fn without(taken: &HashSet<u32>) -> Indices {
        let next = taken.iter().max().map_or(0, |last| last + 1);
        Indices { free: (0..next).filter(|index| !taken.contains(index)).map(Reverse).collect(), next }
    }

    pub fn take(&mut self) -> u32 {
        match self.free.pop() {
            Some(Reverse(index)) => index,
            None => {
                self.next += 1;
                self.next - 1
            }
        }
    }

    pub fn give(&mut self, index: u32) {
        self.free.push(Reverse(index));
    }
}

/// Refused places in the window that are set aside at most.
const MOST_REFUSED: usize = 8;

/// A started device and everything that it has in the fabric.
#[derive(Debug)]
pub(super) struct State {
    pub device: Device,
    /// What of the window is free, in bytes; extents are multiples of the pool's unit.
    pub window: Ranges,
    /// Places that the front-end refused lately, and their sizes: the next attempts are made elsewhere, because something may still be
    /// in use there.
    pub refused: VecDeque<(u64, u64)>,
    /// Extents in the window.
    pub slots: Tracked<ExtentId, Slot>,
    /// Bytes and number of those of which it is the peer only: others chose them, so they get no more than half.
    pub foreign_bytes: u64,
    pub foreign_count: u32,
    /// Extents that it owns, by peer.
    pub pairs: HashMap<DeviceId, Vec<ExtentId>>,
    /// Extents that it owns.
    pub extents: HashSet<ExtentId>,
    /// Extents of which it is the peer.
    pub foreign: HashSet<ExtentId>,
    /// DMBs that it owns, and those that it unregistered and their peer has still attached.
    pub dmbs: HashSet<Token>,
    /// Registered DMBs: number, bytes, indices.
    pub registered: u32,
    pub registered_bytes: u64,
    pub indices: Indices,
    /// DMBs of which it is the peer.
    pub incoming: HashSet<Token>,
    /// Those of them that it has attached.
    pub attached: HashSet<Token>,
    /// What was counted in the lines of DMBs that it wrote and that have ended.
    pub past_signals: LineStats,
    /// Guest address of a word that tells whether the driver lives.
    pub lifeline: Option<u64>,
    /// The extent that its control queue waits for.
    pub waiting_for: Option<ExtentId>,
    /// Its keys that wait for another device.
    pub keys: u32,
}

impl State {
    pub fn new(device: Device, unit: u64) -> State {
        let window = if device.capabilities.map { device.limits.window_size / unit * unit } else { 0 };
        State {
            device,
            window: Ranges::new(0, window),
            refused: VecDeque::new(),
            slots: Tracked::default(),
            foreign_bytes: 0,
            foreign_count: 0,
            pairs: HashMap::new(),
            extents: HashSet::new(),
            foreign: HashSet::new(),
            dmbs: HashSet::new(),
            registered: 0,
            registered_bytes: 0,
            indices: Indices::default(),
            incoming: HashSet::new(),
            attached: HashSet::new(),
            past_signals: LineStats::default(),
            lifeline: None,
            waiting_for: None,
            keys: 0,
        }
    }

    /// Whether an extent of this size has a place in the window.
    pub fn has_room(&self, size: u64, owned: bool) -> bool {
        let limits = &self.device.limits;
        (self.slots.len() as u64) < u64::from(limits.max_mappings)
            && self.window.fits(size)
            && (owned
                || (self.foreign_count < limits.max_mappings.div_ceil(2)
                    && self.foreign_bytes + size <= limits.window_size / 2))
    }

    /// Takes a place in the window.
    pub fn take_slot(&mut self, extent: ExtentId, size: u64, owned: bool, other: Gid) -> Option<Slot> {
        if !self.has_room(size, owned) {
            return None;
        }
        let offset = self.window.take(size)?;
        if !owned {
            self.foreign_bytes += size;
            self.foreign_count += 1;
        }
        let slot = Slot { offset, size, owned, other, state: SlotState::Mapping };
        self.slots.insert(extent, slot);
        Some(slot)
    }

    /// Gives a place in the window back.
    pub fn give_slot(&mut self, extent: ExtentId) -> Option<Slot> {
        let slot = self.remove_slot(extent)?;
        self.window.give(slot.offset, slot.size);
        Some(slot)
    }

    /// The front-end refused a place in the window: it is set aside for a while.
    pub fn refuse_slot(&mut self, extent: ExtentId) -> Option<Slot> {
        let slot = self.remove_slot(extent)?;
        self.refused.push_back((slot.offset, slot.size));
        // A small window cannot do without.
        let most = if self.window.fits(slot.size) { MOST_REFUSED } else { 0 };
        while self.refused.len() > most {
            let Some((offset, size)) = self.refused.pop_front() else { break };
            self.window.give(offset, size);
        }
        Some(slot)
    }

    fn remove_slot(&mut self, extent: ExtentId) -> Option<Slot> {
        let slot = self.slots.remove(&extent)?;
        if !slot.owned {
            self.foreign_bytes -= slot.size;
            self.foreign_count -= 1;
        }
        Some(slot)
    }

    pub fn usage(&self, fabric: &Fabric) -> Usage {
        // What is being unmapped is there until the front-end says that it is not.
        let is_there = |slot: &&Slot| matches!(slot.state, SlotState::Mapped | SlotState::Unmapping);
        let mapped = self.slots.values().filter(is_there);
        let (extents, mapped_bytes) = mapped.fold((0, 0), |(n, bytes), s| (n + 1, bytes + s.size));
        let lines = self.incoming.iter().filter_map(|token| {
            let dmb = fabric.dmbs.get(token)?;
            let (extent, place) = dmb.place.as_ref()?;
            Some(fabric.extents.get(extent)?.memory.file().line(place.line_offset()).stats())
        });
        Usage {
            dmbs: self.registered,
            dmb_bytes: self.registered_bytes,
            attached: self.attached.len() as u32,
            extents,
            mapped_bytes,
            signals: lines.fold(self.past_signals, sum),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_index_is_taken() {
        let mut indices = Indices::default();
        assert_eq!([indices.take(), indices.take(), indices.take()], [0, 1, 2]);
        indices.give(2);
        indices.give(0);
        assert_eq!([indices.take(), indices.take(), indices.take()], [0, 2, 3]);
    }
}
