//! The way back to TCP, for a connection that a program gets which knows nothing of rings.
//!
//! The end that is handed on *leaves*, the other one *stays*; the threads of both libraries do it, so neither program has to
//! call anything. What the leaving end says in the staying one's header is `recall`:
//!
//! | leaves | stays |
//! | --- | --- |
//! | `recall` = [`ASK`] | `took` = [`HERE`], unless it has asked itself and is the end that called `connect` |
//! | `recall` = [`STOP`] | writes no more, neither into the ring nor to wake; `back` = where in TCP it is |
//! | reads TCP up to there; what of it is data is put before what is unread in the ring; says where that begins; `recall` = [`TAKE`] | takes all of that out of the ring; `took` = 1; sends it over TCP, before anything else |
//! | writes no more; `back` = where in TCP it is. It has TCP alone now | reads the ring to its end, TCP up to `back`, and then TCP |
//!
//! So every byte is seen once, in its order, and the leaving end's descriptor is a TCP socket whose next byte is the next one
//! of the stream.

use super::*;
use crate::arena;
use crate::lock::Guard;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const STOP: u32 = 1;
const TAKE: u32 = 2;
const ASK: u32 = 3;
/// `took`: done.
const TOOK: u32 = 1;
/// `took`: this end is there, and will not leave itself.
const HERE: u32 = 2;
/// `back` of a direction that is TCP, and stays so.
const NEVER: u64 = u64::MAX;

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The other end has something to do.
    Wait,
    Done,
    /// It will not be.
    Failed,
}

/// What the leaving end holds: no other thread reads or writes meanwhile.
pub struct Leaving {
    _rx: Guard<'static>,
    _tx: Guard<'static>,
    /// What was data in TCP.
    unread: Vec<u8>,
    /// Once the other end was told to take it: how much is to be sent again.
    rest: Option<u32>,
}

/// What the staying end holds: no other thread writes meanwhile.
pub struct Staying {
    _tx: Guard<'static>,
    stopped: bool,
}

/// What was taken out of a ring and is not sent yet.
struct Backlog {
    data: Vec<u8>,
    sent: usize,
    /// Stays open until all is sent.
    socket: OwnedFd,
    /// The program has ended the direction.
    shut: bool,
}

/// Those of this process, by the addresses of their connections.
struct Backlogs {
    lock: Lock,
    all: UnsafeCell<Option<HashMap<usize, Backlog>>>,
}

// SAFETY: the cell is accessed under the lock.
unsafe impl Sync for Backlogs {}

// SAFETY: all-zero bytes are a free Lock.
static BACKLOGS: Backlogs = Backlogs { lock: unsafe { std::mem::zeroed() }, all: UnsafeCell::new(None) };

fn backlogs<T>(run: impl FnOnce(&mut HashMap<usize, Backlog>) -> T) -> T {
    let _lock = BACKLOGS.lock.take();
    // SAFETY: under the lock.
    run(unsafe { &mut *BACKLOGS.all.get() }.get_or_insert_default())
}

/// In a fork's child: the parent sends them.
pub fn after_fork() {
    BACKLOGS.lock.reset();
    // SAFETY: the child's only thread. What the parent has may be in the middle of a change, and is left as it is.
    std::mem::forget(unsafe { (*BACKLOGS.all.get()).take() });
}

/// The sockets for which something waits to be sent.
pub fn waiting() -> Vec<(&'static Conn, c_int)> {
    // SAFETY: an address of a connection, in memory that stays mapped.
    let of = |at: &usize| unsafe { &*(*at as *const Conn) };
    backlogs(|all| all.iter().map(|(at, backlog)| (of(at), backlog.socket.as_raw_fd())).collect())
}

impl Conn {
    // ---- leaving -----------------------------------------------------------------------------------------------------

