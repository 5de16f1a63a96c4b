//! A pipe in each direction, as large as the system allows.

use anyhow::Result;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use std::os::fd::AsFd;

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::pair::Role;

/// `/proc/sys/fs/pipe-max-size` unless somebody changed it.
const BUFFER: i32 = 1 << 20;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let (reader, writer) = match worker.role {
        Role::A => {
            let (a_reads, b_writes) = pipe2(OFlag::O_CLOEXEC)?;
            let (b_reads, a_writes) = pipe2(OFlag::O_CLOEXEC)?;
            for pipe in [&a_writes, &b_writes] {
                // A smaller limit leaves the pipe at 64 KiB.
                let _ = fcntl(pipe, FcntlArg::F_SETPIPE_SZ(BUFFER));
            }
            worker.rendezvous.give(b_reads.as_fd())?;
            worker.rendezvous.give(b_writes.as_fd())?;
            (a_reads, a_writes)
        }
        Role::B => (worker.rendezvous.take()?, worker.rendezvous.take()?),
    };
    Descriptors::new(reader, writer, &worker.job)
}
