//! One virtual machine: stock QEMU, started by `qemu-scripts/run-qemu`.

use super::agent::{Agent, Output, Running};
use super::image::{image, provisioned, script};
use super::qmp::Qmp;
use super::{frame, shared};
use crate::daemon::end_with_this_thread;
use serde_json::{Value, json};
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a guest may take to boot: seconds alone, more beside others on a busy machine without KVM.
const BOOT: Duration = Duration::from_secs(180);
/// How long a command may take unless the test says otherwise.
pub const COMMAND: Duration = Duration::from_secs(60);

/// What a VM is to be.
#[derive(Debug, Clone)]
pub struct VmOptions {
    name: String,
    sockets: Vec<PathBuf>,
    launcher: Vec<String>,
    qemu: Vec<String>,
}

impl VmOptions {
    /// A VM without a device; the name is the guest's host name.
    pub fn new(name: &str) -> VmOptions {
        VmOptions { name: name.into(), sockets: Vec::new(), launcher: Vec::new(), qemu: Vec::new() }
    }

    /// With a device, served at this vhost-user socket.
    pub fn device(mut self, socket: &Path) -> VmOptions {
        self.sockets.push(socket.into());
        self
    }

    /// An option of `qemu-scripts/run-qemu` and its value.
    pub fn option(mut self, option: &str, value: &str) -> VmOptions {
        self.launcher.extend([option.into(), value.into()]);
        self
    }

    /// An option of QEMU and its value.
    pub fn qemu(mut self, option: &str, value: &str) -> VmOptions {
        self.qemu.extend([option.into(), value.into()]);
        self
    }

    /// Starts it, and does not wait until it has booted. Many boot at once on a machine with many CPUs.
    pub fn start(self) -> Vm {
        Vm::start(self)
    }

    /// Starts it and waits until it has booted.
    pub fn boot(self) -> Vm {
        let vm = self.start();
        vm.wait_until_booted();
        vm
    }
}

/// A virtual machine. It ends when this is dropped, or the thread that started it ends.
#[derive(Debug)]
pub struct Vm {
    name: String,
    child: Child,
    folder: TempDir,
    agent: Agent,
    qmp: Qmp,
}

impl Vm {
    fn start(options: VmOptions) -> Vm {
        let VmOptions { name, sockets, launcher, qemu } = options;
        let folder = tempfile::tempdir().expect("a folder for the VM");
        shared::remove_at_exit(folder.path());
        let log = fs::File::create(folder.path().join("qemu")).expect("a log file for QEMU");
        let (agent, agents) = UnixStream::pair().expect("a pair of sockets");
        let (monitor, monitors) = UnixStream::pair().expect("a pair of sockets");
        let mut command = Command::new(script("run-qemu"));
        command.args(["--name", &name]).arg("--initrd").arg(image());
        command.arg("--append").arg("dmbridge.agent");
        command.arg("--console").arg(folder.path().join("console"));
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
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log file for QEMU")).stderr(log);
        end_with_this_thread(&mut command);
        inherit(&mut command, [agents.as_raw_fd(), monitors.as_raw_fd()]);
        // Makes it now, or fails with its words rather than with those of a VM that did not start.
        provisioned("QEMU");
        let child = command.spawn().unwrap_or_else(|error| panic!("qemu-scripts/run-qemu: {error}"));
        drop((agents, monitors));
        let log = |what| fs::read_to_string(folder.path().join(what)).unwrap_or_default();
        let qmp = Qmp::new(monitor)
            .unwrap_or_else(|error| panic!("VM {name}: {error}\n---- QEMU ----\n{}", log("qemu")));
        Vm { name, child, agent: Agent::new(agent), qmp, folder }
    }

    /// Waits until commands can be run.
    pub fn wait_until_booted(&self) {
        self.expect(self.agent.wait_until_ready(Instant::now() + BOOT));
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a command to its end, however that is.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let running = self.start_command(arguments);
        self.expect(running.end_input());
        self.expect(running.wait(COMMAND))
    }

