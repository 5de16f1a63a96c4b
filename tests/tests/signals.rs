//! Who sleeps is woken, who does not is left alone (`docs/device.md`, 9).

use dmbridge_proto::event::Event;
use dmbridge_proto::line::{ControlLine, Wake};
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::DEADLINE;
use dmbridge_tests::frontend::RawFrontend;
use dmbridge_tests::pair::Pair;
use std::sync::atomic::AtomicU32;

fn signals(device: &mut RawFrontend) -> usize {
    device.events().iter().filter(|event| matches!(event, Event::Signal { .. })).count()
}

/// Something that arrives after every event that was sent before it.
fn fence(sender: &mut RawFrontend, receiver: &mut RawFrontend) -> usize {
    sender.signal_event(receiver.gid(), 99, 0).expect("a software event");
    let mut before = 0;
    receiver.wait_event("the software event", |event| match event {
        Event::Signal { .. } => {
            before += 1;
            None
        }
        Event::Software { code: 99, .. } => Some(()),
        _ => None,
    });
    before
}

fn header(pair: &Pair, mask: u64, flags: MoveFlags) -> MoveHeader {
    MoveHeader { token: pair.dmb.token, offset: 0, mask, flags }
}

#[test]
fn an_owner_that_did_not_arm_gets_bits_and_no_event() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::new(&daemon.hub());
    let line = pair.owner.window().line(pair.dmb.line_offset);
    for bit in 0..10 {
        let header = header(&pair, 1 << bit, MoveFlags::SIGNAL);
        assert_eq!(pair.peer.move_with(&header, b"x"), Ok(()));
    }
    assert_eq!(fence(&mut pair.peer, &mut pair.owner), 0);
    assert_eq!(line.take_pending(), 0x3ff);
}

#[test]
fn an_owner_that_armed_gets_one_event_until_it_arms_again() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::new(&daemon.hub());
    let line = pair.owner.window().line(pair.dmb.line_offset);
    for round in 0..3 {
        line.arm(Wake::Signal);
        for bit in 0..5 {
            let header = header(&pair, 1 << bit, MoveFlags::SIGNAL);
            assert_eq!(pair.peer.move_with(&header, b""), Ok(()));
        }
        assert_eq!(fence(&mut pair.peer, &mut pair.owner), 1, "round {round}");
        assert!(!line.is_armed());
        assert_eq!(line.take_pending(), 0x1f);
    }
}

#[test]
fn a_mapped_sender_that_took_the_wish_rings_by_a_move_without_data() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::new(&daemon.hub());
    let owners = pair.owner.window().line(pair.dmb.line_offset);
    let peers = pair.peer.window().line(pair.remote.line_offset);
    assert_eq!(peers.signal(1), None, "nobody sleeps");
    owners.arm(Wake::Signal);
    assert_eq!(peers.signal(2), Some(Wake::Signal));
    let ring = header(&pair, 0, MoveFlags::RING);
    assert_eq!(pair.peer.move_with(&ring, b""), Ok(()));
    pair.owner.wait_event("the signal", |event| matches!(event, Event::Signal { .. }).then_some(()));
    assert_eq!(owners.take_pending(), 3);
    // A RING alone does not touch the line.
    owners.arm(Wake::Signal);
    assert_eq!(pair.peer.move_with(&ring, b""), Ok(()));
    assert!(owners.is_armed());
}

#[test]
fn a_signal_without_bits_or_data_wakes_as_well() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::new(&daemon.hub());
    let line = pair.owner.window().line(pair.dmb.line_offset);
    line.arm(Wake::Signal);
    let empty = header(&pair, 0, MoveFlags::SIGNAL);
    assert_eq!(pair.peer.move_with(&empty, b""), Ok(()));
    pair.owner.wait_event("the signal", |event| matches!(event, Event::Signal { .. }).then_some(()));
    assert_eq!(line.take_pending(), 0);
}

