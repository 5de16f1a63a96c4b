//! How a channel opens: both say which process they are, prove it, and agree whether and when messages go directly.

use super::chooser::{self, Chooser};
use super::frame::Frame;
use super::{Channel, Direct, Receiver, Refused, Sender};
use crate::cma::{Direction, Peer};
use crate::error::Error;
use crate::fork::Process;
use crate::stream::DmbStream;
use libc::iovec;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Opens one end; the other end does the same.
pub(super) fn open(stream: DmbStream, wish: Direct) -> Result<Channel, Error> {
    let (sender, receiver) = stream.split();
    let process = Process::current();
    let mut sender = Sender {
        stream: sender,
        peer: None,
        process,
        threshold: usize::MAX,
        chooser: None,
        offers: 0,
        open: false,
    };
    let mut receiver = Receiver { stream: receiver, peer: None, process, next: None };

    // Processes of one host can wake each other by futex; nobody else is looked for.
    let willing = wish != Direct::Never && receiver.stream.local().is_of_a_process();
    let pid = if willing { std::process::id() } else { 0 };
    let challenge = random();
    let from = match wish {
        Direct::Measured => 0,
        Direct::From(bytes) => (bytes as u64).max(1),
        Direct::Never => u64::MAX,
    };
    say(&mut sender, Frame::Hello { pid, challenge, from })?;
    let Frame::Hello { pid: their_pid, challenge: asked, from: theirs } = receiver.recv_frame()? else {
        return Err(Error::Peer("a channel does not start with a greeting"));
    };

    // What the other asked for, where it may look for it.
    let proof = Box::new(AtomicU64::new(asked));
    say(&mut sender, Frame::Proof { address: std::ptr::from_ref(&*proof).addr() as u64 })?;
    let Frame::Proof { address } = receiver.recv_frame()? else {
        return Err(Error::Peer("a channel starts without a proof"));
    };
    let found =
        if willing { find(&receiver, their_pid as i32, address, challenge) } else { Err(Refused::Unknown) };
    say(&mut sender, Frame::Verdict { good: found.is_ok() })?;
    let Frame::Verdict { good } = receiver.recv_frame()? else {
        return Err(Error::Peer("a channel starts without a verdict"));
    };
    drop(proof);

    let direct = match found {
        Ok(peer) if good => {
            let peer = Arc::new(peer);
            sender.peer = Some(peer.clone());
            receiver.peer = Some(peer);
            if from.max(theirs) == 0 {
                sender.threshold = chooser::LEAST;
                sender.chooser = Some(Chooser::new(sender.stream.remote().size(), challenge));
            } else {
                sender.threshold = usize::try_from(from.max(theirs)).unwrap_or(usize::MAX);
            }
            Ok(())
        }
        Ok(_) => Err(Refused::Permission),
        Err(refused) => Err(refused),
    };
    Ok(Channel { sender, receiver, direct })
}

pub(super) fn say(sender: &mut Sender, frame: Frame) -> Result<(), Error> {
    sender.stream.send(&frame.to_bytes())
}

/// The other process, if it is the one that it says.
fn find(receiver: &Receiver, pid: i32, address: u64, challenge: u64) -> Result<Peer, Refused> {
    let local = receiver.stream.local();
    let peer = Peer::find(pid, local.memory(), local.daemon())?;
    let mut answer = [0; 8];
    let here = [super::iovec_of_mut(&mut answer)];
    let there = [iovec { iov_base: std::ptr::without_provenance_mut(address as usize), iov_len: 8 }];
    // SAFETY: what is written is a local.
    unsafe { peer.copy(Direction::Read, &here, &there, 0, 8) }?;
    if u64::from_ne_bytes(answer) == challenge && peer.is_alive() { Ok(peer) } else { Err(Refused::Unknown) }
}

/// A number that the other process cannot guess.
fn random() -> u64 {
    let mut bytes = [0; 8];
    // SAFETY: writes at most as many bytes as there are. So few are never cut short once the kernel has booted; if they
    // could not be had at all, the number is the same for all, and one of three safeguards is lost.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    u64::from_ne_bytes(bytes)
}
