//! The fabric without a front-end: every answer of a command, every life of an extent.

use super::*;
use crate::doorbell;
use crate::frontend::MapOutcome;
use crate::memory::RegionInfo;
use crate::placement::NumaSettings;
use crate::port::{Port, SessionId};
use crate::settings::Limits;
use dmbridge_proto::control::{
    AttachReply, Home, PairFlags, Register, RegisterReply, Reply, Request, Segment, Segments, SignalEvent,
};
use dmbridge_proto::ids::Place as TokenPlace;
use dmbridge_proto::status::Status;
use std::fs::File;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const ABLE: Capabilities =
    Capabilities { map: true, ram: true, futex: false, rendezvous: true, private_line: true };

/// A fabric whose front-ends answer when the test says so.
struct World {
    fabric: Fabric,
    asked: Vec<MapRequest>,
    resumed: Vec<(DeviceId, Attempt)>,
    next_gid: u64,
}

impl World {
    fn new() -> World {
        World::with_pool(PoolSettings { max_bytes: 1 << 30, ..PoolSettings::default() })
    }

    fn with_pool(pool: PoolSettings) -> World {
        World {
            fabric: Fabric::new(pool, Topology::single()),
            asked: Vec::new(),
            resumed: Vec::new(),
            next_gid: 1,
        }
    }

    fn join(&mut self, capabilities: Capabilities) -> DeviceId {
        self.join_with("a", capabilities, Limits::default())
    }

    fn join_with(&mut self, group: &str, capabilities: Capabilities, limits: Limits) -> DeviceId {
        let (doorbell, _inbox) = doorbell::pair().unwrap();
        let port = Arc::new(Port::new(SessionId(self.next_gid), doorbell, None));
        let gid = Gid::from_u64(self.next_gid);
        self.next_gid += 1;
        let numa = NumaSettings::default();
        self.fabric.join(Joining { gid, group: group.into(), limits, capabilities, port, numa, pid: 0 })
    }

    fn gid(&self, id: DeviceId) -> Gid {
        self.fabric.device(id).unwrap().gid
    }

    fn port(&self, id: DeviceId) -> Arc<Port> {
        self.fabric.device(id).unwrap().port.clone()
    }

    fn collect(&mut self) {
        for effect in self.fabric.effects() {
            match effect {
                Effect::Ask(request) => self.asked.push(request),
                Effect::Resume(device, attempt) => self.resumed.push((device, attempt)),
            }
        }
    }

    /// The front-end answers the request that was asked first.
    fn answer(&mut self, done: bool) -> MapRequest {
        self.collect();
        let request = self.asked.remove(0);
        self.fabric.mapped(&MapOutcome { request: request.clone(), done });
        self.collect();
        request
    }

    fn answer_all(&mut self) {
        self.collect();
        while !self.asked.is_empty() {
            self.answer(true);
        }
    }

    /// A command to its end; front-ends do what they are asked.
    fn command(&mut self, id: DeviceId, request: &Request<'_>) -> Result<Reply, Status> {
        let mut attempt = Attempt::First;
        loop {
            let result = self.fabric.execute(id, request, attempt);
            self.collect();
            if let Some(result) = result {
                self.answer_all();
                return result;
            }
            while self.resumed.is_empty() {
                self.answer(true);
            }
            attempt = self.resumed.remove(0).1;
        }
    }

    fn register(&mut self, owner: DeviceId, peer: DeviceId, size: u64) -> Result<RegisterReply, Status> {
        let rgid = self.gid(peer);
        self.register_for(owner, rgid, size, Home::Pool)
    }

