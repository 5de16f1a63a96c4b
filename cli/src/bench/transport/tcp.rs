//! TCP over the loopback interface, or a virtual machine's network card, with TCP_NODELAY and the kernel's own choice of buffers.

use anyhow::Result;
use std::net::{SocketAddr, TcpListener, TcpStream};

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::pair::Role;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let stream = match worker.role {
        Role::B => {
            let listener = TcpListener::bind((worker.job.site.address(), 0))?;
            worker.rendezvous.tell(&listener.local_addr()?)?;
            listener.accept()?.0
        }
        Role::A => TcpStream::connect(worker.rendezvous.hear::<SocketAddr>()?)?,
    };
    stream.set_nodelay(true)?;
    Descriptors::new(stream.try_clone()?.into(), stream.into(), &worker.job)
}
