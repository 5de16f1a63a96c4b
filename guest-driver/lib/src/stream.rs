//! A duplex stream of bytes over two DMBs: one of each side, written by the other. Not a socket: who connects to whom,
//! and what to fall back to, is for the layer above.
//!
//! The layout is that of Linux's SMC-D connections: a CDC message at the start of the DMB, the ring behind it
//! ([`proto::smc::cdc`](dmbridge_proto::smc::cdc)). What the peer writes into the message is read once and checked; a
//! peer that breaks the protocol costs its own connection.
//!
//! What makes it fast: a side touches the peer's memory once for the data and once for the cursor; it tells the peer
//! about room only when the peer can miss it (a quarter of the ring was read, or the peer waits); nobody is rung who is
//! not asleep.

use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::shared::{SharedMemory, SharedSlice};
use dmbridge_proto::smc::cdc::{CDC_SIZE, CdcMessage, CursorWord, ProducerFlags, StateFlags};
use dmbridge_proto::smc::ring::{Consumer, Producer};
use std::io;
use std::sync::Arc;

/// A piece of a long write that the peer is told of: it can read it while the next one is being written.
const PIECE: usize = 128 << 10;

/// Both directions. [`split`](Self::split) gives each to a thread of its own.
#[derive(Debug)]
pub struct DmbStream {
    sender: Sender,
    receiver: Receiver,
}

/// The direction to the peer.
#[derive(Debug)]
pub struct Sender {
    ends: Arc<Ends>,
    ring: Producer,
    state: StateFlags,
}

/// The direction from the peer.
#[derive(Debug)]
pub struct Receiver {
    ends: Arc<Ends>,
    ring: Consumer,
    /// The peer's producer word as it was last read.
    seen: CursorWord,
}

/// What the two directions share: each reads in `local` and writes in `remote`.
#[derive(Debug)]
struct Ends {
    local: Dmb,
    remote: RemoteDmb,
    /// Bytes at the end of both DMBs that are not the stream's.
    tail: usize,
}

impl Ends {
    /// What the peer says.
    #[inline]
    fn incoming(&self) -> &CdcMessage {
        cdc(self.local.memory())
    }

    /// What this side says.
    #[inline]
    fn outgoing(&self) -> &CdcMessage {
        cdc(self.remote.memory())
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        // Nobody else writes this word any more: both directions are gone.
        let mut word = self.outgoing().load_prod();
        word.state |= StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED;
        self.outgoing().store_prod(word);
        // The peer that cannot be rung learns it from its device.
        let _ = self.remote.notify();
    }
}

#[inline]
fn cdc(memory: &SharedMemory) -> &CdcMessage {
    // SAFETY: a DMB has 4096 bytes at least, starts at a multiple of 4096, and stays mapped while `memory` lives. This
    // module accesses its first 32 bytes by this reference only; the peer is a guest.
    unsafe { CdcMessage::from_ptr(memory.as_ptr()) }
}

fn ring_size(memory: &SharedMemory, tail: usize) -> u32 {
    u32::try_from(memory.len() - CDC_SIZE - tail).unwrap_or(1 << 31).min(1 << 31)
}

#[inline]
fn ring(memory: &SharedMemory) -> SharedSlice<'_> {
    memory.slice(CDC_SIZE..)
}

impl DmbStream {
    /// A stream that reads from `local` and writes into `remote`; the peer does the reverse. Both DMBs are fresh: zeroed
    /// by the device and untouched since.
    pub fn new(local: Dmb, remote: RemoteDmb) -> DmbStream {
        DmbStream::with_tail(local, remote, 0)
    }

    /// A stream that leaves the last `tail` bytes of both DMBs alone. They are larger than that by 64 bytes at least.
    pub(crate) fn with_tail(local: Dmb, remote: RemoteDmb, tail: usize) -> DmbStream {
        let receive = ring_size(local.memory(), tail);
        let send = ring_size(remote.memory(), tail);
        let ends = Arc::new(Ends { local, remote, tail });
        ends.outgoing().init();
        DmbStream {
            sender: Sender { ends: ends.clone(), ring: Producer::new(send), state: StateFlags::empty() },
            receiver: Receiver { ends, ring: Consumer::new(receive), seen: CursorWord::default() },
        }
    }

    /// The two directions, to be used by two threads.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    /// The direction to the peer.
    pub fn sender(&mut self) -> &mut Sender {
        &mut self.sender
    }

    /// The direction from the peer.
    pub fn receiver(&mut self) -> &mut Receiver {
        &mut self.receiver
    }

