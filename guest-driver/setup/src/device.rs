//! The guest's dmbridge devices, as the kernel module shows them in sysfs.

use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One device.
#[derive(Debug, Clone, Serialize)]
pub struct Device {
    /// Its name on the virtio bus.
    pub name: String,
    /// Its GID.
    pub gid: String,
    /// `map`, `move`, or `broken`.
    pub mode: String,
    /// The system EID of its host.
    pub eid: String,
    /// What the driver counted.
    pub counters: BTreeMap<String, u64>,
}

impl Device {
    /// All that the module drives.
    pub fn all() -> Vec<Device> {
        let Ok(entries) = fs::read_dir("/sys/bus/virtio/drivers/dmbridge") else { return Vec::new() };
        let mut devices: Vec<_> = entries.flatten().filter_map(|entry| Device::at(&entry.path())).collect();
        devices.sort_by(|a, b| a.name.cmp(&b.name));
        devices
    }

    fn at(folder: &Path) -> Option<Device> {
        let read = |name| fs::read_to_string(folder.join(name)).ok();
        let line = |name| read(name).map(|text: String| text.trim_end_matches('\n').to_string());
        let counters = read("stats")?
            .lines()
            .filter_map(|line| line.split_once(' '))
            .filter_map(|(name, value)| Some((name.to_string(), value.parse().ok()?)))
            .collect();
        let name = folder.file_name()?.to_string_lossy().into_owned();
        Some(Device { name, gid: line("gid")?, mode: line("mode")?, eid: line("eid")?, counters })
    }
}
