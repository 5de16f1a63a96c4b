//! Memory that a device reaches by its physical addresses: huge pages, because they lie in one piece, because the kernel
//! neither swaps them nor moves them elsewhere, and because a descriptor of theirs keeps them (see `binding`).

use super::error::PciError;
use crate::mapping::Mapping;
use crate::ram::Region;
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Size of a huge page, in bytes.
const HUGE: usize = 2 << 20;
/// Size of what the page map has an entry for, in bytes.
const PAGE: usize = 4096;
/// How many huge pages may be allocated beyond those set aside.
const OVERCOMMIT: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
/// If the pages that were asked for do not lie one after the other, so many times as many are looked at.
const TRIES: usize = 4;

/// Memory of at least `len` bytes, zero, at one physical address.
pub(super) fn region(len: usize) -> Result<Region, PciError> {
    let count = len.div_ceil(HUGE);
    let mut error = None;
    for factor in 1..=TRIES {
        match pages(count * factor).and_then(|pages| pages.run(count)) {
            Ok(Some(region)) => return Ok(region),
            Ok(None) => {}
            Err(Trouble::NoMemory(e)) => {
                error = Some(e);
                break;
            }
            Err(Trouble::Other(e)) => return Err(e),
        }
    }
    Err(PciError::NoMemory(count, error.unwrap_or_else(|| io::Error::other("they are scattered"))))
}

/// Why there are no pages.
enum Trouble {
    NoMemory(io::Error),
    Other(PciError),
}

/// Huge pages, each somewhere.
struct Pages {
    file: OwnedFd,
    /// Physical addresses, in the order in which the pages lie in the file.
    addresses: Vec<u64>,
}

/// Allocates huge pages.
fn pages(count: usize) -> Result<Pages, Trouble> {
    let no_memory = |errno: nix::Error| Trouble::NoMemory(errno.into());
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
    let file = memfd_create(c"dmbridge-dma", flags).map_err(no_memory)?;
    nix::unistd::ftruncate(&file, (count * HUGE) as i64).map_err(no_memory)?;
    let allocate = || fallocate(&file, FallocateFlags::empty(), 0, (count * HUGE) as i64);
    if allocate().is_err() {
        // None are set aside: most of the time the kernel can still make some, if it may.
        let _allowed = Overcommit::raise(count);
        allocate().map_err(no_memory)?;
    }
    let mapping = Mapping::of_file(file.as_fd(), 0, count * HUGE).map_err(Trouble::NoMemory)?;
    let addresses = physical_addresses(&mapping).map_err(Trouble::Other)?;
    Ok(Pages { file, addresses })
}

impl Pages {
    /// So many of them that lie one after the other, mapped in that order; the others go back.
    fn run(self, count: usize) -> Result<Option<Region>, Trouble> {
        let Some(chosen) = find_run(&self.addresses, count) else { return Ok(None) };
        let mapping = Mapping::of_file(self.file.as_fd(), 0, count * HUGE).map_err(Trouble::NoMemory)?;
        for (to, &from) in chosen.iter().enumerate() {
            mapping
                .replace(to * HUGE, HUGE, self.file.as_fd(), (from * HUGE) as u64)
                .map_err(Trouble::NoMemory)?;
        }
        for other in (0..self.addresses.len()).filter(|page| !chosen.contains(page)) {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            // If it fails, there is less memory for others.
            let _ = fallocate(&self.file, flags, (other * HUGE) as i64, HUGE as i64);
        }
        Ok(Some(Region::fixed(self.file, mapping, self.addresses[chosen[0]])))
    }
}

/// The numbers of so many pages that lie one after the other, in that order.
fn find_run(addresses: &[u64], count: usize) -> Option<Vec<usize>> {
    let mut order: Vec<usize> = (0..addresses.len()).collect();
    order.sort_by_key(|&page| addresses[page]);
    let follows = |pair: &[usize]| addresses[pair[1]] - addresses[pair[0]] == HUGE as u64;
    order.windows(count).find(|run| run.windows(2).all(follows)).map(<[usize]>::to_vec)
}

/// Where the huge pages of a mapping lie. Each has been allocated.
fn physical_addresses(mapping: &Mapping) -> Result<Vec<u64>, PciError> {
    let denied = || PciError::Permission("learn physical addresses of memory");
    let page_map = File::open("/proc/self/pagemap").map_err(PciError::os("read the page map"))?;
    (0..mapping.len() / HUGE)
        .map(|page| {
            // SAFETY: the byte lies in the mapping. Reading it makes the kernel enter the page into the page table.
            let address = unsafe {
                let byte = mapping.base().add(page * HUGE);
                byte.read_volatile();
                byte.as_ptr() as u64
            };
            let mut entry = [0; 8];
            let at = address / PAGE as u64 * size_of_val(&entry) as u64;
            page_map.read_exact_at(&mut entry, at).map_err(PciError::os("read the page map"))?;
            // Bit 63: present. Bits 0 to 54: number of the page, 0 for who may not know it.
            let entry = u64::from_ne_bytes(entry);
            let number = entry & ((1 << 55) - 1);
            if entry >> 63 == 1 && number != 0 { Ok(number * PAGE as u64) } else { Err(denied()) }
        })
        .collect()
}

/// A permission to allocate more huge pages than are set aside, as long as this lives.
struct Overcommit {
    /// Locked, so that processes of this library do not restore each other's numbers.
    file: Flock<File>,
    before: String,
}

impl Overcommit {
    fn raise(count: usize) -> Option<Overcommit> {
        let file = OpenOptions::new().write(true).open(OVERCOMMIT).ok()?;
        let file = Flock::lock(file, FlockArg::LockExclusive).ok()?;
        let before = fs::read_to_string(OVERCOMMIT).ok()?;
        let surplus = fs::read_to_string(OVERCOMMIT.replace("nr_overcommit", "surplus")).ok()?;
        let number = |text: &str| text.trim().parse::<usize>().ok();
        let raised = number(&before)?.max(number(&surplus)?) + count;
        file.write_all_at(raised.to_string().as_bytes(), 0).ok()?;
        Some(Overcommit { file, before })
    }
}

impl Drop for Overcommit {
    fn drop(&mut self) {
        // Pages that were allocated by it stay.
        let _ = self.file.write_all_at(self.before.as_bytes(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H: u64 = HUGE as u64;

    #[test]
    fn pages_that_lie_one_after_the_other_are_found_in_any_order() {
        assert_eq!(find_run(&[9 * H], 1), Some(vec![0]));
        assert_eq!(find_run(&[7 * H, 3 * H, 5 * H, 4 * H], 3), Some(vec![1, 3, 2]));
        assert_eq!(find_run(&[7 * H, 3 * H, 5 * H, 4 * H], 4), None);
        assert_eq!(find_run(&[H], 2), None);
    }

    #[test]
    fn a_region_is_zero_in_one_piece_and_as_long_as_asked_or_the_reason_is_said() {
        // A machine may have no such pages, and the user may not be root: then there is a sentence.
        match region(HUGE + 1) {
            Ok(region) => {
                assert_eq!(region.mapping().len(), 2 * HUGE);
                assert!(region.address().is_multiple_of(H));
                let addresses = physical_addresses(region.mapping()).unwrap();
                assert_eq!(addresses, [region.address(), region.address() + H]);
            }
            Err(PciError::NoMemory(2, _) | PciError::Permission(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
}
