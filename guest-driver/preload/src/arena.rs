//! Where connections' states lie: in memory that forked processes share, so that all of them see the same connection.
//! Reserved with the first connection that needs it.

use crate::conn::{Conn, State};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

/// Connections of a family of processes at most. Others stay TCP.
const CONNS: u32 = 1 << 16;

#[repr(C)]
struct Arena {
    /// Connections below have been used.
    used: AtomicU32,
    /// Where the next search for a free one starts.
    hint: AtomicU32,
    conns: [Conn; CONNS as usize],
}

static ARENA: OnceLock<Option<&'static Arena>> = OnceLock::new();
/// How many descriptors of this process each connection has.
static DESCRIPTORS: [AtomicU16; CONNS as usize] = [const { AtomicU16::new(0) }; CONNS as usize];

fn arena() -> Option<&'static Arena> {
    *ARENA.get_or_init(|| {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping; all-zero bytes are a valid Arena, whose fields are atomics and plain integers.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), size_of::<Arena>(), access, flags, -1, 0);
            (at != libc::MAP_FAILED).then(|| &*at.cast::<Arena>())
        }
    })
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
        let i = arena.used.fetch_add(1, Ordering::AcqRel);
        (i < CONNS && arena.conns[i as usize].take()).then_some(i)
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

/// Connections of which this process has descriptors.
pub fn of_this_process() -> impl Iterator<Item = (u32, &'static Conn)> {
    all().filter(|(i, conn)| {
        DESCRIPTORS[*i as usize].load(Ordering::Relaxed) != 0 && conn.state() != State::Free
    })
}
