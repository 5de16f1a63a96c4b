//! CLC: the messages by which two ends of a TCP connection agree to go on over SMC-D (RFC 7609, appendix A; Linux
//! `net/smc/smc_clc.h` for SMC-D and version 2). Not what to answer: that is `negotiation`.
//!
//! Every message starts with eight bytes:
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 4 | eyecatcher: `SMCR` or `SMCD` in EBCDIC |
//! | 4 | 1 | type: 1 proposal, 2 accept, 3 confirm, 4 decline |
//! | 5 | 2 | length of the whole message, big-endian |
//! | 7 | 1 | bits 7…4 version; bits 3…2 and 1…0: by type |
//!
//! and ends with an eyecatcher again.

mod accept;
mod decline;
mod list;
mod proposal;
mod reason;

pub use accept::{AcceptConfirm, FirstContact, SmcdV2Ids};
pub use decline::Decline;
pub use list::{Full, List};
pub use proposal::{Ipv6Prefix, Prefixes, Proposal, SmcdV2Extension, V2Extension};
pub use reason::Reason;

use zerocopy::byteorder::{BE, U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of what every message starts with.
pub const HEADER_SIZE: usize = 8;
/// The longest message that is sent or believed, in bytes: a proposal with eight of everything.
pub const MAX_SIZE: usize = 652;
/// What messages about no device, or about RDMA, start and end with: `SMCR` in EBCDIC.
pub const EYECATCHER: [u8; 4] = [0xe2, 0xd4, 0xc3, 0xd9];
/// What messages about an SMC-D device start and end with: `SMCD` in EBCDIC.
pub const EYECATCHER_D: [u8; 4] = [0xe2, 0xd4, 0xc3, 0xc4];
/// Devices beside the first that a proposal names at most.
pub const MAX_DEVICES: usize = 8;
/// User-defined EIDs that a proposal names at most.
pub const MAX_EIDS: usize = 8;
/// IPv6 prefixes that a proposal names at most.
pub const MAX_PREFIXES: usize = 8;

const PROPOSAL: u8 = 1;
const ACCEPT: u8 = 2;
const CONFIRM: u8 = 3;
const DECLINE: u8 = 4;

/// A message as bytes.
pub type Bytes = List<u8, MAX_SIZE>;

/// Version of the protocol that a message follows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub enum Version {
    /// RFC 7609, and SMC-D as it was at first: same subnet only.
    V1,
    /// Since Linux 5.10: EIDs say who may talk to whom.
    #[default]
    V2,
}

impl Version {
    const fn to_bits(self) -> u8 {
        match self {
            Version::V1 => 1,
            Version::V2 => 2,
        }
    }
}

/// Which kinds of SMC somebody can do in one version.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Modes {
    /// RDMA only.
    R,
    /// SMC-D only.
    D,
    /// None.
    #[default]
    Neither,
    /// Both.
    Both,
}

impl Modes {
    const fn from_bits(bits: u8) -> Modes {
        match bits & 3 {
            0 => Modes::R,
            1 => Modes::D,
            2 => Modes::Neither,
            _ => Modes::Both,
        }
    }

    const fn to_bits(self) -> u8 {
        match self {
            Modes::R => 0,
            Modes::D => 1,
            Modes::Neither => 2,
            Modes::Both => 3,
        }
    }

    /// Whether SMC-D is among them.
    pub const fn has_d(self) -> bool {
        matches!(self, Modes::D | Modes::Both)
    }

    /// Whether SMC-R is among them.
    pub const fn has_r(self) -> bool {
        matches!(self, Modes::R | Modes::Both)
    }
}

/// An EID: who has the same one in common may talk (ASCII, padded with blanks).
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(transparent)]
pub struct Eid(pub [u8; 32]);

/// Why a text is no EID.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "an EID is 1 to 32 characters: a letter or digit first, then upper-case letters, digits, '.' and '-', no two dots in a row"
)]
pub struct BadEid;

impl Eid {
    /// A user-defined EID by the kernel's rules (`smc_clc_ueid_valid`), padded with blanks.
    ///
    /// # Errors
    ///
    /// [`BadEid`].
    pub fn user(text: &str) -> Result<Eid, BadEid> {
        let bytes = text.as_bytes();
        let good = |b: &u8| b.is_ascii_uppercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-');
        let starts = bytes.first().is_some_and(u8::is_ascii_alphanumeric);
        if !starts || bytes.len() > 32 || !bytes.iter().all(good) || text.contains("..") {
            return Err(BadEid);
        }
        let mut eid = [b' '; 32];
        eid[..bytes.len()].copy_from_slice(bytes);
        Ok(Eid(eid))
    }

