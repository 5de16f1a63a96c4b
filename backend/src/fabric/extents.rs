//! Extents: made for a pair, mapped into its windows, unmapped, given back (`docs/device.md`, 8).

use super::device::{Slot, SlotState};
use super::{Attempt, DeviceId, Effect, Extent, Fabric};
use crate::frontend::{MapOutcome, MapRequest};
use crate::placement::Placement;
use crate::placement::pages::Policy;
use crate::pool::PoolError;
use crate::pool::lines::Want;
use crate::pool::memfile::Borrower;
use dmbridge_proto::event::{Event, ExtentInfo};
use dmbridge_proto::extent::Geometry;
use dmbridge_proto::ids::{ExtentId, Gid};
use dmbridge_proto::status::Status;

fn info(extent: ExtentId, slot: &Slot) -> ExtentInfo {
    ExtentInfo { gid: slot.other, extent, owned: slot.owned, offset: slot.offset, size: slot.size }
}

impl Fabric {
    /// An extent of this owner for this peer that is mapped and has room for a DMB.
    pub(super) fn find_room(
        &self,
        owner: DeviceId,
        peer: DeviceId,
        size: u64,
        lines: Want,
    ) -> Option<ExtentId> {
        let state = self.devices.get(&owner)?;
        let mut extents = state.pairs.get(&peer)?.iter().rev().copied();
        extents.find(|id| {
            state.slots.get(id).is_some_and(|slot| slot.state == SlotState::Mapped)
                && self.extents.get(id).is_some_and(|e| e.memory.fits(size, lines))
        })
    }

    /// Makes an extent with room for a DMB and asks the owner's front-end to map it.
    pub(super) fn add_extent(
        &mut self,
        owner: DeviceId,
        peer: DeviceId,
        peer_gid: Gid,
        size: u64,
    ) -> Result<ExtentId, Status> {
        let geometry = self.choose_size(owner, peer, size)?;
        let (placement, policy) = self.choose_place(owner, peer);
        let memory =
            self.pool.take(geometry, &policy, |id| self.extents.contains_key(&id)).map_err(|error| {
                if let PoolError::Host(error) = &error {
                    tracing::warn!("no extent of {} bytes: {error}", geometry.size());
                }
                Status::NoMemory
            })?;
        let id = memory.id();
        let file = memory.file().clone();
        let state = self.devices.get_mut(&owner).ok_or(Status::NoEntry)?;
        let Some(slot) = state.take_slot(id, geometry.size(), true, peer_gid) else {
            self.pool.give(memory);
            return Err(Status::NoSpace);
        };
        state.extents.insert(id);
        state.pairs.entry(peer).or_default().push(id);
        if let Some(peer) = self.devices.get_mut(&peer) {
            peer.foreign.insert(id);
        }
        self.extents.insert(id, Extent { memory, owner, peer, peer_gid, placement, condemned: false });
        self.effects.push(Effect::Ask(MapRequest {
            device: owner,
            extent: id,
            file: Some((Some(file), Borrower::Owner)),
            offset: slot.offset,
            len: slot.size,
        }));
        Ok(id)
    }

    /// As much as the pair has already, so that its extents stay few; less if there is no room for that, and no more
    /// than the owner's quota can still fill.
    fn choose_size(&self, owner: DeviceId, peer: DeviceId, need: u64) -> Result<Geometry, Status> {
        let state = self.devices.get(&owner).ok_or(Status::NoEntry)?;
        let least = Geometry::with_room_for(need)
            .and_then(|g| Geometry::new(g.size().max(self.pool.unit())))
            .ok_or(Status::NoSpace)?;
        let extents = state.pairs.get(&peer).into_iter().flatten();
        let has: u64 =
            extents.filter_map(|id| self.extents.get(id)).map(|e| e.memory.geometry().size()).sum();
        let quota = state.device.limits.max_dmb_bytes - state.registered_bytes;
        let most = has.min(quota.next_power_of_two()).max(least.size());
        let mut size = 1 << most.ilog2();
        loop {
            if state.has_room(size, true) && size <= self.pool.free_bytes() {
                return Geometry::new(size).ok_or(Status::NoSpace);
            }
            if size <= least.size() {
                return Err(if state.has_room(size, true) { Status::NoMemory } else { Status::NoSpace });
            }
            size /= 2;
        }
    }

    /// On which NUMA nodes an extent of this pair is to lie, from where the two are now.
    fn choose_place(&mut self, owner: DeviceId, peer: DeviceId) -> (Placement, Policy) {
        let topology = &self.topology;
        let mut locate = |id| self.devices.get_mut(&id).and_then(|state| state.device.locate(topology));
        let (owner_at, peer_at) = (locate(owner), locate(peer));
        let own = self.devices.get(&owner).and_then(|state| state.device.numa.placement);
        let placement = own.unwrap_or(self.pool.settings().placement);
        (placement, placement.policy(topology, owner_at, peer_at))
    }

