//! The event queue of one device: events in, in order, buffers filled (`docs/device.md`, 7). Not who tells what.
//!
//! What finds no buffer waits. How much waits is bounded, whatever others do: what merges is merged, what a driver never
//! learned of and is gone again is forgotten, and software events and new peers are refused beyond a limit.

use crate::memory::DeviceMemory;
use crate::notify::EventFile;
use crate::vring::{Broken, Chain, Vring};
use dmbridge_proto::MAX_WAITING_SOFTWARE_EVENTS;
use dmbridge_proto::event::{EVENT_SIZE, Event};
use dmbridge_proto::ids::{ExtentId, Gid, Token};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Software events of all senders that wait at one device at most.
const MAX_WAITING_SOFTWARE_EVENTS_OF_ALL: usize = 64 * MAX_WAITING_SOFTWARE_EVENTS;

/// A device where so many events wait gets no new peers.
const MAX_WAITING: usize = 4096;

/// What at most one waiting event is about.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Subject {
    Signal(Token),
    Unregistered(Token),
    Detached(Token),
    Gone(Gid),
    Added(ExtentId),
    Removed(ExtentId),
    /// Paused, or not any more: what was last counts.
    Paused(Gid),
}

impl Subject {
    fn of(event: &Event) -> Option<Subject> {
        Some(match event {
            Event::Signal { token, .. } => Subject::Signal(*token),
            Event::DmbUnregistered { token, .. } => Subject::Unregistered(*token),
            Event::DmbDetached { token, .. } => Subject::Detached(*token),
            Event::DeviceGone { gid, .. } => Subject::Gone(*gid),
            Event::ExtentAdded(e) => Subject::Added(e.extent),
            Event::ExtentRemoved(e) => Subject::Removed(e.extent),
            Event::DevicePaused { gid } | Event::DeviceResumed { gid } => Subject::Paused(*gid),
            // As many as the device has posted keys.
            Event::Software { .. } | Event::Rendezvous { .. } => return None,
        })
    }
}

/// Too many software events wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

/// Events that wait for a buffer.
#[derive(Debug, Default)]
struct Waiting {
    /// By the order in which they came.
    events: BTreeMap<u64, Event>,
    next: u64,
    by_subject: HashMap<Subject, u64>,
    software: HashMap<Gid, usize>,
    software_total: usize,
}

impl Waiting {
    fn add(&mut self, event: Event) -> Result<(), Full> {
        match event {
            Event::Software { gid, .. } => {
                let of_sender = self.software.get(&gid).copied().unwrap_or(0);
                if of_sender >= MAX_WAITING_SOFTWARE_EVENTS
                    || self.software_total >= MAX_WAITING_SOFTWARE_EVENTS_OF_ALL
                {
                    return Err(Full);
                }
                self.software.insert(gid, of_sender + 1);
                self.software_total += 1;
            }
            // The driver has not heard of it yet, and has nothing to forget.
            Event::ExtentRemoved(e) => {
                if let Some(at) = self.by_subject.remove(&Subject::Added(e.extent)) {
                    self.events.remove(&at);
                    return Ok(());
                }
            }
            // It comes after everything else from that device, of this life and of earlier ones.
            Event::DeviceGone { gid, .. } => {
                if let Some(at) = self.by_subject.remove(&Subject::Gone(gid)) {
                    self.events.remove(&at);
                }
            }
            // A driver that has heard of neither misses nothing by hearing of the last only.
            Event::DevicePaused { gid } | Event::DeviceResumed { gid } => {
                if let Some(at) = self.by_subject.remove(&Subject::Paused(gid)) {
                    self.events.remove(&at);
                }
            }
            _ => {}
        }
        if let Some(subject) = Subject::of(&event) {
            if self.by_subject.contains_key(&subject) {
                return Ok(());
            }
            self.by_subject.insert(subject, self.next);
        }
        self.events.insert(self.next, event);
        self.next += 1;
        Ok(())
    }

