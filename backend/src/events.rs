//! The event queue of one device: events in, in order, buffers filled (`docs/device.md`, 7). Not who tells what.
//!
//! What finds no buffer waits. How much waits is bounded, whatever others do: what merges is merged, what a driver never
//! learned of and is gone again is forgotten, and software events and new peers are refused beyond a limit.

use crate::keep::book::Cell;
use crate::memory::DeviceMemory;
use crate::notify::EventFile;
use crate::vring::{Broken, Chain, Vring};
use dmbridge_proto::MAX_WAITING_SOFTWARE_EVENTS;
use dmbridge_proto::event::{EVENT_SIZE, Event};
use dmbridge_proto::ids::{ExtentId, Gid, Token};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;

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
    /// Numbers of events that came to wait, or wait no longer, and of which the book does not know it yet.
    changed: Option<BTreeSet<u64>>,
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
            Event::ExtentRemoved(e) if self.forget(&Subject::Added(e.extent)) => return Ok(()),
            // It comes after everything else from that device, of this life and of earlier ones.
            Event::DeviceGone { gid, .. } => {
                self.forget(&Subject::Gone(gid));
            }
            // A driver that has heard of neither misses nothing by hearing of the last only.
            Event::DevicePaused { gid } | Event::DeviceResumed { gid } => {
                self.forget(&Subject::Paused(gid));
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
        self.note(self.next);
        self.next += 1;
        Ok(())
    }

    fn note(&mut self, number: u64) {
        if let Some(changed) = &mut self.changed {
            changed.insert(number);
        }
    }

    fn forget(&mut self, subject: &Subject) -> bool {
        let Some(at) = self.by_subject.remove(subject) else { return false };
        self.events.remove(&at);
        self.note(at);
        true
    }

    fn pop(&mut self) {
        let Some((number, event)) = self.events.pop_first() else { return };
        self.note(number);
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

/// How far the events of a device are that are written down before they are told. In its cell: the number of the last one that a
/// buffer was, or is to be, filled with, the index of that buffer's used element, and whether it is known to be told.
#[derive(Debug)]
struct KeptEvents {
    cell: Cell,
    /// From here on they are not written down yet.
    limit: u64,
}

const TOLD: u64 = 1;
const USED_SHIFT: u32 = 1;
const NUMBER_SHIFT: u32 = 17;

/// Signals are not written down: each may be told once more, and is whenever one might have been lost.
fn is_kept(event: &Event) -> bool {
    !matches!(event, Event::Signal { .. })
}

/// A device's event queue.
#[derive(Debug, Default)]
pub struct Events {
    ring: Option<Vring>,
    waiting: Waiting,
    chain: Chain,
    kept: Option<KeptEvents>,
}

impl Events {
    /// Tells the driver something, now or when it posts a buffer.
    pub fn push(&mut self, event: Event, memory: &DeviceMemory) -> Result<(), Full> {
        if self.kept.is_some() && is_kept(&event) {
            // First it is written down.
            return self.waiting.add(event);
        }
        if !self.waiting.events.is_empty() {
            self.waiting.add(event)?;
            self.flush(memory);
            return Ok(());
        }
        let delivered = self.deliver(0, &event, memory).unwrap_or_else(|broken| {
            self.fail(&broken);
            false
        });
        // Also of a buffer that was returned because it is of no use.
        self.notify(memory);
        if delivered { Ok(()) } else { self.waiting.add(event) }
    }

    /// The driver may have posted buffers.
    pub fn flush(&mut self, memory: &DeviceMemory) {
        while let Some((number, event)) = self.waiting.events.first_key_value() {
            let (number, event) = (*number, *event);
            if self.kept.as_ref().is_some_and(|kept| number >= kept.limit) {
                break;
            }
            match self.deliver(number, &event, memory) {
                Ok(true) => self.waiting.pop(),
                Ok(false) => break,
                Err(broken) => return self.fail(&broken),
            }
        }
        self.notify(memory);
    }

    /// From now on what is told is written down first. `cell` is the device's own.
    pub fn keep(&mut self, cell: Cell) {
        self.waiting.changed = Some(BTreeSet::new());
        // In a cell that was never written stands 0, which is nobody's.
        self.waiting.next = self.waiting.next.max(1);
        self.kept = Some(KeptEvents { cell, limit: self.waiting.next });
    }

    /// What another worker had written down: of these events, which are in the order of their numbers, those that it had told
    /// already are left out. `used` is the index of the next used element of the event queue, if that is served, and `len` the length in the one
    /// before that.
    pub fn restore(&mut self, events: &[(u64, Event)], used: Option<u16>, len: impl Fn(u16) -> Option<u32>) {
        let word = self.kept.as_ref().map_or(0, |kept| kept.cell.word().load(Ordering::Acquire));
        let (last, at) = (word >> NUMBER_SHIFT, (word >> USED_SHIFT) as u16);
        let filled = || used.is_some_and(|used| used != at) && len(at) == Some(EVENT_SIZE as u32);
        let mut told = last;
        if word & TOLD != 0 || filled() {
            told += 1;
            if let Some(kept) = &self.kept {
                kept.cell.word().store(word | TOLD, Ordering::Release);
            }
        }
        self.waiting.next = last + 1;
        for (number, event) in events {
            // What is added gets the number that it had.
            self.waiting.next = self.waiting.next.max(*number);
            if *number < told {
                self.waiting.note(*number);
            } else {
                self.waiting.next = *number;
                let _ = self.waiting.add(*event);
            }
        }
        self.waiting.next = self.waiting.next.max(events.last().map_or(0, |(number, _)| number + 1));
        if let Some(kept) = &mut self.kept {
            kept.limit = self.waiting.next;
        }
    }

    /// Of which events the book does not know that they wait, with what they say, or that they do not wait any more.
    pub fn take_changed(&mut self) -> Vec<(u64, Option<Event>)> {
        let changed = self.waiting.changed.as_mut().map(std::mem::take).unwrap_or_default();
        let events = &self.waiting.events;
        let kept = |number: u64| events.get(&number).copied();
        changed
            .into_iter()
            .map(|number| (number, kept(number)))
            .filter(|(_, e)| e.is_none_or(|e| is_kept(&e)))
            .collect()
    }

    /// Whether the book does not know of something.
    pub fn has_changed(&self) -> bool {
        self.waiting.changed.as_ref().is_some_and(|changed| !changed.is_empty())
    }

    /// Everything that waits is written down, and may be told.
    pub fn release(&mut self, memory: &DeviceMemory) {
        if let Some(kept) = &mut self.kept {
            kept.limit = self.waiting.next;
        }
        self.flush(memory);
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
        let numbers: Vec<u64> = self.waiting.events.keys().copied().collect();
        let (next, changed) = (self.waiting.next, self.waiting.changed.take());
        self.waiting = Waiting { next, changed, ..Waiting::default() };
        numbers.into_iter().for_each(|number| self.waiting.note(number));
    }

    /// Where used buffers are announced.
    pub fn set_call(&mut self, call: Option<Arc<EventFile>>) {
        if let Some(ring) = &mut self.ring {
            ring.set_call(call);
        }
    }

    /// Fills one buffer, and if the event is one that is kept so that it can be told afterwards whether it was filled. False if
    /// there is none.
    fn deliver(&mut self, number: u64, event: &Event, memory: &DeviceMemory) -> Result<bool, Broken> {
        let Some(ring) = &mut self.ring else { return Ok(false) };
        let cell = self.kept.as_ref().filter(|_| is_kept(event)).map(|kept| kept.cell.word());
        let guest = memory.guest();
        loop {
            if !ring.pop(guest, &mut self.chain)? {
                if ring.enable_kicks(guest)? {
                    continue;
                }
                return Ok(false);
            }
            let word = number << NUMBER_SHIFT | u64::from(ring.used()) << USED_SHIFT;
            if let Some(cell) = cell {
                cell.store(word, Ordering::SeqCst);
            }
            let chain = &self.chain;
            let good = !chain.malformed
                && chain.writable_len() >= EVENT_SIZE as u64
                && chain.respond(memory, &event.to_bytes());
            ring.push(guest, chain.head, if good { EVENT_SIZE as u32 } else { 0 })?;
            if good {
                if let Some(cell) = cell {
                    cell.store(word | TOLD, Ordering::Release);
                }
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
    use crate::keep::book::Book;
    use crate::testing::{Guest, TestRing};
    use crate::vring::Layout;
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
    fn another_worker_tells_what_was_not_told_and_nothing_twice() {
        let book = Book::new().unwrap();
        let guest = Guest::new(1 << 20);
        let memory = guest.table();
        let mut ring = TestRing::new(&guest, 4);
        let buffer = guest.take(64);
        let say = |code| Event::Software { gid: gid(1), code, info: 0 };
        let serve = |ring: &TestRing| {
            let used = Vring::used_at(&ring.layout, memory.guest()).unwrap();
            Vring::new(Layout { base: used, ..ring.layout }, memory.guest()).unwrap()
        };
        let start = |ring: &TestRing| {
            let mut events = Events::default();
            events.keep(book.cell(0));
            events.start(serve(ring), &memory);
            events
        };
        let restore = |ring: &TestRing, known: &[(u64, Event)]| {
            let mut events = Events::default();
            events.keep(book.cell(0));
            let vring = serve(ring);
            events.restore(known, Some(vring.used()), |at| vring.used_len(at, memory.guest()));
            let waits = waiting(&events);
            events.start(vring, &memory);
            (events, waits)
        };
        let mut events = start(&ring);
        // A signal goes at once, a software event when it is written down.
        let post = |ring: &mut TestRing| ring.offer_pieces(&guest, &[], &[(buffer, 64)]);
        post(&mut ring);
        post(&mut ring);
        events.push(Event::Signal { index: 1, token: token(1), gid: gid(9) }, &memory).unwrap();
        events.push(say(1), &memory).unwrap();
        assert_eq!((ring.used(&guest), ring.used(&guest)), (Some((0, 64)), None));
        let known: Vec<_> = events.take_changed().into_iter().filter_map(|(n, e)| Some((n, e?))).collect();
        assert_eq!(known.len(), 1);
        // It dies before that, and after.
        assert_eq!(restore(&ring, &[]).1, []);
        let (mut events, waits) = restore(&ring, &known);
        assert_eq!((waits, ring.used(&guest)), (vec![say(1)], Some((0, 64))), "the next one tells it");
        assert_eq!(restore(&ring, &known).1, [], "and not the one after that");
        events.push(say(2), &memory).unwrap();
        events.release(&memory);
        let known: Vec<_> = events.take_changed().into_iter().filter_map(|(n, e)| Some((n, e?))).collect();
        post(&mut ring);
        assert_eq!(restore(&ring, &known).1, [say(2)], "it found no buffer");
        // It dies between the used index and its note that the event is told.
        let word = book.cell(0).word().load(Ordering::Relaxed);
        book.cell(0).word().store(word & !TOLD, Ordering::Relaxed);
        assert_eq!(restore(&ring, &known).1, []);
        assert_eq!(ring.used(&guest), Some((0, 64)));
        assert_eq!(ring.used(&guest), None);
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
