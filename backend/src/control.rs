//! The control thread: waits for whatever happens to sessions and fabric ([`core`](crate::core)), and never for one of
//! them.
//!
//! Why `epoll` directly and not `event-manager`: the latter's subscribers are registered objects that own what they
//! react with; here thousands of descriptors come and go that all act on one state, and the kicks have to be watched
//! edge-triggered and are never read (so a front-end cannot make a read block, and a kick costs no system call).

use crate::core::{Arrived, Core, Identity, Source, Work};
use crate::daemon::Error;
use crate::doorbell::{Doorbell, Inbox, Message};
use crate::engine::set::EngineSet;
use crate::fabric::Fabric;
use crate::gate::{self, Arrival};
use crate::handler::Handler;
use crate::hub::HubSettings;
use crate::keep::{Heirs, Kept, exact};
use crate::mover::Mover;
use crate::port::SessionId;
use crate::settings::DeviceSettings;
use crate::socket::Socket;
use dmbridge_proto::event::GoneReason;
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::io::Read;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::Arc;
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::epoll::EpollEvent;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Messages of one session before others have their turn.
const TURN: usize = 64;

/// The control thread's own: the state, and the handlers, which reach into it.
pub struct Control {
    core: Rc<RefCell<Core>>,
    handlers: HashMap<SessionId, BackendReqHandler<Handler>>,
    inbox: Inbox,
}

/// What a control thread is made of; it is put together in the thread, because it stays there.
#[derive(Debug)]
pub struct Setup {
    /// For configuration spaces.
    pub identity: Identity,
    /// The fabric, empty.
    pub fabric: Fabric,
    /// The threads that move.
    pub movers: Vec<Mover>,
    /// What they copy with.
    pub engines: EngineSet,
    /// The configured devices, with their listening sockets or connections.
    pub devices: Vec<(DeviceSettings, Entrance)>,
    /// The hub.
    pub hub: Option<(HubSettings, Socket)>,
    /// Who keeps the daemon, and what there is of another worker's.
    pub keeping: Option<(Kept, Heirs)>,
    /// How to reach the thread.
    pub doorbell: Doorbell,
    /// Where it is reached.
    pub inbox: Inbox,
}

/// How the front-end of a configured device comes.
#[derive(Debug)]
pub enum Entrance {
    /// It connects here.
    Socket(Socket),
    /// It is connected.
    Stream(UnixStream),
}

impl Control {
    /// Puts everything together and watches everything.
    pub fn new(setup: Setup) -> Result<Control, Error> {
        let Setup { identity, fabric, movers, engines, devices, hub, keeping, doorbell, inbox } = setup;
        let mut core = Core::new(identity, fabric, movers, engines, doorbell, inbox.as_raw_fd())?;
        let heirs = keeping.map(|(kept, heirs)| {
            core.keep(kept);
            heirs
        });
        core.reserve_gids(devices.iter().filter_map(|(device, _)| device.gid));
        let mut arrived = Vec::new();
        for (device, entrance) in devices {
            match entrance {
                Entrance::Stream(stream) => arrived.push(core.add_connected(device, stream)?),
                Entrance::Socket(socket) => core.add_listening(device, socket)?,
            }
        }
        if let Some((hub, socket)) = hub {
            core.add_hub(hub, socket)?;
        }
        let taken_over = heirs.map(|heirs| core.take_over(&heirs)).transpose()?;
        let mut control = Control { core: Rc::new(RefCell::new(core)), handlers: HashMap::new(), inbox };
        control.add_handlers(arrived);
        for arrived in taken_over.into_iter().flatten() {
            let id = arrived.id;
            control.add_handlers(vec![arrived]);
            control.remind(id);
        }
        Ok(control)
    }

