//! What a daemon is told to do: the fabric, the pool, the devices and their limits, the hub.
//!
//! Plain values and the rules that they have to keep ([`Settings::check`]). How they are written in a file or on a
//! command line is the program's business, not this file's.

use crate::engine::set::EngineSettings;
use crate::hub::HubSettings;
use crate::placement::{NumaSettings, Placement};
use dmbridge_proto::extent::Geometry;
use dmbridge_proto::ids::Gid;
use dmbridge_proto::{GRANULE, MAX_QUEUE_SIZE};
use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The fabric that devices are on unless told otherwise.
pub const DEFAULT_FABRIC_ID: u16 = 0x0d3b;
/// The group of devices for which none is named.
pub const DEFAULT_GROUP: &str = "default";
/// Fabric ids from here on mean "emulated" to Linux, and 128-bit GIDs.
const FABRIC_ID_END: u16 = 0xff00;
/// Stock QEMU aborts near 510 mappings; beyond 256 each takes it many milliseconds.
const MAX_MAPPINGS: u32 = 480;

/// Everything that a daemon is told.
#[derive(Debug)]
pub struct Settings {
    /// The fabric, below 0xFF00 (dibs: fabric id; SMC: CHID).
    pub fabric_id: u16,
    /// The host's EID for SMC-Dv2: 32 ASCII characters, of which those at 24 and 28 are not both `0`.
    pub system_eid: [u8; 32],
    /// The memory of pool DMBs.
    pub pool: PoolSettings,
    /// Number of threads that serve move queues, at least 1.
    pub movers: usize,
    /// What copies.
    pub engines: EngineSettings,
    /// The devices that exist from the start.
    pub devices: Vec<DeviceSettings>,
    /// The socket on which every connection gets a fresh device.
    pub hub: Option<HubSettings>,
    /// The socket of the control API.
    pub control: Option<PathBuf>,
}

/// The memory of pool DMBs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolSettings {
    /// The most memory that all extents may take together, in bytes.
    pub max_bytes: u64,
    /// Take huge pages of this size, in bytes.
    pub huge_pages: Option<u64>,
    /// On which NUMA node extents are to lie, where the owner's device says nothing else.
    pub placement: Placement,
}

/// A device that exists from the start.
#[derive(Debug)]
pub struct DeviceSettings {
    /// What people call it; unique.
    pub name: String,
    /// Where its front-end connects.
    pub endpoint: Endpoint,
    /// The devices that it can see are those of the same group.
    pub group: String,
    /// Its GID; a random one if none is given.
    pub gid: Option<Gid>,
    /// What it may use.
    pub limits: Limits,
    /// On which NUMA node it is, and its extents are to lie.
    pub numa: NumaSettings,
}

/// Where a device's front-end connects.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket that the daemon makes there and listens on.
    Path(PathBuf),
    /// A connected vhost-user socket.
    Fd(OwnedFd),
}

/// What one device may use (`docs/device.md`, 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Size of the window, in bytes: a power of two, because it becomes a PCI BAR.
    pub window_size: u64,
    /// The largest DMB, in bytes.
    pub max_dmb_size: u64,
    /// Sum of the sizes of all DMBs that the device owns, in bytes.
    pub max_dmb_bytes: u64,
    /// Number of DMBs that the device owns.
    pub max_dmbs: u32,
    /// Most segments of a RAM DMB, and data descriptors of a move.
    pub max_segments: u32,
    /// Most data bytes of a move.
    pub max_move_size: u64,
    /// Most extents mapped into the window at a time: each is a memory slot of the VMM.
    pub max_mappings: u32,
    /// Number of move queues.
    pub move_queues: u16,
    /// Control commands per second; more are delayed. 0: unlimited.
    pub commands_per_second: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            window_size: 1 << 30,
            max_dmb_size: 512 << 20,
            max_dmb_bytes: 1 << 30,
            max_dmbs: 4096,
            max_segments: 256,
            max_move_size: 16 << 20,
            max_mappings: 256,
            move_queues: 1,
            commands_per_second: 0,
        }
    }
}

