//! What tests need of other packages of the workspace: built beside the test that runs, so into the same target folder.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder of the profile of the test that runs: `target/PROFILE`.
pub fn profile() -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    test.ancestors().nth(2).expect("target/profile/deps/test").to_path_buf()
}

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this package lies in the workspace")
}

/// Builds a package; `file` of the target folder is then there.
pub fn build(package: &str, file: &str) -> PathBuf {
    let profile = profile();
    run_cargo(package, &profile, &[]);
    profile.join(file)
}

/// Builds a program that needs nothing of where it runs but a kernel, as `docs/smc-in-a-guest.md` says.
pub fn build_static(package: &str) -> PathBuf {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let profile = profile();
    run_cargo(
        package,
        &profile,
        &["--target", TARGET, "--config", r#"build.rustflags=["-Ctarget-feature=+crt-static"]"#],
    );
    let (target, name) = (profile.parent().expect("target"), profile.file_name().expect("a profile"));
    target.join(TARGET).join(name).join(package)
}

fn run_cargo(package: &str, profile: &Path, words: &[&str]) {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--quiet", "--package", package]).args(words).arg("--manifest-path");
    command.arg(workspace().join("Cargo.toml"));
    command.arg("--target-dir").arg(profile.parent().expect("target"));
    if profile.ends_with("release") {
        command.arg("--release");
    }
    let status =
        command.status().unwrap_or_else(|error| panic!("cargo has to be there to build {package}: {error}"));
    assert!(status.success(), "{package} does not build");
}
