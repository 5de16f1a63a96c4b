//! Moves: what a driver posts on a move queue (`docs/device.md`, 10).

use crate::ids::Token;
use crate::status::Status;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a move's header, in bytes.
pub const HEADER_SIZE: usize = 32;
/// Size of the device's answer, in bytes: the status, and zeroes.
pub const RESPONSE_SIZE: usize = 8;

bitflags::bitflags! {
    /// What else a move does than copying.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct MoveFlags: u32 {
        /// Signal the owner after the data: OR the mask, notify if armed.
        const SIGNAL = 1 << 0;
        /// Notify the owner whatever its control line says: the sender has taken `armed` already.
        const RING = 1 << 1;
    }
}

/// The header of a move.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MoveHeader {
    /// The DMB.
    pub token: Token,
    /// Where the data goes in the DMB, in bytes.
    pub offset: u64,
    /// Bits to set in the DMB's mask, with [`MoveFlags::SIGNAL`].
    pub mask: u64,
    /// What else to do.
    pub flags: MoveFlags,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    token: U64,
    offset: U64,
    mask: U64,
    flags: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<Wire>() == HEADER_SIZE);

impl MoveHeader {
    /// The header as a driver writes it.
    pub fn to_bytes(&self) -> [u8; HEADER_SIZE] {
        zerocopy::transmute!(Wire {
            token: self.token.to_bits().into(),
            offset: self.offset.into(),
            mask: self.mask.into(),
            flags: self.flags.bits().into(),
            reserved: 0.into(),
        })
    }

    /// The header that a driver wrote; [`Status::Invalid`] for unknown flags.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<MoveHeader, Status> {
        let w: Wire = zerocopy::transmute!(*bytes);
        Ok(MoveHeader {
            token: Token::from_bits(w.token.get()),
            offset: w.offset.get(),
            mask: w.mask.get(),
            flags: MoveFlags::from_bits(w.flags.get()).ok_or(Status::Invalid)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_move() {
        let bytes = *b"\x02\0\x01\0\x07\0\0\0\x00\x10\0\0\0\0\0\0\x80\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0";
        let header = MoveHeader {
            token: Token::from_bits(0x7_0001_0002),
            offset: 4096,
            mask: 0x80,
            flags: MoveFlags::SIGNAL,
        };
        assert_eq!(MoveHeader::parse(&bytes), Ok(header));
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn unknown_flags_are_refused() {
        let mut bytes = [0u8; 32];
        bytes[24] = 4;
        assert_eq!(MoveHeader::parse(&bytes), Err(Status::Invalid));
    }
}
