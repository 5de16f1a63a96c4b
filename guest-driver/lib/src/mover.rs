//! Writing into a DMB by moves: the device copies. It works for every DMB of which this device is the peer, whatever
//! the two front-ends can do, and needs no attach.

use crate::device::Core;
use crate::dmb::{DmbState, Port, RemoteDmb};
use crate::error::Error;
use crate::moves::{MoveQueue, Posted, Progress};
use crate::proto::ids::Token;
use crate::proto::moves::{MoveFlags, MoveHeader};
use crate::ram::DmaBuffer;
use crate::shared::SharedMemory;
use crate::sync::lock;
use crate::virtqueue::Piece;
use crate::will::{LastMove, Will};
use std::fmt;
use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Size of the buffer through which data goes that does not lie in a [`MoveBuffer`], in bytes.
const STAGING: usize = 512 << 10;
/// Data is staged in pieces up to this size, so that the device copies one while the next is staged.
const PIECE: usize = STAGING / 4;
/// How long a mover that is dropped waits for its moves.
const DROP_PATIENCE: Duration = Duration::from_secs(10);
/// The longest piece that one descriptor holds here, in bytes.
const MAX_PIECE: u64 = 1 << 30;

/// Memory from which the device moves without another copy: fill it in place. From
/// [`Device::move_buffer`](crate::Device::move_buffer).
#[derive(Clone, Debug)]
pub struct MoveBuffer(DmaBuffer);

impl MoveBuffer {
    pub(crate) fn new(buffer: DmaBuffer) -> MoveBuffer {
        MoveBuffer(buffer)
    }

    /// The memory. What is changed while a move from it is under way may arrive old or new.
    pub fn memory(&self) -> &SharedMemory {
        self.0.memory()
    }

    /// Part of the buffer, to be moved.
    pub fn part(&self, range: Range<usize>) -> MovePart<'_> {
        MovePart { buffer: self, range }
    }
}

/// Part of a [`MoveBuffer`].
#[derive(Clone, Debug)]
pub struct MovePart<'a> {
    buffer: &'a MoveBuffer,
    range: Range<usize>,
}

/// Names a move that was posted by a [`Mover`]. Moves of one mover are done in order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

/// Writes into a DMB by moves. From [`Device::mover`](crate::Device::mover).
///
/// The calls named `post…` return once the device has the move; up to a queue's length can be under way. They report
/// no failure of a move: the next call that waits does (once), for the first move that failed. Moves are done in the
/// order in which they were posted.
pub struct Mover {
    device: Arc<Core>,
    queue: usize,
    token: Token,
    progress: Arc<Progress>,
    staging: Mutex<Staging>,
}

/// A ring of memory, of which what is between `Progress::staged` and `head` is in use.
#[derive(Default)]
struct Staging {
    buffer: Option<DmaBuffer>,
    head: u64,
}

impl Mover {
    /// A mover for a DMB; asks the device whether it exists.
    pub(crate) fn new(device: Arc<Core>, token: Token) -> Result<Mover, Error> {
        let queue = device.next_move_queue();
        let progress = Arc::new(Progress::new());
        let mover = Mover { device, queue, token, progress, staging: Mutex::default() };
        mover.post(0, &[], None)?;
        mover.flush()?;
        Ok(mover)
    }

    /// The DMB.
    pub fn token(&self) -> Token {
        self.token
    }

