//! Move queues and the threads that serve them (`docs/device.md`, 10).
//!
//! A queue belongs to one mover. The mover holds the queue's ring while it does one move; a copy goes in steps, and
//! holds what it reads and writes only for a step. So whoever ends a queue, a DMB or a memory table waits for one step.

use crate::engine::cpu::CpuEngine;
use crate::engine::set::{Choice, MoverEngines};
use crate::engine::{self, Run};
use crate::keep::book::Cell;
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
    /// Where what was done is noted before it is answered.
    progress: Option<Progress>,
    /// Answers to the moves that come first: another worker has done them.
    done: Mutex<VecDeque<u8>>,
}

/// Which moves of a queue were done, in a cell that outlives the worker: a move must not be done again once a later one was. In the
/// word: the available index after the last one, and that there is one; in the bytes the answers to the last of them, by index.
#[derive(Debug)]
pub struct Progress(Cell);

impl Progress {
    const SOME: u64 = 1 << 16;
    /// The answer to a malformed chain.
    const MALFORMED: u8 = u8::MAX;

    /// In this cell.
    pub fn new(cell: Cell) -> Progress {
        Progress(cell)
    }

    /// The move with this index was done.
    fn note(&self, index: u16, answer: u8) {
        self.0.byte(usize::from(index) % AHEAD).store(answer, Ordering::Relaxed);
        self.0.word().store(u64::from(index.wrapping_add(1)) | Progress::SOME, Ordering::Release);
    }

    /// The answers that belong into the used ring from this index on, as far as they are known.
    pub fn answers(&self, used: u16) -> VecDeque<u8> {
        let word = self.0.word().load(Ordering::Acquire);
        let count = usize::from((word as u16).wrapping_sub(used));
        if word & Progress::SOME == 0 || count > AHEAD {
            return VecDeque::new();
        }
        (0..count).map(|at| self.0.byte((usize::from(used) + at) % AHEAD).load(Ordering::Relaxed)).collect()
    }

    /// The ring begins anew.
    pub fn forget(&self) {
        self.0.word().store(0, Ordering::Release);
    }
}

impl MoveQueue {
    fn ring(&self) -> MutexGuard<'_, Option<Vring>> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_done(&self) -> Option<u8> {
        // Without a keeper there never is one.
        self.progress.as_ref()?;
        self.done.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
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
    /// `progress` is where the next worker finds what was done; `done` is what this one found there.
    pub fn serve(
        &self,
        port: Arc<Port>,
        limits: &Limits,
        ring: Vring,
        kick: RawFd,
        progress: Option<Progress>,
        done: VecDeque<u8>,
    ) -> io::Result<Served> {
        let queue = Arc::new(MoveQueue {
            port,
            max_segments: limits.max_segments as usize,
            max_move_size: limits.max_move_size,
            ring: Mutex::new(Some(ring)),
            stopping: AtomicBool::new(false),
            progress,
            done: Mutex::new(done),
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
}

impl Outcome {
    fn to_byte(&self) -> u8 {
        match self {
            Outcome::Malformed => Progress::MALFORMED,
            Outcome::Done(result) => Status::to_byte(result),
        }
    }

    fn from_byte(byte: u8) -> Outcome {
        Status::from_byte(byte).map_or(Outcome::Malformed, Outcome::Done)
    }
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
            let outcome = match queue.take_done() {
                Some(answer) => Some(Outcome::from_byte(answer)),
                None => self.answer(queue, waiting.start, &mut bytes),
            };
            let Some(outcome) = outcome else { break Turn::Later };
            if let Some(progress) = &queue.progress {
                progress.note(ring.base().wrapping_sub(waiting.len() as u16), outcome.to_byte());
            }
            self.answered.push((waiting.start, outcome));
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
                Outcome::Malformed => 0,
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

    /// Does the move in one of `chains`. `None`: it has to wait until its target's owner goes on.
    fn answer(&mut self, queue: &MoveQueue, number: usize, bytes: &mut u64) -> Option<Outcome> {
        let chain = &self.chains[number];
        let mut header = [0; HEADER_SIZE];
        {
            let memory = queue.port.memory.read();
            if chain.malformed
                || !chain.takes_response(&memory, RESPONSE_SIZE)
                || take_header(&memory, &chain.readable, &mut header, &mut self.data).is_none()
            {
                return Some(Outcome::Malformed);
            }
        }
        match MoveHeader::parse(&header).and_then(|header| self.execute(queue, &header, bytes)) {
            Ok(true) => Some(Outcome::Done(Ok(()))),
            Ok(false) => None,
            Err(status) => Some(Outcome::Done(Err(status))),
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

/// Wakes the owner of a DMB if somebody may have had to and did not: who wakes takes the wish to be woken first.
pub fn wake_again(target: &Target) {
    let lost = match &*target.open() {
        // What lies in a paused device's memory is left alone.
        Some(home) if target.is_paused(home) => Some(true),
        Some(home) => home.with_line(&target.owner, |line| {
            let lost = !line.is_armed();
            if lost {
                futex_wake(line.futex_word());
            }
            lost
        }),
        None => None,
    };
    if lost == Some(true) {
        let _ =
            target.owner.tell(Event::Signal { index: target.index, token: target.token, gid: target.sender });
    }
}

/// Wakes all waiters, in whatever process.
fn futex_wake(word: &std::sync::atomic::AtomicU32) {
    // SAFETY: FUTEX_WAKE takes an address and a number; the word is mapped. It does not read or write the word.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

#[cfg(test)]
mod tests;
