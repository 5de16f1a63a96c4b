//! The thread that finds the other ends of connections, through the fabric, and gives both their rings. One in each process
//! that has a candidate; started with the first. Nothing of a program's own calls waits for it.
//!
//! Two ends meet by what both know of the connection, each registers a DMB for the other and says its token (`meeting`), each
//! attaches the other's: then the connection is linked, and its directions switch when they are used next.

use crate::conn::{self, Conn, Leaving, Rings, State, Staying, Step};
use crate::header::SIZE;
use crate::identity::{Identity, Key};
use crate::lock::Lock;
use crate::meeting::{Hello, Offer, Words};
use crate::settings::{self, Place};
use crate::table::{self, Entry, Kind};
use crate::tcp::Counts;
use crate::{arena, epoll, handover, lock, stats, tcp, verbose};
use dmbridge::{Device, Dmb, Event, Events, Gid, RemoteDmb};
use dmbridge_proto::shm::CopyPlan;
use dmbridge_proto::status::Status;
use libc::c_int;
use std::cell::{Cell, UnsafeCell};
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long one end waits for the other.
const PATIENCE: Duration = Duration::from_secs(3);
/// A daemon that was not there is looked for again after so long.
const RETRY: Duration = Duration::from_secs(5);
/// What the program's descriptors are is looked at this often.
const LOOK: Duration = Duration::from_secs(1);
/// Who waited in vain has to do so many times more before it is looked for again.
const DISCOURAGED: u32 = 64;
/// Ring of a connection of requests and answers; what is never used of it costs nothing.
const SMALL: usize = 128 << 10;
/// Ring of a connection that has brought [`MUCH`].
const LARGE: usize = 1 << 20;
const MUCH: u64 = 16 << 10;
/// How often it is looked who waits for room.
const TICK: Duration = Duration::from_millis(100);
/// A ring from which nobody reads for so many ticks is given up for TCP, which has room for more: a program may count on that,
/// and wait for ever. Fewer if this end has not read what came either.
const STALL: u32 = 20;
const STALL_OF_BOTH: u32 = 5;
/// The event that says: one of my connections goes back to TCP.
const BACK: u32 = u32::from_be_bytes(*b"back");

/// Something for the thread to do.
enum Task {
    /// Find the other end.
    Find { index: u32, life: u32, fd: c_int, identity: Identity },
    /// The last descriptor was closed.
    Closed { index: u32 },
    /// The last descriptor of this process was closed.
    Left { index: u32 },
    /// Some connection of this process is wanted back.
    Listen,
    /// Somebody waits for room in a ring.
    Full,
    /// There is nothing more to do.
    End,
}

struct Queue {
    tasks: Mutex<VecDeque<Task>>,
    bell: OwnedFd,
    /// An epoll instance that says when a process of the family called: each of them is told, and none takes it away.
    calls: OwnedFd,
}

struct Service {
    lock: Lock,
    /// The process that it is of, and its queue.
    queue: UnsafeCell<Option<(u32, Arc<Queue>)>>,
}

// SAFETY: the cell is accessed under the lock.
unsafe impl Sync for Service {}

// SAFETY: all-zero bytes are a free Lock.
static SERVICE: Service = Service { lock: unsafe { std::mem::zeroed() }, queue: UnsafeCell::new(None) };
/// Nothing is asked for before then (ms).
static NOT_BEFORE: AtomicU64 = AtomicU64::new(0);
/// This process's id; a `vfork` child has another one although it has our memory.
static PID: AtomicU32 = AtomicU32::new(0);
/// It is looked who waits for room.
static WATCHES_FULL: AtomicBool = AtomicBool::new(false);
/// See [`end`].
static ENDED: AtomicBool = AtomicBool::new(false);
/// 1: the thread runs.
static WORKS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// Whether this is the thread.
    static IS_IT: Cell<bool> = const { Cell::new(false) };
}

/// Whether this is the thread. What descriptors it makes are ours.
#[inline]
pub fn is_it() -> bool {
    IS_IT.with(Cell::get)
}

/// Notes which process this is.
pub fn set_process() {
    PID.store(std::process::id(), Ordering::Relaxed);
}

