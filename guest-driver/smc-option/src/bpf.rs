//! The system call bpf(2), as far as it is needed: each command with the part of `union bpf_attr` that it takes.

use crate::program::Instruction;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const OBJ_PIN: libc::c_int = 6;
const OBJ_GET: libc::c_int = 7;
const BTF_LOAD: libc::c_int = 18;
const LINK_CREATE: libc::c_int = 28;

const MAP_TYPE_SK_STORAGE: u32 = 24;
const MAP_NO_PREALLOC: u32 = 1;
/// A connection that a listener makes has what the listener has.
const MAP_CLONE: u32 = 1 << 9;
const PROG_TYPE_SOCK_OPS: u32 = 13;
const ATTACH_CGROUP_SOCK_OPS: u32 = 3;

#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
    node: u32,
    name: [u8; 16],
    interface: u32,
    btf: u32,
    btf_key: u32,
    btf_value: u32,
}

#[repr(C)]
struct ProgLoad {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
}

#[repr(C)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct BtfLoad {
    btf: u64,
    log: u64,
    size: u32,
    log_size: u32,
    log_level: u32,
    pad: u32,
}

#[repr(C)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

/// # Safety
///
/// `attributes` is what the command takes, and its addresses are those of memory of the sizes that it says.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// As [`bpf`], for commands whose result is a descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is new.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn name(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

/// Makes a map from sockets to 32-bit words.
pub(crate) fn make_map() -> io::Result<OwnedFd> {
    // The kernel wants the types of such a map described: one, a 32-bit integer.
    const BTF: [u32; 10] = [0x0001_eb9f, 24, 0, 16, 16, 5, 1, 1 << 24, 4, 32];
    let mut btf: Vec<u8> = BTF.iter().flat_map(|word| word.to_ne_bytes()).collect();
    btf.extend(b"\0int\0");
    let load = BtfLoad {
        btf: btf.as_ptr() as u64,
        log: 0,
        size: btf.len() as u32,
        log_size: 0,
        log_level: 0,
        pad: 0,
    };
    // SAFETY: `btf` is as long as it says, and lives until the call has returned.
    let btf = unsafe { bpf_fd(BTF_LOAD, &load) }?;
    let create = MapCreate {
        kind: MAP_TYPE_SK_STORAGE,
        key_size: 4,
        value_size: 4,
        max_entries: 0,
        flags: MAP_NO_PREALLOC | MAP_CLONE,
        inner: 0,
        node: 0,
        name: name("smc_option"),
        interface: 0,
        btf: btf.as_raw_fd() as u32,
        btf_key: 1,
        btf_value: 1,
    };
    // SAFETY: there are no addresses in it.
    unsafe { bpf_fd(MAP_CREATE, &create) }
}

/// Has the kernel check and take a program; with what it says if it does not like it.
pub(crate) fn load(program: &[Instruction]) -> Result<OwnedFd, (io::Error, String)> {
    let mut log = vec![0u8; 64 << 10];
    let mut load = ProgLoad {
        kind: PROG_TYPE_SOCK_OPS,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: c"Dual BSD/GPL".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel: 0,
        flags: 0,
        name: name("smc_option"),
        interface: 0,
        attach: ATTACH_CGROUP_SOCK_OPS,
    };
    // SAFETY: the program and the licence are as long as they say.
    unsafe { bpf_fd(PROG_LOAD, &load) }.map_err(|error| {
        (load.log_level, load.log_size, load.log) = (1, log.len() as u32, log.as_mut_ptr() as u64);
        // SAFETY: as before, and so is the log.
        let again = unsafe { bpf_fd(PROG_LOAD, &load) };
        drop(again);
        let len = log.iter().position(|byte| *byte == 0).unwrap_or(0);
        (error, String::from_utf8_lossy(&log[..len]).into_owned())
    })
}

/// Has the program called for all sockets of a control group and those below.
pub(crate) fn attach(program: BorrowedFd<'_>, group: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let (program, target) = (program.as_raw_fd() as u32, group.as_raw_fd() as u32);
    let create = LinkCreate { program, target, attach: ATTACH_CGROUP_SOCK_OPS, flags: 0 };
    // SAFETY: there are no addresses in it.
    unsafe { bpf_fd(LINK_CREATE, &create) }
}

/// Gives something a name, by which it stays.
pub(crate) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_string(path)?;
    let object = Object { path: path.as_ptr() as u64, fd: object.as_raw_fd() as u32, flags: 0 };
    // SAFETY: the path ends with a zero.
    unsafe { bpf(OBJ_PIN, &object) }.map(|_| ())
}

/// What has that name.
pub(crate) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_string(path)?;
    // SAFETY: the path ends with a zero.
    unsafe { bpf_fd(OBJ_GET, &Object { path: path.as_ptr() as u64, fd: 0, flags: 0 }) }
}

/// Says something of a socket.
pub(crate) fn update(map: BorrowedFd<'_>, socket: RawFd, value: u32) -> io::Result<()> {
    let (key, value) = (socket, value);
    // SAFETY: key and value have four bytes each, as the map's have.
    unsafe { bpf(MAP_UPDATE_ELEM, &element(map, &raw const key, (&raw const value).cast_mut())) }.map(|_| ())
}

/// What is said of a socket.
pub(crate) fn look_up(map: BorrowedFd<'_>, socket: RawFd) -> io::Result<u32> {
    let (key, mut value) = (socket, 0);
    // SAFETY: as in `update`; the value is written.
    unsafe { bpf(MAP_LOOKUP_ELEM, &element(map, &raw const key, &raw mut value)) }?;
    Ok(value)
}

fn element(map: BorrowedFd<'_>, key: *const i32, value: *mut u32) -> Element {
    Element { map: map.as_raw_fd() as u32, pad: 0, key: key as u64, value: value as u64, flags: 0 }
}
