//! A core that goes on where the one of another worker ended: what the book says is made again, and what may not have been told
//! is told ([`keeping`](super::keeping) says when what is written down).
//!
//! The book is trusted to be a worker's, because nobody else can write it, and checked as if it were not: what contradicts itself is
//! refused, and nothing was done by then.

use super::admission::{Arrived, Configured, Listener};
use super::keeping::{Keeping, chain};
use super::{Core, Source, Work};
use crate::fabric::{Attempt, Capabilities, DeviceId, Joining, keeping::Entries};
use crate::frontend::{Channel, Manner, MapOutcome, MapRequest, Part, Pending, REPLY_DEADLINE, Stage};
use crate::hub::PeerCredentials;
use crate::keep::{Heirs, KeepError, Kept, exact, record};
use crate::memory::{DeviceMemory, RegionInfo};
use crate::mover::wake_again;
use crate::notify::EventFile;
use crate::placement::NumaSettings;
use crate::pool::memfile::Borrower;
use crate::port::{Port, SessionId};
use crate::session::{Answer, KeptSession, Kick, Origin, Paused, Ring, Service, Session, Suspended};
use crate::vring::{Piece, Vring};
use dmbridge_proto::event::Event;
use dmbridge_proto::features::Features;
use dmbridge_proto::ids::{ExtentId, Gid};
use dmbridge_proto::shm::CopyPlan;
use dmbridge_proto::status::Status;
use dmbridge_proto::{CONTROL_QUEUE, EVENT_QUEUE, FIRST_MOVE_QUEUE};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;
use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;

/// No device is told so many events.
const MAX_EVENTS: u64 = 1 << 46;

/// Everything that a book says.
#[derive(Debug, Default)]
struct Content {
    global: record::Global,
    sessions: BTreeMap<u64, record::Session>,
    commands: HashMap<u64, record::Command>,
    channels: HashMap<u64, record::Channel>,
    events: HashMap<u64, BTreeMap<u64, Event>>,
    fabric: Entries,
    step: Option<record::Step>,
}

impl Content {
    /// Reads a book; each entry with descriptors is made known to the keeper's side.
    fn read(kept: &mut Kept) -> Result<Content, KeepError> {
        let mut content = Content::default();
        let mut named: Vec<(String, Vec<u64>)> = Vec::new();
        for (name, value) in kept.book.values() {
            let (kind, rest) = name.split_once('/').unwrap_or((name, ""));
            let number =
                || rest.parse::<u64>().map_err(|error| KeepError::Entry(name.into(), error.to_string()));
            let pair = || -> Option<(u64, u64)> {
                let (a, b) = rest.split_once('/')?;
                Some((a.parse().ok()?, b.parse().ok()?))
            };
            let pair = || pair().ok_or_else(|| wrong(name, "its name is none"));
            match kind {
                "global" => content.global = parse(name, value)?,
                "step" => content.step = Some(parse(name, value)?),
                "session" => {
                    let session: record::Session = parse(name, value)?;
                    let rings = session.rings.iter().flat_map(|ring| [ring.kick, ring.call, ring.err]);
                    let regions = session.regions.iter().map(|region| region.fd);
                    let all = [session.socket].into_iter().chain(rings.flatten()).chain(regions);
                    named.push((name.into(), all.collect()));
                    content.sessions.insert(number()?, session);
                }
                "command" => {
                    content.commands.insert(number()?, parse(name, value)?);
                }
                "channel" => {
                    let channel: record::Channel = parse(name, value)?;
                    named.push((name.into(), vec![channel.fd]));
                    content.channels.insert(number()?, channel);
                }
                "event" => {
                    let (session, number) = pair()?;
                    let event: record::Event = parse(name, value)?;
                    if number >= MAX_EVENTS {
                        return Err(wrong(name, "its number is too great"));
                    }
                    let event = Event::parse(&event.bytes).map_err(|_| wrong(name, "it is no event"))?;
                    content.events.entry(session).or_default().insert(number, event);
                }
                "device" => {
                    content.fabric.devices.insert(number()?, parse(name, value)?);
                }
                "slot" => {
                    let (device, extent) = pair()?;
                    let extent = u32::try_from(extent).map_err(|_| wrong(name, "its name is none"))?;
                    content.fabric.slots.insert((device, extent), parse(name, value)?);
                }
                "extent" => {
                    let extent: record::Extent = parse(name, value)?;
                    named.push((name.into(), vec![extent.fd]));
                    let number = u32::try_from(number()?).map_err(|_| wrong(name, "its name is none"))?;
                    content.fabric.extents.insert(number, extent);
                }
                "dmb" => {
                    content.fabric.dmbs.insert(number()?, parse(name, value)?);
                }
                "key" => content.fabric.keys.push(parse(name, value)?),
                "listener" | "configured" => {}
                _ => return Err(wrong(name, "there is no such entry")),
            }
        }
        for (name, numbers) in named {
            kept.adopt(&name, numbers);
        }
        Ok(content)
    }
}

