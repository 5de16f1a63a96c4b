//! The registers of a virtio device on PCI (virtio specification, 4.1.4): the ones common to all devices, notification,
//! interrupt status, and the device's own configuration. Not for what they mean to dmbridge.

use super::config_space::{Area, Structures};
use super::error::PciError;
use crate::mapping::Mapping;
use crate::virtqueue::Virtqueue;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The page size.
const PAGE: u64 = 4096;

// Offsets of the common configuration.
const DEVICE_FEATURE_SELECT: usize = 0x00;
const DEVICE_FEATURE: usize = 0x04;
const DRIVER_FEATURE_SELECT: usize = 0x08;
const DRIVER_FEATURE: usize = 0x0c;
const CONFIG_VECTOR: usize = 0x10;
const NUM_QUEUES: usize = 0x12;
const STATUS: usize = 0x14;
const GENERATION: usize = 0x15;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_SIZE: usize = 0x18;
const QUEUE_VECTOR: usize = 0x1a;
const QUEUE_ENABLE: usize = 0x1c;
const QUEUE_NOTIFY_OFF: usize = 0x1e;
const QUEUE_DESCRIPTORS: usize = 0x20;
const QUEUE_AVAILABLE: usize = 0x28;
const QUEUE_USED: usize = 0x30;
const COMMON_SIZE: usize = 0x38;

/// No MSI-X vector: the interrupt is INTx.
const NO_VECTOR: u16 = 0xffff;

// Bits of the status.
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Bit of the interrupt status: something else than a queue.
const CONFIG_CHANGED: u8 = 2;

/// How long a device may take to reset. The VMM does it while the register is written, or is gone.
const RESET: Duration = Duration::from_secs(5);

/// A mapped part of a BAR.
#[derive(Debug, Clone)]
struct Registers {
    bar: Arc<Mapping>,
    /// Where it starts in the mapping.
    offset: usize,
    len: usize,
}

macro_rules! access {
    ($read:ident, $write:ident, $type:ty) => {
        fn $read(&self, at: usize) -> $type {
            let register = self.register::<$type>(at);
            // SAFETY: `register` checked that it lies in the mapping, aligned.
            <$type>::from_le(unsafe { register.read_volatile() })
        }

        #[allow(dead_code)]
        fn $write(&self, at: usize, value: $type) {
            let register = self.register::<$type>(at);
            // SAFETY: as above.
            unsafe { register.write_volatile(value.to_le()) }
        }
    };
}

impl Registers {
    fn register<T>(&self, at: usize) -> *mut T {
        assert!(at + size_of::<T>() <= self.len, "a register at {at} of {}", self.len);
        // SAFETY: the constructor checked that `len` bytes from `offset` on lie in the mapping.
        let register = unsafe { self.bar.base().as_ptr().add(self.offset + at).cast::<T>() };
        assert!(register.is_aligned(), "a register at {at}");
        register
    }

    access!(read_u8, write_u8, u8);
    access!(read_u16, write_u16, u16);
    access!(read_u32, write_u32, u32);

    fn write_u64(&self, at: usize, value: u64) {
        self.write_u32(at, value as u32);
        self.write_u32(at + 4, (value >> 32) as u32);
    }
}

/// Opens the file by which sysfs lets a BAR be mapped. The plain one, not the write-combining one: where the guest's
/// choice of caching counts, a peer that polls would see stores through the latter out of order.
pub(super) fn open_bar(device: &Path, bar: u8) -> Result<File, PciError> {
    let file = OpenOptions::new().read(true).write(true).open(device.join(format!("resource{bar}")));
    file.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => PciError::Capabilities("one lies in a BAR that is not memory"),
        _ => PciError::os("open the device's memory")(error),
    })
}

/// Maps part of a BAR; `area.offset` has to be a multiple of the page size.
pub(super) fn map_bar(file: &File, area: Area) -> Result<Mapping, PciError> {
    let size = file.metadata().map_err(PciError::os("measure the device's memory"))?.len();
    let end = area.offset.checked_add(area.len).filter(|&end| area.len != 0 && end <= size);
    if end.is_none() || !area.offset.is_multiple_of(PAGE) {
        return Err(PciError::Capabilities("one does not lie in its BAR"));
    }
    Mapping::of_file(file.as_fd(), area.offset, area.len as usize)
        .map_err(PciError::os("map the device's memory"))
}

/// All registers of a device.
#[derive(Debug)]
pub(super) struct Device {
    common: Registers,
    isr: Registers,
    device: Registers,
    notify: Registers,
    notify_multiplier: usize,
    /// Where each queue is kicked.
    kicks: Vec<usize>,
    /// The mapped parts of BARs in which the registers lie.
    bars: Vec<Arc<Mapping>>,
}

