//! A front-end and driver in one that does what the test says, right or wrong.
//!
//! It is written against `docs/device.md` alone and shares no code with the library's driver, so that an error which the
//! library and the daemon agree on is found here.

use crate::deadline::{DEADLINE, until};
use crate::memory::GuestMemory;
use crate::ring::{Descriptor, Ring};
use crate::window::Window;
use dmbridge_proto::config::{CONFIG_SIZE, Config};
use dmbridge_proto::control::{
    AttachReply, Command, HEADER_SIZE, Home, PairFlags, Register, RegisterReply, Reply, Request, Segment,
    Segments, SignalEvent,
};
use dmbridge_proto::event::{EVENT_SIZE, Event};
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::{Gid, Token};
use dmbridge_proto::moves::{self, MoveFlags, MoveHeader};
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE, WINDOW_SHMID};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error, Frontend, FrontendReqHandler, VhostUserFrontend};

/// Which front-end to be.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of guest memory.
    pub memory: u64,
    /// Whether to be able to map; without, it asks for exactly what cloud-hypervisor does.
    pub map: bool,
    /// Features of the device to accept, if it offers them.
    pub features: Features,
    /// Descriptors of each queue.
    pub queue_size: u16,
    /// Event buffers to post from the start.
    pub event_buffers: u16,
    /// Whether to answer the device's map requests at all.
    pub answer: bool,
    /// Whether to start the device.
    pub start: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            memory: 8 << 20,
            map: true,
            features: Features::VERSION_1 | Features::MAP | Features::RAM_DMB | Features::RING_INDIRECT_DESC,
            queue_size: 256,
            event_buffers: 128,
            answer: true,
            start: true,
        }
    }
}

impl Options {
    /// A front-end that cannot map.
    pub fn without_map() -> Options {
        Options { map: false, ..Options::default() }
    }

    /// A process that can wait on a futex.
    pub fn with_futex() -> Options {
        let options = Options::default();
        Options { features: options.features | Features::FUTEX, ..options }
    }
}

/// A front-end with a device.
pub struct RawFrontend {
    frontend: Frontend,
    socket: UnixStream,
    backend_channel: UnixStream,
    server: Option<JoinHandle<()>>,
    window: Arc<Mutex<Window>>,
    /// Features that both sides accepted.
    pub features: Features,
    /// What the device presents.
    pub config: Config,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The queues.
    pub rings: Vec<Ring>,
    /// Where rings start.
    bases: Vec<u32>,
    scratch: u64,
    event_buffers: Vec<(u16, u64)>,
    events: VecDeque<Event>,
}

/// Bytes of guest memory that a command or a move is written to by [`RawFrontend`] itself.
const SCRATCH: u64 = 1 << 20;
/// Where in it answers go.
const ANSWER_AT: u64 = SCRATCH - 4096;

impl RawFrontend {
    /// Connects and starts a device with the default options.
    pub fn connect(path: impl AsRef<Path>) -> RawFrontend {
        RawFrontend::connect_with(path, Options::default())
    }

    /// Connects with these options.
    ///
    /// # Panics
    ///
    /// If the daemon refuses; [`RawFrontend::try_connect`] does not.
    pub fn connect_with(path: impl AsRef<Path>, options: Options) -> RawFrontend {
        RawFrontend::try_connect(path, &options, &mut |_| {})
            .expect("the daemon accepts a well-behaved front-end")
    }

