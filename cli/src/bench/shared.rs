//! Memory that two processes of the benchmark share, for the limits: a sealed file in memory, in huge pages where the
//! system gives them.

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use nix::unistd::ftruncate;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use crate::pair::Role;
use crate::rendezvous::Rendezvous;

/// A shared mapping; every page is there from the start.
pub struct Shared {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

impl Shared {
    /// Memory of `len` bytes that both processes have when both have called this.
    pub fn new(role: Role, rendezvous: &Rendezvous, len: usize) -> Result<Shared> {
        let len = NonZeroUsize::new(len).context("shared memory of no bytes")?;
        let file = match role {
            Role::A => {
                let file =
                    memfd_create("dmbridge-bench", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
                ftruncate(&file, len.get() as i64).context("there is not enough memory")?;
                fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW))?;
                let shared = Shared::map(&file, len)?;
                rendezvous.give(file.as_fd())?;
                return Ok(shared);
            }
            Role::B => rendezvous.take()?,
        };
        Shared::map(&file, len)
    }

    fn map(file: &OwnedFd, len: NonZeroUsize) -> Result<Shared> {
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, file, 0) }
            .context("shared memory could not be mapped")?;
        let shared = Shared { start, len };
        // SAFETY: the range is this mapping. The first is a wish that may be refused; the second only makes pages.
        unsafe {
            let _ = madvise(start, len.get(), MmapAdvise::MADV_HUGEPAGE);
            madvise(start, len.get(), MmapAdvise::MADV_POPULATE_WRITE)
                .context("there is not enough memory")?;
        }
        Ok(shared)
    }

    /// The address of the byte at `offset`.
    ///
    /// Panics if that is not inside.
    pub fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.len.get());
        // SAFETY: it stays inside of the mapping.
        unsafe { self.start.as_ptr().cast::<u8>().add(offset) }
    }

    /// The word at `offset`, a multiple of 8.
    ///
    /// Panics if that is not inside.
    pub fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len.get());
        // SAFETY: it is aligned and inside of the mapping, which lives as long as self; both processes access it only
        // through this.
        unsafe { &*self.at(offset).cast::<AtomicU64>() }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: start and len are those of the mapping; references into it do not outlive self.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}
