//! What the control thread tells of its state, as [`Report`].

use super::Core;
use crate::fabric::ExtentView;
use crate::placement::pages::{self, Policy, Sample};
use crate::pool::memfile::MemFile;
use crate::port::Counters;
use crate::report::{
    DeviceReport, ExtentReport, NodePages, NodeReport, PeerReport, PoolReport, Report, TopologyReport,
};
use crate::session::Session;
use crate::topology::{NodeId, Topology, list_text};
use dmbridge_proto::features::Features;
use std::sync::Arc;

/// Of extents up to 2 MiB everything.
const SAMPLE: Sample = Sample { windows: 256, window_pages: 32, pages: 32 };

/// A report but for what takes longer than the control thread has.
#[derive(Debug)]
pub struct Snapshot {
    report: Report,
    /// The memory of the report's extents, in their order; none on a host with one node.
    files: Vec<Arc<MemFile>>,
}

impl Snapshot {
    /// Completes it, in the thread of whoever asked: looks where the pages of extents are.
    pub fn finish(mut self) -> Report {
        for (extent, file) in self.report.extents.iter_mut().zip(&self.files) {
            let census = pages::census(file.range(), SAMPLE).into_iter();
            extent.pages = census.map(|(node, pages)| NodePages { node: node.get(), pages }).collect();
        }
        self.report
    }
}

impl Core {
    /// How things are.
    pub fn report(&self) -> Snapshot {
        let mut views: Vec<ExtentView<'_>> = self.fabric.extents().collect();
        views.sort_by_key(|view| view.id);
        let report = Report { extents: views.iter().map(extent).collect(), ..report(self) };
        let views = views.into_iter().filter(|_| !self.fabric.topology().is_single());
        Snapshot { report, files: views.map(|view| view.file.clone()).collect() }
    }
}

fn report(core: &Core) -> Report {
    let pool = core.fabric.pool();
    let (extent_bytes, extents) = pool.used();
    let mut devices: Vec<DeviceReport> =
        core.sessions.values().map(|session| device(core, session)).collect();
    devices.extend(core.configured.iter().filter(|device| device.session.is_none()).map(|device| {
        DeviceReport {
            name: device.name.to_string(),
            gid: device.gid.to_string(),
            group: device.group.to_string(),
            ..DeviceReport::default()
        }
    }));
    devices.sort_by(|a, b| natural(&a.name).cmp(&natural(&b.name)));
    Report {
        version: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        fabric_id: core.identity.fabric_id,
        system_eid: String::from_utf8_lossy(&core.identity.system_eid).into_owned(),
        threads: threads(),
        pool: PoolReport {
            max_bytes: pool.settings().max_bytes,
            extent_bytes,
            extents,
            page_bytes: pool.settings().huge_pages.unwrap_or(4096),
            placement: pool.settings().placement.to_string(),
        },
        devices,
        topology: topology(core.fabric.topology()),
        extents: Vec::new(),
        engines: core.engines.report(),
    }
}

fn topology(topology: &Topology) -> TopologyReport {
    let node = |node: &crate::topology::Node| NodeReport {
        id: node.id.get(),
        cpus: list_text(&node.cpus),
        memory_bytes: node.memory_bytes,
        distances: node.distances.clone(),
    };
    TopologyReport { nodes: topology.nodes().iter().map(node).collect() }
}

fn extent(view: &ExtentView<'_>) -> ExtentReport {
    let nodes = match view.file.policy() {
        Policy::FirstTouch => &[][..],
        Policy::Prefer(node) => std::slice::from_ref(node),
        Policy::Interleave(nodes) => nodes,
    };
    ExtentReport {
        id: view.id.get(),
        owner: view.owner.to_string(),
        peer: view.peer.to_string(),
        bytes: view.file.size(),
        placement: view.placement.to_string(),
        nodes: nodes.iter().copied().map(NodeId::get).collect(),
        pages: Vec::new(),
    }
}

fn device(core: &Core, session: &Session) -> DeviceReport {
    let usage = session.device.and_then(|device| core.fabric.usage(device)).unwrap_or_default();
    let device = session.device.and_then(|id| core.fabric.device(id));
    let capabilities = device.map(|device| device.capabilities);
    let whereabouts = device.and_then(|device| device.whereabouts);
    let sent = session.channel.as_ref().map(|channel| channel.sent()).unwrap_or_default();
    let counters = &session.port.counters;
    DeviceReport {
        name: session.name.to_string(),
        gid: session.gid.to_string(),
        group: session.group.to_string(),
        peer: session.peer.as_ref().map(|peer| PeerReport { pid: peer.pid, uid: peer.uid }),
        started: session.device.is_some(),
        paused: session.paused.is_some(),
        node: whereabouts.map(|at| at.node.get()),
        node_source: whereabouts.map(|at| at.source.as_str().into()),
        map: capabilities.is_some_and(|c| c.map),
        futex: session.device.is_some() && session.accepted().contains(Features::FUTEX),
        dmbs: usage.dmbs,
        dmb_bytes: usage.dmb_bytes,
        attached: usage.attached,
        extents: usage.extents,
        mapped_bytes: usage.mapped_bytes,
        moves: Counters::get(&counters.moves),
        moves_refused: Counters::get(&counters.refused),
        moved_bytes: Counters::get(&counters.bytes),
        signals_sent: Counters::get(&counters.rung).saturating_add(usage.signals.rung),
        signals_suppressed: Counters::get(&counters.suppressed).saturating_add(usage.signals.suppressed),
        events_waiting: session.port.events().waiting() as u32,
        commands: session.commands,
        map_requests: sent.maps,
        unmap_requests: sent.unmaps,
    }
}

/// Orders `hub-9` before `hub-10`.
fn natural(name: &str) -> (&str, u64) {
    let digits = name.bytes().rev().take_while(u8::is_ascii_digit).count();
    let (text, number) = name.split_at(name.len() - digits);
    (text, number.parse().unwrap_or(0))
}

/// Threads of this process.
fn threads() -> u32 {
    std::fs::read_dir("/proc/self/task").map_or(0, |tasks| tasks.count() as u32)
}
