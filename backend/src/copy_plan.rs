//! Measures how memory that another core reads is written fastest, by size: the [`CopyPlan`] of the configuration space
//! (`docs/device.md`, 4). Done once, at start, in some tens of milliseconds. Not for choosing a move's engine.

use dmbridge_proto::shm::{CopyMethod, CopyPlan, copy_from_shared, copy_to_shared};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Sizes above this one are taken to behave like it: a bigger ring would measure the memory, not the method.
const LARGEST: usize = 1 << 20;
/// Bytes that one measurement writes, unless that is fewer than four chunks or more than a thousand.
const BYTES: usize = 2 << 20;
/// The ring that they are written into.
const RING: usize = 4 << 20;
/// Each method is measured so often; the best counts, because everything else that runs can only disturb.
const REPEATS: usize = 3;
/// The string instruction replaces plain stores only if it takes less than this share of their time.
const STRING_WORTHWHILE: f64 = 0.9;
/// Non-temporal stores replace the better of the others only if they take less than this share of its time: where
/// writer and reader share a cache (which the scheduler may change at any time) they are the worst by far.
const NON_TEMPORAL_WORTHWHILE: f64 = 0.75;

/// Measures with two of the CPUs that this process may use. With one CPU there is nothing to hand over: plain stores.
pub fn measure() -> CopyPlan {
    let Some(cpus) = two_cpus() else { return CopyPlan::default() };
    let mut methods = [CopyMethod::Plain; CopyPlan::CLASSES];
    let mut ring = vec![0u8; RING];
    for class in 0..CopyPlan::CLASSES {
        let size = CopyPlan::FIRST << class;
        methods[class] =
            if size <= LARGEST { best_method(&mut ring, size, cpus) } else { methods[class - 1] };
    }
    // What is best changes with size at two points at most; a size that differs from both its neighbours was disturbed.
    for class in 1..methods.len() - 1 {
        if methods[class - 1] == methods[class + 1] {
            methods[class] = methods[class - 1];
        }
    }
    CopyPlan::new(methods)
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

fn best_method(ring: &mut [u8], size: usize, [writer_cpu, reader_cpu]: [usize; 2]) -> CopyMethod {
    let slots = ring.len() / size;
    let chunks = (BYTES / size).clamp(4, 1000);
    let total = chunks * REPEATS * CopyMethod::ALL.len();
    let (written, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let base = Ring(ring.as_mut_ptr());
    let best = std::thread::scope(|scope| {
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
    });
    let Ok([plain, non_temporal, string]) = best else { return CopyMethod::Plain };
    let (method, best) = if string < plain.mul_f64(STRING_WORTHWHILE) {
        (CopyMethod::String, string)
    } else {
        (CopyMethod::Plain, plain)
    };
    if non_temporal < best.mul_f64(NON_TEMPORAL_WORTHWHILE) { CopyMethod::NonTemporal } else { method }
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
        let plan = measure();
        assert_eq!(CopyPlan::from_bytes(plan.to_bytes()), plan);
    }
}
