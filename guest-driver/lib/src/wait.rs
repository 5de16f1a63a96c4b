//! Waiting: futexes, and how long to spin before one sleeps. Not for what is waited for.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Who can wait on and wake a futex word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// Threads of this process.
    Process,
    /// Whoever maps the memory.
    Host,
}

impl Scope {
    fn flag(self) -> i32 {
        match self {
            Scope::Process => libc::FUTEX_PRIVATE_FLAG,
            Scope::Host => 0,
        }
    }
}

/// Sleeps while `word` holds `value`, until woken or `deadline`. May return at any time for no reason.
pub(crate) fn futex_wait(word: &AtomicU32, value: u32, scope: Scope, deadline: Option<Instant>) {
    let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => return,
        Some(left) => Some(libc::timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }),
        None => None,
    };
    let timeout = timeout.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word is a valid reference and `timeout` null or a local. Whatever the kernel answers, the caller
    // looks again at what it waits for.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | scope.flag(), value, timeout) };
}

/// Wakes up to `count` who sleep on `word`.
pub(crate) fn futex_wake(word: &AtomicU32, count: i32, scope: Scope) {
    // SAFETY: the word is a valid reference; waking has no other effect than that sleepers look again.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | scope.flag(), count) };
}

/// The longest spin before a sleep unless the user says otherwise: about twice what a sleep and a wake-up cost.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(50);

/// The budget grows from nothing to this at least.
const SMALLEST_BUDGET: u64 = 2_000;
/// So many spins in vain in a row, and spinning pauses.
const PATIENCE: u32 = 8;
/// The longest pause is 2 to this many waits.
const LONGEST_PAUSE: u32 = 6;
/// How long to look at the awaited thing between two looks at the clock, in nanoseconds, about.
const BETWEEN_CLOCKS: u64 = 500;
/// So many looks come before the first clock.
const FIRST_LOOKS: u32 = 32;
/// So many looks at most come between two clocks.
const MOST_LOOKS: u32 = 1024;

/// Where the other side of a wait runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Awaited {
    /// Under this kernel. On a machine with one CPU it needs the very CPU that would spin.
    Here,
    /// Under another one.
    Elsewhere,
}

/// How long the waits of one buffer spin before they sleep: learned from how they ended, as the kernel's halt polling
/// does, plus a pause if spinning is in vain although the waits are short, because then the awaited one needs the very
/// CPU that spins.
#[derive(Debug)]
pub struct Spinner {
    awaited: Awaited,
    /// The most that a wait may spin, in nanoseconds.
    max: AtomicU64,
    /// What the next wait spins, in nanoseconds.
    budget: AtomicU64,
    /// Spins in vain in a row.
    misses: AtomicU32,
    /// Waits that will not spin.
    pause: AtomicU32,
}

impl Spinner {
    /// One whose waits, for what this host's CPUs do, spin so long at most.
    pub fn local(max: Duration) -> Spinner {
        Spinner::new(max, Awaited::Here)
    }

    pub(crate) fn new(max: Duration, awaited: Awaited) -> Spinner {
        let spinner = Spinner {
            awaited,
            max: AtomicU64::new(0),
            budget: AtomicU64::new(0),
            misses: AtomicU32::new(0),
            pause: AtomicU32::new(0),
        };
        spinner.set_max(max);
        spinner
    }

    /// Sets the longest spin, and starts learning anew. On a machine with one CPU nothing spins for what runs there.
    pub fn set_max(&self, max: Duration) {
        let in_vain = self.awaited == Awaited::Here && one_cpu();
        let max = if in_vain { 0 } else { u64::try_from(max.as_nanos()).unwrap_or(u64::MAX) };
        self.max.store(max, Ordering::Relaxed);
        self.budget.store(max, Ordering::Relaxed);
        self.misses.store(0, Ordering::Relaxed);
        self.pause.store(0, Ordering::Relaxed);
    }

    /// Spins until `ready`; or until the budget is spent, at `deadline`, or when `give_up` says so, which is asked
    /// now and then.
    ///
    /// # Errors
    ///
    /// When the wait began, for [`slept`](Self::slept): it has to sleep.
    pub fn spin(
        &self,
        deadline: Option<Instant>,
        mut ready: impl FnMut() -> bool,
        give_up: impl Fn() -> bool,
    ) -> Result<(), Instant> {
        let budget = self.budget.load(Ordering::Relaxed);
        if budget == 0 {
            return Err(Instant::now());
        }
        let pause = self.pause.load(Ordering::Relaxed);
        if pause != 0 {
            self.pause.store(pause - 1, Ordering::Relaxed);
            return Err(Instant::now());
        }
        // The first looks come before the first clock: most waits of two pollers end here.
        let mut looks = FIRST_LOOKS;
        let mut start = None;
        loop {
            for _ in 0..looks {
                if ready() {
                    self.misses.store(0, Ordering::Relaxed);
                    return Ok(());
                }
            }
            let now = Instant::now();
            let start = *start.get_or_insert(now);
            let spent = u64::try_from((now - start).as_nanos()).unwrap_or(u64::MAX);
            if spent >= budget || deadline.is_some_and(|d| now >= d) || give_up() {
                self.missed();
                return Err(start);
            }
            if spent < BETWEEN_CLOCKS / 2 {
                looks = (looks * 2).min(MOST_LOOKS);
            } else if spent > BETWEEN_CLOCKS * 8 && looks > FIRST_LOOKS {
                // `ready` is slow, or somebody else had the CPU.
                looks /= 2;
            }
            std::hint::spin_loop();
        }
    }

