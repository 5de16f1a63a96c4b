//! Which engine copies, by size and by the nodes of source and destination: what was measured, what trials showed since, or
//! what is configured.

use crate::topology::NodeId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

/// Number of sizes that the table tells apart.
pub const CLASSES: usize = 10;
/// The smallest of them, in bytes; each further one is four times as large.
pub const FIRST: usize = 64;
/// An engine that takes more than the CPU that asks has to be faster by more than this: a copy in less than this share of
/// its time.
pub(super) const WORTHWHILE: f64 = 0.97;

/// The size of a class, in bytes.
pub fn class_bytes(class: usize) -> usize {
    FIRST << (2 * class)
}

/// The class whose size is nearest, by its logarithm.
#[inline]
pub fn class_of(len: usize) -> usize {
    let doublings = (len | 1).ilog2().saturating_sub(FIRST.ilog2() - 1) as usize;
    (doublings / 2).min(CLASSES - 1)
}

/// A kind of engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The CPU that serves the queue.
    Cpu,
    /// A node's workers.
    CpuNode,
    /// A node's accelerator.
    Dsa,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Cpu, Kind::CpuNode, Kind::Dsa];

    /// As written in configuration and reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Cpu => "cpu",
            Kind::CpuNode => "cpu-node",
            Kind::Dsa => "dsa",
        }
    }
}

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        let found = Kind::ALL.into_iter().find(|kind| kind.as_str() == text);
        found.ok_or_else(|| format!("{text:?} is not an engine; choose cpu, cpu-node or dsa"))
    }
}

/// An engine of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Id {
    /// What it is.
    pub kind: Kind,
    /// Where it is; the CPU that asks is anywhere.
    pub node: Option<u32>,
}

impl Id {
    /// The CPU that asks.
    pub const CPU: Id = Id { kind: Kind::Cpu, node: None };

    /// An engine of a node.
    pub fn of_node(kind: Kind, node: NodeId) -> Id {
        Id { kind, node: Some(node.get()) }
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.node {
            None => f.write_str(self.kind.as_str()),
            Some(node) => write!(f, "{}.{node}", self.kind.as_str()),
        }
    }
}

/// A configured answer for sizes from so many bytes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// From this size on.
    pub at_least: u64,
    /// This kind, on the node of the destination, else of the source.
    pub kind: Kind,
}

/// What one engine takes for a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cost {
    /// Which.
    pub engine: Id,
    /// From its submission until it is visible.
    pub nanoseconds: u64,
}

/// Copies of a size, between two nodes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// The source's node.
    pub source: u32,
    /// The destination's.
    pub destination: u32,
    /// The size, in bytes.
    pub bytes: u64,
    /// What each engine takes.
    pub costs: Vec<Cost>,
}

impl Measured {
    /// The one to use: of those that are as fast as any, the one that comes first, which takes least away from others.
    pub fn best(&self) -> Id {
        let mut best = Cost { engine: Id::CPU, nanoseconds: u64::MAX };
        for cost in &self.costs {
            if (cost.nanoseconds as f64) < best.nanoseconds as f64 * WORTHWHILE {
                best = *cost;
            }
        }
        best.engine
    }
}

/// A way from node to node: a row of the table for each size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route(u16);

/// Who decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chosen {
    /// The measurement at start.
    Measured,
    /// Trials since.
    Tried,
    /// The configuration.
    Configured,
}

/// A row as people see it.
#[derive(Debug, Clone)]
pub struct Row<'a> {
    /// What was measured.
    pub measured: &'a Measured,
    /// What is used.
    pub engine: Id,
    /// Why.
    pub chosen: Chosen,
    /// Its number.
    pub number: usize,
}

/// The table.
#[derive(Debug)]
pub struct Table {
    nodes: Vec<NodeId>,
    engines: Vec<Id>,
    measured: Vec<Measured>,
    /// By row: a place in `engines`. Movers change it.
    choices: Vec<AtomicU8>,
    /// By row that was measured: who decided at start.
    chosen: Vec<Chosen>,
}

