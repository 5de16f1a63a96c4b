//! The library for programs in C (`include/dmbridge.h`, `docs/c-api.md`): handles as opaque pointers, errors as errno.
//!
//! Every function checks its pointers for null, and that is all that it can check: a pointer to something else, or to what
//! was freed, is undefined behaviour here as everywhere in C.

#![allow(non_camel_case_types, reason = "these are the names in C")]

mod device;
mod dmb;
mod error;
mod smc;

pub use device::*;
pub use dmb::*;
pub use error::dmbridge_error;
pub use smc::*;
