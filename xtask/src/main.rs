//! `cargo xtask`: the commands that the README names. Each says what it does, and, if it fails, what to do.

mod run;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use run::{Step, cargo, cargo_is_installed};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Build, show, test, measure and check dmbridge.
#[derive(Parser)]
#[command(name = "cargo xtask", version)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Send real data between two isolated processes, by map and by move, and verify it.
    Demo {
        /// Passed on to `dmbridge demo`; see `dmbridge demo --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run all tests.
    Test {
        /// Seconds for which each fuzz target runs; 0 only builds them.
        #[arg(long, default_value_t = 5)]
        fuzz_seconds: u32,
        /// Instead, run the tests of the guests' kernel module with a kernel that has DIBS, which is built for that from
        /// Debian's source (ten minutes of two CPUs, once).
        #[arg(long)]
        dibs: bool,
        /// Passed on to `cargo test`: a name, or part of one, of the tests to run. The fuzz targets are then left out.
        filter: Vec<String>,
    },
    /// Measure against what a process could use instead; with --vms, between two virtual machines.
    Bench {
        /// Passed on to `dmbridge bench`, as `--vms`, `--quick`, `--html FILE`; see `dmbridge bench --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Check formatting, lints, documentation and licences.
    Lint,
}

/// The exit code of a program that was asked for something that cannot be.
const USAGE: i32 = 2;

fn main() -> std::process::ExitCode {
    let result = match Cli::parse().task {
        Task::Demo { args } => build_release(&[]).and_then(|binaries| dmbridge(&binaries, "demo", &args)),
        Task::Bench { args } => bench(&args),
        Task::Test { dibs: true, filter, .. } => test_dibs(&filter),
        Task::Test { fuzz_seconds, filter, .. } => test(fuzz_seconds, &filter),
        Task::Lint => lint(),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo xtask: {error:#}");
            let code = error.downcast_ref::<run::Failed>().and_then(|failed| failed.status.code());
            // What `dmbridge` cannot be asked for, we cannot be asked for.
            if code == Some(USAGE) { (USAGE as u8).into() } else { std::process::ExitCode::FAILURE }
        }
    }
}

/// Runs the command.
fn dmbridge(binaries: &Path, subcommand: &str, args: &[String]) -> Result<()> {
    Step::new(format!("dmbridge {subcommand}"))
        .run(Command::new(binaries.join("dmbridge")).arg(subcommand).args(args))
}

/// Builds what people run; says where it is.
fn build_release(features: &[&str]) -> Result<PathBuf> {
    Step::new("Building dmbridged and dmbridge (the first time takes some minutes)").run(
        cargo()
            .args(["build", "--release", "--package", "dmbridged", "--package", "dmbridge-cli"])
            .args(["--package", "dmbridge-preload"])
            .args(features.iter().flat_map(|feature| ["--features", feature])),
    )?;
    Ok(run::target_directory()?.join("release"))
}

fn bench(args: &[String]) -> Result<()> {
    // One of the opponents is a library, which only the benchmark is built with.
    dmbridge(&build_release(&["dmbridge-cli/iceoryx2"])?, "bench", args)
}

/// Programs that are run with and without `dmbridge-run`, and the packages that bring them.
const PROGRAMS: [(&str, &str); 12] = [
    ("iperf3", "iperf3"),
    ("sockperf", "sockperf"),
    ("redis-server", "redis-server"),
    ("nginx", "nginx"),
    ("wrk", "wrk"),
    ("curl", "curl"),
    ("openssl", "openssl"),
    ("memcached", "memcached"),
    ("python3", "python3"),
    ("ip", "iproute2"),
    ("node", "nodejs"),
    ("sshd", "openssh-server"),
];

fn test(fuzz_seconds: u32, filter: &[String]) -> Result<()> {
    let binaries = build_release(&[])?;
    module_tools()?;
    // A program in C, and the header in C++, are compiled against what the library for C installs.
    run::debian_package("pkg-config", "pkg-config")?;
    run::debian_package("c++", "g++")?;
    Step::new("Finding or making what virtual machines need (the first time it takes some minutes)").run(
        Command::new(run::workspace().join("qemu-scripts/provision")).arg("--programs").stdout(Stdio::null()),
    )?;
    // Programs that run over dmbridge unchanged.
    for (program, package) in PROGRAMS {
        run::debian_package(program, package)?;
    }
    run::debian_file("/usr/lib/postgresql", "postgresql")?;
    Step::new("Running the tests, in virtual machines too").run(
        cargo()
            .args(["test", "--workspace", "--features", "dmbridge/tokio", "--no-fail-fast"])
            .args(filter)
            .env("DMBRIDGED", binaries.join("dmbridged"))
            .env("DMBRIDGE", binaries.join("dmbridge"))
            .env("DMBRIDGE_RUN", binaries.join("dmbridge-run")),
    )?;
    if filter.is_empty() {
        module_builds()?;
        loom()?;
        fuzz(fuzz_seconds)?;
    }
    eprintln!("\nAll tests passed.");
    Ok(())
}

/// The packages that building the guests' kernel module takes, for Debian's kernel with its objtool.
fn module_tools() -> Result<()> {
    run::debian_package("make", "make")?;
    run::debian_file("/usr/lib/x86_64-linux-gnu/libelf.so.1", "libelf1")
}

/// Runs the tests of the kernel module where SMC finds it as a dibs device.
fn test_dibs(filter: &[String]) -> Result<()> {
    let binaries = build_release(&[])?;
    module_tools()?;
    for (program, package) in [("flex", "flex"), ("bison", "bison"), ("bc", "bc"), ("xz", "xz-utils")] {
        run::debian_package(program, package)?;
    }
    run::debian_file("/usr/include/gelf.h", "libelf-dev")?;
    Step::new("Finding or making a kernel that has DIBS, and what virtual machines need").run(
        Command::new(run::workspace().join("qemu-scripts/provision"))
            .arg("--programs")
            .env("DMBRIDGE_KERNEL", "dibs")
            .stdout(Stdio::null()),
    )?;
    Step::new("Running the tests of the kernel module").run(
        cargo()
            .args(["test", "--package", "dmbridge-tests", "--no-fail-fast"])
            .args(["vm_kernel", "vm_chardev", "vm_liar"].iter().flat_map(|test| ["--test", test]))
            .args(filter)
            .env("DMBRIDGE_KERNEL", "dibs")
            .env("DMBRIDGED", binaries.join("dmbridged")),
    )
}

/// Builds and installs the kernel module as other releases of Debian do.
fn module_builds() -> Result<()> {
    if !run::is_root() {
        eprintln!("==> Leaving out qemu-scripts/module-builds, which takes root");
        return Ok(());
    }
    run::debian_package("mmdebstrap", "mmdebstrap")?;
    let script = run::workspace().join("qemu-scripts/module-builds");
    eprintln!(
        "==> Building the kernel module for other Debian releases (the first time it takes some minutes)"
    );
    match Command::new(&script).status().with_context(|| format!("starting {}", script.display()))?.code() {
        Some(0) => Ok(()),
        // Of releases that change every day; what is wrong with them today is not wrong with us.
        Some(3) => {
            eprintln!("    left out: there is no root file system to be had, see above");
            Ok(())
        }
        _ => anyhow::bail!(
            "the kernel module is not fit for another Debian release; what is printed above says why"
        ),
    }
}

/// Tries every order in which two processors may see each other's stores. Loom's words are not the real ones, so this is
/// a build of its own.
fn loom() -> Result<()> {
    Step::new("Trying every order of the words that two guests share").run(
        cargo()
            .args(["test", "--release", "--package", "dmbridge-proto", "--test", "loom"])
            .env("RUSTFLAGS", "--cfg loom")
            .env("CARGO_TARGET_DIR", run::target_directory()?.join("loom")),
    )
}

/// Builds the fuzz targets with coverage, and runs each for a while from its corpus.
fn fuzz(seconds: u32) -> Result<()> {
    let folder = run::workspace().join("proto/fuzz");
    // libFuzzer is C++.
    run::debian_package("c++", "g++")?;
    if !cargo_is_installed("fuzz") {
        Step::new("Installing cargo-fuzz").run(cargo().args(["install", "--locked", "cargo-fuzz"]))?;
    }
    // libFuzzer's instrumentation is a compiler flag that the stable toolchain has but hides.
    let cargo_fuzz = || {
        let mut command = cargo();
        command.arg("fuzz").env("RUSTC_BOOTSTRAP", "1").current_dir(run::workspace().join("proto"));
        command
    };
    Step::new("Building the fuzz targets").run(cargo_fuzz().args(["build", "--sanitizer", "none"]))?;
    for target in fuzz_targets(&folder)? {
        if seconds > 0 {
            Step::new(format!("Fuzzing {target} for {seconds} s")).run(
                cargo_fuzz()
                    .args(["run", "--sanitizer", "none", &target, "--"])
                    .arg(format!("-max_total_time={seconds}"))
                    .args(["-verbosity=0", "-rss_limit_mb=2048"]),
            )?;
        }
    }
    Ok(())
}

fn fuzz_targets(folder: &Path) -> Result<Vec<String>> {
    let targets = folder.join("fuzz_targets");
    let mut names = Vec::new();
    for entry in targets.read_dir().with_context(|| format!("reading {}", targets.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn lint() -> Result<()> {
    Step::new("Formatting").run(cargo().args(["fmt", "--all", "--check"]))?;
    Step::new("Lints").run(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--features",
        "dmbridge/tokio",
        "--",
        "--deny",
        "warnings",
    ]))?;
    Step::new("Documentation").run(
        cargo()
            .args([
                "doc",
                "--workspace",
                "--no-deps",
                "--features",
                "dmbridge/tokio",
                "--document-private-items",
            ])
            .env("RUSTDOCFLAGS", "--deny warnings"),
    )?;
    if !cargo_is_installed("deny") {
        Step::new("Installing cargo-deny").run(cargo().args(["install", "--locked", "cargo-deny"]))?;
    }
    // Advisories need the RustSec database, which is fetched from the network: `cargo deny check advisories`.
    Step::new("Licences and sources").run(cargo().args([
        "deny",
        "--offline",
        "--all-features",
        "check",
        "licenses",
        "bans",
        "sources",
    ]))?;
    eprintln!("\nNothing to complain about.");
    Ok(())
}
