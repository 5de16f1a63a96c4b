//! Sockets on tokio (feature `tokio`).

use super::{Smc, SmcListener, SmcStream};
use crate::asynchronous::{Watched, watch};
use crate::stream::Patience;
use crate::sync::lock;
use std::fmt;
use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// A [`SmcStream`] in tokio's tasks. One task reads, one writes (or the same one), as with `tokio::net::TcpStream`.
pub struct AsyncSmcStream {
    fd: AsyncFd<Watched<SmcStream>>,
    wakers: Arc<Wakers>,
}

/// Who waits to read and who to write. Over DMBs, one descriptor tells both.
#[derive(Default)]
struct Wakers {
    read: Mutex<Option<Waker>>,
    write: Mutex<Option<Waker>>,
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        for waiting in [&self.read, &self.write] {
            let waker = lock(waiting).take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Read,
    Write,
}

impl AsyncSmcStream {
    /// As [`Smc::connect`], without holding up the task's thread.
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn connect<A>(smc: &Smc, address: A) -> io::Result<AsyncSmcStream>
    where
        A: ToSocketAddrs + Send + 'static,
    {
        let smc = smc.clone();
        // A handshake takes commands of the device, which are not asynchronous.
        let stream = tokio::task::spawn_blocking(move || smc.connect(address)).await;
        AsyncSmcStream::new(stream.map_err(io::Error::other)??)
    }

    /// To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    ///
    /// # Panics
    ///
    /// As [`AsyncFd::register`] does outside of a runtime with I/O enabled.
    pub fn new(stream: SmcStream) -> io::Result<AsyncSmcStream> {
        stream.set_nonblocking(true)?;
        let fd = stream.readiness_fd()?.as_raw_fd();
        let interest =
            if stream.is_smc() { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
        // SAFETY: a stream's descriptor is closed with it.
        let fd = unsafe { watch(stream, fd, interest) }?;
        Ok(AsyncSmcStream { fd, wakers: Arc::default() })
    }

    /// The connection.
    pub fn get_ref(&self) -> &SmcStream {
        &self.fd.get_ref().what
    }

    /// Does what does not wait, or has the task woken when it is worth trying again.
    fn poll_io<T>(
        &self,
        context: &mut Context<'_>,
        direction: Direction,
        mut attempt: impl FnMut(&SmcStream) -> io::Result<T>,
    ) -> Poll<io::Result<T>> {
        let stream = self.get_ref();
        loop {
            match attempt(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => return Poll::Ready(result),
            }
            if !stream.is_smc() {
                let guard = match direction {
                    Direction::Read => ready!(self.fd.poll_read_ready(context))?,
                    Direction::Write => ready!(self.fd.poll_write_ready(context))?,
                };
                let mut guard = guard;
                guard.clear_ready();
                continue;
            }
            if self.is_ready_after_arming(context, direction)? {
                continue;
            }
            // Both directions wait for one descriptor: it wakes both.
            let waker = Waker::from(self.wakers.clone());
            let mut both = Context::from_waker(&waker);
            ready!(self.fd.poll_read_ready(&mut both))?.clear_ready();
        }
    }

    fn is_ready_after_arming(&self, context: &mut Context<'_>, direction: Direction) -> io::Result<bool> {
        let Wakers { read, write } = &*self.wakers;
        let (mine, other) = if direction == Direction::Read { (read, write) } else { (write, read) };
        *lock(mine) = Some(context.waker().clone());
        // Arming takes back what the descriptor had to tell, which the other direction may not have heard yet.
        let (can_read, can_write) = self.get_ref().arm(true, true)?;
        let (me, it) =
            if direction == Direction::Read { (can_read, can_write) } else { (can_write, can_read) };
        if it && let Some(waker) = lock(other).take() {
            waker.wake();
        }
        if me {
            lock(mine).take();
        }
        Ok(me)
    }
}

impl AsyncRead for AsyncSmcStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let len = ready!(self.poll_io(context, Direction::Read, |stream| {
            stream.read_with(to.initialize_unfilled(), Patience::None)
        }))?;
        to.advance(len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for AsyncSmcStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_io(context, Direction::Write, |stream| stream.write_with(from, Patience::None))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_io(context, Direction::Write, |mut stream| stream.write_vectored(from))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Nothing is held back.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_ref().shutdown(Shutdown::Write) {
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

impl fmt::Debug for AsyncSmcStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get_ref().fmt(f)
    }
}

/// A [`SmcListener`] in tokio's tasks.
pub struct AsyncSmcListener(AsyncFd<Watched<SmcListener>>);

impl AsyncSmcListener {
    /// To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch the listener.
    ///
    /// # Panics
    ///
    /// As [`AsyncSmcStream::new`].
    pub fn new(listener: SmcListener) -> io::Result<AsyncSmcListener> {
        listener.set_nonblocking(true);
        let fd = listener.as_raw_fd();
        // SAFETY: a listener's descriptor is closed with it.
        Ok(AsyncSmcListener(unsafe { watch(listener, fd, Interest::READABLE) }?))
    }

    /// As [`SmcListener::accept`].
    ///
    /// # Errors
    ///
    /// As there.
    pub async fn accept(&self) -> io::Result<(AsyncSmcStream, SocketAddr)> {
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|fd| fd.get_ref().what.accept()) {
                Ok(accepted) => {
                    let (stream, from) = accepted?;
                    return Ok((AsyncSmcStream::new(stream)?, from));
                }
                Err(_would_block) => continue,
            }
        }
    }

    /// The listener.
    pub fn get_ref(&self) -> &SmcListener {
        &self.0.get_ref().what
    }
}

impl fmt::Debug for AsyncSmcListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get_ref().fmt(f)
    }
}
