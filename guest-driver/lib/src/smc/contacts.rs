//! Link groups and what their connections share: buffers that are used again, and the peer's buffers that stay attached.
//! So the second connection between two devices needs no command of either.

use super::{Settings, SmcStats};
use crate::device::Device;
use crate::dmb::{Dmb, RemoteDmb};
use crate::error::Error;
use crate::fork::Process;
use crate::proto::ids::{Gid, Token};
use crate::proto::status::Status;
use crate::stream::{DmbStream, Moved, Receiver, Remote, Sender, cdc};
use crate::sync::lock;
use dmbridge_proto::smc::buffer::{Advice, Size, Usage};
use dmbridge_proto::smc::cdc::StateFlags;
use dmbridge_proto::smc::clc::{
    AcceptConfirm, Eid, FirstContact, GidChid, List, Proposal, Reason, SmcdV2Ids,
};
use dmbridge_proto::smc::linkgroup::{LinkGroups, LinkId, Membership};
use dmbridge_proto::smc::negotiation::{Choice, LocalDevice, Offer};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Buffers of a link group that wait for another connection: no more of them than this.
const MOST_IDLE: usize = 64;
/// And no more bytes.
const MOST_IDLE_BYTES: usize = 64 << 20;
/// Buffers of a link group whose peer has not said its last word: beyond this many the oldest are given up.
const MOST_CLOSING: usize = 64;

/// Connections between two devices whose handshake is under way: no more of them than this, so that a peer that begins and never
/// ends leaves buffers for others.
const MOST_UNCONFIRMED: usize = 128;
/// How long a group has no connections before a server ends it. Linux's servers wait as long, and its clients ten seconds longer, so
/// that no client finds a server that believes in a group which is gone.
const UNUSED: Duration = Duration::from_secs(600);
/// How long a kernel is waited for that has not closed its end, before this side's device goes.
const LINGER: Duration = Duration::from_secs(10);
/// How often to ask again for a place in the window that is taken.
const PLACE_ATTEMPTS: u32 = 8;

/// See the module.
pub(crate) struct Contacts {
    offer: Offer,
    devices: Vec<Device>,
    settings: Settings,
    state: Mutex<State>,
    /// A proposal was answered.
    answered: Condvar,
    process: Process,
    counters: Counters,
}

#[derive(Default)]
struct State {
    groups: LinkGroups,
    /// Proposals that were not answered yet.
    unanswered: usize,
    pools: HashMap<LinkId, Pool>,
}

#[derive(Default)]
struct Counters {
    connections: AtomicU64,
    fallbacks: AtomicU64,
    made: AtomicU64,
    reused: AtomicU64,
}

/// What the connections of a link group share.
struct Pool {
    advice: Advice,
    /// When a connection ended last, or began.
    used: Instant,
    /// Leases whose connection is not there yet.
    unconfirmed: usize,
    /// Free for the next connection.
    idle: Vec<Rmb>,
    /// This side has closed; the peer may still write.
    closing: Vec<Rmb>,
    /// The peer's buffers, as long as it has them registered.
    attached: HashMap<Token, Arc<RemoteDmb>>,
}

/// A buffer of this side.
#[derive(Clone)]
struct Rmb {
    dmb: Arc<Dmb>,
    size: Size,
}

impl Rmb {
    /// Whether the peer has said its last word, after which it writes no more.
    fn is_free(&self) -> bool {
        let last = StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT;
        cdc(self.dmb.memory()).load_cons().state.intersects(last)
    }
}

impl Pool {
    /// Moves buffers that became free to the idle ones, and what is of no use to `garbage`: releasing takes commands, for
    /// which the lock is not to be held. Whether the peer's device is gone, as far as its buffers can tell.
    fn tidy(&mut self, garbage: &mut Garbage) -> bool {
        let before = garbage.rmbs.len();
        for rmbs in [&mut self.idle, &mut self.closing] {
            garbage.rmbs.extend(rmbs.extract_if(.., |rmb| rmb.dmb.is_peer_gone()));
        }
        let is_gone = garbage.rmbs.len() != before;
        self.idle.extend(self.closing.extract_if(.., |rmb| rmb.is_free()));
        let excess = self.closing.len().saturating_sub(MOST_CLOSING);
        garbage.rmbs.extend(self.closing.drain(..excess));
        let mut bytes: usize = self.idle.iter().map(|rmb| rmb.size.bytes()).sum();
        while self.idle.len() > MOST_IDLE || bytes > MOST_IDLE_BYTES {
            let rmb = self.idle.remove(0);
            bytes -= rmb.size.bytes();
            garbage.rmbs.push(rmb);
        }
        garbage.attached.extend(self.attached.extract_if(|_, dmb| !dmb.is_registered()).map(|(_, dmb)| dmb));
        is_gone
    }
}

