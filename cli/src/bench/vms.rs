//! Two virtual machines for a run, joined by everything that is measured: a dmbridge device each, a network card each, and
//! AF_VSOCK. Each measurement is a process in each; what the two say to each other is carried by this one.
//!
//! Only what every stock QEMU has: the network is QEMU's own back-end, in user space as our daemon and vhost-device-vsock
//! are.

use anyhow::{Context, Result, anyhow, bail};
use dmbridge_vm::{Input, Machine, MachineOptions, Provisioned, Running};
use serde::Serialize;
use std::fmt;
use std::fs::Permissions;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use super::plan::{Site, Transport};
use crate::daemon::Daemon;
use crate::pair::Role;
use crate::process::BoundChild;
use crate::rendezvous::RELAY;
use crate::scratch::{self, Scratch};

/// Name of the hidden subcommand that a guest's first process starts.
pub const AGENT: &str = "guest-agent";

/// The two, by name. The first one's is the process that asks or sends.
const NAMES: [&str; 2] = ["a", "b"];
/// Their addresses, in a network of their own.
const ADDRESSES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 2)];
/// Their context identifiers. Those up to 2 have meanings.
const CIDS: [u32; 2] = [3, 4];
/// As much as a virtio network card can have: large segments cost the opponent least, for nobody cuts them for it here.
const MTU: u32 = 65535;
/// RAM of each, in MiB.
const MEMORY: u32 = 512;
/// CPUs of each: two guests with one are all that two cores can run.
const CPUS: u32 = 1;
/// What needs the kernel module.
const MODULES: [Transport; 2] = [Transport::AfSmc, Transport::Chardev];
/// The kernel module's file in a guest.
const MODULE: &str = "/lib/dmbridge.ko";
/// How long a command of the set-up may take.
const COMMAND: Duration = Duration::from_secs(60);
/// How long vhost-device-vsock may take to start.
const START: Duration = Duration::from_secs(10);

/// What the guests are, for the report.
#[derive(Clone, Debug, Serialize)]
pub struct Guests {
    /// `KVM` or `TCG`. TCG emulates: its figures say nothing about KVM, and its ratios little.
    pub accelerator: String,
    /// QEMU's version.
    pub qemu: String,
    /// The guests' kernel.
    pub kernel: String,
    /// CPUs of each.
    pub cpus: u32,
    /// RAM of each, in bytes.
    pub memory_bytes: u64,
    /// Largest packet of their network, in bytes.
    pub mtu: u32,
    /// Why transports that were to be measured are not, in sentences.
    pub not_measured: Vec<String>,
}

impl Guests {
    /// Whether instructions are emulated, and times mean little.
    pub fn is_emulated(&self) -> bool {
        self.accelerator == "TCG"
    }
}

impl fmt::Display for Guests {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Two virtual machines under QEMU {} with {}: {}, {} CPU and {} MiB each; network: virtio-net, QEMU's own \
             back-end without vhost, packets of up to {} bytes",
            self.qemu,
            self.accelerator,
            self.kernel,
            self.cpus,
            self.memory_bytes >> 20,
            self.mtu
        )
    }
}

/// What guests are made of. Found or made before anything is started, because it may take minutes.
pub struct Parts {
    provisioned: Provisioned,
    transports: Vec<Transport>,
}

impl Parts {
    /// Finds or makes what these transports need.
    pub fn find(transports: &[Transport]) -> Result<Parts> {
        let options: &[&str] = if transports.contains(&Transport::Vsock) { &["--vsock"] } else { &[] };
        let provisioned = Provisioned::find(options).map_err(anyhow::Error::msg)?;
        Ok(Parts { provisioned, transports: transports.to_vec() })
    }

    fn get(&self, what: &str) -> Result<&str> {
        self.provisioned.get(what).map_err(anyhow::Error::msg)
    }

    /// What the guests will be.
    fn guests(&self) -> Result<Guests> {
        let version =
            Command::new(self.get("QEMU")?).arg("--version").output().context("QEMU does not start")?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        Ok(Guests {
            accelerator: self.get("ACCEL")?.to_uppercase(),
            // "QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1)"
            qemu: version.split_whitespace().nth(3).unwrap_or("?").to_owned(),
            kernel: format!("Linux {}", self.get("KERNEL_RELEASE")?),
            cpus: CPUS,
            memory_bytes: u64::from(MEMORY) << 20,
            mtu: MTU,
            not_measured: Vec::new(),
        })
    }
}

/// The two, booted. They end when this is dropped.
pub struct Vms {
    machines: [Machine; 2],
    guests: Guests,
    /// What is there beside TCP and the device of user space.
    extras: Vec<Transport>,
    _daemon: Daemon,
    _vsock: Option<BoundChild>,
}

