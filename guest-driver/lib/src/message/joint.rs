//! A copy that two processes do together, in chunks that either claims: the receiver reads from the sender's memory, and the
//! sender, if it has nothing else to do, writes into the receiver's. The receiver goes forward from the start, the sender
//! backward from the end, so that each has its own part in its cache, as far as it has it there. Both claim many chunks at
//! once, and fewer towards the end: a call of the kernel is dear, and who comes late should not be waited for. What they
//! need to know of one another for that lies in the last page of the receiver's DMB, which both have mapped.
//!
//! | offset | size | written by | what |
//! | --- | --- | --- | --- |
//! | 0 | 8 | both | number of the offer (upper half), and how many chunks are claimed from the start and from the end (16 bits each) |
//! | 64 | 8 | receiver | the offer that was taken last (upper half), and how |
//! | 128 | 8 | receiver | the offer whose destination is known (upper half), and in how many pieces it is |
//! | 192 | 8 | sender | the offer that it helps with (upper half), and how many chunks it has copied |
//! | 200 | 8 | sender | the same offer, and what it has claimed and could not copy: the first chunk and how many (16 bits each) |
//! | 256 | 16 each | receiver | the pieces of the destination: address and length |
//!
//! Either can write nonsense there. Then a message arrives wrong, or not at all; and no more, because only who could have
//! done that by itself is let into the other's memory (`cma`).

use crate::shared::SharedMemory;
use libc::iovec;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Size of all of it, in bytes.
pub(super) const SIZE: usize = 4096;
/// Size of a chunk, in bytes, unless that would be too many chunks.
const CHUNK: usize = 64 << 10;
/// The most bytes that are claimed at once, if that is a chunk.
const MOST: usize = 1 << 20;

const CLAIM: usize = 0;
const TAKEN: usize = 64;
const READY: usize = 128;
const HELPED: usize = 192;
const FAILED: usize = 200;
const PIECES: usize = 256;
/// The most pieces of a destination that a sender can write into.
const MAX_PIECES: usize = (SIZE - PIECES) / 16;

/// The most chunks of a message.
const MAX_CHUNKS: usize = 1 << 15;

/// From which end a side claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The receiver.
    Start,
    /// The sender.
    End,
}

/// How an offer was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Taken {
    /// All bytes were copied.
    Copied,
    /// They could not be: they are to be sent.
    Refused,
}

/// The page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Joint<'a> {
    memory: &'a SharedMemory,
    start: usize,
}

fn word(number: u32, low: u32) -> u64 {
    u64::from(number) << 32 | u64::from(low)
}

/// The lower half, if the upper one is this number.
fn of(number: u32, word: u64) -> Option<u32> {
    ((word >> 32) as u32 == number).then_some(word as u32)
}

/// Size of the chunks of a message, in bytes; the last one may be shorter.
fn chunk_size(len: usize) -> usize {
    CHUNK.max(len.div_ceil(MAX_CHUNKS))
}

/// How many chunks a message is.
pub(super) fn chunks(len: usize) -> u32 {
    len.div_ceil(chunk_size(len)) as u32
}

/// The bytes of some chunks of a message of `len` bytes.
pub(super) fn bytes(chunks: &Range<u32>, len: usize) -> Range<usize> {
    let size = chunk_size(len);
    chunks.start as usize * size..len.min(chunks.end as usize * size)
}

/// How many chunks are claimed from the start, and from the end.
fn claimed(low: u32) -> (u32, u32) {
    (low & 0xffff, low >> 16)
}

impl<'a> Joint<'a> {
    /// At the end of this DMB.
    pub(super) fn of(memory: &'a SharedMemory) -> Joint<'a> {
        Joint { memory, start: memory.len() - SIZE }
    }

    fn at(self, offset: usize) -> &'a AtomicU64 {
        self.memory.atomic_u64(self.start + offset)
    }

    /// Receiver: opens an offer to be copied; to be copied by the sender as well if the destination is in few enough
    /// pieces.
    pub(super) fn open(self, number: u32, destination: &[iovec]) {
        self.at(CLAIM).store(word(number, 0), Ordering::Release);
        if destination.len() > MAX_PIECES {
            return;
        }
        for (i, piece) in destination.iter().enumerate() {
            self.at(PIECES + 16 * i).store(piece.iov_base.addr() as u64, Ordering::Relaxed);
            self.at(PIECES + 16 * i + 8).store(piece.iov_len as u64, Ordering::Relaxed);
        }
        self.at(READY).store(word(number, destination.len() as u32), Ordering::Release);
    }

