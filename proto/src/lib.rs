//! The dmbridge device (`docs/device.md`) and SMC-D (RFC 7609, Linux `net/smc`) as types.
//!
//! Nothing here does I/O, reads a clock or starts a thread, so every state is reachable from a unit test. What a
//! guest or a peer wrote is parsed into a type that cannot hold a wrong value, or is refused with the status that the
//! specification gives it.
//!
//! | module | subject | `docs/device.md` |
//! | --- | --- | --- |
//! | [`ids`] | GID, token, fabric id, EID | 1, 6.1, 8 |
//! | [`features`] | feature bits, virtio IDs | 2, 3 |
//! | [`config`] | configuration space | 4 |
//! | [`status`] | status values | 6 |
//! | [`control`] | commands and replies | 6 |
//! | [`event`] | events | 7 |
//! | [`extent`] | geometry of an extent | 8 |
//! | [`mod@line`] | control line: the signal protocol | 8, 9 |
//! | [`moves`] | moves | 10 |
//! | [`shm`] | copying into memory that somebody else reads at the same time | 10 |
//! | [`smc`] | SMC-D: handshake, cursors, states | |
#![no_std]

extern crate alloc;

#[cfg(test)]
extern crate std;

pub mod config;
pub mod control;
pub mod event;
pub mod extent;
pub mod features;
pub mod ids;
pub mod lifeline;
pub mod line;
pub mod moves;
pub mod rendezvous;
pub mod shm;
pub mod smc;
pub mod status;
mod sync;

/// Queue index of the control queue.
pub const CONTROL_QUEUE: u16 = 0;
/// Queue index of the event queue.
pub const EVENT_QUEUE: u16 = 1;
/// Queue index of the first move queue.
pub const FIRST_MOVE_QUEUE: u16 = 2;
/// The largest queue that the device accepts, in descriptors.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Id of the window among the device's virtio shared memory regions.
pub const WINDOW_SHMID: u8 = 1;
/// Size and position of a DMB are multiples of this, in bytes.
pub const GRANULE: u64 = 4096;
/// Software events of one sender that may wait for buffers before more are refused.
pub const MAX_WAITING_SOFTWARE_EVENTS: usize = 64;
