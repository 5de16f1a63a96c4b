//! What TCP, UNIX sockets and pipes have in common: a descriptor to read from and one to write to.

use anyhow::{Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{read, write};
use std::os::fd::OwnedFd;

use super::Duplex;
use crate::bench::plan::{Job, Wait, Work};

/// A duplex byte stream of the kernel's.
pub struct Descriptors {
    reader: OwnedFd,
    writer: OwnedFd,
    /// The most bytes of one write.
    piece: usize,
}

impl Descriptors {
    /// With calls that block or, if the job wants both sides to poll, that do not.
    pub fn new(reader: OwnedFd, writer: OwnedFd, job: &Job) -> Result<Descriptors> {
        if matches!(job.work, Work::PingPong { wait: Wait::Poll, .. }) {
            for fd in [&reader, &writer] {
                fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            }
        }
        Ok(Descriptors { reader, writer, piece: usize::MAX })
    }

    /// The same, with writes of at most so many bytes.
    pub fn in_pieces(self, piece: usize) -> Descriptors {
        Descriptors { piece, ..self }
    }
}

impl Duplex for Descriptors {
    fn send(&mut self, mut message: &[u8]) -> Result<()> {
        while !message.is_empty() {
            match write(&self.writer, &message[..message.len().min(self.piece)]) {
                Ok(n) => message = &message[n..],
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn receive(&mut self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            match read(&self.reader, into) {
                Ok(0) => bail!("the other process has ended"),
                Ok(n) => into = &mut into[n..],
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
