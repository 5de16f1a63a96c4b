//! What both ends of a connection have to speak, in a file of its own because a test says it too.

/// The version of what the two ends say to each other (`meeting.rs`) and of a ring's header (`header.rs`).
pub const VERSION: u8 = 4;
