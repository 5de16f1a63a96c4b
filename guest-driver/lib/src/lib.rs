//! The guest library of the dmbridge device (`docs/device.md`).

use dmbridge_proto as proto;

mod dmb;
mod error;
mod mapping;
mod shared;
pub mod stream;
mod wait;

pub use dmb::{Dmb, RemoteDmb};
pub use error::{Error, OutOfBounds};
pub use shared::{SharedMemory, SharedSlice};
pub use wait::DEFAULT_SPIN;

pub use proto::ids::{Gid, Token};
