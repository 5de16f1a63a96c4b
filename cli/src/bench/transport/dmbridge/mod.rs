//! dmbridge itself: two processes, each with a device of its own (its virtual machine's, if it is in one), and DMBs that
//! each owns for the other.

mod map;
mod message;
mod moved;
mod smc;

pub use map::{in_place, map};
pub use message::{direct, messages};
pub use moved::moved;
pub use smc::connect as smc;

use anyhow::{Context, Result};
use dmbridge::{Device, Dmb, Gid, Token, pci};
use std::time::Duration;

use crate::bench::measurement::Worker;
use crate::bench::plan::{Job, Site, Transport, Wait, Work};
use crate::pair::Role;

/// Size of each DMB of a stream.
const DMB: usize = 4 << 20;

/// This process's device, and what it knows of the other one.
struct Ends {
    device: Device,
    /// Written by the other process.
    local: Dmb,
    /// The DMB that this process writes.
    remote: Token,
}

/// Connects a device, and exchanges DMBs of `size` bytes with the other process.
fn connect(worker: &Worker, can_map: bool, size: usize) -> Result<Ends> {
    let job = &worker.job;
    let mut builder = Device::builder().map(can_map);
    if let Some(spin) = spin(job) {
        builder = builder.spin(spin);
    }
    let device = match &job.site {
        Site::Host { hub, sender, .. } => {
            let own = sender.as_ref().filter(|_| worker.role == Role::A).or(hub.as_ref());
            builder.connect(own.context("there is no daemon to connect to")?)?
        }
        Site::Vms { .. } if job.transport == Transport::Chardev => {
            let file = dmbridge::file::find().into_iter().next();
            builder.open_file(file.context("this virtual machine has no character device of dmbridge")?)?
        }
        Site::Vms { .. } => {
            let address = *pci::find().first().context("this virtual machine has no dmbridge device")?;
            builder.open_pci(address)?
        }
    };
    worker.rendezvous.tell(&device.gid().to_string())?;
    let peer: Gid = worker.rendezvous.hear::<String>()?.parse()?;
    let local = device.register(peer, size)?;
    worker.rendezvous.tell(&local.token().to_bits())?;
    let remote = Token::from_bits(worker.rendezvous.hear()?);
    Ok(Ends { device, local, remote })
}

/// How long waits spin, if the job does not want what the library does by itself.
fn spin(job: &Job) -> Option<Duration> {
    match job.work {
        Work::PingPong { wait: Wait::Poll, .. } => Some(Duration::MAX),
        Work::PingPong { wait: Wait::Sleep, .. } => Some(Duration::ZERO),
        _ => None,
    }
}
