//! Where a PCI device is, and which of this machine's may be dmbridge devices.

use super::error::PciError;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Where the kernel shows PCI devices.
const DEVICES: &str = "/sys/bus/pci/devices";
/// PCI vendor of all virtio devices.
const VENDOR: u16 = 0x1af4;
/// PCI device IDs of the two virtio device IDs of a dmbridge device (`docs/device.md`, 2).
const DEVICE_IDS: [u16; 2] = [
    0x1040 + crate::proto::features::VIRTIO_ID_ISM as u16,
    0x1040 + crate::proto::features::VIRTIO_ID_QEMU as u16,
];

/// Address of a PCI device: `domain:bus:device.function`, in hexadecimal, as `lspci -D` shows it. The domain may be left
/// out where it is 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

/// What was given is not the address of a PCI device.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is not the address of a PCI device; it should look like 0000:01:00.0")]
pub struct BadPciAddress(String);

impl FromStr for PciAddress {
    type Err = BadPciAddress;

    fn from_str(text: &str) -> Result<PciAddress, BadPciAddress> {
        let parse = || {
            let (text, function) = text.rsplit_once('.')?;
            let (text, device) = text.rsplit_once(':')?;
            let (domain, bus) = text.rsplit_once(':').unwrap_or(("0", text));
            let number = |digits: &str, max: u32| {
                let plain = digits.bytes().all(|b| b.is_ascii_hexdigit());
                u32::from_str_radix(digits, 16).ok().filter(|n| plain && *n <= max)
            };
            Some(PciAddress {
                domain: number(domain, u32::MAX)?,
                bus: number(bus, 0xff)? as u8,
                device: number(device, 0x1f)? as u8,
                function: number(function, 7)? as u8,
            })
        };
        parse().ok_or_else(|| BadPciAddress(text.to_string()))
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress { domain, bus, device, function } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function}")
    }
}

impl PciAddress {
    /// The folder in which the kernel shows the device.
    pub(super) fn folder(self) -> PathBuf {
        Path::new(DEVICES).join(self.to_string())
    }
}

/// The PCI devices of this machine that have one of the two device IDs of a dmbridge device, in the order of their
/// addresses. One of the IDs is not ours alone: whether it is a dmbridge device shows when it is opened, by
/// [`Device::open_pci`](crate::Device::open_pci), which leaves others alone.
pub fn find() -> Vec<PciAddress> {
    find_in(Path::new(DEVICES))
}

fn find_in(devices: &Path) -> Vec<PciAddress> {
    // A machine without PCI has no such folder, and no device.
    let entries = fs::read_dir(devices).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter(|entry| check_ids(&entry.path()).is_ok())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    found.sort();
    found
}

/// Whether the device in this folder may be a dmbridge device.
pub(super) fn check_ids(folder: &Path) -> Result<(), PciError> {
    let id = |name: &str| {
        let text = fs::read_to_string(folder.join(name)).map_err(|_| PciError::NoDevice)?;
        let digits = text.trim().strip_prefix("0x").unwrap_or_default();
        u16::from_str_radix(digits, 16).map_err(|_| PciError::NoDevice)
    };
    let (vendor, device) = (id("vendor")?, id("device")?);
    if vendor == VENDOR && DEVICE_IDS.contains(&device) {
        Ok(())
    } else {
        Err(PciError::Foreign { vendor, device })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_it_is_written() {
        for text in ["0000:01:00.0", "0000:ff:1f.7", "10000:02:03.4"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        assert_eq!("01:02.3".parse::<PciAddress>().unwrap().to_string(), "0000:01:02.3");
    }

    #[test]
    fn what_is_no_address_is_named() {
        for text in [
            "",
            "1",
            "01:00",
            "01.0",
            "0000:01:20.0",
            "0000:01:00.8",
            "0000:100:00.0",
            "+1:00.0",
            "../..",
            "::.",
        ] {
            let error = text.parse::<PciAddress>().unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
    }

    #[test]
    fn both_device_ids_are_found_and_no_others() {
        let devices = tempfile::tempdir().unwrap();
        let ids = [
            ("0000:00:01.0", "0x1af4", "0x1041"),
            ("0000:02:00.0", "0x1af4", "0x106c"),
            ("0000:01:00.0", "0x1af4", "0x1065"),
            ("0000:03:00.0", "0x8086", "0x106c"),
        ];
        for (name, vendor, device) in ids {
            let folder = devices.path().join(name);
            fs::create_dir(&folder).unwrap();
            fs::write(folder.join("vendor"), format!("{vendor}\n")).unwrap();
            fs::write(folder.join("device"), format!("{device}\n")).unwrap();
        }
        let found: Vec<_> = find_in(devices.path()).iter().map(PciAddress::to_string).collect();
        assert_eq!(found, ["0000:01:00.0", "0000:02:00.0"]);
        assert!(find_in(&devices.path().join("none")).is_empty());
        let network = check_ids(&devices.path().join("0000:00:01.0"));
        assert!(matches!(network, Err(PciError::Foreign { vendor: 0x1af4, device: 0x1041 })));
    }
}