    /// Sends all of it; see [`Sender::send`].
    #[inline]
    pub fn send(&mut self, from: &[u8]) -> Result<(), Error> {
        self.sender.send(from)
    }

    /// Receives what is there, at least a byte; see [`Receiver::recv`].
    #[inline]
    pub fn recv(&mut self, to: &mut [u8]) -> Result<usize, Error> {
        self.receiver.recv(to)
    }

    /// Receives exactly so much; see [`Receiver::recv_exact`].
    #[inline]
    pub fn recv_exact(&mut self, to: &mut [u8]) -> Result<(), Error> {
        self.receiver.recv_exact(to)
    }
}

impl Sender {
    /// Sends all of `from`; waits while the ring is full.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`] when the peer has closed, [`Error::PeerGone`] when its device is gone, [`Error::Protocol`] when
    /// it broke the protocol.
    #[inline]
    pub fn send(&mut self, mut from: &[u8]) -> Result<(), Error> {
        while !from.is_empty() {
            let sent = self.write_some(from)?;
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
        if self.ring.free() == 0 {
            self.observe()?;
        }
        if self.ring.free() == 0 { Ok(0) } else { self.write_some(from) }
    }

    /// Room in the ring, in place: up to `max` bytes without a wrap, at least one. Fill it from its start and
    /// [`commit`](Self::commit). Waits while the ring is full.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    #[inline]
    pub fn reserve(&mut self, max: usize) -> Result<SharedSlice<'_>, Error> {
        if self.ring.free() == 0 {
            self.wait_for_room()?;
        }
        let chunk = self.ring.chunk();
        let start = chunk.offset as usize;
        Ok(ring(self.ends.remote.memory()).slice(start..start + max.min(chunk.len as usize)))
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
        self.publish(ProducerFlags::empty())
    }

    /// Tells the peer that nothing more will come: it reads to the end and then gets 0 bytes. The other direction stays.
    ///
    /// # Errors
    ///
    /// If the peer cannot be woken.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.state |= StateFlags::PEER_DONE_WRITING;
        self.publish(ProducerFlags::empty())
    }

    /// The DMB that the peer writes.
    pub(crate) fn local(&self) -> &Dmb {
        &self.ends.local
    }

    /// The DMB that this side writes.
    pub(crate) fn remote(&self) -> &RemoteDmb {
        &self.ends.remote
    }

    /// Whether the peer has closed the stream.
    pub(crate) fn is_closed(&self) -> bool {
        let state = self.ends.incoming().load_prod().state;
        state.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT)
    }

    #[inline]
    fn write_some(&mut self, from: &[u8]) -> Result<usize, Error> {
        let room = self.reserve(from.len().min(PIECE))?;
        let len = room.len();
        room.copy_from_slice(&from[..len]);
        self.commit(len)?;
        Ok(len)
    }

    /// Tells the peer how far this side has written, and wakes it if it sleeps.
    #[inline]
    fn publish(&mut self, producer: ProducerFlags) -> Result<(), Error> {
        let word = CursorWord { cursor: self.ring.cursor(), producer, state: self.state };
        self.ends.outgoing().store_prod(word);
        self.ends.remote.notify()
    }

    /// Looks at how far the peer has read, and whether it is still there.
    fn observe(&mut self) -> Result<(), Error> {
        self.ring.observe(self.ends.incoming().load_cons().cursor)?;
        let state = self.ends.incoming().load_prod().state;
        if state.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT) {
            return Err(Error::Closed);
        }
        Ok(())
    }

    #[cold]
    fn wait_for_room(&mut self) -> Result<(), Error> {
        self.observe()?;
        if self.ring.free() != 0 {
            return Ok(());
        }
        // From here on the peer tells of every byte that it reads.
        self.publish(ProducerFlags::WRITE_BLOCKED)?;
        while self.ring.free() == 0 {
            let incoming = self.ends.incoming();
            let full = incoming.load_cons();
            let state = incoming.load_prod().state;
            self.ring.observe(full.cursor)?;
            if self.ring.free() == 0 {
                self.ends.local.wait_until(None, || {
                    incoming.load_cons() != full || incoming.load_prod().state != state
                })?;
            }
            self.observe()?;
        }
        Ok(())
    }
}

