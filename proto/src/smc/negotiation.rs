//! What a client proposes, what a server chooses, and whether the client can go along (Linux `smc_listen_work`,
//! `__smc_connect`). No I/O: who sends what when is for the caller, and so are the buffers.

use super::clc::{
    AcceptConfirm, Eid, GidChid, List, MAX_DEVICES, MAX_EIDS, Modes, Proposal, Reason, SmcdV2Extension,
    V2Extension, Version,
};

/// A device of this side.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LocalDevice {
    /// Its GID and its fabric.
    pub id: GidChid,
    /// The EID of its host, if it may count.
    pub system_eid: Option<Eid>,
}

/// What this side has, the favourite device first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offer {
    /// The devices, in order of preference.
    pub devices: List<LocalDevice, MAX_DEVICES>,
    /// User-defined EIDs.
    pub eids: List<Eid, MAX_EIDS>,
}

/// What the two sides have agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Which device of this side: an index into [`Offer::devices`].
    pub device: usize,
    /// The other side's device.
    pub peer: u64,
    /// Version 2: the EID that both have. `None`: version 1.
    pub eid: Option<Eid>,
}

impl Choice {
    /// The version that was chosen.
    pub fn version(&self) -> Version {
        if self.eid.is_some() { Version::V2 } else { Version::V1 }
    }
}

impl Offer {
    /// The client's proposal: version 2, SMC-D.
    ///
    /// # Errors
    ///
    /// [`Reason::NO_SMCD_DEVICE`] without a device: there is nothing to propose.
    pub fn proposal(&self) -> Result<Proposal, Reason> {
        let first = self.devices.first().ok_or(Reason::NO_SMCD_DEVICE)?;
        let devices = List::first_of(self.devices.iter().map(|d| d.id));
        let smcd = SmcdV2Extension { system_eid: first.system_eid, devices };
        let v2 = V2Extension { modes: Modes::D, eids: self.eids, smcd: Some(smcd), ..Default::default() };
        Ok(Proposal { version: Version::V2, v1: Modes::Neither, v2: Some(v2), ..Default::default() })
    }

    /// The server's choice among what the client proposes, the client's favourite first. `reaches` says whether a device
    /// of this side, by its index, reaches a GID; `same_subnet`, for version 1, whether the client is in a subnet of
    /// this side.
    ///
    /// # Errors
    ///
    /// Why there is nothing to choose: to be declined with.
    pub fn choose(
        &self,
        proposal: &Proposal,
        mut reaches: impl FnMut(usize, u64) -> bool,
        same_subnet: impl FnOnce() -> bool,
    ) -> Result<Choice, Reason> {
        let reason = match self.choose_v2(proposal, &mut reaches) {
            Ok(choice) => return Ok(choice),
            Err(reason) => reason,
        };
        let Some(device) = proposal.smcd.filter(|_| proposal.v1.has_d()) else { return Err(reason) };
        if !same_subnet() {
            return Err(Reason::PREFIX);
        }
        let choice = (0..self.devices.len()).find(|&i| reaches(i, device.gid));
        let choice = choice.map(|i| Choice { device: i, peer: device.gid, eid: None });
        choice.ok_or(Reason::NO_SMCD_DEVICE)
    }

