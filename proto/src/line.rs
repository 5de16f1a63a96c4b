//! The control line of a DMB: who sleeps, who rings (`docs/device.md`, 8 and 9).
//!
//! The fences of the protocol are in here, so that no caller can forget one. Everything in a control line may be
//! changed by the other guest at any time: every method reads what it needs once.

use crate::sync::{AtomicU32, AtomicU64, Ordering, full_fence, or_and_fence};

/// A control line as it lies in an extent or in the owner's RAM.
#[derive(Debug, Default)]
#[repr(C, align(64))]
pub struct ControlLine {
    armed: AtomicU32,
    generation: AtomicU32,
    pending: AtomicU64,
    offset: AtomicU64,
    size: AtomicU64,
    rung: AtomicU64,
    suppressed: AtomicU64,
    reserved: [AtomicU64; 2],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<ControlLine>() as u64 == crate::extent::LINE_SIZE);

/// How a sleeping owner wants to be woken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Wake {
    /// By the device: a `SIGNAL` event.
    Signal = 1,
    /// By `FUTEX_WAKE` on [`ControlLine::futex_word`].
    Futex = 2,
}

/// Numbers of the signals of one control line.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LineStats {
    /// How often the sender rang.
    pub rung: u64,
    /// How often it had no need to.
    pub suppressed: u64,
}

impl ControlLine {
    /// The control line at an address.
    ///
    /// # Safety
    ///
    /// `ptr` is aligned to 64 bytes and 64 bytes of memory are mapped there, readable and writable, for all of `'a`.
    /// Others, in this process or not, access them by atomic operations only, or are guests.
    pub unsafe fn from_ptr<'a>(ptr: *mut u8) -> &'a ControlLine {
        // SAFETY: all fields are atomics, which any bytes are valid for; the rest is the caller's promise.
        unsafe { &*ptr.cast::<ControlLine>() }
    }

    /// Owner, before it sleeps: asks to be woken. **Look again at what you wait for after this, before you sleep.**
    pub fn arm(&self, wake: Wake) {
        self.armed.store(wake as u32, Ordering::Relaxed);
        full_fence();
    }

    /// Owner: no longer wants to be woken.
    pub fn disarm(&self) {
        self.armed.store(0, Ordering::Relaxed);
    }

    /// Owner: whether nobody has taken its wish to be woken since [`arm`](Self::arm).
    pub fn is_armed(&self) -> bool {
        self.armed.load(Ordering::Acquire) != 0
    }

    /// Owner: takes the signalled bits. What was written before they were set is visible.
    pub fn take_pending(&self) -> u64 {
        // The load keeps the line shared while there is nothing to take.
        if self.pending.load(Ordering::Relaxed) == 0 { 0 } else { self.pending.swap(0, Ordering::AcqRel) }
    }

    /// Sender, after its write: sets bits, and says whom to ring.
    #[must_use = "somebody may have to be woken"]
    #[inline]
    pub fn signal(&self, mask: u64) -> Option<Wake> {
        if mask == 0 {
            return self.ring();
        }
        self.prefetch();
        or_and_fence(&self.pending, mask);
        self.look()
    }

    /// Sender, after its write: says whom to ring, without setting bits.
    #[must_use = "somebody may have to be woken"]
    #[inline]
    pub fn ring(&self) -> Option<Wake> {
        self.prefetch();
        full_fence();
        self.look()
    }