#[test]
fn a_move_wakes_an_owner_that_sleeps_on_a_futex() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::with_futex(&daemon.hub());
    assert!(pair.dmb.flags.contains(dmbridge_proto::control::PairFlags::FUTEX));
    let line = pair.owner.window().line(pair.dmb.line_offset);
    for round in 0..20u64 {
        line.arm(Wake::Futex);
        let sleeper = std::thread::spawn(move || sleep_on(line));
        let header = header(&pair, 1 << round, MoveFlags::SIGNAL);
        assert_eq!(pair.peer.move_with(&header, &[round as u8; 64]), Ok(()));
        sleeper.join().expect("woken");
        assert_eq!(line.take_pending(), 1 << round);
        assert_eq!(pair.owner.window().read(pair.dmb.offset, 1), [round as u8]);
    }
    assert_eq!(signals(&mut pair.owner), 0, "a futex needs no event");
}

#[test]
fn a_ram_dmb_signals_as_well() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    let line_addr = owner.memory.allocate(64, 64);
    owner.memory.write(line_addr, &[0xff; 64]);
    let pages = owner.memory.allocate(4096, 4096);
    let piece = dmbridge_proto::control::Segment { addr: pages, len: 4096 };
    let dmb = owner.register_ram(peer.gid(), line_addr, &[piece]).expect("a RAM DMB");
    assert_eq!(owner.memory.read(line_addr, 16), [0; 16], "the device clears what is used of the line");
    // SAFETY: 64 aligned bytes of guest memory, which stays for as long as the test.
    let line = unsafe { ControlLine::from_ptr(owner.memory.pointer(line_addr, 64)) };
    line.arm(Wake::Signal);
    let header = MoveHeader { token: dmb.token, offset: 8, mask: 0x80, flags: MoveFlags::SIGNAL };
    assert_eq!(peer.move_with(&header, b"signalled"), Ok(()));
    let index = owner.wait_event("the signal", |event| match event {
        Event::Signal { index, .. } => Some(*index),
        _ => None,
    });
    assert_eq!(index, dmb.index);
    assert_eq!(line.take_pending(), 0x80);
    assert_eq!(owner.memory.read(pages + 8, 9), b"signalled");
}

#[test]
fn software_events_bring_their_words_and_are_bounded() {
    let daemon = TestDaemon::start();
    let mut sender = RawFrontend::connect(daemon.hub());
    let options = dmbridge_tests::frontend::Options { event_buffers: 0, ..Default::default() };
    let mut receiver = RawFrontend::connect_with(daemon.hub(), options);
    for i in 0..64 {
        assert_eq!(sender.signal_event(receiver.gid(), i, u64::from(i) << 32), Ok(()));
    }
    let again = Err(dmbridge_proto::status::Status::Again);
    assert_eq!(sender.signal_event(receiver.gid(), 64, 0), again);
    receiver.post_event_buffers(128);
    for i in 0..64 {
        let event = receiver.wait_event("a software event", |event| Some(*event));
        assert_eq!(event, Event::Software { gid: sender.gid(), code: i, info: u64::from(i) << 32 });
    }
    assert_eq!(sender.signal_event(receiver.gid(), 65, 0), Ok(()));
}

/// Sleeps for as long as the line says so.
fn sleep_on(line: &'static ControlLine) {
    let limit = libc::timespec { tv_sec: DEADLINE.as_secs() as libc::time_t, tv_nsec: 0 };
    while line.is_armed() {
        let word: *const AtomicU32 = line.futex_word();
        // SAFETY: the word stays mapped for as long as the window, which outlives the thread.
        let result = unsafe {
            libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, Wake::Futex as u32, &raw const limit)
        };
        let error = std::io::Error::last_os_error().raw_os_error();
        assert!(result == 0 || error != Some(libc::ETIMEDOUT), "nobody woke the sleeper");
    }
}
