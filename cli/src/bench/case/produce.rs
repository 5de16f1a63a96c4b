//! A stream whose every byte is made for it and read at its end, which is what a copy costs beside real work. The
//! words are cheap to make and to sum, and the sum is checked.

use anyhow::{Result, ensure};

use super::stream;
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::transport::Produce;
use crate::pair::Role;

/// An odd number without a pattern in its bits.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

/// The words of a message that starts with `first`.
#[inline]
fn words_from(first: u64) -> impl FnMut() -> u64 {
    let mut next = first;
    move || {
        let word = next;
        next = next.wrapping_add(STRIDE);
        word
    }
}

/// The sum of the first `count` words.
fn sum(first: u64, count: usize) -> u64 {
    let n = count as u64;
    // n (n - 1) / 2, divided before it can overflow.
    let pairs = if n.is_multiple_of(2) {
        (n / 2).wrapping_mul(n.wrapping_sub(1))
    } else {
        n.wrapping_mul((n - 1) / 2)
    };
    first.wrapping_mul(n).wrapping_add(STRIDE.wrapping_mul(pairs))
}

/// Plays A's or B's part. The value is in bytes per second.
pub fn run<P: Produce>(worker: &mut Worker, end: &mut P, bytes: usize) -> Result<Option<Outcome>> {
    let words = bytes / 8;
    let mut count = 0u64;
    worker.rendezvous.meet()?;
    let outcome = match worker.role {
        Role::A => {
            stream::send(worker, bytes, |phase| {
                count += 1;
                // The lowest byte of the first word is the phase.
                end.produce(words, words_from(count << 8 | u64::from(phase)))
            })?;
            None
        }
        Role::B => Some(stream::receive(bytes, || {
            count += 1;
            // Four sums in turn: one alone would be a chain of additions, slower than memory.
            let mut sums = [0u64; 4];
            let first = end.consume(words, |word| {
                sums = [sums[1], sums[2], sums[3], sums[0].wrapping_add(word)];
            })?;
            let total = sums.into_iter().fold(0, u64::wrapping_add);
            ensure!(
                first >> 8 == count && total == sum(first, words),
                "message {count} arrived with wrong contents"
            );
            Ok(first as u8)
        })?),
    };
    worker.rendezvous.meet()?;
    Ok(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_is_that_of_the_words() {
        for count in [0, 1, 2, 3, 8191, 8192] {
            let mut next = words_from(77);
            let added = (0..count).fold(0u64, |total, _| total.wrapping_add(next()));
            assert_eq!(sum(77, count), added, "{count}");
        }
        assert_eq!(words_from(0x0305)() as u8, 5);
    }
}
