//! Whatever a guest puts into a ring has its defined answer, and costs nobody else anything.

use dmbridge_proto::control::{Command, HEADER_SIZE};
use dmbridge_proto::ids::Token;
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::memory::BASE;
use dmbridge_tests::pair::Pair;
use dmbridge_tests::ring::{Descriptor, INDIRECT, NEXT, link};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

/// A guest of which everything is allowed.
struct Attacker {
    device: RawFrontend,
    /// A DMB of which it is the peer.
    token: Token,
    /// Guest memory: a command or a move header at 0, data at 4096, the answer at 64 KiB.
    at: u64,
}

impl Attacker {
    fn new(daemon: &TestDaemon) -> Attacker {
        let mut device = RawFrontend::connect(daemon.hub());
        let token = device.register(device.gid(), 64 << 10).expect("a DMB").token;
        let at = device.memory.allocate(1 << 17, 4096);
        Attacker { device, token, at }
    }

    fn query(&self) -> Descriptor {
        let mut bytes = Command::QueryGid.header().to_vec();
        bytes.extend_from_slice(&self.device.gid().to_bytes());
        self.device.memory.write(self.at, &bytes);
        Descriptor::readable(self.at, bytes.len() as u32)
    }

    fn header(&self) -> Descriptor {
        let header = MoveHeader { token: self.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
        self.device.memory.write(self.at, &header.to_bytes());
        Descriptor::readable(self.at, 32)
    }

    fn data(&self, len: u32) -> Descriptor {
        Descriptor::readable(self.at + 4096, len)
    }

    fn answer(&self, len: u32) -> Descriptor {
        Descriptor::writable(self.at + (64 << 10), len)
    }

    /// What a healthy command of this device is answered after all that.
    fn check(&mut self) {
        let gid = self.device.gid();
        assert!(self.device.query(gid).is_ok());
        assert_eq!(self.device.move_bytes(self.token, 0, b"sound"), Ok(()));
    }
}

/// Builds the descriptors of a chain, numbered from `first` on in a table of `size`.
type Build = fn(&Attacker, first: u16, size: u16) -> Vec<(u16, Descriptor)>;

fn chain(pieces: &[Descriptor], first: u16, size: u16) -> Vec<(u16, Descriptor)> {
    link(pieces, first, size)
}

/// Chains that break the ring format in a way that can be followed: returned used with length 0, nothing done.
const MALFORMED: &[(&str, u16, Build)] = &[
    ("a loop", CONTROL_QUEUE, |a, n, _| vec![(n, Descriptor { flags: NEXT, next: n, ..a.query() })]),
    ("a loop of two", CONTROL_QUEUE, |a, n, size| {
        let mut chain = chain(&[a.query(), a.answer(16)], n, size);
        chain[1].1.flags |= NEXT;
        chain[1].1.next = n;
        chain
    }),
    ("a next descriptor beyond the table", CONTROL_QUEUE, |a, n, size| {
        vec![(n, Descriptor { flags: NEXT, next: size, ..a.query() })]
    }),
    ("a next descriptor far beyond the table", FIRST_MOVE_QUEUE, |a, n, _| {
        vec![(n, Descriptor { flags: NEXT, next: 0xffff, ..a.header() })]
    }),
    ("readable after writable", CONTROL_QUEUE, |a, n, size| chain(&[a.answer(16), a.query()], n, size)),
    ("readable after writable in a move", FIRST_MOVE_QUEUE, |a, n, size| {
        chain(&[a.header(), a.answer(8), a.data(8)], n, size)
    }),
    ("no writable bytes", CONTROL_QUEUE, |a, n, size| chain(&[a.query()], n, size)),
    ("7 writable bytes", CONTROL_QUEUE, |a, n, size| chain(&[a.query(), a.answer(7)], n, size)),
    ("7 writable bytes for a move", FIRST_MOVE_QUEUE, |a, n, size| {
        chain(&[a.header(), a.answer(7)], n, size)
    }),
    ("a move of 31 bytes", FIRST_MOVE_QUEUE, |a, n, size| {
        chain(&[Descriptor { len: 31, ..a.header() }, a.answer(8)], n, size)
    }),
    ("a move whose header shares its descriptor with data", FIRST_MOVE_QUEUE, |a, n, size| {
        chain(&[Descriptor { len: 40, ..a.header() }, a.answer(8)], n, size)
    }),
    ("a move with nothing to read", FIRST_MOVE_QUEUE, |a, n, size| chain(&[a.answer(8)], n, size)),
    ("an indirect table of no descriptors", CONTROL_QUEUE, |a, n, _| {
        vec![(n, Descriptor { addr: a.at + 8192, len: 0, flags: INDIRECT, next: 0 })]
    }),
    ("an indirect table of half a descriptor", CONTROL_QUEUE, |a, n, _| {
        vec![(n, Descriptor { addr: a.at + 8192, len: 24, flags: INDIRECT, next: 0 })]
    }),
    ("an indirect table outside of memory", CONTROL_QUEUE, |a, n, _| {
        vec![(n, Descriptor { addr: a.device.memory.end() - 16, len: 32, flags: INDIRECT, next: 0 })]
    }),
    ("an indirect table in an indirect table", CONTROL_QUEUE, |a, n, _| {
        let nested = Descriptor { addr: a.at + 8192, len: 16, flags: INDIRECT, next: 0 };
        a.device.memory.write(a.at + 8192, &nested.to_bytes());
        vec![(n, nested)]
    }),
    ("an indirect table with a loop", CONTROL_QUEUE, |a, n, _| {
        let looping = Descriptor { flags: NEXT, next: 0, ..a.query() };
        a.device.memory.write(a.at + 8192, &looping.to_bytes());
        vec![(n, Descriptor { addr: a.at + 8192, len: 16, flags: INDIRECT, next: 0 })]
    }),
    ("an indirect table whose chain leaves it", FIRST_MOVE_QUEUE, |a, n, _| {
        let leaving = Descriptor { flags: NEXT, next: 1, ..a.header() };
        a.device.memory.write(a.at + 8192, &leaving.to_bytes());
        vec![(n, Descriptor { addr: a.at + 8192, len: 16, flags: INDIRECT, next: 0 })]
    }),
    ("an event buffer of 63 bytes", EVENT_QUEUE, |a, n, size| chain(&[a.answer(63)], n, size)),
    ("an event buffer to read from", EVENT_QUEUE, |a, n, size| chain(&[a.data(64)], n, size)),
];

#[test]
fn a_chain_that_breaks_the_ring_format_is_returned_unanswered() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    for (what, queue, build) in MALFORMED {
        println!("{what}");
        let mut attacker = Attacker::new(&daemon);
        if *queue == EVENT_QUEUE {
            // The buffers that are posted already stay unused: this device gets no events. So look at one without.
            let options = Options { event_buffers: 0, ..Options::default() };
            attacker.device = RawFrontend::connect_with(daemon.hub(), options);
            attacker.at = attacker.device.memory.allocate(1 << 17, 4096);
        }
        let size = attacker.device.rings[0].size;
        for (number, descriptor) in build(&attacker, 200, size) {
            attacker.device.rings[usize::from(*queue)].set(&attacker.device.memory, number, descriptor);
        }
        if *queue == EVENT_QUEUE {
            // A buffer is looked at when there is something to put into it.
            let gid = attacker.device.gid();
            assert_eq!(attacker.device.signal_event(gid, 1, 2), Ok(()), "{what}");
        }
        let answer = attacker.at + (64 << 10);
        attacker.device.memory.write(answer, &[0xee; 64]);
        let ring = &mut attacker.device.rings[usize::from(*queue)];
        ring.offer(&attacker.device.memory, 200);
        ring.ring();
        assert_eq!(attacker.device.wait_used(*queue), (200, 0), "{what}");
        assert_eq!(attacker.device.memory.read(answer, 64), [0xee; 64], "{what}: nothing is written");
        if *queue != EVENT_QUEUE {
            attacker.check();
        }
        witness.check();
    }
}

