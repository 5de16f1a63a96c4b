//! A daemon with a keeper: its worker may be killed at any moment, and its devices go on.

use dmbridge_proto::FIRST_MOVE_QUEUE;
use dmbridge_proto::control::{Reply, Request, Segment};
use dmbridge_proto::event::Event;
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::Token;
use dmbridge_proto::moves::{HEADER_SIZE, MoveFlags, MoveHeader};
use dmbridge_proto::rendezvous::Rendezvous;
use dmbridge_proto::status::Status;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::{until, until_good};
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use dmbridge_tests::random::Random;
use dmbridge_tests::ring::Descriptor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often a worker is killed in traffic.
const KILLS: u64 = 300;

fn daemon() -> TestDaemon {
    TestDaemon::start_with(&["--keep"], "")
}

/// A device on the hub. A connection that the daemon has accepted and not yet handed to its keeper may be lost.
fn connect(hub: &Path, options: &Options) -> RawFrontend {
    until("the daemon takes a front-end", || RawFrontend::try_connect(hub, options, &mut |_| {}).ok())
}

/// Descriptors of the keeper.
fn kept(daemon: &TestDaemon) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).expect("/proc").count()
}

/// Kills workers until `KILLS` are dead, or somebody has failed; then `over` is true.
fn kill_workers(daemon: &TestDaemon, kills: u64, over: &AtomicBool) {
    let mut random = Random::new(77);
    for _ in 0..kills {
        if !random.one_in(4) {
            // The others may die while they take over.
            until("a worker serves", || daemon.get("/v1/health").ok());
        }
        std::thread::sleep(Duration::from_micros(random.below(60_000)));
        if over.load(Ordering::Relaxed) {
            return;
        }
        daemon.kill_worker();
    }
    over.store(true, Ordering::Relaxed);
}

/// Says that it is over when a thread that is to go on has failed.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[test]
fn a_worker_that_is_killed_is_replaced_under_its_devices() {
    let daemon = daemon();
    let mut pair = Pair::new(&daemon.hub());
    pair.check();
    let (gid, index) = (pair.owner.gid(), pair.dmb.index);
    for _ in 0..5 {
        let worker = daemon.worker();
        daemon.kill_worker();
        pair.check();
        assert_ne!(daemon.worker(), worker);
        // What was there counts: a second DMB is another one.
        let other = pair.owner.register(pair.peer.gid(), 4096).expect("a DMB");
        assert_ne!((other.token, other.index), (pair.dmb.token, index));
        assert_eq!(pair.peer.attach(pair.dmb.token), Err(Status::Already));
        pair.owner.unregister(other.token).expect("unregistered");
        assert!(pair.peer.query(gid).is_ok());
    }
    drop(pair);
    let report = until_good("devices", || daemon.report(), |report| report.devices.is_empty());
    assert_eq!(report.pool.extent_bytes, 0);
}

/// What two devices do with each other, everything exactly once.
struct Couple {
    pair: Pair,
    random: Random,
    /// Tokens that were ever told.
    tokens: HashSet<Token>,
    /// Software events that were sent.
    said: u64,
    key: u64,
}

impl Couple {
    fn new(hub: &Path, number: u64) -> Couple {
        let options =
            Options { features: Options::default().features | Features::RENDEZVOUS, ..Options::default() };
        let pair = Pair::with(connect(hub, &options), connect(hub, &options));
        let tokens = HashSet::from([pair.dmb.token]);
        Couple { pair, random: Random::new(number), tokens, said: 0, key: number << 32 }
    }

    fn act(&mut self) {
        match self.random.below(6) {
            0 => self.pair.check(),
            1 => self.register_and_attach(),
            2 => self.say(),
            3 => self.register_ram(),
            4 => self.meet(),
            _ => self.many(),
        }
    }

    fn new_token(&mut self, token: Token) {
        assert!(self.tokens.insert(token), "a token was given twice");
    }

