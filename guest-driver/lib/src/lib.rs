//! The guest library of the dmbridge device (`docs/device.md`).

use dmbridge_proto as proto;

#[cfg(feature = "tokio")]
pub mod asynchronous;
mod control;
mod device;
mod dmb;
mod error;
mod events;
mod fork;
mod mapping;
mod mover;
mod moves;
mod ram;
mod reactor;
mod shared;
pub mod stream;
mod sync;
mod transport;
mod virtqueue;
mod wait;
mod window;

/// Devices on the PCI bus, for programs in virtual machines.
pub mod pci {
    pub use crate::transport::pci::{BadPciAddress, PciAddress, PciError, find};
}

pub use device::{Builder, Device, Peer, Stats};
pub use dmb::{Dmb, RemoteDmb};
pub use error::{Error, OutOfBounds};
pub use events::{Event, Events};
pub use mover::{DmbSender, MoveBuffer, MovePart, Mover, Ticket};
pub use shared::{SharedMemory, SharedSlice};
pub use wait::DEFAULT_SPIN;

pub use proto::event::GoneReason;
pub use proto::ids::{Gid, Token};
pub use proto::status::Status;