    /// The user-defined EID that all guests and programs of a host have in common unless they are given another one: its system EID,
    /// with what a user-defined one may not have replaced.
    pub fn of_host(system: &[u8; 32]) -> Eid {
        let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit();
        let end = system.iter().rposition(|b| !matches!(b, b' ' | 0)).map_or(0, |last| last + 1);
        let mut eid = [b' '; 32];
        for (to, from) in eid.iter_mut().zip(&system[..end]) {
            *to = if plain(*from) || *from == b'.' { *from } else { b'-' };
        }
        if !plain(eid[0]) {
            eid[0] = b'D';
        }
        Eid(eid)
    }
}

/// An SMC-D device as proposals name it, big-endian there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct GidChid {
    /// The device's GID.
    pub gid: u64,
    /// Its fabric.
    pub chid: u16,
}

/// [`GidChid`] on the wire.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct GidChidWire {
    gid: U64<BE>,
    chid: U16<BE>,
}

impl From<GidChidWire> for GidChid {
    fn from(wire: GidChidWire) -> GidChid {
        GidChid { gid: wire.gid.get(), chid: wire.chid.get() }
    }
}

impl From<GidChid> for GidChidWire {
    fn from(device: GidChid) -> GidChidWire {
        GidChidWire { gid: device.gid.into(), chid: device.chid.into() }
    }
}

/// Why bytes are no CLC message that could be answered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ClcError {
    /// It is something else.
    #[error("no CLC message starts here")]
    Eyecatcher,
    /// It is shorter than it says, or its length is none that such a message can have.
    #[error("a CLC message of type {kind} cannot be {len} bytes long")]
    Length {
        /// The message's type.
        kind: u8,
        /// The length that it has.
        len: usize,
    },
    /// Version 0, a type or a mode that does not exist.
    #[error("a field of the CLC message has a value that means nothing")]
    Value,
    /// An offset leads out of the message, or a count is above its limit.
    #[error("a part of the CLC message lies outside of it")]
    Bounds,
    /// It does not end with an eyecatcher.
    #[error("the CLC message does not end as it has to")]
    Trailer,
    /// It accepts or confirms RDMA.
    #[error("the CLC message is about SMC-R")]
    NotSmcd,
}

/// What the first bytes of a TCP stream are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Beginning {
    /// Too few to tell: so far it could become a CLC message.
    Undecided,
    /// A CLC message of this length, in bytes.
    Message(usize),
    /// No CLC message, or none that can be believed.
    Other,
}

/// Looks at what a TCP stream starts with, without taking anything out of it.
pub fn beginning(bytes: &[u8]) -> Beginning {
    let so_far = bytes.len().min(4);
    let is = |eyecatcher: [u8; 4]| bytes[..so_far] == eyecatcher[..so_far];
    if !is(EYECATCHER) && !is(EYECATCHER_D) {
        return Beginning::Other;
    }
    match Header::read_from_prefix(bytes) {
        Err(_) => Beginning::Undecided,
        Ok((header, _)) => match header.check() {
            Ok(len) => Beginning::Message(len),
            Err(_) => Beginning::Other,
        },
    }
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    eyecatcher: [u8; 4],
    kind: u8,
    length: U16<BE>,
    flags: u8,
}

/// First contact in an accept or confirm, "out of sync" in a decline.
const FIRST_CONTACT: u8 = 0b10;

impl Header {
    fn new(eyecatcher: [u8; 4], kind: u8, version: Version, v2: u8, v1: u8) -> Header {
        Header { eyecatcher, kind, length: 0.into(), flags: version.to_bits() << 4 | (v2 & 3) << 2 | v1 & 3 }
    }

    /// The length of the message.
    fn check(&self) -> Result<usize, ClcError> {
        if self.eyecatcher != EYECATCHER && self.eyecatcher != EYECATCHER_D {
            return Err(ClcError::Eyecatcher);
        }
        let len = usize::from(self.length.get());
        if !(HEADER_SIZE + 4..=MAX_SIZE).contains(&len) {
            return Err(ClcError::Length { kind: self.kind, len });
        }
        if self.flags >> 4 == 0 || !(PROPOSAL..=DECLINE).contains(&self.kind) {
            return Err(ClcError::Value);
        }
        Ok(len)
    }

    /// What is above 2 is treated as 2, as Linux does.
    fn version(&self) -> Version {
        if self.flags >> 4 == 1 { Version::V1 } else { Version::V2 }
    }

    fn v1(&self) -> u8 {
        self.flags & 3
    }

    fn v2(&self) -> u8 {
        self.flags >> 2 & 3
    }

    fn length_error(&self) -> ClcError {
        ClcError::Length { kind: self.kind, len: self.length.get().into() }
    }
}

