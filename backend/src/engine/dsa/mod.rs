//! Intel's Data Streaming Accelerator copies, through work queues that the host's administrator gave to user space (the
//! kernel's `idxd` driver; set-up in `docs/numa.md`).
//!
//! The accelerator uses this process's addresses. It does not wait for pages that are not there, but stops: then the CPU
//! does the rest, which also lets memory that vanished be noticed. The CPU does everything else that the accelerator does
//! not do as well: what is short, what would tear a word of the destination (the parts of cache lines at both ends, and what
//! lies at another offset in its words at the source: where a page of it ends and the next one is missing, half a word is
//! done), what the queue has no room for, and whatever ended in an error. So a copy never fails, and whoever asks never sees a
//! difference.

pub mod descriptor;
pub mod host;
pub mod queue;
#[cfg(test)]
mod software;
#[cfg(test)]
pub(crate) mod tests;

use super::cpu::CpuEngine;
use super::{Engine, Run};
use descriptor::{Descriptor, Record, Status};
use queue::{NotTaken, WorkQueue};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

/// Runs below this size, in bytes, are the CPU's: a descriptor and its completion cost about as much.
const SHORT: usize = 4096;
/// The accelerator writes whole cache lines.
const LINE: usize = 64;
/// What is never torn.
const WORD: usize = 8;
/// How often a full queue is asked again before the CPU copies.
const TRIES: usize = 256;
/// A queue that has not done its work after this long is given up. It moves a gigabyte in that time.
const PATIENCE: Duration = Duration::from_secs(1);
/// Polls between two looks at the clock.
const POLLS: u32 = 4096;

/// What happened to descriptors of a queue; for people.
#[derive(Debug, Default)]
pub struct Counters {
    /// Descriptors that met a page that was not there.
    pub faults: AtomicU64,
    /// Descriptors that ended in an error.
    pub errors: AtomicU64,
    /// Descriptors for which the queue had no room.
    pub busy: AtomicU64,
    /// Whether the queue was given up: 0 or 1.
    pub lost: AtomicU64,
}

/// A queue, and what happened there.
#[derive(Debug, Clone)]
pub struct Accelerator {
    /// The queue.
    pub queue: Arc<dyn WorkQueue>,
    /// What happened.
    pub counters: Arc<Counters>,
}

impl Accelerator {
    /// Of this queue.
    pub fn new(queue: Arc<dyn WorkQueue>) -> Accelerator {
        Accelerator { queue, counters: Arc::default() }
    }

    /// A mover's way to it.
    pub fn engine(&self, cpu: CpuEngine) -> DsaEngine {
        DsaEngine {
            accelerator: self.clone(),
            cpu,
            pieces: Vec::new(),
            descriptors: Vec::new(),
            records: Vec::new(),
            groups: Vec::new(),
            since: None,
            polls: 0,
        }
    }
}

/// Pieces that were submitted at once, and are completed at once.
#[derive(Debug, Clone)]
struct Group {
    pieces: Range<usize>,
    /// Its own completion record; a single piece has but that.
    record: usize,
    done: bool,
}

/// A mover's way to an accelerator.
#[derive(Debug)]
pub struct DsaEngine {
    accelerator: Accelerator,
    cpu: CpuEngine,
    /// What the accelerator was given. These four change only while nothing is under way.
    pieces: Vec<Run>,
    descriptors: Vec<Descriptor>,
    /// One of each piece, then one of each group.
    records: Vec<Record>,
    groups: Vec<Group>,
    since: Option<Instant>,
    polls: u32,
}

// SAFETY: the addresses in it are those of runs, whose memory is there as the caller promised, and belongs to no thread.
unsafe impl Send for DsaEngine {}

impl DsaEngine {
    fn is_lost(&self) -> bool {
        self.accelerator.counters.lost.load(Ordering::Relaxed) != 0
    }

    /// The part of a run that the accelerator is for, in pieces; the rest is copied.
    ///
    /// # Safety
    ///
    /// As for [`Engine::submit`].
    unsafe fn take(&mut self, run: &Run) {
        let head = run.dst.align_offset(LINE).min(run.len);
        let body = (run.len - head) / LINE * LINE;
        let words_apart = !run.src.addr().wrapping_sub(run.dst.addr()).is_multiple_of(WORD);
        let (head, body) =
            if body < SHORT || words_apart || self.is_lost() { (run.len, 0) } else { (head, body) };
        // SAFETY: the caller's promise; the parts lie in the run.
        unsafe {
            self.copy(part(run, 0..head));
            self.copy(part(run, head + body..run.len));
        }
        let most = (self.accelerator.queue.limits().max_transfer as usize / LINE * LINE).max(LINE);
        for start in (0..body).step_by(most) {
            let end = (start + most).min(body);
            self.pieces.push(part(run, head + start..head + end));
        }
    }

    /// # Safety
    ///
    /// As for [`Engine::submit`].
    unsafe fn copy(&self, run: Run) {
        if run.len != 0 {
            // SAFETY: the caller's promise.
            unsafe { self.cpu.copy(run.src, run.dst, run.len) };
        }
    }

