//! Move queues and the threads that serve them (`docs/device.md`, 10).
//!
//! A queue belongs to one mover. The mover holds the queue's ring while it does one move; a copy goes in steps, and
//! holds what it reads and writes only for a step. So whoever ends a queue, a DMB or a memory table waits for one step.

use crate::engine::cpu::CpuEngine;
use crate::engine::set::{Choice, MoverEngines};
use crate::engine::{self, Run};
use crate::memory::DeviceMemory;
use crate::notify::EventFile;
use crate::port::{Counters, Home, Port, Target};
use crate::settings::Limits;
use crate::vring::{Broken, Chain, Piece, Vring};
use dmbridge_proto::event::Event;
use dmbridge_proto::line::Wake;
use dmbridge_proto::moves::{HEADER_SIZE, MoveFlags, MoveHeader, RESPONSE_SIZE};
use dmbridge_proto::status::Status;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The most bytes that are copied in one step.
const STEP: u64 = engine::STEP as u64;
/// The most runs that an engine is given at once.
const MAX_RUNS: usize = 64;
/// So many moves are looked at before the first of them is done, and answered together.
const AHEAD: usize = 16;
/// A move of so many bytes is answered at once, and those before it before it is begun.
const PROMPTLY: u64 = 4096;
/// A mover leaves a queue for the next one after so many moves, or so many bytes.
const TURN_MOVES: u32 = 64;
const TURN_BYTES: u64 = 8 << 20;
/// A word from the control thread, as an epoll datum; queues have smaller numbers.
const WORD: u64 = u64::MAX;

/// A move queue in service.
#[derive(Debug)]
pub struct MoveQueue {
    port: Arc<Port>,
    max_segments: usize,
    max_move_size: u64,
    ring: Mutex<Option<Vring>>,
    /// Asks for the ring: a copy that is under way ends at its next step.
    stopping: AtomicBool,
}

impl MoveQueue {
    fn ring(&self) -> MutexGuard<'_, Option<Vring>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where used elements are announced.
    pub fn set_call(&self, call: Option<Arc<EventFile>>) {
        if let Some(ring) = &mut *self.ring() {
            ring.set_call(call);
        }
    }
}

/// What a mover and the control thread share.
#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    /// Written for a word: one of the next two.
    word: EventFd,
    stop: AtomicBool,
    /// Queues that are new: something may have been offered in them before anybody watched their kicks.
    fresh: Mutex<Vec<u64>>,
    queues: Mutex<HashMap<u64, Arc<MoveQueue>>>,
    next: AtomicU64,
}

impl Shared {
    fn queues(&self) -> MutexGuard<'_, HashMap<u64, Arc<MoveQueue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fresh(&self) -> MutexGuard<'_, Vec<u64>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread that serves move queues.
#[derive(Debug)]
pub struct Mover {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// A move queue that a mover serves.
#[derive(Debug)]
pub struct Served {
    key: u64,
    kick: RawFd,
    queue: Arc<MoveQueue>,
}

impl Served {
    /// The queue.
    pub fn queue(&self) -> &MoveQueue {
        &self.queue
    }
}

impl Mover {
    /// Starts the thread.
    pub fn start(number: usize, engines: MoverEngines) -> io::Result<Mover> {
        let word = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let epoll = Epoll::new()?;
        let watch = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, WORD);
        epoll.ctl(ControlOperation::Add, word.as_raw_fd(), watch)?;
        let shared = Arc::new(Shared {
            epoll,
            word,
            stop: AtomicBool::new(false),
            fresh: Mutex::default(),
            queues: Mutex::default(),
            next: AtomicU64::new(0),
        });
        let worker = Worker {
            shared: shared.clone(),
            engines,
            chains: std::array::from_fn(|_| Chain::default()),
            answered: Vec::with_capacity(AHEAD),
            data: Vec::new(),
            runs: Vec::with_capacity(MAX_RUNS),
            turns: VecDeque::new(),
            waiting: HashSet::new(),
            parked: Vec::new(),
            look: None,
        };
        let thread =
            std::thread::Builder::new().name(format!("dmb-mover-{number}")).spawn(move || worker.run())?;
        Ok(Mover { shared, thread: Some(thread) })
    }

    /// Serves a queue from now on. `kick` is watched until [`withdraw`](Self::withdraw), and stays open so long.
    pub fn serve(&self, port: Arc<Port>, limits: &Limits, ring: Vring, kick: RawFd) -> io::Result<Served> {
        let queue = Arc::new(MoveQueue {
            port,
            max_segments: limits.max_segments as usize,
            max_move_size: limits.max_move_size,
            ring: Mutex::new(Some(ring)),
            stopping: AtomicBool::new(false),
        });
        let key = self.shared.next.fetch_add(1, Ordering::Relaxed);
        self.shared.queues().insert(key, queue.clone());
        let watch = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, key);
        if let Err(error) = self.shared.epoll.ctl(ControlOperation::Add, kick, watch) {
            self.shared.queues().remove(&key);
            return Err(error);
        }
        self.shared.fresh().push(key);
        let _ = self.shared.word.write(1);
        Ok(Served { key, kick, queue })
    }

