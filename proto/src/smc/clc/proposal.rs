//! The proposal (Linux `struct smc_clc_msg_proposal_area`).
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 8 | header; bits 3…2 of its last byte: modes in version 2, 1…0: in version 1 |
//! | 8 | 8 | system id of the sender (SMC-R) |
//! | 16 | 16 | GID of its RDMA port |
//! | 32 | 6 | MAC of its RDMA port |
//! | 38 | 2 | *I*: from offset 40 to the address area |
//! | 40 | 40 | SMC-D area, if *I* is 40 or the version is 2: GID (8), CHID (2), *E* (2): from offset 52 to the version 2 extension, reserved (28) |
//! | 40 + *I* | 8 + 17 *n* | address area, unless there is no mode in version 1: IPv4 subnet (4), its length (1), reserved (2), *n* (1), then each IPv6 prefix (16) with its length (1) |
//! | 52 + *E* | 40 + 32 *m* | version 2 extension: *m* (1), *k* (1), reserved (1), release (bits 7…4) and whether the system EID counts (bit 0) (1), reserved (2), *D* (2), RoCE GID (16), reserved (16), *m* user EIDs (32 each). *D*: from the end of its field to the SMC-D extension |
//! | … + *D* | 48 + 10 *k* | SMC-D version 2 extension: system EID (32), reserved (16), then *k* times GID (8) and CHID (2) |
//! | end | 4 | eyecatcher |

use super::{
    Bytes, ClcError, EYECATCHER, Eid, GidChid, GidChidWire, Header, List, MAX_DEVICES, MAX_EIDS,
    MAX_PREFIXES, Modes, PROPOSAL, Version, Writer, part,
};
use zerocopy::byteorder::{BE, U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// A client's proposal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Proposal {
    /// Version of the message.
    pub version: Version,
    /// What the client can do in version 1.
    pub v1: Modes,
    /// Who the client is to SMC-R: system id, GID and MAC. Zero for SMC-D.
    pub rdma: [u8; 30],
    /// The device for version 1, which in version 2 is one of those to choose from, too. CHID 0: none in version 2.
    pub smcd: Option<GidChid>,
    /// The client's subnets, which version 1 compares.
    pub prefixes: Option<Prefixes>,
    /// What version 2 adds; with it, what the client can do in version 2.
    pub v2: Option<V2Extension>,
}

/// The subnets of the client's interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Prefixes {
    /// IPv4 subnet as a number, and the length of its mask in bits.
    pub ipv4: (u32, u8),
    /// IPv6 prefixes; if there are any, the IPv4 one does not count.
    pub ipv6: List<Ipv6Prefix, MAX_PREFIXES>,
}

/// An IPv6 prefix.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Ipv6Prefix {
    /// The address whose first bits count.
    pub address: [u8; 16],
    /// How many bits count.
    pub len: u8,
}

/// What version 2 adds to a proposal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct V2Extension {
    /// What the client can do in version 2.
    pub modes: Modes,
    /// Release of the protocol: 0.
    pub release: u8,
    /// GID of a RoCE port, for SMC-R.
    pub roce: [u8; 16],
    /// The client's user-defined EIDs.
    pub eids: List<Eid, MAX_EIDS>,
    /// What SMC-D needs; there if `modes` has it, unless the sender forgot.
    pub smcd: Option<SmcdV2Extension>,
}

