//! The host's NUMA nodes, as sysfs describes them: their CPUs, their memory, how far they are from one another. Not where
//! anything of a device lies (`placement`).
//!
//! Read once, when the daemon starts: nodes that are plugged in later are used after a restart.

use std::fmt;
use std::io;
use std::path::Path;

/// Nodes have numbers below this: the most that Linux can be built for.
pub const MAX_NODES: u32 = 1024;
/// Where Linux tells.
const SYSFS: &str = "/sys/devices/system/node";
/// What firmware tables call the distance of a node from itself.
const LOCAL_DISTANCE: u32 = 10;

/// A NUMA node of the host, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(u32);

impl NodeId {
    /// The node with this number, if there can be one.
    pub fn new(number: u32) -> Option<NodeId> {
        (number < MAX_NODES).then_some(NodeId(number))
    }

    /// Its number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its CPUs, in ascending order; none where it is memory only.
    pub cpus: Vec<u32>,
    /// Its memory, in bytes; 0 where it is CPUs only.
    pub memory_bytes: u64,
    /// Its distance from every node, in the order of the nodes; 10 from itself.
    pub distances: Vec<u32>,
}

/// The nodes of a host. There is always one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topology {
    nodes: Vec<Node>,
}

impl Topology {
    /// This host's; a single node if it does not tell.
    pub fn of_host() -> Topology {
        Topology::read(Path::new(SYSFS)).unwrap_or_else(|error| {
            // A kernel without NUMA has no such folder.
            tracing::debug!("{SYSFS}: {error}; the host counts as one node");
            Topology::single()
        })
    }

    /// One node with no details.
    pub fn single() -> Topology {
        let node = Node { id: NodeId(0), cpus: Vec::new(), memory_bytes: 0, distances: vec![LOCAL_DISTANCE] };
        Topology { nodes: vec![node] }
    }

    /// Reads a folder that is laid out as `/sys/devices/system/node`.
    pub fn read(folder: &Path) -> io::Result<Topology> {
        let online = list(&std::fs::read_to_string(folder.join("online"))?)?;
        let nodes = online.iter().map(|number| Node::read(folder, *number, online.len()));
        let nodes = nodes.collect::<io::Result<Vec<_>>>()?;
        if nodes.is_empty() {
            return Err(invalid("no node is online"));
        }
        Ok(Topology { nodes })
    }

    /// The nodes, in ascending order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Whether there is nothing to choose.
    pub fn is_single(&self) -> bool {
        self.nodes.len() == 1
    }

    /// Whether the host has this node.
    pub fn has(&self, id: NodeId) -> bool {
        self.position(id).is_some()
    }

    /// The node of a CPU.
    pub fn node_of_cpu(&self, cpu: u32) -> Option<NodeId> {
        self.nodes.iter().find(|node| node.cpus.binary_search(&cpu).is_ok()).map(|node| node.id)
    }

    /// Nodes with memory.
    pub fn with_memory(&self) -> impl Iterator<Item = NodeId> {
        self.nodes.iter().filter(|node| node.memory_bytes != 0).map(|node| node.id)
    }

    /// The node with memory that is nearest to a node: itself, unless it is CPUs only.
    pub fn memory_near(&self, id: NodeId) -> Option<NodeId> {
        let distances = &self.nodes[self.position(id)?].distances;
        let candidates = self.nodes.iter().zip(distances).filter(|(node, _)| node.memory_bytes != 0);
        candidates.min_by_key(|(node, distance)| (node.id != id, **distance)).map(|(node, _)| node.id)
    }

    fn position(&self, id: NodeId) -> Option<usize> {
        self.nodes.iter().position(|node| node.id == id)
    }
}

impl Node {
    fn read(folder: &Path, number: u32, nodes: usize) -> io::Result<Node> {
        let id = NodeId::new(number).ok_or_else(|| invalid("a node's number is too large"))?;
        let folder = folder.join(format!("node{id}"));
        let read = |name| std::fs::read_to_string(folder.join(name));
        let distances: Vec<u32> =
            read("distance")?.split_whitespace().map_while(|word| word.parse().ok()).collect();
        if distances.len() != nodes {
            return Err(invalid("a node does not have a distance from each node"));
        }
        Ok(Node {
            id,
            cpus: list(&read("cpulist")?)?,
            memory_bytes: memory_bytes(&read("meminfo")?),
            distances,
        })
    }
}

