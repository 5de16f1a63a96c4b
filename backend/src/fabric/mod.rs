//! The fabric: who is there, which DMBs there are, who may write them, where they are mapped (`docs/device.md`, 6, 8, 11).
//!
//! It knows started devices only, and belongs to the control thread. It asks nothing of a front-end itself: what is to
//! be asked is left in [`Fabric::effects`], and the answer comes back by [`Fabric::mapped`]. A command that has to wait
//! for one is executed again when it is there; until then nothing is held.

mod commands;
mod device;
mod extents;
pub mod keeping;
mod pause;
mod rendezvous;
#[cfg(test)]
mod tests;

pub use commands::Attempt;
pub use device::{Capabilities, Device, DeviceId, Joining, Usage};

use crate::frontend::MapRequest;
use crate::placement::Placement;
use crate::pool::memfile::MemFile;
use crate::pool::{ExtentMemory, Place, Pool};
use crate::port::Target;
use crate::settings::PoolSettings;
use crate::topology::Topology;
use crate::tracked::Tracked;
use device::State;
use dmbridge_proto::event::{Event, GoneReason};
use dmbridge_proto::ids::{ExtentId, Gid, Token};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// For so long it is believed that a device is where it was.
const LOCATED_FOR: Duration = Duration::from_secs(10);
/// The most devices that are looked at in one go.
const LOCATED_AT_ONCE: usize = 20;

/// What is to be done outside of the fabric.
#[derive(Debug)]
pub enum Effect {
    /// A front-end is to be asked.
    Ask(MapRequest),
    /// The command of this device that waited is to be executed again.
    Resume(DeviceId, Attempt),
}

/// A DMB, from registration until nobody uses its memory any more.
#[derive(Debug)]
struct Dmb {
    owner: DeviceId,
    peer: DeviceId,
    index: u32,
    size: u64,
    /// Where it lies in the pool; `None` for a RAM DMB.
    place: Option<(ExtentId, Place)>,
    target: Arc<Target>,
    /// The peer has it attached.
    attached: bool,
    /// The owner has not unregistered it.
    registered: bool,
}

/// An extent.
#[derive(Debug)]
struct Extent {
    memory: ExtentMemory,
    owner: DeviceId,
    peer: DeviceId,
    peer_gid: Gid,
    placement: Placement,
    /// The peer left: nothing new is put here, and it goes with its last DMB.
    condemned: bool,
}

/// An extent, as people are told of it.
#[derive(Debug, Clone, Copy)]
pub struct ExtentView<'a> {
    /// Its name.
    pub id: ExtentId,
    /// Who reads it.
    pub owner: Gid,
    /// Who writes it.
    pub peer: Gid,
    /// Where its pages were to lie.
    pub placement: Placement,
    /// Its memory.
    pub file: &'a Arc<MemFile>,
}

/// The fabric of one daemon.
#[derive(Debug)]
pub struct Fabric {
    topology: Topology,
    pool: Pool,
    devices: Tracked<DeviceId, State>,
    by_gid: HashMap<Gid, DeviceId>,
    extents: Tracked<ExtentId, Extent>,
    dmbs: Tracked<Token, Dmb>,
    keys: rendezvous::Keys,
    next_device: u64,
    next_ram_token: u64,
    effects: Vec<Effect>,
    /// What was in the windows of devices that left, of which the book does not know it yet.
    emptied: Option<Vec<(DeviceId, ExtentId)>>,
}

impl Fabric {
    /// An empty fabric on this host.
    pub fn new(pool: PoolSettings, topology: Topology) -> Fabric {
        Fabric {
            topology,
            pool: Pool::new(pool),
            devices: Tracked::default(),
            by_gid: HashMap::new(),
            extents: Tracked::default(),
            dmbs: Tracked::default(),
            keys: rendezvous::Keys::default(),
            next_device: 0,
            next_ram_token: 0,
            effects: Vec::new(),
            emptied: None,
        }
    }

