//! One TCP connection: what of it goes over TCP, what over DMBs, and how it moves over (`docs/run.md`).
//!
//! The state lies in memory that forked processes share. Each direction switches alone, once, at a position of its TCP
//! stream: the sender decides it, the receiver reads TCP up to there and then the ring. From then on the sender's direction
//! of the TCP connection carries bytes without a meaning, which wake who sleeps in the kernel on the socket.

use crate::errno::{self, Outcome};
use crate::header::{DATA, Header, ROOM, SIZE};
use crate::iov::{Reader, Writer};
use crate::lock::Lock;
use crate::{crowd, real, signal, stats, tcp};
use dmbridge::Spinner;
use dmbridge_proto::line::ControlLine;
use dmbridge_proto::shm::{self, CopyPlan};
use dmbridge_proto::smc::cdc::{CursorWord, ProducerFlags, StateFlags};
use dmbridge_proto::smc::cursor::Cursor;
use dmbridge_proto::smc::ring::{Consumer, Producer};
use libc::{EAGAIN, ECONNRESET, EPIPE, MSG_DONTWAIT, MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC, MSG_WAITALL, c_int};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

mod back;
pub use back::{Leaving, Staying, Step, after_fork, waiting};

/// A piece of a long write that the peer is told of: it can read it while the next one is being written.
const PIECE: usize = 128 << 10;
/// What a gate says when it is closed: nobody enters the kernel as if the connection were TCP alone.
const CLOSED: u32 = 1 << 31;
/// What `put` says of a direction that is TCP again; no call of the kernel for a socket does.
const BACK: c_int = libc::ENOTBLK;
/// How long a call sleeps on a connection that an epoll instance watches too.
const WATCHED: Duration = Duration::from_millis(10);
/// So many bytes that woke may wait to be taken away, and are acknowledged together. TCP sends no more than ten segments,
/// sometimes four, before an acknowledgement, which for a few bytes takes its time: a byte that has to wait for it would
/// wake too late.
const MOST_UNEATEN: u64 = 2;
/// How long a writer sleeps at most before it looks whether its peer lives, where the kernel could not wake it for that.
const MOST_PATIENCE: Duration = Duration::from_millis(20);
/// An empty ring says nothing of a peer that has died; the kernel is asked again after so long.
const LOOK: Duration = Duration::from_millis(1);

/// Where a connection stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum State {
    /// No connection.
    Free = 0,
    /// TCP.
    Plain = 1,
    /// TCP; the other end is being looked for.
    Asking = 2,
    /// Both ends have their rings; each direction switches when it can.
    Linked = 3,
    /// TCP for ever.
    Over = 4,
    /// All descriptors were closed; the rings are still held.
    Orphan = 5,
}

/// A connection.
#[repr(C)]
pub struct Conn {
    state: AtomicU8,
    /// The next life of this memory is another connection.
    pub life: AtomicU32,
    /// Processes that have descriptors of it.
    refs: AtomicU32,
    pub weight: AtomicU32,
    /// What makes it a candidate again.
    pub threshold: AtomicU32,
    /// This end called `connect`.
    active: AtomicBool,
    nonblocking: AtomicBool,
    /// It is registered with an epoll instance.
    watched: AtomicBool,
    /// What the program set, and gets back; the kernel's is always on once the connection is linked.
    pub nodelay: AtomicU32,
    pub cork: AtomicU32,
    /// Our ring, which the peer writes; and the peer's.
    local: AtomicPtr<u8>,
    remote: AtomicPtr<u8>,
    /// The control line of the peer's DMB: its counters are what the daemon shows.
    line: AtomicPtr<u8>,
    plan: UnsafeCell<CopyPlan>,
    /// The peer closed, or died, without a word in the ring.
    eof: AtomicBool,
    /// An error that TCP reported, or a peer that broke the protocol; 0: none.
    error: AtomicU32,
    /// What the kernel calls the socket.
    pub cookie: AtomicU64,
    /// The process whose thread holds the rings and can bring the connection back; 0: none.
    pub home: AtomicU32,
    /// Processes that have it by `exec`, and thus not its rings.
    pub strangers: AtomicU32,
    /// The device at the other end, as the halves of its GID, and the token of its DMB.
    pub peer: [AtomicU64; 3],
    /// Somebody waits for the connection to come back; see `back.rs`.
    pub wanted: AtomicU32,
    /// What our ring's header says as long as it is ours: see [`is_gone`](Self::is_gone).
    alive: AtomicU64,
    tx: Tx,
    rx: Rx,
}

/// The direction to the peer.
#[repr(C, align(64))]
struct Tx {
    /// Threads that are in the kernel to write, and [`CLOSED`] once the direction has switched.
    gate: AtomicU32,
    lock: Lock,
    ring: UnsafeCell<Producer>,
    /// `ring`'s cursor, for who does not hold the lock.
    cursor: AtomicU64,
    size: AtomicU32,
    state: AtomicU8,
    /// The program was told that there is no room.
    full: AtomicBool,
    /// A wake-up is owed that could not be sent because the direction had not switched.
    owed: AtomicBool,
    /// Threads that send a byte to wake, and [`CLOSED`] once there are to be no more of them.
    wakers: AtomicU32,
    /// The direction is TCP again.
    returned: AtomicBool,
    bytes: AtomicU64,
    spinner: UnsafeCell<Spinner>,
}

/// The direction from the peer.
#[repr(C, align(64))]
struct Rx {
    /// Threads that are in the kernel to read, and [`CLOSED`] once readers know of the ring.
    gate: AtomicU32,
    lock: Lock,
    ring: UnsafeCell<Consumer>,
    cursor: AtomicU64,
    /// The peer's word as it was last read under the lock.
    seen: UnsafeCell<CursorWord>,
    /// All of TCP's data has been read: what comes next is in the ring.
    on_ring: AtomicBool,
    /// The direction is TCP again.
    returned: AtomicBool,
    /// Wake-up bytes that were read.
    eaten: AtomicU64,
    /// A byte of the stream that was taken for one that wakes, with 0x100; 0: none.
    stray: AtomicU32,
    /// Threads that sleep in the kernel for data.
    sleepers: AtomicU32,
    /// When the kernel was last asked, in ms.
    looked: AtomicU64,
    shut: AtomicBool,
    bytes: AtomicU64,
    spinner: UnsafeCell<Spinner>,
}

// SAFETY: the cells in `tx` and `rx` are accessed under their locks (the spinners have atomics only), `plan` is written before
// `state` says that the connection is linked.
unsafe impl Sync for Conn {}

/// What both ends of a connection have when they have met.
pub struct Rings {
    pub local: *mut u8,
    pub local_len: usize,
    pub remote: *mut u8,
    pub remote_len: usize,
    pub line: *mut u8,
    pub plan: CopyPlan,
    /// See [`Conn::peer`].
    pub peer: [u64; 3],
}