    /// Tells a handler what its predecessor had heard.
    fn remind(&mut self, id: SessionId) {
        let messages = self.core.borrow().session(id).map(|session| {
            let (features, protocol) = (session.features, session.protocol.bits());
            [
                Some((FrontendReq::GET_FEATURES, None)),
                Some((FrontendReq::SET_PROTOCOL_FEATURES, Some(protocol))).filter(|_| protocol != 0),
                Some((FrontendReq::SET_FEATURES, Some(features))).filter(|_| features != 0),
            ]
        });
        for (code, value) in messages.into_iter().flatten().flatten() {
            let mut message = Vec::new();
            for word in [u32::from(code), 1, value.map_or(0, |_| size_of::<u64>() as u32)] {
                message.extend(word.to_ne_bytes());
            }
            message.extend(value.map(u64::to_ne_bytes).into_iter().flatten());
            if let Err(error) = self.handle_message(id, &message, &[]) {
                tracing::warn!(session = id.0, "{error}");
            }
        }
        self.core.borrow_mut().commit();
    }

    /// Has a message handled that was only looked at so far. The answer.
    fn handle_message(&mut self, id: SessionId, message: &[u8], fds: &[OwnedFd]) -> Result<Vec<u8>, String> {
        let failed = |error: io::Error| error.to_string();
        let feed = self.core.borrow().feed(id).map_err(failed)?;
        let rights: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        feed.send_with_fds(&[message], &rights).map_err(|error| error.to_string())?;
        let Some(handler) = self.handlers.get_mut(&id) else { return Err("the session has ended".into()) };
        // SAFETY: the handler owns the socket and lives through the borrow.
        let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let is_channel = message.starts_with(&u32::from(FrontendReq::SET_BACKEND_REQ_FD).to_ne_bytes());
        if is_channel {
            let taken = self.core.borrow_mut().take_channel(id, socket);
            taken.map_err(|error| format!("SET_BACKEND_REQ_FD: {error}"))?;
        } else {
            handler.handle_request().map_err(|error| error.to_string())?;
        }
        self.core.borrow_mut().settle();
        let mut answer = vec![0; exact::MAX_SENT];
        match (&feed).read(&mut answer) {
            Ok(len) => answer.truncate(len),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => answer.clear(),
            Err(error) => return Err(error.to_string()),
        }
        Ok(answer)
    }

