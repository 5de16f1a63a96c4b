//! Linux's AF_SMC in one guest, the library's sockets in the other: they meet over DMBs, whoever connects to whom, and whatever the
//! library's device is.

use dmbridge_tests::deadline::until;
use dmbridge_tests::vm::kernel::{
    MODULE, address, assert_kernel_is_content, network, set_up_network, set_up_smc, shown,
};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Running, Vm, VmOptions, VmPair};
use serde_json::Value;
use std::time::Duration;

/// How long anything may take: guests are slow without KVM.
const DEADLINE: Duration = Duration::from_secs(300);

const FILE: &str = "/dev/dmbridge0";
/// In the first guest is AF_SMC, in the second the library.
fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(|| {
        let pair = VmPair::boot_with(|daemon, number, name| {
            network(VmOptions::new(name), number, &daemon.path("network"))
        });
        for (number, vm) in [&pair.a, &pair.b].into_iter().enumerate() {
            set_up_network(vm, number);
            set_up_smc(vm);
        }
        assert_eq!(shown(&pair.b)["programs"], true, "the option is not installed");
        pair.b.shell(&format!("chmod 666 {FILE}"));
        pair
    })
}

/// SMC-D connections of the guest with AF_SMC, and its fallbacks.
fn smcd(vm: &Vm) -> (u64, u64) {
    let state = shown(vm);
    let of = |name: &str| state["statistics"]["smcd"][name].as_u64().expect("a number");
    let fallbacks = state["statistics"]["fallbacks"].as_array().expect("a list");
    let fallbacks = fallbacks.iter().map(|fallback| fallback["count"].as_u64().expect("a number"));
    (of("client_v2") + of("server_v2"), fallbacks.sum())
}

/// Who listens, by the number of its guest.
#[derive(Clone, Copy, Debug)]
enum Server {
    Linux,
    Library,
}

/// What each end is and does: the first guest's, the second guest's.
type Both<'a> = [(&'a str, &'a str); 2];

/// Whether the guest has the module.
fn has_file(vm: &Vm) -> bool {
    vm.run(&["test", "-e", FILE]).status.success()
}

/// Starts one end of something in a guest.
fn run(vm: &Vm, family: &str, words: &[&str], what: &str) -> Running {
    let program = format!("exec vm-sockets {family} {} {what}", words.join(" "));
    // With the character device as a user without privileges; with the device itself that does not go.
    let user = if family == "library" && has_file(vm) { "nobody" } else { "root" };
    vm.start_command(&["su", "-s", "/bin/sh", user, "-c", &program])
}

/// Starts both ends of something, the server, which is in the first or the second guest, first.
fn start_both(setup: &VmPair, server: usize, port: u16, both: Both<'_>) -> (Running, Running) {
    let (vms, port) = ([&setup.a, &setup.b], port.to_string());
    let client = 1 - server;
    if !has_file(&setup.b) {
        // The device itself comes and goes with programs, under one name: of the end of one, and so of its contact and buffers, the
        // other's kernel hears after a while.
        until("the kernel knows that the device was gone", || {
            setup.daemon.report().devices.iter().all(|device| device.dmbs == 0).then_some(())
        });
    }
    let mut serving = run(vms[server], both[server].0, &["listen", &port], both[server].1);
    assert_eq!(vms[server].expect(serving.line(DEADLINE)), "listening");
    let words = ["connect", &address(server), &port];
    let connecting = run(vms[client], both[client].0, &words, both[client].1);
    if server == 0 { (serving, connecting) } else { (connecting, serving) }
}

/// Starts both ends of something: AF_SMC's, then the library's.
fn start(setup: &VmPair, server: Server, port: u16, what: &str) -> (Running, Running) {
    start_both(setup, server as usize, port, [("smc", what), ("library", what)])
}

fn result(vm: &Vm, running: Running) -> Value {
    let output = vm.expect(running.wait(DEADLINE));
    let text = output.text();
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error} in {text:?}, {output:?}"))
}

