//! Whether others want the CPU: then who spins takes it from them, and is given it later when it needs it. Each thread looks
//! at how long it had to wait for a CPU itself.

use crate::tcp::milliseconds;
use dmbridge::Spinner;
use std::cell::Cell;
use std::io::Read;
use std::time::Instant;

/// How often to look, in ms.
const EVERY: u64 = 10;
/// How long not to spin after it was crowded, in ms.
const PAUSE: u64 = 50;
/// Crowded is who had to wait for more than one in so many ms.
const SHARE: u64 = 10;

thread_local! {
    /// When to look next and when to spin next (ms); when and what was seen last (ms, ns).
    static SEEN: Cell<(u64, u64, u64, u64)> = const { Cell::new((0, 0, 0, 0)) };
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
        let waited = crate::errno::keep(waited);
        let crowded = last != 0 && (waited.saturating_sub(before) / 1_000_000) * SHARE > now - last;
        let resume = if crowded { now + PAUSE } else { 0 };
        seen.set((now + if crowded { PAUSE } else { EVERY }, resume, now, waited));
        crowded
    })
}

/// How long this thread has waited for a CPU in all, in ns (`Documentation/scheduler/sched-stats.rst`).
fn waited() -> u64 {
    let mut text = [0u8; 96];
    let read = std::fs::File::open("/proc/thread-self/schedstat").and_then(|mut file| file.read(&mut text));
    let text = std::str::from_utf8(&text[..read.unwrap_or(0)]).unwrap_or("");
    text.split_whitespace().nth(1).and_then(|word| word.parse().ok()).unwrap_or(0)
}
