//! `dmbridge-run` between two guests with Debian's stock kernel and the kernel module: unchanged programs, over TCP by virtio-net
//! at first, do the same with and without it, and with it their bytes go through DMBs.

use dmbridge_tests::deadline::until;
use dmbridge_tests::namespaces::joined_to_guest;
use dmbridge_tests::preload::{self, Ran, runner};
use dmbridge_tests::vm::image::provisioned;
use dmbridge_tests::vm::kernel::{
    MODULE, address, assert_kernel_is_content, module, network, set_up_network,
};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Running, Vm, VmOptions, VmPair};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// How long anything may take: guests are slow without KVM.
const DEADLINE: Duration = Duration::from_secs(300);
/// Addresses of the host and of a guest on a network of theirs, and what the guest's hardware address there starts with.
const HOST: [&str; 2] = ["10.78.0.1", "10.78.0.2"];
const HOST_NETWORK: &str = "52:54:00:78";

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    let setup = SETUP.take(|| {
        let pair = VmPair::boot_with(|daemon, number, name| {
            let options = network(VmOptions::with_programs(name), number, &daemon.path("network"));
            let host = daemon.path(&format!("host-{name}")).display().to_string();
            options
                .qemu("-netdev", &format!("stream,id=host,reconnect-ms=100,addr.type=unix,addr.path={host}"))
                .qemu("-device", &format!("virtio-net-pci,netdev=host,mac={HOST_NETWORK}:00:01,romfile="))
        });
        for (number, vm) in [&pair.a, &pair.b].into_iter().enumerate() {
            set_up_network(vm, number);
            let push = |file: &Path, to: &str| vm.push(&fs::read(file).expect("a file"), to);
            push(module(), MODULE);
            push(runner(), "/usr/bin/dmbridge-run");
            push(&runner().with_file_name("libdmbridge_preload.so"), "/usr/lib/libdmbridge_preload.so");
            // By what a kernel says who is at the other end of a connection inside it.
            let modules = Path::new(provisioned("KERNEL_MODULES")).join("kernel/net/ipv4");
            for name in ["inet_diag", "tcp_diag"] {
                push(&modules.join(name).with_extension("ko"), &format!("/lib/{name}.ko"));
                vm.shell(&format!("insmod /lib/{name}.ko"));
            }
            vm.shell("modprobe smc");
        }
        pair
    });
    // A virtual machine has few mappings, and what other tests have left takes some.
    for vm in [&setup.a, &setup.b] {
        load_module(vm, "");
    }
    setup
}

/// Loads the kernel module, anew if it is there.
fn load_module(vm: &Vm, parameters: &str) {
    // What the udev rule does for a group is done for all here.
    vm.shell(&format!(
        "while grep -q ^dmbridge /proc/modules; do rmmod dmbridge 2>/dev/null || sleep 0.1; done
        insmod {MODULE} {parameters}; chmod 666 /dev/dmbridge0"
    ));
}

/// How programs are run.
#[derive(Clone, Copy)]
enum Way {
    /// As they are.
    Plain,
    /// By `dmbridge-run`.
    Dmbridge,
    /// By `dmbridge-run` with a device that is named, by a user without privileges.
    AsNobody,
}

impl Way {
    fn start(self, vm: &Vm, words: &str) -> Running {
        let program = format!("/opt/debian/bin/{words}");
        let device = if matches!(self, Way::AsNobody) { "--device /dev/dmbridge0" } else { "" };
        let run = format!("exec dmbridge-run --network guests {device} --stats -- {program}");
        match self {
            Way::Plain => vm.start_command(&["sh", "-c", &format!("exec {program}")]),
            Way::Dmbridge => vm.start_command(&["sh", "-c", &run]),
            Way::AsNobody => vm.start_command(&["su", "-s", "/bin/sh", "nobody", "-c", &run]),
        }
    }

    /// Runs a program that ends well; what it says.
    fn run(self, vm: &Vm, words: &str) -> Ran {
        finish(vm, words, self.start(vm, words))
    }

    /// Starts a server, and waits until it accepts connections at this port.
    fn serve(self, vm: &Vm, words: &str, port: u16) -> Running {
        let running = self.start(vm, words);
        wait_for_port(vm, port);
        running
    }
}

/// Waits until a program in a guest accepts connections.
fn wait_for_port(vm: &Vm, port: u16) {
    vm.shell(&format!("until netstat -ltn | grep -q ':{port} '; do sleep 0.1; done"));
}

/// Waits until a program ends, which it has to do well; what it says.
fn finish(vm: &Vm, words: &str, running: Running) -> Ran {
    let output = vm.expect(running.wait(DEADLINE));
    let ran = Ran { out: output.text(), err: String::from_utf8_lossy(&output.stderr).into_owned() };
    assert!(
        output.status.success(),
        "VM {}: {words}: {}\n{}\n{}\n{}",
        vm.name(),
        output.status,
        ran.out,
        ran.err,
        vm.shell("dmesg | tail -n 30")
    );
    ran
}

