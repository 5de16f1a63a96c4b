//! What whole-system tests need: the real daemon in a private folder, and a front-end that can send anything.
//!
//! The tests are in `tests/`, one file per promise. They start the daemon that the environment variable `DMBRIDGED`
//! names, or else build it. Nothing here is used by anything but tests, so everything here panics when it fails, and
//! says what it was waiting for.

pub mod build;
pub mod bytes;
pub mod daemon;
pub mod deadline;
pub mod frontend;
pub mod liar;
pub mod memory;
pub mod namespaces;
pub mod pair;
pub mod preload;
pub mod random;
pub mod ring;
pub mod vm;
pub mod window;