    fn register_for(
        &mut self,
        owner: DeviceId,
        rgid: Gid,
        size: u64,
        home: Home<'_>,
    ) -> Result<RegisterReply, Status> {
        match self.command(owner, &Request::Register(Register { rgid, size, home }))? {
            Reply::Register(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    fn attach(&mut self, peer: DeviceId, token: Token) -> Result<AttachReply, Status> {
        match self.command(peer, &Request::Attach(token))? {
            Reply::Attach(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    fn unregister(&mut self, owner: DeviceId, token: Token) -> Result<(), Status> {
        self.command(owner, &Request::Unregister(token)).map(drop)
    }

    fn detach(&mut self, peer: DeviceId, token: Token) -> Result<(), Status> {
        self.command(peer, &Request::Detach(token)).map(drop)
    }

    /// What waits in a device's event queue, which has no buffers here.
    fn events(&self, id: DeviceId) -> Vec<Event> {
        self.port(id).events().take_waiting()
    }

    fn assert_empty(&self) {
        assert_eq!(self.fabric.pool().used(), (0, 0), "the pool is empty");
        assert!(self.fabric.dmbs.is_empty() && self.fabric.extents.is_empty());
    }
}

fn extent_of(token: Token) -> ExtentId {
    match token.place() {
        TokenPlace::Extent { extent, .. } => extent,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_dmb_is_found_at_the_same_place_of_both_windows_extents() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let dmb = world.register(owner, peer, 64 * KIB).unwrap();
    assert_eq!((dmb.index, dmb.size, dmb.flags), (0, 64 * KIB, PairFlags::MAP));
    let [Event::ExtentAdded(owned)] = world.events(owner)[..] else { panic!("one event") };
    let [Event::ExtentAdded(foreign)] = world.events(peer)[..] else { panic!("one event") };
    assert!(owned.owned && !foreign.owned);
    assert_eq!((owned.gid, foreign.gid), (world.gid(peer), world.gid(owner)));
    assert_eq!((owned.extent, foreign.extent), (extent_of(dmb.token), extent_of(dmb.token)));
    let remote = world.attach(peer, dmb.token).unwrap();
    assert_eq!(remote.gid, world.gid(owner));
    assert_eq!(dmb.offset - owned.offset, remote.offset - foreign.offset);
    assert_eq!(dmb.line_offset - owned.offset, remote.line_offset - foreign.offset);
}

#[test]
fn in_a_mapped_extent_nothing_is_asked_of_a_front_end() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let first = world.register(owner, peer, 4 * KIB).unwrap();
    for index in 1..100 {
        let dmb = world.register(owner, peer, 4 * KIB).unwrap();
        assert_eq!(dmb.index, index);
        world.attach(peer, dmb.token).unwrap();
    }
    assert_eq!(world.fabric.usage(owner).unwrap().extents, 1);
    assert_eq!(extent_of(first.token).get(), 1);
}

#[test]
fn the_errors_of_a_registration_come_in_the_order_of_its_table() {
    let mut world = World::new();
    let limits = Limits {
        max_dmb_size: MIB,
        max_dmb_bytes: 2 * MIB,
        max_dmbs: 3,
        window_size: 4 * MIB,
        ..Limits::default()
    };
    let owner = world.join_with("a", ABLE, limits);
    let other = world.join_with("b", ABLE, limits);
    let cannot = world.join_with("a", Capabilities::default(), limits);
    let peer = world.join_with("a", ABLE, limits);
    let nobody = Gid::from_u64(99);

    let segment = [Segment { addr: 0, len: 2 * MIB }.to_bytes()];
    let ram = Home::Ram { line_addr: 0, segments: Segments::from_wire(&segment) };
    // Too big, before anything else is looked at.
    assert_eq!(world.register_for(cannot, nobody, 2 * MIB, Home::Pool), Err(Status::TooBig));
    assert_eq!(world.register_for(cannot, nobody, 2 * MIB, ram), Err(Status::TooBig));
    // Not supported, though the peer does not exist.
    assert_eq!(world.register_for(cannot, nobody, MIB, Home::Pool), Err(Status::NotSupported));
    let segment = [Segment { addr: 0, len: MIB }.to_bytes()];
    let ram = Home::Ram { line_addr: 0, segments: Segments::from_wire(&segment) };
    assert_eq!(world.register_for(cannot, nobody, MIB, ram), Err(Status::NotSupported));
    // Nobody, and somebody of another group.
    assert_eq!(world.register_for(owner, nobody, MIB, ram), Err(Status::NoEntry));
    assert_eq!(world.register(owner, other, MIB), Err(Status::NoEntry));
    // Not guest memory: this device has none.
    let peer_gid = world.gid(peer);
    assert_eq!(world.register_for(owner, peer_gid, MIB, ram), Err(Status::Fault));
    // The quota of bytes, and of DMBs.
    world.register(owner, peer, MIB).unwrap();
    world.register(owner, peer, MIB - 64 * KIB).unwrap();
    assert_eq!(world.register(owner, peer, 128 * KIB), Err(Status::Quota));
    world.register(owner, peer, 4 * KIB).unwrap();
    assert_eq!(world.register(owner, peer, 4 * KIB), Err(Status::Quota));
}

#[test]
fn a_full_window_is_told_from_a_full_pool() {
    let mut world = World::with_pool(PoolSettings { max_bytes: 6 * MIB, ..PoolSettings::default() });
    let small = Limits { window_size: 4 * MIB, ..Limits::default() };
    let (a, b) = (world.join_with("a", ABLE, small), world.join_with("a", ABLE, small));
    let c = world.join_with("a", ABLE, small);
    world.register(a, b, MIB).unwrap();
    assert_eq!(world.register(a, c, 3 * MIB), Err(Status::NoSpace));
    world.register(a, c, MIB).unwrap();
    world.register(b, c, MIB).unwrap();
    assert_eq!(world.register(c, a, MIB), Err(Status::NoMemory));
    let few = Limits { max_mappings: 1, ..Limits::default() };
    let d = world.join_with("a", ABLE, few);
    let e = world.join_with("a", ABLE, few);
    for id in [a, b, c] {
        world.fabric.leave(id, GoneReason::Left);
    }
    world.register(d, e, MIB).unwrap();
    assert_eq!(world.register(d, d, MIB), Err(Status::NoSpace));
}

#[test]
fn an_extent_that_the_owners_front_end_refuses_is_an_error_and_gone() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(peer);
    let request = Request::Register(Register { rgid, size: MIB, home: Home::Pool });
    assert_eq!(world.fabric.execute(owner, &request, Attempt::First), None);
    world.answer(false);
    assert_eq!(world.resumed, [(owner, Attempt::After(Err(Status::Io)))]);
    let attempt = world.resumed.remove(0).1;
    assert_eq!(world.fabric.execute(owner, &request, attempt), Some(Err(Status::Io)));
    assert!(world.asked.is_empty(), "the peer's front-end was not asked");
    assert!(world.events(owner).is_empty() && world.events(peer).is_empty());
    world.assert_empty();
    world.register(owner, peer, MIB).unwrap();
}

#[test]
fn a_peer_whose_front_end_refuses_can_try_again() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(peer);
    let request = Request::Register(Register { rgid, size: MIB, home: Home::Pool });
    assert_eq!(world.fabric.execute(owner, &request, Attempt::First), None);
    assert_eq!(world.answer(true).device, owner);
    let attempt = world.resumed.remove(0).1;
    // The owner does not wait for the peer's front-end.
    let Some(Ok(Reply::Register(dmb))) = world.fabric.execute(owner, &request, attempt) else { panic!() };
    let attach = Request::Attach(dmb.token);
    assert_eq!(world.fabric.execute(peer, &attach, Attempt::First), None);
    assert_eq!(world.answer(false).device, peer);
    let attempt = world.resumed.remove(0).1;
    assert_eq!(world.fabric.execute(peer, &attach, attempt), Some(Err(Status::Io)));
    let remote = world.attach(peer, dmb.token).unwrap();
    assert_eq!(remote.size, MIB);
    assert_eq!(world.attach(peer, dmb.token), Err(Status::Already));
}

#[test]
fn what_is_not_this_devices_does_not_exist() {
    let mut world = World::new();
    let (owner, peer, third) = (world.join(ABLE), world.join(ABLE), world.join(ABLE));
    let stranger = world.join_with("b", ABLE, Limits::default());
    let dmb = world.register(owner, peer, 4 * KIB).unwrap();
    for id in [third, stranger, owner] {
        assert_eq!(world.attach(id, dmb.token), Err(Status::NoEntry));
        assert_eq!(world.detach(id, dmb.token), Err(Status::NoEntry));
        assert!(world.port(id).target(dmb.token).is_none());
    }
    for id in [third, stranger, peer] {
        assert_eq!(world.unregister(id, dmb.token), Err(Status::NoEntry));
    }
    let query = |world: &mut World, from, gid| world.command(from, &Request::QueryGid(gid));
    let (owner_gid, third_gid) = (world.gid(owner), world.gid(third));
    assert_eq!(query(&mut world, stranger, owner_gid), Err(Status::NoEntry));
    assert_eq!(query(&mut world, owner, third_gid), Ok(Reply::QueryGid(PairFlags::MAP)));
    let say = Request::SignalEvent(SignalEvent { rgid: owner_gid, code: 1, info: 2 });
    assert_eq!(world.command(stranger, &say), Err(Status::NoEntry));
    assert_eq!(world.command(third, &say), Ok(Reply::Done));
}

#[test]
fn memory_is_not_used_again_before_the_peer_has_let_go() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let dmb = world.register(owner, peer, 4 * KIB).unwrap();
    world.attach(peer, dmb.token).unwrap();
    world.unregister(owner, dmb.token).unwrap();
    assert_eq!(world.unregister(owner, dmb.token), Err(Status::NoEntry));
    let gone = Event::DmbUnregistered { token: dmb.token, gid: world.gid(owner) };
    assert!(world.events(peer).contains(&gone));
    assert_eq!(world.attach(peer, dmb.token), Err(Status::NoEntry));
    let next = world.register(owner, peer, 4 * KIB).unwrap();
    assert_ne!(next.offset, dmb.offset);
    assert_eq!(next.index, dmb.index);
    world.detach(peer, dmb.token).unwrap();
    assert_eq!(world.detach(peer, dmb.token), Err(Status::NoEntry));
    let after = world.register(owner, peer, 4 * KIB).unwrap();
    assert_eq!(after.offset, dmb.offset);
    assert_ne!(after.token, dmb.token);
}

#[test]
fn a_closed_target_is_closed_when_unregister_returns() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let dmb = world.register(owner, peer, 4 * KIB).unwrap();
    let target = world.port(peer).target(dmb.token).unwrap();
    assert!(target.open().is_some());
    world.unregister(owner, dmb.token).unwrap();
    assert!(target.open().is_none());
    assert!(world.port(peer).target(dmb.token).is_none());
}

#[test]
fn an_owner_that_leaves_takes_everything_along() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let dmb = world.register(owner, peer, 4 * KIB).unwrap();
    let kept = world.register(owner, peer, 4 * KIB).unwrap();
    world.attach(peer, dmb.token).unwrap();
    world.attach(peer, kept.token).unwrap();
    world.unregister(owner, kept.token).unwrap();
    let target = world.port(peer).target(dmb.token).unwrap();
    let gid = world.gid(owner);
    world.events(peer);
    world.fabric.leave(owner, GoneReason::Expelled);
    assert!(target.open().is_none());
    world.assert_empty();
    let unmap = world.answer(true);
    assert_eq!((unmap.device, unmap.file.is_some()), (peer, false));
    let events = world.events(peer);
    assert!(matches!(
        events[..],
        [Event::DeviceGone { reason: GoneReason::Expelled, gid: g }, Event::ExtentRemoved(_)] if g == gid
    ));
    assert_eq!(world.detach(peer, dmb.token), Err(Status::NoEntry));
    assert_eq!(world.fabric.usage(peer).unwrap(), Usage::default());
}

#[test]
fn what_a_peer_that_left_had_written_stays_until_the_owner_lets_go() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let dmb = world.register(owner, peer, 4 * KIB).unwrap();
    let zombie = world.register(owner, peer, 4 * KIB).unwrap();
    world.attach(peer, dmb.token).unwrap();
    world.attach(peer, zombie.token).unwrap();
    world.unregister(owner, zombie.token).unwrap();
    world.events(owner);
    let gid = world.gid(peer);
    world.fabric.leave(peer, GoneReason::Reset);
    assert_eq!(world.events(owner), [Event::DeviceGone { gid, reason: GoneReason::Reset }]);
    assert_eq!(world.fabric.usage(owner).unwrap().extents, 1);
    world.unregister(owner, dmb.token).unwrap();
    world.assert_empty();
    assert!(matches!(world.events(owner)[..], [Event::ExtentRemoved(_)]));
    assert_eq!(world.fabric.usage(owner).unwrap(), Usage::default());
}

