//! Configuration space (`docs/device.md`, 4).

use crate::ids::Gid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The first eight bytes of every device's configuration space.
pub const MAGIC: [u8; 8] = *b"DMBRIDGE";
/// The version that this crate speaks.
pub const VERSION_MAJOR: u16 = 1;
/// Size of the configuration space, in bytes.
pub const CONFIG_SIZE: usize = 128;

/// Configuration space as it lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Config {
    /// [`MAGIC`].
    pub magic: [u8; 8],
    /// [`VERSION_MAJOR`].
    pub version_major: U16,
    /// Greater values only add.
    pub version_minor: U16,
    /// The fabric, below 0xFF00.
    pub fabric_id: U16,
    /// Number of move queues, at least 1.
    pub move_queues: U16,
    /// This device's GID.
    pub gid: Gid,
    /// The host's EID for SMC-Dv2: 32 ASCII characters.
    pub system_eid: [u8; 32],
    /// Size of shared memory region 1, in bytes; 0 if the front-end cannot map.
    pub window_size: U64,
    /// The largest DMB, in bytes.
    pub max_dmb_size: U64,
    /// Quota: sum of the sizes of all DMBs that the device owns, in bytes.
    pub max_dmb_bytes: U64,
    /// Quota: number of DMBs that the device owns.
    pub max_dmbs: U32,
    /// Most segments of a RAM DMB, and data descriptors of a move.
    pub max_segments: U32,
    /// Most data bytes of a move.
    pub max_move_size: U64,
    /// [`GRANULE`](crate::GRANULE).
    pub granule: U32,
    /// How to copy into the window, by size: [`CopyPlan`](crate::shm::CopyPlan).
    pub copy_plan: [u8; 16],
    /// Zero.
    pub reserved: [u8; 4],
}

const _: () = assert!(size_of::<Config>() == CONFIG_SIZE);

/// Why a driver must leave a device alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Fewer bytes than [`CONFIG_SIZE`].
    #[error("the configuration space has {0} bytes, a dmbridge device has 128")]
    Short(usize),
    /// Some other device.
    #[error("this is not a dmbridge device: the configuration space does not start with DMBRIDGE")]
    Magic,
    /// A device of the future.
    #[error("the device speaks version {0} of the protocol, this driver speaks version 1")]
    Version(u16),
    /// A device that breaks the specification.
    #[error("the device's configuration is not valid: {0}")]
    Invalid(&'static str),
}

impl Config {
    /// Checks what a device presented, and copies it.
    pub fn parse(bytes: &[u8]) -> Result<Config, ConfigError> {
        let (config, _) = Config::read_from_prefix(bytes).map_err(|_| ConfigError::Short(bytes.len()))?;
        if config.magic != MAGIC {
            return Err(ConfigError::Magic);
        }
        if config.version_major.get() != VERSION_MAJOR {
            return Err(ConfigError::Version(config.version_major.get()));
        }
        if u64::from(config.granule.get()) != crate::GRANULE {
            return Err(ConfigError::Invalid("the granule is not 4096"));
        }
        if config.move_queues.get() == 0 {
            return Err(ConfigError::Invalid("there is no move queue"));
        }
        if config.gid.is_none() {
            return Err(ConfigError::Invalid("the GID is zero"));
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device with GID 1122334455667788 on fabric 0x0d3b, byte by byte.
    pub(crate) const LITERAL: [u8; CONFIG_SIZE] = {
        let mut b = [0u8; CONFIG_SIZE];
        let text =
            *b"DMBRIDGE\x01\x00\x00\x00\x3b\x0d\x01\x00\x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\0\0\0\0\0\
                      DMBRIDGE-TEST-EID-00000010000000\
                      \0\0\0\x40\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x40\0\0\0\0\
                      \0\x10\0\0\0\x01\0\0\0\0\0\x01\0\0\0\0\0\x10\0\0";
        let mut i = 0;
        while i < text.len() {
            b[i] = text[i];
            i += 1;
        }
        b
    };

    #[test]
    fn a_literal_configuration_parses() {
        let config = Config::parse(&LITERAL).unwrap();
        assert_eq!(config.gid, Gid::from_u64(0x1122_3344_5566_7788));
        assert_eq!(config.fabric_id.get(), 0x0d3b);
        assert_eq!(config.move_queues.get(), 1);
        assert_eq!(config.window_size.get(), 1 << 30);
        assert_eq!(config.max_dmb_size.get(), 1 << 29);
        assert_eq!(config.max_dmb_bytes.get(), 1 << 30);
        assert_eq!(config.max_dmbs.get(), 4096);
        assert_eq!(config.max_segments.get(), 256);
        assert_eq!(config.max_move_size.get(), 1 << 24);
        assert_eq!(config.as_bytes(), LITERAL);
    }

    #[test]
    fn another_device_is_left_alone() {
        assert_eq!(Config::parse(&LITERAL[..127]), Err(ConfigError::Short(127)));
        for (at, value, error) in [
            (0, b'd', ConfigError::Magic),
            (8, 2, ConfigError::Version(2)),
            (0x0e, 0, ConfigError::Invalid("there is no move queue")),
            (0x69, 0, ConfigError::Invalid("the granule is not 4096")),
        ] {
            let mut bytes = LITERAL;
            bytes[at] = value;
            assert_eq!(Config::parse(&bytes), Err(error));
        }
    }
}
