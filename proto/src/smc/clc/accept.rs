//! Accept and confirm for SMC-D, which have one layout (Linux `struct smc_clc_msg_accept_confirm_v2`).
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | header; bit 3 of its last byte: first contact; bits 1…0: 1 (SMC-D) |
//! | 8 | 8 | GID of the sender's device, in the host's byte order |
//! | 16 | 8 | token of its DMB, in the host's byte order |
//! | 24 | 1 | index of the element in the DMB: 0 |
//! | 25 | 1 | bits 7…4: size of the DMB (2^(n+14) bytes) |
//! | 26 | 2 | reserved |
//! | 28 | 4 | link group's id, free for the sender's use |
//! | 32 | 12 | version 1: reserved |
//! | 32 | 2 | version 2: CHID |
//! | 34 | 32 | version 2: the EID that both have |
//! | 66 | 8 | version 2: reserved |
//! | 74 | 36 | version 2, first contact: bit 7 v2_direct (1), system type (bits 7…4) and release (1), reserved (2), host name (32) |
//! | end | 4 | eyecatcher |
//!
//! GID and token are in the host's byte order although both hosts are one: Linux copies them as they are.

use super::{
    ACCEPT, Bytes, ClcError, EYECATCHER_D, Eid, FIRST_CONTACT, Header, Modes, Version, Writer, part,
};
use zerocopy::byteorder::{BE, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a server says to accept, and a client to confirm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AcceptConfirm {
    /// GID of the sender's device.
    pub gid: u64,
    /// Token of the DMB that the sender owns and the receiver of this writes.
    pub token: u64,
    /// Element of the DMB: Linux knows 0 only.
    pub element: u8,
    /// Size of the DMB, as [`buffer::Size`](crate::smc::buffer::Size) compresses it.
    pub size: u8,
    /// The sender's name for the link group.
    pub link_id: [u8; 4],
    /// Whether this begins a link group.
    pub first_contact: bool,
    /// What version 2 adds; `None`: version 1.
    pub v2: Option<SmcdV2Ids>,
}

/// What version 2 adds to accept and confirm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SmcdV2Ids {
    /// The fabric that was chosen.
    pub chid: u16,
    /// The EID that both have.
    pub eid: Eid,
    /// Who the sender is, at first contact.
    pub first_contact: Option<FirstContact>,
}

/// What is said at first contact.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FirstContact {
    /// 1 z/OS, 2 Linux, 3 AIX.
    pub system: u8,
    /// Release of the protocol: 0.
    pub release: u8,
    /// The host's name, padded with blanks.
    pub host: [u8; 32],
}