/// What version 2 adds for SMC-D.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SmcdV2Extension {
    /// The EID of the client's host, if it may count.
    pub system_eid: Option<Eid>,
    /// Devices to choose from, the client's favourite first.
    pub devices: List<GidChid, MAX_DEVICES>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Base {
    rdma: [u8; 30],
    address_area: U16<BE>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SmcdArea {
    device: GidChidWire,
    v2_offset: U16<BE>,
    reserved: [u8; 28],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AddressArea {
    subnet: U32<BE>,
    len: u8,
    reserved: [u8; 2],
    ipv6: u8,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct V2Area {
    eids: u8,
    devices: u8,
    reserved: u8,
    flags: u8,
    reserved2: [u8; 2],
    smcd_offset: U16<BE>,
    roce: [u8; 16],
    reserved3: [u8; 16],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SmcdV2Area {
    system_eid: Eid,
    reserved: [u8; 16],
}

/// Offset of the base: behind the header.
const BASE: usize = size_of::<Header>();
/// Offset of the SMC-D area.
const SMCD: usize = BASE + size_of::<Base>();
/// What the offset of the version 2 extension counts from.
const V2_FROM: usize = SMCD + 12;
/// What the offset of the SMC-D extension counts from, in the version 2 extension.
const SMCD_V2_FROM: usize = 8;
const TRAILER: usize = 4;

impl Proposal {
    pub(super) fn parse(header: &Header, bytes: &[u8]) -> Result<Proposal, ClcError> {
        let version = header.version();
        let v1 = Modes::from_bits(header.v1());
        let v2 = if version == Version::V1 { Modes::Neither } else { Modes::from_bits(header.v2()) };
        if version == Version::V1 && v1 == Modes::Neither {
            return Err(ClcError::Value);
        }
        let base: Base = part(bytes, BASE)?;
        let offset = usize::from(base.address_area.get());
        if offset > size_of::<SmcdArea>() || v1.has_d() && offset != size_of::<SmcdArea>() {
            return Err(ClcError::Bounds);
        }
        let has_smcd_area = version != Version::V1 || offset == size_of::<SmcdArea>();
        let smcd: Option<SmcdArea> = if has_smcd_area { Some(part(bytes, SMCD)?) } else { None };
        let mut want = SMCD + if version == Version::V1 { offset } else { size_of::<SmcdArea>() } + TRAILER;

        let prefixes = if v1 == Modes::Neither {
            None
        } else {
            let at = SMCD + offset;
            let area: AddressArea = part(bytes, at)?;
            let prefixes = Prefixes {
                ipv4: (area.subnet.get(), area.len),
                ipv6: many(bytes, at + size_of::<AddressArea>(), area.ipv6)?,
            };
            want += size_of::<AddressArea>() + prefixes.ipv6.len() * size_of::<Ipv6Prefix>();
            Some(prefixes)
        };
        let v2 = if v2 == Modes::Neither {
            None
        } else {
            let offset = smcd.as_ref().map_or(0, |area| area.v2_offset.get());
            let (extension, len) = parse_v2(v2, bytes, offset)?;
            want += len;
            Some(extension)
        };
        if bytes.len() != want {
            return Err(header.length_error());
        }
        let smcd = smcd.map(|area| GidChid::from(area.device)).filter(|d| v1.has_d() || d.chid != 0);
        Ok(Proposal { version, v1, rdma: base.rdma, smcd, prefixes, v2 })
    }

    pub(super) fn to_bytes(self) -> Bytes {
        let modes = self.v2.map_or(Modes::Neither, |v2| v2.modes);
        let v1 = if self.prefixes.is_some() { self.v1 } else { Modes::Neither };
        let v2_bits = if self.version == Version::V1 { 0 } else { modes.to_bits() };
        let mut out = Writer::new(Header::new(EYECATCHER, PROPOSAL, self.version, v2_bits, v1.to_bits()));
        let address = if v1 == Modes::Neither { 0 } else { size_of::<SmcdArea>() };
        out.put(&Base { rdma: self.rdma, address_area: (address as u16).into() });
        let address_len = self
            .prefixes
            .map_or(0, |prefixes| size_of::<AddressArea>() + prefixes.ipv6.len() * size_of::<Ipv6Prefix>());
        let v2_offset = SMCD + size_of::<SmcdArea>() + address_len - V2_FROM;
        out.put(&SmcdArea {
            device: self.smcd.unwrap_or_default().into(),
            v2_offset: if self.v2.is_some() { (v2_offset as u16).into() } else { 0.into() },
            reserved: [0; 28],
        });
        if let Some(prefixes) = self.prefixes {
            out.put(&AddressArea {
                subnet: prefixes.ipv4.0.into(),
                len: prefixes.ipv4.1,
                reserved: [0; 2],
                ipv6: prefixes.ipv6.len() as u8,
            });
            out.put(&*prefixes.ipv6);
        }
        if let Some(v2) = self.v2 {
            let smcd_offset = size_of::<V2Area>() - SMCD_V2_FROM + v2.eids.len() * size_of::<Eid>();
            out.put(&V2Area {
                eids: v2.eids.len() as u8,
                devices: v2.smcd.map_or(0, |smcd| smcd.devices.len() as u8),
                reserved: 0,
                flags: v2.release << 4 | u8::from(v2.smcd.is_some_and(|smcd| smcd.system_eid.is_some())),
                reserved2: [0; 2],
                smcd_offset: if v2.smcd.is_some() { (smcd_offset as u16).into() } else { 0.into() },
                roce: v2.roce,
                reserved3: [0; 16],
            });
            out.put(&*v2.eids);
            // Whoever does SMC-D has the area, even one that no offset leads to: so the length counts it.
            if v2.modes.has_d() {
                let smcd = v2.smcd.unwrap_or_default();
                out.put(&SmcdV2Area { system_eid: smcd.system_eid.unwrap_or_default(), reserved: [0; 16] });
                smcd.devices.iter().for_each(|device| out.put(&GidChidWire::from(*device)));
            }
        }
        out.end(EYECATCHER)
    }
}

/// The version 2 extension, and how many bytes of the message it takes.
fn parse_v2(modes: Modes, bytes: &[u8], offset: u16) -> Result<(V2Extension, usize), ClcError> {
    if offset == 0 {
        return Err(ClcError::Bounds);
    }
    let at = V2_FROM + usize::from(offset);
    let area: V2Area = part(bytes, at)?;
    let eids: List<Eid, MAX_EIDS> = many(bytes, at + size_of::<V2Area>(), area.eids)?;
    let mut len = size_of::<V2Area>() + size_of_val(&*eids);
    let mut smcd = None;
    if modes.has_d() {
        if usize::from(area.devices) > MAX_DEVICES {
            return Err(ClcError::Bounds);
        }
        len += size_of::<SmcdV2Area>() + usize::from(area.devices) * size_of::<GidChidWire>();
        // Without an offset there is none, which is for the negotiation to refuse.
        if area.smcd_offset.get() != 0 {
            let at = at + SMCD_V2_FROM + usize::from(area.smcd_offset.get());
            let wire: SmcdV2Area = part(bytes, at)?;
            let mut devices = List::new();
            for i in 0..usize::from(area.devices) {
                let device: GidChidWire =
                    part(bytes, at + size_of::<SmcdV2Area>() + i * size_of::<GidChidWire>())?;
                devices.push(device.into()).map_err(|_| ClcError::Bounds)?;
            }
            let system_eid = (area.flags & 1 != 0).then_some(wire.system_eid);
            smcd = Some(SmcdV2Extension { system_eid, devices });
        }
    }
    Ok((V2Extension { modes, release: area.flags >> 4, roce: area.roce, eids, smcd }, len))
}

/// `count` parts of one kind.
fn many<T, const N: usize>(bytes: &[u8], at: usize, count: u8) -> Result<List<T, N>, ClcError>
where
    T: FromBytes + Unaligned + Copy + Default,
{
    let mut list = List::new();
    for i in 0..usize::from(count) {
        list.push(part(bytes, at + i * size_of::<T>())?).map_err(|_| ClcError::Bounds)?;
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smc::clc::{MAX_SIZE, Message};
    use std::vec::Vec;

    /// As Linux 6.1 with one ISM device and one user EID sends it (typev1 SMC-D, typev2 SMC-D).
    fn linux() -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(b"\xe2\xd4\xc3\xd9\x01\x00\xde\x25"); // proposal, 222 bytes, version 2, D, D
        bytes.extend([0; 30]); // no RDMA
        bytes.extend(b"\x00\x28"); // the address area is 40 bytes further
        bytes.extend(b"\x00\x00\x00\x00\x00\x00\x42\x42\x00\x07"); // GID, CHID
        bytes.extend(b"\x00\x24"); // the extension is 36 bytes further: 28 and the address area
        bytes.extend([0; 28]);
        bytes.extend(b"\xc0\xa8\x00\x00\x18\x00\x00\x00"); // 192.168.0.0/24, no IPv6 prefix
        bytes.extend(b"\x01\x01\x00\x01\x00\x00\x00\x40"); // one EID, one device, system EID counts, 64
        bytes.extend([0; 32]);
        bytes.extend(b"LAB                             ");
        bytes.extend(b"IBM-SYSZ-ISMSEID000000010000ABCD");
        bytes.extend([0; 16]);
        bytes.extend(b"\x01\x02\x03\x04\x05\x06\x07\x08\x80\x01");
        bytes.extend(b"\xe2\xd4\xc3\xd9");
        bytes
    }

    fn meaning() -> Proposal {
        Proposal {
            version: Version::V2,
            v1: Modes::D,
            rdma: [0; 30],
            smcd: Some(GidChid { gid: 0x4242, chid: 7 }),
            prefixes: Some(Prefixes { ipv4: (0xc0a8_0000, 24), ipv6: List::new() }),
            v2: Some(V2Extension {
                modes: Modes::D,
                release: 0,
                roce: [0; 16],
                eids: List::first_of([Eid::user("LAB").unwrap()]),
                smcd: Some(SmcdV2Extension {
                    system_eid: Some(Eid(*b"IBM-SYSZ-ISMSEID000000010000ABCD")),
                    devices: List::first_of([GidChid { gid: 0x0102_0304_0506_0708, chid: 0x8001 }]),
                }),
            }),
        }
    }

    #[test]
    fn a_literal_proposal_of_version_2() {
        assert_eq!(Message::parse(&linux()), Ok(Message::Proposal(meaning())));
        assert_eq!(Message::Proposal(meaning()).to_bytes()[..], linux()[..]);
    }

    #[test]
    fn a_literal_proposal_of_version_1_for_rdma() {
        // As RFC 7609 has it: no SMC-D area, the address area follows at once.
        let mut bytes = b"\xe2\xd4\xc3\xd9\x01\x00\x34\x10".to_vec();
        bytes.extend(1..=30);
        bytes.extend(b"\x00\x00\x0a\x00\x00\x00\x08\x00\x00\x00\xe2\xd4\xc3\xd9");
        let Ok(Message::Proposal(proposal)) = Message::parse(&bytes) else { panic!("it parses") };
        assert_eq!((proposal.version, proposal.v1, proposal.smcd), (Version::V1, Modes::R, None));
        assert_eq!(proposal.rdma[29], 30);
        assert_eq!(proposal.prefixes.unwrap().ipv4, (0x0a00_0000, 8));
    }

    #[test]
    fn a_proposal_of_version_2_only_has_no_address_area() {
        let only = Proposal { v1: Modes::Neither, prefixes: None, smcd: None, ..meaning() };
        let bytes = Message::Proposal(only).to_bytes();
        assert_eq!(bytes.len(), 40 + 40 + 40 + 32 + 48 + 10 + 4);
        assert_eq!(bytes[7], 0x26);
        assert_eq!(bytes[50..52], [0, 28]);
        assert_eq!(Message::parse(&bytes), Ok(Message::Proposal(only)));
    }

    #[test]
    fn the_longest_proposal_fits() {
        let mut proposal = meaning();
        let v2 = proposal.v2.as_mut().unwrap();
        v2.eids = List::first_of([Eid([b'E'; 32]); 9]);
        v2.smcd.as_mut().unwrap().devices = List::first_of([GidChid { gid: 1, chid: 2 }; 9]);
        let prefix = Ipv6Prefix { address: [1; 16], len: 64 };
        proposal.prefixes.as_mut().unwrap().ipv6 = List::first_of([prefix; 9]);
        let bytes = Message::Proposal(proposal).to_bytes();
        assert_eq!(bytes.len(), MAX_SIZE);
        assert_eq!(Message::parse(&bytes), Ok(Message::Proposal(proposal)));
    }

    #[test]
    fn what_lies_outside_is_not_read() {
        for (at, value, want) in [
            (39, 0x29, ClcError::Bounds), // address area behind the SMC-D area
            (39, 0x27, ClcError::Bounds), // and inside of it
            (51, 0xff, ClcError::Bounds), // extension
            (51, 0x00, ClcError::Bounds), // no extension
            (87, 9, ClcError::Bounds),    // nine IPv6 prefixes
            (88, 9, ClcError::Bounds),    // nine EIDs
            (89, 9, ClcError::Bounds),    // nine devices
            (89, 2, ClcError::Bounds),    // a device in the trailer
            (95, 0xff, ClcError::Bounds), // SMC-D extension
            (88, 0, ClcError::Length { kind: 1, len: 222 }), // an EID too many
            (7, 0x05, ClcError::Value),   // version 0
            (4, 5, ClcError::Value),      // type
            (221, 0, ClcError::Trailer),
            (6, 0xdd, ClcError::Length { kind: 1, len: 221 }),
            (0, 0, ClcError::Eyecatcher),
        ] {
            let mut bytes = linux();
            bytes[at] = value;
            assert_eq!(Message::parse(&bytes), Err(want), "{value:#x} at {at}");
        }
        for len in 0..222 {
            assert!(Message::parse(&linux()[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn a_version_2_proposal_without_its_smcd_extension_is_understood() {
        let mut bytes = linux();
        bytes[95] = 0;
        let Ok(Message::Proposal(proposal)) = Message::parse(&bytes) else { panic!("it parses") };
        assert_eq!(proposal.v2.unwrap().smcd, None);
        let again = Message::Proposal(proposal).to_bytes();
        assert_eq!(Message::parse(&again), Ok(Message::Proposal(proposal)));
    }
}
