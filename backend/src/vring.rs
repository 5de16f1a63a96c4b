//! The device's end of a split virtqueue: chains out, used elements in, notifications. Not what is in a chain.
//!
//! `virtio-queue` walks the rings; what it leaves to its users is done here, in one place: a chain that ends early
//! because it is malformed is told from one that ends, its order (readable before writable) and its length are checked,
//! and a ring that cannot be followed is stopped for good.

use crate::memory::DeviceMemory;
use crate::notify::EventFile;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A piece of guest memory in a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Guest-physical address, not checked.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

/// A descriptor chain, read once. Reused from chain to chain, so that its memory is.
#[derive(Debug, Default)]
pub struct Chain {
    /// Index of its first descriptor: its name in the used ring.
    pub head: u16,
    /// Whether it breaks the ring format: then nothing else in it means anything.
    pub malformed: bool,
    /// What the device may read, in order.
    pub readable: Vec<Piece>,
    /// What the device may write, in order.
    pub writable: Vec<Piece>,
}

impl Chain {
    /// What these descriptors say; no chain is longer than `limit`.
    fn take(&mut self, descriptors: DescriptorChain<&GuestMemoryMmap>, limit: usize) {
        self.head = descriptors.head_index();
        self.readable.clear();
        self.writable.clear();
        // What the iterator stops at is malformed unless the descriptor before it was the last.
        self.malformed = true;
        for descriptor in descriptors {
            let piece = Piece { addr: descriptor.addr().0, len: descriptor.len() };
            if descriptor.is_write_only() {
                self.writable.push(piece);
            } else if self.writable.is_empty() {
                self.readable.push(piece);
            } else {
                self.malformed = true;
                break;
            }
            if self.readable.len() + self.writable.len() > limit {
                self.malformed = true;
                break;
            }
            self.malformed = descriptor.has_next();
        }
    }

    /// Asks for the lines of the answer, the header and the first of the data, which the driver has just written.
    pub fn fetch(&self, memory: &DeviceMemory) {
        #[cfg(target_arch = "x86_64")]
        {
            let host = |piece: &Piece| memory.host(piece.addr, 1).map(|(at, _)| at);
            if let Some(answer) = self.writable.first().and_then(host) {
                // SAFETY: a prefetch accesses nothing, and where it is not known it does nothing.
                unsafe {
                    std::arch::asm!("prefetchw [{}]", in(reg) answer, options(nostack, preserves_flags, readonly));
                }
            }
            for at in self.readable.iter().take(2).filter_map(host) {
                // SAFETY: as above.
                unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = memory;
    }

    /// Bytes that the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|p| u64::from(p.len)).sum()
    }

    /// Bytes that the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|p| u64::from(p.len)).sum()
    }

    /// Whether `len` bytes can be written to the start of the writable part.
    pub fn takes_response(&self, memory: &DeviceMemory, len: usize) -> bool {
        let mut left = len as u64;
        let all_there = self.writable.iter().all(|piece| {
            let len = left.min(piece.len.into());
            left -= len;
            len == 0 || memory.holds(piece.addr, len)
        });
        all_there && left == 0
    }

    /// Writes `bytes` to the start of the writable part. False, and nothing is written, if they do not fit there.
    pub fn respond(&self, memory: &DeviceMemory, bytes: &[u8]) -> bool {
        if !self.takes_response(memory, bytes.len()) {
            return false;
        }
        let mut rest = bytes;
        for piece in &self.writable {
            let (now, later) = rest.split_at(rest.len().min(piece.len as usize));
            if !now.is_empty() && !memory.write(piece.addr, now) {
                return false;
            }
            rest = later;
        }
        true
    }
}

