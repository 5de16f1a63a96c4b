//! How memory that another core reads is written fastest, by size: the [`CopyPlan`] of the configuration space
//! (`docs/device.md`, 4), which moves follow, too. Measured when the process starts, in some tens of milliseconds, and again
//! later: what was measured on a busy machine, or before a hypervisor moved the CPUs, is outvoted. Not for choosing a move's
//! engine.

use dmbridge_proto::shm::{CopyMethod, CopyPlan, copy_from_shared, copy_to_shared};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Sizes above this one are taken to behave like it: a bigger ring would measure the memory, not the method.
const LARGEST: usize = 1 << 20;
/// Bytes that one measurement writes, unless that is fewer than four chunks or more than a thousand.
const BYTES: usize = 2 << 20;
/// The ring that they are written into.
const RING: usize = 4 << 20;
/// Each method is measured so often; the best counts, because everything else that runs can only disturb.
const REPEATS: usize = 3;
/// After this long the sizes that are left are taken to behave like the one before them.
const BUDGET: Duration = Duration::from_millis(400);
/// The string instruction replaces plain stores only if it takes less than this share of their time.
const STRING_WORTHWHILE: f64 = 0.9;
/// Non-temporal stores replace the better of the others only if they take less than this share of its time: where
/// writer and reader share a cache (which the scheduler may change at any time) they are the worst by far.
const NON_TEMPORAL_WORTHWHILE: f64 = 0.75;
/// When it is measured again: so long after the start, after that, and after each further time.
const AGAIN: [Duration; 3] =
    [Duration::from_secs(60), Duration::from_secs(10 * 60), Duration::from_secs(60 * 60)];
/// So many measurements have a say.
const REMEMBERED: usize = 8;
/// Bits of a method in the current plan.
const BITS: u32 = 2;

/// The current plan: the methods of all sizes, [`BITS`] each; 0 is plain stores.
static CURRENT: AtomicU32 = AtomicU32::new(0);
const _: () = assert!(CopyPlan::CLASSES as u32 * BITS <= u32::BITS);

/// What each method took, as a multiple of the best one's time; `None` if that was not measured.
type Costs = [Option<[f64; CopyMethod::ALL.len()]>; CopyPlan::CLASSES];

/// The plan as it is now.
pub fn current() -> CopyPlan {
    let word = CURRENT.load(Ordering::Relaxed);
    CopyPlan::new(std::array::from_fn(|class| decode(word, class)))
}

/// How to copy `len` bytes now.
#[inline]
pub fn method(len: usize) -> CopyMethod {
    if len < CopyPlan::FIRST {
        return CopyMethod::Plain;
    }
    let class = (len.ilog2() - CopyPlan::FIRST.ilog2()) as usize;
    decode(CURRENT.load(Ordering::Relaxed), class.min(CopyPlan::CLASSES - 1))
}

#[inline]
fn decode(word: u32, class: usize) -> CopyMethod {
    match word >> (class as u32 * BITS) & 3 {
        1 => CopyMethod::NonTemporal,
        2 => CopyMethod::String,
        _ => CopyMethod::Plain,
    }
}

fn encode(plan: &CopyPlan) -> u32 {
    (0..CopyPlan::CLASSES).fold(0, |word, class| {
        let code = match plan.method(CopyPlan::FIRST << class) {
            CopyMethod::Plain => 0,
            CopyMethod::NonTemporal => 1,
            CopyMethod::String => 2,
        };
        word | code << (class as u32 * BITS)
    })
}

