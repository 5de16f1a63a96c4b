//! What the entries of the book say. Numbers are those of the device's own types; descriptors are named by the numbers under which
//! the keeper has them.

use serde::{Deserialize, Serialize};

/// The whole daemon's. Entry `global`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Global {
    pub next_session: u64,
    pub hub_connections: u64,
    pub next_device: u64,
    pub next_extent: u32,
    pub next_ram_token: u64,
    pub copy_plan: [u8; 16],
}

/// A listening socket. Entry `listener/PATH`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Listener {
    pub fd: u64,
    pub device: u64,
    pub inode: u64,
}

/// The GID of a configured device. Entry `configured/NAME`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Configured {
    pub gid: [u8; 16],
}

/// What a device may use: [`crate::settings::Limits`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(remote = "crate::settings::Limits")]
pub struct Limits {
    window_size: u64,
    max_dmb_size: u64,
    max_dmb_bytes: u64,
    max_dmbs: u32,
    max_segments: u32,
    max_move_size: u64,
    max_mappings: u32,
    move_queues: u16,
    commands_per_second: u32,
}

/// A front-end's connection. Entry `session/NUMBER`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Session {
    pub socket: u64,
    pub name: String,
    pub group: String,
    pub hub: bool,
    pub gid: [u8; 16],
    #[serde(with = "Limits")]
    pub limits: crate::settings::Limits,
    pub features: u64,
    pub protocol: u64,
    pub owned: bool,
    pub hasty: bool,
    pub copy_plan: [u8; 16],
    pub first_cell: u32,
    pub rings: Vec<Ring>,
    pub regions: Vec<Region>,
    pub device: Option<u64>,
    pub paused: Option<Paused>,
}

/// One of its rings.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ring {
    pub size: u16,
    pub addresses: Option<(u64, u64, u64)>,
    pub base: u16,
    pub enabled: bool,
    pub kick: Option<u64>,
    pub call: Option<u64>,
    pub err: Option<u64>,
    pub service: Service,
}

/// Whether a ring is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Service {
    None,
    Broken,
    Served,
}

/// A region of its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct Region {
    pub guest_addr: u64,
    pub size: u64,
    pub user_addr: u64,
    pub file_offset: u64,
    pub fd: u64,
}

/// How it was when it was paused.
#[derive(Debug, Serialize, Deserialize)]
pub struct Paused {
    pub bases: Vec<u16>,
    pub features: u64,
}

/// The last command of its control queue. Entry `command/NUMBER`.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Command {
    /// Waits for the front-end.
    pub suspended: Option<Suspended>,
    /// Was done, and is answered as soon as this is written down.
    pub answer: Option<Answer>,
}

/// A command that waits.
#[derive(Debug, Serialize, Deserialize)]
pub struct Suspended {
    pub request: Vec<u8>,
    pub head: u16,
    pub writable: Vec<(u64, u32)>,
    /// What came of it while the device was paused: a status, 0 for good.
    pub answer: Option<u8>,
}

/// An answer, as the used element with this index.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    pub used: u16,
    pub head: u16,
    pub writable: Vec<(u64, u32)>,
    pub response: Vec<u8>,
}

/// Its backend channel. Entry `channel/NUMBER`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Channel {
    pub fd: u64,
    pub guarded: bool,
    pub open: bool,
    pub queue: Vec<MapRequest>,
    pub pending: Option<Pending>,
    /// What is still to be sent, in this order.
    pub outbox: Vec<Part>,
}

/// A request to map or unmap.
#[derive(Debug, Serialize, Deserialize)]
pub struct MapRequest {
    pub device: u64,
    pub extent: u32,
    pub map: bool,
    /// For the DMBs' owner.
    pub owner: bool,
    pub offset: u64,
    pub len: u64,
}

/// The one that is under way.
#[derive(Debug, Serialize, Deserialize)]
pub struct Pending {
    pub request: MapRequest,
    pub stage: Stage,
    pub abandoned: bool,
    pub overdue: bool,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    Begun,
    Asked,
    Settling,
}

/// Something to send on the channel.
#[derive(Debug, Serialize, Deserialize)]
pub struct Part {
    pub bytes: Vec<u8>,
    /// With the file of the request that is under way.
    pub file: bool,
}

/// A started device. Entry `device/NUMBER`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Device {
    pub session: u64,
    #[serde(with = "Limits")]
    pub limits: crate::settings::Limits,
    pub map: bool,
    pub ram: bool,
    pub futex: bool,
    pub rendezvous: bool,
    pub private_line: bool,
    pub lifeline: Option<u64>,
    pub waiting_for: Option<u32>,
    pub refused: Vec<(u64, u64)>,
}

/// A place in its window. Entry `slot/DEVICE/EXTENT`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Slot {
    pub offset: u64,
    pub size: u64,
    pub owned: bool,
    pub other: [u8; 16],
    pub state: SlotState,
}

/// How far its mapping is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotState {
    Mapping,
    Doomed,
    Mapped,
    Unmapping,
}

/// An extent. Entry `extent/NUMBER`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Extent {
    pub fd: u64,
    pub size: u64,
    pub huge: bool,
    pub owner: u64,
    pub peer: u64,
    pub peer_gid: [u8; 16],
    /// A word, or the number of a node.
    pub placement: String,
    pub condemned: bool,
    /// No line of it ever had a greater generation.
    pub generation: u16,
}

/// A DMB. Entry `dmb/TOKEN`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Dmb {
    pub owner: u64,
    pub peer: u64,
    pub peer_gid: [u8; 16],
    pub index: u32,
    pub size: u64,
    pub attached: bool,
    pub registered: bool,
    pub home: Home,
}

/// Where it lies.
#[derive(Debug, Serialize, Deserialize)]
pub enum Home {
    Pool { offset: u64, private_line: bool },
    Ram { line_addr: u64, segments: Vec<(u64, u64)> },
}

/// A key that waits for a second device. Entry `key/GROUP/KEY`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Key {
    pub group: String,
    pub key: [u8; 32],
    pub device: u64,
    pub tag: u32,
    pub payload: [u8; 32],
}

/// An event that waits, as it is told. Entry `event/SESSION/NUMBER`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Event {
    pub bytes: Vec<u8>,
}

/// What is being sent or taken exactly once. Entry `step`.
#[derive(Debug, Serialize, Deserialize)]
pub struct Step {
    pub session: u64,
    /// What is in the pipe goes to the backend channel, else to the front-end's socket.
    pub channel: bool,
    /// The message at which was looked is taken.
    pub take: bool,
}
