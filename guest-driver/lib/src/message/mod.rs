//! Messages between two processes or virtual machines, over two DMBs: each arrives as a whole, in order.
//!
//! Small ones go through the DMBs, as a [stream] does: one copy in, one copy out. Large ones, between two
//! processes that the kernel lets into each other's memory, go directly: **one copy, from the sender's buffer to the
//! receiver's**, wherever those are, by `process_vm_readv` and `process_vm_writev`, of which both processes do a share.
//! Whether that is faster for messages of some size, each sender finds out from now and then sending a few the other way.
//! Large buffers are worth huge pages (`madvise(MADV_HUGEPAGE)`), because the kernel pins page by page.
//!
//! Whether there is a direct way, both sides find out when the channel opens. There is none into another user's process,
//! another PID namespace, a virtual machine, or where Yama forbids it ([`Channel::direct`] says why); then everything goes
//! through the DMBs. Nothing else changes by that, but one thing: a large message that goes directly leaves its sender when
//! the receiver takes it, and through the DMBs as soon as there is room.
//!
//! ```no_run
//! # fn f(local: dmbridge::Dmb, remote: dmbridge::RemoteDmb) -> Result<(), dmbridge::Error> {
//! use dmbridge::message::Channel;
//! let mut channel = Channel::open(local, remote)?;
//! channel.send(b"a message")?;
//! let mut buffer = vec![0; 1 << 20];
//! if let Some(len) = channel.recv(&mut buffer)? {
//!     println!("{:?}", &buffer[..len]);
//! }
//! # Ok(())
//! # }
//! ```

mod chooser;
mod frame;
mod handshake;
mod joint;

use crate::cma::{self, Direction, Peer};
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::{Error, OutOfBounds};
use crate::fork::Process;
use crate::stream::{self, DmbStream};
use chooser::Chooser;
use frame::Frame;
use joint::{End, Joint, Taken};
use libc::iovec;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use cma::Refused;

/// Below this size, in bytes, a message and its frame are written at once if there is room.
const SMALL: usize = 128 << 10;
/// The smallest DMB that a channel can be made of, in bytes.
const LEAST: usize = 2 * joint::SIZE;

/// When messages go directly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direct {
    /// Where it is faster, as the messages themselves show.
    #[default]
    Measured,
    /// From this size on, in bytes.
    From(usize),
    /// Never.
    Never,
}

/// Both directions. [`split`](Self::split) gives each to a thread of its own.
#[derive(Debug)]
pub struct Channel {
    sender: Sender,
    receiver: Receiver,
    direct: Result<(), Refused>,
}

/// The direction to the peer.
#[derive(Debug)]
pub struct Sender {
    stream: stream::Sender,
    peer: Option<Arc<Peer>>,
    /// Which the peer knows: not a child of it.
    process: Process,
    /// No smaller message goes directly.
    threshold: usize,
    /// Whether the others do; all, if there is none.
    chooser: Option<Chooser>,
    /// The number of the last offer.
    offers: u32,
    /// Whether the last offer may not be done with, because its handle was forgotten.
    open: bool,
}

/// The direction from the peer.
#[derive(Debug)]
pub struct Receiver {
    stream: stream::Receiver,
    peer: Option<Arc<Peer>>,
    /// Which the peer knows: not a child of it.
    process: Process,
    /// A message that was announced and not received.
    next: Option<Next>,
}

/// A message that is to be received.
#[derive(Debug)]
enum Next {
    Inline { len: usize },
    Offer { number: u32, len: usize, pieces: Vec<iovec> },
}

// SAFETY: the addresses in `pieces` are another process's, and are followed by the kernel only.
unsafe impl Send for Next {}
// SAFETY: as above.
unsafe impl Sync for Next {}

impl Next {
    fn len(&self) -> usize {
        match self {
            Next::Inline { len } | Next::Offer { len, .. } => *len,
        }
    }
}