    fn register_and_attach(&mut self) {
        let size = 4096 * (1 + self.random.below(100));
        let Pair { owner, peer, .. } = &mut self.pair;
        let dmb = owner.register(peer.gid(), size).expect("a DMB");
        assert_eq!(dmb.index, 1, "the lowest that is free");
        let zeroes = owner.window().read(dmb.offset, size);
        assert!(zeroes.iter().all(|byte| *byte == 0), "a new DMB is zero");
        let remote = peer.attach(dmb.token).expect("attached");
        let bytes = self.random.bytes(size);
        peer.window().write(remote.offset, &bytes);
        assert_eq!(owner.window().read(dmb.offset, size), bytes);
        let unregister_first = self.random.one_in(2);
        if unregister_first {
            owner.unregister(dmb.token).expect("unregistered");
            let token = peer.wait_event("the end of a DMB", |event| match event {
                Event::DmbUnregistered { token, .. } => Some(*token),
                _ => None,
            });
            assert_eq!(token, dmb.token, "each end is told once");
            assert_eq!(owner.unregister(dmb.token), Err(Status::NoEntry));
            peer.detach(dmb.token).expect("detached");
        } else {
            peer.detach(dmb.token).expect("detached");
            let (token, index) = owner.wait_event("a detach", |event| match event {
                Event::DmbDetached { token, index, .. } => Some((*token, *index)),
                _ => None,
            });
            assert_eq!((token, index), (dmb.token, dmb.index), "each detach is told once");
            assert_eq!(peer.detach(dmb.token), Err(Status::NoEntry));
            owner.unregister(dmb.token).expect("unregistered");
        }
        self.new_token(dmb.token);
    }

    /// Software events, in their order and each once.
    fn say(&mut self) {
        let Pair { owner, peer, .. } = &mut self.pair;
        let count = 1 + self.random.below(20);
        for n in 0..count {
            peer.signal_event(owner.gid(), 7, self.said + n).expect("said");
        }
        for n in 0..count {
            let info = owner.wait_event("what was said", |event| match event {
                Event::Software { info, .. } => Some(*info),
                _ => None,
            });
            assert_eq!(info, self.said + n);
        }
        self.said += count;
    }

    fn register_ram(&mut self) {
        let Pair { owner, peer, .. } = &mut self.pair;
        let at = owner.scratch() + (512 << 10);
        let segments = [Segment { addr: at, len: 4096 }, Segment { addr: at + 12288, len: 8192 }];
        let dmb = owner.register_ram(peer.gid(), at + (64 << 10), &segments).expect("a RAM DMB");
        let bytes = self.random.bytes(12288);
        peer.move_bytes(dmb.token, 0, &bytes).expect("moved");
        let mut there = owner.memory.read(at, 4096);
        there.extend(owner.memory.read(at + 12288, 8192));
        assert_eq!(there, bytes);
        owner.unregister(dmb.token).expect("unregistered");
        assert_eq!(peer.move_bytes(dmb.token, 0, &bytes), Err(Status::NoEntry));
        self.new_token(dmb.token);
    }

    fn meet(&mut self) {
        let Pair { owner, peer, .. } = &mut self.pair;
        self.key += 1;
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.key.to_le_bytes());
        let meet = |device: &mut RawFrontend, tag| {
            let payload = [tag as u8; 32];
            match device.request(&Request::Rendezvous(Rendezvous { key, tag, payload })) {
                Ok(Reply::Rendezvous(met)) => met,
                other => panic!("{other:?}"),
            }
        };
        assert!(meet(owner, 1).gid.is_none(), "nobody waits with a new key");
        let met = meet(peer, 2);
        assert_eq!((met.gid, met.payload), (owner.gid(), [1; 32]));
        let (gid, tag, payload) = owner.wait_event("the other", |event| match event {
            Event::Rendezvous { gid, tag, payload } => Some((*gid, *tag, *payload)),
            _ => None,
        });
        assert_eq!((gid, tag, payload), (peer.gid(), 1, [2; 32]));
    }

    /// Many DMBs at once.
    fn many(&mut self) {
        let count = 1 + self.random.below(30);
        let mut dmbs = Vec::new();
        for n in 0..count {
            let Pair { owner, peer, .. } = &mut self.pair;
            let dmb = owner.register(peer.gid(), 4096).expect("a DMB");
            assert_eq!(u64::from(dmb.index), n + 1);
            self.new_token(dmb.token);
            dmbs.push(dmb);
        }
        let offsets: HashSet<_> = dmbs.iter().map(|dmb| dmb.offset).collect();
        assert_eq!(offsets.len(), dmbs.len(), "each has a place of its own");
        for dmb in dmbs {
            self.pair.owner.unregister(dmb.token).expect("unregistered");
        }
    }
}

