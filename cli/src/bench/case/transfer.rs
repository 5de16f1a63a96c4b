//! Transfers into memory of a receiver that does nothing, several at a time. The sender's clock counts, from the
//! first start to the last completion.

use anyhow::Result;
use std::time::Instant;

use crate::bench::measure::{Outcome, Samples, Ticker, ticks};
use crate::bench::measurement::Worker;
use crate::bench::transport::Transfer;

/// How many buffers the sender has, how many places the receiver, and how many transfers are under way at most.
pub const BUFFERS: usize = 8;

/// Plays A's part. The value is in bytes per second.
pub fn run<T: Transfer>(worker: &mut Worker, end: &mut T, bytes: usize) -> Result<Option<Outcome>> {
    let duration = worker.job.duration;
    let ticker = Ticker::calibrate();
    // Small transfers are started in batches, so that the clock costs nothing beside them.
    let batch = ((64 << 10) / bytes).clamp(1, 64);
    let start_batch = |end: &mut T| (0..batch).try_for_each(|_| end.start());

    let start = Instant::now();
    while start.elapsed() < duration / 4 {
        start_batch(end)?;
    }
    end.finish()?;

    let mut samples = Samples::new();
    let (start, mut window) = (Instant::now(), ticks());
    let (mut transfers, mut in_window) = (0u64, 0u64);
    while start.elapsed() < duration {
        start_batch(end)?;
        transfers += batch as u64;
        in_window += batch as u64;
        let now = ticks();
        let passed = ticker.nanoseconds(window, now);
        if passed >= 1_000_000 {
            samples.record(in_window * bytes as u64 * 1_000_000 / passed);
            (window, in_window) = (now, 0);
        }
    }
    end.finish()?;
    let value = transfers as f64 * bytes as f64 / start.elapsed().as_secs_f64();
    Ok(Some(Outcome { value, samples: samples.to_pairs() }))
}
