//! Why a connection fell back to TCP. The codes are those of Linux's `net/smc/smc_clc.h`.

/// What a reason means, and what to do about it.
pub fn explain(code: u32) -> &'static str {
    match code {
        0x0101_0000 => {
            "out of memory for buffers: smaller ones (--buffers), or a larger quota of the device (max_dmb_bytes)"
        }
        0x0201_0000 | 0x0202_0000 => "the peer did not answer in time while a link was set up",
        0x0300_0000 => "wrong configuration",
        0x0301_0000 => {
            "the peer does not speak SMC: its program uses TCP, its kernel has no SMC, or something between drops the TCP option"
        }
        0x0302_0000 => "the connection uses IPsec",
        0x0303_0000 | 0x0303_0001 | 0x0303_0007 => {
            "no device in common: the peer has no dmbridge device, or one of another host or group; or the module dmbridge is not loaded on one side"
        }
        0x0303_0002 => "no RDMA device found (the peer asked for SMC-R)",
        0x0303_0003 => "SMC-Dv2 is off: the device's system EID is none; see the daemon's system_eid",
        0x0303_0004 | 0x0303_0005 => "the peer offered no SMC-Dv2: run dmbridge guest-setup there",
        0x0303_0006 => {
            "the peer sent no system EID and there is no user EID in common: run dmbridge guest-setup in both guests"
        }
        0x0303_0008 => "no user EID in common: run dmbridge guest-setup in both guests",
        0x0303_0009..=0x0303_000b => "the two kernels could not agree on a release of SMC",
        0x0304_0000 => "one side wants SMC-R, the other one SMC-D",
        0x0305_0000 => "the peer wrote no mark into its buffer",
        0x0306_0000 => {
            "the program asked for something that SMC cannot do (TCP_FASTOPEN, TCP_REPAIR or another socket option)"
        }
        0x0307_0000 => "the two addresses are not in one subnet (SMC version 1)",
        0x0308_0000 | 0x0309_0000 => {
            "the network interface is a VLAN; dmbridge has none: use groups of the daemon"
        }
        0x030a_0000 | 0x030b_0000 => "no RDMA link (SMC-R)",
        0x030c_0000 => "the two kernels speak different versions of SMC",
        0x030d_0000 => "the device has no DMB left (the daemon's max_dmbs)",
        0x030e_0000 | 0x030f_0000 => "no direct route to the peer (SMC-R)",
        0x0400_0000 => "the two sides lost track of each other while they connected",
        0x0500_0000 => "the peer declined; its own fallback reason says why",
        0x0999_0000..=0x0999_ffff => "an error inside the kernel's SMC; see dmesg",
        _ => "a reason that this program does not know; see net/smc/smc_clc.h of the kernel",
    }
}
