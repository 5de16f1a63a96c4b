//! The configuration file: TOML as `docs/dmbridged.md` describes it, into [`Settings`].
//!
//! Every error names the file, the line and the key, and says what to do.

use crate::size::Size;
use dmbridge_proto::ids::Gid;
use dmbridged::engine::set::EngineSettings;
use dmbridged::engine::{cache, table};
use dmbridged::hub::{HubRule, HubSettings, Verdict};
use dmbridged::placement::{NumaSettings, Placement};
use dmbridged::settings::{
    DEFAULT_GROUP, DeviceSettings, Endpoint, Limits, PoolSettings, Settings, SettingsError, check_fabric_id,
    check_group, check_movers, check_system_eid, check_workers,
};
use dmbridged::topology::{NodeId, Topology, list_text};
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;

/// A configuration file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("{path}: cannot read the configuration file: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A line is wrong.
    #[error("{path}, line {line}: {message}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// The key, what is wrong with it, and what to do.
        message: String,
    },
}

/// Reads a file. What it does not say is as in [`Settings::default`].
pub fn read(path: &Path) -> Result<Settings, FileError> {
    let text = std::fs::read_to_string(path).map_err(|error| FileError::Read { path: path.into(), error })?;
    parse(&text).map_err(|wrong| {
        let line = text[..wrong.at.min(text.len())].matches('\n').count() + 1;
        FileError::Line { path: path.into(), line, message: wrong.message }
    })
}

/// The settings without a file: as in [`Settings::default`], and what was measured is kept.
pub fn defaults() -> Settings {
    let engines = EngineSettings { cache: cache::default_path(), ..EngineSettings::default() };
    Settings { engines, ..Settings::default() }
}

/// Something wrong at a byte of the text.
#[derive(Debug)]
struct Wrong {
    at: usize,
    message: String,
}