    /// Asks the peer's front-end to map an extent. The place, or why there is none.
    pub(super) fn map_at_peer(&mut self, id: ExtentId) -> Result<(), Status> {
        let extent = self.extents.get(&id).ok_or(Status::NoEntry)?;
        let owner_gid = self.devices.get(&extent.owner).ok_or(Status::NoEntry)?.device.gid;
        let peer = self.devices.get_mut(&extent.peer).ok_or(Status::NoEntry)?;
        if !peer.device.capabilities.map {
            return Err(Status::NotSupported);
        }
        let size = extent.memory.geometry().size();
        let slot = peer.take_slot(id, size, false, owner_gid).ok_or(Status::NoSpace)?;
        self.effects.push(Effect::Ask(MapRequest {
            device: extent.peer,
            extent: id,
            file: Some((Some(extent.memory.file().clone()), Borrower::Peer)),
            offset: slot.offset,
            len: slot.size,
        }));
        Ok(())
    }

    /// A front-end answered, or did not in time.
    pub fn mapped(&mut self, outcome: &MapOutcome) {
        let MapOutcome { request, done } = outcome;
        let (id, extent) = (request.device, request.extent);
        let Some(state) = self.devices.get_mut(&id) else { return };
        let Some(slot) = state.slots.get_mut(&extent) else { return };
        let mut result = if *done { Ok(()) } else { Err(Status::Io) };
        match (slot.state, *done) {
            (SlotState::Mapping, true) => {
                slot.state = SlotState::Mapped;
                let event = Event::ExtentAdded(info(extent, slot));
                let owned = slot.owned;
                let _ = state.device.port.tell(event);
                if owned && self.extents.get(&extent).is_some_and(|e| e.peer != e.owner) {
                    // Without a place there, the peer moves.
                    let _ = self.map_at_peer(extent);
                }
            }
            (SlotState::Mapping, false) => {
                let slot = state.refuse_slot(extent);
                if slot.is_some_and(|slot| slot.owned) {
                    self.end_extent(extent);
                }
            }
            (SlotState::Doomed, true) => {
                self.unmap(id, extent);
                // The command is executed again, and finds that the other device is gone.
                result = Ok(());
            }
            (SlotState::Doomed, false) => {
                state.give_slot(extent);
                result = Ok(());
            }
            (SlotState::Unmapping, true) => {
                if let Some(slot) = state.give_slot(extent) {
                    let _ = state.device.port.tell(Event::ExtentRemoved(info(extent, &slot)));
                }
            }
            // What the front-end does not unmap stays there until reset, and its place in the window with it.
            (SlotState::Unmapping, false) | (SlotState::Mapped, _) => {}
        }
        if let Some(state) = self.devices.get_mut(&id)
            && request.file.is_some()
            && state.waiting_for == Some(extent)
        {
            state.waiting_for = None;
            self.effects.push(Effect::Resume(id, Attempt::After(result)));
        }
    }

    /// Takes an extent out of a device's window.
    fn unmap(&mut self, device: DeviceId, extent: ExtentId) {
        let Some(state) = self.devices.get_mut(&device) else { return };
        let Some(slot) = state.slots.get_mut(&extent) else { return };
        match slot.state {
            SlotState::Mapping => slot.state = SlotState::Doomed,
            SlotState::Mapped | SlotState::Doomed => {
                slot.state = SlotState::Unmapping;
                self.effects.push(Effect::Ask(MapRequest {
                    device,
                    extent,
                    file: None,
                    offset: slot.offset,
                    len: slot.size,
                }));
            }
            SlotState::Unmapping => {}
        }
    }

    /// Ends an extent in which no DMB is: it leaves both windows, and its memory goes back.
    pub(super) fn end_extent(&mut self, id: ExtentId) {
        let Some(extent) = self.extents.remove(&id) else { return };
        self.unmap(extent.owner, id);
        self.unmap(extent.peer, id);
        if let Some(owner) = self.devices.get_mut(&extent.owner) {
            owner.extents.remove(&id);
            if let Some(pair) = owner.pairs.get_mut(&extent.peer) {
                pair.retain(|e| *e != id);
                if pair.is_empty() {
                    owner.pairs.remove(&extent.peer);
                }
            }
        }
        if let Some(peer) = self.devices.get_mut(&extent.peer) {
            peer.foreign.remove(&id);
        }
        // A front-end may still have it mapped, for as long as it pleases: the pages go now.
        extent.memory.file().release();
        self.pool.give(extent.memory);
    }
}