    /// As [`read`](Self::read), of a session that is kept: each message is a step that is written down.
    fn read_kept(&mut self, id: SessionId) {
        for _ in 0..TURN {
            let Ok(socket) = self.core.borrow().socket(id) else { return };
            let result = match gate::look(socket.as_fd()) {
                Ok(Arrival::Nothing) => return,
                Ok(Arrival::End) => return self.end(id, GoneReason::Left),
                Ok(Arrival::Message(code)) => {
                    tracing::trace!(session = id.0, code, "a message");
                    self.step(id, socket.as_fd())
                }
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = result {
                return self.expel(id, &why);
            }
        }
        self.core.borrow_mut().queue(Work::Read(id));
    }

    /// Has the message at the gate handled, and answers it, once.
    fn step(&mut self, id: SessionId, socket: BorrowedFd<'_>) -> Result<(), String> {
        let failed = |error: io::Error| error.to_string();
        let header = exact::peek(socket, gate::HEADER_SIZE).map_err(failed)?.0;
        let body = header.last_chunk().map_or(0, |size| u32::from_ne_bytes(*size)) as usize;
        let (message, fds) = exact::peek(socket, gate::HEADER_SIZE + body).map_err(failed)?;
        let answer = self.handle_message(id, &message, &fds)?;
        self.core.borrow_mut().commit_message(id, &answer).map_err(failed)
    }

    fn add_handlers(&mut self, arrived: Vec<Arrived>) {
        for Arrived { id, stream } in arrived {
            #[expect(
                clippy::arc_with_non_send_sync,
                reason = "`vhost` asks for an Arc; it stays in this thread"
            )]
            let handler = Arc::new(Handler::new(self.core.clone(), id));
            self.handlers.insert(id, BackendReqHandler::from_stream(stream, handler));
        }
    }

    /// Serves until it is told to stop or nothing is left to serve.
    pub fn run(&mut self) -> Result<(), Error> {
        let mut events = [EpollEvent::default(); 128];
        loop {
            let waited = self.core.borrow().wait(&mut events);
            let count = match waited {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => return Err(error.into()),
            };
            for event in &events[..count] {
                match Source::from_bits(event.data()) {
                    Some(Source::Inbox) => match self.read_inbox() {
                        ControlFlow::Continue(()) => {}
                        ControlFlow::Break(()) => return Ok(()),
                    },
                    Some(source) => self.core.borrow_mut().notice(source),
                    None => {}
                }
            }
            self.work();
            if self.core.borrow().is_idle_for_good() {
                return Ok(());
            }
        }
    }

    /// Breaks when it is time to stop.
    fn read_inbox(&mut self) -> ControlFlow<()> {
        while let Some(message) = self.inbox.take() {
            match message {
                Message::Stop => return ControlFlow::Break(()),
                Message::Report(asker) => {
                    let _ = asker.send(self.core.borrow().report());
                }
                Message::Expel(id, why) => self.expel(id, why),
            }
        }
        ControlFlow::Continue(())
    }

    /// Ends a session whose front-end broke the contract.
    fn expel(&mut self, id: SessionId, why: &str) {
        if let Ok(session) = self.core.borrow().session(id) {
            tracing::warn!(device = %session.name, "expelled: {why}");
        }
        self.end(id, GoneReason::Expelled);
    }

    fn work(&mut self) {
        self.core.borrow_mut().due();
        // What is queued meanwhile waits until the descriptors have been looked at again.
        let backlog = self.core.borrow().backlog();
        for _ in 0..backlog {
            let Some(work) = self.core.borrow_mut().next_work() else { return };
            match work {
                Work::Read(id) => self.read(id),
                Work::Commands(id) => self.core.borrow_mut().serve_commands(id),
                Work::Expire(id) => self.core.borrow_mut().expire(id),
                Work::Watch(id) => self.core.borrow_mut().watch_pause(id),
                Work::Locate => self.core.borrow_mut().locate(),
                Work::Accept(number) => {
                    let mut arrived = Vec::new();
                    self.core.borrow_mut().accept(number, &mut arrived);
                    self.add_handlers(arrived);
                }
            }
            self.core.borrow_mut().commit();
        }
    }

    /// Reads messages of a front-end, for one turn.
    fn read(&mut self, id: SessionId) {
        if self.core.borrow().is_kept() {
            return self.read_kept(id);
        }
        for _ in 0..TURN {
            let Some(handler) = self.handlers.get_mut(&id) else { return };
            // SAFETY: the handler owns the socket and lives through the borrow.
            let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
            let arrival = gate::look(socket);
            if let Ok(Arrival::Message(code)) = arrival {
                tracing::trace!(session = id.0, code, "a message");
            }
            let result = match arrival {
                Ok(Arrival::Nothing) => return,
                Ok(Arrival::End) => return self.end(id, GoneReason::Left),
                Ok(Arrival::Message(code)) if code == u32::from(FrontendReq::SET_BACKEND_REQ_FD) => self
                    .core
                    .borrow_mut()
                    .take_channel(id, socket)
                    .map_err(|error| format!("SET_BACKEND_REQ_FD: {error}")),
                Ok(Arrival::Message(_)) => match handler.handle_request() {
                    Err(VhostError::Disconnected | VhostError::SocketBroken(_)) => {
                        return self.end(id, GoneReason::Left);
                    }
                    result => result.map_err(|error| error.to_string()),
                },
                Err(error) => Err(error.to_string()),
            };
            if let Err(why) = result {
                return self.expel(id, &why);
            }
            self.core.borrow_mut().settle();
        }
        self.core.borrow_mut().queue(Work::Read(id));
    }

    fn end(&mut self, id: SessionId, reason: GoneReason) {
        let Some(handler) = self.handlers.remove(&id) else { return };
        let mut core = self.core.borrow_mut();
        core.end(id, handler.as_raw_fd(), reason);
        core.settle();
        core.commit();
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Handlers and core hold each other.
        for id in self.handlers.keys().copied().collect::<Vec<_>>() {
            self.end(id, GoneReason::Left);
        }
    }
}
