//! The driver's side of a split virtqueue (virtio specification, 2.7), with event index and indirect descriptors. Not
//! for what the buffers mean.
//!
//! The device is not believed: this side keeps its own books of which descriptors are where, and checks every used
//! element against them. What breaks them ends the use of the queue.

pub(crate) mod device_side;

use crate::error::Error;
use crate::ram::DmaBuffer;
use std::sync::atomic::{Ordering, fence};

/// Descriptor flag: another one follows.
const NEXT: u64 = 1;
/// Descriptor flag: the device writes.
const WRITE: u64 = 2;
/// Descriptor flag: it is a table of descriptors.
const INDIRECT: u64 = 4;
/// Flag of the used ring: no kicks, please.
const NO_NOTIFY: u16 = 1;
/// Size of a descriptor, in bytes.
const DESCRIPTOR: usize = 16;
/// Chains up to this long stand in the ring itself, longer ones in a table, if the device knows tables.
const DIRECT: usize = 3;
/// The longest chain.
pub(crate) const MAX_CHAIN: usize = 34;

/// A piece of memory that the device reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) address: u64,
    pub(crate) len: u32,
}

/// A queue's answer, or [`Error::Contract`].
type Result<T> = std::result::Result<T, Error>;

/// More buffers were used than are there.
const BAD_INDEX: Error = Error::Contract("more buffers of a queue were used than the device has");
/// A buffer was used that the device does not have.
const BAD_HEAD: Error = Error::Contract("a buffer of a queue was used that the device does not have");
/// More bytes were written than there was room for.
const BAD_LENGTH: Error =
    Error::Contract("a buffer of a queue came back with more bytes than it has room for");

/// Where the parts of a queue lie, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) size: u16,
    pub(crate) available: usize,
    pub(crate) used: usize,
    tables: usize,
    pub(crate) len: usize,
}

impl Layout {
    /// The parts of a queue of this size, a power of two; with room for tables if `indirect`.
    pub(crate) fn new(size: u16, indirect: bool) -> Layout {
        let n = usize::from(size);
        let available = n * DESCRIPTOR;
        let used = (available + 6 + 2 * n).next_multiple_of(64);
        let tables = (used + 6 + 8 * n).next_multiple_of(64);
        let len = if indirect { tables + n * MAX_CHAIN * DESCRIPTOR } else { tables };
        Layout { size, available, used, tables, len }
    }
}

/// What this side remembers of a chain that the device has.
#[derive(Debug, Clone, Copy, Default)]
struct Chain {
    /// Descriptors in the ring; 0: the device does not have it.
    descriptors: u16,
    last: u16,
    /// Bytes that the device may write.
    room: u32,
}

/// A queue.
#[derive(Debug)]
pub(crate) struct Virtqueue {
    memory: DmaBuffer,
    layout: Layout,
    event_idx: bool,
    indirect: bool,
    /// Links of the free list and of chains: this side's own, which the device cannot write.
    next: Box<[u16]>,
    chains: Box<[Chain]>,
    first_free: u16,
    num_free: u16,
    /// Chains that are made available, and as far as the device knows.
    available: u16,
    published: u16,
    /// Used elements that were taken.
    used: u16,
}

impl Virtqueue {
    /// A queue in fresh, zeroed memory.
    pub(crate) fn new(memory: DmaBuffer, layout: Layout, event_idx: bool, indirect: bool) -> Virtqueue {
        assert!(layout.size.is_power_of_two() && memory.memory().len() >= layout.len);
        Virtqueue {
            memory,
            layout,
            event_idx,
            indirect,
            next: (1..=layout.size).collect(),
            chains: vec![Chain::default(); layout.size.into()].into(),
            first_free: 0,
            num_free: layout.size,
            available: 0,
            published: 0,
            used: 0,
        }
    }