    /// Writes the descriptors and groups of all pieces.
    fn describe(&mut self) {
        let batch = (self.accelerator.queue.limits().max_batch as usize).max(1);
        let count = self.pieces.len();
        let groups = count.div_ceil(batch);
        self.records.clear();
        self.records.resize_with(count + groups, Record::default);
        self.descriptors.clear();
        for (piece, record) in self.pieces.iter().zip(&self.records) {
            let (src, dst) = (piece.src.expose_provenance() as u64, piece.dst.expose_provenance() as u64);
            self.descriptors.push(Descriptor::memmove(src, dst, piece.len as u32, record));
        }
        self.groups.clear();
        for (number, start) in (0..count).step_by(batch).enumerate() {
            let pieces = start..(start + batch).min(count);
            let record = if pieces.len() == 1 { start } else { count + number };
            self.groups.push(Group { pieces, record, done: false });
        }
    }

    /// Hands a group over, or copies it.
    ///
    /// # Safety
    ///
    /// As for [`Engine::submit`].
    unsafe fn start(&mut self, number: usize) {
        let Group { pieces, record, .. } = &self.groups[number];
        let first = &self.descriptors[pieces.start];
        let batch;
        let descriptor = if pieces.len() == 1 {
            first
        } else {
            let list = self.descriptors[pieces.start..].as_ptr().expose_provenance() as u64;
            batch = Descriptor::batch(list, pieces.len() as u32, &self.records[*record]);
            &batch
        };
        for _ in 0..TRIES {
            // SAFETY: the memory is there as the caller promised; descriptors and records stay where they are until the
            // group is done, and were zero.
            match unsafe { self.accelerator.queue.submit(descriptor) } {
                Ok(()) => return,
                Err(NotTaken::Busy) => std::hint::spin_loop(),
                Err(NotTaken::Lost) => break,
            }
        }
        self.accelerator.counters.busy.fetch_add(1, Ordering::Relaxed);
        for piece in pieces.clone() {
            // SAFETY: as above, and the accelerator has not got it.
            unsafe { self.copy(self.pieces[piece]) };
        }
        self.groups[number].done = true;
    }

    /// Ends a group that the accelerator has done with: does what it has left.
    fn settle(&self, group: &Group) {
        if group.pieces.len() > 1 && self.records[group.record].status() == Status::Success {
            return;
        }
        for piece in group.pieces.clone() {
            let (run, record) = (&self.pieces[piece], &self.records[piece]);
            let counters = &self.accelerator.counters;
            let done = match record.status() {
                Status::Success => continue,
                Status::PageFault => {
                    counters.faults.fetch_add(1, Ordering::Relaxed);
                    (record.completed() as usize).min(run.len)
                }
                // It was never begun, or it ended in an error.
                status => {
                    if status != Status::None {
                        counters.errors.fetch_add(1, Ordering::Relaxed);
                        tracing::debug!("an accelerator's descriptor ended with {status:?}; the CPU copies");
                    }
                    0
                }
            };
            // From the start of a word: what the accelerator has written of it may be half of it.
            let done = done / LINE * LINE;
            // SAFETY: the run's memory is there until `poll` says that all is done, and the accelerator has done with it.
            unsafe { self.copy(part(run, done..run.len)) };
        }
    }

    /// Gives up a queue that does not answer.
    fn give_up(&mut self) {
        tracing::error!(
            "an accelerator has not answered for {} s; it is not used any more, and CPUs copy",
            PATIENCE.as_secs()
        );
        self.accelerator.counters.lost.store(1, Ordering::Relaxed);
        self.accelerator.queue.abandon();
        let groups = std::mem::take(&mut self.groups);
        groups.iter().filter(|group| !group.done).for_each(|group| self.settle(group));
    }
}

/// A part of a run.
fn part(run: &Run, range: Range<usize>) -> Run {
    Run { src: run.src.wrapping_add(range.start), dst: run.dst.wrapping_add(range.start), len: range.len() }
}

impl Engine for DsaEngine {
    unsafe fn submit(&mut self, runs: &[Run]) {
        self.finish();
        self.pieces.clear();
        for run in runs {
            // SAFETY: the caller's promise.
            unsafe { self.take(run) };
        }
        self.describe();
        for group in 0..self.groups.len() {
            // SAFETY: the caller's promise.
            unsafe { self.start(group) };
        }
        self.since = None;
        self.polls = 0;
    }

    fn poll(&mut self) -> bool {
        let mut all = true;
        for number in 0..self.groups.len() {
            let group = self.groups[number].clone();
            if group.done {
                continue;
            }
            if self.records[group.record].status() == Status::None {
                all = false;
                continue;
            }
            self.accelerator.queue.completed();
            self.settle(&group);
            self.groups[number].done = true;
        }
        if all {
            self.groups.clear();
            // What was copied is what this thread shows by its next store.
            fence(Ordering::Release);
            return true;
        }
        self.polls = self.polls.wrapping_add(1);
        if self.polls.is_multiple_of(POLLS)
            && self.since.get_or_insert_with(Instant::now).elapsed() > PATIENCE
        {
            self.give_up();
            return self.poll();
        }
        false
    }
}

impl Drop for DsaEngine {
    fn drop(&mut self) {
        // The memory is the caller's promise only so long.
        self.finish();
    }
}