impl Channel {
    /// A channel that receives through `local` and sends through `remote`; the peer does the reverse. Both DMBs are fresh:
    /// zeroed by the device and untouched since; and of 8192 bytes at least. Returns when the peer has opened its end, too.
    ///
    /// # Errors
    ///
    /// As for [`Sender::send`], and [`Error::OutOfBounds`] if a DMB is too small.
    pub fn open(local: Dmb, remote: RemoteDmb) -> Result<Channel, Error> {
        Channel::open_with(local, remote, Direct::default())
    }

    /// As [`open`](Self::open). Of the two sides' wishes the larger size counts.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_with(local: Dmb, remote: RemoteDmb, direct: Direct) -> Result<Channel, Error> {
        for size in [local.size(), remote.size()] {
            if size < LEAST {
                return Err(OutOfBounds { offset: 0, len: LEAST, size }.into());
            }
        }
        handshake::open(DmbStream::with_tail(local, remote, joint::SIZE), direct)
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

    /// Both directions at once, for instance to post a message in one and receive in the other.
    pub fn both(&mut self) -> (&mut Sender, &mut Receiver) {
        (&mut self.sender, &mut self.receiver)
    }

    /// Whether there is a direct way between the two processes, and if not, why.
    pub fn direct(&self) -> Result<(), &Refused> {
        self.direct.as_ref().copied()
    }

    /// From which size on messages go directly, or may if it is faster, in bytes; [`usize::MAX`]: never.
    pub fn threshold(&self) -> usize {
        self.sender.threshold
    }

    /// Sends a message; see [`Sender::send`].
    ///
    /// # Errors
    ///
    /// As there.
    #[inline]
    pub fn send(&mut self, message: &[u8]) -> Result<(), Error> {
        self.sender.send(message)
    }

    /// Receives a message; see [`Receiver::recv`].
    ///
    /// # Errors
    ///
    /// As there.
    #[inline]
    pub fn recv(&mut self, to: &mut [u8]) -> Result<Option<usize>, Error> {
        self.receiver.recv(to)
    }
}

/// A message under way. When this is dropped, it waits until the buffer is free.
#[derive(Debug)]
pub struct Posted<'a> {
    sender: &'a mut Sender,
    pieces: &'a [IoSlice<'a>],
    /// The offer; none if the message has left the buffer.
    number: Option<u32>,
}

impl Sender {
    /// Sends a message. When this returns, `message` may be used for something else.
    ///
    /// # Errors
    ///
    /// As for [`stream::Sender::send`](crate::stream::Sender::send), and [`Error::Peer`].
    #[inline]
    pub fn send(&mut self, message: &[u8]) -> Result<(), Error> {
        if message.len() < self.threshold {
            self.send_inline(message)
        } else {
            self.send_vectored(&[IoSlice::new(message)])
        }
    }

