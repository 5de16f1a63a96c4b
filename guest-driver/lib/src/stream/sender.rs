//! The direction to the peer: fills the ring in its DMB.

use super::ends::{Ends, Patience, ring, stop};
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::shared::SharedSlice;
use dmbridge_proto::smc::cdc::{CursorWord, StateFlags};
use dmbridge_proto::smc::ring::Producer;
use std::io;
use std::sync::Arc;

/// A piece of a long write that the peer is told of: it can read it while the next one is being written.
const PIECE: usize = 128 << 10;

/// The direction to the peer.
#[derive(Debug)]
pub struct Sender {
    ends: Arc<Ends>,
    ring: Producer,
    /// The peer's state flags as they were last looked at.
    seen: StateFlags,
    /// Whether the peer was told that this side waits.
    blocked: bool,
}

impl Sender {
    pub(super) fn new(ends: Arc<Ends>) -> Sender {
        let (_, size) = ends.rings();
        Sender { ends, ring: Producer::new(size), seen: StateFlags::empty(), blocked: false }
    }

    pub(crate) fn ends(&self) -> &Arc<Ends> {
        &self.ends
    }

    /// Sends all of `from`; waits while the ring is full.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when one of the two ends has closed, [`Error::Reset`] when the peer broke the stream off,
    /// [`Error::PeerGone`] when its device is gone, [`Error::Protocol`] when it broke the protocol.
    #[inline]
    pub fn send(&mut self, mut from: &[u8]) -> Result<(), Error> {
        while !from.is_empty() {
            let sent = self.write_some(from, Patience::Forever)?;
            from = &from[sent..];
        }
        Ok(())
    }

    /// Sends what fits without waiting; 0 bytes if nothing does.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    pub fn try_send(&mut self, from: &[u8]) -> Result<usize, Error> {
        self.write_some(from, Patience::None)
    }

    /// Room in the ring, in place: up to `max` bytes without a wrap, at least one. Fill it from its start and
    /// [`commit`](Self::commit). Waits while the ring is full.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    #[inline]
    pub fn reserve(&mut self, max: usize) -> Result<SharedSlice<'_>, Error> {
        self.check()?;
        if self.ring.free() == 0 {
            self.wait_for_room(Patience::Forever)?;
        }
        Ok(self.room(max))
    }

    /// As [`reserve`](Self::reserve), with patience; empty if there is no room in time.
    pub(crate) fn reserve_with(&mut self, max: usize, patience: Patience) -> Result<SharedSlice<'_>, Error> {
        self.check()?;
        if self.ring.free() == 0 && !self.wait_for_room(patience)? {
            return Ok(self.room(0));
        }
        Ok(self.room(max))
    }

    #[inline]
    pub(crate) fn room(&self, max: usize) -> SharedSlice<'_> {
        let chunk = self.ring.chunk();
        let start = chunk.offset as usize;
        ring(self.ends.remote().memory()).slice(start..start + max.min(chunk.len as usize))
    }

    /// Sends the first `len` bytes of what [`reserve`](Self::reserve) gave.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send), and if the peer cannot be woken.
    ///
    /// # Panics
    ///
    /// If `len` is more than there is room for.
    #[inline]
    pub fn commit(&mut self, len: usize) -> Result<(), Error> {
        assert!(
            len <= self.ring.chunk().len as usize,
            "{len} bytes committed, {:?} reserved",
            self.ring.chunk()
        );
        self.ring.produce(len as u32);
        // Tells the peer how far this side has written, and wakes it if it sleeps.
        self.ends.outgoing().store_prod(CursorWord { cursor: self.ring.cursor(), ..CursorWord::default() });
        self.ends.remote().notify()
    }

    /// Tells the peer that nothing more will come: it reads to the end and then gets 0 bytes. The other direction stays.
    ///
    /// # Errors
    ///
    /// If the peer cannot be woken.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.ends.stop(stop::WRITING);
        self.ends.tell_finished()
    }

    /// The DMB that the peer writes.
    pub(crate) fn local(&self) -> &Dmb {
        self.ends.local()
    }

    /// The DMB that this side writes.
    pub(crate) fn remote(&self) -> &RemoteDmb {
        self.ends.remote()
    }

    /// Whether the peer has closed the stream.
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.ends.incoming().load_cons().state;
        state.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT)
    }

    /// Sends a part of `from`, at least a byte; 0 bytes if there was no room in time.
    #[inline]
    pub(crate) fn write_some(&mut self, from: &[u8], patience: Patience) -> Result<usize, Error> {
        let room = self.reserve_with(from.len().min(PIECE), patience)?;
        let len = room.len();
        if len != 0 {
            room.copy_from_slice(&from[..len]);
            self.commit(len)?;
        }
        Ok(len)
    }

    /// Whether a byte could be sent at once, or sending fails at once. If not, the peer tells of the next byte that it
    /// reads.
    pub(crate) fn is_ready(&mut self) -> bool {
        self.check().is_err() || self.ring.free() != 0 || self.wait_for_room(Patience::None).unwrap_or(true)
    }

    /// Whether both sides still want to: one load of each one's flags.
    #[inline]
    pub(crate) fn check(&mut self) -> Result<(), Error> {
        if self.ends.stops() & !stop::READING == 0 && self.ends.incoming().load_cons().state == self.seen {
            return Ok(());
        }
        self.look()
    }

    #[cold]
    fn look(&mut self) -> Result<(), Error> {
        // In this order: what the peer said before its line went down is seen.
        let stops = self.ends.stops();
        let state = self.ends.incoming().load_cons().state;
        let connection = self.ends.observe(state);
        if connection.is_aborted() || stops & stop::ABORTED != 0 {
            return Err(Error::Reset);
        }
        if stops & stop::WRITING != 0 || !connection.may_send() {
            return Err(Error::Closed);
        }
        if stops & stop::LINE != 0 {
            return Err(Error::Reset);
        }
        self.seen = state;
        Ok(())
    }

    /// Waits until there is room; whether there is.
    #[cold]
    fn wait_for_room(&mut self, patience: Patience) -> Result<bool, Error> {
        loop {
            let stops = self.ends.stops();
            let word = self.ends.incoming().load_cons();
            if let Err(error) = self.ring.observe(word.cursor) {
                self.ends.abort();
                return Err(error.into());
            }
            if self.ring.free() != 0 {
                if self.blocked {
                    self.ends.tell_blocked(false)?;
                    self.blocked = false;
                }
                return Ok(true);
            }
            self.check()?;
            if !self.blocked {
                // From here on the peer tells of every byte that it reads.
                self.ends.tell_blocked(true)?;
                self.blocked = true;
                continue;
            }
            if patience == Patience::None {
                return Ok(false);
            }
            let (ends, incoming) = (&self.ends, self.ends.incoming());
            let changed = || incoming.load_cons() != word || ends.stops() != stops;
            if !ends.local().wait_until(patience.deadline(), changed)? {
                return Ok(false);
            }
        }
    }
}

impl io::Write for Sender {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if from.is_empty() { Ok(0) } else { Ok(self.write_some(from, Patience::Forever)?) }
    }

    /// Nothing is held back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
