//! Keys that wait for a second device (`docs/device.md`, 6.7). Bounded: each device has its quota, and its keys go with it.

use super::{DeviceId, Fabric};
use crate::tracked::Tracked;
use dmbridge_proto::event::Event;
use dmbridge_proto::rendezvous::{Cancel, Key, MAX_RENDEZVOUS, Met, Payload, Rendezvous};
use dmbridge_proto::status::Status;
use std::sync::Arc;

/// The keys that wait.
#[derive(Debug, Default)]
pub(super) struct Keys(pub(super) Tracked<(Arc<str>, Key), Waiting>);

#[derive(Debug)]
pub(super) struct Waiting {
    pub device: DeviceId,
    pub tag: u32,
    pub payload: Payload,
}

impl Fabric {
    pub(super) fn rendezvous(&mut self, id: DeviceId, request: &Rendezvous) -> Result<Met, Status> {
        let state = self.devices.get(&id).ok_or(Status::NoEntry)?;
        if !state.device.capabilities.rendezvous {
            return Err(Status::NotSupported);
        }
        let gid = state.device.gid;
        let at = (state.device.group.clone(), request.key);
        let Some(first) = self.keys.0.get(&at) else {
            if state.keys >= MAX_RENDEZVOUS {
                return Err(Status::Quota);
            }
            let waiting = Waiting { device: id, tag: request.tag, payload: request.payload };
            self.keys.0.insert(at, waiting);
            if let Some(state) = self.devices.get_mut(&id) {
                state.keys += 1;
            }
            return Ok(Met::NOBODY);
        };
        if first.device == id && first.tag == request.tag {
            return Err(Status::Already);
        }
        let met = Met {
            gid: self.devices.get(&first.device).ok_or(Status::NoEntry)?.device.gid,
            payload: first.payload,
        };
        let (device, tag) = (first.device, first.tag);
        let Some(other) = self.devices.get_mut(&device) else { return Err(Status::NoEntry) };
        // Who takes no events would be given ever more of them.
        if other.device.port.events().is_clogged() {
            return Err(Status::Again);
        }
        other.keys -= 1;
        let _ = other.device.port.tell(Event::Rendezvous { gid, tag, payload: request.payload });
        self.keys.0.remove(&at);
        Ok(met)
    }

    pub(super) fn cancel_rendezvous(&mut self, id: DeviceId, cancel: &Cancel) -> Result<(), Status> {
        let state = self.devices.get_mut(&id).ok_or(Status::NoEntry)?;
        let at = (state.device.group.clone(), cancel.key);
        match self.keys.0.get(&at) {
            Some(waiting) if waiting.device == id && waiting.tag == cancel.tag => {
                self.keys.0.remove(&at);
                state.keys -= 1;
                Ok(())
            }
            _ => Err(Status::NoEntry),
        }
    }

    /// A device leaves.
    pub(super) fn forget_keys(&mut self, id: DeviceId, keys: u32) {
        if keys != 0 {
            self.keys.0.retain(|_, waiting| waiting.device != id);
        }
    }
}