fn exchange(setup: &VmPair, server: Server, port: u16, connections: u64, bytes: u64) {
    let before = smcd(&setup.a);
    let (linux, library) = start(setup, server, port, &format!("exchange {connections} {bytes}"));
    let library = result(&setup.b, library);
    // Who gives up leaves the other one waiting, perhaps.
    assert!(library["error"].is_null(), "{server:?} listens: {library}");
    let linux = result(&setup.a, linux);
    println!("{connections} times {bytes} bytes each way, {server:?} listens: {} s", linux["seconds"]);
    for (said, vm) in [(&library, &setup.b), (&linux, &setup.a)] {
        assert!(said["error"].is_null(), "{server:?} listens: {}: {library} {linux}", vm.name());
    }
    let after = smcd(&setup.a);
    assert_eq!((after.0 - before.0, after.1), (connections, before.1), "{}", shown(&setup.a));
    assert_kernel_is_content(&setup.a);
}

const SERVERS: [Server; 2] = [Server::Linux, Server::Library];

#[test]
fn bytes_go_both_ways_with_the_character_device() {
    let setup = setup();
    for (i, server) in SERVERS.into_iter().enumerate() {
        exchange(&setup, server, 7100 + i as u16, 1, 64 << 20);
        exchange(&setup, server, 7110 + i as u16, 20, 100_000);
    }
    // Small buffers of a kernel share pages with others, and are no program's to map.
    let moved = || setup.daemon.report().devices.iter().map(|device| device.moved_bytes).sum::<u64>();
    setup.a.output(&["dmbridge-guest-setup", "--buffers", "64"]);
    for (i, server) in SERVERS.into_iter().enumerate() {
        let before = moved();
        exchange(&setup, server, 7104 + i as u16, 1, 16 << 20);
        exchange(&setup, server, 7114 + i as u16, 20, 100_000);
        assert!(moved() - before >= 16 << 20);
    }
    setup.a.output(&["dmbridge-guest-setup"]);
}

/// The library has the device for itself as long as this lives.
struct WithoutModule<'a>(&'a VmPair);

impl WithoutModule<'_> {
    fn new(setup: &VmPair) -> WithoutModule<'_> {
        setup.b.shell("rmmod dmbridge");
        WithoutModule(setup)
    }
}

