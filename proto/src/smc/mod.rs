//! SMC-D as in Linux's `net/smc` and RFC 7609: so far the data path, that is the CDC message and its cursors.

pub mod cdc;
pub mod cursor;
