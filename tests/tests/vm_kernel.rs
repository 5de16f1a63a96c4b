//! The kernel module in two guests with Debian's stock kernel: AF_SMC sockets of theirs meet over DMBs. With
//! `DMBRIDGE_KERNEL=dibs` (`cargo xtask test --dibs`) the same with a kernel in which the device is a dibs device, and SMC
//! writes into the peer's DMB itself.

use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until;
use dmbridge_tests::vm::kernel::{
    MODULE, address, assert_kernel_is_content, is_dibs, network, parameters, set_up_network, set_up_smc,
    shown,
};
use dmbridge_tests::vm::shared::{Lent, Shared, in_lasting_thread};
use dmbridge_tests::vm::{Running, Vm, VmOptions, VmPair};
use serde_json::Value;
use std::time::Duration;

/// How long anything may take: guests are slow without KVM.
const DEADLINE: Duration = Duration::from_secs(300);

/// Bytes of one direction of an exchange; the environment variable says it in MiB.
fn exchange_bytes() -> u64 {
    let mib = std::env::var("DMBRIDGE_VM_EXCHANGE_MIB").ok().and_then(|text| text.parse().ok());
    mib.unwrap_or(1024) << 20
}

fn make() -> VmPair {
    let options = |daemon: &TestDaemon, number, name: &str| {
        network(VmOptions::with_programs(name), number, &daemon.path("network"))
    };
    let pair = VmPair::boot_with(options);
    for (number, vm) in [&pair.a, &pair.b].into_iter().enumerate() {
        set_up_network(vm, number);
        set_up_smc(vm);
    }
    pair
}

/// Loads the module anew.
fn reload(vm: &Vm, parameters: &str) {
    vm.shell(&format!("rmmod dmbridge; insmod {MODULE} {parameters}"));
}

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(make)
}

fn result(vm: &Vm, running: Running) -> Value {
    let output = vm.expect(running.wait(DEADLINE));
    let text = output.text();
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error} in {text:?}, {output:?}"))
}

/// Runs both ends of something; what they say.
fn both(setup: &VmPair, family: &str, port: u16, what: &str) -> (Value, Value) {
    let words = |start: &[&str]| -> Vec<String> {
        ["vm-sockets", family].iter().chain(start).copied().chain(what.split(' ')).map(String::from).collect()
    };
    let start =
        |vm: &Vm, words: Vec<String>| vm.start_command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let port = port.to_string();
    let mut server = start(&setup.a, words(&["listen", &port]));
    assert_eq!(setup.a.expect(server.line(DEADLINE)), "listening");
    let client = start(&setup.b, words(&["connect", &address(0), &port]));
    let client = result(&setup.b, client);
    let server = result(&setup.a, server);
    for (said, vm) in [(&client, &setup.b), (&server, &setup.a)] {
        assert!(said["error"].is_null(), "VM {}: {said}\n{}", vm.name(), vm.shell("dmesg | tail -n 30"));
    }
    (server, client)
}

/// SMC-D connections and bytes of a guest, and its fallbacks.
fn smcd(state: &Value) -> (u64, u64, u64) {
    let smcd = &state["statistics"]["smcd"];
    let of = |name: &str| smcd[name].as_u64().expect("a number");
    let fallbacks = state["statistics"]["fallbacks"].as_array().expect("a list");
    let fallbacks = fallbacks.iter().map(|fallback| fallback["count"].as_u64().expect("a number")).sum();
    (of("client_v2") + of("server_v2"), of("sent") + of("received"), fallbacks)
}

#[test]
fn af_smc_sockets_of_two_guests_exchange_by_map_and_nothing_falls_back() {
    let setup = setup();
    let bytes = exchange_bytes();
    let before = (shown(&setup.a), shown(&setup.b));
    let moved_before = setup.moved_bytes();
    let (server, client) = both(&setup, "smc", 7001, &format!("exchange 1 {bytes}"));
    println!("{bytes} bytes each way in {} s, {} s", server["seconds"], client["seconds"]);
    for (vm, before) in [(&setup.a, &before.0), (&setup.b, &before.1)] {
        let after = shown(vm);
        println!("{}: {}", vm.name(), after["devices"][0]["counters"]);
        let (before, now) = (smcd(before), smcd(&after));
        assert_eq!(now.0 - before.0, 1, "{after}");
        assert!(now.1 - before.1 >= 2 * bytes, "{after}");
        assert_eq!(now.2, before.2, "{after}");
        let counters = &after["devices"][0]["counters"];
        let count = |name: &str| counters[name].as_u64().expect("a number");
        if is_dibs() {
            // SMC writes the data; the driver writes cursors, and nothing is moved.
            assert!(count("attached") >= 1 && count("mapped_bytes") < bytes / 64, "{after}");
            assert_eq!(count("moved_bytes"), 0, "{after}");
        } else {
            // The first writes are moves, until the DMB is attached.
            assert!(count("mapped_bytes") >= bytes - (4 << 20), "{after}");
        }
        assert_kernel_is_content(vm);
    }
    let report = setup.daemon.report();
    assert!(report.devices.iter().all(|device| device.started && device.map));
    assert!(!is_dibs() || setup.moved_bytes() == moved_before);
}