    /// Connects, and calls `step` before each message with its name.
    pub fn try_connect(
        path: impl AsRef<Path>,
        options: &Options,
        step: &mut dyn FnMut(&'static str),
    ) -> anyhow::Result<RawFrontend> {
        step("connect");
        let socket = UnixStream::connect(path)?;
        RawFrontend::on_stream(socket, options, step)
    }

    /// As [`try_connect`](Self::try_connect), on a socket that is connected already.
    pub fn on_stream(
        socket: UnixStream,
        options: &Options,
        step: &mut dyn FnMut(&'static str),
    ) -> anyhow::Result<RawFrontend> {
        let mut frontend = Frontend::from_stream(socket.try_clone()?, 2);
        step("SET_OWNER");
        frontend.set_owner()?;
        step("GET_FEATURES");
        let offered = frontend.get_features()?;

        step("GET_PROTOCOL_FEATURES");
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(offered & protocol_bit)?;
        let mut protocol = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ;
        protocol |= if options.map {
            VhostUserProtocolFeatures::RESET_DEVICE
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM
        } else {
            VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::LOG_SHMFD
                | VhostUserProtocolFeatures::DEVICE_STATE
        };
        protocol &= frontend.get_protocol_features()?;
        step("SET_PROTOCOL_FEATURES");
        frontend.set_protocol_features(protocol)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);

        step("GET_SHMEM_CONFIG");
        let window_size = match protocol.contains(VhostUserProtocolFeatures::SHMEM) {
            true => frontend.get_shmem_config()?.memory_sizes[usize::from(WINDOW_SHMID)],
            false => 0,
        };
        let window = Arc::new(Mutex::new(Window::new(window_size.max(4096))));
        step("SET_BACKEND_REQ_FD");
        let mut handler = FrontendReqHandler::new(window.clone())?;
        handler.set_reply_ack_flag(true);
        let backend_channel = UnixStream::from(dup(handler.as_raw_fd())?);
        frontend.set_backend_request_fd(&handler.get_tx_raw_fd())?;
        let server = options.answer.then(|| std::thread::spawn(move || serve(handler)));

        step("GET_QUEUE_NUM");
        let queues = frontend.get_queue_num()? as usize;
        step("SET_FEATURES");
        let features = Features::from_bits_truncate(frontend.get_features()?) & options.features;
        frontend.set_features(features.bits() | protocol_bit)?;
        step("GET_CONFIG");
        let space = [0; CONFIG_SIZE];
        let (_, space) =
            frontend.get_config(0, CONFIG_SIZE as u32, VhostUserConfigFlags::WRITABLE, &space)?;
        let config = Config::parse(&space)?;

        let mut memory = GuestMemory::new(options.memory);
        let rings: Vec<_> = (0..queues).map(|_| Ring::new(&mut memory, options.queue_size)).collect();
        let scratch = memory.allocate(SCRATCH, 4096);
        step("SET_MEM_TABLE");
        frontend.set_mem_table(&[memory.region()])?;

        let mut this = RawFrontend {
            frontend,
            socket,
            backend_channel,
            server,
            window,
            features,
            config,
            memory,
            bases: vec![0; rings.len()],
            rings,
            scratch,
            event_buffers: Vec::new(),
            events: VecDeque::new(),
        };
        if options.start {
            this.start(step)?;
            step("post event buffers");
            this.post_event_buffers(options.event_buffers);
        }
        Ok(this)
    }

    /// Tells the device all its rings and enables them, the control queue last.
    pub fn start(&mut self, step: &mut dyn FnMut(&'static str)) -> anyhow::Result<()> {
        for i in (0..self.rings.len()).rev() {
            self.tell_ring(i, step)?;
            step("SET_VRING_ENABLE");
            self.frontend.set_vring_enable(i, true)?;
        }
        Ok(())
    }

    /// Tells the device one ring.
    pub fn tell_ring(&mut self, i: usize, step: &mut dyn FnMut(&'static str)) -> anyhow::Result<()> {
        let ring = &self.rings[i];
        step("SET_VRING_NUM");
        self.frontend.set_vring_num(i, ring.size)?;
        step("SET_VRING_ADDR");
        self.frontend.set_vring_addr(i, &ring.addresses(&self.memory))?;
        self.frontend.set_vring_base(i, self.bases[i] as u16)?;
        step("SET_VRING_CALL");
        self.frontend.set_vring_call(i, &ring.call)?;
        self.frontend.set_vring_err(i, &ring.err)?;
        step("SET_VRING_KICK");
        self.frontend.set_vring_kick(i, &ring.kick)?;
        Ok(())
    }

    /// The vhost-user protocol, to say anything else with.
    pub fn vhost(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The vhost-user socket, to write any bytes to.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// The window. Do not hold it while you wait for the device.
    pub fn window(&self) -> MutexGuard<'_, Window> {
        self.window.lock().expect("no test thread panicked with it")
    }

    /// This device's GID.
    pub fn gid(&self) -> Gid {
        self.config.gid
    }

    /// Stops the device as QEMU does when it pauses the virtual machine: everything stays as it is.
    pub fn pause(&mut self) {
        for i in 0..self.rings.len() {
            self.frontend.set_vring_enable(i, false).expect("SET_VRING_ENABLE");
            self.bases[i] = self.frontend.get_vring_base(i).expect("GET_VRING_BASE");
        }
    }

    /// Starts it again as it was.
    pub fn resume(&mut self) {
        self.frontend.set_mem_table(&[self.memory.region()]).expect("SET_MEM_TABLE");
        self.start(&mut |_| {}).expect("the device goes on");
    }

    /// Where its rings are to start the next time.
    pub fn bases(&mut self) -> &mut [u32] {
        &mut self.bases
    }

    /// Stops the device as a driver's reset does; nothing is mapped after that (vhost-user, `BACKEND_SHMEM_MAP`).
    pub fn reset(&mut self) {
        for i in 0..self.rings.len() {
            self.frontend.set_vring_enable(i, false).expect("SET_VRING_ENABLE");
            self.frontend.get_vring_base(i).expect("GET_VRING_BASE");
            self.bases[i] = 0;
        }
        self.window().clear();
        self.event_buffers.clear();
        self.events.clear();
        for ring in &mut self.rings {
            ring.reset(&self.memory);
        }
    }

    /// Waits until the daemon has closed the connection.
    pub fn wait_closed(&mut self) {
        self.socket.set_read_timeout(Some(DEADLINE)).expect("timeout");
        let mut rest = Vec::new();
        match (&self.socket).read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the daemon did not close the connection: {error}"),
        }
    }

    /// Whether the daemon has closed the connection.
    pub fn is_closed(&self) -> bool {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLHUP)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll");
        fds[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP))
    }

