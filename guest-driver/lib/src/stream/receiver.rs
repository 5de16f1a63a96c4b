//! The direction from the peer: empties the ring in this side's DMB.

use super::ends::{Ends, Patience, ring, stop};
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::shared::SharedSlice;
use dmbridge_proto::smc::buffer::Usage;
use dmbridge_proto::smc::cdc::{ProducerFlags, StateFlags};
use dmbridge_proto::smc::cursor::Cursor;
use dmbridge_proto::smc::ring::{Chunk, Consumer};
use dmbridge_proto::smc::urgent::Urgent;
use std::io;
use std::sync::Arc;

/// The direction from the peer.
#[derive(Debug)]
pub struct Receiver {
    ends: Arc<Ends>,
    ring: Consumer,
    size: u32,
    /// What the peer said when it was last looked at.
    seen: Seen,
    urgent: Urgent,
    usage: Usage,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Seen {
    prod: Cursor,
    flags: ProducerFlags,
    state: StateFlags,
}

/// The sender waits for room, or wants to know for another reason.
const WANTS_TO_KNOW: ProducerFlags = ProducerFlags::WRITE_BLOCKED.union(ProducerFlags::CONS_CURS_UPD_REQ);

impl Receiver {
    pub(super) fn new(ends: Arc<Ends>) -> Receiver {
        let (size, _) = ends.rings();
        let (seen, urgent, usage) = Default::default();
        Receiver { ends, ring: Consumer::new(size), size, seen, urgent, usage }
    }

    #[cfg(test)]
    pub(super) fn ends(&self) -> &Ends {
        &self.ends
    }

    /// The DMB that the peer writes.
    pub(crate) fn local(&self) -> &Dmb {
        self.ends.local()
    }

    /// The DMB that this side writes, of a stream that was made of one that is mapped.
    pub(crate) fn remote(&self) -> &RemoteDmb {
        self.ends.mapped()
    }

    /// What the connection did with its buffer.
    pub(crate) fn usage(&self) -> Usage {
        self.usage
    }

    /// Receives what is there, at least a byte, at most what fits into `to`; waits while nothing is there. 0 bytes: the
    /// peer will send no more (or `to` is empty).
    ///
    /// # Errors
    ///
    /// When all that the peer sent was read: [`Error::Reset`] if it broke the stream off, [`Error::PeerGone`] if its
    /// device is gone; at any time [`Error::Protocol`] if it broke the protocol.
    #[inline]
    pub fn recv(&mut self, to: &mut [u8]) -> Result<usize, Error> {
        if to.is_empty() {
            return Ok(0);
        }
        Ok(self.read_some(to, Patience::Forever)?.unwrap_or(0))
    }

    /// Fills all of `to`.
    ///
    /// # Errors
    ///
    /// As for [`recv`](Self::recv), and [`Error::Closed`] if the peer sent less.
    #[inline]
    pub fn recv_exact(&mut self, mut to: &mut [u8]) -> Result<(), Error> {
        while !to.is_empty() {
            match self.recv(to)? {
                0 => return Err(Error::Closed),
                len => to = &mut to[len..],
            }
        }
        Ok(())
    }

    /// Receives what is there without waiting; `None` if nothing is.
    ///
    /// # Errors
    ///
    /// As for [`recv`](Self::recv).
    pub fn try_recv(&mut self, to: &mut [u8]) -> Result<Option<usize>, Error> {
        if to.is_empty() {
            return Ok(Some(0));
        }
        self.read_some(to, Patience::None)
    }

    /// As [`recv`](Self::recv), with patience; `None` if nothing is there in time. As with TCP, it waits even if there is no
    /// room in `to`.
    #[inline]
    pub(crate) fn read_some(&mut self, to: &mut [u8], patience: Patience) -> Result<Option<usize>, Error> {
        if !self.has_data_for(to.len(), patience)? {
            return Ok(None);
        }
        let mut done = 0;
        // Twice at most: the ring has one end.
        while done < to.len() {
            let there = self.there();
            let len = there.len().min(to.len() - done);
            if len == 0 {
                break;
            }
            there.slice(..len).copy_to_slice(&mut to[done..done + len]);
            self.consume(len)?;
            done += len;
        }
        Ok(Some(done))
    }

    /// Whether there is something to read now, or after a wait. Looks for more if what is known of does not fill `len` bytes.
    #[inline]
    fn has_data_for(&mut self, len: usize, patience: Patience) -> Result<bool, Error> {
        if self.chunk().len == 0 {
            return self.wait_for_data(patience);
        }
        if (self.ring.available() as usize) < len {
            self.observe()?;
        }
        Ok(true)
    }

    /// Copies what is there, as [`read_some`](Self::read_some) does, and leaves it there.
    pub(crate) fn look(&mut self, to: &mut [u8], patience: Patience) -> Result<Option<usize>, Error> {
        if !self.has_data_for(to.len(), patience)? {
            return Ok(None);
        }
        let first = self.there();
        let mut done = first.len().min(to.len());
        first.slice(..done).copy_to_slice(&mut to[..done]);
        // Behind the end of the ring it goes on at its start, unless an urgent byte is in between.
        if done == first.len() && done == self.ring.chunk().len as usize {
            let mut rest = self.ring;
            rest.consume(done as u32);
            let Chunk { offset, len } = self.up_to_urgent(&rest);
            let len = (len as usize).min(to.len() - done);
            let start = offset as usize;
            let ring = ring(self.ends.local().memory());
            ring.slice(start..start + len).copy_to_slice(&mut to[done..done + len]);
            done += len;
        }
        Ok(Some(done))
    }