fn parse<T: DeserializeOwned>(name: &str, value: &[u8]) -> Result<T, KeepError> {
    serde_json::from_slice(value).map_err(|error| KeepError::Entry(name.into(), error.to_string()))
}

fn wrong(name: &str, why: &str) -> KeepError {
    KeepError::Entry(name.into(), why.into())
}

impl Core {
    /// From now on everything is written down. To be called before anything is added.
    pub fn keep(&mut self, kept: Kept) {
        self.keeping = Some(Keeping::new(kept));
        self.fabric.track();
    }

    /// Goes on where another worker ended, and tells the keeper that this one serves.
    pub fn take_over(&mut self, heirs: &Heirs) -> Result<Vec<Arrived>, KeepError> {
        let mut arrived = Vec::new();
        if heirs.is_old {
            let Some(keeping) = &mut self.keeping else { return Ok(arrived) };
            let content = Content::read(&mut keeping.kept)?;
            arrived = self.restore(content, heirs)?;
            tracing::info!(devices = arrived.len(), "took over");
        }
        self.forget_what_is_not_configured();
        self.commit();
        if let Some(keeping) = &mut self.keeping {
            keeping.kept.drop_unnamed(heirs.numbers());
            keeping.kept.ready();
        }
        Ok(arrived)
    }

    fn restore(&mut self, content: Content, heirs: &Heirs) -> Result<Vec<Arrived>, KeepError> {
        let Content { global, sessions, mut commands, mut channels, mut events, fabric, step } = content;
        self.next_session = sessions.keys().copied().max().unwrap_or(0).max(global.next_session);
        if self.next_session >= 1 << Source::SESSION_BITS {
            return Err(wrong("session", "its number is too great"));
        }
        self.hub_connections = global.hub_connections;
        let mut arrived = Vec::new();
        let mut served = Vec::new();
        let mut expelled = Vec::new();
        for (number, entry) in &sessions {
            let Some(keeping) = &mut self.keeping else { continue };
            let cells = (entry.rings.len() as u32).saturating_sub(u32::from(FIRST_MOVE_QUEUE)) + 1;
            if !keeping.kept.adopt_cells(entry.first_cell, cells) {
                return Err(wrong(&format!("session/{number}"), "its cells are not free"));
            }
        }
        for (number, entry) in &sessions {
            let id = SessionId(*number);
            let (stream, memory) = self.restore_session(id, entry, heirs)?;
            arrived.push(Arrived { id, stream });
            match memory {
                Ok(memory) => self.session(id).map_err(ended)?.port.memory.replace(memory),
                Err(why) => expelled.push((id, why)),
            }
            served.extend(
                (0..)
                    .zip(&entry.rings)
                    .filter(|(_, ring)| ring.service == record::Service::Served)
                    .map(|(index, _)| (id, index)),
            );
        }
        let known = &self.sessions;
        self.fabric.restore(fabric, &global, heirs, |device| {
            let session = known.get(&SessionId(device.session))?;
            Some(Joining {
                gid: session.gid,
                group: session.group.clone(),
                limits: device.limits,
                capabilities: Capabilities {
                    map: device.map,
                    ram: device.ram,
                    futex: device.futex,
                    rendezvous: device.rendezvous,
                    private_line: device.private_line,
                },
                port: session.port.clone(),
                numa: session.numa,
                pid: session.peer.as_ref().map_or(0, |peer| peer.pid),
            })
        })?;
        let mut outcomes = Vec::new();
        for (number, entry) in &sessions {
            let id = SessionId(*number);
            let name = format!("session/{number}");
            if let Some(device) = entry.device.map(DeviceId) {
                let port =
                    &self.fabric.device(device).ok_or_else(|| wrong(&name, "its device is missing"))?.port;
                if port.session != id || self.started.insert(device, id).is_some() {
                    return Err(wrong(&name, "its device is another session's"));
                }
            }
            if let Some(channel) = channels.remove(number) {
                self.restore_channel(id, channel, heirs, &mut outcomes)?;
            }
            if let Some(command) = commands.remove(number) {
                self.restore_command(id, command);
            }
        }
        // From here on nothing is refused any more.
        match step {
            Some(step) => self.do_step(&step),
            None => {
                if let Some(keeping) = &self.keeping {
                    keeping.kept.outlet.unload();
                }
            }
        }
        for session in self.sessions.values() {
            let socket = session.kept.as_ref().map(|kept| kept.socket.as_fd());
            for socket in socket.into_iter().chain(session.channel.as_ref().map(AsFd::as_fd)) {
                let _ = exact::end_peek(socket);
            }
        }
        for number in sessions.keys() {
            self.restore_events(SessionId(*number), &events.remove(number).unwrap_or_default());
        }
        for (id, index) in served {
            self.serve_again(id, index);
        }
        self.fabric.targets().for_each(wake_again);
        self.map_outcomes(outcomes);
        self.settle();
        let ids: Vec<SessionId> = self.sessions.keys().copied().collect();
        for id in ids {
            self.touch(id);
            self.watch_deadline(id);
            self.queue(Work::Read(id));
            self.queue(Work::Commands(id));
            if let Some(session) = self.sessions.get_mut(&id).filter(|session| session.paused.is_some()) {
                session.watched = true;
                self.queue(Work::Watch(id));
            }
        }
        for (id, why) in expelled {
            tracing::warn!(session = id.0, "{why}");
            self.doorbell.expel(id, "its memory cannot be taken over");
        }
        Ok(arrived)
    }

