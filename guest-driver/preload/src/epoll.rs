//! epoll. The kernel's own instances stay what they are, so that nesting, sharing and threads work; what is added is what the
//! kernel cannot know.
//!
//! A moved connection is registered with a token of ours, so that its events can be translated: a byte that was sent to
//! wake becomes what the ring says. A connection that was active is *hot*: looked at in memory, without the kernel. Before
//! a thread sleeps it arms every hot one (its peer then sends a byte). Who is not active for long is armed and forgotten,
//! so that thousands of them cost nothing.

use crate::conn::{Conn, State};
use crate::crowd;
use crate::lock::Lock;
use crate::real;
use crate::table::{self, Entry, Kind};
use crate::{arena, errno, handover, poll, service};
use dmbridge::Spinner;
use libc::{
    EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLERR, EPOLLET, EPOLLEXCLUSIVE, EPOLLHUP, EPOLLONESHOT,
    EPOLLRDHUP, c_int, epoll_event, sigset_t, timespec,
};
use std::cell::UnsafeCell;
use std::ptr::null;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

mod wait;

use wait::Out;
pub use wait::{Until, epoll_wait};

const IN: u32 = poll::IN as u32;
const OUT: u32 = poll::OUT as u32;
const RDHUP: u32 = EPOLLRDHUP as u32;
const ALWAYS: u32 = (EPOLLERR | EPOLLHUP) as u32;
const EDGE: u32 = EPOLLET as u32;
const ONESHOT: u32 = EPOLLONESHOT as u32;
const EXCLUSIVE: u32 = EPOLLEXCLUSIVE as u32;

/// The upper half of our tokens; the lower is the descriptor. No address and no small number looks like it.
const TOKEN: u64 = 0xd3b7_1d6e << 32;
/// The token of an instance's bell.
const BELL: u64 = TOKEN | 0xffff_ffff;
/// So many looks in vain, and a hot connection is armed.
const IDLE: u32 = 64;
/// Who says nothing for so long a sleep is armed and forgotten, too.
const SILENCE: Duration = Duration::from_millis(20);
/// The kernel is asked for everything else at every so many-th wait that needs no kernel.
const TURNS: u32 = 8;
/// Instances nest no deeper (Linux' `EP_MAX_NESTS`, fs/eventpoll.c).
const NESTS: u32 = 4;

/// Where a descriptor is registered.
pub struct Registrations {
    lock: Lock,
    inner: UnsafeCell<Inner>,
}

#[derive(Default)]
struct Inner {
    /// New registrations get our token at once.
    linked: bool,
    list: Vec<Registration>,
}

/// What the program asked an instance to tell it of a descriptor.
struct Registration {
    set: &'static Set,
    events: u32,
    data: u64,
    /// The kernel has our token.
    converted: bool,
    /// What the kernel was last asked for.
    kernel: u32,
    /// A one-shot that has fired.
    fired: bool,
    /// What was last told of incoming data, for edges.
    told: u64,
    /// That there is room has to be told once, for edges.
    tell_room: bool,
    idle: u32,
}

/// An epoll instance.
pub struct Set {
    lock: Lock,
    /// A descriptor of it: programs make copies of one, and register by one and wait by another. -1: none.
    fd: AtomicI32,
    hot: UnsafeCell<Vec<c_int>>,
    /// Instances that are registered in this one.
    nested: UnsafeCell<Vec<c_int>>,
    converted: AtomicU32,
    sleepers: AtomicU32,
    turn: AtomicU32,
    /// The name of the last sleep; 0: none yet.
    sleep: AtomicU64,
    /// The kernel had something else than wake-ups when it was last asked.
    busy: AtomicBool,
    /// It was asked about by way of another call, so what the kernel says of it has to be taken from there.
    watched: AtomicBool,
    /// An eventfd that is registered in it, to wake who sleeps for what only we know; 0: none.
    bell: AtomicI32,
    spinner: OnceLock<Spinner>,
}

// SAFETY: the cells are accessed under the locks.
unsafe impl Sync for Registrations {}
// SAFETY: as above.
unsafe impl Sync for Set {}

impl Default for Registrations {
    fn default() -> Registrations {
        // SAFETY: all-zero bytes are a free Lock.
        Registrations { lock: unsafe { std::mem::zeroed() }, inner: UnsafeCell::default() }
    }
}

