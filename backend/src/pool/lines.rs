//! Allocation of control lines in an extent, and of their generations (`docs/device.md`, 8). Only numbers, no memory.

use dmbridge_proto::extent::LINES_PER_PAGE;
use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU16;

/// The lines of one extent.
#[derive(Debug)]
pub struct Lines {
    count: u32,
    /// Lines from here on were never used.
    fresh: u32,
    /// Lines that are free again; the one that was freed last comes last to be used again, so that an old token stays
    /// wrong for as long as possible.
    free: VecDeque<u16>,
    /// First lines of pages that are free again and in which no line is in use.
    free_pages: VecDeque<u16>,
    /// Lines that are alone in their page.
    private: HashSet<u16>,
    /// Generations of the lines that were used.
    generations: Vec<u16>,
    /// None was ever greater.
    highest: u16,
    /// Lines that were never used here had none that was greater.
    before: u16,
}

/// Which line is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Any.
    AnyLine,
    /// One whose page has no other line that is in use: so that a guest's kernel can hand it to a program.
    PrivateLine,
}

impl Lines {
    /// `count` free lines, at most 65536.
    pub fn new(count: u64) -> Lines {
        Lines {
            count: count.min(1 << 16) as u32,
            fresh: 0,
            free: VecDeque::new(),
            free_pages: VecDeque::new(),
            private: HashSet::new(),
            generations: Vec::new(),
            highest: 0,
            before: 0,
        }
    }

    /// `count` lines, of which those are taken, each once: line, generation, whether it is alone in its page. No line
    /// ever had a generation above `highest`. `None` if that cannot be.
    pub fn with_taken(
        count: u64,
        highest: u16,
        taken: impl Iterator<Item = (u16, NonZeroU16, bool)>,
    ) -> Option<Lines> {
        let mut lines = Lines { highest, before: highest, ..Lines::new(count) };
        let mut used = HashMap::new();
        for (line, generation, private) in taken {
            if u32::from(line) >= lines.count || used.insert(line, generation).is_some() {
                return None;
            }
            if private {
                lines.private.insert(line);
            }
        }
        // Whole pages: what of them is free is alone in its page, or anybody's.
        let pages = used.keys().max().map_or(0, |last| u32::from(last / LINES_PER_PAGE) + 1);
        let end = (pages * u32::from(LINES_PER_PAGE)).min(lines.count);
        lines.fresh = end;
        lines.generations = vec![highest; end as usize];
        for (line, generation) in &used {
            lines.generations[usize::from(*line)] = generation.get();
        }
        for page in (0..end).step_by(LINES_PER_PAGE.into()) {
            let of_page = page..(page + u32::from(LINES_PER_PAGE)).min(end);
            let free: Vec<u16> =
                of_page.map(|line| line as u16).filter(|line| !used.contains_key(line)).collect();
            if free.len() == usize::from(LINES_PER_PAGE) {
                lines.free_pages.push_back(page as u16);
            } else if !lines.private.contains(&(page as u16)) {
                lines.free.extend(free);
            }
        }
        Some(lines)
    }

    /// No line ever had a greater generation.
    pub fn highest(&self) -> u16 {
        self.highest
    }

    /// Whether a line is free.
    pub fn fits(&self, want: Want) -> bool {
        match want {
            Want::AnyLine => self.fresh < self.count || !self.free.is_empty() || !self.free_pages.is_empty(),
            Want::PrivateLine => !self.free_pages.is_empty() || self.fresh_page().is_some(),
        }
    }

    /// The first line of the first page in which no line was ever used.
    fn fresh_page(&self) -> Option<u32> {
        let first = self.fresh.next_multiple_of(LINES_PER_PAGE.into());
        (first + u32::from(LINES_PER_PAGE) <= self.count).then_some(first)
    }

    /// Takes a line, with a generation that it did not have the last time.
    pub fn take(&mut self, want: Want) -> Option<(u16, NonZeroU16)> {
        let line = match want {
            Want::AnyLine => self.take_any()?,
            Want::PrivateLine => self.take_page()?,
        };
        let generation = &mut self.generations[usize::from(line)];
        *generation = generation.checked_add(1).unwrap_or(1);
        self.highest = self.highest.max(*generation);
        Some((line, NonZeroU16::new(*generation).unwrap_or(NonZeroU16::MIN)))
    }

    fn take_any(&mut self) -> Option<u16> {
        if self.fresh < self.count {
            self.use_fresh(self.fresh + 1);
            return Some((self.fresh - 1) as u16);
        }
        if self.free.is_empty() {
            let page = self.free_pages.pop_front()?;
            self.free.extend(page..=page + (LINES_PER_PAGE - 1));
        }
        self.free.pop_front()
    }

