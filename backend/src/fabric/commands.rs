//! What the commands of the control queue do (`docs/device.md`, 6): their errors in the order of the tables.

use super::device::SlotState;
use super::{DeviceId, Dmb, Fabric};
use crate::pool::lines::Want;
use crate::port::{Home as TargetHome, RamSegment, Target};
use dmbridge_proto::control::{
    AttachReply, Home, PairFlags, Register, RegisterReply, Reply, Request, SignalEvent,
};
use dmbridge_proto::event::Event;
use dmbridge_proto::extent::LINE_SIZE;
use dmbridge_proto::ids::{ExtentId, Gid, Token};
use dmbridge_proto::status::Status;
use std::sync::Arc;

/// Which attempt at a command it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attempt {
    /// The first.
    First,
    /// The command waited for its front-end; this is what came of it.
    After(Result<(), Status>),
}

impl Fabric {
    /// Executes a command of a device. `None`: it has to wait for its front-end; a
    /// [`Resume`](super::Effect::Resume) says when it is to be executed again.
    pub fn execute(
        &mut self,
        id: DeviceId,
        request: &Request<'_>,
        attempt: Attempt,
    ) -> Option<Result<Reply, Status>> {
        match request {
            Request::QueryGid(gid) => Some(self.query(id, *gid).map(Reply::QueryGid)),
            Request::Register(register) => {
                finished(self.register(id, register, attempt).map(|wait| wait.map(Reply::Register)))
            }
            Request::Unregister(token) => Some(self.unregister(id, *token).map(|()| Reply::Done)),
            Request::Attach(token) => {
                finished(self.attach(id, *token, attempt).map(|wait| wait.map(Reply::Attach)))
            }
            Request::Detach(token) => Some(self.detach(id, *token).map(|()| Reply::Done)),
            Request::SignalEvent(event) => Some(self.signal_event(id, event).map(|()| Reply::Done)),
            Request::Rendezvous(request) => Some(self.rendezvous(id, request).map(Reply::Rendezvous)),
            Request::CancelRendezvous(key) => Some(self.cancel_rendezvous(id, key).map(|()| Reply::Done)),
            Request::Lifeline(addr) => Some(self.set_lifeline(id, *addr).map(|()| Reply::Done)),
        }
    }

    /// What two devices can do with each other.
    fn pair_flags(&self, a: DeviceId, b: DeviceId) -> PairFlags {
        let mut flags = PairFlags::empty();
        if let (Some(a), Some(b)) = (self.devices.get(&a), self.devices.get(&b)) {
            flags.set(PairFlags::FUTEX, a.device.capabilities.futex && b.device.capabilities.futex);
        }
        flags
    }

    fn query(&self, id: DeviceId, gid: Gid) -> Result<PairFlags, Status> {
        let state = self.devices.get(&id).ok_or(Status::NoEntry)?;
        let other = &self.find(&state.device.group, gid).ok_or(Status::NoEntry)?.device;
        let mut flags = self.pair_flags(id, other.id);
        flags.set(PairFlags::MAP, other.capabilities.map);
        Ok(flags)
    }

    fn register(
        &mut self,
        id: DeviceId,
        register: &Register<'_>,
        attempt: Attempt,
    ) -> Result<Wait<RegisterReply>, Status> {
        let state = self.devices.get(&id).ok_or(Status::NoEntry)?;
        let device = &state.device;
        let limits = device.limits;
        if register.size > limits.max_dmb_size {
            return Err(Status::TooBig);
        }
        let able = match register.home {
            Home::Pool => device.capabilities.map,
            Home::PoolPrivate => device.capabilities.map && device.capabilities.private_line,
            Home::Ram { .. } => device.capabilities.ram,
        };
        if !able {
            return Err(Status::NotSupported);
        }
        let peer = &self.find(&device.group, register.rgid).ok_or(Status::NoEntry)?.device;
        let (peer_id, peer_gid) = (peer.id, peer.gid);
        let ram = match register.home {
            Home::Pool | Home::PoolPrivate => None,
            Home::Ram { line_addr, segments } => {
                let memory = device.port.memory.read();
                let mut offset = 0;
                let mut pieces = Vec::with_capacity(segments.iter().len());
                for segment in segments.iter() {
                    if !memory.holds(segment.addr, segment.len) {
                        return Err(Status::Fault);
                    }
                    pieces.push(RamSegment { offset, addr: segment.addr, len: segment.len });
                    offset += segment.len;
                }
                if !memory.holds(line_addr, LINE_SIZE) {
                    return Err(Status::Fault);
                }
                Some((line_addr, pieces.into_boxed_slice()))
            }
        };
        if state.registered >= limits.max_dmbs
            || state.registered_bytes.saturating_add(register.size) > limits.max_dmb_bytes
        {
            return Err(Status::Quota);
        }
        // A peer that takes no events could be given more of them by one device after another, without an end.
        if self.devices.get(&peer_id).is_some_and(|peer| peer.device.port.events().is_clogged()) {
            return Err(Status::Again);
        }
        let token = match ram {
            Some((line_addr, segments)) => {
                self.register_ram(id, peer_id, peer_gid, register.size, line_addr, segments)?
            }
            None => {
                let lines =
                    if register.home == Home::PoolPrivate { Want::PrivateLine } else { Want::AnyLine };
                let extent = match (self.find_room(id, peer_id, register.size, lines), attempt) {
                    (Some(extent), _) => extent,
                    (None, Attempt::After(Err(status))) => return Err(status),
                    // The new extent is there and was filled by nobody else: it ended again.
                    (None, Attempt::After(Ok(()))) => return Err(Status::NoSpace),
                    (None, Attempt::First) => {
                        let extent = self.add_extent(id, peer_id, peer_gid, register.size)?;
                        return Ok(self.wait(id, extent));
                    }
                };
                self.register_in(extent, id, peer_id, peer_gid, register.size, lines)?
            }
        };
        self.register_reply(token).map(Wait::Ready)
    }