#[test]
fn after_a_place_was_refused_another_one_is_tried() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(peer);
    let request = Request::Register(Register { rgid, size: MIB, home: Home::Pool });
    let mut places = Vec::new();
    for _ in 0..3 {
        assert_eq!(world.fabric.execute(owner, &request, Attempt::First), None);
        places.push(world.answer(false).offset);
        let attempt = world.resumed.remove(0).1;
        assert_eq!(world.fabric.execute(owner, &request, attempt), Some(Err(Status::Io)));
    }
    let mut apart = places.clone();
    apart.dedup();
    assert_eq!(apart, places);
    world.assert_empty();
}

#[test]
fn an_extent_that_dies_while_it_is_being_mapped_is_unmapped_when_it_is_there() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(peer);
    let request = Request::Register(Register { rgid, size: MIB, home: Home::Pool });
    assert_eq!(world.fabric.execute(owner, &request, Attempt::First), None);
    world.fabric.leave(peer, GoneReason::Left);
    world.answer(true);
    // The command goes on, and finds that its peer is gone.
    let attempt = world.resumed.remove(0).1;
    assert_eq!(world.fabric.execute(owner, &request, attempt), Some(Err(Status::NoEntry)));
    let unmap = world.answer(true);
    assert!(unmap.file.is_none());
    world.assert_empty();
    assert_eq!(world.fabric.usage(owner).unwrap(), Usage::default());
}

