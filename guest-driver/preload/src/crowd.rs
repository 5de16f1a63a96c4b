//! Whether others want the CPU: then who spins takes it from them, and is given it later when it needs it. Each thread looks
//! at how long it had to wait for a CPU itself, and at how many want to run on how many CPUs. Many short waits are no crowd:
//! so it is for two that wake each other.

use crate::tcp::milliseconds;
use dmbridge::Spinner;
use std::cell::Cell;
use std::io::Read;
use std::sync::OnceLock;
use std::time::Instant;

/// How often to look, in ms.
const EVERY: u64 = 10;
/// How long not to spin after it was crowded, in ms.
const PAUSE: u64 = 50;
/// Crowded is who had to wait for more than one in so many ms,
const SHARE: u64 = 10;
/// and each time for so long on average, in ns.
const LONG: u64 = 100_000;

thread_local! {
    /// When to look next and when to spin next (ms); when and what was seen last (ms, and as `waits` says).
    static SEEN: Cell<(u64, u64, u64, (u64, u64))> = const { Cell::new((0, 0, 0, (0, 0))) };
}

/// As [`Spinner::spin`], unless it is crowded.
pub fn spin(
    spinner: &Spinner,
    deadline: Option<Instant>,
    ready: impl FnMut() -> bool,
    give_up: impl Fn() -> bool,
) -> Result<(), Option<Instant>> {
    if is_crowded() { Err(None) } else { spinner.spin(deadline, ready, give_up).map_err(Some) }
}

/// As [`Spinner::slept`], for what `spin` began.
pub fn slept(spinner: &Spinner, start: Option<Instant>) {
    if let Some(start) = start {
        spinner.slept(start.elapsed());
    }
}

fn is_crowded() -> bool {
    SEEN.with(|seen| {
        let (next, resume, last, before) = seen.get();
        let now = milliseconds();
        if now < next {
            return now < resume;
        }
        let seen_now = crate::errno::keep(waits);
        let (waited, times) = (seen_now.0.saturating_sub(before.0), seen_now.1.saturating_sub(before.1));
        let waits_long = last != 0 && waited / 1_000_000 * SHARE > now - last && waited / times.max(1) > LONG;
        let crowded = waits_long || crate::errno::keep(runnable) > cpus();
        let resume = if crowded { now + PAUSE } else { 0 };
        seen.set((now + if crowded { PAUSE } else { EVERY }, resume, now, seen_now));
        crowded
    })
}

/// How long this thread has waited for a CPU in all, in ns, and how often (`Documentation/scheduler/sched-stats.rst`).
fn waits() -> (u64, u64) {
    let mut text = [0u8; 96];
    let mut words = look("/proc/thread-self/schedstat", &mut text).split_whitespace().skip(1);
    let mut next = || words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    (next(), next())
}

/// How many threads of the machine run or want to: proc(5), `/proc/loadavg`.
fn runnable() -> u64 {
    let mut text = [0u8; 96];
    let word = look("/proc/loadavg", &mut text).split_whitespace().nth(3);
    word.and_then(|word| word.split('/').next()?.parse().ok()).unwrap_or(0)
}

fn cpus() -> u64 {
    static CPUS: OnceLock<u64> = OnceLock::new();
    // SAFETY: it reads a number.
    *CPUS.get_or_init(|| unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }.max(1) as u64)
}

fn look<'a>(path: &str, text: &'a mut [u8]) -> &'a str {
    let read = std::fs::File::open(path).and_then(|mut file| file.read(text)).unwrap_or(0);
    std::str::from_utf8(&text[..read]).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_says_who_runs_and_who_waits() {
        assert!(runnable() >= 1, "this thread runs");
        assert!(cpus() >= 1);
        let mut text = [0; 96];
        assert_eq!(look("/proc/thread-self/schedstat", &mut text).split_whitespace().count(), 3);
    }
}
