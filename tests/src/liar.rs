//! A device that lies: a vhost-user back-end for one front-end that answers its driver with anything at all.
//!
//! It is the opposite of [`frontend`](crate::frontend). What a good device does (`docs/device.md`) it does just well enough that
//! a driver comes far, and tells lies by chance: in the configuration, in replies and events, in the rings, in control lines.
//! It never lies to the front-end, which the driver is not.

use crate::memory::{BASE, GuestMemory};
use crate::random::Random;
use dmbridge_proto::config::{CONFIG_SIZE, Config, MAGIC, VERSION_MAJOR};
use dmbridge_proto::control::{
    AttachReply, Command, HEADER_SIZE, PairFlags, RegisterReply, Reply, Request, Response,
};
use dmbridge_proto::event::{EVENT_SIZE, Event};
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::{Gid, Token};
use dmbridge_proto::moves::{self, MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE, GRANULE, WINDOW_SHMID};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::{Error as IoError, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMMap, VhostUserMMapFlags, VhostUserMemoryRegion,
    VhostUserProtocolFeatures as Protocol, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
    VhostUserFrontendReqHandler,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Its GID.
pub const GID: Gid = Gid::from_u64(0x11a5_11a5_11a5_11a5);
const WINDOW: u64 = 16 << 20;
const QUEUES: usize = 3;
/// DMBs in the window: one MiB each, its control line in the page before.
const STRIDE: u64 = 2 << 20;
const MAX_DMB: u64 = 1 << 20;
const MAX_DMBS: u32 = 64;

/// What it lies about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Nothing.
    Honest,
    /// Anything, once in so many times, and the configuration in every other round.
    Anything(u64),
    /// Events and control lines only, those so that nobody sleeps for ever; and every other attach is refused. AF_SMC goes
    /// on over that, and over more it cannot be tried: Linux 6.1's own hangs if its device breaks while it makes a connection.
    Interrupts,
}

/// The device; it lasts as long as the program.
pub struct Liar(Arc<Mutex<State>>);

