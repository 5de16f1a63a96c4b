//! Network namespaces of this host, as containers have them: two that are joined by a cable. Takes root, as making them does.

use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// A network namespace. It goes when this is dropped and nobody is in it any more.
pub struct Namespace {
    name: String,
}

impl Namespace {
    fn new() -> Namespace {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dmbridge-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Has `ip` do something in it.
    fn ip(&self, words: &str) {
        ip(&[&["-n", &self.name][..], &words.split(' ').collect::<Vec<_>>()].concat());
    }

    /// Has a command run in it.
    pub fn enter(&self, command: &mut Command) {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("the namespace's file");
        // SAFETY: between fork and exec: one system call.
        unsafe { command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(Into::into)) };
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]);
    }
}

/// Two namespaces that reach each other by these addresses.
pub fn joined(addresses: [&str; 2]) -> [Namespace; 2] {
    let namespaces = [Namespace::new(), Namespace::new()];
    let [a, b] = &namespaces;
    a.ip(&format!("link add cable type veth peer name cable netns {}", b.name));
    for (namespace, address) in namespaces.iter().zip(addresses) {
        namespace.ip(&format!("addr add {address}/24 dev cable"));
        namespace.ip("link set cable up");
    }
    namespaces
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output();
    let output = output.unwrap_or_else(|error| panic!("ip: {error}; `cargo xtask test` installs iproute2"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {}: {said} (it takes root)", words.join(" "));
}