/// Whether this is a child that borrows its parent's memory: then nothing here may change.
pub fn is_borrowed() -> bool {
    // Where nothing moves it makes no difference, and the question may not be allowed.
    !has_ended() && std::process::id() != PID.load(Ordering::Relaxed)
}

/// Whether all connections of this process are TCP for ever.
pub fn has_ended() -> bool {
    ENDED.load(Ordering::Relaxed)
}

/// All connections are TCP from now on, and nothing here calls the kernel for anything else.
pub fn end() {
    if is_borrowed() || ENDED.swap(true, Ordering::SeqCst) {
        return;
    }
    stats::count(&stats::get().ended);
    for (fd, entry) in table::all() {
        match entry.kind() {
            Kind::Socket | Kind::Open => entry.set_kind(Kind::Never),
            // What several processes have moves in another one, when this one is done with it.
            Kind::Conn
                if entry.conn().is_some_and(|conn| conn.refs() > 1 && conn.state() != State::Linked) => {}
            Kind::Conn | Kind::Stranger => handover::leave_to_tcp(fd),
            _ => {}
        }
    }
    if send(Task::End) {
        let limit = Instant::now() + PATIENCE;
        while WORKS.load(Ordering::SeqCst) != 0 && Instant::now() < limit {
            let _ = lock::wait(&WORKS, 1, Duration::from_millis(20));
        }
    }
}

/// In a fork's child: the thread is not here.
pub fn after_fork() {
    SERVICE.lock.reset();
    WORKS.store(0, Ordering::SeqCst);
    arena::disown_all();
    lock::after_fork();
    conn::after_fork();
    set_process();
}

fn send(task: Task) -> bool {
    let _lock = SERVICE.lock.take();
    // SAFETY: under the lock.
    let current = unsafe { &mut *SERVICE.queue.get() };
    let pid = PID.load(Ordering::Relaxed);
    if current.as_ref().is_none_or(|(of, _)| *of != pid) {
        if !matches!(task, Task::Find { .. } | Task::Listen) {
            return false;
        }
        // A parent's queue is left as it is: a lock in it may be held by a thread that is not here.
        std::mem::forget(current.take());
        *current = start().map(|queue| (pid, queue));
    }
    let Some((_, queue)) = current else { return false };
    queue.tasks.lock().unwrap_or_else(PoisonError::into_inner).push_back(task);
    let one = 1u64;
    // SAFETY: 8 bytes into an eventfd.
    unsafe { crate::real::write(queue.bell.as_raw_fd(), (&raw const one).cast(), 8) };
    true
}

fn start() -> Option<Arc<Queue>> {
    use std::os::fd::FromRawFd;
    // SAFETY: a new descriptor, ours.
    let bell = unsafe {
        let fd = arena::own(crate::real::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK));
        if fd < 0 {
            return None;
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: a new descriptor, ours, with that of the arena.
    let calls = unsafe {
        let fd = arena::own(crate::real::epoll_create1(libc::EPOLL_CLOEXEC));
        if fd < 0 {
            return None;
        }
        let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: 0 };
        crate::real::epoll_ctl(fd, libc::EPOLL_CTL_ADD, arena::files()[1], &mut event);
        OwnedFd::from_raw_fd(fd)
    };
    let queue = Arc::new(Queue { tasks: Mutex::default(), bell, calls });
    let worker = queue.clone();
    // Signals are the program's.
    // SAFETY: signal sets of our own.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let started =
            std::thread::Builder::new().name("dmbridge-run".into()).stack_size(256 << 10).spawn(|| {
                WORKS.store(1, Ordering::SeqCst);
                IS_IT.with(|it| it.set(true));
                Worker::new(worker).run();
                WORKS.store(0, Ordering::SeqCst);
                lock::wake(&WORKS, i32::MAX);
            });
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        started.ok().map(|_| queue)
    }
}