    /// Behind the fence: whom to ring.
    #[inline]
    fn look(&self) -> Option<Wake> {
        if self.armed.load(Ordering::Relaxed) == 0 {
            self.suppressed.store(self.suppressed.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
            return None;
        }
        self.take_armed()
    }

    /// Fetches the line for writing while the stores before the fence are on their way. While nobody arms, the line is
    /// here anyway.
    #[inline]
    fn prefetch(&self) {
        #[cfg(all(target_arch = "x86_64", not(miri), not(loom)))]
        // SAFETY: a prefetch accesses nothing, and where it is not known it does nothing.
        unsafe {
            core::arch::asm!("prefetchw [{}]", in(reg) self, options(nostack, preserves_flags, readonly));
        }
    }

    #[cold]
    fn take_armed(&self) -> Option<Wake> {
        let wake = match self.armed.swap(0, Ordering::AcqRel) {
            1 => Wake::Signal,
            2 => Wake::Futex,
            _ => return None,
        };
        self.rung.store(self.rung.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        Some(wake)
    }

    /// Sender that rings by a way of its own: counts that it did, or that it had no need to.
    #[inline]
    pub fn count(&self, rang: bool) {
        let counter = if rang { &self.rung } else { &self.suppressed };
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// The word to wait on and to wake: it holds 2 ([`Wake::Futex`]) while the owner sleeps.
    pub fn futex_word(&self) -> &AtomicU32 {
        &self.armed
    }

    /// Device: a DMB starts here.
    pub fn publish(&self, generation: u16, offset: u64, size: u64) {
        self.armed.store(0, Ordering::Relaxed);
        self.pending.store(0, Ordering::Relaxed);
        self.rung.store(0, Ordering::Relaxed);
        self.suppressed.store(0, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
        self.generation.store(generation.into(), Ordering::Release);
    }

    /// Device: no DMB is here any more.
    pub fn retire(&self) {
        self.generation.store(0, Ordering::Release);
    }

    /// Peer that resolves a token by itself: offset and size of the DMB in the extent, if the generation is the token's.
    /// To be checked against the extent ([`Geometry::holds`](crate::extent::Geometry::holds)).
    pub fn resolve(&self, generation: u16) -> Option<(u64, u64)> {
        (self.generation.load(Ordering::Acquire) == u32::from(generation))
            .then(|| (self.offset.load(Ordering::Relaxed), self.size.load(Ordering::Relaxed)))
    }

    /// What the sender counted; for people, not for decisions.
    pub fn stats(&self) -> LineStats {
        LineStats {
            rung: self.rung.load(Ordering::Relaxed),
            suppressed: self.suppressed.load(Ordering::Relaxed),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_sender_rings_only_who_asked() {
        let line = ControlLine::default();
        assert_eq!(line.signal(1), None);
        line.arm(Wake::Signal);
        assert_eq!(line.signal(2), Some(Wake::Signal));
        assert!(!line.is_armed());
        assert_eq!(line.signal(4), None);
        assert_eq!(line.take_pending(), 7);
        assert_eq!(line.take_pending(), 0);
        assert_eq!(line.stats(), LineStats { rung: 1, suppressed: 2 });
    }

    #[test]
    fn a_value_that_nobody_may_write_wakes_nobody() {
        let line = ControlLine::default();
        line.futex_word().store(77, Ordering::Relaxed);
        assert_eq!(line.ring(), None);
        assert!(!line.is_armed());
    }

    #[test]
    fn the_fields_lie_where_the_specification_says() {
        let line = ControlLine::default();
        line.publish(0x1234, 0x4000, 0x2000);
        line.arm(Wake::Futex);
        let _ = line.pending.fetch_or(0x80, Ordering::Relaxed);
        // SAFETY: ControlLine is 64 bytes of integers.
        let bytes: [u8; 64] = unsafe { core::mem::transmute(line) };
        let mut want = [0u8; 64];
        want[..27].copy_from_slice(b"\x02\0\0\0\x34\x12\0\0\x80\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\0\0\x20\0");
        assert_eq!(bytes, want);
    }

    #[test]
    fn a_retired_line_resolves_no_token() {
        let line = ControlLine::default();
        line.publish(9, 0x4000, 0x2000);
        assert_eq!(line.resolve(9), Some((0x4000, 0x2000)));
        assert_eq!(line.resolve(8), None);
        line.retire();
        assert_eq!(line.resolve(9), None);
    }
}
