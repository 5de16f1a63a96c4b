//! A guest with two NUMA nodes, in which the daemon and its clients are processes: pages of DMBs lie where the placement
//! says, as the guest's kernel tells (`/proc/PID/numa_maps`) and as the daemon reports.
//!
//! The daemon runs on node 0. Who touches a page first decides nothing: that would be node 0 in most of these cases.

use dmbridge_tests::daemon::program;
use dmbridge_tests::deadline::{until, until_equal};
use dmbridge_tests::vm::image::{image, provisioned, script};
use dmbridge_tests::vm::shared::{Lent, Shared, remove_at_exit};
use dmbridge_tests::vm::{Driven, Running, Vm, VmOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

const CONFIGURATION: &str = r#"
[daemon]
control = "/tmp/control.sock"
[limits]
window_size = "64M"
max_dmb_size = "16M"
[[device]]
name = "sender"
socket = "/tmp/sender.sock"
placement = "sender"
[[device]]
name = "interleave"
socket = "/tmp/interleave.sock"
placement = "interleave"
[[device]]
name = "fixed"
socket = "/tmp/fixed.sock"
placement = 1
[[device]]
name = "configured"
socket = "/tmp/configured.sock"
node = 1
[hub]
socket = "/tmp/hub.sock"
[[hub.rule]]
group = "default"
"#;
const HUB: &str = "/tmp/hub.sock";
/// Of another daemon, which may use all CPUs and leaves large moves to workers.
const ENGINES: &str = r#"
[daemon]
control = "/tmp/engines.sock"
[limits]
window_size = "64M"
max_dmb_size = "16M"
[hub]
socket = "/tmp/engines-hub.sock"
[[hub.rule]]
group = "default"
[[engines.rule]]
at_least = "64K"
engine = "cpu-node"
"#;
/// Bytes of each DMB, and pages.
const SIZE: u64 = 1 << 20;
const PAGES: u64 = SIZE / 4096;

/// Pages by node.
type Pages = BTreeMap<u64, u64>;

struct Setup {
    vm: Vm,
    /// The daemon. It ends with this.
    _daemon: Running,
}

fn setup() -> Lent<'static, Setup> {
    static SETUP: Shared<Setup> = Shared::new();
    SETUP.take(|| {
        let image = image_with_daemon();
        let options = VmOptions::new("numa").option("--initrd", image.to_str().expect("a plain path"));
        let vm = options.option("--memory", "1024M").option("--cpus", "2").option("--nodes", "2").boot();
        vm.push(CONFIGURATION.as_bytes(), "/tmp/dmbridged.toml");
        let command = ["taskset", "1", "dmbridged", "--config", "/tmp/dmbridged.toml"];
        let daemon = vm.start_command(&command);
        until("the daemon makes its control socket", || {
            vm.run(&["test", "-S", "/tmp/control.sock"]).status.success().then_some(())
        });
        Setup { vm, _daemon: daemon }
    })
}

/// The usual image with the daemon on top: an initramfs may be several archives one after the other.
fn image_with_daemon() -> PathBuf {
    let image = image();
    let with_daemon = image.with_extension("daemon.cpio");
    remove_at_exit(&with_daemon);
    let status = Command::new(script("guest-image"))
        .env("INITRAMFS", image)
        .env("BUSYBOX", provisioned("BUSYBOX"))
        .args([&with_daemon, program()])
        .status()
        .expect("qemu-scripts/guest-image can be run");
    assert!(status.success(), "qemu-scripts/guest-image failed; what it printed says why");
    with_daemon
}

/// Two devices, of which the first one owns a DMB that is full.
struct Pair {
    owner: Driven,
    _peer: Driven,
}

