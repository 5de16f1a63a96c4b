//! Runs one measurement: starts its two processes and waits for what they report.

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::Read;
use std::os::fd::AsFd;
use std::process::{ChildStdout, Stdio};
use std::time::{Duration, Instant};

use super::WORKER;
use super::measure::Outcome;
use super::plan::Job;
use super::rendezvous::Rendezvous;
use super::worker::{Report, Role};
use crate::process::{BoundChild, own_program};

/// How much longer than the measurement its warm-up, start and end may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the job in two processes.
pub fn run(job: &Job) -> Result<Outcome> {
    let json = serde_json::to_string(job)?;
    let (a, b) = Rendezvous::pair()?;
    let start = |role: &str, end| -> Result<(BoundChild, ChildStdout)> {
        let mut command = own_program()?;
        command.args([WORKER, role, &json]).stdin(Stdio::from(end)).stdout(Stdio::piped());
        let mut child = BoundChild::spawn(&mut command)?;
        let output = child.get_mut().stdout.take().context("a piped output is missing")?;
        Ok((child, output))
    };
    let mut running = [(Role::A, start("a", a)?, Vec::new()), (Role::B, start("b", b)?, Vec::new())]
        .map(|(role, (child, output), text)| Some((role, child, output, text)));

    let deadline = Instant::now() + 10 * job.duration + PATIENCE;
    let mut outcome = None;
    while running.iter().any(Option::is_some) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("nothing was measured within {} seconds", (10 * job.duration + PATIENCE).as_secs());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let ready: Vec<bool> = {
            let mut fds: Vec<_> =
                running.iter().flatten().map(|r| PollFd::new(r.2.as_fd(), PollFlags::POLLIN)).collect();
            match poll(&mut fds, timeout) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
        };
        for (slot, _) in
            running.iter_mut().filter(|slot| slot.is_some()).zip(ready).filter(|(_, ready)| *ready)
        {
            let Some((role, _, output, text)) = slot else { continue };
            let mut piece = [0; 64 << 10];
            let n = output.read(&mut piece)?;
            text.extend_from_slice(&piece[..n]);
            if n > 0 {
                continue;
            }
            match serde_json::from_slice(text) {
                Ok(Report::Measured(found)) => outcome = Some(found),
                Ok(Report::Helped) => {}
                Ok(Report::Failed(sentence)) => bail!("{sentence}"),
                Err(_) => bail!("process {role:?} of the measurement ended without a word"),
            }
            *slot = None;
        }
    }
    outcome.context("neither process measured anything")
}
