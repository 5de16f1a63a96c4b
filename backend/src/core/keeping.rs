//! What a kept core does besides: after each step (a message, a command, a reply) it writes down what has changed, and only then
//! does what others see of it. So whenever it dies, the book says what was done, and what of it may still have to be told.

use super::entries::{channel_record, command_record, regions, session_record};
use super::{Core, Work};
use crate::copy_plan;
use crate::frontend::ChannelError;
use crate::keep::{Kept, exact, number, record, text};
use crate::mover::Progress;
use crate::port::{SessionId, Told};
use crate::session::{Answer, KeptSession, Ring, Service, Session};
use crate::socket::Socket;
use crate::vring::{Chain, Piece};
use dmbridge_proto::FIRST_MOVE_QUEUE;
use dmbridge_proto::ids::Gid;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::PoisonError;
use std::time::Instant;

/// What a kept core has besides.
#[derive(Debug)]
pub struct Keeping {
    /// The book and the keeper.
    pub kept: Kept,
    /// Sessions of whose events the book does not know everything.
    pub told: Told,
    /// Sessions that may have changed.
    touched: HashSet<SessionId>,
    /// Sessions whose last command has changed.
    commanded: HashSet<SessionId>,
    /// Rings that are served as soon as that is written down.
    pub to_start: Vec<(SessionId, u32)>,
}

impl Keeping {
    /// With this book and keeper.
    pub fn new(kept: Kept) -> Keeping {
        Keeping {
            kept,
            told: Told::default(),
            touched: HashSet::new(),
            commanded: HashSet::new(),
            to_start: Vec::new(),
        }
    }

    /// The GID that a configured device had.
    pub fn gid_of(&self, name: &str) -> Option<Gid> {
        let wanted = format!("configured/{name}");
        let (_, entry) = self.kept.book.values().find(|(name, _)| *name == wanted)?;
        serde_json::from_slice::<record::Configured>(entry).ok().map(|entry| Gid::from_bytes(entry.gid))
    }

    /// The GID that a configured device has.
    pub fn keep_gid(&mut self, name: &str, gid: Gid) {
        self.kept.put(&format!("configured/{name}"), &text(&record::Configured { gid: gid.to_bytes() }), &[]);
    }

    /// A socket on which is listened.
    pub fn keep_listener(&mut self, socket: &Socket) {
        let (device, inode) = socket.inode();
        let entry = record::Listener { fd: socket.number(), device, inode };
        let name = format!("listener/{}", socket.path().display());
        self.kept.put(&name, &text(&entry), &[(socket.number(), socket.as_fd())]);
    }

