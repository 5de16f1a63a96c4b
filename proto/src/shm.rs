//! Copying to and from memory that somebody else accesses at the same time (`docs/device.md`, 10).
//!
//! `memcpy` promises nothing about how its stores reach the memory: it may store a word twice, or byte by byte. Whoever
//! writes into a DMB must store each aligned 8-byte word whole, because the other side reads cursors as such words.
//!
//! How memory that another core has just read is written fastest differs between processors by a factor of five, and by
//! size. So there are several [`CopyMethod`]s, and a [`CopyPlan`] that the device measures and tells its drivers.

pub mod wide;

/// Instructions that copy into shared memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum CopyMethod {
    /// Ordinary vector stores: each takes the cache line from the core that has it. Best for what fits a few lines.
    #[default]
    Plain = 1,
    /// Non-temporal vector stores: whole lines go past the caches, nobody is asked for them.
    NonTemporal = 2,
    /// The string instruction, by 8-byte words: the processor decides.
    String = 3,
}

impl CopyMethod {
    /// All of them.
    pub const ALL: [CopyMethod; 3] = [CopyMethod::Plain, CopyMethod::NonTemporal, CopyMethod::String];
}

/// Which [`CopyMethod`] to use by size: a hint from the device, one for each power of two from 256 bytes on
/// (`docs/device.md`, 4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CopyPlan([CopyMethod; CopyPlan::CLASSES]);

impl CopyPlan {
    /// Number of sizes that the plan tells apart.
    pub const CLASSES: usize = 16;
    /// Copies below this size, in bytes, are [`CopyMethod::Plain`].
    pub const FIRST: usize = 256;

    /// The plan with these methods, for 256 bytes, 512, 1024, ….
    pub const fn new(methods: [CopyMethod; CopyPlan::CLASSES]) -> CopyPlan {
        CopyPlan(methods)
    }

    /// The plan that a device presents; what it does not know becomes [`CopyMethod::Plain`].
    pub fn from_bytes(bytes: [u8; CopyPlan::CLASSES]) -> CopyPlan {
        CopyPlan(bytes.map(|b| CopyMethod::ALL.into_iter().find(|m| *m as u8 == b).unwrap_or_default()))
    }

    /// The plan as on the wire.
    pub fn to_bytes(self) -> [u8; CopyPlan::CLASSES] {
        self.0.map(|m| m as u8)
    }

    /// The method for a copy of `len` bytes.
    #[inline]
    pub fn method(&self, len: usize) -> CopyMethod {
        if len < CopyPlan::FIRST {
            return CopyMethod::Plain;
        }
        let class = (len.ilog2() - CopyPlan::FIRST.ilog2()) as usize;
        self.0[class.min(CopyPlan::CLASSES - 1)]
    }

    /// Copies into shared memory by the method for this size; see [`copy_to_shared`].
    ///
    /// # Safety
    ///
    /// As for [`copy_to_shared`].
    #[inline]
    pub unsafe fn copy_to_shared(&self, src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { copy_to_shared(self.method(len), src, dst, len) }
    }
}

/// Copies into shared memory. Each 8-byte word that is aligned in `dst` and wholly inside is stored by one instruction.
/// The stores are not ordered among themselves; a release fence or store after the call orders all of them.
///
/// # Safety
///
/// `len` bytes are readable at `src` and writable at `dst`. The memory at `dst` may be accessed by others meanwhile; no
/// Rust reference to it exists.
#[inline]
pub unsafe fn copy_to_shared(method: CopyMethod, src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise covers every byte below: head, words and tail sum up to `len`.
    unsafe {
        let head = dst.align_offset(8).min(len);
        if head != 0 {
            copy_bytes(src, dst, head);
        }
        let (src, dst, len) = (src.add(head), dst.add(head), len - head);
        let words = len & !7;
        match method {
            CopyMethod::Plain => copy_words(src, dst, words),
            CopyMethod::NonTemporal => {
                stream_words(src, dst, words);
                end_of_stream();
            }
            CopyMethod::String => string_words(src, dst, words),
        }
        if words != len {
            copy_bytes(src.add(words), dst.add(words), len - words);
        }
    }
}

/// Orders what [`wide::stream_lines`] stored before every later store.
#[inline]
pub fn end_of_stream() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: SSE is part of x86-64.
    unsafe {
        core::arch::x86_64::_mm_sfence();
    }
}

/// Copies from shared memory. What is read is a mixture of old and new if somebody writes it meanwhile.
///
/// # Safety
///
/// `len` bytes are readable at `src` and writable at `dst`, which nobody else accesses. The memory at `src` may be
/// written by others meanwhile; no Rust reference to it exists.
#[inline]
pub unsafe fn copy_from_shared(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise. A racing writer can make the bytes meaningless, not the copy.
    unsafe { core::ptr::copy_nonoverlapping(src, dst, len) }
}

/// # Safety
///
/// As for [`copy_to_shared`].
#[inline]
unsafe fn copy_bytes(src: *const u8, dst: *mut u8, len: usize) {
    for i in 0..len {
        // SAFETY: the caller's promise; i < len.
        unsafe { dst.add(i).write_volatile(src.add(i).read()) }
    }
}

