//! The keeper: starts a worker, holds what it is given, and starts another when the worker ends. It reads no front-end's
//! socket, knows nothing of devices, and has one thread.

use super::link::{BATCH, Word, receive};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

/// What a worker's exit code says: its predecessor's book is of a version that it does not read.
pub const REFUSED: u8 = 3;
/// Pauses before the next worker is started, after so many that ended too soon. Beyond that none is.
const PAUSES: [u64; 8] = [0, 100, 200, 400, 800, 1600, 3200, 6400];
/// A worker that served for so long did not end too soon.
const LONG: Duration = Duration::from_secs(10);

/// How the worker is started.
#[derive(Debug, Clone)]
pub struct Program {
    /// The file: when a worker is replaced, whatever is there then.
    pub path: PathBuf,
    /// Its arguments; the descriptor of its end of the link is appended.
    pub arguments: Vec<OsString>,
}

/// Why the keeper ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended(pub u8);

struct Keeper {
    program: Program,
    signals: SignalFd,
    kept: BTreeMap<u64, OwnedFd>,
    /// Whether any worker ever served.
    served: bool,
    /// Workers that ended too soon, in a row.
    failures: usize,
}

/// A worker and the keeper's end of the link.
struct Worker {
    child: Child,
    socket: OwnedFd,
    /// Since when it serves.
    ready: Option<Instant>,
    /// The keeper was told to end.
    stopping: bool,
    /// The keeper was told to replace it, which is done when it serves.
    outdated: bool,
}

/// Keeps until a worker ends well or a signal says to end.
pub fn run(program: Program) -> io::Result<Ended> {
    let mask = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD]);
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    Keeper { program, signals, kept: BTreeMap::new(), served: false, failures: 0 }.run()
}

impl Keeper {
    fn run(mut self) -> io::Result<Ended> {
        loop {
            let mut worker = self.start()?;
            let status = self.serve(&mut worker)?;
            let code = status.code().map_or(1, |code| code as u8);
            let gave_up = !self.served && (status.code().is_some() || self.failures == PAUSES.len());
            if status.success() || worker.stopping || gave_up {
                // One that never served has said why, and there is nothing to hold.
                return Ok(Ended(code));
            }
            if worker.ready.is_some_and(|since| since.elapsed() >= LONG) {
                self.failures = 0;
            }
            let was_killed = worker.ready.is_some() && status.signal() == Some(libc::SIGKILL);
            if was_killed {
                // By somebody's hand, or because the host had no memory: the next one is no worse.
                tracing::warn!("the worker was killed; the next one takes over");
                self.failures = 0;
                continue;
            }
            self.failures += 1;
            let pause = PAUSES.get(self.failures - 1).copied();
            let pause = pause.filter(|_| code != REFUSED || status.signal().is_some());
            let go_on = match pause {
                Some(pause) => {
                    tracing::error!("the worker ended ({status}); the next one takes over in {pause} ms");
                    self.wait(Some(Duration::from_millis(pause)))?
                }
                None => {
                    tracing::error!(
                        "the worker ended ({status}), {} in a row: no further one is started. The devices are held: what \
                         is mapped goes on. Mend what is wrong and send SIGHUP to try again; SIGTERM gives the devices up",
                        self.failures
                    );
                    self.failures = 0;
                    self.wait(None)?
                }
            };
            if !go_on {
                return Ok(Ended(code));
            }
        }
    }