impl Drop for WithoutModule<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        // The library leaves the device to uio_pci_generic.
        self.0.b.shell(&format!(
            "for device in /sys/bus/pci/drivers/uio_pci_generic/0000:*; do
                echo >$device/driver_override
                basename $device >/sys/bus/pci/drivers/uio_pci_generic/unbind
            done
            for device in /sys/bus/pci/devices/*; do
                [ -e $device/driver ] || basename $device >/sys/bus/pci/drivers_probe
            done
            insmod {MODULE}
            until chmod 666 {FILE} 2>/dev/null; do sleep 0.1; done"
        ));
    }
}

#[test]
fn bytes_go_both_ways_with_the_device_itself() {
    let setup = setup();
    let without = WithoutModule::new(&setup);
    for (i, server) in SERVERS.into_iter().enumerate() {
        exchange(&setup, server, 7120 + i as u16, 1, 64 << 20);
        exchange(&setup, server, 7130 + i as u16, 20, 100_000);
    }
    drop(without);
}

/// A connection ended by an error, or by an end, and said so to who wrote.
fn ended(vm: &Vm, running: Running) {
    let said = result(vm, running);
    println!("{}: {said}", vm.name());
    let writing = said["writing"].as_str().expect("words");
    let words = ["reset", "Broken pipe", "connection abort", "broken", "closed"];
    assert!(words.iter().any(|word| writing.contains(word)), "{said}");
}

#[test]
fn who_is_killed_ends_the_other() {
    let setup = setup();
    let without = WithoutModule::new(&setup);
    let both = |port: u16, server: Server, what: &str| {
        let (mut linux, mut library) = start(&setup, server, port, what);
        assert_eq!(setup.a.expect(linux.line(DEADLINE)), "hanging");
        assert_eq!(setup.b.expect(library.line(DEADLINE)), "hanging");
        (linux, library)
    };
    let hang = |port: u16, server: Server| both(port, server, "hang");
    for (i, server) in SERVERS.into_iter().enumerate() {
        let (linux, library) = hang(7140 + i as u16, server);
        setup.a.shell("killall -9 vm-sockets");
        ended(&setup.b, library);
        drop(linux);
        let (linux, library) = hang(7150 + i as u16, server);
        setup.b.shell("killall -9 vm-sockets");
        ended(&setup.a, linux);
        drop(library);
        // The device goes with its program, which who only waits for bytes learns of, too.
        let (linux, library) = both(7155 + i as u16, server, "listen");
        setup.b.shell("killall -9 vm-sockets");
        let said = result(&setup.a, linux);
        println!("{said}");
        assert!(said["reading"].as_str().is_some_and(|words| words.contains("os error")), "{said}");
        drop(library);
        // And nothing is left that is in the way.
        exchange(&setup, server, 7160 + i as u16, 1, 1_000_000);
    }
    drop(without);
}

/// With a device of the program's that stays when the program is killed.
#[test]
fn who_is_killed_ends_the_other_that_only_waits_for_it() {
    let setup = setup();
    setup.a.shell(&format!("chmod 666 {FILE}"));
    let vms = [&setup.a, &setup.b];
    // The survivor waits for bytes, for room as well, or for room only.
    let does = [("listen", "listen"), ("hang", "idle"), ("hang", "finish")];
    let mut port = 7170;
    let mut kill = |families: [&str; 2], server: usize, victim: usize| {
        for (survivor_does, victim_does) in does {
            port += 1;
            let what = |i| (families[i], if i == victim { victim_does } else { survivor_does });
            let both = [what(0), what(1)];
            let (first, second) = start_both(&setup, server, port, both);
            let mut running = [first, second];
            for (vm, running) in vms.iter().zip(&mut running) {
                assert_eq!(vm.expect(running.line(DEADLINE)), "hanging");
            }
            vms[victim].shell("killall -9 vm-sockets");
            let [first, second] = running;
            let survivor = if victim == 0 { second } else { first };
            let said = result(vms[1 - victim], survivor);
            println!("{both:?}, {server} listens, {victim} is killed: {said}");
            // A kernel closes what a program leaves, as TCP does: only who has not read all resets the other.
            let is_end = (families[victim], survivor_does) == ("smc", "listen");
            let [reading, writing] = ["reading", "writing"].map(|what| said[what].as_str().expect("words"));
            assert_eq!(!writing.is_empty(), survivor_does == "hang", "{said}");
            if victim_does == "finish" {
                assert_eq!(reading, "end", "{said}");
                continue;
            }
            // As Linux says it, where who reads gets an end and the reason beside it, and as the library does.
            let is_reset = ["reset by peer", "broken the stream off"].iter().any(|words| {
                // Linux tells of it once.
                reading.contains(words) || reading == "end" && writing.contains(words)
            });
            assert!(if is_end { reading == "end" } else { is_reset }, "{said}");
        }
    };
    for (server, victim) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        kill(["smc", "library"], server, victim);
    }
    kill(["library", "library"], 0, 0);
    kill(["library", "library"], 0, 1);
    // Small buffers of a kernel are no program's to map.
    setup.a.output(&["dmbridge-guest-setup", "--buffers", "64"]);
    for server in [0, 1] {
        kill(["smc", "library"], server, 1);
    }
    setup.a.output(&["dmbridge-guest-setup"]);
    for (i, server) in SERVERS.into_iter().enumerate() {
        exchange(&setup, server, 7210 + i as u16, 1, 1_000_000);
    }
    assert_kernel_is_content(&setup.b);
}
