//! One measurement by two processes, seen from both sides: the one that starts them, and the two. Where they run is all
//! the same here.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::time::Duration;

use super::WORKER;
use super::measure::Outcome;
use super::plan::{Job, Site};
use super::transport;
use super::vms::Vms;
use crate::out;
use crate::pair::{self, PairArgs, Role};
use crate::process;
use crate::rendezvous::Rendezvous;

/// How much longer than the measurement its warm-up, start and end may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same for guests, which may be emulated and share two CPUs with what else runs.
const PATIENCE_WITH_GUESTS: Duration = Duration::from_secs(180);

/// What one of the two processes knows.
pub struct Worker {
    /// Which of the two it is.
    pub role: Role,
    /// What to do.
    pub job: Job,
    /// The other one.
    pub rendezvous: Rendezvous,
}

/// What each of the two processes says when it ends.
#[derive(Serialize, Deserialize)]
enum Report {
    /// It measured.
    Measured(Outcome),
    /// The other one did.
    Helped,
    /// It could not.
    Failed(String),
}

/// Runs the job in two processes: of the two virtual machines, if there are some, else of this host.
pub fn run(job: &Job, vms: Option<&Vms>) -> Result<Outcome> {
    let mut outcome = None;
    let hear = |role: Role, line: &str| {
        match serde_json::from_str(line) {
            Ok(Report::Measured(found)) => outcome = Some(found),
            Ok(Report::Helped) => {}
            Ok(Report::Failed(sentence)) => bail!("{sentence}"),
            Err(_) => bail!("process {role:?} of the measurement said something unexpected: {line}"),
        }
        Ok(())
    };
    let (text, length) = (serde_json::to_string(job)?, 10 * job.duration);
    match vms {
        Some(vms) => vms.run(WORKER, &text, length + PATIENCE_WITH_GUESTS, hear)?,
        None => pair::run(WORKER, &text, length + PATIENCE, hear)?,
    }
    outcome.context("the processes of the measurement ended without a result")
}

/// Is one of the two processes: does the job and reports on standard output.
pub fn work(args: PairArgs) -> Result<()> {
    let rendezvous = if args.relayed { Rendezvous::Relayed } else { Rendezvous::from_stdin()? };
    let report = match take_part(args, rendezvous) {
        Ok(Some(outcome)) => Report::Measured(outcome),
        Ok(None) => Report::Helped,
        Err(error) => Report::Failed(format!("{error:#}")),
    };
    out::line(serde_json::to_string(&report)?)
}

fn take_part(args: PairArgs, rendezvous: Rendezvous) -> Result<Option<Outcome>> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not one")?;
    if let Site::Host { cpus, .. } = job.site {
        process::pin(cpus[args.role as usize])?;
    }
    transport::run(&mut Worker { role: args.role, job, rendezvous })
}
