//! What happens to DMBs when a guest, its device, its driver or the daemon goes, in traffic: the peer learns it, and
//! nothing is left.

use dmbridge_tests::daemon::{Holdings, TestDaemon};
use dmbridge_tests::deadline::{until, until_equal};
use dmbridge_tests::vm::shared::{Lent, Shared, in_lasting_thread};
use dmbridge_tests::vm::{Driven, Vm, VmOptions};

/// More than any exchange here gets done.
const ENDLESS: u64 = 1 << 40;
const FOLDER: &str = "/sys/bus/pci/devices/0000:01:00.0";

struct Setup {
    daemon: TestDaemon,
    /// What the daemon holds while no driver uses a device.
    idle: Holdings,
    a: Vm,
    b: Vm,
}

const CONFIGURATION: &str = r#"
[limits]
window_size = 268435456
max_dmb_size = 67108864
max_dmb_bytes = 134217728
[[device]]
name = "a"
socket = "@/a.sock"
[[device]]
name = "b"
socket = "@/b.sock"
"#;

fn make() -> Setup {
    let daemon = TestDaemon::start_with(&[], CONFIGURATION);
    let [a, b] =
        ["a", "b"].map(|name| VmOptions::new(name).device(&daemon.path(&format!("{name}.sock"))).start());
    a.wait_until_booted();
    b.wait_until_booted();
    // Once each, so that what is made at the first use is there.
    drop((Driven::in_guest(&a), Driven::in_guest(&b)));
    until("both devices are reset", || {
        daemon.report().devices.iter().all(|device| !device.started).then_some(())
    });
    let idle = daemon.holdings();
    Setup { daemon, idle, a, b }
}

fn setup() -> Lent<'static, Setup> {
    static SETUP: Shared<Setup> = Shared::new();
    SETUP.take(make)
}

impl Setup {
    fn wait_until_nothing_is_left(&self) {
        until_equal("what the daemon holds", &self.idle, || self.daemon.holdings());
    }
}

/// Two devices that send to each other until something ends it.
fn traffic(a: &mut Driven, b: &mut Driven) {
    let (a_dmb, a_token) = a.register(b, 1 << 20);
    let (b_dmb, b_token) = b.register(a, 1 << 20);
    let (a_sender, b_sender) = (a.sender("attach", &b_token), b.sender("attach", &a_token));
    a.begin(&format!("exchange {a_dmb} {a_sender} {ENDLESS} 1"));
    b.begin(&format!("exchange {b_dmb} {b_sender} {ENDLESS} 2"));
}

/// The device's exchange ends because its peer is gone, and so does an event say.
fn learns_that_the_peer_is_gone(driven: &mut Driven, peer: &str) {
    let error = driven.try_answer().unwrap_err();
    assert!(error.contains("the peer's device is gone"), "{error}");
    let event = driven.event("gone");
    assert_eq!(event["gid"], peer, "{event}");
}

#[test]
fn a_program_that_is_killed_in_a_guest_ends_its_dmbs_and_another_one_can_start() {
    let setup = setup();
    for _ in 0..3 {
        let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
        let gid = a.gid().to_string();
        traffic(&mut a, &mut b);
        a.kill();
        learns_that_the_peer_is_gone(&mut b, &gid);
        drop(b);
        setup.wait_until_nothing_is_left();
    }
}

#[test]
fn a_device_has_one_program_at_a_time() {
    let setup = setup();
    let first = Driven::in_guest(&setup.a);
    let error = Driven::try_in_guest(&setup.a, &["pci"]).unwrap_err();
    assert!(error.contains("another process uses it"), "{error}");
    first.kill();
    Driven::in_guest(&setup.a);
}

