//! What is known of each descriptor number of this process. Touched only where TCP sockets are; looked up by every call.

use crate::conn::Conn;
use crate::epoll::{Registrations, Set};
use libc::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

/// Descriptors beyond are left alone.
const DESCRIPTORS: usize = 1 << 20;

/// Standard input, output and error: the C library itself reads and writes there, where nobody sees it.
pub const STANDARD: std::ops::RangeInclusive<c_int> = 0..=2;

/// What a descriptor is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// Nothing of ours.
    Other = 0,
    /// A TCP socket that is not connected.
    Socket = 1,
    /// A TCP connection that has to prove itself.
    Open = 2,
    /// A TCP connection with a [`Conn`].
    Conn = 3,
    /// A TCP connection that stays one.
    Never = 4,
    /// An epoll instance.
    Epoll = 5,
    /// A TCP connection with a [`Conn`] whose rings this process does not have; see `handover.rs`.
    Stranger = 6,
    /// Not the program's.
    Ours = 7,
}

/// A descriptor.
#[derive(Debug)]
pub struct Entry {
    kind: AtomicU8,
    /// This process called `connect` on it.
    active: AtomicU8,
    /// How much it has proved; see [`weight`].
    pub weight: AtomicU32,
    /// Threads inside a call of the kernel for it, while it is [`Kind::Open`].
    pub inside: AtomicU32,
    conn: AtomicU32,
    /// Where it is registered. Made once, kept for all lives of the number.
    registrations: AtomicPtr<Registrations>,
    /// What an epoll instance needs. As above.
    set: AtomicPtr<Set>,
}

static TABLE: OnceLock<&'static [Entry]> = OnceLock::new();
/// No descriptor above is in the table.
static HIGHEST: AtomicU32 = AtomicU32::new(0);

/// Makes the table: address space only.
pub fn init() {
    TABLE.get_or_init(|| {
        let len = DESCRIPTORS * size_of::<Entry>();
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new private mapping; all-zero bytes are a valid Entry, whose fields are atomics.
        unsafe {
            let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            if at == libc::MAP_FAILED { &[] } else { std::slice::from_raw_parts(at.cast(), DESCRIPTORS) }
        }
    });
}

/// The entry of a descriptor.
#[inline]
pub fn get(fd: c_int) -> Option<&'static Entry> {
    TABLE.get()?.get(usize::try_from(fd).ok()?)
}

/// All entries that may say something.
pub fn all() -> impl Iterator<Item = (c_int, &'static Entry)> {
    let highest = HIGHEST.load(Ordering::Relaxed) as usize;
    let entries = TABLE.get().copied().unwrap_or_default();
    entries.iter().take(highest + 1).enumerate().map(|(fd, entry)| (fd as c_int, entry))
}

/// No descriptor from here on is in the table.
pub fn limit() -> u32 {
    DESCRIPTORS as u32
}

/// Whether it is a TCP connection that may move.
#[inline]
pub fn is_ours(fd: c_int) -> bool {
    get(fd).is_some_and(|entry| matches!(entry.kind(), Kind::Open | Kind::Conn | Kind::Stranger))
}

/// Whether it is anything that is followed.
#[inline]
pub fn is_interesting(fd: c_int) -> bool {
    get(fd).is_some_and(|entry| entry.kind() != Kind::Other)
}

/// Whether it is of a kind.
pub fn is_kind(fd: c_int, kind: Kind) -> bool {
    get(fd).is_some_and(|entry| entry.kind() == kind)
}

/// A descriptor that this process has of a connection.
pub fn descriptor(index: u32) -> Option<c_int> {
    all().find(|(_, entry)| entry.kind() == Kind::Conn && entry.conn_index() == index).map(|(fd, _)| fd)
}

/// Whether this process has a connection with its rings.
pub fn has_rings(conn: &Conn) -> bool {
    all().any(|(_, entry)| entry.conn().is_some_and(|c| std::ptr::eq(c, conn)))
}

