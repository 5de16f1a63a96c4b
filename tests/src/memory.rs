//! The guest memory of a front-end: one memfd, which the test can also take away.

use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use vhost::VhostUserMemoryRegionInfo;

/// Guest-physical address of the first byte: not 0, so that a mistaken address is one.
pub const BASE: u64 = 0x10_0000;

/// One piece of guest memory.
pub struct GuestMemory {
    file: File,
    address: *mut u8,
    size: u64,
    used: u64,
}

// SAFETY: the mapping belongs to this value alone and can be used from any thread.
unsafe impl Send for GuestMemory {}

impl GuestMemory {
    /// Zeroed memory of `size` bytes.
    pub fn new(size: u64) -> GuestMemory {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).expect("memfd"));
        file.set_len(size).expect("memory");
        GuestMemory { address: map(&file, size), file, size, used: 0 }
    }

    /// The region as it stands in a memory table.
    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: self.size,
            userspace_addr: self.address as u64,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// The memfd.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// First guest-physical address behind the memory.
    pub fn end(&self) -> u64 {
        BASE + self.size
    }

    /// Takes `len` bytes that nobody has taken before.
    pub fn allocate(&mut self, len: u64, align: u64) -> u64 {
        let at = self.used.next_multiple_of(align);
        self.used = at + len;
        assert!(self.used <= self.size, "the test needs more guest memory");
        BASE + at
    }

    /// The front-end's own address of a guest-physical one: what ring addresses are given in.
    pub fn user_address(&self, addr: u64) -> u64 {
        (addr - BASE) + self.address as u64
    }

    /// Where guest memory lies in this process.
    pub fn pointer(&self, addr: u64, len: usize) -> *mut u8 {
        assert!(addr >= BASE && addr - BASE + len as u64 <= self.size, "{addr:#x} is not guest memory");
        // SAFETY: just checked to be inside the mapping.
        unsafe { self.address.add((addr - BASE) as usize) }
    }

    /// Writes bytes.
    pub fn write(&self, addr: u64, bytes: &[u8]) {
        let to = self.pointer(addr, bytes.len());
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: `pointer` checked the range. The device may read it meanwhile, so the store is volatile.
            unsafe { to.add(i).write_volatile(*byte) }
        }
    }

    /// Reads bytes.
    pub fn read(&self, addr: u64, len: usize) -> Vec<u8> {
        let from = self.pointer(addr, len);
        // SAFETY: `pointer` checked the range. The device may write it meanwhile, so the load is volatile.
        (0..len).map(|i| unsafe { from.add(i).read_volatile() }).collect()
    }

    /// Cuts the memory's file off: whoever touches what is behind gets SIGBUS. Nothing of this front-end may be touched
    /// there any more, by this process neither.
    pub fn truncate(&self, size: u64) {
        self.file.set_len(size).expect("truncate");
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size and nothing points into it any more.
        unsafe { libc::munmap(self.address.cast(), self.size as usize) };
    }
}

fn map(file: &File, size: u64) -> *mut u8 {
    // SAFETY: a new mapping anywhere.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(address, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    address.cast()
}