impl State {
    /// Ends groups that had no connection for long.
    fn end_unused(&mut self) {
        let State { groups, pools, .. } = self;
        for (group, pool) in pools {
            if groups.connections(*group) == 0 && pool.used.elapsed() >= UNUSED {
                groups.end(*group);
            }
        }
    }

    /// Moves everything that is of no use any more to `garbage`. What belongs to a peer that is gone is in the way: it keeps
    /// its place in the window, where the device may want to put something new.
    fn tidy(&mut self, garbage: &mut Garbage) {
        let State { groups, pools, .. } = self;
        pools.retain(|group, pool| {
            if pool.tidy(garbage) {
                groups.end(*group);
            }
            let keep = groups.contains(*group);
            if !keep {
                garbage.rmbs.append(&mut pool.idle);
                garbage.rmbs.append(&mut pool.closing);
                garbage.attached.extend(pool.attached.drain().map(|(_, dmb)| dmb));
            }
            keep
        });
    }
}

/// What is to be released when no lock is held.
#[derive(Default)]
struct Garbage {
    rmbs: Vec<Rmb>,
    attached: Vec<Arc<RemoteDmb>>,
}

/// A connection's buffer and its place in a link group, given back when it is dropped.
pub(crate) struct Lease {
    contacts: Arc<Contacts>,
    group: LinkId,
    rmb: Rmb,
    /// What the connection did, if there was one.
    pub(crate) usage: Option<Usage>,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.contacts.give_back(self);
    }
}

/// A connection over SMC.
pub(crate) struct Link {
    pub(crate) sender: Sender,
    pub(crate) receiver: Receiver,
    pub(crate) lease: Lease,
}

/// A proposal that was not answered yet.
pub(crate) struct Unanswered {
    contacts: Arc<Contacts>,
    counts: bool,
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if self.counts {
            lock(&self.contacts.state).unanswered -= 1;
            self.contacts.answered.notify_all();
        }
    }
}

/// A server's half of a connection: the client has not confirmed yet.
pub(crate) struct Accepted {
    choice: Choice,
    lease: Lease,
}

impl Contacts {
    pub(crate) fn new(devices: Vec<Device>, eids: &[Eid], settings: Settings) -> Contacts {
        let local = |device: &Device| {
            let config = device.config();
            let id = GidChid { gid: device.gid().as_u64()?, chid: config.fabric_id.get() };
            Some(LocalDevice { id, system_eid: Some(Eid(config.system_eid)) })
        };
        // SMC-D as of Linux 6.1 knows 64-bit GIDs only.
        let devices: Vec<_> = devices.into_iter().filter(|device| local(device).is_some()).collect();
        // Linux has no system EID on x86. What its guests are given instead is made from their host's.
        let hosts = devices.iter().map(|device| Eid::of_host(&device.config().system_eid));
        let mut eids = eids.to_vec();
        for eid in hosts {
            if !eids.contains(&eid) {
                eids.push(eid);
            }
        }
        Contacts {
            offer: Offer {
                devices: List::first_of(devices.iter().filter_map(local)),
                eids: List::first_of(eids),
            },
            devices,
            settings,
            state: Mutex::default(),
            answered: Condvar::new(),
            process: Process::current(),
            counters: Counters::default(),
        }
    }

    pub(crate) fn devices(&self) -> &[Device] {
        &self.devices
    }

    pub(crate) fn handshake_timeout(&self) -> Duration {
        self.settings.handshake
    }

    pub(crate) fn first_word(&self) -> Duration {
        self.settings.first_word
    }

    /// Whether this process connected the devices; a fork's child can only speak TCP.
    pub(crate) fn is_ours(&self) -> bool {
        self.process.is_current()
    }

    pub(crate) fn stats(&self) -> SmcStats {
        let Counters { connections, fallbacks, made, reused } = &self.counters;
        let [connections, fallbacks, buffers_made, buffers_reused] =
            [connections, fallbacks, made, reused].map(|n| n.load(Ordering::Relaxed));
        SmcStats { connections, fallbacks, buffers_made, buffers_reused }
    }

