//! The first page of a connection's DMB; the ring of bytes follows. The peer writes it, except for `armed`.
//!
//! | offset | size | field | |
//! | --- | --- | --- | --- |
//! | 0 | 32 | CDC message | SMC-D's: how far the peer has written here, and read there |
//! | 32 | 8 | `alive` | the owner's: as long as it is what the owner has put there, this is the DMB's memory |
//! | 64 | 8 | `switch` | 1 + the position in the peer's TCP stream from which on its bytes are in the ring; 0: not yet |
//! | 72 | 4 | `ready` | 1: the peer's readers know of the ring that this side writes |
//! | 76 | 4 | `recall` | what the peer wants of a connection that goes back to TCP; see `conn/back.rs` |
//! | 80 | 8 | `back` | 1 + the position in the peer's TCP stream from which on its bytes are there again; 0: not yet |
//! | 88 | 4 | `took` | 1: the peer has taken back what this side has not read of its ring; 2: it is there to do so |
//! | 128 | 4 | `armed` | what the owner wants to be woken for; the owner sets, the peer takes |
//! | 136 | 8 | `sleep` | the owner's: names the sleep for which it armed; many connections may have one. 0: none |
//! | 192 | 8 | `wakes` | bytes that the peer has sent over TCP after `switch`, to wake |

use crate::{errno, lock, real};
use dmbridge_proto::smc::cdc::CdcMessage;
use libc::c_int;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Size of the header: where the ring starts.
pub const SIZE: usize = 4096;

/// Wake me when there is data.
pub const DATA: u32 = 1;
/// Wake me when there is room.
pub const ROOM: u32 = 2;
/// Wake me when there is room, but not by a byte: I sleep on `armed` itself.
const ROOM_HERE: u32 = ROOM << 1;

/// A header in a DMB.
#[repr(C)]
pub struct Header {
    pub cdc: CdcMessage,
    pub alive: AtomicU64,
    _a: [u64; 3],
    pub switch: AtomicU64,
    pub ready: AtomicU32,
    pub recall: AtomicU32,
    pub back: AtomicU64,
    pub took: AtomicU32,
    _b: [u32; 9],
    pub armed: AtomicU32,
    _c: u32,
    pub sleep: AtomicU64,
    _d: [u64; 6],
    pub wakes: AtomicU64,
}

const _: () = {
    assert!(std::mem::offset_of!(Header, alive) == 32);
    assert!(std::mem::offset_of!(Header, switch) == 64);
    assert!(std::mem::offset_of!(Header, ready) == 72);
    assert!(std::mem::offset_of!(Header, back) == 80);
    assert!(std::mem::offset_of!(Header, armed) == 128);
    assert!(std::mem::offset_of!(Header, sleep) == 136);
    assert!(std::mem::offset_of!(Header, wakes) == 192);
};

impl Header {
    /// The header at the start of a DMB.
    ///
    /// # Safety
    ///
    /// A page of memory is mapped at `at` for all of `'a`, aligned to a page, and accessed by atomic operations only.
    pub unsafe fn at<'a>(at: *mut u8) -> &'a Header {
        // SAFETY: the caller's promise; any bytes are valid for it.
        unsafe { &*at.cast::<Header>() }
    }

    /// Owner: asks to be woken. **Look again after this.**
    #[inline]
    pub fn arm(&self, what: u32, sleep: u64) {
        self.sleep.store(sleep, Ordering::Relaxed);
        self.armed.fetch_or(what, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Owner: is awake, and nobody sleeps by this.
    #[inline]
    pub fn disarm(&self) {
        if self.armed.load(Ordering::Relaxed) & !ROOM_HERE != 0 {
            self.armed.fetch_and(ROOM_HERE, Ordering::SeqCst);
        }
    }

    /// Owner: sleeps until there is room, where no byte can wake it, or for so long. It does not sleep if `ready`. Says as
    /// an errno what ended the sleep. A peer in another guest cannot wake by this.
    pub fn sleep_for_room(&self, longest: Duration, ready: impl FnOnce() -> bool) -> Result<(), c_int> {
        let armed = self.armed.fetch_or(ROOM_HERE, Ordering::SeqCst) | ROOM_HERE;
        fence(Ordering::SeqCst);
        if ready() {
            return Ok(());
        }
        match lock::wait(&self.armed, armed, longest) {
            // Nobody can sleep on memory of a guest's device.
            Err(libc::EFAULT) => {
                let ms = longest.as_nanos().div_ceil(1_000_000) as c_int;
                // SAFETY: no descriptors.
                errno::outcome(unsafe { real::poll(std::ptr::null_mut(), 0, ms) } as isize).map(|_| ())
            }
            ended => ended,
        }
    }

    /// Peer, after it has written: whether the owner is to be woken for this.
    #[inline]
    #[must_use = "somebody may have to be woken"]
    pub fn take(&self, what: u32) -> bool {
        fence(Ordering::SeqCst);
        // ROOM_HERE goes with ROOM.
        let mine = what | (what & ROOM) << 1;
        if self.armed.load(Ordering::Relaxed) & mine == 0 {
            return false;
        }
        let taken = self.armed.fetch_and(!mine, Ordering::AcqRel);
        if taken & mine & ROOM_HERE != 0 {
            lock::wake(&self.armed, i32::MAX);
        }
        taken & what != 0 && is_first(self.sleep.load(Ordering::Relaxed))
    }
}

/// Whether nobody of this process has woken that sleep yet. Who sleeps for many connections looks at all of them when one
/// wakes it; and before it sleeps again it names a new sleep, and looks again after that.
fn is_first(sleep: u64) -> bool {
    static WOKEN: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
    // Neighbours are sleeps of the same sleeper.
    sleep == 0 || WOKEN[(sleep >> 40) as usize % WOKEN.len()].swap(sleep, Ordering::Relaxed) != sleep
}
