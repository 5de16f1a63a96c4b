//! A front-end that stops a device: for a pause of its virtual machine, or because the driver is gone. vhost-user has one
//! message for both (`docs/device.md`, 11).

use super::{Core, Work};
use crate::port::SessionId;
use dmbridge_proto::event::GoneReason;
use std::time::{Duration, Instant};

/// How often a device that is paused is looked at: whether it can still go on.
const WATCH: Duration = Duration::from_millis(100);

impl Core {
    /// The front-end stops the device.
    pub(super) fn stop(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get(&id) else { return };
        if session.paused.is_some() {
            return;
        }
        let Some(device) = session.device.filter(|device| self.fabric.is_alive(*device)) else {
            return self.reset(id, GoneReason::Reset);
        };
        for index in (0..session.rings.len() as u32).rev() {
            self.pause_ring(id, index);
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        tracing::debug!(device = %session.name, gid = %session.gid, "paused");
        session.paused = Some(session.to_be_continued());
        if let Some(channel) = &mut session.channel {
            channel.pause();
        }
        self.fabric.pause(device);
        // The front-end tells its table again, and whether it has the mappings shall not be hidden by us having them.
        let memory = self.fabric.memory_without_window(device);
        match (self.sessions.get(&id), memory) {
            (Some(session), Ok(memory)) => session.port.memory.replace(memory),
            (_, Err(error)) => tracing::warn!("a memory table that was good: {error}"),
            (None, _) => {}
        }
        if let Some(session) = self.sessions.get_mut(&id)
            && !std::mem::replace(&mut session.watched, true)
        {
            self.timers.insert((Instant::now() + WATCH, Work::Watch(id)));
        }
    }

    /// Whether a device that is paused is still that: its driver may have ended, its virtual machine may have been reset.
    pub fn watch_pause(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.watched = false;
        let Some(device) = session.device.filter(|_| session.paused.is_some()) else { return };
        if self.fabric.is_alive(device) && self.fabric.has_its_mappings(device) {
            session.watched = true;
            self.timers.insert((Instant::now() + WATCH, Work::Watch(id)));
        } else {
            self.reset(id, GoneReason::Reset);
            self.settle();
        }
    }

    /// The front-end starts the device. Whether it goes on as it was; if not, nothing is left of what it was.
    pub(super) fn go_on(&mut self, id: SessionId) -> bool {
        let Some(session) = self.sessions.get(&id) else { return false };
        let Some(device) = session.device else { return false };
        let Some(paused) = &session.paused else { return true };
        if *paused != session.to_be_continued()
            || !self.fabric.is_alive(device)
            || !self.fabric.has_its_mappings(device)
        {
            self.leave(id, GoneReason::Reset);
            return false;
        }
        let Some(session) = self.sessions.get_mut(&id) else { return false };
        tracing::debug!(device = %session.name, gid = %session.gid, "goes on");
        session.paused = None;
        self.fabric.go_on(device);
        let mut outcomes = Vec::new();
        if let Some(channel) = &mut session.channel {
            channel.open(Instant::now(), &mut outcomes);
        }
        self.map_outcomes(outcomes);
        true
    }
}