impl Default for Set {
    fn default() -> Set {
        Set {
            // SAFETY: all-zero bytes are a free Lock.
            lock: unsafe { std::mem::zeroed() },
            fd: AtomicI32::new(-1),
            hot: UnsafeCell::default(),
            nested: UnsafeCell::default(),
            converted: AtomicU32::new(0),
            sleepers: AtomicU32::new(0),
            turn: AtomicU32::new(0),
            sleep: AtomicU64::new(0),
            busy: AtomicBool::new(true),
            watched: AtomicBool::new(false),
            bell: AtomicI32::new(0),
            spinner: OnceLock::new(),
        }
    }
}

impl Registrations {
    fn with<T>(&self, run: impl FnOnce(&mut Inner) -> T) -> T {
        let _lock = self.lock.take();
        // SAFETY: under the lock.
        run(unsafe { &mut *self.inner.get() })
    }

    /// The descriptor has a new life.
    pub fn clear(&self) {
        let old = self.with(std::mem::take);
        for registration in old.list.iter().filter(|r| r.converted) {
            registration.set.lose();
        }
    }

    /// For fork: nobody is inside, from here to `release`.
    pub fn hold(&self) {
        std::mem::forget(self.lock.take());
    }

    /// See `hold`.
    pub fn release(&self) {
        self.lock.release();
    }
}

impl Set {
    fn with_hot<T>(&self, run: impl FnOnce(&mut Vec<c_int>) -> T) -> T {
        let _lock = self.lock.take();
        // SAFETY: under the lock.
        run(unsafe { &mut *self.hot.get() })
    }

    fn heat(&self, fd: c_int) {
        self.with_hot(|hot| {
            if !hot.contains(&fd) {
                hot.push(fd);
            }
        });
    }

    /// Wakes who sleeps, to look at what is hot.
    fn ring(&self) {
        let bell = self.bell.load(Ordering::Acquire);
        if bell > 0 {
            let one = 1u64;
            // SAFETY: 8 bytes into an eventfd.
            errno::keep(|| unsafe { real::write(bell, (&raw const one).cast(), 8) });
        }
    }

