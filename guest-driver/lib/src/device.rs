//! A device of this process: connecting it, and what it can be asked for. What it hands out is in `dmb` and `mover`.

use crate::control::{self, Control};
use crate::dmb::{Dmb, DmbState, Line, Port, RemoteDmb, RemoteState};
use crate::error::Error;
use crate::events::{self, Event, EventQueue, Events, Inbox};
use crate::fork::Process;
use crate::lifeline::Lifeline;
use crate::mover::{DmbSender, MoveBuffer, Mover};
use crate::moves::{self, MoveQueue, Posted};
use crate::proto::config::Config;
use crate::proto::control::{
    AttachReply, Home, PairFlags, Register, RegisterReply, Reply, Request, Segment, Segments, SignalEvent,
};
use crate::proto::features::Features;
use crate::proto::ids::{Gid, Token};
use crate::proto::moves::{MoveFlags, MoveHeader};
use crate::proto::rendezvous::{Cancel, Met, Rendezvous};
use crate::proto::shm::CopyPlan;
use crate::proto::status::Status;
use crate::proto::{self, CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE};
use crate::ram::DmaBuffer;
use crate::reactor::{Interest, Reactor, Registration, Source};
use crate::shared::SharedMemory;
use crate::sync::lock;
use crate::transport::Transport;
use crate::transport::chardev::{self, Chardev};
use crate::transport::pci::{self, Pci, PciAddress};
use crate::transport::vhost_user::VhostUser;
use crate::virtqueue::{Layout, Virtqueue};
use crate::wait::{Awaited, DEFAULT_SPIN};
use crate::will::LastMove;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use std::collections::HashMap;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

/// Move queues that this driver uses at most, however many the device has.
const MAX_MOVE_QUEUES: u16 = 8;
/// Names the socket of a daemon, for programs that are not told otherwise.
const SOCKET_VARIABLE: &str = "DMBRIDGE_SOCKET";
/// Where a daemon listens unless it is told otherwise.
const DEFAULT_HUB: &str = "/run/dmbridge/hub.sock";
/// Size of a control line, in bytes.
const LINE: usize = proto::extent::LINE_SIZE as usize;

/// What the reactor watches for a device. Move queues follow.
const REQUESTS: u8 = 0;
const EVENTS: u8 = 1;
const HANGUP: u8 = 2;
const MOVES: u8 = 3;

/// How to connect a device, if not by [`Device::connect`].
#[derive(Clone, Copy, Debug)]
pub struct Builder {
    map: bool,
    features: Features,
    spin: Duration,
}

impl Builder {
    /// Whether this process maps memory for the device; true at first. Without, it behaves as a VMM that cannot map:
    /// its DMBs lie in its own memory, and it reaches others by moves only.
    pub fn map(mut self, map: bool) -> Builder {
        self.map = map;
        self
    }

    /// Whether sleepers are woken by futex where the other side can do that too; true at first. Without, they are woken
    /// by the device as a virtual machine is.
    pub fn futex(mut self, futex: bool) -> Builder {
        self.features.set(Features::FUTEX, futex);
        self
    }

    /// The longest that a wait spins before it sleeps, for DMBs and movers of this device; [`DEFAULT_SPIN`] at
    /// first. Zero: always sleep. A DMB's can be changed ([`Dmb::set_spin`]).
    pub fn spin(mut self, longest: Duration) -> Builder {
        self.spin = longest;
        self
    }

    /// Connects to a daemon's socket: its hub, or that of a configured device.
    ///
    /// # Errors
    ///
    /// As for [`Device::connect`].
    pub fn connect(self, path: impl AsRef<Path>) -> Result<Device, Error> {
        let transport = VhostUser::connect(path.as_ref(), self.map)?;
        Ok(Device { core: Core::start(Box::new(transport), self)? })
    }

    /// Opens a character device of the kernel module.
    ///
    /// # Errors
    ///
    /// As for [`Device::open_file`].
    pub fn open_file(self, path: impl AsRef<Path>) -> Result<Device, Error> {
        let transport = Chardev::open(path.as_ref())?;
        Ok(Device { core: Core::start(Box::new(transport), self)? })
    }

