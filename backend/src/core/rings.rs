//! Rings of a session, as its front-end describes, starts and stops them; and with the control queue's the device.

use super::{Core, Identity, Refusal, Source, Work};
use crate::copy_plan;
use crate::fabric::Joining;
use crate::notify::EventFile;
use crate::port::SessionId;
use crate::session::{Kick, Ring, Service};
use dmbridge_proto::config::CONFIG_SIZE;
use dmbridge_proto::event::GoneReason;
use dmbridge_proto::features::Features;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;
use vhost::vhost_user::VhostUserVirtioFeatures;
use zerocopy::IntoBytes;

/// The largest configuration space of a virtio device that a front-end may ask for; ours is followed by zeroes.
const MAX_CONFIG_SIZE: usize = 256;

impl Core {
    /// A ring that is not in service, to be changed.
    pub fn idle_ring(&mut self, id: SessionId, index: u32) -> Result<&mut Ring, Refusal> {
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
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & protocol == 0 {
            // Without the protocol features there is no message that enables rings: they are from the start.
            session.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        self.update_rings(id)
    }

    /// `GET_CONFIG`.
    pub fn config(&mut self, id: SessionId, offset: usize, size: usize) -> Result<Vec<u8>, Refusal> {
        if self.session(id)?.paused.is_some() {
            // A virtual machine that is paused reads nothing: a driver begins anew.
            self.reset(id, GoneReason::Reset);
        }
        let Identity { fabric_id, system_eid } = self.identity;
        let config = self.session(id)?.config(fabric_id, system_eid);
        let mut bytes = [0; MAX_CONFIG_SIZE];
        bytes[..CONFIG_SIZE].copy_from_slice(config.as_bytes());
        let range = offset..offset.saturating_add(size);
        bytes.get(range).map(<[u8]>::to_vec).ok_or(Refusal::Config(offset, size))
    }

    /// `SET_VRING_KICK`.
    pub fn set_kick(&mut self, id: SessionId, index: u32, fd: Option<File>) -> Result<(), Refusal> {
        self.ring_mut(id, index)?;
        self.pause_ring(id, index);
        self.ring_mut(id, index)?.kick = fd.map(Kick::new);
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

    /// `GET_VRING_BASE`: stops a ring, and with the control queue the device.
    pub fn stop_ring(&mut self, id: SessionId, index: u32) -> Result<u16, Refusal> {
        self.ring_mut(id, index)?;
        if index == u32::from(CONTROL_QUEUE) {
            self.stop(id);
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
    pub(super) fn pause_ring(&mut self, id: SessionId, index: u32) {
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
            if session.rings[index].ready() && (index == 0 || session.is_running()) {
                let progress = self.progress(session, index as u32);
                if let Some(keeping) = self.keeping.as_mut().filter(|_| index != 0) {
                    if let Some(progress) = progress {
                        progress.forget();
                    }
                    // Nothing of it is used before it is written down that it is.
                    keeping.to_start.push((id, index as u32));
                    continue;
                }
                self.start_ring(id, index as u32)?;
            }
        }
        Ok(())
    }

    pub(super) fn start_ring(&mut self, id: SessionId, index: u32) -> Result<(), Refusal> {
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
            let limits = session.limits;
            let progress = self.progress(self.session(id)?, index);
            let answers =
                progress.as_ref().map(|progress| progress.answers(vring.used())).unwrap_or_default();
            let served =
                self.movers[mover].serve(port, &limits, vring, kick, progress, answers).map_err(refuse)?;
            if let Some(session) = self.sessions.get_mut(&id) {
                session.rings[index as usize].service = Service::Move(mover, served);
            }
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
            if !self.go_on(id) {
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
            limits: session.limits(),
            capabilities: session.capabilities(),
            port: session.port.clone(),
            numa: session.numa,
            pid: session.peer.as_ref().map_or(0, |peer| peer.pid),
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
    pub(super) fn reset(&mut self, id: SessionId, reason: GoneReason) {
        let Some(session) = self.sessions.get(&id) else { return };
        for index in (0..session.rings.len() as u32).rev() {
            self.pause_ring(id, index);
        }
        self.leave(id, reason);
    }

    /// As [`reset`](Self::reset), when no queue is served.
    pub(super) fn leave(&mut self, id: SessionId, reason: GoneReason) {
        self.touch(id);
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.suspended = None;
        session.answer = None;
        session.paused = None;
        session.port.set_paused(false);
        if let Some(channel) = &mut session.channel {
            channel.close();
        }
        if let Some(device) = session.device.take() {
            tracing::debug!(device = %session.name, gid = %session.gid, ?reason, "stopped");
            session.copy_plan = copy_plan::current();
            let port = session.port.clone();
            self.started.remove(&device);
            self.fabric.leave(device, reason);
            port.clear_events();
        }
    }
}

fn event_file(index: u32, fd: Option<File>) -> Result<Option<Arc<EventFile>>, Refusal> {
    let file = fd.map(EventFile::new).transpose().map_err(|error| Refusal::Descriptor(index, error))?;
    Ok(file.map(Arc::new))
}
