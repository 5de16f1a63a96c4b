//! Limit: one core copies the same bytes, from buffers like the sender's into memory like the receiver's. Process A
//! does it alone, with the way to copy that was fastest on this machine.

use anyhow::{Result, bail};

use super::{Transfer, over_transfers};
use crate::bench::case::LARGE_BUFFERS;
use crate::bench::case::transfer::BUFFERS;
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::{RingShape, Work};
use crate::bench::shared::Shared;
use crate::pair::Role;

/// Copies from one of several buffers into one of several places.
struct Copies {
    source: Vec<u8>,
    target: Shared,
    bytes: usize,
    next: usize,
    sources: usize,
    targets: usize,
    shape: RingShape,
}

/// Copies as the job's sender would have to.
pub fn run(worker: &mut Worker) -> Result<Option<Outcome>> {
    let shape = worker.job.ring;
    let (bytes, sources, targets) = match worker.job.work {
        // A stream is sent from one buffer into a ring; a transfer from buffer n into place n.
        Work::Stream { bytes } => (bytes, 1, (shape.bytes / bytes).max(1)),
        Work::Move { bytes } => (bytes, BUFFERS, BUFFERS),
        Work::Large { bytes } => (bytes, LARGE_BUFFERS, LARGE_BUFFERS),
        work => bail!("{work:?} is not a copy"),
    };
    let target = Shared::new(worker.role, &worker.rendezvous, bytes * targets)?;
    if worker.role == Role::B {
        return Ok(None);
    }
    worker.job.work = Work::Move { bytes };
    let source = vec![0x5a; bytes * sources];
    over_transfers(worker, &mut Copies { source, target, bytes, next: 0, sources, targets, shape })
}

impl Transfer for Copies {
    fn start(&mut self) -> Result<()> {
        let from = self.next % self.sources * self.bytes;
        let to = self.next % self.targets * self.bytes;
        self.next += 1;
        let source = &self.source[from..from + self.bytes];
        // SAFETY: bytes are at the source by the slice, and at the target, which has targets times as many.
        unsafe { self.shape.copy.copy(source.as_ptr(), self.target.at(to), self.bytes) };
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
