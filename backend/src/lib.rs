//! The dmbridge daemon.

pub mod hub;
pub mod report;
pub mod settings;
pub mod socket;
