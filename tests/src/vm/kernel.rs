//! The kernel module of `guest-driver/kernel`, built for the guests' kernel, and guests that have loaded it.

use super::image::{found, provisioned};
use super::{Vm, VmOptions};
use crate::build::{build, build_static, profile};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The module's file, built once per test program and only if its source has changed.
pub fn module() -> &'static Path {
    static MODULE: OnceLock<PathBuf> = OnceLock::new();
    MODULE.get_or_init(|| {
        let module = found().kernel_module(&profile().join("guest-kernel-module"));
        module.unwrap_or_else(|error| panic!("{error}"))
    })
}

/// The preload library that makes TCP sockets AF_SMC ones.
pub fn af_smc() -> PathBuf {
    build("dmbridge-af-smc", "libdmbridge_af_smc.so")
}

/// Whether the guests' kernel is the one in which AF_SMC finds the device as a dibs device, and not Debian's
/// (`DMBRIDGE_KERNEL`).
pub fn is_dibs() -> bool {
    provisioned("KERNEL_RELEASE").ends_with("-dibs")
}

/// The module's parameters in tests: where SMC can write into DMBs itself, it is to.
pub fn parameters() -> &'static str {
    if is_dibs() { "nocopy=1" } else { "" }
}

/// Path of the module in a guest.
pub const MODULE: &str = "/lib/dmbridge.ko";
/// Path of the preload library in a guest.
pub const AF_SMC: &str = "/usr/lib/libdmbridge_af_smc.so";

/// Guests' addresses on the network that joins them.
pub fn address(number: usize) -> String {
    format!("10.77.0.{}", number + 1)
}

/// A guest's network, the guest's number in it counted from 0. Two guests are joined by `socket`, without the host.
pub fn network(options: VmOptions, number: usize, socket: &Path) -> VmOptions {
    let server = if number == 0 { "server=on" } else { "server=off,reconnect-ms=100" };
    options
        .qemu("-netdev", &format!("stream,id=net0,{server},addr.type=unix,addr.path={}", socket.display()))
        .qemu(
            "-device",
            &format!("virtio-net-pci,netdev=net0,mac=52:54:00:77:00:{:02x},romfile=", number + 1),
        )
}

/// Sets the guest's network up.
pub fn set_up_network(vm: &Vm, number: usize) {
    let interface = vm.shell("ls /sys/class/net | grep -v '^lo$' | head -n 1");
    let (interface, address) = (interface.trim(), address(number));
    vm.shell(&format!("ip addr add {address}/24 dev {interface}; ip link set {interface} up"));
}

/// Loads the module and prepares AF_SMC as a person does.
pub fn set_up_smc(vm: &Vm) {
    vm.push(&fs::read(module()).expect("the module was built"), MODULE);
    vm.push(&fs::read(af_smc()).expect("the library was built"), AF_SMC);
    let run = build("dmbridge-preload", "dmbridge-run");
    vm.push(&fs::read(run).expect("the program was built"), "/usr/bin/dmbridge-run");
    let program = build_static("dmbridge-guest-setup");
    vm.push(&fs::read(program).expect("the program was built"), "/usr/bin/dmbridge-guest-setup");
    vm.shell(&format!("modprobe smc; test -e /sys/module/dmbridge || insmod {MODULE} {}", parameters()));
    vm.output(&["dmbridge-guest-setup", "--module", MODULE]);
}

/// What `dmbridge-guest-setup` shows.
pub fn shown(vm: &Vm) -> Value {
    let text = vm.output(&["dmbridge-guest-setup", "--show", "--json"]);
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

/// A log without what Linux 7.3 says of its own hotplug driver when a device is unplugged, and of no other.
fn without_pciehp(log: &str) -> String {
    let mut parts = log.split("WARNING: possible circular locking");
    let mut rest = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let is_its_own =
            part.lines().take(5).any(|line| line.contains("-pciehp/") && line.contains("to acquire lock"));
        match part.split_once("</TASK>") {
            Some((_, after)) if is_its_own => rest += after,
            _ => rest.extend(["WARNING: possible circular locking", part]),
        }
    }
    rest
}

/// Fails if the guest's kernel had anything to complain about.
pub fn assert_kernel_is_content(vm: &Vm) {
    let log = without_pciehp(&vm.shell("dmesg"));
    let bad = [
        "WARNING",
        "BUG:",
        "Oops",
        "Call Trace",
        "lockdep is turned off",
        "BUG ",
        "ODEBUG",
        "UBSAN",
        "possible recursive",
        "rcu_sched",
        "soft lockup",
        "general protection",
    ];
    let found: Vec<_> = log.lines().filter(|line| bad.iter().any(|word| line.contains(word))).collect();
    assert!(found.is_empty(), "VM {}: {found:#?}\n{log}", vm.name());
}
