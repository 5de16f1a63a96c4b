//! One of the two processes of a measurement: what the hidden subcommand does.

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::WorkerArgs;
use super::measure::Outcome;
use super::plan::Job;
use super::rendezvous::Rendezvous;
use super::transport;
use crate::process;

/// Which of the two: A asks or sends, B answers or receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Role {
    /// Asks, sends, moves.
    A,
    /// Answers, receives, owns the memory.
    B,
}

/// What a worker knows.
pub struct Worker {
    /// Which of the two it is.
    pub role: Role,
    /// What to do.
    pub job: Job,
    /// The other one.
    pub rendezvous: Rendezvous,
}

/// What a worker says on its standard output when it ends.
#[derive(Serialize, Deserialize)]
pub enum Report {
    /// It measured.
    Measured(Outcome),
    /// The other one did.
    Helped,
    /// It could not.
    Failed(String),
}

/// Does the job and reports on standard output.
pub fn run(args: WorkerArgs) -> Result<()> {
    let report = match work(args) {
        Ok(Some(outcome)) => Report::Measured(outcome),
        Ok(None) => Report::Helped,
        Err(error) => Report::Failed(format!("{error:#}")),
    };
    serde_json::to_writer(std::io::stdout(), &report).context("nobody wants to hear the result")
}

fn work(args: WorkerArgs) -> Result<Option<Outcome>> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not one")?;
    let rendezvous = Rendezvous::from_stdin()?;
    process::pin(job.cpus[args.role as usize])?;
    transport::run(&mut Worker { role: args.role, job, rendezvous })
}
