//! What names a connection for both of its ends.
//!
//! If both are sockets of this network namespace, their cookies do, without doubt: the kernel gives each out once. A socket's
//! own is an option of it; that of the other end is found by the addresses, the other way round.
//!
//! If not, the pair of addresses names it within a network: that is what an administrator calls a network, in which no two
//! connections have equal ones at the same time (`dmbridge-run --network`).

use crate::{errno, real};
use libc::{c_int, sockaddr_storage, socklen_t};
use sha2::{Digest, Sha256};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;

/// A connection as this end knows it.
#[derive(Clone, Copy)]
pub struct Identity {
    cookie: u64,
    /// `AF_INET` or `AF_INET6`.
    family: u8,
    local: End,
    remote: End,
    device: u32,
}

/// Address, an IPv4 one in the first four bytes, and port.
type End = ([u8; 16], u16);

/// What both ends know.
pub type Key = [u8; 32];

/// A connection's name.
#[derive(Clone, Copy)]
pub struct Name {
    pub key: Key,
    /// Of the two ends, this is the one whose cookie or address is the lower one.
    pub lower: bool,
    /// Both are in one network namespace, so of one kernel.
    pub is_here: bool,
}

const SO_COOKIE: c_int = 57;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NETLINK_SOCK_DIAG: c_int = 4;

impl Identity {
    /// Of a connected socket.
    pub fn of(fd: c_int) -> Option<Identity> {
        let mut cookie = [0u8; 8];
        let mut len = 8;
        // SAFETY: 8 bytes.
        let got = unsafe {
            real::getsockopt(fd, libc::SOL_SOCKET, SO_COOKIE, cookie.as_mut_ptr().cast(), &mut len)
        };
        if got != 0 {
            return None;
        }
        let (family, local, device) = address(fd, libc::getsockname)?;
        let (other, remote, _) = address(fd, libc::getpeername)?;
        (family == other).then(|| Identity {
            cookie: u64::from_ne_bytes(cookie),
            family,
            local,
            remote,
            device,
        })
    }

    /// The connection's name, if it has one: the other end is in this network namespace, or both are in a network.
    pub fn name(&self, network: Option<&str>) -> Option<Name> {
        match self.other_cookie() {
            Some(other) => self.name_here(other),
            None => self.name_in(network?),
        }
    }

    fn name_here(&self, other: u64) -> Option<Name> {
        // Other machines give out the same cookies.
        let boot = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = std::fs::metadata("/proc/self/ns/net").ok()?.ino();
        let hash = Sha256::new_with_prefix(b"dmbridge-run, by cookies\0")
            .chain_update(boot)
            .chain_update(namespace.to_le_bytes())
            .chain_update(self.cookie.min(other).to_le_bytes())
            .chain_update(self.cookie.max(other).to_le_bytes());
        (self.cookie != other).then(|| Name {
            key: hash.finalize().into(),
            lower: self.cookie < other,
            is_here: true,
        })
    }

    fn name_in(&self, network: &str) -> Option<Name> {
        // Each machine has these for itself.
        if self.local.0 == self.remote.0 || [self.local, self.remote].iter().any(|end| self.is_own(end)) {
            return None;
        }
        let lower = self.local < self.remote;
        let (first, second) = if lower { (self.local, self.remote) } else { (self.remote, self.local) };
        let mut hash = Sha256::new_with_prefix(b"dmbridge-run, by addresses\0")
            .chain_update((network.len() as u64).to_le_bytes())
            .chain_update(network)
            .chain_update([self.family, libc::IPPROTO_TCP as u8]);
        for (address, port) in [first, second] {
            hash = hash.chain_update(address).chain_update(port.to_le_bytes());
        }
        Some(Name { key: hash.finalize().into(), lower, is_here: false })
    }

    /// Whether an address means something on one machine or link only.
    fn is_own(&self, (address, _): &End) -> bool {
        if c_int::from(self.family) == libc::AF_INET {
            let [a, b, c, d, ..] = *address;
            let v4 = Ipv4Addr::new(a, b, c, d);
            v4.is_loopback() || v4.is_link_local()
        } else {
            let v6 = Ipv6Addr::from(*address);
            v6.is_loopback() || v6.is_unicast_link_local()
        }
    }

