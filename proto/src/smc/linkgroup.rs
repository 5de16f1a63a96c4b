//! Link groups: which two devices have contact, so that further connections between them need no introduction (Linux
//! `smc_conn_create`). Not what they share, such as buffers: that hangs on a group's [`LinkId`] elsewhere.

use alloc::vec::Vec;

/// This side's name for a link group; never used again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct LinkId(u32);

impl LinkId {
    /// As in a CLC message.
    pub const fn to_bytes(self) -> [u8; 4] {
        self.0.to_be_bytes()
    }
}

/// Contact of a device of this side with one of the other side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct LinkGroup {
    id: LinkId,
    device: usize,
    peer: u64,
    connections: usize,
    /// Takes no more connections: the two ends do not agree about it, or the peer is gone.
    ended: bool,
}

/// The link groups of one side.
#[derive(Clone, Default, Debug)]
pub struct LinkGroups {
    last: u32,
    groups: Vec<LinkGroup>,
}

/// A connection's place in a link group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Membership {
    /// The group.
    pub group: LinkId,
    /// Whether the connection began it: to be told to the peer.
    pub first_contact: bool,
}

impl LinkGroups {
    /// None yet.
    pub const fn new() -> LinkGroups {
        LinkGroups { last: 0, groups: Vec::new() }
    }

    /// A server that is about to accept: the connection joins the group of that device and that peer, or begins one.
    pub fn join_as_server(&mut self, device: usize, peer: u64) -> Membership {
        match self.find(device, peer) {
            Some(group) => Membership { group, first_contact: false },
            None => Membership { group: self.begin(device, peer), first_contact: true },
        }
    }

    /// A client that was accepted, at first contact or not as the server says. `None`: the server believes in a group that this
    /// side does not have, see [`join_unknown`](Self::join_unknown).
    pub fn join_as_client(&mut self, device: usize, peer: u64, first_contact: bool) -> Option<Membership> {
        // A server that begins a group has lost the old one, whose last connections may live on.
        if first_contact {
            if let Some(old) = self.groups.iter_mut().find(|g| g.is(device, peer)) {
                old.ended = true;
            }
            self.forget_unused();
            return Some(Membership { group: self.begin(device, peer), first_contact: true });
        }
        Some(Membership { group: self.find(device, peer)?, first_contact: false })
    }

    /// A client whose server believes in a group that this side does not have. Linux's client declines, out of sync; but a group of
    /// SMC-D is nothing that two ends would have to agree about, and the server may have met another program with the same device.
    pub fn join_unknown(&mut self, device: usize, peer: u64) -> Membership {
        Membership { group: self.begin(device, peer), first_contact: false }
    }

    /// A connection of a group has ended, or was declined after all. A group that has none stays, for the next one.
    pub fn leave(&mut self, group: LinkId) {
        if let Some(group) = self.groups.iter_mut().find(|g| g.id == group) {
            group.connections = group.connections.saturating_sub(1);
        }
        self.forget_unused();
    }

    /// The group takes no more connections: the peer declined out of sync, or its device is gone.
    pub fn end(&mut self, group: LinkId) {
        if let Some(group) = self.groups.iter_mut().find(|g| g.id == group) {
            group.ended = true;
        }
        self.forget_unused();
    }

    /// Whether there is such a group; what hangs on one that is not can be let go of.
    pub fn contains(&self, group: LinkId) -> bool {
        self.groups.iter().any(|g| g.id == group)
    }

    /// Whether there is a group of that device and that peer.
    pub fn has_contact(&self, device: usize, peer: u64) -> bool {
        self.groups.iter().any(|g| g.is(device, peer))
    }

    /// Connections of a group.
    pub fn connections(&self, group: LinkId) -> usize {
        self.groups.iter().find(|g| g.id == group).map_or(0, |g| g.connections)
    }

    fn find(&mut self, device: usize, peer: u64) -> Option<LinkId> {
        let group = self.groups.iter_mut().find(|g| g.is(device, peer))?;
        group.connections += 1;
        Some(group.id)
    }

    fn begin(&mut self, device: usize, peer: u64) -> LinkId {
        self.last = self.last.wrapping_add(1);
        let id = LinkId(self.last);
        self.groups.push(LinkGroup { id, device, peer, connections: 1, ended: false });
        id
    }

    fn forget_unused(&mut self) {
        self.groups.retain(|g| !g.ended || g.connections != 0);
    }
}

impl LinkGroup {
    /// Whether a connection between the two can join it.
    fn is(&self, device: usize, peer: u64) -> bool {
        !self.ended && self.device == device && self.peer == peer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_connection_reuses_the_first_ones_group() {
        let (mut server, mut client) = (LinkGroups::new(), LinkGroups::new());
        for first in [true, false, false] {
            let s = server.join_as_server(0, 7);
            assert_eq!(s.first_contact, first);
            let c = client.join_as_client(0, 8, s.first_contact).unwrap();
            assert_eq!(c.first_contact, first);
        }
        assert!(server.join_as_server(1, 7).first_contact, "another device");
        assert!(server.join_as_server(0, 9).first_contact, "another peer");
    }

    #[test]
    fn a_group_stays_without_connections_until_it_is_ended() {
        let mut groups = LinkGroups::new();
        let first = groups.join_as_server(0, 7);
        groups.leave(first.group);
        assert_eq!(groups.connections(first.group), 0);
        assert_eq!(groups.join_as_server(0, 7), Membership { group: first.group, first_contact: false });
        groups.end(first.group);
        assert!(groups.contains(first.group), "a connection is left");
        let second = groups.join_as_server(0, 7);
        assert!(second.first_contact && second.group != first.group);
        groups.leave(first.group);
        assert!(!groups.contains(first.group) && groups.contains(second.group));
    }

    #[test]
    fn a_client_without_the_servers_group_begins_one_of_its_own() {
        let mut client = LinkGroups::new();
        assert_eq!(client.join_as_client(0, 8, false), None);
        let unknown = client.join_unknown(0, 8);
        assert!(!unknown.first_contact);
        assert_eq!(client.join_as_client(0, 8, false), Some(unknown));
        client.leave(unknown.group);
        client.leave(unknown.group);
        let first = client.join_as_client(0, 8, true).unwrap();
        // The server was restarted and knows nothing of it.
        let second = client.join_as_client(0, 8, true).unwrap();
        assert_ne!(first.group, second.group);
        assert_eq!(client.join_as_client(0, 8, false).unwrap().group, second.group);
        assert!(client.contains(first.group));
        client.leave(first.group);
        assert!(!client.contains(first.group));
    }
}
