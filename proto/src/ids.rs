//! Names of things: GID, token, extent id, fabric id, EID. Not for looking them up.

use core::fmt;
use core::num::NonZeroU16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A device's name in the fabric, as dibs's `uuid_t` carries it (`docs/device.md`, 6.1).
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Gid([u8; 16]);

impl Gid {
    /// The GID that no device has.
    pub const NONE: Gid = Gid([0; 16]);

    /// A 64-bit GID: big-endian, then eight zero bytes, as Linux's ISM driver presents it to dibs.
    pub const fn from_u64(gid: u64) -> Gid {
        let b = gid.to_be_bytes();
        Gid([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7], 0, 0, 0, 0, 0, 0, 0, 0])
    }

    /// The 16 bytes as on the wire.
    pub const fn from_bytes(bytes: [u8; 16]) -> Gid {
        Gid(bytes)
    }

    /// The 16 bytes as on the wire.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The 64-bit GID, or `None` if this one needs more bits.
    pub fn as_u64(self) -> Option<u64> {
        let (high, low) = self.0.split_at(8);
        (low == [0; 8]).then(|| u64::from_be_bytes(high.try_into().unwrap_or_default()))
    }

    /// Whether this is [`Gid::NONE`].
    pub fn is_none(self) -> bool {
        self == Gid::NONE
    }
}

impl fmt::Display for Gid {
    /// 16 hexadecimal digits for a 64-bit GID, else 32.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.as_u64() {
            Some(gid) => write!(f, "{gid:016x}"),
            None => self.0.iter().try_for_each(|b| write!(f, "{b:02x}")),
        }
    }
}

impl fmt::Debug for Gid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gid({self})")
    }
}

/// Why a text is not a GID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a GID is 1 to 16 or exactly 32 hexadecimal digits and not zero")]
pub struct ParseGidError;

impl core::str::FromStr for Gid {
    type Err = ParseGidError;

    fn from_str(text: &str) -> Result<Gid, ParseGidError> {
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ParseGidError);
        }
        let gid = match text.len() {
            1..=16 => Gid::from_u64(u64::from_str_radix(text, 16).map_err(|_| ParseGidError)?),
            32 => Gid(u128::from_str_radix(text, 16).map_err(|_| ParseGidError)?.to_be_bytes()),
            _ => return Err(ParseGidError),
        };
        if gid.is_none() { Err(ParseGidError) } else { Ok(gid) }
    }
}

/// An extent's name in the fabric: 31 bits, never 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ExtentId(u32);

impl ExtentId {
    /// `None` for 0 and for values above 31 bits.
    pub const fn new(id: u32) -> Option<ExtentId> {
        if id == 0 || id > i32::MAX as u32 { None } else { Some(ExtentId(id)) }
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A DMB's name in the fabric (`docs/device.md`, 8). A name, not a secret; any 64 bits are a token, of nothing perhaps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(u64);

/// What a token says of where its DMB is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// In the extent, at the control line with this number; the generation must match the line's.
    Extent {
        /// The extent.
        extent: ExtentId,
        /// Number of the control line.
        line: u16,
        /// Never 0: 0 marks a free line.
        generation: NonZeroU16,
    },
    /// In its owner's RAM.
    Ram,
    /// Nowhere: no device makes such a token.
    Nothing,
}

impl Token {
    /// The token with these 64 bits.
    pub const fn from_bits(bits: u64) -> Token {
        Token(bits)
    }

    /// The 64 bits as on the wire.
    pub const fn to_bits(self) -> u64 {
        self.0
    }

    /// Token of the DMB at a control line of an extent.
    pub const fn in_extent(extent: ExtentId, line: u16, generation: NonZeroU16) -> Token {
        Token((extent.get() as u64) << 32 | (line as u64) << 16 | generation.get() as u64)
    }

    /// Token of a RAM DMB; `number` is the device's own, 63 bits, the others are dropped.
    pub const fn in_ram(number: u64) -> Token {
        Token(1 << 63 | number)
    }

    /// What the token says.
    pub const fn place(self) -> Place {
        if self.0 >> 63 != 0 {
            return Place::Ram;
        }
        match (ExtentId::new((self.0 >> 32) as u32), NonZeroU16::new(self.0 as u16)) {
            (Some(extent), Some(generation)) => {
                Place::Extent { extent, line: (self.0 >> 16) as u16, generation }
            }
            _ => Place::Nothing,
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_64_bit_gid_is_big_endian_then_zeroes() {
        let gid = Gid::from_u64(0x0102_0304_0506_0708);
        assert_eq!(gid.to_bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(gid.to_string(), "0102030405060708");
        assert_eq!(gid.to_string().parse(), Ok(gid));
    }

    #[test]
    fn a_128_bit_gid_prints_and_parses_whole() {
        let gid = Gid::from_bytes(*b"0123456789abcdef");
        assert_eq!(gid.as_u64(), None);
        assert_eq!(gid.to_string().parse(), Ok(gid));
    }

    #[test]
    fn text_that_is_no_gid_is_refused() {
        for text in ["", "0", "xyz", "+1", "00000000000000000", "0x1"] {
            assert_eq!(text.parse::<Gid>(), Err(ParseGidError), "{text:?}");
        }
    }

    #[test]
    fn a_token_says_where_its_dmb_is() {
        let extent = ExtentId::new(7).unwrap();
        let generation = NonZeroU16::new(0x1234).unwrap();
        let token = Token::in_extent(extent, 0xabcd, generation);
        assert_eq!(token.to_bits(), 0x0000_0007_abcd_1234);
        assert_eq!(token.place(), Place::Extent { extent, line: 0xabcd, generation });
        assert_eq!(Token::in_ram(5).place(), Place::Ram);
        assert_eq!(Token::from_bits(0).place(), Place::Nothing);
        assert_eq!(Token::from_bits(0x0000_0007_abcd_0000).place(), Place::Nothing);
    }
}
