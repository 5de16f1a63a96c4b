//! Cross memory attach: copying between the private memory of two processes by one system call (`process_vm_readv`,
//! `process_vm_writev`), and making sure which process that is. Not when it is worth it.
//!
//! The kernel asks for a process by its number and lets whoever may trace it read all of it. So a number that a peer tells
//! is believed only after three things were seen: that process has mapped the very memory that only the two devices of a
//! DMB's pair share; it is not the daemon, which has, too; and it has put what it was asked to put where it says. A handle
//! of the process (pidfd) then tells whether the number still means it.

use crate::shared::SharedMemory;
use libc::iovec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

/// The most pieces that the kernel takes in a call.
pub(crate) const MAX_PIECES: usize = 1024;

/// Why there is no way into a process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not on this host, or not in this PID namespace, or not a process that maps the DMB.
    #[error("the peer is no process that this one can find")]
    Unknown,
    /// The kernel does not let this process do it.
    #[error(
        "the kernel does not let this process copy from and to the peer's memory: it may if it may trace it (same user \
         and group ids, not set-user-ID; with Yama, ptrace_scope = 0, or PR_SET_PTRACER in the peer)"
    )]
    Permission,
    /// Something else, such as a kernel without the system calls.
    #[error("the peer's memory cannot be reached: error {0}")]
    Other(i32),
}

/// Another process whose memory this one may read and write. Or this one: two devices may be of one process.
#[derive(Debug)]
pub(crate) struct Peer {
    pid: libc::pid_t,
    alive: OwnedFd,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the peer's memory into this process's.
    Read,
    /// The other way.
    Write,
}

/// A file as the kernel names it in a list of mappings: device and inode.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileName(String, String);

impl Peer {
    /// The process with this number, if it maps `shared`, of which only the two sides of a pair know; `daemon` does, too,
    /// and is never meant.
    pub(crate) fn find(pid: i32, shared: &SharedMemory, daemon: Option<i32>) -> Result<Peer, Refused> {
        if pid <= 0 || Some(pid) == daemon {
            return Err(Refused::Unknown);
        }
        // SAFETY: takes two numbers and returns a new descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(refused(&io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made the descriptor for this process; it fits into an int.
        let alive = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let address = shared.as_ptr().addr();
        let own = mappings("self", |start, end, file| (start <= address && address < end).then_some(file))
            .map_err(|error| refused(&error))?
            .ok_or(Refused::Unknown)?;
        // Memory without a file would be anybody's.
        if own.1 == "0" {
            return Err(Refused::Unknown);
        }
        let theirs = mappings(&pid.to_string(), |_, _, file| (file == own).then_some(()));
        match theirs {
            Ok(Some(())) => Ok(Peer { pid, alive }),
            Ok(None) => Err(Refused::Unknown),
            Err(error) => Err(refused(&error)),
        }
    }

    /// Whether the process exists. Its number means no other process if it does now.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.alive.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(0))
    }

    /// Copies `len` bytes, from `at` on in both lists of pieces.
    ///
    /// # Safety
    ///
    /// The pieces of `here` are this process's, readable and, to be read into, writable; nothing else in this process
    /// accesses what is written meanwhile.
    pub(crate) unsafe fn copy(
        &self,
        direction: Direction,
        here: &[iovec],
        there: &[iovec],
        mut at: usize,
        mut len: usize,
    ) -> Result<(), Refused> {
        let (mut local, mut remote) = (Vec::new(), Vec::new());
        while len != 0 {
            cut(here, at, len, &mut local);
            cut(there, at, len, &mut remote);
            // SAFETY: the lists are valid; the kernel checks the peer's addresses, and ours are the caller's promise.
            let done = unsafe {
                let call = match direction {
                    Direction::Read => libc::process_vm_readv,
                    Direction::Write => libc::process_vm_writev,
                };
                call(
                    self.pid,
                    local.as_ptr(),
                    local.len() as libc::c_ulong,
                    remote.as_ptr(),
                    remote.len() as libc::c_ulong,
                    0,
                )
            };
            match usize::try_from(done) {
                Ok(0) => return Err(Refused::Other(libc::EFAULT)),
                Ok(done) => {
                    at += done;
                    len -= done.min(len);
                }
                Err(_) => return Err(refused(&io::Error::last_os_error())),
            }
        }
        Ok(())
    }
}

fn refused(error: &io::Error) -> Refused {
    match error.raw_os_error() {
        Some(libc::ESRCH | libc::ENOENT) => Refused::Unknown,
        Some(libc::EPERM | libc::EACCES) => Refused::Permission,
        other => Refused::Other(other.unwrap_or(0)),
    }
}