    fn pop(&mut self) {
        let Some((_, event)) = self.events.pop_first() else { return };
        if let Some(subject) = Subject::of(&event) {
            self.by_subject.remove(&subject);
        }
        if let Event::Software { gid, .. } = event {
            self.software_total -= 1;
            if let Some(count) = self.software.get_mut(&gid) {
                *count -= 1;
                if *count == 0 {
                    self.software.remove(&gid);
                }
            }
        }
    }
}

/// A device's event queue.
#[derive(Debug, Default)]
pub struct Events {
    ring: Option<Vring>,
    waiting: Waiting,
    chain: Chain,
}

impl Events {
    /// Tells the driver something, now or when it posts a buffer.
    pub fn push(&mut self, event: Event, memory: &DeviceMemory) -> Result<(), Full> {
        if !self.waiting.events.is_empty() {
            self.waiting.add(event)?;
            self.flush(memory);
            return Ok(());
        }
        let delivered = self.deliver(&event, memory).unwrap_or_else(|broken| {
            self.fail(&broken);
            false
        });
        // Also of a buffer that was returned because it is of no use.
        self.notify(memory);
        if delivered { Ok(()) } else { self.waiting.add(event) }
    }

    /// The driver may have posted buffers.
    pub fn flush(&mut self, memory: &DeviceMemory) {
        while let Some((_, event)) = self.waiting.events.first_key_value() {
            let event = *event;
            match self.deliver(&event, memory) {
                Ok(true) => self.waiting.pop(),
                Ok(false) => break,
                Err(broken) => return self.fail(&broken),
            }
        }
        self.notify(memory);
    }

    /// Number of events that wait for a buffer.
    pub fn waiting(&self) -> usize {
        self.waiting.events.len()
    }

    /// Whether so much waits that others must not give it more reasons for events. What it has already can still tell
    /// it everything.
    pub fn is_clogged(&self) -> bool {
        self.waiting.events.len() >= MAX_WAITING
    }

