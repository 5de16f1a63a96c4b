//! Sending and receiving on a front-end's socket exactly once, although the process that does it may die at any
//! instruction: of each it can be seen afterwards whether it was done.
//!
//! **Sending.** What is to be sent stands in a pipe that outlives the worker, and goes from there to the socket by one
//! `splice`, which empties the one as it fills the other: if the book says that it is to be sent, what is still in the pipe was
//! not. **Receiving.** A message is first only looked at, which moves the socket's peek offset (`SO_PEEK_OFF`) to its end; taking
//! it moves the offset back. The offset is the socket's, and outlives the worker as well.

use super::link;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// The most bytes that are sent at once: they are one piece in a pipe.
pub const MAX_SENT: usize = 4096;
/// How long a front-end may make a worker wait that only wants to put some bytes into a socket's buffer.
const PATIENCE: Duration = Duration::from_millis(100);
/// So many times, if there is room in the socket whenever somebody looks.
const MOST_WAITS: u32 = 50;

/// The way out of what must be sent exactly once.
#[derive(Debug)]
pub struct Outlet {
    read: OwnedFd,
    write: File,
}

impl Outlet {
    /// An empty one.
    pub fn new() -> io::Result<Outlet> {
        use nix::fcntl::OFlag;
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        Ok(Outlet { read, write: write.into() })
    }

    /// That of another worker.
    pub fn from_pipe(read: OwnedFd, write: OwnedFd) -> Outlet {
        Outlet { read, write: write.into() }
    }

    /// Both ends of the pipe.
    pub fn pipe(&self) -> (BorrowedFd<'_>, BorrowedFd<'_>) {
        (self.read.as_fd(), self.write.as_fd())
    }

