//! Workers of a NUMA node copy: large moves in shares, near the memory, while the mover that asked copies a share as well
//! (if it runs on that node) or waits.
//!
//! Workers are pinned to the CPUs of their node, take chunks of one another only within it, and sleep while there is
//! nothing to do. A chunk's memory is touched by who claimed the chunk, and the job is done when all chunks are: a worker
//! that comes late finds nothing to claim, and touches nothing.

use super::ranges::Ranges;
use super::{Engine, Run};
use crate::copy_plan;
use crate::topology::NodeId;
use dmbridge_proto::shm::{CopyMethod, copy_to_shared};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

/// The most bytes that are claimed at once: some microseconds of copying, so that all finish at about the same time.
const CHUNK: usize = 32 << 10;
/// Chunks start at multiples of this in the destination, so that no two share a cache line.
const LINE: usize = 64;
/// How long who waits for workers looks before it sleeps.
const SPIN: Duration = Duration::from_micros(100);

/// A node's workers.
#[derive(Debug)]
pub struct NodePool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    node: NodeId,
    cpus: Vec<u32>,
    workers: usize,
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Arc<Job>>,
    stop: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this thread runs on the node now. A thread is moved at any time; then a share is copied from afar.
    fn is_here(&self) -> bool {
        sched_getcpu().is_ok_and(|cpu| self.cpus.binary_search(&(cpu as u32)).is_ok())
    }
}

impl NodePool {
    /// Starts `workers` threads on these CPUs (in ascending order) of a node.
    pub fn start(node: NodeId, cpus: &[u32], workers: usize) -> io::Result<NodePool> {
        let shared = Arc::new(Shared {
            node,
            cpus: cpus.to_vec(),
            workers,
            state: Mutex::default(),
            wake: Condvar::new(),
        });
        let mut pool = NodePool { shared, threads: Vec::with_capacity(workers) };
        for seat in 0..workers {
            let shared = pool.shared.clone();
            let builder = std::thread::Builder::new().name(format!("dmb-copy-{node}.{seat}"));
            pool.threads.push(builder.spawn(move || work(&shared, seat))?);
        }
        Ok(pool)
    }

    /// The node.
    pub fn node(&self) -> NodeId {
        self.shared.node
    }

    /// Number of its workers.
    pub fn workers(&self) -> usize {
        self.shared.workers
    }

    /// A mover's way to them.
    pub fn engine(&self) -> NodeEngine {
        NodeEngine { shared: self.shared.clone(), job: None, takes_part: false }
    }
}

