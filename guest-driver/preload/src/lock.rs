//! A lock in memory that processes share. Nothing blocks in the kernel for something else while it is held.

use std::sync::atomic::{AtomicU32, Ordering};

/// 0: free, 1: held, 2: held and somebody waits.
#[repr(transparent)]
pub struct Lock(AtomicU32);

/// Frees the lock when dropped.
pub struct Guard<'a>(&'a Lock);

impl Lock {
    /// Takes it.
    #[inline]
    pub fn take(&self) -> Guard<'_> {
        if self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.take_slowly();
        }
        Guard(self)
    }

    #[cold]
    fn take_slowly(&self) {
        for _ in 0..100 {
            if self.0.load(Ordering::Relaxed) == 0
                && self.0.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return;
            }
            std::hint::spin_loop();
        }
        while self.0.swap(2, Ordering::Acquire) != 0 {
            futex(&self.0, libc::FUTEX_WAIT, 2);
        }
    }

    /// As it was at first: for memory that is used again.
    pub fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

impl Drop for Guard<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.0.0.swap(0, Ordering::Release) == 2 {
            futex(&self.0.0, libc::FUTEX_WAKE, 1);
        }
    }
}

fn futex(word: &AtomicU32, operation: i32, value: u32) {
    crate::errno::keep(|| {
        // SAFETY: the word is valid; no timeout. Whatever comes back, the caller looks again.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                operation,
                value,
                std::ptr::null::<libc::timespec>(),
            )
        }
    });
}