/// Moves of a growing number to one place, many under way: whoever looks never sees a smaller one again.
fn count_up(hub: &Path, over: &AtomicBool) {
    const UNDER_WAY: u64 = 40;
    let options = Options::default();
    let Pair { owner, mut peer, dmb, .. } = Pair::with(connect(hub, &options), connect(hub, &options));
    // The start of the DMB, as if it were a line: the number's lower half is where a line has its futex.
    let start = owner.window().line(dmb.offset);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            let _alarm = Alarm(over);
            let mut last = 0;
            while !done.load(Ordering::Relaxed) {
                let now = start.futex_word().load(Ordering::Acquire);
                assert!(now >= last, "{now} after {last}: a move was done again after a later one");
                last = now;
            }
        });
        let stop = Alarm(done);
        let mut heads = std::collections::VecDeque::new();
        let slot = |number: u64| peer_slot(number % UNDER_WAY);
        let (mut number, mut answered) = (0, 0);
        let base = peer.scratch();
        while answered < number || !over.load(Ordering::Relaxed) {
            while number - answered < UNDER_WAY && !over.load(Ordering::Relaxed) {
                number += 1;
                let at = base + slot(number);
                // Now and then one that is refused, and one that rings.
                let flags = if number % 7 == 0 { MoveFlags::SIGNAL } else { MoveFlags::empty() };
                let offset = if number % 5 == 0 { 1 << 40 } else { 0 };
                let header = MoveHeader { token: dmb.token, offset, mask: 1, flags };
                peer.memory.write(at, &header.to_bytes());
                peer.memory.write(at + 64, &number.to_le_bytes());
                let head = peer.offer(
                    FIRST_MOVE_QUEUE,
                    &[
                        Descriptor::readable(at, HEADER_SIZE as u32),
                        Descriptor::readable(at + 64, 8),
                        Descriptor::writable(at + 128, 8),
                    ],
                );
                heads.push_back(head);
            }
            let used = peer.wait_used(FIRST_MOVE_QUEUE);
            assert_eq!(Some(used), heads.pop_front().map(|head| (head, 8)), "moves are answered in order");
            answered += 1;
            let status = peer.memory.read(base + slot(answered) + 128, 1)[0];
            assert_eq!(status == 0, answered % 5 != 0, "move {answered} has the answer of another");
        }
        done.store(true, Ordering::Relaxed);
        drop(stop);
    });
}

fn peer_slot(number: u64) -> u64 {
    8192 + 256 * number
}

/// Devices that come, are paused and go on or begin anew, and leave.
fn come_and_go(hub: &Path, over: &AtomicBool) {
    let mut random = Random::new(4711);
    while !over.load(Ordering::Relaxed) {
        let mut pair = Pair::with(connect(hub, &Options::default()), connect(hub, &Options::with_futex()));
        let lifeline = pair.owner.memory.allocate(64, 64);
        pair.owner.memory.write(lifeline, &1u32.to_le_bytes());
        pair.owner.request(&Request::Lifeline(lifeline)).expect("the word is guest memory");
        pair.check();
        for _ in 0..random.below(4) {
            pair.owner.pause();
            let gid = pair.peer.wait_event("a pause", |event| match event {
                Event::DevicePaused { gid } => Some(*gid),
                _ => None,
            });
            assert_eq!(gid, pair.owner.gid());
            pair.owner.resume();
            pair.peer.wait_event("the end of the pause", |event| {
                matches!(event, Event::DeviceResumed { .. }).then_some(())
            });
            pair.check();
        }
        let Pair { mut owner, mut peer, .. } = pair;
        if random.one_in(2) {
            owner.memory.write(lifeline, &0u32.to_le_bytes());
            owner.reset();
        } else {
            drop(owner);
        }
        peer.wait_event("the end", |event| matches!(event, Event::DeviceGone { .. }).then_some(()));
        let gone = peer.events().iter().filter(|event| matches!(event, Event::DeviceGone { .. })).count();
        assert_eq!(gone, 0, "it is gone once");
    }
}

#[test]
fn workers_that_are_killed_in_traffic_lose_nothing_and_double_nothing() {
    let daemon = daemon();
    let hub = daemon.hub();
    let mut witness = Pair::new(&hub);
    // What was sent to the keeper it has read when the next worker serves.
    daemon.kill_worker();
    witness.check();
    let before = (daemon.report().pool.extent_bytes, kept(&daemon));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..3 {
            let (hub, over) = (&hub, &over);
            scope.spawn(move || {
                let _alarm = Alarm(over);
                let mut couple = Couple::new(hub, number);
                while !over.load(Ordering::Relaxed) {
                    couple.act();
                }
                couple.pair.check();
            });
        }
        scope.spawn(|| {
            let _alarm = Alarm(&over);
            count_up(&hub, &over);
        });
        scope.spawn(|| {
            let _alarm = Alarm(&over);
            come_and_go(&hub, &over);
        });
        let _alarm = Alarm(&over);
        kill_workers(&daemon, KILLS, &over);
    });
    witness.check();
    until_good("devices", || daemon.report(), |report| report.devices.len() == 2);
    until_good(
        &format!("bytes of extents and descriptors of the keeper, which were {before:?}"),
        || (daemon.report().pool.extent_bytes, kept(&daemon)),
        |after| after.0 == before.0 && after.1 <= before.1,
    );
    let log = daemon.log();
    assert_eq!(log.matches("panicked").count(), 0, "no thread panicked");
    assert_eq!(log.matches("expelled").count(), 0, "nobody was expelled");
    assert!(log.matches("took over").count() as u64 > KILLS / 3, "most of the workers served");
}

