//! The dmbridge daemon: a vhost-user back-end for the device that `docs/device.md` specifies.
//!
//! The number of threads is constant. The *control thread* ([`control`]) owns sessions and [`fabric`] (together the
//! [`core`]) and waits for everything that happens to them; *movers* ([`mover`]) serve the move queues. What they share
//! of one front-end is its [`port`]. Data goes one way: a chain comes out of a [`vring`], `dmbridge_proto` makes a typed
//! request of it, the fabric answers, and leaves what is to be asked of a front-end ([`frontend`]) as an effect; nobody
//! waits for anybody.
//!
//! `vhost-user-backend` is not used: its daemon takes two threads per device, accepts only from a listener of its own
//! (a hub has to know who connects before there is a device), blocks on a front-end that sends half a message, and keeps
//! guest memory in a way that cannot be guarded against truncation.

pub mod control;
pub mod copy_plan;
pub mod core;
pub mod daemon;
pub mod doorbell;
pub mod engine;
pub mod events;
pub mod fabric;
pub mod frontend;
pub mod gate;
pub mod handler;
pub mod hub;
pub mod keep;
pub mod memory;
pub mod mover;
pub mod notify;
pub mod placement;
pub mod pool;
pub mod port;
pub mod report;
pub mod session;
pub mod settings;
pub mod socket;
#[cfg(test)]
mod testing;
pub mod throttle;
pub mod topology;
pub mod tracked;
pub mod vring;

pub use daemon::{Daemon, Error, Handle};
