//! Why a connection is not over SMC: the codes of Linux's `net/smc/smc_clc.h`, as declines carry them and `smcss` shows
//! them.

use core::fmt;

/// A reason. Any number can come from a peer; those that are known have names.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reason(pub u32);

macro_rules! reasons {
    ($($name:ident = $code:literal, $linux:literal, $text:literal;)*) => {
        impl Reason {
            $(
                #[doc = concat!("`", $linux, "`: ", $text, ".")]
                pub const $name: Reason = Reason($code);
            )*

            /// Linux's name and a sentence, if the code is known.
            fn known(self) -> Option<(&'static str, &'static str)> {
                match self.0 {
                    $($code => Some(($linux, $text)),)*
                    _ => None,
                }
            }

            /// All that have names.
            pub const KNOWN: &'static [Reason] = &[$(Reason::$name),*];
        }
    };
}

reasons! {
    NO_MEMORY = 0x0101_0000, "MEM", "there is no memory for the connection's buffers";
    TIMEOUT_CONFIRM_LINK = 0x0201_0000, "TIMEOUT_CL", "the peer did not confirm the link in time";
    TIMEOUT_ADD_LINK = 0x0202_0000, "TIMEOUT_AL", "the peer did not add the link in time";
    CONFIGURATION = 0x0300_0000, "CNFERR", "a configuration error";
    PEER_NO_SMC = 0x0301_0000, "PEERNOSMC", "the peer does not speak SMC";
    IPSEC = 0x0302_0000, "IPSEC", "the connection is protected by IPsec";
    NO_DEVICE = 0x0303_0000, "NOSMCDEV", "there is no SMC device";
    NO_SMCD_DEVICE = 0x0303_0001, "NOSMCDDEV", "there is no SMC-D device that both can use";
    NO_SMCR_DEVICE = 0x0303_0002, "NOSMCRDEV", "there is no SMC-R device";
    NO_ISM_V2 = 0x0303_0003, "NOISM2SUPP", "the device cannot do version 2";
    NO_V2_EXTENSION = 0x0303_0004, "NOV2EXT", "the peer sent no version 2 extension";
    NO_V2_SMCD_EXTENSION = 0x0303_0005, "NOV2DEXT", "the peer sent no version 2 extension for SMC-D";
    NO_SEID = 0x0303_0006, "NOSEID", "the peer sent no system EID";
    NO_SMCD_V2_DEVICE = 0x0303_0007, "NOSMCD2DEV", "there is no SMC-D device for version 2 that both can use";
    NO_UEID = 0x0303_0008, "NOUEID", "the peer sent no user-defined EID";
    MODE = 0x0304_0000, "MODEUNSUPP", "one speaks SMC-D only and the other SMC-R only";
    EYECATCHER_IN_RMB = 0x0305_0000, "RMBE_EC", "the peer has an eyecatcher in its buffer";
    OPTION = 0x0306_0000, "OPTUNSUPP", "a socket option is in use that SMC does not have";
    PREFIX = 0x0307_0000, "DIFFPREFIX", "the peer is in another subnet";
    VLAN = 0x0308_0000, "GETVLANERR", "the connection's VLAN cannot be told";
    ISM_VLAN = 0x0309_0000, "ISMVLANERR", "the device does not take the connection's VLAN";
    NO_ACTIVE_LINK = 0x030a_0000, "NOACTLINK", "the link group has no active link";
    NO_SERVER_LINK = 0x030b_0000, "NOSRVLINK", "the server's link was not found";
    VERSION = 0x030c_0000, "VERSMISMAT", "the versions do not match";
    MAX_DMBS = 0x030d_0000, "MAX_DMB", "the device has no more buffers to give";
    NO_ROUTE = 0x030e_0000, "NOROUTE", "there is no route to the peer";
    INDIRECT = 0x030f_0000, "NOINDIRECT", "the link group is direct and the route is not";
    OUT_OF_SYNC = 0x0400_0000, "SYNCERR", "the two ends do not agree on whether they have a link group";
    PEER_DECLINED = 0x0500_0000, "PEERDECL", "the peer declined";
    INTERNAL = 0x0999_0000, "INTERR", "an internal error";
}

impl Reason {
    /// Linux's name without `SMC_CLC_DECL_`, or `None` for a code without one.
    pub fn name(self) -> Option<&'static str> {
        self.known().map(|(name, _)| name)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some((name, text)) => write!(f, "{text} ({:#010x} {name})", self.0),
            None => write!(f, "{:#010x}", self.0),
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reason({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    #[test]
    fn a_reason_says_its_code_and_its_name() {
        assert_eq!(Reason(0x03030008).to_string(), "the peer sent no user-defined EID (0x03030008 NOUEID)");
        assert_eq!(Reason(0x12345678).to_string(), "0x12345678");
        assert_eq!(Reason::KNOWN.len(), 30);
    }
}
