//! The other side of a virtqueue, for a device that is served in this process: by tests, and where the kernel is asked by
//! system calls. It believes its driver, which is this crate.

use super::{DESCRIPTOR, INDIRECT, Layout, NEXT, Piece, Virtqueue, WRITE};
use crate::ram::DmaBuffer;
use std::sync::atomic::Ordering;

/// A device's side of a queue: as simple as can be, and, for tests, able to lie.
#[derive(Debug)]
pub(crate) struct DeviceSide {
    memory: DmaBuffer,
    layout: Layout,
    taken: u16,
    used: u16,
}

impl DeviceSide {
    /// Of a fresh queue.
    pub(crate) fn new(queue: &Virtqueue) -> DeviceSide {
        DeviceSide { memory: queue.memory().clone(), layout: queue.layout(), taken: 0, used: 0 }
    }

    fn descriptors(&self, start: usize, first: u16) -> Vec<(Piece, u64)> {
        let mut all = Vec::new();
        let mut at = first;
        loop {
            let d = self.memory.memory().slice(start + usize::from(at) * DESCRIPTOR..);
            let word = d.read_u64(8);
            let flags = word >> 32 & 0xffff;
            all.push((Piece { address: d.read_u64(0), len: word as u32 }, flags));
            if flags & NEXT == 0 {
                return all;
            }
            at = (word >> 48) as u16;
        }
    }

    /// The next chain: head, pieces to read, pieces to write.
    pub(crate) fn take(&mut self) -> Option<(u16, Vec<Piece>, Vec<Piece>)> {
        let memory = self.memory.memory();
        if memory.atomic_u16(self.layout.available + 2).load(Ordering::Acquire) == self.taken {
            return None;
        }
        let slot = self.layout.available + 4 + 2 * usize::from(self.taken & (self.layout.size - 1));
        let head = memory.atomic_u16(slot).load(Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        let mut chain = self.descriptors(0, head);
        if let [(table, INDIRECT)] = chain[..] {
            chain = self.descriptors((table.address - self.memory.address()) as usize, 0);
            assert_eq!(chain.len() * DESCRIPTOR, table.len as usize);
        }
        let part = |write| chain.iter().filter(move |(_, f)| f & WRITE == write).map(|(p, _)| *p);
        Some((head, part(0).collect(), part(WRITE).collect()))
    }

    /// Gives a chain back, true or not.
    pub(crate) fn give(&mut self, head: u32, len: u32) {
        let memory = self.memory.memory();
        let at = self.layout.used + 4 + 8 * usize::from(self.used & (self.layout.size - 1));
        memory.atomic_u32(at).store(head, Ordering::Relaxed);
        memory.atomic_u32(at + 4).store(len, Ordering::Relaxed);
        self.used = self.used.wrapping_add(1);
        self.set_used(self.used);
    }

    /// Says that so many were used.
    pub(crate) fn set_used(&self, index: u16) {
        self.memory.memory().atomic_u16(self.layout.used + 2).store(index, Ordering::Release);
    }

    /// Asks to be kicked for the next chain that was not taken yet.
    #[cfg(test)]
    pub(crate) fn want_kick(&self) {
        self.ask_for_kick(self.taken);
    }

    /// Asks to be kicked for the chain that follows the first `index` ones.
    #[cfg(test)]
    pub(crate) fn ask_for_kick(&self, index: u16) {
        let at = self.layout.used + 4 + 8 * usize::from(self.layout.size);
        self.memory.memory().atomic_u16(at).store(index, Ordering::Release);
    }
}