    fn take_told(&self) -> HashSet<SessionId> {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Core {
    /// Something of a session may have changed.
    pub fn touch(&mut self, id: SessionId) {
        if let Some(keeping) = &mut self.keeping {
            keeping.touched.insert(id);
            keeping.commanded.insert(id);
        }
    }

    /// The last command of a session has changed.
    pub(super) fn touch_command(&mut self, id: SessionId) {
        if let Some(keeping) = &mut self.keeping {
            keeping.commanded.insert(id);
        }
    }

    /// Whether there is a keeper.
    pub fn is_kept(&self) -> bool {
        self.keeping.is_some()
    }

    /// A step is done: writes it down, and does what others see of it.
    pub fn commit(&mut self) {
        if self.keeping.is_some() {
            self.commit_with(None);
        }
    }

    /// As [`commit`](Self::commit), for the step that a message or a reply caused, at which was only looked so far. What is to be
    /// answered is in the outlet.
    pub fn commit_with(&mut self, step: Option<record::Step>) {
        self.write_down();
        let Some(keeping) = &mut self.keeping else { return };
        if let Some(step) = &step {
            keeping.kept.put("step", &text(step), &[]);
        }
        keeping.kept.commit();
        if let Some(step) = step {
            self.do_step(&step);
        }
        loop {
            self.perform();
            let Some(keeping) = &mut self.keeping else { return };
            let told = !keeping.told.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
            if keeping.touched.is_empty() && keeping.commanded.is_empty() && !told {
                return;
            }
            self.write_down();
            if let Some(keeping) = &mut self.keeping {
                keeping.kept.commit();
            }
        }
    }

    /// Takes what was looked at, and sends the answer: what of it has not been done.
    pub(super) fn do_step(&mut self, step: &record::Step) {
        let Some(keeping) = &mut self.keeping else { return };
        if let Some(session) = self.sessions.get(&SessionId(step.session)) {
            let channel = session.channel.as_ref().map(AsFd::as_fd);
            let socket = session.kept.as_ref().map(|kept| kept.socket.as_fd());
            if let Some(socket) = if step.channel { channel } else { socket } {
                // An error here is the end of the connection, which is seen when it is read next.
                if step.take {
                    let _ = exact::take_peeked(socket);
                }
                let _ = if step.channel {
                    keeping.kept.outlet.send_warily(socket)
                } else {
                    keeping.kept.outlet.send(socket)
                };
            }
        }
        keeping.kept.outlet.unload();
        keeping.kept.remove("step");
        keeping.kept.commit();
        if let Some(session) = self.sessions.get(&SessionId(step.session)) {
            let channel = session.channel.as_ref().map(AsFd::as_fd);
            let socket = session.kept.as_ref().map(|kept| kept.socket.as_fd());
            if let Some(socket) = if step.channel { channel } else { socket }.filter(|_| step.take) {
                let _ = exact::end_peek(socket);
            }
        }
    }

    /// The socket of a session's front-end.
    pub fn socket(&self, id: SessionId) -> io::Result<UnixStream> {
        let kept = self.sessions.get(&id).and_then(|session| session.kept.as_ref());
        kept.ok_or(io::ErrorKind::NotConnected)?.socket.try_clone()
    }

    /// Where its handler gets its messages, and leaves its answers.
    pub fn feed(&self, id: SessionId) -> io::Result<UnixStream> {
        let kept = self.sessions.get(&id).and_then(|session| session.kept.as_ref());
        kept.ok_or(io::ErrorKind::NotConnected)?.feed.try_clone()
    }

    /// What the message that was looked at has caused is the next step, and this the answer to it.
    pub fn commit_message(&mut self, id: SessionId, answer: &[u8]) -> io::Result<()> {
        self.touch(id);
        if let Some(keeping) = &mut self.keeping {
            keeping.kept.outlet.load(answer)?;
        }
        self.commit_with(Some(record::Step { session: id.0, channel: false, take: true }));
        Ok(())
    }

    /// Makes a session one that is kept. The other end is for its handler.
    pub(super) fn keep_session(
        &mut self,
        session: &mut Session,
        socket: UnixStream,
    ) -> io::Result<UnixStream> {
        let Some(keeping) = &mut self.keeping else { return Ok(socket) };
        let cells = session.rings.len() as u32 - u32::from(FIRST_MOVE_QUEUE) + 1;
        let first_cell = keeping.kept.take_cells(cells).ok_or(io::ErrorKind::QuotaExceeded)?;
        let (feed, theirs) = UnixStream::pair()?;
        feed.set_nonblocking(true)?;
        let cell = keeping.kept.book.cell(first_cell);
        session.port.keep(cell, keeping.told.clone());
        session.kept = Some(KeptSession { socket, number: number(), first_cell, feed });
        Ok(theirs)
    }

    /// Where the mover of a queue notes what it did.
    pub(super) fn progress(&self, session: &Session, index: u32) -> Option<Progress> {
        let (keeping, kept) = (self.keeping.as_ref()?, session.kept.as_ref()?);
        let number = kept.first_cell + 1 + index.checked_sub(u32::from(FIRST_MOVE_QUEUE))?;
        Some(Progress::new(keeping.kept.book.cell(number)))
    }

    /// A session ends.
    pub(super) fn forget_session(&mut self, id: SessionId, session: &Session) {
        let Some(keeping) = &mut self.keeping else { return };
        for (number, _) in session.port.events().take_changed() {
            keeping.kept.remove(&format!("event/{}/{number}", id.0));
        }
        for entry in ["session", "command", "channel"] {
            keeping.kept.remove(&format!("{entry}/{}", id.0));
        }
        if let Some(kept) = &session.kept {
            let cells = session.rings.len() as u32 - u32::from(FIRST_MOVE_QUEUE) + 1;
            keeping.kept.give_cells(kept.first_cell, cells);
        }
    }

    /// Puts what has changed into the book.
    fn write_down(&mut self) {
        let (next_device, next_extent, next_ram_token) = self.fabric.counters();
        let Some(keeping) = &mut self.keeping else { return };
        for id in keeping.take_told() {
            let Some(session) = self.sessions.get(&id) else { continue };
            for (number, event) in session.port.events().take_changed() {
                let name = format!("event/{}/{number}", id.0);
                match event {
                    Some(event) => {
                        let event = record::Event { bytes: event.to_bytes().to_vec() };
                        keeping.kept.put(&name, &text(&event), &[]);
                    }
                    None => keeping.kept.remove(&name),
                }
            }
            self.to_release.insert(id);
        }
        for id in std::mem::take(&mut keeping.touched) {
            let Some(session) = self.sessions.get(&id) else { continue };
            let Some(kept) = &session.kept else { continue };
            let files = session.device.into_iter().flat_map(|device| self.fabric.files_in_window(device));
            let files: Vec<_> = files.collect();
            let memory = session.port.memory.read();
            let mut descriptors = vec![(kept.number, kept.socket.as_fd())];
            let regions = regions(&memory, &files, &mut descriptors);
            for ring in &session.rings {
                let kick = ring.kick.as_ref().map(|kick| (kick.number, kick.as_fd()));
                let events =
                    [&ring.call, &ring.err].into_iter().flatten().map(|file| (file.number(), file.as_fd()));
                descriptors.extend(kick.into_iter().chain(events));
            }
            let starting = |index: usize| keeping.to_start.contains(&(id, index as u32));
            let entry = session_record(session, kept, regions, starting);
            keeping.kept.put(&format!("session/{}", id.0), &text(&entry), &descriptors);
            let name = format!("channel/{}", id.0);
            match &session.channel {
                Some(channel) => {
                    keeping.kept.put(
                        &name,
                        &text(&channel_record(channel)),
                        &[(channel.number, channel.as_fd())],
                    );
                }
                None => keeping.kept.remove(&name),
            }
        }
        for id in std::mem::take(&mut keeping.commanded) {
            let Some(session) = self.sessions.get(&id) else { continue };
            let entry = command_record(session);
            keeping.kept.put(&format!("command/{}", id.0), &text(&entry), &[]);
            self.to_perform.insert(id);
        }
        self.fabric.write_down(&mut keeping.kept, &self.started);
        let global = record::Global {
            next_session: self.next_session,
            hub_connections: self.hub_connections,
            next_device,
            next_extent,
            next_ram_token,
            copy_plan: copy_plan::current().to_bytes(),
        };
        keeping.kept.put("global", &text(&global), &[]);
    }

    /// Does what was written down and others see.
    fn perform(&mut self) {
        for id in std::mem::take(&mut self.to_perform) {
            self.give_answer(id);
            self.flush_channel(id);
        }
        let Some(keeping) = &mut self.keeping else { return };
        for (id, index) in std::mem::take(&mut keeping.to_start) {
            let Some(session) = self.sessions.get(&id) else { continue };
            if session.is_running()
                && session.rings.get(index as usize).is_some_and(Ring::ready)
                && let Err(error) = self.start_ring(id, index)
            {
                tracing::warn!("{error}");
                self.doorbell.expel(id, "a descriptor of a queue cannot be used");
            }
        }
        for id in std::mem::take(&mut self.to_release) {
            if let Some(session) = self.sessions.get(&id) {
                session.port.release_events();
            }
        }
    }

    /// Sends what is to be sent on a backend channel.
    fn flush_channel(&mut self, id: SessionId) {
        loop {
            let Some(session) = self.sessions.get_mut(&id) else { return };
            let Some(channel) = &mut session.channel else { return };
            let Some(part) = channel.outbox.front() else { return };
            if part.file {
                if channel.send_file().is_err() {
                    return self.fail_channel(id, "a request could not be sent");
                }
                self.touch(id);
                continue;
            }
            let Some(keeping) = &mut self.keeping else { return };
            if keeping.kept.outlet.load(&part.bytes).is_err() {
                return self.fail_channel(id, "a request could not be sent");
            }
            channel.outbox.pop_front();
            let name = format!("channel/{}", id.0);
            keeping.kept.put(&name, &text(&channel_record(channel)), &[(channel.number, channel.as_fd())]);
            let step = record::Step { session: id.0, channel: true, take: false };
            keeping.kept.put("step", &text(&step), &[]);
            keeping.kept.commit();
            self.do_step(&step);
        }
    }

    fn fail_channel(&mut self, id: SessionId, why: &str) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(mut channel) = session.channel.take() else { return };
        tracing::debug!(device = %session.name, "{why}");
        let mut outcomes = Vec::new();
        channel.fail(&mut outcomes);
        self.unwatch(channel.as_raw_fd());
        self.touch(id);
        self.map_outcomes(outcomes);
        self.settle();
    }

    /// As `read_channel`, of one that is kept: each reply is a step.
    pub(super) fn read_kept_channel(&mut self, id: SessionId) {
        let now = Instant::now();
        loop {
            let Some(session) = self.sessions.get_mut(&id) else { return };
            let Some(channel) = &mut session.channel else { return };
            let mut outcomes = Vec::new();
            let result = match channel.peek_reply() {
                Ok(Some(reply)) => exact::peek(channel.as_fd(), reply.len())
                    .map_err(ChannelError::Io)
                    .and_then(|_| channel.take_reply(reply, now, &mut outcomes))
                    .map(|()| true),
                Ok(None) => channel.advance(now, &mut outcomes).map(|()| false),
                Err(error) => Err(error),
            };
            let replied = match result {
                Ok(replied) => replied,
                Err(error) => {
                    let why = error.to_string();
                    self.map_outcomes(outcomes);
                    self.fail_channel(id, &why);
                    return self.commit();
                }
            };
            self.touch(id);
            self.watch_deadline(id);
            self.map_outcomes(outcomes);
            self.settle();
            if !replied {
                return self.commit();
            }
            self.commit_with(Some(record::Step { session: id.0, channel: true, take: true }));
        }
    }

    /// Puts the answer that was written down into the used ring.
    pub(super) fn give_answer(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(Answer { chain, response, .. }) = session.answer.take() else { return };
        let Service::Control(vring) = &mut session.rings[0].service else { return };
        let pushed = {
            let memory = session.port.memory.read();
            let len = if chain.respond(&memory, &response) { response.len() } else { 0 };
            vring.push(memory.guest(), chain.head, len as u32)
        };
        if let Err(broken) = pushed {
            self.break_control(id, &broken);
        }
        self.queue(Work::Commands(id));
    }
}

/// A chain of which only its name and what is writable is known.
pub(super) fn chain(head: u16, writable: &[(u64, u32)]) -> Chain {
    let writable = writable.iter().map(|(addr, len)| Piece { addr: *addr, len: *len }).collect();
    Chain { head, writable, ..Chain::default() }
}
