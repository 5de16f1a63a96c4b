//! Virtual machines under stock QEMU, and a daemon with a keeper: its worker may be killed at any moment, QEMU does not notice,
//! and the guests go on.

use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::random::Random;
use dmbridge_tests::vm::kernel::{
    address, assert_kernel_is_content, network, set_up_network, set_up_smc, shown,
};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Driven, VmOptions, VmPair};
use serde_json::Value;
use std::thread::sleep;
use std::time::Duration;

/// How long AF_SMC may take: guests are slow without KVM.
const SMC: Duration = Duration::from_secs(300);
/// Bytes of an exchange, some seconds long.
const BYTES: u64 = 64 << 20;

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(VmPair::boot_kept)
}

/// Both ways at once, while workers are killed.
fn exchange_meanwhile(setup: &VmPair, a: &mut Driven, b: &mut Driven, by: &str, kills: u32) {
    let (a_dmb, a_token) = a.register(b, 1 << 20);
    let (b_dmb, b_token) = b.register(a, 1 << 20);
    let (a_sender, b_sender) = (a.sender(by, &b_token), b.sender(by, &a_token));
    a.begin(&format!("exchange {a_dmb} {a_sender} {BYTES} 1"));
    b.begin(&format!("exchange {b_dmb} {b_sender} {BYTES} 2"));
    for _ in 0..kills {
        sleep(Duration::from_millis(400));
        setup.daemon.kill_worker();
    }
    let (of_a, of_b) = (a.answer(), b.answer());
    assert_eq!((&of_a["sent"], &of_b["sent"]), (&of_b["received"], &of_a["received"]));
}

/// Everything that a device can do.
fn check(a: &mut Driven, b: &mut Driven) {
    let (dmb, token) = a.register(b, 16384);
    let sender = b.sender("move", &token);
    b.ask(&format!("write {sender} 0 moved"));
    b.ask(&format!("signal {sender} 1"));
    assert_eq!(a.ask(&format!("wait {dmb}"))["bits"], 1);
    assert_eq!(a.ask(&format!("read {dmb} 0 5"))["text"], "moved");
    let (dmb, token) = a.register(b, 16384);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 stored"));
    b.ask(&format!("signal {sender} 2"));
    assert_eq!(a.ask(&format!("wait {dmb}"))["bits"], 2);
    assert_eq!(a.ask(&format!("read {dmb} 0 6"))["text"], "stored");
}

#[test]
fn traffic_goes_on_and_new_buffers_can_be_made() {
    let setup = setup();
    let (mut a, mut b) = setup.drive();
    for by in ["attach", "move"] {
        exchange_meanwhile(&setup, &mut a, &mut b, by, 4);
        check(&mut a, &mut b);
    }
    for said in 0..5 {
        b.ask(&format!("tell {} 7 {said}", a.gid()));
        setup.daemon.kill_worker();
        assert_eq!(a.event("software")["info"], said);
        check(&mut b, &mut a);
    }
}

#[test]
fn a_worker_may_be_killed_while_qemu_maps() {
    let setup = setup();
    let mut random = Random::new(9);
    for _ in 0..10 {
        let (mut a, mut b) = setup.drive();
        for round in 0..2 {
            // Each needs a mapping in both.
            a.begin(&format!("register {} {}", b.gid(), (8 << 20) + 4096 * round));
            sleep(Duration::from_micros(random.below(20_000)));
            setup.daemon.kill_worker();
            let answer = a.answer();
            let token = answer["tokens"][0].as_str().expect("a token").to_string();
            let sender = b.sender("attach", &token);
            b.ask(&format!("write {sender} 0 round {round}"));
            assert_eq!(a.ask(&format!("read {} 0 7", answer["dmb"]))["text"], format!("round {round}"));
        }
        // The next ones reset the devices, which empties the windows.
        drop((a, b));
    }
}

#[test]
fn a_pause_and_a_reset_outlast_a_worker() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let (kept, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    setup.a.pause();
    assert_eq!(b.event("paused")["gid"], a.gid());
    setup.daemon.kill_worker();
    b.ask(&format!("write {sender} 0 in the meantime"));
    b.ask(&format!("signal {sender} 4"));
    setup.daemon.kill_worker();
    setup.a.resume();
    assert_eq!(b.event("resumed")["gid"], a.gid());
    assert_eq!(a.ask(&format!("wait {kept}"))["bits"], 4);
    assert_eq!(a.ask(&format!("read {kept} 0 15"))["text"], "in the meantime");
    check(&mut b, &mut a);
    let gid = a.gid().to_string();
    setup.daemon.kill_worker();
    setup.a.reset();
    assert_eq!(b.event("gone")["gid"], gid);
    let mut a = Driven::in_guest(&setup.a);
    check(&mut a, &mut b);
    setup.daemon.kill_worker();
    check(&mut b, &mut a);
}

#[test]
fn af_smc_connections_outlast_a_worker() {
    let options = |daemon: &TestDaemon, number, name: &str| {
        network(VmOptions::with_programs(name), number, &daemon.path("network"))
    };
    let setup = VmPair::boot_with_daemon(&["--keep"], options);
    for (number, vm) in [&setup.a, &setup.b].into_iter().enumerate() {
        set_up_network(vm, number);
        set_up_smc(vm);
    }
    let bytes = (256u64 << 20).to_string();
    for port in ["7001", "7002"] {
        let mut server =
            setup.a.start_command(&["vm-sockets", "smc", "listen", port, "exchange", "1", &bytes]);
        assert_eq!(setup.a.expect(server.line(SMC)), "listening");
        let words = ["vm-sockets", "smc", "connect", &address(0), port, "exchange", "1", &bytes];
        let client = setup.b.start_command(&words);
        for _ in 0..8 {
            sleep(Duration::from_millis(300));
            setup.daemon.kill_worker();
        }
        for (vm, running) in [(&setup.b, client), (&setup.a, server)] {
            let output = vm.expect(running.wait(SMC));
            let said = output.text();
            assert!(output.status.success() && !said.contains("error"), "VM {}: {said}", vm.name());
        }
    }
    for vm in [&setup.a, &setup.b] {
        let statistics = &shown(vm)["statistics"];
        let smcd = |name: &str| statistics["smcd"][name].as_u64().expect("a number");
        assert_eq!(smcd("client_v2") + smcd("server_v2"), 2, "{statistics}");
        assert_eq!(statistics["fallbacks"], Value::Array(Vec::new()), "{statistics}");
        assert_kernel_is_content(vm);
    }
}