#[test]
fn an_owner_that_leaves_while_its_peer_waits_does_not_leave_it_waiting() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(peer);
    let request = Request::Register(Register { rgid, size: MIB, home: Home::Pool });
    assert_eq!(world.fabric.execute(owner, &request, Attempt::First), None);
    world.answer(true);
    let attempt = world.resumed.remove(0).1;
    let Some(Ok(Reply::Register(dmb))) = world.fabric.execute(owner, &request, attempt) else { panic!() };
    let attach = Request::Attach(dmb.token);
    assert_eq!(world.fabric.execute(peer, &attach, Attempt::First), None);
    world.fabric.leave(owner, GoneReason::Left);
    world.answer(true);
    let attempt = world.resumed.remove(0).1;
    assert_eq!(world.fabric.execute(peer, &attach, attempt), Some(Err(Status::NoEntry)));
    world.answer_all();
    assert_eq!(world.fabric.usage(peer).unwrap(), Usage::default());
    world.assert_empty();
}

#[test]
fn others_fill_no_more_than_half_of_a_window() {
    let mut world = World::new();
    let limits = Limits { window_size: 8 * MIB, ..Limits::default() };
    let victim = world.join_with("a", ABLE, limits);
    for _ in 0..6 {
        let other = world.join(ABLE);
        let dmb = world.register(other, victim, MIB).unwrap();
        // What has no place there is moved into.
        let mapped = world.attach(victim, dmb.token).is_ok();
        assert_eq!(mapped, dmb.flags.contains(PairFlags::MAP));
    }
    assert_eq!(world.fabric.usage(victim).unwrap().mapped_bytes, 4 * MIB);
    let other = world.join(ABLE);
    world.register(victim, other, MIB).unwrap();
}

