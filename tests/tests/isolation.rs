//! A device reaches only what is its own: by group, by pair, and in time.

use dmbridge_proto::ids::Token;
use dmbridge_proto::status::Status::NoEntry;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::RawFrontend;

const SIZE: u64 = 256 << 10;

const TWO_GROUPS: &str = r#"
[[device]]
name = "red"
socket = "@/red.sock"
group = "red"

[[device]]
name = "red2"
socket = "@/red2.sock"
group = "red"

[[device]]
name = "blue"
socket = "@/blue.sock"
group = "blue"
"#;

#[test]
fn devices_of_two_groups_do_not_exist_for_each_other() {
    let daemon = TestDaemon::start_with(&[], TWO_GROUPS);
    let mut red = RawFrontend::connect(daemon.path("red.sock"));
    let red2 = RawFrontend::connect(daemon.path("red2.sock"));
    let mut blue = RawFrontend::connect(daemon.path("blue.sock"));
    assert!(red.query(red2.gid()).is_ok());
    for gid in [red.gid(), red2.gid()] {
        assert_eq!(blue.query(gid), Err(NoEntry));
        assert_eq!(blue.register(gid, SIZE), Err(NoEntry));
        assert_eq!(blue.signal_event(gid, 1, 2), Err(NoEntry));
    }
    assert_eq!(red.query(blue.gid()), Err(NoEntry));
    let dmb = red.register(red2.gid(), SIZE).expect("a DMB").token;
    for token in [dmb, Token::from_bits(dmb.to_bits() + (1 << 32))] {
        assert_eq!(blue.attach(token), Err(NoEntry));
        assert_eq!(blue.detach(token), Err(NoEntry));
        assert_eq!(blue.unregister(token), Err(NoEntry));
        assert_eq!(blue.move_bytes(token, 0, b"x"), Err(NoEntry));
    }
    assert_eq!(blue.window().maps, 0, "nothing of the others' was mapped");
    assert_eq!(blue.events(), []);
}

#[test]
fn a_device_that_is_not_the_peer_gets_the_answer_for_a_token_of_nothing() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    let mut third = RawFrontend::connect(daemon.hub());
    let dmb = owner.register(peer.gid(), SIZE).expect("a DMB").token;
    peer.attach(dmb).expect("attached");
    assert!(third.query(owner.gid()).is_ok(), "they are of one group");
    assert_eq!(third.attach(dmb), Err(NoEntry));
    assert_eq!(third.detach(dmb), Err(NoEntry));
    assert_eq!(third.unregister(dmb), Err(NoEntry));
    assert_eq!(third.move_bytes(dmb, 0, b"x"), Err(NoEntry));
    assert_eq!(peer.unregister(dmb), Err(NoEntry), "it is not the owner");
    assert_eq!(owner.attach(dmb), Err(NoEntry), "it is not the peer");
    assert_eq!(owner.move_bytes(dmb, 0, b"x"), Err(NoEntry));
    assert_eq!(third.window().maps, 0);
}

#[test]
fn memory_is_zero_when_a_dmb_is_registered_fresh_or_reused() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let peers: [RawFrontend; 2] = std::array::from_fn(|_| RawFrontend::connect(daemon.hub()));
    let secret = vec![0x5e; SIZE as usize];
    for round in 0..6 {
        for peer in &peers {
            let dmb = owner.register(peer.gid(), SIZE).expect("a DMB");
            let window = owner.window();
            assert!(window.read(dmb.offset, SIZE).iter().all(|byte| *byte == 0), "round {round}");
            assert_eq!(window.line(dmb.line_offset).take_pending(), 0);
            window.write(dmb.offset, &secret);
            window
                .line(dmb.line_offset)
                .futex_word()
                .store(0xffff_ffff, std::sync::atomic::Ordering::Relaxed);
            drop(window);
            owner.unregister(dmb.token).expect("unregistered");
        }
    }
}

#[test]
fn a_pairs_window_never_shows_another_pairs_bytes() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peers: Vec<_> = (0..3).map(|_| RawFrontend::connect(daemon.hub())).collect();
    for (i, peer) in peers.iter().enumerate() {
        let dmb = owner.register(peer.gid(), SIZE).expect("a DMB");
        owner.window().write(dmb.offset, &vec![i as u8 + 1; SIZE as usize]);
    }
    // Devices that leave and devices that come: what they had goes back to the host, what they get is fresh.
    peers.remove(0);
    peers.push(RawFrontend::connect(daemon.hub()));
    let dmb = owner.register(peers[2].gid(), SIZE).expect("a DMB");
    peers[2].attach(dmb.token).expect("attached");
    for (peer, own) in peers.iter().zip([2u8, 3, 0]) {
        let window = peer.window();
        for (offset, size) in window.extents() {
            // Control lines come first: 64 bytes for each 8 KiB.
            let header = size / 8192 * 64;
            let bytes = window.read(offset + header, size - header);
            assert!(bytes.iter().all(|byte| *byte == 0 || *byte == own), "only its own bytes");
        }
    }
    assert_eq!(peers[0].window().extents().len(), 1, "mapped eagerly");
}

#[test]
fn a_peer_that_stays_attached_keeps_the_memory_from_being_reused() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    let old = owner.register(peer.gid(), SIZE).expect("a DMB");
    let remote = peer.attach(old.token).expect("attached");
    owner.unregister(old.token).expect("unregistered");
    let new = owner.register(peer.gid(), SIZE).expect("another DMB");
    assert_ne!((new.offset, new.token), (old.offset, old.token));
    peer.window().write(remote.offset, b"late");
    assert_eq!(owner.window().read(new.offset, SIZE), vec![0; SIZE as usize]);
    assert_eq!(peer.move_bytes(old.token, 0, b"x"), Err(NoEntry));
    peer.detach(old.token).expect("detached");
    let third = owner.register(peer.gid(), SIZE).expect("a third DMB");
    assert_eq!(owner.window().read(third.offset, 4), [0; 4]);
}

#[test]
fn quotas_bound_what_one_device_takes() {
    let limits = "[hub]\nsocket = \"@/hub.sock\"\n[hub.limits]\nwindow_size = \"16M\"\nmax_dmb_size = \"4M\"\nmax_dmb_bytes = \"8M\"\nmax_dmbs = 5\n";
    let daemon = TestDaemon::start_with(&[], limits);
    let mut owner = RawFrontend::connect(daemon.hub());
    let peer = RawFrontend::connect(daemon.hub());
    use dmbridge_proto::status::Status::{Quota, TooBig};
    assert_eq!(owner.register(peer.gid(), 8 << 20), Err(TooBig));
    let first = owner.register(peer.gid(), 4 << 20).expect("a DMB");
    assert_eq!(first.index, 0);
    owner.register(peer.gid(), 4096).expect("a DMB");
    assert_eq!(owner.register(peer.gid(), 4 << 20), Err(Quota), "bytes");
    for _ in 0..3 {
        owner.register(peer.gid(), 4096).expect("a DMB");
    }
    assert_eq!(owner.register(peer.gid(), 4096), Err(Quota), "DMBs");
    owner.unregister(first.token).expect("unregistered");
    assert_eq!(owner.register(peer.gid(), 4096).expect("room again").index, 0, "the lowest free number");
}
