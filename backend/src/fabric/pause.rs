//! Devices that their front-ends stop and may start again as they were (`docs/device.md`, 11).

use super::device::{SlotState, State};
use super::{DeviceId, Fabric};
use crate::memory::{DeviceMemory, MemoryError};
use crate::pool::memfile::{Borrower, MemFile};
use dmbridge_proto::event::Event;
use dmbridge_proto::ids::ExtentId;
use dmbridge_proto::lifeline;
use dmbridge_proto::status::Status;
use std::collections::HashSet;
use std::sync::Arc;

impl Fabric {
    /// `LIFELINE`.
    pub(super) fn set_lifeline(&mut self, id: DeviceId, addr: u64) -> Result<(), Status> {
        let state = self.devices.get_mut(&id).ok_or(Status::NoEntry)?;
        if !state.device.port.memory.read().holds(addr, size_of::<u32>() as u64) {
            return Err(Status::Fault);
        }
        state.lifeline = Some(addr);
        Ok(())
    }

    /// Whether the driver has said how to know that it lives, and does.
    pub fn is_alive(&self, id: DeviceId) -> bool {
        let Some(state) = self.devices.get(&id) else { return false };
        let mut word = [0; size_of::<u32>()];
        state.lifeline.is_some_and(|addr| state.device.port.memory.read().read(addr, &mut word))
            && lifeline::is_alive(u32::from_le_bytes(word))
    }

    /// Whether the front-end still has everything mapped that it said it had.
    pub fn has_its_mappings(&self, id: DeviceId) -> bool {
        let Some(state) = self.devices.get(&id) else { return false };
        self.lent(state).all(|(borrower, file)| file.is_lent(borrower))
    }

    fn lent<'a>(&'a self, state: &'a State) -> impl Iterator<Item = (Borrower, &'a Arc<MemFile>)> {
        state.slots.iter().filter(|(_, slot)| slot.state == SlotState::Mapped).filter_map(|(id, slot)| {
            let borrower = if slot.owned { Borrower::Owner } else { Borrower::Peer };
            Some((borrower, self.extents.get::<ExtentId>(id)?.memory.file()))
        })
    }

    /// The device's memory table without what is mapped in its window.
    pub fn memory_without_window(&self, id: DeviceId) -> Result<DeviceMemory, MemoryError> {
        let Some(state) = self.devices.get(&id) else { return Ok(DeviceMemory::default()) };
        let lent: Vec<_> = self.lent(state).map(|(_, file)| file).collect();
        state.device.port.memory.read().without_files(|file| lent.iter().any(|lent| lent.is(file)))
    }

    /// The device is stopped, and may go on. Its memory is left alone when this returns.
    pub fn pause(&mut self, id: DeviceId) {
        let Some(state) = self.devices.get(&id) else { return };
        state.device.port.set_paused(true);
        for dmb in state.dmbs.iter().filter_map(|token| self.dmbs.get(token)) {
            dmb.target.settle();
        }
        self.tell_others(state, Event::DevicePaused { gid: state.device.gid });
    }

    /// The device goes on.
    pub fn go_on(&mut self, id: DeviceId) {
        let Some(state) = self.devices.get(&id) else { return };
        state.device.port.set_paused(false);
        self.tell_others(state, Event::DeviceResumed { gid: state.device.gid });
    }

    /// Tells every device with which this one shares a DMB or an extent.
    fn tell_others(&self, state: &State, event: Event) {
        let peers = state.dmbs.iter().filter_map(|token| Some(self.dmbs.get(token)?.peer));
        let owners = state.incoming.iter().filter_map(|token| Some(self.dmbs.get(token)?.owner));
        let of_its_own = state.extents.iter().filter_map(|extent| Some(self.extents.get(extent)?.peer));
        let of_others = state.foreign.iter().filter_map(|extent| Some(self.extents.get(extent)?.owner));
        let others: HashSet<_> = peers.chain(owners).chain(of_its_own).chain(of_others).collect();
        for other in others.into_iter().filter(|other| *other != state.device.id) {
            if let Some(other) = self.devices.get(&other) {
                let _ = other.device.port.tell(event);
            }
        }
    }
}
