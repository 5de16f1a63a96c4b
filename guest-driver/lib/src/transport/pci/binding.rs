//! Taking a PCI device from the kernel's virtio driver and giving it to `uio_pci_generic`, which gives this process its
//! interrupt. The device stays there when the process ends, so that the next one finds it.

use super::error::PciError;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const UIO: &str = "uio_pci_generic";
/// The kernel's driver of the virtio transport; a device's own driver sits on top of it.
const VIRTIO: &str = "virtio-pci";
/// The number that the interrupt's descriptor is given if it is free: above those of memory files.
const HIGH: i32 = 900;

/// Binds a device to `uio_pci_generic` unless it is, and opens its interrupt.
pub(super) fn bind(device: &Path) -> Result<OwnedFd, PciError> {
    match driver(device).as_deref() {
        Some(UIO) => {}
        Some(VIRTIO) => {
            if let Some(name) = virtio_driver(device) {
                return Err(PciError::InUse(name));
            }
            load_uio(device)?;
            rebind(device)?;
        }
        None => {
            load_uio(device)?;
            rebind(device)?;
        }
        Some(other) => return Err(PciError::InUse(other.to_string())),
    }
    open_interrupt(device)
}

fn link_name(link: PathBuf) -> Option<String> {
    Some(fs::read_link(link).ok()?.file_name()?.to_string_lossy().into_owned())
}

/// The driver that has the PCI device.
fn driver(device: &Path) -> Option<String> {
    link_name(device.join("driver"))
}

/// The driver that has the virtio device which `virtio-pci` has made of it.
fn virtio_driver(device: &Path) -> Option<String> {
    let mut entries = fs::read_dir(device).ok()?.flatten();
    entries.find_map(|e| {
        e.file_name().to_str()?.starts_with("virtio").then(|| link_name(e.path().join("driver")))?
    })
}

/// All drivers of the bus, as seen from a device.
fn drivers(device: &Path) -> PathBuf {
    device.join("subsystem/drivers")
}

fn load_uio(device: &Path) -> Result<(), PciError> {
    let there = || drivers(device).join(UIO).exists();
    if there() {
        return Ok(());
    }
    let modprobe = Command::new("modprobe").arg(UIO).stdin(Stdio::null()).stdout(Stdio::null()).output();
    if there() {
        return Ok(());
    }
    Err(PciError::NoUio(match modprobe {
        Ok(output) => format!("modprobe said {:?}", String::from_utf8_lossy(&output.stderr).trim()),
        Err(error) => format!("modprobe cannot be run, {error}"),
    }))
}

fn rebind(device: &Path) -> Result<(), PciError> {
    let address = device.file_name().unwrap_or_default().as_encoded_bytes();
    fs::write(device.join("driver_override"), UIO).map_err(PciError::os("choose the device's driver"))?;
    if device.join("driver").exists() {
        fs::write(device.join("driver/unbind"), address)
            .map_err(PciError::os("take the device from its driver"))?;
    }
    // The kernel says nothing if no driver takes it, and that another one was quicker if it has one already.
    let probed = fs::write(device.join("subsystem/drivers_probe"), address);
    match driver(device).as_deref() {
        Some(UIO) => Ok(()),
        Some(other) => Err(PciError::InUse(other.to_string())),
        None => match probed {
            Err(error) => Err(PciError::os("bind the device to uio_pci_generic")(error)),
            Ok(()) => Err(PciError::NoUio("it does not take the device; the kernel's log says why".into())),
        },
    }
}

/// Opens the interrupt, for this process only.
fn open_interrupt(device: &Path) -> Result<OwnedFd, PciError> {
    let none = || PciError::NoUio("it shows no interrupt of the device".into());
    let name =
        fs::read_dir(device.join("uio")).map_err(|_| none())?.flatten().next().ok_or_else(none)?.file_name();
    let path = Path::new("/dev").join(name);
    let opening = PciError::os("open the device's interrupt");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(opening)?;
    lock(&file)?;
    Ok(release_first(file))
}

