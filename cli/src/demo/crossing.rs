//! The two processes of the demo. A reads the content piece by piece into its own memory, and each piece crosses into a
//! DMB that B owns; B checks it there. What is timed is the crossing alone: from a piece in A's memory to B knowing that
//! it is in B's. Reading, and SHA-256 at both ends, happen before and after; so does the first use of the memory, which
//! the system has to find and clear.

use anyhow::{Context, Result, ensure};
use dmbridge::{Device, Dmb, Gid, MoveBuffer, Mover, RemoteDmb, SharedMemory, SharedSlice, Token};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::{ErrorKind, Read};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::content::{Content, Reader};
use crate::out;
use crate::pair::{PairArgs, Role};
use crate::rendezvous::Rendezvous;

/// What crosses at once.
const PIECE: usize = 32 << 20;
/// The DMB starts with the length of the piece, which starts here.
const DATA: usize = 4096;
/// The sender signals that a piece is there, or the receiver that it has it.
const HERE: u64 = 1;
/// The receiver signals that it has checked the piece and wants the next.
const CHECKED: u64 = 2;

/// What the two are told.
#[derive(Serialize, Deserialize)]
pub struct Job {
    /// The daemon's hub.
    pub hub: PathBuf,
    /// What to send, if not files of this machine.
    pub file: Option<PathBuf>,
    /// By map, else by move.
    pub map: bool,
}

/// What the two say.
#[derive(Serialize, Deserialize)]
pub enum Said {
    /// So many bytes have crossed.
    Crossed(u64),
    /// All have.
    Done(End),
    /// It failed.
    Failed(String),
}

/// What one of the two found.
#[derive(Serialize, Deserialize)]
pub struct End {
    /// Bytes sent or received.
    pub bytes: u64,
    /// Their SHA-256.
    pub sha256: String,
    /// The sender's clock: the crossing.
    pub seconds: f64,
    /// The sender's clock: everything.
    pub seconds_in_all: f64,
}

/// Is one of the two.
pub fn work(args: PairArgs) -> Result<()> {
    let rendezvous = Rendezvous::from_stdin()?;
    let said = match take_part(&args, &rendezvous) {
        Ok(end) => Said::Done(end),
        Err(error) => Said::Failed(format!("{error:#}")),
    };
    say(&said)
}

fn say(said: &Said) -> Result<()> {
    out::line(serde_json::to_string(said)?)
}

fn take_part(args: &PairArgs, rendezvous: &Rendezvous) -> Result<End> {
    let job: Job = serde_json::from_str(&args.job).context("the job is not one")?;
    let device = Device::builder().map(job.map).connect(&job.hub)?;
    rendezvous.tell(&device.gid().to_string())?;
    let peer: Gid = rendezvous.hear::<String>()?.parse()?;
    // Each owns a DMB: B's takes the pieces, A's only the signals that B answers with.
    let size = if args.role == Role::A { DATA } else { DATA + PIECE };
    let own = device.register(peer, size)?;
    rendezvous.tell(&own.token().to_bits())?;
    let other = Token::from_bits(rendezvous.hear()?);
    touch(own.memory());
    let end = match args.role {
        Role::A => {
            let content = match &job.file {
                Some(file) => Content::of_file(file)?,
                None => Content::of_this_machine()?,
            };
            send(content.read(), &own, &mut Way::open(&device, other, job.map, PIECE)?)
        }
        Role::B => receive(&own, &Way::open(&device, other, job.map, 0)?),
    }?;
    rendezvous.meet()?;
    Ok(end)
}

/// How a process writes into the other's DMB.
enum Way {
    /// Its own stores are the other's data.
    Map(RemoteDmb),
    /// The device copies from the buffer.
    Move(Mover, MoveBuffer),
}

impl Way {
    /// The way into a DMB, for pieces up to a size.
    fn open(device: &Device, token: Token, map: bool, piece: usize) -> Result<Way> {
        Ok(if map {
            let dmb = device.attach(token)?;
            touch(dmb.memory());
            Way::Map(dmb)
        } else {
            Way::Move(device.mover(token)?, device.move_buffer(DATA + piece)?)
        })
    }

