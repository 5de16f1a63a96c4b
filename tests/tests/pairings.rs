//! Every pairing of a DMB's place and a sender's means brings the right bytes.

use dmbridge_proto::control::Segment;
use dmbridge_proto::ids::Token;
use dmbridge_proto::status::Status;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::{Options, RawFrontend};

const SIZE: u64 = 64 << 10;

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed).collect()
}

/// A RAM DMB in two pieces: its token and where its bytes are.
fn register_ram(owner: &mut RawFrontend, peer: &RawFrontend) -> (Token, [Segment; 2]) {
    let line = owner.memory.allocate(64, 64);
    let pieces = [
        Segment { addr: owner.memory.allocate(SIZE / 2 + 8, 8), len: SIZE / 2 + 8 },
        Segment { addr: owner.memory.allocate(SIZE / 2, 4096), len: SIZE / 2 - 8 },
    ];
    let reply = owner.register_ram(peer.gid(), line, &pieces).expect("a RAM DMB");
    assert_eq!((reply.offset, reply.line_offset, reply.size), (0, 0, SIZE));
    (reply.token, pieces)
}

fn ram_bytes(owner: &RawFrontend, pieces: &[Segment]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| owner.memory.read(piece.addr, piece.len as usize)).collect()
}

#[test]
fn pool_and_a_mapped_sender() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    let dmb = owner.register(peer.gid(), SIZE).expect("a DMB");
    assert!(dmb.flags.contains(dmbridge_proto::control::PairFlags::MAP));
    let remote = peer.attach(dmb.token).expect("attached");
    let bytes = pattern(1, SIZE as usize);
    peer.window().write(remote.offset, &bytes);
    assert_eq!(owner.window().read(dmb.offset, SIZE), bytes);
    assert_eq!(peer.attach(dmb.token), Err(Status::Already));
}

#[test]
fn pool_and_a_moving_sender() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect_with(daemon.hub(), Options::without_map());
    let dmb = owner.register(peer.gid(), SIZE).expect("a DMB");
    assert!(!dmb.flags.contains(dmbridge_proto::control::PairFlags::MAP));
    assert_eq!(peer.attach(dmb.token), Err(Status::NotSupported));
    for (offset, len) in [(0, SIZE as usize), (1, 1), (4095, 2), (SIZE - 1, 1), (13, 40000)] {
        let before = owner.window().read(dmb.offset, SIZE);
        let bytes = pattern(len as u8, len);
        assert_eq!(peer.move_bytes(dmb.token, offset, &bytes), Ok(()));
        let after = owner.window().read(dmb.offset, SIZE);
        let (start, end) = (offset as usize, offset as usize + len);
        assert_eq!(after[start..end], bytes);
        assert_eq!((&after[..start], &after[end..]), (&before[..start], &before[end..]), "and nothing else");
    }
}

#[test]
fn ram_and_a_moving_sender() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect_with(daemon.hub(), Options::without_map());
    let mut peer = RawFrontend::connect_with(daemon.hub(), Options::without_map());
    assert_eq!(owner.register(peer.gid(), SIZE), Err(Status::NotSupported));
    let (token, pieces) = register_ram(&mut owner, &peer);
    for (offset, len) in [(0, SIZE as usize), (SIZE / 2, 16), (SIZE / 2 + 7, 1), (3, 50000)] {
        let before = ram_bytes(&owner, &pieces);
        let bytes = pattern(len as u8, len);
        assert_eq!(peer.move_bytes(token, offset, &bytes), Ok(()));
        let after = ram_bytes(&owner, &pieces);
        let (start, end) = (offset as usize, offset as usize + len);
        assert_eq!(after[start..end], bytes);
        assert_eq!((&after[..start], &after[end..]), (&before[..start], &before[end..]), "and nothing else");
    }
    assert_eq!(owner.unregister(token), Ok(()));
    assert_eq!(peer.move_bytes(token, 0, b"late"), Err(Status::NoEntry));
}

#[test]
fn ram_and_a_sender_that_could_map() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    let (token, pieces) = register_ram(&mut owner, &peer);
    assert_eq!(peer.attach(token), Err(Status::NotSupported));
    let bytes = pattern(9, SIZE as usize);
    assert_eq!(peer.move_bytes(token, 0, &bytes), Ok(()));
    assert_eq!(ram_bytes(&owner, &pieces), bytes);
}

#[test]
fn a_device_is_its_own_peer() {
    let daemon = TestDaemon::start();
    let mut device = RawFrontend::connect(daemon.hub());
    let dmb = device.register(device.gid(), SIZE).expect("a DMB");
    let remote = device.attach(dmb.token).expect("attached");
    device.window().write(remote.offset, b"to myself");
    assert_eq!(device.window().read(dmb.offset, 9), b"to myself");
    assert_eq!(device.move_bytes(dmb.token, 100, b"moved to myself"), Ok(()));
    assert_eq!(device.window().read(remote.offset + 100, 15), b"moved to myself");
}