impl Table {
    /// The table of a host with these nodes and engines, of which the first is the CPU that asks; `measured` has a row for
    /// each source, destination and size, in this order.
    pub fn new(nodes: Vec<NodeId>, engines: Vec<Id>, measured: Vec<Measured>, rules: &[Rule]) -> Table {
        let mut table =
            Table { nodes, engines, measured: Vec::new(), choices: Vec::new(), chosen: Vec::new() };
        for row in measured {
            let rule =
                rules.iter().filter(|rule| rule.at_least <= row.bytes).max_by_key(|rule| rule.at_least);
            let configured = rule.and_then(|rule| table.find(rule.kind, &row));
            let choice = configured.or_else(|| table.position(row.best())).unwrap_or(0);
            table.choices.push(AtomicU8::new(choice as u8));
            table.chosen.push(if configured.is_some() { Chosen::Configured } else { Chosen::Measured });
            table.measured.push(row);
        }
        // Of a source or a destination whose node nobody knows: the CPU that asks.
        table.choices.extend([const { AtomicU8::new(0) }; CLASSES]);
        table
    }

    /// The engine of this kind that is nearest.
    fn find(&self, kind: Kind, row: &Measured) -> Option<usize> {
        let at = |node: Option<u32>| self.position(Id { kind, node });
        at(Some(row.destination)).or_else(|| at(Some(row.source))).or_else(|| at(None))
    }

    fn position(&self, engine: Id) -> Option<usize> {
        self.engines.iter().position(|id| *id == engine)
    }

    /// The engine of this kind that is nearest to what a row is about.
    pub fn nearest(&self, kind: Kind, row: usize) -> Option<usize> {
        self.find(kind, self.measured.get(row)?)
    }

    /// Number of rows, that of unknown nodes included.
    pub fn rows(&self) -> usize {
        self.choices.len()
    }

    /// The engines.
    pub fn engines(&self) -> &[Id] {
        &self.engines
    }

    /// The way between two nodes. A node that is not known counts as the other one.
    #[inline]
    pub fn route(&self, source: Option<NodeId>, destination: Option<NodeId>) -> Route {
        let count = self.nodes.len();
        if count <= 1 {
            return Route(0);
        }
        let place = |node: Option<NodeId>| self.nodes.iter().position(|n| Some(*n) == node);
        let number = match (place(source.or(destination)), place(destination.or(source))) {
            (Some(source), Some(destination)) => source * count + destination,
            _ => count * count,
        };
        Route(number as u16)
    }

    /// The row for a copy of so many bytes.
    #[inline]
    pub fn row(&self, route: Route, len: usize) -> usize {
        usize::from(route.0) * CLASSES + class_of(len)
    }

    /// Which engine a row names: a place in [`engines`](Self::engines).
    #[inline]
    pub fn choice(&self, row: usize) -> usize {
        usize::from(self.choices[row].load(Ordering::Relaxed))
    }

    /// Whether trials have a say in a row.
    #[inline]
    pub fn is_open(&self, row: usize) -> bool {
        self.engines.len() > 1 && self.chosen.get(row) == Some(&Chosen::Measured)
    }

    /// Names another engine for a row: trials showed that it is faster.
    pub fn choose(&self, row: usize, engine: usize) {
        self.choices[row].store(engine as u8, Ordering::Relaxed);
    }

    /// What was measured.
    pub fn measured(&self) -> &[Measured] {
        &self.measured
    }

