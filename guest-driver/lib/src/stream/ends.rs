//! What the two directions of a stream share: the two DMBs, the words that both directions write, and the connection's
//! state.

use super::remote::Remote;
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::fork::Process;
use crate::shared::{SharedMemory, SharedSlice};
use crate::sync::lock;
use crate::will::Will;
use dmbridge_proto::smc::cdc::{CDC_SIZE, CdcMessage, CursorWord, ProducerFlags, StateFlags};
use dmbridge_proto::smc::connection::Connection;
use dmbridge_proto::smc::cursor::Cursor;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How long to wait for what is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Patience {
    Forever,
    Until(Instant),
    None,
}

impl Patience {
    pub(crate) fn deadline(self) -> Option<Instant> {
        match self {
            Patience::Until(deadline) => Some(deadline),
            Patience::Forever | Patience::None => None,
        }
    }
}

/// Reasons of this side not to go on.
pub(crate) mod stop {
    /// The program wants nothing more from the peer.
    pub(crate) const READING: u8 = 1;
    /// The program sends nothing more.
    pub(crate) const WRITING: u8 = 2;
    /// What tells of the peer's life, its TCP connection, is down.
    pub(crate) const LINE: u8 = 4;
    /// This side has broken the stream off.
    pub(crate) const ABORTED: u8 = 8;
}

/// Each side reads in `local` and writes in `remote`.
pub(crate) struct Ends {
    local: Arc<Dmb>,
    remote: Remote,
    /// Bytes at the end of both DMBs that are not the stream's.
    tail: usize,
    said: Mutex<Said>,
    /// Shared with what watches the peer's life.
    stops: Arc<AtomicU8>,
    process: Process,
}

/// What this side says in the consumer cursor's word, which both directions have a part in: how far the receiver has
/// read, whether the sender waits, how far the connection is closed.
struct Said {
    cursor: Cursor,
    flags: ProducerFlags,
    connection: Connection,
    /// How far the receiver has read when it was dropped.
    read: Option<Cursor>,
    /// Says the last word, if this side cannot.
    will: Option<Will>,
}

impl Ends {
    pub(crate) fn new(local: Arc<Dmb>, remote: Remote, tail: usize) -> Ends {
        let mut connection = Connection::new();
        connection.establish();
        remote.init();
        let will = remote.leave_will(false);
        let (cursor, flags) = (Cursor::default(), ProducerFlags::empty());
        let said = Said { cursor, flags, connection, read: None, will };
        let (stops, process) = (Arc::default(), Process::current());
        Ends { local, remote, tail, said: Mutex::new(said), stops, process }
    }

    #[inline]
    pub(crate) fn local(&self) -> &Dmb {
        &self.local
    }

    #[inline]
    pub(crate) fn remote(&self) -> &Remote {
        &self.remote
    }

    /// The peer's DMB, of a stream that was made of one that is mapped.
    pub(crate) fn mapped(&self) -> &RemoteDmb {
        match &self.remote {
            Remote::Map(dmb) => dmb,
            Remote::Move(_) => unreachable!("only sockets move"),
        }
    }

    /// Sizes of the rings in which this side reads and writes, in bytes.
    pub(crate) fn rings(&self) -> (u32, u32) {
        let ring = |size: usize| u32::try_from(size - CDC_SIZE - self.tail).unwrap_or(1 << 31).min(1 << 31);
        (ring(self.local.size()), ring(self.remote.size()))
    }

    /// What the peer says.
    #[inline]
    pub(crate) fn incoming(&self) -> &CdcMessage {
        cdc(self.local.memory())
    }

    /// Why not to go on, as far as this side knows by itself.
    #[inline]
    pub(crate) fn stops(&self) -> u8 {
        self.stops.load(Ordering::Acquire)
    }

    /// The reasons, for whoever may have one without having the ends.
    pub(crate) fn shared_stops(&self) -> Arc<AtomicU8> {
        self.stops.clone()
    }

