//! The fabric in the book: what has changed is written down, and another worker makes the same of it again.

use super::device::{Device, Indices, Slot, SlotState, State};
use super::rendezvous::Waiting;
use super::{DeviceId, Dmb, Extent, Fabric, Joining};
use crate::keep::{Heirs, KeepError, Kept, record, text};
use crate::placement::Placement;
use crate::placement::pages::Policy;
use crate::pool::Place;
use crate::pool::memfile::MemFile;
use crate::port::{Home, RamSegment, SessionId, Target};
use crate::topology::NodeId;
use dmbridge_proto::extent::Geometry;
use dmbridge_proto::ids::{ExtentId, Gid, Place as Named, Token};
use std::collections::{HashMap, HashSet};

use std::sync::Arc;

/// What the book says of a fabric.
#[derive(Debug, Default)]
pub struct Entries {
    pub(crate) devices: HashMap<u64, record::Device>,
    pub(crate) slots: HashMap<(u64, u32), record::Slot>,
    pub(crate) extents: HashMap<u32, record::Extent>,
    pub(crate) dmbs: HashMap<u64, record::Dmb>,
    pub(crate) keys: Vec<record::Key>,
}

impl Fabric {
    /// From now on what changes is remembered, for [`write_down`](Self::write_down). There is no device yet.
    pub fn track(&mut self) {
        self.devices.track();
        self.extents.track();
        self.dmbs.track();
        self.keys.0.track();
        self.emptied = Some(Vec::new());
    }

    /// The numbers that were used last: of devices, extents and RAM DMBs.
    pub fn counters(&self) -> (u64, u32, u64) {
        (self.next_device, self.pool.last_id(), self.next_ram_token)
    }

    /// Puts into the book what has changed since the last time.
    pub fn write_down(&mut self, kept: &mut Kept, session_of: &HashMap<DeviceId, SessionId>) {
        for (device, extent) in self.emptied.as_mut().map(std::mem::take).into_iter().flatten() {
            kept.remove(&format!("slot/{}/{}", device.0, extent.get()));
        }
        for id in self.devices.take_changed() {
            let name = format!("device/{}", id.0);
            let slots = self.devices.get_mut_untracked(&id).map(|state| state.slots.take_changed());
            let Some(state) = self.devices.get(&id) else {
                kept.remove(&name);
                continue;
            };
            for extent in slots.into_iter().flatten() {
                let name = format!("slot/{}/{}", id.0, extent.get());
                match state.slots.get(&extent) {
                    Some(slot) => kept.put(&name, &text(&slot.record()), &[]),
                    None => kept.remove(&name),
                }
            }
            if let Some(session) = session_of.get(&id) {
                kept.put(&name, &text(&state.record(*session)), &[]);
            }
        }
        for id in self.extents.take_changed() {
            let name = format!("extent/{}", id.get());
            match self.extents.get(&id) {
                Some(extent) => {
                    let file = extent.memory.file();
                    kept.put(&name, &text(&extent.record()), &[(file.number(), file.fd())]);
                }
                None => kept.remove(&name),
            }
        }
        for token in self.dmbs.take_changed() {
            let name = format!("dmb/{}", token.to_bits());
            match self.dmbs.get(&token) {
                Some(dmb) => kept.put(&name, &text(&dmb.record()), &[]),
                None => kept.remove(&name),
            }
        }
        for at in self.keys.0.take_changed() {
            let hex: String = at.1.iter().map(|byte| format!("{byte:02x}")).collect();
            let name = format!("key/{}/{hex}", at.0);
            match self.keys.0.get(&at) {
                Some(Waiting { device, tag, payload }) => {
                    let (group, key) = (at.0.to_string(), at.1);
                    let key = record::Key { group, key, device: device.0, tag: *tag, payload: *payload };
                    kept.put(&name, &text(&key), &[]);
                }
                None => kept.remove(&name),
            }
        }
    }

