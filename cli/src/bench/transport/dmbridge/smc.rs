//! The library's sockets, as a program uses them instead of TCP's.

use anyhow::{Context, Result, bail};
use dmbridge::Device;
use dmbridge::smc::{Smc, SmcStream};
use std::io::{Read, Write};
use std::net::Ipv4Addr;

use super::spin;
use crate::bench::measurement::Worker;
use crate::bench::plan::Site;
use crate::bench::transport::Duplex;
use crate::pair::Role;

/// One end.
pub struct Socket(SmcStream);

/// Connects the two processes.
pub fn connect(worker: &mut Worker) -> Result<Socket> {
    let job = &worker.job;
    let Site::Host { hub, .. } = &job.site else { bail!("sockets are measured on the host only") };
    let device = Device::connect(hub.as_ref().context("there is no daemon to connect to")?)?;
    let smc = Smc::new(device);
    let stream = match worker.role {
        Role::B => {
            let listener = smc.bind((Ipv4Addr::LOCALHOST, 0))?;
            worker.rendezvous.tell(&listener.local_addr()?.port())?;
            listener.accept()?.0
        }
        Role::A => smc.connect((Ipv4Addr::LOCALHOST, worker.rendezvous.hear::<u16>()?))?,
    };
    if let Some(reason) = stream.fallback_reason() {
        bail!("the connection stayed with TCP: {reason}");
    }
    if let Some(longest) = spin(job) {
        stream.set_spin(longest);
    }
    Ok(Socket(stream))
}

impl Duplex for Socket {
    #[inline]
    fn send(&mut self, message: &[u8]) -> Result<()> {
        Ok(self.0.write_all(message)?)
    }

    #[inline]
    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        Ok(self.0.read_exact(into)?)
    }
}
