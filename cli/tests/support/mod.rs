//! What the tests of the command share.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

/// Builds the daemon where the command looks for it first: beside itself.
pub fn build_daemon() {
    static BUILT: OnceLock<()> = OnceLock::new();
    BUILT.get_or_init(|| {
        let profile = Path::new(env!("CARGO_BIN_EXE_dmbridge")).parent().unwrap();
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.args(["build", "--quiet", "--package", "dmbridged", "--bin", "dmbridged", "--manifest-path"]);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"));
        command.arg("--target-dir").arg(profile.parent().unwrap());
        if profile.ends_with("release") {
            command.arg("--release");
        }
        assert!(command.status().unwrap().success(), "dmbridged does not build");
    });
}
