//! Copying to and from memory that somebody else accesses at the same time (`docs/device.md`, 10).
//!
//! `memcpy` promises nothing about how its stores reach the memory: it may store a word twice, or byte by byte. Whoever
//! writes into a DMB must store each aligned 8-byte word whole, because the other side reads cursors as such words.

/// Copies into shared memory. Each 8-byte word that is aligned in `dst` and wholly inside is stored by one instruction.
/// The stores are not ordered among themselves; a release fence or store after the call orders all of them.
///
/// # Safety
///
/// `len` bytes are readable at `src` and writable at `dst`. The memory at `dst` may be accessed by others meanwhile; no
/// Rust reference to it exists.
#[inline]
pub unsafe fn copy_to_shared(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller's promise covers every byte below: `head` and the words and the tail sum up to `len`.
    unsafe {
        let head = dst.align_offset(8).min(len);
        if head != 0 {
            copy_bytes(src, dst, head);
        }
        let (src, dst, len) = (src.add(head), dst.add(head), len - head);
        let body = len & !7;
        copy_words(src, dst, body);
        if body != len {
            copy_bytes(src.add(body), dst.add(body), len - body);
        }
    }
}

/// Copies from shared memory. What is read is a mixture of old and new if somebody writes it meanwhile.
///
/// # Safety
///
/// As for [`copy_to_shared`], with the roles of `src` and `dst` exchanged.
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
/// As for [`copy_to_shared`]; `dst` is aligned to 8, `len` is a multiple of 8.
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_words(mut src: *const u8, mut dst: *mut u8, mut len: usize) {
    use core::arch::x86_64::{__m128i, _mm_loadu_si128};
    // SAFETY: the caller's promise. An aligned 16-byte store is one access, so each 8-byte word in it is whole. The
    // stores are volatile so that the compiler cannot turn the loops into a call of memcpy.
    unsafe {
        if len >= 64 {
            if dst.align_offset(16) != 0 {
                dst.cast::<u64>().write_volatile(src.cast::<u64>().read_unaligned());
                (src, dst, len) = (src.add(8), dst.add(8), len - 8);
            }
            while len >= 64 {
                let (from, to) = (src.cast::<__m128i>(), dst.cast::<__m128i>());
                let (a, b) = (_mm_loadu_si128(from), _mm_loadu_si128(from.add(1)));
                let (c, d) = (_mm_loadu_si128(from.add(2)), _mm_loadu_si128(from.add(3)));
                to.write_volatile(a);
                to.add(1).write_volatile(b);
                to.add(2).write_volatile(c);
                to.add(3).write_volatile(d);
                (src, dst, len) = (src.add(64), dst.add(64), len - 64);
            }
        }
        while len >= 8 {
            dst.cast::<u64>().write_volatile(src.cast::<u64>().read_unaligned());
            (src, dst, len) = (src.add(8), dst.add(8), len - 8);
        }
    }
}

/// # Safety
///
/// As for [`copy_to_shared`]; `dst` is aligned to 8, `len` is a multiple of 8.
#[cfg(not(target_arch = "x86_64"))]
#[inline]
unsafe fn copy_words(src: *const u8, dst: *mut u8, len: usize) {
    for at in (0..len).step_by(8) {
        // SAFETY: the caller's promise; at + 8 <= len. An aligned 64-bit store is one access.
        unsafe { dst.add(at).cast::<u64>().write_volatile(src.add(at).cast::<u64>().read_unaligned()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    #[test]
    fn every_alignment_and_length_copies_exactly_its_bytes() {
        let source: Vec<u8> = (0..400).map(|i| i as u8 ^ 0x5a).collect();
        for len in (0..40).chain([63, 64, 65, 127, 128, 200, 301]) {
            for from in [0, 1, 7, 8] {
                for to in 0..17 {
                    let mut target = vec![0u8; 400];
                    // SAFETY: from + len and to + len are below 400.
                    unsafe { copy_to_shared(source.as_ptr().add(from), target.as_mut_ptr().add(to), len) };
                    assert_eq!(target[to..to + len], source[from..from + len]);
                    assert!(target[..to].iter().chain(&target[to + len..]).all(|b| *b == 0));
                }
            }
        }
    }
}