    /// Puts bytes there, at most [`MAX_SENT`], while nothing is there. Nobody knows of them before the book does.
    pub fn load(&self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > MAX_SENT {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        (&self.write).write_all(bytes)
    }

    /// Bytes that are there.
    pub fn loaded(&self) -> usize {
        ask(self.read.as_fd(), libc::FIONREAD).unwrap_or(0)
    }

    /// Forgets what is there: nobody was to know of it.
    pub fn unload(&self) {
        let mut bytes = [0; MAX_SENT];
        while self.loaded() != 0 && nix::unistd::read(&self.read, &mut bytes).is_ok_and(|n| n != 0) {}
    }

    /// Sends what is there, if anything is. After an error nothing is left either.
    pub fn send(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while self.loaded() != 0 {
            if let Err(error) = splice(self.read.as_fd(), socket, self.loaded()) {
                self.unload();
                return Err(error);
            }
        }
        Ok(())
    }

    /// As [`send`](Self::send), to a socket that others can make blocking and fill at any time: who does that has it shut down.
    pub fn send_warily(&self, socket: BorrowedFd<'_>) -> io::Result<()> {
        if self.loaded() == 0 {
            return Ok(());
        }
        std::thread::scope(|scope| {
            let (done, ended) = sync_channel(1);
            let sender =
                std::thread::Builder::new().name("dmb-send".into()).spawn_scoped(scope, move || {
                    let result = self.send(socket);
                    let _ = done.send(());
                    result
                })?;
            let mut waits = 0;
            while ended.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
                waits += 1;
                // While there is room, it is this host's scheduler that makes us wait.
                if waits == MOST_WAITS || !has_room(socket) {
                    let _ = nix::sys::socket::shutdown(socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
                    break;
                }
            }
            sender.join().map_err(|_| io::Error::other("a thread panicked"))?
        })
    }
}

fn has_room(socket: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::POLLOUT)];
    poll(&mut fds, PollTimeout::ZERO).is_ok() && fds[0].any() == Some(true)
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    // SAFETY: both descriptors are open, and no offset is given.
    let n = unsafe {
        libc::splice(
            from.as_raw_fd(),
            std::ptr::null_mut(),
            to.as_raw_fd(),
            std::ptr::null_mut(),
            len,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    match n {
        ..0 => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
        0 => Err(io::ErrorKind::WriteZero.into()),
        _ => Ok(()),
    }
}

fn ask(fd: BorrowedFd<'_>, what: libc::Ioctl) -> io::Result<usize> {
    let mut value: libc::c_int = 0;
    // SAFETY: the request writes one int.
    if unsafe { libc::ioctl(fd.as_raw_fd(), what, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value.max(0) as usize)
}

/// Looks at the first `len` bytes that have come, and at the descriptors with them. They have to be there.
pub fn peek(socket: BorrowedFd<'_>, len: usize) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    set_peek_offset(socket, 0)?;
    let (mut bytes, mut fds) = (vec![0; len + 1], Vec::new());
    let mut seen = 0;
    while seen < len {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        // Who looks sees the descriptors of what follows, too, even if it is no byte of that; but never anything behind
        // descriptors. So if there is a byte more, they are not of these bytes.
        let (n, more) = link::receive(socket.as_raw_fd(), &mut bytes[seen..], flags)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen += n;
        if seen <= len {
            fds.extend(more);
        }
    }
    bytes.truncate(len);
    let end = libc::c_int::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
    set_peek_offset(socket, end)?;
    Ok((bytes, fds))
}

/// Takes what [`peek`] looked at, or what is left to take of it.
pub fn take_peeked(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut bytes = [0; MAX_SENT + 64];
    loop {
        let left = peek_offset(socket)?;
        if left == 0 {
            return Ok(());
        }
        let Ok(left) = usize::try_from(left) else { return Err(io::ErrorKind::InvalidData.into()) };
        let part = left.min(bytes.len());
        match recv(socket.as_raw_fd(), &mut bytes[..part], MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Ends what [`peek`] began.
pub fn end_peek(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_peek_offset(socket, -1)
}

fn set_peek_offset(socket: BorrowedFd<'_>, offset: libc::c_int) -> io::Result<()> {
    // SAFETY: the option is an int, and one is read.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw const offset).cast(),
            size_of_val(&offset) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn peek_offset(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut offset: libc::c_int = 0;
    let mut len = size_of_val(&offset) as libc::socklen_t;
    // SAFETY: the option is an int, and there is room for one.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEEK_OFF,
            (&raw mut offset).cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(offset) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    #[test]
    fn what_is_loaded_is_sent_once_and_what_was_sent_is_gone() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let outlet = Outlet::new().unwrap();
        for text in [&b"one"[..], &[7; MAX_SENT]] {
            outlet.load(text).unwrap();
            assert_eq!(outlet.loaded(), text.len());
            outlet.send_warily(ours.as_fd()).unwrap();
            assert_eq!(outlet.loaded(), 0);
            outlet.send(ours.as_fd()).unwrap();
            let mut bytes = vec![0; text.len()];
            theirs.read_exact(&mut bytes).unwrap();
            assert_eq!(bytes, text);
        }
        outlet.load(b"never").unwrap();
        outlet.unload();
        outlet.send(ours.as_fd()).unwrap();
        drop(theirs);
        outlet.load(b"late").unwrap();
        assert!(outlet.send(ours.as_fd()).is_err());
        assert_eq!(outlet.loaded(), 0);
    }

    #[test]
    fn who_fills_a_socket_that_blocks_does_not_stop_us() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        while (&ours).write(&[0; 4096]).is_ok() {}
        ours.set_nonblocking(false).unwrap();
        let outlet = Outlet::new().unwrap();
        outlet.load(b"x").unwrap();
        assert!(outlet.send_warily(ours.as_fd()).is_err());
        drop(theirs);
    }

    #[test]
    fn a_message_is_taken_once_by_however_many_it_takes() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        theirs.send_with_fd(&b"head"[..], file.as_raw_fd()).unwrap();
        (&theirs).write_all(b"body").unwrap();
        (&theirs).write_all(b"next").unwrap();
        let look = || peek(ours.as_fd(), 8).map(|(bytes, fds)| (bytes, fds.len())).unwrap();
        for _ in 0..3 {
            assert_eq!(look(), (b"headbody".to_vec(), 1));
        }
        // The first dies half-way.
        let mut part = [0; 3];
        recv(ours.as_raw_fd(), &mut part, MsgFlags::empty()).unwrap();
        let other = ours.try_clone().unwrap();
        assert_eq!(peek_offset(other.as_fd()).unwrap(), 5);
        take_peeked(other.as_fd()).unwrap();
        take_peeked(other.as_fd()).unwrap();
        end_peek(other.as_fd()).unwrap();
        assert_eq!(peek(other.as_fd(), 4).unwrap().0, b"next");
    }

    #[test]
    fn each_message_has_its_own_descriptors() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for (text, count) in [("none", 0), ("two.", 2), ("one.", 1), ("nil.", 0), ("last", 3)] {
            let fds = vec![file.as_raw_fd(); count];
            theirs.send_with_fds(&[text.as_bytes()], &fds).unwrap();
        }
        for (text, count) in [("none", 0), ("two.", 2), ("one.", 1), ("nil.", 0), ("last", 3)] {
            let (bytes, fds) = peek(ours.as_fd(), 4).unwrap();
            assert_eq!((&bytes[..], fds.len()), (text.as_bytes(), count));
            take_peeked(ours.as_fd()).unwrap();
            end_peek(ours.as_fd()).unwrap();
        }
    }
}