    /// Makes a session, but for what it has in the fabric. The stream is for its handler; the memory may be refused, because its
    /// front-end can have changed it.
    fn restore_session(
        &mut self,
        id: SessionId,
        entry: &record::Session,
        heirs: &Heirs,
    ) -> Result<(UnixStream, Result<DeviceMemory, String>), KeepError> {
        let name = format!("session/{}", id.0);
        let limits = entry.limits;
        limits.check().map_err(|error| KeepError::Entry(name.clone(), error.to_string()))?;
        if entry.rings.len() != usize::from(FIRST_MOVE_QUEUE) + usize::from(limits.move_queues) {
            return Err(wrong(&name, "it has another number of queues"));
        }
        let socket = UnixStream::from(heirs.take(entry.socket)?);
        let peer = PeerCredentials::of(&socket).ok();
        let gid = Gid::from_bytes(entry.gid);
        let (origin, numa) = self.restore_origin(id, entry, peer.as_ref());
        self.gids.insert(gid);
        let port = Arc::new(Port::new(id, self.doorbell.clone(), numa.engine));
        let (label, group) = (entry.name.as_str().into(), entry.group.as_str().into());
        let mut session = Session::new(label, origin, peer, gid, group, limits, numa, port);
        let (feed, theirs) = UnixStream::pair()?;
        feed.set_nonblocking(true)?;
        if let Some(keeping) = &self.keeping {
            session.port.keep(keeping.kept.book.cell(entry.first_cell), keeping.told.clone());
        }
        let (number, first_cell) = (entry.socket, entry.first_cell);
        self.watch(socket.as_raw_fd(), Source::Socket(id))?;
        session.kept = Some(KeptSession { socket, number, first_cell, feed });
        session.features = entry.features;
        session.protocol = Protocol::from_bits_truncate(entry.protocol);
        session.owned = entry.owned;
        session.hasty = entry.hasty;
        session.copy_plan = CopyPlan::from_bytes(entry.copy_plan);
        session.device = entry.device.map(DeviceId);
        let paused = entry.paused.as_ref();
        session.paused = paused.map(|p| Paused { bases: p.bases.clone(), features: p.features });
        session.port.set_paused(session.paused.is_some());
        for (ring, entry) in session.rings.iter_mut().zip(&entry.rings) {
            let file = |number: u64| heirs.take(number).map(|fd| (File::from(fd), number));
            let event = |number: Option<u64>| -> Result<Option<Arc<EventFile>>, KeepError> {
                let Some((file, number)) = number.map(file).transpose()? else { return Ok(None) };
                Ok(Some(Arc::new(EventFile::numbered(file, number)?)))
            };
            let kick = entry.kick.map(file).transpose()?;
            *ring = Ring {
                size: entry.size,
                addresses: entry.addresses,
                base: entry.base,
                enabled: entry.enabled,
                kick: kick.map(|(file, number)| Kick::numbered(file, number)),
                call: event(entry.call)?,
                err: event(entry.err)?,
                service: match entry.service {
                    record::Service::Broken => Service::Broken,
                    _ => Service::None,
                },
            };
        }
        let region = |region: &record::Region| {
            let record::Region { guest_addr, size, user_addr, file_offset, fd } = *region;
            let info = RegionInfo { guest_addr, size, user_addr, file_offset };
            heirs.take(fd).map(|file| (info, File::from(file), fd))
        };
        let regions = entry.regions.iter().map(region).collect::<Result<Vec<_>, _>>()?;
        let memory = DeviceMemory::from_numbered(regions.into_iter()).map_err(|error| error.to_string());
        self.sessions.insert(id, session);
        Ok((theirs, memory))
    }