    /// Ends the service: nothing of the queue is touched any more when this returns. The ring, if it did not break.
    pub fn withdraw(&self, served: Served) -> Option<Vring> {
        let _ = self.shared.epoll.ctl(ControlOperation::Delete, served.kick, EpollEvent::default());
        self.shared.queues().remove(&served.key);
        served.queue.stopping.store(true, Ordering::Release);
        served.queue.ring().take()
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.shared.word.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Worker {
    shared: Arc<Shared>,
    engines: MoverEngines,
    /// Moves that were offered.
    chains: [Chain; AHEAD],
    /// Those of them that are done and not answered, by number.
    answered: Vec<(usize, Outcome)>,
    /// The data pieces of the move at hand.
    data: Vec<Piece>,
    /// What of it is copied at once.
    runs: Vec<Run>,
    /// Queues that have something to do, in turn, each once.
    turns: VecDeque<u64>,
    waiting: HashSet<u64>,
    /// Queues that wait for somebody who is paused, and when to look again.
    parked: Vec<u64>,
    look: Option<Instant>,
}

/// A queue whose next move goes into the memory of a paused device is looked at again after this long.
const PAUSE: Duration = Duration::from_millis(20);

/// What came of a move.
enum Outcome {
    /// Its chain is malformed.
    Malformed,
    /// This is the answer.
    Done(Result<(), Status>),
    /// It has to wait until its target's owner goes on.
    Later,
}

/// How a turn ended.
enum Turn {
    /// The next move has to wait.
    Later,
    /// Nothing is left to do; the driver kicks for the next.
    Idle,
    /// Others first.
    More,
}

impl Worker {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 64];
        loop {
            let timeout = match self.look {
                _ if !self.turns.is_empty() => 0,
                Some(when) => when.saturating_duration_since(Instant::now()).as_millis() as i32 + 1,
                None => -1,
            };
            let count = match self.shared.epoll.wait(timeout, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!("a mover cannot wait for kicks: {error}");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    WORD if self.shared.stop.load(Ordering::Acquire) => return,
                    WORD => {
                        let fresh = std::mem::take(&mut *self.shared.fresh());
                        fresh.into_iter().for_each(|key| self.enqueue(key));
                    }
                    key => self.enqueue(key),
                }
            }
            if self.look.is_some_and(|when| when <= Instant::now()) {
                self.look = None;
                std::mem::take(&mut self.parked).into_iter().for_each(|key| self.enqueue(key));
            }
            if let Some(key) = self.turns.pop_front() {
                self.waiting.remove(&key);
                let queue = self.shared.queues().get(&key).cloned();
                match queue.map(|queue| self.turn(&queue)) {
                    Some(Turn::More) => self.enqueue(key),
                    Some(Turn::Later) => {
                        self.parked.push(key);
                        self.look.get_or_insert_with(|| Instant::now() + PAUSE);
                    }
                    Some(Turn::Idle) | None => {}
                }
            }
        }
    }

    fn enqueue(&mut self, key: u64) {
        if self.waiting.insert(key) {
            self.turns.push_back(key);
        }
    }

    fn turn(&mut self, queue: &MoveQueue) -> Turn {
        let mut guard = queue.ring();
        let Some(ring) = &mut *guard else { return Turn::Idle };
        let turn = self.work(queue, ring);
        let turn = turn.and_then(|turn| ring.notify(queue.port.memory.read().guest()).map(|()| turn));
        queue.port.check_memory();
        turn.unwrap_or_else(|broken| {
            tracing::warn!(queue = "move", "{broken}; the queue is stopped");
            if let Some(ring) = guard.take() {
                ring.fail();
            }
            Turn::Idle
        })
    }

    fn work(&mut self, queue: &MoveQueue, ring: &mut Vring) -> Result<Turn, Broken> {
        let (mut moves, mut bytes) = (0, 0);
        // Those of `chains` that are to be done.
        let mut waiting = 0..0;
        let turn = loop {
            if queue.stopping.load(Ordering::Acquire) {
                break Turn::Idle;
            }
            if waiting.is_empty() {
                let memory = queue.port.memory.read();
                if moves == 0 {
                    ring.disable_kicks(memory.guest())?;
                }
                waiting = 0..ring.pop_some(memory.guest(), &mut self.chains)?;
                if waiting.is_empty() {
                    if ring.enable_kicks(memory.guest())? {
                        continue;
                    }
                    break Turn::Idle;
                }
                self.chains[waiting.clone()].iter().for_each(|chain| chain.fetch(&memory));
            }
            if self.chains[waiting.start].readable_len() >= PROMPTLY {
                // Who waits for a short one does not wait for this one.
                self.give_back(queue, ring)?;
            }
            let before = bytes;
            match self.answer(queue, waiting.start, &mut bytes) {
                Outcome::Later => break Turn::Later,
                outcome => self.answered.push((waiting.start, outcome)),
            }
            waiting.start += 1;
            moves += 1;
            if waiting.is_empty() || bytes - before >= PROMPTLY {
                self.give_back(queue, ring)?;
            }
            if moves >= TURN_MOVES || bytes >= TURN_BYTES {
                break Turn::More;
            }
        };
        self.give_back(queue, ring)?;
        ring.unpop(waiting.len());
        Ok(turn)
    }

    /// Answers what is done, in order and at once: the driver looks at the used ring all the time, and its cache line should
    /// come here once for all of them.
    fn give_back(&mut self, queue: &MoveQueue, ring: &mut Vring) -> Result<(), Broken> {
        if self.answered.is_empty() {
            return Ok(());
        }
        let memory = queue.port.memory.read();
        let (mut done, mut refused) = (0, 0);
        for (number, outcome) in self.answered.drain(..) {
            let chain = &self.chains[number];
            let len = match outcome {
                Outcome::Done(result) => {
                    *if result.is_ok() { &mut done } else { &mut refused } += 1;
                    let mut response = [0; RESPONSE_SIZE];
                    response[0] = Status::to_byte(&result);
                    chain.respond(&memory, &response);
                    RESPONSE_SIZE as u32
                }
                Outcome::Malformed | Outcome::Later => 0,
            };
            ring.push(memory.guest(), chain.head, len)?;
        }
        for (counter, count) in [(&queue.port.counters.moves, done), (&queue.port.counters.refused, refused)]
        {
            if count != 0 {
                Counters::add(counter, count);
            }
        }
        Ok(())
    }

    /// Does the move in one of `chains`.
    fn answer(&mut self, queue: &MoveQueue, number: usize, bytes: &mut u64) -> Outcome {
        let chain = &self.chains[number];
        let mut header = [0; HEADER_SIZE];
        {
            let memory = queue.port.memory.read();
            if chain.malformed || !chain.takes_response(&memory, RESPONSE_SIZE) {
                return Outcome::Malformed;
            }
            if take_header(&memory, &chain.readable, &mut header, &mut self.data).is_none() {
                return Outcome::Malformed;
            }
        }
        match MoveHeader::parse(&header).and_then(|header| self.execute(queue, &header, bytes)) {
            Ok(true) => Outcome::Done(Ok(())),
            Ok(false) => Outcome::Later,
            Err(status) => Outcome::Done(Err(status)),
        }
    }

    /// Does a move. False: not now, and then all of it again.
    fn execute(&mut self, queue: &MoveQueue, header: &MoveHeader, bytes: &mut u64) -> Result<bool, Status> {
        let len: u64 = self.data.iter().map(|p| u64::from(p.len)).sum();
        if len > queue.max_move_size || self.data.len() > queue.max_segments {
            return Err(Status::TooBig);
        }
        let target = queue.port.target(header.token).ok_or(Status::NoEntry)?;
        if header.offset.checked_add(len).is_none_or(|end| end > target.size) {
            return Err(Status::Invalid);
        }
        let mut copy = Copy {
            engines: &mut self.engines,
            runs: &mut self.runs,
            source: &queue.port,
            target: &target,
            data: &self.data,
            len,
            choice: None,
            piece: 0,
            at: 0,
            offset: header.offset,
        };
        {
            let memory = queue.port.memory.read();
            if !self.data.iter().all(|p| p.len == 0 || memory.holds(p.addr, p.len.into())) {
                return Err(Status::Fault);
            }
        }
        let mut left = len;
        loop {
            let home = target.open();
            let Some(home) = &*home else {
                return Err(if left == len { Status::NoEntry } else { Status::Reset });
            };
            if target.is_paused(home) {
                return Ok(false);
            }
            // A step ends between two words of the DMB.
            let step = left.min(STEP - copy.offset % 8);
            copy.step(home, step)?;
            left -= step;
            if left == 0 {
                if let Some(choice) = copy.choice {
                    copy.engines.done(choice, len as usize);
                }
                notify(home, &target, header, &queue.port.counters)?;
                break;
            }
            if queue.stopping.load(Ordering::Acquire) {
                // If the queue is served again, from the beginning: nobody has been told anything yet.
                return Ok(false);
            }
        }
        if len != 0 {
            Counters::add(&queue.port.counters.bytes, len);
            *bytes += len;
        }
        if !Arc::ptr_eq(&queue.port, &target.owner) {
            target.owner.check_memory();
        }
        Ok(true)
    }
}

