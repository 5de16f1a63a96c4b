//! One virtual machine for a test: what fails panics, with the end of the guest's console.

use super::image::{image, image_with_programs, provisioned};
use super::shared;
use crate::deadline::until;
use dmbridge_vm::{Machine, MachineOptions, Output, Running};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tempfile::TempDir;

/// How long a command may take unless the test says otherwise.
pub const COMMAND: Duration = Duration::from_secs(60);

/// What a VM is to be.
#[derive(Debug, Clone)]
pub struct VmOptions(MachineOptions);

impl VmOptions {
    /// A VM without a device; the name is the guest's host name.
    pub fn new(name: &str) -> VmOptions {
        VmOptions(MachineOptions::new(name, image()))
    }

    /// A VM that has programs of others too: see [`image_with_programs`].
    pub fn with_programs(name: &str) -> VmOptions {
        VmOptions(MachineOptions::new(name, image_with_programs()).option("--memory", "768M"))
    }

    /// With a device, served at this vhost-user socket.
    pub fn device(self, socket: &Path) -> VmOptions {
        VmOptions(self.0.device(socket))
    }

    /// An option of `qemu-scripts/run-qemu` and its value.
    pub fn option(self, option: &str, value: &str) -> VmOptions {
        VmOptions(self.0.option(option, value))
    }

    /// An option of QEMU and its value.
    pub fn qemu(self, option: &str, value: &str) -> VmOptions {
        VmOptions(self.0.qemu(option, value))
    }

    /// Starts it, and does not wait until it has booted. Many boot at once on a machine with many CPUs.
    pub fn start(self) -> Vm {
        let folder = tempfile::tempdir().expect("a folder for the VM");
        shared::remove_at_exit(folder.path());
        // Makes it now, or fails with its words rather than with those of a VM that did not start.
        provisioned("QEMU");
        let machine = Machine::start(self.0, folder.path()).unwrap_or_else(|error| panic!("{error}"));
        Vm { machine, _folder: folder }
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
    machine: Machine,
    _folder: TempDir,
}

impl Vm {
    /// Waits until commands can be run.
    pub fn wait_until_booted(&self) {
        self.expect(self.machine.wait_until_booted());
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.machine.name()
    }

    /// QEMU's process.
    pub fn pid(&self) -> u32 {
        self.machine.pid()
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
        self.expect(self.machine.start_command(arguments))
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
        let answer = self.machine.monitor().command(command, arguments);
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
        let booted = self.machine.reset();
        self.expect(booted);
    }

    /// Presses the reset button.
    pub fn press_reset(&mut self) {
        let pressed = self.machine.press_reset();
        self.expect(pressed);
    }

    /// Unplugs the device that `run-qemu` gave for the socket with this number, and waits until the guest has let go.
    pub fn unplug(&mut self, number: usize) {
        self.machine.monitor().forget("DEVICE_DELETED");
        self.monitor("device_del", json!({ "id": format!("dmbridge{number}") }));
        let deleted = self.machine.monitor().event("DEVICE_DELETED");
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

    /// Does something while QEMU's main loop stands still, and with it everything that comes from outside; its CPUs go on.
    /// Guests have no timer meanwhile.
    pub fn without_main_loop<T>(&self, act: impl FnOnce() -> T) -> T {
        use nix::sys::ptrace;
        use nix::sys::wait::{WaitPidFlag, waitpid};
        // The main loop is the main thread's, and tracing is a thread's.
        let thread = nix::unistd::Pid::from_raw(self.pid() as i32);
        ptrace::seize(thread, ptrace::Options::empty())
            .unwrap_or_else(|errno| panic!("QEMU's main thread cannot be traced: {errno}"));
        // Where it waits for something to happen it holds no lock.
        let waits = format!("{} ", libc::SYS_ppoll);
        until("QEMU's main loop waits", || {
            ptrace::interrupt(thread).expect("QEMU runs");
            waitpid(thread, Some(WaitPidFlag::__WALL)).expect("QEMU's main thread stops");
            let call = std::fs::read_to_string(format!("/proc/{thread}/syscall")).unwrap_or_default();
            if call.starts_with(&waits) {
                return Some(());
            }
            ptrace::cont(thread, None).expect("QEMU's main thread is traced");
            None
        });
        let result = act();
        ptrace::detach(thread, None).expect("QEMU's main thread is traced");
        result
    }

    /// Kills QEMU, as `kill -9` does.
    pub fn kill(&mut self) {
        self.machine.kill().expect("it runs");
    }

    /// What came out of the serial console, and what QEMU had to say.
    pub fn console(&self) -> String {
        self.machine.console()
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
        panic!("{}", self.machine.explain(error))
    }
}
