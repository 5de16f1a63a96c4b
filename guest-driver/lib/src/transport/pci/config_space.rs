//! PCI configuration space through sysfs: where the parts of a virtio device lie (virtio specification, 4.1.4), and the
//! few registers of PCI itself that a driver sets. Not for the registers in the BARs: see `registers`.

use super::error::PciError;
use crate::proto::WINDOW_SHMID;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Size of the part that has capabilities, in bytes.
const SIZE: usize = 256;
/// PCI: the command register.
const COMMAND: usize = 0x04;
/// Command: memory decoding, bus mastering.
const MEMORY: u8 = 1 << 1;
const MASTER: u8 = 1 << 2;
/// Command's second byte: INTx is switched off.
const INTX_OFF: u8 = 1 << 2;
/// PCI: the status register; bit 4: there are capabilities.
const STATUS: usize = 0x06;
const HAS_CAPABILITIES: u8 = 1 << 4;
/// PCI: where the first capability is.
const FIRST_CAPABILITY: usize = 0x34;
/// A vendor's capability; for virtio's vendor, a virtio structure.
const VENDOR_CAPABILITY: u8 = 0x09;

/// Kinds of virtio structures.
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;
const ISR: u8 = 3;
const DEVICE: u8 = 4;
const PCI: u8 = 5;
const SHARED_MEMORY: u8 = 8;

/// Part of a BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    pub(super) bar: u8,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Where the structures of a device lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Structures {
    pub(super) common: Area,
    pub(super) notify: Area,
    /// A queue's notification address is its `queue_notify_off` times this, in bytes.
    pub(super) notify_multiplier: u32,
    pub(super) isr: Area,
    pub(super) device: Area,
    pub(super) window: Option<Area>,
    /// The capability by which BARs can be accessed through configuration space.
    access: usize,
}

impl Structures {
    /// Finds them. Of several of a kind the first counts, as the specification has it.
    pub(super) fn parse(space: &[u8]) -> Result<Structures, PciError> {
        let byte =
            |at: usize| space.get(at).copied().ok_or(PciError::Capabilities("one reaches beyond the end"));
        let long = |at: usize| {
            Ok::<_, PciError>(u32::from_le_bytes([byte(at)?, byte(at + 1)?, byte(at + 2)?, byte(at + 3)?]))
        };
        if byte(STATUS)? & HAS_CAPABILITIES == 0 {
            return Err(PciError::Capabilities("there are none"));
        }
        let (mut common, mut notify, mut isr, mut device, mut window, mut access) =
            (None, None, None, None, None, None);
        let mut at = usize::from(byte(FIRST_CAPABILITY)? & !3);
        // There is room for so many; more is a loop.
        for _ in 0..SIZE / 4 {
            if at == 0 {
                break;
            }
            if byte(at)? == VENDOR_CAPABILITY && byte(at + 2)? >= 16 {
                let (kind, bar, id) = (byte(at + 3)?, byte(at + 4)?, byte(at + 5)?);
                let mut area = Area { bar, offset: long(at + 8)?.into(), len: long(at + 12)?.into() };
                match kind {
                    PCI => _ = access.get_or_insert(at),
                    // Values that the specification reserves: to be ignored.
                    _ if bar > 5 => {}
                    COMMON => _ = common.get_or_insert(area),
                    NOTIFY if byte(at + 2)? >= 20 => _ = notify.get_or_insert((area, long(at + 16)?)),
                    ISR => _ = isr.get_or_insert(area),
                    DEVICE => _ = device.get_or_insert(area),
                    SHARED_MEMORY if byte(at + 2)? >= 24 && id == WINDOW_SHMID => {
                        area.offset |= u64::from(long(at + 16)?) << 32;
                        area.len |= u64::from(long(at + 20)?) << 32;
                        window.get_or_insert(area);
                    }
                    _ => {}
                }
            }
            at = usize::from(byte(at + 1)? & !3);
        }
        let missing = PciError::Capabilities;
        let (notify, notify_multiplier) = notify.ok_or(missing("notification is missing"))?;
        Ok(Structures {
            common: common.ok_or(missing("common configuration is missing"))?,
            notify,
            notify_multiplier,
            isr: isr.ok_or(missing("ISR status is missing"))?,
            device: device.ok_or(missing("device configuration is missing"))?,
            window,
            access: access.ok_or(missing("configuration access is missing"))?,
        })
    }
}

/// A device's configuration space.
#[derive(Debug)]
pub(super) struct ConfigSpace(File);

impl ConfigSpace {
    pub(super) fn open(device: &Path) -> Result<ConfigSpace, PciError> {
        let file = OpenOptions::new().read(true).write(true).open(device.join("config"));
        file.map(ConfigSpace).map_err(PciError::os("open the device's configuration space"))
    }

    pub(super) fn structures(&self) -> Result<Structures, PciError> {
        let mut space = [0; SIZE];
        // Who may open it but lacks the capability gets 64 bytes.
        match self.0.read_at(&mut space, 0) {
            Ok(SIZE) => Structures::parse(&space),
            Ok(_) => Err(PciError::Permission("read the device's configuration space")),
            Err(error) => Err(PciError::os("read the device's configuration space")(error)),
        }
    }