/// Reads the header and leaves the data's pieces in `data`. `None` if there is too little, if it is not guest memory, or
/// if header and data share a descriptor.
fn take_header(
    memory: &DeviceMemory,
    readable: &[Piece],
    header: &mut [u8; HEADER_SIZE],
    data: &mut Vec<Piece>,
) -> Option<()> {
    let mut filled = 0;
    let mut pieces = readable.iter();
    while filled < HEADER_SIZE {
        let piece = pieces.next()?;
        let end = filled + piece.len as usize;
        if !memory.read(piece.addr, header.get_mut(filled..end)?) {
            return None;
        }
        filled = end;
    }
    data.clear();
    data.extend(pieces);
    Some(())
}

/// A copy under way.
struct Copy<'a> {
    engines: &'a mut MoverEngines,
    runs: &'a mut Vec<Run>,
    source: &'a Port,
    target: &'a Target,
    data: &'a [Piece],
    /// All of the move's bytes.
    len: u64,
    /// What copies them, once that is known.
    choice: Option<Choice>,
    /// The piece to go on with, and where in it.
    piece: usize,
    at: u64,
    /// Where to go on in the DMB.
    offset: u64,
}

impl Copy<'_> {
    /// Copies the next `len` bytes. Both memory tables are held meanwhile, and only so long.
    fn step(&mut self, home: &Home, len: u64) -> Result<(), Status> {
        if len == 0 {
            return Ok(());
        }
        let source = self.source.memory.read();
        let other;
        let owner: &DeviceMemory = match home {
            Home::Ram { .. } if !std::ptr::eq(self.source, &*self.target.owner) => {
                other = self.target.owner.memory.read();
                &other
            }
            _ => &source,
        };
        let destination = match home {
            Home::Pool { file, .. } => file.node(),
            Home::Ram { .. } => self.target.owner.node(),
        };
        let choice = *self.choice.get_or_insert_with(|| {
            self.engines.choose(self.source.engine, self.source.node(), destination, self.len as usize)
        });
        self.runs.clear();
        let mut left = len;
        while left > 0 {
            let (src, run) = self.run(&source, left)?;
            // Where the source is cut within a word of the DMB, the word is put together first: it is stored by one store.
            let words = if run < left { run.saturating_sub((self.offset + run) % 8) } else { run };
            let done = if words > 0 {
                let (dst, run) = home.host(self.offset, words, owner).ok_or(Status::Reset)?;
                if self.runs.len() == MAX_RUNS {
                    // SAFETY: as below.
                    unsafe { self.copy_runs(choice) };
                }
                self.runs.push(Run { src, dst, len: run as usize });
                self.at += run;
                run
            } else {
                let mut word = [0; 8];
                let len = (8 - self.offset % 8).min(left);
                for byte in &mut word[..len as usize] {
                    let (src, _) = self.run(&source, 1)?;
                    // SAFETY: the byte is mapped by the source's memory table, which is held.
                    *byte = unsafe { src.read_volatile() };
                    self.at += 1;
                }
                let (dst, run) = home.host(self.offset, len, owner).ok_or(Status::Reset)?;
                // A piece of a RAM DMB holds whole words, so a word is never cut there.
                debug_assert_eq!(run, len);
                // SAFETY: the destination as below, the source is a local.
                unsafe { CpuEngine.copy(word.as_ptr(), dst, run as usize) };
                run
            };
            self.offset += done;
            left -= done;
        }
        // SAFETY: all runs are mapped: the source's by its memory table, the destination's by the extent or by the owner's
        // table, and all three are held until the engine is done. They may be guests' memory, so no reference to them exists.
        unsafe { self.copy_runs(choice) };
        Ok(())
    }

    /// Copies what was collected. When this returns no engine works on it any more.
    ///
    /// # Safety
    ///
    /// The runs are mapped, and no reference to them exists.
    unsafe fn copy_runs(&mut self, choice: Choice) {
        let len = self.runs.iter().map(|run| run.len).sum();
        // SAFETY: the caller's promise.
        unsafe { self.engines.copy(choice, self.runs, len) };
        self.runs.clear();
    }

    /// Where the source goes on, and how many of `len` bytes follow there in one piece.
    fn run(&mut self, source: &DeviceMemory, len: u64) -> Result<(*mut u8, u64), Status> {
        loop {
            // The sizes were checked: there are pieces for all of the move. What no longer resolves was taken out of a
            // memory table while the copy was under way.
            let piece = self.data.get(self.piece).ok_or(Status::Reset)?;
            let rest = u64::from(piece.len) - self.at;
            if rest != 0 {
                return source.host(piece.addr + self.at, rest.min(len)).ok_or(Status::Reset);
            }
            (self.piece, self.at) = (self.piece + 1, 0);
        }
    }
}

