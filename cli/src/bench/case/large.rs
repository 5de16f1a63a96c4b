//! Large messages, one at a time: there, and one as large back. From buffers of the sender's own into buffers of the
//! receiver's own; nobody runs ahead, so what counts is how long one message takes.

use anyhow::Result;
use std::time::Instant;

use super::{LARGE_BUFFERS, phase};
use crate::bench::measure::{Outcome, Samples, Ticker, ticks};
use crate::bench::measurement::Worker;
use crate::bench::private::Private;
use crate::bench::transport::Duplex;
use crate::pair::Role;

/// Plays A's or B's part. The value is in bytes per second, of the direction in which a message is going.
pub fn run<D: Duplex>(worker: &mut Worker, end: &mut D, bytes: usize) -> Result<Option<Outcome>> {
    let mut messages = Private::several(LARGE_BUFFERS, bytes, phase::WARM_UP)?;
    let mut buffers = Private::several(LARGE_BUFFERS, bytes, phase::WARM_UP)?;
    let ticker = Ticker::calibrate();
    worker.rendezvous.meet()?;
    let mut turn = 0;
    let outcome = match worker.role {
        Role::A => {
            let mut round_trip = |end: &mut D, phase: u8| -> Result<()> {
                turn = (turn + 1) % LARGE_BUFFERS;
                messages[turn][0] = phase;
                end.send(&messages[turn])?;
                end.receive(&mut buffers[turn])
            };
            let start = Instant::now();
            while start.elapsed() < worker.job.duration / 4 {
                round_trip(end, phase::WARM_UP)?;
            }
            let mut samples = Samples::new();
            let (start, mut count) = (Instant::now(), 0u64);
            while start.elapsed() < worker.job.duration {
                let before = ticks();
                round_trip(end, phase::MEASURE)?;
                let passed = ticker.nanoseconds(before, ticks()).max(1);
                samples.record(2 * bytes as u64 * 1_000_000 / passed);
                count += 1;
            }
            let value = 2.0 * bytes as f64 * count as f64 / start.elapsed().as_secs_f64();
            round_trip(end, phase::LAST)?;
            Some(Outcome { value, samples: samples.to_pairs() })
        }
        Role::B => loop {
            turn = (turn + 1) % LARGE_BUFFERS;
            end.receive(&mut buffers[turn])?;
            end.send(&messages[turn])?;
            if buffers[turn][0] == phase::LAST {
                break None;
            }
        },
    };
    worker.rendezvous.meet()?;
    Ok(outcome)
}
