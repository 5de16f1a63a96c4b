//! DMBs in their owner's own memory, which only the device can write: as for two virtual machines whose monitors cannot
//! map. Messages go as Linux's SMC-D sends them over ISM: a move of the data into a ring, then one of a cursor.

use anyhow::{Result, bail};
use dmbridge::{Dmb, MoveBuffer, Mover, Ticket};
use std::collections::VecDeque;

use super::{DMB, connect};
use crate::bench::case::transfer::BUFFERS;
use crate::bench::case::{pingpong, produce, stream};
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::Work;
use crate::bench::transport::{Copied, Duplex, Transfer, over_transfers};
use crate::pair::Role;

/// Where the other side tells, in this side's DMB, how many bytes it has sent.
const SENT: usize = 0;
/// Where it tells how many it has received.
const RECEIVED: usize = 64;
/// Where the ring starts, and how large it is.
const RING: (usize, usize) = (4096, DMB - 4096);

/// Does the worker's job by moves.
pub fn moved(worker: &mut Worker) -> Result<Option<Outcome>> {
    match worker.job.work {
        Work::PingPong { bytes, .. } => pingpong::run(worker, &mut Stream::open(worker)?, bytes),
        Work::Stream { bytes } => stream::run(worker, &mut Stream::open(worker)?, bytes),
        Work::Large { .. } | Work::Exchange { .. } => bail!("moves of this size are Work::Move"),
        Work::Produce { bytes } => {
            let stream = Stream::open(worker)?;
            produce::run(worker, &mut Copied::new(stream, bytes), bytes)
        }
        Work::Move { bytes } => {
            let ends = connect(worker, false, (bytes * BUFFERS).next_multiple_of(4096))?;
            if worker.role == Role::B {
                worker.rendezvous.meet()?;
                return Ok(None);
            }
            let buffer = ends.device.move_buffer((bytes * BUFFERS).next_multiple_of(4096))?;
            buffer.memory().as_slice().fill_u64_with(|| 0x5a5a_5a5a_5a5a_5a5a);
            let mover = ends.device.mover(ends.remote)?;
            let outcome = over_transfers(
                worker,
                &mut Moves { mover, buffer, bytes, next: 0, under_way: VecDeque::new() },
            )?;
            worker.rendezvous.meet()?;
            Ok(outcome)
        }
    }
}

/// A stream of bytes by moves, in both directions.
struct Stream {
    local: Dmb,
    mover: Mover,
    sent: u64,
    received: u64,
    /// What the other side was last told to have been received.
    told: u64,
}

impl Stream {
    fn open(worker: &Worker) -> Result<Stream> {
        let ends = connect(worker, false, DMB)?;
        let mover = ends.device.mover(ends.remote)?;
        Ok(Stream { local: ends.local, mover, sent: 0, received: 0, told: 0 })
    }

    /// Waits until the other side's word is not `than`.
    fn other(&self, at: usize, than: u64) -> Result<u64> {
        let word = self.local.memory().slice(at..at + 8);
        let mut value = than;
        self.local.wait_until(None, || {
            value = word.read_u64(0);
            value != than
        })?;
        Ok(value)
    }

    fn tell_received(&mut self) -> Result<()> {
        self.told = self.received;
        self.mover.post(RECEIVED as u64, &self.received.to_le_bytes(), Some(1))?;
        Ok(())
    }
}

impl Duplex for Stream {
    fn send(&mut self, mut message: &[u8]) -> Result<()> {
        while !message.is_empty() {
            let mut taken = self.local.memory().as_slice().read_u64(RECEIVED);
            if self.sent - taken == RING.1 as u64 {
                taken = self.other(RECEIVED, taken)?;
            }
            let at = self.sent as usize % RING.1;
            let free = RING.1 - (self.sent - taken) as usize;
            let len = message.len().min(free).min(RING.1 - at);
            self.mover.post((RING.0 + at) as u64, &message[..len], None)?;
            self.sent += len as u64;
            self.mover.post(SENT as u64, &self.sent.to_le_bytes(), Some(1))?;
            message = &message[len..];
        }
        Ok(())
    }

    fn receive(&mut self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            let mut there = self.local.memory().as_slice().read_u64(SENT);
            if there == self.received {
                there = self.other(SENT, there)?;
            }
            let at = self.received as usize % RING.1;
            let len = into.len().min((there - self.received) as usize).min(RING.1 - at);
            self.local.memory().read(RING.0 + at, &mut into[..len])?;
            self.received += len as u64;
            into = &mut into[len..];
            if self.received - self.told >= RING.1 as u64 / 4 {
                self.tell_received()?;
            }
        }
        Ok(())
    }
}

/// Moves from buffer n to place n.
struct Moves {
    mover: Mover,
    buffer: MoveBuffer,
    bytes: usize,
    next: usize,
    under_way: VecDeque<Ticket>,
}

impl Transfer for Moves {
    fn start(&mut self) -> Result<()> {
        // Small ones leave each buffer long before its turn comes again.
        let limit = if self.bytes < 4096 { 8 * BUFFERS } else { BUFFERS };
        if self.under_way.len() >= limit
            && let Some(oldest) = self.under_way.pop_front()
        {
            self.mover.wait(oldest, None)?;
        }
        let at = self.next % BUFFERS * self.bytes;
        self.next += 1;
        let ticket = self.mover.post_parts(at as u64, &[self.buffer.part(at..at + self.bytes)], None)?;
        self.under_way.push_back(ticket);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        self.under_way.clear();
        Ok(self.mover.flush()?)
    }
}