#[test]
fn a_command_that_is_wrong_gets_the_status_of_the_first_rule_that_it_breaks() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let mut device = RawFrontend::connect(daemon.hub());
    let gid = device.gid().to_bytes();
    let body = |command: Command, body: &[u8]| [&command.header(), body].concat();
    let register = |size: u64, flags: u32, segments: u32, line: u64| {
        let mut bytes = gid.to_vec();
        bytes.extend_from_slice(&size.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&segments.to_le_bytes());
        bytes.extend_from_slice(&line.to_le_bytes());
        body(Command::Register, &bytes)
    };
    let ram = |segments: &[(u64, u64)], line: u64| {
        let size = segments.iter().fold(0u64, |sum, s| sum.wrapping_add(s.1));
        let mut bytes = register(size, 1, segments.len() as u32, line);
        for (addr, len) in segments {
            bytes.extend_from_slice(&addr.to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
        }
        bytes
    };
    let end = device.memory.end();
    let page = device.memory.allocate(8192, 4096);
    let nobody = [7; 16];
    use Status::{Fault, Invalid, NoEntry, NotSupported, TooBig};
    for (what, bytes, answer, status) in [
        ("7 readable bytes", vec![0; 7], 16, Invalid),
        ("no readable bytes", vec![], 16, Invalid),
        ("an unknown class", vec![9; 64], 64, NotSupported),
        ("an unknown command", vec![1, 77, 0, 0, 0, 0, 0, 0], 64, NotSupported),
        ("an unknown command and a short answer", vec![1, 77, 0, 0, 0, 0, 0, 0], 8, NotSupported),
        ("half a body", body(Command::QueryGid, &gid[..8]), 16, Invalid),
        ("no room for the reply", body(Command::QueryGid, &gid), 15, Invalid),
        ("a device that is not there", body(Command::QueryGid, &nobody), 16, NoEntry),
        ("a token of nothing", body(Command::Attach, &[0xff; 8]), 56, NoEntry),
        ("no token at all", body(Command::Unregister, &[0; 8]), 8, NoEntry),
        ("detach what is not attached", body(Command::Detach, &[1; 8]), 8, NoEntry),
        ("an event for nobody", body(Command::SignalEvent, &[7; 32]), 8, NoEntry),
        ("a DMB of no bytes", register(0, 0, 0, 0), 56, Invalid),
        ("a DMB of half a page", register(2048, 0, 0, 0), 56, Invalid),
        ("a DMB with unknown flags", register(4096, 6, 0, 0), 56, Invalid),
        ("a DMB with a line in the pool", register(4096, 0, 0, 64), 56, Invalid),
        ("a DMB larger than anything", register(1 << 62, 0, 0, 0), 56, TooBig),
        ("a DMB larger than any number", register(u64::MAX - 4095, 0, 0, 0), 56, TooBig),
        ("more segments than are there", register(4096, 1, 5, 64), 56, Invalid),
        ("more segments than allowed", register(4096, 1, 1 << 31, 64), 56, TooBig),
        ("a segment behind the memory", ram(&[(end, 4096)], page), 56, Fault),
        ("a segment that ends behind the memory", ram(&[(end - 2048, 4096)], page), 56, Fault),
        ("a segment before the memory", ram(&[(0, 4096)], page), 56, Fault),
        ("a segment around the end of all", ram(&[(u64::MAX - 2047, 4096)], page), 56, Fault),
        ("a line that is not memory", ram(&[(page, 4096)], end), 56, Fault),
        ("a line at the end of all", ram(&[(page, 4096)], u64::MAX - 63), 56, Fault),
        ("a line that is not aligned", ram(&[(page, 4096)], page + 8), 56, Invalid),
        ("a segment that is not aligned", ram(&[(page + 4, 4096)], page), 56, Invalid),
        ("segments whose sum overflows", ram(&[(page, u64::MAX - 7), (page, 4104)], page), 56, Invalid),
    ] {
        let (used, answer) = device.command(&bytes, answer);
        assert_eq!((used, answer[0]), (8, status as u8), "{what}");
        assert_eq!(answer[1..8], [0; 7], "{what}");
        assert!(answer[8..].iter().all(|byte| *byte == 0xee), "{what}: no reply is written");
    }
    // More than is needed is ignored, on both sides.
    let own = device.gid();
    assert!(device.query(own).is_ok());
    let (used, answer) = device.command(&body(Command::QueryGid, &[&gid[..], &[9; 100]].concat()), 100);
    assert_eq!((used, answer[0]), (16, 0));
    witness.check();
}

