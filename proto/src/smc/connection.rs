//! The states of a connection: who has shut down, closed or aborted (Linux `net/smc/smc_close.c`).
//!
//! The peer learns of a step by the [`StateFlags`] of the CDC message, and flags are never taken back. So what is
//! observed is a set that only grows, several steps may be seen at once, and it does not matter how often one looks.

use super::cdc::StateFlags;

/// Where a connection stands. Names and meaning are Linux's (`enum smc_state`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum State {
    /// Not yet connected.
    Init,
    /// Both sides may send.
    Active,
    /// This side has shut down or closed first; the peer has not.
    PeerCloseWait1,
    /// As before, and the peer has shut down its sending.
    PeerCloseWait2,
    /// The peer has shut down or closed first; this side has not.
    AppCloseWait1,
    /// As before, and this side has shut down its sending.
    AppCloseWait2,
    /// Both have finished; this side's program has not closed yet.
    AppFinCloseWait,
    /// This side has closed; the peer has shut down but not closed.
    PeerFinCloseWait,
    /// The peer has aborted; this side's program does not know yet.
    ProcessAbort,
    /// The end.
    Closed,
}

/// A connection's end: its state, and the flags it was made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Connection {
    state: State,
    sent: u8,
    received: u8,
    released: bool,
}

/// The peer will not look at, or write, anything any more.
const ANY_CLOSE: StateFlags = StateFlags::PEER_CONN_CLOSED.union(StateFlags::PEER_CONN_ABORT);

impl Default for Connection {
    fn default() -> Connection {
        Connection::new()
    }
}

impl Connection {
    /// Not connected.
    pub const fn new() -> Connection {
        Connection { state: State::Init, sent: 0, received: 0, released: false }
    }

    /// The handshake is over.
    pub fn establish(&mut self) {
        if self.state == State::Init {
            self.state = State::Active;
        }
    }

    /// Where it stands.
    pub const fn state(&self) -> State {
        self.state
    }

    /// What the peer is to be told: goes into every CDC message.
    pub const fn flags(&self) -> StateFlags {
        StateFlags::from_bits_truncate(self.sent)
    }

    /// What the peer has told.
    pub const fn received(&self) -> StateFlags {
        StateFlags::from_bits_truncate(self.received)
    }

    /// Whether this side's program may send.
    pub fn may_send(&self) -> bool {
        self.sent == 0
            && matches!(self.state, State::Active | State::AppCloseWait1)
            && !self.received().intersects(ANY_CLOSE)
    }

    /// Whether nothing more will come, beside what is in the buffer.
    pub const fn is_finished(&self) -> bool {
        self.received != 0
    }

    /// Whether the peer has broken the connection off.
    pub const fn is_aborted(&self) -> bool {
        self.received().contains(StateFlags::PEER_CONN_ABORT)
    }

    /// Whether both ends have said their last word: nobody writes into either DMB any more.
    pub const fn is_over(&self) -> bool {
        self.flags().intersects(ANY_CLOSE) && self.received().intersects(ANY_CLOSE)
    }

    /// This side will send no more. Whether [`flags`](Self::flags) changed, so that the peer has to be told.
    #[must_use = "the peer has to be told"]
    pub fn shut_down(&mut self) -> bool {
        self.state = match self.state {
            State::Active => State::PeerCloseWait1,
            State::AppCloseWait1 => State::AppCloseWait2,
            _ => return false,
        };
        self.send(StateFlags::PEER_DONE_WRITING)
    }

