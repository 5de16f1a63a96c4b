//! Network namespaces of this host, as containers have them: two that are joined by a cable, or one that is joined to a virtual
//! machine. Takes root, as making them does.

use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

/// A network namespace. It goes when this is dropped and nobody is in it any more.
pub struct Namespace {
    name: String,
}

impl Namespace {
    fn new() -> Namespace {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("dmbridge-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name]);
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    /// Has `ip` do something in it.
    fn ip(&self, words: &str) {
        ip(&[&["-n", &self.name][..], &words.split(' ').collect::<Vec<_>>()].concat());
    }

    fn file(&self) -> File {
        File::open(format!("/run/netns/{}", self.name)).expect("the namespace's file")
    }

    /// Has a command run in it.
    pub fn enter(&self, command: &mut Command) {
        let file = self.file();
        // SAFETY: between fork and exec: one system call.
        unsafe { command.pre_exec(move || setns(&file, CloneFlags::CLONE_NEWNET).map_err(Into::into)) };
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&["netns", "delete", &self.name]);
    }
}

/// A namespace with this address, joined to the virtual machine whose network device connects to this socket: one of
/// QEMU's, `-netdev stream`.
pub fn joined_to_guest(address: &str, socket: &Path) -> Namespace {
    let namespace = Namespace::new();
    let file = namespace.file();
    // In a thread, which then is in that namespace.
    let made =
        thread::spawn(move || setns(&file, CloneFlags::CLONE_NEWNET).map(|()| network_device("cable")));
    let made = made.join().expect("the thread ends").expect("the namespace can be entered");
    let device = made.expect("a network device for a program; it takes root and /dev/net/tun");
    let listener = UnixListener::bind(socket).unwrap_or_else(|e| panic!("{}: {e}", socket.display()));
    namespace.ip(&format!("addr add {address}/24 dev cable"));
    namespace.ip("link set cable up");
    thread::spawn(move || {
        let Ok((guest, _)) = listener.accept() else { return };
        // They end when the guest or the namespace has gone.
        thread::scope(|scope| {
            scope.spawn(|| to_device(&guest, &device));
            let _ = to_guest(&device, &guest);
            let _ = guest.shutdown(Shutdown::Both);
        });
    });
    namespace
}

/// A network device whose packets go to and come from the file, in the namespace of the thread that makes it.
fn network_device(name: &str) -> io::Result<File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // struct ifreq: the name in 16 bytes, the flags in two, and room.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: reads and writes one such structure.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, request.as_mut_ptr()) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

/// QEMU puts four bytes, the length, before each packet.
fn to_device(mut guest: &UnixStream, mut device: &File) -> io::Result<()> {
    loop {
        let mut len = [0; 4];
        guest.read_exact(&mut len)?;
        let mut packet = vec![0; u32::from_be_bytes(len) as usize];
        guest.read_exact(&mut packet)?;
        device.write_all(&packet)?;
    }
}

fn to_guest(mut device: &File, mut guest: &UnixStream) -> io::Result<()> {
    let mut packet = vec![0; 4 + (1 << 16)];
    loop {
        let len = device.read(&mut packet[4..])?;
        packet[..4].copy_from_slice(&(len as u32).to_be_bytes());
        guest.write_all(&packet[..4 + len])?;
    }
}

/// Two namespaces that reach each other by these addresses.
pub fn joined(addresses: [&str; 2]) -> [Namespace; 2] {
    let namespaces = [Namespace::new(), Namespace::new()];
    let [a, b] = &namespaces;
    a.ip(&format!("link add cable type veth peer name cable netns {}", b.name));
    for (namespace, address) in namespaces.iter().zip(addresses) {
        namespace.ip(&format!("addr add {address}/24 dev cable"));
        namespace.ip("link set cable up");
    }
    namespaces
}

fn ip(words: &[&str]) {
    let output = Command::new("ip").args(words).output();
    let output = output.unwrap_or_else(|error| panic!("ip: {error}; `cargo xtask test` installs iproute2"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {}: {said} (it takes root)", words.join(" "));
}
