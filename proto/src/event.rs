//! Events (`docs/device.md`, 7).

use crate::ids::{ExtentId, Gid, Token};
use crate::rendezvous::Payload;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of an event on the wire, in bytes.
pub const EVENT_SIZE: usize = 64;

/// Something that happened to a DMB or a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// A DMB that this device owns was signalled; the mask is in its control line.
    Signal {
        /// The owner's number for the DMB.
        index: u32,
        /// The DMB.
        token: Token,
        /// The sender.
        gid: Gid,
    },
    /// A DMB that this device had attached ended.
    DmbUnregistered {
        /// The DMB.
        token: Token,
        /// The owner.
        gid: Gid,
    },
    /// The peer detached a DMB that this device owns.
    DmbDetached {
        /// The owner's number for the DMB.
        index: u32,
        /// The DMB.
        token: Token,
        /// The peer.
        gid: Gid,
    },
    /// A device with which this one shared a DMB is gone.
    DeviceGone {
        /// The device.
        gid: Gid,
        /// Why.
        reason: GoneReason,
    },
    /// Something that another driver had to say.
    Software {
        /// The sender.
        gid: Gid,
        /// Free for use.
        code: u32,
        /// Free for use.
        info: u64,
    },
    /// An extent appeared in the window.
    ExtentAdded(ExtentInfo),
    /// An extent left the window.
    ExtentRemoved(ExtentInfo),
    /// Another device came with a key of this one.
    Rendezvous {
        /// The other device.
        gid: Gid,
        /// The number that this driver gave the key.
        tag: u32,
        /// What the other had to say.
        payload: Payload,
    },
    /// A device with which this one shared a DMB is paused.
    DevicePaused {
        /// The device.
        gid: Gid,
    },
    /// It goes on.
    DeviceResumed {
        /// The device.
        gid: Gid,
    },
}

/// Why a device is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum GoneReason {
    /// Its driver reset it.
    Reset = 0,
    /// Its front-end left.
    Left = 1,
    /// It broke the device's contract.
    Expelled = 2,
}

/// An extent in a device's window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExtentInfo {
    /// The other device of the pair.
    pub gid: Gid,
    /// Its name.
    pub extent: ExtentId,
    /// Whether this device owns the DMBs in it (else it is their peer).
    pub owned: bool,
    /// Where it starts in the window, in bytes.
    pub offset: u64,
    /// Its size, in bytes.
    pub size: u64,
}

/// An event that a driver cannot use: it skips it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EventError {
    /// Fewer bytes than [`EVENT_SIZE`].
    #[error("an event of {0} bytes, it has 64")]
    Short(usize),
    /// A type of a later minor version.
    #[error("an event of unknown type {0}")]
    Unknown(u16),
    /// A field that breaks the specification.
    #[error("an event of type {0} with a value that is not valid")]
    Invalid(u16),
}

#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Wire {
    kind: U16,
    code: U16,
    index: U32,
    gid: [u8; 16],
    token: U64,
    info: U64,
    offset: U64,
    size: U64,
    reserved: U64,
}

const _: () = assert!(size_of::<Wire>() == EVENT_SIZE);

const SIGNAL: u16 = 1;
const DMB_UNREGISTERED: u16 = 2;
const DMB_DETACHED: u16 = 3;
const DEVICE_GONE: u16 = 4;
const SOFTWARE: u16 = 5;
const EXTENT_ADDED: u16 = 6;
const EXTENT_REMOVED: u16 = 7;
const RENDEZVOUS: u16 = 8;
const DEVICE_PAUSED: u16 = 9;
const DEVICE_RESUMED: u16 = 10;

impl Event {
    /// The event as the device writes it.
    pub fn to_bytes(&self) -> [u8; EVENT_SIZE] {
        let mut w = Wire::default();
        match *self {
            Event::Signal { index, token, gid } => {
                w.kind = SIGNAL.into();
                w.index = index.into();
                w.token = token.to_bits().into();
                w.gid = gid.to_bytes();
            }
            Event::DmbUnregistered { token, gid } => {
                w.kind = DMB_UNREGISTERED.into();
                w.token = token.to_bits().into();
                w.gid = gid.to_bytes();
            }
            Event::DmbDetached { index, token, gid } => {
                w.kind = DMB_DETACHED.into();
                w.index = index.into();
                w.token = token.to_bits().into();
                w.gid = gid.to_bytes();
            }
            Event::DeviceGone { gid, reason } => {
                w.kind = DEVICE_GONE.into();
                w.code = (reason as u16).into();
                w.gid = gid.to_bytes();
            }
            Event::Software { gid, code, info } => {
                w.kind = SOFTWARE.into();
                w.index = code.into();
                w.info = info.into();
                w.gid = gid.to_bytes();
            }
            Event::ExtentAdded(e) => e.emit(EXTENT_ADDED, &mut w),
            Event::ExtentRemoved(e) => e.emit(EXTENT_REMOVED, &mut w),
            Event::Rendezvous { gid, tag, payload } => {
                w.kind = RENDEZVOUS.into();
                w.index = tag.into();
                w.gid = gid.to_bytes();
                [w.token, w.info, w.offset, w.size] = zerocopy::transmute!(payload);
            }
            Event::DevicePaused { gid } => {
                w.kind = DEVICE_PAUSED.into();
                w.gid = gid.to_bytes();
            }
            Event::DeviceResumed { gid } => {
                w.kind = DEVICE_RESUMED.into();
                w.gid = gid.to_bytes();
            }
        }
        zerocopy::transmute!(w)
    }

