//! One message there, one back: latency, and the rate of requests.
//!
//! The value is the mean of many round trips with no clock in between: of the middle one of several batches, so that a
//! moment in which something else ran on the machine does not decide. Single round trips are timed in another phase,
//! with the processor's own counter, for the distribution.
//!
//! To a receiver that sleeps, each request comes after a silence, and the processor's counter leaves the silences out. That the
//! receiver has slept is not believed but counted.

use anyhow::{Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use std::cell::Cell;
use std::time::{Duration, Instant};

use super::phase;
use crate::bench::measure::{Outcome, Samples, Ticker, median, ticks};
use crate::bench::measurement::Worker;
use crate::bench::plan::{Wait, Work};
use crate::bench::transport::Duplex;
use crate::pair::Role;

/// Batches of round trips whose mean is taken.
const BATCHES: usize = 25;
/// Round trips between two looks at the clock.
const BETWEEN_CLOCKS: u64 = 64;
/// Four times what the library spins at most: nobody who waits so long is awake.
const SILENCE: Duration = dmbridge::DEFAULT_SPIN.saturating_mul(4);

/// Plays A's or B's part. The value is in nanoseconds per round trip.
pub fn run<D: Duplex>(worker: &mut Worker, end: &mut D, bytes: usize) -> Result<Option<Outcome>> {
    let mut message = vec![phase::WARM_UP; bytes];
    let silent = matches!(worker.job.work, Work::PingPong { wait: Wait::Silence, .. });
    worker.rendezvous.meet()?;
    let outcome = match worker.role {
        Role::A => Some(ask(end, &mut message, worker.job.duration, silent.then_some(SILENCE))?),
        Role::B => {
            let (mut received, before) = (0, times_slept()?);
            while message[0] != phase::LAST {
                end.receive(&mut message)?;
                end.send(&message)?;
                received += 1;
            }
            let slept = times_slept()? - before;
            // A few may find it preempted instead, on a machine that does other work too.
            ensure!(
                !silent || received < 50 || slept >= received / 2,
                "the receiver slept before {slept} of {received} messages only"
            );
            None
        }
    };
    worker.rendezvous.meet()?;
    Ok(outcome)
}

/// How often this thread has given up its CPU to wait.
fn times_slept() -> Result<i64> {
    Ok(getrusage(UsageWho::RUSAGE_THREAD)?.voluntary_context_switches())
}

fn ask<D: Duplex>(
    end: &mut D,
    message: &mut [u8],
    duration: Duration,
    silence: Option<Duration>,
) -> Result<Outcome> {
    let ticker = Ticker::calibrate();
    let silent = Cell::new(0);
    let mut round_trip = |end: &mut D| {
        if let Some(silence) = silence {
            let (start, before) = (Instant::now(), ticks());
            while start.elapsed() < silence {
                std::hint::spin_loop();
            }
            silent.set(silent.get() + ticker.nanoseconds(before, ticks()));
        }
        end.send(message).and_then(|()| end.receive(message))
    };

    // Warm up, and learn how many round trips fit in the rest. Here and below at least one is made: on a busy machine all of
    // the time may be gone between two looks at the clock.
    let start = Instant::now();
    let mut warm = 0u32;
    while warm == 0 || start.elapsed() < duration / 5 {
        for _ in 0..1 + warm / 8 {
            round_trip(end)?;
            warm += 1;
        }
    }
    let each = start.elapsed() / warm;

    let count = (duration.as_secs_f64() * 0.6 / BATCHES as f64 / each.as_secs_f64()).ceil().max(1.0);
    let mut means = Vec::with_capacity(BATCHES);
    let all = Instant::now();
    // It ends early if something else has got the CPUs since: two that poll may then take a thousand times as long.
    while means.is_empty() || means.len() < BATCHES && all.elapsed() < duration {
        silent.set(0);
        let start = Instant::now();
        let mut done = 0;
        while done == 0 || done < count as u64 && all.elapsed() < duration {
            let piece = BETWEEN_CLOCKS.min(count as u64 - done);
            for _ in 0..piece {
                round_trip(end)?;
            }
            done += piece;
        }
        means.push((start.elapsed().as_nanos() as f64 - silent.get() as f64) / done as f64);
    }
    let value = median(&means);

    let mut samples = Samples::new();
    let (first, mut before, mut passed) = (ticks(), ticks(), 0);
    while passed < duration.as_nanos() as u64 / 5 {
        silent.set(0);
        round_trip(end)?;
        let now = ticks();
        samples.record(ticker.nanoseconds(before, now).saturating_sub(silent.get()));
        passed = ticker.nanoseconds(first, now);
        before = ticks();
    }

    message[0] = phase::LAST;
    end.send(message)?;
    end.receive(message)?;
    Ok(Outcome { value, samples: samples.to_pairs() })
}
