//! DMBs that both have mapped, as a stream: by its copying calls, and in place.

use anyhow::{Result, bail};
use dmbridge::RemoteDmb;
use dmbridge::stream::DmbStream;

use super::{DMB, connect};
use crate::bench::case::transfer::BUFFERS;
use crate::bench::case::{large, pingpong, produce, stream};
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::Work;
use crate::bench::transport::{Copied, Duplex, Produce, Transfer, over_transfers};
use crate::pair::Role;

/// Through the calls that copy.
pub fn map(worker: &mut Worker) -> Result<Option<Outcome>> {
    match worker.job.work {
        Work::PingPong { bytes, .. } => pingpong::run(worker, &mut Stream::open(worker)?, bytes),
        Work::Stream { bytes } => stream::run(worker, &mut Stream::open(worker)?, bytes),
        Work::Exchange { bytes } => large::run(worker, &mut Stream::open(worker)?, bytes),
        Work::Large { bytes } => stream::run_large(worker, &mut Stream::open(worker)?, bytes),
        Work::Produce { bytes } => {
            let stream = Stream::open(worker)?;
            produce::run(worker, &mut Copied::new(stream, bytes), bytes)
        }
        Work::Move { bytes } => {
            let ends = connect(worker, true, (bytes * BUFFERS).next_multiple_of(4096))?;
            if worker.role == Role::B {
                worker.rendezvous.meet()?;
                return Ok(None);
            }
            let remote = ends.device.attach(ends.remote)?;
            let source = vec![0x5a; bytes * BUFFERS];
            let outcome = over_transfers(worker, &mut Writes { remote, source, bytes, next: 0 })?;
            worker.rendezvous.meet()?;
            Ok(outcome)
        }
    }
}

/// Without a copy.
pub fn in_place(worker: &mut Worker) -> Result<Option<Outcome>> {
    match worker.job.work {
        Work::Produce { bytes } => produce::run(worker, &mut Stream::open(worker)?, bytes),
        work => bail!("{work:?} copies, so it cannot be done in place"),
    }
}

/// The library's stream.
struct Stream(DmbStream);

impl Stream {
    fn open(worker: &Worker) -> Result<Stream> {
        let ends = connect(worker, true, DMB)?;
        let remote = ends.device.attach(ends.remote)?;
        Ok(Stream(DmbStream::new(ends.local, remote)))
    }
}

impl Duplex for Stream {
    #[inline]
    fn send(&mut self, message: &[u8]) -> Result<()> {
        Ok(self.0.send(message)?)
    }

    #[inline]
    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        Ok(self.0.recv_exact(into)?)
    }
}

impl Produce for Stream {
    fn produce(&mut self, words: usize, mut next: impl FnMut() -> u64) -> Result<()> {
        let mut left = words * 8;
        while left > 0 {
            // Room is always a multiple of eight here: so are the ring and all that is written.
            let room = self.0.sender().reserve(left)?;
            let len = room.len();
            room.fill_u64_with(&mut next);
            self.0.sender().commit(len)?;
            left -= len;
        }
        Ok(())
    }

    fn consume(&mut self, words: usize, mut word: impl FnMut(u64)) -> Result<u64> {
        let mut left = words * 8;
        let mut first = None;
        while left > 0 {
            let all = self.0.receiver().peek()?;
            let here = all.slice(..all.len().min(left));
            let len = here.len();
            if len == 0 {
                bail!("the other process has ended");
            }
            first.get_or_insert(here.read_u64(0));
            here.for_each_u64(&mut word);
            self.0.receiver().consume(len)?;
            left -= len;
        }
        Ok(first.unwrap_or_default())
    }
}

/// Writes into the other's DMB, from buffer n to place n.
struct Writes {
    remote: RemoteDmb,
    source: Vec<u8>,
    bytes: usize,
    next: usize,
}

impl Transfer for Writes {
    fn start(&mut self) -> Result<()> {
        let at = self.next % BUFFERS * self.bytes;
        self.next += 1;
        Ok(self.remote.write(at, &self.source[at..at + self.bytes])?)
    }

    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}
