//! Ways to copy memory on one core: a limit is only one if it uses the best of them.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// A way to copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CopyKernel {
    /// The C library's `memcpy`.
    Libc,
    /// The processor's `rep movsb`.
    RepMovsb,
    /// A loop of the widest vector instructions that the processor has.
    Vector,
}

/// Below this size, in bytes, a way to copy makes no difference but its own start-up.
const SMALL: usize = 256;

impl CopyKernel {
    /// Copies.
    ///
    /// # Safety
    ///
    /// `len` bytes are readable at `src` and writable at `dst`, and the two do not overlap. No reference to either
    /// exists.
    #[inline]
    pub unsafe fn copy(self, src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise is each kernel's; the features have been detected.
        unsafe {
            match self {
                _ if len < SMALL => std::ptr::copy_nonoverlapping(src, dst, len),
                #[cfg(target_arch = "x86_64")]
                CopyKernel::RepMovsb => rep_movsb(src, dst, len),
                #[cfg(target_arch = "x86_64")]
                CopyKernel::Vector if is_x86_feature_detected!("avx512f") => avx512(src, dst, len),
                #[cfg(target_arch = "x86_64")]
                CopyKernel::Vector if is_x86_feature_detected!("avx") => avx(src, dst, len),
                _ => std::ptr::copy_nonoverlapping(src, dst, len),
            }
        }
    }
}

/// # Safety
///
/// As [`CopyKernel::copy`].
#[cfg(target_arch = "x86_64")]
unsafe fn rep_movsb(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: it reads and writes exactly the caller's bytes; the direction flag is clear by the calling convention.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _, inout("rsi") src => _, inout("rdi") dst => _,
            options(nostack, preserves_flags)
        )
    }
}

/// # Safety
///
/// As [`CopyKernel::copy`], the processor has AVX-512, and `len` is at least 256.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512(src: *const u8, dst: *mut u8, len: usize) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_storeu_si512};
    // SAFETY: every offset below is at most len - 64 or, in the loop, at most len - 256.
    unsafe {
        let load = |at: usize| _mm512_loadu_si512(src.add(at).cast::<__m512i>());
        let store = |at: usize, v| _mm512_storeu_si512(dst.add(at).cast::<__m512i>(), v);
        let mut at = 0;
        while at + 256 <= len {
            let (a, b, c, d) = (load(at), load(at + 64), load(at + 128), load(at + 192));
            store(at, a);
            store(at + 64, b);
            store(at + 128, c);
            store(at + 192, d);
            at += 256;
        }
        while at + 64 <= len {
            store(at, load(at));
            at += 64;
        }
        // The last, partial vector overlaps what has been copied already.
        store(len - 64, load(len - 64));
    }
}

/// # Safety
///
/// As [`CopyKernel::copy`], the processor has AVX, and `len` is at least 256.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx")]
unsafe fn avx(src: *const u8, dst: *mut u8, len: usize) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    // SAFETY: every offset below is at most len - 32 or, in the loop, at most len - 128.
    unsafe {
        let load = |at: usize| _mm256_loadu_si256(src.add(at).cast::<__m256i>());
        let store = |at: usize, v| _mm256_storeu_si256(dst.add(at).cast::<__m256i>(), v);
        let mut at = 0;
        while at + 128 <= len {
            let (a, b, c, d) = (load(at), load(at + 32), load(at + 64), load(at + 96));
            store(at, a);
            store(at + 32, b);
            store(at + 64, c);
            store(at + 96, d);
            at += 128;
        }
        while at + 32 <= len {
            store(at, load(at));
            at += 32;
        }
        store(len - 32, load(len - 32));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_copies_exactly_its_bytes() {
        let source: Vec<u8> = (0..2000).map(|i| (i * 7) as u8).collect();
        for kernel in CopyKernel::value_variants() {
            for len in [0, 1, 63, 255, 256, 257, 300, 319, 320, 321, 511, 512, 1000, 1999] {
                let mut target = vec![0xaau8; 2048];
                // SAFETY: len is below the length of both.
                unsafe { kernel.copy(source.as_ptr(), target.as_mut_ptr().add(3), len) };
                assert_eq!(target[3..3 + len], source[..len], "{kernel:?} {len}");
                assert!(target[..3].iter().chain(&target[3 + len..]).all(|b| *b == 0xaa), "{kernel:?} {len}");
            }
        }
    }
}
