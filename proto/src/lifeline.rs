//! `LIFELINE`: how a device can tell a driver that has ended from one whose virtual machine is paused
//! (`docs/device.md`, 6.9 and 11).

/// The part of the word that is not zero while the driver lives.
const OWNER: u32 = 0x3fff_ffff;
/// Set by Linux when a thread ends that had the word in its list of robust futexes.
const DIED: u32 = 1 << 30;

/// Whether a driver whose lifeline has this value lives.
pub fn is_alive(word: u32) -> bool {
    word & OWNER != 0 && word & DIED == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lifeline_is_a_robust_futex() {
        // A thread's number, also with waiters.
        assert!(is_alive(1) && is_alive(4321 | 1 << 31));
        // Let go; the thread has ended, as the kernel writes it; memory that is used for something else.
        for dead in [0, DIED, DIED | 1 << 31, DIED | 4321, u32::MAX] {
            assert!(!is_alive(dead), "{dead:#x}");
        }
    }
}