    /// Where the queue lies.
    pub(crate) fn memory(&self) -> &DmaBuffer {
        &self.memory
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// The head that the next chain gets, if a chain of this length fits. Below the queue's size, and different from
    /// those of all chains that the device has.
    pub(crate) fn next_head(&self, pieces: usize) -> Option<u16> {
        let needed = if self.is_indirect(pieces) { 1 } else { pieces };
        (needed <= usize::from(self.num_free)).then_some(self.first_free)
    }

    /// Whether half of the queue is free.
    pub(crate) fn has_room(&self) -> bool {
        self.num_free >= self.layout.size / 2
    }

    fn is_indirect(&self, pieces: usize) -> bool {
        self.indirect && pieces > DIRECT
    }

    /// The longest chain that fits an empty queue.
    pub(crate) fn max_chain(&self) -> usize {
        if self.indirect { MAX_CHAIN } else { MAX_CHAIN.min(self.layout.size.into()) }
    }

    /// Makes a chain available: pieces for the device to read, then pieces to write. Returns its head, or `None` if
    /// there is no room. The device learns of it by [`publish`](Self::publish).
    pub(crate) fn add(&mut self, readable: &[Piece], writable: &[Piece]) -> Option<u16> {
        let pieces = readable.len() + writable.len();
        assert!(pieces != 0 && pieces <= self.max_chain(), "a chain of {pieces} pieces");
        let head = self.next_head(pieces)?;
        let all = readable.iter().map(|p| (*p, 0)).chain(writable.iter().map(|p| (*p, WRITE)));
        let mut last = head;
        let mut descriptors = 0;
        if self.is_indirect(pieces) {
            let table = self.layout.tables + usize::from(head) * MAX_CHAIN * DESCRIPTOR;
            for (i, (piece, flags)) in all.enumerate() {
                let flags = if i + 1 < pieces { flags | NEXT } else { flags };
                self.put(table + i * DESCRIPTOR, piece, flags, i as u16 + 1);
            }
            let address = self.memory.address() + table as u64;
            let table = Piece { address, len: (pieces * DESCRIPTOR) as u32 };
            self.put(usize::from(head) * DESCRIPTOR, table, INDIRECT, 0);
            descriptors = 1;
        } else {
            let mut at = head;
            for (i, (piece, flags)) in all.enumerate() {
                let next = self.next[usize::from(at)];
                let flags = if i + 1 < pieces { flags | NEXT } else { flags };
                self.put(usize::from(at) * DESCRIPTOR, piece, flags, next);
                descriptors += 1;
                last = at;
                at = next;
            }
        }
        self.first_free = self.next[usize::from(last)];
        self.num_free -= descriptors;
        let room = writable.iter().fold(0u32, |sum, piece| sum.saturating_add(piece.len));
        self.chains[usize::from(head)] = Chain { descriptors, last, room };

        let slot = self.layout.available + 4 + 2 * usize::from(self.available & (self.layout.size - 1));
        self.memory.memory().atomic_u16(slot).store(head.to_le(), Ordering::Relaxed);
        self.available = self.available.wrapping_add(1);
        Some(head)
    }

    fn put(&self, at: usize, piece: Piece, flags: u64, next: u16) {
        let descriptor = self.memory.memory().slice(at..at + DESCRIPTOR);
        descriptor.write_u64(0, piece.address);
        descriptor.write_u64(8, u64::from(piece.len) | flags << 32 | u64::from(next) << 48);
    }

    /// Shows the device what was added. Whether it wants to be kicked for that.
    #[must_use = "the device may sleep"]
    pub(crate) fn publish(&mut self) -> bool {
        let memory = self.memory.memory();
        if self.available == self.published {
            return false;
        }
        memory.atomic_u16(self.layout.available + 2).store(self.available.to_le(), Ordering::Release);
        fence(Ordering::SeqCst);
        let new = self.available.wrapping_sub(self.published);
        self.published = self.available;
        if self.event_idx {
            let at = self.layout.used + 4 + 8 * usize::from(self.layout.size);
            let event = u16::from_le(memory.atomic_u16(at).load(Ordering::Relaxed));
            self.available.wrapping_sub(event).wrapping_sub(1) < new
        } else {
            u16::from_le(memory.atomic_u16(self.layout.used).load(Ordering::Relaxed)) & NO_NOTIFY == 0
        }
    }

    /// Takes a chain that the device has used: its head and how many bytes were written.
    pub(crate) fn pop(&mut self) -> Result<Option<(u16, u32)>> {
        let memory = self.memory.memory();
        let index = u16::from_le(memory.atomic_u16(self.layout.used + 2).load(Ordering::Acquire));
        if index == self.used {
            return Ok(None);
        }
        if index.wrapping_sub(self.used) > self.layout.size {
            return Err(BAD_INDEX);
        }
        let at = self.layout.used + 4 + 8 * usize::from(self.used & (self.layout.size - 1));
        let head = u32::from_le(memory.atomic_u32(at).load(Ordering::Relaxed));
        let len = u32::from_le(memory.atomic_u32(at + 4).load(Ordering::Relaxed));
        let head = u16::try_from(head).ok().filter(|&head| head < self.layout.size).ok_or(BAD_HEAD)?;
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        if chain.descriptors == 0 {
            return Err(BAD_HEAD);
        }
        if len > chain.room {
            return Err(BAD_LENGTH);
        }
        self.next[usize::from(chain.last)] = self.first_free;
        self.first_free = head;
        self.num_free += chain.descriptors;
        self.used = self.used.wrapping_add(1);
        Ok(Some((head, len)))
    }

    /// Asks for an interrupt at the next used chain. Returns true if there is one to take already: then there may be no
    /// interrupt for it.
    #[must_use = "there may be no interrupt"]
    pub(crate) fn arm(&mut self) -> bool {
        let memory = self.memory.memory();
        if self.event_idx {
            let at = self.layout.available + 4 + 2 * usize::from(self.layout.size);
            memory.atomic_u16(at).store(self.used.to_le(), Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
        u16::from_le(memory.atomic_u16(self.layout.used + 2).load(Ordering::Acquire)) != self.used
    }
}

#[cfg(test)]
mod tests {
    use super::device_side::DeviceSide;
    use super::*;
    use crate::ram::Ram;

    fn queue(size: u16, indirect: bool) -> (Virtqueue, DeviceSide) {
        let layout = Layout::new(size, indirect);
        let memory = Ram::default().allocate(layout.len, 4096, &|_| Ok(())).unwrap();
        let queue = Virtqueue::new(memory, layout, true, indirect);
        let device = DeviceSide::new(&queue);
        (queue, device)
    }

    fn pieces(from: u64, count: usize) -> Vec<Piece> {
        (0..count).map(|i| Piece { address: from + i as u64 * 4096, len: i as u32 + 1 }).collect()
    }

    #[test]
    fn chains_of_every_length_arrive_whole_and_come_back() {
        for indirect in [false, true] {
            let (mut queue, mut device) = queue(64, indirect);
            for round in 0..200usize {
                let (readable, writable) = (pieces(1 << 20, round % 17 + 1), pieces(1 << 30, round % 15));
                let head = queue.add(&readable, &writable).unwrap();
                let _ = queue.publish();
                assert_eq!(device.take(), Some((head, readable, writable.clone())));
                let room: u32 = writable.iter().map(|p| p.len).sum();
                device.give(head.into(), room);
                assert_eq!(queue.pop().unwrap(), Some((head, room)));
                assert_eq!(queue.pop().unwrap(), None);
            }
        }
    }

    #[test]
    fn a_full_queue_takes_no_more_until_something_comes_back_in_any_order() {
        let (mut queue, mut device) = queue(8, false);
        let heads: Vec<_> = std::iter::from_fn(|| queue.add(&pieces(4096, 2), &[])).collect();
        assert_eq!(heads.len(), 4);
        assert_eq!(queue.next_head(1), None);
        for head in [heads[2], heads[0], heads[3], heads[1]] {
            device.give(head.into(), 0);
            assert_eq!(queue.pop().unwrap(), Some((head, 0)));
            assert!(queue.next_head(2).is_some());
        }
        assert!(queue.add(&pieces(4096, 8), &[]).is_some());
    }

    #[test]
    fn the_device_is_kicked_only_when_it_asked() {
        let (mut queue, mut device) = queue(8, false);
        let add = |queue: &mut Virtqueue| {
            queue.add(&pieces(4096, 1), &[]).unwrap();
            queue.publish()
        };
        assert!(add(&mut queue));
        assert!(!add(&mut queue));
        device.ask_for_kick(2);
        assert!(add(&mut queue));
        assert!(!queue.publish());
        while let Some((head, ..)) = device.take() {
            device.give(head.into(), 0);
        }
        assert!(queue.arm());
        while queue.pop().unwrap().is_some() {}
        assert!(!queue.arm());
    }

    #[test]
    fn without_event_index_a_flag_says_whether_to_kick() {
        let layout = Layout::new(8, false);
        let memory = Ram::default().allocate(layout.len, 4096, &|_| Ok(())).unwrap();
        let mut queue = Virtqueue::new(memory.clone(), layout, false, false);
        let mut add = || {
            queue.add(&pieces(4096, 1), &[]).unwrap();
            queue.publish()
        };
        assert!(add());
        memory.memory().atomic_u16(layout.used).store(NO_NOTIFY.to_le(), Ordering::Relaxed);
        assert!(!add());
    }

    #[test]
    fn a_device_that_lies_is_caught() {
        type Lie<'a> = &'a dyn Fn(&mut DeviceSide, u32);
        let cases: [(Lie<'_>, Error); 6] = [
            (&|d, head| d.give(head, 9), BAD_LENGTH),
            (&|d, head| d.give(head + 1, 0), BAD_HEAD),
            (&|d, _| d.give(8, 0), BAD_HEAD),
            (&|d, _| d.give(u32::MAX, 0), BAD_HEAD),
            (&|d, head| d.give(head + 65536, 0), BAD_HEAD),
            (&|d, _| d.set_used(9), BAD_INDEX),
        ];
        for (lie, error) in cases {
            let (mut queue, mut device) = queue(8, false);
            let head = queue.add(&[], &[Piece { address: 4096, len: 8 }]).unwrap();
            let _ = queue.publish();
            lie(&mut device, head.into());
            assert_eq!(queue.pop().unwrap_err().to_string(), error.to_string());
        }
        let (mut queue, mut device) = queue(8, false);
        let head = queue.add(&[], &[Piece { address: 4096, len: 8 }]).unwrap();
        device.give(head.into(), 8);
        device.give(head.into(), 8);
        assert_eq!(queue.pop().unwrap(), Some((head, 8)));
        assert!(matches!(queue.pop(), Err(Error::Contract(_))));
    }

    #[test]
    fn indexes_may_wrap() {
        let (mut queue, mut device) = queue(4, true);
        for _ in 0..70_000 {
            let head = queue.add(&pieces(4096, 1), &pieces(8192, 1)).unwrap();
            let _ = queue.publish();
            assert_eq!(device.take().unwrap().0, head);
            device.give(head.into(), 1);
            assert_eq!(queue.pop().unwrap(), Some((head, 1)));
        }
    }
}
