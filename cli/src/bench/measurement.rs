//! One measurement by two processes, seen from both sides: the one that starts them, and the two.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::time::Duration;

use super::WORKER;
use super::measure::Outcome;
use super::plan::Job;
use super::transport;
use crate::pair::{self, PairArgs, Role};
use crate::process;
use crate::rendezvous::Rendezvous;

/// How much longer than the measurement its warm-up, start and end may take.
const PATIENCE: Duration = Duration::from_secs(30);

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

/// Runs the job in two processes.
pub fn run(job: &Job) -> Result<Outcome> {
    let mut outcome = None;
    pair::run(WORKER, &serde_json::to_string(job)?, 10 * job.duration + PATIENCE, |role, line| {
        match serde_json::from_str(line) {
            Ok(Report::Measured(found)) => outcome = Some(found),
            Ok(Report::Helped) => {}
            Ok(Report::Failed(sentence)) => bail!("{sentence}"),
            Err(_) => bail!("process {role:?} of the measurement said something unexpected: {line}"),
        }
        Ok(())
    })?;
    outcome.context("the processes of the measurement ended without a result")
}

/// Is one of the two processes: does the job and reports on standard output.
pub fn work(args: PairArgs) -> Result<()> {
    let rendezvous = Rendezvous::from_stdin()?;
    let report = match take_part(args, rendezvous) {
        Ok(Some(outcome)) => Report::Measured(outcome),
        Ok(None) => Report::Helped,
        Err(error) => Report::Failed(format!("{error:#}")),
    };
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

fn take_part(args: PairArgs, rendezvous: Rendezvous) -> Result<Option<Outcome>> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not one")?;
    process::pin(job.cpus[args.role as usize])?;
    transport::run(&mut Worker { role: args.role, job, rendezvous })
}