    /// Writes, and waits until the owner can see it.
    ///
    /// # Errors
    ///
    /// [`Error::Move`] with the device's reason: `NoEntry` if the DMB has ended, `Invalid` if the data does not fit
    /// there.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Error> {
        self.post(offset, data, None)?;
        self.flush()
    }

    /// As [`write`](Self::write), from several pieces to one place.
    ///
    /// # Errors
    ///
    /// As for [`write`](Self::write).
    pub fn write_vectored(&self, offset: u64, data: &[IoSlice<'_>]) -> Result<(), Error> {
        self.post_vectored(offset, data, None)?;
        self.flush()
    }

    /// Sets bits in the owner's mask, and wakes the owner if it sleeps; after all moves that were posted before.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`].
    pub fn signal(&self, mask: u64) -> Result<(), Error> {
        self.post(0, &[], Some(mask)).map(|_| ())
    }

    /// Posts a write of data that is copied, into a buffer of the mover, before this returns. With `signal`, the
    /// owner is signalled after it, as by [`signal`](Self::signal). Long data becomes several moves.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`].
    pub fn post(&self, offset: u64, data: &[u8], signal: Option<u64>) -> Result<Ticket, Error> {
        self.post_vectored(offset, &[IoSlice::new(data)], signal)
    }

    /// As [`post`](Self::post), from several pieces to one place.
    ///
    /// # Errors
    ///
    /// As for [`post`](Self::post).
    pub fn post_vectored(
        &self,
        offset: u64,
        data: &[IoSlice<'_>],
        signal: Option<u64>,
    ) -> Result<Ticket, Error> {
        let mut data = data.iter().map(|piece| &piece[..]).filter(|piece| !piece.is_empty());
        let mut from = data.next().unwrap_or_default();
        let mut left = data.clone().map(<[u8]>::len).sum::<usize>() + from.len();
        let mut staging = lock(&self.staging);
        let mut offset = offset;
        loop {
            let len = left.min(PIECE).min(usize::try_from(self.max_move()).unwrap_or(PIECE));
            left -= len;
            let mut pieces: &[Piece] = &[];
            let piece;
            if len != 0 {
                let at = self.stage(&mut staging, len)?;
                let Staging { buffer: Some(buffer), .. } = &*staging else {
                    unreachable!("it was just staged")
                };
                let mut done = 0;
                while done < len {
                    let part = from.len().min(len - done);
                    buffer.memory().write(at + done, &from[..part])?;
                    done += part;
                    from = &from[part..];
                    if from.is_empty() {
                        from = data.next().unwrap_or_default();
                    }
                }
                piece = [Piece { address: buffer.address() + at as u64, len: len as u32 }];
                pieces = &piece;
            }
            let ticket =
                self.submit(offset, pieces, if left == 0 { signal } else { None }, staging.head, Vec::new())?;
            if left == 0 {
                return Ok(ticket);
            }
            offset = offset.saturating_add(len as u64);
        }
    }

    /// Posts a write from registered memory, without another copy; the parts arrive one after the other from
    /// `offset` on. They are in use until the move is done. With `signal`, the owner is signalled after it.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`] if a part does not lie in its buffer, [`Error::Disconnected`].
    pub fn post_parts(
        &self,
        offset: u64,
        parts: &[MovePart<'_>],
        signal: Option<u64>,
    ) -> Result<Ticket, Error> {
        // What was staged before is free when these are done.
        let staged = lock(&self.staging);
        let max_move = self.max_move();
        let mut pieces = Vec::with_capacity(parts.len());
        for MovePart { buffer, range } in parts {
            let (start, len) = (range.start, range.end.saturating_sub(range.start));
            buffer.memory().get(start, len)?;
            let mut address = buffer.0.address() + start as u64;
            let mut left = len as u64;
            while left != 0 {
                let len = left.min(max_move).min(MAX_PIECE);
                pieces.push((Piece { address, len: len as u32 }, buffer));
                address += len;
                left -= len;
            }
        }
        let max_pieces = self.queue().max_pieces().min(self.device.max_segments());
        let mut offset = offset;
        let mut rest = &pieces[..];
        loop {
            let mut sum = 0;
            let fits = rest.iter().take(max_pieces).take_while(|(piece, _)| {
                sum += u64::from(piece.len);
                sum <= max_move
            });
            let count = fits.count();
            let (now, later) = rest.split_at(count);
            rest = later;
            let keep = now.iter().map(|(_, buffer)| buffer.memory().clone()).collect();
            let now: Vec<_> = now.iter().map(|(piece, _)| *piece).collect();
            let ticket =
                self.submit(offset, &now, if rest.is_empty() { signal } else { None }, staged.head, keep)?;
            if rest.is_empty() {
                return Ok(ticket);
            }
            offset = offset.saturating_add(now.iter().map(|piece| u64::from(piece.len)).sum());
        }
    }

    /// Whether a move is done, well or not.
    ///
    /// # Errors
    ///
    /// [`Error::Contract`] if the device broke the queue.
    pub fn is_done(&self, ticket: Ticket) -> Result<bool, Error> {
        if self.progress.done() < ticket.0 {
            self.queue().take(&self.device)?;
        }
        Ok(self.progress.done() >= ticket.0)
    }

    /// How many moves are under way.
    ///
    /// # Errors
    ///
    /// As for [`is_done`](Self::is_done).
    pub fn under_way(&self) -> Result<u64, Error> {
        self.queue().take(&self.device)?;
        Ok(self.progress.posted() - self.progress.done())
    }

    /// Waits until a move and all before it are done. `Ok(false)`: `timeout` is over first.
    ///
    /// # Errors
    ///
    /// [`Error::Move`] for the first move that failed since the last such error; [`Error::Disconnected`].
    pub fn wait(&self, ticket: Ticket, timeout: Option<Duration>) -> Result<bool, Error> {
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let done = self.queue().wait(&self.device, deadline, || self.progress.done() >= ticket.0)?;
        self.take_failure()?;
        Ok(done)
    }

    /// Waits until everything that was posted is done.
    ///
    /// # Errors
    ///
    /// As for [`wait`](Self::wait).
    pub fn flush(&self) -> Result<(), Error> {
        self.wait(self.last(), None).map(|_| ())
    }

    /// The move that was posted last.
    pub fn last(&self) -> Ticket {
        Ticket(self.progress.posted())
    }

    /// As [`wait`](Self::wait), until a deadline, and whether the moves went well or not.
    pub(crate) fn wait_until(&self, ticket: Ticket, deadline: Option<Instant>) -> Result<bool, Error> {
        self.queue().wait(&self.device, deadline, || self.progress.done() >= ticket.0)
    }

    /// Whether `len` bytes, at most a [`PIECE`], and a word after them can be posted without waiting for the device.
    pub(crate) fn has_room(&self, len: usize) -> Result<bool, Error> {
        self.queue().take(&self.device)?;
        // Who has the buffer now waits for the device, perhaps.
        Ok(self.staging.try_lock().is_ok_and(|staging| self.fits(&staging, len)))
    }

    /// As [`has_room`](Self::has_room), and waits for it.
    pub(crate) fn wait_for_room(&self, len: usize, deadline: Option<Instant>) -> Result<bool, Error> {
        loop {
            self.queue().take(&self.device)?;
            let seen = self.queue().taken();
            let staging = match (self.staging.try_lock(), deadline) {
                (Ok(staging), _) => staging,
                (Err(_), None) => lock(&self.staging),
                (Err(_), Some(deadline)) if Instant::now() < deadline => {
                    std::thread::yield_now();
                    continue;
                }
                (Err(_), Some(_)) => return Ok(false),
            };
            if self.fits(&staging, len) {
                return Ok(true);
            }
            drop(staging);
            // Whatever is in the way is under way.
            if !self.queue().wait(&self.device, deadline, || self.queue().taken() != seen)? {
                return Ok(false);
            }
        }
    }

    fn fits(&self, staging: &Staging, len: usize) -> bool {
        // At worst the data does not fit before the buffer's end, and the word after it neither.
        let most = 2 * (len.next_multiple_of(64) + 64) as u64;
        let used = staging.head - self.progress.staged.load(Ordering::Acquire);
        used + most <= STAGING as u64 && self.queue().has_room()
    }

    /// As [`RemoteDmb::leave_will`].
    pub(crate) fn leave_will(&self, offset: u64, byte: u8, mask: u64) -> Option<Will> {
        let port: Arc<dyn Port> = self.device.clone();
        Will::leave(&port, &LastMove { token: self.token, offset, byte, mask })
    }

    /// Memory that this mover's moves can read.
    pub(crate) fn buffer(&self, size: usize) -> Result<MoveBuffer, Error> {
        self.device.allocate(size, 4096).map(MoveBuffer::new)
    }

    /// Has who waits at `dmb` woken when the next move is done. **Look again after this.** One-shot.
    pub(crate) fn wake_when_done(&self, dmb: &Arc<DmbState>) -> Result<(), Error> {
        self.device.watch_move_queue(self.queue)?;
        self.progress.arm_for(dmb);
        self.queue().take_and_arm().map_err(|e| self.device.give_up(e))
    }

    /// The first failure since this was last asked.
    pub(crate) fn take_failure(&self) -> Result<(), Error> {
        self.progress.take_failure()
    }

    /// For epoll: asks that the descriptor ([`as_fd`](Self::as_fd)) become readable when the next move is done. **Look
    /// again (by [`is_done`](Self::is_done)) after this.** One-shot.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had; [`Error::Disconnected`].
    pub fn arm(&self) -> Result<(), Error> {
        self.device.check()?;
        self.device.watch_move_queue(self.queue)?;
        self.progress.arm()?;
        self.queue().take_and_arm().map_err(|e| self.device.give_up(e))?;
        self.device.check()
    }

    /// The descriptor that becomes readable after [`arm`](Self::arm). Watch it for reading only.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    pub fn as_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        self.progress.as_fd()
    }

    fn queue(&self) -> &MoveQueue {
        self.device.move_queue(self.queue)
    }

    fn max_move(&self) -> u64 {
        self.device.max_move_size()
    }

    /// Finds room for `len` bytes in the staging buffer, and returns where.
    fn stage(&self, staging: &mut Staging, len: usize) -> Result<usize, Error> {
        if staging.buffer.is_none() {
            staging.buffer = Some(self.device.allocate(STAGING, 4096)?);
        }
        // Where words of the data are aligned, those of the copy are.
        let size = STAGING as u64;
        let rounded = len.next_multiple_of(64) as u64;
        let mut at = staging.head % size;
        if at + rounded > size {
            // The rest up to the end stays unused.
            staging.head += size - at;
            at = 0;
        }
        let end = staging.head + rounded;
        let free = || end - self.progress.staged.load(Ordering::Acquire) <= size;
        if !free() {
            self.queue().wait(&self.device, None, free)?;
        }
        staging.head = end;
        Ok(at as usize)
    }

    fn submit(
        &self,
        offset: u64,
        data: &[Piece],
        signal: Option<u64>,
        staged: u64,
        keep: Vec<SharedMemory>,
    ) -> Result<Ticket, Error> {
        let flags = if signal.is_some() { MoveFlags::SIGNAL } else { MoveFlags::empty() };
        let header = MoveHeader { token: self.token, offset, mask: signal.unwrap_or(0), flags };
        let posted = Posted { progress: Some(self.progress.clone()), ticket: 0, staged, _keep: keep };
        self.queue().post(&self.device, &header, data, posted).map(Ticket)
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        if self.progress.done() == self.progress.posted() || self.device.check().is_err() {
            return;
        }
        // The staging buffer must not be used for something else while the device reads it. Moves to who is paused take
        // until that goes on, for which nobody waits here: the buffer is lost instead.
        let deadline = Instant::now() + DROP_PATIENCE;
        if !matches!(self.wait_until(self.last(), Some(deadline)), Ok(true)) {
            std::mem::forget(std::mem::take(&mut *lock(&self.staging)));
        }
    }
}

impl fmt::Debug for Mover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mover").field("token", &self.token).finish()
    }
}

