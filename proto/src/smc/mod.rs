//! SMC-D as in Linux's `net/smc` and RFC 7609: so far the data path, that is the CDC message, its cursors and the rings that they describe.

pub mod cdc;
pub mod cursor;
pub mod ring;