    /// Opens what is there.
    ///
    /// # Errors
    ///
    /// As for [`Device::open`].
    pub fn open(self) -> Result<Device, Error> {
        if let Some(path) = std::env::var_os(SOCKET_VARIABLE) {
            return self.connect(path);
        }
        if let Some(file) = chardev::find().first() {
            return self.open_file(file);
        }
        match pci::find().first() {
            Some(address) if Path::new(DEFAULT_HUB).exists() => {
                // A foreign device may have the same ID.
                self.open_pci(*address).or_else(|_| self.connect(DEFAULT_HUB))
            }
            Some(address) => self.open_pci(*address),
            None => self.connect(DEFAULT_HUB),
        }
    }

    /// Opens a PCI device.
    ///
    /// # Errors
    ///
    /// As for [`Device::open_pci`].
    pub fn open_pci(self, address: PciAddress) -> Result<Device, Error> {
        let transport = Pci::open(address, self.map)?;
        Ok(Device { core: Core::start(Box::new(transport), self)? })
    }
}

/// What a pair of devices can do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Peer {
    /// That device can map.
    pub map: bool,
    /// It and this device can wake each other by futex.
    pub futex: bool,
}

/// What a device of this process did so far.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Stats {
    /// Commands of the control queue.
    pub commands: u64,
    /// Events that the device sent, signals among them.
    pub events: u64,
    /// Events that the program did not take and that were dropped.
    pub events_dropped: u64,
    /// Moves that only rang a sleeper.
    pub rings: u64,
}

/// A device of this process. Cheap to clone. It leaves the fabric when the last clone, and everything that was made
/// from it, is dropped.
///
/// After `fork()`, a child may go on using the memory of DMBs, but what needs the device fails with [`Error::Forked`];
/// dropping handles in the child releases nothing of the parent's.
#[derive(Clone)]
pub struct Device {
    core: Arc<Core>,
}

impl Device {
    /// Connects to a daemon's socket: its hub, or that of a configured device. The device is started when this returns.
    ///
    /// # Errors
    ///
    /// [`Error::Connect`] if nobody listens there, or this user may not; others if it is no dmbridge device.
    pub fn connect(path: impl AsRef<Path>) -> Result<Device, Error> {
        Device::builder().connect(path)
    }

    /// Opens a device on the PCI bus of the virtual machine in which this process runs; [`pci::find`]
    /// lists candidates. It is taken from the kernel's `virtio-pci`, unless a kernel driver uses it, and stays bound to
    /// `uio_pci_generic` afterwards. Takes root. The device is started when this returns.
    ///
    /// The window is mapped as the kernel maps device memory for programs, uncached. Where the VM's choice of
    /// caching counts (not under KVM on Intel, usually) that makes DMBs slow; the kernel driver does not have this
    /// limit.
    ///
    /// # Errors
    ///
    /// [`Error::Pci`] with what is in the way.
    pub fn open_pci(address: PciAddress) -> Result<Device, Error> {
        Device::builder().open_pci(address)
    }

    /// Opens a character device of the kernel module in the virtual machine in which this process runs, such as
    /// `/dev/dmbridge0`; [`file::find`](crate::file::find) lists them. Takes no privileges but those of the file, any
    /// number of processes may do so, and what each has is its own: but all are the same device to others, so a token
    /// goes to whichever process attaches it first.
    ///
    /// # Errors
    ///
    /// [`Error::File`] with what is in the way.
    pub fn open_file(path: impl AsRef<Path>) -> Result<Device, Error> {
        Device::builder().open_file(path)
    }

    /// Opens what is there: what the environment variable `DMBRIDGE_SOCKET` names, else the first character device, else
    /// the first PCI device, else the hub of a daemon of this host, `/run/dmbridge/hub.sock`.
    ///
    /// # Errors
    ///
    /// Those of what was tried last.
    pub fn open() -> Result<Device, Error> {
        Device::builder().open()
    }

    /// To connect with other settings.
    pub fn builder() -> Builder {
        Builder { map: true, features: Features::all(), spin: DEFAULT_SPIN }
    }

