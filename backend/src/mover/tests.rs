use super::*;
use crate::doorbell;
use crate::engine::Engine;
use crate::engine::cpu_node::NodePool;
use crate::pool::memfile::MemFile;
use crate::port::{RamSegment, SessionId};
use crate::testing::{BASE, Guest, INDIRECT, NEXT, TestRing, WRITE, table};
use dmbridge_proto::ids::{Gid, Token};

const DMB_SIZE: u64 = 64 << 10;
const DMB_AT: u64 = 8192;

/// A sender, an owner, and a DMB of it in the pool and one in its RAM.
struct World {
    sender: Guest,
    owner: Guest,
    file: Arc<MemFile>,
    owner_port: Arc<Port>,
    queue: MoveQueue,
    worker: Worker,
    ring: TestRing,
    pool_dmb: Arc<Target>,
    ram_dmb: Arc<Target>,
    /// Where the RAM DMB's control line and its two segments are.
    line: u64,
    segments: [u64; 2],
    header: u64,
    answer: u64,
    inbox: doorbell::Inbox,
}

const RAM_SPLIT: u64 = 24 << 10;

impl World {
    fn new() -> World {
        World::with(MoverEngines::cpu_only())
    }

    fn with(engines: MoverEngines) -> World {
        let (doorbell, inbox) = doorbell::pair().unwrap();
        let (sender, owner) = (Guest::new(4 << 20), Guest::new(4 << 20));
        let sender_port = Arc::new(Port::new(SessionId(1), doorbell.clone(), None));
        let owner_port = Arc::new(Port::new(SessionId(2), doorbell, None));
        sender_port.memory.replace(sender.table());
        owner_port.memory.replace(owner.table());
        let file = Arc::new(MemFile::new(1 << 20, None, &Default::default()).unwrap());
        let home = Home::Pool { file: file.clone(), offset: DMB_AT, line_offset: 64 };
        let target = |number, home| {
            let gid = Gid::from_u64(1);
            let token = Token::in_ram(number);
            Arc::new(Target::new(token, number as u32, DMB_SIZE, gid, owner_port.clone(), home))
        };
        let pool_dmb = target(1, home);
        let line = owner.take(64);
        let segments = [owner.take(RAM_SPLIT), owner.take(DMB_SIZE - RAM_SPLIT)];
        let ram = [
            RamSegment { offset: 0, addr: segments[0], len: RAM_SPLIT },
            RamSegment { offset: RAM_SPLIT, addr: segments[1], len: DMB_SIZE - RAM_SPLIT },
        ];
        let ram_dmb = target(2, Home::Ram { line_addr: line, segments: ram.into() });
        sender_port.add_target(pool_dmb.clone());
        sender_port.add_target(ram_dmb.clone());
        let ring = TestRing::new(&sender, 64);
        let vring = ring.vring(&sender_port.memory.read());
        let shared = Shared {
            epoll: Epoll::new().unwrap(),
            word: EventFd::new(0).unwrap(),
            stop: AtomicBool::new(false),
            fresh: Mutex::default(),
            queues: Mutex::default(),
            next: AtomicU64::new(0),
        };
        World {
            header: sender.take(HEADER_SIZE as u64),
            answer: sender.take(RESPONSE_SIZE as u64),
            queue: MoveQueue {
                port: sender_port,
                max_segments: 8,
                max_move_size: 1 << 20,
                ring: Mutex::new(Some(vring)),
                stopping: AtomicBool::new(false),
                progress: None,
                done: Mutex::default(),
            },
            worker: Worker {
                shared: Arc::new(shared),
                engines,
                runs: Vec::new(),
                chains: std::array::from_fn(|_| Chain::default()),
                answered: Vec::new(),
                data: Vec::new(),
                turns: VecDeque::new(),
                waiting: HashSet::new(),
                parked: Vec::new(),
                look: None,
            },
            sender,
            owner,
            file,
            owner_port,
            ring,
            pool_dmb,
            ram_dmb,
            line,
            segments,
            inbox,
        }
    }

    /// Offers a move and does it: used length and status.
    fn raw(&mut self, header: &[u8], data: &[(u64, u32)]) -> (u32, u8) {
        self.sender.write(self.header, header);
        self.sender.write(self.answer, &[0xee; 8]);
        let mut readable = vec![(self.header, header.len() as u32)];
        readable.extend_from_slice(data);
        self.ring.offer_pieces(&self.sender, &readable, &[(self.answer, 8)]);
        self.turn()
    }