/// # Safety
///
/// 8 bytes are readable at `src` and writable at `dst`, which is aligned to 8.
#[inline]
unsafe fn copy_word(src: *const u8, dst: *mut u8) {
    // SAFETY: the caller's promise. An aligned 64-bit store is one access.
    unsafe { dst.cast::<u64>().write_volatile(src.cast::<u64>().read_unaligned()) }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod x86_64 {
    use super::copy_word;
    use super::wide::{self, Line};

    /// # Safety
    ///
    /// As for [`copy_word`], for `len` bytes, a multiple of 8.
    #[inline]
    pub unsafe fn copy_words(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { copy_lines::<false>(src, dst, len) }
    }

    /// The stores are ordered by nothing but a store fence, not even by a release store.
    ///
    /// # Safety
    ///
    /// As for [`copy_words`].
    #[inline]
    pub unsafe fn stream_words(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { copy_lines::<true>(src, dst, len) }
    }

    /// Whole lines by vectors, what is before and after by words. A part of a line never goes past the caches: the line would be read
    /// back first.
    ///
    /// # Safety
    ///
    /// As for [`copy_words`].
    #[inline]
    unsafe fn copy_lines<const STREAM: bool>(src: *const u8, dst: *mut u8, len: usize) {
        let head = dst.align_offset(64).min(len);
        let lines = (len - head) / 64;
        let tail = head + lines * 64;
        // SAFETY: the caller's promise: head, lines and tail sum up to `len`.
        unsafe {
            each_word(src, dst, 0..head);
            if lines != 0 {
                let mut from = src.add(head).cast::<[u8; 64]>();
                let next = || {
                    let line = from.cast::<Line>().read_unaligned();
                    from = from.add(1);
                    line
                };
                if STREAM {
                    wide::stream_lines(dst.add(head), lines, next);
                } else {
                    wide::store_lines(dst.add(head), lines, next);
                }
            }
            each_word(src, dst, tail..len);
        }
    }

    /// # Safety
    ///
    /// As for [`copy_words`], for a range of it.
    #[inline]
    unsafe fn each_word(src: *const u8, dst: *mut u8, range: core::ops::Range<usize>) {
        for at in range.step_by(8) {
            // SAFETY: the caller's promise.
            unsafe { copy_word(src.add(at), dst.add(at)) }
        }
    }

    /// # Safety
    ///
    /// As for [`copy_words`].
    pub unsafe fn string_words(src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise. The direction flag is clear by the ABI. It counts in words, so that a word is
        // never stored in parts.
        unsafe {
            core::arch::asm!(
                "rep movsq",
                inout("rsi") src => _,
                inout("rdi") dst => _,
                inout("rcx") len / 8 => _,
                options(nostack, preserves_flags)
            );
        }
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
use x86_64::{copy_words, stream_words, string_words};

/// # Safety
///
/// As for [`copy_word`], for `len` bytes, a multiple of 8.
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
#[inline]
unsafe fn copy_words(src: *const u8, dst: *mut u8, len: usize) {
    for at in (0..len).step_by(8) {
        // SAFETY: the caller's promise; at + 8 <= len.
        unsafe { copy_word(src.add(at), dst.add(at)) }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
use copy_words as stream_words;
#[cfg(not(all(target_arch = "x86_64", not(miri))))]
use copy_words as string_words;

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn every_method_alignment_and_length_copies_exactly_its_bytes() {
        let source: Vec<u8> = (0..500).map(|i| i as u8 ^ 0x5a).collect();
        for method in CopyMethod::ALL {
            for len in (0..40).chain([63, 64, 65, 71, 72, 80, 127, 128, 200, 301, 384]) {
                for from in [0, 1, 7, 8] {
                    for to in (0..17).chain([56, 63, 64]) {
                        let mut target = vec![0u8; 500];
                        // SAFETY: from + len and to + len are below 500.
                        unsafe {
                            copy_to_shared(
                                method,
                                source.as_ptr().add(from),
                                target.as_mut_ptr().add(to),
                                len,
                            );
                        }
                        assert_eq!(
                            target[to..to + len],
                            source[from..from + len],
                            "{method:?} {len} {from} {to}"
                        );
                        assert!(target[..to].iter().chain(&target[to + len..]).all(|b| *b == 0));
                    }
                }
            }
        }
    }

    #[test]
    fn a_plan_has_a_method_for_every_size_and_survives_the_wire() {
        let mut methods = [CopyMethod::NonTemporal; CopyPlan::CLASSES];
        methods[0] = CopyMethod::Plain;
        methods[15] = CopyMethod::String;
        let plan = CopyPlan::new(methods);
        assert_eq!(CopyPlan::from_bytes(plan.to_bytes()), plan);
        for (len, method) in [
            (0, CopyMethod::Plain),
            (255, CopyMethod::Plain),
            (256, CopyMethod::Plain),
            (511, CopyMethod::Plain),
            (512, CopyMethod::NonTemporal),
            (4 << 20, CopyMethod::NonTemporal),
            (8 << 20, CopyMethod::String),
            (usize::MAX, CopyMethod::String),
        ] {
            assert_eq!(plan.method(len), method, "{len}");
        }
        assert_eq!(CopyPlan::from_bytes([0xff; 16]), CopyPlan::default());
    }
}
