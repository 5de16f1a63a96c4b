//! Virtual machines for tests: stock QEMU with a stock kernel, in which a test runs commands as if they were here.
//!
//! | file | subject |
//! | --- | --- |
//! | [`machine`] | one VM: boot, run, pause, reset, plug, kill |
//! | [`agent`] | commands in a guest, seen from the host; the program `dmbridge-guest-agent` is the other end |
//! | [`driven`] | a device in a guest that does what a test tells it, by the program `vm-guest` |
//! | [`frame`] | what the two say to each other |
//! | [`qmp`] | QEMU's monitor |
//! | [`image`] | the guest image, made of the workspace's own programs |
//! | [`shared`] | VMs that many tests of one program use, one test at a time |
//!
//! What is needed is found or made by `qemu-scripts/provision`, and QEMU is started by `qemu-scripts/run-qemu`, so what
//! a person gets is what is tested. As everywhere in this crate, what fails panics, and says what it was doing; the
//! guest's console is part of the message.

pub mod agent;
pub mod driven;
pub mod frame;
pub mod image;
pub mod machine;
pub mod qmp;
pub mod shared;

pub use agent::{Output, Running};
pub use driven::Driven;
pub use machine::{Vm, VmOptions};