impl Pair {
    /// Each is a process on a CPU; the CPUs have the numbers of their nodes.
    fn new(vm: &Vm, (owner_cpu, owner_socket): (u32, &str), peer_cpu: u32) -> Pair {
        let mut owner = Driven::inside(vm, owner_cpu, owner_socket);
        let mut peer = Driven::inside(vm, peer_cpu, HUB);
        // What tests before this one have left goes away.
        until_equal("extents", &0, || report(&mut owner)["extents"].as_array().expect("a list").len());
        // It fills every page: chunks are half of a DMB.
        owner.exchange(&mut peer, ["attach"; 2], SIZE, SIZE);
        Pair { owner, _peer: peer }
    }

    /// What the daemon reports of the extent with the DMB.
    fn extent(&mut self) -> Value {
        let report = report(&mut self.owner);
        let extents = report["extents"].as_array().expect("a list");
        let mine = extents.iter().filter(|extent| extent["owner"] == self.owner.gid());
        let mine: Vec<_> = mine.collect();
        assert_eq!(mine.len(), 1, "{report}");
        println!("{}", mine[0]);
        mine[0].clone()
    }
}

/// What the daemon reports of a device.
fn device(driven: &mut Driven) -> Value {
    let report = report(driven);
    let mut devices = report["devices"].as_array().expect("a list").iter();
    devices.find(|device| device["gid"] == driven.gid()).expect("it is there").clone()
}

fn report(driven: &mut Driven) -> Value {
    driven.ask("get /tmp/control.sock /v1/report")
}

fn reported_pages(extent: &Value) -> Pages {
    let pages = extent["pages"].as_array().expect("a list").iter();
    pages.map(|p| (p["node"].as_u64().expect("a node"), p["pages"].as_u64().expect("a number"))).collect()
}

/// Policies and pages of extents, as all processes of the guest have them mapped that run this program.
fn mapped_pages(vm: &Vm, program: &str) -> Vec<(String, Pages)> {
    let text = vm.shell(&format!("for p in $(pidof {program}); do cat /proc/$p/numa_maps; done"));
    let extents = text.lines().filter(|line| line.contains("dmbridge-extent"));
    let extents = extents.map(|line| {
        println!("{program}: {line}");
        let words = line.split(' ').filter_map(|word| word.strip_prefix('N')?.split_once('='));
        let pages = words.map(|(node, pages)| (node.parse().unwrap(), pages.parse().unwrap()));
        (line.split(' ').nth(1).expect("a policy").to_string(), pages.collect())
    });
    extents.collect()
}

/// The extents are where their policies say, in the daemon's mappings and in the clients'. How many extents of each
/// policy there are.
fn assert_everything_is_in_place(vm: &Vm) -> BTreeMap<String, usize> {
    for (policy, pages) in mapped_pages(vm, "dmbridged").into_iter().chain(mapped_pages(vm, "vm-guest")) {
        match policy.as_str() {
            "prefer:0" => assert!(pages.keys().all(|node| *node == 0), "{pages:?}"),
            "prefer:1" => assert!(pages.keys().all(|node| *node == 1), "{pages:?}"),
            "interleave:0-1" => assert_halves(&pages),
            other => panic!("{other}: {pages:?}"),
        }
    }
    let mut policies = BTreeMap::new();
    for (policy, _) in mapped_pages(vm, "dmbridged") {
        *policies.entry(policy).or_default() += 1;
    }
    policies
}

fn assert_halves(pages: &Pages) {
    let of = |node| pages.get(&node).copied().unwrap_or(0);
    // Lines and DMB are two runs of pages, and a process may have mapped a part of one.
    assert!(of(0).abs_diff(of(1)) <= 4, "{pages:?}");
}

fn policies(expected: &[(&str, usize)]) -> BTreeMap<String, usize> {
    expected.iter().map(|(policy, count)| (policy.to_string(), *count)).collect()
}

#[test]
fn the_daemon_knows_the_nodes() {
    let setup = setup();
    let mut client = Driven::inside(&setup.vm, 0, HUB);
    let nodes = report(&mut client)["topology"]["nodes"].clone();
    let of = |field: &str| [nodes[0][field].clone(), nodes[1][field].clone()];
    assert_eq!(of("id"), [json!(0), json!(1)]);
    assert_eq!(of("cpus"), [json!("0"), json!("1")]);
    assert_eq!(of("distances"), [json!([10, 20]), json!([20, 10])]);
}