#[test]
fn a_command_may_be_split_over_descriptors_at_will() {
    let daemon = TestDaemon::start();
    let mut a = Attacker::new(&daemon);
    let query = a.query();
    let answer = a.at + (64 << 10);
    let mut pieces: Vec<_> =
        (0..u64::from(query.len)).map(|i| Descriptor::readable(query.addr + i, 1)).collect();
    pieces.insert(3, Descriptor::readable(query.addr, 0));
    pieces.extend((0..16).map(|i| Descriptor::writable(answer + i, 1)));
    assert_eq!(a.device.offer_and_wait(CONTROL_QUEUE, &pieces), HEADER_SIZE as u32 + 8);
    assert_eq!(a.device.memory.read(answer, 1), [0]);
    // The same through an indirect table.
    let table = a.at + 8192;
    for (i, (_, descriptor)) in link(&pieces, 0, 256).into_iter().enumerate() {
        a.device.memory.write(table + 16 * i as u64, &descriptor.to_bytes());
    }
    a.device.memory.write(answer, &[0xee; 16]);
    let indirect = Descriptor { addr: table, len: 16 * pieces.len() as u32, flags: INDIRECT, next: 0 };
    assert_eq!(a.device.offer_and_wait(CONTROL_QUEUE, &[indirect]), HEADER_SIZE as u32 + 8);
    assert_eq!(a.device.memory.read(answer, 1), [0]);
}

