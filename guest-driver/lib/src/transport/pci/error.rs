//! Why a PCI device cannot be used, in words for the person who reads the message.

use crate::proto::config::ConfigError;
use std::io;

/// Why a PCI device cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// There is nothing at the address.
    #[error("there is no such device; dmbridge devices are among those that lspci -Dd 1af4: lists")]
    NoDevice,
    /// Something else is at the address.
    #[error("it has the IDs {vendor:04x}:{device:04x}, a dmbridge device has 1af4:106c or 1af4:1065")]
    Foreign {
        /// PCI vendor ID.
        vendor: u16,
        /// PCI device ID.
        device: u16,
    },
    /// It has the right IDs, but is something else, or of another version.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This user may not.
    #[error("cannot {0}: that takes root in the guest")]
    Permission(&'static str),
    /// The kernel lets nobody, not even root.
    #[error(
        "the guest's kernel is locked down (Secure Boot) and gives no program access to PCI devices; switch Secure Boot off, or use the kernel driver"
    )]
    LockedDown,
    /// The kernel has not got the driver that lets programs have interrupts.
    #[error(
        "the guest's kernel has no uio_pci_generic: {0}; install the kernel's full set of modules (some cloud kernels leave it out)"
    )]
    NoUio(String),
    /// A kernel driver uses it.
    #[error("the kernel's driver {0} uses it; unbind it from that first")]
    InUse(String),
    /// Another process uses it.
    #[error("another process uses it")]
    Busy,
    /// It is not made for a driver that gives it physical addresses.
    #[error(
        "it is behind an IOMMU (VIRTIO_F_ACCESS_PLATFORM), for which this driver is not made; start the VM without iommu_platform"
    )]
    Iommu,
    /// Its capability list cannot be used.
    #[error("its PCI capabilities cannot be used: {0}")]
    Capabilities(&'static str),
    /// The VMM gave it too few queues.
    #[error("the VMM gave it {there} queues, it needs {needed}; start QEMU with num_vqs={needed} for it")]
    Queues {
        /// What the driver would start.
        needed: usize,
        /// What is there.
        there: u16,
    },
    /// It did not agree to the features, or could not start.
    #[error("it failed while {0}; the VMM's log may say why")]
    Failed(&'static str),
    /// There is no memory that it can reach.
    #[error(
        "no {0} huge pages of 2 MiB are to be had, which lie one after the other: {1}; set some aside early (vm.nr_hugepages)"
    )]
    NoMemory(usize, io::Error),
    /// The operating system refused something else.
    #[error("cannot {doing}: {error}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// The reason.
        error: io::Error,
    },
}

impl PciError {
    /// For `map_err`: the operating system refused to do this.
    pub(super) fn os(doing: &'static str) -> impl Fn(io::Error) -> PciError {
        move |error| match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) if locked_down() => PciError::LockedDown,
            Some(libc::EPERM | libc::EACCES) => PciError::Permission(doing),
            _ => PciError::Os { doing, error },
        }
    }
}

/// Whether the kernel is locked down. To be asked only after it refused something.
fn locked_down() -> bool {
    // "[none] integrity confidentiality", with the present state in brackets.
    std::fs::read_to_string("/sys/kernel/security/lockdown").is_ok_and(|state| !state.contains("[none]"))
}