/// Looks through a process's mappings until `each` finds what it looks for.
fn mappings<T>(
    process: &str,
    mut each: impl FnMut(usize, usize, FileName) -> Option<T>,
) -> io::Result<Option<T>> {
    for line in BufReader::new(File::open(format!("/proc/{process}/maps"))?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let mapping = || -> Option<(usize, usize, FileName)> {
            let (start, end) = words.next()?.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            let file = FileName(words.nth(2)?.into(), words.next()?.into());
            Some((number(start)?, number(end)?, file))
        };
        if let Some((start, end, file)) = { mapping }()
            && let Some(found) = each(start, end, file)
        {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// The part of a list of pieces that starts `at` bytes from its start and has `len` bytes, or fewer if that would be more
/// pieces than the kernel takes.
fn cut(pieces: &[iovec], mut at: usize, mut len: usize, part: &mut Vec<iovec>) {
    part.clear();
    for piece in pieces {
        if at >= piece.iov_len {
            at -= piece.iov_len;
            continue;
        }
        let iov_len = (piece.iov_len - at).min(len);
        if iov_len == 0 || part.len() == MAX_PIECES {
            return;
        }
        part.push(iovec { iov_base: piece.iov_base.cast::<u8>().wrapping_add(at).cast(), iov_len });
        len -= iov_len;
        at = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::tests::memory;

    fn piece(bytes: &[u8]) -> iovec {
        iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
    }

    #[test]
    fn a_part_of_a_list_has_exactly_its_bytes() {
        let bytes: Vec<u8> = (0..100).collect();
        let pieces = [piece(&bytes[..10]), piece(&bytes[10..10]), piece(&bytes[10..60]), piece(&bytes[60..])];
        let mut part = Vec::new();
        for at in 0..100 {
            for len in 0..=100 - at {
                cut(&pieces, at, len, &mut part);
                let there: Vec<u8> = part
                    .iter()
                    .flat_map(|piece| {
                        let start = piece.iov_base.addr() - bytes.as_ptr().addr();
                        bytes[start..start + piece.iov_len].to_vec()
                    })
                    .collect();
                assert_eq!(there, bytes[at..at + len]);
            }
        }
        let many = vec![piece(&bytes[..1]); 2 * MAX_PIECES];
        cut(&many, 0, 2 * MAX_PIECES, &mut part);
        assert_eq!(part.len(), MAX_PIECES);
    }

    #[test]
    fn whole_lists_are_copied_both_ways() {
        let shared = memory(4096);
        let peer = Peer::find(std::process::id() as i32, &shared, None).unwrap();
        assert!(peer.is_alive());
        let from: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let mut to = vec![0; 10_000];
        // More pieces than the kernel takes at once.
        let there: Vec<iovec> = from.chunks(3).map(piece).collect();
        let here = [piece(&to[..7000]), piece(&to[7000..])];
        // SAFETY: both are this function's own.
        unsafe { peer.copy(Direction::Read, &here, &there, 5, 9_990) }.unwrap();
        assert_eq!(to[5..9_995], from[5..9_995]);
        assert_eq!((to[4], to[9_995]), (0, 0));
        to.fill(0);
        // SAFETY: as above.
        unsafe { peer.copy(Direction::Write, &there, &here, 0, 10_000) }.unwrap();
        assert_eq!(to, from);
    }

    #[test]
    fn who_does_not_map_the_memory_is_not_the_peer() {
        let shared = memory(4096);
        let own = std::process::id() as i32;
        assert_eq!(Peer::find(own, &shared, Some(own)).unwrap_err(), Refused::Unknown, "that is the daemon");
        for nobody in [0, -1, 1 << 28] {
            assert!(Peer::find(nobody, &shared, None).is_err());
        }
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert_eq!(Peer::find(child.id() as i32, &shared, None).unwrap_err(), Refused::Unknown);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn memory_that_is_not_there_is_an_error() {
        let shared = memory(4096);
        let peer = Peer::find(std::process::id() as i32, &shared, None).unwrap();
        let to = [0u8; 16];
        let nowhere = iovec { iov_base: std::ptr::without_provenance_mut(8), iov_len: 16 };
        // SAFETY: what is written is this function's own.
        let result = unsafe { peer.copy(Direction::Read, &[piece(&to)], &[nowhere], 0, 16) };
        assert_eq!(result, Err(Refused::Other(libc::EFAULT)));
    }
}
