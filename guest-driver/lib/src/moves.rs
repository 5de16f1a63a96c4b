//! A move queue: posting moves, taking completions, waiting for them (`docs/device.md`, 10). What users see is in
//! `mover`.
//!
//! A queue is shared by several movers and by whoever rings. Whoever looks takes all completions and books them
//! where they belong; of several threads that wait, one sleeps on the queue's interrupt and wakes the others.

use crate::device::Core;
use crate::dmb::DmbState;
use crate::error::Error;
use crate::proto::moves::{HEADER_SIZE, MoveHeader, RESPONSE_SIZE};
use crate::proto::status::Status;
use crate::ram::DmaBuffer;
use crate::shared::SharedMemory;
use crate::sync::lock;
use crate::transport::{Woken, wait_for_interrupt};
use crate::virtqueue::{Piece, Virtqueue};
use crate::wait::{Awaited, Spinner};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Descriptors of a move queue.
pub(crate) const QUEUE_SIZE: u16 = 256;
/// Each head has so many bytes for its header and its answer.
const SLOT: usize = 64;

/// A move queue.
pub(crate) struct MoveQueue {
    number: u16,
    state: Mutex<State>,
    /// The sleeper woke up: there may be completions, and another one may have to sleep on the interrupt.
    changed: Condvar,
    /// Completions taken in all.
    taken: AtomicU64,
    spinner: Spinner,
}

struct State {
    queue: Virtqueue,
    slots: DmaBuffer,
    /// By head.
    posted: Box<[Option<Posted>]>,
    /// Whether a thread sleeps on the interrupt.
    sleeper: bool,
}

/// What a move that the device has belongs to.
pub(crate) struct Posted {
    /// Whom to tell. Nobody wants to know of a ring.
    pub(crate) progress: Option<Arc<Progress>>,
    /// Filled in when it is posted.
    pub(crate) ticket: u64,
    /// How far its mover's staging buffer is free after it.
    pub(crate) staged: u64,
    /// Memory that the device reads.
    pub(crate) _keep: Vec<SharedMemory>,
}

/// How far a mover's moves are.
pub(crate) struct Progress {
    posted: AtomicU64,
    done: AtomicU64,
    pub(crate) staged: AtomicU64,
    /// The first failure that was not reported yet.
    failed: Mutex<Option<Status>>,
    fd: OnceLock<EventFd>,
    fd_armed: AtomicBool,
    /// Who waits at a DMB of this side for moves to be done.
    waiter: Mutex<Option<Arc<DmbState>>>,
}

impl Progress {
    pub(crate) fn new() -> Progress {
        Progress {
            posted: AtomicU64::new(0),
            done: AtomicU64::new(0),
            staged: AtomicU64::new(0),
            failed: Mutex::new(None),
            fd: OnceLock::new(),
            fd_armed: AtomicBool::new(false),
            waiter: Mutex::new(None),
        }
    }

    /// Number of the last move that was posted.
    pub(crate) fn posted(&self) -> u64 {
        self.posted.load(Ordering::Acquire)
    }

    /// Number of the last move that is done; all before it are.
    pub(crate) fn done(&self) -> u64 {
        self.done.load(Ordering::Acquire)
    }

    /// The first failure since this was last asked.
    pub(crate) fn take_failure(&self) -> Result<(), Error> {
        lock(&self.failed).take().map_or(Ok(()), |status| Err(Error::Move(status)))
    }

    fn complete(&self, posted: &Posted, result: Result<(), Status>) -> Result<(), Error> {
        if posted.ticket != self.done.load(Ordering::Relaxed) + 1 {
            return Err(Error::Contract("moves of one queue came back out of order"));
        }
        if let Err(status) = result {
            lock(&self.failed).get_or_insert(status);
        }
        self.staged.store(posted.staged, Ordering::Release);
        self.done.store(posted.ticket, Ordering::Release);
        self.tell_fd();
        Ok(())
    }

    fn tell_fd(&self) {
        if self.fd_armed.swap(false, Ordering::AcqRel) {
            if let Some(fd) = self.fd.get() {
                let _ = fd.write(1);
            }
            if let Some(dmb) = lock(&self.waiter).take() {
                dmb.notify();
            }
        }
    }

