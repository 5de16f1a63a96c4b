//! One virtual machine: stock QEMU, started by `qemu-scripts/run-qemu`.

use super::agent::{Agent, Running};
use super::frame;
use super::qmp::Qmp;
use super::scripts::script;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a guest may take to boot: seconds alone, more beside others on a busy machine without KVM.
const BOOT: Duration = Duration::from_secs(180);

/// What a VM is to be.
#[derive(Debug, Clone)]
pub struct MachineOptions {
    name: String,
    image: PathBuf,
    sockets: Vec<PathBuf>,
    launcher: Vec<String>,
    qemu: Vec<String>,
}

impl MachineOptions {
    /// A VM without a device; the name is the guest's host name. Its image has to contain `dmbridge-guest-agent`
    /// ([`guest_agent`](super::guest_agent)).
    pub fn new(name: &str, image: &Path) -> MachineOptions {
        MachineOptions {
            name: name.into(),
            image: image.into(),
            sockets: Vec::new(),
            launcher: Vec::new(),
            qemu: Vec::new(),
        }
    }

    /// With a device, served at this vhost-user socket.
    pub fn device(mut self, socket: &Path) -> MachineOptions {
        self.sockets.push(socket.into());
        self
    }

    /// An option of `qemu-scripts/run-qemu` and its value.
    pub fn option(mut self, option: &str, value: &str) -> MachineOptions {
        self.launcher.extend([option.into(), value.into()]);
        self
    }

    /// An option of QEMU and its value.
    pub fn qemu(mut self, option: &str, value: &str) -> MachineOptions {
        self.qemu.extend([option.into(), value.into()]);
        self
    }
}

/// A virtual machine. It ends when this is dropped, or the thread that started it ends.
#[derive(Debug)]
pub struct Machine {
    name: String,
    child: Child,
    console: PathBuf,
    log: PathBuf,
    agent: Agent,
    qmp: Qmp,
}

impl Machine {
    /// Starts it, and does not wait until it has booted. What it says is written to files in the folder.
    ///
    /// # Errors
    ///
    /// If QEMU does not start; with what it said.
    pub fn start(options: MachineOptions, folder: &Path) -> Result<Machine, String> {
        let MachineOptions { name, image, sockets, launcher, qemu } = options;
        let (console, log) = (folder.join(format!("{name}.console")), folder.join(format!("{name}.qemu")));
        let file = fs::File::create(&log).map_err(|error| format!("{}: {error}", log.display()))?;
        let failed = |error| format!("VM {name}: {error}");
        let pair = || UnixStream::pair().map_err(|error| failed(error.to_string()));
        let ((agent, agents), (monitor, monitors)) = (pair()?, pair()?);
        let mut command = Command::new(script("run-qemu")?);
        command.args(["--name", &name]).arg("--initrd").arg(image);
        command.args(["--append", "dmbridge.agent"]).arg("--console").arg(&console);
        for socket in &sockets {
            command.arg("--socket").arg(socket);
        }
        command.args(&launcher).arg("--");
        for (id, socket) in [("agent", &agents), ("monitor", &monitors)] {
            command.args(["-chardev", &format!("socket,id={id},fd={}", socket.as_raw_fd())]);
        }
        command.args(["-mon", "chardev=monitor,mode=control", "-device", "virtio-serial-pci"]);
        command.args(["-device", &format!("virtserialport,chardev=agent,name={}", frame::PORT)]);
        command.args(&qemu);
        let output = file.try_clone().map_err(|error| failed(error.to_string()))?;
        command.stdin(Stdio::null()).stdout(output).stderr(file);
        end_with_this_thread(&mut command);
        inherit(&mut command, [agents.as_raw_fd(), monitors.as_raw_fd()]);
        let mut child = command.spawn().map_err(|error| failed(format!("qemu-scripts/run-qemu: {error}")))?;
        drop((agents, monitors));
        match Qmp::new(monitor) {
            Ok(qmp) => Ok(Machine { name, child, console, log, agent: Agent::new(agent), qmp }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(&log).unwrap_or_default();
                Err(failed(format!("{error}\n---- QEMU ----\n{said}")))
            }
        }
    }

    /// Waits until commands can be run.
    ///
    /// # Errors
    ///
    /// If QEMU ends, or it takes minutes.
    pub fn wait_until_booted(&self) -> Result<(), String> {
        self.agent.wait_until_ready(Instant::now() + BOOT)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts a command and leaves it running.
    ///
    /// # Errors
    ///
    /// If no agent runs in the guest.
    pub fn start_command(&self, arguments: &[&str]) -> Result<Running, String> {
        self.agent.start(arguments)
    }

    /// Runs words of the guest's shell, which have to succeed; what they write on standard output.
    ///
    /// # Errors
    ///
    /// If they do not, or not in time; with what they said.
    pub fn shell(&self, words: &str, deadline: Duration) -> Result<String, String> {
        let running = self.start_command(&["sh", "-ec", words])?;
        running.end_input()?;
        let output = running.wait(deadline)?;
        if output.status.success() {
            return Ok(output.text());
        }
        Err(format!("`{words}`: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    /// QEMU's monitor.
    pub fn monitor(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Presses the reset button, and waits until it has booted again.
    ///
    /// # Errors
    ///
    /// As for [`wait_until_booted`](Self::wait_until_booted).
    pub fn reset(&mut self) -> Result<(), String> {
        self.press_reset()?;
        self.wait_until_booted()
    }

    /// Presses the reset button.
    ///
    /// # Errors
    ///
    /// QEMU's own.
    pub fn press_reset(&mut self) -> Result<(), String> {
        self.agent.guest_is_gone();
        self.qmp.command("system_reset", serde_json::json!({})).map(|_| ())
    }

    /// Kills QEMU, as `kill -9` does.
    ///
    /// # Errors
    ///
    /// If it has been waited for already.
    pub fn kill(&mut self) -> Result<(), String> {
        self.agent.guest_is_gone();
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(|error| error.to_string())
    }

    /// What came out of the serial console, what QEMU had to say, and how it ended if it has.
    pub fn console(&self) -> String {
        let read = |path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        format!("{}{}{}", read(&self.console), read(&self.log), self.end().unwrap_or_default())
    }

    /// The error with the VM's name and the end of its console.
    pub fn explain(&self, error: &str) -> String {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        let last = lines[lines.len().saturating_sub(60)..].join("\n");
        format!("VM {}: {error}\n---- end of its console ----\n{last}\n---- ----", self.name)
    }

    /// How QEMU ended, if it has.
    fn end(&self) -> Option<String> {
        // It stays to be waited for.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(nix::unistd::Pid::from_raw(self.child.id() as i32)), flags) {
            Ok(WaitStatus::StillAlive) | Err(_) => None,
            Ok(status) => Some(format!("QEMU ended: {status:?}\n")),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The child is killed when the thread that starts it ends, so that nothing is left of a program that was aborted.
pub fn end_with_this_thread(command: &mut Command) {
    // SAFETY: between fork and exec, prctl is one system call and touches no memory.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// The child keeps these descriptors, under their numbers.
fn inherit(command: &mut Command, descriptors: [RawFd; 2]) {
    // SAFETY: between fork and exec, fcntl is one system call and touches no memory.
    unsafe {
        command.pre_exec(move || {
            for descriptor in descriptors {
                if libc::fcntl(descriptor, libc::F_SETFD, 0) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}
