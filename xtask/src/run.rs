//! Running programs step by step, so that who watches knows what is going on.

use anyhow::{Context, Result, bail};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

/// A step whose program failed.
#[derive(Debug)]
pub struct Failed {
    step: String,
    /// How it ended.
    pub status: ExitStatus,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: failed ({}); what it printed above says why", self.step, self.status)
    }
}

impl std::error::Error for Failed {}

/// Something that is done, with a name for people.
pub struct Step {
    name: String,
}

impl Step {
    /// A step; `name` starts with a capital and says what is done.
    pub fn new(name: impl Into<String>) -> Step {
        Step { name: name.into() }
    }

    /// Runs the command; fails, with the step's name, if the command does.
    pub fn run(self, command: &mut Command) -> Result<()> {
        eprintln!("==> {}", self.name);
        let start = Instant::now();
        let status = command
            .status()
            .with_context(|| format!("{}: could not start {:?}", self.name, command.get_program()))?;
        if !status.success() {
            return Err(Failed { step: self.name, status }.into());
        }
        eprintln!("    {} s", start.elapsed().as_secs());
        Ok(())
    }
}

/// The cargo that runs this, in the workspace's folder.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Whether `cargo NAME` exists.
pub fn cargo_is_installed(name: &str) -> bool {
    cargo()
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Installs a Debian package if the program that it brings is missing and we may; else says what to do.
pub fn debian_package(program: &str, package: &str) -> Result<()> {
    if in_path(program) { Ok(()) } else { install(program, package) }
}

/// Installs a Debian package if the file that it brings is missing and we may; else says what to do.
pub fn debian_file(path: &str, package: &str) -> Result<()> {
    if Path::new(path).exists() { Ok(()) } else { install(path, package) }
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
        || Path::new("/usr/sbin").join(program).is_file()
}

fn install(program: &str, package: &str) -> Result<()> {
    if !in_path("apt-get") || !is_root() {
        bail!("{program} is missing; install it (on Debian: apt-get install {package}) and try again");
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null());
        command
    };
    Step::new("Fetching Debian's list of packages").run(apt().args(["--quiet", "update"]))?;
    Step::new(format!("Installing {package}")).run(apt().args([
        "--quiet",
        "--yes",
        "--no-install-recommends",
        "install",
        package,
    ]))
}

/// Whether we may do anything.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace")
}

/// Where cargo puts what it builds.
pub fn target_directory() -> Result<PathBuf> {
    // The running program lies in TARGET/PROFILE.
    let program = std::env::current_exe().context("finding this program's own file")?;
    program.ancestors().nth(2).map(Path::to_path_buf).context("finding cargo's target folder")
}
