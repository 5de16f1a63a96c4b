//! Events: the event queue on the device's side, and the queue from which a program takes those that are for it
//! (`docs/device.md`, 7). What the library itself does about an event is in `device`.

use crate::error::Error;
use crate::proto::event::{EVENT_SIZE, GoneReason};
use crate::proto::ids::{Gid, Token};
use crate::proto::{self, EVENT_QUEUE};
use crate::ram::DmaBuffer;
use crate::sync::lock;
use crate::transport::Transport;
use crate::virtqueue::{Piece, Virtqueue};
use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Buffers of the event queue.
pub(crate) const QUEUE_SIZE: u16 = 128;
/// Events of one device that may wait to be taken by the program before more are dropped: a peer that floods shall
/// not use up this process's memory.
const MAX_WAITING: usize = 1024;

/// The event queue and its buffers.
pub(crate) struct EventQueue {
    queue: Virtqueue,
    buffers: DmaBuffer,
}

impl EventQueue {
    pub(crate) fn new(
        queue: Virtqueue,
        allocate: impl FnOnce(usize) -> Result<DmaBuffer, Error>,
    ) -> Result<EventQueue, Error> {
        let buffers = allocate(EVENT_SIZE * usize::from(queue.layout().size))?;
        let mut events = EventQueue { queue, buffers };
        events.post();
        // The device is kicked after it was started, in any case.
        let _ = events.queue.publish();
        Ok(events)
    }

    pub(crate) fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// Posts every buffer that the device does not have.
    fn post(&mut self) {
        while let Some(head) = self.queue.next_head(1) {
            let address = self.buffers.address() + u64::from(head) * EVENT_SIZE as u64;
            let _ = self.queue.add(&[], &[Piece { address, len: EVENT_SIZE as u32 }]);
        }
    }

    /// Hands every event that is there to `each`, and asks for an interrupt at the next one.
    pub(crate) fn take(
        &mut self,
        transport: &dyn Transport,
        mut each: impl FnMut(proto::event::Event),
    ) -> Result<(), Error> {
        loop {
            while let Some((head, len)) = self.queue.pop()? {
                let mut bytes = [0; EVENT_SIZE];
                self.buffers.memory().read(usize::from(head) * EVENT_SIZE, &mut bytes)?;
                match proto::event::Event::parse(&bytes[..EVENT_SIZE.min(len as usize)]) {
                    Ok(event) => each(event),
                    Err(error) => tracing::debug!("skipping {error}"),
                }
            }
            self.post();
            if self.queue.publish() {
                transport.kick(EVENT_QUEUE);
            }
            if !self.queue.arm() {
                return Ok(());
            }
        }
    }
}

/// Something that happened to a DMB or a device, or that another program had to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// The owner of a DMB that this device has attached ended it.
    DmbUnregistered {
        /// The DMB.
        token: Token,
        /// The owner.
        owner: Gid,
    },
    /// The peer of a DMB that this device owns let it go.
    DmbDetached {
        /// The DMB.
        token: Token,
        /// The peer.
        peer: Gid,
    },
    /// A device with which this one shared a DMB is gone.
    DeviceGone {
        /// The device.
        gid: Gid,
        /// Why.
        reason: GoneReason,
    },
    /// Another device came with a key that this one had [posted](crate::Device::rendezvous).
    Rendezvous {
        /// The other device.
        gid: Gid,
        /// The number that this program gave the key.
        tag: u32,
        /// What the other had to say.
        payload: [u8; 32],
    },
    /// A device with which this one shared a DMB is paused, most likely with its virtual machine. Nothing is lost: what is
    /// sent to it waits, what it has sent is there.
    DevicePaused {
        /// The device.
        gid: Gid,
    },
    /// It goes on.
    DeviceResumed {
        /// The device.
        gid: Gid,
    },
    /// Somebody called [`Device::signal_event`](crate::Device::signal_event).
    Software {
        /// The sender.
        from: Gid,
        /// Free for use.
        code: u32,
        /// Free for use.
        info: u64,
    },
}

impl Event {
    /// The device that the event is about or from.
    fn other(&self) -> Gid {
        match *self {
            Event::DmbUnregistered { owner, .. } => owner,
            Event::DmbDetached { peer, .. } => peer,
            Event::DeviceGone { gid, .. } | Event::DevicePaused { gid } | Event::DeviceResumed { gid } => gid,
            Event::Software { from, .. } => from,
            Event::Rendezvous { gid, .. } => gid,
        }
    }
}

/// Events that wait to be taken by the program.
pub(crate) struct Inbox {
    state: Mutex<InboxState>,
    changed: Condvar,
    /// Readable while there is something to take.
    fd: EventFd,
}

