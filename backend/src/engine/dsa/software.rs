//! An accelerator in software, for tests: takes descriptors, checks them, does them, and completes them as the
//! architecture says, faults and errors included. It does things in orders and at times of its own choice, as far as it may.

use super::descriptor::{
    Descriptor, FLAG_CC, FLAG_CRAV, FLAG_FENCE, FLAG_RCR, OPCODE_BATCH, OPCODE_MEMMOVE, Record,
};
use super::queue::{Limits, NotTaken, WorkQueue};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const PAGE: u64 = 4096;
const SUCCESS: u8 = 1;
const PAGE_FAULT: u8 = 3;
const BATCH_FAIL: u8 = 5;
const BATCH_PAGE_FAULT: u8 = 6;
const BAD_OPCODE: u8 = 0x10;
const INVALID_FLAGS: u8 = 0x11;
const NONZERO_RESERVED: u8 = 0x12;
const TRANSFER_RANGE: u8 = 0x13;
const COUNT_RANGE: u8 = 0x14;
const LIST_ALIGN: u8 = 0x18;
/// A fault was at a write.
const WRITE: u8 = 0x80;

/// A page that is asked for: its address, and whether it is to be written.
pub type Fault = Box<dyn FnMut(u64, bool) -> bool + Send>;

/// What does not go well.
pub struct Behaviour {
    /// Whether a page is not there.
    pub fault: Fault,
    /// How a move ends that does not end well.
    pub error: Box<dyn FnMut() -> Option<u8> + Send>,
    /// After so many descriptors nothing is completed any more.
    pub hang_after: u64,
}

impl Default for Behaviour {
    fn default() -> Behaviour {
        Behaviour { fault: Box::new(|_, _| false), error: Box::new(|| None), hang_after: u64::MAX }
    }
}

/// The queue and the thread behind it.
#[derive(Debug)]
pub struct Software {
    limits: Limits,
    open: Mutex<Option<(SyncSender<Descriptor>, JoinHandle<()>)>>,
}

impl Software {
    /// A queue of `size` descriptors.
    pub fn start(limits: Limits, size: usize, behaviour: Behaviour) -> Arc<Software> {
        let (sender, receiver) = sync_channel(size);
        let device = Device { limits, behaviour, done: 0, random: 0x9e37_79b9 };
        let thread = std::thread::spawn(move || device.run(&receiver));
        Arc::new(Software { limits, open: Mutex::new(Some((sender, thread))) })
    }
}

impl WorkQueue for Software {
    fn limits(&self) -> Limits {
        self.limits
    }

    unsafe fn submit(&self, descriptor: &Descriptor) -> Result<(), NotTaken> {
        match &*self.open.lock().unwrap() {
            None => Err(NotTaken::Lost),
            Some((sender, _)) => sender.try_send(*descriptor).map_err(|error| match error {
                TrySendError::Full(_) => NotTaken::Busy,
                TrySendError::Disconnected(_) => NotTaken::Lost,
            }),
        }
    }

    fn completed(&self) {}

    fn abandon(&self) {
        if let Some((sender, thread)) = self.open.lock().unwrap().take() {
            drop(sender);
            thread.join().unwrap();
        }
    }
}

impl Drop for Software {
    fn drop(&mut self) {
        self.abandon();
    }
}

struct Device {
    limits: Limits,
    behaviour: Behaviour,
    done: u64,
    random: u64,
}

