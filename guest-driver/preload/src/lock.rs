//! A lock in memory that processes share. Nothing blocks in the kernel for something else while it is held.
//!
//! It names the thread that holds it: a process may be killed at any moment, and those that share a connection with it go
//! on. What the lock guards is then as that thread left it, and every step of it leaves something that can be used. So it is
//! for a signal's handler that interrupts the holder, and for a thread that has left by `longjmp`: both go on without waiting.

use crate::errno;
use libc::c_int;
use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Somebody waits. The other bits are the holder's thread id; 0: free.
const WAITED: u32 = 1 << 31;
/// How long to wait before looking whether the holder lives.
const PATIENCE: Duration = Duration::from_millis(100);

#[repr(transparent)]
pub struct Lock(AtomicU32);

/// Frees the lock when dropped, unless the one that it interrupts has it.
pub struct Guard<'a>(&'a Lock, bool);

thread_local! {
    static THREAD: Cell<u32> = const { Cell::new(0) };
    /// Where the stack was when this thread took a lock last.
    static STACK: Cell<usize> = const { Cell::new(0) };
}

/// What a signal's frame takes of the stack at least.
const FRAME: usize = 512;

/// Where the stack is.
#[inline]
fn stack() -> usize {
    let here = 0u8;
    std::hint::black_box(&raw const here) as usize
}

/// This thread's id.
#[inline]
fn thread() -> u32 {
    THREAD.with(|thread| match thread.get() {
        0 => {
            // SAFETY: takes nothing, and cannot fail.
            let id = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
            thread.set(id);
            id
        }
        id => id,
    })
}

/// In a fork's child: this thread is another one. It asks now, because it may forbid itself to ask later.
pub fn after_fork() {
    THREAD.with(|thread| thread.set(0));
    thread();
}

impl Lock {
    /// Takes it.
    #[inline]
    pub fn take(&self) -> Guard<'_> {
        let own = thread();
        let nested = self.0.compare_exchange(0, own, Ordering::Acquire, Ordering::Relaxed).is_err()
            && self.take_slowly(own);
        if !nested {
            STACK.with(|at| at.set(stack()));
        }
        Guard(self, nested)
    }

    /// Whether this thread has it and was interrupted by a signal, whose handler this is.
    #[inline]
    pub fn is_interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed) & !WAITED == thread() && stack() + FRAME < STACK.with(Cell::get)
    }

    /// Takes it, if nobody has it.
    pub fn try_take(&self) -> Option<Guard<'_>> {
        let taken = self.0.compare_exchange(0, thread(), Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok().then(|| Guard(self, false))
    }

    /// True: it is that of who is interrupted.
    #[cold]
    fn take_slowly(&self, own: u32) -> bool {
        if self.0.load(Ordering::Relaxed) & !WAITED == own {
            return self.is_interrupted();
        }
        for _ in 0..100 {
            if self.0.load(Ordering::Relaxed) == 0
                && self.0.compare_exchange(0, own, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return false;
            }
            std::hint::spin_loop();
        }
        loop {
            let seen = self.0.load(Ordering::Relaxed);
            // Who has waited does not know whether others wait.
            if seen == 0 {
                if self.0.compare_exchange(0, own | WAITED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                    return false;
                }
                continue;
            }
            let waited = seen | WAITED;
            if seen != waited
                && self.0.compare_exchange(seen, waited, Ordering::Relaxed, Ordering::Relaxed).is_err()
            {
                continue;
            }
            if wait(&self.0, waited, PATIENCE) == Err(libc::ETIMEDOUT)
                && !is_alive(waited & !WAITED)
                && self.0.compare_exchange(waited, own | WAITED, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return false;
            }
        }
    }

    /// Frees what was taken and whose guard was forgotten.
    #[inline]
    pub fn release(&self) {
        if self.0.swap(0, Ordering::Release) & WAITED != 0 {
            wake(&self.0, 1);
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
        if !self.1 {
            self.0.release();
        }
    }
}

fn is_alive(thread: u32) -> bool {
    // SAFETY: signal 0 is none. Whose it is does not matter: EPERM says that it is there.
    errno::keep(|| unsafe { libc::kill(thread as i32, 0) } == 0 || errno::get() != libc::ESRCH)
}

/// Sleeps as long as the word is `value`, until it is woken, or for so long. Says as an errno what else ended it.
pub fn wait(word: &AtomicU32, value: u32, longest: Duration) -> Result<(), c_int> {
    let time =
        libc::timespec { tv_sec: longest.as_secs() as i64, tv_nsec: i64::from(longest.subsec_nanos()) };
    errno::keep(|| {
        // SAFETY: the word is valid, and so is the timeout.
        let result = unsafe {
            libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time)
        };
        if result == 0 { Ok(()) } else { Err(errno::get()) }
    })
}

/// Wakes so many that sleep by `wait`, in whatever process.
pub fn wake(word: &AtomicU32, most: i32) {
    // SAFETY: the word is valid.
    errno::keep(|| unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, most) });
}
