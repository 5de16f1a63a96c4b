//! Writing and reading in place: what goes over DMBs is generated where the peer reads it, and read where the peer wrote
//! it. What goes over TCP takes the way through a buffer, so that a program need not know.

use super::fallen::Staging;
use super::stream::SmcStream;
use crate::shared::SharedSlice;
use crate::stream::{Patience, Receiver, Sender};
use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::MutexGuard;

/// Room to write into, from [`SmcStream::reserve`]. Nothing is sent unless it is committed. Who holds it cannot write or shut down
/// the same connection otherwise: that would wait for itself.
pub struct Reserved<'a> {
    kind: Room<'a>,
    len: usize,
}

enum Room<'a> {
    Dmb(MutexGuard<'a, Sender>),
    Tcp(Staging<'a>, &'a TcpStream),
}

/// Bytes to read, from [`SmcStream::peek_in_place`]. They stay there unless they are consumed. Who holds it cannot read the same
/// connection otherwise: that would wait for itself.
pub struct Peeked<'a> {
    kind: There<'a>,
    len: usize,
}

enum There<'a> {
    Dmb(MutexGuard<'a, Receiver>),
    Tcp(Staging<'a>, &'a TcpStream),
}

impl SmcStream {
    /// Room to write into, in place: at most `max` bytes, at least one. Waits for room as writing does. Other writers of this
    /// connection wait until it is committed or dropped.
    ///
    /// # Errors
    ///
    /// As for writing.
    ///
    /// # Panics
    ///
    /// If `max` is 0.
    pub fn reserve(&self, max: usize) -> io::Result<Reserved<'_>> {
        assert!(max > 0, "room for nothing");
        if let Some(carried) = self.as_carried() {
            let patience = self.write_patience();
            let mut sender = carried.sender(patience)?;
            let len = sender.reserve_with(max, patience)?.len();
            if len == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            return Ok(Reserved { kind: Room::Dmb(sender), len });
        }
        let fallen = self.as_fallen();
        fallen.before_write(self.tcp())?;
        let staging = fallen.outgoing()?;
        let len = max.min(staging.memory().len());
        Ok(Reserved { kind: Room::Tcp(staging, self.tcp()), len })
    }

    /// What is there, in place: at least a byte; empty at the end of the stream. Waits as reading does. Other readers of this
    /// connection wait until it is consumed or dropped. Over DMBs the peer can change the bytes until then, if it breaks the
    /// rules: read each once.
    ///
    /// # Errors
    ///
    /// As for reading.
    pub fn peek_in_place(&self) -> io::Result<Peeked<'_>> {
        if let Some(carried) = self.as_carried() {
            let patience = self.read_patience();
            let mut receiver = carried.receiver(patience)?;
            let Some(there) = receiver.peek_with(patience)? else {
                return Err(io::ErrorKind::WouldBlock.into());
            };
            let len = there.len();
            return Ok(Peeked { kind: There::Dmb(receiver), len });
        }
        let fallen = self.as_fallen();
        fallen.before_read(self.tcp(), self.read_patience() != Patience::None)?;
        let staging = fallen.incoming()?;
        let mut bytes = vec![0; staging.memory().len()];
        let len = self.tcp().peek(&mut bytes)?;
        staging.memory().write(0, &bytes[..len]).map_err(crate::Error::from)?;
        Ok(Peeked { kind: There::Tcp(staging, self.tcp()), len })
    }
}

impl Reserved<'_> {
    /// The room.
    pub fn slice(&self) -> SharedSlice<'_> {
        match &self.kind {
            Room::Dmb(sender) => sender.room(self.len),
            Room::Tcp(staging, _) => staging.memory().slice(..self.len),
        }
    }

    /// Sends the first `len` bytes of it.
    ///
    /// # Errors
    ///
    /// As for writing.
    ///
    /// # Panics
    ///
    /// If `len` is more than there is room.
    pub fn commit(self, len: usize) -> io::Result<()> {
        assert!(len <= self.len, "{len} bytes committed, {} reserved", self.len);
        match self.kind {
            Room::Dmb(mut sender) => Ok(sender.commit(len)?),
            Room::Tcp(staging, mut tcp) => {
                let mut bytes = vec![0; len];
                staging.memory().slice(..len).copy_to_slice(&mut bytes);
                tcp.write_all(&bytes)
            }
        }
    }
}

impl Peeked<'_> {
    /// The bytes.
    pub fn slice(&self) -> SharedSlice<'_> {
        match &self.kind {
            There::Dmb(receiver) => receiver.there().slice(..self.len),
            There::Tcp(staging, _) => staging.memory().slice(..self.len),
        }
    }

    /// Lets go of the first `len` bytes.
    ///
    /// # Errors
    ///
    /// As for reading.
    ///
    /// # Panics
    ///
    /// If `len` is more than is there.
    pub fn consume(self, len: usize) -> io::Result<()> {
        assert!(len <= self.len, "{len} bytes consumed, {} there", self.len);
        match self.kind {
            There::Dmb(mut receiver) => Ok(receiver.consume(len)?),
            There::Tcp(_, mut tcp) => tcp.read_exact(&mut vec![0; len]),
        }
    }
}

impl fmt::Debug for Reserved<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reserved({} bytes)", self.len)
    }
}

impl fmt::Debug for Peeked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peeked({} bytes)", self.len)
    }
}