#[derive(Default)]
struct InboxState {
    waiting: VecDeque<Event>,
    /// How many of each device wait.
    per_device: HashMap<Gid, usize>,
    dropped: u64,
    closed: bool,
}

impl Inbox {
    pub(crate) fn new() -> Result<Inbox, Error> {
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
        Ok(Inbox { state: Mutex::default(), changed: Condvar::new(), fd })
    }

    pub(crate) fn put(&self, event: Event) {
        let mut state = lock(&self.state);
        let waiting = state.per_device.entry(event.other()).or_default();
        if *waiting >= MAX_WAITING {
            state.dropped += 1;
            return;
        }
        *waiting += 1;
        if state.waiting.is_empty() && !state.closed {
            let _ = self.fd.write(1);
        }
        state.waiting.push_back(event);
        self.changed.notify_one();
    }

    /// Nothing will come any more.
    pub(crate) fn close(&self) {
        let mut state = lock(&self.state);
        if !state.closed {
            state.closed = true;
            let _ = self.fd.write(1);
            self.changed.notify_all();
        }
    }

    pub(crate) fn dropped(&self) -> u64 {
        lock(&self.state).dropped
    }
}

impl InboxState {
    fn take(&mut self, fd: &EventFd) -> Result<Option<Event>, Error> {
        let Some(event) = self.waiting.pop_front() else {
            return if self.closed { Err(Error::Disconnected) } else { Ok(None) };
        };
        if let Some(count) = self.per_device.get_mut(&event.other()) {
            *count -= 1;
            if *count == 0 {
                self.per_device.remove(&event.other());
            }
        }
        if self.waiting.is_empty() && !self.closed {
            let _ = fd.read();
        }
        Ok(Some(event))
    }
}

/// The events of a device for the program, from [`Device::events`](crate::Device::events). Each is taken once, by
/// whichever clone asks first. At most 1024 of each other device wait; more are dropped and counted.
#[derive(Clone)]
pub struct Events(pub(crate) Arc<Inbox>);

impl Events {
    /// The next event, if there is one.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`] when the daemon is lost and all events were taken.
    pub fn try_next(&self) -> Result<Option<Event>, Error> {
        lock(&self.0.state).take(&self.0.fd)
    }

    /// Waits for the next event; `None` if `timeout` is over first.
    ///
    /// # Errors
    ///
    /// As [`try_next`](Self::try_next).
    pub fn next(&self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut state = lock(&self.0.state);
        loop {
            if let Some(event) = state.take(&self.0.fd)? {
                return Ok(Some(event));
            }
            state = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => return Ok(None),
                Some(left) => {
                    self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl AsFd for Events {
    /// A descriptor that is readable while [`try_next`](Self::try_next) has something to say. Watch it for reading
    /// only.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the inbox, which `self` keeps.
        unsafe { BorrowedFd::borrow_raw(self.0.fd.as_raw_fd()) }
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").field("waiting", &lock(&self.0.state).waiting.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn software(from: u64, info: u64) -> Event {
        Event::Software { from: Gid::from_u64(from), code: 0, info }
    }

    fn readable(events: &Events) -> bool {
        poll(&mut [PollFd::new(events.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    }

    #[test]
    fn the_descriptor_is_readable_while_something_waits() {
        let inbox = Arc::new(Inbox::new().unwrap());
        let events = Events(inbox.clone());
        assert!(!readable(&events));
        inbox.put(software(1, 1));
        inbox.put(software(1, 2));
        assert!(readable(&events));
        assert_eq!(events.next(None).unwrap(), Some(software(1, 1)));
        assert!(readable(&events));
        assert_eq!(events.try_next().unwrap(), Some(software(1, 2)));
        assert!(!readable(&events));
        assert_eq!(events.next(Some(Duration::ZERO)).unwrap(), None);
        inbox.put(software(1, 3));
        inbox.close();
        assert_eq!(events.try_next().unwrap(), Some(software(1, 3)));
        assert!(readable(&events));
        assert!(matches!(events.next(None), Err(Error::Disconnected)));
    }

    #[test]
    fn a_device_that_floods_loses_its_own_events_only() {
        let inbox = Arc::new(Inbox::new().unwrap());
        for i in 0..MAX_WAITING as u64 + 10 {
            inbox.put(software(1, i));
        }
        inbox.put(software(2, 0));
        assert_eq!(inbox.dropped(), 10);
        let events = Events(inbox.clone());
        for i in 0..MAX_WAITING as u64 {
            assert_eq!(events.try_next().unwrap(), Some(software(1, i)));
        }
        assert_eq!(events.try_next().unwrap(), Some(software(2, 0)));
        assert_eq!(events.try_next().unwrap(), None);
        assert!(lock(&inbox.state).per_device.is_empty());
    }
}