    fn register_in(
        &mut self,
        extent: ExtentId,
        owner: DeviceId,
        peer: DeviceId,
        peer_gid: Gid,
        size: u64,
        lines: Want,
    ) -> Result<Token, Status> {
        let memory = &mut self.extents.get_mut(&extent).ok_or(Status::NoSpace)?.memory;
        let place = memory.take(size, lines).ok_or(Status::NoSpace)?;
        let home = TargetHome::Pool {
            file: memory.file().clone(),
            offset: place.offset,
            line_offset: place.line_offset(),
        };
        let token = Token::in_extent(extent, place.line, place.generation);
        self.add_dmb(token, owner, peer, peer_gid, size, Some((extent, place)), home)?;
        Ok(token)
    }

    fn register_ram(
        &mut self,
        owner: DeviceId,
        peer: DeviceId,
        peer_gid: Gid,
        size: u64,
        line_addr: u64,
        segments: Box<[RamSegment]>,
    ) -> Result<Token, Status> {
        let port = &self.devices.get(&owner).ok_or(Status::NoEntry)?.device.port;
        if !port.memory.read().write(line_addr, &[0; 16]) {
            return Err(Status::Fault);
        }
        self.next_ram_token += 1;
        let token = Token::in_ram(self.next_ram_token);
        let home = TargetHome::Ram { line_addr, segments };
        self.add_dmb(token, owner, peer, peer_gid, size, None, home)?;
        Ok(token)
    }

    #[expect(clippy::too_many_arguments, reason = "each is one field of what is made")]
    fn add_dmb(
        &mut self,
        token: Token,
        owner: DeviceId,
        peer: DeviceId,
        peer_gid: Gid,
        size: u64,
        place: Option<(ExtentId, crate::pool::Place)>,
        home: TargetHome,
    ) -> Result<(), Status> {
        let state = self.devices.get_mut(&owner).ok_or(Status::NoEntry)?;
        let index = state.indices.take();
        state.registered += 1;
        state.registered_bytes += size;
        state.dmbs.insert(token);
        let port = state.device.port.clone();
        let target = Arc::new(Target::new(token, index, size, peer_gid, port, home));
        let state = self.devices.get_mut(&peer).ok_or(Status::NoEntry)?;
        state.incoming.insert(token);
        state.device.port.add_target(target.clone());
        self.dmbs.insert(
            token,
            Dmb { owner, peer, index, size, place, target, attached: false, registered: true },
        );
        Ok(())
    }

    fn register_reply(&self, token: Token) -> Result<RegisterReply, Status> {
        let dmb = self.dmbs.get(&token).ok_or(Status::NoEntry)?;
        let mut flags = self.pair_flags(dmb.owner, dmb.peer);
        let (mut offset, mut line_offset) = (0, 0);
        if let Some((extent, place)) = &dmb.place {
            let slot = self.slot(dmb.owner, *extent).ok_or(Status::NoSpace)?;
            (offset, line_offset) = (slot.offset + place.offset, slot.offset + place.line_offset());
            flags.set(PairFlags::MAP, self.slot(dmb.peer, *extent).is_some());
            flags.set(PairFlags::PRIVATE_LINE, place.private_line);
        }
        Ok(RegisterReply { token, offset, line_offset, size: dmb.size, index: dmb.index, flags })
    }

    fn slot(&self, device: DeviceId, extent: ExtentId) -> Option<super::device::Slot> {
        self.devices.get(&device).and_then(|state| state.slots.get(&extent)).copied()
    }