/// Has iperf3 of one guest send to or fetch from another one; how much that was, and what both said.
fn iperf3(server: &Vm, client: &Vm, to: &str, port: u16, how: &str, way: Way) -> (u64, [Ran; 2]) {
    let words = format!("iperf3 -s -1 -p {port}");
    let serving = way.serve(server, &words, port);
    let sent = way.run(client, &format!("iperf3 -c {to} -p {port} -J {how}"));
    let said: Value =
        serde_json::from_str(&sent.out).unwrap_or_else(|error| panic!("{error} in {}", sent.out));
    assert!(said["error"].is_null(), "{said}");
    // At the end, some of it may still be under way.
    let end = &said["end"];
    let received_by = finish(server, &words, serving);
    let moved = [sent.moved(), received_by.moved()];
    println!("iperf3 {how}: {} bit/s, through DMBs {moved:?}", end["sum_received"]["bits_per_second"]);
    (end["sum_sent"]["bytes"].as_u64().expect("a number"), [sent, received_by])
}

#[test]
fn iperf3_runs_unchanged() {
    let setup = setup();
    let before = setup.moved_bytes();
    for how in ["", "-P 4", "-R"] {
        // By DMBs so much that the beginning, which goes over TCP, is a small part.
        for (way, bytes) in [(Way::Plain, 32 << 20), (Way::Dmbridge, 256 << 20)] {
            let (done, ran) =
                iperf3(&setup.a, &setup.b, &address(0), 5301, &format!("{how} -n {bytes}"), way);
            assert!(done >= bytes, "{done}");
            let is_plain = matches!(way, Way::Plain);
            for ran in ran {
                let moved = ran.moved();
                assert!(if is_plain { moved == 0 } else { moved >= bytes / 4 }, "{how}:\n{}", ran.err);
            }
        }
    }
    assert_eq!(setup.moved_bytes(), before);
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

#[test]
fn redis_runs_unchanged() {
    let setup = setup();
    let (server, port) = (address(0), 5302);
    let results = [Way::Plain, Way::Dmbridge].map(|way| {
        let words =
            format!("redis-server --port {port} --protected-mode no --save '' --dir /tmp --daemonize no");
        let serving = way.serve(&setup.a, &words, port);
        let client = |words: &str| way.run(&setup.b, &words.replace('@', &format!("-h {server} -p {port}")));
        let mut said = vec![client("redis-cli @ set key value").out, client("redis-cli @ get key").out];
        let mut moved = 0;
        // The first is one connection that lasts: it has moved long before it ends. Of many that are short, few may.
        for how in ["-n 10000 -c 1", "-n 2000 -c 20", "-n 2000 -P 16", "-n 2000 -d 20000"] {
            let ran = client(&format!("redis-benchmark @ -t get,set --csv {how}"));
            moved += ran.moved();
            println!("redis-benchmark {how}: {}", ran.out);
            said.extend(ran.out.lines().filter_map(|line| line.split(',').next()).map(String::from));
        }
        said.push(client("redis-cli @ strlen key:__rand_int__").out);
        client("redis-cli @ shutdown nosave");
        let ended = finish(&setup.a, &words, serving);
        (said, moved + ended.moved())
    });
    let [(plain, nothing), (said, moved)] = results;
    assert_eq!(said, plain);
    assert!(nothing == 0 && moved > 200_000, "{moved} bytes went through DMBs");
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

/// Has iperf3 of the second guest send to the first one, or fetch from it, for ever. When this returns, bytes go through DMBs.
fn endless(setup: &VmPair, port: u16, how: &str) -> (Running, Running) {
    let run = |vm: &Vm, words: &str| {
        let words = format!("exec dmbridge-run --network guests /opt/debian/bin/iperf3 -p {port} {words}");
        vm.start_command(&["sh", "-c", &words])
    };
    let signals = || {
        let devices = setup.daemon.report().devices;
        devices.iter().map(|device| device.signals_sent + device.signals_suppressed).sum::<u64>()
    };
    let serving = run(&setup.a, "-s -1");
    wait_for_port(&setup.a, port);
    let sending = run(&setup.b, &format!("-c {} -t 80000 {how}", address(0)));
    let before = signals();
    until("bytes go through DMBs", || (signals() > before + 100).then_some(()));
    (serving, sending)
}

#[test]
fn the_daemon_shows_what_programs_of_guests_do() {
    let setup = setup();
    let (serving, sending) = endless(&setup, 5303, "");
    until("each guest has a DMB of its own and one of the other", || {
        let devices = setup.daemon.report().devices;
        (devices.len() == 2 && devices.iter().all(|device| device.dmbs >= 1 && device.attached >= 1))
            .then_some(())
    });
    // As one is killed, it says nothing; the other learns of it.
    setup.b.expect(sending.signal(Signal::SIGKILL));
    setup.b.expect(sending.wait(DEADLINE));
    let ended = setup.a.expect(serving.wait(DEADLINE));
    assert!(ended.status.code().is_some(), "{}", ended.status);
    until("nothing stays of them", || {
        let devices = setup.daemon.report().devices;
        devices.iter().all(|device| device.dmbs == 0 && device.attached == 0).then_some(())
    });
    assert_kernel_is_content(&setup.a);
}

#[test]
fn programs_of_several_users_share_a_guests_device_and_meet_inside_it_too() {
    let setup = setup();
    let (a, b) = (&setup.a, &setup.b);
    let how = format!("-n {}", 128 << 20);
    let (here, there) = (address(0), address(1));
    let runs = [
        (a, b, here.as_str(), 5311, Way::Dmbridge),
        (b, a, there.as_str(), 5312, Way::AsNobody),
        (a, a, "127.0.0.1", 5313, Way::Dmbridge),
        (b, b, "127.0.0.1", 5313, Way::AsNobody),
    ];
    std::thread::scope(|scope| {
        let threads = runs.map(|(server, client, to, port, way)| {
            let how = &how;
            scope.spawn(move || iperf3(server, client, to, port, how, way))
        });
        for thread in threads {
            let (bytes, ran) = thread.join().expect("iperf3 ends well");
            for ran in ran {
                assert!(ran.moved() >= bytes / 4, "{}", ran.err);
            }
        }
    });
    assert_kernel_is_content(a);
    assert_kernel_is_content(b);
}

#[test]
fn guests_that_cannot_map_stay_with_tcp_and_say_so() {
    let setup = setup();
    load_module(&setup.b, "map=0");
    let how = format!("-n {}", 192 << 20);
    let (_, ran) = iperf3(&setup.a, &setup.b, &address(0), 5321, &how, Way::Dmbridge);
    let [client, server] = ran;
    assert_eq!((client.moved(), server.moved()), (0, 0));
    let why =
        ["one of the two ends cannot map memory of the other", "the other end could not, and counts why"];
    assert!(client.counter(why[0]) > 0, "{}", client.err);
    assert!(why.iter().any(|why| server.counter(why) > 0), "{}", server.err);
}

#[test]
fn a_program_of_the_host_and_one_of_a_guest_meet() {
    let setup = setup();
    let namespace = joined_to_guest(HOST[0], &setup.daemon.path("host-a"));
    setup.a.shell(&format!(
        "device=$(cd /sys/class/net; grep -l ^{HOST_NETWORK} */address); device=${{device%/address}}
        ip addr add {}/24 dev $device; ip link set $device up
        until ping -c 1 -W 1 {} >/dev/null; do :; done",
        HOST[1], HOST[0]
    ));
    let way = preload::Way::Within(&setup.daemon, &namespace, "guests");
    for how in ["", "-R"] {
        let mut server = way.serve("iperf3", &["-s", "-1", "-p", "5331"], 5331);
        let words = format!("iperf3 -c {} -p 5331 -n {} {how}", HOST[0], 128 << 20);
        for ran in [Way::Dmbridge.run(&setup.a, &words), server.finish()] {
            assert!(ran.moved() >= 32 << 20, "{how}: {}", ran.err);
        }
    }
    assert_kernel_is_content(&setup.a);
}

#[test]
fn a_device_that_is_taken_away_ends_connections_and_no_program() {
    let setup = setup();
    let name = setup.b.shell("cd /sys/bus/virtio/drivers/dmbridge; echo virtio*");
    let tell =
        |what: &str| setup.b.shell(&format!("echo {} >/sys/bus/virtio/drivers/dmbridge/{what}", name.trim()));
    for (port, how) in [(5341, ""), (5342, "-R")] {
        let (serving, sending) = endless(&setup, port, how);
        tell("unbind");
        let ended = setup.b.expect(sending.wait(DEADLINE));
        let said = format!("{}{}", ended.text(), String::from_utf8_lossy(&ended.stderr));
        assert!(ended.status.code() == Some(1) && said.contains("reset by peer"), "{}: {said}", ended.status);
        let ended = setup.a.expect(serving.wait(DEADLINE));
        assert!(ended.status.code().is_some(), "{}", ended.status);
        tell("bind");
        setup.b.shell("chmod 666 /dev/dmbridge0");
    }
    let (_, ran) = iperf3(&setup.a, &setup.b, &address(0), 5343, &format!("-n {}", 128 << 20), Way::Dmbridge);
    assert!(ran[0].moved() > 0, "{}", ran[0].err);
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}