/// The connection behind a descriptor.
#[inline]
pub fn conn(fd: c_int) -> Option<&'static Conn> {
    get(fd)?.conn()
}

impl Entry {
    #[inline]
    pub fn kind(&self) -> Kind {
        match self.kind.load(Ordering::Acquire) {
            1 => Kind::Socket,
            2 => Kind::Open,
            3 => Kind::Conn,
            4 => Kind::Never,
            5 => Kind::Epoll,
            6 => Kind::Stranger,
            7 => Kind::Ours,
            _ => Kind::Other,
        }
    }

    /// The number has a new life.
    pub fn start(&self, fd: c_int, kind: Kind, active: bool) {
        HIGHEST.fetch_max(fd as u32, Ordering::Relaxed);
        self.weight.store(0, Ordering::Relaxed);
        self.active.store(active.into(), Ordering::Relaxed);
        if let Some(registrations) = self.registrations() {
            registrations.clear();
        }
        self.kind.store(kind as u8, Ordering::SeqCst);
    }

    pub fn set_kind(&self, kind: Kind) {
        self.kind.store(kind as u8, Ordering::SeqCst);
    }

    /// Whether this end called `connect`.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed) != 0
    }

    pub fn set_active(&self) {
        self.active.store(1, Ordering::Relaxed);
    }

    /// The number of its connection, if its kind says that it has one.
    pub fn conn_index(&self) -> u32 {
        self.conn.load(Ordering::Acquire)
    }

    #[inline]
    pub fn conn(&self) -> Option<&'static Conn> {
        if self.kind() != Kind::Conn {
            return None;
        }
        crate::arena::conn(self.conn.load(Ordering::Acquire))
    }

    /// From now on it has this connection.
    pub fn set_conn(&self, fd: c_int, index: u32, active: bool) {
        HIGHEST.fetch_max(fd as u32, Ordering::Relaxed);
        self.active.store(active.into(), Ordering::Relaxed);
        self.conn.store(index, Ordering::Release);
        self.kind.store(Kind::Conn as u8, Ordering::SeqCst);
    }

    pub fn registrations(&self) -> Option<&'static Registrations> {
        // SAFETY: what is stored there was leaked, and is never freed.
        unsafe { self.registrations.load(Ordering::Acquire).as_ref() }
    }

    pub fn registrations_or_new(&self) -> &'static Registrations {
        or_new(&self.registrations)
    }

    pub fn set(&self) -> Option<&'static Set> {
        // SAFETY: as above.
        unsafe { self.set.load(Ordering::Acquire).as_ref() }
    }

    pub fn set_or_new(&self) -> &'static Set {
        or_new(&self.set)
    }

    /// It is what another descriptor is, too. What it needed in an earlier life is never used again.
    pub fn share_set(&self, set: &'static Set) {
        self.set.store(std::ptr::from_ref(set).cast_mut(), Ordering::Release);
    }

    /// Others have it on: this one gets another one in its next life.
    pub fn forget_set(&self) {
        self.set.store(std::ptr::null_mut(), Ordering::Release);
    }
}

fn or_new<T: Default>(at: &AtomicPtr<T>) -> &'static T {
    let there = at.load(Ordering::Acquire);
    if there.is_null() {
        let new = Box::into_raw(Box::<T>::default());
        match at.compare_exchange(std::ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: it was just leaked, and nobody frees it.
            Ok(_) => return unsafe { &*new },
            Err(other) => {
                // SAFETY: nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
                // SAFETY: it was leaked by somebody else, and nobody frees it.
                return unsafe { &*other };
            }
        }
    }
    // SAFETY: it was leaked, and nobody frees it.
    unsafe { &*there }
}

/// What a call that moved so many bytes proves.
#[inline]
pub fn weight(bytes: usize) -> u32 {
    1 + (bytes >> 12).min(1 << 16) as u32
}

/// So much makes a connection a candidate: some dozens of calls, or some hundred KiB. A connection that serves one request
/// does not get there.
pub const PROVEN: u32 = 32;