impl Default for PoolSettings {
    /// Half of the host's memory, in ordinary pages.
    fn default() -> PoolSettings {
        PoolSettings { max_bytes: host_memory_bytes() / 2, huge_pages: None, placement: Placement::default() }
    }
}

impl Default for Settings {
    /// No device and no hub yet.
    fn default() -> Settings {
        Settings {
            fabric_id: DEFAULT_FABRIC_ID,
            system_eid: system_eid(),
            pool: PoolSettings::default(),
            movers: 1,
            engines: EngineSettings::default(),
            devices: Vec::new(),
            hub: None,
            control: None,
        }
    }
}

/// A setting that cannot be, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A value outside of its range.
    #[error("{key} = {value} is not possible; {rule}")]
    Value {
        /// The setting, as the configuration file calls it.
        key: &'static str,
        /// What it was set to.
        value: String,
        /// What it may be.
        rule: String,
    },
    /// Two devices with one name or GID, or two of whatever with one socket.
    #[error("the {what} {value} is there twice; give each its own")]
    Twice {
        /// Of what there are two.
        what: &'static str,
        /// The value that both have.
        value: String,
    },
    /// Neither a device nor a hub.
    #[error(
        "there is nothing to serve; name a device (--socket-path, --fd or [[device]]) or a hub (--hub or [hub])"
    )]
    Nothing,
}

impl SettingsError {
    /// The setting that is wrong, as the configuration file calls it; empty if it is not a single one.
    pub fn key(&self) -> &'static str {
        match self {
            SettingsError::Value { key, .. } => key,
            SettingsError::Twice { .. } | SettingsError::Nothing => "",
        }
    }
}

fn value<T: ToString>(key: &'static str, value: T, rule: impl Into<String>) -> SettingsError {
    SettingsError::Value { key, value: value.to_string(), rule: rule.into() }
}

/// `Ok` if `is` lies in `range`, else what to choose from.
fn range<T: PartialOrd + ToString + Copy>(
    key: &'static str,
    is: T,
    least: T,
    most: T,
) -> Result<(), SettingsError> {
    if is >= least && is <= most {
        return Ok(());
    }
    Err(value(key, is, format!("choose {} to {}", least.to_string(), most.to_string())))
}

/// The same for a number of bytes.
fn size_range(key: &'static str, is: u64, least: u64, most: u64) -> Result<(), SettingsError> {
    if (least..=most).contains(&is) {
        return Ok(());
    }
    Err(value(key, size_text(is), format!("choose {} to {}", size_text(least), size_text(most))))
}

/// A number of bytes as people write it: with the largest unit of which it is a multiple.
fn size_text(bytes: u64) -> String {
    let unit = if bytes == 0 { 0 } else { (bytes.trailing_zeros() / 10).min(4) };
    format!("{}{}", bytes >> (10 * unit), ["", "K", "M", "G", "T"][unit as usize])
}

/// Where the kernel has what it knows of huge pages, in a folder for each size.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";

/// Number of huge pages of this size, in bytes, that are set aside on this host; `None` if it has none of this size.
pub(crate) fn reserved_huge_pages(size: u64) -> Option<u64> {
    let path = format!("{HUGE_PAGES}/hugepages-{}kB/nr_hugepages", size >> 10);
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Sizes of huge pages that this host has, in bytes.
fn huge_page_sizes() -> Vec<u64> {
    let names = std::fs::read_dir(HUGE_PAGES).into_iter().flatten().flatten();
    let size = |name: &str| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok();
    let mut sizes: Vec<_> =
        names.filter_map(|name| size(name.file_name().to_str()?)).map(|kib| kib << 10).collect();
    sizes.sort_unstable();
    sizes
}

impl Settings {
    /// Checks everything that can be checked without opening anything.
    pub fn check(&self) -> Result<(), SettingsError> {
        if self.devices.is_empty() && self.hub.is_none() {
            return Err(SettingsError::Nothing);
        }
        check_fabric_id(self.fabric_id)?;
        check_system_eid(&self.system_eid)?;
        check_movers(self.movers)?;
        check_workers(self.engines.workers.unwrap_or(0))?;
        self.pool.check()?;
        let mut seen = HashSet::new();
        let mut once = |what: &'static str, value: String| match seen.insert((what, value.clone())) {
            true => Ok(()),
            false => Err(SettingsError::Twice { what, value }),
        };
        for device in &self.devices {
            device.limits.check()?;
            check_group(&device.group)?;
            if device.name.is_empty() {
                return Err(value("name", "\"\"", "give each device one"));
            }
            once("name", device.name.clone())?;
            if let Endpoint::Path(path) = &device.endpoint {
                once("socket", socket(path)?)?;
            }
            if let Some(gid) = device.gid {
                once("GID", gid.to_string())?;
            }
        }
        for path in self.hub.iter().map(|hub| &hub.socket).chain(&self.control) {
            once("socket", socket(path)?)?;
        }
        self.hub.as_ref().map_or(Ok(()), HubSettings::check)
    }
}