#[test]
fn a_move_that_is_wrong_gets_its_status_and_writes_no_byte() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let options = Options { queue_size: 512, ..Options::default() };
    let mut device = RawFrontend::connect_with(daemon.hub(), options);
    let dmb = device.register(device.gid(), 8192).expect("a DMB");
    let foreign = witness.dmb.token;
    let (end, at) = (device.memory.end(), device.memory.allocate(1 << 17, 4096));
    let max_segments = device.config.max_segments.get() as usize;
    let max_size = device.config.max_move_size.get();
    let header = |token: Token, offset: u64, flags: u32| {
        let mut bytes = MoveHeader { token, offset, mask: 1, flags: MoveFlags::empty() }.to_bytes();
        bytes[24..28].copy_from_slice(&flags.to_le_bytes());
        bytes
    };
    let data = |addr, len| Descriptor::readable(addr, len);
    let good = dmb.token;
    let large = vec![data(at, 1 << 17); (max_size >> 17) as usize + 1];
    use Status::{Fault, Invalid, NoEntry, TooBig};
    for (what, header, pieces, status) in [
        ("unknown flags", header(good, 0, 4), vec![data(at, 8)], Invalid),
        ("too many descriptors", header(good, 0, 1), vec![data(at, 1); max_segments + 1], TooBig),
        ("too much data", header(good, 0, 1), large, TooBig),
        ("a token of nothing", header(Token::from_bits(0), 0, 1), vec![data(at, 8)], NoEntry),
        ("any token", header(Token::from_bits(u64::MAX), 0, 1), vec![data(at, 8)], NoEntry),
        ("a DMB of others", header(foreign, 0, 1), vec![data(at, 8)], NoEntry),
        ("a DMB of others and nothing to write", header(foreign, 0, 2), vec![], NoEntry),
        (
            "another generation",
            header(Token::from_bits(good.to_bits() ^ 1), 0, 1),
            vec![data(at, 8)],
            NoEntry,
        ),
        ("behind the DMB", header(good, 8192, 1), vec![data(at, 1)], Invalid),
        ("over the end of the DMB", header(good, 8190, 1), vec![data(at, 4)], Invalid),
        ("an offset that overflows", header(good, u64::MAX, 1), vec![data(at, 4)], Invalid),
        ("nothing, behind the DMB", header(good, 8193, 1), vec![], Invalid),
        ("data behind the memory", header(good, 0, 1), vec![data(end, 8)], Fault),
        ("data over the end of the memory", header(good, 0, 1), vec![data(at, 64), data(end - 4, 8)], Fault),
        ("data at the end of all", header(good, 0, 1), vec![data(u64::MAX - 3, 8)], Fault),
        ("data before the memory", header(good, 0, 1), vec![data(BASE - 8, 16)], Fault),
    ] {
        device.memory.write(at, &[0xaa; 256]);
        let (used, got) = device.move_raw(&header, &pieces);
        assert_eq!((used, got), (8, status as u8), "{what}");
        assert_eq!(device.window().read(dmb.offset, 8192), [0; 8192], "{what}: no byte is written");
        assert_eq!(device.window().line(dmb.line_offset).take_pending(), 0, "{what}: nothing is signalled");
    }
    assert_eq!(device.move_raw(&header(good, 8192, 0), &[]), (8, 0), "a move of nothing asks for the token");
    assert_eq!(device.move_bytes(good, 8191, b"x"), Ok(()));
    assert_eq!(device.window().read(dmb.offset + 8190, 2), [0, b'x']);
    witness.check();
}

