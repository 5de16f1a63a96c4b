//! Limit: one cache line handed from core to core and back. Nothing between two cores is faster.

use anyhow::{Result, bail};
use std::sync::atomic::Ordering;

use super::Duplex;
use crate::bench::case::pingpong;
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::Work;
use crate::bench::shared::Shared;

/// A word that both write in turn. It holds the number of the turn, and a byte of the message.
struct Line {
    shared: Shared,
    turn: u64,
}

/// Plays ping-pong on one word.
pub fn run(worker: &mut Worker) -> Result<Option<Outcome>> {
    let Work::PingPong { bytes, .. } = worker.job.work else { bail!("a cache line carries only ping-pong") };
    let mut line = Line { shared: Shared::new(worker.role, &worker.rendezvous, 4096)?, turn: 0 };
    pingpong::run(worker, &mut line, bytes)
}

impl Duplex for Line {
    /// Hands the line over with the message's first byte, which tells the other side when to stop.
    #[inline]
    fn send(&mut self, message: &[u8]) -> Result<()> {
        self.turn += 1;
        self.shared.word(0).store(self.turn << 8 | u64::from(message[0]), Ordering::Release);
        Ok(())
    }

    #[inline]
    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        self.turn += 1;
        let word = self.shared.word(0);
        let mut seen = word.load(Ordering::Acquire);
        while seen >> 8 != self.turn {
            seen = word.load(Ordering::Acquire);
        }
        into[0] = seen as u8;
        Ok(())
    }
}