    fn choose_v2(
        &self,
        proposal: &Proposal,
        reaches: &mut impl FnMut(usize, u64) -> bool,
    ) -> Result<Choice, Reason> {
        if proposal.version == Version::V1 || proposal.v2.is_none() {
            let r_only = !proposal.v1.has_d();
            return Err(if r_only { Reason::MODE } else { Reason::NO_SMCD_DEVICE });
        }
        let v2 = proposal.v2.as_ref().ok_or(Reason::NO_V2_EXTENSION)?;
        if !v2.modes.has_d() {
            return Err(Reason::MODE);
        }
        let smcd = v2.smcd.as_ref().ok_or(Reason::NO_V2_SMCD_EXTENSION)?;
        if v2.eids.is_empty() && smcd.system_eid.is_none() {
            return Err(Reason::NO_UEID);
        }
        let native = proposal.smcd.filter(|device| device.chid != 0);
        let mut reason = Reason::NO_SMCD_V2_DEVICE;
        for proposed in native.iter().chain(&*smcd.devices) {
            for (i, local) in self.devices.iter().enumerate() {
                if local.id.chid != proposed.chid {
                    continue;
                }
                let Some(eid) = self.common_eid(local, smcd.system_eid, &v2.eids) else {
                    reason = Reason::NO_SMCD_DEVICE;
                    continue;
                };
                if reaches(i, proposed.gid) {
                    return Ok(Choice { device: i, peer: proposed.gid, eid: Some(eid) });
                }
            }
        }
        Err(reason)
    }

    /// The system EID if it is the same one, else the client's first user-defined one that this side has, too.
    fn common_eid(&self, local: &LocalDevice, system: Option<Eid>, eids: &[Eid]) -> Option<Eid> {
        match (local.system_eid, system) {
            (Some(ours), Some(theirs)) if ours == theirs => Some(ours),
            _ => eids.iter().copied().find(|eid| self.eids.contains(eid)),
        }
    }

