//! Where a device is: the node of its front-end's memory, else of its CPUs. A guess from samples, for placement only;
//! nothing depends on its being right.

use super::pages::{self, Census, Range, Sample};
use crate::memory::DeviceMemory;
use crate::pool::memfile;
use crate::topology::{NodeId, Topology, list};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use vm_memory::guest_memory::GuestMemoryBackend;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

/// The most regions of a front-end's memory that are looked at, the largest first.
const REGIONS: usize = 8;
/// How much is looked at in one region if it is the only one.
const SAMPLE: Sample = Sample { windows: 64, window_pages: 128, pages: 8 };
/// From so many pages on a sample counts. A process that has touched fewer may have nothing but rings in its memory, and
/// those the daemon may have touched first.
const LEAST_PAGES: u64 = 32;
/// The most threads of a process that are looked at.
const THREADS: usize = 64;

/// The node of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whereabouts {
    /// The node.
    pub node: NodeId,
    /// How it is known.
    pub source: Source,
}

/// How a device's node is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The configuration says so.
    Configured,
    /// Most of its front-end's memory is there.
    Memory,
    /// Its front-end's threads run there.
    Cpus,
}

impl Source {
    /// For reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Configured => "configured",
            Source::Memory => "memory",
            Source::Cpus => "cpus",
        }
    }
}

/// A device's node: as configured, else learned, which takes some hundreds of microseconds. `None`: it is spread over
/// several, or nothing is known, or the host has but one.
pub fn locate(
    topology: &Topology,
    configured: Option<NodeId>,
    memory: &DeviceMemory,
    pid: i32,
) -> Option<Whereabouts> {
    if topology.is_single() {
        return None;
    }
    if let Some(node) = configured {
        return Some(Whereabouts { node, source: Source::Configured });
    }
    let of_memory = || node_of_memory(&memory_census(memory));
    let of_cpus = || node_of_process(topology, Path::new("/proc"), pid);
    let by = |source| move |node| Whereabouts { node, source };
    of_memory().map(by(Source::Memory)).or_else(|| of_cpus().map(by(Source::Cpus)))
}

/// The node of two thirds and more.
fn majority(census: &Census) -> Option<NodeId> {
    let all: u64 = census.values().sum();
    census.iter().find(|(_, count)| **count != 0 && **count * 3 >= all * 2).map(|(node, _)| *node)
}

/// The node of a front-end's memory, if that is enough to tell.
fn node_of_memory(census: &Census) -> Option<NodeId> {
    majority(census).filter(|_| census.values().sum::<u64>() >= LEAST_PAGES)
}

/// A sample of a front-end's own memory.
fn memory_census(memory: &DeviceMemory) -> Census {
    let mut regions: Vec<&GuestRegionMmap> = memory.guest().iter().filter(|region| is_own(region)).collect();
    regions.sort_by_key(|region| std::cmp::Reverse(region.len()));
    regions.truncate(REGIONS);
    let sample = Sample { windows: SAMPLE.windows.div_ceil(regions.len().max(1)), ..SAMPLE };
    let mut census = Census::new();
    for region in regions {
        for (node, pages) in pages::census(Range { start: region.as_ptr(), len: region.len() }, sample) {
            *census.entry(node).or_default() += pages;
        }
    }
    census
}

/// Whether a region is the front-end's own memory. What the daemon itself had it map lies where the daemon placed it; and
/// a file of any other file system is not looked at, because its pages may be served by somebody who takes his time.
fn is_own(region: &GuestRegionMmap) -> bool {
    let Some(file) = region.file_offset().map(|offset| offset.file()) else { return false };
    let memory = fstatfs(file).map(|fs| [TMPFS_MAGIC, HUGETLBFS_MAGIC].contains(&fs.filesystem_type()));
    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default();
    let name = link.to_string_lossy();
    memory == Ok(true) && !name.strip_prefix("/memfd:").is_some_and(|name| name.starts_with(memfile::NAME))
}

/// The node of a process: of the CPUs that it may run on, if that is one; else where its threads ran last, each counted
/// by the time that it has run.
fn node_of_process(topology: &Topology, proc: &Path, pid: i32) -> Option<NodeId> {
    let process = proc.join(pid.to_string());
    let status = fs::read_to_string(process.join("status")).ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut nodes: Vec<_> =
        list(allowed).ok()?.into_iter().filter_map(|cpu| topology.node_of_cpu(cpu)).collect();
    nodes.dedup();
    if let [node] = nodes[..] {
        return Some(node);
    }
    let mut census = Census::new();
    for thread in fs::read_dir(process.join("task")).ok()?.flatten().take(THREADS) {
        let ran = fs::read_to_string(thread.path().join("stat")).ok().and_then(|stat| last_run(&stat));
        if let Some((cpu, ticks)) = ran
            && let Some(node) = topology.node_of_cpu(cpu)
        {
            *census.entry(node).or_default() += ticks + 1;
        }
    }
    majority(&census)
}