impl Drop for NodePool {
    fn drop(&mut self) {
        self.shared.state().stop = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A worker's life. Jobs that are left when it ends are their callers' to finish.
fn work(shared: &Shared, seat: usize) {
    let mut set = CpuSet::new();
    shared.cpus.iter().for_each(|cpu| {
        let _ = set.set(*cpu as usize);
    });
    if let Err(error) = sched_setaffinity(Pid::from_raw(0), &set) {
        tracing::warn!("a worker cannot be kept on node {}: {error}", shared.node);
    }
    let mut state = shared.state();
    while !state.stop {
        state.jobs.retain(|job| !job.ranges.is_empty());
        match state.jobs.front().cloned() {
            Some(job) => {
                drop(state);
                while job.step(seat) {}
                // Before the lock: the last one to hold a job frees it.
                drop(job);
                state = shared.state();
            }
            None => state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

/// A piece of a run.
#[derive(Debug)]
struct Chunk {
    run: Run,
    /// By the length of the whole run.
    method: CopyMethod,
}

/// What was submitted at once.
#[derive(Debug)]
struct Job {
    chunks: Box<[Chunk]>,
    ranges: Ranges,
    /// Chunks that are not copied.
    left: AtomicUsize,
    caller: Thread,
}

impl Job {
    /// Copies one chunk; false if there is none to claim.
    fn step(&self, seat: usize) -> bool {
        let Some(claimed) = self.ranges.claim(seat) else { return false };
        let Chunk { run, method } = &self.chunks[claimed as usize];
        // SAFETY: the chunk was claimed and is not counted as copied, so the job is not done, and its memory is there by
        // the promise of who submitted it.
        unsafe { copy_to_shared(*method, run.src, run.dst, run.len) };
        // After this the memory may be gone.
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.caller.unpark();
        }
        true
    }

    fn is_done(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }
}

/// Cuts runs into chunks.
fn chunks(runs: &[Run]) -> Box<[Chunk]> {
    let mut chunks =
        Vec::with_capacity(runs.len() + runs.iter().map(|run| run.len / CHUNK + 1).sum::<usize>());
    for run in runs {
        let method = copy_plan::method(run.len);
        let mut at = 0;
        while at < run.len {
            // The first one ends where a line does.
            let aligned = CHUNK - run.dst.wrapping_add(at).addr() % LINE;
            let len = aligned.min(run.len - at);
            let run = Run { src: run.src.wrapping_add(at), dst: run.dst.wrapping_add(at), len };
            chunks.push(Chunk { run, method });
            at += len;
        }
    }
    chunks.into()
}

/// A mover's way to the workers of a node.
#[derive(Debug)]
pub struct NodeEngine {
    shared: Arc<Shared>,
    job: Option<Arc<Job>>,
    takes_part: bool,
}

impl NodeEngine {
    fn seat(&self) -> usize {
        self.shared.workers
    }
}

impl Engine for NodeEngine {
    unsafe fn submit(&mut self, runs: &[Run]) {
        self.finish();
        let chunks = chunks(runs);
        if chunks.is_empty() {
            return;
        }
        self.takes_part = self.shared.is_here();
        let mut parts = vec![true; self.shared.workers];
        parts.push(self.takes_part);
        let job = Arc::new(Job {
            ranges: Ranges::new(chunks.len() as u32, &parts),
            left: AtomicUsize::new(chunks.len()),
            chunks,
            caller: std::thread::current(),
        });
        self.job = Some(job.clone());
        let mut state = self.shared.state();
        if state.stop {
            self.takes_part = true;
        } else {
            state.jobs.push_back(job);
            drop(state);
            self.shared.wake.notify_all();
        }
    }

    fn poll(&mut self) -> bool {
        let Some(job) = &self.job else { return true };
        if self.takes_part {
            job.step(self.seat());
        }
        if !job.is_done() {
            return false;
        }
        // What the workers stored is what this thread shows by its next store.
        fence(Ordering::Release);
        self.job = None;
        true
    }

    fn finish(&mut self) {
        let mut since = None;
        while !self.poll() {
            let Some(job) = &self.job else { return };
            if self.takes_part && !job.ranges.is_empty() {
                continue;
            }
            if since.get_or_insert_with(Instant::now).elapsed() < SPIN {
                std::hint::spin_loop();
            } else if self.shared.state().stop {
                // Nobody else is left to do it.
                self.takes_part = true;
            } else {
                // Whoever copies the last chunk wakes this thread.
                std::thread::park_timeout(Duration::from_millis(10));
            }
        }
    }
}

impl Drop for NodeEngine {
    fn drop(&mut self) {
        // The memory is the caller's promise only so long.
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64};

    fn pool(workers: usize) -> NodePool {
        let topology = crate::topology::Topology::of_host();
        let node = &topology.nodes()[0];
        NodePool::start(node.id, &node.cpus, workers).unwrap()
    }

    fn pattern(len: usize, seed: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 4096 + seed) as u8).collect()
    }

    #[test]
    fn every_byte_is_copied_once_done_is_said_and_none_beside() {
        for workers in [1, 3] {
            let pool = pool(workers);
            let mut engine = pool.engine();
            for (round, len) in [1, 7, 4096, CHUNK, CHUNK + 1, 300_001, 1 << 20].into_iter().enumerate() {
                for takes_part in [true, false] {
                    let source = pattern(len, round);
                    let mut target = vec![0xaau8; len + 64];
                    let (half, to) = (len / 2, target.as_mut_ptr().wrapping_add(3));
                    let run =
                        |at: usize, len| Run { src: source[at..].as_ptr(), dst: to.wrapping_add(at), len };
                    // SAFETY: both buffers live until the engine is done.
                    unsafe { engine.submit(&[run(0, half), run(half, len - half)]) };
                    engine.takes_part = takes_part;
                    engine.finish();
                    assert_eq!(target[3..3 + len], source[..]);
                    assert!(target[..3].iter().chain(&target[3 + len..]).all(|byte| *byte == 0xaa));
                }
            }
        }
    }

    #[test]
    fn nothing_is_submitted_and_nothing_waited_for() {
        let pool = pool(1);
        let mut engine = pool.engine();
        // SAFETY: there is no run.
        unsafe { engine.submit(&[]) };
        assert!(engine.poll());
    }

    #[test]
    fn what_is_done_is_seen_by_who_sees_a_later_release_store() {
        const LEN: usize = 256 << 10;
        let pool = pool(2);
        let target: Arc<Vec<AtomicU64>> = Arc::new((0..LEN / 8).map(|_| AtomicU64::new(0)).collect());
        let shown = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let reader = std::thread::spawn({
            let (target, shown, stop) = (target.clone(), shown.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    let round = shown.load(Ordering::Acquire);
                    let least = target.iter().map(|word| word.load(Ordering::Relaxed)).min();
                    assert!(least >= Some(round), "{least:?} was seen after {round}");
                }
            }
        });
        let mut engine = pool.engine();
        for round in 1..200u64 {
            let source = vec![round; LEN / 8];
            let run = Run { src: source.as_ptr().cast(), dst: target.as_ptr().cast_mut().cast(), len: LEN };
            // SAFETY: both live until the engine is done; the reader accesses words atomically.
            unsafe { engine.submit(&[run]) };
            engine.finish();
            shown.store(round, Ordering::Release);
        }
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    }

    #[test]
    fn several_movers_share_the_workers() {
        let pool = pool(2);
        std::thread::scope(|scope| {
            for mover in 0..3 {
                let mut engine = pool.engine();
                scope.spawn(move || {
                    for round in 0..50 {
                        let source = pattern(200_000, mover * 100 + round);
                        let mut target = vec![0; source.len()];
                        let run = Run { src: source.as_ptr(), dst: target.as_mut_ptr(), len: source.len() };
                        // SAFETY: both live until the engine is done.
                        unsafe { engine.submit(&[run]) };
                        engine.finish();
                        assert!(target == source);
                    }
                });
            }
        });
    }

    #[test]
    fn a_pool_that_ends_first_leaves_nobody_waiting() {
        let pool = pool(1);
        let mut engine = pool.engine();
        let source = pattern(1 << 20, 1);
        let mut target = vec![0; source.len()];
        let run = Run { src: source.as_ptr(), dst: target.as_mut_ptr(), len: source.len() };
        // SAFETY: both live until the engine is done.
        unsafe { engine.submit(&[run]) };
        drop(pool);
        engine.takes_part = false;
        engine.finish();
        assert!(target == source);
    }
}