impl Device {
    /// Maps them.
    pub(super) fn map(device: &Path, structures: &Structures) -> Result<Device, PciError> {
        let wanted = [structures.common, structures.isr, structures.device, structures.notify];
        // One mapping for all that lies in one BAR.
        let mut bars = HashMap::<u8, (u64, u64)>::new();
        for area in wanted {
            let end = area.offset.saturating_add(area.len);
            let (from, to) = bars.entry(area.bar).or_insert((area.offset, end));
            *from = area.offset.min(*from);
            *to = end.max(*to);
        }
        let mut mapped = HashMap::new();
        for (bar, (from, to)) in bars {
            let from = from / PAGE * PAGE;
            let mapping = map_bar(&open_bar(device, bar)?, Area { bar, offset: from, len: to - from })?;
            mapped.insert(bar, (Arc::new(mapping), from));
        }
        let registers = |area: Area, needed: usize| {
            let (bar, from) = &mapped[&area.bar];
            let aligned = area.offset.is_multiple_of(4) && area.len >= needed as u64;
            let registers =
                Registers { bar: bar.clone(), offset: (area.offset - from) as usize, len: area.len as usize };
            if aligned {
                Ok(registers)
            } else {
                Err(PciError::Capabilities("one is too short or not aligned"))
            }
        };
        Ok(Device {
            common: registers(structures.common, COMMON_SIZE)?,
            isr: registers(structures.isr, 1)?,
            device: registers(structures.device, crate::proto::config::CONFIG_SIZE)?,
            notify: registers(structures.notify, 2)?,
            notify_multiplier: structures.notify_multiplier as usize,
            kicks: Vec::new(),
            bars: mapped.into_values().map(|(bar, _)| bar).collect(),
        })
    }

    fn status(&self) -> u8 {
        self.common.read_u8(STATUS)
    }

    /// Adds to the status; whether the device agrees.
    fn add_status(&self, bit: u8) -> bool {
        self.common.write_u8(STATUS, self.status() | bit);
        self.status() & (bit | NEEDS_RESET) == bit
    }

    /// Resets the device: from then on, it accesses no memory. Whether it did.
    #[must_use]
    pub(super) fn reset(&self) -> bool {
        self.common.write_u8(STATUS, 0);
        let start = Instant::now();
        while self.status() != 0 {
            if start.elapsed() > RESET {
                return false;
            }
            // The specification asks for this loop; the VMMs known are done before the first look.
            thread::yield_now();
        }
        true
    }

    /// Takes the device, just reset, and returns its features.
    pub(super) fn take(&self) -> u64 {
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        let half = |number| {
            self.common.write_u32(DEVICE_FEATURE_SELECT, number);
            u64::from(self.common.read_u32(DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    /// Accepts features.
    pub(super) fn accept(&self, features: u64) -> Result<(), PciError> {
        for number in 0..2 {
            self.common.write_u32(DRIVER_FEATURE_SELECT, number);
            self.common.write_u32(DRIVER_FEATURE, (features >> (32 * number)) as u32);
        }
        if self.add_status(FEATURES_OK) { Ok(()) } else { Err(PciError::Failed("features were negotiated")) }
    }

    /// The device's own configuration.
    pub(super) fn config(&self) -> Vec<u8> {
        loop {
            let generation = self.common.read_u8(GENERATION);
            let words = (0..crate::proto::config::CONFIG_SIZE)
                .step_by(4)
                .map(|at| self.device.read_u32(at).to_le_bytes());
            let config = words.flatten().collect();
            if self.common.read_u8(GENERATION) == generation {
                return config;
            }
        }
    }

    /// The largest size of a queue, a power of two; 0 if there is no such queue.
    pub(super) fn max_queue_size(&self, queue: u16) -> u16 {
        self.common.write_u16(QUEUE_SELECT, queue);
        let size = self.common.read_u16(QUEUE_SIZE);
        size.checked_ilog2().map_or(0, |bits| 1 << bits)
    }

    /// Tells the device its queues, and starts it.
    pub(super) fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), PciError> {
        let (needed, there) = (queues.len(), self.common.read_u16(NUM_QUEUES));
        if needed > usize::from(there) {
            return Err(PciError::Queues { needed, there });
        }
        self.common.write_u16(CONFIG_VECTOR, NO_VECTOR);
        for (number, queue) in queues.iter().enumerate() {
            let (layout, address) = (queue.layout(), queue.memory().address());
            self.common.write_u16(QUEUE_SELECT, number as u16);
            self.common.write_u16(QUEUE_SIZE, layout.size);
            self.common.write_u16(QUEUE_VECTOR, NO_VECTOR);
            self.common.write_u64(QUEUE_DESCRIPTORS, address);
            self.common.write_u64(QUEUE_AVAILABLE, address + layout.available as u64);
            self.common.write_u64(QUEUE_USED, address + layout.used as u64);
            let kick = usize::from(self.common.read_u16(QUEUE_NOTIFY_OFF)) * self.notify_multiplier;
            if kick + 2 > self.notify.len || !kick.is_multiple_of(2) {
                return Err(PciError::Capabilities("a queue's notification does not lie in its structure"));
            }
            self.kicks.push(kick);
            self.common.write_u16(QUEUE_ENABLE, 1);
        }
        if self.add_status(DRIVER_OK) { Ok(()) } else { Err(PciError::Failed("it was started")) }
    }

    /// Tells the device that something is in a queue.
    pub(super) fn kick(&self, queue: u16) {
        self.notify.write_u16(self.kicks[usize::from(queue)], queue);
    }

    /// Takes the interrupt's reason. Whether the device has broken down.
    pub(super) fn acknowledge_interrupt(&self) -> bool {
        self.isr.read_u8(0) & CONFIG_CHANGED != 0 && self.status() & NEEDS_RESET != 0
    }

    /// The device is gone, or no longer ours: from now on, accesses meet memory of this process only.
    pub(super) fn part(&self) {
        for bar in &self.bars {
            // If it fails, the registers stay where they are.
            let _ = bar.replace_by_zeroes(0, bar.len());
        }
    }
}
