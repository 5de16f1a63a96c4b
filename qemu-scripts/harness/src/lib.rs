//! Virtual machines for programs: stock QEMU with a stock kernel, in which commands run as if they were here.
//!
//! | file | subject |
//! | --- | --- |
//! | [`scripts`] | what `qemu-scripts` find, make and start |
//! | [`machine`] | one VM: boot, run, reset, kill |
//! | [`agent`] | commands in a guest, seen from the host |
//! | [`guest_agent`] | the other end: what runs in the guest |
//! | [`frame`] | what the two say to each other |
//! | [`qmp`] | QEMU's monitor |
//!
//! QEMU is found by `qemu-scripts/provision` and started by `qemu-scripts/run-qemu`, so what a person gets is what
//! programs get. An error is a sentence for people: nobody decides anything by it.

pub mod agent;
pub mod frame;
pub mod guest_agent;
pub mod machine;
pub mod qmp;
pub mod scripts;

pub use agent::{Input, Output, Running};
pub use machine::{Machine, MachineOptions};
pub use scripts::Provisioned;