#[test]
fn devices_that_come_and_go_cannot_fill_one_that_takes_no_events() {
    let mut world = World::new();
    let victim = world.join(ABLE);
    let mut cycles = 0;
    loop {
        let other = world.join(ABLE);
        let result = world.register(other, victim, 4 * KIB);
        world.fabric.leave(other, GoneReason::Left);
        world.answer_all();
        match result {
            Ok(_) => cycles += 1,
            Err(status) => break assert_eq!(status, Status::Again),
        }
        assert!(cycles < 10_000);
    }
    // Only who left is still to be told, and the victim can go on.
    assert_eq!(world.port(victim).events().waiting(), cycles);
    let other = world.join(ABLE);
    world.register(victim, other, 4 * KIB).unwrap();
    world.events(victim);
    world.register(other, victim, 4 * KIB).unwrap();
}

#[test]
fn a_pairs_extents_double() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(ABLE));
    for _ in 0..120 {
        world.register(owner, peer, MIB).unwrap();
    }
    let usage = world.fabric.usage(owner).unwrap();
    assert!(usage.extents <= 8, "{usage:?}");
    assert!(usage.mapped_bytes <= 256 * MIB, "{usage:?}");
}

#[test]
fn a_ram_dmb_lies_where_its_owner_says_and_its_line_is_cleared() {
    let mut world = World::new();
    let (owner, peer) = (world.join(ABLE), world.join(Capabilities::default()));
    let file = nix::sys::memfd::memfd_create(c"guest", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(MIB).unwrap();
    let region = RegionInfo { guest_addr: MIB, size: MIB, user_addr: 0, file_offset: 0 };
    let port = world.port(owner);
    let memory = port.memory.read().with(region, file).unwrap();
    port.memory.replace(memory);
    assert!(port.memory.read().write(MIB + 64, &[0xff; 64]));
    let rgid = world.gid(peer);
    let good = [Segment { addr: MIB + 4096, len: 4000 }, Segment { addr: MIB + 65536, len: 96 }];
    let wire = good.map(|s| s.to_bytes());
    let home = Home::Ram { line_addr: MIB + 64, segments: Segments::from_wire(&wire) };
    let dmb = world.register_for(owner, rgid, 4096, home).unwrap();
    assert_eq!((dmb.offset, dmb.line_offset, dmb.flags), (0, 0, PairFlags::empty()));
    assert_eq!(dmb.token.place(), TokenPlace::Ram);
    let mut line = [0; 64];
    assert!(port.memory.read().read(MIB + 64, &mut line));
    assert_eq!((&line[..16], &line[16..]), (&[0; 16][..], &[0xff; 48][..]));
    assert_eq!(world.attach(peer, dmb.token), Err(Status::NotSupported));
    for (line_addr, addr) in [(MIB + 64, 2 * MIB - 2048), (2 * MIB - 32, MIB), (64, MIB)] {
        let wire = [Segment { addr, len: 4096 }.to_bytes()];
        let home = Home::Ram { line_addr, segments: Segments::from_wire(&wire) };
        assert_eq!(world.register_for(owner, rgid, 4096, home), Err(Status::Fault));
    }
    world.unregister(owner, dmb.token).unwrap();
    world.assert_empty();
}

#[test]
fn a_device_may_be_its_own_peer() {
    let mut world = World::new();
    let device = world.join(ABLE);
    let dmb = world.register(device, device, 4 * KIB).unwrap();
    let remote = world.attach(device, dmb.token).unwrap();
    assert_eq!((remote.offset, remote.line_offset), (dmb.offset, dmb.line_offset));
    assert_eq!(world.fabric.usage(device).unwrap().extents, 1);
    world.fabric.leave(device, GoneReason::Left);
    world.assert_empty();
}

#[test]
fn two_devices_that_know_a_key_meet_and_a_third_waits_for_a_fourth() {
    use dmbridge_proto::rendezvous::{Cancel, MAX_RENDEZVOUS, Met, Rendezvous};
    let mut world = World::new();
    let (a, b, c) = (world.join(ABLE), world.join(ABLE), world.join(ABLE));
    let stranger = world.join_with("b", ABLE, Limits::default());
    let deaf = world.join(Capabilities { rendezvous: false, ..ABLE });
    let post = |tag, says: u8| Request::Rendezvous(Rendezvous { key: [7; 32], tag, payload: [says; 32] });
    let nobody = Ok(Reply::Rendezvous(Met::NOBODY));
    assert_eq!(world.command(deaf, &post(1, 1)), Err(Status::NotSupported));
    assert_eq!(world.command(a, &post(1, 1)), nobody);
    assert_eq!(world.command(a, &post(1, 1)), Err(Status::Already));
    assert_eq!(world.command(stranger, &post(1, 9)), nobody, "another group, another key");
    let met = Met { gid: world.gid(a), payload: [1; 32] };
    assert_eq!(world.command(b, &post(2, 2)), Ok(Reply::Rendezvous(met)));
    assert_eq!(world.events(a), [Event::Rendezvous { gid: world.gid(b), tag: 1, payload: [2; 32] }]);
    assert_eq!(world.events(b), []);
    // The key is free again.
    assert_eq!(world.command(c, &post(3, 3)), nobody);
    let cancel = |tag| Request::CancelRendezvous(Cancel { key: [7; 32], tag });
    assert_eq!(world.command(a, &cancel(1)), Err(Status::NoEntry));
    assert_eq!(world.command(c, &cancel(4)), Err(Status::NoEntry));
    assert_eq!(world.command(c, &cancel(3)), Ok(Reply::Done));
    // A device may be both ends.
    assert_eq!(world.command(c, &post(3, 3)), nobody);
    let met = Met { gid: world.gid(c), payload: [3; 32] };
    assert_eq!(world.command(c, &post(4, 4)), Ok(Reply::Rendezvous(met)));
    // Keys are bounded, and go with their device.
    let many = |i: u32| Rendezvous {
        key: [(i >> 8) as u8, i as u8].repeat(16).try_into().unwrap(),
        tag: i,
        payload: [0; 32],
    };
    for i in 0..MAX_RENDEZVOUS {
        assert_eq!(world.command(b, &Request::Rendezvous(many(i))), nobody);
    }
    assert_eq!(world.command(b, &Request::Rendezvous(many(MAX_RENDEZVOUS))), Err(Status::Quota));
    world.fabric.leave(b, GoneReason::Left);
    assert_eq!(world.command(a, &Request::Rendezvous(many(0))), nobody);
}

#[test]
fn a_private_line_is_had_by_who_asks_and_by_large_dmbs() {
    let mut world = World::new();
    let (a, b) = (world.join(ABLE), world.join(ABLE));
    let rgid = world.gid(b);
    let flag = |reply: RegisterReply| reply.flags.contains(PairFlags::PRIVATE_LINE);
    let page = |reply: RegisterReply| reply.line_offset / 4096;
    let plain = world.register_for(a, rgid, 4096, Home::Pool).unwrap();
    let private = world.register_for(a, rgid, 4096, Home::PoolPrivate).unwrap();
    let large = world.register_for(a, rgid, 512 << 10, Home::Pool).unwrap();
    assert_eq!([plain, private, large].map(flag), [false, true, true]);
    let others = [(); 100].map(|()| world.register_for(a, rgid, 4096, Home::Pool).unwrap());
    assert!(others.iter().all(|other| ![page(private), page(large)].contains(&page(*other))));
    assert!(world.attach(b, private.token).unwrap().flags.contains(PairFlags::PRIVATE_LINE));
    let unable = world.join(Capabilities { private_line: false, ..ABLE });
    assert_eq!(world.register_for(unable, rgid, 4096, Home::PoolPrivate), Err(Status::NotSupported));
}