/// The kernel takes the right to access memory from the device when its interrupt's last descriptor is closed. If this
/// process is killed, that has to happen before its memory serves others. The memory's files keep it until they are closed,
/// and Linux closes the files of a dead process from the highest number down.
fn release_first(file: File) -> OwnedFd {
    match fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(HIGH)) {
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(high) => unsafe { std::os::fd::FromRawFd::from_raw_fd(high) },
        // So many files may not be open here.
        Err(_) => file.into(),
    }
}

fn lock(file: &File) -> Result<(), PciError> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => PciError::Busy,
        TryLockError::Error(error) => PciError::os("lock the device's interrupt")(error),
    })
}

/// Takes what happened since the last time: whether there was an interrupt. An error means that the device is gone.
pub(super) fn take_interrupt(fd: &impl AsFd) -> io::Result<bool> {
    let mut count = [0; 4];
    match nix::unistd::read(fd, &mut count) {
        Ok(_) => Ok(true),
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    /// A folder that looks like sysfs's of a device on a bus with these drivers.
    fn sysfs(drivers: &[&str], bound_to: Option<&str>) -> (TempDir, PathBuf) {
        let bus = tempfile::tempdir().unwrap();
        let device = bus.path().join("devices/0000:01:00.0");
        fs::create_dir_all(&device).unwrap();
        fs::create_dir(bus.path().join("drivers")).unwrap();
        for name in drivers {
            fs::create_dir(bus.path().join("drivers").join(name)).unwrap();
        }
        symlink(bus.path(), device.join("subsystem")).unwrap();
        if let Some(name) = bound_to {
            symlink(bus.path().join("drivers").join(name), device.join("driver")).unwrap();
        }
        (bus, device)
    }

    #[test]
    fn a_device_that_a_kernel_driver_uses_is_left_to_it() {
        let (_bus, device) = sysfs(&[UIO, VIRTIO, "dmbridge"], Some(VIRTIO));
        fs::create_dir(device.join("virtio3")).unwrap();
        symlink("../../../drivers/dmbridge", device.join("virtio3/driver")).unwrap();
        assert!(matches!(bind(&device), Err(PciError::InUse(name)) if name == "dmbridge"));
        let (_bus, device) = sysfs(&[UIO, "vfio-pci"], Some("vfio-pci"));
        assert!(matches!(bind(&device), Err(PciError::InUse(name)) if name == "vfio-pci"));
        assert!(!device.join("driver_override").exists());
    }

    #[test]
    fn a_virtio_device_that_nobody_drives_is_taken() {
        let (bus, device) = sysfs(&[UIO, VIRTIO], Some(VIRTIO));
        fs::create_dir(device.join("virtio3")).unwrap();
        // Nothing happens in this folder when the files are written, so it stays where it is; the requests are there.
        assert!(matches!(bind(&device), Err(PciError::InUse(name)) if name == VIRTIO));
        let written = |path: PathBuf| fs::read_to_string(path).unwrap();
        assert_eq!(written(device.join("driver_override")), UIO);
        assert_eq!(written(bus.path().join("drivers/virtio-pci/unbind")), "0000:01:00.0");
        assert_eq!(written(bus.path().join("drivers_probe")), "0000:01:00.0");
    }

    #[test]
    fn a_device_that_the_driver_does_not_take_is_said() {
        let (_bus, device) = sysfs(&[UIO], None);
        assert!(matches!(bind(&device), Err(PciError::NoUio(_))));
        let (_bus, device) = sysfs(&[UIO], Some(UIO));
        assert!(matches!(bind(&device), Err(PciError::NoUio(reason)) if reason.contains("no interrupt")));
    }

    #[test]
    fn two_processes_do_not_share_a_device() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (first, second) = (File::open(file.path()).unwrap(), File::open(file.path()).unwrap());
        lock(&first).unwrap();
        assert!(matches!(lock(&second), Err(PciError::Busy)));
        // The lock is the file's, not the number's.
        let first = release_first(first);
        assert!(matches!(lock(&second), Err(PciError::Busy)));
        drop(first);
        lock(&second).unwrap();
    }
}