    /// A moved connection is not registered any more. The byte that would have woken a sleeper, also for others, may have come to it.
    fn lose(&self) {
        self.converted.fetch_sub(1, Ordering::AcqRel);
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            self.ring();
        }
    }

    fn answer_bell(&self) {
        let mut count = 0u64;
        // SAFETY: 8 bytes out of an eventfd.
        errno::keep(|| unsafe { real::read(self.bell.load(Ordering::Acquire), (&raw mut count).cast(), 8) });
    }

    fn make_bell(&self) {
        let epoll = self.fd.load(Ordering::Acquire);
        if self.bell.load(Ordering::Acquire) != 0 {
            return;
        }
        errno::keep(|| {
            // SAFETY: a new eventfd, registered in the program's instance.
            unsafe {
                let bell = arena::own(real::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK));
                let mut event = epoll_event { events: IN | EDGE, u64: BELL };
                if bell > 0
                    && real::epoll_ctl(epoll, EPOLL_CTL_ADD, bell, &mut event) == 0
                    && self.bell.compare_exchange(0, bell, Ordering::AcqRel, Ordering::Relaxed).is_ok()
                {
                    return;
                }
                arena::disown(bell);
            }
        });
    }

    /// A descriptor of the instance is about to be closed. True: another one is left. With the last one, what was registered
    /// with it is not any more.
    pub fn close(&self, epoll: c_int) -> bool {
        let other = table::all().find(|(fd, entry)| {
            *fd != epoll && entry.kind() == Kind::Epoll && entry.set().is_some_and(|set| set.is(self))
        });
        if let Some((other, _)) = other {
            self.fd.store(other, Ordering::Release);
            return true;
        }
        self.fd.store(-1, Ordering::Release);
        for (_, entry) in table::all() {
            if let Some(registrations) = entry.registrations() {
                registrations.with(|inner| inner.list.retain(|r| !r.set.is(self)));
            }
        }
        self.with_hot(Vec::clear);
        {
            let _lock = self.lock.take();
            // SAFETY: under the lock.
            unsafe { (*self.nested.get()).clear() };
        }
        self.watched.store(false, Ordering::Relaxed);
        self.converted.store(0, Ordering::Release);
        let bell = self.bell.swap(0, Ordering::AcqRel);
        if bell > 0 {
            arena::disown(bell);
        }
        false
    }

    fn is(&self, other: &Set) -> bool {
        std::ptr::eq(self, other)
    }

    fn has_moved(&self) -> bool {
        self.converted.load(Ordering::Acquire) != 0
    }

    /// For fork, as [`Registrations::hold`].
    pub fn hold(&self) {
        std::mem::forget(self.lock.take());
    }

    /// See `hold`.
    pub fn release(&self) {
        self.lock.release();
    }

    fn spinner(&self) -> &Spinner {
        self.spinner.get_or_init(|| Spinner::local(dmbridge::DEFAULT_SPIN))
    }

    /// Before the kernel is asked about this instance by way of another one, or of `poll`: arms what is hot, here and in what
    /// is nested here, or makes the kernel say that there is something.
    pub fn prepare(&self) {
        self.prepare_to(NESTS);
    }

    fn prepare_to(&self, depth: u32) {
        self.watched.store(true, Ordering::Relaxed);
        self.prepare_nested(depth);
        if self.has_moved() && !self.arm() {
            self.ring();
        }
    }

    /// Prepares what is nested here, so many levels down.
    fn prepare_nested(&self, depth: u32) {
        let nested = {
            let _lock = self.lock.take();
            // SAFETY: under the lock.
            unsafe { (*self.nested.get()).clone() }
        };
        for inner in nested.into_iter().filter(|_| depth != 0) {
            let entry = table::get(inner).filter(|entry| entry.kind() == Kind::Epoll);
            if let Some(set) = entry.and_then(Entry::set) {
                set.prepare_to(depth - 1);
            }
        }
    }

    /// Whether the kernel alone does not know of all that comes.
    pub fn needs_us(&self) -> bool {
        let has_nested = || {
            let _lock = self.lock.take();
            // SAFETY: under the lock.
            unsafe { !(*self.nested.get()).is_empty() }
        };
        self.has_moved() || has_nested()
    }

    /// Arms everything that is hot. False if something is ready.
    fn arm(&self) -> bool {
        self.with_hot(|hot| {
            let mut quiet = true;
            let sleep = self.next_sleep();
            hot.retain(|&fd| {
                let Some((entry, conn)) = converted(fd) else { return false };
                let Some(registrations) = entry.registrations() else { return false };
                registrations.with(|inner| {
                    let Some(r) = inner.list.iter_mut().find(|r| r.set.is(self) && r.converted) else {
                        return false;
                    };
                    r.idle += 1;
                    let stays = r.idle < IDLE;
                    // Who is forgotten wakes by itself.
                    let calm = r.arm(fd, conn, if stays { sleep } else { 0 });
                    quiet &= calm;
                    stays || !calm
                })
            });
            quiet
        })
    }

    /// Forgets all that is hot, and has each of them wake by itself.
    fn cool(&self) {
        self.with_hot(|hot| {
            hot.retain(|&fd| {
                let quiet = converted(fd).and_then(|(entry, conn)| {
                    entry.registrations()?.with(|inner| {
                        let r = inner.list.iter_mut().find(|r| r.set.is(self) && r.converted)?;
                        r.idle = 0;
                        Some(r.arm(fd, conn, 0))
                    })
                });
                quiet == Some(false)
            });
        });
    }

    /// A name that no other sleep has, on this machine or another one; 0, which is none, as long as there is no randomness. Under
    /// the lock.
    fn next_sleep(&self) -> u64 {
        let mut last = self.sleep.load(Ordering::Relaxed);
        if last == 0 {
            last = crate::random();
            if last == 0 {
                return 0;
            }
        }
        let next = last.wrapping_add(1).max(1);
        self.sleep.store(next, Ordering::Relaxed);
        next
    }

    /// Somebody is awake, and looks by itself: peers can spare their bytes, unless somebody else sleeps.
    fn disarm(&self) {
        self.with_hot(|hot| {
            if self.sleepers.load(Ordering::SeqCst) == 0 {
                hot.iter().filter_map(|&fd| converted(fd)).for_each(|(_, conn)| conn.disarm());
            }
        });
    }

    /// Whether something hot is ready.
    fn any_ready(&self) -> bool {
        self.with_hot(|hot| {
            hot.iter().any(|&fd| {
                converted(fd).is_some_and(|(entry, conn)| {
                    entry.registrations().is_some_and(|registrations| {
                        registrations.with(|inner| {
                            inner.list.iter().any(|r| r.set.is(self) && r.converted && r.peek(fd, conn) != 0)
                        })
                    })
                })
            })
        })
    }

    /// Tells of what is hot and ready.
    fn collect(&self, to: &mut Out) {
        self.with_hot(|hot| {
            let mut at = 0;
            let mut looked = 0;
            let all = hot.len();
            while at < hot.len() && looked < all && !to.is_full() {
                looked += 1;
                let fd = hot[at];
                let keep = converted(fd).and_then(|(entry, conn)| {
                    entry.registrations()?.with(|inner| {
                        let r = inner.list.iter_mut().find(|r| r.set.is(self) && r.converted)?;
                        let events = r.take(fd, conn);
                        if events != 0 {
                            r.idle = 0;
                            to.put(events, r.data);
                            return (!r.fired).then_some(());
                        }
                        r.idle += 1;
                        if r.idle > IDLE {
                            r.idle = 0;
                            return (!r.arm(fd, conn, 0)).then_some(());
                        }
                        Some(())
                    })
                });
                if keep.is_some() {
                    at += 1;
                } else {
                    hot.swap_remove(at);
                }
            }
            // Who was not looked at comes first the next time.
            if at < hot.len() {
                hot.rotate_left(at);
            }
        });
    }

    /// Translates what the kernel said, which lies behind what was told already.
    fn translate(&self, to: &mut Out, count: usize) {
        let mut busy = false;
        for i in 0..count {
            let event = to.raw(i);
            let (events, token) = (event.events, event.u64);
            if token == BELL {
                self.answer_bell();
                continue;
            }
            if token & !0xffff_ffff != TOKEN {
                to.put(events, token);
                busy = true;
                continue;
            }
            let fd = token as u32 as c_int;
            let Some((entry, conn)) = converted(fd) else { continue };
            conn.look_at_edge(fd, events & (RDHUP | ALWAYS) != 0);
            let Some(registrations) = entry.registrations() else { continue };
            let told = registrations.with(|inner| {
                let r = inner.list.iter_mut().find(|r| r.set.is(self) && r.converted)?;
                if r.fired {
                    return None;
                }
                let (_, ask) = conn.readiness(fd);
                // The kernel's word counts for what is still TCP, and for the end of the connection.
                let native = events & (ask as u32 | ALWAYS | RDHUP) & (r.events | ALWAYS);
                let ours = r.take(fd, conn);
                busy |= native != 0;
                if native | ours == 0 && r.kernel & ONESHOT != 0 {
                    // It was for us, and the program's shot is not fired.
                    r.kernel = 0;
                    r.sync(fd, conn);
                } else if native | ours != 0 && r.events & ONESHOT != 0 {
                    r.fired = true;
                } else {
                    r.sync(fd, conn);
                }
                Some((native | ours, r.data))
            });
            let Some((told, data)) = told else { continue };
            self.heat(fd);
            if told != 0 {
                to.merge(told, data);
            }
        }
        self.busy.store(busy, Ordering::Relaxed);
        to.end();
    }
}

