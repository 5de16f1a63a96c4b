//! Listening: connections come out with their handshake done.

use super::acceptor::Acceptor;
use super::contacts::Contacts;
use super::{Reason, SmcStream};
use crate::sync::lock;
use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Connections that wait to be accepted by the program before no more are taken from TCP's own queue.
const BACKLOG: usize = 128;

/// Listens as [`TcpListener`] does, for clients that speak SMC and for such that do not.
///
/// A thread of the listener does the handshakes, so [`accept`](Self::accept) never waits for a client that is slow to speak.
/// After `fork()`, a child can accept, too; its connections stay with TCP.
pub struct SmcListener {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the listener and its thread share.
pub(crate) struct Shared {
    tcp: TcpListener,
    contacts: Arc<Contacts>,
    queue: Mutex<VecDeque<io::Result<(SmcStream, SocketAddr)>>>,
    changed: Condvar,
    /// Readable while something waits to be accepted.
    ready: EventFd,
    /// Tells the thread to look up.
    kick: EventFd,
    nonblocking: AtomicBool,
    closed: AtomicBool,
}

impl SmcListener {
    pub(crate) fn new(tcp: TcpListener, contacts: Arc<Contacts>) -> io::Result<SmcListener> {
        tcp.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            tcp,
            contacts,
            queue: Mutex::default(),
            changed: Condvar::new(),
            ready: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            kick: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            nonblocking: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        });
        let acceptor = Acceptor::new(shared.clone())?;
        let thread = std::thread::Builder::new().name("dmbridge-smc".into()).spawn(|| acceptor.run())?;
        Ok(SmcListener { shared, thread: Some(thread) })
    }

    /// The next connection, and who it is from. Waits for one.
    ///
    /// # Errors
    ///
    /// As for [`TcpListener::accept`].
    pub fn accept(&self) -> io::Result<(SmcStream, SocketAddr)> {
        let shared = &*self.shared;
        if !shared.contacts.is_ours() {
            return shared.accept_in_child();
        }
        let mut queue = lock(&shared.queue);
        loop {
            if let Some(next) = shared.take(&mut queue) {
                return next;
            }
            if shared.nonblocking.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Connections without end, as [`TcpListener::incoming`].
    pub fn incoming(&self) -> Incoming<'_> {
        Incoming(self)
    }

    /// The address that it listens at.
    ///
    /// # Errors
    ///
    /// As for [`TcpListener::local_addr`].
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.shared.tcp.local_addr()
    }

    /// Whether [`accept`](Self::accept) fails with `WouldBlock` instead of waiting.
    pub fn set_nonblocking(&self, nonblocking: bool) {
        self.shared.nonblocking.store(nonblocking, Ordering::Relaxed);
    }
}

impl AsFd for SmcListener {
    /// A descriptor that is readable while there is something to accept. Watch it for reading only. It is not the socket.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `shared`, which `self` keeps.
        unsafe { BorrowedFd::borrow_raw(self.shared.ready.as_raw_fd()) }
    }
}

impl AsRawFd for SmcListener {
    fn as_raw_fd(&self) -> i32 {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for SmcListener {
    fn drop(&mut self) {
        // A fork's child has the sockets, not the thread.
        if !self.shared.contacts.is_ours() {
            return;
        }
        self.shared.closed.store(true, Ordering::Release);
        let _ = self.shared.kick.write(1);
        if let Some(thread) = self.thread.take() {
            // It takes no user's lock and waits for no peer.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for SmcListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SmcListener").field("address", &self.local_addr().ok()).finish()
    }
}

/// See [`SmcListener::incoming`].
#[derive(Debug)]
pub struct Incoming<'a>(&'a SmcListener);

impl Iterator for Incoming<'_> {
    type Item = io::Result<SmcStream>;

    fn next(&mut self) -> Option<io::Result<SmcStream>> {
        Some(self.0.accept().map(|(stream, _)| stream))
    }
}

type Queue = VecDeque<io::Result<(SmcStream, SocketAddr)>>;

impl Shared {
    pub(crate) fn tcp(&self) -> &TcpListener {
        &self.tcp
    }

    pub(crate) fn contacts(&self) -> &Arc<Contacts> {
        &self.contacts
    }

    pub(crate) fn kick(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.kick.as_raw_fd()) }
    }

    pub(crate) fn was_kicked(&self) {
        let _ = self.kick.read();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Whether the program has enough to accept.
    pub(crate) fn is_full(&self) -> bool {
        let queue = lock(&self.queue);
        queue.len() >= BACKLOG || queue.back().is_some_and(Result::is_err)
    }

    pub(crate) fn put(&self, stream: SmcStream, from: SocketAddr) {
        self.push(Ok((stream, from)));
    }

    pub(crate) fn put_error(&self, error: io::Error) {
        self.push(Err(error));
    }

    fn push(&self, next: io::Result<(SmcStream, SocketAddr)>) {
        let mut queue = lock(&self.queue);
        if queue.is_empty() {
            let _ = self.ready.write(1);
        }
        queue.push_back(next);
        self.changed.notify_one();
    }

    fn take(&self, queue: &mut Queue) -> Option<io::Result<(SmcStream, SocketAddr)>> {
        let was_full = queue.len() >= BACKLOG || queue.back().is_some_and(Result::is_err);
        let next = queue.pop_front()?;
        if queue.is_empty() {
            let _ = self.ready.read();
        }
        if was_full {
            let _ = self.kick.write(1);
        }
        Some(next)
    }

    fn accept_in_child(&self) -> io::Result<(SmcStream, SocketAddr)> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            match self.tcp.accept() {
                Ok((tcp, from)) => {
                    let stream = SmcStream::fallen(&self.contacts, tcp, Reason::NO_SMCD_DEVICE, None, true)?;
                    return Ok((stream, from));
                }
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && !self.nonblocking.load(Ordering::Relaxed) =>
                {
                    match poll(&mut [PollFd::new(self.tcp.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                        Ok(_) | Err(nix::Error::EINTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}
