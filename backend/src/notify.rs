//! The event file descriptors of a ring: a front-end chose them, so they are checked before they are used.
//!
//! A kick descriptor is never read: it is watched edge-triggered, and each write to it is an edge. A call or error
//! descriptor is written, which must not block; so it has to be an eventfd, and is made non-blocking.

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};

/// An eventfd of a front-end.
#[derive(Debug)]
pub struct EventFile(File);

impl EventFile {
    /// Takes what the front-end sent, if it is an eventfd.
    pub fn new(file: File) -> io::Result<EventFile> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if !link.as_os_str().as_encoded_bytes().starts_with(b"anon_inode:[eventfd]") {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not an eventfd"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(EventFile(file))
    }

    /// Adds 1. A counter that is full says enough.
    pub fn signal(&self) {
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }
}

impl AsRawFd for EventFile {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::OwnedFd;

    #[test]
    fn only_an_eventfd_is_taken() {
        assert!(EventFile::new(File::open("/dev/null").unwrap()).is_err());
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(EventFile::new(pipe.into()).is_err());
    }

    #[test]
    fn a_full_counter_does_not_block() {
        let event = EventFd::from_value_and_flags(0, EfdFlags::empty()).unwrap();
        event.write(u64::MAX - 1).unwrap();
        let copy = OwnedFd::from(event);
        EventFile::new(copy.into()).unwrap().signal();
    }
}
