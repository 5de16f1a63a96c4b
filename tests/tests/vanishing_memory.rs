//! A front-end takes its guest's memory away under the daemon's hands.

use dmbridge_proto::event::{Event, GoneReason};
use dmbridge_proto::ids::Gid;
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_proto::{CONTROL_QUEUE, FIRST_MOVE_QUEUE};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use dmbridge_tests::ring::Descriptor;

fn wait_expelled(device: &mut RawFrontend, who: Gid) {
    let reason = device.wait_event("the device is gone", |event| match event {
        Event::DeviceGone { gid, reason } if *gid == who => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, GoneReason::Expelled);
}

/// Two devices that share a DMB, of which the second moves.
fn sharing(daemon: &TestDaemon, memory: u64) -> (RawFrontend, RawFrontend, MoveHeader) {
    let mut owner = RawFrontend::connect(daemon.hub());
    let options = Options { memory, ..Options::default() };
    let mut thief = RawFrontend::connect_with(daemon.hub(), options);
    let dmb = owner.register(thief.gid(), 4 << 20).expect("a DMB");
    thief.attach(dmb.token).expect("attached");
    let header = MoveHeader { token: dmb.token, offset: 0, mask: 1, flags: MoveFlags::SIGNAL };
    (owner, thief, header)
}

#[test]
fn a_source_that_is_truncated_in_the_middle_of_moves_expels_its_device_only() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let (mut owner, mut thief, header) = sharing(&daemon, 16 << 20);
    let data = thief.memory.allocate(4 << 20, 4096);
    let at = thief.memory.allocate(64, 64);
    let answer = thief.memory.allocate(8, 8);
    thief.memory.write(at, &header.to_bytes());
    let pieces =
        [Descriptor::readable(at, 32), Descriptor::readable(data, 4 << 20), Descriptor::writable(answer, 8)];
    for _ in 0..80 {
        thief.offer(FIRST_MOVE_QUEUE, &pieces);
    }
    // The rings lie at the start and stay: only the data goes, while it is being copied.
    thief.memory.truncate(2 << 20);
    wait_expelled(&mut owner, thief.gid());
    thief.wait_closed();
    witness.check();
}

#[test]
fn rings_that_are_truncated_expel_their_device_only() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let (mut owner, thief, _) = sharing(&daemon, 8 << 20);
    thief.memory.truncate(0);
    // The rings are gone; the kick is not.
    thief.rings[usize::from(CONTROL_QUEUE)].ring();
    wait_expelled(&mut owner, thief.gid());
    witness.check();
    until("the daemon closes the connection", || thief.is_closed().then_some(()));
}

#[test]
fn a_destination_that_is_truncated_expels_its_owner_only() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let options = Options { memory: 16 << 20, ..Options::default() };
    let mut owner = RawFrontend::connect_with(daemon.hub(), options);
    let mut sender = RawFrontend::connect(daemon.hub());
    let line = owner.memory.allocate(64, 64);
    let pages = owner.memory.allocate(4 << 20, 4096);
    let piece = dmbridge_proto::control::Segment { addr: pages, len: 4 << 20 };
    let dmb = owner.register_ram(sender.gid(), line, &[piece]).expect("a RAM DMB");
    assert_eq!(sender.move_bytes(dmb.token, 3 << 20, b"still there"), Ok(()));
    owner.memory.truncate(2 << 20);
    let status = sender.move_bytes(dmb.token, 3 << 20, b"nowhere");
    assert!(matches!(status, Ok(()) | Err(dmbridge_proto::status::Status::Reset)), "{status:?}");
    wait_expelled(&mut sender, owner.gid());
    assert_eq!(sender.move_bytes(dmb.token, 0, b"x"), Err(dmbridge_proto::status::Status::NoEntry));
    owner.wait_closed();
    witness.check();
}