    /// The event that a device wrote.
    pub fn parse(bytes: &[u8]) -> Result<Event, EventError> {
        let (w, _) = Wire::read_from_prefix(bytes).map_err(|_| EventError::Short(bytes.len()))?;
        let gid = Gid::from_bytes(w.gid);
        let token = Token::from_bits(w.token.get());
        let index = w.index.get();
        Ok(match w.kind.get() {
            SIGNAL => Event::Signal { index, token, gid },
            DMB_UNREGISTERED => Event::DmbUnregistered { token, gid },
            DMB_DETACHED => Event::DmbDetached { index, token, gid },
            DEVICE_GONE => Event::DeviceGone {
                gid,
                reason: match w.code.get() {
                    0 => GoneReason::Reset,
                    1 => GoneReason::Left,
                    2 => GoneReason::Expelled,
                    _ => return Err(EventError::Invalid(DEVICE_GONE)),
                },
            },
            SOFTWARE => Event::Software { gid, code: index, info: w.info.get() },
            EXTENT_ADDED => Event::ExtentAdded(ExtentInfo::parse(&w)?),
            EXTENT_REMOVED => Event::ExtentRemoved(ExtentInfo::parse(&w)?),
            RENDEZVOUS => {
                let payload = zerocopy::transmute!([w.token, w.info, w.offset, w.size]);
                Event::Rendezvous { gid, tag: index, payload }
            }
            DEVICE_PAUSED => Event::DevicePaused { gid },
            DEVICE_RESUMED => Event::DeviceResumed { gid },
            unknown => return Err(EventError::Unknown(unknown)),
        })
    }
}

impl ExtentInfo {
    fn emit(&self, kind: u16, w: &mut Wire) {
        w.kind = kind.into();
        w.code = u16::from(!self.owned).into();
        w.gid = self.gid.to_bytes();
        w.token = u64::from(self.extent.get()).into();
        w.offset = self.offset.into();
        w.size = self.size.into();
    }

    fn parse(w: &Wire) -> Result<ExtentInfo, EventError> {
        let invalid = EventError::Invalid(w.kind.get());
        Ok(ExtentInfo {
            gid: Gid::from_bytes(w.gid),
            extent: u32::try_from(w.token.get()).ok().and_then(ExtentId::new).ok_or(invalid)?,
            owned: match w.code.get() {
                0 => true,
                1 => false,
                _ => return Err(invalid),
            },
            offset: w.offset.get(),
            size: w.size.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literal_events() {
        let gid = Gid::from_u64(0x1122_3344_5566_7788);
        let signal = Event::Signal { index: 3, token: Token::from_bits(0x7_0001_0002), gid };
        let mut bytes = [0u8; 64];
        bytes[..32].copy_from_slice(
            b"\x01\0\0\0\x03\0\0\0\x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\0\0\0\0\0\x02\0\x01\0\x07\0\0\0",
        );
        assert_eq!(signal.to_bytes(), bytes);
        assert_eq!(Event::parse(&bytes), Ok(signal));
    }

    #[test]
    fn every_event_survives_the_wire() {
        let gid = Gid::from_bytes(*b"0123456789abcdef");
        let token = Token::in_ram(9);
        let extent = ExtentInfo {
            gid,
            extent: ExtentId::new(5).unwrap(),
            owned: false,
            offset: 1 << 21,
            size: 1 << 20,
        };
        for event in [
            Event::Signal { index: 1, token, gid },
            Event::DmbUnregistered { token, gid },
            Event::DmbDetached { index: 2, token, gid },
            Event::DeviceGone { gid, reason: GoneReason::Expelled },
            Event::Software { gid, code: 0xffff_fffe, info: u64::MAX },
            Event::ExtentAdded(extent),
            Event::ExtentRemoved(ExtentInfo { owned: true, ..extent }),
            Event::Rendezvous { gid, tag: 5, payload: core::array::from_fn(|i| i as u8) },
            Event::DevicePaused { gid },
            Event::DeviceResumed { gid },
        ] {
            assert_eq!(Event::parse(&event.to_bytes()), Ok(event));
        }
    }

    #[test]
    fn events_that_break_the_specification_are_refused() {
        assert_eq!(Event::parse(&[0; 63]), Err(EventError::Short(63)));
        let mut bytes = [0u8; 64];
        assert_eq!(Event::parse(&bytes), Err(EventError::Unknown(0)));
        bytes[0] = DEVICE_GONE as u8;
        bytes[2] = 3;
        assert_eq!(Event::parse(&bytes), Err(EventError::Invalid(DEVICE_GONE)));
        bytes[0] = EXTENT_ADDED as u8;
        bytes[2] = 0;
        assert_eq!(Event::parse(&bytes), Err(EventError::Invalid(EXTENT_ADDED)));
    }
}
