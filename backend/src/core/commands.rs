//! The control queue: a command out of its chain, to the fabric, and the answer back (`docs/device.md`, 6).

use super::{Core, Work};
use crate::fabric::{Attempt, DeviceId};
use crate::memory::DeviceMemory;
use crate::port::SessionId;
use crate::session::{Answer, Service, Session, Suspended};
use crate::vring::{Broken, Chain};
use dmbridge_proto::control::{Command, HEADER_SIZE, Reply, Request, Response};
use dmbridge_proto::status::Status;
use std::os::fd::AsRawFd;
use std::time::Instant;

/// Commands of one device before others have their turn.
const TURN: usize = 64;

impl Core {
    /// Serves commands, for one turn.
    pub fn serve_commands(&mut self, id: SessionId) {
        for turn in 0.. {
            let Some(session) = self.sessions.get_mut(&id) else { return };
            let Service::Control(_) = session.rings[0].service else { return };
            if session.suspended.is_some() || session.answer.is_some() {
                break;
            }
            let now = Instant::now();
            if let Some(when) = session.throttle.wait(now) {
                self.timers.insert((when, Work::Commands(id)));
                break;
            }
            if turn == TURN {
                self.queue(Work::Commands(id));
                break;
            }
            match self.next_command(id) {
                Ok(true) => {}
                Ok(false) => break,
                Err(broken) => return self.break_control(id, &broken),
            }
        }
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Service::Control(vring) = &mut session.rings[0].service else { return };
        let notified = vring.notify(session.port.memory.read().guest());
        session.port.check_memory();
        if let Err(broken) = notified {
            self.break_control(id, &broken);
        }
    }

    pub(super) fn break_control(&mut self, id: SessionId, broken: &Broken) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        tracing::warn!(device = %session.name, queue = "control", "{broken}; the queue is stopped");
        session.answer = None;
        // A ring whose memory has vanished reads as zeroes, and cannot be followed either.
        session.port.check_memory();
        let kick = session.rings[0].kick.as_ref().map(AsRawFd::as_raw_fd);
        session.rings[0].fail();
        if let Some(kick) = kick {
            self.unwatch(kick);
        }
        self.touch(id);
    }

    /// Does one command. False if there is none.
    fn next_command(&mut self, id: SessionId) -> Result<bool, Broken> {
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(false) };
        let Service::Control(vring) = &mut session.rings[0].service else { return Ok(false) };
        let Some(device) = session.device else { return Ok(false) };
        let chain = &mut self.chain;
        {
            let memory = session.port.memory.read();
            vring.disable_kicks(memory.guest())?;
            if !vring.pop(memory.guest(), chain)? {
                return vring.enable_kicks(memory.guest());
            }
            session.throttle.count(Instant::now());
            if chain.malformed
                || !chain.takes_response(&memory, HEADER_SIZE)
                || !read_request(&memory, chain, session.limits.max_segments, &mut self.request)
            {
                vring.push(memory.guest(), chain.head, 0)?;
                return Ok(true);
            }
        }
        let fits = |command: Command| {
            let body = self.request.len() >= HEADER_SIZE + command.body_size();
            let size = HEADER_SIZE + command.reply_size();
            if body && chain.takes_response(&session.port.memory.read(), size) {
                Ok(())
            } else {
                Err(Status::Invalid)
            }
        };
        let request = Command::parse(&self.request)
            .and_then(fits)
            .and_then(|()| Request::parse(&self.request, session.limits.max_segments));
        let is_full = self.keeping.as_ref().is_some_and(|keeping| keeping.kept.book.is_nearly_full());
        let result = match request {
            Ok(Request::Register(_)) if is_full => Some(Err(Status::NoMemory)),
            Ok(request) => self.fabric.execute(device, &request, Attempt::First),
            Err(status) => Some(Err(status)),
        };
        let Some(session) = self.sessions.get_mut(&id) else { return Ok(false) };
        match result {
            Some(result) => {
                let kept = self.keeping.is_some();
                answer(session, &self.chain, result, kept)?;
            }
            None => {
                session.suspended = Some(Suspended {
                    request: self.request.clone(),
                    head: self.chain.head,
                    writable: self.chain.writable.clone(),
                    answer: None,
                });
            }
        }
        self.touch_command(id);
        self.settle();
        self.commit();
        Ok(true)
    }

    /// Goes on with the command that waited.
    pub(super) fn resume(&mut self, device: DeviceId, attempt: Attempt) {
        let Some(&id) = self.started.get(&device) else { return };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(mut suspended) = session.suspended.take() else { return };
        if !matches!(session.rings[0].service, Service::Control(_)) {
            suspended.answer = Some(attempt);
            session.suspended = Some(suspended);
            return self.touch_command(id);
        }
        let result = match Request::parse(&suspended.request, session.limits.max_segments) {
            Ok(request) => self.fabric.execute(device, &request, attempt),
            Err(status) => Some(Err(status)),
        };
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let Some(result) = result else {
            session.suspended = Some(suspended);
            return;
        };
        let chain = Chain { head: suspended.head, writable: suspended.writable, ..Chain::default() };
        if let Err(broken) = answer(session, &chain, result, self.keeping.is_some()) {
            self.break_control(id, &broken);
        }
        self.touch_command(id);
        self.queue(Work::Commands(id));
    }

    /// The control queue is served again: what came meanwhile for the command that waits is taken up.
    pub(super) fn resume_after_pause(&mut self, id: SessionId) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let attempt = session.suspended.as_mut().and_then(|suspended| suspended.answer.take());
        if let (Some(attempt), Some(device)) = (attempt, session.device) {
            self.resume(device, attempt);
        }
    }
}

/// Copies what the device may need of a command's readable bytes. False if that is not all guest memory.
fn read_request(memory: &DeviceMemory, chain: &Chain, max_segments: u32, request: &mut Vec<u8>) -> bool {
    const SEGMENT: usize = 16;
    let most = HEADER_SIZE + Command::Register.body_size() + SEGMENT * max_segments as usize;
    request.clear();
    for piece in &chain.readable {
        let at = request.len();
        let len = (piece.len as usize).min(most - at);
        request.resize(at + len, 0);
        if len != 0 && !memory.read(piece.addr, &mut request[at..]) {
            return false;
        }
    }
    true
}

/// Answers a command; with a keeper as soon as that is written down.
fn answer(
    session: &mut Session,
    chain: &Chain,
    result: Result<Reply, Status>,
    kept: bool,
) -> Result<(), Broken> {
    let Service::Control(vring) = &mut session.rings[0].service else { return Ok(()) };
    let response = Response::from(result);
    if kept {
        session.commands += 1;
        let chain = Chain { head: chain.head, writable: chain.writable.clone(), ..Chain::default() };
        session.answer = Some(Answer { used: vring.used(), chain, response: response.as_bytes().to_vec() });
        return Ok(());
    }
    let memory = session.port.memory.read();
    let len = if chain.respond(&memory, response.as_bytes()) { response.as_bytes().len() } else { 0 };
    session.commands += 1;
    vring.push(memory.guest(), chain.head, len as u32)
}
