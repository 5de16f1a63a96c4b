//! SMC-D as in Linux's `net/smc` and RFC 7609: how two ends of a TCP connection agree on it, and how they go on over two
//! DMBs. No I/O and no memory: what is sent and what was read is handed in and out.
//!
//! | module | subject | Linux |
//! | --- | --- | --- |
//! | [`clc`] | messages of the handshake | `smc_clc.h` |
//! | [`negotiation`] | what to propose, to choose, to decline | `af_smc.c` |
//! | [`linkgroup`] | contact of two devices | `smc_core.c` |
//! | [`buffer`] | sizes of buffers | `smc_core.c` |
//! | [`cdc`] | the message at the start of a DMB | `smc_cdc.h` |
//! | [`cursor`], [`ring`] | positions in a ring, and who may go where | `smc_cdc.h`, `smc_tx.c`, `smc_rx.c` |
//! | [`urgent`] | the urgent byte | `smc_cdc.c`, `smc_rx.c` |
//! | [`connection`] | states from connecting to the last close | `smc_close.c` |

pub mod buffer;
pub mod cdc;
pub mod clc;
pub mod connection;
pub mod cursor;
pub mod linkgroup;
pub mod negotiation;
pub mod ring;
pub mod urgent;
