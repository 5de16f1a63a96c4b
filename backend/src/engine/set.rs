//! The engines of a daemon: which there are, which one is the best for what, and how often each was used. And those of one
//! of its movers.

use super::calibrate::{self, Named};
use super::cpu::CpuEngine;
use super::cpu_node::NodePool;
use super::dsa::host::{self, Found, HostQueue};
use super::dsa::{Accelerator, Counters};
use super::table::{Chosen, Id, Kind, Measured, Rule, Table};
use super::trial::{self, Trials};
use super::{Engine, Run, cache};
use crate::report::{EngineCost, EngineReport, EngineRow, EnginesReport};
use crate::topology::{Node, NodeId, Topology};
use nix::sched::sched_getaffinity;
use nix::unistd::Pid;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Workers of a node unless told otherwise, if it has as many CPUs beside one for a mover: what a memory controller can
/// serve, about.
const WORKERS: usize = 4;

/// What is configured of the engines.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EngineSettings {
    /// Answers that are not measured.
    pub rules: Vec<Rule>,
    /// Queues of accelerators, such as `wq0.0`; those named `dmbridge` if not given.
    pub dsa: Option<Vec<String>>,
    /// Workers of each node; by the number of its CPUs if not given. 0: there are none.
    pub workers: Option<usize>,
    /// Where results are kept from start to start; nowhere if not given.
    pub cache: Option<PathBuf>,
}

/// Where the table comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Measured,
    Cached,
}

/// The engines of a daemon.
#[derive(Debug)]
pub struct EngineSet {
    pools: Vec<NodePool>,
    accelerators: Vec<(NodeId, Accelerator)>,
    table: Arc<Table>,
    uses: Mutex<Vec<Arc<Uses>>>,
    origin: Origin,
    took: Duration,
}

impl EngineSet {
    /// Finds the engines, starts their workers, and measures.
    pub fn start(settings: &EngineSettings, topology: &Topology) -> io::Result<EngineSet> {
        let start = Instant::now();
        let pools = pools(settings, topology)?;
        let accelerators = accelerators(settings, topology);
        let mut engines = engines(&pools, &accelerators);
        let (measured, origin) = measured(settings, topology, &mut engines)?;
        let ids = engines.iter().map(|(id, _)| *id).collect();
        let table = Arc::new(Table::new(calibrate::nodes(topology), ids, measured, &settings.rules));
        let took = start.elapsed();
        Ok(EngineSet { pools, accelerators, table, uses: Mutex::default(), origin, took })
    }

    /// The engines of another mover.
    pub fn mover(&self) -> MoverEngines {
        let uses = Arc::new(Uses::new(&self.table));
        self.uses.lock().unwrap_or_else(PoisonError::into_inner).push(uses.clone());
        let others = engines(&self.pools, &self.accelerators).into_iter().map(|(_, engine)| engine).collect();
        MoverEngines::new(others, self.table.clone(), uses)
    }

    /// How things are.
    pub fn report(&self) -> EnginesReport {
        let uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        let sum = |of: &dyn Fn(&Uses) -> u64| uses.iter().map(|uses| of(uses)).sum();
        let engine = |(at, id): (usize, &Id)| EngineReport {
            name: id.to_string(),
            node: id.node,
            workers: self.workers(*id) as u32,
            faults: self.counter(*id, |counters| &counters.faults),
            errors: self.counter(*id, |counters| &counters.errors),
            busy: self.counter(*id, |counters| &counters.busy),
            lost: self.counter(*id, |counters| &counters.lost) != 0,
            copies: sum(&|uses| Uses::get(&uses.copies[at])),
            bytes: sum(&|uses| Uses::get(&uses.bytes[at])),
        };
        let rows = self.table.iter().map(|row| EngineRow {
            source_node: row.measured.source,
            destination_node: row.measured.destination,
            bytes: row.measured.bytes,
            engine: row.engine.to_string(),
            chosen_by: match row.chosen {
                Chosen::Measured => "measurement".into(),
                Chosen::Tried => "trial".into(),
                Chosen::Configured => "configuration".into(),
            },
            uses: sum(&|uses| Uses::get(&uses.rows[row.number])),
            costs: row
                .measured
                .costs
                .iter()
                .map(|cost| EngineCost { engine: cost.engine.to_string(), nanoseconds: cost.nanoseconds })
                .collect(),
        });
        EnginesReport {
            origin: match self.origin {
                Origin::Measured => "measured".into(),
                Origin::Cached => "cached".into(),
            },
            took_microseconds: self.took.as_micros() as u64,
            engines: self.table.engines().iter().enumerate().map(engine).collect(),
            rows: rows.collect(),
        }
    }

