//! The picture: a tree for each node, with what lies on it.

use std::fmt::Write;

use super::Report;
use super::host::{Host, Node, WorkQueue};
use crate::report::{Device, Extent, bytes};

/// A line, and those that belong to it.
struct Branch {
    line: String,
    below: Vec<Branch>,
}

/// The whole text.
pub fn text(host: &Host, report: Option<&Report>) -> String {
    let mut out = String::new();
    if let Some(report) = report {
        let _ = writeln!(
            out,
            "dmbridged {}, pid {}: {}, {}\n",
            report.version,
            report.pid,
            number(report.devices.len(), "device"),
            number(report.extents.len(), "extent")
        );
    }
    if host.nodes.len() > 1 {
        distances(host, &mut out);
    }
    // The daemon does not ask where anything is if there is but one place.
    let only = (host.nodes.len() == 1).then(|| host.nodes[0].id);
    for node in &host.nodes {
        let is_here = |place: Option<u32>| place.or(only) == Some(node.id);
        tree(&Branch { line: node_line(node), below: below(host, report, is_here) }, &mut out);
    }
    let nowhere = below(host, report, |place| place.or(only).is_none_or(|node| !host.has(node)));
    if !nowhere.is_empty() {
        tree(
            &Branch { line: "on no node, or on several, or not known".to_owned(), below: nowhere },
            &mut out,
        );
    }
    out
}

/// What there is in a place.
fn below(host: &Host, report: Option<&Report>, is_here: impl Fn(Option<u32>) -> bool) -> Vec<Branch> {
    let queues = host.work_queues.iter().filter(|queue| is_here(queue.node));
    let mut branches: Vec<Branch> =
        queues.map(|queue| Branch { line: queue_line(queue), below: Vec::new() }).collect();
    let Some(report) = report else { return branches };
    for device in report.devices.iter().filter(|device| is_here(device.node)) {
        let owned = report.extents.iter().filter(|extent| extent.owner == device.gid);
        let below = owned.map(|extent| Branch { line: extent_line(extent, report), below: Vec::new() });
        branches.push(Branch { line: device_line(device), below: below.collect() });
    }
    branches
}

fn distances(host: &Host, out: &mut String) {
    let _ = write!(out, "distances");
    for node in &host.nodes {
        let _ = write!(out, "{:>5}", node.id);
    }
    for node in &host.nodes {
        let _ = write!(out, "\n{:>9}", node.id);
        for distance in &node.distances {
            let _ = write!(out, "{distance:>5}");
        }
    }
    out.push_str("\n\n");
}

fn node_line(node: &Node) -> String {
    let cpus = match node.cpus.as_str() {
        "" => "no CPUs".to_owned(),
        list if list.contains([',', '-']) => format!("CPUs {list}"),
        one => format!("CPU {one}"),
    };
    let memory = match node.memory_bytes {
        0 => "no memory".to_owned(),
        memory => format!("{}, {} free", bytes(memory), bytes(node.free_bytes)),
    };
    format!("node {}: {cpus}; {memory}", node.id)
}

fn queue_line(queue: &WorkQueue) -> String {
    let whose = match queue.r#type.as_str() {
        "user" => "for programs",
        "kernel" => "for the kernel",
        _ => "for nobody yet",
    };
    let name = if queue.name.is_empty() { String::new() } else { format!(" \"{}\"", queue.name) };
    format!(
        "{} queue {}{name}: {}, {} entries, {whose}, {}",
        queue.device, queue.queue, queue.mode, queue.size, queue.state
    )
}

fn device_line(device: &Device) -> String {
    let mut line = format!("device {} ({}), {}", device.name, device.gid, device.state());
    if let Some(pid) = device.pid() {
        let _ = write!(line, ", pid {pid}");
    }
    let known = match device.node_source.as_deref() {
        Some("configured") => "; here by configuration",
        Some("memory") => "; here by its memory",
        Some("cpus") => "; here by its CPUs",
        _ => "",
    };
    line + known
}

