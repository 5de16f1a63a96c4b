//! The driver's side of a split virtqueue, by hand: every field can be set to anything.

use crate::memory::GuestMemory;
use std::sync::atomic::{Ordering, fence};
use vhost::VringConfigData;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// `VIRTQ_DESC_F_NEXT`
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`
pub const INDIRECT: u16 = 4;

/// A descriptor, with any values.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`], or whatever.
    pub flags: u16,
    /// The next descriptor's number.
    pub next: u16,
}

impl Descriptor {
    /// Device-readable memory.
    pub fn readable(addr: u64, len: u32) -> Descriptor {
        Descriptor { addr, len, flags: 0, next: 0 }
    }

    /// Device-writable memory.
    pub fn writable(addr: u64, len: u32) -> Descriptor {
        Descriptor { addr, len, flags: WRITE, next: 0 }
    }

    /// As it lies in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Links descriptors into a chain that starts at number `first` of a table of `size`.
pub fn link(pieces: &[Descriptor], first: u16, size: u16) -> Vec<(u16, Descriptor)> {
    let number = |i: usize| (first as usize + i) as u16 % size;
    let last = pieces.len() - 1;
    let linked = |(i, piece): (usize, &Descriptor)| match i == last {
        true => (number(i), *piece),
        false => (number(i), Descriptor { flags: piece.flags | NEXT, next: number(i + 1), ..*piece }),
    };
    pieces.iter().enumerate().map(linked).collect()
}

/// One queue.
pub struct Ring {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub table: u64,
    /// Of the available ring.
    pub avail: u64,
    /// Of the used ring.
    pub used: u64,
    /// How many chains were offered.
    pub offered: u16,
    seen: u16,
    next: u16,
    /// Tells the device that something was offered.
    pub kick: EventFd,
    /// The device tells that something was used.
    pub call: EventFd,
    /// The device tells that it cannot follow the ring.
    pub err: EventFd,
}

impl Ring {
    /// A ring in this memory.
    pub fn new(memory: &mut GuestMemory, size: u16) -> Ring {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("eventfd");
        let n = u64::from(size);
        Ring {
            size,
            table: memory.allocate(16 * n, 16),
            avail: memory.allocate(6 + 2 * n, 2),
            used: memory.allocate(6 + 8 * n, 4),
            offered: 0,
            seen: 0,
            next: 0,
            kick: event(),
            call: event(),
            err: event(),
        }
    }

    /// Empties it, while the device is stopped.
    pub fn reset(&mut self, memory: &GuestMemory) {
        (self.offered, self.seen, self.next) = (0, 0, 0);
        self.set_avail_index(memory, 0);
        memory.write(self.used + 2, &[0; 2]);
        let _ = (self.call.read(), self.kick.read());
    }

    /// Its addresses, as the front-end tells them.
    pub fn addresses(&self, memory: &GuestMemory) -> VringConfigData {
        VringConfigData {
            queue_max_size: self.size,
            queue_size: self.size,
            flags: 0,
            desc_table_addr: memory.user_address(self.table),
            used_ring_addr: memory.user_address(self.used),
            avail_ring_addr: memory.user_address(self.avail),
            log_addr: None,
        }
    }

    /// Writes a descriptor.
    pub fn set(&self, memory: &GuestMemory, number: u16, descriptor: Descriptor) {
        memory.write(self.table + 16 * u64::from(number), &descriptor.to_bytes());
    }

    /// Writes a chain to the next descriptors; says the number of the first. Nobody keeps track of which are free: a
    /// test does not offer more than the ring has.
    pub fn chain(&mut self, memory: &GuestMemory, pieces: &[Descriptor]) -> u16 {
        let head = self.next;
        for (number, descriptor) in link(pieces, head, self.size) {
            self.set(memory, number, descriptor);
        }
        self.next = (head as usize + pieces.len()) as u16 % self.size;
        head
    }

    /// Puts a head into the available ring and shows it to the device.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.offered % self.size);
        memory.write(slot, &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.set_avail_index(memory, self.offered);
    }

    /// Sets the available index to anything.
    pub fn set_avail_index(&self, memory: &GuestMemory, index: u16) {
        let at = memory.pointer(self.avail + 2, 2).cast::<u16>();
        fence(Ordering::SeqCst);
        // SAFETY: aligned guest memory, checked by `pointer`; one store, because the device reads it meanwhile.
        unsafe { at.write_volatile(index.to_le()) };
    }

    /// Rings the device.
    pub fn ring(&self) {
        self.kick.write(1).expect("kick");
    }

    /// The next used element, if there is one: the head and the used length.
    pub fn take_used(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let at = memory.pointer(self.used + 2, 2).cast::<u16>();
        // SAFETY: aligned guest memory, checked by `pointer`; the device writes it meanwhile.
        let index = u16::from_le(unsafe { at.read_volatile() });
        if index == self.seen {
            return None;
        }
        fence(Ordering::Acquire);
        let element = memory.read(self.used + 4 + 8 * u64::from(self.seen % self.size), 8);
        self.seen = self.seen.wrapping_add(1);
        let word =
            |at: usize| u32::from_le_bytes([element[at], element[at + 1], element[at + 2], element[at + 3]]);
        Some((word(0) as u16, word(4)))
    }
}