    /// Makes the fabric that another worker wrote down. `join` tells of a device what is not written down with it.
    pub fn restore(
        &mut self,
        entries: Entries,
        global: &record::Global,
        heirs: &Heirs,
        mut join: impl FnMut(&record::Device) -> Option<Joining>,
    ) -> Result<(), KeepError> {
        self.next_device = devices_end(&entries, global);
        self.next_ram_token = global.next_ram_token;
        self.pool.set_last_id(global.next_extent);
        let Entries { devices, slots, extents, dmbs, keys } = entries;
        for (number, device) in devices {
            let what = || format!("device/{number}");
            device.limits.check().map_err(|error| KeepError::Entry(what(), error.to_string()))?;
            let joining = join(&device).ok_or_else(|| wrong(what(), "it has no session"))?;
            let id = DeviceId(number);
            let mut state = State::new(Device::new(id, joining), self.pool.unit());
            state.slots.track();
            state.device.locate(&self.topology);
            state.lifeline = device.lifeline;
            state.waiting_for = device.waiting_for.and_then(ExtentId::new);
            for (offset, size) in device.refused {
                if size == 0 || !state.window.take_at(offset, size) {
                    return Err(wrong(what(), "a place that was refused is none"));
                }
                state.refused.push_back((offset, size));
            }
            self.by_gid.insert(state.device.gid, id);
            self.devices.insert(id, state);
        }
        let mut places: HashMap<ExtentId, Vec<Place>> = HashMap::new();
        for (bits, dmb) in &dmbs {
            if dmb.size == 0 {
                return Err(wrong(format!("dmb/{bits}"), "it is empty"));
            }
            if let (Named::Extent { extent, line, generation }, record::Home::Pool { offset, private_line }) =
                (Token::from_bits(*bits).place(), &dmb.home)
            {
                let (offset, size, private_line) = (*offset, dmb.size, *private_line);
                places.entry(extent).or_default().push(Place {
                    offset,
                    size,
                    line,
                    generation,
                    private_line,
                });
            }
        }
        let mut extents: Vec<_> = extents.into_iter().collect();
        // In the order in which they were made: those of a pair are kept like this.
        extents.sort_by_key(|(number, _)| number.wrapping_sub(global.next_extent).wrapping_sub(1));
        for (number, extent) in extents {
            self.restore_extent(number, extent, &mut places, heirs)?;
        }
        for ((device, extent), slot) in slots {
            let what = || format!("slot/{device}/{extent}");
            let state =
                self.devices.get_mut(&DeviceId(device)).ok_or_else(|| wrong(what(), "there is no device"))?;
            let extent = ExtentId::new(extent).ok_or_else(|| wrong(what(), "there is no such extent"))?;
            let slot = Slot::from_record(&slot);
            if slot.size == 0 || !state.window.take_at(slot.offset, slot.size) {
                return Err(wrong(what(), "its place in the window is not free"));
            }
            if !slot.owned {
                state.foreign_bytes += slot.size;
                state.foreign_count += 1;
            }
            state.slots.insert(extent, slot);
        }
        for (bits, dmb) in dmbs {
            self.restore_dmb(Token::from_bits(bits), dmb, &places)?;
        }
        for (_, state) in self.devices.iter_mut_untracked() {
            let owned = state.dmbs.iter().filter_map(|token| self.dmbs.get(token));
            let taken: HashSet<u32> = owned.filter(|dmb| dmb.registered).map(|dmb| dmb.index).collect();
            let limits = &state.device.limits;
            if taken.iter().any(|index| *index >= limits.max_dmbs)
                || state.registered_bytes > limits.max_dmb_bytes
            {
                return Err(wrong(format!("device/{}", state.device.id.0), "it has more than it may"));
            }
            state.indices = Indices::without(&taken);
        }
        for record::Key { group, key, device, tag, payload } in keys {
            let device = DeviceId(device);
            let state =
                self.devices.get_mut(&device).ok_or_else(|| wrong("key".into(), "there is no device"))?;
            state.keys += 1;
            self.keys.0.insert((Arc::from(group), key), Waiting { device, tag, payload });
        }
        Ok(())
    }