/// A descriptor with a linked connection.
fn converted(fd: c_int) -> Option<(&'static Entry, &'static Conn)> {
    let entry = table::get(fd)?;
    let conn = entry.conn()?;
    matches!(conn.state(), State::Linked | State::Asking | State::Over).then_some((entry, conn))
}

impl Registration {
    /// What is ready of what the program wants, as far as we know it and not the kernel.
    fn ready(&self, fd: c_int, conn: &Conn) -> u32 {
        if self.fired || !conn.is_moved() {
            return 0;
        }
        let (ready, _) = conn.readiness(fd);
        ready as u32 & (self.events & (IN | OUT | RDHUP) | ALWAYS)
    }

    /// As `take`, without consequences.
    fn peek(&self, fd: c_int, conn: &Conn) -> u32 {
        if !conn.is_moved() {
            return 0;
        }
        let mut ready = self.ready(fd, conn);
        if self.events & EDGE != 0 {
            if self.told == conn.news() {
                ready &= !(IN | RDHUP | ALWAYS);
            }
            if !self.tell_room && !conn.was_full() {
                ready &= !OUT;
            }
        }
        ready
    }

    /// What is to be told now.
    fn take(&mut self, fd: c_int, conn: &Conn) -> u32 {
        if !conn.is_moved() {
            return 0;
        }
        // Before the look, so that what comes meanwhile is told again.
        let news = conn.news();
        let mut ready = self.ready(fd, conn);
        if self.events & EDGE != 0 {
            if self.told == news {
                ready &= !(IN | RDHUP | ALWAYS);
            }
            if ready & IN != 0 {
                self.told = news;
            }
            let room = ready & OUT != 0 && (conn.take_full() || self.tell_room);
            if room {
                self.tell_room = false;
            } else {
                ready &= !OUT;
            }
        } else if ready & OUT != 0 {
            conn.take_full();
        }
        if ready != 0 && self.events & ONESHOT != 0 {
            self.fired = true;
        }
        self.sync(fd, conn);
        ready
    }

