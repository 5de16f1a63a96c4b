//! The decline (Linux `struct smc_clc_msg_decline`, `smc_clc_msg_decline_v2`).
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | header; bit 3 of its last byte: out of sync, the link group is to be given up |
//! | 8 | 8 | system id of the sender (SMC-R) |
//! | 16 | 4 | reason |
//! | 20 | 1 | bits 7…4: system type in version 2 |
//! | 21 | 3 | reserved |
//! | 24 | 16 | version 2: more reasons, zero |
//! | end | 4 | eyecatcher |

use super::{Bytes, ClcError, DECLINE, EYECATCHER, FIRST_CONTACT, Header, Reason, Version, Writer, part};
use zerocopy::byteorder::{BE, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One end does not want SMC: both go on over TCP.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decline {
    /// Version of the message.
    pub version: Version,
    /// Why.
    pub reason: Reason,
    /// The two ends do not agree on whether they have a link group: it is to be given up.
    pub out_of_sync: bool,
}

impl Default for Decline {
    fn default() -> Decline {
        Decline::new(Version::V2, Reason::CONFIGURATION)
    }
}

impl Decline {
    /// A decline for this reason.
    pub const fn new(version: Version, reason: Reason) -> Decline {
        Decline { version, reason, out_of_sync: reason.0 == Reason::OUT_OF_SYNC.0 }
    }

    pub(super) fn parse(header: &Header, bytes: &[u8]) -> Result<Decline, ClcError> {
        let version = header.version();
        let want = if version == Version::V1 { LEN_V1 } else { LEN_V2 };
        if bytes.len() != want {
            return Err(header.length_error());
        }
        let body: Body = part(bytes, size_of::<Header>())?;
        Ok(Decline {
            version,
            reason: Reason(body.reason.get()),
            out_of_sync: header.v2() & FIRST_CONTACT != 0,
        })
    }

    pub(super) fn to_bytes(self) -> Bytes {
        let flag = if self.out_of_sync { FIRST_CONTACT } else { 0 };
        let mut out = Writer::new(Header::new(EYECATCHER, DECLINE, self.version, flag, 0));
        let system = if self.version == Version::V1 { 0 } else { 2 << 4 };
        out.put(&Body { system_id: [0; 8], reason: self.reason.0.into(), system, reserved: [0; 3] });
        if self.version == Version::V2 {
            out.put(&[U32::<BE>::ZERO; 4]);
        }
        out.end(EYECATCHER)
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    system_id: [u8; 8],
    reason: U32<BE>,
    system: u8,
    reserved: [u8; 3],
}

const LEN_V1: usize = size_of::<Header>() + size_of::<Body>() + 4;
const LEN_V2: usize = LEN_V1 + 16;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smc::clc::Message;

    #[test]
    fn literal_declines() {
        let first = Decline::new(Version::V1, Reason::NO_SMCD_DEVICE);
        let mut bytes = b"\xe2\xd4\xc3\xd9\x04\x00\x1c\x10".to_vec();
        bytes.extend([0; 8]);
        bytes.extend(b"\x03\x03\x00\x01\x00\x00\x00\x00\xe2\xd4\xc3\xd9");
        assert_eq!(Message::parse(&bytes), Ok(Message::Decline(first)));
        assert_eq!(Message::Decline(first).to_bytes()[..], bytes[..]);

        let second = Decline::new(Version::V2, Reason::OUT_OF_SYNC);
        let mut bytes = b"\xe2\xd4\xc3\xd9\x04\x00\x2c\x28".to_vec();
        bytes.extend([0; 8]);
        bytes.extend(b"\x04\x00\x00\x00\x20\x00\x00\x00");
        bytes.extend([0; 16]);
        bytes.extend(b"\xe2\xd4\xc3\xd9");
        assert!(second.out_of_sync);
        assert_eq!(Message::parse(&bytes), Ok(Message::Decline(second)));
        assert_eq!(Message::Decline(second).to_bytes()[..], bytes[..]);
    }

    #[test]
    fn the_length_has_to_be_that_of_the_version() {
        let mut bytes = Message::Decline(Decline::default()).to_bytes();
        bytes[7] = 0x10;
        assert_eq!(Message::parse(&bytes), Err(ClcError::Length { kind: 4, len: 44 }));
    }
}