    pub(crate) fn count_fallback(&self) {
        self.counters.fallbacks.fetch_add(1, Ordering::Relaxed);
    }

    /// Client: what to propose, and what the answer has to be handed in with.
    pub(crate) fn propose(self: &Arc<Self>) -> Result<(Proposal, Unanswered), Reason> {
        if !self.is_ours() || !self.devices.iter().any(Device::is_connected) {
            return Err(Reason::NO_SMCD_DEVICE);
        }
        let proposal = self.offer.proposal()?;
        lock(&self.state).unanswered += 1;
        Ok((proposal, Unanswered { contacts: self.clone(), counts: true }))
    }

    /// Client: joins the link group that the server means. If there is none, it may be that another connection is about to
    /// begin it, whose answer was sent earlier and is looked at later.
    fn join(&self, choice: &Choice, first_contact: bool, mut proposal: Unanswered) -> Membership {
        let deadline = super::after(self.settings.handshake);
        let mut state = lock(&self.state);
        state.unanswered -= 1;
        proposal.counts = false;
        loop {
            let joined = state.groups.join_as_client(choice.device, choice.peer, first_contact);
            let left = deadline.map_or(Duration::MAX, |d| d.saturating_duration_since(Instant::now()));
            if joined.is_some() || state.unanswered == 0 || left.is_zero() {
                self.answered.notify_all();
                return joined.unwrap_or_else(|| state.groups.join_unknown(choice.device, choice.peer));
            }
            let waited = self.answered.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Client: goes along with what the server accepted.
    pub(crate) fn confirm(
        self: &Arc<Self>,
        accept: &AcceptConfirm,
        proposal: Unanswered,
    ) -> Result<(AcceptConfirm, Link), Reason> {
        let choice = self.offer.accepted(accept)?;
        let member = self.join(&choice, accept.first_contact, proposal);
        let lease = self.lease(&choice, member)?;
        let confirm = self.message(&choice, member, &lease);
        let link = self.link(&choice, lease, accept)?;
        Ok((confirm, link))
    }

    /// Server: what to accept of a proposal.
    pub(crate) fn accept(self: &Arc<Self>, proposal: &Proposal) -> Result<(AcceptConfirm, Accepted), Reason> {
        if !self.is_ours() {
            return Err(Reason::NO_SMCD_DEVICE);
        }
        let reaches = |device: usize, gid: u64| self.reaches(device, gid);
        // That the fabric reaches the client's device proves more than that it is in one of our subnets.
        let choice = self.offer.choose(proposal, reaches, || true)?;
        let member = {
            let mut state = lock(&self.state);
            state.end_unused();
            state.groups.join_as_server(choice.device, choice.peer)
        };
        let lease = self.lease(&choice, member)?;
        Ok((self.message(&choice, member, &lease), Accepted { choice, lease }))
    }

    /// Server: the client has confirmed.
    pub(crate) fn confirmed(
        self: &Arc<Self>,
        accepted: Accepted,
        confirm: &AcceptConfirm,
    ) -> Result<Link, Reason> {
        let Accepted { choice, lease } = accepted;
        if confirm.gid != choice.peer || confirm.element != 0 {
            return Err(Reason::CONFIGURATION);
        }
        self.link(&choice, lease, confirm)
    }

    /// Server: the client declined what was accepted.
    pub(crate) fn declined(&self, accepted: Accepted, out_of_sync: bool) {
        if out_of_sync {
            lock(&self.state).groups.end(accepted.lease.group);
        }
    }

    fn reaches(&self, device: usize, gid: u64) -> bool {
        if lock(&self.state).groups.has_contact(device, gid) {
            return true;
        }
        let peer = self.devices.get(device).map(|device| device.query(Gid::from_u64(gid)));
        matches!(peer, Some(Ok(Some(_))))
    }

    fn message(&self, choice: &Choice, member: Membership, lease: &Lease) -> AcceptConfirm {
        let local = &self.offer.devices[choice.device];
        let first_contact = member.first_contact.then(|| FirstContact::linux(&host_name()));
        AcceptConfirm {
            gid: local.id.gid,
            token: lease.rmb.dmb.token().to_bits(),
            element: 0,
            size: lease.rmb.size.compressed(),
            link_id: member.group.to_bytes(),
            first_contact: member.first_contact,
            v2: choice.eid.map(|eid| SmcdV2Ids { chid: local.id.chid, eid, first_contact }),
        }
    }

    /// A buffer for a connection: one that another has left, or a new one.
    fn lease(self: &Arc<Self>, choice: &Choice, member: Membership) -> Result<Lease, Reason> {
        let mut garbage = Garbage::default();
        let mut state = lock(&self.state);
        state.tidy(&mut garbage);
        let Settings { smallest, first, largest, .. } = self.settings;
        let pool = state.pools.entry(member.group).or_insert_with(|| Pool {
            advice: Advice::new(smallest, first, largest),
            used: Instant::now(),
            unconfirmed: 0,
            idle: Vec::new(),
            closing: Vec::new(),
            attached: HashMap::new(),
        });
        if pool.unconfirmed >= MOST_UNCONFIRMED {
            state.groups.leave(member.group);
            return Err(Reason::MAX_DMBS);
        }
        pool.unconfirmed += 1;
        let size = pool.advice.next();
        // The smallest that is large enough: what is there already costs less than a smaller one would.
        let enough = pool.idle.iter().enumerate().filter(|(_, rmb)| rmb.size >= size);
        let found = enough.min_by_key(|(_, rmb)| rmb.size).map(|(i, _)| i).map(|i| pool.idle.swap_remove(i));
        drop(state);
        drop(garbage);
        let rmb = match found {
            Some(rmb) => {
                self.counters.reused.fetch_add(1, Ordering::Relaxed);
                Ok(rmb)
            }
            None => self.register(choice, size),
        };
        match rmb {
            Ok(rmb) => {
                cdc(rmb.dmb.memory()).clear();
                Ok(Lease { contacts: self.clone(), group: member.group, rmb, usage: None })
            }
            Err(reason) => {
                let mut state = lock(&self.state);
                if let Some(pool) = state.pools.get_mut(&member.group) {
                    pool.unconfirmed -= 1;
                }
                state.groups.leave(member.group);
                if member.first_contact {
                    // The peer was never told of it.
                    state.groups.end(member.group);
                }
                Err(reason)
            }
        }
    }

    /// Registers a buffer, smaller than wished if need be.
    fn register(&self, choice: &Choice, size: Size) -> Result<Rmb, Reason> {
        let device = &self.devices[choice.device];
        let mut trimmed = false;
        let mut next = Some(size);
        while let Some(size) = next {
            let peer = Gid::from_u64(choice.peer);
            // In this process's own memory, which the peer cannot map, if it has to be.
            let anywhere = trimmed || !device.can_map();
            let register = || match anywhere {
                true => device.register(peer, size.bytes()),
                false => device.register_in_pool(peer, size.bytes()),
            };
            match self.with_a_place(register) {
                Ok(dmb) => {
                    self.counters.made.fetch_add(1, Ordering::Relaxed);
                    return Ok(Rmb { dmb: Arc::new(dmb), size });
                }
                Err(Error::Refused { status: Status::NoEntry, .. }) => return Err(Reason::NO_SMCD_DEVICE),
                Err(Error::Refused { .. }) if !trimmed => {
                    // What other link groups have no use for now may be what is missing here.
                    trimmed = true;
                    self.trim();
                }
                Err(Error::Refused { status, .. }) => {
                    tracing::debug!("a buffer of {} bytes: {status}", size.bytes());
                    next = size.smaller();
                }
                Err(error) => {
                    tracing::debug!("a buffer of {} bytes: {error}", size.bytes());
                    return Err(Reason::NO_MEMORY);
                }
            }
        }
        Err(Reason::MAX_DMBS)
    }

    /// Asks the device for something that needs a place in the window. If it finds the place taken, it is by what is of no use any
    /// more: that this is so may be news that arrives just now.
    fn with_a_place<T>(&self, ask: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        let mut attempts = 0;
        loop {
            match ask() {
                Err(Error::Refused { status: Status::Io, .. }) if attempts < PLACE_ATTEMPTS => {
                    attempts += 1;
                    let mut garbage = Garbage::default();
                    lock(&self.state).tidy(&mut garbage);
                    drop(garbage);
                    std::thread::yield_now();
                }
                result => return result,
            }
        }
    }

    /// Releases every buffer that no connection uses.
    fn trim(&self) {
        let mut garbage = Garbage::default();
        for pool in lock(&self.state).pools.values_mut() {
            pool.tidy(&mut garbage);
            garbage.rmbs.append(&mut pool.idle);
        }
    }

    /// The peer's buffer, to write there.
    fn remote(&self, choice: &Choice, group: LinkId, theirs: &AcceptConfirm) -> Result<Remote, Reason> {
        let device = &self.devices[choice.device];
        let (token, size) = (Token::from_bits(theirs.token), Size::from_compressed(theirs.size).bytes());
        let known = |pool: &Pool| pool.attached.get(&token).filter(|dmb| dmb.is_registered()).cloned();
        let mut dmb = lock(&self.state).pools.get(&group).and_then(known);
        if dmb.is_none() {
            // One of the same name that has ended is let go of first.
            let ended = lock(&self.state).pools.get_mut(&group).and_then(|pool| pool.attached.remove(&token));
            drop(ended);
            dmb = match self.with_a_place(|| device.attach(token)) {
                Ok(dmb) => Some(Arc::new(dmb)),
                // One of the two cannot map, or there is no room to.
                Err(Error::Refused {
                    status: Status::NotSupported | Status::NoSpace | Status::Io, ..
                }) => None,
                Err(error) => return Err(unreachable_buffer(&error)),
            };
            if let (Some(dmb), Some(pool)) = (&dmb, lock(&self.state).pools.get_mut(&group)) {
                pool.attached.insert(token, dmb.clone());
            }
        }
        match dmb {
            Some(dmb) if dmb.owner() != Gid::from_u64(choice.peer) || dmb.size() != size => {
                Err(Reason::CONFIGURATION)
            }
            Some(dmb) => Ok(Remote::Map(dmb)),
            None => {
                let mover = device.mover(token).map_err(|error| unreachable_buffer(&error))?;
                Ok(Remote::Move(Moved::new(mover, size)))
            }
        }
    }

    /// Both buffers are known: the connection is there.
    fn link(&self, choice: &Choice, lease: Lease, theirs: &AcceptConfirm) -> Result<Link, Reason> {
        let remote = self.remote(choice, lease.group, theirs)?;
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = DmbStream::over(lease.rmb.dmb.clone(), remote).split();
        let mut lease = lease;
        lease.usage = Some(Usage::default());
        if let Some(pool) = lock(&self.state).pools.get_mut(&lease.group) {
            pool.unconfirmed -= 1;
        }
        Ok(Link { sender, receiver, lease })
    }

    fn give_back(&self, lease: &Lease) {
        if !self.is_ours() {
            return;
        }
        let mut garbage = Garbage::default();
        let mut state = lock(&self.state);
        if lease.rmb.dmb.is_peer_gone() {
            state.groups.end(lease.group);
        }
        state.groups.leave(lease.group);
        if let Some(pool) = state.pools.get_mut(&lease.group) {
            pool.used = Instant::now();
        }
        match (lease.usage, state.pools.get_mut(&lease.group)) {
            (Some(usage), Some(pool)) => {
                pool.advice.learn(lease.rmb.size, usage);
                pool.closing.push(lease.rmb.clone());
                pool.tidy(&mut garbage);
            }
            // The peer, which never confirmed, may or may not believe that it may write there.
            (None, Some(pool)) => {
                pool.unconfirmed -= 1;
                garbage.rmbs.push(lease.rmb.clone());
            }
            (_, None) => garbage.rmbs.push(lease.rmb.clone()),
        }
        drop(state);
    }
}

impl Drop for Contacts {
    fn drop(&mut self) {
        if !self.process.is_current() {
            return;
        }
        // A kernel ends its connections with this side's device, and what its program has not read then is lost.
        let deadline = super::after(LINGER);
        let pools = &self.state.get_mut().unwrap_or_else(PoisonError::into_inner).pools;
        for rmb in pools.values().flat_map(|pool| &pool.closing) {
            if !cdc(rmb.dmb.memory()).reads_on() {
                let _ = rmb.dmb.wait_until(deadline, || rmb.is_free());
            }
        }
    }
}

fn unreachable_buffer(error: &Error) -> Reason {
    tracing::debug!("the peer's buffer: {error}");
    Reason::NO_SMCD_DEVICE
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map(|name| name.trim().to_owned())
        .unwrap_or_default()
}