impl Vms {
    /// Boots them, with what the transports need: a device of its own for the library, and one for the kernel module.
    pub fn boot(parts: Parts, scratch: &Scratch) -> Result<Vms> {
        eprintln!("booting two virtual machines");
        let (mut guests, mut extras) = (parts.guests()?, Vec::new());
        let mut files = program(scratch)?;
        let of_the_module: Vec<_> =
            parts.transports.iter().copied().filter(|transport| MODULES.contains(transport)).collect();
        if !of_the_module.is_empty() {
            match parts.provisioned.kernel_module(&scratch.file("module")) {
                Ok(module) => {
                    files.push((module, MODULE));
                    extras.extend(of_the_module);
                }
                Err(error) => guests.not_measured.push(format!("af-smc, chardev: {error}")),
            }
        }
        let mut vsock = None;
        if parts.transports.contains(&Transport::Vsock) {
            match parts.get("VHOST_DEVICE_VSOCK") {
                Ok(program) => {
                    vsock = Some(start_vsock(Path::new(program), scratch)?);
                    extras.push(Transport::Vsock);
                }
                Err(_) => guests.not_measured.push(
                    "vsock: vhost-device-vsock is not installed and could not be built (cargo install \
                     vhost-device-vsock)"
                        .to_owned(),
                ),
            }
        }
        let image = scratch.file("guest.cpio");
        let files: Vec<_> = files.iter().map(|(file, place)| (file.as_path(), *place)).collect();
        parts.provisioned.guest_image(&image, &files).map_err(anyhow::Error::msg)?;

        let with_kernel = extras.iter().any(|transport| MODULES.contains(transport));
        let devices: &[&str] = if with_kernel { &["user", "kernel"] } else { &["user"] };
        let sockets = NAMES.map(|name| {
            devices.iter().map(|use_| scratch.file(&format!("{name}-{use_}.sock"))).collect::<Vec<_>>()
        });
        let daemon = Daemon::with_sockets(scratch, &sockets.concat())?;
        let start = |number: usize| {
            let mut options = MachineOptions::new(NAMES[number], &image)
                .option("--memory", &format!("{MEMORY}M"))
                .option("--cpus", &CPUS.to_string());
            for socket in &sockets[number] {
                options = options.device(socket);
            }
            for (option, value) in network(number, scratch) {
                options = options.qemu(option, &value);
            }
            if vsock.is_some() {
                let socket = vsock_socket(number, scratch);
                options = options
                    .qemu("-chardev", &format!("socket,id=vsock,path={}", socket.display()))
                    .qemu("-device", "vhost-user-vsock-pci,chardev=vsock");
            }
            Machine::start(options, scratch.path()).map_err(anyhow::Error::msg)
        };
        let machines = [start(0)?, start(1)?];
        for (number, machine) in machines.iter().enumerate() {
            let ready =
                machine.wait_until_booted().and_then(|()| machine.shell(&set_up(number, &extras), COMMAND));
            ready.map_err(|error| anyhow!(machine.explain(&error)))?;
        }
        Ok(Vms { machines, guests, extras, _daemon: daemon, _vsock: vsock })
    }

    /// What they are.
    pub fn guests(&self) -> &Guests {
        &self.guests
    }

    /// Whether the transport can be measured in them.
    pub fn have(&self, transport: Transport) -> bool {
        !matches!(transport, Transport::AfSmc | Transport::Chardev | Transport::Vsock)
            || self.extras.contains(&transport)
    }

    /// Where measurements in them are.
    pub fn site(&self) -> Site {
        Site::Vms { address: ADDRESSES[1], cid: CIDS[1] }
    }

    /// As [`pair::run`](crate::pair::run), with a process in each.
    pub fn run(
        &self,
        worker: &str,
        job: &str,
        patience: Duration,
        mut hear: impl FnMut(Role, &str) -> Result<()>,
    ) -> Result<()> {
        let in_words = |number: usize, error: String| anyhow!(self.machines[number].explain(&error));
        let start = |number: usize, role: &str| {
            let command = ["dmbridge", worker, role, job, "--relayed"];
            self.machines[number].start_command(&command).map_err(|error| in_words(number, error))
        };
        let running = [start(0, "a")?, start(1, "b")?];
        let inputs: [Input; 2] = [running[0].input(), running[1].input()];
        let (sender, said) = channel();
        std::thread::scope(|scope| {
            for (number, running) in running.into_iter().enumerate() {
                let sender = sender.clone();
                scope.spawn(move || listen(running, patience, |heard| sender.send((number, heard)).is_ok()));
            }
            drop(sender);
            let mut over = 0;
            while over < NAMES.len() {
                let (number, heard) = match said.recv_timeout(patience) {
                    Ok(heard) => heard,
                    Err(RecvTimeoutError::Timeout) => {
                        bail!("the two processes said nothing for {} seconds", patience.as_secs())
                    }
                    Err(RecvTimeoutError::Disconnected) => bail!("the two processes ended without a word"),
                };
                match heard {
                    Heard::Line(line) => match line.strip_prefix(RELAY) {
                        Some(words) => inputs[1 - number]
                            .write(format!("{words}\n").as_bytes())
                            .map_err(|error| in_words(1 - number, error))?,
                        None => hear([Role::A, Role::B][number], &line)?,
                    },
                    Heard::End => over += 1,
                    Heard::Failed(error) => return Err(in_words(number, error)),
                }
            }
            Ok(())
        })
    }
}