impl Receiver {
    /// Receives what is there, at least a byte, at most what fits into `to`; waits while nothing is there. 0 bytes: the
    /// peer will send no more (or `to` is empty).
    ///
    /// # Errors
    ///
    /// [`Error::PeerGone`] when the peer's device is gone and all that it sent was read, [`Error::Protocol`] when it broke
    /// the protocol.
    #[inline]
    pub fn recv(&mut self, to: &mut [u8]) -> Result<usize, Error> {
        let mut done = 0;
        while done < to.len() {
            let there = if done == 0 { self.peek()? } else { self.chunk() };
            let len = there.len().min(to.len() - done);
            if len == 0 {
                break;
            }
            there.slice(..len).copy_to_slice(&mut to[done..done + len]);
            self.consume(len)?;
            done += len;
        }
        Ok(done)
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
        if self.ring.available() == 0 {
            self.observe()?;
            if self.ring.available() == 0 && !self.is_finished() {
                self.report()?;
                return Ok(None);
            }
        }
        self.recv(to).map(Some)
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
        if self.ring.available() == 0 {
            self.wait_for_data()?;
        }
        Ok(self.chunk())
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
        assert!(len <= self.ring.chunk().len as usize, "{len} bytes consumed, {:?} there", self.ring.chunk());
        self.ring.consume(len as u32);
        if self.ring.unreported() >= self.threshold()
            || self.seen.producer.contains(ProducerFlags::WRITE_BLOCKED)
        {
            self.report()?;
        }
        Ok(())
    }

    /// The DMB that the peer writes.
    pub(crate) fn local(&self) -> &Dmb {
        &self.ends.local
    }

    /// The DMB that this side writes.
    pub(crate) fn remote(&self) -> &RemoteDmb {
        &self.ends.remote
    }

    fn threshold(&self) -> u32 {
        ring_size(self.ends.local.memory(), self.ends.tail) / 4
    }

    #[inline]
    fn chunk(&self) -> SharedSlice<'_> {
        let chunk = self.ring.chunk();
        let start = chunk.offset as usize;
        ring(self.ends.local.memory()).slice(start..start + chunk.len as usize)
    }

    fn is_finished(&self) -> bool {
        let end = StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT;
        self.seen.state.intersects(end)
    }

    /// Looks at how far the peer has written.
    #[inline]
    fn observe(&mut self) -> Result<(), Error> {
        self.seen = self.ends.incoming().load_prod();
        self.ring.observe(self.seen.cursor)?;
        Ok(())
    }

    /// Tells the peer how far this side has read, if it does not know.
    #[inline]
    fn report(&mut self) -> Result<(), Error> {
        if self.ring.unreported() == 0 {
            return Ok(());
        }
        self.ends.outgoing().store_cons(CursorWord { cursor: self.ring.cursor(), ..CursorWord::default() });
        self.ring.reported();
        self.ends.remote.notify()
    }

    fn wait_for_data(&mut self) -> Result<(), Error> {
        loop {
            self.observe()?;
            if self.ring.available() != 0 || self.is_finished() {
                return Ok(());
            }
            // The peer may wait for room while this side waits for data.
            self.report()?;
            let incoming = self.ends.incoming();
            let next = ring(self.ends.local.memory()).slice(self.ring.chunk().offset as usize..);
            let seen = self.seen;
            self.ends.local.wait_until(None, || {
                // The data comes from the other core's cache together with the cursor, not after it.
                next.prefetch();
                incoming.load_prod() != seen
            })?;
        }
    }
}

impl io::Write for Sender {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if from.is_empty() { Ok(0) } else { Ok(self.write_some(from)?) }
    }

    /// Nothing is held back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl io::Read for Receiver {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Ok(self.recv(to)?)
    }
}

impl io::Write for DmbStream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.sender.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sender.flush()
    }
}

