//! A whole daemon in this process, and front-ends over real sockets. What is exact about single parts is tested there;
//! here it is that they come together, and that nobody waits for anybody.

use super::*;
use crate::hub::HubSettings;
use crate::placement::{NumaSettings, Placement};
use crate::settings::{DeviceSettings, Limits, PoolSettings};
use crate::testing::{BASE, Guest, TestRing};
use dmbridge_proto::config::{CONFIG_SIZE, Config};
use dmbridge_proto::control::{
    AttachReply, Command, HEADER_SIZE, Home, PairFlags, Register, RegisterReply, Reply, Request, SignalEvent,
};
use dmbridge_proto::event::{EVENT_SIZE, Event, GoneReason};
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::{Gid, Token};
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE, WINDOW_SHMID};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

const MEMORY: u64 = 4 << 20;
/// Where the front-end says that it has its memory itself.
const USER_BASE: u64 = 0x7000_0000_0000;
const QUEUE_SIZE: u16 = 64;
/// Milliseconds. Nothing takes this long unless it never happens.
const PATIENCE: u16 = 30_000;

/// A daemon with a hub, in a folder of its own.
struct World {
    daemon: Daemon,
    folder: TempDir,
}

impl World {
    fn start() -> World {
        World::start_with(|_, _| {})
    }

    fn start_with(change: impl FnOnce(&mut Settings, &Path)) -> World {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = Settings {
            pool: PoolSettings { max_bytes: 256 << 20, ..PoolSettings::default() },
            hub: Some(HubSettings::new(folder.path().join("hub"))),
            ..Settings::default()
        };
        change(&mut settings, folder.path());
        World { daemon: Daemon::start(settings).unwrap(), folder }
    }

    fn stream(&self) -> UnixStream {
        UnixStream::connect(self.folder.path().join("hub")).unwrap()
    }

    fn connect(&self) -> Client {
        Client::new(self.stream(), true)
    }

    fn report(&self) -> Report {
        self.daemon.handle().report().unwrap()
    }

    /// Waits until the report is as it should be: every report is made after everything that was asked before it.
    fn until(&self, mut good: impl FnMut(&Report) -> bool) -> Report {
        for _ in 0..100_000 {
            let report = self.report();
            if good(&report) {
                return report;
            }
            std::thread::yield_now();
        }
        panic!("the daemon never came to the expected state: {:#?}", self.report());
    }
}

struct Queue {
    ring: TestRing,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
}

/// A front-end with its driver. It answers requests to map when the test says so.
struct Client {
    socket: UnixStream,
    frontend: Frontend,
    channel: UnixStream,
    guest: Guest,
    config: Config,
    queues: Vec<Queue>,
    /// The files that were mapped, by offset in the window.
    window: HashMap<u64, File>,
    scratch: u64,
    events: u64,
}

impl Client {
    fn new(stream: UnixStream, map: bool) -> Client {
        let mut client = Client::negotiate(stream, map);
        client.start();
        client
    }