    /// Has the peer wake for what the program waits for. False if that is there.
    fn arm(&mut self, fd: c_int, conn: &Conn, sleep: u64) -> bool {
        if self.fired {
            return true;
        }
        self.sync(fd, conn);
        let (_, only_wakes) = self.wanted(conn);
        conn.arm(fd, self.waits_for(conn), only_wakes, sleep);
        self.peek(fd, conn) == 0
    }

    /// What the peer has to wake for.
    fn waits_for(&self, conn: &Conn) -> i16 {
        let mut events = (self.events & (IN | RDHUP)) as i16;
        if self.events & OUT != 0 && conn.is_full() {
            events |= libc::POLLOUT;
        }
        events
    }

    /// What the kernel is to be asked for, and whether it knows nothing but that somebody is to be woken: then edges do, and
    /// it need not be told what the program asks for.
    fn wanted(&self, conn: &Conn) -> (u32, bool) {
        let (rx, tx) = (conn.rx_on_ring(), conn.tx_on_ring() || self.events & OUT == 0);
        if rx && tx {
            return (IN | RDHUP | EDGE, true);
        }
        if self.fired {
            return (ONESHOT, false);
        }
        let mut events = self.events;
        if conn.tx_on_ring() {
            // TCP always has room. What wakes is a byte.
            if events & EDGE == 0 {
                events &= !OUT;
            }
            if conn.is_full() {
                events |= IN;
            }
        }
        (events, false)
    }

    /// Tells the kernel, if it has to know something else.
    fn sync(&mut self, fd: c_int, conn: &Conn) {
        let (wanted, _) = self.wanted(conn);
        if wanted != self.kernel {
            self.kernel = wanted;
            let mut event = epoll_event { events: wanted, u64: TOKEN | fd as u32 as u64 };
            let epoll = self.set.fd.load(Ordering::Acquire);
            // SAFETY: an event.
            errno::keep(|| unsafe { real::epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &mut event) });
        }
    }
}

/// Whether a connection with these registrations can be moved.
pub fn is_suitable(entry: &Entry) -> bool {
    entry.registrations().is_none_or(|r| r.with(|inner| inner.list.iter().all(|r| r.events & EXCLUSIVE == 0)))
}

/// A connection is about to be linked: its registrations get our tokens.
pub fn convert(fd: c_int, entry: &Entry) {
    let Some(conn) = entry.conn() else { return };
    let mut sets = Vec::new();
    entry.registrations_or_new().with(|inner| {
        inner.linked = true;
        for r in inner.list.iter_mut().filter(|r| !r.converted) {
            let set = r.set;
            r.converted = true;
            conn.set_watched();
            // Before the token: who gets it has to know that there are tokens.
            set.converted.fetch_add(1, Ordering::AcqRel);
            set.make_bell();
            // The same events, but our token.
            r.kernel = !r.kernel;
            r.sync(fd, conn);
            sets.push(set);
        }
    });
    for set in sets {
        set.heat(fd);
        set.ring();
    }
}

/// A direction is TCP again: the kernel is asked for what the program waits for, and everything is told once more.
pub fn renew(fd: c_int, entry: &Entry) {
    let (Some(conn), Some(registrations)) = (entry.conn(), entry.registrations()) else { return };
    let sets: Vec<_> = registrations.with(|inner| {
        let renewed = inner.list.iter_mut().filter(|r| r.converted).map(|r| {
            (r.told, r.tell_room) = (u64::MAX, true);
            r.sync(fd, conn);
            r.set
        });
        renewed.collect()
    });
    for set in sets {
        set.heat(fd);
        set.ring();
    }
}

