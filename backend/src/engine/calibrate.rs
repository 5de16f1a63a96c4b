//! Measures what each engine takes for a copy, by size and by the nodes of source and destination. Done when the daemon
//! starts, in some tens of milliseconds on a host with one node, and in less than a second on any.
//!
//! It is measured beside one thread that spins: that is the sender, who waits for its move. An engine that is only fast
//! while nobody else runs is not fast on a host whose CPUs are for guests. Whoever waits for a long move sleeps, so those are
//! measured without.

use super::table::{CLASSES, Cost, Id, Measured, class_bytes};
use super::{Engine, Run, STEP};
use crate::placement::pages::Policy;
use crate::pool::memfile::MemFile;
use crate::topology::{Node, NodeId, Topology};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// All of it takes less than about this. Pairs of nodes for which no time is left are taken to be as others of their
/// distance are; what is left of the first pair then is measured by a single copy each, because on a busy machine every hand-over
/// to a worker may take as long as the scheduler lets somebody else run.
const BUDGET: Duration = Duration::from_millis(800);
/// Memory at each end, in bytes, of which copies use one part after the other, as in a stream of moves.
const REGION: usize = 16 << 20;
/// The most parts of it.
const SLOTS: usize = 8;
/// Each is measured so often, in turn with all others; the middle one counts.
const ROUNDS: usize = 7;
/// The same of what takes longer than a step.
const ROUNDS_OF_LONG: usize = 3;
/// A measurement copies about so many bytes, unless that is more than [`MOST_COPIES`].
const BYTES: usize = 128 << 10;
/// The most copies in a measurement.
const MOST_COPIES: usize = 64;

/// An engine with its name.
pub type Named = (Id, Box<dyn Engine>);

/// Measures all pairs of nodes; the nodes of the result are those of [`nodes`], in their order.
pub fn measure(topology: &Topology, engines: &mut [Named]) -> io::Result<Vec<Measured>> {
    let deadline = Instant::now() + BUDGET;
    let nodes = nodes(topology);
    let mut all: Vec<Measured> = Vec::new();
    for (source, destination) in pairs(&nodes) {
        let measured = if all.is_empty() || Instant::now() < deadline {
            measure_route(topology, engines, source, destination, deadline)?
        } else {
            like(topology, &all, source, destination)
        };
        all.extend(measured);
    }
    Ok(all)
}

/// The nodes between which copies go: those with memory. Of a host that tells nothing, its only one.
pub fn nodes(topology: &Topology) -> Vec<NodeId> {
    let nodes: Vec<_> = topology.with_memory().collect();
    if nodes.is_empty() { topology.nodes().iter().map(|node| node.id).take(1).collect() } else { nodes }
}

fn pairs(nodes: &[NodeId]) -> impl Iterator<Item = (NodeId, NodeId)> {
    nodes.iter().flat_map(move |source| nodes.iter().map(move |destination| (*source, *destination)))
}

/// What was measured for a pair of the same distance, under this pair's name; else for the first one.
fn like(topology: &Topology, all: &[Measured], source: NodeId, destination: NodeId) -> Vec<Measured> {
    let distance = |from: u32, to: u32| {
        let at = topology.nodes().iter().position(|node| node.id.get() == to)?;
        topology.nodes().iter().find(|node| node.id.get() == from)?.distances.get(at).copied()
    };
    let wanted = distance(source.get(), destination.get());
    let alike = all.chunks(CLASSES).find(|rows| distance(rows[0].source, rows[0].destination) == wanted);
    let rename = |row: &Measured| Measured {
        source: source.get(),
        destination: destination.get(),
        bytes: row.bytes,
        costs: row.costs.clone(),
    };
    alike.unwrap_or(&all[..CLASSES]).iter().map(rename).collect()
}

/// Measures the first pair of nodes alone.
pub fn measure_first(topology: &Topology, engines: &mut [Named]) -> io::Result<Vec<Measured>> {
    let first = nodes(topology)[0];
    measure_route(topology, engines, first, first, Instant::now() + BUDGET)
}

