//! A guest for unit tests: memory in a file, and the driver's end of a ring in it, in which every field can be wrong.

use crate::memory::{DeviceMemory, RegionInfo};
use crate::topology::Topology;
use crate::vring::{Layout, Vring};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// `VIRTQ_DESC_F_NEXT`
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`
pub const INDIRECT: u16 = 4;
/// Where the memory starts.
pub const BASE: u64 = 0x10_0000;

/// A guest's memory.
pub struct Guest {
    /// The file, to take it away.
    pub file: File,
    size: u64,
    used: Cell<u64>,
}

impl Guest {
    /// Memory of `size` bytes.
    pub fn new(size: u64) -> Guest {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        Guest { file, size, used: Cell::new(0) }
    }

    /// The memory as the daemon has it.
    pub fn table(&self) -> DeviceMemory {
        let info = RegionInfo { guest_addr: BASE, size: self.size, user_addr: 0, file_offset: 0 };
        DeviceMemory::default().with(info, self.file.try_clone().unwrap()).unwrap()
    }

    /// Takes `len` bytes that nobody has taken, aligned to 4096.
    pub fn take(&self, len: u64) -> u64 {
        let at = self.used.get();
        self.used.set((at + len).next_multiple_of(4096));
        assert!(self.used.get() <= self.size);
        BASE + at
    }

    /// Takes room for these bytes, and writes them there.
    pub fn put(&self, bytes: &[u8]) -> u64 {
        let addr = self.take(bytes.len() as u64);
        self.write(addr, bytes);
        addr
    }

    /// Writes bytes.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, addr - BASE).unwrap();
    }

    /// Reads bytes.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, addr - BASE).unwrap();
        bytes
    }
}

/// Descriptors: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// The driver's end of a ring.
pub struct TestRing {
    /// What the device is told.
    pub layout: Layout,
    offered: u16,
    seen: u16,
}

impl TestRing {
    /// A ring of `size` descriptors in this memory.
    pub fn new(guest: &Guest, size: u16) -> TestRing {
        let n = u64::from(size);
        let layout = Layout {
            size,
            descriptors: guest.take(16 * n),
            available: guest.take(6 + 2 * n),
            used: guest.take(6 + 8 * n),
            base: 0,
            event_idx: false,
        };
        TestRing { layout, offered: 0, seen: 0 }
    }

    /// How many chains were offered.
    pub fn offered(&self) -> u16 {
        self.offered
    }

    /// The device's end.
    pub fn vring(&self, memory: &DeviceMemory) -> Vring {
        Vring::new(self.layout, memory.guest()).unwrap()
    }

    /// Writes descriptors from number 0 on.
    pub fn describe(&self, guest: &Guest, descriptors: &[Descriptor]) {
        guest.write(self.layout.descriptors, &table(descriptors));
    }

    /// Offers the chain that starts there.
    pub fn offer(&mut self, guest: &Guest, head: u16) {
        let slot = u64::from(self.offered % self.layout.size);
        guest.write(self.layout.available + 4 + 2 * slot, &head.to_le_bytes());
        self.offered += 1;
        self.claim(guest, self.offered);
    }

    /// Claims to have offered so many.
    pub fn claim(&self, guest: &Guest, index: u16) {
        guest.write(self.layout.available + 2, &index.to_le_bytes());
    }

    /// Writes a chain of readable and then writable pieces from number 0 on, and offers it.
    pub fn offer_pieces(&mut self, guest: &Guest, readable: &[(u64, u32)], writable: &[(u64, u32)]) {
        let count = readable.len() + writable.len();
        let pieces = readable.iter().map(|p| (p, 0)).chain(writable.iter().map(|p| (p, WRITE)));
        let linked = |(i, ((addr, len), flags)): (usize, (&(u64, u32), u16))| {
            (*addr, *len, if i + 1 < count { flags | NEXT } else { flags }, i as u16 + 1)
        };
        let descriptors: Vec<Descriptor> = pieces.enumerate().map(linked).collect();
        self.describe(guest, &descriptors);
        self.offer(guest, 0);
    }

    /// The next used element: head and length.
    pub fn used(&mut self, guest: &Guest) -> Option<(u32, u32)> {
        let index = guest.read(self.layout.used + 2, 2);
        if u16::from_le_bytes([index[0], index[1]]) == self.seen {
            return None;
        }
        let slot = u64::from(self.seen % self.layout.size);
        self.seen += 1;
        let e = guest.read(self.layout.used + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes([e[at], e[at + 1], e[at + 2], e[at + 3]]);
        Some((word(0), word(4)))
    }
}

/// Descriptors as they lie in memory.
pub fn table(descriptors: &[Descriptor]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (addr, len, flags, next) in descriptors {
        bytes.extend(addr.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
    }
    bytes
}

/// A host made of nodes: CPU list, memory in KiB, distances.
pub fn host(nodes: &[(&str, u64, &str)]) -> Topology {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: String, text: String| std::fs::write(folder.path().join(name), text).unwrap();
    write("online".into(), format!("0-{}\n", nodes.len() - 1));
    for (number, (cpus, memory, distances)) in nodes.iter().enumerate() {
        std::fs::create_dir(folder.path().join(format!("node{number}"))).unwrap();
        write(format!("node{number}/cpulist"), format!("{cpus}\n"));
        write(format!("node{number}/distance"), format!("{distances}\n"));
        write(
            format!("node{number}/meminfo"),
            format!("Node {number} MemTotal: {memory} kB\nNode {number} MemFree: 1 kB\n"),
        );
    }
    Topology::read(folder.path()).unwrap()
}
