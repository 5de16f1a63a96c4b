//! What the daemon tells of itself: the JSON of the control API (`docs/dmbridged.md`).
//!
//! A public interface: names stay, fields are only added. Every number says its unit in its name or is a count. Counters
//! count from the moment that the device's front-end connected, and are for people, not for accounting.

use serde::{Deserialize, Serialize};

/// Everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Version of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// The fabric, as a number below 0xFF00.
    pub fabric_id: u16,
    /// The host's EID for SMC-Dv2.
    pub system_eid: String,
    /// Threads of the daemon. Their number does not depend on the number of devices.
    pub threads: u32,
    /// The memory of pool DMBs.
    pub pool: PoolReport,
    /// The devices, by name.
    pub devices: Vec<DeviceReport>,
    /// The host's NUMA nodes.
    #[serde(default)]
    pub topology: TopologyReport,
    /// The extents, by id.
    #[serde(default)]
    pub extents: Vec<ExtentReport>,
    /// What copies.
    #[serde(default)]
    pub engines: EnginesReport,
}

/// The engines: what each takes for a copy on this host, and which is used for what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnginesReport {
    /// `measured` when the daemon started, or `cached`: measured at an earlier start, and tried again at this one.
    pub origin: String,
    /// What finding and measuring them took, in microseconds.
    pub took_microseconds: u64,
    /// The engines.
    pub engines: Vec<EngineReport>,
    /// Which one is used, by source, destination and size.
    pub rows: Vec<EngineRow>,
}

/// An engine.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineReport {
    /// `cpu`, `cpu-node.N` or `dsa.N`.
    pub name: String,
    /// Its NUMA node. Absent for the CPU that serves the queue, which is anywhere.
    pub node: Option<u32>,
    /// Its threads.
    pub workers: u32,
    /// Of an accelerator: descriptors that met a page that was not there, and were finished by a CPU.
    pub faults: u64,
    /// Descriptors that ended in an error; a CPU copied instead.
    pub errors: u64,
    /// Descriptors for which its queue had no room; a CPU copied instead.
    pub busy: u64,
    /// Whether it did not answer, and is not used any more.
    pub lost: bool,
    /// Copies that it did: moves, or pieces of long ones.
    pub copies: u64,
    /// Their sizes together, in bytes.
    pub bytes: u64,
}

/// Copies of about a size between two nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineRow {
    /// The node that the data comes from.
    pub source_node: u32,
    /// The node that it goes to.
    pub destination_node: u32,
    /// The size of the move that was measured, in bytes. The row counts for sizes from half of it on.
    pub bytes: u64,
    /// The engine that is used.
    pub engine: String,
    /// Why: `measurement` (at start), `trial` (since) or `configuration`.
    pub chosen_by: String,
    /// Moves by this row.
    pub uses: u64,
    /// What each engine took at start.
    pub costs: Vec<EngineCost>,
}

/// What an engine takes for a copy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineCost {
    /// The engine.
    pub engine: String,
    /// From its submission until it is visible, in nanoseconds.
    pub nanoseconds: u64,
}

/// The host's NUMA nodes, as they were when the daemon started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopologyReport {
    /// The nodes, in ascending order.
    pub nodes: Vec<NodeReport>,
}

/// A NUMA node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    /// Its number.
    pub id: u32,
    /// Its CPUs, as a list that `taskset` and `numactl` take: `0-3,8-11`.
    pub cpus: String,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Its distances from all nodes, in the order of the nodes; 10 from itself.
    pub distances: Vec<u32>,
}

/// An extent: where its pages are to lie, and where they do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentReport {
    /// The upper half of the tokens of its DMBs.
    pub id: u32,
    /// GID of the device that owns it and reads it.
    pub owner: String,
    /// GID of the device that writes it.
    pub peer: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// The placement that counted when it was made: `receiver`, `sender`, `interleave`, or a node's number.
    pub placement: String,
    /// The nodes that its pages are to lie on. None: the node of whichever CPU touches a page first.
    pub nodes: Vec<u32>,
    /// Where they do lie: a sample of at most some thousands of those that exist. Empty on a host with one node.
    pub pages: Vec<NodePages>,
}

/// Pages on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePages {
    /// The node.
    pub node: u32,
    /// How many, in units of 4096 bytes.
    pub pages: u64,
}

/// The memory of pool DMBs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolReport {
    /// The most that all extents may take, in bytes.
    pub max_bytes: u64,
    /// What all extents take of it, in bytes: address space; memory is taken as it is written.
    pub extent_bytes: u64,
    /// Number of extents.
    pub extents: u32,
    /// Size of the pages, in bytes.
    pub page_bytes: u64,
    /// Where extents lie whose owners say nothing else: `receiver`, `sender`, `interleave`, or a node's number.
    #[serde(default)]
    pub placement: String,
}

/// One device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceReport {
    /// As configured, or `hub-<n>`.
    pub name: String,
    /// GID in hexadecimal.
    pub gid: String,
    /// The group that it belongs to.
    pub group: String,
    /// The front-end's process; absent while none is connected.
    pub peer: Option<PeerReport>,
    /// Whether the driver has started the device.
    pub started: bool,
    /// Whether the front-end has stopped it, and may start it again as it was.
    #[serde(default)]
    pub paused: bool,
    /// The NUMA node that it is on. Absent while it is not known, if it is spread, and on a host with one node.
    #[serde(default)]
    pub node: Option<u32>,
    /// How that is known: `configured`, from the pages of its `memory`, or from the `cpus` of its process.
    #[serde(default)]
    pub node_source: Option<String>,
    /// Whether the front-end can map, and the driver accepted it.
    pub map: bool,
    /// Whether the driver waits and wakes by futex.
    pub futex: bool,
    /// DMBs that it owns.
    pub dmbs: u32,
    /// Their sizes together, in bytes.
    pub dmb_bytes: u64,
    /// DMBs of others that it has attached.
    pub attached: u32,
    /// Extents in its window.
    pub extents: u32,
    /// Their sizes together, in bytes.
    pub mapped_bytes: u64,
    /// Moves that the device did for its driver.
    pub moves: u64,
    /// Moves that it refused.
    pub moves_refused: u64,
    /// Bytes that it moved, in bytes.
    pub moved_bytes: u64,
    /// Signals of this sender that rang: by the device, and as counted in the control lines of DMBs that it writes.
    pub signals_sent: u64,
    /// Signals that had no need to ring, counted likewise.
    pub signals_suppressed: u64,
    /// Events that wait for buffers of the event queue.
    pub events_waiting: u32,
    /// Control commands answered.
    pub commands: u64,
    /// `SHMEM_MAP` requests sent to the front-end.
    pub map_requests: u64,
    /// `SHMEM_UNMAP` requests sent to the front-end.
    pub unmap_requests: u64,
}

/// The process at the other end of a device's socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    /// Process id; 0 if it is not visible from the daemon's PID namespace.
    pub pid: i32,
    /// User id.
    pub uid: u32,
}
