//! Noticing fork(): a device belongs to the process that connected it. A child has the memory, and may go on reading
//! and writing it, but it must not speak on the parent's rings and sockets; it learns so by [`Process::check`].

use crate::error::Error;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

/// How often this process's line was forked.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(u32);

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

impl Process {
    /// The one that calls.
    pub(crate) fn current() -> Process {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            // SAFETY: the handler does one atomic addition, which is allowed in a fork's child. The call fails only
            // without memory for its list; then forks go unnoticed, as they would without this module.
            unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        });
        Process(GENERATION.load(Ordering::Relaxed))
    }

    /// Another one, for tests.
    #[cfg(test)]
    pub(crate) fn other() -> Process {
        Process(u32::MAX)
    }

    /// Whether this is the calling process. Costs one load.
    pub(crate) fn is_current(self) -> bool {
        self.0 == GENERATION.load(Ordering::Relaxed)
    }

    /// [`Error::Forked`] unless this is the calling process.
    pub(crate) fn check(self) -> Result<(), Error> {
        if self.is_current() { Ok(()) } else { Err(Error::Forked) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, fork};

    #[test]
    fn a_child_is_another_process() {
        let process = Process::current();
        // SAFETY: the child only loads an atomic and ends by _exit().
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let code = i32::from(process.is_current());
                // SAFETY: ends the process at once, without destructors.
                unsafe { libc::_exit(code) }
            }
            ForkResult::Parent { child } => {
                assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
                assert!(process.is_current());
            }
        }
    }
}