#[test]
fn by_default_pages_lie_on_the_node_of_who_reads_them() {
    let setup = setup();
    let mut pair = Pair::new(&setup.vm, (1, HUB), 0);
    let owner = device(&mut pair.owner);
    assert_eq!((&owner["node"], &owner["node_source"]), (&json!(1), &json!("cpus")));
    let extent = pair.extent();
    assert_eq!((&extent["placement"], &extent["nodes"]), (&json!("receiver"), &json!([1])));
    let pages = reported_pages(&extent);
    assert!(pages.len() == 1 && pages[&1] >= PAGES, "{pages:?}");
    // The other direction's extent is on the other node.
    assert_eq!(assert_everything_is_in_place(&setup.vm), policies(&[("prefer:0", 1), ("prefer:1", 1)]));
}

#[test]
fn a_device_can_have_its_pages_on_the_node_of_who_writes_them() {
    let setup = setup();
    let mut pair = Pair::new(&setup.vm, (0, "/tmp/sender.sock"), 1);
    assert_eq!(device(&mut pair.owner)["node"], 0);
    let extent = pair.extent();
    assert_eq!((&extent["placement"], &extent["nodes"]), (&json!("sender"), &json!([1])));
    assert_eq!(reported_pages(&extent).into_keys().collect::<Vec<_>>(), [1]);
    assert_eq!(assert_everything_is_in_place(&setup.vm), policies(&[("prefer:1", 2)]));
}

#[test]
fn a_device_can_have_its_pages_on_all_nodes() {
    let setup = setup();
    let mut pair = Pair::new(&setup.vm, (0, "/tmp/interleave.sock"), 0);
    let extent = pair.extent();
    assert_eq!((&extent["placement"], &extent["nodes"]), (&json!("interleave"), &json!([0, 1])));
    assert_halves(&reported_pages(&extent));
    assert_eq!(assert_everything_is_in_place(&setup.vm), policies(&[("interleave:0-1", 1), ("prefer:0", 1)]));
}

#[test]
fn a_device_can_have_its_pages_on_a_node_that_is_named() {
    let setup = setup();
    let mut pair = Pair::new(&setup.vm, (0, "/tmp/fixed.sock"), 0);
    let extent = pair.extent();
    assert_eq!((&extent["placement"], &extent["nodes"]), (&json!("1"), &json!([1])));
    assert_eq!(reported_pages(&extent).into_keys().collect::<Vec<_>>(), [1]);
    assert_eq!(assert_everything_is_in_place(&setup.vm), policies(&[("prefer:0", 1), ("prefer:1", 1)]));
}

#[test]
fn a_configured_node_counts_and_not_what_could_be_learned() {
    let setup = setup();
    let mut pair = Pair::new(&setup.vm, (0, "/tmp/configured.sock"), 0);
    let owner = device(&mut pair.owner);
    assert_eq!((&owner["node"], &owner["node_source"]), (&json!(1), &json!("configured")));
    assert_eq!(reported_pages(&pair.extent()).into_keys().collect::<Vec<_>>(), [1]);
}

#[test]
fn a_device_is_where_its_memory_is_and_not_where_its_process_happens_to_run() {
    let setup = setup();
    let mut moved = Driven::inside(&setup.vm, 1, HUB);
    let gid = moved.gid().to_string();
    // A DMB in its own memory, all of which it touches.
    moved.ask(&format!("register-ram {gid} {}", 8 << 20));
    let pid = device(&mut moved)["peer"]["pid"].clone();
    setup.vm.shell(&format!("taskset -p 1 {pid}"));
    // A new extent is a reason to look again.
    moved.ask(&format!("register {gid} 4096"));
    let found = device(&mut moved);
    assert_eq!((&found["node"], &found["node_source"]), (&json!(1), &json!("memory")));
    let extents = report(&mut moved)["extents"].clone();
    assert_eq!((&extents[0]["owner"], &extents[0]["nodes"]), (&json!(gid), &json!([1])));
}

