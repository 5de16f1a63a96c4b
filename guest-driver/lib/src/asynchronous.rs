//! Waiting on tokio (feature `tokio`). What waits here never spins: a task that waits lets others run.

use crate::dmb::Dmb;
use crate::error::Error;
use crate::events::{Event, Events};
use crate::mover::{Mover, Ticket};
use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Something with the descriptor by which it tells that there is something to look at.
pub(crate) struct Watched<T> {
    pub(crate) what: T,
    /// Open as long as `what`.
    fd: RawFd,
}

impl<T> AsRawFd for Watched<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

/// Has the runtime watch a descriptor.
///
/// # Safety
///
/// `fd` is open, and the same file, as long as `what` lives.
///
/// # Panics
///
/// As [`AsyncFd::register`] does outside of a runtime with I/O enabled.
pub(crate) unsafe fn watch<T>(what: T, fd: RawFd, interest: Interest) -> Result<AsyncFd<Watched<T>>, Error> {
    let watched = Watched { what, fd };
    // SAFETY: `AsyncFd` owns `what`, and the descriptor that is told never changes; the rest is the caller's promise.
    let watched = unsafe { AsyncFd::register_with_interest(watched, interest) };
    watched.map_err(|error| Error::os("have the runtime watch a descriptor")(error.into()))
}

/// Waits until the descriptor tells again.
async fn told<T>(fd: &AsyncFd<Watched<T>>) -> Result<(), Error> {
    let mut told = fd.readable().await.map_err(Error::os("wait for a descriptor"))?;
    told.clear_ready();
    Ok(())
}

/// A [`Dmb`] to wait on in a task.
pub struct AsyncDmb(AsyncFd<Watched<Dmb>>);

impl AsyncDmb {
    /// To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    ///
    /// # Panics
    ///
    /// As [`AsyncFd::register`] does outside of a runtime with I/O enabled.
    pub fn new(dmb: Dmb) -> Result<AsyncDmb, Error> {
        let fd = dmb.as_fd()?.as_raw_fd();
        // SAFETY: a DMB's descriptor is closed with it.
        unsafe { watch(dmb, fd, Interest::READABLE) }.map(AsyncDmb)
    }

    /// As [`Dmb::wait`]: the bits that the peer signalled, at least one.
    ///
    /// # Errors
    ///
    /// As for [`Dmb::wait_until`].
    pub async fn wait(&mut self) -> Result<u64, Error> {
        let mut bits = 0;
        let dmb = &self.0.get_ref().what;
        wait_until(&self.0, || {
            bits = dmb.take_signals();
            bits != 0
        })
        .await?;
        Ok(bits)
    }

    /// As [`Dmb::wait_until`], without a deadline: drop the future to give up.
    ///
    /// # Errors
    ///
    /// As for [`Dmb::wait_until`].
    pub async fn wait_until(&mut self, ready: impl FnMut() -> bool) -> Result<(), Error> {
        wait_until(&self.0, ready).await
    }

    /// The DMB.
    pub fn into_inner(self) -> Dmb {
        self.0.into_inner().what
    }
}

async fn wait_until(fd: &AsyncFd<Watched<Dmb>>, mut ready: impl FnMut() -> bool) -> Result<(), Error> {
    let dmb = &fd.get_ref().what;
    loop {
        if ready() {
            return Ok(());
        }
        dmb.arm()?;
        if ready() {
            dmb.disarm();
            return Ok(());
        }
        if let Some(end) = dmb.end() {
            return if ready() { Ok(()) } else { Err(end) };
        }
        told(fd).await?;
    }
}

impl Deref for AsyncDmb {
    type Target = Dmb;

    fn deref(&self) -> &Dmb {
        &self.0.get_ref().what
    }
}

/// [`Events`] to wait for in a task.
pub struct AsyncEvents(AsyncFd<Watched<Events>>);

impl AsyncEvents {
    /// To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If the runtime cannot watch the descriptor.
    ///
    /// # Panics
    ///
    /// As [`AsyncDmb::new`].
    pub fn new(events: Events) -> Result<AsyncEvents, Error> {
        let fd = events.as_fd().as_raw_fd();
        // SAFETY: the descriptor of events is closed with the last clone.
        unsafe { watch(events, fd, Interest::READABLE) }.map(AsyncEvents)
    }

    /// As [`Events::next`], without a timeout.
    ///
    /// # Errors
    ///
    /// As for [`Events::try_next`].
    pub async fn next(&mut self) -> Result<Event, Error> {
        let events = &self.0.get_ref().what;
        loop {
            if let Some(event) = events.try_next()? {
                return Ok(event);
            }
            let mut told = self.0.readable().await.map_err(Error::os("wait for a descriptor"))?;
            if let Some(event) = events.try_next()? {
                return Ok(event);
            }
            told.clear_ready();
        }
    }
}

/// A [`Mover`] whose moves are waited for in a task. Posting is as with [`Mover`]: it waits, for a moment, only
/// while as many moves as the queue holds are under way.
pub struct AsyncMover(AsyncFd<Watched<Mover>>);

impl AsyncMover {
    /// To be called in a runtime.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    ///
    /// # Panics
    ///
    /// As [`AsyncDmb::new`].
    pub fn new(mover: Mover) -> Result<AsyncMover, Error> {
        let fd = mover.as_fd()?.as_raw_fd();
        // SAFETY: a mover's descriptor is closed with it.
        unsafe { watch(mover, fd, Interest::READABLE) }.map(AsyncMover)
    }

    /// Waits until a move and all before it are done.
    ///
    /// # Errors
    ///
    /// As for [`Mover::wait`].
    pub async fn wait(&mut self, ticket: Ticket) -> Result<(), Error> {
        let mover = &self.0.get_ref().what;
        while !mover.is_done(ticket)? {
            mover.arm()?;
            if mover.is_done(ticket)? {
                break;
            }
            told(&self.0).await?;
        }
        mover.take_failure()
    }

    /// Waits until everything that was posted is done.
    ///
    /// # Errors
    ///
    /// As for [`Mover::wait`].
    pub async fn flush(&mut self) -> Result<(), Error> {
        let last = self.last();
        self.wait(last).await
    }
}

impl Deref for AsyncMover {
    type Target = Mover;

    fn deref(&self) -> &Mover {
        &self.0.get_ref().what
    }
}

impl fmt::Debug for AsyncDmb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl fmt::Debug for AsyncEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.get_ref().what.fmt(f)
    }
}

impl fmt::Debug for AsyncMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