    /// Its name in the fabric, by which others know it.
    pub fn gid(&self) -> Gid {
        self.core.config.gid
    }

    /// Its configuration space: limits, fabric, EID (`docs/device.md`, 4).
    pub fn config(&self) -> &Config {
        &self.core.config
    }

    /// Whether it can map.
    pub fn can_map(&self) -> bool {
        self.core.features.contains(Features::MAP)
    }

    /// Whether the daemon is there. Memory that is mapped stays usable without it.
    pub fn is_connected(&self) -> bool {
        !self.core.is_lost()
    }

    /// What another device can do; `None` if there is none with that GID in this device's group.
    ///
    /// # Errors
    ///
    /// If the device cannot be asked.
    pub fn query(&self, gid: Gid) -> Result<Option<Peer>, Error> {
        match self.core.command(&Request::QueryGid(gid)) {
            Ok(Reply::QueryGid(flags)) => Ok(Some(Peer {
                map: flags.contains(PairFlags::MAP),
                futex: flags.contains(PairFlags::FUTEX),
            })),
            Ok(_) => Err(WRONG_REPLY),
            Err(Error::Refused { status: Status::NoEntry, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Registers a DMB that `peer` may write. It lies in the host's pool, so that the peer can map it, or in this
    /// process's memory if this device cannot map, or has no room for another mapping. `size` in bytes, a multiple of
    /// 4096. Its memory is zero.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the device's reason, see `docs/device.md`, 6.2.
    pub fn register(&self, peer: Gid, size: usize) -> Result<Dmb, Error> {
        self.register_at(peer, size, Home::Pool)
    }

    /// As [`register`](Self::register), with a control line that is alone in its page, where the device has that. For a peer that
    /// may be a program in a virtual machine: by the kernel module's character device it can attach no other DMB, unless that
    /// has 512 KiB or more.
    ///
    /// # Errors
    ///
    /// As for [`register`](Self::register).
    pub fn register_with_private_line(&self, peer: Gid, size: usize) -> Result<Dmb, Error> {
        let can = self.core.features.contains(Features::PRIVATE_LINE);
        self.register_at(peer, size, if can { Home::PoolPrivate } else { Home::Pool })
    }

    fn register_at(&self, peer: Gid, size: usize, home: Home<'_>) -> Result<Dmb, Error> {
        if !self.can_map() {
            return self.register_ram(peer, size);
        }
        match self.register_mapped(peer, size, home) {
            Err(Error::Refused { status: Status::NoSpace, .. }) => self.register_ram(peer, size),
            result => result,
        }
    }

    /// As [`register`](Self::register), in the pool only.
    pub(crate) fn register_in_pool(&self, peer: Gid, size: usize) -> Result<Dmb, Error> {
        self.register_mapped(peer, size, Home::Pool)
    }

    fn register_mapped(&self, peer: Gid, size: usize, home: Home<'_>) -> Result<Dmb, Error> {
        let (state, memory) = self.core.register(peer, size, home, |core, reply| {
            let line = core.window_line(reply.line_offset)?;
            Ok((core.window(reply.offset, size as u64)?, line))
        })?;
        Ok(Dmb::new(state, memory, self.core.clone()))
    }

    /// Registers a DMB in this process's own memory. The peer reaches it by moves only. `size` as for
    /// [`register`](Self::register).
    ///
    /// # Errors
    ///
    /// As for [`register`](Self::register).
    pub fn register_ram(&self, peer: Gid, size: usize) -> Result<Dmb, Error> {
        let memory = self.core.allocate(size, 4096)?;
        // What lay there before is this process's own, but a fresh DMB is zero.
        memory.memory().as_slice().fill_u64_with(|| 0);
        let line = self.core.allocate(LINE, LINE)?;
        let segment = [Segment { addr: memory.address(), len: size as u64 }.to_bytes()];
        let home = Home::Ram { line_addr: line.address(), segments: Segments::from_wire(&segment) };
        let (state, memory) = self.core.register(peer, size, home, |_, _| {
            let line =
                Line::new(line.memory().clone()).ok_or(Error::Contract("a control line is not aligned"))?;
            Ok((memory.memory().clone(), line))
        })?;
        Ok(Dmb::new(state, memory, self.core.clone()))
    }

    /// Attaches a DMB whose peer this device is: finds it in the window.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] with the device's reason, see `docs/device.md`, 6.4; `NotSupported` means that
    /// [`mover`](Self::mover) is the way.
    pub fn attach(&self, token: Token) -> Result<RemoteDmb, Error> {
        let (state, memory) = self.core.attach(token)?;
        Ok(RemoteDmb::new(state, memory, self.core.clone()))
    }

    /// A mover into a DMB whose peer this device is.
    ///
    /// # Errors
    ///
    /// [`Error::Move`] with `NoEntry` if there is no such DMB.
    pub fn mover(&self, token: Token) -> Result<Mover, Error> {
        Mover::new(self.core.clone(), token)
    }

    /// A way to write into a DMB whose peer this device is: by mapping if that works, else by moves.
    ///
    /// # Errors
    ///
    /// As for [`attach`](Self::attach) and [`mover`](Self::mover).
    pub fn sender(&self, token: Token) -> Result<DmbSender, Error> {
        match self.attach(token) {
            Ok(dmb) => Ok(DmbSender::Map(dmb)),
            // It lies in the owner's memory, this device cannot map, or has no more room to.
            Err(Error::Refused { status: Status::NotSupported | Status::NoSpace | Status::Io, .. }) => {
                self.mover(token).map(DmbSender::Move)
            }
            Err(error) => Err(error),
        }
    }

    /// Memory to move from: filled in place, moved without another copy.
    ///
    /// # Errors
    ///
    /// If there is no memory.
    pub fn move_buffer(&self, size: usize) -> Result<MoveBuffer, Error> {
        self.core.allocate(size, 4096).map(MoveBuffer::new)
    }

    /// Says something to another device's program, which gets [`Event::Software`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`]: `NoEntry` if there is no such device, `Again` if 64 events from this device wait there
    /// already.
    pub fn signal_event(&self, rgid: Gid, code: u32, info: u64) -> Result<(), Error> {
        self.core.command(&Request::SignalEvent(SignalEvent { rgid, code, info })).map(|_| ())
    }

    /// Meets the other device of the group that has `key`: by the answer, its GID and what it had to say, if it was there
    /// first, else by [`Event::Rendezvous`] with `tag` when it comes. A key joins two; then it is free again.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`]: `NotSupported` if the device knows no keys, `Already` if this one waits, `Quota` if too many do.
    pub fn rendezvous(
        &self,
        key: [u8; 32],
        tag: u32,
        payload: [u8; 32],
    ) -> Result<Option<(Gid, [u8; 32])>, Error> {
        match self.core.command(&Request::Rendezvous(Rendezvous { key, tag, payload }))? {
            Reply::Rendezvous(Met::NOBODY) => Ok(None),
            Reply::Rendezvous(Met { gid, payload }) => Ok(Some((gid, payload))),
            _ => Err(WRONG_REPLY),
        }
    }

    /// Takes a key back. False if it is not there: then the event is on its way, or was there.
    ///
    /// # Errors
    ///
    /// If the device cannot be asked.
    pub fn cancel_rendezvous(&self, key: [u8; 32], tag: u32) -> Result<bool, Error> {
        match self.core.command(&Request::CancelRendezvous(Cancel { key, tag })) {
            Ok(_) => Ok(true),
            Err(Error::Refused { status: Status::NoEntry, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The events for this program, from the time of connecting on.
    pub fn events(&self) -> Events {
        Events(self.core.inbox.clone())
    }

    /// What it did so far.
    pub fn stats(&self) -> Stats {
        let counters = &self.core.counters;
        Stats {
            commands: counters.commands.load(Ordering::Relaxed),
            events: counters.events.load(Ordering::Relaxed),
            events_dropped: self.core.inbox.dropped(),
            rings: counters.rings.load(Ordering::Relaxed),
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("gid", &self.gid())
            .field("features", &self.core.features)
            .field("connected", &self.is_connected())
            .finish()
    }
}

const WRONG_REPLY: Error = Error::Contract("the answer is that of another command");

/// A started device, shared by its handles.
pub(crate) struct Core {
    transport: Box<dyn Transport>,
    features: Features,
    config: Config,
    plan: CopyPlan,
    spin: Duration,
    control: Control,
    events: Mutex<EventQueue>,
    moves: Vec<MoveQueue>,
    next_move_queue: AtomicUsize,
    /// Which move queues the reactor watches.
    watched: Mutex<Vec<usize>>,
    registry: Mutex<Registry>,
    inbox: Arc<Inbox>,
    lost: AtomicBool,
    process: Process,
    counters: Counters,
    registration: OnceLock<Registration>,
    lifeline: OnceLock<Lifeline>,
}

#[derive(Default)]
struct Counters {
    commands: AtomicU64,
    events: AtomicU64,
    rings: AtomicU64,
}

/// The DMBs of a device, for the events that are about them.
#[derive(Default)]
struct Registry {
    owned: HashMap<Token, Arc<DmbState>>,
    attached: HashMap<Token, Arc<RemoteState>>,
    /// Registrations and attachments whose answers are not booked yet, and what ended meanwhile.
    pending: usize,
    gone: Vec<Gid>,
    ended: Vec<Token>,
}

impl Core {
    /// Negotiates with a device and starts it.
    pub(crate) fn start(mut transport: Box<dyn Transport>, settings: Builder) -> Result<Arc<Core>, Error> {
        let offered = transport.offered();
        if !offered.contains(Features::VERSION_1) {
            return Err(Error::Missing("VIRTIO_F_VERSION_1"));
        }
        let mut features = offered & settings.features;
        features.set(Features::MAP, offered.contains(Features::MAP) && transport.window().is_some());
        let config = Config::parse(&transport.accept(features)?)?;

        let (event_idx, indirect) =
            (features.contains(Features::RING_EVENT_IDX), features.contains(Features::RING_INDIRECT_DESC));
        let queue = |number, size: u16, indirect| {
            // A VMM may give less than the device would take. None at all is said by the start.
            let size = size.min(transport.max_queue_size(number).max(control::QUEUE_SIZE));
            let layout = Layout::new(size, indirect);
            let memory = transport.allocate(layout.len, 4096)?;
            Ok::<_, Error>(Virtqueue::new(memory, layout, event_idx, indirect))
        };
        let buffers = |len| transport.allocate(len, 64);
        // A transport into another kernel never offers futexes.
        let awaited = if offered.contains(Features::FUTEX) { Awaited::Here } else { Awaited::Elsewhere };
        let control = Control::new(queue(CONTROL_QUEUE, control::QUEUE_SIZE, false)?, buffers)?;
        let events = EventQueue::new(queue(EVENT_QUEUE, events::QUEUE_SIZE, false)?, buffers)?;
        let moves = (0..config.move_queues.get().min(MAX_MOVE_QUEUES))
            .map(|i| {
                let number = FIRST_MOVE_QUEUE + i;
                let queue = queue(number, moves::QUEUE_SIZE, indirect)?;
                MoveQueue::new(number, queue, (settings.spin, awaited), buffers)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        control.with_queue(|control| {
            let mut queues = vec![control, events.queue()];
            start_with(&mut *transport, &mut queues, &moves)
        })?;
        transport.kick(EVENT_QUEUE);

        let core = Arc::new(Core {
            transport,
            features,
            plan: CopyPlan::from_bytes(config.copy_plan),
            config,
            spin: settings.spin,
            control,
            events: Mutex::new(events),
            moves,
            next_move_queue: AtomicUsize::new(0),
            watched: Mutex::default(),
            registry: Mutex::default(),
            inbox: Arc::new(Inbox::new()?),
            lost: AtomicBool::new(false),
            process: Process::current(),
            counters: Counters::default(),
            registration: OnceLock::new(),
            lifeline: OnceLock::new(),
        });
        let source: Weak<dyn Source> = Arc::downgrade(&(core.clone() as Arc<dyn Source>));
        let reactor = Reactor::get()?;
        let registration = core.registration.get_or_init(|| reactor.register(source));
        for (fd, what) in core.watched_fds() {
            let interest = if what == HANGUP { Interest::HangUp } else { Interest::Readable };
            registration.watch(fd, interest, what)?;
        }
        if core.transport.is_deaf() {
            let lifeline = reactor.lifeline(core.allocate(Lifeline::SIZE, Lifeline::SIZE)?);
            let address = lifeline.address();
            let _ = core.lifeline.set(lifeline);
            match core.command(&Request::Lifeline(address)) {
                // A device of an earlier version takes every stop for the end.
                Ok(_) | Err(Error::Refused { status: Status::NotSupported, .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(core)
    }

    pub(crate) fn transport(&self) -> &dyn Transport {
        &*self.transport
    }

    /// Memory that the device can reach.
    pub(crate) fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error> {
        self.check()?;
        self.transport.allocate(len, align)
    }

    pub(crate) fn max_segments(&self) -> usize {
        self.config.max_segments.get().max(1) as usize
    }

    pub(crate) fn max_move_size(&self) -> u64 {
        self.config.max_move_size.get().max(1)
    }

    pub(crate) fn move_queue(&self, i: usize) -> &MoveQueue {
        &self.moves[i]
    }

    /// The move queue for a new mover: one after the other.
    pub(crate) fn next_move_queue(&self) -> usize {
        self.next_move_queue.fetch_add(1, Ordering::Relaxed) % self.moves.len()
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// Whether the device can be used: by this process, and at all.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.process.check()?;
        if self.is_lost() { Err(Error::Disconnected) } else { Ok(()) }
    }

    /// The device is gone: everybody who waits for it shall learn that. To be called with no lock held.
    pub(crate) fn set_lost(&self) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(lifeline) = self.lifeline.get().filter(|_| self.process.is_current()) {
            lifeline.let_go();
        }
        let owned: Vec<_> = lock(&self.registry).owned.values().cloned().collect();
        owned.iter().for_each(|dmb| dmb.interrupt());
        lock(&self.registry).attached.values().for_each(|dmb| dmb.set_ended());
        self.moves.iter().for_each(MoveQueue::tell_all);
        self.inbox.close();
    }

    /// A device that broke its contract is not used any more. Returns the error. To be called with no lock held.
    pub(crate) fn give_up(&self, error: Error) -> Error {
        if matches!(error, Error::Contract(_) | Error::Response(_)) && !self.is_lost() {
            tracing::warn!("device {}: {error}", self.config.gid);
            // The hang-up wakes who waits on the device's descriptors.
            self.transport.give_up();
            self.set_lost();
        }
        error
    }

    fn command(&self, request: &Request<'_>) -> Result<Reply, Error> {
        self.check()?;
        self.counters.commands.fetch_add(1, Ordering::Relaxed);
        self.control.command(self.transport(), request).map_err(|error| self.give_up(error))
    }

    /// A part of the window that the device named.
    fn window(&self, offset: u64, len: u64) -> Result<SharedMemory, Error> {
        self.transport
            .window()
            .and_then(|window| window.get(offset, len, self.plan))
            .ok_or(Error::Contract("a DMB does not lie in what is mapped"))
    }

    fn window_line(&self, offset: u64) -> Result<Line, Error> {
        let memory = self.window(offset, LINE as u64)?;
        Line::new(memory).ok_or(Error::Contract("a control line is not aligned"))
    }

    /// Asks for something that events can be about as soon as the device has done it, and books it by `book`, which is
    /// told of devices that went and DMBs that ended meanwhile.
    fn ask_and_book<T>(
        &self,
        request: &Request<'_>,
        book: impl FnOnce(Reply, &mut Registry) -> Result<T, Error>,
    ) -> Result<T, Error> {
        lock(&self.registry).pending += 1;
        let reply = self.command(request);
        let mut registry = lock(&self.registry);
        let result = reply.and_then(|reply| book(reply, &mut registry));
        registry.pending -= 1;
        if registry.pending == 0 {
            registry.gone.clear();
            registry.ended.clear();
        }
        result
    }

    fn register(
        &self,
        peer: Gid,
        size: usize,
        home: Home<'_>,
        memory: impl FnOnce(&Core, &RegisterReply) -> Result<(SharedMemory, Line), Error>,
    ) -> Result<(Arc<DmbState>, SharedMemory), Error> {
        let request = Request::Register(Register { rgid: peer, size: size as u64, home });
        self.ask_and_book(&request, |reply, registry| {
            let Reply::Register(reply) = reply else { return Err(WRONG_REPLY) };
            if reply.size != size as u64 || registry.owned.contains_key(&reply.token) {
                return Err(Error::Contract("a DMB is not the one that was asked for"));
            }
            let (memory, line) = memory(self, &reply)?;
            let state = DmbState::new(reply.token, reply.index, peer, reply.flags, line, self.spin);
            let state = Arc::new(state);
            if registry.gone.contains(&peer) {
                state.set_peer_gone();
            }
            registry.owned.insert(reply.token, state.clone());
            Ok((state, memory))
        })
        .map_err(|error| self.give_up(error))
    }

    fn attach(&self, token: Token) -> Result<(Arc<RemoteState>, SharedMemory), Error> {
        self.ask_and_book(&Request::Attach(token), |reply, registry| {
            let Reply::Attach(AttachReply { gid, offset, line_offset, size, .. }) = reply else {
                return Err(WRONG_REPLY);
            };
            if size == 0 || !size.is_multiple_of(proto::GRANULE) {
                return Err(Error::Contract("a DMB's size is not a multiple of 4096"));
            }
            let memory = self.window(offset, size)?;
            let state = Arc::new(RemoteState::new(token, gid, self.window_line(line_offset)?));
            if registry.gone.contains(&gid) || registry.ended.contains(&token) {
                state.set_ended();
            }
            registry.attached.insert(token, state.clone());
            Ok((state, memory))
        })
        .map_err(|error| self.give_up(error))
    }

    /// Has the reactor take the completions of a move queue.
    pub(crate) fn watch_move_queue(&self, i: usize) -> Result<(), Error> {
        let mut watched = lock(&self.watched);
        if !watched.contains(&i)
            && let Some(registration) = self.registration.get()
        {
            let fd = self.transport.interrupt(self.moves[i].number());
            registration.watch(fd, Interest::Readable, MOVES + i as u8)?;
            watched.push(i);
        }
        Ok(())
    }

    /// What the reactor watches from the start.
    fn watched_fds(&self) -> impl Iterator<Item = (BorrowedFd<'_>, u8)> {
        let requests = self.transport.requests().map(|fd| (fd, REQUESTS));
        let others = [(self.transport.interrupt(EVENT_QUEUE), EVENTS), (self.transport.hangup(), HANGUP)];
        requests.into_iter().chain(others)
    }

    fn take_events(&self) -> Result<(), Error> {
        lock(&self.events).take(self.transport(), |event| {
            self.counters.events.fetch_add(1, Ordering::Relaxed);
            self.handle(event);
        })
    }

    fn handle(&self, event: proto::event::Event) {
        use proto::event::Event as Wire;
        let mut registry = lock(&self.registry);
        let pending = registry.pending != 0;
        let event = match event {
            Wire::Signal { token, .. } => {
                let dmb = registry.owned.get(&token).cloned();
                drop(registry);
                if let Some(dmb) = dmb {
                    dmb.notify();
                }
                return;
            }
            Wire::DmbUnregistered { token, gid } => {
                if let Some(dmb) = registry.attached.get(&token) {
                    dmb.set_ended();
                }
                if pending {
                    registry.ended.push(token);
                }
                Event::DmbUnregistered { token, owner: gid }
            }
            Wire::DmbDetached { token, gid, .. } => {
                if let Some(dmb) = registry.owned.get(&token) {
                    dmb.set_detached();
                }
                Event::DmbDetached { token, peer: gid }
            }
            Wire::DeviceGone { gid, reason } => {
                registry.owned.values().filter(|dmb| dmb.peer == gid).for_each(|dmb| dmb.set_peer_gone());
                registry.attached.values().filter(|dmb| dmb.owner == gid).for_each(|dmb| dmb.set_ended());
                if pending {
                    registry.gone.push(gid);
                }
                Event::DeviceGone { gid, reason }
            }
            Wire::Software { gid, code, info } => Event::Software { from: gid, code, info },
            Wire::Rendezvous { gid, tag, payload } => Event::Rendezvous { gid, tag, payload },
            Wire::DevicePaused { gid } => Event::DevicePaused { gid },
            Wire::DeviceResumed { gid } => Event::DeviceResumed { gid },
            // The window knows what is mapped.
            Wire::ExtentAdded(_) | Wire::ExtentRemoved(_) => return,
        };
        drop(registry);
        self.inbox.put(event);
    }
}

/// Starts the device with these queues and the move queues, which are borrowed one after the other.
fn start_with(
    transport: &mut dyn Transport,
    queues: &mut Vec<&Virtqueue>,
    moves: &[MoveQueue],
) -> Result<(), Error> {
    match moves.split_first() {
        None => transport.start(queues),
        Some((first, rest)) => first.with_queue(|queue| {
            let mut queues = queues.clone();
            queues.push(queue);
            start_with(transport, &mut queues, rest)
        }),
    }
}

impl Port for Core {
    fn unregister(&self, dmb: &DmbState) {
        if !self.process.is_current() {
            return;
        }
        lock(&self.registry).owned.remove(&dmb.token);
        if let Err(error) = self.command(&Request::Unregister(dmb.token)) {
            tracing::debug!("unregistering {}: {error}", dmb.token);
        }
    }

    fn detach(&self, dmb: &RemoteState) {
        if !self.process.is_current() {
            return;
        }
        lock(&self.registry).attached.remove(&dmb.token);
        if let Err(error) = self.command(&Request::Detach(dmb.token)) {
            tracing::debug!("detaching {}: {error}", dmb.token);
        }
    }

    fn ring(&self, token: Token) -> Result<(), Error> {
        self.check()?;
        self.counters.rings.fetch_add(1, Ordering::Relaxed);
        let header = MoveHeader { token, offset: 0, mask: 0, flags: MoveFlags::RING };
        let posted = Posted { progress: None, ticket: 0, staged: 0, _keep: Vec::new() };
        self.moves[0].post(self, &header, &[], posted).map(|_| ())
    }

    fn is_connected(&self) -> bool {
        !self.is_lost()
    }

    fn leave_will(&self, last: &LastMove) -> Option<libc::c_ulong> {
        self.check().ok()?;
        self.transport.leave_will(last)
    }

    fn withdraw_will(&self, number: libc::c_ulong) {
        // In a child of fork() it is the parent's.
        if self.process.is_current() {
            self.transport.withdraw_will(number);
        }
    }

    fn daemon(&self) -> Option<i32> {
        let hangup = self.transport.hangup();
        getsockopt(&hangup, PeerCredentials).ok().map(|peer| peer.pid()).filter(|pid| *pid > 0)
    }
}

impl Source for Core {
    fn ready(&self, what: u8) {
        let result = match what {
            REQUESTS => self.transport.serve(),
            EVENTS => self.take_events(),
            HANGUP => {
                // Events that came before are still told. The peer of a socket that hung up wrote nothing after it.
                let last = self.take_events();
                // Half a hang-up becomes a whole one, which is what others wait for.
                self.transport.give_up();
                self.set_lost();
                last
            }
            queue => self.moves[usize::from(queue - MOVES)].take_and_arm(),
        };
        if let Err(error) = result {
            tracing::warn!("device {}: {error}", self.config.gid);
            self.transport.give_up();
            self.set_lost();
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // Before the reset: what follows is no pause.
        let lifeline = self.lifeline.take();
        if self.process.is_current() {
            drop(lifeline);
        } else {
            std::mem::forget(lifeline);
        }
        let Some(registration) = self.registration.take() else { return };
        if !self.process.is_current() {
            // The epoll instance is the parent's as well, and a lock of the registration may be held by a thread
            // that is not in this process.
            std::mem::forget(registration);
            return;
        }
        for (fd, _) in self.watched_fds() {
            registration.forget(fd);
        }
        for &i in &*lock(&self.watched) {
            registration.forget(self.transport.interrupt(self.moves[i].number()));
        }
    }
}

/// What the library does about a device that is not as it should be; `tests/` has the rest, over the real daemon.
#[cfg(test)]
mod tests;