#[test]
fn who_may_not_is_told_so() {
    let setup = setup();
    let error = Driven::try_in_guest(&setup.a, &["pci", "0000:05:00.0"]).unwrap_err();
    assert!(error.contains("0000:05:00.0: there is no such device"), "{error}");
    let error = Driven::try_in_guest(&setup.a, &["pci", "0000:00:00.0"]).unwrap_err();
    assert!(error.contains("8086:29c0"), "{error}");
    let error = Driven::try_in_guest(&setup.a, &["pci", "1"]).unwrap_err();
    assert!(error.contains("0000:01:00.0"), "it shows how an address looks: {error}");
    let output = setup.a.run(&["su", "-s", "/bin/sh", "nobody", "-c", "vm-guest pci </dev/null"]);
    assert!(output.text().contains("takes root"), "{output:?}");
}

#[test]
fn a_guest_that_is_reset_in_traffic_leaves_nothing() {
    let mut setup = setup();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.reset();
    learns_that_the_peer_is_gone(&mut b, &gid);
    drop((a, b));
    setup.wait_until_nothing_is_left();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    assert_eq!(a.gid(), gid, "a configured device keeps its GID");
    traffic(&mut a, &mut b);
}

#[test]
fn a_device_whose_driver_is_unbound_in_traffic_is_reset() {
    let setup = setup();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.shell(&format!("echo 0000:01:00.0 >{FOLDER}/driver/unbind"));
    let error = a.try_answer().unwrap_err();
    assert!(error.contains("connection to the daemon is lost"), "{error}");
    drop(a);
    learns_that_the_peer_is_gone(&mut b, &gid);
    drop(b);
    setup.wait_until_nothing_is_left();
    Driven::in_guest(&setup.a);
}

#[test]
fn a_device_that_is_unplugged_in_traffic_ends_its_dmbs_and_the_program_lives() {
    let mut setup = setup();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let gid = a.gid().to_string();
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    b.ask(&format!("write {sender} 0 before"));
    a.begin(&format!("wait {dmb}"));
    setup.a.unplug(0);
    let error = a.try_answer().unwrap_err();
    assert!(error.contains("connection to the daemon is lost"), "{error}");
    // Its memory is gone with the device; what the program sees is zero, and not its end.
    assert_eq!(a.ask(&format!("read {dmb} 0 6"))["text"], "\0\0\0\0\0\0");
    assert_eq!(b.event("gone")["gid"], gid);
    drop((a, b));
    let socket = setup.daemon.path("a.sock");
    setup.a.plug(0, &socket);
    until("the guest finds the device again", || {
        setup.a.run(&["test", "-e", FOLDER]).status.success().then_some(())
    });
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    traffic(&mut a, &mut b);
}

#[test]
fn a_guest_that_is_paused_and_resumed_goes_on() {
    let mut setup = setup();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    a.begin(&format!("wait {dmb}"));
    setup.a.pause();
    b.ask(&format!("write {sender} 0 while it was paused"));
    b.ask(&format!("signal {sender} 4"));
    setup.a.resume();
    assert_eq!(a.answer()["bits"], 4);
    assert_eq!(a.ask(&format!("read {dmb} 0 19"))["text"], "while it was paused");
}

#[test]
fn a_guest_that_is_killed_in_traffic_leaves_nothing() {
    let mut setup = setup();
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.kill();
    learns_that_the_peer_is_gone(&mut b, &gid);
    drop((a, b));
    // The front-end itself is not there either.
    until("the device is gone", || {
        let report = setup.daemon.report();
        (report.pool.extents == 0 && report.devices[0].peer.is_none()).then_some(())
    });
    let socket = setup.daemon.path("a.sock");
    setup.a = in_lasting_thread(move || VmOptions::new("a").device(&socket).boot());
    drop(Driven::in_guest(&setup.a));
    setup.wait_until_nothing_is_left();
}

#[test]
fn mapped_memory_outlives_the_daemon() {
    let mut setup = in_lasting_thread(make);
    let (mut a, mut b) = (Driven::in_guest(&setup.a), Driven::in_guest(&setup.b));
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    setup.daemon.kill();
    b.ask(&format!("write {sender} 0 nobody else knows"));
    assert_eq!(a.ask(&format!("read {dmb} 0 18"))["text"], "nobody else knows\0");
}