/// The CPU on which a thread ran last, and for how many ticks it has run, from its `stat` (proc(5)).
fn last_run(stat: &str) -> Option<(u32, u64)> {
    /// Numbers in proc(5), counted from 1; the third follows the name, which may hold anything.
    const UTIME: usize = 14 - 3;
    const STIME: usize = 15 - 3;
    const PROCESSOR: usize = 39 - 3;
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_whitespace().collect();
    let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
    let ticks = number(UTIME)?.saturating_add(number(STIME)?).min(u64::from(u32::MAX));
    Some((u32::try_from(number(PROCESSOR)?).ok()?, ticks))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Guest, host};

    fn node(number: u32) -> NodeId {
        NodeId::new(number).unwrap()
    }

    fn two_nodes() -> Topology {
        host(&[("0-3", 4096, "10 20"), ("4-7", 4096, "20 10")])
    }

    /// A process as `/proc` shows it: the CPUs that it may run on, and of each thread the last CPU and the time.
    fn node_of(allowed: &str, threads: &[(u32, u64)]) -> Option<NodeId> {
        let proc = tempfile::tempdir().unwrap();
        let process = proc.path().join("42");
        for (number, (cpu, ticks)) in threads.iter().enumerate() {
            let folder = process.join("task").join(number.to_string());
            fs::create_dir_all(&folder).unwrap();
            let stat = format!(
                "42 (a) b (c) S 1 42 42 0 -1 4194560 9 0 0 0 {ticks} 0 0 0 20 0 1 0 5 6 7 8 9 1 1 0 0 0 0 0 0 0 0 0 17 {cpu} 0 0 0 0 0\n"
            );
            fs::write(folder.join("stat"), stat).unwrap();
        }
        fs::create_dir_all(&process).unwrap();
        fs::write(process.join("status"), format!("Name:\tx\nCpus_allowed_list:\t{allowed}\n")).unwrap();
        node_of_process(&two_nodes(), proc.path(), 42)
    }

    #[test]
    fn a_process_that_may_run_on_one_node_only_is_there() {
        assert_eq!(node_of("5-7", &[(0, 100)]), Some(node(1)));
    }

    #[test]
    fn a_process_that_may_run_anywhere_is_where_its_threads_spend_their_time() {
        assert_eq!(node_of("0-7", &[(0, 10), (5, 1000), (6, 1000), (1, 0)]), Some(node(1)));
        assert_eq!(node_of("0-7", &[(0, 0)]), Some(node(0)));
    }

    #[test]
    fn a_process_that_is_spread_or_gone_is_nowhere() {
        assert_eq!(node_of("0-7", &[(0, 1000), (5, 1000)]), None);
        assert_eq!(node_of("0-7", &[(99, 1000)]), None);
        assert_eq!(node_of_process(&two_nodes(), Path::new("/nowhere"), 42), None);
    }

    #[test]
    fn this_process_is_somewhere_on_this_host() {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let (cpu, _) = last_run(&stat).unwrap();
        assert!(Topology::of_host() == Topology::single() || Topology::of_host().node_of_cpu(cpu).is_some());
    }

    #[test]
    fn a_front_ends_memory_counts_as_far_as_it_was_touched() {
        let guest = Guest::new(1 << 20);
        assert_eq!(memory_census(&guest.table()).values().sum::<u64>(), 0);
        guest.put(&[1; 5 * 4096]);
        assert_eq!(memory_census(&guest.table()).values().sum::<u64>(), 5);
    }

    #[test]
    fn memory_tells_where_a_front_end_is_once_enough_of_it_was_touched() {
        let guest = Guest::new(16 << 20);
        let mut seen = Vec::new();
        for megabytes in [1, 7] {
            guest.put(&vec![1; megabytes << 20]);
            seen.push(node_of_memory(&memory_census(&guest.table())));
        }
        assert_eq!(seen[0], None);
        // Unless this host spreads the pages of this thread over several nodes.
        assert!(Topology::of_host().nodes().len() > 1 || seen[1] == Some(node(0)), "{seen:?}");
    }

    #[test]
    fn what_the_daemon_placed_does_not_count_as_the_front_ends() {
        use crate::memory::RegionInfo;
        use crate::pool::memfile::MemFile;
        let extent = MemFile::new(1 << 20, None, &Default::default()).unwrap();
        extent.zero(0, 4096);
        let info = RegionInfo { guest_addr: 0, size: 1 << 20, user_addr: 0, file_offset: 0 };
        let file = extent.fd().try_clone_to_owned().unwrap().into();
        let table = DeviceMemory::default().with(info, file).unwrap();
        assert_eq!(memory_census(&table).len(), 0);
    }

    #[test]
    fn two_thirds_are_a_majority() {
        let census = |a, b| Census::from([(node(0), a), (node(1), b)]);
        assert_eq!(majority(&census(1, 2)), Some(node(1)));
        assert_eq!(majority(&census(10, 11)), None);
        assert_eq!(majority(&Census::new()), None);
    }
}