impl Liar {
    /// Waits for a front-end at this socket.
    pub fn listen(socket: &Path) -> Liar {
        let listener = UnixListener::bind(socket).expect("a socket");
        let state = Arc::new(Mutex::new(State::new()));
        let (messages, rings) = (state.clone(), state.clone());
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a front-end");
            let mut handler = BackendReqHandler::from_stream(stream, messages);
            while handler.handle_request().is_ok() {}
        });
        thread::spawn(move || serve(&rings));
        Liar(state)
    }

    /// From now on lies like this, in a way that is the same in every run for the same number.
    pub fn begin(&self, round: u64, mood: Mood) {
        let mut state = lock(&self.0);
        state.random = Random::new(round);
        state.mood = mood;
        state.config = honest_config();
        if matches!(mood, Mood::Anything(_)) && state.random.one_in(2) {
            for _ in 0..1 + state.random.below(3) {
                let at = state.random.below(CONFIG_SIZE as u64 / 4) as usize * 4;
                let bytes = state.random.number().to_le_bytes();
                let len = (CONFIG_SIZE - at).min([2, 4, 8][state.random.below(3) as usize]);
                state.config[at..at + len].copy_from_slice(&bytes[..len]);
            }
        }
    }

    /// How many lies it has told.
    pub fn lies(&self) -> u64 {
        lock(&self.0).lies
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn honest_config() -> [u8; CONFIG_SIZE] {
    let config = Config {
        magic: MAGIC,
        version_major: VERSION_MAJOR.into(),
        version_minor: 0.into(),
        fabric_id: 0x0d3b.into(),
        move_queues: 1.into(),
        gid: GID,
        system_eid: *b"DMBRIDGE-SYSTEM-EID-F1FA9B773897",
        window_size: WINDOW.into(),
        max_dmb_size: MAX_DMB.into(),
        max_dmb_bytes: WINDOW.into(),
        max_dmbs: MAX_DMBS.into(),
        max_segments: 1024.into(),
        max_move_size: MAX_DMB.into(),
        granule: (GRANULE as u32).into(),
        copy_plan: [1; 16],
        reserved: [0; 4],
    };
    zerocopy::transmute!(config)
}

/// One ring, as the front-end described it.
#[derive(Default)]
struct Queue {
    size: u16,
    /// Descriptors, used and available ring, at the front-end's addresses.
    addresses: (u64, u64, u64),
    next: u16,
    used: u16,
    enabled: bool,
    kick: Option<Arc<File>>,
    call: Option<File>,
}

struct Dmb {
    token: u64,
    index: u32,
    /// In the window; none for one in the guest's RAM.
    place: Option<u64>,
    size: u64,
}

struct Chain {
    head: u16,
    readable: Vec<u8>,
    writable: Vec<(GuestAddress, u32)>,
}

struct State {
    random: Random,
    mood: Mood,
    lies: u64,
    config: [u8; CONFIG_SIZE],
    features: u64,
    regions: Vec<(u64, u64, u64)>,
    memory: GuestMemoryMmap,
    queues: [Queue; QUEUES],
    /// What is in the window.
    window: GuestMemory,
    channel: Option<Backend>,
    /// The window is to be mapped before anything is answered.
    to_map: bool,
    dmbs: Vec<Dmb>,
    tokens: u64,
    changed: EventFd,
}

/// Serves the rings for ever.
fn serve(state: &Mutex<State>) {
    loop {
        let (changed, kicks) = {
            let state = lock(state);
            let kicks: Vec<_> = state.queues.iter().map(|queue| queue.kick.clone()).collect();
            (state.changed.try_clone().expect("a descriptor"), kicks)
        };
        // SAFETY: it is open for as long as `changed` lives.
        let changed_fd = unsafe { BorrowedFd::borrow_raw(changed.as_raw_fd()) };
        let mut fds = vec![PollFd::new(changed_fd, PollFlags::POLLIN)];
        fds.extend(kicks.iter().flatten().map(|kick| PollFd::new(kick.as_fd(), PollFlags::POLLIN)));
        poll(&mut fds, PollTimeout::NONE).expect("poll");
        let _ = changed.read();
        for kick in kicks.iter().flatten() {
            let mut count = [0; 8];
            if (&**kick).read(&mut count).is_err() {
                continue;
            }
        }
        map_window(state);
        let mut state = lock(state);
        state.serve_commands();
        state.serve_moves();
    }
}

/// Maps the window, if the device has just been started. Nobody may hold the state meanwhile: QEMU sends a memory table
/// before it answers.
fn map_window(state: &Mutex<State>) {
    let (channel, fd) = {
        let mut state = lock(state);
        // A command waits for its answer: nobody stops the device.
        if !state.to_map || !state.is_offered(CONTROL_QUEUE) {
            return;
        }
        state.to_map = false;
        (state.channel.clone().expect("SHMEM was negotiated"), state.window.fd())
    };
    let request = VhostUserMMap {
        shmid: WINDOW_SHMID,
        padding: [0; 7],
        fd_offset: 0,
        shm_offset: 0,
        len: WINDOW,
        flags: VhostUserMMapFlags::WRITABLE.bits(),
    };
    channel.shmem_map(&request, &fd).expect("the front-end maps the window");
}

impl State {
    fn new() -> State {
        State {
            random: Random::new(0),
            mood: Mood::Honest,
            lies: 0,
            config: honest_config(),
            features: 0,
            regions: Vec::new(),
            memory: GuestMemoryMmap::new(),
            queues: Default::default(),
            window: GuestMemory::new(WINDOW),
            channel: None,
            to_map: false,
            dmbs: Vec::new(),
            tokens: 0,
            changed: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    /// Whether to lie this time.
    fn lie(&mut self) -> bool {
        let lie = matches!(self.mood, Mood::Anything(n) if self.random.one_in(n));
        self.lies += u64::from(lie);
        lie
    }

    // --- rings ---

    /// Guest memory at an address of the front-end's.
    fn at(&self, user: u64) -> GuestAddress {
        let region = self.regions.iter().find(|(_, at, size)| (*at..at + size).contains(&user));
        let (guest, at, _) = region.expect("a ring is in the memory table");
        GuestAddress(guest + (user - at))
    }

    fn read<T: vm_memory::ByteValued>(&self, at: GuestAddress) -> T {
        self.memory.read_obj(at).expect("a good driver's addresses are guest memory")
    }

    fn write(&self, at: GuestAddress, bytes: &[u8]) {
        self.memory.write_slice(bytes, at).expect("a good driver's addresses are guest memory");
    }

    fn is_offered(&self, queue: u16) -> bool {
        let queue = &self.queues[usize::from(queue)];
        queue.enabled && self.read::<u16>(GuestAddress(self.at(queue.addresses.2).0 + 2)) != queue.next
    }

    /// The next chain that the driver offers.
    fn take(&mut self, number: u16) -> Option<Chain> {
        if !self.is_offered(number) {
            return None;
        }
        let queue = &self.queues[usize::from(number)];
        let (table, available) = (self.at(queue.addresses.0), self.at(queue.addresses.2));
        let head: u16 = self.read(GuestAddress(available.0 + 4 + 2 * u64::from(queue.next % queue.size)));
        let mut chain = Chain { head, readable: Vec::new(), writable: Vec::new() };
        let mut number_of = head;
        loop {
            let descriptor: [u64; 2] = self.read(GuestAddress(table.0 + 16 * u64::from(number_of)));
            let (address, len) = (GuestAddress(descriptor[0]), descriptor[1] as u32);
            let (flags, next) = ((descriptor[1] >> 32) as u16, (descriptor[1] >> 48) as u16);
            if flags & crate::ring::WRITE != 0 {
                chain.writable.push((address, len));
            } else {
                let mut bytes = vec![0; len as usize];
                self.memory
                    .read_slice(&mut bytes, address)
                    .expect("a good driver's addresses are guest memory");
                chain.readable.extend(bytes);
            }
            if flags & crate::ring::NEXT == 0 {
                break;
            }
            number_of = next;
        }
        self.queues[usize::from(number)].next = self.queues[usize::from(number)].next.wrapping_add(1);
        Some(chain)
    }

    /// Gives a chain back with these bytes, or says so.
    fn give(&mut self, number: u16, chain: &Chain, bytes: &[u8]) {
        let mut rest = bytes;
        for (address, len) in &chain.writable {
            let (now, later) = rest.split_at(rest.len().min(*len as usize));
            self.write(*address, now);
            rest = later;
        }
        let (mut head, mut len, mut times) = (u32::from(chain.head), bytes.len() as u32, 1);
        if self.lie() {
            match self.random.below(5) {
                0 => head = self.random.number() as u32,
                1 => head = self.random.below(256) as u32,
                2 => times = 1 + self.random.below(300) as u16,
                _ => len = self.random.number() as u32,
            }
        }
        let queue = &self.queues[usize::from(number)];
        let (size, index) = (queue.size, queue.used);
        let used = self.at(queue.addresses.1);
        for i in 0..times.min(2) {
            let at = GuestAddress(used.0 + 4 + 8 * u64::from(index.wrapping_add(i) % size));
            self.write(at, &(u64::from(head) | u64::from(len) << 32).to_le_bytes());
        }
        let index = index.wrapping_add(times);
        self.queues[usize::from(number)].used = index;
        self.memory
            .store(index, GuestAddress(used.0 + 2), std::sync::atomic::Ordering::SeqCst)
            .expect("a ring is guest memory");
        if let Some(call) = &mut self.queues[usize::from(number)].call {
            let _ = call.write_all(&1u64.to_ne_bytes());
        }
    }

    // --- commands ---

    fn serve_commands(&mut self) {
        while !self.to_map
            && let Some(chain) = self.take(CONTROL_QUEUE)
        {
            let result = match Request::parse(&chain.readable, 1024) {
                Ok(request) => self.answer(&request),
                Err(status) => Err(status),
            };
            let mut bytes = Response::from(result).as_bytes().to_vec();
            let may_be_long = Command::parse(&chain.readable).map_or(0, |command| command.reply_size());
            if self.lie() {
                bytes.resize(HEADER_SIZE + may_be_long, 0);
                for _ in 0..1 + self.random.below(3) {
                    let at = self.random.below(bytes.len() as u64 / 4) as usize * 4;
                    // A place that could be one, or anything.
                    let word = match self.random.one_in(2) {
                        true => self.random.below(2 * WINDOW / GRANULE) * GRANULE,
                        false => self.random.number(),
                    };
                    let end = bytes.len().min(at + 8);
                    bytes[at..end].copy_from_slice(&word.to_le_bytes()[..end - at]);
                }
                // Most of the time it says that it succeeded.
                bytes[0] = if self.random.one_in(4) { self.random.next() as u8 } else { 0 };
            }
            self.give(CONTROL_QUEUE, &chain, &bytes);
            self.interrupt();
        }
    }

    fn answer(&mut self, request: &Request<'_>) -> std::result::Result<Reply, Status> {
        let flags = PairFlags::MAP | PairFlags::PRIVATE_LINE;
        match request {
            Request::QueryGid(_) => Ok(Reply::QueryGid(PairFlags::MAP)),
            Request::Register(register) => {
                let index = (0..MAX_DMBS).find(|i| self.dmbs.iter().all(|dmb| dmb.index != *i));
                let index = index.ok_or(Status::Quota)?;
                let in_ram = matches!(register.home, dmbridge_proto::control::Home::Ram { .. });
                let place = u64::from(index) * STRIDE + GRANULE;
                let place = if in_ram {
                    None
                } else if register.size <= MAX_DMB && place + MAX_DMB <= WINDOW {
                    Some(place)
                } else {
                    return Err(Status::NoSpace);
                };
                if let Some(place) = place {
                    self.window.write(BASE + place - GRANULE, &vec![0; (GRANULE + register.size) as usize]);
                }
                self.tokens += 1;
                self.dmbs.push(Dmb { token: self.tokens, index, place, size: register.size });
                Ok(Reply::Register(RegisterReply {
                    token: Token::from_bits(self.tokens),
                    offset: place.unwrap_or(0),
                    line_offset: place.map_or(0, |place| place - GRANULE),
                    size: register.size,
                    index,
                    flags,
                }))
            }
            Request::Unregister(token) => {
                self.dmbs.retain(|dmb| dmb.token != token.to_bits());
                Ok(Reply::Done)
            }
            Request::Attach(token) => {
                let dmb = self.dmbs.iter().find(|dmb| dmb.token == token.to_bits()).ok_or(Status::NoEntry)?;
                let place = dmb.place.ok_or(Status::NotSupported)?;
                if self.mood == Mood::Interrupts && self.random.one_in(2) {
                    return Err(
                        [Status::NotSupported, Status::NoSpace, Status::Io][self.random.below(3) as usize]
                    );
                }
                let (line_offset, size) = (place - GRANULE, dmb.size);
                Ok(Reply::Attach(AttachReply { gid: GID, offset: place, line_offset, size, flags }))
            }
            Request::SignalEvent(event) => {
                self.tell(&Event::Software { gid: GID, code: event.code, info: event.info }.to_bytes());
                Ok(Reply::Done)
            }
            _ => Ok(Reply::Done),
        }
    }

    // --- moves ---

    fn serve_moves(&mut self) {
        while !self.to_map
            && let Some(chain) = self.take(FIRST_MOVE_QUEUE)
        {
            let header = chain.readable.first_chunk().map(MoveHeader::parse);
            let mut status = 0;
            if let Some(Ok(header)) = header {
                status = Status::to_byte(&self.do_move(&header, &chain.readable[moves::HEADER_SIZE..]));
            }
            if self.lie() {
                status = self.random.next() as u8;
            }
            self.give(FIRST_MOVE_QUEUE, &chain, &[status, 0, 0, 0, 0, 0, 0, 0]);
            self.interrupt();
        }
    }

    fn do_move(&mut self, header: &MoveHeader, data: &[u8]) -> std::result::Result<(), Status> {
        let token = header.token.to_bits();
        let dmb = self.dmbs.iter().find(|dmb| dmb.token == token).ok_or(Status::NoEntry)?;
        let (index, place) = (dmb.index, dmb.place);
        if header.offset.checked_add(data.len() as u64).is_none_or(|end| end > dmb.size) {
            return Err(Status::Invalid);
        }
        if let Some(place) = place {
            self.window.write(BASE + place + header.offset, data);
            if header.flags.contains(MoveFlags::SIGNAL) {
                self.window.write(BASE + place - GRANULE + 8, &header.mask.to_le_bytes());
            }
        }
        if !header.flags.is_empty() {
            self.tell(&Event::Signal { index, token: header.token, gid: GID }.to_bytes());
        }
        Ok(())
    }

    // --- events ---

    /// Writes an event, if the driver has a buffer for it.
    fn tell(&mut self, event: &[u8]) {
        if let Some(chain) = self.take(EVENT_QUEUE) {
            self.give(EVENT_QUEUE, &chain, event);
        }
    }

    /// What no driver asked for: events of all kinds, and control lines that say anything.
    fn interrupt(&mut self) {
        if self.mood == Mood::Honest {
            return;
        }
        for _ in 0..self.random.below(4) {
            let known = self.random.below(self.dmbs.len() as u64 + 1) as usize;
            let (token, index) = self.dmbs.get(known).map_or((0, 0), |dmb| (dmb.token, dmb.index));
            let mut event = [0; EVENT_SIZE];
            let kind = match self.mood {
                // A device that is gone ends what a driver could work with.
                Mood::Interrupts => [1, 2, 6, 7, 8, 9, 10, 11][self.random.below(8) as usize],
                _ => self.random.below(13) as u16,
            };
            let mut pick = |honest: u64| if self.random.one_in(2) { honest } else { self.random.number() };
            event[..2].copy_from_slice(&kind.to_le_bytes());
            event[2..4].copy_from_slice(&(pick(0) as u16).to_le_bytes());
            event[4..8].copy_from_slice(&(pick(index.into()) as u32).to_le_bytes());
            event[8..16].copy_from_slice(&pick(GID.as_u64().unwrap_or_default()).to_be_bytes());
            event[24..32].copy_from_slice(&pick(token).to_le_bytes());
            for at in [32, 40, 48, 56] {
                event[at..at + 8].copy_from_slice(&pick(0).to_le_bytes());
            }
            self.lies += 1;
            self.tell(&event);
        }
        for i in 0..self.dmbs.len() {
            if let Some(place) = self.dmbs[i].place
                && self.random.one_in(4)
            {
                let mut field = 8 * self.random.below(8);
                let mut value = self.random.number();
                if self.mood == Mood::Interrupts {
                    // `armed` stays, and what was signalled.
                    (field, value) = (field.max(8), value | 1);
                }
                self.window.write(BASE + place - GRANULE + field, &value.to_le_bytes());
            }
        }
    }
}

fn unsupported<T>() -> Result<T> {
    Err(Error::ReqHandlerError(IoError::other("not offered")))
}

impl VhostUserBackendReqHandlerMut for State {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        let features = Features::VERSION_1 | Features::MAP | Features::RAM_DMB | Features::PRIVATE_LINE;
        Ok(features.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.features = features;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mapped = regions.iter().zip(files).map(|(region, file)| {
            let file = FileOffset::new(file, region.mmap_offset);
            let mapping =
                MmapRegion::from_file(file, region.memory_size as usize).expect("guest memory can be mapped");
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr))
                .expect("guest memory has an end")
        });
        self.memory = GuestMemoryMmap::from_regions(mapped.collect()).expect("guest memory does not overlap");
        self.regions = regions.iter().map(|r| (r.guest_phys_addr, r.user_addr, r.memory_size)).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.queues[index as usize].size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.queues[index as usize].addresses = (descriptor, used, available);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = &mut self.queues[index as usize];
        (queue.next, queue.used) = (base as u16, base as u16);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = &mut self.queues[index as usize];
        queue.enabled = false;
        queue.kick = None;
        Ok(VhostUserVringState::new(index, queue.next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queues[usize::from(index)].kick = fd.map(Arc::new);
        self.changed.write(1).expect("eventfd");
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queues[usize::from(index)].call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _index: u8, _fd: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<Protocol> {
        Ok(Protocol::MQ
            | Protocol::REPLY_ACK
            | Protocol::BACKEND_REQ
            | Protocol::BACKEND_SEND_FD
            | Protocol::CONFIG
            | Protocol::SHMEM)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queues[index as usize].enabled = enable;
        if index == u32::from(CONTROL_QUEUE) && enable {
            self.to_map = true;
            self.dmbs.clear();
        }
        self.changed.write(1).expect("eventfd");
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let (start, end) = (offset as usize, (offset + size) as usize);
        self.config.get(start..end).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        backend.set_reply_ack_flag(true);
        backend.set_shmem_flag(true);
        self.channel = Some(backend);
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unsupported()
    }

    fn add_mem_region(
        &mut self,
        _region: &VhostUserSingleMemoryRegion,
        _fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unsupported()
    }

    fn remove_mem_region(&mut self, _region: &VhostUserSingleMemoryRegion) -> Result<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        let mut sizes = [0; WINDOW_SHMID as usize + 1];
        sizes[usize::from(WINDOW_SHMID)] = WINDOW;
        Ok(VhostUserShMemConfig::new(1, &sizes))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}
