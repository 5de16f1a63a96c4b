//! A piece of address space that this process mapped, and gives back when nobody uses it any more. Not for what lies
//! in it: see `window` and `memory`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};

/// A mapping of its own.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is memory of the process, bound to no thread; nobody gets a Rust reference to it but by the
// unsafe code of this crate, which uses volatile and atomic accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Address space that nothing can be read from or written to.
    pub(crate) fn reserve(len: usize) -> io::Result<Mapping> {
        // SAFETY: a new mapping where the kernel finds room touches nothing that exists.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0)
        };
        Mapping::check(base, len)
    }

    /// `len` bytes of a file from `offset` on, shared with whoever maps it too.
    pub(crate) fn of_file(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapping> {
        // SAFETY: as for `reserve`.
        let base = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let offset = offset as libc::off_t;
            libc::mmap(ptr::null_mut(), len, access, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        Mapping::check(base, len)
    }

    /// Puts `len` bytes of a file, from `offset` on, in the place of what is mapped from `at` on.
    pub(crate) fn replace(&self, at: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        self.put(at, len, libc::MAP_SHARED, file.as_raw_fd(), offset)
    }

    /// Puts zeroed memory of this process in the place of what is mapped from `at` on.
    pub(crate) fn replace_by_zeroes(&self, at: usize, len: usize) -> io::Result<()> {
        self.put(at, len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0)
    }

    fn put(&self, at: usize, len: usize, flags: i32, file: i32, offset: u64) -> io::Result<()> {
        assert!(
            at.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {at} of {}",
            self.len
        );
        // SAFETY: the range lies in this mapping, whose addresses nobody else uses; no Rust reference to it exists.
        let base = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let to = self.base.as_ptr().add(at).cast();
            libc::mmap(to, len, access, flags | libc::MAP_FIXED, file, offset as libc::off_t)
        };
        if base == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn check(base: *mut libc::c_void, len: usize) -> io::Result<Mapping> {
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Mapping { base, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by the constructor, and whoever has a pointer into it keeps this alive.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
