//! The cases, each written once over the traits of [`transport`](super::transport).

pub mod large;
pub mod patterns;
pub mod pingpong;
pub mod produce;
pub mod scale;
pub mod stream;
pub mod transfer;

/// Buffers of each side for large messages, used in turn: who sends a large message has filled it, and not just now.
pub const LARGE_BUFFERS: usize = 4;

/// First byte, or word, of every message: what the receiver does with it.
pub mod phase {
    /// Forget it.
    pub const WARM_UP: u8 = 0;
    /// Count it.
    pub const MEASURE: u8 = 1;
    /// Count it, and stop.
    pub const LAST: u8 = 2;
}