impl Home {
    /// Our address of the DMB's byte at `offset`, and how many of `len` follow it there in one piece.
    fn host(&self, offset: u64, len: u64, owner: &DeviceMemory) -> Option<(*mut u8, u64)> {
        match self {
            Home::Pool { file, offset: start, .. } => Some((file.at(start + offset, len), len)),
            Home::Ram { segments, .. } => {
                let at = segments.partition_point(|s| s.offset <= offset).checked_sub(1)?;
                let segment = segments[at];
                let inside = offset - segment.offset;
                owner.host(segment.addr + inside, len.min(segment.len.checked_sub(inside)?))
            }
        }
    }
}

/// After the data: sets the bits, and wakes the owner as it asked to be woken (`docs/device.md`, 9).
fn notify(home: &Home, target: &Target, header: &MoveHeader, counters: &Counters) -> Result<(), Status> {
    let mut ring = header.flags.contains(MoveFlags::RING);
    if header.flags.contains(MoveFlags::SIGNAL) {
        let wake = home.with_line(&target.owner, |line| {
            let wake = line.signal(header.mask);
            if wake == Some(Wake::Futex) {
                futex_wake(line.futex_word());
            }
            wake
        });
        let wake = wake.ok_or(Status::Reset)?;
        ring |= wake == Some(Wake::Signal);
        if matches!(home, Home::Ram { .. }) {
            // For a DMB in the pool the control line counts, which the daemon can read whenever it is asked.
            Counters::add(if wake.is_some() { &counters.rung } else { &counters.suppressed }, 1);
        }
    }
    if ring {
        let event = Event::Signal { index: target.index, token: target.token, gid: target.sender };
        // A signal merges with one that waits, so there is always room.
        let _ = target.owner.tell(event);
    }
    Ok(())
}