    /// Where the front-end of a session came from, as the settings say it now.
    fn restore_origin(
        &mut self,
        id: SessionId,
        entry: &record::Session,
        peer: Option<&PeerCredentials>,
    ) -> (Origin, NumaSettings) {
        if entry.hub {
            self.hub_sessions += 1;
            if let Some(peer) = peer {
                *self.hub_sessions_of.entry(peer.uid).or_default() += 1;
            }
            let hub = self.listeners.iter().find_map(|listener| match listener {
                Listener::Hub { hub, .. } => Some(hub.numa),
                Listener::Device { .. } => None,
            });
            return (Origin::Hub, hub.unwrap_or_default());
        }
        let free = |device: &Configured| *device.name == *entry.name && device.session.is_none();
        let number = self.configured.iter().position(free).unwrap_or_else(|| {
            // It is configured no more: it stays as long as its front-end does.
            self.configured.push(Configured {
                name: entry.name.as_str().into(),
                group: entry.group.as_str().into(),
                gid: Gid::from_bytes(entry.gid),
                limits: entry.limits,
                numa: NumaSettings::default(),
                session: None,
                listener: None,
            });
            self.configured.len() - 1
        });
        self.configured[number].session = Some(id);
        (Origin::Configured(number), self.configured[number].numa)
    }

    fn restore_channel(
        &mut self,
        id: SessionId,
        entry: record::Channel,
        heirs: &Heirs,
        outcomes: &mut Vec<MapOutcome>,
    ) -> Result<(), KeepError> {
        let name = format!("channel/{}", id.0);
        let request = |entry: &record::MapRequest| -> Result<MapRequest, KeepError> {
            let extent =
                ExtentId::new(entry.extent).ok_or_else(|| wrong(&name, "there is no such extent"))?;
            let borrower = if entry.owner { Borrower::Owner } else { Borrower::Peer };
            let file = entry.map.then(|| (self.fabric.extent_file(extent).cloned(), borrower));
            Ok(MapRequest {
                device: DeviceId(entry.device),
                extent,
                file,
                offset: entry.offset,
                len: entry.len,
            })
        };
        let manner = if entry.guarded { Manner::Guarded } else { Manner::Plain };
        let mut channel = Channel::new(heirs.take(entry.fd)?, manner);
        channel.keep();
        channel.number = entry.fd;
        channel.open = entry.open;
        for waiting in &entry.queue {
            let request = request(waiting)?;
            if request.file.as_ref().is_some_and(|(file, _)| file.is_none()) {
                // Nobody wants it any more.
                outcomes.push(MapOutcome { request, done: false });
            } else {
                channel.queue.push_back(request);
            }
        }
        channel.outbox =
            entry.outbox.into_iter().map(|part| Part { bytes: part.bytes, file: part.file }).collect();
        if let Some(pending) = entry.pending {
            channel.pending = Some(Pending {
                request: request(&pending.request)?,
                stage: match pending.stage {
                    record::Stage::Begun => Stage::Begun,
                    record::Stage::Asked => Stage::Asked,
                    record::Stage::Settling => Stage::Settling,
                },
                deadline: Instant::now() + REPLY_DEADLINE,
                abandoned: pending.abandoned,
                overdue: pending.overdue,
            });
        }
        if channel.outbox.front().is_some_and(|part| part.file) {
            // Whoever got the file has it, or has answered.
            let file = channel.pending.as_ref().and_then(|pending| pending.request.file.clone());
            let has_it = |(file, borrower): (Option<Arc<crate::pool::memfile::MemFile>>, Borrower)| {
                file.is_none_or(|file| file.is_lent(borrower))
            };
            let was_sent = file.is_none_or(has_it) || !matches!(channel.peek_reply(), Ok(None));
            if was_sent {
                channel.outbox.pop_front();
            }
        }
        self.watch(channel.as_raw_fd(), Source::Channel(id))?;
        if let Some(session) = self.sessions.get_mut(&id) {
            session.channel = Some(channel);
        }
        Ok(())
    }