impl FirstContact {
    /// Linux, with this host name; what does not fit is cut off.
    pub fn linux(host: &str) -> FirstContact {
        let mut name = [b' '; 32];
        let len = host.len().min(32);
        name[..len].copy_from_slice(&host.as_bytes()[..len]);
        FirstContact { system: 2, release: 0, host: name }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Common {
    gid: [u8; 8],
    token: [u8; 8],
    element: u8,
    size: u8,
    reserved: [u8; 2],
    link_id: [u8; 4],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct V2 {
    chid: U16<BE>,
    eid: Eid,
    reserved: [u8; 8],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FirstContactWire {
    flags: u8,
    system: u8,
    reserved: [u8; 2],
    host: [u8; 32],
}

const COMMON: usize = size_of::<Header>();
const V2_IDS: usize = COMMON + size_of::<Common>();
const FIRST: usize = V2_IDS + size_of::<V2>();
const LEN_V1: usize = 48;
const LEN_V2: usize = FIRST + 4;
const LEN_V2_FIRST: usize = LEN_V2 + size_of::<FirstContactWire>();
const _: () = assert!(LEN_V2 == 78);

impl AcceptConfirm {
    pub(super) fn parse(header: &Header, bytes: &[u8]) -> Result<AcceptConfirm, ClcError> {
        match Modes::from_bits(header.v1()) {
            Modes::D => {}
            Modes::R => return Err(ClcError::NotSmcd),
            Modes::Neither | Modes::Both => return Err(ClcError::Value),
        }
        let common: Common = part(bytes, COMMON)?;
        let first_contact = header.v2() & FIRST_CONTACT != 0;
        let v2 = match (header.version(), bytes.len()) {
            (Version::V1, LEN_V1) => None,
            (Version::V2, LEN_V2 | LEN_V2_FIRST) => {
                let ids: V2 = part(bytes, V2_IDS)?;
                let first_contact = if bytes.len() == LEN_V2_FIRST {
                    let wire: FirstContactWire = part(bytes, FIRST)?;
                    Some(FirstContact {
                        system: wire.system >> 4,
                        release: wire.system & 15,
                        host: wire.host,
                    })
                } else {
                    None
                };
                Some(SmcdV2Ids { chid: ids.chid.get(), eid: ids.eid, first_contact })
            }
            _ => return Err(header.length_error()),
        };
        Ok(AcceptConfirm {
            gid: u64::from_ne_bytes(common.gid),
            token: u64::from_ne_bytes(common.token),
            element: common.element,
            size: common.size >> 4,
            link_id: common.link_id,
            first_contact,
            v2,
        })
    }

    pub(super) fn to_bytes(self, kind: u8) -> Bytes {
        debug_assert!(kind == ACCEPT || kind == super::CONFIRM);
        let version = if self.v2.is_some() { Version::V2 } else { Version::V1 };
        let flag = if self.first_contact { FIRST_CONTACT } else { 0 };
        let mut out = Writer::new(Header::new(EYECATCHER_D, kind, version, flag, Modes::D.to_bits()));
        out.put(&Common {
            gid: self.gid.to_ne_bytes(),
            token: self.token.to_ne_bytes(),
            element: self.element,
            size: self.size << 4,
            reserved: [0; 2],
            link_id: self.link_id,
        });
        match self.v2 {
            None => out.put(&[U32::<BE>::ZERO; 3]),
            Some(ids) => {
                out.put(&V2 { chid: ids.chid.into(), eid: ids.eid, reserved: [0; 8] });
                if let Some(first) = ids.first_contact {
                    out.put(&FirstContactWire {
                        flags: 0,
                        system: first.system << 4 | first.release & 15,
                        reserved: [0; 2],
                        host: first.host,
                    });
                }
            }
        }
        out.end(EYECATCHER_D)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smc::clc::Message;
    use std::vec::Vec;

    fn v1() -> AcceptConfirm {
        AcceptConfirm {
            gid: 0x0102_0304_0506_0708,
            token: 0x1112_1314_1516_1718,
            element: 0,
            size: 6,
            link_id: *b"\0\0\0\x09",
            first_contact: true,
            v2: None,
        }
    }

    fn v2() -> AcceptConfirm {
        let first_contact = Some(FirstContact::linux("host-a"));
        AcceptConfirm {
            v2: Some(SmcdV2Ids { chid: 0x8001, eid: Eid::user("LAB").unwrap(), first_contact }),
            ..v1()
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_literal_accept_of_version_1() {
        let mut bytes = b"\xe2\xd4\xc3\xc4\x02\x00\x30\x19".to_vec();
        bytes.extend(b"\x08\x07\x06\x05\x04\x03\x02\x01\x18\x17\x16\x15\x14\x13\x12\x11");
        bytes.extend(b"\x00\x60\x00\x00\x00\x00\x00\x09");
        bytes.extend([0; 12]);
        bytes.extend(b"\xe2\xd4\xc3\xc4");
        assert_eq!(Message::parse(&bytes), Ok(Message::Accept(v1())));
        assert_eq!(Message::Accept(v1()).to_bytes()[..], bytes[..]);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_literal_confirm_of_version_2_at_first_contact() {
        let mut bytes = b"\xe2\xd4\xc3\xc4\x03\x00\x72\x29".to_vec();
        bytes.extend(b"\x08\x07\x06\x05\x04\x03\x02\x01\x18\x17\x16\x15\x14\x13\x12\x11");
        bytes.extend(b"\x00\x60\x00\x00\x00\x00\x00\x09\x80\x01");
        bytes.extend(b"LAB                             ");
        bytes.extend([0; 8]);
        bytes.extend(b"\x00\x20\x00\x00host-a                          ");
        bytes.extend(b"\xe2\xd4\xc3\xc4");
        assert_eq!(Message::parse(&bytes), Ok(Message::Confirm(v2())));
        assert_eq!(Message::Confirm(v2()).to_bytes()[..], bytes[..]);
    }

    #[test]
    fn lengths_versions_and_modes_have_to_fit_each_other() {
        for message in [v1(), v2()] {
            let bytes = Message::Accept(message).to_bytes();
            for len in 0..bytes.len() {
                let mut short: Vec<u8> = bytes[..len].to_vec();
                if len >= 12 {
                    // It says so itself, and ends as it has to.
                    short[5..7].copy_from_slice(&(len as u16).to_be_bytes());
                    short[len - 4..].copy_from_slice(&EYECATCHER_D);
                }
                let is_without_first_contact = message.v2.is_some() && len == LEN_V2;
                assert_eq!(Message::parse(&short).is_ok(), is_without_first_contact, "{len}");
            }
            for (mode, want) in [(0, ClcError::NotSmcd), (2, ClcError::Value), (3, ClcError::Value)] {
                let mut bytes = bytes;
                bytes[7] = bytes[7] & !3 | mode;
                assert_eq!(Message::parse(&bytes), Err(want));
            }
            let mut bytes = bytes;
            bytes[7] ^= 0x30;
            assert!(matches!(Message::parse(&bytes), Err(ClcError::Length { .. })));
        }
    }
}
