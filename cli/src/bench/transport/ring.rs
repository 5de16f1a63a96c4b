//! Limit: a bare ring in each direction between two cores. Copy in, copy out, a cursor each way, no protocol, nobody
//! sleeps, nobody is checked. The benchmark looks for the shape in which it is fastest first.

use anyhow::Result;
use std::sync::atomic::Ordering;

use super::Duplex;
use crate::bench::measurement::Worker;
use crate::bench::plan::RingShape;
use crate::bench::shared::Shared;
use crate::pair::Role;

/// Where the data of a ring starts: its cursors have the page before.
const HEADER: usize = 4096;
/// Where the sender's cursor is.
const SENT: usize = 0;
/// Where the receiver's cursor is: two cache lines on, because processors fetch pairs.
const RECEIVED: usize = 128;

/// One end of two rings.
pub struct Rings {
    shared: Shared,
    shape: RingShape,
    outgoing: Place,
    incoming: Place,
}

/// A side's place in a ring.
struct Place {
    /// Where the ring starts in the memory.
    base: usize,
    /// Bytes that this side has sent, or received.
    own: u64,
    /// What the other side was last seen to have received, or sent.
    other: u64,
}

impl Place {
    /// How many bytes can be copied at once, of those wanted and those possible.
    fn piece(&self, shape: RingShape, wanted: usize, possible: u64) -> usize {
        let to_end = shape.bytes - self.own as usize % shape.bytes;
        wanted.min(possible as usize).min(to_end).min(shape.step)
    }

    fn address(&self, shared: &Shared, shape: RingShape) -> *mut u8 {
        shared.at(self.base + HEADER + self.own as usize % shape.bytes)
    }
}

/// Makes the rings.
pub fn connect(worker: &mut Worker) -> Result<Rings> {
    let shape = worker.job.ring;
    let one = HEADER + shape.bytes;
    let shared = Shared::new(worker.role, &worker.rendezvous, 2 * one)?;
    let place = |base| Place { base, own: 0, other: 0 };
    let (outgoing, incoming) = match worker.role {
        Role::A => (place(0), place(one)),
        Role::B => (place(one), place(0)),
    };
    Ok(Rings { shared, shape, outgoing, incoming })
}

impl Duplex for Rings {
    fn send(&mut self, mut message: &[u8]) -> Result<()> {
        let Rings { shared, shape, outgoing: at, .. } = self;
        let (sent, received) = (shared.word(at.base + SENT), shared.word(at.base + RECEIVED));
        while !message.is_empty() {
            if at.own - at.other == shape.bytes as u64 {
                at.other = received.load(Ordering::Acquire);
                continue;
            }
            let n = at.piece(*shape, message.len(), shape.bytes as u64 - (at.own - at.other));
            // SAFETY: n bytes are in the message, and free in the ring up to its end: the receiver stays away.
            unsafe { shape.copy.copy(message.as_ptr(), at.address(shared, *shape), n) };
            message = &message[n..];
            at.own += n as u64;
            sent.store(at.own, Ordering::Release);
        }
        Ok(())
    }

    fn receive(&mut self, mut into: &mut [u8]) -> Result<()> {
        let Rings { shared, shape, incoming: at, .. } = self;
        let (sent, received) = (shared.word(at.base + SENT), shared.word(at.base + RECEIVED));
        while !into.is_empty() {
            if at.other == at.own {
                at.other = sent.load(Ordering::Acquire);
                continue;
            }
            let n = at.piece(*shape, into.len(), at.other - at.own);
            // SAFETY: n bytes are wanted, and there in the ring up to its end: the sender stays away.
            unsafe { shape.copy.copy(at.address(shared, *shape), into.as_mut_ptr(), n) };
            into = &mut into[n..];
            at.own += n as u64;
            received.store(at.own, Ordering::Release);
        }
        Ok(())
    }
}
