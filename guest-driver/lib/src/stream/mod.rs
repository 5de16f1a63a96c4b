//! A duplex stream of bytes over two DMBs: one of each side, written by the other. Not a socket: who connects to whom,
//! and what to fall back to, is for the layer above ([`smc`](crate::smc)).
//!
//! The layout is that of Linux's SMC-D connections: a CDC message at the start of the DMB, the ring behind it
//! ([`proto::smc::cdc`](dmbridge_proto::smc::cdc)). What the peer writes into the message is read once and checked; a
//! peer that breaks the protocol costs its own connection.
//!
//! A DMB that cannot be mapped is written by moves: each side for itself, and the other need not know.
//!
//! What makes it fast: a side touches the peer's memory once for the data and once for the cursor; it tells the peer
//! about room only when the peer can miss it (a quarter of the ring was read, a sixteenth while the peer waits, or this
//! side is about to wait itself); nobody is rung who is not asleep.

mod ends;
mod receiver;
mod remote;
mod sender;

pub(crate) use ends::{Ends, Patience, cdc, stop};
pub use receiver::Receiver;
pub(crate) use remote::{Moved, Remote};
pub use sender::Sender;

use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use std::io;
use std::sync::Arc;

/// Both directions. [`split`](Self::split) gives each to a thread of its own.
///
/// When both are dropped the stream is closed: the peer reads to the end and then gets 0 bytes. If this side had not read
/// all that came, the peer is told that the stream was broken off.
#[derive(Debug)]
pub struct DmbStream {
    sender: Sender,
    receiver: Receiver,
}

impl DmbStream {
    /// A stream that reads from `local` and writes into `remote`; the peer does the reverse. Both DMBs are fresh: zeroed
    /// by the device and untouched since.
    pub fn new(local: Dmb, remote: RemoteDmb) -> DmbStream {
        DmbStream::with_tail(local, remote, 0)
    }

    /// A stream that leaves the last `tail` bytes of both DMBs alone. They are larger than that by 64 bytes at least.
    pub(crate) fn with_tail(local: Dmb, remote: RemoteDmb, tail: usize) -> DmbStream {
        DmbStream::of(Ends::new(Arc::new(local), Remote::Map(Arc::new(remote)), tail))
    }

    /// As [`new`](Self::new), over DMBs that are used again: their CDC messages say nothing, and the streams before have
    /// ended on both sides.
    pub(crate) fn over(local: Arc<Dmb>, remote: Remote) -> DmbStream {
        DmbStream::of(Ends::new(local, remote, 0))
    }

