//! Commands of the control queue and their replies (`docs/device.md`, 6).

use crate::GRANULE;
use crate::ids::{Gid, Token};
use crate::rendezvous::{Cancel, CancelWire, Met, MetWire, Rendezvous, RendezvousWire};
use crate::status::Status;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Size of a command's header, and of the status before a reply, in bytes.
pub const HEADER_SIZE: usize = 8;
/// The largest reply, in bytes, without the status before it.
pub const MAX_REPLY_SIZE: usize = 48;

bitflags::bitflags! {
    /// Flags of [`Register`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct RegisterFlags: u32 {
        /// The DMB lies in the owner's own memory.
        const RAM = 1 << 0;
        /// In the pool, with a control line that is alone in its page.
        const PRIVATE_LINE = 1 << 1;
    }
}

bitflags::bitflags! {
    /// What a pair of devices can do, in replies.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct PairFlags: u32 {
        /// The other device can map (in an attach's reply: not used).
        const MAP = 1 << 0;
        /// Both can use futexes on the control line.
        const FUTEX = 1 << 1;
        /// No other DMB has its control line in the same page (not in the reply of `QUERY_GID`).
        const PRIVATE_LINE = 1 << 2;
    }
}

/// A piece of the owner's memory in which a RAM DMB lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Guest-physical address, a multiple of 8.
    pub addr: u64,
    /// Length in bytes, a multiple of 8, not 0.
    pub len: u64,
}

/// Where a DMB that is being registered shall lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Home<'a> {
    /// In the host's pool.
    Pool,
    /// In the host's pool, and no other DMB has its control line in the same page.
    PoolPrivate,
    /// In the owner's own memory.
    Ram {
        /// Guest-physical address of the control line.
        line_addr: u64,
        /// The pieces, in order.
        segments: Segments<'a>,
    },
}

/// The segments of a RAM DMB, known to be valid and to sum up to its size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segments<'a>(&'a [[u8; 16]]);

impl Segments<'_> {
    /// The segments, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Segment> + '_ {
        self.0.iter().map(Segment::parse)
    }
}

impl Segment {
    fn parse(bytes: &[u8; 16]) -> Segment {
        let w: [U64; 2] = zerocopy::transmute!(*bytes);
        Segment { addr: w[0].get(), len: w[1].get() }
    }

    /// The segment as on the wire.
    pub fn to_bytes(&self) -> [u8; 16] {
        zerocopy::transmute!([U64::new(self.addr), U64::new(self.len)])
    }
}

/// `REGISTER`: a DMB for a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Register<'a> {
    /// The peer that may write.
    pub rgid: Gid,
    /// Size in bytes: a multiple of [`GRANULE`], not 0.
    pub size: u64,
    /// Where it shall lie.
    pub home: Home<'a>,
}

/// `SIGNAL_EVENT`: something to say to another driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SignalEvent {
    /// The device that is told.
    pub rgid: Gid,
    /// Free for use.
    pub code: u32,
    /// Free for use.
    pub info: u64,
}

/// A command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request<'a> {
    /// Is that device there, and what can it do?
    QueryGid(Gid),
    /// Make a DMB.
    Register(Register<'a>),
    /// End a DMB that this device owns.
    Unregister(Token),
    /// Find a DMB in this device's window.
    Attach(Token),
    /// Let go of a DMB.
    Detach(Token),
    /// Tell another driver something.
    SignalEvent(SignalEvent),
    /// Meet the other driver that has a key.
    Rendezvous(Rendezvous),
    /// Take a key back.
    CancelRendezvous(Cancel),
    /// Look at this word of the driver's memory to know whether the driver lives.
    Lifeline(u64),
}

/// Which command it is: class and command number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Command {
    /// Class 0, command 0.
    QueryGid,
    /// Class 1, command 0.
    Register,
    /// Class 1, command 1.
    Unregister,
    /// Class 1, command 2.
    Attach,
    /// Class 1, command 3.
    Detach,
    /// Class 2, command 0.
    SignalEvent,
    /// Class 0, command 1.
    Rendezvous,
    /// Class 0, command 2.
    CancelRendezvous,
    /// Class 0, command 3.
    Lifeline,
}

