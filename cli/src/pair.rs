//! Two processes that work together: this program twice more, joined by a [`Rendezvous`]. Each tells in lines on its
//! standard output what it does; here they are started, heard, and ended.

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{ChildStdout, Stdio};
use std::time::{Duration, Instant};

use crate::process::{BoundChild, own_program};
use crate::rendezvous::Rendezvous;

/// Which of the two: A asks or sends, B answers or receives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Role {
    /// Asks, sends, moves.
    A,
    /// Answers, receives, owns the memory.
    B,
}

/// What one of the two is told on its command line.
#[derive(clap::Args)]
pub struct PairArgs {
    /// Which of the two it is.
    pub role: Role,
    /// The job, as JSON.
    pub job: String,
    /// What the two say to each other goes through standard input and output, because they are in two machines.
    #[arg(long)]
    pub relayed: bool,
}

/// A process that has not ended.
struct Running {
    role: Role,
    output: ChildStdout,
    text: Vec<u8>,
    /// Ends when this is dropped.
    child: BoundChild,
}

impl Running {
    fn start(worker: &str, role: Role, job: &str, end: OwnedFd) -> Result<Running> {
        let name = if role == Role::A { "a" } else { "b" };
        let mut command = own_program()?;
        command.args([worker, name, job]).stdin(Stdio::from(end)).stdout(Stdio::piped());
        let mut child = BoundChild::spawn(&mut command)?;
        let output = child.get_mut().stdout.take().context("a piped output is missing")?;
        Ok(Running { role, output, text: Vec::new(), child })
    }

    /// Reads what is there; false at its end.
    fn read(&mut self) -> Result<bool> {
        let mut piece = [0; 64 << 10];
        let n = self.output.read(&mut piece)?;
        self.text.extend_from_slice(&piece[..n]);
        Ok(n > 0)
    }

    /// The next whole line.
    fn line(&mut self) -> Option<String> {
        let end = self.text.iter().position(|byte| *byte == b'\n')?;
        let line: Vec<u8> = self.text.drain(..=end).collect();
        Some(String::from_utf8_lossy(&line[..end]).into_owned())
    }
}

/// Runs the hidden subcommand `worker` in two processes and hands each line that they say to `hear`, until both have
/// ended. An error of `hear`, a process that fails, or silence for longer than `patience`, ends both.
pub fn run(
    worker: &str,
    job: &str,
    patience: Duration,
    mut hear: impl FnMut(Role, &str) -> Result<()>,
) -> Result<()> {
    let (a, b) = Rendezvous::pair()?;
    let mut running =
        vec![Running::start(worker, Role::A, job, a)?, Running::start(worker, Role::B, job, b)?];
    let mut deadline = Instant::now() + patience;
    while !running.is_empty() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the two processes said nothing for {} seconds", patience.as_secs());
        }
        let ready: Vec<bool> = {
            let mut fds: Vec<_> = running
                .iter()
                .map(|process| PollFd::new(process.output.as_fd(), PollFlags::POLLIN))
                .collect();
            match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
        };
        // From the back, so that removing one does not move those to come.
        for index in (0..running.len()).rev().filter(|index| ready[*index]) {
            let process = &mut running[index];
            let goes_on = process.read()?;
            while let Some(line) = process.line() {
                deadline = Instant::now() + patience;
                hear(process.role, &line)?;
            }
            if !goes_on {
                let mut ended = running.remove(index);
                let status = ended.child.get_mut().wait()?;
                // The other one may wait for it for ever.
                if !status.success() {
                    bail!("process {:?} of the two ended too early ({status})", ended.role);
                }
            }
        }
    }
    Ok(())
}
