//! Patterns of communication between two or four processes, as in the tables that cross memory attach was proposed with:
//! ping-pong and ping-ping in pairs, and rings in which each sends to both its neighbours, in the order of the processes
//! and in another one. What counts is what each process sends, in bytes per second, while all others do the same.
//!
//! Each process is this program again. They find each other through this one, which hands on what they say.

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use dmbridge::message::{Channel, Direct};
use dmbridge::{Device, Gid, Token};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::bench::plan::Transport;
use crate::bench::private::Private;
use crate::process::{self, BoundChild, own_program};
use crate::rendezvous::Rendezvous;

/// Name of the hidden subcommand.
pub const MEMBER: &str = "bench-member";
/// How many processes.
pub const SIZES: [usize; 2] = [2, 4];
/// Ways to send messages that are compared.
pub const WAYS: [Transport; 3] =
    [Transport::DmbridgeMap, Transport::DmbridgeMessage, Transport::DmbridgeDirect];
/// Size of a message, in bytes.
const BYTES: usize = 1 << 20;
/// Size of each DMB: a message that goes through it has room there.
const DMB: usize = 4 << 20;
/// Rounds from which their time is learned.
const TRIES: u32 = 8;

/// Who talks to whom, and when.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, ValueEnum)]
pub enum Pattern {
    /// One message there, one back.
    PingPong,
    /// One message in each direction at once.
    PingPing,
    /// One message to each neighbour; neighbours have neighbouring numbers.
    NaturalRing,
    /// The same with neighbours by chance.
    RandomRing,
}

/// What a process is told on its command line.
#[derive(clap::Args)]
pub struct MemberArgs {
    /// The job, as JSON.
    job: String,
}

#[derive(Serialize, Deserialize)]
struct Job {
    member: usize,
    members: usize,
    cpu: usize,
    hub: PathBuf,
    pattern: Pattern,
    way: Transport,
}

/// A DMB of each side: with whom, and their tokens.
type Tokens = BTreeMap<usize, u64>;

impl Pattern {
    /// The two members of each pair that talk. Every member opens those that it is in by ascending number, so that nobody
    /// waits in a circle.
    fn pairs(self, members: usize) -> Vec<[usize; 2]> {
        let ring = |order: &[usize]| {
            (0..members).map(|at| [order[at], order[(at + 1) % members]]).collect::<Vec<_>>()
        };
        match self {
            Pattern::PingPong | Pattern::PingPing => (0..members / 2).map(|i| [2 * i, 2 * i + 1]).collect(),
            Pattern::NaturalRing => ring(&(0..members).collect::<Vec<_>>()),
            // Not the natural order, nor its reverse; the same in every run, so that runs can be compared.
            Pattern::RandomRing => ring(&[&[0, 2, 1, 3][..], &(4..members).collect::<Vec<_>>()].concat()),
        }
    }
}

/// Measures once: bytes per second that each process sends.
pub fn run(
    hub: &Path,
    cpus: [usize; 2],
    pattern: Pattern,
    members: usize,
    way: Transport,
    duration: Duration,
) -> Result<f64> {
    // With two members there is only one order.
    let pattern = if members == 2 && pattern == Pattern::RandomRing { Pattern::NaturalRing } else { pattern };
    let all = (0..members).map(|member| {
        let job = Job { member, members, cpu: cpus[member % cpus.len()], hub: hub.to_owned(), pattern, way };
        let (ours, theirs) = Rendezvous::pair()?;
        let mut command = own_program()?;
        command.args([MEMBER, &serde_json::to_string(&job)?]).stdin(Stdio::from(theirs));
        Ok((BoundChild::spawn(command.stdout(Stdio::null()))?, Rendezvous::Socket(ours)))
    });
    let all = all.collect::<Result<Vec<_>>>()?;
    let tell = |what: &dyn Fn(&Rendezvous) -> Result<()>| all.iter().try_for_each(|(_, member)| what(member));
    let gids = all.iter().map(|(_, member)| member.hear()).collect::<Result<Vec<String>>>()?;
    tell(&|member| member.tell(&gids))?;
    // Of each pair, what either registered for the other.
    let tokens = all.iter().map(|(_, member)| member.hear()).collect::<Result<Vec<Tokens>>>()?;
    for (number, (_, member)) in all.iter().enumerate() {
        let mut theirs = Tokens::new();
        for (pair, both) in pattern.pairs(members).iter().enumerate() {
            if let Some(at) = both.iter().position(|one| *one == number) {
                theirs.insert(pair, tokens[both[1 - at]][&pair]);
            }
        }
        member.tell(&theirs)?;
    }
    let times = all.iter().map(|(_, member)| member.hear()).collect::<Result<Vec<f64>>>()?;
    let slowest = times.into_iter().fold(1e-9, f64::max);
    let rounds = (duration.as_secs_f64() / slowest).clamp(4.0, 1e6) as u32;
    tell(&|member| member.tell(&rounds))?;
    let speeds = all.iter().map(|(_, member)| member.hear()).collect::<Result<Vec<f64>>>()?;
    // Nobody leaves while another one still receives.
    tell(&|member| member.tell(&()))?;
    Ok(speeds.iter().sum::<f64>() / members as f64)
}