    fn eventfd(&self) -> Result<&EventFd, Error> {
        if let Some(fd) = self.fd.get() {
            return Ok(fd);
        }
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
        Ok(self.fd.get_or_init(|| fd))
    }

    /// The descriptor that becomes readable by the next completion after [`arm`](Self::arm).
    pub(crate) fn as_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        // SAFETY: the descriptor is open as long as `self`.
        self.eventfd().map(|fd| unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) })
    }

    pub(crate) fn arm(&self) -> Result<(), Error> {
        let _ = self.eventfd()?.read();
        self.fd_armed.store(true, Ordering::Release);
        Ok(())
    }

    /// As [`arm`](Self::arm), for who waits at a DMB.
    pub(crate) fn arm_for(&self, dmb: &Arc<DmbState>) {
        *lock(&self.waiter) = Some(dmb.clone());
        self.fd_armed.store(true, Ordering::Release);
    }
}

impl State {
    /// Takes every completion that is there.
    fn take(&mut self, taken: &AtomicU64) -> Result<(), Error> {
        while let Some((head, len)) = self.queue.pop()? {
            let posted = self.posted[usize::from(head)].take();
            let posted = posted.ok_or(Error::Contract("a move came back that was not posted"))?;
            if len as usize != RESPONSE_SIZE {
                return Err(Error::Contract("a move came back without an answer"));
            }
            let status = self.slots.memory().slice(..).read_u8(usize::from(head) * SLOT + HEADER_SIZE);
            let result = Status::from_byte(status)
                .map_err(|_| Error::Contract("a move's status is not one of version 1"))?;
            // A ring that failed has no owner to wake any more; who rings learns that by an event.
            if let Some(progress) = &posted.progress {
                progress.complete(&posted, result)?;
            }
            // Last: who sees it sees the rest.
            taken.fetch_add(1, Ordering::Release);
        }
        Ok(())
    }
}

impl MoveQueue {
    pub(crate) fn new(
        number: u16,
        queue: Virtqueue,
        (spin, awaited): (Duration, Awaited),
        allocate: impl FnOnce(usize) -> Result<DmaBuffer, Error>,
    ) -> Result<MoveQueue, Error> {
        let size = usize::from(queue.layout().size);
        let state = State {
            queue,
            slots: allocate(size * SLOT)?,
            posted: std::iter::repeat_with(|| None).take(size).collect(),
            sleeper: false,
        };
        Ok(MoveQueue {
            number,
            state: Mutex::new(state),
            changed: Condvar::new(),
            taken: AtomicU64::new(0),
            spinner: Spinner::new(spin, awaited),
        })
    }

    pub(crate) fn number(&self) -> u16 {
        self.number
    }

    /// Calls `f` with the queue.
    pub(crate) fn with_queue<T>(&self, f: impl FnOnce(&Virtqueue) -> T) -> T {
        f(&lock(&self.state).queue)
    }

    /// The most pieces of data that a move can have.
    pub(crate) fn max_pieces(&self) -> usize {
        lock(&self.state).queue.max_chain() - 2
    }

    /// Posts a move, and kicks the device if it asked for that. Waits while the queue is full. Returns the move's
    /// number among those of its mover.
    pub(crate) fn post(
        &self,
        device: &Core,
        header: &MoveHeader,
        data: &[Piece],
        posted: Posted,
    ) -> Result<u64, Error> {
        self.post_unchecked(device, header, data, posted).map_err(|e| device.give_up(e))
    }

