//! The direction to the peer: fills the ring in its DMB.

use super::ends::{Ends, Patience, ring, stop};
use super::remote::{Moved, Remote};
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::mover::{MoveBuffer, Ticket};
use crate::shared::SharedSlice;
use dmbridge_proto::smc::cdc::{CDC_SIZE, CursorWord, StateFlags};
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
    /// Where what is to be moved is written in place.
    stage: Option<Stage>,
}

/// A buffer that is moved from.
#[derive(Debug)]
struct Stage {
    buffer: MoveBuffer,
    /// The last move from it.
    under_way: Option<Ticket>,
}

impl Sender {
    pub(super) fn new(ends: Arc<Ends>) -> Sender {
        let (_, size) = ends.rings();
        Sender { ends, ring: Producer::new(size), seen: StateFlags::empty(), blocked: false, stage: None }
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
        self.reserve_with(max, Patience::Forever)
    }

    /// As [`reserve`](Self::reserve), with patience; empty if there is no room in time.
    #[inline]
    pub(crate) fn reserve_with(&mut self, max: usize, patience: Patience) -> Result<SharedSlice<'_>, Error> {
        self.check()?;
        if self.ring.free() == 0 && !self.wait_for_room(patience)? {
            return Ok(self.room(0));
        }
        if let Remote::Move(_) = self.ends.remote()
            && !self.stage(patience)?
        {
            return Ok(self.room(0));
        }
        Ok(self.room(max))
    }

    #[inline]
    pub(crate) fn room(&self, max: usize) -> SharedSlice<'_> {
        let chunk = self.ring.chunk();
        let (start, len) = (chunk.offset as usize, max.min(chunk.len as usize));
        match (self.ends.remote(), &self.stage) {
            (Remote::Map(dmb), _) => ring(dmb.memory()).slice(start..start + len),
            (_, Some(stage)) => stage.buffer.memory().slice(..len.min(PIECE)),
            // There is no room before there is something to put it into.
            (_, None) => self.ends.local().memory().slice(..0),
        }
    }

    /// Has a buffer at hand that no move reads from; whether there is one in time.
    #[cold]
    fn stage(&mut self, patience: Patience) -> Result<bool, Error> {
        let Remote::Move(moved) = self.ends.remote() else { return Ok(true) };
        let stage = match &mut self.stage {
            Some(stage) => stage,
            none => none.insert(Stage { buffer: moved.mover().buffer(PIECE)?, under_way: None }),
        };
        if !moved.is_ready(0, patience).inspect_err(|_| self.ends.stop(stop::ABORTED))? {
            return Ok(false);
        }
        if let Some(ticket) = stage.under_way {
            let done = match patience {
                Patience::None => moved.mover().is_done(ticket)?,
                _ => moved.mover().wait_until(ticket, patience.deadline())?,
            };
            if !done {
                return Ok(false);
            }
            stage.under_way = None;
        }
        Ok(true)
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
        let chunk = self.ring.chunk();
        assert!(len <= chunk.len as usize, "{len} bytes committed, {chunk:?} reserved");
        if let (Remote::Move(moved), Some(stage)) = (self.ends.remote(), &mut self.stage) {
            let offset = CDC_SIZE as u64 + u64::from(chunk.offset);
            stage.under_way = Some(moved.mover().post_parts(offset, &[stage.buffer.part(0..len)], None)?);
        }
        self.announce(len)
    }

    /// Tells the peer that this side has written so much more, and wakes it if it sleeps.
    #[inline]
    fn announce(&mut self, len: usize) -> Result<(), Error> {
        self.ring.produce(len as u32);
        self.ends.remote().store_prod(CursorWord { cursor: self.ring.cursor(), ..CursorWord::default() })
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

    /// The DMB that this side writes, of a stream that was made of one that is mapped.
    pub(crate) fn remote(&self) -> &RemoteDmb {
        self.ends.mapped()
    }

    /// Whether the peer has closed the stream.
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.ends.incoming().load_cons().state;
        state.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT)
    }

    /// Sends a part of `from`, at least a byte; 0 bytes if there was no room in time.
    #[inline]
    pub(crate) fn write_some(&mut self, from: &[u8], patience: Patience) -> Result<usize, Error> {
        if let Remote::Move(_) = self.ends.remote() {
            return self.move_some(from, patience);
        }
        let room = self.reserve_with(from.len().min(PIECE), patience)?;
        let len = room.len();
        if len != 0 {
            room.copy_from_slice(&from[..len]);
            self.commit(len)?;
        }
        Ok(len)
    }

    /// [`write_some`](Self::write_some), by a move.
    fn move_some(&mut self, from: &[u8], patience: Patience) -> Result<usize, Error> {
        self.check()?;
        if self.ring.free() == 0 && !self.wait_for_room(patience)? {
            return Ok(0);
        }
        let chunk = self.ring.chunk();
        let len = from.len().min(PIECE).min(chunk.len as usize);
        let Some(moved) = self.moved() else { return Ok(0) };
        if !moved.is_ready(len, patience).inspect_err(|_| self.ends.stop(stop::ABORTED))? {
            return Ok(0);
        }
        moved.post(chunk.offset, &from[..len])?;
        self.announce(len)?;
        Ok(len)
    }

    fn moved(&self) -> Option<&Moved> {
        match self.ends.remote() {
            Remote::Map(_) => None,
            Remote::Move(moved) => Some(moved),
        }
    }

    /// Whether a byte could be sent at once, or sending fails at once. If not, the peer tells of the next byte that it
    /// reads.
    pub(crate) fn is_ready(&mut self) -> bool {
        let room =
            |sender: &mut Sender| match sender.moved().map(|moved| moved.is_ready(PIECE, Patience::None)) {
                Some(Ok(false)) => Ok(false),
                Some(Err(error)) => Err(error),
                None | Some(Ok(true)) => Ok(sender.ring.free() != 0 || sender.wait_for_room(Patience::None)?),
            };
        self.check().is_err() || room(self).unwrap_or(true)
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
        // Linux ends half of the TCP connection with half of the stream.
        if stops & stop::LINE != 0 && !state.contains(StateFlags::PEER_DONE_WRITING) {
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