/// Both ends of a connection that has no end; when this returns, bytes go both ways.
fn endless(setup: &VmPair, port: u16) -> (Running, Running) {
    let port = port.to_string();
    let mut server = setup.a.start_command(&["vm-sockets", "smc", "listen", &port, "hang"]);
    assert_eq!(setup.a.expect(server.line(DEADLINE)), "listening");
    let mut client = setup.b.start_command(&["vm-sockets", "smc", "connect", &address(0), &port, "hang"]);
    assert_eq!(setup.b.expect(client.line(DEADLINE)), "hanging");
    assert_eq!(setup.a.expect(server.line(DEADLINE)), "hanging");
    (server, client)
}

/// A connection ended by an error, and said so to who wrote.
fn ended(vm: &Vm, running: Running) {
    let said = result(vm, running);
    println!("{}: {said}", vm.name());
    let writing = said["writing"].as_str().expect("words");
    // What SMC says of a connection whose device is gone.
    let words = ["reset", "Broken pipe", "connection abort"];
    assert!(words.iter().any(|word| writing.contains(word)), "{said}");
}

fn works(setup: &VmPair, port: u16) {
    let before = smcd(&shown(&setup.b));
    both(setup, "smc", port, "exchange 1 1000000");
    let after = smcd(&shown(&setup.b));
    assert_eq!((after.0 - before.0, after.2), (1, before.2));
}

#[test]
fn guests_that_cannot_map_move() {
    let setup = setup();
    for (port, parameters) in [(7010, ["map=0", "map=0"]), (7011, ["", "map=0"])] {
        for (vm, parameters) in [&setup.a, &setup.b].into_iter().zip(parameters) {
            reload(vm, parameters);
        }
        let bytes = exchange_bytes() / 16;
        let before = (smcd(&shown(&setup.a)), setup.moved_bytes());
        let (server, _) = both(&setup, "smc", port, &format!("exchange 2 {bytes}"));
        println!("{bytes} bytes twice each way in {} s by moves", server["seconds"]);
        let after = smcd(&shown(&setup.a));
        assert_eq!((after.0 - before.0.0, after.2), (2, before.0.2));
        assert!(setup.moved_bytes() - before.1 >= 4 * bytes);
    }
    for vm in [&setup.a, &setup.b] {
        reload(vm, parameters());
        assert_kernel_is_content(vm);
    }
    works(&setup, 7012);
}

#[test]
fn an_smc_that_writes_into_dmbs_itself_does_not_accept_a_guest_that_cannot_map() {
    if !is_dibs() {
        return;
    }
    let setup = setup();
    reload(&setup.b, "map=0");
    let before = smcd(&shown(&setup.b));
    both(&setup, "smc", 7015, "exchange 1 1000000");
    let after = smcd(&shown(&setup.b));
    assert_eq!((after.0, after.2), (before.0, before.2 + 1));
    reload(&setup.b, parameters());
    works(&setup, 7016);
}

#[test]
fn a_peer_that_is_gone_leaves_no_dmb_behind() {
    let setup = setup();
    let dmbs = || setup.daemon.report().devices.iter().find(|device| device.name == "a").map(|a| a.dmbs);
    works(&setup, 7070);
    assert_ne!(dmbs(), Some(0), "SMC keeps them for later connections");
    reload(&setup.b, parameters());
    until("SMC has given them back", || (dmbs() == Some(0)).then_some(()));
    works(&setup, 7071);
    assert_kernel_is_content(&setup.a);
}

