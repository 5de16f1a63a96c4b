//! What a daemon tells of itself (`docs/dmbridged.md`), as far as this command shows it. What an older daemon does not tell
//! is 0 or nothing.

use serde::Deserialize;

/// A device.
#[derive(Deserialize, Default)]
#[serde(default)]
pub struct Device {
    /// What people call it.
    pub name: String,
    /// Its GID, in hexadecimal.
    pub gid: String,
    /// The group that it belongs to.
    pub group: String,
    /// The front-end's process, while one is connected.
    pub peer: Option<Peer>,
    /// Whether the driver has started the device.
    pub started: bool,
    /// Whether the front-end has stopped it, and may start it again as it was.
    pub paused: bool,
    /// Whether the front-end maps.
    pub map: bool,
    /// Its NUMA node, if it is known.
    pub node: Option<u32>,
    /// How that is known: `configured`, `memory` or `cpus`.
    pub node_source: Option<String>,
    /// DMBs that it owns.
    pub dmbs: u64,
    /// DMBs of others that it has attached.
    pub attached: u64,
    /// Extents in its window.
    pub extents: u64,
    /// Their sizes together, in bytes.
    pub mapped_bytes: u64,
    /// Moves that the device did for its driver.
    pub moves: u64,
    /// Their sizes together, in bytes.
    pub moved_bytes: u64,
    /// Signals that rang.
    pub signals_sent: u64,
    /// Signals that had no need to.
    pub signals_suppressed: u64,
}

/// The process at the other end of a device's socket.
#[derive(Deserialize)]
pub struct Peer {
    /// Its number; 0 if the daemon does not see it.
    pub pid: i32,
}

impl Device {
    /// In a word or two, what it does.
    pub fn state(&self) -> &'static str {
        match (&self.peer, self.started, self.map) {
            (None, ..) => "absent",
            _ if self.paused => "paused",
            (_, false, _) => "connected",
            (_, true, true) => "maps",
            (_, true, false) => "moves only",
        }
    }

    /// Its process, if the daemon sees one.
    pub fn pid(&self) -> Option<i32> {
        self.peer.as_ref().map(|peer| peer.pid).filter(|pid| *pid != 0)
    }
}

/// A piece of the pool that belongs to a pair of devices.
#[derive(Deserialize, Default)]
#[serde(default)]
pub struct Extent {
    /// The upper half of its DMBs' tokens.
    pub id: u32,
    /// GID of who reads it.
    pub owner: String,
    /// GID of who writes it.
    pub peer: String,
    /// Its size, in bytes.
    pub bytes: u64,
    /// The setting by which it was placed.
    pub placement: String,
    /// The nodes on which its pages are to lie.
    pub nodes: Vec<u32>,
    /// Where they do lie: a sample.
    pub pages: Vec<Pages>,
}

/// Pages on a node.
#[derive(Deserialize)]
pub struct Pages {
    /// The node.
    pub node: u32,
    /// How many.
    pub pages: u64,
}

/// A size in the largest unit of which there is one, with a digit after the point.
pub fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{:.1} {}", bytes as f64 / f64::from(1 << 10).powi(unit as i32), units[unit as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(
            [0, 1023, 1024, 1536 << 10, 3 << 40].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.0 TiB"]
        );
    }
}
