//! UNIX stream sockets, with the largest buffers that the system allows.

use anyhow::Result;
use nix::sys::socket::{setsockopt, sockopt};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::pair::Role;

/// More does not make a stream faster.
const BUFFER: usize = 1 << 20;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let end: OwnedFd = match worker.role {
        Role::A => {
            let (a, b) = UnixStream::pair()?;
            worker.rendezvous.give(b.as_fd())?;
            a.into()
        }
        Role::B => worker.rendezvous.take()?,
    };
    // The kernel cuts it down to what an unprivileged process may have.
    setsockopt(&end, sockopt::SndBuf, &BUFFER)?;
    Descriptors::new(end.try_clone()?, end, &worker.job)
}