    /// The socket at the other end.
    fn other_cookie(&self) -> Option<u64> {
        ask(self.family, self.remote, self.local, self.device).map(|socket| socket.cookie)
    }

    /// Whether some process still has a descriptor of this end; false also where the kernel cannot say, without `tcp_diag`.
    pub fn is_open(&self) -> bool {
        ask(self.family, self.local, self.remote, self.device)
            .is_some_and(|socket| socket.cookie == self.cookie && socket.inode != 0)
    }
}

/// What the kernel says of a socket.
struct Socket {
    cookie: u64,
    /// 0: no process has a descriptor of it.
    inode: u32,
}

/// Asks the kernel for the socket with these addresses (`include/uapi/linux/inet_diag.h`).
fn ask(family: u8, own: End, other: End, device: u32) -> Option<Socket> {
    const REQUEST: usize = 16 + 56;
    let mut request = [0u8; REQUEST];
    request[..4].copy_from_slice(&(REQUEST as u32).to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&(libc::NLM_F_REQUEST as u16).to_ne_bytes());
    request[16] = family;
    request[17] = libc::IPPROTO_TCP as u8;
    request[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    request[24..26].copy_from_slice(&own.1.to_be_bytes());
    request[26..28].copy_from_slice(&other.1.to_be_bytes());
    request[28..44].copy_from_slice(&own.0);
    request[44..60].copy_from_slice(&other.0);
    request[60..64].copy_from_slice(&device.to_ne_bytes());
    // Any cookie.
    request[64..72].copy_from_slice(&[0xff; 8]);

    let mut answer = [0u8; 512];
    // SAFETY: a socket of our own, and buffers with their lengths.
    let len = unsafe {
        let fd = libc::socket(libc::AF_NETLINK, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
        if fd < 0 {
            return None;
        }
        let sent = real::send(fd, request.as_ptr().cast(), request.len(), 0);
        let len = if sent == REQUEST as isize {
            errno::outcome(real::recv(fd, answer.as_mut_ptr().cast(), answer.len(), 0)).unwrap_or(0)
        } else {
            0
        };
        real::close(fd);
        len
    };
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    // Header, then inet_diag_msg: family, state, timer, retrans, and the socket's id, which ends with its cookie.
    if len < 16 + 4 + 48 + 20 || kind != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let inode = u32::from_ne_bytes(std::array::from_fn(|i| answer[16 + 4 + 48 + 16 + i]));
    Some(Socket { cookie: u64::from_ne_bytes(std::array::from_fn(|i| answer[16 + 4 + 40 + i])), inode })
}

type GetAddress = unsafe extern "C" fn(c_int, *mut libc::sockaddr, *mut socklen_t) -> c_int;

/// Family, address, port, and the device of a link-local address.
fn address(fd: c_int, get: GetAddress) -> Option<(u8, End, u32)> {
    // SAFETY: all-zero bytes are a sockaddr_storage, which is as long as it says.
    unsafe {
        let mut storage: sockaddr_storage = std::mem::zeroed();
        let mut len = size_of::<sockaddr_storage>() as socklen_t;
        if get(fd, (&raw mut storage).cast(), &mut len) != 0 {
            return None;
        }
        let mut bytes = [0u8; 16];
        match c_int::from(storage.ss_family) {
            libc::AF_INET => {
                let v4 = *(&raw const storage).cast::<libc::sockaddr_in>();
                bytes[..4].copy_from_slice(&v4.sin_addr.s_addr.to_ne_bytes());
                Some((libc::AF_INET as u8, (bytes, u16::from_be(v4.sin_port)), 0))
            }
            libc::AF_INET6 => {
                let v6 = *(&raw const storage).cast::<libc::sockaddr_in6>();
                let port = u16::from_be(v6.sin6_port);
                // An IPv4 connection on an IPv6 socket: its other end may be an IPv4 socket.
                if v6.sin6_addr.s6_addr[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff] {
                    bytes[..4].copy_from_slice(&v6.sin6_addr.s6_addr[12..]);
                    return Some((libc::AF_INET as u8, (bytes, port), 0));
                }
                Some((libc::AF_INET6 as u8, (v6.sin6_addr.s6_addr, port), v6.sin6_scope_id))
            }
            _ => None,
        }
    }
}
