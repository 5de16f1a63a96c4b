//! A connection that goes over DMBs. Its TCP connection stays, and tells of the peer's death.

use super::contacts::{Lease, Link};
use crate::dmb::DmbState;
use crate::error::Error;
use crate::fork::Process;
use crate::reactor::{Alarm, Interest, Reactor, Registration, Source};
use crate::stream::{Ends, Patience, Receiver, Sender, stop};
use crate::sync::lock;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
use std::time::Duration;

/// How long the peer's last word may come after its TCP connection has gone down: a kernel does not wait for its moves.
const LAST_WORD: Duration = Duration::from_secs(2);

/// See the module. The order of the fields is that in which they are dropped: the buffer is given back last.
pub(crate) struct Carried {
    sender: Mutex<Sender>,
    receiver: Mutex<Receiver>,
    watch: Option<LineWatch>,
    ends: Arc<Ends>,
    lease: Lease,
}

impl Carried {
    pub(crate) fn new(tcp: &TcpStream, link: Link) -> Result<Carried, Error> {
        let Link { sender, receiver, lease } = link;
        let ends = sender.ends().clone();
        let watch = LineWatch::new(tcp, &ends)?;
        let (sender, receiver) = (Mutex::new(sender), Mutex::new(receiver));
        Ok(Carried { sender, receiver, watch: Some(watch), ends, lease })
    }

    /// The direction to the peer, for this thread alone.
    pub(crate) fn sender(&self, patience: Patience) -> io::Result<MutexGuard<'_, Sender>> {
        take(&self.sender, patience)
    }

    /// The direction from the peer, for this thread alone.
    pub(crate) fn receiver(&self, patience: Patience) -> io::Result<MutexGuard<'_, Receiver>> {
        take(&self.receiver, patience)
    }

    /// Whether both ends have finished: as with TCP, there is no connection to shut down any more.
    pub(crate) fn is_over(&self) -> bool {
        let connection = self.ends.observe(self.ends.incoming().load_cons().state);
        connection.is_finished() && !connection.flags().is_empty()
    }

    pub(crate) fn stop_reading(&self) {
        self.ends.stop(stop::READING);
    }

    pub(crate) fn stop_writing(&self) -> Result<(), Error> {
        // Who waits for room stops, so that the lock is free soon and nothing follows the last word.
        self.ends.stop(stop::WRITING);
        lock(&self.sender).finish()
    }

    /// For epoll: as [`Dmb::arm`](crate::Dmb::arm), and what is ready already.
    pub(crate) fn arm(&self, read: bool, write: bool) -> Result<(bool, bool), Error> {
        self.ends.local().arm()?;
        // What another thread is busy with counts as ready: to look again is never wrong.
        let can_read = read && take(&self.receiver, Patience::None).map_or(true, |mut r| r.is_ready());
        let has_room = || take(&self.sender, Patience::None).map_or(true, |mut s| s.is_ready());
        let mut can_write = write && has_room();
        if write && !can_write {
            // It may be moves that are in the way.
            self.ends.remote().wake_when_done(self.ends.local().state())?;
            can_write = has_room();
        }
        Ok((can_read, can_write))
    }

    pub(crate) fn fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.ends.local().as_fd()
    }

    pub(crate) fn set_spin(&self, longest: std::time::Duration) {
        self.ends.local().set_spin(longest);
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.watch = None;
        let receiver = self.receiver.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.lease.usage = Some(receiver.usage());
    }
}

fn take<T>(mutex: &Mutex<T>, patience: Patience) -> io::Result<MutexGuard<'_, T>> {
    if patience != Patience::None {
        return Ok(lock(mutex));
    }
    match mutex.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Has the library's thread watch the TCP connection: when it goes down, who waits for the peer learns it.
struct LineWatch {
    registration: Option<Registration>,
    fd: RawFd,
    process: Process,
    _line: Arc<Line>,
}

/// What the library's thread needs to know. Nothing in it takes a command to drop, for which that thread must not wait.
struct Line {
    stops: Arc<AtomicU8>,
    dmb: Arc<DmbState>,
    alarm: OnceLock<Alarm>,
}

/// The TCP connection is down.
const DOWN: u8 = 0;
/// It is, and has been for a while.
const STILL_DOWN: u8 = 1;

impl Source for Line {
    fn ready(&self, what: u8) {
        if let (DOWN, Some(alarm)) = (what, self.alarm.get()) {
            return alarm.set(LAST_WORD, STILL_DOWN);
        }
        self.stops.fetch_or(stop::LINE, Ordering::AcqRel);
        self.dmb.interrupt();
    }
}

impl LineWatch {
    fn new(tcp: &TcpStream, ends: &Ends) -> Result<LineWatch, Error> {
        let (stops, dmb) = (ends.shared_stops(), ends.local().state().clone());
        let line = Arc::new(Line { stops, dmb, alarm: OnceLock::new() });
        let source: Weak<dyn Source> = Arc::downgrade(&(line.clone() as Arc<dyn Source>));
        let registration = Reactor::get()?.register(source);
        let _ = line.alarm.set(registration.alarm());
        registration.watch(tcp.as_fd(), Interest::HangUp, DOWN)?;
        let fd = tcp.as_raw_fd();
        Ok(LineWatch { registration: Some(registration), fd, process: Process::current(), _line: line })
    }
}

impl Drop for LineWatch {
    fn drop(&mut self) {
        let Some(registration) = self.registration.take() else { return };
        if self.process.is_current() {
            // SAFETY: the connection is closed after this, see `SmcStream`.
            registration.forget(unsafe { BorrowedFd::borrow_raw(self.fd) });
        } else {
            // The epoll instance is the parent's, too, and a thread that is not here may hold a lock of it.
            std::mem::forget(registration);
        }
    }
}
