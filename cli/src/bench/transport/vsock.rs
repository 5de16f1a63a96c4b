//! AF_VSOCK stream sockets between two virtual machines, through vhost-device-vsock, which carries them from guest to guest
//! since vhost-vsock of the kernel does not. The sizes of buffers are the kernel's own.

use anyhow::{Context, Result, bail};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect as connect_socket,
    getsockname, listen, socket,
};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::bench::plan::Site;
use crate::pair::Role;

/// The largest write, which becomes one packet. vhost-device-vsock 0.3 hands a sender's packet to the receiver as it is, and
/// what does not fit into the buffer there is lost, and with it the connection. In Linux 6.1 a buffer is a page, of which the
/// packet's header and the kernel's own books take some.
const PIECE: usize = 3584;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let Site::Vms { cid, .. } = worker.job.site else {
        bail!("AF_VSOCK joins virtual machines, not processes")
    };
    let new = || {
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
            .context("this kernel has no AF_VSOCK")
    };
    let stream = match worker.role {
        Role::B => {
            let listener = new()?;
            bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, libc::VMADDR_PORT_ANY))?;
            listen(&listener, Backlog::new(1)?)?;
            worker.rendezvous.tell(&getsockname::<VsockAddr>(listener.as_raw_fd())?.port())?;
            let stream = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
            // SAFETY: the kernel has just made the descriptor for this process, and nobody else has it.
            unsafe { OwnedFd::from_raw_fd(stream) }
        }
        Role::A => {
            let stream = new()?;
            let address = VsockAddr::new(cid, worker.rendezvous.hear()?);
            connect_socket(stream.as_raw_fd(), &address)
                .context("the other machine cannot be reached by AF_VSOCK")?;
            stream
        }
    };
    Ok(Descriptors::new(stream.try_clone()?, stream, &worker.job)?.in_pieces(PIECE))
}
