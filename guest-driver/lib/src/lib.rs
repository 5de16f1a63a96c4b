//! The guest library of the dmbridge device (`docs/device.md`): memory that one program reads and another one, in
//! another virtual machine, container or process of the same host, writes.
//!
//! A program connects a [`Device`], and is then known to others by its GID. It [registers](Device::register) a
//! [`Dmb`] for one of them and tells it the token. The other [attaches](Device::attach) it and writes: its stores
//! are the reader's data. Where one of the two cannot map, the writer [moves](Device::mover): the device copies. Who
//! does not care which takes a [sender](Device::sender). A [signal](RemoteDmb::signal) tells the reader, and wakes
//! it if it sleeps. Over two DMBs stands a [byte stream](stream), or a [channel of messages](message), and on
//! byte streams stand [sockets](smc).
//!
//! ```no_run
#![doc = include_str!("../examples/exchange.rs")]
//! ```
//!
//! # What to know
//!
//! - **Shared memory is shared.** The peer can change what is in a DMB at any time. [`SharedMemory`] therefore never
//!   gives out a reference to it; read once, check, use the copy. No misuse of this crate is undefined behaviour,
//!   and no peer can make it so.
//! - **Handles are what they name.** Dropping one releases it: a `Dmb` is unregistered, a `RemoteDmb` detached, a
//!   device leaves the fabric with the last handle that came from it. Its peers are told.
//! - **Waiting** spins for a while and then sleeps; how long it spins is learned, up to [`DEFAULT_SPIN`] or what
//!   [`Builder::spin`] says. For epoll there are descriptors ([`Dmb::arm`], [`Mover::arm`], [`Events`]), for tokio the
//!   module `asynchronous` (feature `tokio`).
//! - **Threads**: one in the background for all devices of the process, however many, and one for each
//!   [`SmcListener`](smc::SmcListener); they run no code of yours. All handles can be used from any thread.
//! - **Descriptors**: a device takes about a dozen. A program with many has to raise its limit (`RLIMIT_NOFILE`).
//! - **`fork()`**: a device belongs to the process that connected it. A child can go on with the memory that it
//!   inherited; whatever needs the device fails there with [`Error::Forked`], and dropping a handle releases nothing.
//! - **If the daemon dies**, mapped memory stays, and processes that wake each other by futex go on; everything else
//!   fails with [`Error::Disconnected`].

use dmbridge_proto as proto;

#[cfg(feature = "tokio")]
pub mod asynchronous;
mod cma;
mod control;
mod device;
mod dmb;
mod error;
mod events;
mod fills;
mod fork;
mod lifeline;
mod mapping;
pub mod message;
mod mover;
mod moves;
mod ram;
mod reactor;
mod shared;
pub mod smc;
pub mod stream;
mod sync;
mod transport;
mod virtqueue;
mod wait;
mod will;
mod window;

/// Devices on the PCI bus, for programs in virtual machines.
pub mod pci {
    pub use crate::transport::pci::{BadPciAddress, PciAddress, PciError, find};
}

/// The kernel module's character devices, for programs in virtual machines.
pub mod file {
    pub use crate::transport::chardev::find;
}

pub use device::{Builder, Device, Peer, Stats};
pub use dmb::{Dmb, RemoteDmb};
pub use error::{Error, OutOfBounds};
pub use events::{Event, Events};
pub use mover::{DmbSender, MoveBuffer, MovePart, Mover, Ticket};
pub use shared::{SharedMemory, SharedSlice};
pub use wait::{DEFAULT_SPIN, Spinner};

pub use proto::event::GoneReason;
pub use proto::ids::{Gid, Token};
pub use proto::status::Status;
