//! DMBs: [`Dmb`] at the owner, who reads, and [`RemoteDmb`] at the peer, who writes. How a token travels from one to
//! the other is theirs (`docs/device.md`, 1).

use crate::error::Error;
use crate::proto::control::PairFlags;
use crate::proto::ids::{Gid, Token};
use crate::proto::line::{ControlLine, LineStats, Wake};
use crate::shared::SharedMemory;
use crate::wait::{Awaited, Scope, Spinner, futex_wait, futex_wake};
use crate::will::{LastMove, Will};
use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What a DMB's handle needs of its device.
pub(crate) trait Port: Send + Sync {
    /// The owner lets go.
    fn unregister(&self, dmb: &DmbState);
    /// The peer lets go.
    fn detach(&self, dmb: &RemoteState);
    /// Rings the owner, whose wish to be rung was taken already.
    fn ring(&self, token: Token) -> Result<(), Error>;
    /// Whether the device is still connected.
    fn is_connected(&self) -> bool;
    /// The daemon's process, if this process can tell.
    fn daemon(&self) -> Option<i32> {
        None
    }
    /// Has a move made when this process ends, if that can be done and is of use; its number.
    fn leave_will(&self, _: &LastMove) -> Option<libc::c_ulong> {
        None
    }
    /// That move is not to be made.
    fn withdraw_will(&self, _: libc::c_ulong) {}
}

/// A control line in memory that stays as long as this.
#[derive(Debug, Clone)]
pub(crate) struct Line(SharedMemory);

impl Line {
    /// The line in this memory, which is 64 bytes and aligned to as many.
    pub(crate) fn new(memory: SharedMemory) -> Option<Line> {
        let fits = memory.len() == size_of::<ControlLine>();
        (fits && memory.as_ptr().cast::<ControlLine>().is_aligned()).then_some(Line(memory))
    }
}

impl std::ops::Deref for Line {
    type Target = ControlLine;

    fn deref(&self) -> &ControlLine {
        // SAFETY: `new` checked size and alignment, the memory is kept by `self`, and this crate, the device and the
        // peer access control lines by atomic operations.
        unsafe { ControlLine::from_ptr(self.0.as_ptr()) }
    }
}

/// What this process knows of a DMB that it owns. Shared by the handle and by the thread that receives events.
pub(crate) struct DmbState {
    pub(crate) token: Token,
    pub(crate) index: u32,
    pub(crate) peer: Gid,
    pub(crate) flags: PairFlags,
    pub(crate) line: Line,
    spinner: Spinner,
    /// Threads that have armed, or are about to.
    sleepers: AtomicU32,
    /// Counts the events for this DMB. Who waits for a `SIGNAL` event sleeps on it.
    bell: AtomicU32,
    /// For who waits with epoll; made when first asked for.
    fd: OnceLock<EventFd>,
    /// Whether the descriptor is to become readable by the next event.
    fd_armed: AtomicBool,
    peer_gone: AtomicBool,
    detached: AtomicBool,
}

impl DmbState {
    pub(crate) fn new(
        token: Token,
        index: u32,
        peer: Gid,
        flags: PairFlags,
        line: Line,
        spin: Duration,
    ) -> DmbState {
        // Who could be woken by futex runs under this kernel.
        let here = flags.contains(PairFlags::FUTEX);
        let awaited = if here { Awaited::Here } else { Awaited::Elsewhere };
        DmbState {
            token,
            index,
            peer,
            flags,
            line,
            spinner: Spinner::new(spin, awaited),
            sleepers: AtomicU32::new(0),
            bell: AtomicU32::new(0),
            fd: OnceLock::new(),
            fd_armed: AtomicBool::new(false),
            peer_gone: AtomicBool::new(false),
            detached: AtomicBool::new(false),
        }
    }

