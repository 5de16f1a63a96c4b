//! How a driver reaches its device: what differs between vhost-user, PCI and a character device, and nothing else.
//!
//! The order of use: [`offered`](Transport::offered), [`accept`](Transport::accept), then the rest;
//! [`start`](Transport::start) once. Dropping the transport resets the device.

pub(crate) mod chardev;
#[cfg(test)]
pub(crate) mod fake;
pub(crate) mod pci;
pub(crate) mod vhost_user;

use crate::error::Error;
use crate::proto::features::Features;
use crate::ram::DmaBuffer;
use crate::virtqueue::Virtqueue;
use crate::will::LastMove;
use crate::window::Window;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

/// A device as its driver sees it.
pub(crate) trait Transport: Send + Sync {
    /// The features that the device offers.
    fn offered(&self) -> Features;

    /// Accepts features, and reads the configuration space, which is constant from then on.
    fn accept(&mut self, features: Features) -> Result<Vec<u8>, Error>;

    /// The window, if the device accepted [`Features::MAP`].
    fn window(&self) -> Option<&Window>;

    /// The largest size that the device accepts for a queue, a power of two; 0 if it has no such queue.
    fn max_queue_size(&self, queue: u16) -> u16;

    /// Starts the device with these queues, in the order of their numbers.
    fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), Error>;

    /// Memory that the device can reach.
    fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error>;

    /// Tells the device that something is in a queue.
    fn kick(&self, queue: u16);

    /// A descriptor that becomes readable when the device has used something of a queue. To be read (8 bytes) to
    /// make it unreadable again.
    fn interrupt(&self, queue: u16) -> BorrowedFd<'_>;

    /// A descriptor that is hung up when the device is gone.
    fn hangup(&self) -> BorrowedFd<'_>;

    /// Ends the connection to a device that broke its contract: [`hangup`](Self::hangup) is hung up from then on.
    fn give_up(&self);

    /// A descriptor that becomes readable when [`serve`](Self::serve) is to be called, if this transport has
    /// something to serve.
    fn requests(&self) -> Option<BorrowedFd<'_>>;

    /// Whether the device does not hear by itself that this process has ended, and has to be told how to find out
    /// (`docs/device.md`, 6.9).
    fn is_deaf(&self) -> bool {
        false
    }

    /// Has a move made when this process ends, where the device does not go with the process; the move's number.
    fn leave_will(&self, _: &LastMove) -> Option<libc::c_ulong> {
        None
    }

    /// That move is not to be made.
    fn withdraw_will(&self, _: libc::c_ulong) {}

    /// Does what the device asks of its front-end, as far as it has asked; does not block.
    fn serve(&self) -> Result<(), Error>;
}

/// What ended a wait for an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken {
    /// An interrupt (now taken), the deadline, or nothing in particular.
    Look,
    /// The device is gone.
    HungUp,
}

/// Waits for an interrupt of a queue, on the calling thread.
pub(crate) fn wait_for_interrupt(
    transport: &dyn Transport,
    queue: u16,
    deadline: Option<Instant>,
) -> Result<Woken, Error> {
    let interrupt = transport.interrupt(queue);
    let mut fds = [
        PollFd::new(interrupt, PollFlags::POLLIN),
        // POLLHUP is always told.
        PollFd::new(transport.hangup(), PollFlags::empty()),
    ];
    let timeout = match deadline {
        None => PollTimeout::NONE,
        // Rounded up, because waiting less than asked for would make callers turn in circles.
        Some(deadline) => deadline
            .saturating_duration_since(Instant::now())
            .saturating_add(Duration::from_micros(999))
            .try_into()
            .unwrap_or(PollTimeout::MAX),
    };
    match poll(&mut fds, timeout) {
        Ok(_) | Err(nix::Error::EINTR) => {}
        Err(errno) => return Err(Error::errno("wait for the device")(errno)),
    }
    if fds[1].any() == Some(true) {
        return Ok(Woken::HungUp);
    }
    if fds[0].any() == Some(true) {
        // Another thread may have taken it; the descriptor does not block.
        let _ = nix::unistd::read(interrupt, &mut [0; 8]);
    }
    Ok(Woken::Look)
}