    /// As [`send`](Self::send), a message from several pieces.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    pub fn send_vectored(&mut self, message: &[IoSlice<'_>]) -> Result<(), Error> {
        self.post(message)?.wait()
    }

    /// Starts to send a message. One that goes directly is offered to the peer, and this returns at once: meanwhile,
    /// receive, for instance. Any other is sent before this returns, which waits for room as [`send`](Self::send) does.
    ///
    /// # Errors
    ///
    /// As for [`send`](Self::send).
    pub fn post<'a>(&'a mut self, message: &'a [IoSlice<'a>]) -> Result<Posted<'a>, Error> {
        self.settle()?;
        let len: usize = message.iter().map(|piece| piece.len()).sum();
        let pieces = message.iter().filter(|piece| !piece.is_empty());
        let count = pieces.clone().count();
        let direct = self.peer.is_some() && self.process.is_current();
        let direct = direct && len >= self.threshold && len != 0 && count <= cma::MAX_PIECES;
        let chosen = |chooser: &mut Chooser| chooser.next(len, Instant::now);
        if !direct || !self.chooser.as_mut().is_none_or(chosen) {
            self.send_pieces(message)?;
            return Ok(Posted { sender: self, pieces: message, number: None });
        }
        self.offers = self.offers.wrapping_add(1).max(1);
        let frame = Frame::Offer { number: self.offers, len: len as u64, pieces: count as u32 };
        let mut bytes = frame.to_bytes().to_vec();
        for piece in pieces {
            bytes.extend((piece.as_ptr().addr() as u64).to_le_bytes());
            bytes.extend((piece.len() as u64).to_le_bytes());
        }
        self.stream.send(&bytes)?;
        self.open = true;
        let number = Some(self.offers);
        Ok(Posted { sender: self, pieces: message, number })
    }

    /// Tells the peer that nothing more will come; it then receives `None`. The other direction stays.
    ///
    /// # Errors
    ///
    /// If the peer cannot be woken.
    pub fn finish(&mut self) -> Result<(), Error> {
        self.settle()?;
        self.stream.finish()
    }

    /// Waits for an offer whose handle was forgotten.
    fn settle(&mut self) -> Result<(), Error> {
        if !self.open {
            return Ok(());
        }
        match self.wait_taken(self.offers, &[])? {
            Taken::Copied => Ok(()),
            Taken::Refused => Err(Error::Peer("it asks for a message that is not there any more")),
        }
    }

    #[inline]
    fn send_inline(&mut self, message: &[u8]) -> Result<(), Error> {
        if self.open {
            self.settle()?;
        }
        let header = Frame::Inline { len: message.len() as u64 }.to_bytes();
        let all = header.len() + message.len();
        let room = self.stream.reserve(all)?;
        if room.len() == all && message.len() < SMALL {
            let (to_header, to_message) = room.split_at(header.len());
            to_header.copy_from_slice(&header);
            to_message.copy_from_slice(message);
            return self.stream.commit(all);
        }
        self.stream.send(&header)?;
        self.stream.send(message)
    }

    fn send_pieces(&mut self, message: &[IoSlice<'_>]) -> Result<(), Error> {
        if let [piece] = message {
            return self.send_inline(piece);
        }
        let len: usize = message.iter().map(|piece| piece.len()).sum();
        self.stream.send(&Frame::Inline { len: len as u64 }.to_bytes())?;
        message.iter().try_for_each(|piece| self.stream.send(piece))
    }

    /// Waits until the receiver has done with an offer, and copies a share of it meanwhile.
    fn wait_taken(&mut self, number: u32, message: &[iovec]) -> Result<Taken, Error> {
        let mut helped = message.is_empty();
        let taken = loop {
            let joint = Joint::of(self.stream.remote().memory());
            if let Some(taken) = joint.taken(number) {
                break taken;
            }
            if !helped && let Some(destination) = joint.destination(number) {
                helped = true;
                self.help(number, message, &destination)?;
                continue;
            }
            let closed = self.stream.is_closed();
            if closed {
                return Err(Error::Closed);
            }
            self.stream.local().wait_until(None, || {
                joint.taken(number).is_some()
                    || (!helped && joint.destination(number).is_some())
                    || self.stream.is_closed()
            })?;
        };
        self.open = false;
        Ok(taken)
    }

    /// Writes chunks into the receiver's buffer as long as there are some to claim.
    fn help(&self, number: u32, message: &[iovec], destination: &[iovec]) -> Result<(), Error> {
        let Some(peer) = &self.peer else { return Ok(()) };
        let joint = Joint::of(self.stream.remote().memory());
        let len: usize = message.iter().map(|piece| piece.iov_len).sum();
        let room = destination.iter().fold(0usize, |sum, piece| sum.saturating_add(piece.iov_len));
        if room < len {
            return Ok(());
        }
        let mut helped = 0;
        while let Some(chunks) = joint.claim(number, len, End::End) {
            let bytes = joint::bytes(&chunks, len);
            // SAFETY: the pieces are a message that is borrowed until it is taken; they are only read.
            let copied =
                unsafe { peer.copy(Direction::Write, message, destination, bytes.start, bytes.len()) };
            if let Err(error) = copied {
                tracing::debug!("the receiver has to copy by itself: {error}");
                joint.set_failed(number, chunks);
                break;
            }
            helped += chunks.len() as u32;
            joint.set_helped(number, helped);
        }
        self.stream.remote().notify()
    }
}

