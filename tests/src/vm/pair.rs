//! A daemon and virtual machines with a device each: what most tests here start from.

use super::driven::Driven;
use super::machine::{Vm, VmOptions};
use super::shared::in_lasting_thread;
use crate::daemon::TestDaemon;
use std::fmt::Write;

/// Limits that leave room for many guests on a small machine.
const LIMITS: &str = r#"
[limits]
window_size = 268435456
max_dmb_size = 67108864
max_dmb_bytes = 134217728
"#;
/// Processes of the host come in by this.
const HUB: &str = r#"
[hub]
socket = "@/hub.sock"
[[hub.rule]]
group = "default"
"#;

/// A daemon with a device for each of these names, in that group, and a hub.
pub fn daemon(devices: &[(&str, &str)]) -> TestDaemon {
    daemon_with(&[], LIMITS, devices)
}

fn daemon_with(flags: &[&str], limits: &str, devices: &[(&str, &str)]) -> TestDaemon {
    let mut configuration = limits.to_string();
    for (name, group) in devices {
        write!(
            configuration,
            "[[device]]\nname = \"{name}\"\nsocket = \"@/{name}.sock\"\ngroup = \"{group}\"\n"
        )
        .expect("memory");
    }
    TestDaemon::start_with(flags, &(configuration + HUB))
}

/// A booted virtual machine for each of these devices. They boot at the same time.
pub fn boot<const N: usize>(daemon: &TestDaemon, names: [&str; N]) -> [Vm; N] {
    let vms = names.map(|name| VmOptions::new(name).device(&daemon.path(&format!("{name}.sock"))).start());
    vms.iter().for_each(Vm::wait_until_booted);
    vms
}

/// Two virtual machines, a and b, whose devices know each other, and a hub for processes of the host.
pub struct VmPair {
    /// The daemon.
    pub daemon: TestDaemon,
    /// One.
    pub a: Vm,
    /// The other.
    pub b: Vm,
}

impl VmPair {
    /// Boots them.
    pub fn boot() -> VmPair {
        let daemon = daemon(&[("a", "default"), ("b", "default")]);
        let [a, b] = boot(&daemon, ["a", "b"]);
        VmPair { daemon, a, b }
    }

    /// Boots them, and a daemon with a keeper.
    pub fn boot_kept() -> VmPair {
        let daemon = daemon_with(&["--keep"], LIMITS, &[("a", "default"), ("b", "default")]);
        let [a, b] = boot(&daemon, ["a", "b"]);
        VmPair { daemon, a, b }
    }

    /// Boots them with these options, by number and name, and a daemon whose limits are the usual ones.
    pub fn boot_with(options: impl Fn(&TestDaemon, usize, &str) -> VmOptions) -> VmPair {
        VmPair::boot_with_daemon(&[], options)
    }

    /// As [`boot_with`](Self::boot_with), and a daemon with these flags.
    pub fn boot_with_daemon(
        flags: &[&str],
        options: impl Fn(&TestDaemon, usize, &str) -> VmOptions,
    ) -> VmPair {
        let daemon = daemon_with(flags, "", &[("a", "default"), ("b", "default")]);
        let start = |number, name| {
            let socket = daemon.path(&format!("{name}.sock"));
            options(&daemon, number, name).device(&socket).start()
        };
        let (a, b) = (start(0, "a"), start(1, "b"));
        [&a, &b].into_iter().for_each(Vm::wait_until_booted);
        VmPair { daemon, a, b }
    }

    /// Bytes that the daemon has copied.
    pub fn moved_bytes(&self) -> u64 {
        self.daemon.report().devices.iter().map(|device| device.moved_bytes).sum()
    }

    /// A program in each guest that drives its device.
    pub fn drive(&self) -> (Driven, Driven) {
        (Driven::in_guest(&self.a), Driven::in_guest(&self.b))
    }

    /// Boots a again, which was killed.
    pub fn boot_a_again(&mut self) {
        let socket = self.daemon.path("a.sock");
        self.a = in_lasting_thread(move || VmOptions::new("a").device(&socket).boot());
    }
}
