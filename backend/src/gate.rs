//! The gate before `vhost`'s request handler, which blocks until a whole message is there: lets it read only then.
//!
//! It looks at the socket without taking anything from it. A message of which only a part has come stays there, and the
//! next part wakes the event loop again. It also looks whether the front-end reads its answers: a handler that sends to
//! a socket whose other end is never read would block as well.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// The header of every vhost-user message, in bytes.
pub const HEADER_SIZE: usize = 12;
/// The longest message after the header, as in `vhost`.
pub const MAX_BODY_SIZE: u32 = 4096;
/// Bytes of answers (as the kernel accounts for them) that a front-end may leave unread. The socket's buffer is larger.
const MAX_UNREAD: libc::c_int = 64 << 10;

/// What is at the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Not a whole message yet.
    Nothing,
    /// A whole message with this request code.
    Message(u32),
    /// The front-end closed the connection.
    End,
}

/// Why a front-end is shut out.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// It sends longer messages than there are.
    #[error("the front-end announced a message of {0} bytes, there is none above {MAX_BODY_SIZE}")]
    TooLong(u32),
    /// It does not read.
    #[error("the front-end does not read its answers")]
    Deaf,
    /// The system refused.
    #[error("the front-end's socket failed: {0}")]
    Io(#[from] io::Error),
}

/// Looks at what has come.
pub fn look(socket: BorrowedFd<'_>) -> Result<Arrival, GateError> {
    if let Some(arrival) = look_once(socket)? {
        return Ok(arrival);
    }
    if !has_hung_up(socket)? {
        return Ok(Arrival::Nothing);
    }
    // All that will ever come is there, and it may have come since.
    Ok(look_once(socket)?.unwrap_or(Arrival::End))
}

/// `None`: not a whole message.
fn look_once(socket: BorrowedFd<'_>) -> Result<Option<Arrival>, GateError> {
    let mut header = [0u8; HEADER_SIZE];
    let n = loop {
        // SAFETY: `header` is writable for its length.
        let n = unsafe {
            libc::recv(
                socket.as_raw_fd(),
                header.as_mut_ptr().cast(),
                header.len(),
                libc::MSG_PEEK | libc::MSG_DONTWAIT,
            )
        };
        if n >= 0 {
            break n as usize;
        }
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::Interrupted => {}
            io::ErrorKind::WouldBlock => return Ok(None),
            io::ErrorKind::ConnectionReset => return Ok(Some(Arrival::End)),
            _ => return Err(error.into()),
        }
    };
    if n == 0 {
        return Ok(Some(Arrival::End));
    }
    if n < HEADER_SIZE {
        return Ok(None);
    }
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let size = word(8);
    if size > MAX_BODY_SIZE {
        return Err(GateError::TooLong(size));
    }
    if ask(socket, libc::FIONREAD)? < HEADER_SIZE as libc::c_int + size as libc::c_int {
        return Ok(None);
    }
    if ask(socket, libc::TIOCOUTQ)? > MAX_UNREAD {
        return Err(GateError::Deaf);
    }
    Ok(Some(Arrival::Message(word(0))))
}

/// Whether nothing more will come than has come.
pub fn has_hung_up(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one valid element, and no waiting.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(poll.revents & (libc::POLLRDHUP | libc::POLLHUP) != 0)
}

fn ask(socket: BorrowedFd<'_>, what: libc::Ioctl) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: both requests write one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn message(code: u32, body: usize) -> Vec<u8> {
        let mut message = Vec::new();
        for word in [code, 1, body as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.resize(HEADER_SIZE + body, 0xaa);
        message
    }

    #[test]
    fn only_a_whole_message_passes() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let message = message(7, 20);
        for (at, byte) in message.iter().enumerate() {
            assert_eq!(look(ours.as_fd()).unwrap(), Arrival::Nothing, "after {at} bytes");
            theirs.write_all(&[*byte]).unwrap();
        }
        assert_eq!(look(ours.as_fd()).unwrap(), Arrival::Message(7));
        theirs.write_all(&message[..3]).unwrap();
        (&ours).read_exact(&mut vec![0; message.len()]).unwrap();
        assert_eq!(look(ours.as_fd()).unwrap(), Arrival::Nothing);
    }

    #[test]
    fn the_end_is_seen_behind_half_a_message() {
        for half in [3, HEADER_SIZE, HEADER_SIZE + 5] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&message(7, 20)[..half]).unwrap();
            assert_eq!(look(ours.as_fd()).unwrap(), Arrival::Nothing);
            drop(theirs);
            assert_eq!(look(ours.as_fd()).unwrap(), Arrival::End);
        }
    }

    #[test]
    fn a_whole_message_passes_before_the_end() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(7, 20)).unwrap();
        drop(theirs);
        assert_eq!(look(ours.as_fd()).unwrap(), Arrival::Message(7));
    }

    #[test]
    fn the_end_is_seen() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        assert_eq!(look(ours.as_fd()).unwrap(), Arrival::End);
    }

    #[test]
    fn a_message_that_is_too_long_is_refused_by_its_header() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(1, MAX_BODY_SIZE as usize + 1)[..HEADER_SIZE]).unwrap();
        assert!(matches!(look(ours.as_fd()), Err(GateError::TooLong(4097))));
    }

    #[test]
    fn who_does_not_read_is_shut_out_before_anybody_blocks() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&message(1, 0)).unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut answers = 0;
        while !matches!(look(ours.as_fd()), Err(GateError::Deaf)) {
            ours.write_all(&[0; 2068]).unwrap();
            answers += 1;
            assert!(answers < 1000);
        }
        // There is room for one more of the longest.
        ours.write_all(&[0; 4108]).unwrap();
    }
}