    /// Everybody who waits shall look again: for a `SIGNAL` event, and for whatever ends a wait.
    pub(crate) fn notify(&self) {
        // Who arms after this sees what happened before it; who armed before is woken.
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) != 0 {
            self.wake_sleepers();
        }
        if self.fd_armed.swap(false, Ordering::AcqRel)
            && let Some(fd) = self.fd.get()
        {
            // It fails only if 2^64 - 2 notifications were never read.
            let _ = fd.write(1);
        }
    }

    fn wake_sleepers(&self) {
        self.bell.fetch_add(1, Ordering::Release);
        futex_wake(&self.bell, i32::MAX, Scope::Process);
        if self.flags.contains(PairFlags::FUTEX) {
            futex_wake(self.line.futex_word(), i32::MAX, Scope::Host);
        }
    }

    pub(crate) fn set_peer_gone(&self) {
        self.peer_gone.store(true, Ordering::Release);
        self.interrupt();
    }

    pub(crate) fn set_detached(&self) {
        self.detached.store(true, Ordering::Release);
        self.interrupt();
    }

    /// Ends sleeps whose reason is not a signal: takes the wish to be woken, so that who is about to sleep does not.
    pub(crate) fn interrupt(&self) {
        self.line.disarm();
        self.notify();
    }
}

/// A DMB that this device owns: its peer writes, this process reads. Dropping it unregisters it.
///
/// All methods take `&self`, and any number of threads may wait at once.
pub struct Dmb {
    state: Arc<DmbState>,
    memory: SharedMemory,
    port: Arc<dyn Port>,
}

impl Dmb {
    pub(crate) fn new(state: Arc<DmbState>, memory: SharedMemory, port: Arc<dyn Port>) -> Dmb {
        Dmb { state, memory, port }
    }

    /// Its name, to be told to the peer.
    pub fn token(&self) -> Token {
        self.state.token
    }

    /// The device's number for it: the lowest that was free.
    pub fn index(&self) -> u32 {
        self.state.index
    }

    /// The device that may write.
    pub fn peer(&self) -> Gid {
        self.state.peer
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.memory.len()
    }

    /// Whether the peer can map it; else it can only move.
    pub fn peer_can_map(&self) -> bool {
        self.state.flags.contains(PairFlags::MAP)
    }

    /// What the peer writes.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Takes the bits that the peer has signalled since the last time. What the peer wrote before it set them is
    /// visible.
    #[inline]
    pub fn take_signals(&self) -> u64 {
        self.state.line.take_pending()
    }

    /// Whether the peer's device is gone: nothing new will come.
    pub fn is_peer_gone(&self) -> bool {
        self.state.peer_gone.load(Ordering::Acquire)
    }

    /// Whether the peer had attached the DMB and has let it go at some time. It could attach it again, and it could
    /// move.
    pub fn is_detached(&self) -> bool {
        self.state.detached.load(Ordering::Acquire)
    }

    /// What the sender counted of its notifications. The peer can write anything there: for people, not for decisions.
    pub fn line_stats(&self) -> LineStats {
        self.state.line.stats()
    }

    /// The longest that a wait spins before it sleeps; [`DEFAULT_SPIN`](crate::DEFAULT_SPIN) at first. Waits learn to
    /// spin less where it does not pay. Zero: always sleep; [`Duration::MAX`]: never.
    pub fn set_spin(&self, longest: Duration) {
        self.state.spinner.set_max(longest);
    }

    /// Waits until the peer signals, and takes the bits; 0 if `timeout` is over first.
    ///
    /// # Errors
    ///
    /// As [`wait_until`](Self::wait_until).
    pub fn wait(&self, timeout: Option<Duration>) -> Result<u64, Error> {
        let mut bits = 0;
        // A timeout beyond the clock's end is none.
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        self.wait_until(deadline, || {
            bits = self.take_signals();
            bits != 0
        })?;
        Ok(bits)
    }

