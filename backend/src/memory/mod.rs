//! A front-end's memory, as its memory table describes it: guest addresses to ours, and back from the front-end's own.
//!
//! A table is immutable; a change makes a new one. Whoever accesses guest memory holds the table meanwhile (through
//! [`SharedMemory`]), so that a region goes away only when nobody uses it, and a change is over when it is acknowledged.

pub mod sigbus;

use crate::keep;
use sigbus::Guard;
use std::fs::File;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use vm_memory::guest_memory::GuestMemoryBackend;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

/// The most regions of a memory table.
pub const MAX_REGIONS: usize = 509;
/// The most bytes that one front-end's regions may have together: address space, not memory.
const MAX_BYTES: u64 = 1 << 46;

/// Why a memory table is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than [`MAX_REGIONS`].
    #[error("the memory table has more than {MAX_REGIONS} regions")]
    TooMany,
    /// A region of no or of absurd size, or one that wraps around.
    #[error("a memory region of {size:#x} bytes at {addr:#x} is not possible")]
    Size {
        /// Guest address.
        addr: u64,
        /// Size, in bytes.
        size: u64,
    },
    /// Two regions at one guest address.
    #[error("the memory region at {0:#x} overlaps another")]
    Overlap(u64),
    /// A region that is to be removed and is not there.
    #[error("there is no memory region of this size at {0:#x}")]
    Unknown(u64),
    /// The file is shorter than the region says.
    #[error("the file of the memory region at {addr:#x} has {len:#x} bytes, the region ends at {end:#x}")]
    File {
        /// Guest address.
        addr: u64,
        /// The file's length, in bytes.
        len: u64,
        /// Where the region ends in the file.
        end: u64,
    },
    /// The file is of a file system that is not memory: an access could wait for whoever serves it, for ever.
    #[error(
        "the file of the memory region at {0:#x} is not memory; use memory-backend-memfd, or a file in tmpfs or \
         hugetlbfs"
    )]
    NotMemory(u64),
    /// The kernel refused the mapping.
    #[error("the memory region at {addr:#x} cannot be mapped: {error}")]
    Map {
        /// Guest address.
        addr: u64,
        /// Why.
        error: MmapRegionError,
    },
    /// The system refused something else.
    #[error("the memory region at {addr:#x} cannot be used: {error}")]
    Io {
        /// Guest address.
        addr: u64,
        /// Why.
        error: std::io::Error,
    },
}

/// A region as the front-end described it.
#[derive(Debug, Clone, Copy)]
pub struct RegionInfo {
    /// Guest-physical address.
    pub guest_addr: u64,
    /// Size, in bytes.
    pub size: u64,
    /// The front-end's own address of it; ring addresses are given by these.
    pub user_addr: u64,
    /// Offset in the file.
    pub file_offset: u64,
}

#[derive(Debug)]
struct Region {
    // Dropped in this order: the guard before the mapping that it guards.
    guard: Guard,
    mapping: Arc<GuestRegionMmap>,
    info: RegionInfo,
    number: u64,
}

impl Region {
    fn map(info: RegionInfo, file: File, number: u64) -> Result<Region, MemoryError> {
        let RegionInfo { guest_addr: addr, size, file_offset, .. } = info;
        let end = file_offset.checked_add(size);
        let (Some(end), Some(_)) = (end, addr.checked_add(size)) else {
            return Err(MemoryError::Size { addr, size });
        };
        if size == 0 || size > MAX_BYTES || i64::try_from(end).is_err() {
            return Err(MemoryError::Size { addr, size });
        }
        let page = page_size(&file)
            .map_err(|error| MemoryError::Io { addr, error })?
            .ok_or(MemoryError::NotMemory(addr))?;
        let len = file.metadata().map_err(|error| MemoryError::Io { addr, error })?.len();
        if len < end {
            return Err(MemoryError::File { addr, len, end });
        }
        let mapping = MmapRegionBuilder::new(size as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, file_offset))
            .build()
            .map_err(|error| MemoryError::Map { addr, error })?;
        // A core dump of the daemon must not hold the tenants' memory; and a child has no use for it.
        for advice in [libc::MADV_DONTDUMP, libc::MADV_DONTFORK] {
            // SAFETY: the range is the mapping that was just made; the advice changes no content.
            unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
        }
        let guard = Guard::new(mapping.as_ptr(), mapping.size(), page)
            .map_err(|error| MemoryError::Io { addr, error })?;
        let mapping =
            GuestRegionMmap::new(mapping, GuestAddress(addr)).ok_or(MemoryError::Size { addr, size })?;
        Ok(Region { guard, mapping: Arc::new(mapping), info, number })
    }
}

/// Size of the pages of a mapping of a file that is memory; `None` if it is another file.
fn page_size(file: &File) -> std::io::Result<Option<usize>> {
    use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
    let fs = fstatfs(file)?;
    Ok(match fs.filesystem_type() {
        TMPFS_MAGIC => Some(4096),
        HUGETLBFS_MAGIC => Some(fs.block_size() as usize).filter(|size| size.is_power_of_two()),
        _ => None,
    })
}

/// A memory table.
#[derive(Debug, Default)]
pub struct DeviceMemory {
    /// In the order of their guest addresses; dropped before `memory`, so that guards go first.
    regions: Vec<Arc<Region>>,
    memory: GuestMemoryMmap,
}

impl DeviceMemory {
    /// The table of these regions.
    pub fn from_regions(
        regions: impl ExactSizeIterator<Item = (RegionInfo, File)>,
    ) -> Result<DeviceMemory, MemoryError> {
        DeviceMemory::from_numbered(regions.map(|(info, file)| (info, file, keep::number())))
    }

