//! Two well-behaved devices that share a DMB: a witness that the daemon still serves, and serves right.

use crate::frontend::{Options, RawFrontend};
use dmbridge_proto::control::{AttachReply, RegisterReply};
use dmbridge_proto::event::Event;
use dmbridge_proto::line::Wake;
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use std::path::Path;

/// Size of the DMB, in bytes.
pub const SIZE: u64 = 64 << 10;

/// Owner and peer of a DMB in the pool, attached.
pub struct Pair {
    /// Reads.
    pub owner: RawFrontend,
    /// Writes.
    pub peer: RawFrontend,
    /// The DMB as the owner knows it.
    pub dmb: RegisterReply,
    /// The DMB as the peer knows it.
    pub remote: AttachReply,
    round: u8,
}

impl Pair {
    /// Connects both and registers the DMB.
    pub fn new(hub: &Path) -> Pair {
        Pair::with(RawFrontend::connect(hub), RawFrontend::connect(hub))
    }

    /// The same with futexes.
    pub fn with_futex(hub: &Path) -> Pair {
        let connect = || RawFrontend::connect_with(hub, Options::with_futex());
        Pair::with(connect(), connect())
    }

    /// Of these two devices.
    pub fn with(mut owner: RawFrontend, mut peer: RawFrontend) -> Pair {
        let dmb = owner.register(peer.gid(), SIZE).expect("a DMB");
        let remote = peer.attach(dmb.token).expect("attached");
        assert_eq!((remote.gid, remote.size), (owner.gid(), SIZE));
        Pair { owner, peer, dmb, remote, round: 0 }
    }

    /// A store through the window, a move, a signal: all have to arrive, exactly.
    pub fn check(&mut self) {
        self.round = self.round.wrapping_add(1);
        let stored = [self.round; 100];
        self.peer.window().write(self.remote.offset + 8192, &stored);
        assert_eq!(
            self.owner.window().read(self.dmb.offset + 8192, 100),
            stored,
            "stored through the window"
        );

        let bytes: Vec<u8> = (0..5000u32).map(|i| (i as u8).wrapping_mul(7) ^ self.round).collect();
        let line = self.owner.window().line(self.dmb.line_offset);
        line.arm(Wake::Signal);
        let mask = 1 << (self.round % 64);
        let header = MoveHeader { token: self.dmb.token, offset: 100, mask, flags: MoveFlags::SIGNAL };
        assert_eq!(self.peer.move_with(&header, &bytes), Ok(()), "a move with a signal");
        let wanted = self.dmb.token;
        // Others may be woken without a reason.
        let (index, gid) = self.owner.wait_event("the signal of a move", |event| match *event {
            Event::Signal { index, token, gid } if token == wanted => Some((index, gid)),
            _ => None,
        });
        assert_eq!((index, gid), (self.dmb.index, self.peer.gid()));
        assert_eq!(line.take_pending(), mask);
        assert_eq!(self.owner.window().read(self.dmb.offset + 100, 5000), bytes, "moved");
    }
}