impl Device {
    fn run(mut self, descriptors: &Receiver<Descriptor>) {
        while let Ok(descriptor) = descriptors.recv() {
            if self.done >= self.behaviour.hang_after {
                continue;
            }
            self.execute(&descriptor, false);
            self.done += 1;
        }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    /// Does a descriptor; whether it ended well.
    fn execute(&mut self, descriptor: &Descriptor, member: bool) -> bool {
        // Now and then somebody else is first.
        for _ in 0..self.random(3) {
            std::thread::yield_now();
        }
        let known = FLAG_FENCE | FLAG_CRAV | FLAG_RCR | FLAG_CC;
        let fence = descriptor.flags() & FLAG_FENCE != 0;
        assert!(descriptor.flags() & FLAG_CRAV != 0, "nobody would learn how it ended");
        assert!(descriptor.completion.is_multiple_of(32), "the completion record is not aligned");
        let (status, completed, fault) = match descriptor.opcode() {
            _ if descriptor.pasid != 0 || descriptor.reserved != 0 || descriptor.interrupt != 0 => {
                (NONZERO_RESERVED, 0, 0)
            }
            _ if descriptor.flags() & !known != 0 || (fence && !member) => (INVALID_FLAGS, 0, 0),
            OPCODE_MEMMOVE => self.memmove(descriptor),
            OPCODE_BATCH if !member => self.batch(descriptor),
            _ => (BAD_OPCODE, 0, 0),
        };
        // SAFETY: who submitted it promised that the record is there until it is completed.
        let record = unsafe { &*std::ptr::with_exposed_provenance::<Record>(descriptor.completion as usize) };
        record.complete(status, 0, completed, fault);
        status == SUCCESS
    }

    fn memmove(&mut self, descriptor: &Descriptor) -> (u8, u32, u64) {
        let Descriptor { src, dst, size, .. } = *descriptor;
        if size == 0 || size > self.limits.max_transfer {
            return (TRANSFER_RANGE, 0, 0);
        }
        if let Some(error) = (self.behaviour.error)() {
            return (error, 0, 0);
        }
        let mut at = 0;
        while at < u64::from(size) {
            let to_page = |address: u64| PAGE - address % PAGE;
            for (address, write) in [(src + at, false), (dst + at, true)] {
                if (self.behaviour.fault)(address / PAGE * PAGE, write) {
                    let status = if write { PAGE_FAULT | WRITE } else { PAGE_FAULT };
                    return (status, at as u32, address);
                }
            }
            let len = (u64::from(size) - at).min(to_page(src + at)).min(to_page(dst + at));
            let from = std::ptr::with_exposed_provenance::<u8>((src + at) as usize);
            let to = std::ptr::with_exposed_provenance_mut::<u8>((dst + at) as usize);
            // SAFETY: who submitted it promised that both are there until it is completed.
            unsafe { std::ptr::copy(from, to, len as usize) };
            at += len;
        }
        (SUCCESS, size, 0)
    }

    fn batch(&mut self, descriptor: &Descriptor) -> (u8, u32, u64) {
        let Descriptor { src: list, size: count, .. } = *descriptor;
        if !list.is_multiple_of(64) {
            return (LIST_ALIGN, 0, 0);
        }
        if count < 2 || count > self.limits.max_batch {
            return (COUNT_RANGE, 0, 0);
        }
        let mut members = Vec::new();
        let mut end = None;
        for i in 0..u64::from(count) {
            let address = list + 64 * i;
            if (self.behaviour.fault)(address / PAGE * PAGE, false) {
                end = Some(address);
                break;
            }
            let member = std::ptr::with_exposed_provenance::<Descriptor>(address as usize);
            // SAFETY: who submitted it promised that the list is there until it is completed.
            members.push(unsafe { *member });
        }
        let fetched = members.len() as u32;
        // What has no fence may be done in any order.
        if members.iter().all(|member| member.flags() & FLAG_FENCE == 0) {
            for i in (1..members.len()).rev() {
                let other = self.random(i as u64 + 1) as usize;
                members.swap(i, other);
            }
        }
        let mut good = true;
        for member in &members {
            good &= self.execute(member, true);
        }
        match end {
            Some(address) => (BATCH_PAGE_FAULT, fetched, address),
            None if good => (SUCCESS, count, 0),
            None => (BATCH_FAIL, fetched, 0),
        }
    }
}