impl PoolSettings {
    /// Checks that extents can be made from it.
    pub fn check(&self) -> Result<(), SettingsError> {
        if let Some(size) = self.huge_pages
            && reserved_huge_pages(size).is_none()
        {
            let rule = match huge_page_sizes().as_slice() {
                [] => "this host has no huge pages; leave it out".to_owned(),
                sizes => {
                    let sizes: Vec<_> = sizes.iter().map(|size| size_text(*size)).collect();
                    format!(
                        "this host has huge pages of {}; choose from these, or leave it out",
                        sizes.join(", ")
                    )
                }
            };
            return Err(value("huge_pages", size_text(size), rule));
        }
        size_range("max_bytes", self.max_bytes, 2 << 20, 1 << 47)
    }
}

impl Limits {
    /// Checks each limit, and that the largest DMB fits into the window.
    pub fn check(&self) -> Result<(), SettingsError> {
        size_range("window_size", self.window_size, 2 << 20, 1 << 43)?;
        if !self.window_size.is_power_of_two() {
            return Err(value("window_size", size_text(self.window_size), "choose a power of two"));
        }
        size_range("max_dmb_size", self.max_dmb_size, GRANULE, 1 << 43)?;
        if !self.max_dmb_size.is_multiple_of(GRANULE) {
            return Err(value("max_dmb_size", self.max_dmb_size, "choose a multiple of 4096"));
        }
        let needed = Geometry::with_room_for(self.max_dmb_size).map_or(u64::MAX, Geometry::size);
        if needed > self.window_size {
            let rule = format!("such a DMB needs a window_size of {}", size_text(needed));
            return Err(value("max_dmb_size", size_text(self.max_dmb_size), rule));
        }
        size_range("max_dmb_bytes", self.max_dmb_bytes, self.max_dmb_size, 1 << 47)?;
        range("max_dmbs", self.max_dmbs, 1, 1 << 20)?;
        range("max_segments", self.max_segments, 1, u32::from(MAX_QUEUE_SIZE))?;
        size_range("max_move_size", self.max_move_size, 1, 1 << 40)?;
        range("max_mappings", self.max_mappings, 1, MAX_MAPPINGS)?;
        range("move_queues", self.move_queues, 1, 64)
    }
}

/// A number of threads that serve move queues.
pub fn check_movers(number: usize) -> Result<(), SettingsError> {
    range("movers", number, 1, 64)
}

/// A number of threads of a node that copy.
pub fn check_workers(number: usize) -> Result<(), SettingsError> {
    range("workers", number, 0, 64)
}

/// The path of a socket as text, if it is one.
fn socket(path: &Path) -> Result<String, SettingsError> {
    if path.as_os_str().is_empty() {
        return Err(value("socket", "\"\"", "give the path at which to make it"));
    }
    Ok(path.display().to_string())
}

/// A fabric id that Linux takes for a real device's.
pub fn check_fabric_id(id: u16) -> Result<(), SettingsError> {
    range("fabric id", id, 1, FABRIC_ID_END - 1)
}

