//! One front-end's connection: what it negotiated, its rings, its place in the fabric. Not the messages themselves
//! (`handler.rs`), nor when they are read (`control.rs`).

use crate::copy_plan;
use crate::fabric::{Attempt, DeviceId};
use crate::frontend::Channel;
use crate::hub::PeerCredentials;
use crate::keep;
use crate::memory::DeviceMemory;
use crate::mover::Served;
use crate::notify::EventFile;
use crate::placement::NumaSettings;
use crate::port::Port;
use crate::settings::Limits;
use crate::throttle::Throttle;
use crate::vring::{Chain, Layout, Piece, Vring};
use dmbridge_proto::FIRST_MOVE_QUEUE;
use dmbridge_proto::config::{Config, MAGIC, VERSION_MAJOR};
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::Gid;
use dmbridge_proto::shm::CopyPlan;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use vm_memory::GuestMemoryBackend;

/// Protocol features that the device offers.
pub const PROTOCOL_FEATURES: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::BACKEND_REQ)
    .union(Protocol::BACKEND_SEND_FD)
    .union(Protocol::CONFIG)
    .union(Protocol::CONFIGURE_MEM_SLOTS)
    .union(Protocol::RESET_DEVICE)
    .union(Protocol::SHMEM);
/// Regions of a memory table that is sent as a whole.
const TABLE_REGIONS: u32 = 8;
/// What of them mapping takes: requests with memory, and replies to them.
const MAP_FEATURES: Protocol = Protocol::SHMEM.union(Protocol::BACKEND_REQ).union(Protocol::REPLY_ACK);

/// Where a front-end came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// To the configured device with this number.
    Configured(usize),
    /// To the hub.
    Hub,
}

/// A ring, as far as the front-end has described it.
#[derive(Debug, Default)]
pub struct Ring {
    /// Number of descriptors; 0 until it is told.
    pub size: u16,
    /// The front-end's own addresses of descriptors, used and available ring.
    pub addresses: Option<(u64, u64, u64)>,
    /// Index of the next available element.
    pub base: u16,
    /// The front-end has enabled it.
    pub enabled: bool,
    /// Watched for kicks while the ring is in service.
    pub kick: Option<Kick>,
    /// Where used elements are announced.
    pub call: Option<Arc<EventFile>>,
    /// Where its end is announced.
    pub err: Option<Arc<EventFile>>,
    /// Whether it is in service.
    pub service: Service,
}

/// A descriptor that the driver kicks.
#[derive(Debug)]
pub struct Kick {
    file: File,
    /// The number under which a keeper has it.
    pub number: u64,
}

impl Kick {
    /// What the front-end sent.
    pub fn new(file: File) -> Kick {
        Kick::numbered(file, keep::number())
    }

