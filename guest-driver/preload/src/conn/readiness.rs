//! What `poll`, epoll and `ioctl` ask of a connection, and how who sleeps on it is woken.

use super::*;
use crate::poll::{IN, OUT};

impl Conn {
    /// What of `IN` and `OUT` is so as far as the rings say, and of which of the two the kernel has to be asked.
    pub fn readiness(&self, fd: c_int) -> (i16, i16) {
        if !self.is_moved() {
            return (0, IN | OUT);
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
            ask |= IN;
            if self.has_stray() {
                ready |= IN;
            }
        } else {
            if self.has_data() || self.eof.load(Ordering::Relaxed) || self.rx.shut.load(Ordering::Relaxed) {
                ready |= IN;
            }
            if self.rx.shut.load(Ordering::Relaxed) {
                ready |= libc::POLLRDHUP;
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
            ask |= OUT;
        } else if self.has_room() || self.is_broken() {
            ready |= OUT;
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
        if events & (IN | libc::POLLRDHUP) != 0 {
            what |= DATA;
        }
        if events & OUT != 0 && self.tx_in_ring() {
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
}