impl Posted<'_> {
    /// Waits until the buffer is free. Until then this process does a share of the copying.
    ///
    /// # Errors
    ///
    /// As for [`Sender::send`].
    pub fn wait(mut self) -> Result<(), Error> {
        self.settle()
    }

    /// Whether the buffer is free.
    pub fn is_done(&self) -> bool {
        let joint = Joint::of(self.sender.stream.remote().memory());
        self.number.is_none_or(|number| joint.taken(number) == Some(Taken::Copied))
    }

    fn settle(&mut self) -> Result<(), Error> {
        let Some(number) = self.number.take() else { return Ok(()) };
        let pieces: Vec<iovec> = self.pieces.iter().map(|piece| iovec_of(piece)).collect();
        match self.sender.wait_taken(number, &pieces)? {
            Taken::Copied => Ok(()),
            Taken::Refused => {
                // The receiver waits for the bytes, and for nothing else.
                self.sender.peer = None;
                self.sender.send_pieces(self.pieces)
            }
        }
    }
}

impl Drop for Posted<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.settle() {
            tracing::debug!("a message was not received: {error}");
        }
    }
}

impl Receiver {
    /// Receives a message into `to`, waits until one comes: its length; `None` if no more will come.
    ///
    /// # Errors
    ///
    /// [`Error::MessageTooLong`] if it does not fit, and it stays the next one; [`Error::PeerGone`] when the peer's device
    /// is gone and all that it sent was received; [`Error::Peer`] and [`Error::Protocol`] when it broke the protocol.
    #[inline]
    pub fn recv(&mut self, to: &mut [u8]) -> Result<Option<usize>, Error> {
        self.recv_vectored(&mut [IoSliceMut::new(to)])
    }

