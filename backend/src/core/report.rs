//! What the control thread tells of its state, as [`Report`](crate::report::Report).

use super::Core;
use crate::port::Counters;
use crate::report::{DeviceReport, PeerReport, PoolReport, Report};
use crate::session::Session;
use dmbridge_proto::features::Features;

impl Core {
    /// How things are.
    pub fn report(&self) -> Report {
        report(self)
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
        },
        devices,
    }
}

fn device(core: &Core, session: &Session) -> DeviceReport {
    let usage = session.device.and_then(|device| core.fabric.usage(device)).unwrap_or_default();
    let capabilities = session.device.and_then(|id| core.fabric.device(id)).map(|d| d.capabilities);
    let sent = session.channel.as_ref().map(|channel| channel.sent()).unwrap_or_default();
    let counters = &session.port.counters;
    DeviceReport {
        name: session.name.to_string(),
        gid: session.gid.to_string(),
        group: session.group.to_string(),
        peer: session.peer.as_ref().map(|peer| PeerReport { pid: peer.pid, uid: peer.uid }),
        started: session.device.is_some(),
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
