//! Where connections' states lie: in memory that forked processes share, and programs that they execute, so that all of
//! them see the same connection. Made with the first connection that needs it.

use crate::conn::{Conn, State};
use crate::table::{self, Kind};
use crate::{errno, real};
use libc::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Connections of a family of processes at most. Others stay TCP.
const CONNS: u32 = 1 << 16;
/// What the memory starts with: who finds something else leaves it alone.
const MAGIC: u64 = 0x6e72_6472_6964_6d00 + size_of::<Arena>() as u64;
/// Our descriptors are out of the way of a program's.
const HIGH: libc::c_ulong = 400;

#[repr(C)]
struct Arena {
    magic: AtomicU64,
    /// Connections below have been used.
    used: AtomicU32,
    /// Where the next search for a free one starts.
    hint: AtomicU32,
    conns: [Conn; CONNS as usize],
}

static ARENA: OnceLock<Option<&'static Arena>> = OnceLock::new();
/// The memory, and an eventfd that calls the threads of all its processes; -1: none.
static FILES: [AtomicI32; 2] = [const { AtomicI32::new(-1) }; 2];
/// How many descriptors of this process each connection has.
static DESCRIPTORS: [AtomicU16; CONNS as usize] = [const { AtomicU16::new(0) }; CONNS as usize];

fn arena() -> Option<&'static Arena> {
    *ARENA.get_or_init(|| {
        errno::keep(|| {
            let arena = map(new_memory().unwrap_or(-1))?;
            arena.magic.store(MAGIC, Ordering::Release);
            Some(arena)
        })
    })
}

/// Makes the files. `None`: this process may not have them, and programs that it executes get connections that are TCP.
fn new_memory() -> Option<c_int> {
    let size = size_of::<Arena>();
    // SAFETY: an rlimit; new descriptors.
    let new = unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        // It would be ended by a signal.
        if libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) != 0 || limit.rlim_cur < size as u64 {
            return None;
        }
        let memory = real::memfd_create(c"dmbridge-run".as_ptr(), libc::MFD_CLOEXEC);
        if libc::ftruncate(memory, size as i64) != 0 {
            real::close(memory);
            return None;
        }
        [memory, real::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK)]
    };
    keep_files(new.map(own));
    Some(files()[0])
}

/// Maps the memory; -1: memory that has no file.
fn map(memory: c_int) -> Option<&'static Arena> {
    let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | if memory < 0 { libc::MAP_ANONYMOUS } else { 0 };
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping, of a file that is long enough if it is one; all-zero bytes are a valid Arena, whose fields are
    // atomics and plain integers.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), size_of::<Arena>(), access, flags, memory, 0);
        (at != libc::MAP_FAILED).then(|| &*at.cast::<Arena>())
    }
}

/// A new descriptor is ours: has a number that programs do not use, and is closed by nobody else, even if a program closes all
/// that there are.
pub fn own(fd: c_int) -> c_int {
    if fd < 0 {
        return fd;
    }
    // SAFETY: a descriptor of ours.
    let own = errno::keep(|| unsafe {
        match real::fcntl(fd, libc::F_DUPFD_CLOEXEC, HIGH) {
            -1 => fd,
            high => {
                real::close(fd);
                high
            }
        }
    });
    mark(own);
    own
}

fn mark(fd: c_int) {
    if let Some(entry) = table::get(fd) {
        entry.start(fd, Kind::Ours, false);
    }
}

/// Closes a descriptor of ours.
pub fn disown(fd: c_int) {
    if let Some(entry) = table::get(fd) {
        entry.set_kind(Kind::Other);
    }
    // SAFETY: ours.
    errno::keep(|| unsafe { real::close(fd) });
}

/// In a fork's child, where the thread that used them is not: they are closed with all others there.
pub fn disown_all() {
    let files = files();
    for (_, entry) in table::all().filter(|(fd, entry)| entry.kind() == Kind::Ours && !files.contains(fd)) {
        entry.set_kind(Kind::Other);
    }
}

