//! Bringing the eBPF program into the kernel, for as long as the machine runs, and out again. Takes root.
//!
//! Program and map stay by names in a file system of their own: systemd lets nobody but root into `/sys/fs/bpf`.

use crate::{bpf, program};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Where the names are.
pub(crate) const FOLDER: &str = "/run/dmbridge-smc-option";
/// The map, for every program.
pub(crate) const MAP: &str = "map";
/// What keeps the program attached.
const LINK: &str = "link";

/// What is in the way.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused.
    #[error("{doing}: {error}{}", advice(error))]
    System {
        /// What was tried.
        doing: &'static str,
        /// Its reason.
        error: io::Error,
    },
    /// The kernel's verifier refused the program.
    #[error("this kernel does not take the eBPF program, which is for Linux 5.10 and later ({error}): {log}")]
    Program {
        /// Its reason.
        error: io::Error,
        /// In its words.
        log: String,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "; this takes root, and a kernel that is not locked down",
        Some(libc::ENOSYS | libc::EINVAL) => {
            "; it takes Linux 5.10 or later with CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF"
        }
        _ => "",
    }
}

impl Error {
    fn system(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::System { doing, error }
    }
}

/// Whether it is there, and this program may use it.
pub fn is_installed() -> bool {
    let folder = Path::new(FOLDER);
    bpf::open(&folder.join(MAP)).is_ok() && folder.join(LINK).exists()
}

/// Brings it into the kernel, if it is not there yet.
///
/// # Errors
///
/// What is in the way.
pub fn install() -> Result<(), Error> {
    if is_installed() {
        return Ok(());
    }
    // What is left of an attempt that failed.
    remove()?;
    let map = bpf::make_map().map_err(Error::system("making the map of sockets"))?;
    let program = program::program(map.as_fd());
    let program = bpf::load(&program).map_err(|(error, log)| Error::Program { error, log })?;
    let group = all_sockets().map_err(Error::system("finding the root of all control groups"))?;
    let link = bpf::attach(program.as_fd(), group.as_fd()).map_err(Error::system("attaching the program"))?;
    let folder = Path::new(FOLDER);
    std::fs::create_dir_all(folder).map_err(Error::system("making /run/dmbridge-smc-option"))?;
    mount(folder).map_err(Error::system("mounting /run/dmbridge-smc-option"))?;
    let path = folder.join(MAP);
    bpf::pin(map.as_fd(), &path).map_err(Error::system("naming the map of sockets"))?;
    // Who marks a socket has it anyway.
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666))
        .map_err(Error::system("giving the map of sockets to all users"))?;
    bpf::pin(link.as_fd(), &folder.join(LINK)).map_err(Error::system("naming the program"))
}

/// Takes it out of the kernel, if it is there.
///
/// # Errors
///
/// What is in the way.
pub fn remove() -> Result<(), Error> {
    let path = c_path(Path::new(FOLDER));
    // SAFETY: the path ends with a zero.
    while unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) } == 0 {}
    let error = io::Error::last_os_error();
    // Not a mount point, or not there at all: then there is nothing.
    if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) {
        return Err(Error::system("unmounting /run/dmbridge-smc-option")(error));
    }
    let _ = std::fs::remove_dir(FOLDER);
    Ok(())
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap_or_default()
}

fn mount(folder: &Path) -> io::Result<()> {
    let (path, none) = (c_path(folder), c"dmbridge");
    // SAFETY: all strings end with zeroes.
    let result = unsafe {
        libc::mount(none.as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, c"mode=0755".as_ptr().cast())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The root of the control groups, wherever it is mounted, if anywhere.
fn all_sockets() -> io::Result<OwnedFd> {
    const CREATE: libc::c_uint = 6;
    let fd = |result: libc::c_long| {
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made it.
        Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
    };
    use std::os::fd::AsRawFd;
    // SAFETY: the name ends with a zero; the other arguments are numbers.
    unsafe {
        let context = fd(libc::syscall(libc::SYS_fsopen, c"cgroup2".as_ptr(), 1))?;
        if libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), CREATE, 0usize, 0usize, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
        fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))
    }
}