/// A way to write into a DMB, for who does not care which: by mapping where that works, else by moves. From
/// [`Device::sender`](crate::Device::sender).
#[derive(Debug)]
pub enum DmbSender {
    /// This program's stores are the owner's data.
    Map(RemoteDmb),
    /// The device copies.
    Move(Mover),
}

impl DmbSender {
    /// The DMB.
    pub fn token(&self) -> Token {
        match self {
            DmbSender::Map(dmb) => dmb.token(),
            DmbSender::Move(mover) => mover.token(),
        }
    }

    /// Writes; when this returns, `data` may be reused. The owner sees it at the latest when it sees a later
    /// [`signal`](Self::signal).
    ///
    /// # Errors
    ///
    /// If the data does not lie in the DMB; when it is moved, by a later call or by [`flush`](Self::flush).
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), Error> {
        match self {
            DmbSender::Map(dmb) => dmb.write(offset, data),
            DmbSender::Move(mover) => {
                mover.take_failure()?;
                mover.post(offset as u64, data, None).map(|_| ())
            }
        }
    }

    /// Sets bits in the owner's mask, and wakes the owner if it sleeps; what was written before is seen before.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`] if that needs the daemon, and it is lost.
    pub fn signal(&self, mask: u64) -> Result<(), Error> {
        match self {
            DmbSender::Map(dmb) => dmb.signal(mask),
            DmbSender::Move(mover) => mover.signal(mask),
        }
    }

    /// Wakes the owner if it sleeps, without setting bits.
    ///
    /// # Errors
    ///
    /// As for [`signal`](Self::signal).
    pub fn notify(&self) -> Result<(), Error> {
        match self {
            DmbSender::Map(dmb) => dmb.notify(),
            DmbSender::Move(mover) => mover.signal(0),
        }
    }

    /// Waits until all that was written can be seen by the owner.
    ///
    /// # Errors
    ///
    /// As for [`Mover::wait`].
    pub fn flush(&self) -> Result<(), Error> {
        match self {
            DmbSender::Map(_) => Ok(()),
            DmbSender::Move(mover) => mover.flush(),
        }
    }
}