    /// Where a piece is read to: the first half of the way that is not timed.
    fn prepare(&mut self, piece: &[u8]) -> Result<()> {
        match self {
            Way::Map(_) => Ok(()),
            Way::Move(_, buffer) => {
                buffer.memory().as_slice().write_u64(0, piece.len() as u64);
                Ok(buffer.memory().write(DATA, piece)?)
            }
        }
    }

    /// Brings a prepared piece into the other's DMB, and signals.
    fn cross(&self, piece: &[u8]) -> Result<()> {
        match self {
            Way::Map(dmb) => {
                dmb.write(DATA, piece)?;
                dmb.write(0, &(piece.len() as u64).to_le_bytes())?;
                dmb.signal(HERE)?;
            }
            Way::Move(mover, buffer) => {
                let parts = [buffer.part(0..DATA + piece.len())];
                mover.post_parts(0, &parts, Some(HERE))?;
                mover.flush()?;
            }
        }
        Ok(())
    }

    fn signal(&self, mask: u64) -> Result<()> {
        match self {
            Way::Map(dmb) => Ok(dmb.signal(mask)?),
            Way::Move(mover, _) => {
                mover.signal(mask)?;
                Ok(mover.flush()?)
            }
        }
    }
}

/// Sends all, and an empty piece at the end.
fn send(mut content: Reader, own: &Dmb, way: &mut Way) -> Result<End> {
    let (mut hash, mut bytes, mut crossing) = (Sha256::new(), 0u64, Duration::ZERO);
    let mut piece = vec![0; PIECE];
    let mut signals = Signals { own, seen: 0 };
    let all = Instant::now();
    loop {
        let len = fill(&mut content, &mut piece)?;
        let piece = &piece[..len];
        hash.update(piece);
        way.prepare(piece)?;
        let start = Instant::now();
        way.cross(piece)?;
        signals.wait_for(HERE)?;
        crossing += start.elapsed();
        signals.wait_for(CHECKED)?;
        if len == 0 {
            break;
        }
        bytes += len as u64;
        say(&Said::Crossed(bytes))?;
    }
    let (seconds, seconds_in_all) = (crossing.as_secs_f64(), all.elapsed().as_secs_f64());
    Ok(End { bytes, sha256: hex(hash), seconds, seconds_in_all })
}

/// Receives pieces until an empty one.
fn receive(own: &Dmb, way: &Way) -> Result<End> {
    let (mut hash, mut bytes) = (Sha256::new(), 0u64);
    let mut copy = vec![0; 64 << 10];
    let mut signals = Signals { own, seen: 0 };
    loop {
        signals.wait_for(HERE)?;
        way.signal(HERE)?;
        let len = usize::try_from(own.memory().as_slice().read_u64(0))?;
        ensure!(len <= PIECE, "a piece of {len} bytes is announced, which is more than there is room for");
        let mut rest: SharedSlice<'_> = own.memory().slice(DATA..DATA + len);
        while !rest.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(copy.len()));
            part.copy_to_slice(&mut copy[..part.len()]);
            hash.update(&copy[..part.len()]);
            rest = after;
        }
        bytes += len as u64;
        way.signal(CHECKED)?;
        if len == 0 {
            return Ok(End { bytes, sha256: hex(hash), seconds: 0.0, seconds_in_all: 0.0 });
        }
    }
}

/// Uses memory for the first time.
fn touch(memory: &SharedMemory) {
    memory.as_slice().for_each_u64(|_| {});
}

/// What the other process has signalled and this one has not looked at yet: signals merge while nobody looks.
struct Signals<'a> {
    own: &'a Dmb,
    seen: u64,
}

impl Signals<'_> {
    /// Waits until the other has signalled this.
    fn wait_for(&mut self, wanted: u64) -> Result<()> {
        while self.seen & wanted == 0 {
            self.seen |= self.own.wait(None)?;
        }
        self.seen &= !wanted;
        Ok(())
    }
}

/// Reads until the piece is full or there is no more.
fn fill(content: &mut Reader, piece: &mut [u8]) -> Result<usize> {
    let mut len = 0;
    while len < piece.len() {
        match content.read(&mut piece[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("what is to be sent cannot be read"),
        }
    }
    Ok(len)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