/// A connection has proved itself: look for its other end.
#[cold]
pub fn consider(fd: c_int) {
    crate::errno::keep(|| {
        let Some(entry) = table::get(fd) else { return };
        entry.weight.store(0, Ordering::Relaxed);
        if has_ended() || tcp::milliseconds() < NOT_BEFORE.load(Ordering::Relaxed) || is_borrowed() {
            return;
        }
        let Some((index, conn)) = conn_of(fd, entry) else { return };
        conn.weight.store(0, Ordering::Relaxed);
        let is_standard = |fd| table::conn(fd).is_some_and(|standard| std::ptr::eq(standard, conn));
        if conn.refs() != 1 || table::STANDARD.into_iter().any(is_standard) {
            stats::count(&stats::get().shared);
            return;
        }
        if !conn.change(State::Plain, State::Asking) {
            return;
        }
        stats::count(&stats::get().candidates);
        let suitable = tcp::is_suitable(fd) && epoll::is_suitable(entry);
        let identity = if suitable { Identity::of(fd) } else { None };
        let Some(identity) = identity else {
            stats::count(&stats::get().unsuitable);
            conn.change(State::Asking, State::Over);
            return;
        };
        let life = conn.life.load(Ordering::Relaxed);
        if !send(Task::Find { index, life, fd, identity }) {
            conn.change(State::Asking, State::Over);
        }
    });
}

/// The descriptor's connection, made if it has none yet and no thread is in the kernel for it.
pub fn conn_of(fd: c_int, entry: &Entry) -> Option<(u32, &'static Conn)> {
    if let Some(conn) = entry.conn() {
        return Some((entry.conn_index(), conn));
    }
    if entry.kind() != Kind::Open {
        return None;
    }
    let (index, conn) = arena::allocate()?;
    conn.set_active(entry.is_active());
    conn.cookie.store(tcp::cookie(fd).unwrap_or(0), Ordering::Relaxed);
    arena::add_descriptor(index);
    entry.set_conn(fd, index, entry.is_active());
    fence(Ordering::SeqCst);
    if entry.inside.load(Ordering::SeqCst) != 0 {
        // Somebody reads or writes without knowing of it: another time.
        entry.set_kind(Kind::Open);
        arena::remove_descriptor(index);
        conn.free();
        return None;
    }
    Some((index, conn))
}

/// The last descriptor of all processes was closed. `ends`: so does this process.
pub fn closed(index: u32, conn: &Conn, ends: bool) {
    let (sent, received) = conn.bytes();
    stats::get().bytes_sent.fetch_add(sent, Ordering::Relaxed);
    stats::get().bytes_received.fetch_add(received, Ordering::Relaxed);
    if conn.state() == State::Asking || conn.has_rings() {
        conn.orphan();
        if !ends {
            send(Task::Closed { index });
        }
    } else if conn.is_used() {
        conn.orphan();
    } else {
        conn.free();
    }
}

/// The last descriptor of this process was closed; others may have some.
pub fn left(index: u32) {
    send(Task::Left { index });
}

/// The process that could call the connection back (`gone`) has closed it, or has ended: this one does it, if it can.
pub fn call_back(conn: &Conn, gone: u32) -> bool {
    if is_borrowed() || !table::has_rings(conn) {
        return false;
    }
    let own = std::process::id();
    let _ = conn.home.compare_exchange(gone, own, Ordering::AcqRel, Ordering::Relaxed);
    send(Task::Listen)
}

/// A ring has no room for what is written.
#[inline]
pub fn watch_full() {
    if !WATCHES_FULL.load(Ordering::Relaxed) && !WATCHES_FULL.swap(true, Ordering::Relaxed) {
        crate::errno::keep(|| send(Task::Full));
    }
}

/// Two ends that are about to meet.
struct Meeting {
    index: u32,
    life: u32,
    fd: c_int,
    large: bool,
    since: Instant,
    identity: Identity,
    /// What was known of its bytes before anything was said.
    before: Counts,
    hello: Hello,
    offered: Option<Offered>,
    /// What the other end offered, while several processes have the socket: some of them are about to close it.
    late: Option<(Gid, Words)>,
}

/// What one of them has offered to the other.
struct Offered {
    key: Key,
    to: Gid,
    /// Or why it is nothing.
    ring: Result<Dmb, Why>,
}

/// Why a connection stays TCP: what to count. None: it has ended.
type Why = Option<&'static AtomicU64>;

impl Meeting {
    /// The connection, if it still is the one that was to move, and open both ways; what is known of its bytes now.
    fn connection(&self) -> Option<(&'static Conn, Counts)> {
        let conn = arena::conn(self.index)?;
        let counts = tcp::counts(self.fd, conn.is_active())?;
        let is_same = conn.life.load(Ordering::Relaxed) == self.life
            && table::conn(self.fd).is_some_and(|c| std::ptr::eq(c, conn));
        is_same.then_some((conn, counts))
    }