    /// This side's program closes; `unread`: without having read all that came. Whether the peer has to be told.
    #[must_use = "the peer has to be told"]
    pub fn close(&mut self, unread: bool) -> bool {
        self.released = true;
        let last = if unread { StateFlags::PEER_CONN_ABORT } else { StateFlags::PEER_CONN_CLOSED };
        match self.state {
            State::Init => {
                self.state = State::Closed;
                false
            }
            State::Active => {
                self.state = State::PeerCloseWait1;
                self.send(last)
            }
            State::AppFinCloseWait => {
                self.state = State::Closed;
                self.send(last)
            }
            State::AppCloseWait1 | State::AppCloseWait2 => {
                let peer_closed = self.received().intersects(ANY_CLOSE);
                self.state = if peer_closed { State::Closed } else { State::PeerFinCloseWait };
                self.send(last)
            }
            State::PeerCloseWait1 | State::PeerCloseWait2 => self.send(last),
            State::ProcessAbort => {
                self.state = State::Closed;
                self.send(StateFlags::PEER_CONN_ABORT)
            }
            State::PeerFinCloseWait => false,
            // What the peer aborted is answered, so that both know that it is over.
            State::Closed => self.send(StateFlags::PEER_CONN_ABORT),
        }
    }

    /// This side breaks the connection off: it broke the protocol, or is of no use any more. Whether the peer has to be told.
    #[must_use = "the peer has to be told"]
    pub fn abort(&mut self) -> bool {
        self.state = State::Closed;
        self.send(StateFlags::PEER_CONN_ABORT)
    }

    /// Looks at the peer's flags. Whether there is something new.
    pub fn observe(&mut self, flags: StateFlags) -> bool {
        // Flags are never taken back; who does so is not believed.
        let now = self.received | flags.bits();
        if now == self.received || self.state == State::Init && flags.is_empty() {
            return false;
        }
        self.received = now;
        self.state = if self.is_aborted() { self.after_abort() } else { self.after_close() };
        true
    }

    fn after_abort(&self) -> State {
        match self.state {
            State::Init | State::Active | State::AppCloseWait1 | State::AppFinCloseWait => {
                State::ProcessAbort
            }
            State::PeerCloseWait1 | State::PeerCloseWait2 | State::AppCloseWait2 if !self.released => {
                State::ProcessAbort
            }
            State::ProcessAbort => State::ProcessAbort,
            _ => State::Closed,
        }
    }

    fn after_close(&self) -> State {
        let closed = self.received().intersects(ANY_CLOSE);
        match self.state {
            State::Init | State::Active => State::AppCloseWait1,
            State::PeerCloseWait1 | State::PeerCloseWait2 if closed => {
                if self.released {
                    State::Closed
                } else {
                    State::AppFinCloseWait
                }
            }
            State::PeerCloseWait1 => State::PeerCloseWait2,
            State::AppCloseWait2 if closed => State::AppFinCloseWait,
            State::PeerFinCloseWait if closed => State::Closed,
            state => state,
        }
    }

