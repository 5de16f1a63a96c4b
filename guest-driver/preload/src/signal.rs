//! Whether a wait goes on after a signal. The kernel restarts `recv` and `send` as the handler asked for (signal(7)), but never
//! `poll`, by which some of their waits are done here.

use libc::c_int;
use std::mem::zeroed;
use std::ptr::null;

/// Faults of a thread itself: they happen to it while it runs, not while it waits.
const FAULTS: [c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// Whether `recv` or `send`, without a timeout, would have been restarted: every handler that can have interrupted this thread
/// was installed with `SA_RESTART`. If some were and others not, nobody can say which it was, and a program that wants to
/// be interrupted by one has to know `EINTR`.
pub fn restarts() -> bool {
    // SAFETY: all-zero bytes are a set and an action, which the calls fill in; nothing is changed.
    unsafe {
        let mut blocked: libc::sigset_t = zeroed();
        libc::pthread_sigmask(libc::SIG_BLOCK, null(), &mut blocked);
        let interrupts =
            |signal: &c_int| !FAULTS.contains(signal) && libc::sigismember(&blocked, *signal) != 1;
        (1..=libc::SIGRTMAX()).filter(interrupts).all(|signal| {
            let mut action: libc::sigaction = zeroed();
            let known = libc::sigaction(signal, null(), &mut action) == 0;
            let handled = !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN);
            !(known && handled) || action.sa_flags & libc::SA_RESTART != 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ptr::null_mut;

    extern "C" fn nothing(_: c_int) {}

    fn handle(signal: c_int, flags: c_int) {
        // SAFETY: the handler does nothing.
        unsafe {
            let mut action: libc::sigaction = zeroed();
            action.sa_sigaction = nothing as extern "C" fn(c_int) as usize;
            action.sa_flags = flags;
            libc::sigaction(signal, &action, null_mut());
        }
    }

    #[test]
    fn a_wait_goes_on_if_every_handler_that_can_run_wants_it() {
        handle(libc::SIGUSR1, libc::SA_RESTART);
        assert!(restarts());
        handle(libc::SIGUSR2, 0);
        assert!(!restarts());
        // SAFETY: a set of one signal, for this thread.
        unsafe {
            let mut set: libc::sigset_t = zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR2);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut());
        }
        assert!(restarts(), "what is blocked interrupts nobody");
    }
}
