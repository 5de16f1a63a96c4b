//! Private memory of a process for large messages, as programs that care about large memory have it: in transparent huge
//! pages, where the system gives them.

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// What a huge page's size is a divisor of, on the processors that Linux has transparent ones for.
const ALIGN: usize = 2 << 20;

/// A buffer; every page is there from the start.
pub struct Private {
    map: NonNull<c_void>,
    map_len: NonZeroUsize,
    start: NonNull<u8>,
    len: usize,
}

impl Private {
    /// `len` bytes, all of this value.
    pub fn new(len: usize, value: u8) -> Result<Private> {
        let map_len =
            NonZeroUsize::new(len.next_multiple_of(ALIGN) + ALIGN).context("a buffer of no bytes")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe { mmap_anonymous(None, map_len, prot, MapFlags::MAP_PRIVATE) }
            .context("there is not enough memory")?;
        // SAFETY: the range is this mapping. It is a wish that may be refused.
        let _ = unsafe { madvise(map, map_len.get(), MmapAdvise::MADV_HUGEPAGE) };
        let start = map.cast::<u8>();
        // SAFETY: the mapping is longer than the buffer by as much as this may skip.
        let start = unsafe { start.add(start.align_offset(ALIGN)) };
        let mut buffer = Private { map, map_len, start, len };
        buffer.fill(value);
        Ok(buffer)
    }

    /// Several of them.
    pub fn several(count: usize, len: usize, value: u8) -> Result<Vec<Private>> {
        (0..count).map(|_| Private::new(len, value)).collect()
    }
}

impl Deref for Private {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped as long as self, readable, initialised, and nobody else's.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Private {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and writable.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's, and no reference into it outlives self.
        let _ = unsafe { munmap(self.map, self.map_len.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_has_its_bytes_and_can_be_written() {
        let mut buffers = Private::several(2, 5000, 7).unwrap();
        assert!(buffers[1].iter().all(|byte| *byte == 7));
        buffers[1][4999] = 8;
        assert_eq!((buffers[0][4999], buffers[1].len()), (7, 5000));
    }
}
