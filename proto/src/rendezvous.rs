//! `RENDEZVOUS`: two drivers that know the same key learn of each other (`docs/device.md`, 6.7 and 6.8).

use crate::control::HEADER_SIZE;
use crate::ids::Gid;
use crate::status::Status;
use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What both know, and nobody else of the group should: for instance what names one TCP connection of the host.
pub type Key = [u8; 32];
/// What each tells the other.
pub type Payload = [u8; 32];
/// Keys of one device that may wait at once.
pub const MAX_RENDEZVOUS: u32 = 1024;

/// A key and what to say to the other one who has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rendezvous {
    /// What both know.
    pub key: Key,
    /// The driver's number for it, which the event repeats.
    pub tag: u32,
    /// For the other one.
    pub payload: Payload,
}

/// Takes a key back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cancel {
    /// The key.
    pub key: Key,
    /// The number that it was given.
    pub tag: u32,
}

/// Whom a driver met.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Met {
    /// The other device; the zero GID if nobody is there yet: then an event will tell.
    pub gid: Gid,
    /// What it had to say.
    pub payload: Payload,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RendezvousWire {
    key: Key,
    tag: U32,
    reserved: U32,
    payload: Payload,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct CancelWire {
    key: Key,
    tag: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct MetWire {
    gid: [u8; 16],
    payload: Payload,
}

const _: () = {
    assert!(size_of::<RendezvousWire>() == 72);
    assert!(size_of::<CancelWire>() == 40);
    assert!(size_of::<MetWire>() == crate::control::MAX_REPLY_SIZE);
    assert!(HEADER_SIZE == 8);
};

impl Rendezvous {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Rendezvous, Status> {
        let (w, _) = RendezvousWire::ref_from_prefix(bytes).map_err(|_| Status::Invalid)?;
        Ok(Rendezvous { key: w.key, tag: w.tag.get(), payload: w.payload })
    }

    pub(crate) fn to_wire(self) -> RendezvousWire {
        RendezvousWire { key: self.key, tag: self.tag.into(), reserved: 0.into(), payload: self.payload }
    }
}

impl Cancel {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Cancel, Status> {
        let (w, _) = CancelWire::ref_from_prefix(bytes).map_err(|_| Status::Invalid)?;
        Ok(Cancel { key: w.key, tag: w.tag.get() })
    }

    pub(crate) fn to_wire(self) -> CancelWire {
        CancelWire { key: self.key, tag: self.tag.into(), reserved: 0.into() }
    }
}

impl Met {
    /// Nobody, so far.
    pub const NOBODY: Met = Met { gid: Gid::from_bytes([0; 16]), payload: [0; 32] };

    pub(crate) fn parse(bytes: &[u8]) -> Option<Met> {
        let (w, _) = MetWire::ref_from_prefix(bytes).ok()?;
        Some(Met { gid: Gid::from_bytes(w.gid), payload: w.payload })
    }

    pub(crate) fn to_wire(self) -> MetWire {
        MetWire { gid: self.gid.to_bytes(), payload: self.payload }
    }
}