    /// Waits for the next used chain of a queue: its head and the used length.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let end = Instant::now() + DEADLINE;
        let ring = &mut self.rings[usize::from(queue)];
        loop {
            let _ = ring.call.read();
            if let Some(used) = ring.take_used(&self.memory) {
                return used;
            }
            let mut fds = [
                PollFd::new(borrow(&ring.call), PollFlags::POLLIN),
                PollFd::new(borrow(&ring.err), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLHUP),
            ];
            let left = end.saturating_duration_since(Instant::now());
            let ready =
                poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)).expect("poll");
            assert_ne!(ready, 0, "the device did not use a chain of queue {queue} within {DEADLINE:?}");
            let happened = |i: usize| fds[i].any().unwrap_or(false);
            if !happened(0) {
                assert!(!happened(1), "the device stopped queue {queue}");
                assert!(!happened(2), "the daemon closed the connection");
            }
        }
    }

    /// Waits until the device has stopped a queue because it cannot follow it.
    pub fn wait_stopped(&mut self, queue: u16) {
        let err = &self.rings[usize::from(queue)].err;
        until("the device signals the queue's error file descriptor", || err.read().ok());
    }

    /// Offers a chain of these descriptors and waits for the answer: the used length.
    pub fn offer_and_wait(&mut self, queue: u16, pieces: &[Descriptor]) -> u32 {
        let head = self.offer(queue, pieces);
        let (used, len) = self.wait_used(queue);
        assert_eq!(used, head, "queue {queue} used another chain");
        len
    }

    /// Offers a chain of these descriptors, and rings.
    pub fn offer(&mut self, queue: u16, pieces: &[Descriptor]) -> u16 {
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.chain(&self.memory, pieces);
        ring.offer(&self.memory, head);
        ring.ring();
        head
    }

    /// Guest memory for whatever a test wants to write there itself.
    pub fn scratch(&self) -> u64 {
        self.scratch
    }

    /// A command of any bytes, with an answer buffer of any size: the used length and what is in the buffer.
    pub fn command(&mut self, bytes: &[u8], answer: usize) -> (u32, Vec<u8>) {
        let (request, reply) = (self.scratch, self.scratch + ANSWER_AT);
        self.memory.write(request, bytes);
        self.memory.write(reply, &vec![0xee; answer]);
        let mut pieces = Vec::new();
        if !bytes.is_empty() {
            pieces.push(Descriptor::readable(request, bytes.len() as u32));
        }
        if answer > 0 {
            pieces.push(Descriptor::writable(reply, answer as u32));
        }
        let used = self.offer_and_wait(CONTROL_QUEUE, &pieces);
        (used, self.memory.read(reply, answer))
    }

    /// A command as it should be.
    pub fn request(&mut self, request: &Request<'_>) -> Result<Reply, Status> {
        let head = self.begin_request(request);
        self.end_request(head, request.command())
    }

    /// Sends a command without waiting for its answer.
    pub fn begin_request(&mut self, request: &Request<'_>) -> u16 {
        let mut bytes = Vec::new();
        request.emit(|piece| bytes.extend_from_slice(piece));
        let answer = HEADER_SIZE + request.command().reply_size();
        self.memory.write(self.scratch, &bytes);
        let pieces = [
            Descriptor::readable(self.scratch, bytes.len() as u32),
            Descriptor::writable(self.scratch + ANSWER_AT, answer as u32),
        ];
        self.offer(CONTROL_QUEUE, &pieces)
    }

    /// Waits for the answer of a command that was sent.
    pub fn end_request(&mut self, head: u16, command: Command) -> Result<Reply, Status> {
        let (used, len) = self.wait_used(CONTROL_QUEUE);
        assert_eq!(used, head, "commands are answered in order");
        let bytes = self.memory.read(self.scratch + ANSWER_AT, len as usize);
        Reply::parse(command, &bytes).expect("the device's answer follows the specification")
    }

    /// `QUERY_GID`
    pub fn query(&mut self, gid: Gid) -> Result<PairFlags, Status> {
        match self.request(&Request::QueryGid(gid))? {
            Reply::QueryGid(flags) => Ok(flags),
            other => panic!("{other:?}"),
        }
    }

    /// `REGISTER` in the pool.
    pub fn register(&mut self, rgid: Gid, size: u64) -> Result<RegisterReply, Status> {
        self.register_at(rgid, size, Home::Pool)
    }

    /// `REGISTER` in this guest's memory: the DMB in these pieces, its control line at `line_addr`.
    pub fn register_ram(
        &mut self,
        rgid: Gid,
        line_addr: u64,
        pieces: &[Segment],
    ) -> Result<RegisterReply, Status> {
        let wire: Vec<_> = pieces.iter().map(Segment::to_bytes).collect();
        let size = pieces.iter().map(|piece| piece.len).sum();
        self.register_at(rgid, size, Home::Ram { line_addr, segments: Segments::from_wire(&wire) })
    }

    fn register_at(&mut self, rgid: Gid, size: u64, home: Home<'_>) -> Result<RegisterReply, Status> {
        match self.request(&Request::Register(Register { rgid, size, home }))? {
            Reply::Register(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    /// `UNREGISTER`
    pub fn unregister(&mut self, token: Token) -> Result<(), Status> {
        self.request(&Request::Unregister(token)).map(drop)
    }

    /// `ATTACH`
    pub fn attach(&mut self, token: Token) -> Result<AttachReply, Status> {
        match self.request(&Request::Attach(token))? {
            Reply::Attach(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    /// `DETACH`
    pub fn detach(&mut self, token: Token) -> Result<(), Status> {
        self.request(&Request::Detach(token)).map(drop)
    }

    /// `SIGNAL_EVENT`
    pub fn signal_event(&mut self, rgid: Gid, code: u32, info: u64) -> Result<(), Status> {
        self.request(&Request::SignalEvent(SignalEvent { rgid, code, info })).map(drop)
    }

    /// A move of these bytes, without a signal.
    pub fn move_bytes(&mut self, token: Token, offset: u64, bytes: &[u8]) -> Result<(), Status> {
        self.move_with(&MoveHeader { token, offset, mask: 0, flags: MoveFlags::empty() }, bytes)
    }

    /// A move of these bytes with this header.
    pub fn move_with(&mut self, header: &MoveHeader, bytes: &[u8]) -> Result<(), Status> {
        let data = self.scratch + 4096;
        self.memory.write(data, bytes);
        let piece = Descriptor::readable(data, bytes.len() as u32);
        let pieces = if bytes.is_empty() { &[][..] } else { &[piece] };
        let (used, status) = self.move_raw(&header.to_bytes(), pieces);
        assert_eq!(used, moves::RESPONSE_SIZE as u32, "a move is answered with 8 bytes");
        Status::from_byte(status).expect("a status that the specification knows")
    }

    /// A move with any header and any data descriptors: the used length and the status.
    pub fn move_raw(&mut self, header: &[u8], data: &[Descriptor]) -> (u32, u8) {
        let answer = self.scratch + ANSWER_AT;
        self.memory.write(self.scratch, header);
        self.memory.write(answer, &[0xee; 8]);
        let mut pieces = vec![Descriptor::readable(self.scratch, header.len() as u32)];
        pieces.extend_from_slice(data);
        pieces.push(Descriptor::writable(answer, 8));
        let used = self.offer_and_wait(FIRST_MOVE_QUEUE, &pieces);
        (used, self.memory.read(answer, 1)[0])
    }

    /// Posts so many more event buffers.
    pub fn post_event_buffers(&mut self, count: u16) {
        for _ in 0..count {
            let buffer = self.memory.allocate(EVENT_SIZE as u64, 64);
            let head = self.offer(EVENT_QUEUE, &[Descriptor::writable(buffer, EVENT_SIZE as u32)]);
            self.event_buffers.push((head, buffer));
        }
    }

    /// Events that have arrived.
    pub fn events(&mut self) -> Vec<Event> {
        self.collect_events();
        self.events.drain(..).collect()
    }

    /// Waits for the next event that `wanted` finds something in; forgets those before it.
    pub fn wait_event<T>(&mut self, what: &str, mut wanted: impl FnMut(&Event) -> Option<T>) -> T {
        let mut before = Vec::new();
        until(what, || {
            self.collect_events();
            while let Some(event) = self.events.pop_front() {
                if let Some(found) = wanted(&event) {
                    return Some(found);
                }
                before.push(event);
            }
            assert!(!self.is_closed(), "the daemon closed the connection; before that: {before:?}");
            None
        })
    }

    fn collect_events(&mut self) {
        let ring = &mut self.rings[usize::from(EVENT_QUEUE)];
        while let Some((head, len)) = ring.take_used(&self.memory) {
            let (_, buffer) =
                self.event_buffers.iter().find(|(h, _)| *h == head).expect("a buffer that was posted");
            let bytes = self.memory.read(*buffer, len as usize);
            self.events.push_back(Event::parse(&bytes).expect("an event that follows the specification"));
            ring.offer(&self.memory, head);
            ring.ring();
        }
    }

    /// Writes bytes to the vhost-user socket as they are.
    pub fn send_bytes(&self, bytes: &[u8]) {
        (&self.socket).write_all(bytes).expect("the daemon reads");
    }
}

impl Drop for RawFrontend {
    fn drop(&mut self) {
        let _ = self.backend_channel.shutdown(Shutdown::Both);
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// Answers the device's requests until the channel is shut down.
fn serve(mut handler: FrontendReqHandler<Mutex<Window>>) {
    loop {
        match handler.handle_request() {
            Ok(_) | Err(Error::ReqHandlerError(_)) => {}
            Err(_) => return,
        }
    }
}

fn dup(fd: std::os::fd::RawFd) -> anyhow::Result<std::os::fd::OwnedFd> {
    // SAFETY: the handler that owns it lives on in the caller.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?)
}

fn borrow(event: &vmm_sys_util::eventfd::EventFd) -> BorrowedFd<'_> {
    // SAFETY: it stays open for as long as the reference.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
