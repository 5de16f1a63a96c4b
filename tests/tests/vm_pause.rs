//! A virtual machine that is paused and resumed loses nothing: its peers learn it, wait, and go on. vhost-user has no word for
//! it: to the daemon it looks as if the driver had let the device go, until it is started again.

use dmbridge_tests::deadline::until;
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Driven, VmPair};
use std::thread::sleep;
use std::time::Duration;

/// Longer than the daemon needs to look twice whether a device that is paused still is that.
const WHILE: Duration = Duration::from_millis(500);
/// Bytes of an exchange, some seconds long.
const BYTES: u64 = 96 << 20;

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(VmPair::boot)
}

#[test]
fn an_exchange_goes_on_where_it_was() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    a.begin_exchange(&mut b, ["attach"; 2], 1 << 20, BYTES);
    for _ in 0..3 {
        setup.a.pause();
        sleep(WHILE);
        setup.a.resume();
    }
    setup.a.pause();
    setup.b.pause();
    sleep(WHILE);
    setup.a.resume();
    setup.b.resume();
    a.end_exchange(&mut b);
    // Each was told of the other, as often as that was seen, and of nothing worse.
    let (gid_a, gid_b) = (a.gid().to_string(), b.gid().to_string());
    for (driven, other) in [(&mut b, gid_a), (&mut a, gid_b)] {
        for kind in ["paused", "resumed"] {
            assert_eq!(driven.event(kind)["gid"], other);
        }
        while let Some(kind) = driven.ask("event 0")["event"].as_str() {
            assert!(["paused", "resumed"].contains(&kind), "{kind}");
        }
    }
    // Nor did the device forget anything.
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 after"));
    b.ask(&format!("signal {sender} 1"));
    assert_eq!(a.ask(&format!("wait {dmb}"))["bits"], 1);
    assert_eq!(a.ask(&format!("read {dmb} 0 5"))["text"], "after");
}

#[test]
fn what_others_do_meanwhile_is_there_afterwards() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let (kept, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    let (_, ended) = b.register(&a, 4096);
    a.sender("attach", &ended);
    setup.a.pause();
    assert_eq!(b.event("paused")["gid"], a.gid());
    // An extent that is to be mapped at both, a DMB that ends, bytes and a signal.
    let (new, token) = b.register(&a, 8 << 20);
    b.ask("drop-dmb 0");
    b.ask(&format!("write {sender} 0 in the meantime"));
    b.ask(&format!("signal {sender} 4"));
    b.ask(&format!("tell {} 7 8", a.gid()));
    setup.a.resume();
    assert_eq!(b.event("resumed")["gid"], a.gid());
    assert_eq!(a.ask(&format!("wait {kept}"))["bits"], 4);
    assert_eq!(a.ask(&format!("read {kept} 0 15"))["text"], "in the meantime");
    assert_eq!(a.event("unregistered")["token"], ended);
    assert_eq!(a.event("software")["info"], 8);
    let sender = a.sender("attach", &token);
    a.ask(&format!("write {sender} 0 new"));
    assert_eq!(b.ask(&format!("read {new} 0 3"))["text"], "new");
}

#[test]
fn a_peer_that_goes_meanwhile_is_gone_afterwards() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let (_, token) = b.register(&a, 1 << 20);
    a.sender("attach", &token);
    let (_, token) = a.register(&b, 1 << 20);
    b.sender("attach", &token);
    setup.a.pause();
    let gid = b.gid().to_string();
    b.kill();
    sleep(WHILE);
    setup.a.resume();
    assert_eq!(a.event("gone")["gid"], gid);
    // What was b's is unmapped at last.
    until("a has its own extent only", || {
        let report = setup.daemon.report();
        let device = report.devices.iter().find(|device| device.gid == a.gid())?;
        (device.extents == 1).then_some(())
    });
    let mut b = Driven::in_guest(&setup.b);
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 again"));
    assert_eq!(a.ask(&format!("read {dmb} 0 5"))["text"], "again");
}

#[test]
fn a_registration_that_a_pause_interrupts_is_finished() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    for round in 0..3 {
        // Each needs a mapping in both.
        a.begin(&format!("register {} {}", b.gid(), 8 << 20));
        setup.a.pause();
        setup.b.pause();
        setup.b.resume();
        setup.a.resume();
        let token = a.answer()["tokens"][0].as_str().expect("a token").to_string();
        let sender = b.sender("attach", &token);
        b.ask(&format!("write {sender} 0 round {round}"));
        assert_eq!(a.ask(&format!("read {round} 0 7"))["text"], format!("round {round}"));
    }
}

#[test]
fn a_move_into_a_paused_guests_own_memory_waits() {
    let mut setup = setup();
    let mut a = Driven::in_guest_with(&setup.a, &["pci", "--no-map"]);
    let mut host = Driven::on_host(&setup.daemon.hub(), true);
    let (dmb, token) = a.register(&host, 65536);
    let sender = host.sender("move", &token);
    setup.a.pause();
    assert_eq!(host.event("paused")["gid"], a.gid());
    host.begin(&format!("write {sender} 0 patience"));
    sleep(WHILE);
    setup.a.resume();
    host.answer();
    host.ask(&format!("signal {sender} 1"));
    assert_eq!(a.ask(&format!("wait {dmb}"))["bits"], 1);
    assert_eq!(a.ask(&format!("read {dmb} 0 8"))["text"], "patience");
}

#[test]
fn a_guest_that_is_reset_while_it_is_paused_is_gone_at_once() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    let (_, token) = a.register(&b, 1 << 20);
    b.sender("attach", &token);
    setup.a.pause();
    assert_eq!(b.event("paused")["gid"], gid);
    setup.a.press_reset();
    // The guest does nothing yet: its front-end has taken the mappings away.
    assert_eq!(b.event("gone")["gid"], gid);
    drop(a);
    setup.a.resume();
    setup.a.wait_until_booted();
    let mut a = Driven::in_guest(&setup.a);
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 a new life"));
    assert_eq!(a.ask(&format!("read {dmb} 0 10"))["text"], "a new life");
}