    /// [`post`](Self::post), but for what follows from a device that broke its contract, for which no lock may be held.
    fn post_unchecked(
        &self,
        device: &Core,
        header: &MoveHeader,
        data: &[Piece],
        mut posted: Posted,
    ) -> Result<u64, Error> {
        let mut state = loop {
            device.check()?;
            let mut state = lock(&self.state);
            if state.queue.next_head(data.len() + 2).is_some() {
                break state;
            }
            state.take(&self.taken)?;
            if state.queue.next_head(data.len() + 2).is_some() {
                break state;
            }
            let seen = self.taken();
            drop(state);
            self.wait(device, None, || self.taken() != seen)?;
        };
        let State { queue, slots, posted: table, .. } = &mut *state;
        let Some(head) = queue.next_head(data.len() + 2) else { unreachable!("there was room just now") };
        let slot = usize::from(head) * SLOT;
        slots.memory().write(slot, &header.to_bytes())?;
        let address = slots.address() + slot as u64;
        let answer = Piece { address: address + HEADER_SIZE as u64, len: RESPONSE_SIZE as u32 };
        // The header, and after it the data.
        let mut pieces = [Piece { address, len: HEADER_SIZE as u32 }; crate::virtqueue::MAX_CHAIN];
        pieces[1..=data.len()].copy_from_slice(data);
        if queue.add(&pieces[..=data.len()], &[answer]) != Some(head) {
            unreachable!("the queue foretold this head");
        }
        if let Some(progress) = &posted.progress {
            posted.ticket = progress.posted.fetch_add(1, Ordering::AcqRel) + 1;
        }
        let ticket = posted.ticket;
        table[usize::from(head)] = Some(posted);
        let kick = queue.publish();
        drop(state);
        if kick {
            device.transport().kick(self.number);
        }
        Ok(ticket)
    }

    /// How many completions were taken in all.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Acquire)
    }

    /// Whether there is room for more than one move.
    pub(crate) fn has_room(&self) -> bool {
        lock(&self.state).queue.has_room()
    }

    /// Takes the completions that are there.
    pub(crate) fn take(&self, device: &Core) -> Result<(), Error> {
        let result = lock(&self.state).take(&self.taken);
        result.map_err(|e| device.give_up(e))
    }

    /// Takes the completions that are there, and asks for an interrupt at the next one: for the reactor.
    pub(crate) fn take_and_arm(&self) -> Result<(), Error> {
        let mut state = lock(&self.state);
        loop {
            state.take(&self.taken)?;
            if !state.queue.arm() {
                // Others may wait for what was taken.
                self.changed.notify_all();
                return Ok(());
            }
        }
    }

    /// Takes completions until `until` says so; `Ok(false)`: the deadline is over.
    pub(crate) fn wait(
        &self,
        device: &Core,
        deadline: Option<Instant>,
        until: impl Fn() -> bool,
    ) -> Result<bool, Error> {
        let mut failure = None;
        let mut look = || {
            until() || {
                failure = self.take(device).err();
                failure.is_some() || until()
            }
        };
        if look() {
            return failure.map_or(Ok(true), Err);
        }
        let start = match self.spinner.spin(deadline, &mut look, || device.check().is_err()) {
            Ok(()) => return failure.map_or(Ok(true), Err),
            Err(start) => start,
        };
        let result = self.sleep(device, deadline, &until).map_err(|e| device.give_up(e));
        if matches!(result, Ok(true)) {
            self.spinner.slept(start.elapsed());
        }
        result
    }

    fn sleep(
        &self,
        device: &Core,
        deadline: Option<Instant>,
        until: &dyn Fn() -> bool,
    ) -> Result<bool, Error> {
        let mut state = lock(&self.state);
        loop {
            state.take(&self.taken)?;
            if until() {
                return Ok(true);
            }
            device.check()?;
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Ok(false);
            }
            if state.sleeper {
                state = self.wait_for_sleeper(state, left);
            } else if !state.queue.arm() {
                state.sleeper = true;
                drop(state);
                let woken = wait_for_interrupt(device.transport(), self.number, deadline);
                if matches!(woken, Ok(Woken::HungUp)) {
                    // What was done before can still be taken: once more around.
                    device.set_lost();
                }
                state = lock(&self.state);
                state.sleeper = false;
                self.changed.notify_all();
                woken?;
            }
        }
    }

    fn wait_for_sleeper<'a>(
        &self,
        state: MutexGuard<'a, State>,
        left: Option<Duration>,
    ) -> MutexGuard<'a, State> {
        match left {
            Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }

    /// The device is gone: who waits with a descriptor shall look.
    pub(crate) fn tell_all(&self) {
        for posted in lock(&self.state).posted.iter().flatten() {
            if let Some(progress) = &posted.progress {
                progress.tell_fd();
            }
        }
        self.changed.notify_all();
    }
}
