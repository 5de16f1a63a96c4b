//! What carries the bytes, behind traits that are as small as the cases allow, so that each case is written once.

mod af_smc;
mod cacheline;
mod dmbridge;
mod fd;
#[cfg(feature = "iceoryx2")]
mod iceoryx2;
mod memcpy;
mod pipe;
mod ring;
mod tcp;
mod ucx;
mod uds;
mod vsock;

use anyhow::{Result, bail};
use std::path::Path;

use super::case::{large, pingpong, produce, stream, transfer};
use super::measure::Outcome;
use super::measurement::Worker;
use super::plan::{Transport, Work};

pub use ucx::version as ucx_version;

/// One end of a channel for messages whose size both sides know.
pub trait Duplex {
    /// Sends all of a message.
    fn send(&mut self, message: &[u8]) -> Result<()>;
    /// Receives all of a message.
    fn receive(&mut self, into: &mut [u8]) -> Result<()>;
}

/// One end of a channel whose messages are made and read word by word, in place or not.
pub trait Produce {
    /// Sends so many words, each from `next`.
    fn produce(&mut self, words: usize, next: impl FnMut() -> u64) -> Result<()>;
    /// Receives as many words, hands each to `word` in order, and returns the first.
    fn consume(&mut self, words: usize, word: impl FnMut(u64)) -> Result<u64>;
}

/// The sender's end of transfers into memory of a receiver that does nothing.
pub trait Transfer {
    /// Starts another transfer of the job's size. It may wait for an earlier one.
    fn start(&mut self) -> Result<()>;
    /// Waits for all.
    fn finish(&mut self) -> Result<()>;
}

/// Removes what a killed measurement may have left outside of the run's folder.
pub fn remove_leftovers(folder: &Path) {
    #[cfg(feature = "iceoryx2")]
    iceoryx2::remove_leftovers(folder);
    #[cfg(not(feature = "iceoryx2"))]
    let _ = folder;
}

/// Does the worker's job over the transport it names.
pub fn run(worker: &mut Worker) -> Result<Option<Outcome>> {
    match worker.job.transport {
        Transport::Tcp => over_copies(worker, tcp::connect),
        Transport::Uds => over_copies(worker, uds::connect),
        Transport::Chardev => dmbridge::map(worker),
        Transport::AfSmc => over_copies(worker, af_smc::connect),
        Transport::Vsock => over_copies(worker, vsock::connect),
        Transport::Pipe => over_copies(worker, pipe::connect),
        Transport::Ring => over_copies(worker, ring::connect),
        Transport::Cacheline => cacheline::run(worker),
        Transport::Memcpy => memcpy::run(worker),
        Transport::Ucx => ucx::run(worker),
        #[cfg(feature = "iceoryx2")]
        Transport::Iceoryx2 => iceoryx2::run(worker),
        #[cfg(not(feature = "iceoryx2"))]
        Transport::Iceoryx2 => bail!("this program was built without its feature `iceoryx2`"),
        Transport::DmbridgeMap => dmbridge::map(worker),
        Transport::DmbridgeSmc => over_copies(worker, dmbridge::smc),
        Transport::DmbridgeInplace => dmbridge::in_place(worker),
        Transport::DmbridgeMove | Transport::EngineCpu | Transport::EngineCpuNode => dmbridge::moved(worker),
        Transport::DmbridgeRun => bail!("dmbridge-run runs programs"),
        Transport::DmbridgeMessage => dmbridge::messages(worker),
        Transport::DmbridgeDirect => dmbridge::direct(worker),
    }
}

/// Does the job over a transport that copies in and out.
fn over_copies<D: Duplex>(
    worker: &mut Worker,
    connect: fn(&mut Worker) -> Result<D>,
) -> Result<Option<Outcome>> {
    let mut end = connect(worker)?;
    match worker.job.work {
        Work::PingPong { bytes, .. } => pingpong::run(worker, &mut end, bytes),
        Work::Stream { bytes } => stream::run(worker, &mut end, bytes),
        Work::Exchange { bytes } => large::run(worker, &mut end, bytes),
        Work::Large { bytes } => stream::run_large(worker, &mut end, bytes),
        Work::Produce { bytes } => produce::run(worker, &mut Copied::new(end, bytes), bytes),
        // What has no memory of the receiver to transfer into is measured to where the receiver has the bytes.
        Work::Move { bytes } => stream::run(worker, &mut end, bytes),
    }
}

/// Does transfers, or refuses anything else.
fn over_transfers<T: Transfer>(worker: &mut Worker, end: &mut T) -> Result<Option<Outcome>> {
    match worker.job.work {
        Work::Move { bytes } => transfer::run(worker, end, bytes),
        work => bail!("{work:?} is not a transfer"),
    }
}

/// Makes and reads words in a buffer of its own, and copies that.
struct Copied<D> {
    duplex: D,
    buffer: Vec<u64>,
}

impl<D: Duplex> Copied<D> {
    fn new(duplex: D, bytes: usize) -> Copied<D> {
        Copied { duplex, buffer: vec![0; bytes / 8] }
    }
}

impl<D: Duplex> Produce for Copied<D> {
    fn produce(&mut self, words: usize, mut next: impl FnMut() -> u64) -> Result<()> {
        self.buffer[..words].fill_with(&mut next);
        self.duplex.send(bytes_of(&mut self.buffer[..words]))
    }

    fn consume(&mut self, words: usize, word: impl FnMut(u64)) -> Result<u64> {
        self.duplex.receive(bytes_of(&mut self.buffer[..words]))?;
        each_word(&self.buffer[..words], word);
        Ok(self.buffer[0])
    }
}

/// Hands on each word; in lines, which compilers make wide.
fn each_word(words: &[u64], mut word: impl FnMut(u64)) {
    let (lines, rest) = words.as_chunks::<8>();
    for line in lines {
        line.iter().copied().for_each(&mut word);
    }
    rest.iter().copied().for_each(word);
}

/// The bytes of words.
fn bytes_of(words: &mut [u64]) -> &mut [u8] {
    // SAFETY: the range is that of the words, bytes need no alignment, and any bytes make words.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), size_of_val(words)) }
}