impl Command {
    /// The command with these numbers.
    pub const fn from_numbers(class: u8, command: u8) -> Option<Command> {
        Some(match (class, command) {
            (0, 0) => Command::QueryGid,
            (1, 0) => Command::Register,
            (1, 1) => Command::Unregister,
            (1, 2) => Command::Attach,
            (1, 3) => Command::Detach,
            (2, 0) => Command::SignalEvent,
            (0, 1) => Command::Rendezvous,
            (0, 2) => Command::CancelRendezvous,
            (0, 3) => Command::Lifeline,
            _ => return None,
        })
    }

    /// Class and command.
    pub const fn numbers(self) -> (u8, u8) {
        match self {
            Command::QueryGid => (0, 0),
            Command::Register => (1, 0),
            Command::Unregister => (1, 1),
            Command::Attach => (1, 2),
            Command::Detach => (1, 3),
            Command::SignalEvent => (2, 0),
            Command::Rendezvous => (0, 1),
            Command::CancelRendezvous => (0, 2),
            Command::Lifeline => (0, 3),
        }
    }

    /// The 8 bytes at the start of the command.
    pub const fn header(self) -> [u8; HEADER_SIZE] {
        let (class, command) = self.numbers();
        [class, command, 0, 0, 0, 0, 0, 0]
    }

    /// Which command the readable bytes of a chain start with: rules 2 and 3 of section 6.
    pub fn parse(bytes: &[u8]) -> Result<Command, Status> {
        let header = bytes.first_chunk::<HEADER_SIZE>().ok_or(Status::Invalid)?;
        Command::from_numbers(header[0], header[1]).ok_or(Status::NotSupported)
    }

    /// Size of the reply after the status, in bytes.
    pub const fn reply_size(self) -> usize {
        match self {
            Command::QueryGid => size_of::<QueryReplyWire>(),
            Command::Register => size_of::<RegisterReplyWire>(),
            Command::Attach => size_of::<AttachReplyWire>(),
            Command::Rendezvous => size_of::<MetWire>(),
            Command::Unregister
            | Command::Detach
            | Command::SignalEvent
            | Command::CancelRendezvous
            | Command::Lifeline => 0,
        }
    }

