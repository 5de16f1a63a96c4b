//! Bytes that can be told apart: generated from a seed, and hashed.

/// Fills with bytes that look random, a different sequence for each seed (splitmix64).
pub fn generate(state: &mut u64, data: &mut [u8]) {
    for word in data.chunks_mut(8) {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_le_bytes()[..word.len()]);
    }
}

/// A hash that sees every bit and its place, and is quick without hardware's help.
#[derive(Debug)]
pub struct Hash(u64);

impl Default for Hash {
    fn default() -> Hash {
        Hash::new()
    }
}

impl Hash {
    /// Of nothing.
    pub fn new() -> Hash {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    /// What it is of so far.
    pub fn value(&self) -> u64 {
        self.0
    }

    /// Goes on with these bytes; all but the last ones are multiples of eight.
    pub fn add(&mut self, data: &[u8]) {
        for word in data.chunks(8) {
            let mut bytes = [0; 8];
            bytes[..word.len()].copy_from_slice(word);
            self.0 =
                (self.0.rotate_left(5) ^ u64::from_le_bytes(bytes)).wrapping_mul(0x0100_0000_01b3_4a7d | 1);
        }
    }
}