impl io::Read for DmbStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.receiver.read(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dmb::tests::pair;
    use crate::proto::control::PairFlags;
    use crate::proto::smc::cursor::Cursor;
    use std::io::{Read, Write};
    use std::thread;
    use std::time::Duration;

    const BOTH: [PairFlags; 2] = [PairFlags::MAP, PairFlags::MAP.union(PairFlags::FUTEX)];

    /// Two ends of a stream with rings of `size` − 32 bytes, with no device; they sleep at once or spin.
    fn streams(size: usize, flags: PairFlags, spin: Duration) -> (DmbStream, DmbStream) {
        let (here, to_here, _) = pair(size, flags);
        let (there, to_there, _) = pair(size, flags);
        here.set_spin(spin);
        there.set_spin(spin);
        (DmbStream::new(here, to_there), DmbStream::new(there, to_here))
    }

    /// The `i`th byte of a stream that repeats in no ring.
    fn byte(i: usize) -> u8 {
        (i % 251) as u8 ^ (i / 251) as u8
    }

    #[test]
    fn every_byte_arrives_in_order_however_it_is_cut() {
        const TOTAL: usize = 300_000;
        for flags in BOTH {
            for spin in [Duration::ZERO, Duration::from_micros(50)] {
                let (mut a, mut b) = streams(8192, flags, spin);
                thread::scope(|scope| {
                    scope.spawn(move || {
                        let data: Vec<u8> = (0..TOTAL).map(byte).collect();
                        let mut at = 0;
                        for len in (1..).map(|i| i * 37 % 9000 + 1) {
                            let end = (at + len).min(TOTAL);
                            a.send(&data[at..end]).unwrap();
                            at = end;
                            if at == TOTAL {
                                break;
                            }
                        }
                    });
                    let mut at = 0;
                    let mut buffer = vec![0; 5000];
                    for len in (1..).map(|i| i * 53 % 5000 + 1) {
                        let got = b.recv(&mut buffer[..len]).unwrap();
                        if got == 0 {
                            break;
                        }
                        for (i, value) in buffer[..got].iter().enumerate() {
                            assert_eq!(*value, byte(at + i), "byte {}", at + i);
                        }
                        at += got;
                    }
                    assert_eq!(at, TOTAL);
                });
            }
        }
    }

    #[test]
    fn in_place_both_directions_go_at_once() {
        const TOTAL: usize = 200_000;
        let (a, b) = streams(4096, BOTH[1], Duration::ZERO);
        thread::scope(|scope| {
            for (mut sender, mut receiver) in [a.split(), b.split()] {
                scope.spawn(move || {
                    let mut at = 0;
                    while at < TOTAL {
                        let room = sender.reserve(TOTAL - at).unwrap();
                        let len = room.len();
                        room.copy_from_slice(&(at..at + len).map(byte).collect::<Vec<_>>());
                        sender.commit(len).unwrap();
                        at += len;
                    }
                    sender.finish().unwrap();
                });
                scope.spawn(move || {
                    let mut at = 0;
                    loop {
                        let there = receiver.peek().unwrap();
                        let len = there.len();
                        if len == 0 {
                            break;
                        }
                        for i in 0..len {
                            assert_eq!(there.read_u8(i), byte(at + i));
                        }
                        receiver.consume(len).unwrap();
                        at += len;
                    }
                    assert_eq!(at, TOTAL);
                });
            }
        });
    }

    #[test]
    fn what_was_sent_before_a_close_is_received() {
        let (mut a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
        a.write_all(b"last words").unwrap();
        drop(a);
        let mut text = String::new();
        b.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
        assert!(matches!(b.send(&[0; 5000]), Err(Error::Closed)), "nobody reads any more");
    }

    #[test]
    fn without_waiting_only_what_fits_is_sent_and_only_what_is_there_received() {
        let (mut a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
        let mut buffer = [0; 5000];
        assert_eq!(b.receiver().try_recv(&mut buffer).unwrap(), None);
        assert_eq!(a.sender().try_send(&[7; 5000]).unwrap(), 4096 - CDC_SIZE);
        assert_eq!(a.sender().try_send(&[7; 5000]).unwrap(), 0);
        assert_eq!(b.receiver().try_recv(&mut buffer).unwrap(), Some(4096 - CDC_SIZE));
        assert_eq!(a.sender().try_send(&[7; 10]).unwrap(), 10);
        a.sender().finish().unwrap();
        assert_eq!(b.receiver().try_recv(&mut buffer).unwrap(), Some(10));
        assert_eq!(b.receiver().try_recv(&mut buffer).unwrap(), Some(0));
    }

    #[test]
    fn a_peer_that_breaks_the_protocol_costs_its_own_stream() {
        for cursor in
            [Cursor { wrap: 0, count: 9999 }, Cursor { wrap: 2, count: 0 }, Cursor { wrap: 1, count: 1 }]
        {
            let (a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
            a.sender.ends.outgoing().store_prod(CursorWord { cursor, ..Default::default() });
            assert!(matches!(b.recv(&mut [0; 10]), Err(Error::Protocol(_))), "{cursor:?}");
            let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
            b.sender.ends.outgoing().store_cons(CursorWord { cursor, ..Default::default() });
            assert!(matches!(a.send(&[0; 5000]), Err(Error::Protocol(_))), "{cursor:?}");
        }
    }
}
