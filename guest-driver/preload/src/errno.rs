//! `errno`, and how results go from here to there.

use libc::{c_int, ssize_t};

/// What a call came to: a number of bytes, or an errno.
pub type Outcome = Result<usize, c_int>;

/// `errno` of this thread.
pub fn get() -> c_int {
    // SAFETY: glibc's address of this thread's errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// Sets `errno` of this thread.
pub fn set(value: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = value };
}

/// What a system call returned.
pub fn outcome(returned: ssize_t) -> Outcome {
    usize::try_from(returned).map_err(|_| get())
}

/// What a C function returns.
pub fn give(outcome: Outcome) -> ssize_t {
    match outcome {
        Ok(n) => n as ssize_t,
        Err(errno) => {
            set(errno);
            -1
        }
    }
}

/// Runs something when dropped: also if the thread is cancelled inside of the kernel.
pub struct Finally<F: FnMut()>(pub F);

impl<F: FnMut()> Drop for Finally<F> {
    #[inline]
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Runs something that shall leave `errno` as it was.
pub fn keep<T>(run: impl FnOnce() -> T) -> T {
    let before = get();
    let result = run();
    set(before);
    result
}
