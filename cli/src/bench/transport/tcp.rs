//! TCP over the loopback interface, with TCP_NODELAY and the kernel's own choice of buffers.

use anyhow::Result;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::fd::Descriptors;
use crate::bench::measurement::Worker;
use crate::pair::Role;

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Descriptors> {
    let stream = match worker.role {
        Role::B => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            worker.rendezvous.tell(&listener.local_addr()?.port())?;
            listener.accept()?.0
        }
        Role::A => TcpStream::connect((Ipv4Addr::LOCALHOST, worker.rendezvous.hear::<u16>()?))?,
    };
    stream.set_nodelay(true)?;
    Descriptors::new(stream.try_clone()?.into(), stream.into(), &worker.job)
}