    /// The first line of a page whose other lines nobody gets meanwhile.
    fn take_page(&mut self) -> Option<u16> {
        let line = match self.free_pages.pop_front() {
            Some(line) => line,
            None => {
                let first = self.fresh_page()?;
                // What is passed over is for others.
                self.free.extend((self.fresh..first).map(|line| line as u16));
                self.use_fresh(first + u32::from(LINES_PER_PAGE));
                first as u16
            }
        };
        self.private.insert(line);
        Some(line)
    }

    fn use_fresh(&mut self, end: u32) {
        self.fresh = end;
        self.generations.resize(end as usize, self.before);
    }

    /// Gives a line back.
    pub fn give(&mut self, line: u16) {
        if self.private.remove(&line) { self.free_pages.push_back(line) } else { self.free.push_back(line) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_back_with_another_generation() {
        let mut lines = Lines::new(2);
        let (a, first) = lines.take(Want::AnyLine).unwrap();
        let (b, _) = lines.take(Want::AnyLine).unwrap();
        assert_eq!((a, b), (0, 1));
        assert!(!lines.fits(Want::AnyLine));
        assert_eq!(lines.take(Want::AnyLine), None);
        lines.give(a);
        let (again, second) = lines.take(Want::AnyLine).unwrap();
        assert_eq!(again, a);
        assert_ne!(first, second);
    }

    #[test]
    fn lines_that_are_taken_over_are_as_they_were() {
        let mut lines = Lines::new(256);
        let mut taken: Vec<_> = (0..70).filter_map(|_| lines.take(Want::AnyLine)).collect();
        let private = lines.take(Want::PrivateLine).unwrap();
        for (line, _) in taken.drain(10..20) {
            lines.give(line);
        }
        let all = || {
            let any = taken.iter().map(|(line, generation)| (*line, *generation, false));
            any.chain([(private.0, private.1, true)])
        };
        let mut again = Lines::with_taken(256, lines.highest(), all()).unwrap();
        let mut seen: HashSet<u16> = all().map(|(line, ..)| line).collect();
        let (page, generation) = again.take(Want::PrivateLine).unwrap();
        assert!(page.is_multiple_of(LINES_PER_PAGE) && generation.get() > 1);
        seen.extend(page..page + LINES_PER_PAGE);
        while let Some((line, generation)) = again.take(Want::AnyLine) {
            assert!(generation.get() > lines.highest(), "an old token would be good again");
            assert!(seen.insert(line), "{line} is taken twice");
            assert_ne!(line / LINES_PER_PAGE, private.0 / LINES_PER_PAGE);
        }
        assert_eq!(seen.len(), 256 - usize::from(LINES_PER_PAGE) + 1);
        let twice = || all().chain(all());
        assert!(Lines::with_taken(256, 1, twice()).is_none());
        assert!(Lines::with_taken(64, 1, all()).is_none());
    }

    #[test]
    fn a_generation_is_never_zero() {
        let mut lines = Lines::new(1);
        for _ in 0..70_000 {
            let (line, generation) = lines.take(Want::AnyLine).unwrap();
            assert_ne!(generation.get(), 0);
            lines.give(line);
        }
    }

    #[test]
    fn a_private_line_is_alone_in_its_page_as_long_as_it_is_taken() {
        let page = |line: u16| line / LINES_PER_PAGE;
        let mut lines = Lines::new(256);
        let (any, _) = lines.take(Want::AnyLine).unwrap();
        let private: Vec<_> =
            std::iter::from_fn(|| lines.take(Want::PrivateLine)).map(|(line, _)| line).collect();
        assert_eq!(private, [64, 128, 192]);
        let others: Vec<_> = std::iter::from_fn(|| lines.take(Want::AnyLine)).map(|(line, _)| line).collect();
        assert_eq!(others.len(), 63);
        assert!(others.iter().all(|line| page(*line) == page(any)));
        lines.give(128);
        assert_eq!(
            lines.take(Want::PrivateLine).map(|(line, generation)| (line, generation.get())),
            Some((128, 2))
        );
        lines.give(128);
        // Without another line, a page is there for all.
        let again: Vec<_> = std::iter::from_fn(|| lines.take(Want::AnyLine)).map(|(line, _)| line).collect();
        assert_eq!(again.len(), 64);
        assert!(again.iter().all(|line| page(*line) == 2));
    }
}