#[test]
fn a_device_that_moves_is_seen_to_when_an_extent_is_made_and_after_a_while() {
    let setup = setup();
    let mut moved = Driven::inside(&setup.vm, 0, HUB);
    let gid = moved.gid().to_string();
    moved.ask(&format!("register {gid} 4096"));
    let found = device(&mut moved);
    assert_eq!((&found["node"], &found["node_source"]), (&json!(0), &json!("cpus")));
    setup.vm.shell(&format!("taskset -p 2 {}", found["peer"]["pid"]));
    // More than there is room for in the first extent.
    moved.ask(&format!("register {gid} {}", 4 << 20));
    let found = device(&mut moved);
    assert_eq!((&found["node"], &found["node_source"]), (&json!(1), &json!("cpus")));
    let report = report(&mut moved);
    let extents = report["extents"].as_array().expect("a list").iter();
    let mut nodes: Vec<_> = extents.filter(|extent| extent["owner"] == gid.as_str()).collect();
    nodes.sort_by_key(|extent| extent["id"].as_u64());
    let nodes: Vec<_> = nodes.into_iter().map(|extent| extent["nodes"].clone()).collect();
    assert_eq!(nodes, [json!([0]), json!([1])]);
    setup.vm.shell(&format!("taskset -p 1 {}", found["peer"]["pid"]));
    until_equal("the device's node", &json!(0), || device(&mut moved)["node"].clone());
}

#[test]
fn large_moves_are_copied_by_cpus_of_the_node_where_they_arrive() {
    let setup = setup();
    let (vm, hub) = (&setup.vm, "/tmp/engines-hub.sock");
    vm.push(ENGINES.as_bytes(), "/tmp/engines.toml");
    let _daemon = vm.start_command(&["dmbridged", "--config", "/tmp/engines.toml"]);
    until("the daemon makes its control socket", || {
        vm.run(&["test", "-S", "/tmp/engines.sock"]).status.success().then_some(())
    });
    let mut owner = Driven::inside(vm, 1, hub);
    let mut peer = Driven::inside(vm, 0, hub);
    // One direction by moves, the other one by stores.
    owner.exchange(&mut peer, ["attach", "move"], SIZE, SIZE);

    let engines = owner.ask("get /tmp/engines.sock /v1/engines");
    println!("{engines}");
    let count = |name: &str, what: &str| {
        let mut all = engines["engines"].as_array().expect("a list").iter();
        all.find(|engine| engine["name"] == name).expect("the engine is there")[what]
            .as_u64()
            .expect("a number")
    };
    assert!(count("cpu-node.1", "bytes") >= SIZE / 2, "{engines}");
    assert_eq!(count("cpu-node.0", "copies"), 0, "{engines}");
    let used = engines["rows"].as_array().expect("a list").iter().filter(|row| row["uses"] != 0);
    let large = used.filter(|row| row["bytes"].as_u64() >= Some(64 << 10));
    for row in large {
        assert_eq!((&row["destination_node"], &row["engine"]), (&json!(1), &json!("cpu-node.1")));
        assert_eq!(row["chosen_by"], "configuration");
    }
    // The workers stay on their node.
    let workers =
        "for t in /proc/[0-9]*/task/*; do echo $(cat $t/comm) $(grep Cpus_allowed_list $t/status); done";
    let workers = vm.shell(&format!("({workers}) 2>/dev/null | grep dmb-copy"));
    for line in workers.lines() {
        let node = line.strip_prefix("dmb-copy-").and_then(|rest| rest.split('.').next()).expect("a node");
        // The CPUs have the numbers of their nodes.
        assert!(line.ends_with(&format!(" {node}")), "{line}");
    }
    assert!(workers.contains("dmb-copy-1.0"), "{workers}");
}