    /// Waits until `ready` says so: it spins for a while, then sleeps until the peer notifies (by a signal, a move, or
    /// [`RemoteDmb::notify`]), and asks again. `Ok(false)`: the deadline is over and it was not ready.
    ///
    /// `ready` is called very often and at any time; it must be quick and not block. It is called once more after
    /// whatever ended a wait, so data that came before an end is never missed. It also decides about ends other than
    /// the error below, by [`is_detached`](Self::is_detached) for instance: that, too, wakes it.
    ///
    /// # Errors
    ///
    /// [`Error::PeerGone`] if it is not ready and never will be. [`Error::Disconnected`] if the daemon is lost and the
    /// peer cannot notify without it.
    #[inline]
    pub fn wait_until(
        &self,
        deadline: Option<Instant>,
        mut ready: impl FnMut() -> bool,
    ) -> Result<bool, Error> {
        if ready() {
            return Ok(true);
        }
        self.wait_slowly(deadline, &mut ready)
    }

    fn wait_slowly(&self, deadline: Option<Instant>, ready: &mut dyn FnMut() -> bool) -> Result<bool, Error> {
        let spinner = &self.state.spinner;
        let start = match spinner.spin(deadline, &mut *ready, || self.end().is_some()) {
            Ok(()) => return Ok(true),
            Err(start) => start,
        };
        let result = self.sleep(deadline, ready);
        if matches!(result, Ok(true)) {
            spinner.slept(start.elapsed());
        }
        result
    }

    fn sleep(&self, deadline: Option<Instant>, ready: &mut dyn FnMut() -> bool) -> Result<bool, Error> {
        let state = &*self.state;
        let wake = if state.flags.contains(PairFlags::FUTEX) { Wake::Futex } else { Wake::Signal };
        state.sleepers.fetch_add(1, Ordering::Relaxed);
        let result = loop {
            let bell = state.bell.load(Ordering::Acquire);
            state.line.arm(wake);
            if ready() {
                break Ok(true);
            }
            if let Some(end) = self.end() {
                break if ready() { Ok(true) } else { Err(end) };
            }
            if deadline.is_some_and(|d| Instant::now() >= d) {
                break Ok(false);
            }
            match wake {
                Wake::Futex => {
                    futex_wait(state.line.futex_word(), Wake::Futex as u32, Scope::Host, deadline);
                    // The peer woke all who sleep like this one, but knows of no descriptor.
                    if state.fd_armed.load(Ordering::Relaxed) && !state.line.is_armed() {
                        state.notify();
                    }
                }
                Wake::Signal => futex_wait(&state.bell, bell, Scope::Process, deadline),
            }
            // Who woke this one has taken the line's wish, and woke all others too. So the line, which is in the peer's
            // cache now, is left alone; if it is still armed, the worst is a wake-up in vain.
            if ready() {
                state.sleepers.fetch_sub(1, Ordering::Relaxed);
                return Ok(true);
            }
        };
        // Others may sleep in the belief that the line is armed: they have to arm again.
        state.line.disarm();
        state.sleepers.fetch_sub(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if state.sleepers.load(Ordering::Relaxed) != 0 || state.fd_armed.load(Ordering::Relaxed) {
            state.notify();
        }
        result
    }

    pub(crate) fn state(&self) -> &Arc<DmbState> {
        &self.state
    }

    /// Whether both sides are processes of this host, as far as they say.
    pub(crate) fn is_of_a_process(&self) -> bool {
        self.state.flags.contains(PairFlags::FUTEX)
    }

    /// The daemon's process, if this process can tell.
    pub(crate) fn daemon(&self) -> Option<i32> {
        self.port.daemon()
    }

    /// Why nothing will come any more.
    pub(crate) fn end(&self) -> Option<Error> {
        if self.is_peer_gone() {
            return Some(Error::PeerGone);
        }
        // Two processes ring each other by futex, and go on without the daemon.
        let needs_daemon = !self.state.flags.contains(PairFlags::FUTEX);
        (needs_daemon && !self.port.is_connected()).then_some(Error::Disconnected)
    }

    /// For epoll: asks that the descriptor ([`as_fd`](Self::as_fd)) become readable at the next notification. **Look
    /// again at what you wait for after this**; if it is there, [`disarm`](Self::disarm). One-shot.
    pub fn arm(&self) -> Result<(), Error> {
        let fd = self.eventfd()?;
        let _ = fd.read();
        self.state.fd_armed.store(true, Ordering::Release);
        self.state.line.arm(Wake::Signal);
        if self.end().is_some() {
            self.state.notify();
        }
        Ok(())
    }

    /// Takes back [`arm`](Self::arm).
    pub fn disarm(&self) {
        self.state.fd_armed.store(false, Ordering::Release);
        self.state.line.disarm();
        fence(Ordering::SeqCst);
        if self.state.sleepers.load(Ordering::Relaxed) != 0 {
            self.state.notify();
        }
    }

    /// The descriptor that becomes readable after [`arm`](Self::arm). It belongs to this handle; watch it for
    /// reading only.
    pub fn as_fd(&self) -> Result<BorrowedFd<'_>, Error> {
        // SAFETY: the descriptor is open as long as `state`, which `self` keeps.
        self.eventfd().map(|fd| unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) })
    }

    fn eventfd(&self) -> Result<&EventFd, Error> {
        if let Some(fd) = self.state.fd.get() {
            return Ok(fd);
        }
        let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
        Ok(self.state.fd.get_or_init(|| fd))
    }
}