    fn unregister(&mut self, id: DeviceId, token: Token) -> Result<(), Status> {
        let dmb = self.dmbs.get_mut(&token).filter(|dmb| dmb.owner == id && dmb.registered);
        let dmb = dmb.ok_or(Status::NoEntry)?;
        dmb.target.close();
        dmb.registered = false;
        let (index, size, peer, attached, place) = (dmb.index, dmb.size, dmb.peer, dmb.attached, dmb.place);
        if let Some((extent, place)) = place
            && let Some(extent) = self.extents.get(&extent)
        {
            extent.memory.retire(&place);
        }
        let owner = self.devices.get_mut(&id).ok_or(Status::NoEntry)?;
        owner.indices.give(index);
        owner.registered -= 1;
        owner.registered_bytes -= size;
        let gid = owner.device.gid;
        if let Some(peer) = self.devices.get(&peer) {
            peer.device.port.remove_target(token);
            if attached {
                let _ = peer.device.port.tell(Event::DmbUnregistered { token, gid });
            }
        }
        if !attached {
            self.release(token);
        }
        Ok(())
    }

    fn attach(&mut self, id: DeviceId, token: Token, attempt: Attempt) -> Result<Wait<AttachReply>, Status> {
        let dmb = self.dmbs.get(&token).filter(|dmb| dmb.peer == id && dmb.registered);
        let dmb = dmb.ok_or(Status::NoEntry)?;
        let state = self.devices.get(&id).ok_or(Status::NoEntry)?;
        let Some((extent, place)) = dmb.place.filter(|_| state.device.capabilities.map) else {
            return Err(Status::NotSupported);
        };
        if dmb.attached {
            return Err(Status::Already);
        }
        let (owner, size) = (dmb.owner, dmb.size);
        let slot = match (state.slots.get(&extent), attempt) {
            (Some(slot), _) if slot.state == SlotState::Mapped => *slot,
            (_, Attempt::After(result)) => return Err(result.err().unwrap_or(Status::Io)),
            (Some(slot), Attempt::First) if slot.state == SlotState::Mapping => {
                return Ok(self.wait(id, extent));
            }
            (Some(_), Attempt::First) => return Err(Status::Io),
            (None, Attempt::First) => {
                self.map_at_peer(extent)?;
                return Ok(self.wait(id, extent));
            }
        };
        let gid = self.devices.get(&owner).ok_or(Status::NoEntry)?.device.gid;
        let mut flags = self.pair_flags(owner, id);
        flags.set(PairFlags::PRIVATE_LINE, place.private_line);
        if let Some(dmb) = self.dmbs.get_mut(&token) {
            dmb.attached = true;
        }
        if let Some(state) = self.devices.get_mut(&id) {
            state.attached.insert(token);
        }
        Ok(Wait::Ready(AttachReply {
            gid,
            offset: slot.offset + place.offset,
            line_offset: slot.offset + place.line_offset(),
            size,
            flags,
        }))
    }

    fn detach(&mut self, id: DeviceId, token: Token) -> Result<(), Status> {
        let state = self.devices.get_mut(&id).ok_or(Status::NoEntry)?;
        if !state.attached.remove(&token) {
            return Err(Status::NoEntry);
        }
        let gid = state.device.gid;
        let dmb = self.dmbs.get_mut(&token).ok_or(Status::NoEntry)?;
        dmb.attached = false;
        if !dmb.registered {
            self.release(token);
        } else if let Some(owner) = self.devices.get(&dmb.owner) {
            let _ = owner.device.port.tell(Event::DmbDetached { index: dmb.index, token, gid });
        }
        Ok(())
    }

    fn signal_event(&self, id: DeviceId, event: &SignalEvent) -> Result<(), Status> {
        let device = &self.devices.get(&id).ok_or(Status::NoEntry)?.device;
        let other = self.find(&device.group, event.rgid).ok_or(Status::NoEntry)?;
        let SignalEvent { code, info, .. } = *event;
        other.device.port.tell(Event::Software { gid: device.gid, code, info }).map_err(|_| Status::Again)
    }

    fn wait<T>(&mut self, id: DeviceId, extent: ExtentId) -> Wait<T> {
        if let Some(state) = self.devices.get_mut(&id) {
            state.waiting_for = Some(extent);
        }
        Wait::Waiting
    }
}

/// What came of a command that may have to wait.
enum Wait<T> {
    Ready(T),
    Waiting,
}

impl<T> Wait<T> {
    fn map<U>(self, f: impl FnOnce(T) -> U) -> Wait<U> {
        match self {
            Wait::Ready(value) => Wait::Ready(f(value)),
            Wait::Waiting => Wait::Waiting,
        }
    }
}

fn finished<T>(result: Result<Wait<T>, Status>) -> Option<Result<T, Status>> {
    match result {
        Ok(Wait::Ready(value)) => Some(Ok(value)),
        Ok(Wait::Waiting) => None,
        Err(status) => Some(Err(status)),
    }
}