    fn counter(&self, id: Id, of: impl Fn(&Counters) -> &AtomicU64) -> u64 {
        let found = self.accelerators.iter().find(|(node, _)| id == Id::of_node(Kind::Dsa, *node));
        found.map_or(0, |(_, accelerator)| of(&accelerator.counters).load(Ordering::Relaxed))
    }

    fn workers(&self, id: Id) -> usize {
        let pool = self.pools.iter().find(|pool| id == Id::of_node(Kind::CpuNode, pool.node()));
        pool.map_or(0, NodePool::workers)
    }
}

/// Workers of every node that has CPUs that this process may use.
fn pools(settings: &EngineSettings, topology: &Topology) -> io::Result<Vec<NodePool>> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).map_err(io::Error::from)?;
    let may = |cpu: &u32| allowed.is_set(*cpu as usize).unwrap_or(false);
    let mut pools = Vec::new();
    for Node { id, cpus, .. } in topology.nodes() {
        let cpus: Vec<u32> = cpus.iter().copied().filter(may).collect();
        // Where all memory is near, a single CPU is the mover's.
        let least = usize::from(!topology.is_single());
        let workers = settings.workers.unwrap_or(cpus.len().saturating_sub(1).clamp(least, WORKERS));
        if !cpus.is_empty() && workers != 0 {
            pools.push(NodePool::start(*id, &cpus, workers)?);
        }
    }
    Ok(pools)
}

/// One queue of each node, of those that are configured or named for this daemon, and that can be opened.
fn accelerators(settings: &EngineSettings, topology: &Topology) -> Vec<(NodeId, Accelerator)> {
    let found = host::find();
    for name in settings.dsa.iter().flatten() {
        if !found.iter().any(|queue| queue.queue == *name) {
            tracing::warn!("{name} is no enabled work queue of type user; it is not used");
        }
    }
    one_of_each_node(settings, topology, &found, |queue| match HostQueue::open(queue) {
        Ok(opened) => Some(Accelerator::new(Arc::new(opened))),
        Err(error) => {
            tracing::warn!("{} cannot be used: {error}", queue.queue);
            None
        }
    })
}

fn one_of_each_node<T>(
    settings: &EngineSettings,
    topology: &Topology,
    found: &[Found],
    mut open: impl FnMut(&Found) -> Option<T>,
) -> Vec<(NodeId, T)> {
    let mut opened: Vec<(NodeId, T)> = Vec::new();
    for queue in found {
        let wanted = match &settings.dsa {
            Some(names) => names.contains(&queue.queue),
            None => queue.name == host::NAME,
        };
        // Of a device that does not say where it is, any node is as good.
        let node = queue.node.filter(|node| topology.has(*node)).unwrap_or(topology.nodes()[0].id);
        if wanted && !opened.iter().any(|(other, _)| *other == node) {
            opened.extend(open(queue).map(|queue| (node, queue)));
        }
    }
    opened
}

/// All engines, by a way to each that nobody else has; the CPU first.
fn engines(pools: &[NodePool], accelerators: &[(NodeId, Accelerator)]) -> Vec<Named> {
    let mut engines: Vec<Named> = vec![(Id::CPU, Box::new(CpuEngine))];
    for pool in pools {
        engines.push((Id::of_node(Kind::CpuNode, pool.node()), Box::new(pool.engine())));
    }
    for (node, accelerator) in accelerators {
        engines.push((Id::of_node(Kind::Dsa, *node), Box::new(accelerator.engine(CpuEngine))));
    }
    engines
}

