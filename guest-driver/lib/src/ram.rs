//! The memory that the device reads and writes by address, "guest RAM": rings, commands, buffers to move from, DMBs
//! that lie in their owner's memory. One device's own; allocated from files, which the transport makes known to the
//! device or chooses so that it knows them. They are few, because each is as large as all before where that can be
//! had.

use crate::error::Error;
use crate::mapping::Mapping;
use crate::proto::shm::CopyPlan;
use crate::shared::SharedMemory;
use crate::sync::lock;
use crate::virtqueue::Piece;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// The first region's size, in bytes: enough for the rings of a device with one move queue.
const FIRST_REGION: usize = 512 * 1024;
/// Where the first region lies in the device's eyes; address 0 is left out so that it never looks valid.
const FIRST_ADDRESS: u64 = 1 << 20;
/// Allocations are multiples of this, in bytes.
const UNIT: usize = 64;
/// Freed pieces from this size on, in bytes, go back to the host.
const PUNCH: usize = 64 * 1024;

/// Memory of a device's driver.
#[derive(Debug, Default)]
pub(crate) struct Ram {
    regions: Mutex<Vec<Arc<Region>>>,
}

/// One file, mapped.
#[derive(Debug)]
pub(crate) struct Region {
    file: OwnedFd,
    mapping: Mapping,
    address: u64,
    /// Its pages have to stay what they are: the device knows them themselves.
    fixed: bool,
    /// What is free: offset to length. Neighbours are joined.
    free: Mutex<BTreeMap<usize, usize>>,
}

/// Makes a new region known to the device.
pub(crate) type Announce<'a> = &'a dyn Fn(&Region) -> Result<(), Error>;

impl Ram {
    /// Allocates; `align` is a power of two up to the page size. What is new is zero, what was used before is not. If a
    /// new region is needed, `announce` makes it known before anything in it is handed out.
    pub(crate) fn allocate(
        &self,
        len: usize,
        align: usize,
        announce: Announce<'_>,
    ) -> Result<DmaBuffer, Error> {
        self.allocate_from(len, align, &|_, size, address| {
            let region = Region::new(size, address)?;
            announce(&region)?;
            Ok(region)
        })
    }

    /// As [`allocate`](Self::allocate), with regions that `make` makes: of the size that is needed at least, better
    /// of the one that keeps regions few, and at the address that follows the others' if it can choose.
    pub(crate) fn allocate_from(
        &self,
        len: usize,
        align: usize,
        make: &dyn Fn(usize, usize, u64) -> Result<Region, Error>,
    ) -> Result<DmaBuffer, Error> {
        let rounded = len.max(1).checked_next_multiple_of(UNIT).ok_or_else(no_memory)?;
        let mut regions = lock(&self.regions);
        if let Some(buffer) = regions.iter().find_map(|region| region.allocate(rounded, len, align)) {
            return Ok(buffer);
        }
        let total: usize = regions.iter().map(|region| region.mapping.len()).sum();
        let size = rounded.max(total).max(FIRST_REGION).checked_next_power_of_two();
        let size = size.filter(|&size| size < 1 << 46).ok_or_else(no_memory)?;
        let address = regions.last().map_or(FIRST_ADDRESS, |last| last.address + last.mapping.len() as u64);
        let region = Arc::new(make(rounded, size, address)?);
        let buffer = region.allocate(rounded, len, align).ok_or_else(no_memory)?;
        regions.push(region);
        Ok(buffer)
    }

    /// What a descriptor names, for a device in this process.
    pub(crate) fn at(&self, piece: Piece) -> Option<SharedMemory> {
        let len = u64::from(piece.len);
        let region = self.regions().into_iter().find(|region| {
            let end = region.address + region.mapping.len() as u64;
            piece.address >= region.address && piece.address.checked_add(len).is_some_and(|to| to <= end)
        })?;
        let offset = (piece.address - region.address) as usize;
        // SAFETY: the piece lies in the region's mapping, which the region keeps.
        Some(unsafe {
            let ptr = region.mapping.base().add(offset);
            SharedMemory::new(ptr, piece.len as usize, CopyPlan::default(), region)
        })
    }

    /// Hands all regions to `each`, in the order in which they were made.
    pub(crate) fn regions(&self) -> Vec<Arc<Region>> {
        lock(&self.regions).clone()
    }
}

fn no_memory() -> Error {
    Error::Os { doing: "allocate memory", error: nix::Error::ENOMEM.into() }
}