/// What one of the two processes did.
enum Heard {
    Line(String),
    End,
    Failed(String),
}

/// Tells what a process says, until it has ended or nobody wants to know; then it is ended.
fn listen(mut running: Running, patience: Duration, tell: impl Fn(Heard) -> bool) {
    loop {
        let heard = match running.next_line(patience) {
            Ok(Some(line)) => Heard::Line(line),
            Ok(None) => Heard::End,
            Err(error) => Heard::Failed(error),
        };
        let more = matches!(heard, Heard::Line(_));
        if !tell(heard) || !more {
            return;
        }
    }
}

/// Files for the guests: this program as both agent and worker.
fn program(scratch: &Scratch) -> Result<Vec<(PathBuf, &'static str)>> {
    let agent = scratch.file("agent");
    scratch::write(&agent, format!("#!/bin/sh\nexec dmbridge {AGENT}\n"))?;
    std::fs::set_permissions(&agent, Permissions::from_mode(0o755))?;
    let program = std::env::current_exe().context("this program cannot find its own file")?;
    Ok(vec![(program, "/usr/bin/dmbridge"), (agent, "/usr/bin/dmbridge-guest-agent")])
}

/// What is typed in a guest before anything can be measured.
fn set_up(number: usize, extras: &[Transport]) -> String {
    let mut words =
        format!("ip address add {}/24 dev eth0; ip link set eth0 mtu {MTU} up\n", ADDRESSES[number]);
    if extras.contains(&Transport::Vsock) {
        words += "modprobe vmw_vsock_virtio_transport\n";
    }
    if extras.iter().any(|transport| MODULES.contains(transport)) {
        // The first device is for the library, so the module must not find it.
        words += "for device in /sys/bus/pci/drivers/virtio-pci/*; do\n\
                  if grep -q -e 0x1065 -e 0x106c \"$device/device\" 2>/dev/null; then\n\
                  basename \"$device\" >/sys/bus/pci/drivers/virtio-pci/unbind; break; fi; done\n";
        words += &format!("dmbridge guest-setup --module {MODULE}\n");
    }
    words
}

/// QEMU's options for a network card whose cable ends at the other machine's.
fn network(number: usize, scratch: &Scratch) -> [(&'static str, String); 2] {
    let end = |number: usize| scratch.file(&format!("{}.net", NAMES[number])).display().to_string();
    let (local, remote) = (end(number), end(1 - number));
    let cable =
        format!("dgram,id=net,local.type=unix,local.path={local},remote.type=unix,remote.path={remote}");
    let mac = format!("52:54:00:77:00:{:02x}", number + 1);
    [("-netdev", cable), ("-device", format!("virtio-net-pci,netdev=net,mac={mac},romfile="))]
}

fn vsock_socket(number: usize, scratch: &Scratch) -> PathBuf {
    scratch.file(&format!("{}.vsock", NAMES[number]))
}

/// Starts vhost-device-vsock for both, and waits until it serves.
fn start_vsock(program: &Path, scratch: &Scratch) -> Result<BoundChild> {
    let mut command = Command::new(program);
    for (number, cid) in CIDS.iter().enumerate() {
        let socket = vsock_socket(number, scratch);
        let host = scratch.file(&format!("{}.vsock-host", NAMES[number]));
        command.arg("--vm").arg(format!(
            "guest-cid={cid},socket={},uds-path={}",
            socket.display(),
            host.display()
        ));
    }
    let log = std::fs::File::create(scratch.file("vsock.log"))?;
    let mut child = BoundChild::spawn(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log))?;
    let deadline = Instant::now() + START;
    while !(0..NAMES.len()).all(|number| vsock_socket(number, scratch).exists()) {
        if child.get_mut().try_wait()?.is_some() || Instant::now() > deadline {
            let said = std::fs::read_to_string(scratch.file("vsock.log")).unwrap_or_default();
            bail!("{} does not serve: {}", program.display(), said.trim());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(child)
}