/// A CLC message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "it lives on the stack for a moment, and there is no allocator"
)]
pub enum Message {
    /// The client would like to.
    Proposal(Proposal),
    /// The server does.
    Accept(AcceptConfirm),
    /// The client does, too.
    Confirm(AcceptConfirm),
    /// One of them does not.
    Decline(Decline),
}

impl Message {
    /// The message that `bytes` are, all of them.
    ///
    /// # Errors
    ///
    /// [`ClcError`].
    pub fn parse(bytes: &[u8]) -> Result<Message, ClcError> {
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| ClcError::Eyecatcher)?;
        if header.check()? != bytes.len() {
            return Err(header.length_error());
        }
        let trailer = bytes.last_chunk::<4>().ok_or(ClcError::Trailer)?;
        // Linux does not look at a decline's.
        if header.kind != DECLINE && *trailer != EYECATCHER && *trailer != EYECATCHER_D {
            return Err(ClcError::Trailer);
        }
        Ok(match header.kind {
            PROPOSAL => Message::Proposal(Proposal::parse(&header, bytes)?),
            ACCEPT => Message::Accept(AcceptConfirm::parse(&header, bytes)?),
            CONFIRM => Message::Confirm(AcceptConfirm::parse(&header, bytes)?),
            DECLINE => Message::Decline(Decline::parse(&header, bytes)?),
            _ => return Err(ClcError::Value),
        })
    }

    /// The message as on the wire.
    pub fn to_bytes(&self) -> Bytes {
        match self {
            Message::Proposal(proposal) => proposal.to_bytes(),
            Message::Accept(accept) => accept.to_bytes(ACCEPT),
            Message::Confirm(confirm) => confirm.to_bytes(CONFIRM),
            Message::Decline(decline) => decline.to_bytes(),
        }
    }
}

/// Puts a message together. What a message holds is bounded, so it always fits.
struct Writer(Bytes);

impl Writer {
    fn new(header: Header) -> Writer {
        let mut writer = Writer(Bytes::new());
        writer.put(&header);
        writer
    }

    fn put<T: IntoBytes + Immutable + ?Sized>(&mut self, part: &T) {
        self.0.extend_from_slice(part.as_bytes()).expect("MAX_SIZE is that of the longest message");
    }

    /// Ends the message: trailer and length.
    fn end(mut self, trailer: [u8; 4]) -> Bytes {
        self.put(&trailer);
        let len = self.0.len() as u16;
        self.0[5..7].copy_from_slice(&len.to_be_bytes());
        self.0
    }
}

/// Reads a part of a message.
fn part<T: FromBytes + Unaligned>(bytes: &[u8], at: usize) -> Result<T, ClcError> {
    let rest = bytes.get(at..).ok_or(ClcError::Bounds)?;
    T::read_from_prefix(rest).map(|(part, _)| part).map_err(|_| ClcError::Bounds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hosts_eid_is_one_that_linux_takes() {
        let of_host = |system: &[u8; 32]| Eid::of_host(system);
        assert_eq!(of_host(b"DMBRIDGE-SYSTEM-EID-F1FA9B773897").0, *b"DMBRIDGE-SYSTEM-EID-F1FA9B773897");
        assert_eq!(of_host(b"my_host                         "), Eid::user("D------").unwrap());
        assert_eq!(
            of_host(b"LAB.1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
            Eid::user("LAB.1").unwrap()
        );
    }

    #[test]
    fn a_stream_is_told_from_a_message_by_its_first_bytes() {
        let decline = Message::Decline(Decline::default()).to_bytes();
        for len in 0..HEADER_SIZE {
            assert_eq!(beginning(&decline[..len]), Beginning::Undecided, "{len}");
        }
        assert_eq!(beginning(&decline[..HEADER_SIZE]), Beginning::Message(decline.len()));
        assert_eq!(beginning(b"G"), Beginning::Other);
        assert_eq!(beginning(&[0xe2, 0xd4, 0xc3, 0xd8]), Beginning::Other);
        // An eyecatcher, and then a length that no message has.
        assert_eq!(beginning(&[0xe2, 0xd4, 0xc3, 0xd9, 1, 0xff, 0xff, 0x10]), Beginning::Other);
        assert_eq!(beginning(&[0xe2, 0xd4, 0xc3, 0xd9, 9, 0, 28, 0x10]), Beginning::Other);
    }

    #[test]
    fn an_eid_follows_the_kernels_rules() {
        assert_eq!(&Eid::user("LAB-1.EXAMPLE").unwrap().0, b"LAB-1.EXAMPLE                   ");
        for text in ["", "-A", "lower", "A B", "A..B", "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456"] {
            assert_eq!(Eid::user(text), Err(BadEid), "{text:?}");
        }
    }
}
