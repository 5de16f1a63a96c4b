//! The TCP option by which SMC users know each other (RFC 7609, 3.1: kind 254, `e2d4c3d9`), for programs: Linux writes it for
//! its own AF_SMC sockets only, and takes nobody for an SMC user who does not.
//!
//! An eBPF program, attached to all of the machine once by root ([`install()`]), writes the option into the SYN and the SYN-ACK of sockets
//! that are marked, into a SYN-ACK only if the SYN had it, and notes whether the other end answered it. Any program may
//! [`mark`] its own sockets, and ask [`heard`]. Nothing of other sockets is touched.
//!
//! | file | subject |
//! | --- | --- |
//! | `program` | the eBPF program |
//! | `install` | bringing it into the kernel, and out |
//! | `bpf` | the system call |

mod bpf;
mod install;
mod program;

pub use install::{Error, install, is_installed, remove};

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

/// What the map says of a socket: it is marked.
const MARKED: u32 = 1;
/// It is marked, and the server's SYN-ACK had the option.
const HEARD: u32 = 2;

/// The map from sockets to what is said of them, once it was found.
static MAP: Mutex<Option<OwnedFd>> = Mutex::new(None);

/// Calls `f` with the map, if there is one that this program may use.
fn with_map<T>(f: impl FnOnce(BorrowedFd<'_>) -> Option<T>) -> Option<T> {
    use std::os::fd::AsFd;
    let mut map = MAP.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if map.is_none() {
        *map = bpf::open(&Path::new(install::FOLDER).join(install::MAP)).ok();
    }
    map.as_ref().and_then(|map| f(map.as_fd()))
}

/// Marks a TCP socket that neither listens nor is connected yet. Whether that worked: not if nobody has
/// [installed](install()) what it takes, which is no error but a reason to do without.
pub fn mark(socket: BorrowedFd<'_>) -> bool {
    with_map(|map| bpf::update(map, socket.as_raw_fd(), MARKED).ok()).is_some()
}

/// Whether the server that a marked socket is connected to has shown that it speaks SMC. `None` if the socket is not marked.
pub fn heard(socket: BorrowedFd<'_>) -> Option<bool> {
    with_map(|map| bpf::look_up(map, socket.as_raw_fd()).ok()).map(|value| value == HEARD)
}