/// Measures again from time to time until it is dropped.
#[derive(Debug)]
pub struct Revision(#[expect(dead_code, reason = "its end is the message")] Sender<()>);

/// Measures, unless this process has or the plan of another is known, and sees to it that it is measured again.
pub fn start(known: Option<CopyPlan>) -> io::Result<Revision> {
    static MEASURED: OnceLock<()> = OnceLock::new();
    MEASURED.get_or_init(|| match known {
        Some(plan) => CURRENT.store(encode(&plan), Ordering::Relaxed),
        None => revise(),
    });
    let (sender, ended) = channel();
    // It is not waited for: what it does touches nothing of the daemon's.
    std::thread::Builder::new().name("dmb-plan".into()).spawn(move || {
        for pause in AGAIN.into_iter().chain(std::iter::repeat(AGAIN[AGAIN.len() - 1])) {
            if ended.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            revise();
        }
    })?;
    Ok(Revision(sender))
}

/// Measures, and makes the plan of this and of what was measured before.
fn revise() {
    static PAST: Mutex<VecDeque<Costs>> = Mutex::new(VecDeque::new());
    let mut past = PAST.lock().unwrap_or_else(PoisonError::into_inner);
    // With one CPU there is nothing to hand over: plain stores.
    let Some(costs) = measure() else { return };
    if past.len() == REMEMBERED {
        past.pop_front();
    }
    past.push_back(costs);
    let plan = decide(past.make_contiguous());
    if CURRENT.swap(encode(&plan), Ordering::Relaxed) != encode(&plan) {
        tracing::debug!(?plan, "how memory is written fastest, by {} measurements", past.len());
    }
}

/// Measures with two of the CPUs that this process may use.
fn measure() -> Option<Costs> {
    let cpus = two_cpus()?;
    let end = Instant::now() + BUDGET;
    let mut ring = vec![0u8; RING];
    let mut costs = [None; CopyPlan::CLASSES];
    for (class, costs) in costs.iter_mut().enumerate() {
        let size = CopyPlan::FIRST << class;
        if size <= LARGEST && Instant::now() < end {
            *costs = times(&mut ring, size, cpus).map(|times| {
                let best = times.into_iter().min().unwrap_or_default().as_secs_f64().max(1e-9);
                times.map(|time| time.as_secs_f64() / best)
            });
        }
    }
    Some(costs)
}

/// The plan that is best by what each method takes mostly.
fn decide(past: &[Costs]) -> CopyPlan {
    let mut methods = [CopyMethod::Plain; CopyPlan::CLASSES];
    for class in 0..CopyPlan::CLASSES {
        let measured: Vec<_> = past.iter().filter_map(|costs| costs[class]).collect();
        methods[class] = if measured.is_empty() {
            class.checked_sub(1).map_or(CopyMethod::Plain, |before| methods[before])
        } else {
            best(std::array::from_fn(|method| middle(measured.iter().map(|costs| costs[method]).collect())))
        };
    }
    // What is best changes with size at two points at most; a size that differs from both its neighbours was disturbed.
    for class in 1..methods.len() - 1 {
        if methods[class - 1] == methods[class + 1] {
            methods[class] = methods[class - 1];
        }
    }
    CopyPlan::new(methods)
}

/// The one in the middle, or half-way between the two.
fn middle(mut costs: Vec<f64>) -> f64 {
    costs.sort_by(f64::total_cmp);
    f64::midpoint(costs[(costs.len() - 1) / 2], costs[costs.len() / 2])
}

/// In the order of [`CopyMethod::ALL`].
fn best([plain, non_temporal, string]: [f64; 3]) -> CopyMethod {
    let (method, best) = if string < plain * STRING_WORTHWHILE {
        (CopyMethod::String, string)
    } else {
        (CopyMethod::Plain, plain)
    };
    if non_temporal < best * NON_TEMPORAL_WORTHWHILE { CopyMethod::NonTemporal } else { method }
}

fn two_cpus() -> Option<[usize; 2]> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
    Some([cpus.next()?, cpus.next()?])
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    // A thread that cannot be pinned measures all the same, less well.
    let _ = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
}

/// Where the ring is, as two threads know it.
struct Ring(*mut u8);
// SAFETY: the writer writes a chunk before it counts it as written, and the reader reads it after that and before it
// counts it as read; the writer waits for that before it writes there again.
unsafe impl Sync for Ring {}

impl Ring {
    fn slot(&self, chunk: usize, size: usize, slots: usize) -> *mut u8 {
        self.0.wrapping_add(chunk % slots * size)
    }
}

