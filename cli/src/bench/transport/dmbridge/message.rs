//! Messages: through DMBs, or directly from one process's buffer into the other's.

use anyhow::{Result, bail, ensure};
use dmbridge::message::{Channel, Direct};

use super::{DMB, connect};
use crate::bench::case::{large, stream};
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::Work;
use crate::bench::transport::Duplex;

/// As the library chooses.
pub fn messages(worker: &mut Worker) -> Result<Option<Outcome>> {
    run(worker, Direct::Measured)
}

/// Directly, whatever the library would choose.
pub fn direct(worker: &mut Worker) -> Result<Option<Outcome>> {
    run(worker, Direct::From(1))
}

fn run(worker: &mut Worker, direct: Direct) -> Result<Option<Outcome>> {
    let ends = connect(worker, true, DMB)?;
    let remote = ends.device.attach(ends.remote)?;
    let channel = Channel::open_with(ends.local, remote, direct)?;
    if let (Direct::From(_), Err(refused)) = (direct, channel.direct()) {
        bail!("there is no direct way between the two processes: {refused}");
    }
    match worker.job.work {
        Work::Exchange { bytes } => large::run(worker, &mut Messages(channel), bytes),
        Work::Large { bytes } => stream::run_large(worker, &mut Messages(channel), bytes),
        work => bail!("{work:?} is not done by large messages"),
    }
}

struct Messages(Channel);

impl Duplex for Messages {
    fn send(&mut self, message: &[u8]) -> Result<()> {
        Ok(self.0.send(message)?)
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        let len = self.0.recv(into)?;
        ensure!(
            len == Some(into.len()),
            "a message of {len:?} bytes came, one of {} should have",
            into.len()
        );
        Ok(())
    }
}
