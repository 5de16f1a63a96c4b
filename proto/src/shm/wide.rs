//! Cache lines from registers into shared memory, by the widest vectors that the processor has: a line that is stored whole
//! costs one entry of the store buffer instead of four.

/// A cache line, as numbers of the processor's own byte order.
pub type Line = [u64; 8];

/// Stores `count` lines from `next`, in order. Each aligned 8-byte word is stored whole. The stores are ordered by a release
/// fence or store.
///
/// # Safety
///
/// `dst` is aligned to 64, and so many lines are writable there. They may be accessed by others meanwhile; no Rust reference
/// to them exists.
#[inline]
pub unsafe fn store_lines(dst: *mut u8, count: usize, next: impl FnMut() -> Line) {
    // SAFETY: the caller's promise; what the processor has was asked.
    unsafe { vectors::store::<false>(dst, count, next) }
}

/// As [`store_lines`], past the caches; ordered before later stores by [`end_of_stream`](super::end_of_stream) only.
///
/// # Safety
///
/// As for [`store_lines`].
#[inline]
pub unsafe fn stream_lines(dst: *mut u8, count: usize, next: impl FnMut() -> Line) {
    // SAFETY: the caller's promise; what the processor has was asked.
    unsafe { vectors::store::<true>(dst, count, next) }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod vectors {
    use super::Line;
    use core::arch::x86_64::*;

    cpufeatures::new!(avx, "avx");
    // 64-byte vectors cost clock frequency on processors that are older than these instructions.
    cpufeatures::new!(avx512, "avx512f", "avx512vbmi2");

    /// # Safety
    ///
    /// As for [`store_lines`](super::store_lines).
    #[inline]
    pub unsafe fn store<const STREAM: bool>(dst: *mut u8, count: usize, next: impl FnMut() -> Line) {
        // SAFETY: the caller's promise, and each form only where the processor has it.
        unsafe {
            if avx512::get() {
                store_avx512::<STREAM, _>(dst, count, next);
            } else if avx::get() {
                store_avx::<STREAM, _>(dst, count, next);
            } else {
                store_sse2::<STREAM, _>(dst, count, next);
            }
        }
    }

    /// The stores with one kind of vector. Plain ones are volatile, because others access the memory too.
    macro_rules! store_with {
        ($feature:literal, $vector:ty, $stream:ident, $store:ident) => {
            /// # Safety
            ///
            /// As for [`store`], on a processor that has the feature.
            #[target_feature(enable = $feature)]
            unsafe fn $store<const STREAM: bool, F: FnMut() -> Line>(
                dst: *mut u8,
                count: usize,
                mut next: F,
            ) {
                // What `next` remembers stays in registers from one line to the next only while nothing is stored between.
                let (fours, ones) = (count / 4, count % 4);
                for at in 0..fours {
                    let lines: [Line; 4] = core::array::from_fn(|_| next());
                    for (i, line) in lines.into_iter().enumerate() {
                        // SAFETY: below `count` lines.
                        unsafe { put::<STREAM>(dst.cast::<Line>().add(at * 4 + i), line) }
                    }
                }
                for at in count - ones..count {
                    // SAFETY: as above.
                    unsafe { put::<STREAM>(dst.cast::<Line>().add(at), next()) }
                }

                /// # Safety
                ///
                /// `to` is a line, aligned to its size.
                #[inline]
                #[target_feature(enable = $feature)]
                unsafe fn put<const STREAM: bool>(to: *mut Line, line: Line) {
                    const PARTS: usize = size_of::<Line>() / size_of::<$vector>();
                    // SAFETY: both are 64 bytes, and any bytes make either.
                    let parts: [$vector; PARTS] = unsafe { core::mem::transmute(line) };
                    for (i, part) in parts.into_iter().enumerate() {
                        // SAFETY: inside of the line, and aligned as it is.
                        unsafe {
                            let to = to.cast::<$vector>().add(i);
                            if STREAM { $stream(to.cast(), part) } else { to.write_volatile(part) }
                        }
                    }
                }
            }
        };
    }

    store_with!("avx512f", __m512i, _mm512_stream_si512, store_avx512);
    store_with!("avx", __m256i, _mm256_stream_si256, store_avx);
    store_with!("sse2", __m128i, _mm_stream_si128, store_sse2);

    #[cfg(test)]
    mod tests {
        use super::*;

        #[repr(align(64))]
        struct Aligned([u8; 1024]);

        macro_rules! stored {
            ($store:expr) => {{
                let mut memory = Aligned([0; 1024]);
                let mut next = 0u64;
                let line = || {
                    next += 8;
                    core::array::from_fn(|i| next - 7 + i as u64)
                };
                // SAFETY: 15 lines of the memory's 16, which nobody else accesses, on a processor that can.
                unsafe { $store(memory.0.as_mut_ptr(), 15, line) };
                crate::shm::end_of_stream();
                let (words, []) = memory.0.as_chunks::<8>() else { unreachable!() };
                for (i, word) in words.iter().enumerate() {
                    let want = if i < 15 * 8 { i as u64 + 1 } else { 0 };
                    assert_eq!(u64::from_ne_bytes(*word), want);
                }
            }};
        }

        #[test]
        fn every_kind_of_vector_stores_the_same() {
            stored!(store_sse2::<false, _>);
            stored!(store_sse2::<true, _>);
            if avx::get() {
                stored!(store_avx::<false, _>);
                stored!(store_avx::<true, _>);
            }
            if avx512::get() {
                stored!(store_avx512::<false, _>);
                stored!(store_avx512::<true, _>);
            }
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", not(miri))))]
mod vectors {
    use super::Line;

    /// # Safety
    ///
    /// As for [`store_lines`](super::store_lines).
    pub unsafe fn store<const STREAM: bool>(dst: *mut u8, count: usize, mut next: impl FnMut() -> Line) {
        for at in 0..count {
            for (i, word) in next().into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe { dst.cast::<u64>().add(at * 8 + i).write_volatile(word) }
            }
        }
    }
}
