//! Virtual machines for tests: those of the crate `dmbridge_vm`, with devices and programs of ours.
//!
//! | file | subject |
//! | --- | --- |
//! | [`machine`] | one VM: boot, run, pause, reset, plug, kill |
//! | [`driven`] | a device in a guest that does what a test tells it, by the program `vm-guest` |
//! | [`pair`] | a daemon and virtual machines with a device each |
//! | [`image`] | the guest image, made of the workspace's own programs |
//! | [`kernel`] | the kernel module, and guests that have loaded it |
//! | [`shared`] | VMs that many tests of one program use, one test at a time |
//!
//! As everywhere in this crate, what fails panics, and says what it was doing; the guest's console is part of the message.

pub mod driven;
pub mod image;
pub mod kernel;
pub mod machine;
pub mod pair;
pub mod shared;

pub use dmbridge_vm::{Output, Running};
pub use driven::Driven;
pub use machine::{Vm, VmOptions};
pub use pair::VmPair;
