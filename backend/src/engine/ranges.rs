//! Who copies which chunk of a job: every participant starts with a range of its own, so that it goes through memory in
//! order, and who has finished takes half of what is left of somebody else's.
//!
//! A chunk is claimed by one compare-and-swap, and by one participant only. A claim is the only licence to touch the
//! chunk's memory.

use std::sync::atomic::{AtomicU64, Ordering};

/// The ranges of all participants: start in the lower half of a word, end in the upper one.
#[derive(Debug)]
pub struct Ranges(Box<[AtomicU64]>);

fn pack(start: u32, end: u32) -> u64 {
    u64::from(start) | u64::from(end) << 32
}

fn unpack(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

impl Ranges {
    /// `chunks` chunks for these participants: each that `takes_part` gets as many as every other.
    pub fn new(chunks: u32, takes_part: &[bool]) -> Ranges {
        let parts = takes_part.iter().filter(|part| **part).count().max(1) as u64;
        let mut given = 0u64;
        let range = |part: &bool| {
            let start = given * u64::from(chunks) / parts;
            given += u64::from(*part);
            AtomicU64::new(pack(start as u32, (given * u64::from(chunks) / parts) as u32))
        };
        Ranges(takes_part.iter().map(range).collect())
    }

    /// The next chunk for this participant: of its own range, else of another's; `None` if all are claimed.
    pub fn claim(&self, seat: usize) -> Option<u32> {
        loop {
            if let Some(chunk) = self.claim_own(seat) {
                return Some(chunk);
            }
            let (start, end) = self.steal(seat)?;
            // Nobody else writes an empty range, so this one is still empty.
            self.0[seat].store(pack(start, end), Ordering::Relaxed);
        }
    }

    /// Whether nothing is left to claim. What somebody is just taking over counts as claimed.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|range| {
            let (start, end) = unpack(range.load(Ordering::Relaxed));
            start >= end
        })
    }

    fn claim_own(&self, seat: usize) -> Option<u32> {
        let mut word = self.0[seat].load(Ordering::Relaxed);
        loop {
            let (start, end) = unpack(word);
            if start >= end {
                return None;
            }
            match self.0[seat].compare_exchange_weak(
                word,
                pack(start + 1, end),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(start),
                Err(now) => word = now,
            }
        }
    }

    /// Takes the further half of the longest range. A range never comes to hold the same chunks again, so a word that has
    /// not changed says that nothing in it was claimed.
    fn steal(&self, seat: usize) -> Option<(u32, u32)> {
        loop {
            let others = self.0.iter().enumerate().filter(|(other, _)| *other != seat);
            let words = others.map(|(other, range)| (other, range.load(Ordering::Relaxed)));
            let length = |word: u64| {
                let (start, end) = unpack(word);
                end.saturating_sub(start)
            };
            let (other, word) = words.max_by_key(|(_, word)| length(*word))?;
            if length(word) == 0 {
                return None;
            }
            let (start, end) = unpack(word);
            let middle = start + (end - start) / 2;
            let left = pack(start, middle);
            if self.0[other].compare_exchange(word, left, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Some((middle, end));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    /// What a participant is about to do: each step is one access of the real thing.
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
    enum Step {
        Claim,
        Steal,
        Keep(u32, u32),
        Done,
    }

    /// Every order in which three participants can take their steps: each chunk is claimed once, by whomever, and when all
    /// have found nothing, all are claimed.
    #[test]
    fn in_every_order_each_chunk_is_claimed_once() {
        const CHUNKS: u32 = 5;
        type State = (Vec<u64>, Vec<Step>, u32);
        let mut todo: Vec<State> = Vec::new();
        for parts in [[true, true, true], [true, true, false], [false, false, true]] {
            let ranges = Ranges::new(CHUNKS, &parts);
            let words = ranges.0.iter().map(|word| word.load(Ordering::Relaxed)).collect();
            todo.push((words, vec![Step::Claim; 3], 0));
        }
        let mut seen = HashSet::new();
        while let Some(state) = todo.pop() {
            if !seen.insert(state.clone()) {
                continue;
            }
            let (words, steps, claimed) = state;
            if steps.iter().all(|step| *step == Step::Done) {
                assert_eq!(claimed, (1 << CHUNKS) - 1);
            }
            for seat in 0..3 {
                let ranges = Ranges(words.iter().copied().map(AtomicU64::new).collect());
                let (mut steps, mut claimed) = (steps.clone(), claimed);
                steps[seat] = match steps[seat] {
                    Step::Done => continue,
                    Step::Claim => match ranges.claim_own(seat) {
                        Some(chunk) => {
                            assert_eq!(claimed & 1 << chunk, 0, "chunk {chunk} twice");
                            claimed |= 1 << chunk;
                            Step::Claim
                        }
                        None => Step::Steal,
                    },
                    Step::Steal => match ranges.steal(seat) {
                        Some((start, end)) => Step::Keep(start, end),
                        None => Step::Done,
                    },
                    Step::Keep(start, end) => {
                        let (s, e) = unpack(ranges.0[seat].load(Ordering::Relaxed));
                        assert!(s >= e, "a range that is not empty would be lost");
                        ranges.0[seat].store(pack(start, end), Ordering::Relaxed);
                        Step::Claim
                    }
                };
                let words = ranges.0.iter().map(|word| word.load(Ordering::Relaxed)).collect();
                todo.push((words, steps, claimed));
            }
        }
        assert!(seen.len() > 1000, "{} states", seen.len());
    }

    #[test]
    fn who_takes_no_part_starts_with_nothing_and_may_steal() {
        let ranges = Ranges::new(7, &[true, false, true]);
        assert_eq!(ranges.claim_own(1), None);
        let mut all: Vec<u32> = std::iter::from_fn(|| ranges.claim(1)).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6]);
        assert!(ranges.is_empty());
    }
}