    /// Reads from a BAR without mapping it, so that a device can be looked at that a kernel driver has.
    pub(super) fn read_bar(
        &self,
        structures: &Structures,
        area: Area,
        to: &mut [u8],
    ) -> Result<(), PciError> {
        let at = structures.access as u64;
        let failed = || PciError::os("look at the device through its configuration space");
        for (offset, word) in (area.offset as u32..).step_by(4).zip(to.chunks_mut(4)) {
            self.0.write_all_at(&[area.bar], at + 4).map_err(failed())?;
            self.0.write_all_at(&offset.to_le_bytes(), at + 8).map_err(failed())?;
            self.0.write_all_at(&4u32.to_le_bytes(), at + 12).map_err(failed())?;
            let mut value = [0; 4];
            self.0.read_exact_at(&mut value, at + 16).map_err(failed())?;
            word.copy_from_slice(&value[..word.len()]);
        }
        Ok(())
    }

    /// Lets the device be accessed, and access memory.
    pub(super) fn enable(&self) -> Result<(), PciError> {
        let failed = || PciError::os("enable the device");
        let mut command = [0];
        self.0.read_exact_at(&mut command, COMMAND as u64).map_err(failed())?;
        self.0.write_all_at(&[command[0] | MEMORY | MASTER], COMMAND as u64).map_err(failed())
    }

    /// Switches its interrupt on or off. The kernel switches it off at each interrupt.
    pub(super) fn set_interrupt(&self, on: bool) -> std::io::Result<()> {
        let mut command = [0];
        self.0.read_exact_at(&mut command, COMMAND as u64 + 1)?;
        let command = if on { command[0] & !INTX_OFF } else { command[0] | INTX_OFF };
        self.0.write_all_at(&[command], COMMAND as u64 + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What QEMU 11.1 shows of a vhost-user-test-device-pci with a window of 256 MiB.
    fn literal() -> [u8; SIZE] {
        let mut space = [0; SIZE];
        space[..8].copy_from_slice(&[0xf4, 0x1a, 0x65, 0x10, 0x07, 0x01, 0x10, 0x00]);
        space[FIRST_CAPABILITY] = 0xe8;
        let capabilities: [(usize, &[u8]); 9] = [
            (0xe8, &[0x09, 0xdc, 0x18, 0x08, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0]),
            (0xdc, &[0x11, 0xc8, 0, 0, 1, 0, 0, 0, 1, 0x08, 0, 0]),
            (0xc8, &[0x09, 0xb4, 0x14, 0x05, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (0xb4, &[0x09, 0xa4, 0x14, 0x02, 2, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0]),
            (0xa4, &[0x09, 0x94, 0x10, 0x04, 2, 0, 0, 0, 0, 0x20, 0, 0, 0, 0x10, 0, 0]),
            (0x94, &[0x09, 0x84, 0x10, 0x03, 2, 0, 0, 0, 0, 0x10, 0, 0, 0, 0x10, 0, 0]),
            (0x84, &[0x09, 0x7c, 0x10, 0x01, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0]),
            (0x7c, &[0x01, 0x40, 0x03, 0]),
            (0x40, &[0x10, 0, 2, 0, 0x20, 0x80, 0, 0x10, 0, 0, 0, 0, 0x11, 4, 0, 0]),
        ];
        for (at, bytes) in capabilities {
            space[at..at + bytes.len()].copy_from_slice(bytes);
        }
        space
    }

    #[test]
    fn every_structure_is_found_where_it_is() {
        let page = |number: u64| Area { bar: 2, offset: number * 0x1000, len: 0x1000 };
        let expected = Structures {
            common: page(0),
            isr: page(1),
            device: page(2),
            notify: page(3),
            notify_multiplier: 4,
            window: Some(Area { bar: 4, offset: 0, len: 256 << 20 }),
            access: 0xc8,
        };
        assert_eq!(Structures::parse(&literal()).unwrap(), expected);
    }

    #[test]
    fn the_window_may_be_far_up_and_large() {
        let mut space = literal();
        space[0xe8 + 16..0xe8 + 24].copy_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
        let window = Structures::parse(&space).unwrap().window;
        assert_eq!(window, Some(Area { bar: 4, offset: 1 << 32, len: 2 << 32 | 256 << 20 }));
        // Another region's id: no window.
        space[0xe8 + 5] = 2;
        assert_eq!(Structures::parse(&space).unwrap().window, None);
    }

    #[test]
    fn what_cannot_be_a_capability_list_is_refused() {
        type Change = dyn Fn(&mut [u8; SIZE]);
        let cases: [&Change; 7] = [
            &|space| space[STATUS] = 0,
            &|space| space[FIRST_CAPABILITY] = 0,
            // A loop that leaves out what comes after it.
            &|space| space[0xc8 + 1] = 0xe8,
            &|space| space[0x84 + 3] = 77,
            // Reserved BARs are ignored, and short capabilities are none.
            &|space| space[0x84 + 4] = 6,
            &|space| space[0xb4 + 2] = 16,
            &|space| {
                space[FIRST_CAPABILITY] = 0xfc;
                space[0xfc..].copy_from_slice(&[0x09, 0, 0x10, 1]);
            },
        ];
        for (number, change) in cases.iter().enumerate() {
            let mut space = literal();
            change(&mut space);
            assert!(matches!(Structures::parse(&space), Err(PciError::Capabilities(_))), "case {number}");
        }
    }
}