impl Drop for Dmb {
    fn drop(&mut self) {
        self.port.unregister(&self.state);
    }
}

impl fmt::Debug for Dmb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dmb")
            .field("token", &self.token())
            .field("size", &self.size())
            .field("peer", &self.peer())
            .finish()
    }
}

/// What this process knows of a DMB that it has attached. Shared by the handle and by the thread that receives events.
pub(crate) struct RemoteState {
    pub(crate) token: Token,
    pub(crate) owner: Gid,
    line: Line,
    ended: AtomicBool,
}

impl RemoteState {
    pub(crate) fn new(token: Token, owner: Gid, line: Line) -> RemoteState {
        RemoteState { token, owner, line, ended: AtomicBool::new(false) }
    }

    pub(crate) fn set_ended(&self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// A DMB that a peer owns and this device has attached: this process writes, the owner reads. Dropping it detaches it.
pub struct RemoteDmb {
    state: Arc<RemoteState>,
    memory: SharedMemory,
    port: Arc<dyn Port>,
}

impl RemoteDmb {
    pub(crate) fn new(state: Arc<RemoteState>, memory: SharedMemory, port: Arc<dyn Port>) -> RemoteDmb {
        RemoteDmb { state, memory, port }
    }

    /// Its name.
    pub fn token(&self) -> Token {
        self.state.token
    }

    /// The device that reads.
    pub fn owner(&self) -> Gid {
        self.state.owner
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.memory.len()
    }

    /// Where its control line lies in this process, 64 bytes, for who counts there without this handle. It stays mapped as
    /// long as the handle.
    pub fn line_address(&self) -> *mut u8 {
        self.state.line.futex_word().as_ptr().cast()
    }

    /// What the owner reads. Writing there is sending; [`notify`](Self::notify) or [`signal`](Self::signal) tells.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Writes, without telling the owner.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfBounds`].
    #[inline]
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<(), Error> {
        Ok(self.memory.write(offset, data)?)
    }

    /// Sets bits in the owner's mask, and wakes the owner if it sleeps. What was written before is visible before.
    ///
    /// # Errors
    ///
    /// [`Error::Disconnected`] if the owner sleeps and cannot be woken without the daemon.
    #[inline]
    pub fn signal(&self, mask: u64) -> Result<(), Error> {
        match self.state.line.signal(mask) {
            None => Ok(()),
            Some(wake) => self.ring(wake),
        }
    }

    /// Wakes the owner if it sleeps, without setting bits: for who looks at the memory itself.
    ///
    /// # Errors
    ///
    /// As [`signal`](Self::signal).
    #[inline]
    pub fn notify(&self) -> Result<(), Error> {
        match self.state.line.ring() {
            None => Ok(()),
            Some(wake) => self.ring(wake),
        }
    }

    #[cold]
    fn ring(&self, wake: Wake) -> Result<(), Error> {
        match wake {
            Wake::Futex => {
                futex_wake(self.state.line.futex_word(), i32::MAX, Scope::Host);
                Ok(())
            }
            Wake::Signal => self.port.ring(self.state.token),
        }
    }

    /// Has the owner told of this process's end by this byte at this place, and these bits.
    pub(crate) fn leave_will(&self, offset: u64, byte: u8, mask: u64) -> Option<Will> {
        Will::leave(&self.port, &LastMove { token: self.token(), offset, byte, mask })
    }

    /// Whether the owner still has it registered, as far as is known: after it has not, writing reaches nobody.
    pub fn is_registered(&self) -> bool {
        !self.state.ended.load(Ordering::Acquire)
    }
}

impl Drop for RemoteDmb {
    fn drop(&mut self) {
        self.port.detach(&self.state);
    }
}

impl fmt::Debug for RemoteDmb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteDmb")
            .field("token", &self.token())
            .field("size", &self.size())
            .field("owner", &self.owner())
            .finish()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::shared::tests::memory;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::sync::Mutex;
    use std::thread;

    /// A device that remembers what its handles asked for.
    #[derive(Default)]
    pub(crate) struct FakePort {
        lost: AtomicBool,
        asked: Mutex<Vec<String>>,
        /// Who is notified by a ring.
        owner: OnceLock<Arc<DmbState>>,
    }

    impl Port for FakePort {
        fn unregister(&self, dmb: &DmbState) {
            self.asked.lock().unwrap().push(format!("unregister {}", dmb.token));
        }

        fn detach(&self, dmb: &RemoteState) {
            self.asked.lock().unwrap().push(format!("detach {}", dmb.token));
        }

        fn ring(&self, token: Token) -> Result<(), Error> {
            self.asked.lock().unwrap().push(format!("ring {token}"));
            self.owner.get().unwrap().notify();
            Ok(())
        }

        fn is_connected(&self) -> bool {
            !self.lost.load(Ordering::Acquire)
        }

        fn leave_will(&self, last: &LastMove) -> Option<libc::c_ulong> {
            let mut asked = self.asked.lock().unwrap();
            asked.push(format!("will {:#x} at {}, then {}", last.byte, last.offset, last.mask));
            Some(asked.len() as libc::c_ulong)
        }

        fn withdraw_will(&self, number: libc::c_ulong) {
            self.asked.lock().unwrap().push(format!("withdraw {number}"));
        }
    }

    impl FakePort {
        /// What handles have asked for since this was last called, in order.
        pub(crate) fn asked(&self) -> Vec<String> {
            std::mem::take(&mut self.asked.lock().unwrap())
        }
    }

    /// Both ends of a DMB of `size` bytes, with no device.
    pub(crate) fn pair(size: usize, flags: PairFlags) -> (Dmb, RemoteDmb, Arc<FakePort>) {
        let all = memory(size + 4096);
        let line = Line::new(all.part(0, 64).unwrap()).unwrap();
        let data = all.part(4096, size).unwrap();
        let (token, gid) = (Token::from_bits(0x1_0000_0001), Gid::from_u64(7));
        let port = Arc::new(FakePort::default());
        let state = Arc::new(DmbState::new(token, 0, gid, flags, line.clone(), crate::DEFAULT_SPIN));
        let _ = port.owner.set(state.clone());
        let dmb = Dmb::new(state, data.clone(), port.clone());
        let remote = RemoteDmb::new(Arc::new(RemoteState::new(token, gid, line)), data, port.clone());
        (dmb, remote, port)
    }

    const BOTH: [PairFlags; 2] = [PairFlags::MAP, PairFlags::MAP.union(PairFlags::FUTEX)];

    #[test]
    fn what_was_written_before_a_signal_is_there_after_it() {
        for flags in BOTH {
            let (dmb, remote, _) = pair(4096, flags);
            remote.write(8, b"data").unwrap();
            remote.signal(4).unwrap();
            remote.signal(1).unwrap();
            assert_eq!(dmb.wait(None).unwrap(), 5);
            let mut data = [0; 4];
            dmb.memory().read(8, &mut data).unwrap();
            assert_eq!(&data, b"data");
            assert_eq!(dmb.wait(Some(Duration::ZERO)).unwrap(), 0);
        }
    }

    #[test]
    fn a_ping_pong_of_sleepers_loses_no_wake_up() {
        for flags in BOTH {
            let (here, to_here, _a) = pair(4096, flags);
            let (there, to_there, _b) = pair(4096, flags);
            here.set_spin(Duration::ZERO);
            there.set_spin(Duration::ZERO);
            thread::scope(|scope| {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        assert_eq!(there.wait(None).unwrap(), 1);
                        to_here.signal(2).unwrap();
                    }
                });
                for _ in 0..2000 {
                    to_there.signal(1).unwrap();
                    assert_eq!(here.wait(None).unwrap(), 2);
                }
            });
        }
    }

    #[test]
    fn two_threads_and_a_descriptor_may_wait_on_one_dmb() {
        for flags in BOTH {
            let (dmb, remote, _) = pair(4096, flags);
            dmb.set_spin(Duration::ZERO);
            let word = |at| dmb.memory().slice(..).read_u64(at);
            thread::scope(|scope| {
                for at in [0, 8] {
                    let dmb = &dmb;
                    scope.spawn(move || {
                        for round in 1..=500 {
                            assert!(dmb.wait_until(None, || word(at) >= round).unwrap());
                        }
                    });
                }
                scope.spawn(|| {
                    for round in 1..=500 {
                        loop {
                            dmb.arm().unwrap();
                            if word(16) >= round {
                                dmb.disarm();
                                break;
                            }
                            let mut fds = [PollFd::new(dmb.as_fd().unwrap(), PollFlags::POLLIN)];
                            poll(&mut fds, PollTimeout::NONE).unwrap();
                        }
                    }
                });
                for round in 1..=500 {
                    for at in [16, 0, 8] {
                        remote.memory().slice(..).write_u64(at, round);
                        remote.notify().unwrap();
                    }
                }
            });
        }
    }

    #[test]
    fn a_sleeper_is_woken_when_its_peer_goes_and_still_sees_the_last_data() {
        for flags in BOTH {
            let (dmb, remote, _) = pair(4096, flags);
            dmb.set_spin(Duration::ZERO);
            thread::scope(|scope| {
                let waiter = scope.spawn(|| dmb.wait(None));
                while dmb.state.sleepers.load(Ordering::Relaxed) == 0 {
                    thread::yield_now();
                }
                dmb.state.set_peer_gone();
                assert!(matches!(waiter.join().unwrap(), Err(Error::PeerGone)));
            });
            remote.signal(9).unwrap();
            assert_eq!(dmb.wait(None).unwrap(), 9);
            assert!(matches!(dmb.wait(None), Err(Error::PeerGone)));
        }
    }

    #[test]
    fn without_the_daemon_only_processes_go_on() {
        let (dmb, remote, port) = pair(4096, PairFlags::MAP);
        port.lost.store(true, Ordering::Release);
        assert!(matches!(dmb.wait(None), Err(Error::Disconnected)));
        drop((dmb, remote));

        let (dmb, remote, port) = pair(4096, PairFlags::FUTEX);
        dmb.set_spin(Duration::ZERO);
        port.lost.store(true, Ordering::Release);
        thread::scope(|scope| {
            let waiter = scope.spawn(|| dmb.wait(None));
            remote.signal(1).unwrap();
            assert_eq!(waiter.join().unwrap().unwrap(), 1);
        });
    }

    #[test]
    fn dropping_a_handle_releases_it() {
        let (dmb, remote, port) = pair(4096, PairFlags::MAP);
        let token = dmb.token();
        drop(remote);
        drop(dmb);
        assert_eq!(port.asked(), [format!("detach {token}"), format!("unregister {token}")]);
    }

    #[test]
    fn a_deadline_ends_a_wait() {
        let (dmb, _remote, _) = pair(4096, PairFlags::FUTEX);
        let deadline = Instant::now() + Duration::from_millis(2);
        assert!(!dmb.wait_until(Some(deadline), || false).unwrap());
        assert!(Instant::now() >= deadline);
    }
}
