//! The window: the address range in which the device's extents appear (`docs/device.md`, 8).
//!
//! In a virtual machine the VMM maps: the range is the device's memory, and what is mapped where is not known here.
//!
//! Where this process maps, the range is reserved once, without access. An extent is mapped into its place when the
//! device asks, and replaced by private zero memory when the device takes it back, so that a late store of the
//! program lands nowhere instead of ending it. Requests of the device are not believed: each is checked against the
//! range, the file and what is mapped.

use crate::mapping::Mapping;
use crate::proto::GRANULE;
use crate::proto::shm::CopyPlan;
use crate::shared::SharedMemory;
use crate::sync::lock;
use nix::errno::Errno;
use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, Weak};

/// The largest window that is reserved: an eighth of a process's address space.
const MAX_SIZE: u64 = 1 << 44;

/// A device's window.
#[derive(Debug)]
pub(crate) struct Window {
    mapping: Arc<Mapping>,
    /// If this process maps them.
    extents: Option<Mutex<Extents>>,
}

#[derive(Debug, Default)]
struct Extents {
    /// What is mapped, by offset.
    mapped: BTreeMap<u64, Arc<Extent>>,
    /// What is no longer mapped, but perhaps still in use by a handle of the program.
    left: Vec<Weak<Extent>>,
}

/// A range of the window. Handles of what lies in it keep it, so that its place is not given to another meanwhile.
#[derive(Debug)]
struct Extent {
    start: u64,
    end: u64,
    /// Keeps the window's address range reserved.
    _mapping: Arc<Mapping>,
}

impl Extent {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

impl Window {
    /// Reserves a window of this size.
    pub(crate) fn reserve(size: u64) -> io::Result<Window> {
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(GRANULE) {
            return Err(Errno::EINVAL.into());
        }
        let mapping = Arc::new(Mapping::reserve(size as usize)?);
        Ok(Window { mapping, extents: Some(Mutex::default()) })
    }

    /// A window in which a VMM maps.
    pub(crate) fn whole(mapping: Mapping) -> Window {
        Window { mapping: Arc::new(mapping), extents: None }
    }

    /// The device's memory is no longer this program's: from now on, its handles meet memory of this process only.
    pub(crate) fn part(&self) {
        // If it fails, the memory stays what it is.
        let _ = self.mapping.replace_by_zeroes(0, self.mapping.len());
    }

    pub(crate) fn size(&self) -> u64 {
        self.mapping.len() as u64
    }

    /// Does what the device asks for: maps `len` bytes of a file, from `file_offset` on, at `offset`.
    pub(crate) fn map(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), Errno> {
        let end = self.check(offset, len)?;
        if !file_offset.is_multiple_of(GRANULE) {
            return Err(Errno::EINVAL);
        }
        let stat = nix::sys::stat::fstat(file)?;
        let is_device = stat.st_mode & libc::S_IFMT == libc::S_IFCHR;
        let size = if is_device { i64::MAX } else { stat.st_size };
        let needed = file_offset.checked_add(len).ok_or(Errno::EINVAL)?;
        if u64::try_from(size).is_ok_and(|size| size < needed) || size < 0 {
            // Pages beyond a file's end end the process when touched.
            return Err(Errno::ENXIO);
        }
        let mut extents = lock(self.extents.as_ref().ok_or(Errno::ENOTSUP)?);
        extents.left.retain(|extent| extent.strong_count() != 0);
        let mut in_use = extents.left.iter().filter_map(Weak::upgrade);
        if in_use.any(|extent| extent.overlaps(offset, end)) {
            return Err(Errno::EBUSY);
        }
        if extents.mapped.range(..end).next_back().is_some_and(|(_, extent)| extent.overlaps(offset, end)) {
            return Err(Errno::EEXIST);
        }
        self.mapping.replace(offset as usize, len as usize, file, file_offset).map_err(|_| Errno::last())?;
        let extent = Extent { start: offset, end, _mapping: self.mapping.clone() };
        extents.mapped.insert(offset, Arc::new(extent));
        Ok(())
    }

    /// Does what the device asks for: takes back what is mapped from `offset` on, `len` bytes.
    pub(crate) fn unmap(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = self.check(offset, len)?;
        let mut extents = lock(self.extents.as_ref().ok_or(Errno::ENOTSUP)?);
        if extents.mapped.get(&offset).is_none_or(|extent| extent.end != end) {
            return Err(Errno::ENOENT);
        }
        self.mapping.replace_by_zeroes(offset as usize, len as usize).map_err(|_| Errno::last())?;
        if let Some(extent) = extents.mapped.remove(&offset) {
            let extent = Arc::downgrade(&extent);
            extents.left.retain(|extent| extent.strong_count() != 0);
            extents.left.push(extent);
        }
        Ok(())
    }