    fn restore_command(&mut self, id: SessionId, entry: record::Command) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        session.suspended = entry.suspended.map(|entry| Suspended {
            request: entry.request,
            head: entry.head,
            writable: entry.writable.into_iter().map(|(addr, len)| Piece { addr, len }).collect(),
            answer: entry.answer.map(|status| match Status::from_byte(status) {
                Ok(result) => Attempt::After(result),
                Err(_) => Attempt::After(Err(Status::Io)),
            }),
        });
        session.answer = entry.answer.map(|entry| Answer {
            used: entry.used,
            chain: chain(entry.head, &entry.writable),
            response: entry.response,
        });
    }

    fn restore_events(&mut self, id: SessionId, events: &BTreeMap<u64, Event>) {
        let Some(session) = self.sessions.get(&id) else { return };
        let ring = &session.rings[usize::from(EVENT_QUEUE)];
        let vring = ring.vring(&session.port, session.accepted()).ok();
        let memory = session.port.memory.read();
        let len = |index| vring.as_ref()?.used_len(index, memory.guest());
        let events: Vec<_> = events.iter().map(|(number, event)| (*number, *event)).collect();
        session.port.events().restore(&events, vring.as_ref().map(Vring::used), len);
    }

    /// Serves a ring that another worker served: each goes on at its used index, because the device is done with its chains in their
    /// order.
    fn serve_again(&mut self, id: SessionId, index: u32) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let features = session.accepted();
        let port = session.port.clone();
        let is_control = index == u32::from(CONTROL_QUEUE);
        let Some(used) = used_of(&session.rings[index as usize], &port, features) else {
            session.rings[index as usize].fail();
            return;
        };
        // What was done and is in the used ring needs no answer.
        session.answer.take_if(|answer| is_control && answer.used != used);
        let taken = is_control && (session.suspended.is_some() || session.answer.is_some());
        let ring = &mut session.rings[index as usize];
        ring.base = used.wrapping_add(u16::from(taken));
        if let Some(call) = &ring.call {
            // Whether it was told of what is in the used ring, nobody knows.
            call.signal();
        }
        if !is_control {
            if let Err(error) = self.start_ring(id, index) {
                tracing::warn!("{error}");
            }
            return;
        }
        let (Ok(vring), Some(kick)) = (ring.vring(&port, features), &ring.kick) else { return ring.fail() };
        let kick = kick.as_raw_fd();
        ring.service = Service::Control(Box::new(vring));
        if let Err(error) = self.watch(kick, Source::Kick(id, CONTROL_QUEUE)) {
            tracing::warn!("{error}");
        }
        self.give_answer(id);
        self.queue(Work::Commands(id));
    }

    /// Of sockets and devices that are configured no more nothing is remembered.
    fn forget_what_is_not_configured(&mut self) {
        let Some(keeping) = &mut self.keeping else { return };
        let sockets = self.listeners.iter().map(|listener| match listener {
            Listener::Device { socket, .. } | Listener::Hub { socket, .. } => {
                format!("listener/{}", socket.path().display())
            }
        });
        let devices = self.configured.iter().map(|device| format!("configured/{}", device.name));
        let known: Vec<String> = sockets.chain(devices).collect();
        let old = keeping.kept.book.values().map(|(name, _)| name);
        let old = old.filter(|name| name.starts_with("listener/") || name.starts_with("configured/"));
        let old: Vec<String> = old.filter(|name| !known.iter().any(|k| k == name)).map(Into::into).collect();
        old.iter().for_each(|name| keeping.kept.remove(name));
    }
}

fn used_of(ring: &Ring, port: &Port, features: Features) -> Option<u16> {
    let memory = port.memory.read();
    Vring::used_at(&ring.layout(&memory, features).ok()?, memory.guest())
}

fn ended(_: super::Refusal) -> KeepError {
    wrong("session", "it has ended")
}