/// What each method takes for chunks of a size, at best.
fn times(ring: &mut [u8], size: usize, [writer_cpu, reader_cpu]: [usize; 2]) -> Option<[Duration; 3]> {
    let slots = ring.len() / size;
    let chunks = (BYTES / size).clamp(4, 1000);
    let total = chunks * REPEATS * CopyMethod::ALL.len();
    let (written, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let base = Ring(ring.as_mut_ptr());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pin(reader_cpu);
            let mut target = vec![0u8; size];
            for chunk in 0..total {
                wait_for(&written, chunk as u64 + 1);
                // SAFETY: the slot lies in the ring, and the writer has written it and waits before it does so again.
                unsafe { copy_from_shared(base.slot(chunk, size, slots), target.as_mut_ptr(), size) };
                read.store(chunk as u64 + 1, Ordering::Release);
            }
        });
        scope
            .spawn(|| {
                pin(writer_cpu);
                let source = vec![1u8; size];
                let mut best = [Duration::MAX; CopyMethod::ALL.len()];
                let mut chunk = 0;
                for _ in 0..REPEATS {
                    for (method, best) in CopyMethod::ALL.into_iter().zip(&mut best) {
                        let start = Instant::now();
                        for _ in 0..chunks {
                            wait_for(&read, (chunk as u64 + 1).saturating_sub(slots as u64));
                            // SAFETY: the slot lies in the ring, and the reader is done with it.
                            unsafe {
                                copy_to_shared(method, source.as_ptr(), base.slot(chunk, size, slots), size);
                            }
                            chunk += 1;
                            written.store(chunk as u64, Ordering::Release);
                        }
                        wait_for(&read, chunk as u64);
                        *best = start.elapsed().min(*best);
                    }
                }
                best
            })
            .join()
            .ok()
    })
}

fn wait_for(counter: &AtomicU64, value: u64) {
    let mut spins = 0u32;
    while counter.load(Ordering::Acquire) < value {
        spins += 1;
        // The other thread may have to get this very CPU first.
        if spins.is_multiple_of(1 << 14) { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measurement_ends_and_gives_a_plan_that_survives_the_wire() {
        revise();
        let plan = current();
        assert_eq!(CopyPlan::from_bytes(plan.to_bytes()), plan);
        for len in [0, 1, 255, 256, 4095, 4096, 1 << 20, usize::MAX] {
            assert_eq!(method(len), plan.method(len));
        }
    }

    /// Every size costs this.
    fn costs(plain: f64, non_temporal: f64, string: f64) -> Costs {
        [Some([plain, non_temporal, string]); CopyPlan::CLASSES]
    }

    fn all(method: CopyMethod) -> CopyPlan {
        CopyPlan::new([method; CopyPlan::CLASSES])
    }

    #[test]
    fn every_plan_can_be_the_current_one() {
        let methods = std::array::from_fn(|class| CopyMethod::ALL[class % 3]);
        for plan in [CopyPlan::new(methods), all(CopyMethod::String), CopyPlan::default()] {
            let word = encode(&plan);
            assert_eq!(CopyPlan::new(std::array::from_fn(|class| decode(word, class))), plan);
        }
    }

    #[test]
    fn a_disturbed_measurement_is_outvoted() {
        let (good, disturbed) = (costs(5.0, 1.2, 1.0), costs(1.0, 1.1, 100.0));
        assert_eq!(decide(&[disturbed]), all(CopyMethod::Plain));
        assert_eq!(decide(&[disturbed, good, good]), all(CopyMethod::String));
    }

    #[test]
    fn what_is_never_bad_is_preferred_to_what_is_best_now_and_then() {
        let (apart, sharing) = (costs(5.0, 1.0, 1.1), costs(1.0, 3.0, 1.0));
        assert_eq!(decide(&[apart, sharing]), all(CopyMethod::String));
    }

    #[test]
    fn what_was_not_measured_is_as_the_size_below() {
        let mut some = costs(5.0, 1.2, 1.0);
        some[6..].fill(None);
        assert_eq!(decide(&[some]), all(CopyMethod::String));
        assert_eq!(decide(&[[None; CopyPlan::CLASSES]]), CopyPlan::default());
    }
}
