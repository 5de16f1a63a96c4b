//! Two guests under stock QEMU, and processes of the host, exchange data through DMBs: by map without any copy, by moves
//! where somebody cannot map.

use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Driven, VmPair};

/// Bytes of one direction of an exchange; the environment variable says it in MiB. Without KVM, guests are slow.
fn exchange_bytes() -> u64 {
    let mib = std::env::var("DMBRIDGE_VM_EXCHANGE_MIB").ok().and_then(|text| text.parse().ok());
    mib.unwrap_or(1024) << 20
}

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(VmPair::boot)
}

#[test]
fn what_one_guest_writes_the_other_reads_and_nothing_is_copied() {
    let setup = setup();
    let (mut a, mut b) = setup.drive();
    let before = setup.moved_bytes();
    a.exchange(&mut b, ["attach", "attach"], 2 << 20, exchange_bytes());
    assert_eq!(setup.moved_bytes(), before);
}

#[test]
fn a_sleeping_guest_is_woken_by_a_signal() {
    let setup = setup();
    let (mut a, mut b) = setup.drive();
    a.is_woken_by(&mut b, "attach");
}

#[test]
fn a_guest_that_cannot_map_moves_and_is_moved_to() {
    let setup = setup();
    let mut a = Driven::in_guest_with(&setup.a, &["pci", "--no-map"]);
    let mut b = Driven::in_guest_with(&setup.b, &["pci", "--no-map"]);
    let before = setup.moved_bytes();
    // Both DMBs lie in their owners' memory.
    a.exchange(&mut b, ["move", "move"], 2 << 20, exchange_bytes() / 4);
    assert!(setup.moved_bytes() - before >= exchange_bytes() / 2);
    let (_, token) = a.register(&b, 4096);
    assert!(b.refused(&format!("attach {token}")).contains("NotSupported"));
}

#[test]
fn guests_of_both_kinds_meet() {
    let setup = setup();
    let mut a = Driven::in_guest(&setup.a);
    let mut b = Driven::in_guest_with(&setup.b, &["pci", "--no-map"]);
    // One DMB lies in the pool, the other one in its owner's memory; both sides move.
    a.exchange(&mut b, ["move", "move"], 1 << 20, exchange_bytes() / 16);
}

#[test]
fn a_process_of_the_host_and_a_guest_exchange_by_map() {
    let setup = setup();
    let mut guest = Driven::in_guest(&setup.a);
    let mut host = Driven::on_host(&setup.daemon.hub(), true);
    let before = setup.moved_bytes();
    guest.exchange(&mut host, ["attach", "attach"], 2 << 20, exchange_bytes() / 4);
    assert_eq!(setup.moved_bytes(), before);
    let peer = guest.ask(&format!("query {}", host.gid()));
    assert_eq!(
        (&peer["map"], &peer["futex"]),
        (&true.into(), &false.into()),
        "they sleep in different kernels"
    );
}

#[test]
fn a_process_and_a_guest_exchange_by_every_pairing() {
    let setup = setup();
    for (guest_maps, host_maps) in [(true, false), (false, true), (false, false)] {
        let arguments = if guest_maps { &["pci"][..] } else { &["pci", "--no-map"] };
        let mut guest = Driven::in_guest_with(&setup.a, arguments);
        let mut host = Driven::on_host(&setup.daemon.hub(), host_maps);
        guest.exchange(&mut host, ["move", "move"], 1 << 20, exchange_bytes() / 32);
    }
    // A DMB in the pool, which one side maps and into which the other one moves all the same.
    let mut guest = Driven::in_guest(&setup.a);
    let mut host = Driven::on_host(&setup.daemon.hub(), true);
    guest.exchange(&mut host, ["move", "attach"], 1 << 20, exchange_bytes() / 32);
}

#[test]
fn a_thousand_dmbs_and_many_peers_need_few_mappings() {
    let setup = setup();
    let (mut a, mut b) = setup.drive();
    let tokens = a.ask(&format!("register {} 16384 1000", b.gid()))["tokens"].clone();
    let tokens: Vec<_> = tokens.as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens.len(), 1000);
    b.ask(&format!("attach {}", tokens.join(" ")));
    b.ask("write 999 0 last");
    assert_eq!(a.ask("read 999 0 4")["text"], "last");
    let mut hosts: Vec<_> = (0..20).map(|_| Driven::on_host(&setup.daemon.hub(), true)).collect();
    for host in &mut hosts {
        // By map as long as there is room for mappings, by moves from then on.
        let (dmb, token) = a.register(host, 65536);
        let sender = host.sender("open", &token);
        host.ask(&format!("write {sender} 0 to the guest"));
        host.ask(&format!("signal {sender} 1"));
        assert_eq!(a.ask(&format!("wait {dmb}"))["bits"], 1);
        assert_eq!(a.ask(&format!("read {dmb} 0 12"))["text"], "to the guest");
        let (dmb, token) = host.register(&a, 65536);
        let sender = a.sender("open", &token);
        a.ask(&format!("write {sender} 0 from there"));
        a.ask(&format!("signal {sender} 1"));
        assert_eq!(host.ask(&format!("wait {dmb}"))["bits"], 1);
        assert_eq!(host.ask(&format!("read {dmb} 0 10"))["text"], "from there");
    }
    let report = setup.daemon.report();
    let extents = |gid: &str| report.devices.iter().find(|device| device.gid == gid).unwrap().extents;
    // A few for a thousand DMBs, because they grow. QEMU has room for eight regions, and the guest's RAM is one.
    assert!(extents(b.gid()) <= 4, "{} extents", extents(b.gid()));
    assert_eq!(extents(a.gid()), 7);
}