    /// The one that a keeper has under this number.
    pub fn numbered(file: File, number: u64) -> Kick {
        Kick { file, number }
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for Kick {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Who serves a ring.
#[derive(Debug, Default)]
pub enum Service {
    /// Nobody yet.
    #[default]
    None,
    /// Nobody any more: it could not be followed.
    Broken,
    /// The control thread.
    Control(Box<Vring>),
    /// Whoever has an event for the device.
    Event,
    /// The mover with this number.
    Move(usize, Served),
}

impl Ring {
    /// Whether the front-end has done everything for it to be served.
    pub fn ready(&self) -> bool {
        matches!(self.service, Service::None)
            && self.enabled
            && self.kick.is_some()
            && self.size != 0
            && self.addresses.is_some()
    }

    /// Where the ring is: the front-end's addresses as its memory table translates them.
    pub fn layout(&self, memory: &DeviceMemory, features: Features) -> Result<Layout, crate::vring::Broken> {
        let (descriptors, used, available) = self.addresses.unwrap_or_default();
        let at = |addr| {
            memory.guest_addr_of(addr).ok_or(crate::vring::Broken::from(virtio_queue::Error::AddressOverflow))
        };
        Ok(Layout {
            size: self.size,
            descriptors: at(descriptors)?,
            available: at(available)?,
            used: at(used)?,
            base: self.base,
            event_idx: features.contains(Features::RING_EVENT_IDX),
        })
    }

    /// The ring.
    pub fn vring(&self, port: &Port, features: Features) -> Result<Vring, crate::vring::Broken> {
        let memory = port.memory.read();
        let mut vring = Vring::new(self.layout(&memory, features)?, memory.guest())?;
        vring.set_call(self.call.clone());
        vring.set_err(self.err.clone());
        Ok(vring)
    }

    /// The ring cannot be served.
    pub fn fail(&mut self) {
        self.service = Service::Broken;
        if let Some(err) = &self.err {
            err.signal();
        }
    }
}

/// How a device was when its front-end stopped it. If it is started again like this, it goes on.
#[derive(Debug, PartialEq, Eq)]
pub struct Paused {
    /// Where its rings stopped.
    pub bases: Vec<u16>,
    /// Virtio features that the driver accepted.
    pub features: u64,
}

/// A command that waits for its front-end.
#[derive(Debug)]
pub struct Suspended {
    /// Its readable bytes.
    pub request: Vec<u8>,
    /// Its chain.
    pub head: u16,
    /// Where its answer goes.
    pub writable: Vec<Piece>,
    /// What came while the ring was disabled.
    pub answer: Option<Attempt>,
}

/// The answer to a command that was done; with a keeper it is written down before it is given.
#[derive(Debug)]
pub struct Answer {
    /// Index of its used element.
    pub used: u16,
    /// Its chain, of which only this and what is writable counts.
    pub chain: Chain,
    /// The answer.
    pub response: Vec<u8>,
}

/// What a session with a keeper has besides.
#[derive(Debug)]
pub struct KeptSession {
    /// The front-end's socket.
    pub socket: UnixStream,
    /// The number under which the keeper has it.
    pub number: u64,
    /// The first of its cells in the book: for its events, then for each move queue.
    pub first_cell: u32,
    /// Where the handler gets its messages, and leaves its answers.
    pub feed: UnixStream,
}

/// One front-end's connection.
#[derive(Debug)]
pub struct Session {
    /// What people call the device.
    pub name: Arc<str>,
    /// Where the front-end came from.
    pub origin: Origin,
    /// Who it is.
    pub peer: Option<PeerCredentials>,
    /// The device's GID.
    pub gid: Gid,
    /// The device's group.
    pub group: Arc<str>,
    /// What the device may use.
    pub limits: Limits,
    /// On which NUMA node the device is, and its extents are to lie.
    pub numa: NumaSettings,
    /// What other threads see of it.
    pub port: Arc<Port>,
    /// Virtio features that the driver accepted.
    pub features: u64,
    /// What the driver is told of how memory is written: the same from its features to a reset.
    pub copy_plan: CopyPlan,
    /// Whether it has said that it owns the connection.
    pub owned: bool,
    /// Whether it asked for protocol features before that.
    pub hasty: bool,
    /// Protocol features that the front-end accepted.
    pub protocol: Protocol,
    /// All queues.
    pub rings: Vec<Ring>,
    /// The device in the fabric, while it is started.
    pub device: Option<DeviceId>,
    /// The device is stopped and may be started again as it was.
    pub paused: Option<Paused>,
    /// Somebody looks whether it still is paused.
    pub watched: bool,
    /// The command that waits.
    pub suspended: Option<Suspended>,
    /// An answer that is not written down yet.
    pub answer: Option<Answer>,
    /// What it has besides if it is kept.
    pub kept: Option<KeptSession>,
    /// For requests to the front-end.
    pub channel: Option<Channel>,
    /// Slows the control queue down.
    pub throttle: Throttle,
    /// Commands answered.
    pub commands: u64,
}

impl Session {
    /// A front-end that just connected.
    #[expect(clippy::too_many_arguments, reason = "each is one field of what is made")]
    pub fn new(
        name: Arc<str>,
        origin: Origin,
        peer: Option<PeerCredentials>,
        gid: Gid,
        group: Arc<str>,
        limits: Limits,
        numa: NumaSettings,
        port: Arc<Port>,
    ) -> Session {
        let queues = usize::from(FIRST_MOVE_QUEUE) + usize::from(limits.move_queues);
        Session {
            name,
            origin,
            peer,
            gid,
            group,
            limits,
            numa,
            port,
            features: 0,
            copy_plan: copy_plan::current(),
            owned: false,
            hasty: false,
            protocol: Protocol::empty(),
            rings: (0..queues).map(|_| Ring::default()).collect(),
            device: None,
            paused: None,
            watched: false,
            suspended: None,
            answer: None,
            kept: None,
            channel: None,
            throttle: Throttle::new(limits.commands_per_second),
            commands: 0,
        }
    }

    /// Protocol features that the device offers this front-end.
    ///
    /// QEMU (11.1) keeps two books of its memory regions if they can be added and removed one by one. When the guest resets
    /// the device, or itself, QEMU takes the window's mappings out of one of them only, and dies of the difference when the
    /// device is started again. So it gets the other way, a whole table at each change.
    pub fn offered_protocol(&self) -> Protocol {
        if self.is_qemu() {
            PROTOCOL_FEATURES.difference(Protocol::CONFIGURE_MEM_SLOTS)
        } else {
            PROTOCOL_FEATURES
        }
    }

    /// Whether the front-end is QEMU, as far as can be told: QEMU asks for protocol features before it says that it
    /// owns the connection.
    pub fn is_qemu(&self) -> bool {
        self.hasty
    }

    /// What the device may use with the memory table that its front-end has: a front-end puts mappings there, too.
    pub fn limits(&self) -> Limits {
        let mut limits = self.limits;
        if !self.protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
            let taken = self.port.memory.read().guest().num_regions();
            limits.max_mappings = limits.max_mappings.min(TABLE_REGIONS.saturating_sub(taken as u32));
        }
        limits
    }

    /// Whether the front-end can map, as far as it has said.
    fn can_map(&self) -> bool {
        self.protocol.contains(MAP_FEATURES)
    }

    /// Whether the driver has started the device, and it is not paused.
    pub fn is_running(&self) -> bool {
        self.device.is_some() && self.paused.is_none()
    }

    /// What has to be the same if it is to go on later.
    pub fn to_be_continued(&self) -> Paused {
        Paused { bases: self.rings.iter().map(|ring| ring.base).collect(), features: self.features }
    }

    /// Virtio features that the device offers this front-end now.
    pub fn offered(&self) -> u64 {
        let mut features = Features::all();
        features.set(Features::MAP, self.can_map());
        features.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    /// Virtio features that the driver accepted.
    pub fn accepted(&self) -> Features {
        Features::from_bits_truncate(self.features)
    }

    /// What driver and front-end can do.
    pub fn capabilities(&self) -> crate::fabric::Capabilities {
        let features = self.accepted();
        crate::fabric::Capabilities {
            map: features.contains(Features::MAP) && self.can_map() && self.channel.is_some(),
            ram: features.contains(Features::RAM_DMB),
            futex: features.contains(Features::FUTEX),
            rendezvous: features.contains(Features::RENDEZVOUS),
            private_line: features.contains(Features::PRIVATE_LINE),
        }
    }

    /// The configuration space.
    pub fn config(&self, fabric_id: u16, system_eid: [u8; 32]) -> Config {
        let limits = &self.limits;
        Config {
            magic: MAGIC,
            version_major: VERSION_MAJOR.into(),
            version_minor: 0.into(),
            fabric_id: fabric_id.into(),
            move_queues: limits.move_queues.into(),
            gid: self.gid,
            system_eid,
            window_size: if self.can_map() { limits.window_size } else { 0 }.into(),
            max_dmb_size: limits.max_dmb_size.into(),
            max_dmb_bytes: limits.max_dmb_bytes.into(),
            max_dmbs: limits.max_dmbs.into(),
            max_segments: limits.max_segments.into(),
            max_move_size: limits.max_move_size.into(),
            granule: (dmbridge_proto::GRANULE as u32).into(),
            copy_plan: self.copy_plan.to_bytes(),
            reserved: [0; 4],
        }
    }
}