#[test]
fn a_hundred_connections_are_told_apart() {
    let setup = setup();
    for vm in [&setup.a, &setup.b] {
        // They take more mappings than QEMU has, so some move; which SMC does not do if it writes itself.
        reload(vm, "");
        vm.output(&["dmbridge-guest-setup", "--module", MODULE, "--buffers", "64"]);
    }
    let before = smcd(&shown(&setup.a));
    both(&setup, "smc", 7020, "exchange 100 200000");
    let state = shown(&setup.a);
    let after = smcd(&state);
    assert_eq!((after.0 - before.0, after.2), (100, before.2), "{state}");
    for vm in [&setup.a, &setup.b] {
        reload(vm, parameters());
        vm.output(&["dmbridge-guest-setup", "--module", MODULE]);
        assert_kernel_is_content(vm);
    }
}

#[test]
fn a_module_that_is_unloaded_in_traffic_ends_its_connections_and_can_come_back() {
    let setup = setup();
    let (server, client) = endless(&setup, 7030);
    reload(&setup.b, parameters());
    ended(&setup.b, client);
    ended(&setup.a, server);
    works(&setup, 7031);
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

#[test]
fn connections_of_a_guest_that_is_paused_go_on() {
    let mut setup = setup();
    let what = ["exchange", "1", "200000000"];
    let mut server = setup.a.start_command(&[&["vm-sockets", "smc", "listen", "7035"][..], &what].concat());
    assert_eq!(setup.a.expect(server.line(DEADLINE)), "listening");
    let client =
        setup.b.start_command(&[&["vm-sockets", "smc", "connect", &address(0), "7035"][..], &what].concat());
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        setup.a.pause();
        std::thread::sleep(Duration::from_millis(300));
        setup.b.pause();
        setup.a.resume();
        setup.b.resume();
    }
    for (vm, running) in [(&setup.b, client), (&setup.a, server)] {
        let said = result(vm, running);
        assert!(said["error"].is_null(), "{said}");
        assert_kernel_is_content(vm);
    }
    assert!(setup.daemon.log().contains("goes on"), "no device was paused");
}

