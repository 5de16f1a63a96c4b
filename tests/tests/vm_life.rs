//! What happens to DMBs when a guest, its device, its driver or the daemon goes, in traffic: the peer learns it, and
//! nothing is left.

use dmbridge_tests::daemon::Holdings;
use dmbridge_tests::deadline::until;
use dmbridge_tests::vm::shared::{Lent, Shared, in_lasting_thread};
use dmbridge_tests::vm::{Driven, VmPair};
use std::time::Duration;

/// More than any exchange here gets done.
const ENDLESS: u64 = 1 << 40;
const FOLDER: &str = "/sys/bus/pci/devices/0000:01:00.0";

/// How often what is a race is tried; the environment variable says it.
fn rounds() -> u32 {
    std::env::var("DMBRIDGE_VM_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

struct Setup {
    pair: VmPair,
    /// What the daemon holds while no driver uses a device.
    idle: Holdings,
}

impl std::ops::Deref for Setup {
    type Target = VmPair;

    fn deref(&self) -> &VmPair {
        &self.pair
    }
}

impl std::ops::DerefMut for Setup {
    fn deref_mut(&mut self) -> &mut VmPair {
        &mut self.pair
    }
}

fn make() -> Setup {
    let pair = VmPair::boot();
    let setup = Setup { idle: pair.daemon.holdings(), pair };
    // Once in full, so that what is made at the first use is there.
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    a.kill();
    learns_that_the_peer_is_gone(&mut b, &gid);
    b.kill();
    Setup { idle: setup.measure(), ..setup }
}

fn setup() -> Lent<'static, Setup> {
    static SETUP: Shared<Setup> = Shared::new();
    SETUP.take(make)
}

impl Setup {
    /// A front-end's memory table, with what was mapped, stays as it was until the next start.
    fn let_go(&self) {
        for vm in [&self.a, &self.b] {
            Driven::in_guest(vm).end();
        }
    }

    /// What the daemon holds when nobody uses a device.
    fn measure(&self) -> Holdings {
        self.let_go();
        // The connection by which the daemon is asked may still be counted.
        let samples = (0..20).map(|_| self.daemon.holdings());
        samples.min_by_key(|holdings| holdings.descriptors).expect("a sample")
    }

    fn wait_until_nothing_is_left(&self) {
        self.let_go();
        until("the daemon holds what it held before", || {
            let Holdings { descriptors, threads, .. } = self.daemon.holdings();
            // Each of its threads may have opened something to notify with, at the first need and for good.
            let few = descriptors <= self.idle.descriptors + threads;
            let now = Holdings { descriptors: self.idle.descriptors, ..self.daemon.holdings() };
            (few && now == self.idle).then_some(())
        });
    }
}

/// Two devices that send to each other until something ends it.
fn traffic(a: &mut Driven, b: &mut Driven) {
    a.begin_exchange(b, ["attach"; 2], 1 << 20, ENDLESS);
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
    for _ in 0..rounds() {
        let (mut a, mut b) = setup.drive();
        let gid = a.gid().to_string();
        traffic(&mut a, &mut b);
        a.kill();
        learns_that_the_peer_is_gone(&mut b, &gid);
        b.kill();
        setup.wait_until_nothing_is_left();
    }
}

/// Kills two programs at the same time.
fn kill_both(first: Driven, second: Driven) {
    std::thread::scope(|scope| {
        scope.spawn(|| first.kill());
        second.kill();
    });
}

#[test]
fn whatever_happens_to_two_guests_at_once_harms_neither() {
    let mut setup = setup();
    for round in 0..2 * rounds() {
        let (mut a, mut b) = setup.drive();
        traffic(&mut a, &mut b);
        match round % 6 {
            0 => kill_both(a, b),
            1 => {
                setup.a.pause();
                b.kill();
                setup.a.resume();
                a.kill();
            }
            2 => {
                setup.a.pause();
                setup.b.pause();
                setup.b.resume();
                setup.a.resume();
                kill_both(b, a);
            }
            3 => {
                setup.b.pause();
                a.kill();
                setup.b.press_reset();
                setup.b.resume();
                setup.b.wait_until_booted();
            }
            // Killed while mappings are being made in both.
            4 => {
                let mut c = Driven::on_host(&setup.daemon.hub(), true);
                let gid = c.gid().to_string();
                c.begin(&format!("register {} 8388608 2", b.gid()));
                for guest in [&mut a, &mut b] {
                    guest.begin(&format!("register {gid} 8388608 2"));
                }
                kill_both(a, b);
            }
            _ => {
                setup.a.press_reset();
                setup.b.pause();
                setup.b.resume();
                b.kill();
                setup.a.wait_until_booted();
            }
        }
    }
    setup.wait_until_nothing_is_left();
}

#[test]
fn a_request_that_meets_the_end_of_the_driver_does_no_harm() {
    let setup = setup();
    for _ in 0..3 {
        let (mut a, mut b) = setup.drive();
        let (_, token) = a.register(&b, 1 << 20);
        b.sender("attach", &token);
        let gid = b.gid().to_string();
        // Takes long, and no timer, so that it comes to its end while QEMU does nothing else.
        let kill = "echo; i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; killall -9 vm-guest";
        let mut killer = setup.b.start_command(&["sh", "-c", kill]);
        setup.b.expect(killer.line(Duration::from_secs(60)));
        setup.b.without_main_loop(|| {
            // What b has mapped of a is to be unmapped now, and nobody reads that.
            a.kill();
            until("the driver of b is gone", || {
                let report = setup.daemon.report();
                let device = report.devices.iter().find(|device| device.gid == gid)?;
                (!device.started).then_some(())
            });
        });
        drop((killer, b));
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
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.reset();
    learns_that_the_peer_is_gone(&mut b, &gid);
    drop(a);
    b.kill();
    setup.wait_until_nothing_is_left();
    let (mut a, mut b) = setup.drive();
    assert_eq!(a.gid(), gid, "a configured device keeps its GID");
    traffic(&mut a, &mut b);
}

#[test]
fn a_device_whose_driver_is_unbound_in_traffic_is_reset() {
    let setup = setup();
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.shell(&format!("echo 0000:01:00.0 >{FOLDER}/driver/unbind"));
    let error = a.try_answer().unwrap_err();
    assert!(error.contains("connection to the daemon is lost"), "{error}");
    drop(a);
    learns_that_the_peer_is_gone(&mut b, &gid);
    b.kill();
    setup.wait_until_nothing_is_left();
    Driven::in_guest(&setup.a);
}

#[test]
fn a_device_that_is_unplugged_in_traffic_is_gone_and_can_be_plugged_in_again() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    // Nobody asks the program.
    setup.a.unplug(0);
    let error = a.try_answer().unwrap_err();
    assert!(error.contains("connection to the daemon is lost"), "{error}");
    drop(a);
    learns_that_the_peer_is_gone(&mut b, &gid);
    let socket = setup.daemon.path("a.sock");
    setup.a.plug(0, &socket);
    until("the guest has found the device", || {
        setup.a.run(&["test", "-e", &format!("{FOLDER}/resource4")]).status.success().then_some(())
    });
    let mut a = Driven::in_guest(&setup.a);
    traffic(&mut a, &mut b);
    drop((a, b));
    setup.wait_until_nothing_is_left();
}

#[test]
fn a_guest_that_is_killed_in_traffic_leaves_nothing() {
    let mut setup = setup();
    let (mut a, mut b) = setup.drive();
    let gid = a.gid().to_string();
    traffic(&mut a, &mut b);
    setup.a.kill();
    learns_that_the_peer_is_gone(&mut b, &gid);
    drop(a);
    b.kill();
    // The front-end itself is not there either.
    until("the device is gone", || {
        let report = setup.daemon.report();
        (report.pool.extents == 0 && report.devices[0].peer.is_none()).then_some(())
    });
    setup.boot_a_again();
    drop(Driven::in_guest(&setup.a));
    setup.wait_until_nothing_is_left();
}

#[test]
fn mapped_memory_outlives_the_daemon() {
    let mut setup = in_lasting_thread(make);
    let (mut a, mut b) = setup.drive();
    let (dmb, token) = a.register(&b, 1 << 20);
    let sender = b.sender("attach", &token);
    setup.daemon.kill();
    b.ask(&format!("write {sender} 0 nobody else knows"));
    assert_eq!(a.ask(&format!("read {dmb} 0 18"))["text"], "nobody else knows\0");
}