    /// The table of these regions, whose files a keeper has under these numbers.
    pub fn from_numbered(
        regions: impl ExactSizeIterator<Item = (RegionInfo, File, u64)>,
    ) -> Result<DeviceMemory, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let map = |(info, file, number)| Region::map(info, file, number).map(Arc::new);
        DeviceMemory::assemble(regions.map(map).collect::<Result<_, _>>()?)
    }

    /// Its regions, with their files and the numbers under which a keeper has these.
    pub fn regions(&self) -> impl Iterator<Item = (RegionInfo, &File, u64)> {
        self.regions
            .iter()
            .filter_map(|region| Some((region.info, region.mapping.file_offset()?.file(), region.number)))
    }

    /// This table and one more region.
    pub fn with(&self, info: RegionInfo, file: File) -> Result<DeviceMemory, MemoryError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let mut regions = self.regions.clone();
        regions.push(Arc::new(Region::map(info, file, keep::number())?));
        DeviceMemory::assemble(regions)
    }

    /// This table without one region.
    pub fn without(&self, info: RegionInfo) -> Result<DeviceMemory, MemoryError> {
        let mut regions = self.regions.clone();
        let at = regions
            .iter()
            .position(|r| r.info.guest_addr == info.guest_addr && r.info.size == info.size)
            .ok_or(MemoryError::Unknown(info.guest_addr))?;
        regions.remove(at);
        DeviceMemory::assemble(regions)
    }

    /// This table without the regions whose file is one of those.
    pub fn without_files(&self, those: impl Fn(&File) -> bool) -> Result<DeviceMemory, MemoryError> {
        use vm_memory::GuestMemoryRegion as _;
        let is_there =
            |region: &&Arc<Region>| region.mapping.file_offset().is_none_or(|at| !those(at.file()));
        DeviceMemory::assemble(self.regions.iter().filter(is_there).cloned().collect())
    }

    fn assemble(mut regions: Vec<Arc<Region>>) -> Result<DeviceMemory, MemoryError> {
        if regions.is_empty() {
            return Ok(DeviceMemory::default());
        }
        regions.sort_by_key(|r| r.info.guest_addr);
        let mut total = 0u64;
        for (i, region) in regions.iter().enumerate() {
            let RegionInfo { guest_addr: addr, size, .. } = region.info;
            total = total.saturating_add(size);
            if total > MAX_BYTES {
                return Err(MemoryError::Size { addr, size });
            }
            // No overflow: `Region::map` checked the sum.
            if i > 0 && regions[i - 1].info.guest_addr + regions[i - 1].info.size > addr {
                return Err(MemoryError::Overlap(addr));
            }
        }
        let mappings = regions.iter().map(|r| r.mapping.clone()).collect();
        let memory = GuestMemoryMmap::from_arc_regions(mappings)
            .map_err(|_| MemoryError::Overlap(regions[0].info.guest_addr))?;
        Ok(DeviceMemory { regions, memory })
    }

    /// For reading and writing at guest addresses.
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The guest address of one of the front-end's own addresses.
    pub fn guest_addr_of(&self, user_addr: u64) -> Option<u64> {
        self.regions.iter().map(|r| &r.info).find_map(|r| {
            let offset = user_addr.checked_sub(r.user_addr)?;
            (offset < r.size).then_some(r.guest_addr + offset)
        })
    }

    /// Whether all of these bytes are guest memory.
    pub fn holds(&self, addr: u64, len: u64) -> bool {
        usize::try_from(len).is_ok_and(|len| self.memory.check_range(GuestAddress(addr), len))
    }

    /// Our address of the guest memory at `addr`, and how many of `len` bytes follow it there in one piece. Valid as
    /// long as the table is borrowed.
    pub fn host(&self, addr: u64, len: u64) -> Option<(*mut u8, u64)> {
        let region = self.memory.find_region(GuestAddress(addr))?;
        let offset = addr - region.start_addr().0;
        let piece = len.min(region.len() - offset);
        // `offset` is inside of the region: it was found for `addr`.
        Some((region.as_ptr().wrapping_add(offset as usize), piece))
    }

    /// Reads exactly `buf.len()` bytes; false if they are not all guest memory.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> bool {
        self.memory.read_slice(buf, GuestAddress(addr)).is_ok()
    }

    /// Writes all of `buf`; false if it does not all go to guest memory.
    pub fn write(&self, addr: u64, buf: &[u8]) -> bool {
        self.holds(addr, buf.len() as u64) && self.memory.write_slice(buf, GuestAddress(addr)).is_ok()
    }

    /// Whether any of the memory was found to be gone.
    pub fn vanished(&self) -> bool {
        self.regions.iter().any(|r| r.guard.vanished())
    }
}

/// The memory table of a device, which others use while it changes.
#[derive(Debug, Default)]
pub struct SharedMemory(RwLock<DeviceMemory>);

impl SharedMemory {
    /// The table as it is; it does not change while this is held. Not to be taken twice by one thread, and not to be
    /// held for longer than a piece of work of some tens of microseconds: the control thread waits.
    pub fn read(&self) -> RwLockReadGuard<'_, DeviceMemory> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts another table in its place, when nobody uses the old one any more.
    pub fn replace(&self, memory: DeviceMemory) {
        let old = std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), memory);
        drop(old);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_somebody_has_to_serve_is_not_memory() {
        let file = File::open("/proc/self/status").unwrap();
        let info = RegionInfo { guest_addr: 0x1000, size: 4096, user_addr: 0, file_offset: 0 };
        let refused = DeviceMemory::default().with(info, file).unwrap_err();
        assert!(matches!(refused, MemoryError::NotMemory(0x1000)), "{refused}");
    }
}