    fn start(&self) -> io::Result<Worker> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty())?;
        nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        let child = Command::new(&self.program.path)
            .args(&self.program.arguments)
            .arg(format!("--kept-by={}", theirs.as_raw_fd()))
            // A terminal's signals are for the keeper.
            .process_group(0)
            .spawn()
            .map_err(|error| {
                io::Error::new(error.kind(), format!("{}: {error}", self.program.path.display()))
            })?;
        drop(theirs);
        let worker = Worker { child, socket: ours, ready: None, stopping: false, outdated: false };
        // A worker that ends meanwhile is seen by its end.
        let _ = self.hand_over(worker.socket.as_raw_fd());
        Ok(worker)
    }

    fn hand_over(&self, socket: RawFd) -> io::Result<()> {
        let everything: Vec<_> = self.kept.iter().map(|(number, fd)| (*number, fd.as_raw_fd())).collect();
        // The last one means the end.
        let end = [(0, self.signals.as_raw_fd())];
        for batch in everything.chunks(BATCH).chain([&end[..]]) {
            let bytes: Vec<u8> = batch.iter().flat_map(|(number, _)| number.to_le_bytes()).collect();
            let fds: Vec<RawFd> = batch.iter().map(|(_, fd)| *fd).collect();
            loop {
                let rights = [ControlMessage::ScmRights(&fds)];
                match sendmsg::<()>(socket, &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None) {
                    Ok(_) => break,
                    // So many may be under way: the worker has to read some first.
                    Err(Errno::ETOOMANYREFS) => std::thread::sleep(Duration::from_millis(1)),
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Until the worker has ended, and all that it sent was read.
    fn serve(&mut self, worker: &mut Worker) -> io::Result<ExitStatus> {
        let mut open = true;
        loop {
            if let Some(status) = worker.child.try_wait()? {
                // All that it will ever have said is there.
                self.hear(worker)?;
                return Ok(status);
            }
            let link = if open { PollFlags::POLLIN } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(worker.socket.as_fd(), link),
            ];
            // Without its end of the link a worker is on its way out.
            let timeout = if open { PollTimeout::NONE } else { PollTimeout::from(100u8) };
            match poll(&mut fds[..if open { 2 } else { 1 }], timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(signal) = self.signals.read_signal()? {
                let pid = Pid::from_raw(worker.child.id() as i32);
                match Signal::try_from(signal.ssi_signo as i32) {
                    Ok(signal @ (Signal::SIGTERM | Signal::SIGINT)) => {
                        worker.stopping = true;
                        let _ = kill(pid, signal);
                    }
                    Ok(Signal::SIGHUP) => worker.outdated = true,
                    _ => {}
                }
            }
            open = open && self.hear(worker)?;
            if worker.outdated && worker.ready.is_some() {
                worker.outdated = false;
                tracing::info!("the worker is replaced");
                let _ = kill(Pid::from_raw(worker.child.id() as i32), Signal::SIGKILL);
            }
        }
    }

    /// Does what the worker has said. False when it will say nothing more.
    fn hear(&mut self, worker: &mut Worker) -> io::Result<bool> {
        loop {
            let mut bytes = [0; 16];
            let (n, fds) = match receive(worker.socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                // It ended before it had read everything; what it said before is still to come.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) => return Err(error),
            };
            if n == 0 {
                return Ok(false);
            }
            match Word::from_bytes(&bytes[..n]) {
                Some(Word::Keep(number)) => {
                    if let Some(fd) = fds.into_iter().next() {
                        self.kept.insert(number, fd);
                    }
                }
                Some(Word::Drop(number)) => {
                    self.kept.remove(&number);
                }
                Some(Word::Ready) => {
                    self.served = true;
                    worker.ready = Some(Instant::now());
                }
                None => tracing::warn!("the worker said something that is not understood"),
            }
        }
    }

    /// Waits for so long, or for a signal. False if that says to end.
    fn wait(&self, time: Option<Duration>) -> io::Result<bool> {
        let end = time.map(|time| Instant::now() + time);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let timeout = match left {
                Some(Duration::ZERO) => return Ok(true),
                Some(left) => PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX),
                None => PollTimeout::NONE,
            };
            let mut fds = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            while let Some(signal) = self.signals.read_signal()? {
                match Signal::try_from(signal.ssi_signo as i32) {
                    Ok(Signal::SIGTERM | Signal::SIGINT) => return Ok(false),
                    Ok(Signal::SIGHUP) => return Ok(true),
                    _ => {}
                }
            }
        }
    }
}
