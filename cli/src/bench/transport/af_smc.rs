//! AF_SMC sockets: what TCP programs in a guest use unchanged, over the device that the guest's kernel module drives.
//!
//! Linux falls back to TCP without a word. A connection that did is not measured, but an error.

use anyhow::{Context, Result, bail};
use dmbridge_guest_setup::reason;
use dmbridge_guest_setup::smc::{Smc, Statistics};
use nix::sys::socket::{
    Backlog, SockFlag, SockaddrIn, accept4, bind, connect as connect_socket, getsockname, listen,
};
use std::net::SocketAddrV4;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::pair::Role;

/// The address family, which the libc crate does not know; protocol 0 is IPv4.
const AF_SMC: libc::c_int = 43;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let before = statistics()?;
    let stream = match worker.role {
        Role::B => {
            let listener = socket()?;
            bind(listener.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(worker.job.site.address(), 0)))?;
            listen(&listener, Backlog::new(1)?)?;
            let address: SockaddrIn = getsockname(listener.as_raw_fd())?;
            worker.rendezvous.tell(&SocketAddrV4::from(address))?;
            let stream = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
            // SAFETY: the kernel has just made the descriptor for this process, and nobody else has it.
            unsafe { OwnedFd::from_raw_fd(stream) }
        }
        Role::A => {
            let stream = socket()?;
            let address = SockaddrIn::from(worker.rendezvous.hear::<SocketAddrV4>()?);
            connect_socket(stream.as_raw_fd(), &address)
                .context("the other machine cannot be reached by AF_SMC")?;
            stream
        }
    };
    let after = statistics()?;
    if after.smcd.connections() == before.smcd.connections() {
        let count = |all: &Statistics, code| -> u64 {
            all.fallbacks.iter().filter(|fallback| fallback.code == code).map(|fallback| fallback.count).sum()
        };
        let mut codes = after.fallbacks.iter().map(|fallback| fallback.code);
        match codes.find(|code| count(&after, *code) > count(&before, *code)) {
            Some(code) => bail!("AF_SMC fell back to TCP (reason {code:#010x}): {}", reason::explain(code)),
            None => bail!("AF_SMC did not use a dmbridge device, and does not say why"),
        }
    }
    Descriptors::new(stream.try_clone()?, stream, &worker.job)
}

fn statistics() -> Result<Statistics> {
    Ok(Smc::open()?.statistics()?)
}

fn socket() -> Result<OwnedFd> {
    // SAFETY: a call that takes numbers and touches no memory of this process but errno.
    let fd = unsafe { libc::socket(AF_SMC, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    nix::errno::Errno::result(fd).context("this kernel has no AF_SMC")?;
    // SAFETY: the kernel has just made the descriptor for this process, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
