//! What the two ends of a connection say to each other before any byte of it moves: two turns, both by `RENDEZVOUS`.
//!
//! | turn | key | each says |
//! | --- | --- | --- |
//! | hello | the connection's name | the version, which of the two it is, a number that it has drawn |
//! | offer | made of that name and both numbers | the token of its ring, 0 if there is none; what it knows of TCP's bytes |
//!
//! | offset | size | hello | offset | size | offer |
//! | --- | --- | --- | --- | --- | --- |
//! | 0 | 1 | version | 0 | 8 | token |
//! | 1 | 1 | 1: the lower end | 8 | 8 | bytes that it has sent and the other end's kernel has |
//! | 8 | 8 | number | 16 | 8 | bytes that its kernel has received |
//!
//! Integers are little-endian, the rest is zero. The second key is known to nobody who was not at the first turn, and to no
//! earlier attempt of the same two.

use crate::identity::{Key, Name};
use crate::tcp::Counts;
use crate::version::VERSION;
use dmbridge::Token;
use sha2::{Digest, Sha256};

/// What is said in one turn.
pub type Words = [u8; 32];

/// The first turn.
#[derive(Clone, Copy)]
pub struct Hello {
    name: Name,
    number: [u8; 8],
}

impl Hello {
    pub fn new(name: Name) -> Hello {
        // Where there is no randomness yet, attempts are told apart by less.
        Hello { name, number: crate::random().to_le_bytes() }
    }

    /// Whether both are of one kernel.
    pub fn is_here(&self) -> bool {
        self.name.is_here
    }

    /// The key of this turn.
    pub fn key(&self) -> Key {
        self.name.key
    }

    pub fn words(&self) -> Words {
        let mut words = [0; 32];
        words[0] = VERSION;
        words[1] = self.name.lower.into();
        words[8..16].copy_from_slice(&self.number);
        words
    }

    /// The key of the next turn, if that is the other end.
    pub fn answered(&self, theirs: &Words) -> Option<Key> {
        if theirs[0] != VERSION || theirs[1] != u8::from(!self.name.lower) {
            return None;
        }
        let (ours, theirs) = (&self.number[..], &theirs[8..16]);
        let numbers = if self.name.lower { [ours, theirs] } else { [theirs, ours] };
        let hash = Sha256::new_with_prefix(b"dmbridge-run, offers\0").chain_update(self.name.key);
        Some(hash.chain_update(numbers.concat()).finalize().into())
    }
}

/// The second turn.
pub struct Offer {
    /// The ring; none: it stays TCP.
    pub ring: Option<Token>,
    acked: u64,
    received: u64,
}

impl Offer {
    /// An offer, or none.
    pub fn words(ring: Option<(Token, Counts)>) -> Words {
        let mut words = [0; 32];
        if let Some((token, counts)) = ring {
            words[..8].copy_from_slice(&token.to_bits().to_le_bytes());
            words[8..16].copy_from_slice(&counts.acked.to_le_bytes());
            words[16..24].copy_from_slice(&counts.received.to_le_bytes());
        }
        words
    }

    pub fn parse(words: &Words) -> Offer {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| words[at + i]));
        let token = word(0);
        Offer { ring: (token != 0).then(|| Token::from_bits(token)), acked: word(8), received: word(16) }
    }

    /// Whether that can be the other end of a connection of which this end knew `before` before, and knows `now`, after
    /// that was said: what one end has received the other has sent, at the time.
    pub fn fits(&self, before: &Counts, now: &Counts) -> bool {
        self.acked <= now.received && (before.acked..=now.written).contains(&self.received)
    }
}