    /// Runs a command that has to succeed; what it wrote on standard output.
    pub fn output(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            self.fail(&format!("`{}`: {}\n{error}", arguments.join(" "), output.status));
        }
        output.text()
    }

    /// Runs words of the guest's shell, which have to succeed.
    pub fn shell(&self, words: &str) -> String {
        self.output(&["sh", "-ec", words])
    }

    /// Starts a command and leaves it running.
    pub fn start_command(&self, arguments: &[&str]) -> Running {
        self.expect(self.agent.start(arguments))
    }

    /// Makes a file in the guest, which may be executed.
    pub fn push(&self, content: &[u8], path: &str) {
        let running = self.start_command(&["sh", "-ec", "cat >\"$0\"; chmod 755 \"$0\"", path]);
        self.expect(running.write(content));
        self.expect(running.end_input());
        let output = self.expect(running.wait(COMMAND));
        if !output.status.success() {
            self.fail(&format!("pushing {path}: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }

    /// A command of QEMU's monitor, which has to succeed.
    pub fn monitor(&mut self, command: &str, arguments: Value) -> Value {
        let answer = self.qmp.command(command, arguments);
        self.expect(answer)
    }

    /// Stops its CPUs.
    pub fn pause(&mut self) {
        self.monitor("stop", json!({}));
    }

    /// Starts its CPUs again.
    pub fn resume(&mut self) {
        self.monitor("cont", json!({}));
    }

    /// Presses the reset button, and waits until it has booted again.
    pub fn reset(&mut self) {
        self.agent.guest_is_gone();
        self.monitor("system_reset", json!({}));
        self.wait_until_booted();
    }

    /// Unplugs the device that `run-qemu` gave for the socket with this number, and waits until the guest has let go.
    pub fn unplug(&mut self, number: usize) {
        self.qmp.forget("DEVICE_DELETED");
        self.monitor("device_del", json!({ "id": format!("dmbridge{number}") }));
        let deleted = self.qmp.event("DEVICE_DELETED");
        self.expect(deleted);
        self.monitor("chardev-remove", json!({ "id": format!("dmbridge-socket{number}") }));
    }

    /// Plugs in a device served at this socket, where the one with this number was unplugged.
    pub fn plug(&mut self, number: usize, socket: &Path) {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        let id = format!("dmbridge-socket{number}");
        self.monitor("chardev-add", json!({ "id": id, "backend": backend }));
        self.monitor(
            "device_add",
            json!({ "driver": "vhost-user-test-device-pci", "id": format!("dmbridge{number}"),
                "bus": format!("port{number}"), "chardev": id, "virtio-id": 37, "num_vqs": 3, "vq_size": 256, "config_size": 128 }),
        );
    }

    /// Kills QEMU, as `kill -9` does.
    pub fn kill(&mut self) {
        self.agent.guest_is_gone();
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// What came out of the serial console, and what QEMU had to say.
    pub fn console(&self) -> String {
        let log = |what| {
            String::from_utf8_lossy(&fs::read(self.folder.path().join(what)).unwrap_or_default()).into_owned()
        };
        format!("{}{}{}", log("console"), log("qemu"), self.end().unwrap_or_default())
    }

    /// How QEMU ended, if it has.
    fn end(&self) -> Option<String> {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        // It stays to be waited for.
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        match waitid(Id::Pid(nix::unistd::Pid::from_raw(self.child.id() as i32)), flags) {
            Ok(WaitStatus::StillAlive) | Err(_) => None,
            Ok(status) => Some(format!("QEMU ended: {status:?}\n")),
        }
    }

    /// Unwraps what was done in or to the VM.
    ///
    /// # Panics
    ///
    /// With the error and the end of the guest's console.
    pub fn expect<T>(&self, result: Result<T, String>) -> T {
        result.unwrap_or_else(|error| self.fail(&error))
    }

    fn fail(&self, error: &str) -> ! {
        let console = self.console();
        let lines: Vec<_> = console.lines().collect();
        let last = lines[lines.len().saturating_sub(60)..].join("\n");
        panic!("VM {}: {error}\n---- end of its console ----\n{last}\n---- ----", self.name);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
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
