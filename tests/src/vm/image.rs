//! What a guest is made of: what `qemu-scripts/provision` found, and the workspace's own programs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Programs of this package that are in every guest. Cargo builds them with the package's tests.
const PROGRAMS: [&str; 2] = ["dmbridge-guest-agent", "vm-guest"];

/// A script of `qemu-scripts`.
pub fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../qemu-scripts").join(name)
}

/// What `qemu-scripts/provision` says is there (`provision --help` lists it). The first call on a machine may take a
/// minute, and needs a network.
pub fn provisioned(what: &str) -> &'static str {
    static FOUND: OnceLock<HashMap<String, String>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let output = Command::new(script("provision"))
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .unwrap_or_else(|error| panic!("qemu-scripts/provision: {error}"));
        assert!(output.status.success(), "qemu-scripts/provision failed; what it printed says why");
        let lines = String::from_utf8(output.stdout).expect("provision prints text");
        lines.lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    });
    found.get(what).unwrap_or_else(|| panic!("provision says nothing of {what}"))
}

/// The guest image, made once per test program.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<PathBuf> = OnceLock::new();
    IMAGE.get_or_init(|| {
        let test = std::env::current_exe().expect("the test's own path");
        let programs = test.ancestors().nth(2).expect("target/profile/deps/test");
        // Beside what it is made of. Test programs that run at the same time each have their own.
        let image = programs.join(format!("guest-{}.cpio", std::process::id()));
        super::shared::remove_at_exit(&image);
        let status = Command::new(script("guest-image"))
            .env("INITRAMFS", provisioned("INITRAMFS"))
            .env("BUSYBOX", provisioned("BUSYBOX"))
            .arg(&image)
            .args(PROGRAMS.map(|name| programs.join(name)))
            .status()
            .unwrap_or_else(|error| panic!("qemu-scripts/guest-image: {error}"));
        assert!(status.success(), "qemu-scripts/guest-image failed; what it printed says why");
        image
    })
}