#[test]
fn a_signal_to_the_keeper_replaces_the_worker_or_ends_both() {
    let mut daemon = TestDaemon::start_with(&["--keep", "--socket-path", "@/vm.sock"], "");
    let mut pair = Pair::new(&daemon.hub());
    pair.check();
    let worker = daemon.worker();
    kill(Pid::from_raw(daemon.pid() as i32), Signal::SIGHUP).expect("SIGHUP");
    until("another worker", || daemon.worker().filter(|now| Some(*now) != worker));
    pair.check();
    let status = daemon.stop(Signal::SIGTERM);
    assert_eq!(status.code(), Some(0));
    for socket in ["hub.sock", "control.sock", "vm.sock"] {
        assert!(!daemon.path(socket).exists(), "{socket}");
    }
    pair.peer.wait_closed();
}

#[test]
fn a_configured_device_keeps_its_gid_and_its_place() {
    let daemon = TestDaemon::start_with(&["--keep", "--socket-path", "@/a.sock"], "");
    let gid = RawFrontend::connect(daemon.path("a.sock")).gid();
    daemon.kill_worker();
    let device = connect(&daemon.path("a.sock"), &Options::default());
    assert_eq!(device.gid(), gid);
    daemon.kill_worker();
    until_good(
        "devices",
        || daemon.worker().map(|_| daemon.get("/v1/report").is_ok()),
        |ok| *ok == Some(true),
    );
    let devices = daemon.report().devices;
    assert_eq!(devices.len(), 1);
    assert!(devices[0].started);
}

#[test]
fn a_worker_that_cannot_read_the_book_says_so_and_everything_is_held() {
    const VERSION_AT: u64 = 8;
    let daemon = daemon();
    let mut pair = Pair::new(&daemon.hub());
    pair.check();
    let keeper = Path::new("/proc").join(daemon.pid().to_string()).join("fd");
    let is_book = |path: &PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("dmbridge-book"))
    };
    let entries = std::fs::read_dir(keeper).expect("/proc");
    let path = entries.filter_map(|entry| Some(entry.ok()?.path())).find(is_book).expect("the book");
    let book = File::options().read(true).write(true).open(path).expect("the book");
    let mut version = [0; 8];
    book.read_exact_at(&mut version, VERSION_AT).expect("the book");
    // As if a later version had written it.
    book.write_all_at(&u64::MAX.to_le_bytes(), VERSION_AT).expect("the book");
    daemon.kill_worker();
    until("the keeper gives up", || daemon.log().contains("no further one is started").then_some(()));
    assert!(daemon.log().contains("start the version that wrote it"), "{}", daemon.log());
    assert_eq!(daemon.worker(), None);
    // What is mapped goes on, and nobody has lost the connection.
    pair.peer.window().write(pair.remote.offset, b"without a worker");
    assert_eq!(pair.owner.window().read(pair.dmb.offset, 16), b"without a worker");
    assert!(!pair.owner.is_closed());
    book.write_all_at(&version, VERSION_AT).expect("the book");
    kill(Pid::from_raw(daemon.pid() as i32), Signal::SIGHUP).expect("SIGHUP");
    pair.check();
}

#[test]
fn a_worker_that_ends_by_itself_is_replaced_after_a_pause() {
    let daemon = daemon();
    let mut pair = Pair::new(&daemon.hub());
    for round in 1..4 {
        let worker = until("there is a worker", || daemon.worker());
        until("it serves", || daemon.get("/v1/health").ok());
        kill(Pid::from_raw(worker as i32), Signal::SIGABRT).expect("SIGABRT");
        until("the keeper says so", || (daemon.log().matches("SIGABRT").count() == round).then_some(()));
        pair.check();
    }
}
