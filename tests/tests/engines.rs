//! The engines of the real daemon: every one copies right, for devices that come and go, and the daemon tells what it used.

use dmbridge_proto::control::Segment;
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use dmbridge_tests::ring::Descriptor;
use dmbridged::report::EnginesReport;

fn engines(daemon: &TestDaemon) -> EnginesReport {
    let body = daemon.get("/v1/engines").expect("the control API answers");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error} in {body}"))
}

/// Moves of these sizes arrive, in the pool and in the owner's memory.
fn move_everything(daemon: &TestDaemon) {
    let mut pair = Pair::new(&daemon.hub());
    pair.check();
    for options in [Options::default(), Options::without_map()] {
        let mut owner = RawFrontend::connect_with(daemon.hub(), options);
        let mut sender = RawFrontend::connect(daemon.hub());
        let size = 4 << 20;
        let pages = owner.memory.allocate(size, 4096);
        let line = owner.memory.allocate(64, 64);
        let data = sender.memory.allocate(size, 4096);
        let segments = [Segment { addr: pages, len: size }];
        let dmb = owner.register_ram(sender.gid(), line, &segments).expect("a RAM DMB");
        for len in [1, 63, 4096, 100_001, 1 << 20, (3 << 20) + 7] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 + i / 4099 + len) as u8).collect();
            sender.memory.write(data, &bytes);
            let header = MoveHeader { token: dmb.token, offset: 5, mask: 0, flags: MoveFlags::empty() };
            // In two pieces, which meet in the middle of a word.
            let cut = len / 3;
            let pieces = [(0, cut), (cut, len - cut)]
                .map(|(at, len)| Descriptor::readable(data + at as u64, len as u32));
            assert_eq!(sender.move_raw(&header.to_bytes(), &pieces), (8, 0), "{len} bytes");
            assert!(owner.memory.read(pages + 5, len) == bytes, "{len} bytes");
        }
    }
}

#[test]
fn every_engine_copies_and_is_counted() {
    for engine in ["cpu", "cpu-node"] {
        let daemon = TestDaemon::start_with(
            &["--engine", engine],
            "[engines]\nworkers = 2\ncache = \"@/engines.json\"\n",
        );
        let before = engines(&daemon);
        assert_eq!(before.origin, "measured");
        assert!(before.rows.iter().all(|row| row.chosen_by == "configuration" && row.uses == 0));
        move_everything(&daemon);
        let after = engines(&daemon);
        let used: Vec<_> = after.engines.iter().filter(|engine| engine.copies != 0).collect();
        assert!(used.iter().all(|used| used.name.split('.').next() == Some(engine)), "{used:?}");
        let bytes: u64 = used.iter().map(|used| used.bytes).sum();
        assert!(bytes > 8 << 20, "{bytes}");
        let uses: u64 = after.rows.iter().map(|row| row.uses).sum();
        // A long move is one use and several copies.
        assert!(uses < used.iter().map(|used| used.copies).sum::<u64>());
        assert_eq!(daemon.log().matches("panicked").count(), 0);
        assert!(daemon.path("engines.json").exists());
    }
}

#[test]
fn devices_of_one_daemon_may_each_name_an_engine() {
    let group = format!("uid-{}", nix::unistd::geteuid());
    let device = |engine: &str| {
        format!(
            "[[device]]\nname = \"{engine}\"\nsocket = \"@/{engine}\"\ngroup = \"{group}\"\nengine = \"{engine}\"\n"
        )
    };
    let config = format!("[engines]\nworkers = 1\n{}{}", device("cpu"), device("cpu-node"));
    let daemon = TestDaemon::start_with(&[], &config);
    let copies = |by: &str| -> u64 {
        let all = engines(&daemon).engines;
        all.iter()
            .filter(|engine| engine.name.split('.').next() == Some(by))
            .map(|engine| engine.copies)
            .sum()
    };
    for [engine, other] in [["cpu", "cpu-node"], ["cpu-node", "cpu"]] {
        let mut owner = RawFrontend::connect_with(daemon.hub(), Options::without_map());
        let mut sender = RawFrontend::connect(daemon.path(engine));
        let size = 1 << 20;
        let (pages, line) = (owner.memory.allocate(size, 4096), owner.memory.allocate(64, 64));
        let segments = [Segment { addr: pages, len: size }];
        let dmb = owner.register_ram(sender.gid(), line, &segments).expect("a RAM DMB");
        let data = sender.memory.allocate(size, 4096);
        let before = [copies(engine), copies(other)];
        for len in [64, 4096, 1 << 20] {
            let header = MoveHeader { token: dmb.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
            let piece = Descriptor::readable(data, len);
            assert_eq!(sender.move_raw(&header.to_bytes(), &[piece]), (8, 0));
        }
        assert_eq!([copies(engine), copies(other)], [before[0] + 3, before[1]], "{engine}");
    }
}

#[test]
fn every_engine_is_tried_among_the_moves_and_all_of_them_arrive() {
    let daemon = TestDaemon::start_with(&[], "[engines]\nworkers = 1\ncache = \"\"\n");
    let mut owner = RawFrontend::connect_with(daemon.hub(), Options::without_map());
    let mut sender = RawFrontend::connect(daemon.hub());
    const SIZE: usize = 64 << 10;
    let (pages, line) = (owner.memory.allocate(SIZE as u64, 4096), owner.memory.allocate(64, 64));
    let segments = [Segment { addr: pages, len: SIZE as u64 }];
    let dmb = owner.register_ram(sender.gid(), line, &segments).expect("a RAM DMB");
    let data = sender.memory.allocate(SIZE as u64, 4096);
    // A trial comes after 64 moves, and is of sixteen.
    for round in 0..100usize {
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i * 7 + i / 4099 + round) as u8).collect();
        sender.memory.write(data, &bytes);
        let header = MoveHeader { token: dmb.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
        assert_eq!(sender.move_raw(&header.to_bytes(), &[Descriptor::readable(data, SIZE as u32)]), (8, 0));
        assert!(owner.memory.read(pages, SIZE) == bytes, "move {round}");
    }
    let report = engines(&daemon);
    let row = report.rows.iter().position(|row| row.uses != 0).expect("a row");
    assert_eq!((report.rows[row].bytes, report.rows[row].uses), (SIZE as u64, 100));
    let tried: Vec<_> = report.engines.iter().filter(|engine| engine.copies >= 8).collect();
    assert!(tried.len() >= 2, "{:?}", report.engines);
    assert_eq!(report.engines.iter().map(|engine| engine.copies).sum::<u64>(), 100);
}