/// Measures one pair of nodes: from a thread at the source and from one at the destination, of which the mean counts,
/// because a mover may be anywhere.
fn measure_route(
    topology: &Topology,
    engines: &mut [Named],
    source: NodeId,
    destination: NodeId,
    deadline: Instant,
) -> io::Result<Vec<Measured>> {
    let memory = |node| {
        let policy = if topology.is_single() { Policy::FirstTouch } else { Policy::Prefer(node) };
        MemFile::new(REGION as u64, None, &policy)
    };
    let (from, to) = (memory(source)?, memory(destination)?);
    for file in [&from, &to] {
        // SAFETY: the range is the file's own mapping, which nobody else has.
        unsafe { file.at(0, file.size()).write_bytes(0x5a, file.size() as usize) };
    }
    let mut places: Vec<&Node> = topology.nodes().iter().collect();
    places.retain(|node| (node.id == source || node.id == destination) && !node.cpus.is_empty());
    let places: Vec<Option<&Node>> = if topology.is_single() || places.is_empty() {
        vec![None]
    } else {
        places.into_iter().map(Some).collect()
    };
    let mut sums = vec![vec![0u64; engines.len()]; CLASSES];
    for place in &places {
        let stop = AtomicBool::new(false);
        let costs = std::thread::scope(|scope| {
            if many_cpus() {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            // A thread of its own, because it is pinned.
            let costs = scope.spawn(|| {
                if let Some(node) = place {
                    pin(&node.cpus);
                }
                let costs = |class| {
                    stop.fetch_or(class_bytes(class) > STEP, Ordering::Relaxed);
                    costs(engines, &from, &to, class, deadline)
                };
                (0..CLASSES).map(costs).collect::<Vec<_>>()
            });
            let costs = costs.join();
            stop.store(true, Ordering::Relaxed);
            costs.map_err(|_| io::Error::other("the measurement of the engines panicked"))
        })?;
        for (sum, costs) in sums.iter_mut().zip(costs) {
            sum.iter_mut().zip(costs).for_each(|(sum, cost)| *sum += cost);
        }
    }
    let row = |class: usize| Measured {
        source: source.get(),
        destination: destination.get(),
        bytes: class_bytes(class) as u64,
        costs: engines
            .iter()
            .zip(&sums[class])
            .map(|((engine, _), sum)| Cost {
                engine: *engine,
                nanoseconds: sum.div_ceil(places.len() as u64),
            })
            .collect(),
    };
    Ok((0..CLASSES).map(row).collect())
}

/// What each engine takes for a copy of this class, in nanoseconds.
fn costs(engines: &mut [Named], from: &MemFile, to: &MemFile, class: usize, deadline: Instant) -> Vec<u64> {
    let len = class_bytes(class);
    let copies = (BYTES / len).clamp(1, MOST_COPIES);
    let slots = SLOTS.min(REGION / len);
    let run = |copy: usize, step: usize| {
        let (at, len) = ((copy % slots * len.max(4096) + step) as u64, STEP.min(len - step));
        Run { src: from.at(at, len as u64), dst: to.at(at, len as u64), len }
    };
    let count = if len > STEP { ROUNDS_OF_LONG } else { ROUNDS };
    let mut rounds = vec![Vec::with_capacity(count); engines.len()];
    let mut copy = 0;
    for round in 0..count {
        if round != 0 && Instant::now() > deadline {
            break;
        }
        for ((_, engine), rounds) in engines.iter_mut().zip(&mut rounds) {
            let start = Instant::now();
            let copies = if start > deadline { 1 } else { copies };
            for _ in 0..copies {
                for step in (0..len).step_by(STEP) {
                    // SAFETY: both files stay mapped until the engine is done; nobody else accesses them.
                    unsafe { engine.submit(&[run(copy, step)]) };
                    engine.finish();
                }
                copy += 1;
            }
            rounds.push((start.elapsed().as_nanos() as u64).div_ceil(copies as u64));
        }
    }
    let middle = |mut rounds: Vec<u64>| {
        rounds.sort_unstable();
        rounds[rounds.len() / 2].max(1)
    };
    rounds.into_iter().map(middle).collect()
}

/// Whether the thread that spins leaves a CPU to the others.
fn many_cpus() -> bool {
    sched_getaffinity(Pid::from_raw(0))
        .is_ok_and(|set| (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).count() > 1)
}

fn pin(cpus: &[u32]) {
    let mut set = CpuSet::new();
    cpus.iter().for_each(|cpu| {
        let _ = set.set(*cpu as usize);
    });
    // A thread that cannot be pinned measures all the same, less well.
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::CpuEngine;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_row_is_measured_and_every_engine_in_it() {
        let topology = Topology::of_host();
        let cpu = || Box::new(CpuEngine);
        let other = Id { kind: crate::engine::table::Kind::Dsa, node: Some(7) };
        let mut engines: Vec<Named> = vec![(Id::CPU, cpu()), (other, cpu())];
        let rows = measure(&topology, &mut engines).unwrap();
        let count = nodes(&topology).len();
        assert_eq!(rows.len(), count * count * CLASSES);
        for (i, row) in rows.iter().enumerate() {
            assert_eq!(row.bytes, class_bytes(i % CLASSES) as u64);
            assert_eq!(row.costs.iter().map(|cost| cost.engine).collect::<Vec<_>>(), [Id::CPU, other]);
            assert!(row.costs.iter().all(|cost| cost.nanoseconds > 0));
        }
    }

    #[test]
    fn without_time_left_each_is_measured_once() {
        struct Counting(Arc<AtomicUsize>);
        impl Engine for Counting {
            unsafe fn submit(&mut self, runs: &[Run]) {
                self.0.fetch_add(runs.len(), Ordering::Relaxed);
            }
            fn poll(&mut self) -> bool {
                true
            }
        }
        let count = Arc::new(AtomicUsize::new(0));
        let topology = Topology::of_host();
        let node = nodes(&topology)[0];
        let mut engines: Vec<Named> = vec![(Id::CPU, Box::new(Counting(count.clone())))];
        let rows = measure_route(&topology, &mut engines, node, node, Instant::now()).unwrap();
        assert_eq!(rows.len(), CLASSES);
        let steps: usize = (0..CLASSES).map(|class| class_bytes(class).div_ceil(STEP)).sum();
        assert_eq!(count.load(Ordering::Relaxed), steps);
    }

    #[test]
    fn a_pair_that_was_not_measured_is_as_another_of_its_distance() {
        let host = crate::testing::host(&[("0", 4096, "10 20"), ("1", 4096, "20 10")]);
        let row = |source, destination, nanoseconds| Measured {
            source,
            destination,
            bytes: 64,
            costs: vec![Cost { engine: Id::CPU, nanoseconds }],
        };
        let mut all = vec![row(0, 0, 1); CLASSES];
        all.extend(vec![row(0, 1, 2); CLASSES]);
        let node = |number| NodeId::new(number).unwrap();
        assert_eq!(like(&host, &all, node(1), node(0))[3], row(1, 0, 2));
        assert_eq!(like(&host, &all, node(1), node(1))[3], row(1, 1, 1));
    }
}