    /// Gives a reason not to go on, and has everybody who waits look at it.
    pub(crate) fn stop(&self, why: u8) {
        self.stops.fetch_or(why, Ordering::AcqRel);
        self.local.state().interrupt();
    }

    /// How far the receiver has read.
    #[inline]
    pub(crate) fn tell_read(&self, cursor: Cursor) -> Result<(), Error> {
        self.tell(true, |said| {
            said.cursor = cursor;
            true
        })
    }

    /// Whether the sender waits for room.
    pub(crate) fn tell_blocked(&self, blocked: bool) -> Result<(), Error> {
        // Who is told that nobody waits has nothing to do.
        self.tell(blocked, |said| {
            said.flags.set(ProducerFlags::WRITE_BLOCKED, blocked);
            true
        })
    }

    /// Nothing more will be sent.
    pub(crate) fn tell_finished(&self) -> Result<(), Error> {
        self.tell(true, |said| said.connection.shut_down())?;
        let mut said = lock(&self.said);
        if said.will.is_some()
            && let Some(will) = self.remote.leave_will(true)
        {
            said.will = Some(will);
        }
        Ok(())
    }

    /// The stream is of no use any more.
    pub(crate) fn abort(&self) {
        let _ = self.tell(true, |said| said.connection.abort());
        self.stop(stop::ABORTED);
    }

    /// What the peer has said of its end.
    pub(crate) fn observe(&self, flags: StateFlags) -> Connection {
        let mut said = lock(&self.said);
        said.connection.observe(flags);
        said.connection
    }

    /// The receiver is gone, having read so far.
    pub(crate) fn receiver_gone(&self, cursor: Cursor) {
        lock(&self.said).read = Some(cursor);
    }

    /// Changes what this side says, and says it; `signal`: and wakes the peer if it sleeps. After its last word nothing is said.
    fn tell(&self, signal: bool, change: impl FnOnce(&mut Said) -> bool) -> Result<(), Error> {
        let mut said = lock(&self.said);
        let last = StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT;
        if said.connection.flags().intersects(last) || !change(&mut said) {
            return Ok(());
        }
        let word = CursorWord { cursor: said.cursor, producer: said.flags, state: said.connection.flags() };
        let result = self.remote.store_cons(word, signal);
        if word.state.intersects(last) {
            // From here on the peer may use its buffer for another connection.
            said.will = None;
        }
        result
    }

    #[cfg(test)]
    pub(crate) fn mark_urgent(&self) {
        let set = |said: &mut Said| {
            said.flags |= ProducerFlags::URG_DATA_PRESENT;
            true
        };
        let _ = self.tell(false, set);
    }

    #[cfg(test)]
    pub(crate) fn clear_urgent(&self) {
        let clear = |said: &mut Said| {
            said.flags -= ProducerFlags::URG_DATA_PRESENT;
            true
        };
        let _ = self.tell(false, clear);
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        // A fork's child has inherited a handle, not the stream.
        if !self.process.is_current() {
            return;
        }
        let here = self.incoming().load_prod().cursor;
        let state = self.incoming().load_cons().state;
        // The peer that cannot be rung learns it from its device.
        let _ = self.tell(true, |said| {
            said.connection.observe(state);
            let unread = said.read.is_some_and(|read| read != here);
            said.connection.close(unread)
        });
    }
}

impl fmt::Debug for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ends { local, remote, .. } = self;
        f.debug_struct("Ends").field("local", local).field("remote", remote).finish_non_exhaustive()
    }
}

#[inline]
pub(crate) fn cdc(memory: &SharedMemory) -> &CdcMessage {
    // SAFETY: a DMB has 4096 bytes at least, starts at a multiple of 4096, and stays mapped while `memory` lives. This
    // crate accesses a stream's first 32 bytes by such references only; the peer is a guest.
    unsafe { CdcMessage::from_ptr(memory.as_ptr()) }
}

#[inline]
pub(crate) fn ring(memory: &SharedMemory) -> SharedSlice<'_> {
    memory.slice(CDC_SIZE..)
}