    /// The key that waits.
    fn key(&self) -> Key {
        self.offered.as_ref().map_or(self.hello.key(), |offered| offered.key)
    }
}

/// What keeps a connection's rings.
struct Held {
    identity: Identity,
    /// The kernel can say whether it is open.
    known: bool,
    /// This process has no descriptor of it any more.
    left: bool,
    _local: Dmb,
    _remote: RemoteDmb,
}

/// How a connection asks to go back to TCP, and begins to.
type Begin<T> = (fn(&Conn) -> bool, fn(&'static Conn) -> Option<T>);

/// Connections that go back to TCP, since when, and what is held for it.
type Returning<T> = HashMap<u32, (Instant, Option<T>)>;

struct Worker {
    queue: Arc<Queue>,
    device: Option<(Device, Events)>,
    meetings: HashMap<u32, Meeting>,
    held: HashMap<u32, Held>,
    leaving: Returning<Leaving>,
    staying: Returning<Staying>,
    /// Connections whose rings are full: how far they were read, and for how many ticks it was not farther.
    full: HashMap<u32, (u64, u32)>,
    ticked: Instant,
    next: u32,
    /// When it was looked whether the program has an io_uring, and what was seen.
    io_uring: Option<(Instant, bool)>,
}

impl Worker {
    fn new(queue: Arc<Queue>) -> Worker {
        Worker {
            queue,
            device: None,
            meetings: HashMap::new(),
            held: HashMap::new(),
            leaving: HashMap::new(),
            staying: HashMap::new(),
            full: HashMap::new(),
            ticked: Instant::now(),
            next: 0,
            io_uring: None,
        }
    }

    fn run(mut self) {
        loop {
            self.wait();
            loop {
                let task = self.queue.tasks.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                match task {
                    Some(Task::Find { index, life, fd, identity }) => self.find(index, life, fd, &identity),
                    Some(Task::Closed { index }) => self.closed(index),
                    Some(Task::Left { index }) => {
                        if let Some(held) = self.held.get_mut(&index) {
                            held.left = true;
                        }
                    }
                    Some(Task::Listen) => self.listen(),
                    Some(Task::Full) => {}
                    Some(Task::End) => return,
                    None => break,
                }
            }
            self.take_events();
            self.give_up();
            self.reap();
            self.look_who_waits();
            self.bring_back();
        }
    }

    fn wait(&mut self) {
        let events = self.device.as_ref().map_or(-1, |(_, events)| events.as_fd().as_raw_fd());
        let calls = self.queue.calls.as_raw_fd();
        let watch = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds: Vec<_> =
            [self.queue.bell.as_raw_fd(), events, calls].map(|fd| watch(fd, libc::POLLIN)).into();
        fds.extend(conn::waiting().iter().map(|(_, socket)| watch(*socket, libc::POLLOUT)));
        let returning = !self.leaving.is_empty() || !self.staying.is_empty();
        let orphan = |index| arena::conn(index).is_some_and(|conn| conn.state() == State::Orphan);
        let shared = self.held.iter().any(|(index, held)| held.left || orphan(*index));
        // Without a daemon nobody says that the other end wants to leave.
        let alone = self.device.is_none() && !self.held.is_empty();
        let timeout = match (self.meetings.is_empty(), shared) {
            _ if returning => 1,
            _ if self.meetings.values().any(|meeting| meeting.late.is_some()) => 5,
            (false, _) => 200,
            _ if alone => 200,
            _ if WATCHES_FULL.load(Ordering::Relaxed) => TICK.as_millis() as c_int,
            (true, true) => 1000,
            (true, false) => -1,
        };
        let mut count = 0u64;
        // SAFETY: pollfds; 8 bytes out of an eventfd; one event.
        unsafe {
            crate::real::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout);
            crate::real::read(self.queue.bell.as_raw_fd(), (&raw mut count).cast(), 8);
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            if crate::real::epoll_wait(calls, &mut event, 1, 0) > 0 {
                self.listen();
            }
        }
        if alone {
            self.look_who_leaves();
        }
    }

    /// Who waits for room for too long is helped.
    fn look_who_waits(&mut self) {
        if !WATCHES_FULL.load(Ordering::Relaxed) || self.ticked.elapsed() < TICK {
            return;
        }
        self.ticked = Instant::now();
        WATCHES_FULL.store(false, Ordering::Relaxed);
        let before = std::mem::take(&mut self.full);
        for index in self.held.keys() {
            let Some((conn, (read, unread))) =
                arena::conn(*index).and_then(|conn| Some((conn, conn.stall()?)))
            else {
                continue;
            };
            let ticks = before.get(index).filter(|(at, _)| *at == read).map_or(0, |(_, ticks)| ticks + 1);
            self.full.insert(*index, (read, ticks));
            if ticks >= if unread { STALL_OF_BOTH } else { STALL }
                && conn.wanted.compare_exchange(0, conn::STALLED, Ordering::SeqCst, Ordering::Relaxed).is_ok()
            {
                self.leaving.entry(*index).or_insert_with(|| (Instant::now(), None));
            }
        }
        if !self.full.is_empty() {
            WATCHES_FULL.store(true, Ordering::Relaxed);
        }
    }

    /// A process of the family has called: connections are wanted back.
    fn listen(&mut self) {
        for (index, conn) in arena::all() {
            if conn.wanted.load(Ordering::SeqCst) != 0
                && conn.home.load(Ordering::Acquire) == std::process::id()
            {
                self.leaving.entry(index).or_insert_with(|| (Instant::now(), None));
            }
        }
    }

    /// The other end of some connection wants to leave.
    fn look_who_leaves(&mut self) {
        for index in self.held.keys() {
            if let Some(conn) = arena::conn(*index).filter(|conn| conn.state() == State::Linked) {
                conn.answer();
            }
            if arena::conn(*index).is_some_and(|conn| conn.state() == State::Linked && conn.is_left()) {
                self.staying.entry(*index).or_insert_with(|| (Instant::now(), None));
            }
        }
    }

    /// Goes on with all connections that go back to TCP (`conn/back.rs`).
    fn bring_back(&mut self) {
        for (conn, _) in conn::waiting() {
            if conn.flush_some() {
                renew(conn);
            }
        }
        let device = if self.leaving.is_empty() { None } else { self.device().ok() };
        self.leaving.retain(|index, (since, leaving)| {
            let begin: Begin<_> = (Conn::ask_to_leave, Conn::begin_leaving);
            let ended = advance(*index, *since, leaving, begin, Conn::go_on_leaving, |conn| {
                let [low, high, token] = [0, 1, 2].map(|i: usize| conn.peer[i].load(Ordering::Relaxed));
                let gid = Gid::from_bytes((u128::from(low) | u128::from(high) << 64).to_ne_bytes());
                if let Some(device) = &device {
                    let _ = device.signal_event(gid, BACK, token);
                }
            });
            // Who has closed it meanwhile leaves it to another process.
            if ended
                && let Some(conn) = arena::conn(*index)
                && (conn.state() != State::Linked || table::descriptor(*index).is_some())
            {
                conn.wanted.store(0, Ordering::SeqCst);
                lock::wake(&conn.wanted, i32::MAX);
            }
            !ended
        });
        self.staying.retain(|index, (since, staying)| {
            let begin: Begin<_> = (|_| false, Conn::begin_staying);
            let ended = advance(*index, *since, staying, begin, Conn::go_on_staying, |_| {});
            if ended && let Some(conn) = arena::conn(*index) {
                // Who is about to close it waits for that.
                lock::wake(&conn.wanted, i32::MAX);
            }
            !ended
        });
    }

    /// The device, opened when it is first needed; or what to count.
    fn device(&mut self) -> Result<Device, &'static AtomicU64> {
        if self.device.as_ref().is_some_and(|(device, _)| !device.is_connected()) {
            // What is mapped stays usable, so what is held is kept.
            self.fail_all();
        }
        if self.device.is_none() {
            let opened = match &settings::get().place {
                Place::Hub(socket) => Device::connect(socket),
                Place::File(file) => Device::open_file(file),
                Place::Any => Device::open(),
            };
            let device = opened.map_err(|error| {
                verbose!("{error}: connections stay TCP");
                &stats::get().no_daemon
            })?;
            if !device.can_map() {
                verbose!("the device {} cannot map: connections stay TCP", device.gid());
                return Err(&stats::get().unmapped);
            }
            let events = device.events();
            self.device = Some((device, events));
        }
        self.device.as_ref().map(|(device, _)| device.clone()).ok_or(&stats::get().no_daemon)
    }

    fn find(&mut self, index: u32, life: u32, fd: c_int, identity: &Identity) {
        let Some(conn) = arena::conn(index) else { return };
        let over = |counter: &AtomicU64| {
            stats::count(counter);
            conn.change(State::Asking, State::Over);
        };
        let Some(name) = identity.name(settings::get().network.as_deref()) else {
            return over(&stats::get().elsewhere);
        };
        if self.uses_io_uring() {
            return over(&stats::get().io_uring);
        }
        let device = match self.device() {
            Ok(device) => device,
            Err(counter) => {
                stats::count(counter);
                NOT_BEFORE.store(tcp::milliseconds() + RETRY.as_millis() as u64, Ordering::Relaxed);
                conn.change(State::Asking, State::Plain);
                return;
            }
        };
        let Some(before) = tcp::counts(fd, conn.is_active()) else {
            conn.change(State::Asking, State::Over);
            return;
        };
        self.next = self.next.wrapping_add(1);
        let tag = self.next;
        let large = before.received >= MUCH;
        let hello = Hello::new(name);
        let (since, identity) = (Instant::now(), *identity);
        let meeting =
            Meeting { index, life, fd, large, since, identity, before, hello, offered: None, late: None };
        self.meetings.insert(tag, meeting);
        self.say(&device, tag, hello.key(), hello.words());
    }

    /// Whether this process has an io_uring: then reads and writes may happen that nobody here sees. To look at all descriptors
    /// for each of thousands of connections would be too much.
    fn uses_io_uring(&mut self) -> bool {
        if let Some((when, has)) = self.io_uring
            && when.elapsed() < LOOK
        {
            return has;
        }
        let mut fds = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let has = fds.any(|fd| {
            std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == "anon_inode:[io_uring]")
        });
        self.io_uring = Some((Instant::now(), has));
        has
    }

    /// Says something to who has the key, now or later.
    fn say(&mut self, device: &Device, tag: u32, key: Key, words: Words) {
        match device.rendezvous(key, tag, words) {
            Ok(Some((gid, words))) => self.told(tag, gid, &words),
            Ok(None) => {}
            Err(error) => {
                verbose!("{error}");
                self.fail(tag, Some(&stats::get().no_daemon));
            }
        }
    }

    fn take_events(&mut self) {
        loop {
            let Some((_, events)) = &self.device else { return };
            match events.try_next() {
                Ok(Some(Event::Rendezvous { gid, tag, payload })) => self.told(tag, gid, &payload),
                Ok(Some(Event::Software { code: BACK, .. })) => self.look_who_leaves(),
                Ok(Some(_)) => {}
                Ok(None) => return,
                Err(_) => {
                    // New connections are TCP until it is back.
                    self.fail_all();
                    self.abandon();
                    return;
                }
            }
        }
    }

    /// The other end of a meeting has said something.
    fn told(&mut self, tag: u32, gid: Gid, words: &Words) {
        let Some(meeting) = self.meetings.get_mut(&tag) else { return };
        if meeting.offered.is_some() && arena::conn(meeting.index).is_some_and(|conn| conn.refs() > 1) {
            meeting.late = Some((gid, *words));
            return;
        }
        match meeting.offered.take() {
            None => self.greeted(tag, gid, words),
            Some(ours) => self.offered(tag, ours, gid, &Offer::parse(words)),
        }
    }

    /// The other end is there: it gets a DMB to write to.
    fn greeted(&mut self, tag: u32, gid: Gid, words: &Words) {
        let Some((device, _)) = &self.device else { return };
        let device = device.clone();
        let Some(meeting) = self.meetings.get_mut(&tag) else { return };
        let Some(key) = meeting.hello.answered(words) else {
            return self.fail(tag, Some(&stats::get().stranger));
        };
        // If this end is not open any more, who came belongs to a later connection with its addresses.
        let size = SIZE + if meeting.large { LARGE } else { SMALL };
        let register = |peer, size| match meeting.hello.is_here() {
            true => device.register(peer, size),
            false => device.register_with_private_line(peer, size),
        };
        let ring = match meeting.connection() {
            None => Err(None),
            Some((_, counts)) => match register(gid, size) {
                Ok(dmb) if dmb.peer_can_map() => Ok((dmb, counts)),
                Ok(_) => Err(Some(&stats::get().unmapped)),
                Err(error) => {
                    verbose!("{error}");
                    Err(Some(&stats::get().no_memory))
                }
            },
        };
        // A refusal is said too: the other end need not wait.
        let words = Offer::words(ring.as_ref().ok().map(|(dmb, counts)| (dmb.token(), *counts)));
        meeting.offered = Some(Offered { key, to: gid, ring: ring.map(|(dmb, _)| dmb) });
        self.say(&device, tag, key, words);
    }

    /// The other end has told its DMB: both have what they need.
    fn offered(&mut self, tag: u32, ours: Offered, gid: Gid, theirs: &Offer) {
        let Some((device, _)) = &self.device else { return };
        let Some(meeting) = self.meetings.get(&tag) else { return };
        let connection = meeting.connection();
        let (dmb, token, conn) = match (ours.ring, theirs.ring, connection) {
            (Err(why), ..) => return self.fail(tag, why),
            (_, None, _) => return self.fail(tag, Some(&stats::get().refused)),
            (.., None) => return self.fail(tag, None),
            (Ok(dmb), Some(token), Some((conn, now)))
                if gid == ours.to && theirs.fits(&meeting.before, &now) =>
            {
                (dmb, token, conn)
            }
            _ => return self.fail(tag, Some(&stats::get().stranger)),
        };
        let remote = match device.attach(token) {
            Ok(remote) if remote.size() > SIZE && remote.owner() == gid => remote,
            Ok(_) => return self.fail(tag, Some(&stats::get().stranger)),
            Err(error) => {
                verbose!("{error}");
                let cannot = error.status() == Some(Status::NotSupported);
                let counters = stats::get();
                return self.fail(tag, Some(if cannot { &counters.unmapped } else { &counters.no_memory }));
            }
        };
        let plan = CopyPlan::from_bytes(device.config().copy_plan);
        let Some(Meeting { index, fd, identity, .. }) = self.meetings.remove(&tag) else { return };
        let rings = Rings {
            local: dmb.memory().as_ptr(),
            local_len: dmb.size(),
            remote: remote.memory().as_ptr(),
            remote_len: remote.size(),
            line: remote.line_address(),
            plan,
            peer: {
                let gid = u128::from_ne_bytes(remote.owner().to_bytes());
                [gid as u64, (gid >> 64) as u64, remote.token().to_bits()]
            },
        };
        let known = identity.is_open();
        self.held.insert(index, Held { identity, known, left: false, _local: dmb, _remote: remote });
        // Who is told by the kernel from now on has to be told in our words.
        for (fd, entry) in table::all() {
            if entry.conn().is_some_and(|c| std::ptr::eq(c, conn)) {
                epoll::convert(fd, entry);
            }
        }
        conn.link(fd, &rings);
        stats::count(&stats::get().linked);
    }

    /// It stays TCP.
    fn fail(&mut self, tag: u32, why: Why) {
        let Some(meeting) = self.meetings.remove(&tag) else { return };
        if let Some(conn) = arena::conn(meeting.index) {
            if let Some(counter) = why {
                stats::count(counter);
            }
            conn.change(State::Asking, State::Over);
        }
    }

    fn fail_all(&mut self) {
        for tag in self.meetings.keys().copied().collect::<Vec<_>>() {
            self.fail(tag, Some(&stats::get().no_daemon));
        }
        self.device = None;
    }

    /// Goes on with those that other processes have closed meanwhile, and forgets those whose other end did not come.
    fn give_up(&mut self) {
        let late = self.meetings.iter().filter_map(|(tag, meeting)| Some((*tag, meeting.late?)));
        for (tag, (gid, words)) in late.collect::<Vec<_>>() {
            self.told(tag, gid, &words);
        }
        let late = |(tag, meeting): (&u32, &Meeting)| (meeting.since.elapsed() > PATIENCE).then_some(*tag);
        for tag in self.meetings.iter().filter_map(late).collect::<Vec<_>>() {
            let Some(meeting) = self.meetings.remove(&tag) else { continue };
            if let Some((device, _)) = &self.device {
                let _ = device.cancel_rendezvous(meeting.key(), tag);
            }
            if let Some(conn) = arena::conn(meeting.index) {
                let stats = stats::get();
                stats::count(if meeting.late.is_some() { &stats.shared } else { &stats.alone });
                conn.threshold.store(
                    conn.threshold.load(Ordering::Relaxed).saturating_mul(DISCOURAGED),
                    Ordering::Relaxed,
                );
                conn.change(State::Asking, State::Plain);
            }
        }
    }

    fn closed(&mut self, index: u32) {
        let meeting = self.meetings.iter().find(|(_, m)| m.index == index).map(|(tag, _)| *tag);
        if let Some(tag) = meeting
            && let Some(meeting) = self.meetings.remove(&tag)
            && let Some((device, _)) = &self.device
        {
            let _ = device.cancel_rendezvous(meeting.key(), tag);
        }
        // Who sleeps on it still looks at its rings; it is tried again.
        let is_over = |conn: &&Conn| conn.state() == State::Orphan && !conn.is_used();
        if let Some(conn) = arena::conn(index).filter(is_over) {
            self.held.remove(&index);
            conn.free();
        }
    }

    /// The device is gone. What is mapped goes on, unless the memory went with it: then nobody shall wait for it.
    fn abandon(&self) {
        for (fd, entry) in table::all() {
            if let Some(conn) = entry.conn()
                && self.held.contains_key(&entry.conn_index())
                && conn.state() == State::Linked
                && conn.is_gone()
            {
                conn.abandon(fd);
            }
        }
    }

    /// Takes back what other processes closed last.
    fn reap(&mut self) {
        let orphan = |(i, held): (&u32, &Held)| {
            let closed = arena::conn(*i).is_some_and(|conn| conn.state() == State::Orphan);
            // A process that was killed said nothing, and may have been inside; the kernel knows.
            let killed = !closed && held.left && held.known && !held.identity.is_open();
            if killed && let Some(conn) = arena::conn(*i) {
                conn.leave_all();
            }
            (closed || killed).then_some(*i)
        };
        for index in self.held.iter().filter_map(orphan).collect::<Vec<_>>() {
            self.closed(index);
        }
    }
}

