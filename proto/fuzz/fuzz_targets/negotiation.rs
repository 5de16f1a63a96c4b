//! A handshake in which each end's messages are the other's input, mutated: nobody chooses what it does not have.
#![no_main]

use arbitrary::Arbitrary;
use dmbridge_proto::smc::clc::{AcceptConfirm, Eid, FirstContact, GidChid, List, Message, SmcdV2Ids};
use dmbridge_proto::smc::linkgroup::LinkGroups;
use dmbridge_proto::smc::negotiation::{LocalDevice, Offer};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    ours: Side,
    theirs: Side,
    said: Vec<Said>,
    reachable: u8,
}

#[derive(Arbitrary, Debug)]
struct Side {
    devices: Vec<(u64, u8, bool)>,
    eids: Vec<u8>,
}

/// What the other end says, and which of its bytes are others on the way.
#[derive(Arbitrary, Debug)]
enum Said {
    Proposal(Vec<(u16, u8)>),
    Accept { gid: u64, chid: u8, eid: u8, first_contact: bool, changes: Vec<(u16, u8)> },
    Anything(Vec<u8>),
}

impl Side {
    fn offer(&self) -> Offer {
        let device = |&(gid, chid, system): &(u64, u8, bool)| LocalDevice {
            id: GidChid { gid, chid: chid.into() },
            system_eid: system.then_some(Eid([b'S'; 32])),
        };
        Offer {
            devices: List::first_of(self.devices.iter().map(device)),
            eids: List::first_of(self.eids.iter().map(|eid| Eid([*eid; 32]))),
        }
    }
}

impl Said {
    fn to_bytes(&self, theirs: &Offer) -> Option<Vec<u8>> {
        let (message, changes) = match self {
            Said::Proposal(changes) => (Message::Proposal(theirs.proposal().ok()?), changes),
            Said::Accept { gid, chid, eid, first_contact, changes } => {
                let host = first_contact.then(|| FirstContact::linux("peer"));
                let v2 = SmcdV2Ids { chid: (*chid).into(), eid: Eid([*eid; 32]), first_contact: host };
                let accept = AcceptConfirm {
                    gid: *gid,
                    token: 1,
                    element: 0,
                    size: 2,
                    link_id: [0; 4],
                    first_contact: *first_contact,
                    v2: Some(v2),
                };
                (Message::Accept(accept), changes)
            }
            Said::Anything(bytes) => return Some(bytes.clone()),
        };
        let mut bytes = message.to_bytes().to_vec();
        for (at, value) in changes {
            let len = bytes.len();
            bytes[usize::from(*at) % len] = *value;
        }
        Some(bytes)
    }
}

fuzz_target!(|input: Input| {
    let (offer, theirs) = (input.ours.offer(), input.theirs.offer());
    let mut groups = LinkGroups::new();
    for bytes in input.said.iter().filter_map(|said| said.to_bytes(&theirs)) {
        match Message::parse(&bytes) {
            Ok(Message::Proposal(proposal)) => {
                let reaches = |i: usize, _| input.reachable >> (i % 8) & 1 != 0;
                if let Ok(choice) = offer.choose(&proposal, reaches, || true) {
                    assert!(choice.device < offer.devices.len() && reaches(choice.device, choice.peer));
                    let member = groups.join_as_server(choice.device, choice.peer);
                    assert!(groups.contains(member.group) && groups.connections(member.group) > 0);
                    groups.leave(member.group);
                }
            }
            Ok(Message::Accept(accept)) => {
                if let Ok(choice) = offer.accepted(&accept) {
                    assert!(choice.device < offer.devices.len());
                    let had = groups.has_contact(choice.device, choice.peer);
                    let joined = groups.join_as_client(choice.device, choice.peer, accept.first_contact);
                    let member = joined.unwrap_or_else(|| {
                        assert!(!had && !accept.first_contact);
                        groups.join_unknown(choice.device, choice.peer)
                    });
                    assert_eq!(member.first_contact, accept.first_contact);
                    assert!(groups.connections(member.group) > 0);
                    groups.leave(member.group);
                }
            }
            _ => {}
        }
    }
});