impl Region {
    fn new(size: usize, address: u64) -> Result<Region, Error> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let file = memfd_create(c"dmbridge-ram", flags).map_err(Error::errno("make a memory file"))?;
        nix::unistd::ftruncate(&file, size as i64).map_err(Error::errno("size a memory file"))?;
        // So that the device can rely on it not being truncated under its hands.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::errno("seal a memory file"))?;
        let mapping = Mapping::of_file(file.as_fd(), 0, size).map_err(Error::os("map a memory file"))?;
        Ok(Region::over(file, mapping, address, false))
    }

    /// Memory whose pages the device knows by their own addresses, so that they have to stay.
    pub(crate) fn fixed(file: OwnedFd, mapping: Mapping, address: u64) -> Region {
        Region::over(file, mapping, address, true)
    }

    fn over(file: OwnedFd, mapping: Mapping, address: u64, fixed: bool) -> Region {
        let free = Mutex::new(BTreeMap::from([(0, mapping.len())]));
        Region { file, mapping, address, fixed, free }
    }

    pub(crate) fn file(&self) -> &OwnedFd {
        &self.file
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The device's address of its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    fn allocate(self: &Arc<Region>, rounded: usize, len: usize, align: usize) -> Option<DmaBuffer> {
        let mut free = lock(&self.free);
        let (start, size, at) = free.iter().find_map(|(&start, &size)| {
            let at = start.next_multiple_of(align);
            (at + rounded <= start + size).then_some((start, size, at))
        })?;
        free.remove(&start);
        if at != start {
            free.insert(start, at - start);
        }
        if at + rounded != start + size {
            free.insert(at + rounded, start + size - at - rounded);
        }
        let block = Arc::new(Block { region: self.clone(), offset: at, len: rounded });
        // SAFETY: the piece lies in the region's mapping, which the block keeps; it was free, so nothing else uses it.
        let memory = unsafe {
            let ptr = self.mapping.base().add(at);
            SharedMemory::new(ptr, len, CopyPlan::default(), block)
        };
        Some(DmaBuffer { memory, address: self.address + at as u64 })
    }

    fn release(&self, offset: usize, len: usize) {
        if len >= PUNCH && !self.fixed {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // If it fails, the memory stays with the process, that is all.
            let _ = fallocate(&self.file, flags, offset as i64, len as i64);
        }
        let mut free = lock(&self.free);
        let mut start = offset;
        let mut end = offset + len;
        if let Some((&before, &size)) = free.range(..offset).next_back()
            && before + size == offset
        {
            free.remove(&before);
            start = before;
        }
        if let Some(size) = free.remove(&end) {
            end += size;
        }
        free.insert(start, end - start);
    }
}

/// An allocated piece; free again when nobody keeps it.
#[derive(Debug)]
struct Block {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl Drop for Block {
    fn drop(&mut self) {
        self.region.release(self.offset, self.len);
    }
}

/// Memory that this program and its device both know: the program by [`memory`](Self::memory), the device by
/// [`address`](Self::address).
#[derive(Debug, Clone)]
pub(crate) struct DmaBuffer {
    memory: SharedMemory,
    address: u64,
}

impl DmaBuffer {
    pub(crate) fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// The device's address of its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(_: &Region) -> Result<(), Error> {
        Ok(())
    }

    #[test]
    fn what_is_freed_is_used_again_and_neighbours_join() {
        let ram = Ram::default();
        let pieces: Vec<_> = (0..8).map(|_| ram.allocate(FIRST_REGION / 8, 64, &known).unwrap()).collect();
        let first = pieces[0].address();
        assert_eq!(ram.regions().len(), 1);
        drop(pieces);
        assert_eq!(ram.allocate(FIRST_REGION, 4096, &known).unwrap().address(), first);
        assert_eq!(ram.regions().len(), 1);
    }

    #[test]
    fn pieces_do_not_overlap_and_are_aligned() {
        let ram = Ram::default();
        let sizes = [1, 64, 65, 4096, 100, 8192, 63];
        let pieces: Vec<_> =
            sizes.iter().map(|&len| (ram.allocate(len, 4096, &known).unwrap(), len)).collect();
        for (i, (a, len)) in pieces.iter().enumerate() {
            assert_eq!(a.address() % 4096, 0);
            assert_eq!(a.memory().len(), *len);
            for (b, _) in &pieces[i + 1..] {
                assert!(b.address() >= a.address() + *len as u64 || b.address() < a.address());
            }
        }
    }

    #[test]
    fn a_region_that_the_device_refused_is_not_used() {
        let ram = Ram::default();
        assert!(ram.allocate(64, 64, &|_| Err(Error::Disconnected)).is_err());
        assert!(ram.regions().is_empty());
        assert!(ram.allocate(usize::MAX, 64, &known).is_err());
        assert!(ram.allocate(1 << 50, 64, &known).is_err());
    }

    #[test]
    fn large_pieces_go_back_to_the_host() {
        let ram = Ram::default();
        let piece = ram.allocate(1 << 20, 4096, &known).unwrap();
        piece.memory().write(0, &[1; 4096]).unwrap();
        drop(piece);
        let region = &ram.regions()[0];
        assert_eq!(nix::sys::stat::fstat(region.file()).unwrap().st_blocks, 0);
    }

    #[test]
    fn regions_grow_geometrically() {
        let ram = Ram::default();
        let pieces: Vec<_> = (0..1000).map(|_| ram.allocate(256 * 1024, 4096, &known).unwrap()).collect();
        assert!(ram.regions().len() <= 10, "{} regions", ram.regions().len());
        drop(pieces);
    }
}