/// The instance behind a descriptor.
fn of(epoll: c_int, entry: &'static Entry) -> &'static Set {
    let set = entry.set_or_new();
    let _ = set.fd.compare_exchange(-1, epoll, Ordering::AcqRel, Ordering::Relaxed);
    set
}

/// `to` is another descriptor of the instance behind `from`.
pub fn copied((from, source): (c_int, &'static Entry), (to, entry): (c_int, &'static Entry)) {
    let set = of(from, source);
    entry.start(to, Kind::Epoll, false);
    entry.share_set(set);
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn epoll_create(size: c_int) -> c_int {
    // SAFETY: the program's call.
    made(unsafe { real::epoll_create(size) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn epoll_create1(flags: c_int) -> c_int {
    // SAFETY: the program's call.
    made(unsafe { real::epoll_create1(flags) })
}

fn made(fd: c_int) -> c_int {
    if service::is_it() {
        return arena::own(fd);
    }
    if let Some(entry) = table::get(fd) {
        entry.start(fd, Kind::Epoll, false);
    }
    fd
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn epoll_ctl(
    epoll: c_int,
    operation: c_int,
    fd: c_int,
    event: *mut epoll_event,
) -> c_int {
    // SAFETY: the program's call.
    let plain = || unsafe { real::epoll_ctl(epoll, operation, fd, event) };
    let Some(entry) = table::get(fd) else { return plain() };
    handover::claim_if_strange(fd);
    match entry.kind() {
        Kind::Socket | Kind::Open | Kind::Conn => {}
        Kind::Epoll => {
            let result = plain();
            if result == 0
                && operation != EPOLL_CTL_MOD
                && let Some(outer) = table::get(epoll)
            {
                let set = of(epoll, outer);
                let _lock = set.lock.take();
                // SAFETY: under the lock.
                let nested = unsafe { &mut *set.nested.get() };
                nested.retain(|inner| *inner != fd);
                if operation == EPOLL_CTL_ADD {
                    nested.push(fd);
                }
            }
            return result;
        }
        _ => return plain(),
    }
    if operation != EPOLL_CTL_DEL && event.is_null() {
        return plain();
    }
    let Some(set) = table::get(epoll).map(|entry| of(epoll, entry)) else { return plain() };
    let linked = entry.conn().filter(|conn| conn.state() == State::Linked);
    let mut heat = false;
    let result = entry.registrations_or_new().with(|inner| {
        let at = inner.list.iter().position(|r| r.set.is(set));
        match operation {
            EPOLL_CTL_ADD => {
                // SAFETY: the program's event.
                let (events, data) = unsafe { ((*event).events, (*event).u64) };
                let mut r = Registration {
                    set,
                    events,
                    data,
                    converted: false,
                    kernel: events,
                    fired: false,
                    told: u64::MAX,
                    tell_room: true,
                    idle: 0,
                };
                let conn = linked.or_else(|| entry.conn().filter(|_| inner.linked));
                let result = match conn {
                    Some(conn) => {
                        set.converted.fetch_add(1, Ordering::AcqRel);
                        conn.set_watched();
                        r.converted = true;
                        r.kernel = r.wanted(conn).0;
                        let mut ours = epoll_event { events: r.kernel, u64: TOKEN | fd as u32 as u64 };
                        // SAFETY: an event.
                        let result = unsafe { real::epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &mut ours) };
                        if result == 0 {
                            set.make_bell();
                            heat = true;
                        } else {
                            set.converted.fetch_sub(1, Ordering::AcqRel);
                        }
                        result
                    }
                    None => {
                        r.told = 0;
                        r.tell_room = false;
                        plain()
                    }
                };
                if result == 0 {
                    inner.list.retain(|r| !r.set.is(set));
                    inner.list.push(r);
                }
                result
            }
            EPOLL_CTL_MOD => {
                // SAFETY: the program's event.
                let (events, data) = unsafe { ((*event).events, (*event).u64) };
                match at.map(|at| &mut inner.list[at]) {
                    Some(r) if r.converted => {
                        let Some(conn) = entry.conn() else { return plain() };
                        (r.events, r.data, r.fired, r.told, r.tell_room) =
                            (events, data, false, u64::MAX, true);
                        heat = true;
                        let (wanted, only_wakes) = r.wanted(conn);
                        if only_wakes && wanted == r.kernel {
                            return 0;
                        }
                        r.kernel = wanted;
                        let mut ours = epoll_event { events: wanted, u64: TOKEN | fd as u32 as u64 };
                        // SAFETY: an event.
                        unsafe { real::epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &mut ours) }
                    }
                    Some(r) => {
                        (r.events, r.data, r.kernel) = (events, data, events);
                        plain()
                    }
                    None => plain(),
                }
            }
            EPOLL_CTL_DEL => {
                if let Some(at) = at {
                    let r = inner.list.swap_remove(at);
                    if r.converted {
                        set.lose();
                    }
                }
                plain()
            }
            _ => plain(),
        }
    });
    if heat {
        set.heat(fd);
        if set.sleepers.load(Ordering::SeqCst) != 0 {
            set.ring();
        }
    }
    result
}
