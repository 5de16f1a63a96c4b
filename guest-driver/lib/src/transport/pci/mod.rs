//! A device on the PCI bus of the virtual machine in which this process runs, driven from user space: registers and window
//! through sysfs, interrupts by `uio_pci_generic`, queues in huge pages. Takes root in the guest; no kernel module of ours.
//!
//! One interrupt (INTx) serves all queues. The reactor takes it and passes it on to whoever waits for a queue.
//!
//! If the device is unplugged, its registers and its window are replaced by memory of this process as soon as the library
//! learns of it. What touches them between the kernel's taking them away and that gets SIGBUS, as with any mapped file that
//! is cut off; a VMM that unplugs in good order tells the kernel first.

mod address;
mod binding;
mod config_space;
mod error;
mod memory;
mod registers;

pub use address::{BadPciAddress, PciAddress, find};
pub use error::PciError;

use super::Transport;
use crate::error::Error;
use crate::fork::Process;
use crate::proto::config::{CONFIG_SIZE, Config};
use crate::proto::features::Features;
use crate::ram::{DmaBuffer, Ram};
use crate::sync::lock;
use crate::virtqueue::Virtqueue;
use crate::window::Window;
use config_space::{Area, ConfigSpace};
use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The device cannot be used by a driver that gives it physical addresses.
const ACCESS_PLATFORM: u64 = 1 << 33;

/// A PCI device, taken.
pub(crate) struct Pci {
    address: PciAddress,
    config_space: ConfigSpace,
    registers: registers::Device,
    window: Option<Window>,
    offered: Features,
    ram: Ram,
    /// One for each queue.
    interrupts: Vec<EventFd>,
    /// All of them at once.
    interrupt: OwnedFd,
    hangup: PipeReader,
    /// Closed: the device is gone.
    alive: Mutex<Option<PipeWriter>>,
    process: Process,
}

impl Pci {
    /// Takes the device from the kernel, if it is one of ours and nobody uses it. Without `map`, its window is left alone.
    pub(crate) fn open(address: PciAddress, map: bool) -> Result<Pci, Error> {
        Pci::take(address, map).map_err(|error| Error::Pci { address, error })
    }

    fn take(address: PciAddress, map: bool) -> Result<Pci, PciError> {
        let folder = &address.folder();
        address::check_ids(folder)?;
        let config_space = ConfigSpace::open(folder)?;
        let structures = config_space.structures()?;
        // Before anything is changed: is it ours?
        let mut config = [0; CONFIG_SIZE];
        config_space.read_bar(
            &structures,
            Area { len: CONFIG_SIZE as u64, ..structures.device },
            &mut config,
        )?;
        Config::parse(&config)?;

        let interrupt = binding::bind(folder)?;
        config_space.enable()?;
        config_space.set_interrupt(false).map_err(PciError::os("switch the interrupt off"))?;
        let registers = registers::Device::map(folder, &structures)?;
        let window = match structures.window.filter(|_| map) {
            Some(area) => {
                Some(Window::whole(registers::map_bar(&registers::open_bar(folder, area.bar)?, area)?))
            }
            None => None,
        };
        if !registers.reset() {
            return Err(PciError::Failed("it was reset"));
        }
        let offered = registers.take();
        if offered & ACCESS_PLATFORM != 0 {
            return Err(PciError::Iommu);
        }
        // Who sleeps here sleeps in another kernel than its peer.
        let mut offered = Features::from_bits_truncate(offered) - Features::FUTEX;
        offered.set(Features::MAP, offered.contains(Features::MAP) && window.is_some());
        let (hangup, alive) = io::pipe().map_err(PciError::os("make a pipe"))?;
        Ok(Pci {
            address,
            config_space,
            registers,
            window,
            offered,
            ram: Ram::default(),
            interrupts: Vec::new(),
            interrupt,
            hangup,
            alive: Mutex::new(Some(alive)),
            process: Process::current(),
        })
    }

    fn error(&self, error: PciError) -> Error {
        Error::Pci { address: self.address, error }
    }

    /// Cuts the program's memory off from the device's.
    fn part(&self) {
        self.registers.part();
        if let Some(window) = &self.window {
            window.part();
        }
    }
}

impl Transport for Pci {
    fn offered(&self) -> Features {
        self.offered
    }

    fn accept(&mut self, features: Features) -> Result<Vec<u8>, Error> {
        self.registers.accept(features.bits()).map_err(|e| self.error(e))?;
        Ok(self.registers.config())
    }

    fn window(&self) -> Option<&Window> {
        self.window.as_ref()
    }

    fn max_queue_size(&self, queue: u16) -> u16 {
        self.registers.max_queue_size(queue)
    }

    fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), Error> {
        for _ in queues {
            let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
            self.interrupts.push(interrupt);
        }
        self.registers.start(queues).map_err(|e| self.error(e))?;
        let failed = PciError::os("switch the interrupt on");
        self.config_space.set_interrupt(true).map_err(|e| self.error(failed(e)))
    }

    fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error> {
        self.ram.allocate_from(len, align, &|needed, _, _| memory::region(needed).map_err(|e| self.error(e)))
    }

    fn kick(&self, queue: u16) {
        self.registers.kick(queue);
    }

    fn interrupt(&self, queue: u16) -> BorrowedFd<'_> {
        let fd = self.interrupts[usize::from(queue)].as_raw_fd();
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn hangup(&self) -> BorrowedFd<'_> {
        self.hangup.as_fd()
    }

    fn give_up(&self) {
        lock(&self.alive).take();
    }

    fn is_deaf(&self) -> bool {
        // The VMM stops the device then, as it does when the virtual machine is paused.
        true
    }

    fn requests(&self) -> Option<BorrowedFd<'_>> {
        Some(self.interrupt.as_fd())
    }

    /// Passes an interrupt on. Which queue it is for is not told.
    fn serve(&self) -> Result<(), Error> {
        let gone = |_| {
            self.part();
            Error::Disconnected
        };
        while binding::take_interrupt(&self.interrupt).map_err(gone)? {
            let broken = self.registers.acknowledge_interrupt();
            for interrupt in &self.interrupts {
                // It fails only if 2^64 - 2 interrupts were not taken.
                let _ = interrupt.write(1);
            }
            if broken {
                return Err(self.error(PciError::Failed("it was working")));
            }
            self.config_space.set_interrupt(true).map_err(gone)?;
        }
        Ok(())
    }
}

impl Drop for Pci {
    fn drop(&mut self) {
        // A child of fork() has the descriptors and mappings, but the device is its parent's.
        if !self.process.is_current() {
            return;
        }
        let _ = self.config_space.set_interrupt(false);
        if !self.registers.reset() {
            tracing::error!("PCI device {}: it does not reset; its memory is not used again", self.address);
            std::mem::forget(std::mem::take(&mut self.ram));
        }
        // Handles may still be there, and what they wrote would meet the next user's extents.
        self.part();
    }
}