/// An EID that Linux takes for a system that can SMC-Dv2.
pub fn check_system_eid(eid: &[u8; 32]) -> Result<(), SettingsError> {
    let characters = eid.iter().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || b"-._".contains(c));
    if characters && (eid[24] != b'0' || eid[28] != b'0') {
        return Ok(());
    }
    let rule = "choose 32 of A-Z, 0-9, '-', '.' and '_', of which the 25th and the 29th are not both 0";
    Err(value("system_eid", format!("{:?}", String::from_utf8_lossy(eid)), rule))
}

/// A group's name that a person can read in a table.
pub fn check_group(group: &str) -> Result<(), SettingsError> {
    if (1..=64).contains(&group.len()) && group.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    Err(value("group", format!("{group:?}"), "choose 1 to 64 visible ASCII characters without spaces"))
}

/// The host's memory in bytes, or 4 GiB if it does not tell.
fn host_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(4u64 << 20) << 10
}

/// This host's EID: the same for every daemon and every boot of it, and most likely no other host's.
fn system_eid() -> [u8; 32] {
    let name = ["/etc/machine-id", "/proc/sys/kernel/random/boot_id"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok().filter(|id| !id.trim().is_empty()))
        .unwrap_or_default();
    eid_from(name.trim())
}

/// 20 characters that are always the same, then 12 hexadecimal digits of the host's name.
fn eid_from(host: &str) -> [u8; 32] {
    let mut eid = *b"DMBRIDGE-SYSTEM-EID-000000000000";
    // A hash, because a machine id is not to be told to guests.
    let hash = Sha256::digest([b"dmbridge system EID of ", host.as_bytes()].concat());
    let nibbles = hash.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    for (character, nibble) in eid[20..].iter_mut().zip(nibbles) {
        *character = b"0123456789ABCDEF"[usize::from(nibble)];
    }
    if eid[24] == b'0' {
        eid[24] = b'G';
    }
    eid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_what_the_documentation_says_and_pass_the_check() {
        let limits = Limits::default();
        assert_eq!(limits.check(), Ok(()));
        assert_eq!((limits.window_size, limits.max_dmb_size), (1 << 30, 1 << 29));
        assert_eq!(PoolSettings::default().check(), Ok(()));
        assert_eq!(Settings::default().check(), Err(SettingsError::Nothing));
    }

    #[test]
    fn a_hosts_eid_is_one_that_linux_takes_and_differs_from_another_hosts() {
        for host in ["", "4c4c4544-0042", "x"] {
            assert_eq!(check_system_eid(&eid_from(host)), Ok(()), "{host}");
        }
        assert_ne!(eid_from("a"), eid_from("b"));
        assert_eq!(eid_from("a"), eid_from("a"));
        assert!((0..100).all(|i| eid_from(&i.to_string())[24] != b'0'));
        assert!(check_system_eid(b"DMBRIDGE-TEST-EID-00000000000000").is_err());
    }

    #[test]
    fn a_limit_out_of_range_says_what_to_choose() {
        let error = |change: fn(&mut Limits)| {
            let mut limits = Limits::default();
            change(&mut limits);
            limits.check().unwrap_err().to_string()
        };
        assert_eq!(
            error(|l| l.window_size = 3 << 20),
            "window_size = 3M is not possible; choose a power of two"
        );
        assert_eq!(error(|l| l.max_mappings = 500), "max_mappings = 500 is not possible; choose 1 to 480");
        assert!(error(|l| l.max_dmb_size = 1 << 30).ends_with("needs a window_size of 2G"));
        assert!(error(|l| l.max_dmb_size = 4097).ends_with("choose a multiple of 4096"));
        assert!(error(|l| l.move_queues = 0).starts_with("move_queues = 0"));
    }

    #[test]
    fn two_devices_with_one_socket_are_refused() {
        let device = |name: &str| DeviceSettings {
            name: name.into(),
            endpoint: Endpoint::Path("/run/a.sock".into()),
            group: DEFAULT_GROUP.into(),
            gid: None,
            limits: Limits::default(),
            numa: NumaSettings::default(),
        };
        let settings = Settings { devices: vec![device("a"), device("b")], ..Settings::default() };
        assert_eq!(
            settings.check().unwrap_err().to_string(),
            "the socket /run/a.sock is there twice; give each its own"
        );
    }
}
