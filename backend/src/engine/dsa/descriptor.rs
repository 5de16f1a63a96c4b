//! What software and accelerator say to one another: descriptors and completion records, as in Linux's `linux/idxd.h`
//! (`struct dsa_hw_desc`, `struct dsa_completion_record`) and in Intel's architecture specification.

use std::sync::atomic::{AtomicU64, Ordering};

/// Moves memory.
pub const OPCODE_MEMMOVE: u8 = 3;
/// Does a list of descriptors.
pub const OPCODE_BATCH: u8 = 1;

/// Nothing starts before all that came earlier in the batch is done.
pub const FLAG_FENCE: u32 = 1;
/// The address of the completion record is valid.
pub const FLAG_CRAV: u32 = 4;
/// A completion record is wanted in any case.
pub const FLAG_RCR: u32 = 8;
/// The destination goes into the cache, because somebody is about to read it.
pub const FLAG_CC: u32 = 0x100;

/// How a descriptor ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Not yet.
    None,
    /// Well.
    Success,
    /// A page was not there. What was done before it is done.
    PageFault,
    /// Some descriptor of the batch ended otherwise than well.
    BatchFail,
    /// A page of the list was not there: descriptors from there on were not looked at.
    BatchPageFault,
    /// The device or the queue failed.
    Hardware(u8),
    /// Anything else: the descriptor was not to the device's liking. Nothing was done that counts.
    Error(u8),
}

impl Status {
    /// The status byte; its highest bit says whether a fault was at a write.
    pub fn from_byte(byte: u8) -> Status {
        match byte & 0x7f {
            0 => Status::None,
            1 => Status::Success,
            3 => Status::PageFault,
            5 => Status::BatchFail,
            6 => Status::BatchPageFault,
            code @ 0x20..=0x22 => Status::Hardware(code),
            code => Status::Error(code),
        }
    }
}

/// A descriptor, 64 bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Descriptor {
    /// Process address space id (20 bits) and privilege: the queue's own, so 0.
    pub pasid: u32,
    /// Flags (24 bits) and opcode (8).
    pub flags_opcode: u32,
    /// Where the completion record goes.
    pub completion: u64,
    /// Source; of a batch, the list.
    pub src: u64,
    /// Destination.
    pub dst: u64,
    /// Bytes; of a batch, descriptors.
    pub size: u32,
    /// No interrupt is asked for.
    pub interrupt: u16,
    /// Zero.
    pub reserved: u16,
    /// Of other operations.
    pub specific: [u64; 3],
}

const _: () = assert!(size_of::<Descriptor>() == 64);

impl Descriptor {
    /// Moves `size` bytes.
    pub fn memmove(src: u64, dst: u64, size: u32, record: &Record) -> Descriptor {
        Descriptor { src, dst, size, ..Descriptor::new(OPCODE_MEMMOVE, FLAG_CC, record) }
    }

    /// Does `count` descriptors, which start at `list`.
    pub fn batch(list: u64, count: u32, record: &Record) -> Descriptor {
        Descriptor { src: list, size: count, ..Descriptor::new(OPCODE_BATCH, 0, record) }
    }

    fn new(opcode: u8, flags: u32, record: &Record) -> Descriptor {
        Descriptor {
            flags_opcode: FLAG_CRAV | FLAG_RCR | flags | u32::from(opcode) << 24,
            completion: std::ptr::from_ref(record).expose_provenance() as u64,
            ..Descriptor::default()
        }
    }

    /// What it asks for.
    pub fn opcode(&self) -> u8 {
        (self.flags_opcode >> 24) as u8
    }

    /// Its flags.
    pub fn flags(&self) -> u32 {
        self.flags_opcode & 0xff_ffff
    }
}

/// A completion record, 32 bytes. The device writes it.
#[derive(Debug, Default)]
#[repr(C, align(32))]
pub struct Record {
    words: [AtomicU64; 4],
}

const _: () = assert!(size_of::<Record>() == 32);

impl Record {
    /// How the descriptor ended. What the device wrote before is visible if it did.
    pub fn status(&self) -> Status {
        Status::from_byte(self.words[0].load(Ordering::Acquire) as u8)
    }

    /// How many bytes from the start are done, of a descriptor that met a fault; of a batch, how many descriptors. A device
    /// that moved from the end has done none from the start.
    pub fn completed(&self) -> u32 {
        let word = self.words[0].load(Ordering::Acquire);
        let from_the_end = word >> 8 & 0xff != 0;
        if from_the_end { 0 } else { (word >> 32) as u32 }
    }

    /// Where the fault was.
    pub fn fault_address(&self) -> u64 {
        self.words[1].load(Ordering::Relaxed)
    }

    /// As the device does: the status last.
    #[cfg(test)]
    pub fn complete(&self, status: u8, result: u8, completed: u32, fault: u64) {
        self.words[1].store(fault, Ordering::Relaxed);
        let word = u64::from(status) | u64::from(result) << 8 | u64::from(completed) << 32;
        self.words[0].store(word, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_descriptor_and_its_record() {
        let record = Record::default();
        let descriptor = Descriptor::memmove(0x1122_3344_5566_7788, 0x99, 0x1000, &record);
        // SAFETY: a descriptor is 64 bytes of integers.
        let bytes: [u8; 64] = unsafe { std::mem::transmute(descriptor) };
        assert_eq!(bytes[..8], [0, 0, 0, 0, 0x0c, 0x01, 0, 3]);
        assert_eq!(bytes[8..16], (&raw const record as u64).to_le_bytes());
        assert_eq!(bytes[16..36], *b"\x88\x77\x66\x55\x44\x33\x22\x11\x99\0\0\0\0\0\0\0\0\x10\0\0");
        assert!(bytes[36..].iter().all(|byte| *byte == 0));
        assert_eq!((&raw const record).addr() % 32, 0);
        assert_eq!(record.status(), Status::None);
        record.complete(0x83, 0, 4096, 77);
        assert_eq!((record.status(), record.completed()), (Status::PageFault, 4096));
        assert_eq!(record.fault_address(), 77);
        record.complete(3, 1, 4096, 77);
        assert_eq!(record.completed(), 0, "it moved from the end");
    }
}
