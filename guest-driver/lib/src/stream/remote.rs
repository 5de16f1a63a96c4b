//! How a side writes into the peer's DMB: by its own stores where it has it mapped, by moves where it cannot. The order is
//! SMC-D's in both cases: data, then the cursor that announces it, then the signal.
//!
//! The signal is a bit and not only a bell: a peer in a kernel looks at nothing else before it sleeps.

use super::ends::{Patience, cdc};
use crate::dmb::{DmbState, RemoteDmb};
use crate::error::Error;
use crate::mover::Mover;
use crate::will::Will;
use dmbridge_proto::smc::cdc::{
    CDC_KIND, CDC_SIZE, CONS_OFFSET, CursorWord, PROD_OFFSET, STATE_OFFSET, StateFlags,
};
use std::fmt;
use std::sync::Arc;

/// The bit that says that there is something to look at. One DMB is one connection's, so one is enough.
const SIGNAL: u64 = 1;

/// The peer's DMB.
pub(crate) enum Remote {
    /// It is mapped here.
    Map(Arc<RemoteDmb>),
    /// The device copies into it.
    Move(Moved),
}

/// A DMB that is not mapped here.
pub(crate) struct Moved {
    mover: Mover,
    /// As its owner told: what lies behind its end the device refuses.
    size: usize,
}

impl Moved {
    pub(crate) fn new(mover: Mover, size: usize) -> Moved {
        Moved { mover, size }
    }

    /// What writes there.
    pub(crate) fn mover(&self) -> &Mover {
        &self.mover
    }

    /// Copies data away, to be moved into the ring from `offset` on.
    pub(crate) fn post(&self, offset: u32, data: &[u8]) -> Result<(), Error> {
        self.mover.post((CDC_SIZE + offset as usize) as u64, data, None).map(|_| ())
    }

    /// Whether `len` bytes and what announces them can be posted without waiting for the device; waits as patiently.
    ///
    /// # Errors
    ///
    /// [`Error::Reset`] if a move has failed: the peer has no such DMB any more.
    pub(crate) fn is_ready(&self, len: usize, patience: Patience) -> Result<bool, Error> {
        let ready = match patience {
            Patience::None => self.mover.has_room(len),
            Patience::Until(_) | Patience::Forever => self.mover.wait_for_room(len, patience.deadline()),
        };
        match self.mover.take_failure() {
            Ok(()) => ready,
            Err(error) => {
                tracing::debug!("{:?}: {error}", self.mover);
                Err(Error::Reset)
            }
        }
    }

    fn store(&self, offset: usize, word: CursorWord, signal: bool) -> Result<(), Error> {
        let signal = signal.then_some(SIGNAL);
        self.mover.post(offset as u64, &word.to_bits().to_ne_bytes(), signal).map(|_| ())
    }
}

impl Remote {
    /// Its size in bytes.
    pub(crate) fn size(&self) -> usize {
        match self {
            Remote::Map(dmb) => dmb.size(),
            Remote::Move(moved) => moved.size,
        }
    }

    /// Marks the CDC message as one, and says nothing yet.
    pub(crate) fn init(&self) {
        match self {
            Remote::Map(dmb) => cdc(dmb.memory()).init(),
            Remote::Move(moved) => {
                let mut message = [0; CDC_SIZE];
                message[..CDC_KIND.len()].copy_from_slice(&CDC_KIND);
                // What makes it fail makes all that follows fail.
                drop(moved.mover.post(0, &message, None));
            }
        }
    }

    /// Has the peer told of this process's end: that the stream is broken off, or, if this side has `finished` before, closed.
    pub(crate) fn leave_will(&self, finished: bool) -> Option<Will> {
        let closed = StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED;
        let last = if finished { closed } else { StateFlags::PEER_CONN_ABORT };
        let (offset, byte) = (STATE_OFFSET as u64, last.bits());
        match self {
            Remote::Map(dmb) => dmb.leave_will(offset, byte, SIGNAL),
            Remote::Move(moved) => moved.mover.leave_will(offset, byte, SIGNAL),
        }
    }

    /// Says how far this side has written, and wakes the peer if it sleeps.
    #[inline]
    pub(crate) fn store_prod(&self, word: CursorWord) -> Result<(), Error> {
        match self {
            Remote::Map(dmb) => {
                cdc(dmb.memory()).store_prod(word);
                dmb.signal(SIGNAL)
            }
            Remote::Move(moved) => moved.store(PROD_OFFSET, word, true),
        }
    }

    /// Says how far this side has read, and its flags; `signal`: and wakes the peer if it sleeps.
    #[inline]
    pub(crate) fn store_cons(&self, word: CursorWord, signal: bool) -> Result<(), Error> {
        match self {
            Remote::Map(dmb) => {
                cdc(dmb.memory()).store_cons(word);
                if signal { dmb.signal(SIGNAL) } else { Ok(()) }
            }
            Remote::Move(moved) => moved.store(CONS_OFFSET, word, signal),
        }
    }

    /// Has who waits at `dmb` woken when moves are done, if there are moves.
    pub(crate) fn wake_when_done(&self, dmb: &Arc<DmbState>) -> Result<(), Error> {
        match self {
            Remote::Map(_) => Ok(()),
            Remote::Move(moved) => moved.mover.wake_when_done(dmb),
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Remote::Map(dmb) => dmb.fmt(f),
            Remote::Move(moved) => moved.mover.fmt(f),
        }
    }
}
