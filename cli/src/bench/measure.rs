//! Clocks and samples: how a measurement is taken without disturbing what it measures.

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What one of the two processes found out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Nanoseconds per round trip, or bytes per second, over the whole measurement.
    pub value: f64,
    /// Single samples of the same in whole nanoseconds or kilobytes per second, with how often each was seen.
    pub samples: Vec<(u64, u64)>,
}

/// Reads the time in a third of what `Instant::now` takes, where the processor has a counter for it.
#[derive(Clone, Copy)]
pub struct Ticker {
    nanoseconds_per_tick: f64,
}

impl Ticker {
    /// Compares the processor's counter with the system's clock for a few milliseconds.
    pub fn calibrate() -> Ticker {
        let (clock, ticks) = (Instant::now(), ticks());
        let mut elapsed = clock.elapsed();
        while elapsed < Duration::from_millis(5) {
            std::hint::spin_loop();
            elapsed = clock.elapsed();
        }
        let passed = self::ticks().wrapping_sub(ticks).max(1);
        Ticker { nanoseconds_per_tick: elapsed.as_nanos() as f64 / passed as f64 }
    }

    /// Nanoseconds between two readings of [`ticks`].
    pub fn nanoseconds(self, from: u64, to: u64) -> u64 {
        (to.wrapping_sub(from) as f64 * self.nanoseconds_per_tick) as u64
    }
}

/// The counter now.
#[cfg(target_arch = "x86_64")]
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets user space execute it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// The counter now.
#[cfg(not(target_arch = "x86_64"))]
pub fn ticks() -> u64 {
    use std::sync::OnceLock;
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_nanos() as u64
}

/// Samples of three significant digits.
pub struct Samples(Histogram<u64>);

impl Samples {
    /// None yet.
    pub fn new() -> Samples {
        // One hour in nanoseconds is more than anything takes, and nothing has to grow while it measures.
        Samples(Histogram::new_with_bounds(1, 3_600_000_000_000, 3).expect("these bounds are allowed"))
    }

    /// One more.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.0.saturating_record(value);
    }

    /// What another process sampled.
    pub fn add(&mut self, samples: &[(u64, u64)]) {
        for (value, count) in samples {
            self.0.saturating_record_n(*value, *count);
        }
    }

    /// The sample that a fraction of all is not above; `None` if there is none.
    pub fn quantile(&self, fraction: f64) -> Option<u64> {
        (!self.0.is_empty()).then(|| self.0.value_at_quantile(fraction))
    }

    /// Each value with how often it was seen.
    pub fn to_pairs(&self) -> Vec<(u64, u64)> {
        self.0.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect()
    }
}

/// The middle one; 0 of none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => 0.0,
        (n, half) if n % 2 == 0 => (sorted[half - 1] + sorted[half]) / 2.0,
        (_, half) => sorted[half],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }

    #[test]
    fn samples_of_two_processes_add_up() {
        let (mut a, mut b) = (Samples::new(), Samples::new());
        assert_eq!(a.quantile(0.5), None);
        (1..=98).for_each(|_| a.record(100));
        (1..=2).for_each(|_| b.record(900));
        a.add(&b.to_pairs());
        assert_eq!(a.quantile(0.5), Some(100));
        assert_eq!(a.quantile(0.99), Some(900));
    }

    #[test]
    fn ticks_and_the_clock_agree() {
        let ticker = Ticker::calibrate();
        let (clock, from) = (Instant::now(), ticks());
        while clock.elapsed() < Duration::from_millis(5) {}
        assert!(ticker.nanoseconds(from, ticks()) >= 4_000_000);
    }
}