impl Conn {
    /// Takes a free one: this process holds it.
    pub fn take(&self) -> bool {
        let taken = self.state.compare_exchange(
            State::Free as u8,
            State::Plain as u8,
            Ordering::AcqRel,
            Ordering::Relaxed,
        );
        if taken.is_err() {
            return false;
        }
        self.life.fetch_add(1, Ordering::Relaxed);
        self.refs.store(1, Ordering::Relaxed);
        self.weight.store(0, Ordering::Relaxed);
        self.threshold.store(crate::table::PROVEN, Ordering::Relaxed);
        self.eof.store(false, Ordering::Relaxed);
        self.error.store(0, Ordering::Relaxed);
        self.watched.store(false, Ordering::Relaxed);
        for word in [&self.home, &self.strangers, &self.wanted, &self.tx.wakers, &self.rx.stray] {
            word.store(0, Ordering::Relaxed);
        }
        self.tx.returned.store(false, Ordering::Relaxed);
        self.rx.returned.store(false, Ordering::Relaxed);
        for at in [&self.local, &self.remote, &self.line] {
            at.store(null_mut(), Ordering::Relaxed);
        }
        self.tx.gate.store(0, Ordering::Relaxed);
        self.tx.lock.reset();
        self.tx.state.store(0, Ordering::Relaxed);
        self.tx.full.store(false, Ordering::Relaxed);
        self.tx.owed.store(false, Ordering::Relaxed);
        self.tx.cursor.store(0, Ordering::Relaxed);
        self.tx.bytes.store(0, Ordering::Relaxed);
        self.rx.gate.store(0, Ordering::Relaxed);
        self.rx.lock.reset();
        self.rx.on_ring.store(false, Ordering::Relaxed);
        self.rx.eaten.store(0, Ordering::Relaxed);
        self.rx.sleepers.store(0, Ordering::Relaxed);
        self.rx.cursor.store(0, Ordering::Relaxed);
        self.rx.shut.store(false, Ordering::Relaxed);
        self.rx.bytes.store(0, Ordering::Relaxed);
        true
    }

