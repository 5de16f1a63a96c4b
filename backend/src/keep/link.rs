//! A worker's end of the socket pair between it and the keeper, and what is said there.
//!
//! A worker first receives everything that the keeper has. From then on only the worker speaks, and waits for
//! no answer: what it has sent is the keeper's even if the worker dies before the keeper reads it.

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, send, sendmsg};
use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// Descriptors in one message from the keeper.
pub(super) const BATCH: usize = 32;

/// What is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// Keep the descriptor that comes with this, under this number.
    Keep(u64),
    /// Close the one with this number.
    Drop(u64),
    /// The worker serves.
    Ready,
}

impl Word {
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let (kind, number) = match self {
            Word::Keep(number) => (1u64, number),
            Word::Drop(number) => (2, number),
            Word::Ready => (3, 0),
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&number.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Word> {
        let (kind, number) = bytes.split_first_chunk::<8>()?;
        let number = u64::from_le_bytes(number.try_into().ok()?);
        match u64::from_le_bytes(*kind) {
            1 => Some(Word::Keep(number)),
            2 => Some(Word::Drop(number)),
            3 => Some(Word::Ready),
            _ => None,
        }
    }
}

/// The worker's end.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
}

impl Link {
    pub fn new(socket: OwnedFd) -> Link {
        Link { socket }
    }

    /// Everything that the keeper has, by number.
    pub fn receive_all(&self) -> io::Result<HashMap<u64, OwnedFd>> {
        let mut all = HashMap::new();
        loop {
            let mut bytes = [0; 8 * BATCH];
            let (n, fds) = receive(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty())?;
            let numbers =
                bytes[..n].chunks_exact(8).map(|n| u64::from_le_bytes(n.try_into().unwrap_or_default()));
            if n == 0 || numbers.len() != fds.len() {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it did not hand over what it has"));
            }
            // The last message is one number without a meaning, with any descriptor.
            for (number, fd) in numbers.zip(fds) {
                if number == 0 {
                    return Ok(all);
                }
                all.insert(number, fd);
            }
        }
    }

    pub fn keep(&self, number: u64, fd: BorrowedFd<'_>) -> io::Result<()> {
        let fds = [fd.as_raw_fd()];
        let bytes = Word::Keep(number).to_bytes();
        sendmsg::<()>(
            self.socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    pub fn drop(&self, number: u64) {
        self.say(Word::Drop(number));
    }

    pub fn ready(&self) {
        self.say(Word::Ready);
    }

    fn say(&self, word: Word) {
        // Without a keeper there is nobody to tell.
        let _ = send(self.socket.as_raw_fd(), &word.to_bytes(), MsgFlags::MSG_NOSIGNAL);
    }
}

/// One message and its descriptors.
pub(crate) fn receive(socket: RawFd, bytes: &mut [u8], flags: MsgFlags) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; BATCH]);
    let mut fds = Vec::new();
    let mut iov = [IoSliceMut::new(bytes)];
    let message = loop {
        match recvmsg::<()>(socket, &mut iov, Some(&mut space), flags | MsgFlags::MSG_CMSG_CLOEXEC) {
            Err(nix::Error::EINTR) => {}
            message => break message?,
        }
    };
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel just made these descriptors for us.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_read_as_it_was_said() {
        for word in [Word::Keep(1 << 40), Word::Drop(7), Word::Ready] {
            assert_eq!(Word::from_bytes(&word.to_bytes()), Some(word));
        }
        assert_eq!(Word::from_bytes(&[0; 16]), None);
        assert_eq!(Word::from_bytes(&[1; 9]), None);
    }
}
