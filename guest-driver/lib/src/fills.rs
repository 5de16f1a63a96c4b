//! How data that is generated in shared memory is stored fastest: by ordinary stores or past the caches. Where writer and
//! reader share a cache the former are better by a factor of three, where they do not the latter by five; and a scheduler, or
//! a hypervisor, may change which it is at any time. So each buffer keeps trying.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Fills that are shorter, in bytes, are too short to be timed: they are stored by ordinary stores.
const SHORTEST: usize = 4096;
/// One fill of so many is done the other way, to see whether that is better by now.
const TRY_EVERY: u32 = 128;

/// What a buffer has learned. Threads that fill it at once may lose each other's readings, which harms nothing.
#[derive(Debug, Default)]
pub(crate) struct Fills {
    turn: AtomicU32,
    /// Clock ticks for a mebibyte, on average: by ordinary stores, and past the caches. 0: not known.
    ticks: [AtomicU64; 2],
}

/// A fill under way.
pub(crate) struct Measure {
    len: usize,
    way: usize,
    start: u64,
}

impl Measure {
    /// Whether the data is to go past the caches.
    pub(crate) fn streams(&self) -> bool {
        self.way == 1
    }
}

impl Fills {
    /// Before a fill of `len` bytes: decides how.
    #[inline]
    pub(crate) fn start(&self, len: usize) -> Measure {
        if len < SHORTEST {
            return Measure { len, way: 0, start: 0 };
        }
        let turn = self.turn.load(Ordering::Relaxed);
        self.turn.store(turn.wrapping_add(1), Ordering::Relaxed);
        let [plain, stream] = [0, 1].map(|way| self.ticks[way].load(Ordering::Relaxed));
        let best = usize::from(stream < plain);
        let way = if turn.is_multiple_of(TRY_EVERY) { 1 - best } else { best };
        Measure { len, way, start: ticks() }
    }

    /// After it: learns.
    #[inline]
    pub(crate) fn end(&self, measure: &Measure) {
        if measure.start == 0 {
            return;
        }
        let spent = ticks().saturating_sub(measure.start);
        let new = (spent << 20) / measure.len as u64;
        let known = &self.ticks[measure.way];
        let old = known.load(Ordering::Relaxed);
        // What was interrupted counts little, what is better counts at once.
        let average = if old == 0 || new < old { new } else { old + (new.min(old * 4) - old) / 8 };
        known.store(average.max(1), Ordering::Relaxed);
    }
}

/// A clock that costs nothing. Where there is none, nothing is learned, and stores are ordinary.
#[inline]
fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it reads a counter.
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills of 64 KiB that take so many ticks each; how many of them went past the caches.
    fn fill(fills: &Fills, count: usize, plain: u64, stream: u64) -> usize {
        (0..count)
            .filter(|_| {
                let mut measure = fills.start(65536);
                let spent = if measure.streams() { stream } else { plain };
                measure.start = ticks().saturating_sub(spent).max(1);
                fills.end(&measure);
                measure.streams()
            })
            .count()
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_better_way_is_taken_and_another_one_found_when_it_becomes_better() {
        let fills = Fills::default();
        fill(&fills, 300, 1 << 30, 1 << 28);
        assert!(fill(&fills, 1280, 1 << 30, 1 << 28) >= 1260);
        fill(&fills, 1280, 1 << 26, 1 << 28);
        assert!(fill(&fills, 1280, 1 << 26, 1 << 28) <= 20);
    }

    #[test]
    fn a_short_fill_is_plain() {
        assert!(!Fills::default().start(100).streams());
    }
}