    pub fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            1 => State::Plain,
            2 => State::Asking,
            3 => State::Linked,
            4 => State::Over,
            5 => State::Orphan,
            _ => State::Free,
        }
    }

    /// Goes from one state to the next, if it is in that one.
    pub fn change(&self, from: State, to: State) -> bool {
        self.state.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether it is TCP, and might not stay so.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.state() == State::Plain
    }

    /// Whether it is TCP for ever.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.state() == State::Over
    }

    pub fn orphan(&self) {
        self.state.store(State::Orphan as u8, Ordering::Release);
    }

    pub fn add_ref(&self) {
        self.refs.fetch_add(1, Ordering::AcqRel);
    }

    /// True if that was the last process.
    pub fn remove_ref(&self) -> bool {
        self.refs.fetch_sub(1, Ordering::AcqRel) == 1
    }

    pub fn refs(&self) -> u32 {
        self.refs.load(Ordering::Acquire)
    }

    /// Nobody uses it, and its rings are given back.
    pub fn free(&self) {
        self.state.store(State::Free as u8, Ordering::Release);
    }

    pub fn set_active(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    pub fn set_nonblocking(&self, on: bool) {
        self.nonblocking.store(on, Ordering::Relaxed);
    }

    /// Bytes that were sent and received over rings.
    pub fn bytes(&self) -> (u64, u64) {
        (self.tx.bytes.load(Ordering::Relaxed), self.rx.bytes.load(Ordering::Relaxed))
    }

    /// Whether it has moved, even if it is TCP again.
    pub fn has_rings(&self) -> bool {
        !self.local.load(Ordering::Acquire).is_null()
    }

    /// Whether anything of it may be in rings: then its calls cannot simply be the kernel's.
    #[inline]
    pub fn is_moved(&self) -> bool {
        self.rx.gate.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Both ends have met: from now on directions may switch. The state was [`State::Asking`].
    pub fn link(&self, fd: c_int, rings: &Rings) {
        // SAFETY: the state is not Linked yet, so nobody else uses these.
        unsafe {
            *self.plan.get() = rings.plan;
            *self.tx.ring.get() = Producer::new((rings.remote_len - SIZE) as u32);
            *self.rx.ring.get() = Consumer::new((rings.local_len - SIZE) as u32);
            *self.rx.seen.get() = CursorWord::default();
            self.tx.spinner.get().write(Spinner::local(dmbridge::DEFAULT_SPIN));
            self.rx.spinner.get().write(Spinner::local(dmbridge::DEFAULT_SPIN));
        }
        self.tx.size.store((rings.remote_len - SIZE) as u32, Ordering::Relaxed);
        self.local.store(rings.local, Ordering::Release);
        self.line.store(rings.line, Ordering::Release);
        self.remote.store(rings.remote, Ordering::Release);
        self.alive.store(crate::random() | 1, Ordering::Relaxed);
        self.local().alive.store(self.alive.load(Ordering::Relaxed), Ordering::Release);
        self.remote().cdc.init();
        // A wake-up must not wait for an acknowledgement, nor for more to come.
        self.nodelay.store(tcp::option(fd, libc::TCP_NODELAY).unwrap_or(0), Ordering::Relaxed);
        self.cork.store(tcp::option(fd, libc::TCP_CORK).unwrap_or(0), Ordering::Relaxed);
        tcp::set_option(fd, libc::TCP_CORK, 0);
        tcp::set_option(fd, libc::TCP_NODELAY, 1);
        tcp::set_plain_congestion_control(fd);
        self.set_nonblocking(tcp::is_nonblocking(fd));
        for (to, number) in self.peer.iter().zip(rings.peer) {
            to.store(number, Ordering::Relaxed);
        }
        self.home.store(std::process::id(), Ordering::Release);
        if self.change(State::Asking, State::Linked) {
            self.close_rx_gate();
        }
    }

    fn local(&self) -> &Header {
        // SAFETY: set by `link` to a DMB that stays mapped while the connection is linked.
        unsafe { Header::at(self.local.load(Ordering::Acquire)) }
    }

    fn remote(&self) -> &Header {
        // SAFETY: as above.
        unsafe { Header::at(self.remote.load(Ordering::Acquire)) }
    }

    /// Whether the memory of our ring was taken away, with the device: then other memory is in its place, and what was read
    /// before this was asked is worth something only if it is not so.
    #[inline]
    pub fn is_gone(&self) -> bool {
        fence(Ordering::Acquire);
        self.local().alive.load(Ordering::Acquire) != self.alive.load(Ordering::Relaxed)
    }

    /// The memory was taken away: nobody shall wait for it, and the other end learns that this is no end in good order.
    pub fn abandon(&self, fd: c_int) {
        self.break_off();
        tcp::reset_at_close(fd);
        // SAFETY: no memory is involved.
        errno::keep(|| unsafe { real::shutdown(fd, libc::SHUT_RD) });
    }

    fn line(&self) -> &ControlLine {
        // SAFETY: as above: its control line.
        unsafe { ControlLine::from_ptr(self.line.load(Ordering::Relaxed)) }
    }

    /// Readers know of the ring from now on, if none is in the kernel as if it were TCP alone.
    fn close_rx_gate(&self) -> bool {
        if self.rx.gate.compare_exchange(0, CLOSED, Ordering::SeqCst, Ordering::Relaxed).is_err() {
            return self.is_moved();
        }
        // Who sleeps in the kernel on this descriptor now is woken by the first bytes in the ring.
        self.local().arm(DATA | ROOM, 0);
        self.remote().ready.store(1, Ordering::Release);
        true
    }

    /// Enters the kernel to read as if it were TCP alone. False: readers know of the ring.
    #[inline]
    fn enter_rx(&self) -> bool {
        if self.is_moved() || (self.state() == State::Linked && self.close_rx_gate()) {
            return false;
        }
        if self.rx.gate.fetch_add(1, Ordering::SeqCst) & CLOSED != 0 {
            self.rx.gate.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        true
    }

    fn leave_rx(&self) {
        self.rx.gate.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether this side's bytes go into the ring.
    #[inline]
    fn tx_switched(&self) -> bool {
        self.tx.gate.load(Ordering::Acquire) & CLOSED != 0
    }

    /// Whether this side's bytes go into the ring, and nowhere else.
    #[inline]
    fn tx_in_ring(&self) -> bool {
        self.tx_switched() && !self.tx.returned.load(Ordering::Relaxed)
    }

    /// 1 + where in the peer's TCP stream its ring begins; 0: it has none yet, or no more.
    #[inline]
    fn ring_begins(&self) -> u64 {
        if self.rx.returned.load(Ordering::Relaxed) { 0 } else { self.local().switch.load(Ordering::Acquire) }
    }

    /// Switches the direction to the peer, if both sides' readers know of the rings and no thread writes to TCP now.
    #[inline]
    fn switch_tx(&self, fd: c_int) -> bool {
        self.tx_switched()
            || (self.is_moved()
                && self.local().ready.load(Ordering::Acquire) != 0
                && !self.tx.returned.load(Ordering::Relaxed)
                && self.switch_tx_now(fd))
    }

    #[cold]
    fn switch_tx_now(&self, fd: c_int) -> bool {
        let _lock = self.tx.lock.take();
        if self.tx_switched() {
            return true;
        }
        if self.tx.returned.load(Ordering::Relaxed) {
            return false;
        }
        if self.tx.gate.compare_exchange(0, CLOSED, Ordering::SeqCst, Ordering::Relaxed).is_err() {
            return false;
        }
        let written = tcp::written(fd, self.is_active()).filter(|_| !self.is_gone());
        let Some(written) = written else {
            self.tx.gate.store(0, Ordering::SeqCst);
            return false;
        };
        self.remote().switch.store(written + 1, Ordering::Release);
        stats::count(&stats::get().moved_directions);
        true
    }

    /// Enters the kernel to write to TCP. False: it goes into the ring.
    fn enter_tx(&self, fd: c_int) -> bool {
        if self.switch_tx(fd) {
            return false;
        }
        if self.tx.gate.fetch_add(1, Ordering::SeqCst) & CLOSED != 0 {
            self.tx.gate.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        true
    }

    fn leave_tx(&self, fd: c_int) {
        self.tx.gate.fetch_sub(1, Ordering::SeqCst);
        if self.tx.owed.load(Ordering::SeqCst) && self.tx.owed.swap(false, Ordering::SeqCst) {
            self.wake(fd);
        }
    }

    /// Wakes whoever sleeps in the kernel at the other end.
    fn wake(&self, fd: c_int) {
        if !self.switch_tx(fd) {
            // A thread of ours is in the kernel with data for TCP: it wakes when it leaves.
            self.tx.owed.store(true, Ordering::SeqCst);
            if self.tx.gate.load(Ordering::SeqCst) != 0 || !self.switch_tx(fd) {
                return;
            }
            self.tx.owed.store(false, Ordering::SeqCst);
        }
        if self.tx.wakers.fetch_add(1, Ordering::SeqCst) & CLOSED != 0 {
            self.tx.wakers.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        self.remote().wakes.fetch_add(1, Ordering::AcqRel);
        let sent = errno::keep(|| {
            // SAFETY: one byte of a literal.
            unsafe { errno::outcome(real::send(fd, c"".as_ptr().cast(), 1, MSG_DONTWAIT | MSG_NOSIGNAL)) }
        });
        self.tx.wakers.fetch_sub(1, Ordering::SeqCst);
        if let Err(errno) = sent
            && errno != EAGAIN
        {
            self.eof.store(true, Ordering::Release);
        }
    }

    fn count(&self, woke: bool) {
        self.line().count(woke);
    }

    // ---- sending -----------------------------------------------------------------------------------------------------

    /// Sends. `real` is the call itself, for when it is TCP's.
    pub fn send<'a>(
        &self,
        fd: c_int,
        from: impl FnOnce() -> Result<&'a [libc::iovec], c_int>,
        flags: c_int,
        real: impl FnOnce() -> Outcome,
    ) -> Outcome {
        if self.enter_tx(fd) {
            let result = real();
            self.leave_tx(fd);
            return result;
        }
        let from = &mut Reader::new(from()?);
        let nonblocking = flags & MSG_DONTWAIT != 0 || self.nonblocking.load(Ordering::Relaxed);
        let mut done = 0;
        loop {
            match self.put(fd, from, flags) {
                Ok(n) => done += n,
                Err(BACK) => return self.send_by_tcp(fd, from, flags, done),
                Err(_) if done != 0 => return Ok(done),
                Err(errno) => return Err(errno),
            }
            if from.left() == 0 {
                return Ok(done);
            }
            if nonblocking {
                self.tx.full.store(true, Ordering::SeqCst);
                self.local().arm(ROOM, 0);
                if self.has_room() {
                    continue;
                }
                return if done != 0 { Ok(done) } else { Err(EAGAIN) };
            }
            match self.wait_for_room(fd) {
                Ok(()) => {}
                Err(_) if done != 0 => return Ok(done),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Writes what fits.
    fn put(&self, fd: c_int, from: &mut Reader<'_>, flags: c_int) -> Outcome {
        let mut done = 0;
        let _lock = self.tx.lock.take();
        // SAFETY: under the lock.
        let ring = unsafe { &mut *self.tx.ring.get() };
        // SAFETY: written before the connection was linked.
        let plan = unsafe { *self.plan.get() };
        if self.tx.returned.load(Ordering::Relaxed) {
            return Err(BACK);
        }
        loop {
            self.check_tx(fd, flags)?;
            if ring.free() == 0 || (done == 0 && (ring.free() as usize) < from.left()) {
                self.observe_room(ring)?;
            }
            if ring.free() == 0 || from.left() == 0 {
                break;
            }
            let chunk = ring.chunk();
            let len = (chunk.len as usize).min(PIECE).min(from.left());
            // SAFETY: the chunk lies in the ring, which `remote` starts.
            let to = unsafe { self.remote.load(Ordering::Relaxed).add(SIZE + chunk.offset as usize) };
            // SAFETY: `len` bytes are writable there.
            unsafe { from.copy_to(len, |src, at, len| plan.copy_to_shared(src, to.add(at), len)) };
            ring.produce(len as u32);
            done += len;
            self.publish(fd, ring, ProducerFlags::empty());
        }
        if from.left() != 0 {
            // From here on the peer tells of all that it reads.
            self.publish(fd, ring, ProducerFlags::WRITE_BLOCKED);
        }
        self.tx.bytes.fetch_add(done as u64, Ordering::Relaxed);
        if self.is_gone() { Err(self.break_off()) } else { Ok(done) }
    }

    /// Writes what a descriptor gives by `fill`, which is told where to and how much at most, and says how much it was.
    pub fn send_from(
        &self,
        fd: c_int,
        mut left: usize,
        fill: &mut dyn FnMut(*mut u8, usize) -> Outcome,
    ) -> Option<Outcome> {
        if !self.switch_tx(fd) {
            return None;
        }
        let mut done = 0;
        let mut ended = false;
        while left != 0 && !ended {
            {
                let _lock = self.tx.lock.take();
                if self.tx.returned.load(Ordering::Relaxed) {
                    drop(_lock);
                    return match done {
                        0 => self.flush(fd, self.nonblocking.load(Ordering::Relaxed)).err().map(Err),
                        _ => Some(Ok(done)),
                    };
                }
                // SAFETY: under the lock.
                let ring = unsafe { &mut *self.tx.ring.get() };
                if let Err(errno) = self.check_tx(fd, 0).and_then(|()| self.observe_room(ring)) {
                    return Some(if done != 0 { Ok(done) } else { Err(errno) });
                }
                while ring.free() != 0 && left != 0 {
                    let chunk = ring.chunk();
                    let len = (chunk.len as usize).min(PIECE).min(left);
                    // SAFETY: the chunk lies in the ring.
                    let to = unsafe { self.remote.load(Ordering::Relaxed).add(SIZE + chunk.offset as usize) };
                    match fill(to, len) {
                        Ok(0) => ended = true,
                        Ok(n) => {
                            ring.produce(n as u32);
                            self.publish(fd, ring, ProducerFlags::empty());
                            self.tx.bytes.fetch_add(n as u64, Ordering::Relaxed);
                            done += n;
                            left -= n;
                            continue;
                        }
                        Err(_) if done != 0 => ended = true,
                        Err(errno) => return Some(Err(errno)),
                    }
                    break;
                }
                if left != 0 && !ended {
                    self.publish(fd, ring, ProducerFlags::WRITE_BLOCKED);
                }
            }
            if left == 0 || ended {
                break;
            }
            if self.nonblocking.load(Ordering::Relaxed) {
                self.tx.full.store(true, Ordering::SeqCst);
                self.local().arm(ROOM, 0);
                if self.has_room() {
                    continue;
                }
                return Some(if done != 0 { Ok(done) } else { Err(EAGAIN) });
            }
            if let Err(errno) = self.wait_for_room(fd) {
                return Some(if done != 0 { Ok(done) } else { Err(errno) });
            }
        }
        Some(Ok(done))
    }

    /// What TCP would say to a write, other than that there is no room.
    #[inline]
    fn check_tx(&self, fd: c_int, flags: c_int) -> Result<(), c_int> {
        let theirs = self.local().cdc.load_prod().state;
        let gone = StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT;
        let ended = self.eof.load(Ordering::Relaxed) && !theirs.contains(StateFlags::PEER_DONE_WRITING);
        if self.tx.state.load(Ordering::Relaxed) != 0 {
            if flags & MSG_NOSIGNAL == 0 {
                // SAFETY: a signal to this thread, as the kernel sends it to who writes after an end.
                unsafe { libc::raise(libc::SIGPIPE) };
            }
            return Err(EPIPE);
        }
        if theirs.intersects(gone) || ended || self.error.load(Ordering::Relaxed) != 0 {
            return self.fail_tx(fd, flags);
        }
        Ok(())
    }

    /// The kernel knows what to say to who writes to a connection that the other end has closed, and who gets a signal.
    #[cold]
    fn fail_tx(&self, fd: c_int, flags: c_int) -> Result<(), c_int> {
        let error = self.error.swap(0, Ordering::Relaxed);
        if error != 0 {
            return Err(error as c_int);
        }
        // SAFETY: one byte of a literal.
        errno::outcome(unsafe {
            real::send(fd, c"".as_ptr().cast(), 1, flags & MSG_NOSIGNAL | MSG_DONTWAIT)
        })?;
        Ok(())
    }

    /// Tells the peer how far this side has written, and wakes it if it sleeps.
    #[inline]
    fn publish(&self, fd: c_int, ring: &Producer, producer: ProducerFlags) {
        let state = StateFlags::from_bits_truncate(self.tx.state.load(Ordering::Relaxed));
        let word = CursorWord { cursor: ring.cursor(), producer, state };
        self.tx.cursor.store(position(word), Ordering::Relaxed);
        let remote = self.remote();
        remote.cdc.store_prod(word);
        let woke = remote.take(DATA);
        self.count(woke);
        if woke {
            self.wake(fd);
        }
    }

    fn observe_room(&self, ring: &mut Producer) -> Result<(), c_int> {
        let cons = self.local().cdc.load_cons().cursor;
        match ring.observe(cons) {
            Ok(_) if !self.is_gone() => Ok(()),
            _ => Err(self.break_off()),
        }
    }

    fn break_off(&self) -> c_int {
        self.error.store(ECONNRESET as u32, Ordering::Relaxed);
        self.eof.store(true, Ordering::Relaxed);
        ECONNRESET
    }

    /// Whether a write would find room. Without the lock.
    pub fn has_room(&self) -> bool {
        if self.tx.returned.load(Ordering::Relaxed) {
            return true;
        }
        let ours = CursorWord::from_bits(self.tx.cursor.load(Ordering::Relaxed)).cursor;
        let theirs = self.local().cdc.load_cons().cursor;
        let size = self.tx.size.load(Ordering::Relaxed);
        theirs.distance(ours, size) != Some(size)
    }

    fn wait_for_room(&self, fd: c_int) -> Result<(), c_int> {
        // SAFETY: written before the connection was linked; it has atomics only.
        let spinner = unsafe { &*self.tx.spinner.get() };
        let start = match crowd::spin(spinner, None, || self.has_room(), || self.is_broken()) {
            Ok(()) => return Ok(()),
            Err(start) => start,
        };
        let deadline = tcp::timeout(fd, libc::SO_SNDTIMEO).map(|t| Instant::now() + t);
        let mut patience = Duration::from_millis(1);
        loop {
            self.local().arm(ROOM, 0);
            if self.has_room() || self.is_broken() {
                break;
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                return Err(EAGAIN);
            }
            // What wakes is a byte from the peer. A reader of ours may take it away, and before the reader has read TCP to its
            // end it is behind data.
            if !self.rx.on_ring.load(Ordering::Acquire) {
                let _lock = self.rx.lock.take();
                let _ = self.find_switch(fd);
            }
            let on_ring = self.rx.on_ring.load(Ordering::Acquire);
            let behind_nothing = on_ring || tcp::queued_in(fd) == Some(0);
            let ended = self.eof.load(Ordering::Relaxed);
            let alone = !ended && self.rx.sleepers.load(Ordering::SeqCst) == 0 && behind_nothing;
            if alone && on_ring && !self.has_data() {
                self.eat(fd);
                if self.has_room() || self.is_broken() {
                    break;
                }
            }
            let left = |longest: Duration| {
                deadline.map_or(longest, |d| longest.min(d.saturating_duration_since(Instant::now())))
            };
            let (watch, longest) = if alone && !self.has_data() {
                (libc::POLLIN, left(Duration::from_millis(100)))
            } else {
                let ready = || self.has_room() || self.is_broken();
                let ended = self.local().sleep_for_room(left(patience), ready);
                let interrupted = ended == Err(libc::EINTR) && !self.has_room();
                if interrupted && (deadline.is_some() || !signal::restarts()) {
                    return Err(libc::EINTR);
                }
                patience = (patience * 2).min(MOST_PATIENCE);
                (0, Duration::ZERO)
            };
            let mut wait = libc::pollfd { fd, events: watch, revents: 0 };
            // SAFETY: one pollfd.
            let ready = unsafe { real::poll(&mut wait, 1, longest.as_nanos().div_ceil(1_000_000) as c_int) };
            if ready < 0 && errno::get() != libc::EINTR {
                return Err(errno::get());
            }
            if ready < 0 && !self.has_room() && (deadline.is_some() || !signal::restarts()) {
                return Err(libc::EINTR);
            }
            if wait.revents & (libc::POLLERR | libc::POLLHUP) != 0 {
                self.eof.store(true, Ordering::Relaxed);
                break;
            }
        }
        crowd::slept(spinner, start);
        Ok(())
    }

    /// Whether there is nothing to wait for.
    fn is_broken(&self) -> bool {
        let theirs = self.local().cdc.load_prod().state;
        self.error.load(Ordering::Relaxed) != 0
            || theirs.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT)
            || (self.eof.load(Ordering::Relaxed) && !theirs.contains(StateFlags::PEER_DONE_WRITING))
            || self.tx.state.load(Ordering::Relaxed) != 0
    }

    // ---- receiving ---------------------------------------------------------------------------------------------------

    /// Receives. `real` is the call itself, for when it is TCP's.
    pub fn recv<'a>(
        &self,
        fd: c_int,
        to: impl FnOnce() -> Result<&'a [libc::iovec], c_int>,
        flags: c_int,
        real: impl FnOnce() -> Outcome,
    ) -> Outcome {
        if self.enter_rx() {
            let result = real();
            self.leave_rx();
            return result;
        }
        let to = &mut Writer::new(to()?);
        let nonblocking = flags & MSG_DONTWAIT != 0 || self.nonblocking.load(Ordering::Relaxed);
        let mut began = None;
        let all = flags & MSG_WAITALL != 0 && flags & (MSG_PEEK | MSG_DONTWAIT) == 0;
        let mut done = 0;
        loop {
            let before = self.rx.on_ring.load(Ordering::Acquire);
            let result = self.get(fd, to, flags);
            // That was the last of TCP: what is in the ring already belongs to the same stream.
            let more = !before && flags & MSG_PEEK == 0 && self.rx_on_ring() && self.has_data();
            match result {
                Ok(Some(n)) => {
                    done += n;
                    if n == 0 || to.left() == 0 || !(all || more) {
                        return Ok(done);
                    }
                }
                Ok(None) if nonblocking || (done != 0 && !all) => {
                    return if done != 0 { Ok(done) } else { Err(EAGAIN) };
                }
                Ok(None) => {
                    if let Err(errno) = self.wait_for_data(fd, &mut began) {
                        return if done != 0 { Ok(done) } else { Err(errno) };
                    }
                }
                Err(_) if done != 0 => return Ok(done),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Reads what is there. `None`: nothing is, and more may come.
    fn get(&self, fd: c_int, to: &mut Writer<'_>, flags: c_int) -> Result<Option<usize>, c_int> {
        let _lock = self.rx.lock.take();
        if self.is_gone() && !self.rx.returned.load(Ordering::Relaxed) {
            return Err(self.break_off());
        }
        if !self.rx.on_ring.load(Ordering::Acquire) {
            self.return_rx_unused(fd);
            if let Some(result) = self.get_tcp(fd, to, flags) {
                let done = result?;
                // Who has looked at all that TCP has left looks on in the ring.
                let more = flags & MSG_PEEK != 0 && self.find_switch(fd) == Some(done as u64);
                return Ok(Some(done + if more { self.peek(to, flags)? } else { 0 }));
            }
        }
        if !self.rx.on_ring.load(Ordering::Acquire) {
            return Ok(None);
        }
        // SAFETY: under the lock.
        let ring = unsafe { &mut *self.rx.ring.get() };
        // SAFETY: under the lock.
        let seen = unsafe { &mut *self.rx.seen.get() };
        if to.left() == 0 {
            return Ok(Some(0));
        }
        if self.rx.shut.load(Ordering::Relaxed) {
            return Ok(Some(0));
        }
        if (ring.available() as usize) < to.left() {
            self.observe_data(ring, seen)?;
        }
        if ring.available() == 0 && self.return_rx(fd, ring, seen)? {
            return self.get_tcp(fd, to, flags).transpose();
        }
        if ring.available() == 0 {
            self.report(fd, ring);
            if let Some(end) = self.end(fd, seen) {
                // What was written before the end is there by now.
                self.observe_data(ring, seen)?;
                if ring.available() == 0 {
                    return end.map(|()| Some(0));
                }
            } else {
                // A byte to wake may have come with data.
                self.observe_data(ring, seen)?;
                if ring.available() == 0 {
                    return Ok(None);
                }
            }
        }
        if flags & MSG_PEEK != 0 {
            return self.peek(to, flags).map(Some);
        }
        let mut done = 0;
        while to.left() != 0 && ring.available() != 0 {
            done += self.copy_out(ring, to, flags);
            self.rx.cursor.store(
                position(CursorWord { cursor: ring.cursor(), ..Default::default() }),
                Ordering::Relaxed,
            );
            if ring.unreported() >= self.quarter() || seen.producer.contains(ProducerFlags::WRITE_BLOCKED) {
                self.report(fd, ring);
            }
        }
        if self.is_gone() {
            return Err(self.break_off());
        }
        self.rx.bytes.fetch_add(done as u64, Ordering::Relaxed);
        Ok(Some(done))
    }

    /// Looks at what is in the ring, which stays there. Under the lock.
    fn peek(&self, to: &mut Writer<'_>, flags: c_int) -> Outcome {
        // SAFETY: under the lock.
        let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
        self.observe_data(ring, seen)?;
        // A copy, which is not reported.
        let mut ring = *ring;
        let mut done = 0;
        while to.left() != 0 && ring.available() != 0 {
            done += self.copy_out(&mut ring, to, flags);
        }
        if self.is_gone() { Err(self.break_off()) } else { Ok(done) }
    }

    /// Reads the next piece of the ring.
    #[inline]
    fn copy_out(&self, ring: &mut Consumer, to: &mut Writer<'_>, flags: c_int) -> usize {
        let chunk = ring.chunk();
        let len = (chunk.len as usize).min(to.left());
        // SAFETY: the chunk lies in the ring, which `local` starts.
        let from = unsafe { self.local.load(Ordering::Relaxed).add(SIZE + chunk.offset as usize) };
        if flags & MSG_TRUNC != 0 {
            to.skip(len);
        } else {
            // SAFETY: `len` bytes are readable there.
            unsafe { to.copy_from(len, |dst, at, len| shm::copy_from_shared(from.add(at), dst, len)) };
        }
        ring.consume(len as u32);
        len
    }

    /// Takes data where it lies by `take`, which is told where it is and how much, and says how much it took. For splice.
    pub fn recv_into(
        &self,
        fd: c_int,
        most: usize,
        take: &mut dyn FnMut(*const u8, usize) -> Outcome,
    ) -> Option<Outcome> {
        if !self.is_moved() {
            return None;
        }
        let mut began = None;
        loop {
            {
                let _lock = self.rx.lock.take();
                if !self.rx.on_ring.load(Ordering::Acquire) {
                    let _ = self.find_switch(fd);
                }
                if !self.rx.on_ring.load(Ordering::Acquire) {
                    return None;
                }
                // SAFETY: under the lock.
                let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
                if let Err(errno) = self.observe_data(ring, seen) {
                    return Some(Err(errno));
                }
                if ring.available() == 0 && self.return_rx(fd, ring, seen) != Ok(false) {
                    return None;
                }
                if ring.available() == 0
                    && let Some(end) = self.end(fd, seen)
                {
                    let _ = self.observe_data(ring, seen);
                    if ring.available() == 0 {
                        return Some(end.map(|()| 0));
                    }
                }
                if ring.available() != 0 {
                    let chunk = ring.chunk();
                    let len = (chunk.len as usize).min(most);
                    // SAFETY: the chunk lies in the ring.
                    let from =
                        unsafe { self.local.load(Ordering::Relaxed).add(SIZE + chunk.offset as usize) };
                    return Some(take(from, len).inspect(|&n| {
                        ring.consume(n as u32);
                        self.rx.bytes.fetch_add(n as u64, Ordering::Relaxed);
                        self.rx.cursor.store(
                            position(CursorWord { cursor: ring.cursor(), ..Default::default() }),
                            Ordering::Relaxed,
                        );
                        self.report(fd, ring);
                    }));
                }
                self.report(fd, ring);
            }
            if self.nonblocking.load(Ordering::Relaxed) {
                return Some(Err(EAGAIN));
            }
            if let Err(errno) = self.wait_for_data(fd, &mut began) {
                return Some(Err(errno));
            }
        }
    }

    /// Reads what TCP still has. `None`: nothing, or that was all, and `on_ring` says which.
    fn get_tcp(&self, fd: c_int, to: &mut Writer<'_>, flags: c_int) -> Option<Outcome> {
        if let Some(stray) = self.take_stray(fd, to, flags) {
            return Some(Ok(stray));
        }
        let left = self.find_switch(fd);
        if left == Some(0) {
            return None;
        }
        let most = left.map_or(usize::MAX, |left| usize::try_from(left).unwrap_or(usize::MAX));
        let read = to.call(most, |message| {
            let flags = flags & !MSG_WAITALL | MSG_DONTWAIT;
            // SAFETY: the message describes the program's buffers.
            errno::outcome(unsafe { real::recvmsg(fd, message, flags) })
        });
        // The peer may have switched just now.
        let switched = self.ring_begins() != 0;
        let mut read = match read {
            Ok(0) | Err(EAGAIN) if switched => {
                let _ = self.find_switch(fd);
                return None;
            }
            Ok(n) => n,
            Err(EAGAIN) => return None,
            Err(errno) if switched => {
                self.error.store(errno as u32, Ordering::Relaxed);
                self.rx.on_ring.store(true, Ordering::Release);
                return None;
            }
            Err(errno) => return Some(Err(errno)),
        };
        if left.is_none() && switched {
            // The peer switched while we read: bytes behind the position were to wake.
            let at = self.ring_begins().saturating_sub(1);
            let until = tcp::read(fd)?;
            let until = if flags & MSG_PEEK != 0 { until + read as u64 } else { until };
            let behind = until.saturating_sub(at).min(read as u64);
            if behind != 0 {
                read -= behind as usize;
                if flags & MSG_PEEK == 0 {
                    self.rx.eaten.fetch_add(behind, Ordering::Relaxed);
                    self.rx.on_ring.store(true, Ordering::Release);
                }
                if read == 0 {
                    let _ = self.find_switch(fd);
                    return None;
                }
            }
        }
        to.skip(read);
        if flags & MSG_PEEK == 0 && left.is_some_and(|left| left <= read as u64) {
            self.rx.on_ring.store(true, Ordering::Release);
        }
        Some(Ok(read))
    }

    /// How many bytes TCP still has before the peer's direction switched; `None` if it has not. Under the lock.
    fn find_switch(&self, fd: c_int) -> Option<u64> {
        let switch = self.ring_begins();
        if switch == 0 {
            return None;
        }
        let left = (switch - 1).saturating_sub(tcp::read(fd)?);
        if left == 0 {
            self.rx.on_ring.store(true, Ordering::Release);
        }
        Some(left)
    }

    fn quarter(&self) -> u32 {
        // SAFETY: the size never changes.
        unsafe { (*self.rx.ring.get()).size() / 4 }
    }

    #[inline]
    fn observe_data(&self, ring: &mut Consumer, seen: &mut CursorWord) -> Result<(), c_int> {
        *seen = self.local().cdc.load_prod();
        match ring.observe(seen.cursor) {
            Ok(_) if !self.is_gone() => Ok(()),
            _ => Err(self.break_off()),
        }
    }

    /// Tells the peer how far this side has read, if it does not know, and wakes it if it waits for room.
    #[inline]
    fn report(&self, fd: c_int, ring: &mut Consumer) {
        if ring.unreported() == 0 {
            return;
        }
        let remote = self.remote();
        remote.cdc.store_cons(CursorWord { cursor: ring.cursor(), ..CursorWord::default() });
        ring.reported();
        if remote.take(ROOM) {
            self.wake(fd);
        }
    }

    /// The ring is empty: whether nothing more will come. Under the lock. Takes away what was sent to wake.
    fn end(&self, fd: c_int, seen: &CursorWord) -> Option<Result<(), c_int>> {
        if self.returns_rx() {
            return None;
        }
        if seen.state.contains(StateFlags::PEER_CONN_ABORT) {
            return Some(Err(ECONNRESET));
        }
        if seen.state.intersects(StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED) {
            return Some(Ok(()));
        }
        let error = self.error.swap(0, Ordering::Relaxed);
        if error != 0 {
            return Some(Err(error as c_int));
        }
        if self.eof.load(Ordering::Relaxed) {
            return Some(Ok(()));
        }
        let now = tcp::milliseconds();
        let due = now.wrapping_sub(self.rx.looked.load(Ordering::Relaxed)) >= LOOK.as_millis() as u64;
        if due || self.uneaten() != 0 {
            self.rx.looked.store(now, Ordering::Relaxed);
            return self.eat(fd);
        }
        None
    }

    /// Takes away what was sent to wake, and nothing behind it. Says whether TCP has ended.
    pub fn eat(&self, fd: c_int) -> Option<Result<(), c_int>> {
        // Who sleeps in the kernel takes it, and counts it later.
        let sleeper = self.rx.sleepers.load(Ordering::SeqCst) != 0;
        let there = if sleeper { 0 } else { self.uneaten() };
        let result = errno::keep(|| {
            let mut byte = 0u8;
            // SAFETY: TCP does not copy what is cut off, and one byte is one byte.
            errno::outcome(unsafe {
                match there.min(1 << 16) as usize {
                    0 => real::recv(fd, (&raw mut byte).cast(), 1, MSG_DONTWAIT | MSG_PEEK),
                    there => real::recv(fd, null_mut(), there, MSG_DONTWAIT | MSG_TRUNC),
                }
            })
        });
        match result {
            Ok(0) => {
                self.eof.store(true, Ordering::Release);
                Some(Ok(()))
            }
            Ok(_) if there == 0 => {
                // The direction is TCP again, or else this is a byte that nobody may send.
                let known = sleeper || self.uneaten() != 0 || self.local().back.load(Ordering::SeqCst) != 0;
                if known { None } else { Some(Err(self.break_off())) }
            }
            Ok(n) => {
                self.ate(fd, n);
                None
            }
            Err(EAGAIN | libc::EINTR) => None,
            Err(ECONNRESET) if !self.left_unread() => {
                // A peer that has read all and said goodbye, with a byte of ours unread that meant nothing.
                self.eof.store(true, Ordering::Release);
                Some(Ok(()))
            }
            Err(errno) => {
                self.eof.store(true, Ordering::Release);
                Some(Err(errno))
            }
        }
    }

    /// Bytes that were sent to wake, or are about to be, and were not taken away.
    fn uneaten(&self) -> u64 {
        self.local().wakes.load(Ordering::Acquire).wrapping_sub(self.rx.eaten.load(Ordering::Relaxed))
    }

    /// Bytes that were sent to wake were taken away.
    fn ate(&self, fd: c_int, bytes: usize) {
        let before = self.rx.eaten.fetch_add(bytes as u64, Ordering::Relaxed);
        if (before + bytes as u64) / MOST_UNEATEN != before / MOST_UNEATEN {
            tcp::set_option(fd, libc::TCP_QUICKACK, 1);
        }
    }

    /// Whether the peer has left bytes of ours unread.
    fn left_unread(&self) -> bool {
        let ours = CursorWord::from_bits(self.tx.cursor.load(Ordering::Relaxed)).cursor;
        self.tx_switched() && self.local().cdc.load_cons().cursor != ours
    }

    /// Whether a read would find data, or an end. Without the lock.
    #[inline]
    pub fn has_data(&self) -> bool {
        let word = self.local().cdc.load_prod();
        position(word) != self.rx.cursor.load(Ordering::Relaxed) || !word.state.is_empty()
    }

    /// How far the peer has written, and what it said: changes with everything that a reader may want to know.
    pub fn news(&self) -> u64 {
        let word = self.local().cdc.load_prod();
        CursorWord { producer: ProducerFlags::empty(), ..word }.to_bits()
            ^ u64::from(self.eof.load(Ordering::Relaxed)) << 50
    }

    /// Tells the peer what it can know before this side sleeps.
    fn settle(&self, fd: c_int) {
        let _lock = self.rx.lock.take();
        // SAFETY: under the lock.
        self.report(fd, unsafe { &mut *self.rx.ring.get() });
    }

    /// Waits for data in the kernel, as `recv` does: with its timeout, its signals and its cancellation.
    fn wait_for_data(&self, fd: c_int, began: &mut Option<Instant>) -> Result<(), c_int> {
        let on_ring = self.rx.on_ring.load(Ordering::Acquire);
        let ready = || self.has_data() && (on_ring || self.ring_begins() != 0);
        let ended = || self.eof.load(Ordering::Relaxed) || self.rx.shut.load(Ordering::Relaxed);
        let start = match crowd::spin(self.rx_spinner(), None, ready, ended) {
            Ok(()) => return Ok(()),
            Err(start) => start,
        };
        let sleepers = self.rx.sleepers.fetch_add(1, Ordering::SeqCst);
        self.local().arm(DATA, 0);
        let result = if ready() || ended() {
            Ok(None)
        } else if let Some(longest) = self.longest_sleep() {
            let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd.
            let ready = unsafe { real::poll(&mut wait, 1, longest.as_millis() as c_int) };
            let began = *began.get_or_insert_with(Instant::now);
            let deadline = tcp::timeout(fd, libc::SO_RCVTIMEO).map(|t| began + t);
            match errno::outcome(ready as isize) {
                Ok(0) if deadline.is_some_and(|d| Instant::now() >= d) => Err(EAGAIN),
                Err(libc::EINTR) if deadline.is_none() && signal::restarts() => Ok(None),
                outcome => outcome.map(|_| None),
            }
        } else if on_ring && sleepers == 0 {
            // What wakes is taken away at once.
            let mut byte = 0u8;
            // SAFETY: one byte.
            errno::outcome(unsafe { real::recv(fd, (&raw mut byte).cast(), 1, 0) }).map(|n| Some((n, byte)))
        } else {
            let mut byte = 0u8;
            // SAFETY: one byte.
            errno::outcome(unsafe { real::recv(fd, (&raw mut byte).cast(), 1, MSG_PEEK) }).map(|_| None)
        };
        match result {
            Ok(Some((0, _))) => self.eof.store(true, Ordering::Release),
            Ok(Some((_, byte))) => self.ate_one(fd, byte),
            _ => {}
        }
        self.rx.sleepers.fetch_sub(1, Ordering::SeqCst);
        crowd::slept(self.rx_spinner(), start);
        match result {
            Ok(_) => {}
            // The end is found by who looks at the ring.
            Err(ECONNRESET) if on_ring => self.eat_reset(),
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// TCP reported a reset, and has forgotten it by that.
    fn eat_reset(&self) {
        if self.left_unread() {
            self.error.store(ECONNRESET as u32, Ordering::Relaxed);
        }
        self.eof.store(true, Ordering::Release);
    }

    // ---- poll --------------------------------------------------------------------------------------------------------

    /// What of POLLIN and POLLOUT is so as far as the rings say, and of which of the two the kernel has to be asked.
    pub fn readiness(&self, fd: c_int) -> (i16, i16) {
        if !self.is_moved() {
            return (0, libc::POLLIN | libc::POLLOUT);
        }
        let (mut ready, mut ask) = (0, 0);
        if !self.rx.on_ring.load(Ordering::Acquire) && self.ring_begins() != 0 {
            let _lock = self.rx.lock.take();
            let _ = self.find_switch(fd);
        }
        if self.rx.on_ring.load(Ordering::Acquire) && self.returns_rx() {
            let _lock = self.rx.lock.take();
            // SAFETY: under the lock.
            let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
            let _ = self.return_rx(fd, ring, seen);
        }
        if !self.rx.on_ring.load(Ordering::Acquire) {
            ask |= libc::POLLIN;
            if self.has_stray() {
                ready |= libc::POLLIN;
            }
        } else {
            if self.has_data() || self.eof.load(Ordering::Relaxed) || self.rx.shut.load(Ordering::Relaxed) {
                ready |= libc::POLLIN;
            }
            if self
                .local()
                .cdc
                .load_prod()
                .state
                .intersects(StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED)
            {
                ready |= libc::POLLRDHUP;
                if self.tx.state.load(Ordering::Relaxed) != 0 {
                    ready |= libc::POLLHUP;
                }
            }
        }
        if !self.tx_in_ring() {
            ask |= libc::POLLOUT;
        } else if self.has_room() || self.is_broken() {
            ready |= libc::POLLOUT;
        }
        (ready, ask)
    }

    /// Asks for a byte that wakes; look again after it.
    pub fn arm(&self, fd: c_int, events: i16, edges: bool, sleep: u64) {
        if !self.is_moved() {
            return;
        }
        if self.rx.on_ring.load(Ordering::Acquire) {
            self.settle(fd);
            // The kernel would say again and again that there is a byte.
            if !edges && !self.has_data() && self.uneaten() != 0 {
                self.eat(fd);
            }
        }
        let mut what = 0;
        if events & (libc::POLLIN | libc::POLLRDHUP) != 0 {
            what |= DATA;
        }
        if events & libc::POLLOUT != 0 && self.tx_in_ring() {
            what |= ROOM;
        }
        if what != 0 {
            self.local().arm(what, sleep);
        }
    }

    /// Takes back `arm`. To be called only where nobody can sleep by it without waking up by itself.
    pub fn disarm(&self) {
        if self.is_moved() && self.rx.sleepers.load(Ordering::SeqCst) == 0 {
            self.local().disarm();
        }
    }

    /// An epoll instance watches it, and disarms.
    pub fn set_watched(&self) {
        self.watched.store(true, Ordering::SeqCst);
    }

    /// The longest sleep that needs no byte to wake, if somebody else may disarm.
    pub fn longest_sleep(&self) -> Option<Duration> {
        self.watched.load(Ordering::SeqCst).then_some(WATCHED)
    }

    /// The kernel said that there is something to read, once for each byte that came: takes them away now and then, and
    /// finds out about an end.
    pub fn look_at_edge(&self, fd: c_int, ended: bool) {
        if !self.rx.on_ring.load(Ordering::Acquire) {
            return;
        }
        let waiting = self.uneaten();
        // A byte that was counted and has not come yet does not matter.
        if !ended && waiting != 0 && waiting < MOST_UNEATEN {
            return;
        }
        let _lock = self.rx.lock.take();
        loop {
            let before = self.rx.eaten.load(Ordering::Relaxed);
            if let Some(Err(errno)) = self.eat(fd) {
                self.error.store(errno as u32, Ordering::Relaxed);
            }
            // The end lies behind the bytes.
            if self.eof.load(Ordering::Relaxed) || before == self.rx.eaten.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Whether the kernel knows nothing of incoming data but that somebody is to be woken.
    pub fn rx_on_ring(&self) -> bool {
        self.is_moved() && self.rx.on_ring.load(Ordering::Acquire)
    }

    /// Whether the kernel knows nothing of room.
    pub fn tx_on_ring(&self) -> bool {
        self.is_moved() && self.tx_in_ring()
    }

    /// The kernel said that there is something to read: it may be an end, or a byte that was sent to wake.
    pub fn look(&self, fd: c_int) {
        if !self.rx.on_ring.load(Ordering::Acquire) || self.has_data() {
            return;
        }
        let _lock = self.rx.lock.take();
        if let Some(Err(errno)) = self.eat(fd) {
            self.error.store(errno as u32, Ordering::Relaxed);
        }
    }

    /// Whether the program was told that there is no room, and there is some now; forgets it then.
    pub fn take_full(&self) -> bool {
        self.tx.full.load(Ordering::Relaxed) && self.has_room() && self.tx.full.swap(false, Ordering::AcqRel)
    }

    /// As `take_full`, without forgetting.
    pub fn was_full(&self) -> bool {
        self.tx.full.load(Ordering::Relaxed)
    }

    pub fn is_full(&self) -> bool {
        self.tx_in_ring() && !self.has_room() && !self.is_broken()
    }

    /// For waits of several descriptors.
    pub fn rx_spinner(&self) -> &Spinner {
        // SAFETY: written before the connection was linked; it has atomics only.
        unsafe { &*self.rx.spinner.get() }
    }

    // ---- the rest ----------------------------------------------------------------------------------------------------

    /// Bytes that can be read now, as SIOCINQ says.
    pub fn readable(&self, fd: c_int) -> Option<usize> {
        if !self.is_moved() {
            return None;
        }
        let _lock = self.rx.lock.take();
        let left = if self.rx.on_ring.load(Ordering::Acquire) { Some(0) } else { self.find_switch(fd) };
        let tcp = match left {
            None => tcp::queued_in(fd)?,
            Some(left) => left.min(tcp::queued_in(fd)?),
        };
        // SAFETY: under the lock.
        let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
        let _ = self.observe_data(ring, seen);
        Some(tcp as usize + ring.available() as usize)
    }

    /// Bytes that the peer has not taken, as SIOCOUTQ says.
    pub fn unread(&self) -> Option<usize> {
        if !self.tx_in_ring() {
            return None;
        }
        let ours = CursorWord::from_bits(self.tx.cursor.load(Ordering::Relaxed)).cursor;
        let theirs = self.local().cdc.load_cons().cursor;
        theirs.distance(ours, self.tx.size.load(Ordering::Relaxed)).map(|n| n as usize)
    }

    /// The program shuts down. Says what of it the kernel is to do.
    ///
    /// A direction in the ring ends there: the kernel's stays open, because it has to wake the peer when this side reads,
    /// until the peer has ended its direction too.
    pub fn shutdown(&self, fd: c_int, how: c_int) -> Option<c_int> {
        if !self.is_moved() {
            return Some(how);
        }
        if how != libc::SHUT_WR {
            self.rx.shut.store(true, Ordering::Release);
        }
        if how == libc::SHUT_RD || !self.switch_tx(fd) {
            return Some(how);
        }
        if self.tx.returned.load(Ordering::Acquire) {
            return self.shut_after_flush(fd, how);
        }
        self.say(StateFlags::PEER_DONE_WRITING);
        let woke = self.remote().take(DATA | ROOM);
        if self.local().cdc.load_prod().state.contains(StateFlags::PEER_DONE_WRITING) {
            return Some(how);
        }
        if woke {
            self.wake(fd);
        }
        (how == libc::SHUT_RDWR).then_some(libc::SHUT_RD)
    }

    /// This process closes its last descriptor: the peer is told how far it has read, and nothing is left unread that would
    /// make the kernel reset the connection.
    pub fn leave(&self, fd: c_int) {
        if self.rx_on_ring() {
            self.settle(fd);
            if !self.has_data() {
                self.eat(fd);
            }
        }
    }

    /// The last descriptor of all processes is being closed. True: the kernel is to reset the connection, as it does when
    /// data was not read.
    pub fn close(&self, fd: c_int) -> bool {
        if !self.is_moved() {
            return false;
        }
        let unread = {
            let _lock = self.rx.lock.take();
            // SAFETY: under the lock.
            let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
            let on_ring = self.rx.on_ring.load(Ordering::Acquire) || self.find_switch(fd) == Some(0);
            let _ = self.observe_data(ring, seen);
            if on_ring && ring.available() == 0 {
                // A byte that nobody reads would make the kernel reset the connection.
                self.eat(fd);
            }
            on_ring && ring.available() != 0
        };
        let state = StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED;
        let aborts = unread || tcp::resets_at_close(fd);
        self.say(if aborts { state | StateFlags::PEER_CONN_ABORT } else { state });
        // The kernel wakes who sleeps in it; here are the others.
        let _ = self.remote().take(ROOM);
        unread
    }

    fn say(&self, state: StateFlags) {
        let _lock = self.tx.lock.take();
        let state = StateFlags::from_bits_truncate(self.tx.state.load(Ordering::Relaxed)) | state;
        self.tx.state.store(state.bits(), Ordering::Relaxed);
        if self.tx_in_ring() {
            // SAFETY: under the lock.
            let cursor = unsafe { (*self.tx.ring.get()).cursor() };
            self.remote().cdc.store_prod(CursorWord { cursor, producer: ProducerFlags::empty(), state });
        }
        fence(Ordering::SeqCst);
    }
}

/// The bits of a word that say where it is.
#[inline]
fn position(word: CursorWord) -> u64 {
    let Cursor { wrap, count } = word.cursor;
    u64::from(wrap) | u64::from(count) << 16
}
