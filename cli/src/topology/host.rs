//! The host as sysfs describes it now: NUMA nodes and work queues of Intel's Data Streaming Accelerator. What is not told is
//! left out; only a host without any node gets one that stands for all of it.

use serde::Serialize;
use std::fs;
use std::path::Path;

/// The host.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Host {
    /// Its nodes, in ascending order; at least one.
    pub nodes: Vec<Node>,
    /// Its work queues, by name.
    pub work_queues: Vec<WorkQueue>,
}

/// A NUMA node.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Its number.
    pub id: u32,
    /// Its CPUs, as a list that `taskset` takes; empty where it is memory only.
    pub cpus: String,
    /// Its memory, in bytes; 0 where it is CPUs only.
    pub memory_bytes: u64,
    /// What is free of it, in bytes.
    pub free_bytes: u64,
    /// Its distances from all nodes, in the order of the nodes; 10 from itself.
    pub distances: Vec<u32>,
}

/// A work queue of a DSA device.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct WorkQueue {
    /// As the kernel calls it: `wq0.0`.
    pub queue: String,
    /// Its device: `dsa0`.
    pub device: String,
    /// The device's node.
    pub node: Option<u32>,
    /// What the administrator called it.
    pub name: String,
    /// `dedicated` or `shared`.
    pub mode: String,
    /// `enabled` or `disabled`.
    pub state: String,
    /// Who it is for: `user`, `kernel` or `none`.
    pub r#type: String,
    /// Descriptors that it holds.
    pub size: u32,
}

impl Host {
    /// This one.
    pub fn look() -> Host {
        Host::read(Path::new("/"))
    }

    /// One whose `sys` and `proc` are in this folder.
    fn read(root: &Path) -> Host {
        let mut nodes = nodes(&root.join("sys/devices/system/node"));
        if nodes.is_empty() {
            let meminfo = text(&root.join("proc/meminfo"));
            nodes.push(Node {
                id: 0,
                cpus: text(&root.join("sys/devices/system/cpu/online")),
                memory_bytes: kilobytes(&meminfo, "MemTotal:"),
                free_bytes: kilobytes(&meminfo, "MemFree:"),
                distances: vec![10],
            });
        }
        Host { nodes, work_queues: work_queues(&root.join("sys/bus/dsa/devices")) }
    }

    /// Whether the host has this node.
    pub fn has(&self, node: u32) -> bool {
        self.nodes.iter().any(|other| other.id == node)
    }
}

fn nodes(folder: &Path) -> Vec<Node> {
    let number = |name: &str| name.strip_prefix("node")?.parse().ok();
    let mut ids: Vec<u32> = names(folder).iter().filter_map(|name| number(name)).collect();
    ids.sort_unstable();
    let node = |id: u32| {
        let file = |name: &str| text(&folder.join(format!("node{id}")).join(name));
        let meminfo = file("meminfo");
        Node {
            id,
            cpus: file("cpulist"),
            memory_bytes: kilobytes(&meminfo, "MemTotal:"),
            free_bytes: kilobytes(&meminfo, "MemFree:"),
            distances: file("distance").split_whitespace().map_while(|word| word.parse().ok()).collect(),
        }
    };
    ids.into_iter().map(node).collect()
}