    /// A front-end that has said everything but not started the device.
    fn negotiate(stream: UnixStream, map: bool) -> Client {
        let socket = stream.try_clone().unwrap();
        let mut frontend = Frontend::from_stream(stream, 16);
        frontend.set_owner().unwrap();
        let bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        assert_eq!(frontend.get_features().unwrap() & (bit | Features::MAP.bits()), bit);
        let mut protocol =
            Protocol::CONFIG | Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIGURE_MEM_SLOTS;
        protocol |= Protocol::RESET_DEVICE;
        if map {
            protocol |= Protocol::BACKEND_REQ | Protocol::BACKEND_SEND_FD | Protocol::SHMEM;
        }
        assert!(frontend.get_protocol_features().unwrap().contains(protocol));
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (channel, theirs) = UnixStream::pair().unwrap();
        if map {
            frontend.set_backend_request_fd(&theirs.as_raw_fd()).unwrap();
            assert_eq!(frontend.get_shmem_config().unwrap().memory_sizes[usize::from(WINDOW_SHMID)], 1 << 30);
        }
        let features = frontend.get_features().unwrap();
        assert_eq!(features & Features::MAP.bits() != 0, map);
        frontend.set_features(features & !Features::RING_EVENT_IDX.bits()).unwrap();
        let guest = Guest::new(MEMORY);
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: BASE,
            memory_size: MEMORY,
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: guest.file.as_raw_fd(),
        };
        frontend.set_mem_table(&[region]).unwrap();
        let (_, config) = frontend
            .get_config(0, CONFIG_SIZE as u32, VhostUserConfigFlags::empty(), &[0; CONFIG_SIZE])
            .unwrap();
        let queues = frontend.get_queue_num().unwrap();
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let queue =
            |_| Queue { ring: TestRing::new(&guest, QUEUE_SIZE), kick: event(), call: event(), err: event() };
        let queues = (0..queues).map(queue).collect();
        let scratch = guest.take(1 << 20);
        let events = guest.take(EVENT_SIZE as u64 * u64::from(QUEUE_SIZE));
        let config = Config::parse(&config).unwrap();
        let window = HashMap::new();
        Client { socket, frontend, channel, guest, config, queues, window, scratch, events }
    }

    fn start(&mut self) {
        for (index, queue) in self.queues.iter().enumerate() {
            let layout = queue.ring.layout;
            let user = |addr: u64| addr - BASE + USER_BASE;
            let addresses = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: user(layout.descriptors),
                used_ring_addr: user(layout.used),
                avail_ring_addr: user(layout.available),
                log_addr: None,
            };
            self.frontend.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.frontend.set_vring_addr(index, &addresses).unwrap();
            self.frontend.set_vring_base(index, queue.ring.offered()).unwrap();
            self.frontend.set_vring_call(index, &queue.call).unwrap();
            self.frontend.set_vring_err(index, &queue.err).unwrap();
            self.frontend.set_vring_kick(index, &queue.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    fn gid(&self) -> Gid {
        self.config.gid
    }

    /// Waits for the next used chain of a queue: the used length.
    fn used(&mut self, queue: u16) -> u32 {
        let q = &mut self.queues[usize::from(queue)];
        loop {
            if let Some((_, len)) = q.ring.used(&self.guest) {
                return len;
            }
            assert!(readable(&[&q.call, &q.err]), "queue {queue} is not used");
            assert!(q.err.read().is_err(), "queue {queue} was stopped");
            let _ = q.call.read();
        }
    }

    /// Offers a command.
    fn begin(&mut self, request: &Request<'_>) {
        let mut bytes = Vec::new();
        request.emit(|piece| bytes.extend_from_slice(piece));
        self.guest.write(self.scratch, &bytes);
        let (from, to) = ((self.scratch, bytes.len() as u32), (self.scratch + 4096, 64));
        let queue = &mut self.queues[usize::from(CONTROL_QUEUE)];
        queue.ring.offer_pieces(&self.guest, &[from], &[to]);
        queue.kick.write(1).unwrap();
    }

    /// Waits for the answer to a command.
    fn finish(&mut self, command: Command) -> Result<Reply, Status> {
        let len = self.used(CONTROL_QUEUE);
        Reply::parse(command, &self.guest.read(self.scratch + 4096, len as usize)).unwrap()
    }

    fn is_answered(&mut self) -> bool {
        self.queues[0].call.read().is_ok()
    }

    fn command(&mut self, request: &Request<'_>) -> Result<Reply, Status> {
        self.begin(request);
        self.finish(request.command())
    }

    fn begin_register(&mut self, rgid: Gid, size: u64) {
        self.begin(&Request::Register(Register { rgid, size, home: Home::Pool }));
    }

    fn finish_register(&mut self) -> Result<RegisterReply, Status> {
        match self.finish(Command::Register)? {
            Reply::Register(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    /// The first registration for a peer: both front-ends are asked to map.
    fn register_and_map(&mut self, peer: &mut Client, size: u64) -> RegisterReply {
        self.begin_register(peer.gid(), size);
        self.map(true);
        let reply = self.finish_register().unwrap();
        peer.map(true);
        reply
    }

    fn attach(&mut self, token: Token) -> Result<AttachReply, Status> {
        match self.command(&Request::Attach(token))? {
            Reply::Attach(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    fn query(&mut self, gid: Gid) -> Result<Reply, Status> {
        self.command(&Request::QueryGid(gid))
    }

    /// Waits for a request to map or unmap and answers it.
    fn map(&mut self, agree: bool) -> u64 {
        let (code, offset, file) = self.asked();
        match (file, agree) {
            (Some(file), true) => drop(self.window.insert(offset, file)),
            (None, true) => drop(self.window.remove(&offset).expect("an extent that is mapped")),
            _ => {}
        }
        self.answer(code, agree);
        offset
    }

    fn asked(&mut self) -> (u32, u64, Option<File>) {
        let mut bytes = [0u8; 52];
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let mut iov = [IoSliceMut::new(&mut bytes)];
        let message =
            recvmsg::<()>(self.channel.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::empty()).unwrap();
        assert_eq!(message.bytes, 52);
        let mut file = None;
        for control in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel just made the descriptor for us.
                file = Some(unsafe { File::from_raw_fd(fds[0]) });
            }
        }
        let code = u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        (code, u64::from_ne_bytes(bytes[28..36].try_into().unwrap()), file)
    }

    fn answer(&mut self, code: u32, agree: bool) {
        let mut bytes = [code, 5, 8].map(u32::to_ne_bytes).concat();
        bytes.extend(u64::from(!agree).to_ne_bytes());
        self.channel.write_all(&bytes).unwrap();
    }

    /// Reads or writes the window as the guest would.
    fn file_at(&self, offset: u64) -> (&File, u64) {
        let (start, file) =
            self.window.iter().filter(|(s, _)| **s <= offset).max_by_key(|(s, _)| **s).unwrap();
        (file, offset - start)
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let (file, at) = self.file_at(offset);
        file.write_all_at(bytes, at).unwrap();
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let (file, at) = self.file_at(offset);
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn move_bytes(&mut self, header: MoveHeader, bytes: &[u8]) -> Result<(), Status> {
        let (at, data, answer) = (self.scratch + 8192, self.scratch + 12288, self.scratch + 8192 + 64);
        self.guest.write(at, &header.to_bytes());
        self.guest.write(data, bytes);
        let queue = &mut self.queues[usize::from(FIRST_MOVE_QUEUE)];
        queue.ring.offer_pieces(&self.guest, &[(at, 32), (data, bytes.len() as u32)], &[(answer, 8)]);
        queue.kick.write(1).unwrap();
        assert_eq!(self.used(FIRST_MOVE_QUEUE), 8);
        Status::from_byte(self.guest.read(answer, 1)[0]).unwrap()
    }

    /// Posts one buffer and waits for the event in it.
    fn event(&mut self) -> Event {
        let queue = &mut self.queues[usize::from(EVENT_QUEUE)];
        queue.ring.offer_pieces(&self.guest, &[], &[(self.events, EVENT_SIZE as u32)]);
        queue.kick.write(1).unwrap();
        assert_eq!(self.used(EVENT_QUEUE), EVENT_SIZE as u32);
        Event::parse(&self.guest.read(self.events, EVENT_SIZE)).unwrap()
    }

    fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        assert!(readable(&[&self.socket]));
        matches!(self.socket.read(&mut byte), Ok(0) | Err(_))
    }
}

fn readable(what: &[&dyn AsRawFd]) -> bool {
    let mut fds: Vec<PollFd<'_>> = what
        .iter()
        // SAFETY: the caller's references keep the descriptors open.
        .map(|fd| PollFd::new(unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }, PollFlags::POLLIN))
        .collect();
    poll(&mut fds, PollTimeout::from(PATIENCE)).unwrap() > 0
}

fn header(token: Token, flags: MoveFlags) -> MoveHeader {
    MoveHeader { token, offset: 0, mask: 1, flags }
}

#[test]
fn stores_and_moves_of_the_peer_are_the_owners_data() {
    let world = World::start();
    let (mut owner, mut peer) = (world.connect(), world.connect());
    assert_eq!(owner.query(peer.gid()), Ok(Reply::QueryGid(PairFlags::MAP | PairFlags::FUTEX)));
    let dmb = owner.register_and_map(&mut peer, 64 << 10);
    let remote = peer.attach(dmb.token).unwrap();
    peer.write(remote.offset + 100, b"stored");
    assert_eq!(owner.read(dmb.offset + 100, 6), b"stored");
    assert_eq!(peer.move_bytes(header(dmb.token, MoveFlags::empty()), b"moved"), Ok(()));
    assert_eq!(owner.read(dmb.offset, 5), b"moved");
    assert!(matches!(owner.event(), Event::ExtentAdded(e) if e.owned));
    assert!(matches!(peer.event(), Event::ExtentAdded(e) if !e.owned));
    // The owner sleeps, and is woken by a move.
    owner.write(dmb.line_offset, &1u32.to_le_bytes());
    assert_eq!(peer.move_bytes(header(dmb.token, MoveFlags::SIGNAL), b"!"), Ok(()));
    assert_eq!(owner.event(), Event::Signal { index: 0, token: dmb.token, gid: peer.gid() });
    assert_eq!(owner.read(dmb.line_offset + 8, 8), 1u64.to_le_bytes());
    let report = world.report();
    let of = |client: &Client| report.devices.iter().find(|d| d.gid == client.gid().to_string()).unwrap();
    assert_eq!((of(&owner).dmbs, of(&owner).extents, of(&owner).map_requests), (1, 1, 1));
    assert_eq!((of(&peer).attached, of(&peer).moves, of(&peer).moved_bytes), (1, 2, 6));
    assert_eq!((of(&peer).signals_sent, report.pool.extents), (1, 1));
}

#[test]
fn a_front_end_that_never_answers_delays_only_itself() {
    let world = World::start();
    let (mut deaf, mut a, mut b) = (world.connect(), world.connect(), world.connect());
    deaf.begin_register(a.gid(), 4096);
    let (code, _, _file) = deaf.asked();
    // Others go on, with it and without it.
    let dmb = a.register_and_map(&mut b, 4096);
    assert!(b.attach(dmb.token).is_ok());
    a.begin_register(deaf.gid(), 4096);
    a.map(true);
    let for_deaf = a.finish_register().unwrap();
    assert_eq!(deaf.move_bytes(header(for_deaf.token, MoveFlags::empty()), b"moves go on"), Ok(()));
    assert_eq!(a.read(for_deaf.offset, 11), b"moves go on");
    assert!(!deaf.is_answered());
    deaf.answer(code, false);
    assert_eq!(deaf.finish_register(), Err(Status::Io));
}

#[test]
fn a_front_end_that_leaves_with_a_command_under_way_leaves_nothing() {
    let world = World::start();
    let (mut a, b) = (world.connect(), world.connect());
    a.begin_register(b.gid(), 4096);
    let _ = a.asked();
    drop(a);
    world.until(|report| report.devices.len() == 1 && report.pool.extents == 0);
    drop(b);
    world.until(|report| report.devices.is_empty());
}

#[test]
fn memory_that_vanishes_expels_the_device_and_its_peers_hear_of_it() {
    let world = World::start();
    let (mut owner, mut bad) = (world.connect(), world.connect());
    let dmb = owner.register_and_map(&mut bad, 4096);
    assert!(matches!(owner.event(), Event::ExtentAdded(_)));
    let data = bad.guest.take(1 << 20);
    bad.guest.file.set_len(data - BASE).unwrap();
    let queue = &mut bad.queues[usize::from(FIRST_MOVE_QUEUE)];
    bad.guest.write(bad.scratch, &header(dmb.token, MoveFlags::empty()).to_bytes());
    queue.ring.offer_pieces(&bad.guest, &[(bad.scratch, 32), (data, 4096)], &[(bad.scratch + 64, 8)]);
    queue.kick.write(1).unwrap();
    assert!(bad.is_closed());
    let gone = Event::DeviceGone { gid: bad.gid(), reason: GoneReason::Expelled };
    assert_eq!(owner.event(), gone);
    assert_eq!(owner.read(dmb.offset, 4096), [0; 4096]);
    assert_eq!(owner.query(bad.gid()), Err(Status::NoEntry));
    assert_eq!(owner.query(owner.gid()), Ok(Reply::QueryGid(PairFlags::MAP | PairFlags::FUTEX)));
}

#[test]
fn a_device_that_is_reset_starts_again_with_nothing() {
    let world = World::start();
    let (mut owner, mut peer) = (world.connect(), world.connect());
    let dmb = owner.register_and_map(&mut peer, 4096);
    peer.attach(dmb.token).unwrap();
    assert!(matches!(peer.event(), Event::ExtentAdded(_)));
    for queue in 0..owner.queues.len() {
        owner.frontend.set_vring_enable(queue, false).unwrap();
        let base = owner.frontend.get_vring_base(queue).unwrap();
        assert_eq!(base, u32::from(owner.queues[queue].ring.offered()));
    }
    assert_eq!(peer.event(), Event::DeviceGone { gid: owner.gid(), reason: GoneReason::Reset });
    assert_eq!(peer.query(owner.gid()), Err(Status::NoEntry));
    assert_eq!(peer.move_bytes(header(dmb.token, MoveFlags::empty()), b"late"), Err(Status::NoEntry));
    peer.map(true);
    assert!(matches!(peer.event(), Event::ExtentRemoved(_)));
    assert_eq!(world.report().pool.extents, 0);
    // The front-end has emptied its window.
    owner.window.clear();
    owner.start();
    let again = owner.register_and_map(&mut peer, 4096);
    assert_ne!(again.token, dmb.token);
    assert!(peer.attach(again.token).is_ok());
    owner.frontend.reset_device().unwrap();
    assert!(matches!(peer.event(), Event::ExtentAdded(_)));
    assert_eq!(peer.event(), Event::DeviceGone { gid: owner.gid(), reason: GoneReason::Reset });
}

#[test]
fn rings_that_are_disabled_for_a_while_go_on_where_they_were() {
    let world = World::start();
    let (mut owner, mut peer) = (world.connect(), world.connect());
    let dmb = owner.register_and_map(&mut peer, 4096);
    let gid = peer.gid();
    for queue in 0..owner.queues.len() {
        for client in [&mut owner, &mut peer] {
            client.frontend.set_vring_enable(queue, false).unwrap();
        }
    }
    // Offered while nobody looks.
    peer.begin(&Request::SignalEvent(SignalEvent { rgid: owner.gid(), code: 7, info: 8 }));
    owner.begin_register(gid, 1 << 20);
    for queue in 0..owner.queues.len() {
        for client in [&mut owner, &mut peer] {
            client.frontend.set_vring_enable(queue, true).unwrap();
        }
    }
    assert_eq!(peer.finish(Command::SignalEvent), Ok(Reply::Done));
    assert!(owner.finish_register().is_ok());
    assert!(matches!(owner.event(), Event::ExtentAdded(_)));
    assert_eq!(owner.event(), Event::Software { gid, code: 7, info: 8 });
    assert_eq!(peer.move_bytes(header(dmb.token, MoveFlags::empty()), b"again"), Ok(()));
    assert_eq!(owner.read(dmb.offset, 5), b"again");
}

#[test]
fn an_extent_is_reported_with_its_pair_and_where_it_is_to_lie() {
    let world = World::start_with(|settings, _| settings.pool.placement = Placement::Interleave);
    let (mut owner, mut peer) = (world.connect(), world.connect());
    let dmb = owner.register_and_map(&mut peer, 64 << 10);
    let report = world.report();
    let nodes: Vec<u32> = report.topology.nodes.iter().map(|node| node.id).collect();
    let [extent] = &report.extents[..] else { panic!("{:?}", report.extents) };
    assert_eq!((u64::from(extent.id), extent.bytes), (dmb.token.to_bits() >> 32, 2 << 20));
    assert_eq!((&extent.owner, &extent.peer), (&owner.gid().to_string(), &peer.gid().to_string()));
    assert_eq!((extent.placement.as_str(), report.pool.placement.as_str()), ("interleave", "interleave"));
    // With one node there is nothing to place and nothing to look for.
    assert_eq!(extent.nodes.is_empty(), nodes.len() == 1);
    assert_eq!(extent.pages.is_empty(), nodes.len() == 1);
}

#[test]
fn a_configured_device_keeps_its_gid_and_serves_one_front_end_at_a_time() {
    let gid = Gid::from_u64(0x4711);
    let world = World::start_with(|settings, folder| {
        settings.devices.push(DeviceSettings {
            name: "web".into(),
            endpoint: Endpoint::Path(folder.join("web")),
            group: "a".into(),
            gid: Some(gid),
            limits: Limits::default(),
            numa: NumaSettings::default(),
        });
    });
    let path = world.folder.path().join("web");
    let first = Client::new(UnixStream::connect(&path).unwrap(), false);
    assert_eq!(first.gid(), gid);
    let second = UnixStream::connect(&path).unwrap();
    let waiting = std::thread::spawn(|| Client::new(second, true));
    let started = |report: &Report| report.devices.iter().filter(|d| d.started).count();
    assert_eq!(started(&world.report()), 1);
    drop(first);
    let mut second = waiting.join().unwrap();
    assert_eq!(second.gid(), gid);
    let mut stranger = world.connect();
    assert_eq!(stranger.query(gid), Err(Status::NoEntry));
    assert_eq!(second.query(stranger.gid()), Err(Status::NoEntry));
}

#[test]
fn a_daemon_of_one_descriptor_ends_with_its_front_end() {
    let (theirs, ours) = UnixStream::pair().unwrap();
    let device = DeviceSettings {
        name: "fd".into(),
        endpoint: Endpoint::Fd(ours.into()),
        group: "a".into(),
        gid: None,
        limits: Limits::default(),
        numa: NumaSettings::default(),
    };
    let daemon = Daemon::start(Settings { devices: vec![device], ..Settings::default() }).unwrap();
    let client = Client::new(theirs, true);
    drop(client);
    daemon.join().unwrap();
    let device = DeviceSettings {
        name: "null".into(),
        endpoint: Endpoint::Fd(File::open("/dev/null").unwrap().into()),
        group: "a".into(),
        gid: None,
        limits: Limits::default(),
        numa: NumaSettings::default(),
    };
    let settings = Settings { devices: vec![device], ..Settings::default() };
    assert!(matches!(Daemon::start(settings), Err(Error::Descriptor(name)) if name == "null"));
}

#[test]
fn half_messages_and_unread_answers_delay_nobody() {
    let world = World::start();
    let mut half = world.stream();
    half.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    // GET_FEATURES again and again, and no answer is read.
    let mut deaf = world.stream();
    let get_features = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    deaf.set_nonblocking(true).unwrap();
    while deaf.write_all(&get_features).is_ok() {}
    let (mut a, mut b) = (world.connect(), world.connect());
    let dmb = a.register_and_map(&mut b, 4096);
    assert!(b.attach(dmb.token).is_ok());
    world.until(|report| report.devices.len() == 3);
    drop(half);
    world.until(|report| report.devices.len() == 2);
}

#[test]
fn what_no_front_end_may_say_ends_its_session_alone() {
    let world = World::start();
    let mut good = world.connect();
    let refused: [fn(&mut Client); 5] = [
        |client| assert!(client.frontend.set_vring_num(2, 3).is_err()),
        |client| assert!(client.frontend.set_vring_num(2, 2048).is_err()),
        |client| assert!(client.frontend.set_features(1 << 60 | 1 << 30).is_err()),
        |client| {
            // A region that is longer than its file.
            let region = VhostUserMemoryRegionInfo {
                guest_phys_addr: BASE,
                memory_size: 2 * MEMORY,
                userspace_addr: USER_BASE,
                mmap_offset: 0,
                mmap_handle: client.guest.file.as_raw_fd(),
            };
            assert!(client.frontend.set_mem_table(&[region]).is_err());
        },
        |client| {
            let file = File::open("/dev/null").unwrap();
            // SAFETY: the descriptor is a duplicate that belongs to the EventFd alone.
            let not_one = unsafe { EventFd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(file)) };
            assert!(client.frontend.set_vring_call(2, &not_one).is_err());
        },
    ];
    for refuse in refused {
        let mut client = Client::negotiate(world.stream(), true);
        refuse(&mut client);
        assert!(client.is_closed());
    }
    assert_eq!(good.query(good.gid()), Ok(Reply::QueryGid(PairFlags::MAP | PairFlags::FUTEX)));
    assert_eq!(world.report().devices.len(), 1);
}

#[test]
fn a_queue_that_cannot_be_followed_stops_alone() {
    let world = World::start();
    let (mut bad, mut peer) = (world.connect(), world.connect());
    let dmb = peer.register_and_map(&mut bad, 4096);
    for queue in [EVENT_QUEUE, CONTROL_QUEUE] {
        let q = &bad.queues[usize::from(queue)];
        q.ring.claim(&bad.guest, q.ring.offered() + QUEUE_SIZE + 1);
        q.kick.write(1).unwrap();
        if queue == EVENT_QUEUE {
            // It is looked at when there is something to tell.
            let say = Request::SignalEvent(SignalEvent { rgid: bad.gid(), code: 0, info: 0 });
            assert_eq!(peer.command(&say), Ok(Reply::Done));
        }
        assert!(readable(&[&bad.queues[usize::from(queue)].err]));
    }
    assert_eq!(bad.move_bytes(header(dmb.token, MoveFlags::empty()), b"moves go on"), Ok(()));
    assert_eq!(peer.read(dmb.offset, 11), b"moves go on");
}

#[test]
fn commands_above_the_rate_are_delayed_and_all_are_answered() {
    let world = World::start_with(|settings, _| {
        if let Some(hub) = &mut settings.hub {
            hub.limits.commands_per_second = 500;
        }
    });
    let mut client = world.connect();
    let gid = client.gid();
    for _ in 0..600 {
        assert!(client.query(gid).is_ok());
    }
}

#[test]
fn malformed_commands_are_returned_and_the_next_is_answered() {
    let world = World::start();
    let mut client = world.connect();
    let gid = client.gid();
    let (scratch, outside) = (client.scratch, BASE + MEMORY - 4);
    let query = Request::QueryGid(gid);
    let mut bytes = Vec::new();
    query.emit(|piece| bytes.extend_from_slice(piece));
    let n = bytes.len() as u32;
    let answer = scratch + 4096;
    type Pieces<'a> = &'a [(u64, u32)];
    let cases: [(Pieces<'_>, Pieces<'_>, u32, u8); 9] = [
        (&[(scratch, n)], &[], 0, 0),
        (&[(scratch, n)], &[(answer, 7)], 0, 0),
        (&[(scratch, n)], &[(outside, 16)], 0, 0),
        (&[(outside, n)], &[(answer, 16)], 0, 0),
        (&[], &[(answer, 16)], 8, Status::Invalid as u8),
        (&[(scratch, 7)], &[(answer, 16)], 8, Status::Invalid as u8),
        (&[(scratch, n - 1)], &[(answer, 16)], 8, Status::Invalid as u8),
        (&[(scratch, n)], &[(answer, 15)], 8, Status::Invalid as u8),
        (&[(scratch, 8), (scratch + 8, n - 8), (scratch, 99)], &[(answer, 3), (answer + 3, 13)], 16, 0),
    ];
    for (readable, writable, len, status) in cases {
        client.guest.write(scratch, &bytes);
        client.guest.write(answer, &[0xee; HEADER_SIZE]);
        let queue = &mut client.queues[usize::from(CONTROL_QUEUE)];
        queue.ring.offer_pieces(&client.guest, readable, writable);
        queue.kick.write(1).unwrap();
        assert_eq!(client.used(CONTROL_QUEUE), len, "{readable:x?} {writable:x?}");
        if len != 0 {
            assert_eq!(client.guest.read(answer, 1)[0], status, "{readable:x?} {writable:x?}");
        }
        assert!(client.query(gid).is_ok());
    }
    // An unknown command is told from one that is too short.
    client.guest.write(scratch, &[9; 8]);
    let queue = &mut client.queues[usize::from(CONTROL_QUEUE)];
    queue.ring.offer_pieces(&client.guest, &[(scratch, 8)], &[(answer, 8)]);
    queue.kick.write(1).unwrap();
    assert_eq!(client.used(CONTROL_QUEUE), 8);
    assert_eq!(client.guest.read(answer, 1)[0], Status::NotSupported as u8);
}

/// What a keeper that is a thread of this process has.
type Kept = Arc<Mutex<HashMap<u64, OwnedFd>>>;

/// A keeper that has this; the worker's end of the link.
fn keeper(kept: &Kept) -> OwnedFd {
    use crate::keep::link::{Word, receive};
    use nix::sys::socket::{AddressFamily, ControlMessage, SockFlag, SockType, sendmsg, socketpair};
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let kept = kept.clone();
    std::thread::spawn(move || {
        let all = copy(&kept);
        for (number, fd) in all.iter().map(|(n, fd)| (*n, fd.as_raw_fd())).chain([(0, ours.as_raw_fd())]) {
            let (bytes, fds) = (number.to_le_bytes(), [fd]);
            let iov = [std::io::IoSlice::new(&bytes)];
            let rights = [ControlMessage::ScmRights(&fds)];
            // A worker that refuses does not read everything.
            let _ = sendmsg::<()>(ours.as_raw_fd(), &iov, &rights, MsgFlags::MSG_NOSIGNAL, None);
        }
        let mut bytes = [0; 16];
        while let Ok((16, fds)) = receive(ours.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            match Word::from_bytes(&bytes) {
                Some(Word::Keep(number)) => {
                    drop(kept.lock().unwrap().insert(number, fds.into_iter().next().unwrap()))
                }
                Some(Word::Drop(number)) => drop(kept.lock().unwrap().remove(&number)),
                _ => {}
            }
        }
    });
    theirs
}

fn copy(kept: &Kept) -> HashMap<u64, OwnedFd> {
    kept.lock().unwrap().iter().map(|(number, fd)| (*number, fd.try_clone().unwrap())).collect()
}

/// The descriptors that an entry names.
fn named(value: &serde_json::Value) -> Vec<u64> {
    use serde_json::Value;
    match value {
        Value::Array(values) => values.iter().flat_map(named).collect(),
        Value::Object(map) => {
            let of = |(key, value): (&String, &Value)| match key.as_str() {
                "fd" | "kick" | "call" => value.as_u64().into_iter().collect(),
                _ => named(value),
            };
            map.iter().flat_map(of).collect()
        }
        _ => Vec::new(),
    }
}

/// The entry with other numbers where `pick` gives some.
fn distort(value: &serde_json::Value, pick: &mut impl FnMut(u64) -> Option<u64>) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Number(number) => {
            number.as_u64().and_then(&mut *pick).map_or_else(|| value.clone(), Value::from)
        }
        Value::Array(values) => values.iter().map(|value| distort(value, pick)).collect(),
        Value::Object(map) => {
            Value::Object(map.iter().map(|(key, value)| (key.clone(), distort(value, pick))).collect())
        }
        other => other.clone(),
    }
}

#[test]
fn whatever_a_book_says_it_is_taken_over_or_refused() {
    use crate::engine::set::EngineSettings;
    use crate::keep::book::Book;
    use crate::keep::exact::Outlet;
    use dmbridge_proto::control::{Segment, Segments};
    use dmbridge_proto::rendezvous::Rendezvous;
    let folder = tempfile::tempdir().unwrap();
    let start = |hub: &str, kept: &Kept| {
        let settings = Settings {
            pool: PoolSettings { max_bytes: 256 << 20, ..PoolSettings::default() },
            hub: Some(HubSettings::new(folder.path().join(hub))),
            engines: EngineSettings { workers: Some(0), ..EngineSettings::default() },
            ..Settings::default()
        };
        Daemon::start_kept(settings, keeper(kept))
    };
    let kept = Kept::default();
    let daemon = start("hub", &kept).unwrap();
    let connect = || Client::new(UnixStream::connect(folder.path().join("hub")).unwrap(), true);
    let (mut owner, mut peer) = (connect(), connect());
    // Something of everything: DMBs of both kinds, one attached, an event that waits, a key, a command that waits.
    let dmb = owner.register_and_map(&mut peer, 8192);
    peer.attach(dmb.token).unwrap();
    let segments = [Segment { addr: owner.scratch + 65536, len: 4096 }.to_bytes()];
    let home = Home::Ram { line_addr: owner.scratch + 131072, segments: Segments::from_wire(&segments) };
    owner.command(&Request::Register(Register { rgid: peer.gid(), size: 4096, home })).unwrap();
    owner.command(&Request::Lifeline(owner.scratch)).unwrap();
    owner.command(&Request::SignalEvent(SignalEvent { rgid: peer.gid(), code: 1, info: 2 })).unwrap();
    owner.command(&Request::Rendezvous(Rendezvous { key: [3; 32], tag: 1, payload: [4; 32] })).unwrap();
    peer.begin_register(owner.gid(), 8192);
    peer.asked();
    assert_eq!(daemon.handle().report().unwrap().devices.len(), 2);
    let book = Book::open(kept.lock().unwrap()[&crate::keep::BOOK].try_clone().unwrap()).unwrap();
    let entries: Vec<(String, Vec<u8>)> =
        book.values().map(|(name, value)| (name.into(), value.into())).collect();
    // The daemon does not wait until the keeper has taken what it is sent.
    for fd in entries.iter().flat_map(|(_, value)| named(&serde_json::from_slice(value).unwrap())) {
        let start = Instant::now();
        while !kept.lock().unwrap().contains_key(&fd) {
            assert!(start.elapsed() < Duration::from_secs(30), "the keeper has no descriptor {fd}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let heritage = Arc::new(Mutex::new(copy(&kept)));
    for kind in ["session", "command", "channel", "device", "slot", "extent", "dmb", "event", "key"] {
        assert!(entries.iter().any(|(name, _)| name.starts_with(kind)), "{kind} is in no entry");
    }
    drop(daemon);

    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let (mut taken, mut refused) = (0, 0);
    for round in 0..200 {
        let mut book = Book::new().unwrap();
        let wrong = random() as usize % entries.len();
        for (number, (name, value)) in entries.iter().enumerate() {
            // The first one is as it was.
            if number != wrong || round == 0 {
                book.put(name, value);
            } else if round % 4 != 1 {
                let whole: serde_json::Value = serde_json::from_slice(value).unwrap();
                let mut pick = |is: u64| match random() % 12 {
                    0 => Some(0),
                    1 => Some(is.wrapping_add(1)),
                    2 => Some(1 << (random() % 64)),
                    3 => Some(u64::MAX - random() % 2),
                    _ => None,
                };
                let other = serde_json::to_vec(&distort(&whole, &mut pick)).unwrap();
                book.put(name, &other);
            }
        }
        book.commit();
        let outlet = Outlet::new().unwrap();
        let mut heritage = copy(&heritage);
        heritage.insert(crate::keep::BOOK, book.as_fd().try_clone_to_owned().unwrap());
        heritage.insert(crate::keep::OUTLET_READ, outlet.pipe().0.try_clone_to_owned().unwrap());
        heritage.insert(crate::keep::OUTLET_WRITE, outlet.pipe().1.try_clone_to_owned().unwrap());
        let started = start(&format!("hub{round}"), &Arc::new(Mutex::new(heritage)));
        let result = started.and_then(|daemon| {
            let report = daemon.handle().report();
            if round == 0 {
                let Some(report) = report else { panic!("it ended: {:?}", daemon.join()) };
                assert!(report.devices.iter().all(|device| device.started));
            }
            daemon.handle().stop();
            daemon.join()
        });
        match result {
            Ok(()) => taken += 1,
            Err(Error::Keep(_)) => refused += 1,
            Err(error) => panic!("{}: {error}", entries[wrong].0),
        }
    }
    assert!(taken > 10 && refused > 10, "{taken} taken over, {refused} refused");
}
