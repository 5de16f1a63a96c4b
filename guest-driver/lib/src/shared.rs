//! Memory that a peer accesses at the same time: how to read and write it without `unsafe` and without ever having a
//! Rust reference to it.
//!
//! Every access is bounds-checked. What is read may be a mixture of old and new while the peer writes; it is the job of
//! the layer above (signals, cursors) to read what is complete. What was read once and checked must be used from the
//! copy: a second look may show something else.

use crate::error::OutOfBounds;
use crate::fills::Fills;
use crate::proto::shm::{self, CopyPlan, wide};
use std::any::Any;
use std::fmt;
use std::ops::{Bound, RangeBounds};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};

/// A buffer that others access too: a DMB, or memory to move from. Cheap to clone; the memory stays mapped as long as a
/// clone lives. After a DMB has ended, its memory may become that of another DMB of the same two devices.
#[derive(Clone)]
pub struct SharedMemory {
    ptr: NonNull<u8>,
    len: usize,
    plan: CopyPlan,
    fills: Arc<Fills>,
    /// Keeps it mapped.
    _keep: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the memory belongs to no thread, `_keep` keeps it mapped, and all accesses are volatile or atomic.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Memory that somebody mapped, to be copied into by `plan`.
    ///
    /// # Safety
    ///
    /// `len` bytes at `ptr` are readable and writable while `keep` lives, and no Rust reference to them exists.
    pub(crate) unsafe fn new(
        ptr: NonNull<u8>,
        len: usize,
        plan: CopyPlan,
        keep: Arc<dyn Any + Send + Sync>,
    ) -> SharedMemory {
        SharedMemory { ptr, len, plan, fills: Arc::default(), _keep: keep }
    }

    /// Size in bytes.
    #[expect(clippy::len_without_is_empty, reason = "no buffer is empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Copies from the buffer.
    #[inline]
    pub fn read(&self, offset: usize, to: &mut [u8]) -> Result<(), OutOfBounds> {
        self.get(offset, to.len())?.copy_to_slice(to);
        Ok(())
    }

    /// Copies into the buffer. An 8-byte word that is aligned in the buffer and wholly inside is written by one store.
    /// The order of the stores is not defined; a signal or a notification after the call comes after all of them.
    #[inline]
    pub fn write(&self, offset: usize, from: &[u8]) -> Result<(), OutOfBounds> {
        self.get(offset, from.len())?.copy_from_slice(from);
        Ok(())
    }

    /// A part of the buffer.
    #[inline]
    pub fn get(&self, offset: usize, len: usize) -> Result<SharedSlice<'_>, OutOfBounds> {
        match offset.checked_add(len) {
            // SAFETY: the part lies in the buffer, and `self` keeps the buffer.
            Some(end) if end <= self.len => Ok(unsafe { SharedSlice::new(self.ptr.add(offset), len, self) }),
            _ => Err(OutOfBounds { offset, len, size: self.len }),
        }
    }

    /// A part of the buffer.
    ///
    /// # Panics
    ///
    /// As indexing a slice does, if the range does not lie in the buffer.
    #[inline]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> SharedSlice<'_> {
        self.as_slice().slice(range)
    }

    /// All of the buffer.
    #[inline]
    pub fn as_slice(&self) -> SharedSlice<'_> {
        // SAFETY: the whole buffer lies in the buffer, and `self` keeps it.
        unsafe { SharedSlice::new(self.ptr, self.len, self) }
    }

    /// A part of the buffer as a buffer of its own.
    #[cfg(test)]
    pub(crate) fn part(&self, offset: usize, len: usize) -> Result<SharedMemory, OutOfBounds> {
        let ptr = self.get(offset, len)?.ptr;
        Ok(SharedMemory { ptr, len, plan: self.plan, fills: self.fills.clone(), _keep: self._keep.clone() })
    }

    /// Where it lies in this process, for who takes the care of it from the type system: the peer may change it at any
    /// time, so no Rust reference to plain data in it may exist.
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// A word of the buffer to use by atomic operations.
    ///
    /// # Panics
    ///
    /// If the word is not aligned or does not lie in the buffer: to be used with offsets that this program chose.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: any 8 bytes are an AtomicU64.
        unsafe { self.atomic(offset) }
    }

    /// As [`atomic_u64`](Self::atomic_u64), for 4 bytes.
    #[inline]
    pub fn atomic_u32(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: any 4 bytes are an AtomicU32.
        unsafe { self.atomic(offset) }
    }

    /// As [`atomic_u64`](Self::atomic_u64), for 2 bytes.
    #[inline]
    pub(crate) fn atomic_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: any 2 bytes are an AtomicU16.
        unsafe { self.atomic(offset) }
    }

    /// # Safety
    ///
    /// `T` is an atomic integer.
    #[inline]
    unsafe fn atomic<T>(&self, offset: usize) -> &T {
        let word = self.slice(offset..offset + size_of::<T>()).ptr.cast::<T>();
        assert!(word.is_aligned(), "an atomic word at offset {offset}");
        // SAFETY: in bounds, aligned, kept by `self`. Others access it by whole words, or make its value meaningless.
        unsafe { word.as_ref() }
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMemory({} bytes)", self.len)
    }
}