/// What breaks a ring itself: the queue stops, and nothing else.
type Break = fn(&mut RawFrontend, queue: u16);

const BROKEN_RINGS: &[(&str, Break)] = &[
    ("the available index is further ahead than the queue is long", |device, queue| {
        let ring = &device.rings[usize::from(queue)];
        ring.set_avail_index(&device.memory, ring.offered.wrapping_add(ring.size + 1));
        ring.ring();
    }),
    ("the available index went back", |device, queue| {
        let ring = &device.rings[usize::from(queue)];
        // Event buffers are taken when there is an event: none of them was.
        let taken = if queue == EVENT_QUEUE { 0 } else { ring.offered };
        ring.set_avail_index(&device.memory, taken.wrapping_sub(1));
        ring.ring();
    }),
    ("an available head is beyond the descriptor table", |device, queue| {
        let ring = &mut device.rings[usize::from(queue)];
        // In place of every event buffer: it is not known which one comes next.
        let heads = if queue == EVENT_QUEUE { ring.size } else { 1 };
        ring.offered = ring.offered.wrapping_sub(heads - 1);
        (0..heads).for_each(|_| ring.offer(&device.memory, 0xfff0));
        ring.ring();
    }),
];

#[test]
fn a_ring_that_cannot_be_followed_stops_and_the_other_queues_go_on() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    for (what, break_ring) in BROKEN_RINGS {
        for queue in [CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE] {
            println!("{what}, queue {queue}");
            let mut a = Attacker::new(&daemon);
            break_ring(&mut a.device, queue);
            if queue == EVENT_QUEUE {
                let gid = a.device.gid();
                assert_eq!(a.device.signal_event(gid, 1, 1), Ok(()));
            }
            a.device.wait_stopped(queue);
            match queue {
                CONTROL_QUEUE => assert_eq!(a.device.move_bytes(a.token, 0, b"goes on"), Ok(())),
                _ => assert!(a.device.query(a.device.gid()).is_ok()),
            }
            witness.check();
        }
    }
}

#[test]
fn rings_that_are_not_in_guest_memory_are_refused_or_stop() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let options = Options { start: false, ..Options::default() };
    for field in 0..3 {
        for wrong in [0u64, u64::MAX - 15, 0x10] {
            println!("address {field} is {wrong:#x}");
            let mut device = RawFrontend::connect_with(daemon.hub(), options.clone());
            let mut addresses = device.rings[0].addresses(&device.memory);
            match field {
                0 => addresses.desc_table_addr = wrong,
                1 => addresses.avail_ring_addr = wrong & !1,
                _ => addresses.used_ring_addr = wrong & !3,
            }
            let size = device.rings[0].size;
            device.vhost().set_vring_num(0, size).expect("SET_VRING_NUM");
            let refused = device.vhost().set_vring_addr(0, &addresses).is_err();
            if !refused {
                let kick = device.rings[0].kick.try_clone().expect("eventfd");
                let started = device
                    .vhost()
                    .set_vring_kick(0, &kick)
                    .and_then(|()| device.vhost().set_vring_enable(0, true));
                // Refused late, or a queue that stops when it is rung; what the daemon must not do is die.
                let _ = started;
                let _ = kick.write(1);
            }
            drop(device);
            witness.check();
        }
    }
}