/// Wakes all waiters, in whatever process.
fn futex_wake(word: &std::sync::atomic::AtomicU32) {
    // SAFETY: FUTEX_WAKE takes an address and a number; the word is mapped. It does not read or write the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doorbell;
    use crate::engine::Engine;
    use crate::engine::cpu_node::NodePool;
    use crate::pool::memfile::MemFile;
    use crate::port::{RamSegment, SessionId};
    use crate::testing::{BASE, Guest, INDIRECT, NEXT, TestRing, WRITE, table};
    use dmbridge_proto::ids::{Gid, Token};

    const DMB_SIZE: u64 = 64 << 10;
    const DMB_AT: u64 = 8192;

    /// A sender, an owner, and a DMB of it in the pool and one in its RAM.
    struct World {
        sender: Guest,
        owner: Guest,
        file: Arc<MemFile>,
        owner_port: Arc<Port>,
        queue: MoveQueue,
        worker: Worker,
        ring: TestRing,
        pool_dmb: Arc<Target>,
        ram_dmb: Arc<Target>,
        /// Where the RAM DMB's control line and its two segments are.
        line: u64,
        segments: [u64; 2],
        header: u64,
        answer: u64,
        inbox: doorbell::Inbox,
    }

    const RAM_SPLIT: u64 = 24 << 10;

    impl World {
        fn new() -> World {
            World::with(MoverEngines::cpu_only())
        }

        fn with(engines: MoverEngines) -> World {
            let (doorbell, inbox) = doorbell::pair().unwrap();
            let (sender, owner) = (Guest::new(4 << 20), Guest::new(4 << 20));
            let sender_port = Arc::new(Port::new(SessionId(1), doorbell.clone(), None));
            let owner_port = Arc::new(Port::new(SessionId(2), doorbell, None));
            sender_port.memory.replace(sender.table());
            owner_port.memory.replace(owner.table());
            let file = Arc::new(MemFile::new(1 << 20, None, &Default::default()).unwrap());
            let home = Home::Pool { file: file.clone(), offset: DMB_AT, line_offset: 64 };
            let target = |number, home| {
                let gid = Gid::from_u64(1);
                let token = Token::in_ram(number);
                Arc::new(Target::new(token, number as u32, DMB_SIZE, gid, owner_port.clone(), home))
            };
            let pool_dmb = target(1, home);
            let line = owner.take(64);
            let segments = [owner.take(RAM_SPLIT), owner.take(DMB_SIZE - RAM_SPLIT)];
            let ram = [
                RamSegment { offset: 0, addr: segments[0], len: RAM_SPLIT },
                RamSegment { offset: RAM_SPLIT, addr: segments[1], len: DMB_SIZE - RAM_SPLIT },
            ];
            let ram_dmb = target(2, Home::Ram { line_addr: line, segments: ram.into() });
            sender_port.add_target(pool_dmb.clone());
            sender_port.add_target(ram_dmb.clone());
            let ring = TestRing::new(&sender, 64);
            let vring = ring.vring(&sender_port.memory.read());
            let shared = Shared {
                epoll: Epoll::new().unwrap(),
                word: EventFd::new(0).unwrap(),
                stop: AtomicBool::new(false),
                fresh: Mutex::default(),
                queues: Mutex::default(),
                next: AtomicU64::new(0),
            };
            World {
                header: sender.take(HEADER_SIZE as u64),
                answer: sender.take(RESPONSE_SIZE as u64),
                queue: MoveQueue {
                    port: sender_port,
                    max_segments: 8,
                    max_move_size: 1 << 20,
                    ring: Mutex::new(Some(vring)),
                    stopping: AtomicBool::new(false),
                },
                worker: Worker {
                    shared: Arc::new(shared),
                    engines,
                    runs: Vec::new(),
                    chains: std::array::from_fn(|_| Chain::default()),
                    answered: Vec::new(),
                    data: Vec::new(),
                    turns: VecDeque::new(),
                    waiting: HashSet::new(),
                    parked: Vec::new(),
                    look: None,
                },
                sender,
                owner,
                file,
                owner_port,
                ring,
                pool_dmb,
                ram_dmb,
                line,
                segments,
                inbox,
            }
        }

        /// Offers a move and does it: used length and status.
        fn raw(&mut self, header: &[u8], data: &[(u64, u32)]) -> (u32, u8) {
            self.sender.write(self.header, header);
            self.sender.write(self.answer, &[0xee; 8]);
            let mut readable = vec![(self.header, header.len() as u32)];
            readable.extend_from_slice(data);
            self.ring.offer_pieces(&self.sender, &readable, &[(self.answer, 8)]);
            self.turn()
        }

        fn turn(&mut self) -> (u32, u8) {
            self.worker.turn(&self.queue);
            let (_, len) = self.ring.used(&self.sender).expect("the chain is used");
            (len, self.sender.read(self.answer, 1)[0])
        }

        fn move_into(&mut self, header: MoveHeader, data: &[(u64, u32)]) -> Result<(), Status> {
            let (len, status) = self.raw(&header.to_bytes(), data);
            assert_eq!(len, 8);
            Status::from_byte(status).unwrap()
        }

        fn pool_bytes(&self) -> Vec<u8> {
            let start = self.file.at(DMB_AT, DMB_SIZE);
            // SAFETY: inside of the mapping, as `at` checks.
            (0..DMB_SIZE as usize).map(|i| unsafe { start.add(i).read_volatile() }).collect()
        }

        fn ram_bytes(&self) -> Vec<u8> {
            let mut bytes = self.owner.read(self.segments[0], RAM_SPLIT as usize);
            bytes.extend(self.owner.read(self.segments[1], (DMB_SIZE - RAM_SPLIT) as usize));
            bytes
        }

        fn signals(&self) -> usize {
            self.owner_port.events().take_waiting().len()
        }
    }

    fn to(target: &Target, offset: u64) -> MoveHeader {
        MoveHeader { token: target.token, offset, mask: 0, flags: MoveFlags::empty() }
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
    }

    #[test]
    fn scattered_data_lands_in_order_and_nowhere_else() {
        let mut world = World::new();
        let bytes = pattern(40_000);
        let data = world.sender.put(&bytes);
        let pieces = [(data, 1u32), (data + 1, 0), (data + 1, 12_345), (data + 12_346, 27_654)];
        for offset in [0, 1, 8, 4095, DMB_SIZE - 40_000] {
            for dmb in [world.pool_dmb.clone(), world.ram_dmb.clone()] {
                let before = [world.pool_bytes(), world.ram_bytes()];
                assert_eq!(world.move_into(to(&dmb, offset), &pieces), Ok(()));
                let mut want = before;
                let at = offset as usize;
                want[dmb.index as usize - 1][at..at + bytes.len()].copy_from_slice(&bytes);
                assert!(want == [world.pool_bytes(), world.ram_bytes()]);
            }
        }
        assert_eq!(Counters::get(&world.queue.port.counters.moves), 10);
        assert_eq!(Counters::get(&world.queue.port.counters.bytes), 400_000);
    }

    #[test]
    fn errors_come_in_the_order_of_the_specification_and_write_nothing() {
        let mut world = World::new();
        let data = world.sender.put(&[0xff; 4096]);
        let good = to(&world.pool_dmb.clone(), 0);
        let nobody = MoveHeader { token: Token::in_ram(77), offset: u64::MAX, ..good };
        let behind = MoveHeader { offset: DMB_SIZE - 8, ..good };
        let outside = (BASE + (4 << 20) - 8, 16u32);
        let mut flags = nobody.to_bytes();
        flags[24] = 4;
        let big = [(data, 1 << 20), (data, 1)];
        let many = [(data, 1); 9];
        type Pieces<'a> = &'a [(u64, u32)];
        let cases: [(&str, [u8; 32], Pieces<'_>, Status); 8] = [
            ("an unknown flag before everything", flags, &big, Status::Invalid),
            ("too much data before an unknown token", nobody.to_bytes(), &big, Status::TooBig),
            ("too many descriptors", nobody.to_bytes(), &many, Status::TooBig),
            ("an unknown token before its range", nobody.to_bytes(), &[outside], Status::NoEntry),
            ("a range before an address", behind.to_bytes(), &[outside], Status::Invalid),
            (
                "a range that wraps",
                MoveHeader { offset: u64::MAX, ..good }.to_bytes(),
                &[(data, 8)],
                Status::Invalid,
            ),
            ("an address", good.to_bytes(), &[(data, 8), outside], Status::Fault),
            ("an address beyond everything", good.to_bytes(), &[(u64::MAX - 3, 8)], Status::Fault),
        ];
        for (what, header, pieces, status) in cases {
            assert_eq!(world.raw(&header, pieces), (8, status as u8), "{what}");
        }
        assert!(world.pool_bytes().iter().all(|b| *b == 0));
        assert_eq!(Counters::get(&world.queue.port.counters.refused), 8);
    }

    #[test]
    fn malformed_moves_are_returned_with_length_zero() {
        let mut world = World::new();
        let good = to(&world.pool_dmb.clone(), 0).to_bytes();
        // The header shares a descriptor with data, is too short, or is not guest memory.
        assert_eq!(world.raw(&[good.as_slice(), b"data"].concat(), &[]).0, 0);
        assert_eq!(world.raw(&good[..31], &[]).0, 0);
        assert_eq!(world.raw(&good[..16], &[(world.header + 16, 17)]).0, 0);
        assert_eq!(world.raw(&good[..16], &[(0, 16)]).0, 0);
        let (header, answer) = (world.header, world.answer);
        for writable in [(answer, 7), (0, 8), (BASE + (4 << 20) - 4, 8)] {
            world.sender.write(header, &good);
            world.ring.offer_pieces(&world.sender, &[(header, 32)], &[writable]);
            assert_eq!(world.turn().0, 0);
        }
        world.ring.describe(&world.sender, &[(answer, 8, WRITE | NEXT, 1), (header, 32, 0, 0)]);
        world.ring.offer(&world.sender, 0);
        assert_eq!(world.turn().0, 0);
        // A header in pieces is good.
        world.sender.write(header, &good);
        let pieces = [(header, 5), (header + 5, 0), (header + 5, 27)];
        world.ring.offer_pieces(&world.sender, &pieces, &[(answer, 8)]);
        assert_eq!(world.turn(), (8, 0));
    }

    #[test]
    fn a_signal_sets_bits_and_tells_only_who_asked() {
        let mut world = World::new();
        for dmb in [world.pool_dmb.clone(), world.ram_dmb.clone()] {
            let signal = MoveHeader { mask: 0x80, flags: MoveFlags::SIGNAL, ..to(&dmb, 0) };
            assert_eq!(world.move_into(signal, &[]), Ok(()));
            assert_eq!(world.signals(), 0);
            let home = dmb.open();
            let line = |act: &dyn Fn(&dmbridge_proto::line::ControlLine) -> u64| {
                home.as_ref().unwrap().with_line(&world.owner_port, act).unwrap()
            };
            assert_eq!(line(&|line| line.take_pending()), 0x80);
            line(&|line| {
                line.arm(Wake::Signal);
                0
            });
            drop(home);
            assert_eq!(world.move_into(signal, &[]), Ok(()));
            assert_eq!(world.move_into(signal, &[]), Ok(()));
            assert_eq!(world.signals(), 1);
            // A ring tells in any case, and does not look at the line.
            let ring = MoveHeader { flags: MoveFlags::RING, ..to(&dmb, 0) };
            assert_eq!(world.move_into(ring, &[]), Ok(()));
            assert_eq!(world.signals(), 1);
        }
        let counters = &world.queue.port.counters;
        assert_eq!((Counters::get(&counters.rung), Counters::get(&counters.suppressed)), (1, 2));
        let stats = world.file.line(64).stats();
        assert_eq!((stats.rung, stats.suppressed), (1, 2));
        assert_eq!(world.owner.read(world.line, 4), [0; 4]);
    }

    #[test]
    fn a_closed_dmb_is_not_there() {
        let mut world = World::new();
        let data = world.sender.put(&[0xff; 64]);
        let dmb = world.pool_dmb.clone();
        dmb.close();
        assert_eq!(world.move_into(to(&dmb, 0), &[(data, 64)]), Err(Status::NoEntry));
        assert!(world.pool_bytes().iter().all(|b| *b == 0));
    }

    /// An engine that copies when it likes to, in pieces and in an order of its own.
    struct Late {
        runs: std::sync::mpsc::Sender<Run>,
        left: Arc<AtomicU64>,
    }

    impl Late {
        fn new() -> Late {
            let (runs, given) = std::sync::mpsc::channel::<Run>();
            let left = Arc::new(AtomicU64::new(0));
            let done = left.clone();
            std::thread::spawn(move || {
                for Run { src, dst, len } in given {
                    let mut pieces: Vec<usize> = (0..len).step_by(512).collect();
                    // From both ends to the middle, so the last byte is an early one.
                    pieces.sort_by_key(|at| at.abs_diff(len / 2));
                    for at in pieces.into_iter().rev() {
                        if at % 7 == 0 {
                            std::thread::yield_now();
                        }
                        let len = 512.min(len - at);
                        // SAFETY: the run is there until it is counted as done.
                        unsafe {
                            dmbridge_proto::shm::copy_to_shared(
                                dmbridge_proto::shm::CopyMethod::NonTemporal,
                                src.wrapping_add(at),
                                dst.wrapping_add(at),
                                len,
                            );
                        }
                    }
                    done.fetch_sub(1, Ordering::Release);
                }
            });
            Late { runs, left }
        }
    }

    impl Engine for Late {
        unsafe fn submit(&mut self, runs: &[Run]) {
            self.left.fetch_add(runs.len() as u64, Ordering::Relaxed);
            runs.iter().for_each(|run| self.runs.send(*run).unwrap());
        }

        fn poll(&mut self) -> bool {
            self.left.load(Ordering::Acquire) == 0
        }
    }

    /// Every engine, one that is late, and an accelerator at which things go wrong.
    fn all_engines() -> Vec<(&'static str, MoverEngines)> {
        let host = crate::topology::Topology::of_host();
        let node = &host.nodes()[0];
        // The threads of a pool end with it, and jobs are then done by who asks: so it stays.
        let pool = Box::leak(Box::new(NodePool::start(node.id, &node.cpus, 2).unwrap()));
        vec![
            ("cpu", MoverEngines::cpu_only()),
            ("cpu-node", MoverEngines::only(Box::new(pool.engine()))),
            ("dsa", MoverEngines::only(crate::engine::dsa::tests::faulty())),
            ("late", MoverEngines::only(Box::new(Late::new()))),
        ]
    }

    /// A word of the DMB that somebody else writes.
    fn word(file: &MemFile, offset: u64) -> &AtomicU64 {
        // SAFETY: inside of the mapping, aligned, and mapped as long as the file.
        unsafe { AtomicU64::from_ptr(file.at(DMB_AT + offset, 8).cast()) }
    }

    #[test]
    fn whatever_copies_a_signal_and_a_later_move_are_seen_after_the_last_byte() {
        for (name, engines) in all_engines() {
            let mut world = World::with(engines);
            let file = world.file.clone();
            let last = DMB_SIZE - 8;
            let reader = std::thread::spawn(move || {
                let mut signalled = 0;
                while signalled != u64::MAX {
                    // The mask is the round; the cursor is a move of its own.
                    signalled = signalled.max(file.line(64).take_pending());
                    let cursor = word(&file, last).load(Ordering::Acquire);
                    let least = (0..last).step_by(8).map(|at| word(&file, at).load(Ordering::Relaxed)).min();
                    assert!(least >= Some(cursor), "{name}: {least:?} was seen after {cursor} by the cursor");
                    assert!(
                        signalled == u64::MAX || least >= Some(signalled),
                        "{name}: {least:?} was seen after {signalled} by the signal"
                    );
                }
            });
            let (data, cursor) = (world.sender.take(DMB_SIZE), world.sender.take(8));
            let dmb = world.pool_dmb.clone();
            // Rounds grow bit by bit, because masks are ORed.
            for round in (1..60).map(|bits| (1u64 << bits) - 1) {
                world.sender.write(data, &round.to_le_bytes().repeat(last as usize / 8));
                let signal = MoveHeader { mask: round, flags: MoveFlags::SIGNAL, ..to(&dmb, 0) };
                // In two pieces, of which one is not aligned.
                let cut = (last as u32 / 3) | 1;
                let pieces = [(data, cut), (data + u64::from(cut), last as u32 - cut)];
                assert_eq!(world.move_into(signal, &pieces), Ok(()), "{name}");
                world.sender.write(cursor, &round.to_le_bytes());
                assert_eq!(world.move_into(to(&dmb, last), &[(cursor, 8)]), Ok(()), "{name}");
            }
            let _ = world.file.line(64).signal(u64::MAX);
            reader.join().unwrap();
        }
    }

    #[test]
    fn when_a_memory_table_has_changed_no_engine_writes_into_the_old_memory() {
        for (name, engines) in all_engines() {
            let mut world = World::with(engines);
            let (owner, ram) = (world.owner.file.try_clone().unwrap(), world.segments[1] - BASE);
            let port = world.owner_port.clone();
            let mover = std::thread::spawn(move || {
                let data = world.sender.take(DMB_SIZE);
                for round in 1u64.. {
                    world.sender.write(data, &round.to_le_bytes().repeat(DMB_SIZE as usize / 8));
                    let dmb = world.ram_dmb.clone();
                    if let Err(status) = world.move_into(to(&dmb, 0), &[(data, DMB_SIZE as u32)]) {
                        return status;
                    }
                }
                unreachable!("the memory was taken away")
            });
            let read = |len: usize| {
                let mut bytes = vec![0; len];
                std::os::unix::fs::FileExt::read_exact_at(&owner, &mut bytes, ram).unwrap();
                bytes
            };
            while read(8) == [0; 8] {
                std::thread::yield_now();
            }
            port.memory.replace(DeviceMemory::default());
            let then = read((DMB_SIZE - RAM_SPLIT) as usize);
            assert_eq!(mover.join().unwrap(), Status::Reset, "{name}");
            assert!(then == read((DMB_SIZE - RAM_SPLIT) as usize), "{name}");
        }
    }

    #[test]
    fn nothing_is_written_to_a_dmb_after_it_was_closed() {
        for (name, engines) in (0..5).flat_map(|_| all_engines()) {
            let mut world = World::with(engines);
            let dmb = world.pool_dmb.clone();
            let file = world.file.clone();
            let snapshot = || {
                let start = file.at(DMB_AT, DMB_SIZE).cast::<u64>();
                // SAFETY: inside of the mapping, as `at` checks; a mover may write it meanwhile.
                (0..DMB_SIZE as usize / 8)
                    .map(|i| unsafe { start.add(i).read_volatile() })
                    .collect::<Vec<_>>()
            };
            let mover = std::thread::spawn(move || {
                let data = world.sender.take(DMB_SIZE);
                let header = to(&world.pool_dmb.clone(), 0);
                for round in 1u64.. {
                    world.sender.write(data, &round.to_le_bytes().repeat(DMB_SIZE as usize / 8));
                    match world.move_into(header, &[(data, DMB_SIZE as u32)]) {
                        Ok(()) => {}
                        Err(status) => return status,
                    }
                }
                unreachable!("the DMB was closed")
            });
            while snapshot()[0] == 0 {
                std::thread::yield_now();
            }
            dmb.close();
            let then = snapshot();
            assert_eq!(mover.join().unwrap(), Status::NoEntry, "{name}");
            assert!(then == snapshot(), "{name}");
        }
    }

    #[test]
    fn moves_that_were_looked_at_and_have_to_wait_stay_in_the_ring_and_all_are_answered_in_order() {
        const MOVES: u64 = 40;
        const WAITS: u64 = 20;
        const MALFORMED: u64 = 5;
        let mut world = World::new();
        let (pool, ram) = (world.pool_dmb.clone(), world.ram_dmb.clone());
        let mut answers = Vec::new();
        let chains: Vec<_> = (0..MOVES)
            .map(|number| {
                let target = if number == WAITS { &ram } else { &pool };
                let header = world.sender.put(&to(target, 0).to_bytes());
                let data = world.sender.put(&number.to_le_bytes());
                let answer = world.sender.put(&[0xee; 8]);
                answers.push(answer);
                let header_len = if number == MALFORMED { 31 } else { 32 };
                let pieces = [(header, header_len, NEXT, 1), (data, 8, NEXT, 2), (answer, 8, WRITE, 0)];
                (world.sender.put(&table(&pieces)), 48, INDIRECT, 0)
            })
            .collect();
        world.ring.describe(&world.sender, &chains);
        (0..MOVES as u16).for_each(|head| world.ring.offer(&world.sender, head));
        let cursor = |world: &World| word(&world.file, 0).load(Ordering::Relaxed);
        let base = |world: &World| world.queue.ring().as_ref().unwrap().base();

        world.owner_port.set_paused(true);
        assert!(matches!(world.worker.turn(&world.queue), Turn::Later));
        assert_eq!((cursor(&world), base(&world)), (WAITS - 1, WAITS as u16));
        let mut used: Vec<_> = std::iter::from_fn(|| world.ring.used(&world.sender)).collect();
        assert_eq!(used.len() as u64, WAITS);
        world.owner_port.set_paused(false);
        assert!(matches!(world.worker.turn(&world.queue), Turn::Idle));
        assert_eq!((cursor(&world), base(&world)), (MOVES - 1, MOVES as u16));
        used.extend(std::iter::from_fn(|| world.ring.used(&world.sender)));
        for (number, (used, answer)) in used.iter().zip(&answers).enumerate() {
            let (len, status) = if number as u64 == MALFORMED { (0, 0xee) } else { (8, 0) };
            assert_eq!((used.0, used.1, world.sender.read(*answer, 1)[0]), (number as u32, len, status));
        }
        assert_eq!(used.len() as u64, MOVES);
        assert_eq!(Counters::get(&world.queue.port.counters.moves), MOVES - 1);
    }

    /// An engine that has done with a long run only when so many chains are used.
    struct Patient {
        memory: std::fs::File,
        used: u64,
        want: u16,
        long: bool,
    }

    impl Engine for Patient {
        unsafe fn submit(&mut self, runs: &[Run]) {
            self.long = runs.iter().any(|run| run.len as u64 >= PROMPTLY);
        }

        fn poll(&mut self) -> bool {
            let mut index = [0; 2];
            std::os::unix::fs::FileExt::read_exact_at(&self.memory, &mut index, self.used).unwrap();
            !self.long || u16::from_le_bytes(index) >= self.want
        }
    }

    #[test]
    fn short_moves_are_answered_before_a_long_one_is_begun() {
        let mut world = World::new();
        let used = world.ring.layout.used + 2 - BASE;
        let memory = world.sender.file.try_clone().unwrap();
        world.worker.engines = MoverEngines::only(Box::new(Patient { memory, used, want: 3, long: false }));
        let data = world.sender.take(PROMPTLY);
        let chains: Vec<_> = [8, 8, 8, PROMPTLY as u32, 8]
            .into_iter()
            .map(|len| {
                let header = world.sender.put(&to(&world.pool_dmb, 0).to_bytes());
                let answer = world.sender.put(&[0xee; 8]);
                let pieces = [(header, 32, NEXT, 1), (data, len, NEXT, 2), (answer, 8, WRITE, 0)];
                (world.sender.put(&table(&pieces)), 48, INDIRECT, 0)
            })
            .collect();
        world.ring.describe(&world.sender, &chains);
        (0..chains.len() as u16).for_each(|head| world.ring.offer(&world.sender, head));
        // Else it would wait for ever.
        assert!(matches!(world.worker.turn(&world.queue), Turn::Idle));
        assert_eq!(std::iter::from_fn(|| world.ring.used(&world.sender)).count(), chains.len());
    }

    #[test]
    fn a_ring_that_claims_too_much_is_stopped() {
        let mut world = World::new();
        world.ring.claim(&world.sender, 65);
        world.worker.turn(&world.queue);
        assert!(world.queue.ring().is_none());
    }

    #[test]
    fn memory_that_vanishes_expels_its_own_device_and_no_other() {
        for ((name, source), (_, owner)) in all_engines().into_iter().zip(all_engines()) {
            let mut world = World::with(source);
            let data = world.sender.take(2 << 20);
            world.sender.file.set_len(data - BASE).unwrap();
            let dmb = world.pool_dmb.clone();
            assert_eq!(world.move_into(to(&dmb, 0), &[(data, 16 << 10)]), Ok(()), "{name}");
            assert!(world.pool_bytes().iter().all(|b| *b == 0), "{name}");
            let mut expelled = Vec::new();
            while let Some(doorbell::Message::Expel(id, _)) = world.inbox.take() {
                expelled.push(id);
            }
            assert_eq!(expelled, [SessionId(1)], "{name}");

            let mut world = World::with(owner);
            let data = world.sender.put(&[0xff; 16 << 10]);
            world.owner.file.set_len(4096).unwrap();
            let dmb = world.ram_dmb.clone();
            assert_eq!(world.move_into(to(&dmb, 0), &[(data, 16 << 10)]), Ok(()), "{name}");
            let Some(doorbell::Message::Expel(id, _)) = world.inbox.take() else {
                panic!("{name}: nobody is expelled")
            };
            assert_eq!(id, SessionId(2), "{name}");
        }
    }

    #[test]
    fn a_memory_table_that_changes_ends_moves_into_what_it_held() {
        let mut world = World::new();
        let data = world.sender.put(&[0xff; 4096]);
        let dmb = world.ram_dmb.clone();
        world.owner_port.memory.replace(DeviceMemory::default());
        assert_eq!(world.move_into(to(&dmb, 0), &[(data, 4096)]), Err(Status::Reset));
    }
}
