//! A handshake in which each end's messages are the other's input, mutated: nobody chooses what it does not have.
#![no_main]

use arbitrary::Arbitrary;
use dmbridge_proto::smc::clc::{Eid, GidChid, List, Message};
use dmbridge_proto::smc::linkgroup::LinkGroups;
use dmbridge_proto::smc::negotiation::{LocalDevice, Offer};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    ours: Vec<(u64, u8, bool)>,
    eids: Vec<u8>,
    messages: Vec<Vec<u8>>,
    reachable: u8,
}

fuzz_target!(|input: Input| {
    let device = |&(gid, chid, system): &(u64, u8, bool)| LocalDevice {
        id: GidChid { gid, chid: chid.into() },
        system_eid: system.then_some(Eid([b'S'; 32])),
    };
    let offer = Offer {
        devices: List::first_of(input.ours.iter().map(device)),
        eids: List::first_of(input.eids.iter().map(|eid| Eid([*eid; 32]))),
    };
    let mut groups = LinkGroups::new();
    for bytes in &input.messages {
        match Message::parse(bytes) {
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