#[test]
fn queue_sizes_that_no_ring_has_are_refused() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let options = Options { start: false, ..Options::default() };
    for size in [0, 3, 1025, 2048, u16::MAX] {
        let mut device = RawFrontend::connect_with(daemon.hub(), options.clone());
        assert!(device.vhost().set_vring_num(0, size).is_err(), "{size} descriptors");
        drop(device);
        witness.check();
    }
}

#[test]
fn memory_tables_that_make_no_sense_are_refused() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let options = Options { start: false, ..Options::default() };
    let file = std::fs::File::open("/dev/null").expect("/dev/null");
    for what in
        ["beyond the file", "overlap", "around the end of all", "not a file that can be mapped", "huge"]
    {
        println!("{what}");
        let mut device = RawFrontend::connect_with(daemon.hub(), options.clone());
        let good = device.memory.region();
        let mut bad = good;
        match what {
            "beyond the file" => bad.mmap_offset = good.memory_size,
            "overlap" => {}
            "around the end of all" => bad.guest_phys_addr = u64::MAX - 4095,
            "huge" => bad.memory_size = 1 << 60,
            _ => bad.mmap_handle = std::os::fd::AsRawFd::as_raw_fd(&file),
        }
        let table = if what == "overlap" { vec![good, bad] } else { vec![bad] };
        assert!(device.vhost().set_mem_table(&table).is_err(), "{what}");
        witness.check();
    }
}

#[test]
fn bytes_that_are_no_vhost_user_message_end_only_their_own_connection() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let header = |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    for (what, bytes) in [
        ("an unknown request", header(200, 1, 0)),
        ("a request of version 0", header(1, 0, 0)),
        ("a size beyond every message", header(2, 1, u32::MAX)),
        ("a size that the request does not have", [header(2, 1, 3), vec![1, 2, 3]].concat()),
        ("zeroes", vec![0; 64]),
        ("noise", (0..=255).collect()),
        ("a memory table without files", [header(5, 1, 40), vec![1; 40]].concat()),
    ] {
        println!("{what}");
        let options = Options { start: false, ..Options::default() };
        let mut device = RawFrontend::connect_with(daemon.hub(), options);
        device.send_bytes(&bytes);
        device.wait_closed();
        witness.check();
    }
}

#[test]
fn a_front_end_that_stops_in_the_middle_of_a_message_delays_nobody() {
    let daemon = TestDaemon::start();
    let stuck: Vec<_> = (0..20)
        .map(|i| {
            let options = Options { start: false, ..Options::default() };
            let device = RawFrontend::connect_with(daemon.hub(), options);
            let message = [1u32, 1, 8].map(u32::to_le_bytes).concat();
            device.send_bytes(&message[..1 + i % 12]);
            device
        })
        .collect();
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    drop(stuck);
    witness.check();
}

#[test]
fn a_front_end_that_never_answers_a_map_delays_only_itself() {
    let daemon = TestDaemon::start();
    let options = Options { answer: false, ..Options::default() };
    let mut mute = RawFrontend::connect_with(daemon.hub(), options);
    let register = dmbridge_proto::control::Register {
        rgid: mute.gid(),
        size: 4096,
        home: dmbridge_proto::control::Home::Pool,
    };
    let head = mute.begin_request(&dmbridge_proto::control::Request::Register(register));
    let mut witness = Pair::new(&daemon.hub());
    for _ in 0..10 {
        witness.check();
    }
    assert_eq!(mute.end_request(head, Command::Register), Err(Status::Io));
}

#[test]
fn a_front_end_that_refuses_a_map_gets_an_error_and_may_move() {
    let daemon = TestDaemon::start();
    let mut peer = RawFrontend::connect(daemon.hub());
    let mut owner = RawFrontend::connect(daemon.hub());
    owner.window().refuse = true;
    assert_eq!(owner.register(peer.gid(), 4096), Err(Status::Io));
    owner.window().refuse = false;
    peer.window().refuse = true;
    let dmb = owner.register(peer.gid(), 4096).expect("the owner's own front-end maps");
    assert_eq!(peer.attach(dmb.token), Err(Status::Io));
    assert_eq!(peer.move_bytes(dmb.token, 0, b"moved"), Ok(()));
    assert_eq!(owner.window().read(dmb.offset, 5), b"moved");
}