impl Wrong {
    fn new(at: Range<usize>, message: impl ToString) -> Wrong {
        Wrong { at: at.start, message: message.to_string() }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    fabric: Fabric,
    #[serde(default)]
    daemon: Daemon,
    #[serde(default)]
    pool: Pool,
    #[serde(default)]
    engines: Engines,
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    device: Vec<Device>,
    hub: Option<Hub>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Fabric {
    id: Option<Spanned<u16>>,
    system_eid: Option<Spanned<String>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Daemon {
    movers: Option<Spanned<usize>>,
    control: Option<PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Pool {
    max_bytes: Option<Spanned<Size>>,
    huge_pages: Option<Spanned<Size>>,
    placement: Option<Spanned<toml::Value>>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Engines {
    workers: Option<Spanned<usize>>,
    dsa: Option<Vec<String>>,
    cache: Option<PathBuf>,
    #[serde(default)]
    rule: Vec<EngineRule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EngineRule {
    at_least: Option<Size>,
    engine: Spanned<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    window_size: Option<Spanned<Size>>,
    max_dmb_size: Option<Spanned<Size>>,
    max_dmb_bytes: Option<Spanned<Size>>,
    max_dmbs: Option<Spanned<u32>>,
    max_segments: Option<Spanned<u32>>,
    max_move_size: Option<Spanned<Size>>,
    max_mappings: Option<Spanned<u32>>,
    move_queues: Option<Spanned<u16>>,
    commands_per_second: Option<Spanned<u32>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    name: String,
    socket: PathBuf,
    group: Option<Spanned<String>>,
    gid: Option<Spanned<String>>,
    node: Option<Spanned<u32>>,
    placement: Option<Spanned<toml::Value>>,
    engine: Option<Spanned<String>>,
    #[serde(default)]
    limits: LimitsTable,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Hub {
    socket: PathBuf,
    mode: Option<Spanned<u32>>,
    max_devices: Option<usize>,
    max_devices_per_user: Option<usize>,
    node: Option<Spanned<u32>>,
    placement: Option<Spanned<toml::Value>>,
    engine: Option<Spanned<String>>,
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    rule: Vec<Spanned<Rule>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    uid: Option<u32>,
    user: Option<String>,
    gid: Option<u32>,
    user_group: Option<String>,
    group: Option<String>,
    #[serde(default)]
    refuse: bool,
}

fn parse(text: &str) -> Result<Settings, Wrong> {
    let file: File = toml::from_str(text).map_err(|error| syntax(text, &error))?;
    let mut settings = Settings {
        pool: file.pool.settings()?,
        control: file.daemon.control,
        engines: file.engines.settings()?,
        ..Settings::default()
    };
    if let Some(movers) = file.daemon.movers {
        check_movers(*movers.get_ref()).map_err(|e| Wrong::new(movers.span(), e))?;
        settings.movers = movers.into_inner();
    }
    if let Some(id) = file.fabric.id {
        check_fabric_id(*id.get_ref()).map_err(|e| Wrong::new(id.span(), e))?;
        settings.fabric_id = id.into_inner();
    }
    if let Some(eid) = file.fabric.system_eid {
        settings.system_eid = system_eid(eid.get_ref()).map_err(|e| Wrong::new(eid.span(), e))?;
    }
    let limits = file.limits.over(Limits::default(), None)?;
    for device in file.device {
        settings.devices.push(device.settings(limits, &file.limits)?);
    }
    settings.hub = file.hub.map(|hub| hub.settings(limits, &file.limits)).transpose()?;
    Ok(settings)
}

/// An error of the TOML parser in one sentence.
fn syntax(text: &str, error: &toml::de::Error) -> Wrong {
    let span = error.span().unwrap_or(0..0);
    let start = text[..span.start].rfind('\n').map_or(0, |newline| newline + 1);
    let message = error.message().trim().replace('\n', ", ");
    // A value that does not fit is told without its key: the key is in front of it.
    let message = match text[start..span.start].split_once('=') {
        Some((key, _)) if !message.contains("field") => format!("{}: {message}", key.trim()),
        _ => message,
    };
    Wrong::new(span, message)
}

fn system_eid(text: &str) -> Result<[u8; 32], SettingsError> {
    let eid: [u8; 32] = text.as_bytes().try_into().map_err(|_| SettingsError::Value {
        key: "system_eid",
        value: format!("{text:?}"),
        rule: format!("choose exactly 32 characters, these are {}", text.len()),
    })?;
    check_system_eid(&eid).map(|()| eid)
}

/// On which node a device is, its extents are to lie, and what copies its moves.
fn numa(
    node: Option<&Spanned<u32>>,
    place: Option<&Spanned<toml::Value>>,
    kind: Option<&Spanned<String>>,
) -> Result<NumaSettings, Wrong> {
    let node = node.map(|node| {
        host_node((*node.get_ref()).into()).map_err(|e| Wrong::new(node.span(), format!("node = {e}")))
    });
    Ok(NumaSettings {
        node: node.transpose()?,
        placement: place.map(placement).transpose()?,
        engine: kind.map(engine).transpose()?,
    })
}

fn engine(kind: &Spanned<String>) -> Result<table::Kind, Wrong> {
    kind.get_ref().parse().map_err(|e| Wrong::new(kind.span(), format!("engine = {e}")))
}

fn placement(value: &Spanned<toml::Value>) -> Result<Placement, Wrong> {
    const RULE: &str = "choose \"receiver\", \"sender\", \"interleave\", or the number of a node";
    let placement = match value.get_ref() {
        toml::Value::String(name) if name == "receiver" => Ok(Placement::Receiver),
        toml::Value::String(name) if name == "sender" => Ok(Placement::Sender),
        toml::Value::String(name) if name == "interleave" => Ok(Placement::Interleave),
        toml::Value::Integer(number) => host_node(*number).map(Placement::Node),
        other => Err(format!("{other} is not possible; {RULE}")),
    };
    placement.map_err(|e| Wrong::new(value.span(), format!("placement = {e}")))
}

/// A node that this host has.
fn host_node(number: i64) -> Result<NodeId, String> {
    let host = Topology::of_host();
    let node = u32::try_from(number).ok().and_then(NodeId::new).filter(|node| host.has(*node));
    node.ok_or_else(|| {
        let there: Vec<u32> = host.nodes().iter().map(|node| node.id.get()).collect();
        format!("{number}: this host has no such node; choose from {}", list_text(&there))
    })
}

impl Pool {
    fn settings(&self) -> Result<PoolSettings, Wrong> {
        let mut pool = PoolSettings::default();
        if let Some(bytes) = &self.max_bytes {
            pool.max_bytes = bytes.get_ref().0;
        }
        pool.huge_pages = self.huge_pages.as_ref().map(|size| size.get_ref().0);
        pool.placement = self.placement.as_ref().map(placement).transpose()?.unwrap_or_default();
        let at = |key| if key == "huge_pages" { &self.huge_pages } else { &self.max_bytes };
        pool.check().map_err(|e| Wrong::new(at(e.key()).as_ref().map_or(0..0, Spanned::span), e))?;
        Ok(pool)
    }
}

impl Engines {
    fn settings(self) -> Result<EngineSettings, Wrong> {
        let mut engines = defaults().engines;
        if let Some(workers) = &self.workers {
            check_workers(*workers.get_ref()).map_err(|e| Wrong::new(workers.span(), e))?;
            engines.workers = Some(*workers.get_ref());
        }
        engines.dsa = self.dsa;
        if let Some(path) = self.cache {
            engines.cache = Some(path).filter(|path| !path.as_os_str().is_empty());
        }
        for rule in self.rule {
            let at_least = rule.at_least.map_or(0, |size| size.0);
            engines.rules.push(table::Rule { at_least, kind: engine(&rule.engine)? });
        }
        Ok(engines)
    }
}

impl LimitsTable {
    /// `limits` with what this table says instead; `general` is the table that `limits` came from.
    fn over(&self, mut limits: Limits, general: Option<&LimitsTable>) -> Result<Limits, Wrong> {
        fn set<T: Copy, U>(field: &mut U, value: &Option<Spanned<T>>, convert: impl Fn(T) -> U) {
            if let Some(value) = value {
                *field = convert(*value.get_ref());
            }
        }
        set(&mut limits.window_size, &self.window_size, |s| s.0);
        set(&mut limits.max_dmb_size, &self.max_dmb_size, |s| s.0);
        set(&mut limits.max_dmb_bytes, &self.max_dmb_bytes, |s| s.0);
        set(&mut limits.max_dmbs, &self.max_dmbs, |n| n);
        set(&mut limits.max_segments, &self.max_segments, |n| n);
        set(&mut limits.max_move_size, &self.max_move_size, |s| s.0);
        set(&mut limits.max_mappings, &self.max_mappings, |n| n);
        set(&mut limits.move_queues, &self.move_queues, |n| n);
        set(&mut limits.commands_per_second, &self.commands_per_second, |n| n);
        limits.check().map_err(|error| {
            let at = self.span(error.key()).or_else(|| general?.span(error.key())).or_else(|| self.any());
            Wrong::new(at.unwrap_or(0..0), error)
        })?;
        Ok(limits)
    }

    /// Where the table says something of `key`.
    fn span(&self, key: &str) -> Option<Range<usize>> {
        let size = |value: &Option<Spanned<Size>>| value.as_ref().map(Spanned::span);
        let number = |value: &Option<Spanned<u32>>| value.as_ref().map(Spanned::span);
        match key {
            "window_size" => size(&self.window_size),
            "max_dmb_size" => size(&self.max_dmb_size),
            "max_dmb_bytes" => size(&self.max_dmb_bytes),
            "max_dmbs" => number(&self.max_dmbs),
            "max_segments" => number(&self.max_segments),
            "max_move_size" => size(&self.max_move_size),
            "max_mappings" => number(&self.max_mappings),
            "move_queues" => self.move_queues.as_ref().map(Spanned::span),
            "commands_per_second" => number(&self.commands_per_second),
            _ => None,
        }
    }

    /// Where the table says anything: a limit can become impossible by another one.
    fn any(&self) -> Option<Range<usize>> {
        ["window_size", "max_dmb_size", "max_dmb_bytes"].iter().find_map(|key| self.span(key))
    }
}

impl Device {
    fn settings(self, limits: Limits, general: &LimitsTable) -> Result<DeviceSettings, Wrong> {
        let group = match self.group {
            None => DEFAULT_GROUP.into(),
            Some(group) => {
                check_group(group.get_ref()).map_err(|e| Wrong::new(group.span(), e))?;
                group.into_inner()
            }
        };
        let gid = self.gid.map(|gid| {
            let parsed: Result<Gid, _> = gid.get_ref().parse();
            parsed.map_err(|e| Wrong::new(gid.span(), format!("gid = {:?}: {e}", gid.get_ref())))
        });
        Ok(DeviceSettings {
            name: self.name,
            endpoint: Endpoint::Path(self.socket),
            group,
            gid: gid.transpose()?,
            numa: numa(self.node.as_ref(), self.placement.as_ref(), self.engine.as_ref())?,
            limits: self.limits.over(limits, Some(general))?,
        })
    }
}

impl Hub {
    fn settings(self, limits: Limits, general: &LimitsTable) -> Result<HubSettings, Wrong> {
        let mut hub = HubSettings::new(self.socket);
        hub.numa = numa(self.node.as_ref(), self.placement.as_ref(), self.engine.as_ref())?;
        hub.limits = self.limits.over(limits, Some(general))?;
        if let Some(mode) = self.mode {
            let bits = *mode.get_ref();
            if bits > 0o777 {
                let message =
                    format!("mode = {bits} is not possible; write permission bits in octal, such as 0o660");
                return Err(Wrong::new(mode.span(), message));
            }
            hub.mode = bits;
        }
        hub.max_devices = self.max_devices.unwrap_or(hub.max_devices);
        hub.max_devices_per_user = self.max_devices_per_user.unwrap_or(hub.max_devices_per_user);
        for rule in self.rule {
            let span = rule.span();
            hub.rules.push(rule.into_inner().settings().map_err(|message| Wrong::new(span, message))?);
        }
        Ok(hub)
    }
}

impl Rule {
    fn settings(self) -> Result<HubRule, String> {
        let uid = match (self.uid, self.user) {
            (Some(_), Some(_)) => return Err("a rule has uid or user, not both; remove one".into()),
            (uid, None) => uid,
            (None, Some(name)) => match nix::unistd::User::from_name(&name) {
                Ok(Some(user)) => Some(user.uid.as_raw()),
                _ => {
                    return Err(format!(
                        "user = {name:?}: this host has no such user; correct it or give the uid"
                    ));
                }
            },
        };
        let gid = match (self.gid, self.user_group) {
            (Some(_), Some(_)) => return Err("a rule has gid or user_group, not both; remove one".into()),
            (gid, None) => gid,
            (None, Some(name)) => match nix::unistd::Group::from_name(&name) {
                Ok(Some(group)) => Some(group.gid.as_raw()),
                _ => {
                    let advice = "this host has no such group; correct it or give the gid";
                    return Err(format!("user_group = {name:?}: {advice}"));
                }
            },
        };
        let verdict = match (self.group, self.refuse) {
            (Some(group), false) => {
                check_group(&group).map_err(|e| e.to_string())?;
                Verdict::Group(group)
            }
            (None, true) => Verdict::Refuse,
            (Some(_), true) => return Err("a rule has group or refuse = true, not both; remove one".into()),
            (None, false) => return Err("a rule decides nothing; add group = \"…\" or refuse = true".into()),
        };
        Ok(HubRule { uid, gid, verdict })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.toml");
        std::fs::write(&path, text).unwrap();
        let error = read(&path).unwrap_err().to_string();
        error.strip_prefix(&format!("{}, ", path.display())).unwrap().to_string()
    }

    #[test]
    fn a_whole_file_is_read() {
        let settings = parse(include_str!("../share/dmbridged.toml")).unwrap();
        assert_eq!(settings.check(), Ok(()));
        assert_eq!(settings.devices.len(), 2);
        assert_eq!(settings.devices[0].limits.max_dmbs, 64);
        assert_eq!(settings.devices[1].limits.max_dmbs, Limits::default().max_dmbs);
        assert_eq!(settings.devices[0].gid, Some(Gid::from_u64(0x1122_3344_5566_7788)));
        let hub = settings.hub.unwrap();
        assert_eq!(hub.mode, 0o666);
        assert_eq!(hub.rules.len(), 3);
    }

    #[test]
    fn an_empty_file_gives_the_defaults() {
        let settings = parse("").unwrap();
        assert_eq!(settings.pool, PoolSettings::default());
        assert!(settings.devices.is_empty() && settings.hub.is_none());
    }

    #[test]
    fn every_error_names_line_and_key_and_says_what_to_do() {
        for (text, want) in [
            (
                "[pool]\nmaxbytes = 1\n",
                "line 2: unknown field `maxbytes`, expected one of `max_bytes`, `huge_pages`, `placement`",
            ),
            ("[limits]\n\nmax_dmbs = \"x\"\n", "line 3: max_dmbs: invalid type: string \"x\", expected u32"),
            ("[limits]\nmax_mappings = 999", "line 2: max_mappings = 999 is not possible; choose 1 to 480"),
            (
                "[limits]\nwindow_size = \"1GB\"",
                "line 2: window_size: \"1GB\" is not a size; write a number of bytes, or one with K, M, G or T, such as 64M",
            ),
            ("[fabric]\nid = 0xff00", "line 2: fabric id = 65280 is not possible; choose 1 to 65279"),
            (
                "[fabric]\nsystem_eid = \"X\"",
                "line 2: system_eid = \"X\" is not possible; choose exactly 32 characters, these are 1",
            ),
            ("[[device]]\nname = \"a\"\n", "line 1: missing field `socket`"),
            (
                "[[device]]\nname = \"a\"\nsocket = \"/s\"\ngid = \"0\"",
                "line 4: gid = \"0\": a GID is 1 to 16 or exactly 32 hexadecimal digits and not zero",
            ),
            (
                "[[device]]\nname = \"a\"\nsocket = \"/s\"\n[device.limits]\nmove_queues = 0",
                "line 5: move_queues = 0 is not possible; choose 1 to 64",
            ),
            (
                "[hub]\nsocket = \"/h\"\nmode = 660",
                "line 3: mode = 660 is not possible; write permission bits in octal, such as 0o660",
            ),
            (
                "[hub]\nsocket = \"/h\"\n[[hub.rule]]\nuid = 1",
                "line 3: a rule decides nothing; add group = \"…\" or refuse = true",
            ),
            (
                "[hub]\nsocket = \"/h\"\n[[hub.rule]]\nuser = \"no such\"\nrefuse = true",
                "line 3: user = \"no such\": this host has no such user; correct it or give the uid",
            ),
            (
                "[pool]\nplacement = \"near\"",
                "line 2: placement = \"near\" is not possible; choose \"receiver\", \"sender\", \"interleave\", or the number of a node",
            ),
            (
                "[[engines.rule]]\nengine = \"fast\"",
                "line 2: engine = \"fast\" is not an engine; choose cpu, cpu-node or dsa",
            ),
            ("[pool\n", "line 1: unclosed table, expected `]`"),
            (
                "[limits]\nwindow_size = \"2M\"\n",
                "line 2: max_dmb_size = 512M is not possible; such a DMB needs a window_size of 1G",
            ),
        ] {
            assert_eq!(sentence(text), want, "{text:?}");
        }
    }

    #[test]
    fn a_node_is_one_that_the_host_has() {
        for key in ["node", "placement"] {
            let error = sentence(&format!("[hub]\nsocket = \"/h\"\n{key} = 1023"));
            let start = format!("line 3: {key} = 1023: this host has no such node; choose from 0");
            assert!(error.starts_with(&start), "{error}");
        }
        assert!(sentence("[pool]\nplacement = -1").contains("placement = -1: this host has no such node"));
    }

    #[test]
    fn placement_is_the_pools_and_a_devices_own() {
        let text = "[pool]\nplacement = \"interleave\"\n[[device]]\nname = \"a\"\nsocket = \"/a\"\nnode = 0\n\
                    [[device]]\nname = \"b\"\nsocket = \"/b\"\nplacement = 0\n[hub]\nsocket = \"/h\"\nplacement = \"sender\"";
        let settings = parse(text).unwrap();
        let node = NodeId::new(0);
        assert_eq!(settings.pool.placement, Placement::Interleave);
        assert_eq!(settings.devices[0].numa, NumaSettings { node, ..NumaSettings::default() });
        assert_eq!(settings.devices[1].numa.placement, node.map(Placement::Node));
        assert_eq!(settings.hub.unwrap().numa.placement, Some(Placement::Sender));
    }

    #[test]
    fn a_device_and_the_hub_may_name_the_engine_that_copies_their_moves() {
        let text = "[[device]]\nname = \"a\"\nsocket = \"/a\"\nengine = \"cpu-node\"\n\
                    [hub]\nsocket = \"/h\"\nengine = \"cpu\"";
        let settings = parse(text).unwrap();
        assert_eq!(settings.devices[0].numa.engine, Some(table::Kind::CpuNode));
        assert_eq!(settings.hub.unwrap().numa.engine, Some(table::Kind::Cpu));
        assert!(
            sentence("[hub]\nsocket = \"/h\"\nengine = \"gpu\"")
                .starts_with("line 3: engine = \"gpu\" is not an engine")
        );
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = read(Path::new("/nowhere/c.toml")).unwrap_err().to_string();
        assert_eq!(
            error,
            "/nowhere/c.toml: cannot read the configuration file: No such file or directory (os error 2)"
        );
    }
}