/// What the engines take: as it was measured at an earlier start, if that still holds, else measured now.
fn measured(
    settings: &EngineSettings,
    topology: &Topology,
    engines: &mut [Named],
) -> io::Result<(Vec<Measured>, Origin)> {
    let Some(path) = &settings.cache else {
        return Ok((calibrate::measure(topology, engines)?, Origin::Measured));
    };
    let names: Vec<String> = engines.iter().map(|(id, _)| id.to_string()).collect();
    let machine = cache::machine(topology, &names.join(" "));
    let nodes = calibrate::nodes(topology);
    let rows = nodes.len() * nodes.len() * super::table::CLASSES;
    if let Some(mut past) = cache::load(path, &machine, rows) {
        let now = calibrate::measure_first(topology, engines)?;
        if cache::still_true(&past, &now) {
            past[..now.len()].clone_from_slice(&now);
            return Ok((past, Origin::Cached));
        }
    }
    let measured = calibrate::measure(topology, engines)?;
    cache::store(path, &machine, &measured);
    Ok((measured, Origin::Measured))
}

/// How often what was used, by one mover, which alone counts here.
#[derive(Debug)]
struct Uses {
    rows: Box<[AtomicU64]>,
    copies: Box<[AtomicU64]>,
    bytes: Box<[AtomicU64]>,
}

impl Uses {
    fn new(table: &Table) -> Uses {
        let zeroes = |count| (0..count).map(|_| AtomicU64::new(0)).collect();
        let engines = table.engines().len();
        Uses { rows: zeroes(table.rows()), copies: zeroes(engines), bytes: zeroes(engines) }
    }

    /// Without a locked instruction: nobody else adds.
    #[inline]
    fn add(counter: &AtomicU64, n: u64) {
        counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// Who does a move.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// A place in the table's engines.
    engine: usize,
    /// The row that it is timed for, and since when.
    timed: Option<(usize, Instant)>,
}

/// The engines of one mover.
pub struct MoverEngines {
    /// All of them, in the order of the table's; the first one is not used, because the CPU is asked directly.
    others: Vec<Box<dyn Engine>>,
    table: Arc<Table>,
    trials: Trials,
    uses: Arc<Uses>,
}

impl MoverEngines {
    fn new(others: Vec<Box<dyn Engine>>, table: Arc<Table>, uses: Arc<Uses>) -> MoverEngines {
        let trials = Trials::new(table.rows(), table.engines().len());
        MoverEngines { others, table, trials, uses }
    }

    /// The CPU, and nothing to choose.
    #[cfg(test)]
    pub fn cpu_only() -> MoverEngines {
        let nodes = vec![NodeId::new(0).expect("a node")];
        let row = |class| Measured {
            source: 0,
            destination: 0,
            bytes: super::table::class_bytes(class) as u64,
            costs: Vec::new(),
        };
        let rows = (0..super::table::CLASSES).map(row).collect();
        let table = Arc::new(Table::new(nodes, vec![Id::CPU], rows, &[]));
        let uses = Arc::new(Uses::new(&table));
        MoverEngines::new(Vec::new(), table, uses)
    }

    /// This engine for everything, for tests.
    #[cfg(test)]
    pub fn only(engine: Box<dyn Engine>) -> MoverEngines {
        MoverEngines::beside_cpu(engine, &[Rule { at_least: 0, kind: Kind::Dsa }], |_| 1)
    }

    /// This engine beside the CPU; what a copy takes by either was measured to be this.
    #[cfg(test)]
    fn beside_cpu(engine: Box<dyn Engine>, rules: &[Rule], cost: impl Fn(Id) -> u64) -> MoverEngines {
        let node = NodeId::new(0).expect("a node");
        let engines = vec![Id::CPU, Id::of_node(Kind::Dsa, node)];
        let costs = |id: &Id| super::table::Cost { engine: *id, nanoseconds: cost(*id) };
        let row = |class| Measured {
            source: 0,
            destination: 0,
            bytes: super::table::class_bytes(class) as u64,
            costs: engines.iter().map(costs).collect(),
        };
        let rows = (0..super::table::CLASSES).map(row).collect();
        let table = Arc::new(Table::new(vec![node], engines, rows, rules));
        let uses = Arc::new(Uses::new(&table));
        MoverEngines::new(vec![Box::new(CpuEngine), engine], table, uses)
    }

