//! Reading from a connection: TCP up to where the peer has switched, then the ring; and waiting for data.

use super::*;

impl Conn {
    /// Receives. `real` is the call itself, for when it is TCP's.
    pub fn recv<'a>(
        &self,
        fd: c_int,
        to: impl FnOnce() -> Result<&'a [libc::iovec], c_int>,
        flags: c_int,
        real: impl FnOnce() -> Outcome,
    ) -> Outcome {
        if self.enter_rx() {
            let _inside = Finally(|| self.leave_rx());
            return real();
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
    pub(super) fn get(&self, fd: c_int, to: &mut Writer<'_>, flags: c_int) -> Result<Option<usize>, c_int> {
        if self.rx.lock.is_interrupted() {
            // A signal's handler reads what this thread is just reading.
            return Err(libc::EINTR);
        }
        let _lock = self.rx.lock.take();
        if self.is_gone() && !self.rx.returned.load(Ordering::Relaxed) {
            return Err(self.break_off());
        }
        if to.left() == 0 {
            return Ok(self.is_readable(fd).then_some(0));
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
        if (ring.available() as usize) < to.left() {
            self.observe_data(ring, seen)?;
        }
        if ring.available() == 0 && self.return_rx(fd, ring, seen)? {
            return self.get_tcp(fd, to, flags).transpose();
        }
        if ring.available() == 0 {
            self.report(fd, ring);
            if self.rx.shut.load(Ordering::Relaxed) {
                return Ok(Some(0));
            }
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

    /// Whether a read would not wait. Under the lock.
    fn is_readable(&self, fd: c_int) -> bool {
        let on_ring = self.rx.on_ring.load(Ordering::Acquire) || self.find_switch(fd) == Some(0);
        let mut look = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd.
        let mut tcp = || self.has_stray() || errno::keep(|| unsafe { real::poll(&mut look, 1, 0) }) != 0;
        let data = if on_ring { self.has_data() } else { tcp() };
        data || self.eof.load(Ordering::Relaxed) || self.rx.shut.load(Ordering::Relaxed)
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
    pub(super) fn find_switch(&self, fd: c_int) -> Option<u64> {
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
    pub(super) fn observe_data(&self, ring: &mut Consumer, seen: &mut CursorWord) -> Result<(), c_int> {
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
    pub(super) fn uneaten(&self) -> u64 {
        self.local().wakes.load(Ordering::Acquire).wrapping_sub(self.rx.eaten.load(Ordering::Relaxed))
    }

    /// Bytes that were sent to wake were taken away.
    pub(super) fn ate(&self, fd: c_int, bytes: usize) {
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
    pub(super) fn settle(&self, fd: c_int) {
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
        let asleep = Finally(|| {
            self.rx.sleepers.fetch_sub(1, Ordering::SeqCst);
        });
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
        drop(asleep);
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
}
