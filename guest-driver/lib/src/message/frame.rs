//! What two ends of a channel say to one another: 32 bytes each, in the stream, in front of a message's bytes or in their
//! place.

use crate::error::Error;

/// Size of a frame, in bytes.
pub(super) const SIZE: usize = 32;
/// Version of all of it.
const VERSION: u64 = 3;

/// A frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// First of all, from both: the process's number (0: there is no way into it), and a number to be put into its memory
    /// by the other. `from`: the size from which on messages have to go directly; 0: whatever is faster.
    Hello { pid: u32, challenge: u64, from: u64 },
    /// Where the other's number was put.
    Proof { address: u64 },
    /// Whether it was found there.
    Verdict { good: bool },
    /// A message whose bytes follow.
    Inline { len: u64 },
    /// A message whose bytes are in the sender's memory; so many pieces follow, each an address and a length.
    Offer { number: u32, len: u64, pieces: u32 },
}

impl Frame {
    /// As it lies in the stream.
    pub(super) fn to_bytes(self) -> [u8; SIZE] {
        let words = match self {
            Frame::Hello { pid, challenge, from } => [1 | VERSION << 16, pid.into(), challenge, from],
            Frame::Proof { address } => [2, address, 0, 0],
            Frame::Verdict { good } => [3, good.into(), 0, 0],
            Frame::Inline { len } => [4, len, 0, 0],
            Frame::Offer { number, len, pieces } => [5, number.into(), len, pieces.into()],
        };
        let mut bytes = [0; SIZE];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// What came; the peer may have sent anything.
    pub(super) fn parse(bytes: &[u8; SIZE]) -> Result<Frame, Error> {
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at * 8..at * 8 + 8]);
            u64::from_le_bytes(word)
        };
        let small = |at| u32::try_from(word(at)).map_err(|_| Error::Peer("a number is too large"));
        Ok(match word(0) {
            kind if kind == 1 | VERSION << 16 => {
                Frame::Hello { pid: small(1)?, challenge: word(2), from: word(3) }
            }
            2 => Frame::Proof { address: word(1) },
            3 => Frame::Verdict { good: word(1) == 1 },
            4 => Frame::Inline { len: word(1) },
            5 => Frame::Offer { number: small(1)?, len: word(2), pieces: small(3)? },
            _ => return Err(Error::Peer("a frame is of no kind that there is")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_survives_the_stream() {
        for frame in [
            Frame::Hello { pid: 77, challenge: u64::MAX, from: 5 },
            Frame::Proof { address: 0x7fff_0000_1234 },
            Frame::Verdict { good: true },
            Frame::Inline { len: 14 },
            Frame::Offer { number: u32::MAX, len: 1 << 40, pieces: 1024 },
        ] {
            assert_eq!(Frame::parse(&frame.to_bytes()).unwrap(), frame);
        }
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        assert!(Frame::parse(&[0; SIZE]).is_err());
        assert!(Frame::parse(&[0xff; SIZE]).is_err());
        let mut offer = Frame::Offer { number: 1, len: 1, pieces: 1 }.to_bytes();
        offer[15] = 1;
        assert!(Frame::parse(&offer).is_err());
    }
}