    fn turn(&mut self) -> (u32, u8) {
        self.worker.turn(&self.queue);
        let (_, len) = self.ring.used(&self.sender).expect("the chain is used");
        (len, self.sender.read(self.answer, 1)[0])
    }

    fn move_into(&mut self, header: MoveHeader, data: &[(u64, u32)]) -> Result<(), Status> {
        let (len, status) = self.raw(&header.to_bytes(), data);
        assert_eq!(len, 8);
        Status::from_byte(status).unwrap()
    }

    fn pool_bytes(&self) -> Vec<u8> {
        let start = self.file.at(DMB_AT, DMB_SIZE);
        // SAFETY: inside of the mapping, as `at` checks.
        (0..DMB_SIZE as usize).map(|i| unsafe { start.add(i).read_volatile() }).collect()
    }

    fn ram_bytes(&self) -> Vec<u8> {
        let mut bytes = self.owner.read(self.segments[0], RAM_SPLIT as usize);
        bytes.extend(self.owner.read(self.segments[1], (DMB_SIZE - RAM_SPLIT) as usize));
        bytes
    }

    fn signals(&self) -> usize {
        self.owner_port.events().take_waiting().len()
    }
}

fn to(target: &Target, offset: u64) -> MoveHeader {
    MoveHeader { token: target.token, offset, mask: 0, flags: MoveFlags::empty() }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn scattered_data_lands_in_order_and_nowhere_else() {
    let mut world = World::new();
    let bytes = pattern(40_000);
    let data = world.sender.put(&bytes);
    let pieces = [(data, 1u32), (data + 1, 0), (data + 1, 12_345), (data + 12_346, 27_654)];
    for offset in [0, 1, 8, 4095, DMB_SIZE - 40_000] {
        for dmb in [world.pool_dmb.clone(), world.ram_dmb.clone()] {
            let before = [world.pool_bytes(), world.ram_bytes()];
            assert_eq!(world.move_into(to(&dmb, offset), &pieces), Ok(()));
            let mut want = before;
            let at = offset as usize;
            want[dmb.index as usize - 1][at..at + bytes.len()].copy_from_slice(&bytes);
            assert!(want == [world.pool_bytes(), world.ram_bytes()]);
        }
    }
    assert_eq!(Counters::get(&world.queue.port.counters.moves), 10);
    assert_eq!(Counters::get(&world.queue.port.counters.bytes), 400_000);
}

#[test]
fn errors_come_in_the_order_of_the_specification_and_write_nothing() {
    let mut world = World::new();
    let data = world.sender.put(&[0xff; 4096]);
    let good = to(&world.pool_dmb.clone(), 0);
    let nobody = MoveHeader { token: Token::in_ram(77), offset: u64::MAX, ..good };
    let behind = MoveHeader { offset: DMB_SIZE - 8, ..good };
    let outside = (BASE + (4 << 20) - 8, 16u32);
    let mut flags = nobody.to_bytes();
    flags[24] = 4;
    let big = [(data, 1 << 20), (data, 1)];
    let many = [(data, 1); 9];
    type Pieces<'a> = &'a [(u64, u32)];
    let cases: [(&str, [u8; 32], Pieces<'_>, Status); 8] = [
        ("an unknown flag before everything", flags, &big, Status::Invalid),
        ("too much data before an unknown token", nobody.to_bytes(), &big, Status::TooBig),
        ("too many descriptors", nobody.to_bytes(), &many, Status::TooBig),
        ("an unknown token before its range", nobody.to_bytes(), &[outside], Status::NoEntry),
        ("a range before an address", behind.to_bytes(), &[outside], Status::Invalid),
        (
            "a range that wraps",
            MoveHeader { offset: u64::MAX, ..good }.to_bytes(),
            &[(data, 8)],
            Status::Invalid,
        ),
        ("an address", good.to_bytes(), &[(data, 8), outside], Status::Fault),
        ("an address beyond everything", good.to_bytes(), &[(u64::MAX - 3, 8)], Status::Fault),
    ];
    for (what, header, pieces, status) in cases {
        assert_eq!(world.raw(&header, pieces), (8, status as u8), "{what}");
    }
    assert!(world.pool_bytes().iter().all(|b| *b == 0));
    assert_eq!(Counters::get(&world.queue.port.counters.refused), 8);
}

#[test]
fn malformed_moves_are_returned_with_length_zero() {
    let mut world = World::new();
    let good = to(&world.pool_dmb.clone(), 0).to_bytes();
    // The header shares a descriptor with data, is too short, or is not guest memory.
    assert_eq!(world.raw(&[good.as_slice(), b"data"].concat(), &[]).0, 0);
    assert_eq!(world.raw(&good[..31], &[]).0, 0);
    assert_eq!(world.raw(&good[..16], &[(world.header + 16, 17)]).0, 0);
    assert_eq!(world.raw(&good[..16], &[(0, 16)]).0, 0);
    let (header, answer) = (world.header, world.answer);
    for writable in [(answer, 7), (0, 8), (BASE + (4 << 20) - 4, 8)] {
        world.sender.write(header, &good);
        world.ring.offer_pieces(&world.sender, &[(header, 32)], &[writable]);
        assert_eq!(world.turn().0, 0);
    }
    world.ring.describe(&world.sender, &[(answer, 8, WRITE | NEXT, 1), (header, 32, 0, 0)]);
    world.ring.offer(&world.sender, 0);
    assert_eq!(world.turn().0, 0);
    // A header in pieces is good.
    world.sender.write(header, &good);
    let pieces = [(header, 5), (header + 5, 0), (header + 5, 27)];
    world.ring.offer_pieces(&world.sender, &pieces, &[(answer, 8)]);
    assert_eq!(world.turn(), (8, 0));
}

#[test]
fn a_signal_sets_bits_and_tells_only_who_asked() {
    let mut world = World::new();
    for dmb in [world.pool_dmb.clone(), world.ram_dmb.clone()] {
        let signal = MoveHeader { mask: 0x80, flags: MoveFlags::SIGNAL, ..to(&dmb, 0) };
        assert_eq!(world.move_into(signal, &[]), Ok(()));
        assert_eq!(world.signals(), 0);
        let home = dmb.open();
        let line = |act: &dyn Fn(&dmbridge_proto::line::ControlLine) -> u64| {
            home.as_ref().unwrap().with_line(&world.owner_port, act).unwrap()
        };
        assert_eq!(line(&|line| line.take_pending()), 0x80);
        line(&|line| {
            line.arm(Wake::Signal);
            0
        });
        drop(home);
        assert_eq!(world.move_into(signal, &[]), Ok(()));
        assert_eq!(world.move_into(signal, &[]), Ok(()));
        assert_eq!(world.signals(), 1);
        // A ring tells in any case, and does not look at the line.
        let ring = MoveHeader { flags: MoveFlags::RING, ..to(&dmb, 0) };
        assert_eq!(world.move_into(ring, &[]), Ok(()));
        assert_eq!(world.signals(), 1);
    }
    let counters = &world.queue.port.counters;
    assert_eq!((Counters::get(&counters.rung), Counters::get(&counters.suppressed)), (1, 2));
    let stats = world.file.line(64).stats();
    assert_eq!((stats.rung, stats.suppressed), (1, 2));
    assert_eq!(world.owner.read(world.line, 4), [0; 4]);
}

#[test]
fn a_closed_dmb_is_not_there() {
    let mut world = World::new();
    let data = world.sender.put(&[0xff; 64]);
    let dmb = world.pool_dmb.clone();
    dmb.close();
    assert_eq!(world.move_into(to(&dmb, 0), &[(data, 64)]), Err(Status::NoEntry));
    assert!(world.pool_bytes().iter().all(|b| *b == 0));
}

/// An engine that copies when it likes to, in pieces and in an order of its own.
struct Late {
    runs: std::sync::mpsc::Sender<Run>,
    left: Arc<AtomicU64>,
}

impl Late {
    fn new() -> Late {
        let (runs, given) = std::sync::mpsc::channel::<Run>();
        let left = Arc::new(AtomicU64::new(0));
        let done = left.clone();
        std::thread::spawn(move || {
            for Run { src, dst, len } in given {
                let mut pieces: Vec<usize> = (0..len).step_by(512).collect();
                // From both ends to the middle, so the last byte is an early one.
                pieces.sort_by_key(|at| at.abs_diff(len / 2));
                for at in pieces.into_iter().rev() {
                    if at % 7 == 0 {
                        std::thread::yield_now();
                    }
                    let len = 512.min(len - at);
                    // SAFETY: the run is there until it is counted as done.
                    unsafe {
                        dmbridge_proto::shm::copy_to_shared(
                            dmbridge_proto::shm::CopyMethod::NonTemporal,
                            src.wrapping_add(at),
                            dst.wrapping_add(at),
                            len,
                        );
                    }
                }
                done.fetch_sub(1, Ordering::Release);
            }
        });
        Late { runs, left }
    }
}

impl Engine for Late {
    unsafe fn submit(&mut self, runs: &[Run]) {
        self.left.fetch_add(runs.len() as u64, Ordering::Relaxed);
        runs.iter().for_each(|run| self.runs.send(*run).unwrap());
    }

    fn poll(&mut self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }
}

/// Every engine, one that is late, and an accelerator at which things go wrong.
fn all_engines() -> Vec<(&'static str, MoverEngines)> {
    let host = crate::topology::Topology::of_host();
    let node = &host.nodes()[0];
    // The threads of a pool end with it, and jobs are then done by who asks: so it stays.
    let pool = Box::leak(Box::new(NodePool::start(node.id, &node.cpus, 2).unwrap()));
    vec![
        ("cpu", MoverEngines::cpu_only()),
        ("cpu-node", MoverEngines::only(Box::new(pool.engine()))),
        ("dsa", MoverEngines::only(crate::engine::dsa::tests::faulty())),
        ("late", MoverEngines::only(Box::new(Late::new()))),
    ]
}

/// A word of the DMB that somebody else writes.
fn word(file: &MemFile, offset: u64) -> &AtomicU64 {
    // SAFETY: inside of the mapping, aligned, and mapped as long as the file.
    unsafe { AtomicU64::from_ptr(file.at(DMB_AT + offset, 8).cast()) }
}

#[test]
fn whatever_copies_a_signal_and_a_later_move_are_seen_after_the_last_byte() {
    for (name, engines) in all_engines() {
        let mut world = World::with(engines);
        let file = world.file.clone();
        let last = DMB_SIZE - 8;
        let reader = std::thread::spawn(move || {
            let mut signalled = 0;
            while signalled != u64::MAX {
                // The mask is the round; the cursor is a move of its own.
                signalled = signalled.max(file.line(64).take_pending());
                let cursor = word(&file, last).load(Ordering::Acquire);
                let least = (0..last).step_by(8).map(|at| word(&file, at).load(Ordering::Relaxed)).min();
                assert!(least >= Some(cursor), "{name}: {least:?} was seen after {cursor} by the cursor");
                assert!(
                    signalled == u64::MAX || least >= Some(signalled),
                    "{name}: {least:?} was seen after {signalled} by the signal"
                );
            }
        });
        let (data, cursor) = (world.sender.take(DMB_SIZE), world.sender.take(8));
        let dmb = world.pool_dmb.clone();
        // Rounds grow bit by bit, because masks are ORed.
        for round in (1..60).map(|bits| (1u64 << bits) - 1) {
            world.sender.write(data, &round.to_le_bytes().repeat(last as usize / 8));
            let signal = MoveHeader { mask: round, flags: MoveFlags::SIGNAL, ..to(&dmb, 0) };
            // In two pieces, of which one is not aligned.
            let cut = (last as u32 / 3) | 1;
            let pieces = [(data, cut), (data + u64::from(cut), last as u32 - cut)];
            assert_eq!(world.move_into(signal, &pieces), Ok(()), "{name}");
            world.sender.write(cursor, &round.to_le_bytes());
            assert_eq!(world.move_into(to(&dmb, last), &[(cursor, 8)]), Ok(()), "{name}");
        }
        let _ = world.file.line(64).signal(u64::MAX);
        reader.join().unwrap();
    }
}

#[test]
fn when_a_memory_table_has_changed_no_engine_writes_into_the_old_memory() {
    for (name, engines) in all_engines() {
        let mut world = World::with(engines);
        let (owner, ram) = (world.owner.file.try_clone().unwrap(), world.segments[1] - BASE);
        let port = world.owner_port.clone();
        let mover = std::thread::spawn(move || {
            let data = world.sender.take(DMB_SIZE);
            for round in 1u64.. {
                world.sender.write(data, &round.to_le_bytes().repeat(DMB_SIZE as usize / 8));
                let dmb = world.ram_dmb.clone();
                if let Err(status) = world.move_into(to(&dmb, 0), &[(data, DMB_SIZE as u32)]) {
                    return status;
                }
            }
            unreachable!("the memory was taken away")
        });
        let read = |len: usize| {
            let mut bytes = vec![0; len];
            std::os::unix::fs::FileExt::read_exact_at(&owner, &mut bytes, ram).unwrap();
            bytes
        };
        while read(8) == [0; 8] {
            std::thread::yield_now();
        }
        port.memory.replace(DeviceMemory::default());
        let then = read((DMB_SIZE - RAM_SPLIT) as usize);
        assert_eq!(mover.join().unwrap(), Status::Reset, "{name}");
        assert!(then == read((DMB_SIZE - RAM_SPLIT) as usize), "{name}");
    }
}

#[test]
fn nothing_is_written_to_a_dmb_after_it_was_closed() {
    for (name, engines) in (0..5).flat_map(|_| all_engines()) {
        let mut world = World::with(engines);
        let dmb = world.pool_dmb.clone();
        let file = world.file.clone();
        let snapshot = || {
            let start = file.at(DMB_AT, DMB_SIZE).cast::<u64>();
            // SAFETY: inside of the mapping, as `at` checks; a mover may write it meanwhile.
            (0..DMB_SIZE as usize / 8).map(|i| unsafe { start.add(i).read_volatile() }).collect::<Vec<_>>()
        };
        let mover = std::thread::spawn(move || {
            let data = world.sender.take(DMB_SIZE);
            let header = to(&world.pool_dmb.clone(), 0);
            for round in 1u64.. {
                world.sender.write(data, &round.to_le_bytes().repeat(DMB_SIZE as usize / 8));
                match world.move_into(header, &[(data, DMB_SIZE as u32)]) {
                    Ok(()) => {}
                    Err(status) => return status,
                }
            }
            unreachable!("the DMB was closed")
        });
        while snapshot()[0] == 0 {
            std::thread::yield_now();
        }
        dmb.close();
        let then = snapshot();
        assert_eq!(mover.join().unwrap(), Status::NoEntry, "{name}");
        assert!(then == snapshot(), "{name}");
    }
}

#[test]
fn moves_that_were_looked_at_and_have_to_wait_stay_in_the_ring_and_all_are_answered_in_order() {
    const MOVES: u64 = 40;
    const WAITS: u64 = 20;
    const MALFORMED: u64 = 5;
    let mut world = World::new();
    let (pool, ram) = (world.pool_dmb.clone(), world.ram_dmb.clone());
    let mut answers = Vec::new();
    let chains: Vec<_> = (0..MOVES)
        .map(|number| {
            let target = if number == WAITS { &ram } else { &pool };
            let header = world.sender.put(&to(target, 0).to_bytes());
            let data = world.sender.put(&number.to_le_bytes());
            let answer = world.sender.put(&[0xee; 8]);
            answers.push(answer);
            let header_len = if number == MALFORMED { 31 } else { 32 };
            let pieces = [(header, header_len, NEXT, 1), (data, 8, NEXT, 2), (answer, 8, WRITE, 0)];
            (world.sender.put(&table(&pieces)), 48, INDIRECT, 0)
        })
        .collect();
    world.ring.describe(&world.sender, &chains);
    (0..MOVES as u16).for_each(|head| world.ring.offer(&world.sender, head));
    let cursor = |world: &World| word(&world.file, 0).load(Ordering::Relaxed);
    let base = |world: &World| world.queue.ring().as_ref().unwrap().base();

    world.owner_port.set_paused(true);
    assert!(matches!(world.worker.turn(&world.queue), Turn::Later));
    assert_eq!((cursor(&world), base(&world)), (WAITS - 1, WAITS as u16));
    let mut used: Vec<_> = std::iter::from_fn(|| world.ring.used(&world.sender)).collect();
    assert_eq!(used.len() as u64, WAITS);
    world.owner_port.set_paused(false);
    assert!(matches!(world.worker.turn(&world.queue), Turn::Idle));
    assert_eq!((cursor(&world), base(&world)), (MOVES - 1, MOVES as u16));
    used.extend(std::iter::from_fn(|| world.ring.used(&world.sender)));
    for (number, (used, answer)) in used.iter().zip(&answers).enumerate() {
        let (len, status) = if number as u64 == MALFORMED { (0, 0xee) } else { (8, 0) };
        assert_eq!((used.0, used.1, world.sender.read(*answer, 1)[0]), (number as u32, len, status));
    }
    assert_eq!(used.len() as u64, MOVES);
    assert_eq!(Counters::get(&world.queue.port.counters.moves), MOVES - 1);
}

/// An engine that has done with a long run only when so many chains are used.
struct Patient {
    memory: std::fs::File,
    used: u64,
    want: u16,
    long: bool,
}

impl Engine for Patient {
    unsafe fn submit(&mut self, runs: &[Run]) {
        self.long = runs.iter().any(|run| run.len as u64 >= PROMPTLY);
    }

    fn poll(&mut self) -> bool {
        let mut index = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&self.memory, &mut index, self.used).unwrap();
        !self.long || u16::from_le_bytes(index) >= self.want
    }
}

#[test]
fn short_moves_are_answered_before_a_long_one_is_begun() {
    let mut world = World::new();
    let used = world.ring.layout.used + 2 - BASE;
    let memory = world.sender.file.try_clone().unwrap();
    world.worker.engines = MoverEngines::only(Box::new(Patient { memory, used, want: 3, long: false }));
    let data = world.sender.take(PROMPTLY);
    let chains: Vec<_> = [8, 8, 8, PROMPTLY as u32, 8]
        .into_iter()
        .map(|len| {
            let header = world.sender.put(&to(&world.pool_dmb, 0).to_bytes());
            let answer = world.sender.put(&[0xee; 8]);
            let pieces = [(header, 32, NEXT, 1), (data, len, NEXT, 2), (answer, 8, WRITE, 0)];
            (world.sender.put(&table(&pieces)), 48, INDIRECT, 0)
        })
        .collect();
    world.ring.describe(&world.sender, &chains);
    (0..chains.len() as u16).for_each(|head| world.ring.offer(&world.sender, head));
    // Else it would wait for ever.
    assert!(matches!(world.worker.turn(&world.queue), Turn::Idle));
    assert_eq!(std::iter::from_fn(|| world.ring.used(&world.sender)).count(), chains.len());
}

#[test]
fn a_ring_that_claims_too_much_is_stopped() {
    let mut world = World::new();
    world.ring.claim(&world.sender, 65);
    world.worker.turn(&world.queue);
    assert!(world.queue.ring().is_none());
}

#[test]
fn memory_that_vanishes_expels_its_own_device_and_no_other() {
    for ((name, source), (_, owner)) in all_engines().into_iter().zip(all_engines()) {
        let mut world = World::with(source);
        let data = world.sender.take(2 << 20);
        world.sender.file.set_len(data - BASE).unwrap();
        let dmb = world.pool_dmb.clone();
        assert_eq!(world.move_into(to(&dmb, 0), &[(data, 16 << 10)]), Ok(()), "{name}");
        assert!(world.pool_bytes().iter().all(|b| *b == 0), "{name}");
        let mut expelled = Vec::new();
        while let Some(doorbell::Message::Expel(id, _)) = world.inbox.take() {
            expelled.push(id);
        }
        assert_eq!(expelled, [SessionId(1)], "{name}");

        let mut world = World::with(owner);
        let data = world.sender.put(&[0xff; 16 << 10]);
        world.owner.file.set_len(4096).unwrap();
        let dmb = world.ram_dmb.clone();
        assert_eq!(world.move_into(to(&dmb, 0), &[(data, 16 << 10)]), Ok(()), "{name}");
        let Some(doorbell::Message::Expel(id, _)) = world.inbox.take() else {
            panic!("{name}: nobody is expelled")
        };
        assert_eq!(id, SessionId(2), "{name}");
    }
}

#[test]
fn a_memory_table_that_changes_ends_moves_into_what_it_held() {
    let mut world = World::new();
    let data = world.sender.put(&[0xff; 4096]);
    let dmb = world.ram_dmb.clone();
    world.owner_port.memory.replace(DeviceMemory::default());
    assert_eq!(world.move_into(to(&dmb, 0), &[(data, 4096)]), Err(Status::Reset));
}