    /// Takes what waits.
    #[cfg(test)]
    pub fn take_waiting(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.waiting).events.into_values().collect()
    }

    /// Puts the ring into service.
    pub fn start(&mut self, ring: Vring, memory: &DeviceMemory) {
        self.ring = Some(ring);
        self.flush(memory);
    }

    /// Takes the ring out of service, if it is in it.
    pub fn stop(&mut self) -> Option<Vring> {
        self.ring.take()
    }

    /// Forgets what waits: the device was reset.
    pub fn clear(&mut self) {
        self.waiting = Waiting::default();
    }

    /// Where used buffers are announced.
    pub fn set_call(&mut self, call: Option<Arc<EventFile>>) {
        if let Some(ring) = &mut self.ring {
            ring.set_call(call);
        }
    }

    /// Fills one buffer. False if there is none.
    fn deliver(&mut self, event: &Event, memory: &DeviceMemory) -> Result<bool, Broken> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let guest = memory.guest();
        loop {
            if !ring.pop(guest, &mut self.chain)? {
                if ring.enable_kicks(guest)? {
                    continue;
                }
                return Ok(false);
            }
            let chain = &self.chain;
            let good = !chain.malformed
                && chain.writable_len() >= EVENT_SIZE as u64
                && chain.respond(memory, &event.to_bytes());
            ring.push(guest, chain.head, if good { EVENT_SIZE as u32 } else { 0 })?;
            if good {
                return Ok(true);
            }
        }
    }

    fn notify(&mut self, memory: &DeviceMemory) {
        if let Some(Err(broken)) = self.ring.as_mut().map(|ring| ring.notify(memory.guest())) {
            self.fail(&broken);
        }
    }

    fn fail(&mut self, broken: &Broken) {
        tracing::warn!(queue = "event", "{broken}; the queue is stopped");
        if let Some(ring) = self.ring.take() {
            ring.fail();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dmbridge_proto::event::{ExtentInfo, GoneReason};

    fn gid(n: u64) -> Gid {
        Gid::from_u64(n)
    }

    fn token(n: u64) -> Token {
        Token::in_ram(n)
    }

    fn extent(n: u32) -> ExtentInfo {
        ExtentInfo { gid: gid(1), extent: ExtentId::new(n).unwrap(), owned: true, offset: 0, size: 1 << 21 }
    }

    fn push(events: &mut Events, event: Event) -> Result<(), Full> {
        events.push(event, &DeviceMemory::default())
    }

    fn waiting(events: &Events) -> Vec<Event> {
        events.waiting.events.values().copied().collect()
    }

    #[test]
    fn signals_of_one_dmb_merge() {
        let mut events = Events::default();
        let signal = |n| Event::Signal { index: n as u32, token: token(n), gid: gid(9) };
        for n in [1, 2, 1, 2, 1] {
            push(&mut events, signal(n)).unwrap();
        }
        assert_eq!(waiting(&events), [signal(1), signal(2)]);
        events.waiting.pop();
        push(&mut events, signal(1)).unwrap();
        assert_eq!(waiting(&events), [signal(2), signal(1)]);
    }

    #[test]
    fn one_sender_can_fill_only_its_share_of_software_events() {
        let mut events = Events::default();
        let say = |from, code| Event::Software { gid: gid(from), code, info: 0 };
        for code in 0..64 {
            push(&mut events, say(1, code)).unwrap();
        }
        assert_eq!(push(&mut events, say(1, 64)), Err(Full));
        push(&mut events, say(2, 0)).unwrap();
        events.waiting.pop();
        push(&mut events, say(1, 64)).unwrap();
    }

    #[test]
    fn many_senders_cannot_fill_the_daemon() {
        let mut events = Events::default();
        let mut taken = 0;
        for sender in 1..1000 {
            for code in 0..64 {
                taken += usize::from(
                    push(&mut events, Event::Software { gid: gid(sender), code, info: 0 }).is_ok(),
                );
            }
        }
        assert_eq!(taken, MAX_WAITING_SOFTWARE_EVENTS_OF_ALL);
    }

    #[test]
    fn an_extent_that_came_and_went_unheard_is_forgotten() {
        let mut events = Events::default();
        push(&mut events, Event::ExtentAdded(extent(1))).unwrap();
        push(&mut events, Event::ExtentAdded(extent(2))).unwrap();
        push(&mut events, Event::ExtentRemoved(extent(1))).unwrap();
        assert_eq!(waiting(&events), [Event::ExtentAdded(extent(2))]);
        events.waiting.pop();
        push(&mut events, Event::ExtentRemoved(extent(2))).unwrap();
        assert_eq!(waiting(&events), [Event::ExtentRemoved(extent(2))]);
    }

    #[test]
    fn a_device_that_pauses_ever_again_is_one_event() {
        let mut events = Events::default();
        for _ in 0..3 {
            push(&mut events, Event::DevicePaused { gid: gid(1) }).unwrap();
            push(&mut events, Event::DevicePaused { gid: gid(2) }).unwrap();
            push(&mut events, Event::DeviceResumed { gid: gid(1) }).unwrap();
        }
        assert_eq!(
            waiting(&events),
            [Event::DevicePaused { gid: gid(2) }, Event::DeviceResumed { gid: gid(1) }]
        );
    }

    #[test]
    fn a_device_is_gone_after_its_last_event() {
        let mut events = Events::default();
        let gone = |reason| Event::DeviceGone { gid: gid(1), reason };
        let say = Event::Software { gid: gid(1), code: 0, info: 0 };
        push(&mut events, gone(GoneReason::Reset)).unwrap();
        push(&mut events, say).unwrap();
        push(&mut events, gone(GoneReason::Left)).unwrap();
        assert_eq!(waiting(&events), [say, gone(GoneReason::Left)]);
    }
}