fn keep_files(files: [c_int; 2]) {
    for (at, fd) in FILES.iter().zip(files) {
        at.store(fd, Ordering::Release);
        mark(fd);
    }
}

/// The memory's descriptor, and that of the eventfd.
pub fn files() -> [c_int; 2] {
    [0, 1].map(|i: usize| FILES[i].load(Ordering::Acquire))
}

/// The program wants this number for itself.
pub fn make_way(fd: c_int) {
    for at in FILES.iter().filter(|at| at.load(Ordering::Acquire) == fd) {
        // SAFETY: a descriptor of ours.
        let to = unsafe { real::fcntl(fd, libc::F_DUPFD_CLOEXEC, HIGH) };
        at.store(to, Ordering::Release);
        if let Some(entry) = table::get(fd) {
            entry.set_kind(Kind::Other);
        }
        mark(to);
    }
}

/// The memory of the family that this program was executed by.
pub fn inherit(files: [c_int; 2]) -> bool {
    let mut status: libc::stat = {
        // SAFETY: all-zero bytes are a stat.
        unsafe { std::mem::zeroed() }
    };
    // SAFETY: a stat.
    let found = unsafe { libc::fstat(files[0], &mut status) } == 0;
    if !found || status.st_size != size_of::<Arena>() as i64 {
        return false;
    }
    let Some(arena) = map(files[0]).filter(|arena| arena.magic.load(Ordering::Acquire) == MAGIC) else {
        return false;
    };
    keep_files(files);
    ARENA.set(Some(arena)).is_ok()
}

/// Calls the threads of all processes of the family.
pub fn ring() {
    let one = 1u64;
    // SAFETY: 8 bytes into an eventfd.
    errno::keep(|| unsafe { real::write(files()[1], (&raw const one).cast(), 8) });
}

/// The connection of this number.
#[inline]
pub fn conn(index: u32) -> Option<&'static Conn> {
    ARENA.get().copied().flatten()?.conns.get(index as usize)
}

/// All that were ever used.
pub fn all() -> impl Iterator<Item = (u32, &'static Conn)> {
    let arena = ARENA.get().copied().flatten();
    let used = arena.map_or(0, |a| a.used.load(Ordering::Acquire));
    (0..used).filter_map(|i| Some((i, conn(i)?)))
}

/// A fresh connection, held by this process.
pub fn allocate() -> Option<(u32, &'static Conn)> {
    let arena = arena()?;
    let used = arena.used.load(Ordering::Acquire).min(CONNS);
    let hint = arena.hint.load(Ordering::Relaxed);
    // Those that were used before first; a few tries only, so that it stays cheap.
    let old = (0..used.min(64)).map(|i| (hint + i) % used.max(1));
    let taken = old.into_iter().find(|&i| arena.conns[i as usize].take()).or_else(|| {
        let next = (used < CONNS).then(|| arena.used.fetch_add(1, Ordering::AcqRel))?;
        (next < CONNS && arena.conns[next as usize].take()).then_some(next)
    })?;
    arena.hint.store(taken + 1, Ordering::Relaxed);
    DESCRIPTORS[taken as usize].store(0, Ordering::Relaxed);
    Some((taken, &arena.conns[taken as usize]))
}

/// This process has one more descriptor of it.
pub fn add_descriptor(index: u32) {
    DESCRIPTORS[index as usize].fetch_add(1, Ordering::AcqRel);
}

/// This process has one descriptor less of it. True if that was the last.
pub fn remove_descriptor(index: u32) -> bool {
    DESCRIPTORS[index as usize].fetch_sub(1, Ordering::AcqRel) == 1
}

/// How many descriptors of it this process has.
pub fn descriptors(index: u32) -> u16 {
    DESCRIPTORS[index as usize].load(Ordering::Acquire)
}

/// Connections of which this process has descriptors.
pub fn of_this_process() -> impl Iterator<Item = (u32, &'static Conn)> {
    all().filter(|(i, conn)| {
        DESCRIPTORS[*i as usize].load(Ordering::Relaxed) != 0 && conn.state() != State::Free
    })
}