    fn restore_extent(
        &mut self,
        number: u32,
        extent: record::Extent,
        places: &mut HashMap<ExtentId, Vec<Place>>,
        heirs: &Heirs,
    ) -> Result<(), KeepError> {
        let wrong = |why| wrong(format!("extent/{number}"), why);
        let id = ExtentId::new(number).ok_or_else(|| wrong("it has no such number"))?;
        let geometry = Geometry::new(extent.size).ok_or_else(|| wrong("it has no such size"))?;
        let placement = placement(&extent.placement).ok_or_else(|| wrong("its placement is unknown"))?;
        let file = heirs.take(extent.fd)?.into();
        // The kernel remembers the policy itself; for reports it is worked out again.
        let policy = placement.policy(&self.topology, None, None);
        let policy = if self.topology.is_single() { Policy::FirstTouch } else { policy };
        let file = MemFile::adopt(file, extent.size, extent.huge, policy, extent.fd)
            .map_err(|_| wrong("its file is no extent"))?;
        let taken = places.get(&id).map_or(&[][..], Vec::as_slice);
        let memory = self
            .pool
            .adopt(id, geometry, file, extent.generation, taken)
            .ok_or_else(|| wrong("its DMBs overlap"))?;
        let (owner, peer) = (DeviceId(extent.owner), DeviceId(extent.peer));
        let state = self.devices.get_mut(&owner).ok_or_else(|| wrong("it has no owner"))?;
        state.extents.insert(id);
        state.pairs.entry(peer).or_default().push(id);
        if let Some(peer) = self.devices.get_mut(&peer) {
            peer.foreign.insert(id);
        }
        let peer_gid = Gid::from_bytes(extent.peer_gid);
        let condemned = extent.condemned;
        self.extents.insert(id, Extent { memory, owner, peer, peer_gid, placement, condemned });
        Ok(())
    }

    fn restore_dmb(
        &mut self,
        token: Token,
        dmb: record::Dmb,
        places: &HashMap<ExtentId, Vec<Place>>,
    ) -> Result<(), KeepError> {
        let wrong = |why| wrong(format!("dmb/{}", token.to_bits()), why);
        let record::Dmb { index, size, attached, registered, .. } = dmb;
        let (owner, peer) = (DeviceId(dmb.owner), DeviceId(dmb.peer));
        let (home, place) = match (dmb.home, token.place()) {
            (record::Home::Pool { .. }, Named::Extent { extent, line, generation }) => {
                let found = places.get(&extent).into_iter().flatten();
                let mut found = found.filter(|p| p.line == line && p.generation == generation);
                let place = *found.next().ok_or_else(|| wrong("it has no place"))?;
                let extent_entry = self.extents.get(&extent).ok_or_else(|| wrong("it has no extent"))?;
                if (extent_entry.owner, extent_entry.peer) != (owner, peer) {
                    return Err(wrong("its extent is another pair's"));
                }
                let file = extent_entry.memory.file().clone();
                (
                    Home::Pool { file, offset: place.offset, line_offset: place.line_offset() },
                    Some((extent, place)),
                )
            }
            (record::Home::Ram { line_addr, segments }, Named::Ram) => {
                let is_whole = |len: &u64| *len != 0 && len.is_multiple_of(8);
                let sum = segments
                    .iter()
                    .try_fold(0u64, |sum, (_, len)| sum.checked_add(*len).filter(|_| is_whole(len)));
                if registered && sum != Some(size) {
                    return Err(wrong("its pieces are not what it is"));
                }
                let mut offset = 0u64;
                let segments = segments.into_iter().map(|(addr, len)| {
                    let segment = RamSegment { offset, addr, len };
                    offset = offset.saturating_add(len);
                    segment
                });
                (Home::Ram { line_addr, segments: segments.collect() }, None)
            }
            _ => return Err(wrong("its token names another place")),
        };
        let state = self.devices.get_mut(&owner).ok_or_else(|| wrong("it has no owner"))?;
        state.dmbs.insert(token);
        if registered {
            state.registered += 1;
            state.registered_bytes = state.registered_bytes.saturating_add(size);
        }
        let port = state.device.port.clone();
        let peer_gid = Gid::from_bytes(dmb.peer_gid);
        let target = Arc::new(Target::new(token, index, size, peer_gid, port, home));
        match self.devices.get_mut(&peer) {
            Some(state) => {
                state.incoming.insert(token);
                if attached {
                    state.attached.insert(token);
                }
                if registered {
                    state.device.port.add_target(target.clone());
                }
            }
            None => target.close(),
        }
        if !registered {
            target.close();
        }
        self.dmbs.insert(token, Dmb { owner, peer, index, size, place, target, attached, registered });
        Ok(())
    }