fn extent_line(extent: &Extent, report: &Report) -> String {
    let writer = report.devices.iter().find(|device| device.gid == extent.peer);
    let writer = match writer {
        Some(device) => match device.node {
            Some(node) => format!("{} on node {node}", device.name),
            None => device.name.clone(),
        },
        None => extent.peer.clone(),
    };
    let mut line = format!("extent {}, {}, written by {writer}", extent.id, bytes(extent.bytes));
    if !extent.placement.is_empty() {
        let _ = write!(line, "; placed by {}", extent.placement);
    }
    if !extent.nodes.is_empty() {
        let nodes: Vec<_> = extent.nodes.iter().map(u32::to_string).collect();
        let _ = write!(line, " on {} {}", if nodes.len() == 1 { "node" } else { "nodes" }, nodes.join(", "));
    }
    let all: u64 = extent.pages.iter().map(|pages| pages.pages).sum();
    if all != 0 {
        let share = |pages: u64| format!("{:.0} %", pages as f64 * 100.0 / all as f64);
        let shares: Vec<_> =
            extent.pages.iter().map(|p| format!("{} on node {}", share(p.pages), p.node)).collect();
        let _ = write!(line, "; its pages lie {}", shares.join(", "));
    }
    line
}

fn number(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn tree(root: &Branch, out: &mut String) {
    out.push_str(&root.line);
    out.push('\n');
    branches(&root.below, "", out);
}

fn branches(all: &[Branch], indent: &str, out: &mut String) {
    for (i, branch) in all.iter().enumerate() {
        let (knee, below) = if i + 1 == all.len() { ("└─ ", "   ") } else { ("├─ ", "│  ") };
        let _ = writeln!(out, "{indent}{knee}{}", branch.line);
        branches(&branch.below, &format!("{indent}{below}"), out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::host::tests::three_nodes;
    use super::*;
    use serde_json::json;

    fn report() -> Report {
        let device = |name: &str, gid: &str, node: Option<u32>, source: Option<&str>| {
            json!({ "name": name, "gid": gid, "group": "default", "started": true, "map": true, "node": node,
                "node_source": source, "peer": { "pid": 77, "uid": 0 } })
        };
        serde_json::from_value(json!({
            "version": "1.2.3", "pid": 4, "fabric_id": 1,
            "devices": [
                device("web", "0f3c", Some(0), Some("memory")),
                device("db", "77a1", Some(1), Some("configured")),
                device("wide", "9", None, None),
            ],
            "extents": [{ "id": 1, "owner": "0f3c", "peer": "77a1", "bytes": 2 << 20, "placement": "receiver",
                "nodes": [0], "pages": [{ "node": 0, "pages": 450 }, { "node": 2, "pages": 50 }] }],
        }))
        .unwrap()
    }

    #[test]
    fn a_host_with_nodes_queues_devices_and_extents_is_drawn() {
        let expected = "\
dmbridged 1.2.3, pid 4: 3 devices, 1 extent

distances    0    1    2
        0   10   21   17
        1   21   10   28
        2   17   28   10

node 0: CPUs 0-3,8-11; 64.0 GiB, 1.0 GiB free
├─ dsa0 queue wq0.0 \"dmbridge\": dedicated, 16 entries, for programs, enabled
├─ dsa0 queue wq0.1: shared, 16 entries, for nobody yet, disabled
└─ device web (0f3c), maps, pid 77; here by its memory
   └─ extent 1, 2.0 MiB, written by db on node 1; placed by receiver on node 0; its pages lie 90 % on node 0, 10 % on node 2
node 1: CPUs 4-7,12-15; 64.0 GiB, 512.0 KiB free
└─ device db (77a1), maps, pid 77; here by configuration
node 2: no CPUs; 32.0 GiB, 32.0 GiB free
on no node, or on several, or not known
├─ dsa10 queue wq10.0 \"dmaengine\": shared, 16 entries, for the kernel, enabled
└─ device wide (9), maps, pid 77
";
        assert_eq!(text(&three_nodes(), Some(&report())), expected);
    }

    #[test]
    fn on_a_host_with_one_node_all_is_there() {
        let mut host = three_nodes();
        host.nodes.truncate(1);
        host.work_queues.clear();
        let mut report = report();
        report.devices.retain(|device| device.name == "wide");
        report.extents.clear();
        let expected = "\
dmbridged 1.2.3, pid 4: 1 device, 0 extents

node 0: CPUs 0-3,8-11; 64.0 GiB, 1.0 GiB free
└─ device wide (9), maps, pid 77
";
        assert_eq!(text(&host, Some(&report)), expected);
        assert_eq!(text(&host, None), "node 0: CPUs 0-3,8-11; 64.0 GiB, 1.0 GiB free\n");
    }
}
