//! A connection that goes over DMBs. Its TCP connection stays, and tells of the peer's death.

use super::contacts::{Lease, Link};
use crate::dmb::DmbState;
use crate::error::Error;
use crate::fork::Process;
use crate::reactor::{Interest, Reactor, Registration, Source};
use crate::stream::{Ends, Patience, Receiver, Sender, stop};
use crate::sync::lock;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

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
        let read = read && take(&self.receiver, Patience::None).map_or(true, |mut r| r.is_ready());
        let write = write && take(&self.sender, Patience::None).map_or(true, |mut s| s.is_ready());
        Ok((read, write))
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
}

impl Source for Line {
    fn ready(&self, _what: u8) {
        self.stops.fetch_or(stop::LINE, Ordering::AcqRel);
        self.dmb.interrupt();
    }
}

impl LineWatch {
    fn new(tcp: &TcpStream, ends: &Ends) -> Result<LineWatch, Error> {
        let line = Arc::new(Line { stops: ends.shared_stops(), dmb: ends.local().state().clone() });
        let source: Weak<dyn Source> = Arc::downgrade(&(line.clone() as Arc<dyn Source>));
        let registration = Reactor::get()?.register(source);
        registration.watch(tcp.as_fd(), Interest::HangUp, 0)?;
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