    /// What is there, in place: without a wrap, at least a byte; empty when the peer will send no more. Then
    /// [`consume`](Self::consume) it. Waits while nothing is there. The peer can change the bytes until then, if it
    /// breaks the protocol: read each once.
    ///
    /// # Errors
    ///
    /// As for [`recv`](Self::recv).
    #[inline]
    pub fn peek(&mut self) -> Result<SharedSlice<'_>, Error> {
        if self.chunk().len == 0 {
            self.wait_for_data(Patience::Forever)?;
        }
        Ok(self.there())
    }

    /// As [`peek`](Self::peek), with patience; `None` if nothing is there in time.
    pub(crate) fn peek_with(&mut self, patience: Patience) -> Result<Option<SharedSlice<'_>>, Error> {
        if self.chunk().len == 0 && !self.wait_for_data(patience)? {
            return Ok(None);
        }
        Ok(Some(self.there()))
    }

    /// Lets go of the first `len` bytes of what [`peek`](Self::peek) gave.
    ///
    /// # Errors
    ///
    /// If the peer waits for the room and cannot be woken.
    ///
    /// # Panics
    ///
    /// If `len` is more than is there.
    #[inline]
    pub fn consume(&mut self, len: usize) -> Result<(), Error> {
        assert!(len <= self.chunk().len as usize, "{len} bytes consumed, {:?} there", self.chunk());
        self.ring.consume(len as u32);
        if self.urgent.is_known() {
            self.pass_urgent();
        }
        // Who waits for room is told of a part that is worth waking up for; of the rest before this side waits itself.
        let worth = if self.seen.flags.intersects(WANTS_TO_KNOW) { self.size / 16 } else { self.size / 4 };
        if self.ring.unreported() >= worth {
            self.report()?;
        }
        Ok(())
    }

    /// Whether a byte could be received at once, or receiving ends or fails at once.
    pub(crate) fn is_ready(&mut self) -> bool {
        self.chunk().len != 0 || self.wait_for_data(Patience::None).unwrap_or(true)
    }

    #[inline]
    fn chunk(&self) -> Chunk {
        self.up_to_urgent(&self.ring)
    }

    #[inline]
    fn up_to_urgent(&self, ring: &Consumer) -> Chunk {
        let mut chunk = ring.chunk();
        if self.urgent.is_known()
            && let Some(before) = self.urgent.before(ring.cursor(), ring.available(), self.size)
        {
            chunk.len = chunk.len.min(before);
        }
        chunk
    }

    #[inline]
    pub(crate) fn there(&self) -> SharedSlice<'_> {
        let chunk = self.chunk();
        let start = chunk.offset as usize;
        ring(self.ends.local().memory()).slice(start..start + chunk.len as usize)
    }

    /// Takes the urgent byte out of the stream if it is the next one.
    #[cold]
    fn pass_urgent(&mut self) {
        if self.urgent.before(self.ring.cursor(), self.ring.available(), self.size) == Some(0) {
            self.ring.consume(1);
            self.urgent.passed();
        }
    }

    /// What the peer says. Flags first: what it wrote before it said that it was all is then seen as well.
    #[inline]
    fn said(&self) -> Seen {
        let incoming = self.ends.incoming();
        let cons = incoming.load_cons();
        Seen { prod: incoming.load_prod().cursor, flags: cons.producer, state: cons.state }
    }

    /// Looks at how far the peer has written.
    #[inline]
    fn observe(&mut self) -> Result<(), Error> {
        let seen = self.said();
        let arrived = match self.ring.observe(seen.prod) {
            Ok(arrived) => arrived,
            Err(error) => {
                self.ends.abort();
                return Err(error.into());
            }
        };
        self.usage.most = self.usage.most.max(self.ring.available());
        self.usage.full += u64::from(arrived != 0 && seen.flags.contains(ProducerFlags::WRITE_BLOCKED));
        if arrived != 0 && seen.flags.contains(ProducerFlags::URG_DATA_PRESENT) {
            self.urgent.arrived(seen.prod, seen.flags);
            self.pass_urgent();
        }
        if seen.state != self.seen.state {
            self.ends.observe(seen.state);
        }
        self.seen = seen;
        Ok(())
    }

    /// Tells the peer how far this side has read, if it does not know.
    #[inline]
    fn report(&mut self) -> Result<(), Error> {
        if self.ring.unreported() == 0 {
            return Ok(());
        }
        self.ring.reported();
        self.ends.tell_read(self.ring.cursor())
    }

    /// Waits until something can be read, or nothing will come any more; `false` if neither in time.
    fn wait_for_data(&mut self, patience: Patience) -> Result<bool, Error> {
        loop {
            // First why this side would stop: what the peer said before its line went down is then seen.
            let stops = self.ends.stops();
            self.observe()?;
            if self.chunk().len != 0 {
                return Ok(true);
            }
            if self.seen.state.contains(StateFlags::PEER_CONN_ABORT) || stops & stop::ABORTED != 0 {
                return Err(Error::Reset);
            }
            if !self.seen.state.is_empty() || stops & stop::READING != 0 {
                return Ok(true);
            }
            if stops & stop::LINE != 0 {
                return Err(Error::Reset);
            }
            // The peer may wait for room while this side waits for data.
            self.report()?;
            if patience == Patience::None {
                return Ok(false);
            }
            let next = ring(self.ends.local().memory()).slice(self.ring.chunk().offset as usize..);
            let seen = self.seen;
            let changed = || {
                // The data comes from the other core's cache together with the cursor, not after it.
                next.prefetch();
                self.said() != seen || self.ends.stops() != stops
            };
            if !self.ends.local().wait_until(patience.deadline(), changed)? {
                return Ok(false);
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.ends.receiver_gone(self.ring.cursor());
    }
}

impl io::Read for Receiver {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv(to)?)
    }
}
