//! A connection that stayed with TCP.
//!
//! A server that took a client for one that speaks plain TCP, because it said nothing for a while, may find a proposal
//! after all when it first reads. Then the client waits for an answer, or, if the server has spoken, knows already; in both
//! cases the proposal is no data.

use super::clc::{self, Word};
use crate::error::Error;
use crate::mapping::Mapping;
use crate::proto::shm::CopyPlan;
use crate::shared::SharedMemory;
use crate::sync::lock;
use dmbridge_proto::smc::clc::{Message, Reason};
use std::io;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Size of the buffers for what is written and read in place, in bytes.
const STAGING: usize = 64 << 10;

/// See the module.
pub(crate) struct Fallen {
    /// Whether a proposal may still come.
    late: AtomicBool,
    /// Whether this side has spoken.
    spoke: Mutex<bool>,
    outgoing: Mutex<Option<SharedMemory>>,
    incoming: Mutex<Option<SharedMemory>>,
}

impl Fallen {
    pub(crate) fn new(late: bool) -> Fallen {
        Fallen {
            late: AtomicBool::new(late),
            spoke: Mutex::default(),
            outgoing: Mutex::default(),
            incoming: Mutex::default(),
        }
    }

    /// To be called before anything is read: takes a late proposal out of the way. `block`: whether the caller would wait for data.
    #[inline]
    pub(crate) fn before_read(&self, tcp: &TcpStream, block: bool) -> io::Result<()> {
        if self.late.load(Ordering::Acquire) { self.look(tcp, block) } else { Ok(()) }
    }

    /// To be called before anything is written.
    #[inline]
    pub(crate) fn before_write(&self, tcp: &TcpStream) -> io::Result<()> {
        if self.late.load(Ordering::Acquire) {
            self.take_proposal(tcp)?;
            *lock(&self.spoke) = true;
        }
        Ok(())
    }

    #[cold]
    fn look(&self, tcp: &TcpStream, block: bool) -> io::Result<()> {
        loop {
            match self.take_proposal(tcp)? {
                Word::Message(_) | Word::Other => return Ok(()),
                Word::Part | Word::Nothing if !block => return Err(io::ErrorKind::WouldBlock.into()),
                // Waits as reading would, for as long as reading would.
                Word::Nothing => drop(tcp.peek(&mut [0])?),
                Word::Part => std::thread::yield_now(),
            }
        }
    }

    fn take_proposal(&self, tcp: &TcpStream) -> io::Result<Word> {
        let spoke = lock(&self.spoke);
        let word = clc::look(tcp)?;
        match &word {
            Word::Message(Message::Proposal(proposal)) => {
                if !*spoke {
                    clc::decline(tcp, proposal.version, Reason::PEER_NO_SMC)?;
                }
                self.late.store(false, Ordering::Release);
            }
            Word::Message(_) => return Err(clc::unexpected()),
            Word::Other => self.late.store(false, Ordering::Release),
            Word::Part | Word::Nothing => {}
        }
        Ok(word)
    }

    /// A buffer to write in place.
    pub(crate) fn outgoing(&self) -> io::Result<Staging<'_>> {
        staging(&self.outgoing)
    }

    /// A buffer to read in place.
    pub(crate) fn incoming(&self) -> io::Result<Staging<'_>> {
        staging(&self.incoming)
    }
}

/// A buffer, for one thread at a time.
pub(crate) struct Staging<'a>(MutexGuard<'a, Option<SharedMemory>>);

impl Staging<'_> {
    pub(crate) fn memory(&self) -> &SharedMemory {
        self.0.as_ref().expect("it was made before it was handed out")
    }
}

fn staging(slot: &Mutex<Option<SharedMemory>>) -> io::Result<Staging<'_>> {
    let mut slot = lock(slot);
    if slot.is_none() {
        let mapping = Mapping::reserve(STAGING).map_err(Error::os("map memory"))?;
        mapping.replace_by_zeroes(0, STAGING)?;
        let mapping = Arc::new(mapping);
        // SAFETY: the mapping is new, has that many bytes, and is kept.
        *slot = Some(unsafe { SharedMemory::new(mapping.base(), STAGING, CopyPlan::default(), mapping) });
    }
    Ok(Staging(slot))
}
