//! Allocation of ranges out of a larger one: DMBs in an extent, extents in a window. Only numbers, no memory.

use std::collections::{BTreeMap, BTreeSet};

/// Free ranges between 0 and a size. Allocates from the smallest that suffices, and there from the start; both ways in
/// logarithmic time.
#[derive(Debug)]
pub struct Ranges {
    size: u64,
    /// Start to length, no two adjacent.
    by_start: BTreeMap<u64, u64>,
    /// The same as (length, start).
    by_len: BTreeSet<(u64, u64)>,
}

impl Ranges {
    /// `start..size` is free.
    pub fn new(start: u64, size: u64) -> Ranges {
        let mut ranges = Ranges { size, by_start: BTreeMap::new(), by_len: BTreeSet::new() };
        if start < size {
            ranges.insert(start, size - start);
        }
        ranges
    }

    fn insert(&mut self, start: u64, len: u64) {
        self.by_start.insert(start, len);
        self.by_len.insert((len, start));
    }

    fn remove(&mut self, start: u64, len: u64) {
        self.by_start.remove(&start);
        self.by_len.remove(&(len, start));
    }

    /// Whether there is room for `len`.
    pub fn fits(&self, len: u64) -> bool {
        self.by_len.last().is_some_and(|(longest, _)| *longest >= len)
    }

    /// Takes `len`, more than 0, and tells where.
    pub fn take(&mut self, len: u64) -> Option<u64> {
        let (found, start) = self.by_len.range((len, 0)..).next().copied()?;
        self.remove(start, found);
        if found > len {
            self.insert(start + len, found - len);
        }
        Some(start)
    }

    /// Takes `len`, more than 0, from `start` on. False if not all of it is free.
    pub fn take_at(&mut self, start: u64, len: u64) -> bool {
        let Some((&free, &free_len)) = self.by_start.range(..=start).next_back() else { return false };
        let Some(end) = start.checked_add(len).filter(|end| *end <= free + free_len) else { return false };
        self.remove(free, free_len);
        if free < start {
            self.insert(free, start - free);
        }
        if end < free + free_len {
            self.insert(end, free + free_len - end);
        }
        true
    }

    /// Gives back what [`take`](Self::take) gave.
    pub fn give(&mut self, mut start: u64, mut len: u64) {
        debug_assert!(start + len <= self.size);
        if let Some((&before, &before_len)) = self.by_start.range(..start).next_back() {
            debug_assert!(before + before_len <= start);
            if before + before_len == start {
                self.remove(before, before_len);
                start = before;
                len += before_len;
            }
        }
        let end = start + len;
        if let Some(&after_len) = self.by_start.get(&end) {
            self.remove(end, after_len);
            len += after_len;
        }
        self.insert(start, len);
    }

    /// What is free in all.
    pub fn free(&self) -> u64 {
        self.by_start.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_grows_together() {
        let mut ranges = Ranges::new(4096, 65536);
        let a = ranges.take(4096).unwrap();
        let b = ranges.take(8192).unwrap();
        let c = ranges.take(4096).unwrap();
        assert_eq!((a, b, c), (4096, 8192, 16384));
        ranges.give(a, 4096);
        ranges.give(c, 4096);
        assert_eq!(ranges.by_start.len(), 2);
        ranges.give(b, 8192);
        assert_eq!(ranges.by_start.len(), 1);
        assert_eq!(ranges.free(), 65536 - 4096);
        assert_eq!(ranges.take(65536 - 4096), Some(4096));
        assert!(!ranges.fits(1));
        assert_eq!(ranges.take(1), None);
    }

    #[test]
    fn the_smallest_hole_that_suffices_is_taken() {
        let mut ranges = Ranges::new(0, 1 << 20);
        let holes: Vec<u64> = (0..8).map(|_| ranges.take(3).unwrap()).collect();
        let big = ranges.take(100).unwrap();
        let _end = ranges.take(1).unwrap();
        ranges.give(big, 100);
        ranges.give(holes[2], 3);
        assert_eq!(ranges.take(2), Some(holes[2]));
        assert_eq!(ranges.take(3), Some(big));
    }

    #[test]
    fn random_use_never_overlaps_and_never_leaks() {
        let mut ranges = Ranges::new(0, 10_000);
        let mut taken: Vec<(u64, u64)> = Vec::new();
        let mut seed = 1u64;
        for _ in 0..20_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let r = seed >> 33;
            if r.is_multiple_of(2) {
                let len = 1 + r / 2 % 300;
                if let Some(start) = ranges.take(len) {
                    assert!(taken.iter().all(|(s, l)| start + len <= *s || s + l <= start));
                    taken.push((start, len));
                }
            } else if !taken.is_empty() {
                let (start, len) = taken.swap_remove(r as usize / 2 % taken.len());
                ranges.give(start, len);
            }
            assert_eq!(ranges.free() + taken.iter().map(|(_, l)| l).sum::<u64>(), 10_000);
        }
    }
}
