//! Copy engines: what moves bytes. Not what may be moved where; that was checked before.
//!
//! An engine takes one run of bytes that is contiguous on both sides. Whatever does it, an aligned 8-byte word is never
//! torn, and what was copied is visible before what the caller writes next with release order.

pub mod cpu;
