//! Writing to a connection: into the ring once its direction has switched, and waiting for room there.

use super::*;
use std::cell::Cell;
use std::mem::ManuallyDrop;

/// The address of a connection, a descriptor of it, and what is to be written.
type PutOff = (usize, c_int, Vec<u8>);

thread_local! {
    /// What handlers have written to connections while this thread wrote to them.
    static PUT_OFF: Cell<ManuallyDrop<Vec<PutOff>>> = const { Cell::new(ManuallyDrop::new(Vec::new())) };
}

/// Writes what was put off, once a call is done.
#[inline]
pub fn write_put_off() {
    PUT_OFF.with(|all| {
        // SAFETY: this thread's, which looks whether there is something.
        if unsafe { !(*all.as_ptr()).is_empty() } {
            write_all_put_off(ManuallyDrop::into_inner(all.replace(ManuallyDrop::new(Vec::new()))));
        }
    });
}

#[cold]
fn write_all_put_off(all: Vec<PutOff>) {
    for (at, fd, data) in all {
        // SAFETY: a connection's address, in memory that stays mapped.
        let conn = unsafe { &*(at as *const Conn) };
        let list = crate::iov::one(data.as_ptr().cast(), data.len());
        let mut from = Reader::new(&list);
        while from.left() != 0 {
            let put = match conn.put(fd, &mut from, MSG_NOSIGNAL) {
                Err(BACK) => conn.send_by_tcp(fd, &mut from, MSG_NOSIGNAL, 0).map(|_| ()),
                Ok(_) if from.left() != 0 => conn.wait_for_room(fd),
                put => put.map(|_| ()),
            };
            // Who wrote it has been told that it was written.
            if put.is_err_and(|errno| errno != libc::EINTR && errno != EAGAIN) {
                break;
            }
        }
    }
}

impl Conn {
    /// Sends. `real` is the call itself, for when it is TCP's.
    pub fn send<'a>(
        &self,
        fd: c_int,
        from: impl FnOnce() -> Result<&'a [libc::iovec], c_int>,
        flags: c_int,
        real: impl FnOnce() -> Outcome,
    ) -> Outcome {
        if self.enter_tx(fd) {
            let _inside = Finally(|| self.leave_tx(fd));
            return real();
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
            crate::service::watch_full();
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
        if self.tx.lock.is_interrupted() {
            return Ok(self.put_off(fd, from));
        }
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

    /// A signal's handler writes to what this thread is just writing to: it will be written behind that.
    #[cold]
    fn put_off(&self, fd: c_int, from: &mut Reader<'_>) -> usize {
        let len = from.left();
        let mut data = vec![0u8; len];
        let to = data.as_mut_ptr();
        // SAFETY: `len` bytes of the program's, and as many of ours.
        unsafe { from.copy_to(len, |src, at, len| std::ptr::copy_nonoverlapping(src, to.add(at), len)) };
        let at = std::ptr::from_ref(self) as usize;
        PUT_OFF.with(|all| {
            let mut list = all.replace(ManuallyDrop::new(Vec::new()));
            list.push((at, fd, data));
            all.set(list);
        });
        len
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
            crate::service::watch_full();
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

    pub(super) fn break_off(&self) -> c_int {
        self.error.store(ECONNRESET as u32, Ordering::Relaxed);
        self.eof.store(true, Ordering::Relaxed);
        ECONNRESET
    }

    /// How far the peer has read, if the ring is full; and whether there is something to be read here.
    pub fn stall(&self) -> Option<(u64, bool)> {
        let moves = self.state() == State::Linked && self.is_full();
        moves.then(|| (position(self.local().cdc.load_cons()), self.has_data()))
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
    pub(super) fn is_broken(&self) -> bool {
        let theirs = self.local().cdc.load_prod().state;
        self.error.load(Ordering::Relaxed) != 0
            || theirs.intersects(StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT)
            || (self.eof.load(Ordering::Relaxed) && !theirs.contains(StateFlags::PEER_DONE_WRITING))
            || self.tx.state.load(Ordering::Relaxed) != 0
    }
}
