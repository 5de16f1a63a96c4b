//! One TCP connection: what of it goes over TCP, what over DMBs, and how it moves over (`docs/run.md`).
//!
//! The state lies in memory that forked processes share. Each direction switches alone, once, at a position of its TCP
//! stream: the sender decides it, the receiver reads TCP up to there and then the ring. From then on the sender's direction
//! of the TCP connection carries bytes without a meaning, which wake who sleeps in the kernel on the socket.

use crate::errno::{self, Finally, Outcome};
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
mod end;
mod readiness;
mod receive;
mod send;
pub use back::{Leaving, Staying, Step, after_fork, waiting};
pub use send::write_put_off;

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

/// See [`Conn::wanted`].
pub const STALLED: u32 = 2;

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
    /// 1: somebody waits for the connection to come back; see `back.rs`. [`STALLED`]: it would be better there.
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
        // One without rings is free as soon as no thread is inside.
        let is_left = self.state() == State::Orphan && !self.has_rings() && !self.is_used();
        if !self.change(if is_left { State::Orphan } else { State::Free }, State::Plain) {
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

    /// Whether a thread is inside of a call for it, whose descriptor another one has closed.
    pub fn is_used(&self) -> bool {
        let inside = |gate: &AtomicU32| gate.load(Ordering::SeqCst) & !CLOSED != 0;
        inside(&self.rx.gate) || inside(&self.tx.gate) || self.rx.sleepers.load(Ordering::SeqCst) != 0
    }

    /// The kernel has closed it, so no thread is inside any more, whatever a process that was killed has left.
    pub fn leave_all(&self) {
        for gate in [&self.rx.gate, &self.tx.gate] {
            gate.fetch_and(CLOSED, Ordering::SeqCst);
        }
        self.rx.sleepers.store(0, Ordering::SeqCst);
        self.orphan();
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
        self.set_nonblocking(tcp::is_nonblocking(fd));
        for (to, number) in self.peer.iter().zip(rings.peer) {
            to.store(number, Ordering::Relaxed);
        }
        self.home.store(std::process::id(), Ordering::Release);
        if !self.change(State::Asking, State::Linked) {
            return self.decline();
        }
        tcp::set_option(fd, libc::TCP_CORK, 0);
        tcp::set_option(fd, libc::TCP_NODELAY, 1);
        tcp::set_plain_congestion_control(fd);
        self.close_rx_gate();
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
}

/// The bits of a word that say where it is.
#[inline]
fn position(word: CursorWord) -> u64 {
    let Cursor { wrap, count } = word.cursor;
    u64::from(wrap) | u64::from(count) << 16
}
