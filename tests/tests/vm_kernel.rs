//! The kernel module in two guests with Debian's stock kernel: AF_SMC sockets of theirs meet over DMBs.

use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::vm::kernel::{address, assert_kernel_is_content, network, set_up_network, set_up_smc};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Running, Vm, VmOptions};
use serde_json::Value;
use std::time::Duration;

/// How long anything may take: guests are slow without KVM.
const DEADLINE: Duration = Duration::from_secs(300);

/// Bytes of one direction of an exchange; the environment variable says it in MiB.
fn exchange_bytes() -> u64 {
    let mib = std::env::var("DMBRIDGE_VM_EXCHANGE_MIB").ok().and_then(|text| text.parse().ok());
    mib.unwrap_or(1024) << 20
}

const CONFIGURATION: &str = r#"
[[device]]
name = "a"
socket = "@/a.sock"
[[device]]
name = "b"
socket = "@/b.sock"
"#;

struct Setup {
    daemon: TestDaemon,
    a: Vm,
    b: Vm,
}

fn make() -> Setup {
    let daemon = TestDaemon::start_with(&[], CONFIGURATION);
    let start = |number: usize, name: &str| {
        let options = VmOptions::new(name).device(&daemon.path(&format!("{name}.sock")));
        network(options, number, &daemon.path("network")).start()
    };
    let (a, b) = (start(0, "a"), start(1, "b"));
    for (number, vm) in [&a, &b].into_iter().enumerate() {
        vm.wait_until_booted();
        set_up_network(vm, number);
        set_up_smc(vm);
    }
    Setup { daemon, a, b }
}

fn setup() -> Lent<'static, Setup> {
    static SETUP: Shared<Setup> = Shared::new();
    SETUP.take(make)
}

/// What `dmbridge-guest-setup` shows.
fn shown(vm: &Vm) -> Value {
    let text = vm.output(&["dmbridge-guest-setup", "--show", "--json"]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

fn result(vm: &Vm, running: Running) -> Value {
    let output = vm.expect(running.wait(DEADLINE));
    let text = output.text();
    let last = text.lines().last().unwrap_or_default();
    serde_json::from_str(last).unwrap_or_else(|error| panic!("{error} in {text:?}, {output:?}"))
}

/// Runs both ends of something; what they say.
fn both(setup: &Setup, family: &str, port: u16, what: &str) -> (Value, Value) {
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
        // The first writes are moves, until the DMB is attached.
        assert!(counters["mapped_bytes"].as_u64().expect("a number") >= bytes - (4 << 20), "{after}");
        assert_kernel_is_content(vm);
    }
    let report = setup.daemon.report();
    assert!(report.devices.iter().all(|device| device.started && device.map));
}

#[test]
#[ignore = "a measurement: it prints, and checks nothing"]
fn af_smc_beside_tcp() {
    let setup = setup();
    for round in 0..3 {
        for family in ["tcp", "smc"] {
            let port = 7100 + round * 10 + if family == "tcp" { 0 } else { 5 };
            let bytes = if family == "tcp" { 64u64 << 20 } else { 256 << 20 };
            let (server, _) = both(&setup, family, port, &format!("stream {bytes} 65536"));
            let (_, client) = both(&setup, family, port + 1, "echo 2000 14");
            println!(
                "{family}: {:.0} MB/s, {} us",
                bytes as f64 / 1e6 / server["seconds"].as_f64().expect("a number"),
                client["round_trip_ns"].as_u64().expect("a number") / 1000
            );
        }
    }
    for vm in [&setup.a, &setup.b] {
        println!("{}", shown(vm)["devices"][0]["counters"]);
        assert_kernel_is_content(vm);
    }
}