    /// The client's view of what the server chose.
    ///
    /// # Errors
    ///
    /// Why it cannot be: to be declined with.
    pub fn accepted(&self, accept: &AcceptConfirm) -> Result<Choice, Reason> {
        if accept.element != 0 {
            return Err(Reason::CONFIGURATION);
        }
        let Some(v2) = accept.v2 else {
            // Version 1 was not proposed.
            return Err(Reason::MODE);
        };
        let chosen = self.devices.iter().position(|local| local.id.chid == v2.chid);
        let device = chosen.ok_or(Reason::NO_SMCD_V2_DEVICE)?;
        Ok(Choice { device, peer: accept.gid, eid: Some(v2.eid) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smc::clc::{Message, Prefixes, SmcdV2Ids};

    const HOST: Eid = Eid(*b"DMBRIDGE-HOST-EID-00000000001234");

    fn lab() -> Eid {
        Eid::user("LAB").unwrap()
    }

    fn offer(devices: &[(u64, u16)], system: Option<Eid>, eids: &[Eid]) -> Offer {
        let devices =
            devices.iter().map(|&(gid, chid)| LocalDevice { id: GidChid { gid, chid }, system_eid: system });
        Offer { devices: List::first_of(devices), eids: List::first_of(eids.iter().copied()) }
    }

    fn proposal(offer: &Offer) -> Proposal {
        let proposal = Message::Proposal(offer.proposal().unwrap());
        match Message::parse(&proposal.to_bytes()).unwrap() {
            Message::Proposal(proposal) => proposal,
            other => panic!("{other:?}"),
        }
    }

    fn all(_: usize, _: u64) -> bool {
        true
    }

    #[test]
    fn the_clients_favourite_that_both_can_use_is_chosen() {
        let client = offer(&[(1, 30), (2, 20), (3, 10)], Some(HOST), &[]);
        let server = offer(&[(11, 10), (12, 20)], Some(HOST), &[]);
        let choice = server.choose(&proposal(&client), all, || false).unwrap();
        assert_eq!(choice, Choice { device: 1, peer: 2, eid: Some(HOST) });
        let choice = server.choose(&proposal(&client), |_, gid| gid != 2, || false).unwrap();
        assert_eq!(choice, Choice { device: 0, peer: 3, eid: Some(HOST) });
        let none = server.choose(&proposal(&client), |_, _| false, || true);
        assert_eq!(none, Err(Reason::NO_SMCD_V2_DEVICE));
    }

    #[test]
    fn without_a_common_eid_there_is_nothing() {
        let there = Eid(*b"DMBRIDGE-HOST-EID-00000000009999");
        let server = offer(&[(11, 10)], Some(HOST), &[lab()]);
        let device = [(1, 10)];
        let choose = |client: &Offer| server.choose(&proposal(client), all, || true);
        assert_eq!(choose(&offer(&device, Some(there), &[])), Err(Reason::NO_SMCD_DEVICE));
        assert_eq!(choose(&offer(&device, None, &[])), Err(Reason::NO_UEID));
        assert_eq!(choose(&offer(&device, Some(there), &[lab()])).unwrap().eid, Some(lab()));
        assert_eq!(choose(&offer(&device, None, &[Eid([b'X'; 32]), lab()])).unwrap().eid, Some(lab()));
        assert_eq!(choose(&offer(&device, Some(HOST), &[lab()])).unwrap().eid, Some(HOST));
    }

    #[test]
    fn version_1_is_chosen_in_the_same_subnet_where_version_2_is_not_possible() {
        let server = offer(&[(11, 10)], Some(HOST), &[]);
        let v1 = Proposal {
            version: Version::V1,
            v1: Modes::D,
            smcd: Some(GidChid { gid: 5, chid: 0 }),
            prefixes: Some(Prefixes::default()),
            ..Default::default()
        };
        let choice = server.choose(&v1, all, || true).unwrap();
        assert_eq!((choice, choice.version()), (Choice { device: 0, peer: 5, eid: None }, Version::V1));
        assert_eq!(server.choose(&v1, all, || false), Err(Reason::PREFIX));
        assert_eq!(server.choose(&v1, |_, _| false, || true), Err(Reason::NO_SMCD_DEVICE));
        let rdma = Proposal { v1: Modes::R, smcd: None, ..v1 };
        assert_eq!(server.choose(&rdma, all, || true), Err(Reason::MODE));
        // In version 2 the same device has a CHID, so that both ways lead to it.
        let mut both = proposal(&offer(&[(5, 99)], Some(HOST), &[]));
        (both.v1, both.smcd, both.prefixes) = (Modes::D, v1.smcd, v1.prefixes);
        assert_eq!(server.choose(&both, all, || true).unwrap().eid, None);
    }

    #[test]
    fn a_proposal_that_lacks_its_extensions_is_declined_by_name() {
        let server = offer(&[(11, 10)], Some(HOST), &[]);
        let mut p = proposal(&offer(&[(1, 10)], Some(HOST), &[]));
        p.v2.as_mut().unwrap().smcd = None;
        assert_eq!(server.choose(&p, all, || true), Err(Reason::NO_V2_SMCD_EXTENSION));
        p.v2.as_mut().unwrap().modes = Modes::R;
        assert_eq!(server.choose(&p, all, || true), Err(Reason::MODE));
        assert_eq!(offer(&[], None, &[]).proposal(), Err(Reason::NO_SMCD_DEVICE));
        let p = proposal(&offer(&[(1, 10)], Some(HOST), &[]));
        assert_eq!(Offer::default().choose(&p, all, || true), Err(Reason::NO_SMCD_V2_DEVICE));
    }

    #[test]
    fn a_client_goes_along_only_with_what_it_proposed() {
        let client = offer(&[(1, 30), (2, 20)], Some(HOST), &[]);
        let ids = SmcdV2Ids { chid: 20, eid: HOST, first_contact: None };
        let accept = AcceptConfirm {
            gid: 9,
            token: 1,
            element: 0,
            size: 4,
            link_id: [0; 4],
            first_contact: true,
            v2: Some(ids),
        };
        assert_eq!(client.accepted(&accept), Ok(Choice { device: 1, peer: 9, eid: Some(HOST) }));
        let other = AcceptConfirm { v2: Some(SmcdV2Ids { chid: 21, ..ids }), ..accept };
        assert_eq!(client.accepted(&other), Err(Reason::NO_SMCD_V2_DEVICE));
        assert_eq!(client.accepted(&AcceptConfirm { v2: None, ..accept }), Err(Reason::MODE));
        assert_eq!(client.accepted(&AcceptConfirm { element: 1, ..accept }), Err(Reason::CONFIGURATION));
    }
}