    /// As [`recv`](Self::recv), into several pieces.
    ///
    /// # Errors
    ///
    /// As for [`recv`](Self::recv).
    pub fn recv_vectored(&mut self, to: &mut [IoSliceMut<'_>]) -> Result<Option<usize>, Error> {
        let Some(len) = self.next_len()? else { return Ok(None) };
        let size: usize = to.iter().map(|piece| piece.len()).sum();
        if len > size {
            return Err(Error::MessageTooLong { len, size });
        }
        match self.next.take() {
            Some(Next::Offer { number, pieces, .. }) => self.take_offer(number, len, &pieces, to)?,
            _ => self.recv_inline(len, to)?,
        }
        Ok(Some(len))
    }

    /// The length of the next message, which this waits for; `None` if no more will come.
    ///
    /// # Errors
    ///
    /// As for [`recv`](Self::recv).
    #[inline]
    pub fn next_len(&mut self) -> Result<Option<usize>, Error> {
        if self.next.is_none() {
            if self.stream.peek()?.is_empty() {
                return Ok(None);
            }
            self.next = Some(self.recv_next()?);
        }
        Ok(self.next.as_ref().map(Next::len))
    }

    fn recv_next(&mut self) -> Result<Next, Error> {
        let long = |len| usize::try_from(len).map_err(|_| Error::Peer("a message is too long"));
        match self.recv_frame()? {
            Frame::Inline { len } => Ok(Next::Inline { len: long(len)? }),
            Frame::Offer { number, len, pieces } => {
                let len = long(len)?;
                if pieces as usize > cma::MAX_PIECES || self.peer.is_none() || len > isize::MAX as usize {
                    return Err(Error::Peer("it offers what cannot be taken"));
                }
                let mut bytes = vec![0; pieces as usize * 16];
                self.stream.recv_exact(&mut bytes)?;
                let word = |bytes: &[u8]| {
                    let mut word = [0; 8];
                    word.copy_from_slice(bytes);
                    u64::from_le_bytes(word) as usize
                };
                let piece = |bytes: &[u8]| iovec {
                    iov_base: std::ptr::without_provenance_mut(word(&bytes[..8])),
                    iov_len: word(&bytes[8..]),
                };
                let pieces: Vec<iovec> = bytes.chunks_exact(16).map(piece).collect();
                let sum = pieces.iter().try_fold(0usize, |sum, piece| sum.checked_add(piece.iov_len));
                if sum != Some(len) {
                    return Err(Error::Peer("the pieces of a message are not as long as the message"));
                }
                Ok(Next::Offer { number, len, pieces })
            }
            _ => Err(Error::Peer("a frame came that belongs to the start of a channel")),
        }
    }

    fn recv_frame(&mut self) -> Result<Frame, Error> {
        let mut bytes = [0; frame::SIZE];
        self.stream.recv_exact(&mut bytes)?;
        Frame::parse(&bytes)
    }

    fn recv_inline(&mut self, mut len: usize, to: &mut [IoSliceMut<'_>]) -> Result<(), Error> {
        for piece in to {
            let part = len.min(piece.len());
            self.stream.recv_exact(&mut piece[..part])?;
            len -= part;
        }
        Ok(())
    }

    /// Copies a message out of the sender's memory, and lets the sender help.
    fn take_offer(
        &mut self,
        number: u32,
        len: usize,
        pieces: &[iovec],
        to: &mut [IoSliceMut<'_>],
    ) -> Result<(), Error> {
        let destination: Vec<iovec> =
            to.iter_mut().filter(|p| !p.is_empty()).map(|p| iovec_of_mut(p)).collect();
        let Some(peer) = self.peer.clone() else { return Err(Error::Peer("it offers what cannot be taken")) };
        let chunks = joint::chunks(len);
        let joint = Joint::of(self.stream.local().memory());
        // In a child the addresses are those of other memory than the peer would write into.
        joint.open(number, if self.process.is_current() { &destination } else { &[] });
        // It may sleep until there is something to do for it. That it cannot be woken is seen below.
        let _ = self.stream.remote().notify();
        let copy = |chunks: &Range<u32>| {
            let bytes = joint::bytes(chunks, len);
            // SAFETY: the destination is borrowed for the whole of this function, which does not end before the sender
            // has done with what it claimed; nobody else accesses it.
            unsafe { peer.copy(Direction::Read, &destination, pieces, bytes.start, bytes.len()) }
        };
        let mut own = 0;
        let mut result = Ok(());
        while result.is_ok()
            && let Some(chunks) = joint.claim(number, len, End::Start)
        {
            own += chunks.len() as u32;
            result = copy(&chunks);
        }
        let theirs = joint.close(number, chunks).saturating_sub(own);
        // Whatever happens, the sender writes into the destination until it says that it does not.
        let waited = wait_for_helper(&self.stream, &peer, number, theirs);
        let failed = joint.failed(number);
        if result.is_ok() && !failed.is_empty() && failed.end <= chunks {
            result = copy(&failed);
        }
        waited?;
        if result.is_ok() && !peer.is_alive() {
            // Its number may have become another process's while this one read there.
            return Err(Error::PeerGone);
        }
        let taken = if result.is_ok() { Taken::Copied } else { Taken::Refused };
        joint.set_taken(number, taken);
        self.stream.remote().notify()?;
        if let Err(error) = result {
            tracing::debug!("a message has to be sent: {error}");
            match self.recv_frame()? {
                Frame::Inline { len: again } if again == len as u64 => self.recv_inline(len, to)?,
                _ => return Err(Error::Peer("it does not send what was asked for")),
            }
        }
        Ok(())
    }
}

/// Waits until the sender has done with what it has claimed, or is not there any more.
fn wait_for_helper(stream: &stream::Receiver, peer: &Peer, number: u32, theirs: u32) -> Result<(), Error> {
    let joint = Joint::of(stream.local().memory());
    let done = || joint.helped(number).saturating_add(joint.failed(number).len() as u32) >= theirs;
    let end = stream.local().wait_until(None, done);
    // Its device may be gone while it still copies.
    while !done() && peer.is_alive() {
        std::thread::sleep(Duration::from_micros(50));
    }
    if done() { Ok(()) } else { end.map(|_| ()) }
}

fn iovec_of(piece: &[u8]) -> iovec {
    iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() }
}

fn iovec_of_mut(piece: &mut [u8]) -> iovec {
    iovec { iov_base: piece.as_mut_ptr().cast(), iov_len: piece.len() }
}

#[cfg(test)]
mod tests;
