//! On which NUMA node an extent's pages are to lie: the setting, where owner and peer are, and what follows from both.
//!
//! Not the copying: which node's CPU moves bytes is a question for the engines. On a host with one node nothing here asks
//! or tells the kernel anything.

pub mod locate;
pub mod pages;

use crate::engine::table::Kind;
use crate::topology::{NodeId, Topology};
use locate::Whereabouts;
use pages::Policy;
use std::fmt;

/// Where the pages of an extent are to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// On the node of the device that owns the extent, which reads it.
    #[default]
    Receiver,
    /// On the node of the device that writes it.
    Sender,
    /// On all nodes in turn.
    Interleave,
    /// On this node.
    Node(NodeId),
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Placement::Receiver => f.write_str("receiver"),
            Placement::Sender => f.write_str("sender"),
            Placement::Interleave => f.write_str("interleave"),
            Placement::Node(node) => node.fmt(f),
        }
    }
}

/// What is configured of one device's place, and of who copies from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NumaSettings {
    /// Its node; learned if none is given.
    pub node: Option<NodeId>,
    /// Where extents that it owns are to lie; as in the pool's settings if nothing is given.
    pub placement: Option<Placement>,
    /// What copies its moves, if there is such an engine; what is fastest if nothing is given.
    pub engine: Option<Kind>,
}

impl Placement {
    /// The policy for an extent between these two. Where nobody knows a node, whoever touches a page first decides.
    pub fn policy(
        self,
        topology: &Topology,
        owner: Option<Whereabouts>,
        peer: Option<Whereabouts>,
    ) -> Policy {
        if topology.is_single() {
            return Policy::FirstTouch;
        }
        let node = match self {
            Placement::Receiver => owner.map(|at| at.node),
            Placement::Sender => peer.map(|at| at.node),
            Placement::Node(node) => Some(node),
            Placement::Interleave => return Policy::Interleave(topology.with_memory().collect()),
        };
        node.and_then(|node| topology.memory_near(node)).map_or(Policy::FirstTouch, Policy::Prefer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::host;
    use locate::Source;

    fn node(number: u32) -> NodeId {
        NodeId::new(number).unwrap()
    }

    fn at(number: u32) -> Option<Whereabouts> {
        Some(Whereabouts { node: node(number), source: Source::Memory })
    }

    #[test]
    fn each_placement_names_its_node() {
        let host = host(&[("0", 4096, "10 20"), ("1", 4096, "20 10")]);
        let policy = |placement: Placement| placement.policy(&host, at(0), at(1));
        assert_eq!(policy(Placement::Receiver), Policy::Prefer(node(0)));
        assert_eq!(policy(Placement::Sender), Policy::Prefer(node(1)));
        assert_eq!(policy(Placement::Node(node(1))), Policy::Prefer(node(1)));
        assert_eq!(policy(Placement::Interleave), Policy::Interleave(vec![node(0), node(1)]));
    }

    #[test]
    fn what_nobody_knows_is_left_to_the_first_touch() {
        let host = host(&[("0", 4096, "10 20"), ("1", 4096, "20 10")]);
        assert_eq!(Placement::Receiver.policy(&host, None, at(1)), Policy::FirstTouch);
        assert_eq!(Placement::Sender.policy(&host, at(1), None), Policy::FirstTouch);
        assert_eq!(Placement::Node(node(7)).policy(&host, at(0), at(0)), Policy::FirstTouch);
    }

    #[test]
    fn a_node_without_memory_stands_for_the_nearest_with_some() {
        let host = host(&[("0", 0, "10 20"), ("1", 4096, "20 10")]);
        assert_eq!(Placement::Receiver.policy(&host, at(0), None), Policy::Prefer(node(1)));
        assert_eq!(Placement::Interleave.policy(&host, None, None), Policy::Interleave(vec![node(1)]));
    }

    #[test]
    fn one_node_leaves_nothing_to_place() {
        let host = host(&[("0-3", 4096, "10")]);
        for placement in [Placement::Receiver, Placement::Interleave, Placement::Node(node(0))] {
            assert_eq!(placement.policy(&host, at(0), at(0)), Policy::FirstTouch);
        }
    }
}