/// A part of a [`SharedMemory`]: readable, and writable, while others write and read it too.
#[derive(Clone, Copy)]
pub struct SharedSlice<'a> {
    ptr: NonNull<u8>,
    len: usize,
    memory: &'a SharedMemory,
}

// SAFETY: as for SharedMemory, which it borrows.
unsafe impl Send for SharedSlice<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedSlice<'_> {}

impl<'a> SharedSlice<'a> {
    /// # Safety
    ///
    /// The `len` bytes at `ptr` lie in `memory`.
    #[inline]
    unsafe fn new(ptr: NonNull<u8>, len: usize, memory: &'a SharedMemory) -> SharedSlice<'a> {
        SharedSlice { ptr, len, memory }
    }

    /// Size in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of it.
    ///
    /// # Panics
    ///
    /// As indexing a slice does, if the range does not lie inside.
    #[inline]
    pub fn slice(&self, range: impl RangeBounds<usize>) -> SharedSlice<'a> {
        let start = match range.start_bound() {
            Bound::Included(&n) => n,
            Bound::Excluded(&n) => n + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&n) => n + 1,
            Bound::Excluded(&n) => n,
            Bound::Unbounded => self.len,
        };
        assert!(start <= end && end <= self.len, "{start}..{end} of {} bytes of shared memory", self.len);
        // SAFETY: start <= end <= len.
        unsafe { SharedSlice::new(self.ptr.add(start), end - start, self.memory) }
    }

    /// Two parts: before and from `at`.
    ///
    /// # Panics
    ///
    /// If `at` is greater than the length.
    #[inline]
    pub fn split_at(&self, at: usize) -> (SharedSlice<'a>, SharedSlice<'a>) {
        (self.slice(..at), self.slice(at..))
    }

    /// Copies out.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    #[inline]
    pub fn copy_to_slice(&self, to: &mut [u8]) {
        assert_eq!(self.len, to.len(), "the lengths differ");
        // SAFETY: `len` bytes on both sides, and a `&mut` cannot lie in shared memory.
        unsafe { shm::copy_from_shared(self.ptr.as_ptr(), to.as_mut_ptr(), self.len) }
    }

    /// Copies in, each aligned 8-byte word by one store.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    #[inline]
    pub fn copy_from_slice(&self, from: &[u8]) {
        assert_eq!(self.len, from.len(), "the lengths differ");
        // SAFETY: `len` bytes on both sides, and a `&` cannot lie in shared memory.
        unsafe { self.memory.plan.copy_to_shared(from.as_ptr(), self.ptr.as_ptr(), self.len) }
    }

    /// Copies from other shared memory, for instance to pass on what came in; undefined content if the two overlap.
    ///
    /// # Panics
    ///
    /// If the lengths differ.
    #[inline]
    pub fn copy_from_shared(&self, from: SharedSlice<'_>) {
        assert_eq!(self.len, from.len, "the lengths differ");
        // SAFETY: `len` bytes on both sides. Overlap is harmless: the copy goes by loads and volatile stores.
        unsafe { self.memory.plan.copy_to_shared(from.ptr.as_ptr(), self.ptr.as_ptr(), self.len) }
    }

    /// Fetches its first cache line, which is about to be read.
    #[inline]
    pub(crate) fn prefetch(&self) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch accesses nothing.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(self.ptr.as_ptr().cast());
        }
    }

    /// The byte at `at`.
    ///
    /// # Panics
    ///
    /// If it does not lie inside.
    #[inline]
    pub fn read_u8(&self, at: usize) -> u8 {
        // SAFETY: `slice` checked that it lies inside.
        unsafe { self.slice(at..at + 1).ptr.as_ptr().read_volatile() }
    }

    /// The eight bytes at `at` as a little-endian number. One load if they are aligned in memory.
    ///
    /// # Panics
    ///
    /// If they do not lie inside.
    #[inline]
    pub fn read_u64(&self, at: usize) -> u64 {
        let word = self.slice(at..at + 8);
        // SAFETY: `slice` checked that the eight bytes lie inside.
        u64::from_le(unsafe { load(word.ptr.as_ptr().cast()) })
    }

    /// Writes eight bytes at `at`, little-endian. One store if they are aligned in memory.
    ///
    /// # Panics
    ///
    /// If they do not lie inside.
    #[inline]
    pub fn write_u64(&self, at: usize, value: u64) {
        let word = self.slice(at..at + 8);
        // SAFETY: `slice` checked that the eight bytes lie inside.
        unsafe { store(word.ptr.as_ptr().cast(), value.to_le()) }
    }

    /// Reads it all, in order, as little-endian 8-byte words; returns the rest of less than eight bytes. This is how to
    /// use every byte that a peer wrote without copying it first.
    #[inline]
    pub fn for_each_u64(&self, mut each: impl FnMut(u64)) -> SharedSlice<'a> {
        let words = self.len / 8;
        let (pieces, rest) = (words / PIECE, words % PIECE);
        let from = self.ptr.as_ptr().cast::<[u64; PIECE]>();
        let mut piece = [0; PIECE];
        for at in 0..pieces {
            // By wide loads, whatever is then done with the words.
            // SAFETY: so many pieces lie inside, and `piece` is one.
            unsafe { shm::copy_from_shared(from.add(at).cast(), piece.as_mut_ptr().cast(), PIECE * 8) };
            piece.into_iter().for_each(|word| each(u64::from_le(word)));
        }
        for at in words - rest..words {
            // SAFETY: at < words.
            each(u64::from_le(unsafe { load(from.cast::<u64>().add(at)) }));
        }
        self.slice(words * 8..)
    }

    /// Writes it all, in order, as little-endian 8-byte words; returns the rest of less than eight bytes. This is how to
    /// generate data where the peer will read it.
    #[inline]
    pub fn fill_u64_with(&self, mut next: impl FnMut() -> u64) -> SharedSlice<'a> {
        let words = self.len / 8;
        let to = self.ptr.as_ptr();
        // Whole lines go by the widest stores, and where plain ones are slow past the caches: what is generated is written
        // once, and read by somebody else.
        let head = if to.cast::<u64>().is_aligned() { (to.align_offset(64) / 8).min(words) } else { words };
        let lines = (words - head) / 8;
        let tail = head + lines * 8;
        for at in 0..head {
            // SAFETY: at < words.
            unsafe { store(to.cast::<u64>().add(at), next().to_le()) }
        }
        let measure = self.memory.fills.start(lines * 64);
        let line = || std::array::from_fn(|_| next().to_le());
        // SAFETY: the lines lie inside, and their start is aligned; the stream is ended before anything else is stored.
        unsafe {
            let to = to.add(head * 8);
            if measure.streams() {
                wide::stream_lines(to, lines, line);
                shm::end_of_stream();
            } else {
                wide::store_lines(to, lines, line);
            }
        }
        self.memory.fills.end(&measure);
        for at in tail..words {
            // SAFETY: at < words.
            unsafe { store(to.cast::<u64>().add(at), next().to_le()) }
        }
        self.slice(words * 8..)
    }
}