/// The ring cannot be followed any more.
#[derive(Debug, thiserror::Error)]
#[error("the ring cannot be followed: {0}")]
pub struct Broken(#[from] virtio_queue::Error);

/// A ring that is being served.
#[derive(Debug)]
pub struct Vring {
    queue: Queue,
    call: Option<Arc<EventFile>>,
    err: Option<Arc<EventFile>>,
    /// Used elements were added since the last notification.
    unnotified: bool,
}

/// What is known of a ring before it is served, and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Layout {
    /// Number of descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Index of the next available element, and of the next used.
    pub base: u16,
    /// Whether `VIRTIO_F_EVENT_IDX` was accepted.
    pub event_idx: bool,
}

impl Vring {
    /// A ring at these addresses, if all of it is guest memory.
    pub fn new(layout: Layout, memory: &GuestMemoryMmap) -> Result<Vring, Broken> {
        let mut queue = Queue::new(dmbridge_proto::MAX_QUEUE_SIZE)?;
        queue.try_set_size(layout.size)?;
        queue.try_set_desc_table_address(GuestAddress(layout.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(layout.available))?;
        queue.try_set_used_ring_address(GuestAddress(layout.used))?;
        queue.set_event_idx(layout.event_idx);
        queue.set_next_avail(layout.base);
        queue.set_ready(true);
        if !queue.is_valid(memory) {
            return Err(Broken(virtio_queue::Error::QueueNotReady));
        }
        // The used index is in the ring: a device that takes over goes on from there.
        let used = queue.used_idx(memory, Ordering::Acquire)?;
        queue.set_next_used(used.0);
        Ok(Vring { queue, call: None, err: None, unnotified: false })
    }

    /// Where used elements are announced.
    pub fn set_call(&mut self, call: Option<Arc<EventFile>>) {
        self.call = call;
        // What was used while there was none to call is announced now.
        if let (Some(call), true) = (&self.call, self.unnotified) {
            self.unnotified = false;
            call.signal();
        }
    }

    /// Where the end of the ring is announced.
    pub fn set_err(&mut self, err: Option<Arc<EventFile>>) {
        self.err = err;
    }

    /// Ends the ring because it cannot be followed.
    pub fn fail(self) {
        if let Some(err) = self.err {
            err.signal();
        }
    }

    /// Index of the next available element.
    pub fn base(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Index of the next used element.
    pub fn used(&self) -> u16 {
        self.queue.next_used()
    }

    /// The used index as it is in the ring.
    pub fn used_at(layout: &Layout, memory: &GuestMemoryMmap) -> Option<u16> {
        const INDEX: u64 = 2;
        let at = layout.used.checked_add(INDEX)?;
        memory.load(GuestAddress(at), Ordering::Acquire).ok().map(u16::from_le)
    }

    /// The length in the used element with this index, as it is in the ring.
    pub fn used_len(&self, index: u16, memory: &GuestMemoryMmap) -> Option<u32> {
        const ELEMENTS: u64 = 4;
        let at = self.queue.used_ring() + ELEMENTS + 8 * u64::from(index % self.queue.size()) + 4;
        memory.load(GuestAddress(at), Ordering::Acquire).ok().map(u32::from_le)
    }

    /// Puts the chains back that were taken last, so many.
    pub fn unpop(&mut self, count: usize) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count as u16));
    }

    /// Takes the next available chain into `chain`. False if there is none.
    pub fn pop(&mut self, memory: &GuestMemoryMmap, chain: &mut Chain) -> Result<bool, Broken> {
        Ok(self.pop_some(memory, std::slice::from_mut(chain))? == 1)
    }

    /// Takes the next available chains into `chains`, as many as fit. How many there were. Cheaper than one by one: what the
    /// driver has written is still in its cache, and comes from there at once instead of one after the other.
    pub fn pop_some(&mut self, memory: &GuestMemoryMmap, chains: &mut [Chain]) -> Result<usize, Broken> {
        let limit = usize::from(self.queue.size());
        let mut available = self.queue.iter(memory)?;
        let mut count = 0;
        while let Some(chain) = chains.get_mut(count)
            && let Some(descriptors) = available.next()
        {
            chain.take(descriptors, limit);
            count += 1;
        }
        Ok(count)
    }

    /// Gives a chain back, of whose writable bytes the first `len` were written.
    pub fn push(&mut self, memory: &GuestMemoryMmap, head: u16, len: u32) -> Result<(), Broken> {
        self.queue.add_used(memory, head, len)?;
        self.unnotified = true;
        Ok(())
    }

    /// Tells the driver what was used since the last time, if it wants to know.
    pub fn notify(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        if !self.unnotified {
            return Ok(());
        }
        let wanted = self.queue.needs_notification(memory)?
            && (self.queue.event_idx_enabled() || !self.interrupts_suppressed(memory)?);
        match &self.call {
            Some(call) if wanted => call.signal(),
            None if wanted => return Ok(()),
            _ => {}
        }
        self.unnotified = false;
        Ok(())
    }

    /// `VRING_AVAIL_F_NO_INTERRUPT`, which counts without `VIRTIO_F_EVENT_IDX`.
    fn interrupts_suppressed(&self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        let flags: u16 = memory
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    /// Asks to be kicked for the next chain. True if one is there already.
    pub fn enable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<bool, Broken> {
        Ok(self.queue.enable_notification(memory)?)
    }

    /// Asks not to be kicked, while the ring is being worked on.
    pub fn disable_kicks(&mut self, memory: &GuestMemoryMmap) -> Result<(), Broken> {
        Ok(self.queue.disable_notification(memory)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{BASE, Descriptor, Guest, INDIRECT, NEXT, TestRing, WRITE, table};

    const SIZE: u16 = 4;

    /// The chain that the device takes out of a ring with these descriptors, the first of which is offered.
    fn pop(guest: &Guest, descriptors: &[Descriptor]) -> Chain {
        let memory = guest.table();
        let mut ring = TestRing::new(guest, SIZE);
        let mut vring = ring.vring(&memory);
        ring.describe(guest, descriptors);
        ring.offer(guest, 0);
        let mut chain = Chain::default();
        assert!(vring.pop(memory.guest(), &mut chain).unwrap());
        assert!(!vring.pop(memory.guest(), &mut Chain::default()).unwrap());
        vring.push(memory.guest(), chain.head, 0).unwrap();
        assert_eq!(ring.used(guest), Some((0, 0)));
        chain
    }

    #[test]
    fn a_good_chain_is_readable_and_then_writable() {
        let guest = Guest::new(1 << 20);
        let (a, b, c) = (BASE, BASE + 100, BASE + 200);
        let direct = [(a, 10, NEXT, 2), (0, 0, 0, 0), (b, 20, NEXT, 1), (0, 0, 0, 0)];
        let chain = pop(&guest, &[direct[0], (c, 30, WRITE, 0), direct[2]]);
        assert!(!chain.malformed);
        assert_eq!(chain.readable, [Piece { addr: a, len: 10 }, Piece { addr: b, len: 20 }]);
        assert_eq!(chain.writable, [Piece { addr: c, len: 30 }]);
        assert_eq!((chain.readable_len(), chain.writable_len()), (30, 30));
        // The same by an indirect table, behind a direct descriptor.
        let indirect = guest.put(&table(&[(b, 20, NEXT, 1), (c, 30, WRITE, 0)]));
        let other = pop(&guest, &[(a, 10, NEXT, 1), (indirect, 32, INDIRECT, 0)]);
        assert!(!other.malformed);
        assert_eq!((other.readable, other.writable), (chain.readable, chain.writable));
    }

    #[test]
    fn every_kind_of_malformed_chain_is_seen() {
        let guest = Guest::new(1 << 20);
        let a = BASE;
        let good = (a, 8, 0, 0);
        let nested = guest.put(&table(&[(a, 16, INDIRECT, 0)]));
        let short_chain = guest.put(&table(&[(a, 8, NEXT, 7), good]));
        let looping = guest.put(&table(&[(a, 8, NEXT, 1), (a, 8, NEXT, 0)]));
        let long =
            guest.put(&table(&[(a, 8, NEXT, 1), (a, 8, NEXT, 2), (a, 8, NEXT, 3), (a, 8, NEXT, 4), good]));
        let cases: [(&str, &[Descriptor]); 12] = [
            ("an index out of range", &[(a, 8, NEXT, SIZE)]),
            ("a loop of one", &[(a, 8, NEXT, 0)]),
            ("a loop", &[(a, 8, NEXT, 1), (a, 8, NEXT, 0)]),
            ("readable after writable", &[(a, 8, NEXT | WRITE, 1), good]),
            ("an empty indirect table", &[(nested, 0, INDIRECT, 0)]),
            ("an indirect table of half a descriptor", &[(nested, 24, INDIRECT, 0)]),
            ("an indirect table outside of memory", &[(0x1000, 32, INDIRECT, 0)]),
            ("an indirect table in an indirect table", &[(nested, 16, INDIRECT, 0)]),
            ("an index out of an indirect table's range", &[(short_chain, 32, INDIRECT, 0)]),
            ("a loop in an indirect table", &[(looping, 32, INDIRECT, 0)]),
            ("more than the queue is long, indirectly", &[(long, 80, INDIRECT, 0)]),
            ("more than 2^32 bytes", &[(a, u32::MAX, NEXT, 1), (a, 8, 0, 0)]),
        ];
        for (what, descriptors) in cases {
            assert!(pop(&guest, descriptors).malformed, "{what}");
        }
    }

    #[test]
    fn a_ring_that_claims_more_than_it_can_hold_is_broken() {
        let guest = Guest::new(1 << 20);
        let memory = guest.table();
        let ring = TestRing::new(&guest, SIZE);
        let mut vring = ring.vring(&memory);
        ring.claim(&guest, SIZE + 1);
        assert!(vring.pop(memory.guest(), &mut Chain::default()).is_err());
    }

    #[test]
    fn a_head_out_of_range_has_no_place_in_the_used_ring() {
        let guest = Guest::new(1 << 20);
        let memory = guest.table();
        let mut ring = TestRing::new(&guest, SIZE);
        let mut vring = ring.vring(&memory);
        ring.offer(&guest, SIZE);
        let mut chain = Chain::default();
        assert!(vring.pop(memory.guest(), &mut chain).unwrap());
        assert!(chain.malformed);
        assert!(vring.push(memory.guest(), chain.head, 0).is_err());
    }

    #[test]
    fn a_ring_outside_of_memory_is_not_served() {
        let guest = Guest::new(1 << 20);
        let memory = guest.table();
        let layout = TestRing::new(&guest, SIZE).layout;
        for layout in [
            Layout { descriptors: BASE + (1 << 20) - 16, ..layout },
            Layout { available: 0x1000, ..layout },
            Layout { used: u64::MAX - 3, ..layout },
            Layout { used: layout.used + 1, ..layout },
            Layout { size: 3, ..layout },
            Layout { size: 2048, ..layout },
        ] {
            assert!(Vring::new(layout, memory.guest()).is_err(), "{layout:?}");
        }
    }

    #[test]
    fn a_response_is_written_whole_or_not_at_all() {
        let guest = Guest::new(1 << 20);
        let memory = guest.table();
        let end = BASE + (1 << 20);
        let chain = |pieces: &[(u64, u32)]| Chain {
            writable: pieces.iter().map(|(addr, len)| Piece { addr: *addr, len: *len }).collect(),
            ..Chain::default()
        };
        assert!(chain(&[(BASE, 3), (BASE + 16, 0), (BASE + 32, 9)]).respond(&memory, b"12345678"));
        assert_eq!((guest.read(BASE, 4), guest.read(BASE + 32, 6)), (b"123\0".to_vec(), b"45678\0".to_vec()));
        assert!(!chain(&[(BASE, 7)]).respond(&memory, b"xxxxxxxx"));
        assert!(!chain(&[(BASE, 4), (end - 2, 4)]).respond(&memory, b"xxxxxxxx"));
        assert_eq!(guest.read(BASE, 3), b"123");
        // What is behind the response may be anywhere.
        assert!(chain(&[(end - 8, 100)]).respond(&memory, b"12345678"));
    }
}
