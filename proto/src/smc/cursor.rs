//! Cursors of a ring in a DMB, checked (Linux `net/smc/smc_cdc.h`: `smc_curs_add`, `smc_curs_diff`).
//!
//! The peer writes its cursors into shared memory and may write anything. [`Cursor::distance`] is the one place where a
//! cursor that breaks the protocol is caught.

/// A position in a ring: how often it went around, and the byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct Cursor {
    /// How often the ring was gone around, modulo 2^16.
    pub wrap: u16,
    /// The byte in the ring, below the ring's size.
    pub count: u32,
}

impl Cursor {
    /// The cursor `by` bytes further in a ring of `size` bytes; `by` is at most `size`, `size` at most 2^31.
    #[must_use]
    #[inline]
    pub const fn advance(self, by: u32, size: u32) -> Cursor {
        let count = self.count + by;
        if count >= size {
            Cursor { wrap: self.wrap.wrapping_add(1), count: count - size }
        } else {
            Cursor { wrap: self.wrap, count }
        }
    }

    /// How many bytes `later` is ahead of this cursor in a ring of `size` bytes: 0 to `size`. `None` if it is not: then
    /// whoever wrote one of them breaks the protocol.
    #[inline]
    pub const fn distance(self, later: Cursor, size: u32) -> Option<u32> {
        if self.count >= size || later.count >= size {
            return None;
        }
        if later.wrap == self.wrap {
            later.count.checked_sub(self.count)
        } else if later.wrap == self.wrap.wrapping_add(1) && later.count <= self.count {
            Some(size - self.count + later.count)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_undoes_advance_everywhere_in_a_small_ring() {
        let size = 7;
        for count in 0..size {
            for wrap in [0, 1, u16::MAX] {
                let start = Cursor { wrap, count };
                for by in 0..=size {
                    assert_eq!(start.distance(start.advance(by, size), size), Some(by));
                }
            }
        }
    }

    #[test]
    fn a_cursor_that_no_peer_may_write_is_caught() {
        let here = Cursor { wrap: 5, count: 10 };
        for (wrap, count) in [(5, 9), (5, 64), (6, 11), (7, 0), (4, 10), (5, u32::MAX), (6, 64)] {
            assert_eq!(here.distance(Cursor { wrap, count }, 64), None, "{wrap} {count}");
        }
        for (wrap, count) in [(4, 64), (4, 70), (4, u32::MAX), (5, 64)] {
            assert_eq!(Cursor { wrap, count }.distance(here, 64), None, "{wrap} {count}");
        }
        for (wrap, count) in [(5, 11), (4, 9), (5, u32::MAX), (4, 64), (4, u32::MAX)] {
            assert_eq!(Cursor { wrap, count }.distance(here, 64), None, "{wrap} {count}");
        }
    }
}