    /// Learns from a wait that had to sleep and took this long in all.
    pub fn slept(&self, total: Duration) {
        let max = self.max.load(Ordering::Relaxed);
        if max == 0 {
            return;
        }
        let budget = self.budget.load(Ordering::Relaxed);
        let next = if u64::try_from(total.as_nanos()).unwrap_or(u64::MAX) <= max {
            budget.saturating_mul(2).clamp(SMALLEST_BUDGET.min(max), max)
        } else if budget / 2 < SMALLEST_BUDGET {
            0
        } else {
            budget / 2
        };
        self.budget.store(next, Ordering::Relaxed);
    }

    /// Learns from a spin in vain. One that comes after a pause and is not in vain ends all pausing.
    fn missed(&self) {
        let misses = self.misses.load(Ordering::Relaxed).saturating_add(1);
        self.misses.store(misses, Ordering::Relaxed);
        if misses >= PATIENCE {
            self.pause.store(1 << (misses - PATIENCE).min(LONGEST_PAUSE), Ordering::Relaxed);
        }
    }
}

/// Whether the machine has one CPU only. A thread that is bound to one CPU still spins: others run elsewhere.
fn one_cpu() -> bool {
    static ONE: OnceLock<bool> = OnceLock::new();
    *ONE.get_or_init(|| {
        let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
        matches!(cpus, Ok(Some(1)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spinner(max_us: u64) -> Spinner {
        let spinner = Spinner::new(Duration::ZERO, Awaited::Here);
        // Not by `set_max`, whose result depends on the machine.
        spinner.max.store(max_us * 1000, Ordering::Relaxed);
        spinner.budget.store(max_us * 1000, Ordering::Relaxed);
        spinner
    }

    #[test]
    fn a_zero_budget_never_looks() {
        assert!(
            Spinner::new(Duration::ZERO, Awaited::Elsewhere)
                .spin(None, || panic!("looked"), || false)
                .is_err()
        );
    }

    #[test]
    fn what_is_ready_is_seen_and_the_budget_stays() {
        let spinner = spinner(50);
        let mut looks = 0;
        let ready = || {
            looks += 1;
            looks == 10
        };
        assert!(spinner.spin(None, ready, || false).is_ok());
        assert_eq!(spinner.budget.load(Ordering::Relaxed), 50_000);
    }

    #[test]
    fn long_waits_end_spinning_and_short_ones_bring_it_back() {
        let spinner = spinner(50);
        for _ in 0..10 {
            spinner.slept(Duration::from_millis(1));
        }
        assert!(spinner.spin(None, || panic!("looked"), || false).is_err());
        spinner.slept(Duration::from_micros(10));
        assert!(spinner.spin(None, || true, || false).is_ok());
        for _ in 0..10 {
            spinner.slept(Duration::from_micros(10));
        }
        assert_eq!(spinner.budget.load(Ordering::Relaxed), 50_000);
    }

    #[test]
    fn spins_that_are_always_in_vain_pause() {
        let spinner = spinner(1);
        let mut spun = 0;
        for _ in 0..1000 {
            let mut looked = false;
            let ready = || {
                looked = true;
                false
            };
            assert!(spinner.spin(None, ready, || true).is_err());
            spun += u32::from(looked);
            spinner.slept(Duration::from_nanos(900));
        }
        assert!(spun < 50, "{spun} of 1000 waits spun");
        // When the awaited one has got another CPU, spinning comes back.
        let waits = (0..100).position(|_| {
            let spun = spinner.spin(None, || true, || false).is_ok();
            spinner.slept(Duration::from_nanos(900));
            spun
        });
        assert!(waits.is_some_and(|waits| waits <= 1 << LONGEST_PAUSE), "{waits:?}");
        assert!((0..100).all(|_| spinner.spin(None, || true, || false).is_ok()));
    }

    #[test]
    fn a_futex_with_another_value_does_not_sleep() {
        let word = AtomicU32::new(1);
        futex_wait(&word, 0, Scope::Process, None);
        futex_wait(&word, 1, Scope::Host, Some(Instant::now()));
    }
}