#[test]
fn a_device_that_is_unplugged_in_traffic_ends_its_connections_and_can_come_back() {
    let mut setup = setup();
    let (server, client) = endless(&setup, 7060);
    setup.b.unplug(0);
    ended(&setup.b, client);
    ended(&setup.a, server);
    let socket = setup.daemon.path("b.sock");
    setup.b.plug(0, &socket);
    setup.b.shell("until ls -d /sys/bus/virtio/drivers/dmbridge/virtio* 2>/dev/null; do sleep 0.1; done");
    works(&setup, 7061);
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

#[test]
fn a_guest_that_is_killed_in_traffic_ends_its_peers_connections() {
    let mut setup = setup();
    let (server, client) = endless(&setup, 7040);
    setup.b.kill();
    drop(client);
    ended(&setup.a, server);
    assert_kernel_is_content(&setup.a);
    let (socket, net) = (setup.daemon.path("b.sock"), setup.daemon.path("network"));
    setup.b =
        in_lasting_thread(move || network(VmOptions::with_programs("b").device(&socket), 1, &net).boot());
    set_up_network(&setup.b, 1);
    set_up_smc(&setup.b);
    works(&setup, 7041);
}

#[test]
fn a_daemon_that_dies_in_traffic_ends_connections_and_new_ones_are_tcp() {
    let mut setup = in_lasting_thread(make);
    let (server, client) = endless(&setup, 7050);
    setup.daemon.kill();
    ended(&setup.a, server);
    ended(&setup.b, client);
    let before = smcd(&shown(&setup.b));
    both(&setup, "smc", 7051, "exchange 1 1000000");
    let after = smcd(&shown(&setup.b));
    assert_eq!(after.0, before.0);
    for vm in [&setup.a, &setup.b] {
        assert_eq!(shown(vm)["devices"][0]["mode"], "broken");
        // It can still be let go.
        vm.shell("rmmod dmbridge");
        assert_kernel_is_content(vm);
    }
}

/// Runs a program of others in a guest, its sockets AF_SMC ones, and leaves it running.
fn start_program(vm: &Vm, words: &str) -> Running {
    vm.start_command(&["sh", "-ec", &format!("exec dmbridge-run --af-smc /opt/debian/bin/{words}")])
}

/// Runs one that ends well; what it says.
fn program(vm: &Vm, words: &str) -> String {
    let output = vm.expect(start_program(vm, words).wait(DEADLINE));
    let (text, error) = (output.text(), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "VM {}: {words}: {}\n{text}\n{error}", vm.name(), output.status);
    text
}

/// Waits until a program in the first guest accepts connections.
fn wait_for_port(setup: &VmPair, port: u16) {
    let words = format!("until netstat -ltn | grep -q ':{port} '; do sleep 0.1; done");
    setup.a.shell(&words);
}

/// Fails unless all connections since `before` were SMC-D, and carried so many bytes.
fn all_smcd(setup: &VmPair, before: &Value, connections: u64, bytes: u64) {
    let after = shown(&setup.b);
    let (before, now) = (smcd(before), smcd(&after));
    assert!(now.0 - before.0 >= connections && now.1 - before.1 >= bytes && now.2 == before.2, "{after}");
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

#[test]
fn iperf3_runs_unchanged() {
    let setup = setup();
    let server = address(0);
    for how in ["", "-R", "-P 4"] {
        let before = shown(&setup.b);
        let running = start_program(&setup.a, "iperf3 -s -1 -p 5201");
        wait_for_port(&setup, 5201);
        let text = program(&setup.b, &format!("iperf3 -c {server} -p 5201 -n 64M {how} -J"));
        let said: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"));
        let received = &said["end"]["sum_received"];
        println!("iperf3 {how}: {} bit/s", received["bits_per_second"]);
        all_smcd(&setup, &before, 2, received["bytes"].as_u64().expect("a number"));
        drop(running);
    }
}

#[test]
fn sockperf_runs_unchanged() {
    let setup = setup();
    let server = address(0);
    let before = shown(&setup.b);
    let running = start_program(&setup.a, &format!("sockperf server --tcp -i {server} -p 5202"));
    wait_for_port(&setup, 5202);
    let text = program(&setup.b, &format!("sockperf ping-pong --tcp -i {server} -p 5202 -m 14 -t 3"));
    println!("{}", text.lines().find(|line| line.contains("Latency is")).unwrap_or_default());
    assert!(text.contains("Latency is"), "{text}");
    all_smcd(&setup, &before, 1, 1000);
    drop(running);
}

#[test]
fn nginx_and_curl_run_unchanged() {
    let setup = setup();
    let server = address(0);
    setup.a.shell(
        "mkdir -p /tmp/www /tmp/nginx/logs; seq 1 1000000 >/tmp/www/numbers
        cat >/tmp/nginx/conf <<END
daemon off; pid /tmp/nginx/pid; error_log stderr; user root;
events { }
http {
    access_log off; sendfile on; keepalive_requests 10000;
    client_body_temp_path /tmp/nginx/a; proxy_temp_path /tmp/nginx/b; fastcgi_temp_path /tmp/nginx/c;
    uwsgi_temp_path /tmp/nginx/d; scgi_temp_path /tmp/nginx/e;
    server { listen 5203; root /tmp/www; }
}
END",
    );
    let before = shown(&setup.b);
    let running = start_program(&setup.a, "nginx -p /tmp/nginx -c /tmp/nginx/conf");
    wait_for_port(&setup, 5203);
    let url = format!("http://{server}:5203/numbers");
    let sum = setup.a.shell("md5sum </tmp/www/numbers");
    for _ in 0..3 {
        program(&setup.b, &format!("curl -sS -o /tmp/numbers {url}"));
        assert_eq!(setup.b.shell("md5sum </tmp/numbers; rm /tmp/numbers"), sum);
    }
    // Many requests on one connection.
    let urls = vec![format!("-o /dev/null {url}-no"); 50].join(" ");
    let codes = program(&setup.b, &format!("curl -sS -w '%{{http_code}} %{{num_connects}}\\n' {urls}"));
    assert_eq!(codes.lines().filter(|line| *line == "404 0").count(), 49, "{codes}");
    all_smcd(&setup, &before, 4, 3 * 6_888_896);
    drop(running);
}

#[test]
fn redis_runs_unchanged() {
    let setup = setup();
    let server = address(0);
    let before = shown(&setup.b);
    let running = start_program(
        &setup.a,
        "redis-server --port 5204 --protected-mode no --save '' --dir /tmp --daemonize no",
    );
    wait_for_port(&setup, 5204);
    let client = format!("redis-cli -h {server} -p 5204");
    assert_eq!(program(&setup.b, &format!("{client} set key value")), "OK\n");
    assert_eq!(program(&setup.b, &format!("{client} get key")), "value\n");
    let text = program(
        &setup.b,
        &format!("redis-benchmark -h {server} -p 5204 -t get,set -n 2000 -c 20 -d 1000 --csv"),
    );
    println!("{text}");
    assert_eq!(text.lines().count(), 3, "{text}");
    all_smcd(&setup, &before, 22, 2_000_000);
    drop(running);
}
