//! Commands in a guest, as the host sees them. The guest's end is
//! [`guest_agent`](super::guest_agent).

use super::frame::{self, Frame, Kind};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a guest may take nothing of what is written to it: one that is paused or hangs never does.
const TAKING: Duration = Duration::from_secs(120);

/// What a command did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote on standard output.
    pub stdout: Vec<u8>,
    /// What it wrote on standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

/// The host's end of the agents of one VM: after a reset, another one takes over.
#[derive(Debug, Clone)]
pub struct Agent(Arc<State>);

#[derive(Debug)]
struct State {
    port: UnixStream,
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// Whether an agent runs in the guest. Frames are written only then.
    ready: bool,
    /// Why there will never be one again.
    over: Option<String>,
    next_id: u32,
    commands: HashMap<u32, Sender<Happened>>,
}

#[derive(Debug)]
enum Happened {
    Output(Vec<u8>),
    Error(Vec<u8>),
    Ended(i32),
    Failed(String),
}

impl Agent {
    /// Waits for agents at this end of the guest's port.
    pub fn new(port: UnixStream) -> Agent {
        // The duration is not zero, and so cannot be refused.
        let _ = port.set_write_timeout(Some(TAKING));
        let state = State { port, inner: Mutex::default(), changed: Condvar::new() };
        let agent = Agent(Arc::new(state));
        let reader = agent.clone();
        thread::spawn(move || {
            let error = reader.read();
            let mut inner = reader.inner();
            inner.ready = false;
            inner.over = Some(error.to_string());
            reader.abandon(&mut inner, "QEMU ended");
            reader.0.changed.notify_all();
        });
        agent
    }

    /// Waits until an agent is there.
    pub fn wait_until_ready(&self, deadline: Instant) -> Result<(), String> {
        let mut inner = self.inner();
        while !inner.ready {
            if let Some(over) = &inner.over {
                return Err(format!("QEMU ended ({over})"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("the guest did not boot in time".into());
            }
            inner = self.0.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// The guest is about to be reset, or killed: its commands are no more.
    pub fn guest_is_gone(&self) {
        let mut inner = self.inner();
        inner.ready = false;
        self.abandon(&mut inner, "the guest was reset");
    }

    /// Starts a command.
    pub fn start(&self, arguments: &[&str]) -> Result<Running, String> {
        let (sender, happened) = channel();
        let mut inner = self.inner();
        inner.next_id += 1;
        let id = inner.next_id;
        inner.commands.insert(id, sender);
        drop(inner);
        let words: Vec<u8> = arguments.iter().flat_map(|word| word.bytes().chain([0])).collect();
        let name = arguments.join(" ");
        let running = Running {
            agent: self.clone(),
            id,
            name,
            happened,
            stdout: Vec::new(),
            stderr: Vec::new(),
            line: 0,
        };
        self.send(Kind::Run, id, &words).map(|()| running)
    }

    fn send(&self, kind: Kind, id: u32, content: &[u8]) -> Result<(), String> {
        // The lock keeps frames whole, and away from an agent that is not there yet.
        let inner = self.inner();
        if !inner.ready {
            return Err("there is no agent in the guest".into());
        }
        Frame::write(kind, id, content, &mut &self.0.port).map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => format!("the guest has taken nothing for {} s", TAKING.as_secs()),
            _ => format!("writing to the guest: {error}"),
        })
    }

    /// Reads what agents say, one agent after the other, until QEMU ends.
    fn read(&self) -> std::io::Error {
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 1 << 16];
        let mut current = None;
        loop {
            match (&self.0.port).read(&mut chunk) {
                Ok(0) => return std::io::ErrorKind::UnexpectedEof.into(),
                Ok(count) => bytes.extend_from_slice(&chunk[..count]),
                Err(error) => return error,
            }
            // A guest that was reset leaves half a frame, and its next agent's HELLO would be taken for the other half.
            while let Some((at, number)) = frame::find_hello(&bytes) {
                bytes.drain(..at);
                if current.replace(number) == Some(number) {
                    continue;
                }
                let mut inner = self.inner();
                self.abandon(&mut inner, "the guest started again");
                if let Err(error) = (&self.0.port).write_all(&[frame::WELCOME.as_slice(), &number].concat()) {
                    return error;
                }
                inner.ready = true;
                self.0.changed.notify_all();
            }
            if current.is_none() {
                continue;
            }
            loop {
                match Frame::take(&mut bytes) {
                    Ok(Some(frame)) => self.deliver(frame),
                    Ok(None) => break,
                    Err(_) => {
                        // What follows a half frame. The next HELLO will tell.
                        current = None;
                        bytes.clear();
                        break;
                    }
                }
            }
        }
    }

    fn deliver(&self, frame: Frame) {
        let happened = match frame.kind {
            Kind::Output => Happened::Output(frame.content),
            Kind::Error => Happened::Error(frame.content),
            Kind::Ended => match frame.content.try_into() {
                Ok(status) => Happened::Ended(i32::from_le_bytes(status)),
                Err(_) => Happened::Failed("the agent said no status".into()),
            },
            _ => Happened::Failed(String::from_utf8_lossy(&frame.content).into_owned()),
        };
        if let Some(command) = self.inner().commands.get(&frame.id) {
            // Who started it may not care any more.
            let _ = command.send(happened);
        }
    }

    fn abandon(&self, inner: &mut Inner, why: &str) {
        for (_, command) in inner.commands.drain() {
            let _ = command.send(Happened::Failed(why.into()));
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A command that runs in a guest. It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    agent: Agent,
    id: u32,
    name: String,
    happened: Receiver<Happened>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// How much of the standard output [`Running::line`] has given.
    line: usize,
}

impl Running {
    /// Writes to its standard input.
    pub fn write(&self, bytes: &[u8]) -> Result<(), String> {
        self.input().write(bytes)
    }

    /// Its standard input, for another thread than the one that reads its output.
    pub fn input(&self) -> Input {
        Input { agent: self.agent.clone(), id: self.id }
    }

    /// Ends its standard input.
    pub fn end_input(&self) -> Result<(), String> {
        self.agent.send(Kind::Input, self.id, &[])
    }

    /// Sends a signal to it and its children.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<(), String> {
        self.agent.send(Kind::Signal, self.id, &(signal as i32).to_le_bytes())
    }

    /// The next line of its standard output, without the end of line.
    pub fn line(&mut self, deadline: Duration) -> Result<String, String> {
        self.line_or_status(deadline)?.map_err(|status| {
            format!("`{}` ended ({status}) before it wrote a line{}", self.name, self.said())
        })
    }

    /// The next line; none if it ended well without another one.
    pub fn next_line(&mut self, deadline: Duration) -> Result<Option<String>, String> {
        match self.line_or_status(deadline)? {
            Ok(line) => Ok(Some(line)),
            Err(status) if status.success() => Ok(None),
            Err(status) => Err(format!("`{}` ended ({status}){}", self.name, self.said())),
        }
    }

    /// The next line, or how it ended without one.
    fn line_or_status(&mut self, deadline: Duration) -> Result<Result<String, ExitStatus>, String> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(len) = self.stdout[self.line..].iter().position(|byte| *byte == b'\n') {
                let line = String::from_utf8_lossy(&self.stdout[self.line..][..len]).into_owned();
                self.line += len + 1;
                return Ok(Ok(line));
            }
            if let Some(status) = self.next(end)? {
                return Ok(Err(status));
            }
        }
    }

