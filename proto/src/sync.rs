//! Atomic words: the real ones, or loom's, which try every order in which they may be seen (`tests/loom.rs`).

#[cfg(not(loom))]
pub(crate) use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Orders every earlier store before every later load, as `smp_mb()` does: a locked instruction on the stack, which
/// costs less than the `mfence` that the compiler would choose.
#[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
#[inline]
pub(crate) fn full_fence() {
    // SAFETY: it ORs 0 into the word at the top of the stack, which is mapped; it changes nothing but the flags.
    unsafe { core::arch::asm!("lock or dword ptr [rsp], 0", options(nostack)) }
}

/// Orders every earlier store before every later load.
#[cfg(all(not(all(target_arch = "x86_64", not(miri))), not(loom)))]
#[inline]
pub(crate) fn full_fence() {
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// Orders every earlier store before every later load.
#[cfg(loom)]
pub(crate) fn full_fence() {
    loom::sync::atomic::fence(Ordering::SeqCst);
}

/// Sets bits, after every earlier store, and orders it and them before every later load.
#[inline]
pub(crate) fn or_and_fence(word: &AtomicU64, bits: u64) {
    word.fetch_or(bits, Ordering::SeqCst);
    // On x86 the locked instruction was the fence, as long as the compiler keeps the order.
    #[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
    core::sync::atomic::compiler_fence(Ordering::SeqCst);
    #[cfg(not(all(target_arch = "x86_64", not(miri), not(loom))))]
    full_fence();
}