fn work_queues(folder: &Path) -> Vec<WorkQueue> {
    let queue = |queue: String| {
        let (number, index) = queue.strip_prefix("wq")?.split_once('.')?;
        let order = (number.parse::<u32>().ok()?, index.parse::<u32>().ok()?);
        // Numbers are shared with other accelerators that the same driver serves.
        let device = format!("dsa{number}");
        let device_folder = folder.join(&device);
        if !device_folder.exists() {
            return None;
        }
        let file = |name: &str| text(&folder.join(&queue).join(name));
        let found = WorkQueue {
            // -1 where the firmware does not say.
            node: text(&device_folder.join("numa_node")).parse().ok(),
            device,
            name: file("name"),
            mode: file("mode"),
            state: file("state"),
            r#type: file("type"),
            size: file("size").parse().unwrap_or(0),
            queue,
        };
        Some((order, found))
    };
    let mut queues: Vec<_> = names(folder).into_iter().filter_map(queue).collect();
    queues.sort_by_key(|(order, _)| *order);
    queues.into_iter().map(|(_, queue)| queue).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn text(file: &Path) -> String {
    fs::read_to_string(file).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// `Node 0 MemTotal:       16869592 kB`, in bytes.
fn kilobytes(meminfo: &str, field: &str) -> u64 {
    let number = |line: &str| line.split_once(field)?.1.split_whitespace().next()?.parse::<u64>().ok();
    meminfo.lines().find_map(number).unwrap_or(0) << 10
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Writes files below a folder.
    fn files(root: &Path, folder: &str, files: &[(&str, &str)]) {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), format!("{text}\n")).unwrap();
        }
    }

    /// Two nodes with CPUs, one that is memory only, and two accelerators, of which one is not a DSA.
    pub fn three_nodes() -> Host {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let nodes = [
            ("node0", "0-3,8-11", "Node 0 MemTotal: 67108864 kB\nNode 0 MemFree: 1048576 kB", "10 21 17"),
            ("node1", "4-7,12-15", "Node 1 MemTotal: 67108864 kB\nNode 1 MemFree: 512 kB", "21 10 28"),
            ("node2", "", "Node 2 MemTotal: 33554432 kB\nNode 2 MemFree: 33554432 kB", "17 28 10"),
        ];
        for (name, cpus, meminfo, distance) in nodes {
            let path = format!("sys/devices/system/node/{name}");
            files(root, &path, &[("cpulist", cpus), ("meminfo", meminfo), ("distance", distance)]);
        }
        files(root, "sys/devices/system/node", &[("online", "0-2"), ("has_cpu", "0-1")]);
        files(root, "sys/bus/dsa/devices/dsa0", &[("numa_node", "0")]);
        files(root, "sys/bus/dsa/devices/dsa10", &[("numa_node", "-1")]);
        files(root, "sys/bus/dsa/devices/iax1", &[("numa_node", "1")]);
        files(root, "sys/bus/dsa/devices/engine0.0", &[]);
        for (queue, mode, state, r#type, name) in [
            ("wq0.0", "dedicated", "enabled", "user", "dmbridge"),
            ("wq0.1", "shared", "disabled", "none", ""),
            ("wq1.0", "dedicated", "enabled", "user", "compress"),
            ("wq10.0", "shared", "enabled", "kernel", "dmaengine"),
        ] {
            let of = [("mode", mode), ("state", state), ("type", r#type), ("name", name), ("size", "16")];
            files(root, &format!("sys/bus/dsa/devices/{queue}"), &of);
        }
        Host::read(root)
    }

    #[test]
    fn nodes_and_queues_are_read() {
        let host = three_nodes();
        let ids: Vec<_> = host.nodes.iter().map(|node| node.id).collect();
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!((host.nodes[1].cpus.as_str(), host.nodes[1].memory_bytes), ("4-7,12-15", 64 << 30));
        assert_eq!(
            (host.nodes[1].free_bytes, host.nodes[0].distances.as_slice()),
            (512 << 10, &[10, 21, 17][..])
        );
        let queues: Vec<_> = host.work_queues.iter().map(|q| (q.queue.as_str(), q.node)).collect();
        assert_eq!(queues, [("wq0.0", Some(0)), ("wq0.1", Some(0)), ("wq10.0", None)]);
    }

    #[test]
    fn a_host_without_nodes_is_one_node() {
        let folder = tempfile::tempdir().unwrap();
        files(folder.path(), "sys/devices/system/cpu", &[("online", "0-1")]);
        files(folder.path(), "proc", &[("meminfo", "MemTotal:  2048 kB\nMemFree:  1024 kB")]);
        let host = Host::read(folder.path());
        assert_eq!((host.nodes.len(), host.nodes[0].cpus.as_str()), (1, "0-1"));
        assert_eq!((host.nodes[0].memory_bytes, host.nodes[0].free_bytes), (2 << 20, 1 << 20));
    }

    #[test]
    fn this_host_has_cpus_and_memory() {
        let host = Host::look();
        assert!(host.nodes.iter().any(|node| !node.cpus.is_empty() && node.memory_bytes != 0), "{host:?}");
    }
}