    /// Adds to what the peer is told; nothing follows a last word.
    fn send(&mut self, flags: StateFlags) -> bool {
        if self.flags().intersects(ANY_CLOSE) {
            return false;
        }
        let before = self.sent;
        self.sent |= flags.bits();
        self.sent != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec;
    use std::vec::Vec;

    const DONE: StateFlags = StateFlags::PEER_DONE_WRITING;
    const CLOSED: StateFlags = StateFlags::PEER_CONN_CLOSED;
    const ABORT: StateFlags = StateFlags::PEER_CONN_ABORT;

    fn connected() -> Connection {
        let mut c = Connection::new();
        c.establish();
        c
    }

    #[test]
    fn one_side_after_the_other_closes() {
        let (mut a, mut b) = (connected(), connected());
        assert!(a.close(false));
        assert_eq!((a.state(), a.flags()), (State::PeerCloseWait1, CLOSED));
        assert!(b.observe(a.flags()));
        assert_eq!(b.state(), State::AppCloseWait1);
        assert!(b.is_finished() && !b.may_send());
        assert!(b.close(false));
        assert_eq!(b.state(), State::Closed);
        assert!(a.observe(b.flags()));
        assert_eq!(a.state(), State::Closed);
        assert!(a.is_over() && b.is_over());
    }

    #[test]
    fn half_a_close_leaves_the_other_direction_open() {
        let (mut a, mut b) = (connected(), connected());
        assert!(a.shut_down());
        assert!(!a.may_send() && !a.shut_down());
        b.observe(a.flags());
        assert!(b.is_finished() && b.may_send());
        assert_eq!((a.state(), b.state()), (State::PeerCloseWait1, State::AppCloseWait1));
        assert!(b.shut_down());
        a.observe(b.flags());
        assert_eq!((a.state(), b.state()), (State::PeerCloseWait2, State::AppCloseWait2));
        assert!(a.close(false));
        b.observe(a.flags());
        assert_eq!((a.state(), b.state()), (State::PeerCloseWait2, State::AppFinCloseWait));
        assert!(b.close(false));
        a.observe(b.flags());
        assert_eq!((a.state(), b.state()), (State::Closed, State::Closed));
        assert!(a.is_over() && b.is_over());
    }

    #[test]
    fn unread_data_makes_a_close_an_abort() {
        let (mut a, mut b) = (connected(), connected());
        assert!(a.close(true));
        b.observe(a.flags());
        assert_eq!((b.state(), b.is_aborted(), b.may_send()), (State::ProcessAbort, true, false));
        assert!(b.close(false));
        assert_eq!((b.state(), b.flags()), (State::Closed, ABORT));
        a.observe(b.flags());
        assert_eq!(a.state(), State::Closed);
    }

    #[test]
    fn a_peer_that_takes_flags_back_is_not_believed() {
        let mut a = connected();
        assert!(a.observe(DONE));
        assert!(!a.observe(StateFlags::empty()));
        assert!(a.is_finished());
        assert!(a.observe(CLOSED));
        assert_eq!(a.received(), DONE | CLOSED);
    }

    /// Both ends, all that their programs can do, and every moment at which one can look at the other's flags.
    #[test]
    fn however_two_ends_close_both_end_up_closed() {
        let mut seen = HashSet::new();
        let mut todo = vec![(connected(), connected())];
        let mut ends = 0;
        while let Some((a, b)) = todo.pop() {
            if !seen.insert((a, b)) {
                continue;
            }
            for (me, you) in [(a, b), (b, a)] {
                let mut next: Vec<(Connection, Connection)> = Vec::new();
                // A program that has closed does nothing more.
                if !me.released {
                    for step in 0..4 {
                        let mut me = me;
                        let _ = match step {
                            0 => me.shut_down(),
                            1 => me.close(false),
                            2 => me.close(true),
                            _ => {
                                let told = me.abort();
                                me.released = true;
                                told
                            }
                        };
                        next.push((me, you));
                    }
                }
                let mut looked = me;
                if looked.observe(you.flags()) {
                    next.push((looked, you));
                }
                // Who was told of no end may send unless it ended itself; who was told of a close may not.
                assert_eq!(
                    me.may_send(),
                    me.sent == 0 && !me.released && !me.received().intersects(ANY_CLOSE)
                );
                // What was ever told is never taken back.
                for (n, _) in &next {
                    assert!(n.flags().contains(me.flags()) && n.received().contains(me.received()));
                }
                todo.extend(next);
            }
            if a.released && b.released {
                let (mut a, mut b) = (a, b);
                while a.observe(b.flags()) | b.observe(a.flags()) {}
                assert_eq!((a.state(), b.state()), (State::Closed, State::Closed), "{a:?} {b:?}");
                assert!(a.is_over() && b.is_over(), "{a:?} {b:?}");
                ends += 1;
            }
        }
        assert!(seen.len() > 100 && ends > 20, "{} states, {ends} ends", seen.len());
    }

    #[test]
    fn who_closes_before_it_is_connected_tells_nobody() {
        let mut c = Connection::new();
        assert!(!c.close(false));
        assert_eq!(c.state(), State::Closed);
    }
}