    /// Asks the other end whether it is there: until it says so nothing changes, however long that takes. True: it has to be
    /// woken for that.
    pub fn ask_to_leave(&self) -> bool {
        let they_leave = self.remote().took.load(Ordering::SeqCst) == HERE;
        !they_leave
            && self.remote().recall.compare_exchange(0, ASK, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Begins to leave. `None`: the other end has not answered, or a thread is just reading or writing.
    pub fn begin_leaving(&'static self) -> Option<Leaving> {
        if self.local().took.load(Ordering::SeqCst) == 0 && !self.is_alone() {
            return None;
        }
        let leaving = Leaving {
            _rx: self.rx.lock.try_take()?,
            _tx: self.tx.lock.try_take()?,
            unread: Vec::new(),
            rest: None,
        };
        self.remote().recall.store(STOP, Ordering::SeqCst);
        Some(leaving)
    }

    /// Goes on, as far as the other end has come.
    pub fn go_on_leaving(&self, fd: c_int, leaving: &mut Leaving) -> Step {
        let alone = self.is_alone();
        let Some(rest) = leaving.rest else {
            let stopped = if alone { self.emptied(fd) } else { self.stopped(fd, &mut leaving.unread) };
            if stopped == Step::Done {
                // SAFETY: under the lock.
                let ring = unsafe { &*self.rx.ring.get() };
                leaving.rest = Some(ring.available() + leaving.unread.len() as u32);
                self.remote().recall.store(TAKE, Ordering::SeqCst);
                return self.go_on_leaving(fd, leaving);
            }
            return stopped;
        };
        if self.local().took.load(Ordering::Acquire) != TOOK {
            match alone {
                false => return Step::Wait,
                true if rest != 0 => return Step::Failed,
                true => {}
            }
        }
        let back = if self.tx_switched() {
            // Who sleeps over there has to look again.
            if self.tx.wakers.load(Ordering::SeqCst) & CLOSED == 0 && self.remote().take(DATA | ROOM) {
                self.wake(fd);
            }
            match self.stop_waking(fd) {
                Ok(Some(position)) => position + 1,
                Ok(None) => return Step::Wait,
                Err(()) if alone => NEVER,
                Err(()) => return Step::Failed,
            }
        } else {
            NEVER
        };
        self.remote().back.store(back, Ordering::SeqCst);
        if self.tx.state.load(Ordering::Relaxed) != 0 {
            // SAFETY: what the program has said already.
            errno::keep(|| unsafe { real::shutdown(fd, libc::SHUT_WR) });
        }
        self.left(fd);
        Step::Done
    }

    /// Both directions are TCP.
    fn left(&self, fd: c_int) {
        self.rx.eaten.store(self.local().wakes.load(Ordering::Acquire), Ordering::Relaxed);
        self.rx.on_ring.store(false, Ordering::Relaxed);
        self.rx.returned.store(true, Ordering::SeqCst);
        self.tx.returned.store(true, Ordering::SeqCst);
        self.tx.gate.fetch_and(!CLOSED, Ordering::SeqCst);
        self.settle_on_tcp(fd);
    }

    /// Whether the other end has closed, and nobody there answers any more.
    fn has_closed(&self) -> bool {
        self.local().cdc.load_prod().state.contains(StateFlags::PEER_CONN_CLOSED)
    }

    /// Whether nobody over there answers any more.
    pub fn is_alone(&self) -> bool {
        self.has_closed() || self.eof.load(Ordering::Relaxed)
    }

    /// The other end is gone. What it has written and nobody has read would be lost to who comes after us, who is told so;
    /// else TCP's end is all there is to read.
    fn emptied(&self, fd: c_int) -> Step {
        // SAFETY: under the lock.
        let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
        let begins = self.ring_begins() != 0;
        let begun = self.rx.on_ring.load(Ordering::Acquire) || self.find_switch(fd) == Some(0);
        if begins && (!begun || self.observe_data(ring, seen).is_err() || ring.available() != 0) {
            return Step::Failed;
        }
        if begun {
            self.eat(fd);
        }
        Step::Done
    }

    /// Once the other end has stopped: reads what TCP has, and puts what of it is data before what is in the ring.
    fn stopped(&self, fd: c_int, unread: &mut Vec<u8>) -> Step {
        let stop = match self.local().back.load(Ordering::Acquire) {
            0 => return Step::Wait,
            NEVER => return Step::Done,
            stop => stop - 1,
        };
        let Some(begins) = self.ring_begins().checked_sub(1) else { return Step::Failed };
        // SAFETY: under the lock.
        let (ring, seen) = unsafe { (&mut *self.rx.ring.get(), &mut *self.rx.seen.get()) };
        loop {
            let Some(read) = tcp::read(fd) else { return Step::Failed };
            if read >= stop {
                break;
            }
            let mut bytes = [0u8; 16 << 10];
            let end = if read < begins { begins } else { stop };
            let most = bytes.len().min(usize::try_from(end - read).unwrap_or(usize::MAX));
            // SAFETY: at most as many bytes as there is room for.
            let got = errno::keep(|| unsafe {
                errno::outcome(real::recv(fd, bytes.as_mut_ptr().cast(), most, MSG_DONTWAIT))
            });
            match got {
                Ok(0) => return Step::Failed,
                Ok(n) if read < begins && unread.len() + n > ring.size() as usize => return Step::Failed,
                Ok(n) if read < begins => unread.extend_from_slice(&bytes[..n]),
                Ok(_) => {}
                Err(EAGAIN | libc::EINTR) => return Step::Wait,
                Err(_) => return Step::Failed,
            }
        }
        let Ok(()) = self.observe_data(ring, seen) else { return Step::Failed };
        let Some(begin) = before(ring, unread.len()) else { return Step::Failed };
        let mut at = begin;
        for byte in unread.iter() {
            // SAFETY: inside of the ring.
            unsafe { self.local.load(Ordering::Relaxed).add(SIZE + at.count as usize).write_volatile(*byte) };
            at = at.advance(1, ring.size());
        }
        self.remote().cdc.store_cons(CursorWord { cursor: begin, ..CursorWord::default() });
        Step::Done
    }

    // ---- staying -----------------------------------------------------------------------------------------------------

    /// Whether the other end wants to leave.
    pub fn is_left(&self) -> bool {
        let leaves = matches!(self.local().recall.load(Ordering::Acquire), STOP | TAKE);
        leaves && !self.tx.returned.load(Ordering::Relaxed)
    }

    /// Says that this end is there, if the other one wants to know. Of two that want to leave the one that called `connect`
    /// does.
    pub fn answer(&self) {
        let leaves = self.is_active() && self.remote().recall.load(Ordering::SeqCst) != 0;
        if self.local().recall.load(Ordering::SeqCst) == ASK && !leaves {
            let _ = self.remote().took.compare_exchange(0, HERE, Ordering::SeqCst, Ordering::Relaxed);
        }
    }

    /// This end is TCP, and no ring was used: the other one need not wait for it when it wants to be so, too.
    pub(super) fn decline(&self) {
        self.remote().back.store(NEVER, Ordering::SeqCst);
        self.remote().took.store(TOOK, Ordering::SeqCst);
    }

    /// Begins to stay behind. `None`: a thread is just writing.
    pub fn begin_staying(&'static self) -> Option<Staying> {
        Some(Staying { _tx: self.tx.lock.try_take()?, stopped: false })
    }

    /// Goes on, as far as the other end has come.
    pub fn go_on_staying(&self, fd: c_int, staying: &mut Staying) -> Step {
        if !staying.stopped {
            let back = if self.tx_switched() {
                match self.stop_waking(fd) {
                    Ok(Some(position)) => position + 1,
                    Ok(None) => return Step::Wait,
                    Err(()) => return Step::Failed,
                }
            } else {
                self.tx.returned.store(true, Ordering::SeqCst);
                NEVER
            };
            self.remote().back.store(back, Ordering::SeqCst);
            staying.stopped = true;
        }
        if self.local().recall.load(Ordering::Acquire) != TAKE {
            return Step::Wait;
        }
        if !self.tx.returned.load(Ordering::Relaxed) {
            // SAFETY: under the lock.
            let ring = unsafe { &mut *self.tx.ring.get() };
            let begin = self.local().cdc.load_cons().cursor;
            let size = self.tx.size.load(Ordering::Relaxed);
            let Some(len) = begin.distance(ring.cursor(), size) else { return Step::Failed };
            let mut data = vec![0u8; len as usize];
            let mut at = begin;
            for byte in &mut data {
                // SAFETY: inside of the ring, which `remote` starts.
                *byte = unsafe {
                    self.remote.load(Ordering::Relaxed).add(SIZE + at.count as usize).read_volatile()
                };
                at = at.advance(1, size);
            }
            // SAFETY: takes a descriptor, gives a new one, which is ours.
            let socket = unsafe {
                match real::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) {
                    -1 => return Step::Failed,
                    copy => OwnedFd::from_raw_fd(arena::own(copy)),
                }
            };
            let shut = self.tx.state.load(Ordering::Relaxed) != 0;
            backlogs(|all| {
                all.insert(std::ptr::from_ref(self) as usize, Backlog { data, sent: 0, socket, shut })
            });
            self.tx.returned.store(true, Ordering::SeqCst);
        }
        self.remote().took.store(TOOK, Ordering::SeqCst);
        self.flush_now();
        Step::Done
    }

    /// Has no thread send bytes to wake any more. Says where in TCP that was; `None`: one is just doing it.
    fn stop_waking(&self, fd: c_int) -> Result<Option<u64>, ()> {
        if self.tx.wakers.fetch_or(CLOSED, Ordering::SeqCst) & !CLOSED != 0 {
            return Ok(None);
        }
        tcp::written_half(fd, self.is_active()).map(Some).ok_or(())
    }

    /// Sends what was taken out of the ring, as far as TCP takes it. True: all of it. Under the lock of the direction.
    fn flush_now(&self) -> bool {
        let at = std::ptr::from_ref(self) as usize;
        let socket = backlogs(|all| {
            let Some(backlog) = all.get_mut(&at) else { return Some(None) };
            let fd = backlog.socket.as_raw_fd();
            while backlog.sent < backlog.data.len() {
                let rest = &backlog.data[backlog.sent..];
                // SAFETY: what is left of the data.
                let sent = errno::keep(|| unsafe {
                    errno::outcome(real::send(
                        fd,
                        rest.as_ptr().cast(),
                        rest.len(),
                        MSG_DONTWAIT | MSG_NOSIGNAL,
                    ))
                });
                match sent {
                    Ok(n) => backlog.sent += n,
                    Err(EAGAIN | libc::EINTR) => return None,
                    // Nobody wants it any more; who writes next is told.
                    Err(_) => break,
                }
            }
            if backlog.shut {
                // SAFETY: what the program has said already.
                errno::keep(|| unsafe { real::shutdown(fd, libc::SHUT_WR) });
            }
            Some(all.remove(&at))
        });
        let Some(done) = socket else { return false };
        match &done {
            Some(backlog) => {
                self.tx.gate.fetch_and(!CLOSED, Ordering::SeqCst);
                self.settle_on_tcp(backlog.socket.as_raw_fd());
            }
            // Another process has it to send, or it never was.
            None => return !self.tx_switched(),
        }
        if let Some(backlog) = done {
            let fd = std::os::fd::IntoRawFd::into_raw_fd(backlog.socket);
            arena::disown(fd);
        }
        true
    }

    /// As `flush_now`, for who does not hold the lock.
    pub fn flush_some(&self) -> bool {
        let _lock = self.tx.lock.take();
        self.flush_now()
    }

    /// A direction that is TCP again: sends what has to come before the next byte, and waits for it where the program would.
    pub(super) fn flush(&self, fd: c_int, nonblocking: bool) -> Result<(), c_int> {
        let deadline = tcp::timeout(fd, libc::SO_SNDTIMEO).map(|t| Instant::now() + t);
        while !self.flush_some() {
            if nonblocking || deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Err(EAGAIN);
            }
            let mut wait = libc::pollfd { fd, events: libc::POLLOUT, revents: 0 };
            // SAFETY: one pollfd.
            let ready = errno::outcome(unsafe { real::poll(&mut wait, 1, 100) } as isize);
            if let Err(errno) = ready
                && (errno != libc::EINTR || deadline.is_some() || !signal::restarts())
            {
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Sends the rest of a call's data by TCP, after what has to come before; `done` bytes of the call are on their way.
    #[cold]
    pub(super) fn send_by_tcp(
        &self,
        fd: c_int,
        from: &mut Reader<'_>,
        flags: c_int,
        mut done: usize,
    ) -> Outcome {
        let nonblocking = flags & MSG_DONTWAIT != 0 || self.nonblocking.load(Ordering::Relaxed);
        let result = self.flush(fd, nonblocking).and_then(|()| {
            while from.left() != 0 {
                // SAFETY: the message describes the program's buffers.
                let sent =
                    from.call(|message| unsafe { errno::outcome(real::sendmsg(fd, message, flags)) })?;
                done += sent;
                from.skip(sent);
                if nonblocking {
                    break;
                }
            }
            Ok(())
        });
        match result {
            Err(errno) if done == 0 => Err(errno),
            _ => Ok(done),
        }
    }

    /// Ends the direction, which is TCP again, behind what is to be sent. Says what the kernel is to do.
    pub(super) fn shut_after_flush(&self, _fd: c_int, how: c_int) -> Option<c_int> {
        if self.flush_some() {
            return Some(how);
        }
        backlogs(|all| {
            if let Some(backlog) = all.get_mut(&(std::ptr::from_ref(self) as usize)) {
                backlog.shut = true;
            }
        });
        (how == libc::SHUT_RDWR).then_some(libc::SHUT_RD)
    }

    // ---- reading on where TCP begins again ---------------------------------------------------------------------------

    /// Whether the peer's direction is about to be TCP again.
    pub(super) fn returns_rx(&self) -> bool {
        self.local().back.load(Ordering::Acquire) != 0 && !self.rx.returned.load(Ordering::Relaxed)
    }

    /// The ring is empty: goes on with TCP, if the peer does. Under the lock.
    pub(super) fn return_rx(
        &self,
        fd: c_int,
        ring: &mut Consumer,
        seen: &mut CursorWord,
    ) -> Result<bool, c_int> {
        if !self.returns_rx() {
            return Ok(false);
        }
        // What was written before is there by now.
        self.observe_data(ring, seen)?;
        if ring.available() != 0 {
            return Ok(false);
        }
        let back = self.local().back.load(Ordering::Acquire);
        if back != NEVER {
            // What comes behind may be urgent.
            let left = || Some((back - 1).saturating_sub(tcp::read_before_urgent(fd)?));
            while let Some(n @ 1..) = left() {
                let most = usize::try_from(n).unwrap_or(usize::MAX).min(1 << 16);
                // SAFETY: TCP does not copy what is cut off.
                let eaten = errno::keep(|| unsafe {
                    errno::outcome(real::recv(fd, null_mut(), most, MSG_DONTWAIT | MSG_TRUNC))
                });
                if !matches!(eaten, Ok(1..)) {
                    break;
                }
            }
            if left() != Some(0) {
                return Ok(false);
            }
        }
        self.rx.on_ring.store(false, Ordering::Release);
        self.rx.returned.store(true, Ordering::SeqCst);
        self.settle_on_tcp(fd);
        Ok(true)
    }

    /// A peer that has left without having written anything here.
    #[cold]
    pub(super) fn return_rx_unused(&self, fd: c_int) {
        if self.returns_rx() && self.ring_begins() == 0 {
            self.rx.returned.store(true, Ordering::SeqCst);
            self.settle_on_tcp(fd);
        }
    }

    /// A byte came to who slept: it was to wake, or is the first one of TCP.
    pub(super) fn ate_one(&self, fd: c_int, byte: u8) {
        if self.uneaten() != 0 {
            self.ate(fd, 1);
        } else if self.rx.returned.load(Ordering::SeqCst) || self.local().back.load(Ordering::SeqCst) != 0 {
            self.rx.stray.store(0x100 | u32::from(byte), Ordering::SeqCst);
        } else {
            self.break_off();
        }
    }

    /// Whether such a byte waits to be read.
    pub(super) fn has_stray(&self) -> bool {
        self.rx.stray.load(Ordering::Relaxed) != 0
    }

    /// Reads it. Under the lock.
    pub(super) fn take_stray(&self, fd: c_int, to: &mut Writer<'_>, flags: c_int) -> Option<usize> {
        let stray = self.rx.stray.load(Ordering::Relaxed);
        if stray == 0 || to.left() == 0 {
            return None;
        }
        if flags & MSG_TRUNC != 0 {
            to.skip(1);
        } else {
            // SAFETY: a byte of the program's.
            unsafe { to.copy_from(1, |at, _, _| at.write(stray as u8)) };
        }
        if flags & MSG_PEEK == 0 {
            self.rx.stray.store(0, Ordering::Relaxed);
            self.settle_on_tcp(fd);
        }
        Some(1)
    }

    /// Once both directions are TCP again, everything is.
    fn settle_on_tcp(&self, fd: c_int) {
        let both = self.tx.returned.load(Ordering::SeqCst) && self.rx.returned.load(Ordering::SeqCst);
        if !both || self.tx_switched() || self.has_stray() || !self.change(State::Linked, State::Over) {
            return;
        }
        self.rx.gate.fetch_and(!CLOSED, Ordering::SeqCst);
        tcp::set_option(fd, libc::TCP_NODELAY, self.nodelay.load(Ordering::Relaxed) as c_int);
        tcp::set_option(fd, libc::TCP_CORK, self.cork.load(Ordering::Relaxed) as c_int);
    }

    /// It did not come back: whoever has it is told, and sees no byte in a wrong place.
    pub fn break_connection(&self, fd: c_int) {
        self.break_off();
        tcp::disconnect(fd);
    }
}

/// Where `len` bytes lie that end where the unread ones begin. `None`: there is no room for them.
fn before(ring: &Consumer, len: usize) -> Option<Cursor> {
    let len = u32::try_from(len).ok().filter(|len| *len <= ring.size() - ring.available())?;
    let Cursor { wrap, count } = ring.cursor();
    Some(match count.checked_sub(len) {
        Some(count) => Cursor { wrap, count },
        None => Cursor { wrap: wrap.wrapping_sub(1), count: count + ring.size() - len },
    })
}
