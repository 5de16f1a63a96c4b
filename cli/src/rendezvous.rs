//! How the two processes of a measurement find each other: a socket on standard input, with JSON packets that may
//! carry a file descriptor; or, between two machines, lines of standard input and output that somebody carries. It is not
//! part of what is measured.

use anyhow::{Context, Result, bail, ensure};
use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

const MAX_PACKET: usize = 4096;

/// What a line of standard output starts with if the rest of it is for the other process's standard input.
pub const RELAY: char = '>';

/// One end.
pub enum Rendezvous {
    /// Both processes are here.
    Socket(OwnedFd),
    /// They are not, and who started them carries lines from one to the other.
    Relayed,
}

impl Rendezvous {
    /// Both ends, for the process that starts the two.
    pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
        Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
    }

    /// The end that this process was started with.
    pub fn from_stdin() -> Result<Rendezvous> {
        let end = std::io::stdin().as_fd().try_clone_to_owned()?;
        nix::sys::socket::getpeername::<nix::sys::socket::UnixAddr>(end.as_raw_fd())
            .context("this subcommand is started by `dmbridge bench` and `dmbridge demo`, not by hand")?;
        Ok(Rendezvous::Socket(end))
    }

    /// Tells the other process something.
    pub fn tell<T: Serialize>(&self, what: &T) -> Result<()> {
        self.send(&serde_json::to_vec(what)?, None)
    }

    /// Waits for what the other process tells.
    pub fn hear<T: DeserializeOwned>(&self) -> Result<T> {
        let (bytes, _) = self.receive()?;
        serde_json::from_slice(&bytes).context("the other process said something unexpected")
    }

    /// Gives the other process a file.
    pub fn give(&self, file: BorrowedFd<'_>) -> Result<()> {
        self.send(b"null", Some(file.as_raw_fd()))
    }

    /// Waits for a file from the other process.
    pub fn take(&self) -> Result<OwnedFd> {
        self.receive()?.1.context("the other process gave no file")
    }

    /// Returns when both processes have come here.
    pub fn meet(&self) -> Result<()> {
        self.tell(&())?;
        self.hear()
    }

    fn send(&self, bytes: &[u8], file: Option<RawFd>) -> Result<()> {
        let Rendezvous::Socket(socket) = self else {
            ensure!(file.is_none(), "a file cannot go to another machine");
            let mut out = std::io::stdout().lock();
            let line = [RELAY.to_string().as_bytes(), bytes, b"\n"].concat();
            return out.write_all(&line).and_then(|()| out.flush()).context("nobody reads what this says");
        };
        let files = file.as_slice();
        let control = [ControlMessage::ScmRights(files)];
        let control = if files.is_empty() { &[] } else { control.as_slice() };
        let sent =
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
                .context("the other process has ended")?;
        ensure!(sent == bytes.len());
        Ok(())
    }

    fn receive(&self) -> Result<(Vec<u8>, Option<OwnedFd>)> {
        let Rendezvous::Socket(socket) = self else {
            let mut line = String::new();
            if std::io::stdin().read_line(&mut line)? == 0 {
                bail!("the other process has ended");
            }
            return Ok((line.into_bytes(), None));
        };
        let mut bytes = vec![0; MAX_PACKET];
        let mut space = cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut file = None;
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(files) = control {
                // SAFETY: the kernel has just made these descriptors for this process, and nobody else has them.
                file = files.into_iter().map(|f| unsafe { OwnedFd::from_raw_fd(f) }).next_back();
            }
        }
        let len = message.bytes;
        if len == 0 {
            bail!("the other process has ended");
        }
        bytes.truncate(len);
        Ok((bytes, file))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn words_and_files_cross() {
        let (a, b) = Rendezvous::pair().unwrap();
        let (a, b) = (Rendezvous::Socket(a), Rendezvous::Socket(b));
        a.tell(&("port", 7)).unwrap();
        assert_eq!(b.hear::<(String, u16)>().unwrap(), ("port".into(), 7));
        let (mut reader, writer) = std::io::pipe().unwrap();
        a.give(writer.as_fd()).unwrap();
        drop(writer);
        let mut writer = std::fs::File::from(b.take().unwrap());
        writer.write_all(b"hello").unwrap();
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    #[test]
    fn an_ended_partner_is_an_error_not_a_wait() {
        let (a, b) = Rendezvous::pair().unwrap();
        drop(b);
        let a = Rendezvous::Socket(a);
        assert!(a.hear::<()>().unwrap_err().to_string().contains("has ended"));
        assert!(a.tell(&()).unwrap_err().to_string().contains("has ended"));
    }
}