/// Takes one connection's next step back to TCP, which is asked for and begun by `begin`, and announced by `announce`. True: that
/// was the last one.
fn advance<T>(
    index: u32,
    since: Instant,
    state: &mut Option<T>,
    (ask, begin): Begin<T>,
    go_on: impl FnOnce(&Conn, c_int, &mut T) -> Step,
    announce: impl Fn(&Conn),
) -> bool {
    let Some(conn) = arena::conn(index).filter(|conn| conn.state() == State::Linked) else { return true };
    let Some(fd) = table::descriptor(index) else { return true };
    if state.is_none() {
        if ask(conn) {
            announce(conn);
        }
        *state = begin(conn);
        if state.is_some() {
            announce(conn);
        }
    }
    let step = match state {
        Some(state) => go_on(conn, fd, state),
        None => Step::Wait,
    };
    let stalled = conn.wanted.load(Ordering::SeqCst) == conn::STALLED;
    match step {
        // Nobody waits for it but who waits for the other end anyway.
        Step::Wait if since.elapsed() < handover::LIMIT || (stalled && state.is_some()) => return false,
        Step::Done if stalled => stats::count(&stats::get().stalled),
        Step::Done => {}
        Step::Failed if stalled && conn.is_alone() => {}
        // It is in the middle, where nobody can read or write.
        _ if state.is_some() => conn.break_connection(fd),
        _ => {}
    }
    *state = None;
    renew(conn);
    true
}

/// Tells the epoll instances of this process that the connection is another one now.
fn renew(conn: &Conn) {
    for (fd, entry) in table::all() {
        if entry.conn().is_some_and(|c| std::ptr::eq(c, conn)) {
            epoll::renew(fd, entry);
        }
    }
}
