//! The window of a front-end: maps what the device asks for, counts how often, and reads and writes it.

use dmbridge_proto::line::ControlLine;
use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::ptr;
use vhost::vhost_user::message::VhostUserMMap;
use vhost::vhost_user::{HandlerResult, VhostUserFrontendReqHandlerMut};

/// Shared memory region 1.
pub struct Window {
    address: *mut u8,
    size: u64,
    extents: BTreeMap<u64, u64>,
    /// `SHMEM_MAP` requests so far.
    pub maps: u64,
    /// `SHMEM_UNMAP` requests so far.
    pub unmaps: u64,
    /// Answer `SHMEM_MAP` with an error.
    pub refuse: bool,
}

// SAFETY: the mapping belongs to this value alone and can be used from any thread.
unsafe impl Send for Window {}

impl Window {
    /// An address range with nothing in it.
    pub fn new(size: u64) -> Window {
        Window {
            address: reserve(ptr::null_mut(), size, 0),
            size,
            extents: BTreeMap::new(),
            maps: 0,
            unmaps: 0,
            refuse: false,
        }
    }

    /// Extents in the window: offset and size.
    pub fn extents(&self) -> Vec<(u64, u64)> {
        self.extents.iter().map(|(offset, size)| (*offset, *size)).collect()
    }

    /// Unmaps everything.
    pub fn clear(&mut self) {
        for (offset, size) in std::mem::take(&mut self.extents) {
            // SAFETY: a range of this window.
            reserve(unsafe { self.address.add(offset as usize) }, size, libc::MAP_FIXED);
        }
    }

    fn pointer(&self, offset: u64, len: u64) -> *mut u8 {
        let inside = self
            .extents
            .range(..=offset)
            .next_back()
            .is_some_and(|(start, size)| offset + len <= start + size);
        assert!(inside, "offset {offset:#x} + {len:#x} of the window is not mapped: {:x?}", self.extents);
        // SAFETY: inside of the address range.
        unsafe { self.address.add(offset as usize) }
    }

    /// Writes bytes, as a guest does that has the DMB there.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.pointer(offset, bytes.len() as u64);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: `pointer` checked the range; others access it too, so the store is volatile.
            unsafe { to.add(i).write_volatile(*byte) }
        }
    }

    /// Reads bytes.
    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        let from = self.pointer(offset, len);
        // SAFETY: `pointer` checked the range; others access it too, so the load is volatile.
        (0..len as usize).map(|i| unsafe { from.add(i).read_volatile() }).collect()
    }

    /// A control line. It must not be used after its extent was unmapped.
    pub fn line(&self, offset: u64) -> &'static ControlLine {
        // SAFETY: `pointer` checked the range, and extents are page-aligned; tests keep the window for as long.
        unsafe { ControlLine::from_ptr(self.pointer(offset, 64)) }
    }
}

impl VhostUserFrontendReqHandlerMut for Window {
    fn shmem_map(&mut self, request: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        self.maps += 1;
        let (shmid, offset, len, at) = (request.shmid, request.shm_offset, request.len, request.fd_offset);
        if self.refuse {
            return Err(Error::from_raw_os_error(libc::ENOMEM));
        }
        self.check(shmid, offset, len)?;
        let overlaps =
            self.extents.range(..offset + len).next_back().is_some_and(|(start, size)| start + size > offset);
        if overlaps {
            return Err(Error::new(ErrorKind::AlreadyExists, "there is an extent already"));
        }
        // SAFETY: a range of this window in which nothing is mapped.
        let mapped = unsafe {
            libc::mmap(
                self.address.add(offset as usize).cast(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED,
                fd.as_raw_fd(),
                at as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(Error::last_os_error());
        }
        self.extents.insert(offset, len);
        Ok(0)
    }

    fn shmem_unmap(&mut self, request: &VhostUserMMap) -> HandlerResult<u64> {
        self.unmaps += 1;
        let (shmid, offset, len) = (request.shmid, request.shm_offset, request.len);
        self.check(shmid, offset, len)?;
        if self.extents.remove(&offset) != Some(len) {
            return Err(Error::new(ErrorKind::NotFound, "there is no such extent"));
        }
        // SAFETY: a range of this window.
        reserve(unsafe { self.address.add(offset as usize) }, len, libc::MAP_FIXED);
        Ok(0)
    }
}

impl Window {
    fn check(&self, shmid: u8, offset: u64, len: u64) -> Result<()> {
        if shmid == dmbridge_proto::WINDOW_SHMID
            && offset.checked_add(len).is_some_and(|end| end <= self.size)
        {
            return Ok(());
        }
        Err(Error::from_raw_os_error(libc::EINVAL))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range was reserved with this size.
        unsafe { libc::munmap(self.address.cast(), self.size as usize) };
    }
}

fn reserve(at: *mut u8, size: u64, flags: i32) -> *mut u8 {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new range anywhere, or, with MAP_FIXED, one of a window's own.
    let address = unsafe { libc::mmap(at.cast(), size as usize, libc::PROT_NONE, flags, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED, "mmap: {}", Error::last_os_error());
    address.cast()
}