    /// A part of the window, if it lies in one extent that is mapped, as far as this process can know that.
    pub(crate) fn get(&self, offset: u64, len: u64, plan: CopyPlan) -> Option<SharedMemory> {
        let end = offset.checked_add(len)?;
        let keep: Arc<dyn Any + Send + Sync> = match &self.extents {
            Some(extents) => {
                let extents = lock(extents);
                let (_, extent) = extents.mapped.range(..=offset).next_back()?;
                if end > extent.end {
                    return None;
                }
                extent.clone()
            }
            None if end > self.size() => return None,
            None => self.mapping.clone(),
        };
        // SAFETY: the range lies in the window, in a mapped extent where this process maps. What is unmapped is
        // replaced by other memory, or by whatever the VMM has there. `keep` keeps the window's addresses.
        Some(unsafe {
            let ptr = self.mapping.base().add(offset as usize);
            SharedMemory::new(ptr, len as usize, plan, keep)
        })
    }

    fn check(&self, offset: u64, len: u64) -> Result<u64, Errno> {
        let end = offset.checked_add(len).ok_or(Errno::EINVAL)?;
        let aligned = offset.is_multiple_of(GRANULE) && len.is_multiple_of(GRANULE);
        if len == 0 || !aligned || end > self.size() { Err(Errno::EINVAL) } else { Ok(end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::{AsFd, OwnedFd};

    const K: u64 = 1024;

    fn file(len: u64) -> OwnedFd {
        let file = memfd_create(c"extent", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, len as i64).unwrap();
        file
    }

    #[test]
    fn only_what_is_mapped_can_be_had() {
        let window = Window::reserve(256 * K).unwrap();
        window.map(64 * K, 64 * K, file(128 * K).as_fd(), 64 * K).unwrap();
        let get = |offset, len| window.get(offset, len, CopyPlan::default());
        assert!(get(64 * K, 64 * K).is_some());
        assert!(get(128 * K - 64, 64).is_some());
        for (offset, len) in [(0, 64), (64 * K - 64, 128), (128 * K - 64, 128), (128 * K, 1), (u64::MAX, 2)] {
            assert!(get(offset, len).is_none(), "{offset} {len}");
        }
    }

    #[test]
    fn a_request_that_is_not_right_is_refused() {
        let window = Window::reserve(256 * K).unwrap();
        let file = file(64 * K);
        let map = |offset, len, from| window.map(offset, len, file.as_fd(), from);
        assert_eq!(map(0, 0, 0), Err(Errno::EINVAL));
        assert_eq!(map(100, 4 * K, 0), Err(Errno::EINVAL));
        assert_eq!(map(0, 100, 0), Err(Errno::EINVAL));
        assert_eq!(map(0, 4 * K, 100), Err(Errno::EINVAL));
        assert_eq!(map(252 * K, 8 * K, 0), Err(Errno::EINVAL));
        assert_eq!(map(u64::MAX - 4095, 4 * K, 0), Err(Errno::EINVAL));
        assert_eq!(map(0, 128 * K, 0), Err(Errno::ENXIO));
        assert_eq!(map(0, 4 * K, 64 * K), Err(Errno::ENXIO));
        assert_eq!(map(0, 4 * K, u64::MAX - 4095), Err(Errno::EINVAL));
        map(16 * K, 16 * K, 0).unwrap();
        for (offset, len) in [(16, 16), (0, 20), (28, 8), (20, 4), (0, 64)] {
            assert_eq!(map(offset * K, len * K, 0), Err(Errno::EEXIST));
        }
        assert_eq!(window.unmap(16 * K, 8 * K), Err(Errno::ENOENT));
        assert_eq!(window.unmap(0, 16 * K), Err(Errno::ENOENT));
        for size in [0, 100, u64::MAX, 1 << 45] {
            assert!(Window::reserve(size).is_err());
        }
    }

    #[test]
    fn a_late_store_into_what_was_unmapped_lands_nowhere() {
        let window = Window::reserve(64 * K).unwrap();
        let file = file(16 * K);
        window.map(0, 16 * K, file.as_fd(), 0).unwrap();
        let handle = window.get(4 * K, 4 * K, CopyPlan::default()).unwrap();
        handle.write(0, b"early").unwrap();
        window.unmap(0, 16 * K).unwrap();
        handle.write(0, b"later").unwrap();
        let mut bytes = [0; 5];
        nix::sys::uio::pread(&file, &mut bytes, 4 * K as i64).unwrap();
        assert_eq!(&bytes, b"early");

        // Nor in what the device would map there while the handle is in use.
        assert_eq!(window.map(0, 16 * K, file.as_fd(), 0), Err(Errno::EBUSY));
        drop(handle);
        window.map(0, 16 * K, file.as_fd(), 0).unwrap();
    }

    #[test]
    fn memory_outlives_the_window_that_it_came_from() {
        let window = Window::reserve(64 * K).unwrap();
        window.map(0, 16 * K, file(16 * K).as_fd(), 0).unwrap();
        let handle = window.get(0, 64, CopyPlan::default()).unwrap();
        drop(window);
        handle.write(0, b"still here").unwrap();
    }
}