    /// The rows, for people.
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        self.measured.iter().enumerate().map(|(number, measured)| Row {
            measured,
            engine: self.engines[self.choice(number)],
            chosen: match self.chosen[number] {
                Chosen::Measured if self.engines[self.choice(number)] != measured.best() => Chosen::Tried,
                chosen => chosen,
            },
            number,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(number: u32) -> NodeId {
        NodeId::new(number).unwrap()
    }

    fn measured(nodes: &[u32], cost: impl Fn(u32, u32, usize, Id) -> u64, engines: &[Id]) -> Vec<Measured> {
        let mut all = Vec::new();
        for (source, destination) in nodes.iter().flat_map(|a| nodes.iter().map(move |b| (*a, *b))) {
            for class in 0..CLASSES {
                let costs = engines.iter().map(|engine| Cost {
                    engine: *engine,
                    nanoseconds: cost(source, destination, class, *engine),
                });
                let bytes = class_bytes(class) as u64;
                all.push(Measured { source, destination, bytes, costs: costs.collect() });
            }
        }
        all
    }

    #[test]
    fn every_size_has_the_class_that_is_nearest() {
        let classes = [0, 1, 64, 127, 128, 256, 511, 512, 1024, 16 << 10, 32 << 10, 1 << 20, 16 << 20];
        assert_eq!(classes.map(class_of), [0, 0, 0, 0, 1, 1, 1, 2, 2, 4, 5, 7, 9]);
        for class in 0..CLASSES {
            assert_eq!(class_of(class_bytes(class)), class);
        }
    }

    #[test]
    fn the_faster_engine_is_chosen_and_the_cheaper_one_if_they_are_equal() {
        let far = Id::of_node(Kind::CpuNode, node(0));
        let rows = measured(
            &[0],
            |_, _, class, engine| match (engine.kind, class) {
                (Kind::Cpu, _) => 1000,
                (_, 7) => 500,
                (_, 6) => 975,
                _ => 4000,
            },
            &[Id::CPU, far],
        );
        let table = Table::new(vec![node(0)], vec![Id::CPU, far], rows, &[]);
        let choices: Vec<usize> = (0..CLASSES)
            .map(|class| table.choice(table.row(table.route(None, None), class_bytes(class))))
            .collect();
        assert_eq!(choices, [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
    }

    #[test]
    fn the_configuration_overrides_the_measurement_by_size() {
        let far = Id::of_node(Kind::CpuNode, node(0));
        let rows = measured(&[0], |_, _, _, engine| if engine == Id::CPU { 1 } else { 100 }, &[Id::CPU, far]);
        let rules = [
            Rule { at_least: 16 << 10, kind: Kind::CpuNode },
            Rule { at_least: 1 << 20, kind: Kind::Cpu },
            // There is none, so the measurement counts.
            Rule { at_least: 256 << 10, kind: Kind::Dsa },
        ];
        let table = Table::new(vec![node(0)], vec![Id::CPU, far], rows, &rules);
        let rows: Vec<_> = table.iter().map(|row| (row.engine.to_string(), row.chosen)).collect();
        assert_eq!(rows[3], ("cpu".into(), Chosen::Measured));
        assert_eq!(rows[4], ("cpu-node.0".into(), Chosen::Configured));
        assert_eq!(rows[6], ("cpu".into(), Chosen::Measured));
        assert_eq!(rows[7], ("cpu".into(), Chosen::Configured));
    }

    #[test]
    fn each_pair_of_nodes_has_a_way_of_its_own() {
        let engines = [Id::CPU, Id::of_node(Kind::CpuNode, node(0)), Id::of_node(Kind::CpuNode, node(3))];
        // Best is who is at the destination.
        let cost = |_, destination, _, engine: Id| match engine.node {
            Some(node) if node == destination => 10,
            Some(_) => 30,
            None => 20,
        };
        let rows = measured(&[0, 3], cost, &engines);
        let table = Table::new(vec![node(0), node(3)], engines.to_vec(), rows, &[]);
        let choice = |from, to| table.choice(table.row(table.route(from, to), 4096));
        let (a, b) = (Some(node(0)), Some(node(3)));
        assert_eq!((choice(a, a), choice(a, b), choice(b, a), choice(b, b)), (1, 2, 1, 2));
        assert_eq!((choice(None, b), choice(a, None)), (2, 1));
        assert_eq!((choice(None, None), choice(Some(node(9)), a)), (0, 0));
    }
}
