//! Geometry of an extent: control lines first, then pages for DMBs (`docs/device.md`, 8).

/// Size of a control line, in bytes.
pub const LINE_SIZE: u64 = 64;
/// Control lines in a page, which is what a driver can hand to a program.
pub const LINES_PER_PAGE: u16 = (crate::GRANULE / LINE_SIZE) as u16;
/// The smallest extent, in bytes.
pub const MIN_EXTENT_SIZE: u64 = 1 << 20;
/// Bytes of an extent for each control line in it.
pub const BYTES_PER_LINE: u64 = 8192;
/// A line's number has 16 bits.
const MAX_LINES: u64 = 1 << 16;

/// An extent's size, known to be one that an extent can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    size: u64,
}

impl Geometry {
    /// `None` unless `size` is a power of two, at least [`MIN_EXTENT_SIZE`], at most 2^47.
    pub const fn new(size: u64) -> Option<Geometry> {
        if size.is_power_of_two() && size >= MIN_EXTENT_SIZE && size <= 1 << 47 {
            Some(Geometry { size })
        } else {
            None
        }
    }

    /// The smallest extent that has `bytes` for DMBs, or `None` if there is none.
    pub fn with_room_for(bytes: u64) -> Option<Geometry> {
        let mut geometry = Geometry::new(bytes.checked_next_power_of_two()?.max(MIN_EXTENT_SIZE))?;
        if geometry.capacity() < bytes {
            geometry = Geometry::new(geometry.size * 2)?;
        }
        Some(geometry)
    }

    /// Bytes in all.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// Number of control lines.
    pub const fn lines(self) -> u64 {
        let lines = self.size / BYTES_PER_LINE;
        if lines < MAX_LINES { lines } else { MAX_LINES }
    }

    /// Bytes that the control lines take; DMBs start here at the earliest.
    pub const fn header_size(self) -> u64 {
        self.lines() * LINE_SIZE
    }

    /// Bytes for DMBs.
    pub const fn capacity(self) -> u64 {
        self.size - self.header_size()
    }

    /// Offset of a control line in the extent; `None` if there is no such line.
    pub fn line_offset(self, line: u16) -> Option<u64> {
        (u64::from(line) < self.lines()).then_some(u64::from(line) * LINE_SIZE)
    }

    /// Whether a DMB may lie there: wholly behind the control lines, in the extent, at multiples of the granule.
    pub fn holds(self, offset: u64, size: u64) -> bool {
        size != 0
            && offset.is_multiple_of(crate::GRANULE)
            && size.is_multiple_of(crate::GRANULE)
            && offset >= self.header_size()
            && offset.checked_add(size).is_some_and(|end| end <= self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_no_extent_has_are_refused() {
        for size in [0, 1, 4096, MIN_EXTENT_SIZE - 1, MIN_EXTENT_SIZE + 4096, 3 << 20, 1 << 48, u64::MAX] {
            assert_eq!(Geometry::new(size), None, "{size}");
        }
    }

    #[test]
    fn lines_take_less_than_a_hundredth() {
        let g = Geometry::new(2 << 20).unwrap();
        assert_eq!((g.lines(), g.header_size(), g.capacity()), (256, 16384, (2 << 20) - 16384));
        let g = Geometry::new(1 << 40).unwrap();
        assert_eq!(g.lines(), 65536);
    }

    #[test]
    fn room_is_behind_the_lines() {
        let g = Geometry::with_room_for(1 << 20).unwrap();
        assert_eq!(g.size(), 2 << 20);
        assert!(g.capacity() >= 1 << 20);
        assert_eq!(Geometry::with_room_for(u64::MAX), None);
        assert!(g.holds(g.header_size(), 4096));
        assert!(!g.holds(g.header_size() - 4096, 4096));
        assert!(!g.holds(g.header_size(), g.size()));
        assert!(!g.holds(u64::MAX - 4095, 4096));
    }

    #[test]
    fn a_line_beyond_the_last_does_not_exist() {
        let g = Geometry::new(1 << 20).unwrap();
        assert_eq!(g.line_offset(127), Some(127 * 64));
        assert_eq!(g.line_offset(128), None);
    }
}
