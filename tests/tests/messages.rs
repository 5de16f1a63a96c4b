//! Once a pair's extent is mapped, DMBs come and go without a word to the front-end.

use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::RawFrontend;

#[test]
fn five_hundred_dmbs_in_a_mapped_extent_need_no_request_to_a_front_end() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let mut peer = RawFrontend::connect(daemon.hub());
    // A DMB of 8 MiB makes an extent with room for the lines and pages of 500 small ones.
    let first = owner.register(peer.gid(), 8 << 20).expect("a DMB");
    peer.attach(first.token).expect("attached");
    let seen = |front_end: &RawFrontend| {
        let window = front_end.window();
        (window.maps, window.unmaps)
    };
    let requests = |owner: &RawFrontend, peer: &RawFrontend| {
        let report = daemon.report();
        let counted: Vec<_> = report.devices.iter().map(|d| (d.map_requests, d.unmap_requests)).collect();
        (seen(owner), seen(peer), counted)
    };
    let before = requests(&owner, &peer);
    assert_eq!((before.0, before.1), ((1, 0), (1, 0)), "one map each");
    peer.detach(first.token).expect("detached");
    owner.unregister(first.token).expect("unregistered");

    let dmbs: Vec<_> = (0..500).map(|_| owner.register(peer.gid(), 4096).expect("a DMB")).collect();
    let report = daemon.report();
    let of = |gid: String| report.devices.iter().find(|d| d.gid == gid).expect("a device").clone();
    assert_eq!((of(owner.gid().to_string()).dmbs, of(owner.gid().to_string()).extents), (500, 1));
    for dmb in &dmbs {
        peer.attach(dmb.token).expect("attached");
    }
    for dmb in &dmbs {
        peer.detach(dmb.token).expect("detached");
    }
    for dmb in &dmbs {
        owner.unregister(dmb.token).expect("unregistered");
    }
    assert_eq!(requests(&owner, &peer), before);
}

#[test]
fn a_pairs_extents_grow_so_that_there_are_few() {
    let daemon = TestDaemon::start();
    let mut owner = RawFrontend::connect(daemon.hub());
    let peer = RawFrontend::connect(daemon.hub());
    for _ in 0..256 {
        owner.register(peer.gid(), 256 << 10).expect("a DMB");
    }
    let window = owner.window();
    let extents = window.extents();
    assert!((2..=8).contains(&extents.len()), "64 MiB in extents of {extents:x?}");
    assert_eq!(window.maps, extents.len() as u64);
}