#[test]
fn once_a_reset_is_acknowledged_no_engine_writes_into_the_devices_memory() {
    for engine in ["cpu", "cpu-node"] {
        let settings = "[engines]\nworkers = 2\ncache = \"\"\n";
        let daemon = TestDaemon::start_with(&["--engine", engine], settings);
        let mut owner = RawFrontend::connect_with(daemon.hub(), Options::without_map());
        let mut sender = RawFrontend::connect(daemon.hub());
        const SIZE: usize = 2 << 20;
        let (pages, line) = (owner.memory.allocate(SIZE as u64, 4096), owner.memory.allocate(64, 64));
        let data = sender.memory.allocate(SIZE as u64, 4096);
        for round in 1..=30u8 {
            owner.memory.write(pages, &[0; SIZE]);
            let segments = [Segment { addr: pages, len: SIZE as u64 }];
            let dmb = owner.register_ram(sender.gid(), line, &segments).expect("a RAM DMB");
            let header = MoveHeader { token: dmb.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
            let sender = &mut sender;
            std::thread::scope(|scope| {
                // Each move writes something else, for as long as there is something to write to.
                let mover = scope.spawn(move || {
                    for number in 1u64.. {
                        sender.memory.write(data, &number.to_le_bytes().repeat(SIZE / 8));
                        let piece = Descriptor::readable(data, SIZE as u32);
                        match sender.move_raw(&header.to_bytes(), &[piece]) {
                            (8, 0) => {}
                            (8, status) => return Status::from_byte(status).expect("a status"),
                            (used, _) => panic!("a move is answered with 8 bytes, not {used}"),
                        }
                    }
                    unreachable!("the device was reset")
                });
                let some = pages + SIZE as u64 / 32 * u64::from(round);
                while owner.memory.read(some, 8) == [0; 8] {
                    std::thread::yield_now();
                }
                owner.reset();
                let then = owner.memory.read(pages, SIZE);
                let status = mover.join().expect("the mover does not panic");
                assert!(matches!(status, Err(Status::NoEntry | Status::Reset)), "{engine}: {status:?}");
                assert!(then == owner.memory.read(pages, SIZE), "{engine}, round {round}");
            });
            owner.start(&mut |_| {}).expect("started again");
            owner.post_event_buffers(16);
        }
        assert_eq!(daemon.log().matches("panicked").count(), 0);
    }
}

#[test]
fn what_is_measured_is_used_and_every_row_says_why() {
    let daemon = TestDaemon::start();
    move_everything(&daemon);
    let report = engines(&daemon);
    assert_eq!(report.engines[0].name, "cpu");
    for row in &report.rows {
        assert_eq!(row.chosen_by, "measurement");
        let of = |name: &str| row.costs.iter().find(|cost| cost.engine == name).map(|cost| cost.nanoseconds);
        let best = row.costs.iter().map(|cost| cost.nanoseconds).min().expect("an engine");
        let chosen = of(&row.engine).expect("a measured engine");
        assert!(
            chosen * 97 <= best * 100 + 97,
            "{} is used where another takes {best} ns: {row:?}",
            row.engine
        );
    }
}
