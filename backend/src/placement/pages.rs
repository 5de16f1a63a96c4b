//! Pages of shared memory and NUMA nodes: telling the kernel where they are to lie, and asking it where they lie. Only the
//! system calls (`mbind`, `mincore`, `move_pages`); what is wanted is decided elsewhere.

use crate::topology::{MAX_NODES, NodeId};
use std::collections::BTreeMap;
use std::{io, ptr};

/// Where pages that do not exist yet are to be taken from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Policy {
    /// The node of the CPU that touches them first, as without any policy.
    #[default]
    FirstTouch,
    /// This node, and when it is full the nearest that is not.
    Prefer(NodeId),
    /// One node after the other.
    Interleave(Vec<NodeId>),
}

/// Pages by node, of those that were looked at.
pub type Census = BTreeMap<NodeId, u64>;

/// How much of a range is looked at.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// So many pieces, evenly spread.
    pub windows: usize,
    /// So many pages of each piece are looked for.
    pub window_pages: usize,
    /// So many pages of each piece, the first that exist, are asked about: one after the other, because every eighth page
    /// of an interleaved range lies on the same node.
    pub pages: usize,
}

/// A range of this process's address space that shows a file in memory.
#[derive(Debug, Clone, Copy)]
pub struct Range {
    /// Its address, aligned to `page`.
    pub start: *mut u8,
    /// Its length, in bytes.
    pub len: u64,
}

/// The kernel asks for one bit more than it uses.
const MASK_BITS: usize = MAX_NODES as usize + 1;
const MASK_WORDS: usize = MASK_BITS.div_ceil(64);
const PAGE: usize = 4096;
/// Since Linux 5.14.
const MADV_POPULATE_READ: libc::c_int = 22;

