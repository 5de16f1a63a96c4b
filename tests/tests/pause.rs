//! A front-end that stops a device and starts it again as it was, and all that tells this from the end of a driver. The
//! same in virtual machines is in `vm_pause.rs`.

use dmbridge_proto::FIRST_MOVE_QUEUE;
use dmbridge_proto::control::{Request, Segment};
use dmbridge_proto::event::{Event, GoneReason};
use dmbridge_proto::moves::{HEADER_SIZE, MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use dmbridge_tests::ring::Descriptor;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

/// What Linux writes into a robust futex whose owner has died.
const DIED: u32 = 1 << 30;

/// A pair whose owner has told its lifeline: its guest address.
fn pair(daemon: &TestDaemon) -> (Pair, u64) {
    let mut pair = Pair::new(&daemon.hub());
    let lifeline = pair.owner.memory.allocate(64, 64);
    pair.owner.memory.write(lifeline, &1u32.to_le_bytes());
    pair.owner.request(&Request::Lifeline(lifeline)).expect("the word is guest memory");
    (pair, lifeline)
}

fn paused(peer: &mut RawFrontend) {
    peer.wait_event("the owner is paused", |event| matches!(event, Event::DevicePaused { .. }).then_some(()));
}

fn gone(peer: &mut RawFrontend) {
    let reason = peer.wait_event("the owner is gone", |event| match event {
        Event::DeviceGone { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, GoneReason::Reset);
}

#[test]
fn a_device_that_is_started_as_it_was_goes_on() {
    let daemon = TestDaemon::start();
    let (mut pair, _) = pair(&daemon);
    let maps = |daemon: &TestDaemon| daemon.report().devices.iter().map(|d| d.map_requests).sum::<u64>();
    let before = maps(&daemon);
    for round in 0..3u8 {
        pair.owner.pause();
        paused(&mut pair.peer);
        pair.peer.window().write(pair.remote.offset, &[round; 100]);
        pair.owner.resume();
        pair.peer.wait_event("the owner goes on", |event| {
            matches!(event, Event::DeviceResumed { .. }).then_some(())
        });
        assert_eq!(pair.owner.window().read(pair.dmb.offset, 100), [round; 100]);
        pair.check();
    }
    assert_eq!(maps(&daemon), before);
}

#[test]
fn a_move_into_the_memory_of_a_paused_device_is_done_when_it_goes_on() {
    let daemon = TestDaemon::start();
    let (mut pair, _) = pair(&daemon);
    let gid = pair.peer.gid();
    let segment = pair.owner.memory.allocate(4096, 4096);
    let line = pair.owner.memory.allocate(64, 64);
    let piece = Segment { addr: segment, len: 4096 };
    let dmb = pair.owner.register_ram(gid, line, &[piece]).expect("a DMB in its own memory");
    pair.owner.pause();
    paused(&mut pair.peer);
    let at = pair.peer.memory.allocate(4096, 4096);
    let header = MoveHeader { token: dmb.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
    pair.peer.memory.write(at, &header.to_bytes());
    pair.peer.memory.write(at + 1024, b"later");
    let head = pair.peer.offer(
        FIRST_MOVE_QUEUE,
        &[
            Descriptor::readable(at, HEADER_SIZE as u32),
            Descriptor::readable(at + 1024, 5),
            Descriptor::writable(at + 2048, 8),
        ],
    );
    // What comes after it in the same queue waits, too; commands do not.
    assert!(pair.peer.query(gid).is_ok());
    assert_eq!(pair.owner.memory.read(segment, 5), [0; 5]);
    pair.owner.resume();
    assert_eq!(pair.peer.wait_used(FIRST_MOVE_QUEUE), (head, 8));
    assert_eq!(pair.peer.memory.read(at + 2048, 1), [0]);
    assert_eq!(pair.owner.memory.read(segment, 5), b"later");
}

#[test]
fn a_move_that_a_pause_interrupts_is_done_again() {
    const LEN: u64 = 16 << 20;
    let daemon = TestDaemon::start();
    let connect =
        || RawFrontend::connect_with(daemon.hub(), Options { memory: 48 << 20, ..Options::default() });
    let (mut owner, mut sender) = (connect(), connect());
    let lifeline = sender.memory.allocate(64, 64);
    sender.memory.write(lifeline, &1u32.to_le_bytes());
    sender.request(&Request::Lifeline(lifeline)).expect("the word is guest memory");
    let dmb = owner.register(sender.gid(), LEN).expect("a DMB");
    let at = sender.memory.allocate(LEN + 4096, 4096);
    for round in 1..=8u8 {
        let header = MoveHeader { token: dmb.token, offset: 0, mask: 0, flags: MoveFlags::empty() };
        sender.memory.write(at, &header.to_bytes());
        sender.memory.write(at + 4096, &vec![round; LEN as usize]);
        let head = sender.offer(
            FIRST_MOVE_QUEUE,
            &[
                Descriptor::readable(at, HEADER_SIZE as u32),
                Descriptor::readable(at + 4096, LEN as u32),
                Descriptor::writable(at + 2048, 8),
            ],
        );
        sender.pause();
        sender.resume();
        assert_eq!(sender.wait_used(FIRST_MOVE_QUEUE), (head, 8));
        assert_eq!(sender.memory.read(at + 2048, 1), [0]);
        assert!(owner.window().read(dmb.offset, LEN).iter().all(|byte| *byte == round));
    }
}

#[test]
fn without_a_lifeline_a_stop_is_the_end() {
    let daemon = TestDaemon::start();
    let mut pair = Pair::new(&daemon.hub());
    pair.owner.pause();
    gone(&mut pair.peer);
}

#[test]
fn a_driver_that_is_dead_when_the_device_is_stopped_is_gone() {
    let daemon = TestDaemon::start();
    for word in [0, DIED, DIED | 1 << 31] {
        let (mut pair, lifeline) = pair(&daemon);
        pair.owner.memory.write(lifeline, &word.to_le_bytes());
        pair.owner.pause();
        gone(&mut pair.peer);
    }
}

#[test]
fn a_driver_that_dies_later_is_gone_then() {
    let daemon = TestDaemon::start();
    let (mut pair, lifeline) = pair(&daemon);
    pair.owner.pause();
    paused(&mut pair.peer);
    pair.owner.memory.write(lifeline, &DIED.to_le_bytes());
    gone(&mut pair.peer);
}

#[test]
fn a_front_end_that_has_given_the_mappings_up_has_reset_the_device() {
    let daemon = TestDaemon::start();
    let (mut pair, _) = pair(&daemon);
    pair.owner.pause();
    paused(&mut pair.peer);
    pair.owner.window().clear();
    gone(&mut pair.peer);
}

#[test]
fn a_driver_that_begins_anew_has_reset_the_device() {
    let daemon = TestDaemon::start();
    let (mut pair, _) = pair(&daemon);
    pair.owner.pause();
    paused(&mut pair.peer);
    let config = pair.owner.vhost().get_config(0, 128, VhostUserConfigFlags::empty(), &[0; 128]);
    config.expect("the configuration space");
    gone(&mut pair.peer);
}

#[test]
fn rings_that_start_elsewhere_are_those_of_another_driver() {
    let daemon = TestDaemon::start();
    let (mut pair, _) = pair(&daemon);
    pair.owner.pause();
    paused(&mut pair.peer);
    pair.owner.bases()[0] += 1;
    pair.owner.resume();
    gone(&mut pair.peer);
}

#[test]
fn a_lifeline_is_an_aligned_word_of_guest_memory() {
    let daemon = TestDaemon::start();
    let mut device = RawFrontend::connect(daemon.hub());
    let end = device.memory.end();
    for (addr, status) in
        [(end - 2, Status::Invalid), (end, Status::Fault), (u64::MAX - 3, Status::Fault), (0, Status::Fault)]
    {
        assert_eq!(device.request(&Request::Lifeline(addr)), Err(status), "{addr:#x}");
    }
    assert!(device.request(&Request::Lifeline(end - 4)).is_ok());
}
