//! What happened, and why something stayed TCP: counters that `dmbridge-run --stats` shows for all processes it started.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where `dmbridge-run` put the counters' file.
pub const ENVIRONMENT: &str = "DMBRIDGE_RUN_STATS";

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident: $text:literal,)*) => {
        /// The counters.
        #[repr(C)]
        pub struct Stats {
            $($(#[$doc])* pub $name: AtomicU64,)*
        }

        /// What each says, in their order.
        #[allow(dead_code, reason = "the library counts, dmbridge-run shows")]
        pub const TEXTS: &[&str] = &[$($text),*];

        static OWN: Stats = Stats { $($name: AtomicU64::new(0),)* };
    };
}

counters! {
    /// Connections that were looked at.
    candidates: "connections that did enough to be worth moving",
    /// Connections with rings.
    linked: "connections whose other end was found",
    /// Directions that switched.
    moved_directions: "directions of connections that moved to DMBs",
    /// Bytes that went into rings.
    bytes_sent: "bytes sent through DMBs",
    /// Bytes that came out of rings.
    bytes_received: "bytes received through DMBs",
    /// No device.
    no_daemon: "stayed TCP: no device or daemon, or it refused",
    /// The peer is elsewhere.
    elsewhere: "stayed TCP: the other end is not in this network namespace, and no network was named",
    /// The peer did not come.
    alone: "stayed TCP: the other end does not run under dmbridge-run",
    /// The peer is none.
    stranger: "stayed TCP: who said to be the other end is not",
    /// The peer could not.
    refused: "stayed TCP: the other end could not, and counts why",
    /// No mapping.
    unmapped: "stayed TCP: one of the two ends cannot map memory of the other",
    /// Several processes.
    shared: "stayed TCP for now: several processes have the socket",
    /// Options.
    unsuitable: "stayed TCP: something is set that only TCP can do",
    /// Memory.
    no_memory: "stayed TCP: no more DMBs",
    /// io_uring.
    io_uring: "stayed TCP: the program uses io_uring",
    /// See `service::end`.
    ended: "programs that allowed themselves fewer system calls (seccomp), or use io_uring: from then on they have TCP",
    /// Handed on.
    called_back: "went back to TCP: another program got the connection",
    /// Used in a way that only TCP has.
    left: "went back to TCP: the program did something with it that only TCP can do",
    /// Its ring was full.
    stalled: "went back to TCP: the other end did not read, and TCP holds more",
    /// Handed on in vain.
    broken: "broken off: another program got the connection, and the other end did not answer",
}

/// The counters of this process, or of all that `dmbridge-run` started.
pub fn get() -> &'static Stats {
    static SHARED: OnceLock<Option<&'static Stats>> = OnceLock::new();
    SHARED.get_or_init(|| map(&std::env::var_os(ENVIRONMENT)?)).unwrap_or(&OWN)
}

fn map(path: &std::ffi::OsStr) -> Option<&'static Stats> {
    use std::os::fd::AsRawFd;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).ok()?;
    if file.metadata().ok()?.len() < size_of::<Stats>() as u64 {
        return None;
    }
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of a file that is long enough; any bytes are counters.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            size_of::<Stats>(),
            access,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        (at != libc::MAP_FAILED).then(|| &*at.cast::<Stats>())
    }
}

/// One more.
pub fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
