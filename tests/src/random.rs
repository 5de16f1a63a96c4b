//! Numbers that break things, the same in every run; set `SEED` to try others.

/// SplitMix64: small, and good enough to be nasty.
pub struct Random(u64);

impl Random {
    /// The numbers of a round, whatever came in other rounds.
    pub fn new(round: u64) -> Random {
        let seed = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(0u64);
        Random(seed.wrapping_mul(0x1_0000_0001) ^ round << 40)
    }

    /// Any number.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below this one.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in so many times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A number of the kind that breaks things.
    pub fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(16),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => u64::MAX - self.below(4096),
            4 => self.below(1 << 20),
            _ => self.next(),
        }
    }

    /// Any bytes.
    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}