    /// All DMBs that can be written to.
    pub fn targets(&self) -> impl Iterator<Item = &Target> {
        self.dmbs.values().filter(|dmb| dmb.registered).map(|dmb| &*dmb.target)
    }

    /// The memory of an extent.
    pub fn extent_file(&self, id: ExtentId) -> Option<&Arc<MemFile>> {
        self.extents.get(&id).map(|extent| extent.memory.file())
    }

    /// The extents in a device's window, whose memory a front-end tells as its own.
    pub fn files_in_window(&self, id: DeviceId) -> impl Iterator<Item = &Arc<MemFile>> {
        let slots = self.devices.get(&id).into_iter().flat_map(|state| state.slots.keys());
        slots.filter_map(|extent| self.extent_file(*extent))
    }
}

/// No device has a greater number.
fn devices_end(entries: &Entries, global: &record::Global) -> u64 {
    entries.devices.keys().copied().max().unwrap_or(0).max(global.next_device)
}

fn wrong(name: String, why: &str) -> KeepError {
    KeepError::Entry(name, why.into())
}

fn placement(text: &str) -> Option<Placement> {
    Some(match text {
        "receiver" => Placement::Receiver,
        "sender" => Placement::Sender,
        "interleave" => Placement::Interleave,
        node => Placement::Node(NodeId::new(node.parse().ok()?)?),
    })
}

impl State {
    fn record(&self, session: SessionId) -> record::Device {
        let Device { limits, capabilities, .. } = self.device;
        record::Device {
            session: session.0,
            limits,
            map: capabilities.map,
            ram: capabilities.ram,
            futex: capabilities.futex,
            rendezvous: capabilities.rendezvous,
            private_line: capabilities.private_line,
            lifeline: self.lifeline,
            waiting_for: self.waiting_for.map(ExtentId::get),
            refused: self.refused.iter().copied().collect(),
        }
    }
}

impl Slot {
    fn record(&self) -> record::Slot {
        record::Slot {
            offset: self.offset,
            size: self.size,
            owned: self.owned,
            other: self.other.to_bytes(),
            state: match self.state {
                SlotState::Mapping => record::SlotState::Mapping,
                SlotState::Doomed => record::SlotState::Doomed,
                SlotState::Mapped => record::SlotState::Mapped,
                SlotState::Unmapping => record::SlotState::Unmapping,
            },
        }
    }

    fn from_record(slot: &record::Slot) -> Slot {
        Slot {
            offset: slot.offset,
            size: slot.size,
            owned: slot.owned,
            other: Gid::from_bytes(slot.other),
            state: match slot.state {
                record::SlotState::Mapping => SlotState::Mapping,
                record::SlotState::Doomed => SlotState::Doomed,
                record::SlotState::Mapped => SlotState::Mapped,
                record::SlotState::Unmapping => SlotState::Unmapping,
            },
        }
    }
}

impl Extent {
    fn record(&self) -> record::Extent {
        let file = self.memory.file();
        record::Extent {
            fd: file.number(),
            size: file.size(),
            huge: file.is_huge(),
            owner: self.owner.0,
            peer: self.peer.0,
            peer_gid: self.peer_gid.to_bytes(),
            placement: self.placement.to_string(),
            condemned: self.condemned,
            generation: self.memory.highest_generation(),
        }
    }
}

impl Dmb {
    fn record(&self) -> record::Dmb {
        let home = match (&self.place, &*self.target.open()) {
            (Some((_, place)), _) => {
                record::Home::Pool { offset: place.offset, private_line: place.private_line }
            }
            (None, Some(Home::Ram { line_addr, segments })) => record::Home::Ram {
                line_addr: *line_addr,
                segments: segments.iter().map(|segment| (segment.addr, segment.len)).collect(),
            },
            // Closed: nobody writes there any more.
            (None, _) => record::Home::Ram { line_addr: 0, segments: Vec::new() },
        };
        record::Dmb {
            owner: self.owner.0,
            peer: self.peer.0,
            peer_gid: self.target.sender.to_bytes(),
            index: self.index,
            size: self.size,
            attached: self.attached,
            registered: self.registered,
            home,
        }
    }
}