/// Words that [`SharedSlice::for_each_u64`] loads at a time.
const PIECE: usize = 64;

impl fmt::Debug for SharedSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedSlice({} bytes)", self.len)
    }
}

/// # Safety
///
/// Eight bytes are readable at `from`.
#[inline]
unsafe fn load(from: *const u64) -> u64 {
    // SAFETY: the caller's promise; the second form does not ask for alignment.
    unsafe {
        if from.is_aligned() {
            from.read_volatile()
        } else {
            u64::from_ne_bytes(from.cast::<[u8; 8]>().read_volatile())
        }
    }
}

/// # Safety
///
/// Eight bytes are writable at `to`.
#[inline]
unsafe fn store(to: *mut u64, value: u64) {
    // SAFETY: the caller's promise; the second form does not ask for alignment.
    unsafe {
        if to.is_aligned() {
            to.write_volatile(value)
        } else {
            to.cast::<[u8; 8]>().write_volatile(value.to_ne_bytes())
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::mapping::Mapping;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsFd;

    /// Zeroed shared memory of its own, for tests.
    pub(crate) fn memory(len: usize) -> SharedMemory {
        let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, len as i64).unwrap();
        let mapping = Arc::new(Mapping::of_file(file.as_fd(), 0, len).unwrap());
        // SAFETY: the mapping is new, has `len` bytes, and is kept.
        unsafe { SharedMemory::new(mapping.base(), len, CopyPlan::default(), mapping) }
    }

    #[test]
    fn what_is_written_is_read() {
        let memory = memory(4096);
        memory.write(100, b"hello").unwrap();
        let mut text = [0; 7];
        memory.read(99, &mut text).unwrap();
        assert_eq!(&text, b"\0hello\0");
        assert_eq!(memory.slice(100..).read_u8(4), b'o');
    }

    #[test]
    fn nothing_outside_is_reached() {
        let memory = memory(4096);
        let outside = |offset, len| Err(OutOfBounds { offset, len, size: 4096 });
        assert_eq!(memory.write(4090, &[1; 7]), outside(4090, 7));
        assert_eq!(memory.read(usize::MAX, &mut [0; 2]), outside(usize::MAX, 2));
        assert_eq!(memory.write(4096, &[]), Ok(()));
    }

    #[test]
    #[should_panic = "83..91 of 90 bytes"]
    fn a_word_that_is_not_wholly_inside_is_not_read() {
        memory(4096).slice(4000..4090).read_u64(83);
    }

    #[test]
    fn words_are_little_endian_at_every_alignment() {
        let memory = memory(4096);
        for at in 0..9 {
            memory.slice(at..).write_u64(3, 0x0807_0605_0403_0201);
            let mut bytes = [0; 8];
            memory.read(at + 3, &mut bytes).unwrap();
            assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
            assert_eq!(memory.slice(at + 3..).read_u64(0), 0x0807_0605_0403_0201);
        }
    }

    #[test]
    fn generating_and_reading_in_place_sees_every_word_once_in_order() {
        for (start, len) in [(0, 4096), (8, 1000), (3, 777), (1, 7), (16, 0)] {
            let memory = memory(4096);
            let slice = memory.slice(start..start + len);
            let mut next = 0u64;
            let rest = slice.fill_u64_with(|| {
                next += 1;
                next
            });
            assert_eq!((rest.len(), next), (len % 8, len as u64 / 8));
            let mut want = 0;
            let rest = slice.for_each_u64(|word| {
                want += 1;
                assert_eq!(word, want);
            });
            assert_eq!((rest.len(), want), (len % 8, next));
        }
    }
}