    /// The pool.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// The host's NUMA nodes.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// All extents, in no order.
    pub fn extents(&self) -> impl Iterator<Item = ExtentView<'_>> {
        self.extents.iter().filter_map(|(id, extent)| {
            let owner = self.devices.get(&extent.owner)?.device.gid;
            let Extent { memory, peer_gid, placement, .. } = extent;
            Some(ExtentView { id: *id, owner, peer: *peer_gid, placement: *placement, file: memory.file() })
        })
    }

    /// A started device.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.get(&id).map(|state| &state.device)
    }

    /// What a started device uses.
    pub fn usage(&self, id: DeviceId) -> Option<Usage> {
        self.devices.get(&id).map(|state| state.usage(self))
    }

    /// Takes what is to be done outside.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// A device was started. Its GID is nobody else's.
    pub fn join(&mut self, joining: Joining) -> DeviceId {
        self.next_device += 1;
        let id = DeviceId(self.next_device);
        self.by_gid.insert(joining.gid, id);
        let unit = self.pool.unit();
        let mut device = Device::new(id, joining);
        device.locate(&self.topology);
        let mut state = State::new(device, unit);
        if self.emptied.is_some() {
            state.slots.track();
        }
        self.devices.insert(id, state);
        id
    }

    /// Looks where devices are that were looked at long ago: at some of them, because each takes some hundreds of microseconds.
    pub fn locate_again(&mut self) {
        let devices = self.devices.iter_mut_untracked().map(|(_, state)| &mut state.device);
        for device in devices.filter(|device| device.since_located() >= LOCATED_FOR).take(LOCATED_AT_ONCE) {
            device.locate(&self.topology);
        }
    }

    /// The started device of the group that has this GID.
    fn find(&self, group: &str, gid: Gid) -> Option<&State> {
        self.by_gid.get(&gid).and_then(|id| self.devices.get(id)).filter(|d| *d.device.group == *group)
    }

    /// A device was reset or left. Its queues are not served any more. Nothing writes to its memory when this returns.
    pub fn leave(&mut self, id: DeviceId, reason: GoneReason) {
        let Some(mut state) = self.devices.remove(&id) else { return };
        let gid = state.device.gid;
        if self.by_gid.get(&gid) == Some(&id) {
            self.by_gid.remove(&gid);
        }
        self.forget_keys(id, state.keys);
        if let Some(emptied) = &mut self.emptied {
            emptied.extend(state.slots.take_changed().into_iter().map(|extent| (id, extent)));
            emptied.extend(state.slots.keys().map(|extent| (id, *extent)));
        }
        let mut told: HashSet<DeviceId> = HashSet::new();
        for token in std::mem::take(&mut state.dmbs) {
            if let Some(dmb) = self.dmbs.get(&token) {
                told.insert(dmb.peer);
            }
            self.end_dmb(token);
        }
        for token in std::mem::take(&mut state.incoming) {
            if let Some(dmb) = self.dmbs.get(&token) {
                told.insert(dmb.owner);
            }
            self.end_peer(token, &state);
        }
        for extent in std::mem::take(&mut state.extents) {
            if let Some(extent) = self.extents.get(&extent) {
                told.insert(extent.peer);
            }
            self.end_extent(extent);
        }
        for extent in std::mem::take(&mut state.foreign) {
            if let Some(e) = self.extents.get_mut(&extent) {
                told.insert(e.owner);
                e.condemned = true;
                if e.memory.is_empty() {
                    self.end_extent(extent);
                }
            }
        }
        for other in told {
            if let Some(other) = self.devices.get(&other) {
                let _ = other.device.port.tell(Event::DeviceGone { gid, reason });
            }
        }
    }

    /// The owner of a DMB leaves: it ends at once, for everybody.
    fn end_dmb(&mut self, token: Token) {
        let Some(dmb) = self.dmbs.remove(&token) else { return };
        dmb.target.close();
        let stats = dmb.place.as_ref().and_then(|(extent, place)| {
            Some(self.extents.get(extent)?.memory.file().line(place.line_offset()).stats())
        });
        if let Some(peer) = self.devices.get_mut(&dmb.peer) {
            peer.past_signals = device::sum(peer.past_signals, stats.unwrap_or_default());
            peer.device.port.remove_target(token);
            peer.incoming.remove(&token);
            peer.attached.remove(&token);
        }
        if let Some((extent, place)) = dmb.place
            && let Some(extent) = self.extents.get_mut(&extent)
        {
            extent.memory.retire(&place);
            extent.memory.give(&place);
        }
    }

    /// The peer of a DMB leaves: nobody writes it any more. It stays its owner's until that unregisters it.
    fn end_peer(&mut self, token: Token, peer: &State) {
        // In any case: a device that was its own peer would hold itself otherwise.
        peer.device.port.remove_target(token);
        let Some(dmb) = self.dmbs.get_mut(&token) else { return };
        dmb.target.close();
        dmb.attached = false;
        if !dmb.registered {
            self.release(token);
        }
    }

    /// Nobody uses the memory of a DMB any more.
    fn release(&mut self, token: Token) {
        let Some(dmb) = self.dmbs.remove(&token) else { return };
        if let Some(owner) = self.devices.get_mut(&dmb.owner) {
            owner.dmbs.remove(&token);
        }
        if let Some(peer) = self.devices.get_mut(&dmb.peer) {
            peer.incoming.remove(&token);
        }
        let Some((id, place)) = dmb.place else { return };
        let Some(extent) = self.extents.get_mut(&id) else { return };
        if let Some(peer) = self.devices.get_mut(&dmb.peer) {
            let stats = extent.memory.file().line(place.line_offset()).stats();
            peer.past_signals = device::sum(peer.past_signals, stats);
        }
        extent.memory.give(&place);
        if extent.condemned && extent.memory.is_empty() {
            self.end_extent(id);
        }
    }
}