    /// Size of the body after the header, in bytes, without a registration's segments.
    pub const fn body_size(self) -> usize {
        match self {
            Command::QueryGid => 16,
            Command::Register => size_of::<RegisterWire>(),
            Command::Unregister | Command::Attach | Command::Detach | Command::Lifeline => 8,
            Command::SignalEvent => size_of::<SignalEventWire>(),
            Command::Rendezvous => size_of::<RendezvousWire>(),
            Command::CancelRendezvous => size_of::<CancelWire>(),
        }
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RegisterWire {
    rgid: [u8; 16],
    size: U64,
    flags: U32,
    num_segments: U32,
    line_addr: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SignalEventWire {
    rgid: [u8; 16],
    code: U32,
    reserved: U32,
    info: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct QueryReplyWire {
    flags: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RegisterReplyWire {
    token: U64,
    offset: U64,
    line_offset: U64,
    size: U64,
    index: U32,
    flags: U32,
    reserved: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AttachReplyWire {
    gid: [u8; 16],
    offset: U64,
    line_offset: U64,
    size: U64,
    flags: U32,
    reserved: U32,
}

const _: () = {
    assert!(size_of::<RegisterWire>() == 40);
    assert!(size_of::<SignalEventWire>() == 32);
    assert!(size_of::<QueryReplyWire>() == 8);
    assert!(size_of::<RegisterReplyWire>() == MAX_REPLY_SIZE);
    assert!(size_of::<AttachReplyWire>() == MAX_REPLY_SIZE);
};

fn body<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Result<(&T, &[u8]), Status> {
    T::ref_from_prefix(bytes).map_err(|_| Status::Invalid)
}

impl<'a> Request<'a> {
    /// Parses the readable bytes of a chain: rules 2, 3 and 4 of section 6, and of rule 6 what needs no state:
    /// `EINVAL`, and `E2BIG` for more than `max_segments` segments.
    pub fn parse(bytes: &'a [u8], max_segments: u32) -> Result<Request<'a>, Status> {
        let command = Command::parse(bytes)?;
        let rest = &bytes[HEADER_SIZE..];
        let token = || body::<U64>(rest).map(|(bits, _)| Token::from_bits(bits.get()));
        Ok(match command {
            Command::QueryGid => Request::QueryGid(*body::<Gid>(rest)?.0),
            Command::Register => Request::Register(Register::parse(rest, max_segments)?),
            Command::Unregister => Request::Unregister(token()?),
            Command::Attach => Request::Attach(token()?),
            Command::Detach => Request::Detach(token()?),
            Command::Rendezvous => Request::Rendezvous(Rendezvous::parse(rest)?),
            Command::CancelRendezvous => Request::CancelRendezvous(Cancel::parse(rest)?),
            Command::Lifeline => match body::<U64>(rest)?.0.get() {
                addr if addr.is_multiple_of(4) => Request::Lifeline(addr),
                _ => return Err(Status::Invalid),
            },
            Command::SignalEvent => {
                let (w, _) = body::<SignalEventWire>(rest)?;
                Request::SignalEvent(SignalEvent {
                    rgid: Gid::from_bytes(w.rgid),
                    code: w.code.get(),
                    info: w.info.get(),
                })
            }
        })
    }

    /// Which command it is.
    pub fn command(&self) -> Command {
        match self {
            Request::QueryGid(_) => Command::QueryGid,
            Request::Register(_) => Command::Register,
            Request::Unregister(_) => Command::Unregister,
            Request::Attach(_) => Command::Attach,
            Request::Detach(_) => Command::Detach,
            Request::SignalEvent(_) => Command::SignalEvent,
            Request::Rendezvous(_) => Command::Rendezvous,
            Request::CancelRendezvous(_) => Command::CancelRendezvous,
            Request::Lifeline(_) => Command::Lifeline,
        }
    }

    /// Hands the command, as a driver writes it, to `put` piece by piece.
    pub fn emit(&self, mut put: impl FnMut(&[u8])) {
        put(&self.command().header());
        match self {
            Request::QueryGid(gid) => put(gid.as_bytes()),
            Request::Unregister(token) | Request::Attach(token) | Request::Detach(token) => {
                put(&token.to_bits().to_le_bytes());
            }
            Request::SignalEvent(e) => put(SignalEventWire {
                rgid: e.rgid.to_bytes(),
                code: e.code.into(),
                reserved: 0.into(),
                info: e.info.into(),
            }
            .as_bytes()),
            Request::Rendezvous(r) => put(r.to_wire().as_bytes()),
            Request::CancelRendezvous(c) => put(c.to_wire().as_bytes()),
            Request::Lifeline(addr) => put(&addr.to_le_bytes()),
            Request::Register(r) => r.emit(put),
        }
    }
}

impl<'a> Register<'a> {
    /// The body of a registration in the pool, after the header.
    fn parse(bytes: &'a [u8], max_segments: u32) -> Result<Register<'a>, Status> {
        let (w, rest) = body::<RegisterWire>(bytes)?;
        let size = w.size.get();
        let flags = RegisterFlags::from_bits(w.flags.get()).ok_or(Status::Invalid)?;
        if size == 0 || !size.is_multiple_of(GRANULE) {
            return Err(Status::Invalid);
        }
        let home = if flags.contains(RegisterFlags::RAM) {
            if flags.contains(RegisterFlags::PRIVATE_LINE) {
                return Err(Status::Invalid);
            }
            if w.num_segments.get() > max_segments {
                return Err(Status::TooBig);
            }
            let count = w.num_segments.get() as usize;
            let (segments, _) =
                <[[u8; 16]]>::ref_from_prefix_with_elems(rest, count).map_err(|_| Status::Invalid)?;
            let line_addr = w.line_addr.get();
            if !line_addr.is_multiple_of(crate::extent::LINE_SIZE) {
                return Err(Status::Invalid);
            }
            let mut sum = 0u64;
            for segment in segments.iter().map(Segment::parse) {
                if segment.len == 0 || !segment.addr.is_multiple_of(8) || !segment.len.is_multiple_of(8) {
                    return Err(Status::Invalid);
                }
                sum = sum.checked_add(segment.len).ok_or(Status::Invalid)?;
            }
            if sum != size {
                return Err(Status::Invalid);
            }
            Home::Ram { line_addr, segments: Segments(segments) }
        } else {
            if w.num_segments.get() != 0 || w.line_addr.get() != 0 {
                return Err(Status::Invalid);
            }
            if flags.contains(RegisterFlags::PRIVATE_LINE) { Home::PoolPrivate } else { Home::Pool }
        };
        Ok(Register { rgid: Gid::from_bytes(w.rgid), size, home })
    }

    fn emit(&self, mut put: impl FnMut(&[u8])) {
        let (flags, line_addr, segments) = match self.home {
            Home::Pool => (RegisterFlags::empty(), 0, Segments(&[])),
            Home::PoolPrivate => (RegisterFlags::PRIVATE_LINE, 0, Segments(&[])),
            Home::Ram { line_addr, segments } => (RegisterFlags::RAM, line_addr, segments),
        };
        put(RegisterWire {
            rgid: self.rgid.to_bytes(),
            size: self.size.into(),
            flags: flags.bits().into(),
            num_segments: (segments.0.len() as u32).into(),
            line_addr: line_addr.into(),
        }
        .as_bytes());
        put(segments.0.as_flattened());
    }
}

impl<'a> Segments<'a> {
    /// Segments that [`Segment::to_bytes`] made, for a driver to register; the device checks them.
    pub fn from_wire(bytes: &'a [[u8; 16]]) -> Segments<'a> {
        Segments(bytes)
    }
}

/// Reply of `REGISTER`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RegisterReply {
    /// The DMB's name.
    pub token: Token,
    /// Its offset in the owner's window, in bytes; 0 for a RAM DMB.
    pub offset: u64,
    /// Its control line's offset in the owner's window, in bytes; 0 for a RAM DMB.
    pub line_offset: u64,
    /// Its size, in bytes.
    pub size: u64,
    /// The owner's number for it.
    pub index: u32,
    /// What the pair can do.
    pub flags: PairFlags,
}

/// Reply of `ATTACH`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttachReply {
    /// The owner.
    pub gid: Gid,
    /// The DMB's offset in the peer's window, in bytes.
    pub offset: u64,
    /// Its control line's offset in the peer's window, in bytes.
    pub line_offset: u64,
    /// Its size, in bytes.
    pub size: u64,
    /// What the pair can do.
    pub flags: PairFlags,
}

/// What the device answers to a command that succeeded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reply {
    /// To `QUERY_GID`.
    QueryGid(PairFlags),
    /// To `REGISTER`.
    Register(RegisterReply),
    /// To `ATTACH`.
    Attach(AttachReply),
    /// To `RENDEZVOUS`.
    Rendezvous(Met),
    /// To every other command.
    Done,
}

/// Status and reply as they lie in a chain's writable part.
#[derive(Clone, Copy)]
pub struct Response {
    bytes: [u8; HEADER_SIZE + MAX_REPLY_SIZE],
    len: usize,
}

impl Response {
    /// The bytes to write; their number is the used length.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl From<Result<Reply, Status>> for Response {
    fn from(result: Result<Reply, Status>) -> Response {
        let mut bytes = [0; HEADER_SIZE + MAX_REPLY_SIZE];
        bytes[0] = Status::to_byte(&result);
        let mut len = HEADER_SIZE;
        let mut put = |reply: &[u8]| {
            bytes[len..len + reply.len()].copy_from_slice(reply);
            len += reply.len();
        };
        match result {
            Ok(Reply::QueryGid(flags)) => {
                put(QueryReplyWire { flags: flags.bits().into(), reserved: 0.into() }.as_bytes());
            }
            Ok(Reply::Register(r)) => put(RegisterReplyWire {
                token: r.token.to_bits().into(),
                offset: r.offset.into(),
                line_offset: r.line_offset.into(),
                size: r.size.into(),
                index: r.index.into(),
                flags: r.flags.bits().into(),
                reserved: 0.into(),
            }
            .as_bytes()),
            Ok(Reply::Attach(a)) => put(AttachReplyWire {
                gid: a.gid.to_bytes(),
                offset: a.offset.into(),
                line_offset: a.line_offset.into(),
                size: a.size.into(),
                flags: a.flags.bits().into(),
                reserved: 0.into(),
            }
            .as_bytes()),
            Ok(Reply::Rendezvous(met)) => put(met.to_wire().as_bytes()),
            Ok(Reply::Done) | Err(_) => {}
        }
        Response { bytes, len }
    }
}

/// Why a driver cannot use a device's answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ResponseError {
    /// The device returned the command unanswered.
    #[error("the device answered {0} bytes where {1} belong")]
    Short(usize, usize),
    /// A status of another version.
    #[error(transparent)]
    Status(#[from] crate::status::UnknownStatus),
}

impl Reply {
    /// Parses the used bytes of the answer to `command`. The outer error is the device's fault, the inner its answer.
    pub fn parse(command: Command, bytes: &[u8]) -> Result<Result<Reply, Status>, ResponseError> {
        let short = |want| ResponseError::Short(bytes.len(), want);
        let (header, rest) = bytes.split_first_chunk::<HEADER_SIZE>().ok_or(short(HEADER_SIZE))?;
        if let Err(status) = Status::from_byte(header[0])? {
            return Ok(Err(status));
        }
        let short = short(HEADER_SIZE + command.reply_size());
        Ok(Ok(match command {
            Command::QueryGid => {
                let (w, _) = QueryReplyWire::ref_from_prefix(rest).map_err(|_| short)?;
                Reply::QueryGid(PairFlags::from_bits_truncate(w.flags.get()))
            }
            Command::Register => {
                let (w, _) = RegisterReplyWire::ref_from_prefix(rest).map_err(|_| short)?;
                Reply::Register(RegisterReply {
                    token: Token::from_bits(w.token.get()),
                    offset: w.offset.get(),
                    line_offset: w.line_offset.get(),
                    size: w.size.get(),
                    index: w.index.get(),
                    flags: PairFlags::from_bits_truncate(w.flags.get()),
                })
            }
            Command::Attach => {
                let (w, _) = AttachReplyWire::ref_from_prefix(rest).map_err(|_| short)?;
                Reply::Attach(AttachReply {
                    gid: Gid::from_bytes(w.gid),
                    offset: w.offset.get(),
                    line_offset: w.line_offset.get(),
                    size: w.size.get(),
                    flags: PairFlags::from_bits_truncate(w.flags.get()),
                })
            }
            Command::Rendezvous => Reply::Rendezvous(Met::parse(rest).ok_or(short)?),
            Command::Unregister
            | Command::Detach
            | Command::SignalEvent
            | Command::CancelRendezvous
            | Command::Lifeline => Reply::Done,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn bytes(request: &Request<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        request.emit(|piece| bytes.extend_from_slice(piece));
        bytes
    }

    #[test]
    fn a_literal_register() {
        let literal = *b"\x01\0\0\0\0\0\0\0\
            \x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\0\0\0\0\0\
            \0\x20\0\0\0\0\0\0\x01\0\0\0\x02\0\0\0\x40\0\x10\0\0\0\0\0\
            \0\x30\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\
            \0\x50\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0";
        let Ok(Request::Register(r)) = Request::parse(&literal, 2) else { panic!("no registration") };
        assert_eq!((r.rgid, r.size), (Gid::from_u64(0x1122_3344_5566_7788), 8192));
        let Home::Ram { line_addr, segments } = r.home else { panic!("not in RAM") };
        assert_eq!(line_addr, 0x10_0040);
        let segments: Vec<_> = segments.iter().collect();
        assert_eq!(segments, [Segment { addr: 0x13000, len: 4096 }, Segment { addr: 0x15000, len: 4096 }]);
        assert_eq!(bytes(&Request::Register(r)), literal);
        assert_eq!(Request::parse(&literal, 1), Err(Status::TooBig));
        assert_eq!(Request::parse(&literal[..literal.len() - 1], 2), Err(Status::Invalid));
    }

    #[test]
    fn every_request_survives_the_wire() {
        let gid = Gid::from_u64(42);
        let token = Token::from_bits(0x7_0001_0002);
        for request in [
            Request::QueryGid(gid),
            Request::Register(Register { rgid: gid, size: 4096, home: Home::Pool }),
            Request::Register(Register { rgid: gid, size: 4096, home: Home::PoolPrivate }),
            Request::Unregister(token),
            Request::Attach(token),
            Request::Detach(token),
            Request::SignalEvent(SignalEvent { rgid: gid, code: 7, info: u64::MAX }),
            Request::Rendezvous(Rendezvous { key: [1; 32], tag: 7, payload: [2; 32] }),
            Request::CancelRendezvous(Cancel { key: [3; 32], tag: 9 }),
            Request::Lifeline(0x1_2345_6780),
        ] {
            let bytes = bytes(&request);
            assert_eq!(bytes.len(), HEADER_SIZE + request.command().body_size());
            assert_eq!(Request::parse(&bytes, 0), Ok(request));
            for short in 0..bytes.len() {
                assert_eq!(Request::parse(&bytes[..short], 0), Err(Status::Invalid), "{short} bytes");
            }
        }
    }

    #[test]
    fn an_unknown_command_is_not_supported() {
        for (class, command) in [(0, 4), (1, 4), (2, 1), (3, 0), (255, 255)] {
            assert_eq!(Request::parse(&[class, command, 0, 0, 0, 0, 0, 0], 0), Err(Status::NotSupported));
        }
    }

    #[test]
    fn a_registration_that_breaks_the_table_is_refused() {
        let good =
            bytes(&Request::Register(Register { rgid: Gid::from_u64(1), size: 4096, home: Home::Pool }));
        for (at, value) in [
            (HEADER_SIZE + 16, 1),  // size 4097
            (HEADER_SIZE + 17, 0),  // size 0
            (HEADER_SIZE + 24, 4),  // an unknown flag
            (HEADER_SIZE + 24, 1),  // RAM without segments
            (HEADER_SIZE + 28, 1),  // segments without RAM
            (HEADER_SIZE + 32, 64), // a control line without RAM
        ] {
            let mut bytes = good.clone();
            bytes[at] = value;
            assert_eq!(Request::parse(&bytes, 8), Err(Status::Invalid), "byte {at} = {value}");
        }
    }

    #[test]
    fn segments_that_overflow_or_do_not_sum_up_are_refused() {
        let try_segments = |segments: &[Segment]| {
            let wire: Vec<_> = segments.iter().map(Segment::to_bytes).collect();
            let home = Home::Ram { line_addr: 64, segments: Segments::from_wire(&wire) };
            let bytes = bytes(&Request::Register(Register { rgid: Gid::from_u64(1), size: 4096, home }));
            Request::parse(&bytes, 8).map(|_| ())
        };
        assert_eq!(try_segments(&[Segment { addr: 8, len: 4096 }]), Ok(()));
        assert_eq!(try_segments(&[Segment { addr: 8, len: 4088 }]), Err(Status::Invalid));
        assert_eq!(try_segments(&[Segment { addr: 4, len: 4096 }]), Err(Status::Invalid));
        let huge = Segment { addr: 0, len: u64::MAX - 7 };
        assert_eq!(try_segments(&[huge, Segment { addr: 0, len: 4104 }]), Err(Status::Invalid));
        assert_eq!(
            try_segments(&[Segment { addr: 0, len: 4096 }, Segment { addr: 0, len: 0 }]),
            Err(Status::Invalid)
        );
    }

    #[test]
    fn every_reply_survives_the_wire() {
        let gid = Gid::from_u64(42);
        let flags = PairFlags::MAP | PairFlags::FUTEX;
        let register = RegisterReply {
            token: Token::from_bits(0x7_0001_0002),
            offset: 0x4000,
            line_offset: 64,
            size: 4096,
            index: 3,
            flags,
        };
        let attach = AttachReply { gid, offset: 0x4000, line_offset: 64, size: 4096, flags };
        for (command, reply) in [
            (Command::QueryGid, Reply::QueryGid(flags)),
            (Command::Register, Reply::Register(register)),
            (Command::Attach, Reply::Attach(attach)),
            (Command::Rendezvous, Reply::Rendezvous(Met { gid, payload: [5; 32] })),
            (Command::Detach, Reply::Done),
        ] {
            let response = Response::from(Ok(reply));
            assert_eq!(response.as_bytes().len(), HEADER_SIZE + command.reply_size());
            assert_eq!(Reply::parse(command, response.as_bytes()), Ok(Ok(reply)));
            let refused = Response::from(Err(Status::Quota));
            assert_eq!(refused.as_bytes(), [122, 0, 0, 0, 0, 0, 0, 0]);
            assert_eq!(Reply::parse(command, refused.as_bytes()), Ok(Err(Status::Quota)));
        }
        assert_eq!(Reply::parse(Command::Attach, &[0; 8]), Err(ResponseError::Short(8, 56)));
    }
}