    /// Waits until it ends. What [`Running::line`] gave is in the output again.
    pub fn wait(mut self, deadline: Duration) -> Result<Output, String> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.next(end)? {
                let (stdout, stderr) = (std::mem::take(&mut self.stdout), std::mem::take(&mut self.stderr));
                return Ok(Output { status, stdout, stderr });
            }
        }
    }

    /// The next thing that happens; the status if it is the end.
    fn next(&mut self, end: Instant) -> Result<Option<ExitStatus>, String> {
        match self.happened.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Happened::Output(bytes)) => self.stdout.extend(bytes),
            Ok(Happened::Error(bytes)) => self.stderr.extend(bytes),
            Ok(Happened::Ended(status)) => {
                self.agent.inner().commands.remove(&self.id);
                return Ok(Some(ExitStatus::from_raw(status)));
            }
            Ok(Happened::Failed(why)) => return Err(format!("`{}`: {why}{}", self.name, self.said())),
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("`{}` did not come to an end in time{}", self.name, self.said()));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(format!("`{}` has ended", self.name)),
        }
        Ok(None)
    }

    /// What it has said so far, for messages.
    fn said(&self) -> String {
        let mut text = String::new();
        for (what, bytes) in [("standard output", &self.stdout), ("standard error", &self.stderr)] {
            if !bytes.is_empty() {
                let from = bytes.len().saturating_sub(2000);
                text += &format!("\n---- its {what} ----\n{}", String::from_utf8_lossy(&bytes[from..]));
            }
        }
        text
    }
}

/// The standard input of a command that runs in a guest, or did.
#[derive(Debug, Clone)]
pub struct Input {
    agent: Agent,
    id: u32,
}

impl Input {
    /// Writes to it. What a command does not read any more is lost.
    pub fn write(&self, bytes: &[u8]) -> Result<(), String> {
        bytes.chunks(frame::MAX_CONTENT).try_for_each(|chunk| self.agent.send(Kind::Input, self.id, chunk))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.agent.inner().commands.remove(&self.id).is_some() {
            let _ = self.signal(nix::sys::signal::Signal::SIGKILL);
        }
    }
}
