//! Allocation of control lines in an extent, and of their generations (`docs/device.md`, 8). Only numbers, no memory.

use std::num::NonZeroU16;

/// The lines of one extent.
#[derive(Debug)]
pub struct Lines {
    count: u32,
    /// Lines from here on were never used.
    fresh: u32,
    /// Lines that are free again; the one that was freed last comes last to be used again, so that an old token stays
    /// wrong for as long as possible.
    free: std::collections::VecDeque<u16>,
    /// Generations of the lines that were used.
    generations: Vec<u16>,
}

impl Lines {
    /// `count` free lines, at most 65536.
    pub fn new(count: u64) -> Lines {
        Lines {
            count: count.min(1 << 16) as u32,
            fresh: 0,
            free: std::collections::VecDeque::new(),
            generations: Vec::new(),
        }
    }

    /// Whether a line is free.
    pub fn fits(&self) -> bool {
        self.fresh < self.count || !self.free.is_empty()
    }

    /// Takes a line, with a generation that it did not have the last time.
    pub fn take(&mut self) -> Option<(u16, NonZeroU16)> {
        let line = if self.fresh < self.count {
            self.fresh += 1;
            self.generations.push(0);
            (self.fresh - 1) as u16
        } else {
            self.free.pop_front()?
        };
        let generation = &mut self.generations[usize::from(line)];
        *generation = generation.checked_add(1).unwrap_or(1);
        Some((line, NonZeroU16::new(*generation).unwrap_or(NonZeroU16::MIN)))
    }

    /// Gives a line back.
    pub fn give(&mut self, line: u16) {
        self.free.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_back_with_another_generation() {
        let mut lines = Lines::new(2);
        let (a, first) = lines.take().unwrap();
        let (b, _) = lines.take().unwrap();
        assert_eq!((a, b), (0, 1));
        assert!(!lines.fits());
        assert_eq!(lines.take(), None);
        lines.give(a);
        let (again, second) = lines.take().unwrap();
        assert_eq!(again, a);
        assert_ne!(first, second);
    }

    #[test]
    fn a_generation_is_never_zero() {
        let mut lines = Lines::new(1);
        for _ in 0..70_000 {
            let (line, generation) = lines.take().unwrap();
            assert_ne!(generation.get(), 0);
            lines.give(line);
        }
    }
}