/// Makes a policy that of the file that a shared mapping shows: a file in memory keeps it for whoever touches a page
/// first, in whichever process or guest. Pages that exist stay where they are.
///
/// Preferred, not bound: when a bound-to node is full, the kernel ends some process to make room there, and that would be
/// somebody's virtual machine. With a preferred node the pages lie elsewhere, which costs speed and shows in reports.
pub fn set_policy(range: Range, policy: &Policy) -> io::Result<()> {
    let (mode, nodes): (libc::c_int, &[NodeId]) = match policy {
        Policy::FirstTouch => return Ok(()),
        Policy::Prefer(node) => (libc::MPOL_PREFERRED, std::slice::from_ref(node)),
        Policy::Interleave(nodes) => (libc::MPOL_INTERLEAVE, nodes),
    };
    let mut mask = [0u64; MASK_WORDS];
    for node in nodes {
        mask[node.get() as usize / 64] |= 1 << (node.get() % 64);
    }
    // SAFETY: the call changes no content of the range, and reads `MASK_BITS` bits of the mask, which has as many.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            range.start,
            range.len,
            mode,
            mask.as_ptr(),
            MASK_BITS as libc::c_ulong,
            0,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Counts a sample of a range's pages by node. Pages that do not exist are not counted, and are not made, unless they end
/// while they are counted. What is behind the range may vanish meanwhile.
pub fn census(range: Range, sample: Sample) -> Census {
    let mut census = Census::new();
    let total = usize::try_from(range.len).unwrap_or(usize::MAX) / PAGE;
    let windows = sample.windows.min(total.div_ceil(sample.window_pages.max(1)));
    let mut there = vec![0u8; sample.window_pages.min(total)];
    let mut addresses: Vec<*mut u8> = Vec::with_capacity(sample.pages);
    for window in 0..windows {
        // Multiplied before it is divided, so that the windows are spread to the end.
        let first = (total as u128 * window as u128 / windows as u128) as usize;
        let count = there.len().min(total - first);
        let start = range.start.wrapping_add(first * PAGE);
        // SAFETY: only asks about `count` pages, and writes a byte for each into `there`, which is as long at least.
        if unsafe { libc::mincore(start.cast(), count * PAGE, there.as_mut_ptr()) } != 0 {
            continue;
        }
        let existing = (0..count).filter(|page| there[*page] & 1 != 0).take(sample.pages);
        addresses.clear();
        addresses.extend(existing.map(|page| start.wrapping_add(page * PAGE)));
        count_nodes(&addresses, &mut census);
    }
    census
}

fn count_nodes(addresses: &[*mut u8], census: &mut Census) {
    // `move_pages` knows only pages that this process has mapped, and others may have made these.
    for run in addresses.chunk_by(|a, b| a.wrapping_add(PAGE) == *b) {
        // SAFETY: reads the pages into our page tables; whatever is wrong with them is an error, not a signal.
        unsafe { libc::madvise(run[0].cast(), run.len() * PAGE, MADV_POPULATE_READ) };
    }
    let mut nodes = vec![-libc::ENOENT; addresses.len()];
    // SAFETY: without a list of nodes the call moves nothing. It reads `addresses` and writes as many of `nodes`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len() as libc::c_ulong,
            addresses.as_ptr(),
            ptr::null::<libc::c_int>(),
            nodes.as_mut_ptr(),
            0,
        )
    };
    if result != 0 {
        return;
    }
    for node in nodes.iter().filter_map(|node| NodeId::new(u32::try_from(*node).ok()?)) {
        *census.entry(node).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::memfile::MemFile;

    const ALL: Sample = Sample { windows: 64, window_pages: 128, pages: 128 };

    /// A file, and this many of its pages made by somebody else.
    fn file(pages: u64) -> MemFile {
        use std::os::unix::fs::FileExt;
        let file = MemFile::new(1 << 20, None, &Policy::FirstTouch).unwrap();
        let theirs = std::fs::File::from(file.fd().try_clone_to_owned().unwrap());
        theirs.write_all_at(&vec![1; pages as usize * PAGE], 0).unwrap();
        file
    }

    #[test]
    fn pages_are_counted_that_others_made_and_none_is_made() {
        let file = file(100);
        let counted: u64 = census(file.range(), ALL).values().sum();
        assert_eq!(counted, 100);
        let metadata = std::fs::File::from(file.fd().try_clone_to_owned().unwrap()).metadata().unwrap();
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&metadata) * 512, 100 * PAGE as u64);
    }

    #[test]
    fn a_sample_is_no_larger_than_it_was_meant_to_be() {
        let file = file(256);
        let sample = Sample { windows: 4, window_pages: 16, pages: 3 };
        assert_eq!(census(file.range(), sample).values().sum::<u64>(), 12);
    }

    #[test]
    fn a_policy_of_nodes_that_exist_is_taken_and_others_are_an_error() {
        let file = file(0);
        let host = crate::topology::Topology::of_host();
        let nodes: Vec<_> = host.with_memory().collect();
        set_policy(file.range(), &Policy::FirstTouch).unwrap();
        set_policy(file.range(), &Policy::Prefer(nodes[0])).unwrap();
        set_policy(file.range(), &Policy::Interleave(nodes)).unwrap();
        let nowhere = NodeId::new(MAX_NODES - 1).unwrap();
        assert!(set_policy(file.range(), &Policy::Prefer(nowhere)).is_err());
    }

    #[test]
    fn memory_that_vanishes_is_not_counted_and_harms_nobody() {
        let file = std::fs::File::from(
            nix::sys::memfd::memfd_create(c"vanishing", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap(),
        );
        file.set_len(1 << 20).unwrap();
        // SAFETY: a new mapping of the file.
        let start = unsafe {
            use std::os::fd::AsRawFd;
            libc::mmap(ptr::null_mut(), 1 << 20, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        file.set_len(0).unwrap();
        let addresses: Vec<_> = (0..4).map(|page| start.cast::<u8>().wrapping_add(page * PAGE)).collect();
        let mut counted = Census::new();
        count_nodes(&addresses, &mut counted);
        assert_eq!(counted.len(), 0);
        assert_eq!(census(Range { start: start.cast(), len: 1 << 20 }, ALL).len(), 0);
        // SAFETY: the mapping from above, which nobody uses any more.
        unsafe { libc::munmap(start, 1 << 20) };
    }
}