    fn of(ends: Ends) -> DmbStream {
        let ends = Arc::new(ends);
        DmbStream { sender: Sender::new(ends.clone()), receiver: Receiver::new(ends) }
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
    use dmbridge_proto::smc::cdc::{CDC_SIZE, CursorWord, ProducerFlags, StateFlags};
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
            a.sender.ends().remote().store_prod(CursorWord { cursor, ..Default::default() }).unwrap();
            assert!(matches!(b.recv(&mut [0; 10]), Err(Error::Protocol(_))), "{cursor:?}");
            let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
            b.sender.ends().remote().store_cons(CursorWord { cursor, ..Default::default() }, false).unwrap();
            assert!(matches!(a.send(&[0; 5000]), Err(Error::Protocol(_))), "{cursor:?}");
        }
    }

    #[test]
    fn an_end_that_closes_with_unread_data_breaks_the_stream_off() {
        let (mut a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
        b.write_all(b"for you").unwrap();
        a.write_all(b"nobody reads this").unwrap();
        drop(b);
        let mut text = [0; 20];
        assert_eq!(a.recv(&mut text).unwrap(), 7, "what came before is read first");
        assert!(matches!(a.recv(&mut text), Err(Error::Reset)));
        assert!(matches!(a.send(b"x"), Err(Error::Reset)));
    }

    #[test]
    fn a_sender_learns_of_the_other_ends_close_before_the_ring_is_full() {
        let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
        drop(b);
        assert!(matches!(a.send(b"x"), Err(Error::Closed)));
    }

    #[test]
    fn a_stream_leaves_a_will_that_says_what_its_death_would_mean_until_it_has_said_its_last_word() {
        let streams = || {
            let (here, to_here, _) = pair(4096, BOTH[0]);
            let (there, to_there, port) = pair(4096, BOTH[0]);
            (DmbStream::new(here, to_there), DmbStream::new(there, to_here), port)
        };
        let (mut a, b, port) = streams();
        assert_eq!(port.asked(), ["will 0x20 at 23, then 1"], "broken off");
        a.sender().finish().unwrap();
        assert_eq!(port.asked(), ["will 0xc0 at 23, then 1", "withdraw 1"], "closed");
        let (sender, receiver) = a.split();
        drop(sender);
        assert_eq!(port.asked(), Vec::<String>::new());
        drop(receiver);
        assert_eq!(port.asked()[0], "withdraw 1");
        drop(b);

        let (mut a, b, port) = streams();
        let cursor = Cursor { wrap: 0, count: 9999 };
        b.sender.ends().remote().store_prod(CursorWord { cursor, ..Default::default() }).unwrap();
        assert!(a.recv(&mut [0; 10]).is_err());
        assert_eq!(port.asked(), ["will 0x20 at 23, then 1", "withdraw 1"], "this side broke it off");
    }

    #[test]
    fn flags_are_where_linux_has_them() {
        let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
        a.sender().finish().unwrap();
        let seen = b.receiver.ends().incoming();
        assert_eq!(seen.load_prod().state, StateFlags::empty());
        assert_eq!(seen.load_cons().state, StateFlags::PEER_DONE_WRITING);
        let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
        assert_eq!(a.sender().try_send(&[7; 5000]).unwrap(), 4096 - CDC_SIZE);
        assert_eq!(a.sender().try_send(&[7; 5000]).unwrap(), 0);
        let seen = b.receiver.ends().incoming();
        assert_eq!(seen.load_cons().producer, ProducerFlags::WRITE_BLOCKED);
    }

    #[test]
    fn an_urgent_byte_is_no_part_of_the_stream() {
        let (mut a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
        a.send(b"before").unwrap();
        // As Linux's sender does: the byte, and the flag with the cursor behind it.
        let ends = a.sender.ends();
        ends.mark_urgent();
        a.send(b"!").unwrap();
        let mut text = [0; 20];
        assert_eq!(b.recv(&mut text).unwrap(), 6);
        a.sender.ends().clear_urgent();
        a.send(b"after").unwrap();
        assert_eq!(b.recv(&mut text).unwrap(), 5);
        assert_eq!(&text[..5], b"after");
    }

    #[test]
    fn looking_ahead_takes_nothing_even_across_the_end_of_the_ring() {
        let (mut a, mut b) = streams(4096, BOTH[0], Duration::ZERO);
        let data: Vec<u8> = (0..4000).map(byte).collect();
        a.send(&data).unwrap();
        let mut buffer = vec![0; 4000];
        b.recv_exact(&mut buffer).unwrap();
        a.send(&data[..500]).unwrap();
        for _ in 0..2 {
            buffer.fill(0);
            assert_eq!(b.receiver().look(&mut buffer, Patience::Forever).unwrap(), Some(500));
            assert_eq!(buffer[..500], data[..500]);
        }
        assert_eq!(b.recv(&mut buffer).unwrap(), 500);
        assert_eq!(buffer[..500], data[..500]);
    }

    /// A peer that writes whatever it likes into its words, at any time, urgent marks and flags included.
    #[test]
    fn a_hostile_peer_makes_nothing_but_errors() {
        let mut state = 0x2545_f491_4f6c_dd1d_u64;
        let mut draw = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) % below
        };
        for _ in 0..2000 {
            let (mut a, b) = streams(4096, BOTH[0], Duration::ZERO);
            let size = (4096 - CDC_SIZE) as u64;
            let mut cursor = Cursor::default();
            let mut buffer = vec![0; 5000];
            for _ in 0..30 {
                // Mostly what it may do, so that the odd lie comes at every stage.
                let step = if draw(12) == 0 { draw(1 << 20) } else { draw(size / 2) } as u32;
                let next = cursor.advance(step.min(size as u32), size as u32);
                let flags = ProducerFlags::from_bits_truncate(draw(256) as u8);
                let end = if draw(40) == 0 { draw(256) as u8 } else { 0 };
                let word =
                    CursorWord { cursor: next, producer: flags, state: StateFlags::from_bits_truncate(end) };
                let says = b.receiver.ends().remote();
                if draw(3) == 0 {
                    says.store_cons(word, false).unwrap();
                } else {
                    cursor = next;
                    let cons = CursorWord { cursor: Cursor::default(), ..word };
                    says.store_cons(cons, false).unwrap();
                    says.store_prod(word).unwrap();
                }
                let len = draw(5000) as usize;
                match draw(5) {
                    0 => drop(a.sender().try_send(&buffer[..len])),
                    1 => drop(a.receiver().try_recv(&mut buffer[..len])),
                    2 => drop(a.receiver().look(&mut buffer[..len], Patience::None)),
                    3 => {
                        let there = a.receiver().peek_with(Patience::None);
                        let there = there.map(|there| there.map_or(0, |there| there.len()));
                        if let Ok(there) = there {
                            drop(a.receiver().consume(there.min(len)));
                        }
                    }
                    _ => {
                        let _ = (a.sender().is_ready(), a.receiver().is_ready());
                    }
                }
            }
        }
    }
}
