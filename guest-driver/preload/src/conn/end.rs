//! The end of a connection: of one of its directions, or of both.

use super::*;

impl Conn {
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
