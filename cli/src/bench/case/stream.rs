//! Messages one way, as fast as they go. The receiver has each in a buffer of its own before it counts it, and its
//! clock is the one that counts.

use anyhow::Result;
use std::ops::DerefMut;
use std::time::Instant;

use super::{LARGE_BUFFERS, phase};
use crate::bench::measure::{Outcome, Samples, Ticker, ticks};
use crate::bench::measurement::Worker;
use crate::bench::private::Private;
use crate::bench::transport::Duplex;
use crate::pair::Role;

/// Plays A's or B's part. The value is in bytes per second.
pub fn run<D: Duplex>(worker: &mut Worker, end: &mut D, bytes: usize) -> Result<Option<Outcome>> {
    run_from(worker, end, bytes, vec![vec![phase::WARM_UP; bytes]])
}

/// The same from and into several large buffers in turn.
pub fn run_large<D: Duplex>(worker: &mut Worker, end: &mut D, bytes: usize) -> Result<Option<Outcome>> {
    run_from(worker, end, bytes, Private::several(LARGE_BUFFERS, bytes, phase::WARM_UP)?)
}

fn run_from<D: Duplex, B: DerefMut<Target = [u8]>>(
    worker: &mut Worker,
    end: &mut D,
    bytes: usize,
    mut messages: Vec<B>,
) -> Result<Option<Outcome>> {
    let mut next = 0;
    let count = messages.len();
    let mut message = move || {
        next = (next + 1) % count;
        next
    };
    worker.rendezvous.meet()?;
    let outcome = match worker.role {
        Role::A => {
            send(worker, bytes, |phase| {
                let message = &mut messages[message()];
                message[0] = phase;
                end.send(message)
            })?;
            None
        }
        Role::B => Some(receive(bytes, || {
            let message = &mut messages[message()];
            end.receive(message)?;
            Ok(message[0])
        })?),
    };
    worker.rendezvous.meet()?;
    Ok(outcome)
}

/// How many messages pass between two looks at the clock.
fn batch(bytes: usize) -> usize {
    ((64 << 10) / bytes).clamp(1, 64)
}

/// Sends messages for as long as the job says, each with its phase.
pub fn send(worker: &Worker, bytes: usize, mut send: impl FnMut(u8) -> Result<()>) -> Result<()> {
    let duration = worker.job.duration;
    for (phase, end) in [(phase::WARM_UP, duration / 4), (phase::MEASURE, duration)] {
        let start = Instant::now();
        while start.elapsed() < end {
            for _ in 0..batch(bytes) {
                send(phase)?;
            }
        }
    }
    send(phase::LAST)
}

/// Receives messages until the last; `receive` returns the phase of each.
pub fn receive(bytes: usize, mut receive: impl FnMut() -> Result<u8>) -> Result<Outcome> {
    let ticker = Ticker::calibrate();
    while receive()? == phase::WARM_UP {}
    // The first message of the measurement has come: from here on, time and bytes count.
    let mut samples = Samples::new();
    let (start, mut window) = (Instant::now(), ticks());
    let (mut messages, mut in_window) = (0u64, 0u64);
    loop {
        let mut phase = phase::MEASURE;
        let mut count = 0;
        while count < batch(bytes) && phase != phase::LAST {
            phase = receive()?;
            count += 1;
        }
        messages += count as u64;
        in_window += count as u64;
        let now = ticks();
        let passed = ticker.nanoseconds(window, now);
        if passed >= 1_000_000 {
            samples.record(in_window * bytes as u64 * 1_000_000 / passed);
            (window, in_window) = (now, 0);
        }
        if phase == phase::LAST {
            break;
        }
    }
    let value = messages as f64 * bytes as f64 / start.elapsed().as_secs_f64();
    Ok(Outcome { value, samples: samples.to_pairs() })
}