    /// Sender: the destination of an offer, if it can be written into.
    pub(super) fn destination(self, number: u32) -> Option<Vec<iovec>> {
        let count = of(number, self.at(READY).load(Ordering::Acquire))? as usize;
        let piece = |i: usize| iovec {
            iov_base: std::ptr::without_provenance_mut(
                self.at(PIECES + 16 * i).load(Ordering::Relaxed) as usize
            ),
            iov_len: self.at(PIECES + 16 * i + 8).load(Ordering::Relaxed) as usize,
        };
        (count <= MAX_PIECES).then(|| (0..count).map(piece).collect())
    }

    /// Both: chunks to copy of a message of `len` bytes; `None` if all are claimed, or nobody may claim any more.
    pub(super) fn claim(self, number: u32, len: usize, end: End) -> Option<Range<u32>> {
        let (chunks, most) = (chunks(len), (MOST / chunk_size(len)).max(1) as u32);
        let mut seen = self.at(CLAIM).load(Ordering::Acquire);
        loop {
            let (front, back) = claimed(of(number, seen)?);
            let left = chunks.checked_sub(front + back).filter(|left| *left != 0)?;
            let own = if end == End::Start { front } else { back };
            // Half of the message at first, so that two that begin at once need one call each.
            let share = if own == 0 { chunks.div_ceil(2).min(left) } else { left.div_ceil(2) };
            let count = share.min(most);
            let (claim, front, back) = match end {
                End::Start => (front..front + count, front + count, back),
                End::End => (chunks - back - count..chunks - back, front, back + count),
            };
            let next = word(number, front | back << 16);
            match self.at(CLAIM).compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(claim),
                Err(now) => seen = now,
            }
        }
    }

    /// Receiver: nobody may claim any more. How many were claimed, of so many.
    pub(super) fn close(self, number: u32, chunks: u32) -> u32 {
        let seen = self.at(CLAIM).swap(word(number, u32::MAX), Ordering::AcqRel);
        of(number, seen).map_or(chunks, |low| {
            let (front, back) = claimed(low);
            (front + back).min(chunks)
        })
    }

    /// Sender: it has copied so many chunks of an offer.
    pub(super) fn set_helped(self, number: u32, chunks: u32) {
        self.at(HELPED).store(word(number, chunks), Ordering::Release);
    }

    /// Sender: it has claimed these and cannot copy them.
    pub(super) fn set_failed(self, number: u32, chunks: Range<u32>) {
        let low = chunks.start | (chunks.end - chunks.start) << 16;
        self.at(FAILED).store(word(number, low), Ordering::Release);
    }

    /// Receiver: how many chunks the sender has copied.
    pub(super) fn helped(self, number: u32) -> u32 {
        of(number, self.at(HELPED).load(Ordering::Acquire)).unwrap_or(0)
    }

    /// Receiver: the chunks that the sender could not copy.
    pub(super) fn failed(self, number: u32) -> Range<u32> {
        let (start, count) = claimed(of(number, self.at(FAILED).load(Ordering::Acquire)).unwrap_or(0));
        start..start + count
    }

    /// Receiver: the offer is done with.
    pub(super) fn set_taken(self, number: u32, taken: Taken) {
        let low = if taken == Taken::Copied { 1 } else { 2 };
        self.at(TAKEN).store(word(number, low), Ordering::Release);
    }

    /// Sender: whether the offer is done with, and how.
    pub(super) fn taken(self, number: u32) -> Option<Taken> {
        match of(number, self.at(TAKEN).load(Ordering::Acquire))? {
            1 => Some(Taken::Copied),
            2 => Some(Taken::Refused),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shared::tests::memory;

    #[test]
    fn two_that_claim_get_each_chunk_once() {
        let memory = memory(2 * SIZE);
        for number in 1..200 {
            let joint = Joint::of(&memory);
            joint.open(number, &[]);
            let claims = |end| {
                std::iter::from_fn(|| joint.claim(number, 37 * CHUNK - 1, end)).flatten().collect::<Vec<_>>()
            };
            let mut all = std::thread::scope(|scope| {
                let other = scope.spawn(|| claims(End::End));
                let mut all = claims(End::Start);
                all.extend(other.join().unwrap());
                all
            });
            all.sort_unstable();
            assert!(all.iter().copied().eq(0..37));
        }
    }

    #[test]
    fn after_the_end_nothing_is_claimed_and_what_was_is_known() {
        let memory = memory(2 * SIZE);
        let joint = Joint::of(&memory);
        joint.open(7, &[]);
        let len = 40 * CHUNK;
        assert_eq!(
            (joint.claim(7, len, End::Start), joint.claim(7, len, End::End)),
            (Some(0..16), Some(24..40))
        );
        assert_eq!(joint.claim(6, len, End::Start), None, "another offer");
        assert_eq!(joint.close(7, 40), 32);
        assert_eq!((joint.claim(7, len, End::Start), joint.claim(7, len, End::End)), (None, None));
        assert_eq!(joint.close(7, 40), 40, "more is never known than there is");
    }

    #[test]
    fn who_claims_alone_claims_less_and_less_and_two_a_half_each() {
        let memory = memory(2 * SIZE);
        let joint = Joint::of(&memory);
        joint.open(1, &[]);
        let alone = std::iter::from_fn(|| joint.claim(1, 16 * CHUNK, End::End)).collect::<Vec<_>>();
        assert_eq!(alone, [8..16, 4..8, 2..4, 1..2, 0..1]);
        for chunks in [1, 2, 15, 16, 17, 32] {
            joint.open(2, &[]);
            let first = joint.claim(2, chunks * CHUNK, End::Start).unwrap();
            let second = joint.claim(2, chunks * CHUNK, End::End);
            let count = first.len() + second.map_or(0, |second| second.len());
            assert_eq!((first.start, count), (0, chunks));
        }
    }

    #[test]
    fn what_the_other_side_may_have_written_claims_nothing_outside() {
        let memory = memory(2 * SIZE);
        let joint = Joint::of(&memory);
        for low in [0, u32::MAX, 0xffff, 0xffff_0000, 0x0008_0009, 0x0010_0001, 0x0005_0005] {
            for end in [End::Start, End::End] {
                joint.at(CLAIM).store(word(3, low), Ordering::Relaxed);
                let claimed = std::iter::from_fn(|| joint.claim(3, 16 * CHUNK, end));
                assert!(
                    claimed.take(100).all(|claim| claim.start < claim.end && claim.end <= 16),
                    "{low:#x}"
                );
            }
        }
    }

    #[test]
    fn a_message_of_any_length_has_chunks_that_can_be_counted() {
        for len in [1, CHUNK, CHUNK + 1, MAX_CHUNKS * CHUNK, MAX_CHUNKS * CHUNK + 1, 1 << 45, usize::MAX / 4]
        {
            let (size, chunks) = (chunk_size(len), chunks(len) as usize);
            assert!(chunks <= MAX_CHUNKS && size * (chunks - 1) < len && len <= size * chunks, "{len}");
        }
    }

    #[test]
    fn what_one_says_of_an_offer_is_not_taken_for_another() {
        let memory = memory(2 * SIZE);
        let joint = Joint::of(&memory);
        let piece = iovec { iov_base: std::ptr::without_provenance_mut(4096), iov_len: 77 };
        joint.open(1, &[piece]);
        assert_eq!(joint.destination(1).unwrap()[0].iov_len, 77);
        assert!(joint.destination(2).is_none());
        joint.open(2, &[piece; MAX_PIECES + 1]);
        assert!(joint.destination(2).is_none(), "too many pieces");
        joint.set_helped(2, 3);
        joint.set_failed(2, 4..6);
        assert_eq!((joint.helped(2), joint.failed(2)), (3, 4..6));
        assert_eq!((joint.helped(3), joint.failed(3)), (0, 0..0));
        joint.set_taken(2, Taken::Refused);
        assert_eq!((joint.taken(2), joint.taken(3)), (Some(Taken::Refused), None));
    }
}
