//! Processes that end with us: how this command starts its own workers, the daemon, and other people's programs.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command};

/// A child that is killed when it is dropped, and by the kernel when this process dies, however that happens.
pub struct BoundChild(Child);

impl BoundChild {
    /// Starts the command.
    pub fn spawn(command: &mut Command) -> Result<BoundChild> {
        let parent = nix::unistd::getpid();
        // SAFETY: prctl and getppid are async-signal-safe, and nothing is allocated between fork and exec.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGKILL)?;
                if getppid() == parent { Ok(()) } else { Err(nix::Error::ESRCH.into()) }
            });
        }
        let name = command.get_program().to_string_lossy().into_owned();
        command.spawn().map(BoundChild).with_context(|| format!("{name} could not be started"))
    }

    /// The process itself.
    pub fn get_mut(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Its number.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }
}

impl Drop for BoundChild {
    fn drop(&mut self) {
        // It may have ended long ago; then both calls do nothing.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// This program again, with another subcommand.
pub fn own_program() -> Result<Command> {
    Ok(Command::new(std::env::current_exe().context("this program cannot find its own file")?))
}

/// Keeps this process, and what it starts, on one CPU.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("CPU {cpu} does not exist"))?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .with_context(|| format!("this process may not run on CPU {cpu}"))
}

/// Where a program is: next to this one, else in `PATH`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(name)));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).map(|dir| dir.join(name)))
        .find(|file| file.is_file())
}