/// `Node 0 MemTotal:       16869592 kB`
fn memory_bytes(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != "MemTotal:");
        words.nth(1)?.parse::<u64>().ok()
    });
    total.unwrap_or(0) << 10
}

/// The numbers of a list as the kernel writes it: `0-3,8,10-11`.
pub fn list(text: &str) -> io::Result<Vec<u32>> {
    /// More than any host has CPUs.
    const MOST: u32 = 1 << 16;
    let number = |text: &str| {
        text.parse::<u32>()
            .ok()
            .filter(|n| *n < MOST)
            .ok_or_else(|| invalid("a list of the kernel is not a list"))
    };
    let mut numbers = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        numbers.extend(number(first)?..=number(last)?);
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Ascending numbers as the kernel, `taskset` and `numactl` write them: `0-3,8,10-11`.
pub fn list_text(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|a, b| a + 1 == *b);
    let texts: Vec<String> = runs
        .map(|run| match run {
            [first, .., last] => format!("{first}-{last}"),
            [only] => only.to_string(),
            [] => String::new(),
        })
        .collect();
    texts.join(",")
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::host;

    fn node(number: u32) -> NodeId {
        NodeId::new(number).unwrap()
    }

    #[test]
    fn this_host_has_a_node_with_memory_and_this_cpu() {
        let host = Topology::of_host();
        assert!(!host.nodes().is_empty());
        if host != Topology::single() {
            assert!(host.with_memory().next().is_some());
            assert!(host.node_of_cpu(nix::sched::sched_getcpu().unwrap() as u32).is_some());
        }
    }

    #[test]
    fn nodes_are_read_with_cpus_memory_and_distances() {
        let host = host(&[("0-3,8-11", 4096, "10 21"), ("4-7,12-15", 2048, "21 10")]);
        assert!(!host.is_single());
        assert_eq!(host.nodes()[1].cpus, [4, 5, 6, 7, 12, 13, 14, 15]);
        assert_eq!(host.nodes()[0].memory_bytes, 4096 << 10);
        assert_eq!(host.nodes()[1].distances, [21, 10]);
        assert_eq!((host.node_of_cpu(9), host.node_of_cpu(12)), (Some(node(0)), Some(node(1))));
        assert_eq!(host.node_of_cpu(16), None);
        assert_eq!((host.has(node(1)), host.has(node(2))), (true, false));
    }

    #[test]
    fn a_node_without_memory_takes_the_nearest_that_has_some() {
        // Two sockets, of which one has no memory, and memory without CPUs that is nearer to that one.
        let host = host(&[("0-1", 4096, "10 20 40"), ("2-3", 0, "20 10 17"), ("", 2048, "40 17 10")]);
        assert_eq!(host.memory_near(node(0)), Some(node(0)));
        assert_eq!(host.memory_near(node(1)), Some(node(2)));
        assert_eq!(host.memory_near(node(2)), Some(node(2)));
        assert_eq!(host.memory_near(node(3)), None);
        assert_eq!(host.with_memory().collect::<Vec<_>>(), [node(0), node(2)]);
    }

    #[test]
    fn a_folder_that_says_nonsense_is_an_error_and_no_panic() {
        assert!(Topology::read(Path::new("/nowhere")).is_err());
        for online in ["", "x", "0-", "5-4", "0-99999999", "2000"] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("online"), online).unwrap();
            assert!(Topology::read(folder.path()).is_err(), "{online:?}");
        }
    }

    #[test]
    fn lists_are_read_and_written_as_the_kernel_does() {
        for text in ["", "0", "0-3", "0-3,8,10-11"] {
            assert_eq!(list_text(&list(&format!("{text}\n")).unwrap()), text);
        }
        assert!(list("1,a").is_err() && list("-").is_err());
    }
}