    /// Who does a move of `len` bytes: an engine of the kind that was `asked` for, if there is one, else the best.
    #[inline]
    pub fn choose(
        &mut self,
        asked: Option<Kind>,
        source: Option<NodeId>,
        destination: Option<NodeId>,
        len: usize,
    ) -> Choice {
        let row = self.table.row(self.table.route(source, destination), len);
        Uses::add(&self.uses.rows[row], 1);
        if let Some(engine) = asked.and_then(|kind| self.table.nearest(kind, row)) {
            return Choice { engine, timed: None };
        }
        let used = self.table.choice(row);
        if len < trial::LEAST || !self.table.is_open(row) {
            return Choice { engine: used, timed: None };
        }
        let turn = self.trials.next(row, used);
        Choice { engine: turn.engine, timed: turn.timed.then(|| (row, Instant::now())) }
    }

    /// All `len` bytes of a move are copied.
    #[inline]
    pub fn done(&mut self, choice: Choice, len: usize) {
        if let Some((row, since)) = choice.timed
            && let Some(better) = self.trials.done(row, len, since.elapsed())
        {
            self.table.choose(row, better);
        }
    }

    /// Copies all runs, `len` bytes together. They are visible when this returns.
    ///
    /// # Safety
    ///
    /// As for [`Engine::submit`], until this returns.
    #[inline]
    pub unsafe fn copy(&mut self, choice: Choice, runs: &[Run], len: usize) {
        let choice = choice.engine;
        Uses::add(&self.uses.copies[choice], 1);
        Uses::add(&self.uses.bytes[choice], len as u64);
        if choice == 0 {
            for run in runs {
                // SAFETY: the caller's promise.
                unsafe { CpuEngine.copy(run.src, run.dst, run.len) };
            }
            return;
        }
        let engine = &mut self.others[choice];
        // SAFETY: the caller's promise: this does not return before the engine is done.
        unsafe { engine.submit(runs) };
        engine.finish();
    }
}

impl fmt::Debug for MoverEngines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MoverEngines").field("table", &self.table).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(engines: &mut MoverEngines, len: usize) {
        let source: Vec<u8> = (0..len).map(|i| (i * 7) as u8).collect();
        let mut target = vec![0; len];
        let choice = engines.choose(None, None, None, len);
        let run = Run { src: source.as_ptr(), dst: target.as_mut_ptr(), len };
        // SAFETY: both are this function's own.
        unsafe { engines.copy(choice, &[run], len) };
        engines.done(choice, len);
        assert!(target == source);
    }

    /// Copies everything many times over.
    struct Slow(CpuEngine);

    impl Engine for Slow {
        unsafe fn submit(&mut self, runs: &[Run]) {
            for _ in 0..50 {
                // SAFETY: the caller's promise.
                unsafe { self.0.submit(runs) };
            }
        }

        fn poll(&mut self) -> bool {
            true
        }
    }

    #[test]
    fn an_engine_that_was_measured_to_be_fast_and_is_not_is_used_no_more() {
        let slow = Slow(CpuEngine);
        let cost = |id| if id == Id::CPU { 100 } else { 1 };
        let mut engines = MoverEngines::beside_cpu(Box::new(slow), &[], cost);
        let len = trial::LEAST;
        let row = engines.table.row(engines.table.route(None, None), len);
        assert_eq!(engines.table.choice(row), 1);
        while engines.table.choice(row) != 0 {
            copy(&mut engines, len);
        }
        assert_eq!(engines.table.iter().nth(row).unwrap().chosen, Chosen::Tried);
        // Smaller ones are as they were measured.
        assert_eq!(engines.choose(None, None, None, len - 1).engine, 1);
    }

    #[test]
    fn who_asks_for_an_engine_gets_it_if_it_is_there() {
        let other = Box::new(CpuEngine);
        let mut engines = MoverEngines::beside_cpu(other, &[], |id| if id == Id::CPU { 1 } else { 100 });
        for len in [64, 1 << 20] {
            let mut engine = |kind| engines.choose(kind, None, None, len).engine;
            assert_eq!(
                [None, Some(Kind::Cpu), Some(Kind::Dsa), Some(Kind::CpuNode)].map(&mut engine),
                [0, 0, 1, 0]
            );
        }
    }

    #[test]
    fn every_engine_that_is_configured_copies_and_is_counted() {
        let topology = Topology::of_host();
        for kind in [Kind::Cpu, Kind::CpuNode] {
            let rules = vec![Rule { at_least: 0, kind }];
            let settings = EngineSettings { rules, workers: Some(1), ..EngineSettings::default() };
            let set = EngineSet::start(&settings, &topology).unwrap();
            let mut movers = [set.mover(), set.mover()];
            for len in [1, 64, 5000, 1 << 20] {
                movers.iter_mut().for_each(|engines| copy(engines, len));
            }
            let report = set.report();
            let used: Vec<_> = report.engines.iter().filter(|engine| engine.copies != 0).collect();
            assert_eq!(used.len(), 1);
            assert!(used[0].name.starts_with(kind.as_str()), "{}", used[0].name);
            assert_eq!((used[0].copies, used[0].bytes), (8, 2 * (65 + 5000 + (1 << 20))));
            assert_eq!(report.rows.iter().map(|row| row.uses).sum::<u64>(), 8);
            assert!(report.rows.iter().all(|row| row.chosen_by == "configuration"));
        }
    }

    #[test]
    fn each_node_has_one_queue_of_those_that_are_meant_and_can_be_opened() {
        let topology = crate::testing::host(&[("0-3", 4096, "10 20"), ("4-7", 4096, "20 10")]);
        let queue = |queue: &str, name: &str, node| Found {
            queue: queue.into(),
            name: name.into(),
            node: NodeId::new(node),
            dedicated: true,
            size: 16,
            limits: crate::engine::dsa::queue::Limits { max_transfer: 1 << 21, max_batch: 32 },
        };
        let found = [
            queue("wq0.0", "other", 0),
            queue("wq0.1", "dmbridge", 0),
            queue("wq0.2", "dmbridge", 0),
            queue("wq1.0", "dmbridge", 1),
            queue("wq2.0", "dmbridge", 7),
        ];
        let used = |dsa: Option<&[&str]>, broken: &str| {
            let dsa = dsa.map(|names| names.iter().map(|name| name.to_string()).collect());
            let settings = EngineSettings { dsa, ..EngineSettings::default() };
            let open = |queue: &Found| (queue.queue != broken).then(|| queue.queue.clone());
            let used = one_of_each_node(&settings, &topology, &found, open);
            used.into_iter().map(|(node, queue)| format!("{queue} on {node}")).collect::<Vec<_>>()
        };
        assert_eq!(used(None, ""), ["wq0.1 on 0", "wq1.0 on 1"]);
        assert_eq!(used(None, "wq0.1"), ["wq0.2 on 0", "wq1.0 on 1"]);
        assert_eq!(used(Some(&["wq0.0", "wq0.1"]), ""), ["wq0.0 on 0"]);
        assert_eq!(used(Some(&["wq2.0"]), ""), ["wq2.0 on 0"]);
        assert!(used(Some(&[]), "").is_empty());
    }

    #[test]
    fn a_second_start_takes_what_the_first_one_measured() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Some(folder.path().join("engines.json"));
        // With one engine there is only one decision, and it stays the same.
        let settings = EngineSettings { workers: Some(0), cache, ..EngineSettings::default() };
        let start = || EngineSet::start(&settings, &Topology::of_host()).unwrap().report();
        assert_eq!(start().origin, "measured");
        assert_eq!(start().origin, "cached");
    }
}