/// Is one of the processes.
pub fn work(args: MemberArgs) -> Result<()> {
    let switchboard = Rendezvous::from_stdin()?;
    let job: Job = serde_json::from_str(&args.job).context("the job is not one")?;
    process::pin(job.cpu)?;
    let device = Device::connect(&job.hub)?;
    switchboard.tell(&device.gid().to_string())?;
    let gids: Vec<String> = switchboard.hear()?;
    let pairs = job.pattern.pairs(job.members);
    let mine: Vec<(usize, usize)> = pairs
        .iter()
        .enumerate()
        .filter_map(|(pair, both)| {
            both.iter().position(|one| *one == job.member).map(|at| (pair, both[1 - at]))
        })
        .collect();
    let mut local = BTreeMap::new();
    for (pair, peer) in &mine {
        let gid: Gid = gids[*peer].parse()?;
        local.insert(*pair, device.register(gid, DMB)?);
    }
    let tokens: Tokens = local.iter().map(|(pair, dmb)| (*pair, dmb.token().to_bits())).collect();
    switchboard.tell(&tokens)?;
    let theirs: Tokens = switchboard.hear()?;
    let direct = match job.way {
        Transport::DmbridgeMap => Direct::Never,
        Transport::DmbridgeDirect => Direct::From(1),
        _ => Direct::Measured,
    };
    let mut channels = BTreeMap::new();
    for (pair, _) in &mine {
        let dmb = local.remove(pair).context("a DMB is missing")?;
        let remote = device.attach(Token::from_bits(theirs[pair]))?;
        channels.insert(*pair, Channel::open_with(dmb, remote, direct)?);
    }
    let mut part = Part::new(&job, &pairs, channels)?;
    let mut rounds = |count: u32| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            part.round()?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(count))
    };
    rounds(TRIES)?;
    let each = rounds(TRIES)?;
    switchboard.tell(&each)?;
    let count = switchboard.hear()?;
    let each = rounds(count)?;
    let sent = match job.pattern {
        // A round is there and back.
        Pattern::PingPong | Pattern::NaturalRing | Pattern::RandomRing => 2 * BYTES,
        Pattern::PingPing => BYTES,
    };
    switchboard.tell(&(sent as f64 / each))?;
    switchboard.hear()
}

/// A member's part of a pattern.
struct Part {
    pattern: Pattern,
    /// Whether it begins.
    first: bool,
    /// To the next one of a ring, or to the only other one.
    next: Channel,
    /// To the one before in a ring.
    before: Option<Channel>,
    message: Private,
    buffer: Private,
}

impl Part {
    fn new(job: &Job, pairs: &[[usize; 2]], mut channels: BTreeMap<usize, Channel>) -> Result<Part> {
        let first = pairs.iter().position(|pair| pair[0] == job.member);
        let second = pairs.iter().position(|pair| pair[1] == job.member);
        let ring = matches!(job.pattern, Pattern::NaturalRing | Pattern::RandomRing);
        let next = if ring { first } else { first.or(second) };
        let next = next.and_then(|pair| channels.remove(&pair)).context("a member has no pair")?;
        let before = second.and_then(|pair| channels.remove(&pair));
        Ok(Part {
            pattern: job.pattern,
            first: first.is_some(),
            next,
            before,
            message: Private::new(BYTES, job.member as u8)?,
            buffer: Private::new(BYTES, 0)?,
        })
    }

    fn round(&mut self) -> Result<()> {
        let Part { pattern, first, next, before, message, buffer } = self;
        let all = |len: Option<usize>| -> Result<()> {
            ensure!(len == Some(BYTES), "a message of {len:?} bytes came");
            Ok(())
        };
        let pieces = [IoSlice::new(message)];
        match (pattern, before) {
            (Pattern::PingPong, _) if *first => {
                next.send(message)?;
                all(next.recv(buffer)?)
            }
            (Pattern::PingPong, _) => {
                all(next.recv(buffer)?)?;
                Ok(next.send(message)?)
            }
            (Pattern::PingPing, _) => {
                let (sender, receiver) = next.both();
                let posted = sender.post(&pieces)?;
                all(receiver.recv(buffer)?)?;
                Ok(posted.wait()?)
            }
            (_, Some(before)) => {
                let posted = next.sender().post(&pieces)?;
                all(before.recv(buffer)?)?;
                posted.wait()?;
                let posted = before.sender().post(&pieces)?;
                all(next.recv(buffer)?)?;
                Ok(posted.wait()?)
            }
            (_, None) => unreachable!("a member of a ring has two neighbours"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_a_ring_everybody_has_one_before_and_one_behind() {
        for members in SIZES {
            for pattern in [Pattern::NaturalRing, Pattern::RandomRing] {
                if members == 2 && pattern == Pattern::RandomRing {
                    continue;
                }
                let pairs = pattern.pairs(members);
                for side in 0..2 {
                    let mut all: Vec<usize> = pairs.iter().map(|pair| pair[side]).collect();
                    all.sort_unstable();
                    assert_eq!(all, (0..members).collect::<Vec<_>>());
                }
            }
            assert_eq!(Pattern::PingPing.pairs(members).len(), members / 2);
        }
    }
}
