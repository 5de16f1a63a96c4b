//! The library over the real daemon, with several devices in one process: each connection to the hub is a device.

use dmbridge::{Builder, Device, DmbSender, Error, Event, GoneReason, Status};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::{DEADLINE, until, until_good};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{BufRead, BufReader, IoSlice};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const SIZE: usize = 64 << 10;

fn connect(daemon: &TestDaemon, builder: Builder) -> Device {
    builder.connect(daemon.hub()).unwrap()
}

fn two(daemon: &TestDaemon) -> (Device, Device) {
    (connect(daemon, Device::builder()), connect(daemon, Device::builder()))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ (i / 251) as u8).collect()
}

fn content(dmb: &dmbridge::Dmb, offset: usize, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    dmb.memory().read(offset, &mut bytes).unwrap();
    bytes
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>, status: Status) {
    assert_eq!(result.unwrap_err().status(), Some(status));
}

#[track_caller]
fn next(device: &Device) -> Event {
    device.events().next(Some(DEADLINE)).unwrap().expect("an event")
}

#[test]
fn two_processes_exchange_a_message() {
    let daemon = TestDaemon::start();
    // Beside this test: target/profile/deps/test, target/profile/examples/exchange.
    let test = std::env::current_exe().unwrap();
    let example = test.ancestors().nth(2).unwrap().join("examples/exchange");
    let mut reader = Command::new(&example).arg(daemon.hub()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    let gid = lines.next().unwrap().unwrap();
    let writer = Command::new(&example).arg(daemon.hub()).arg(gid).status().unwrap();
    assert!(writer.success());
    assert_eq!(lines.next().unwrap().unwrap(), "Hello through a DMB.");
    assert!(reader.wait().unwrap().success());
}

#[test]
fn a_store_of_the_peer_is_the_owners_data() {
    let daemon = TestDaemon::start();
    for futex in [true, false] {
        let (owner, peer) =
            (connect(&daemon, Device::builder().futex(futex)), connect(&daemon, Device::builder()));
        let dmb = owner.register(peer.gid(), SIZE).unwrap();
        assert_eq!((dmb.size(), dmb.peer(), dmb.index()), (SIZE, peer.gid(), 0));
        let remote = peer.attach(dmb.token()).unwrap();
        assert_eq!((remote.size(), remote.owner()), (SIZE, owner.gid()));
        dmb.set_spin(Duration::ZERO);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for round in 0..200u64 {
                    assert!(dmb.wait_until(None, || dmb.memory().slice(..).read_u64(8) > round).unwrap());
                    assert_eq!(dmb.wait(None).unwrap(), 1 << (round % 64));
                    dmb.memory().write(16, &(round + 1).to_le_bytes()).unwrap();
                }
            });
            for round in 0..200u64 {
                remote.memory().slice(..).write_u64(8, round + 1);
                remote.signal(1 << (round % 64)).unwrap();
                until("the answer", || (remote.memory().slice(..).read_u64(16) == round + 1).then_some(()));
            }
            reader.join().unwrap();
        });
    }
}

#[test]
fn every_pairing_carries_bytes_and_signals() {
    let daemon = TestDaemon::start();
    let data = pattern(SIZE);
    for owner_maps in [true, false] {
        for peer_maps in [true, false] {
            for futex in [true, false] {
                let owner = connect(&daemon, Device::builder().map(owner_maps).futex(futex));
                let peer = connect(&daemon, Device::builder().map(peer_maps));
                assert_eq!((owner.can_map(), peer.can_map()), (owner_maps, peer_maps));
                let seen = owner.query(peer.gid()).unwrap().unwrap();
                assert_eq!((seen.map, seen.futex), (peer_maps, futex));
                let dmb = owner.register(peer.gid(), SIZE).unwrap();
                let sender = peer.sender(dmb.token()).unwrap();
                assert_eq!(matches!(sender, DmbSender::Map(_)), owner_maps && peer_maps);
                thread::scope(|scope| {
                    let waiter = scope.spawn(|| dmb.wait(Some(DEADLINE)));
                    sender.write(0, &data).unwrap();
                    sender.signal(6).unwrap();
                    assert_eq!(waiter.join().unwrap().unwrap(), 6);
                });
                assert!(content(&dmb, 0, SIZE) == data, "{owner_maps} {peer_maps} {futex}");
                sender.flush().unwrap();
            }
        }
    }
}

#[test]
fn moves_arrive_whole_in_order_and_from_any_memory() {
    let daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let dmb = owner.register(peer.gid(), 8 << 20).unwrap();
    let mover = peer.mover(dmb.token()).unwrap();

    let data = pattern(5_000_001);
    mover.write(3, &data).unwrap();
    assert!(content(&dmb, 3, data.len()) == data);

    mover.write_vectored(7, &[IoSlice::new(b"one"), IoSlice::new(b""), IoSlice::new(b", two")]).unwrap();
    assert_eq!(content(&dmb, 7, 8), b"one, two");

    let buffer = peer.move_buffer(1 << 20).unwrap();
    buffer.memory().write(0, &data[..1 << 20]).unwrap();
    let parts: Vec<_> = (0..100).map(|i| buffer.part(i * 9_000..i * 9_000 + 4_001)).collect();
    let ticket = mover.post_parts(4096, &parts, Some(2)).unwrap();
    assert!(mover.wait(ticket, Some(DEADLINE)).unwrap());
    assert_eq!(dmb.take_signals(), 2);
    for i in 0..100 {
        assert!(content(&dmb, 4096 + i * 4_001, 4_001) == data[i * 9_000..i * 9_000 + 4_001]);
    }

    // More than the queue and the staging buffer hold, all under way at once; the last one tells.
    for i in 0..5_000u64 {
        mover.post(i * 8, &i.to_le_bytes(), (i == 4_999).then_some(1)).unwrap();
    }
    assert_eq!(dmb.wait(Some(DEADLINE)).unwrap(), 1);
    for i in 0..5_000 {
        assert_eq!(dmb.memory().slice(..).read_u64(i * 8), i as u64);
    }
    mover.flush().unwrap();
    assert_eq!(mover.under_way().unwrap(), 0);
}

#[test]
fn a_move_that_fails_is_reported_once_and_later_ones_go_on() {
    let daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    let mover = peer.mover(dmb.token()).unwrap();
    refused(mover.write(SIZE as u64 - 3, b"four"), Status::Invalid);
    refused(mover.write(u64::MAX, b"four"), Status::Invalid);
    mover.write(SIZE as u64 - 4, b"four").unwrap();
    assert!(matches!(
        mover.post_parts(0, &[peer.move_buffer(64).unwrap().part(60..65)], None),
        Err(Error::OutOfBounds(_))
    ));
    let token = dmb.token();
    drop(dmb);
    refused(mover.write(0, b"late"), Status::NoEntry);
    refused(peer.mover(token), Status::NoEntry);
    refused(owner.mover(token), Status::NoEntry);
}

#[test]
fn several_threads_move_and_wait_at_once() {
    let daemon = TestDaemon::start();
    let (owner, peer) =
        (connect(&daemon, Device::builder()), connect(&daemon, Device::builder().spin(Duration::ZERO)));
    let dmbs: Vec<_> = (0..4).map(|_| owner.register(peer.gid(), SIZE).unwrap()).collect();
    thread::scope(|scope| {
        for dmb in &dmbs {
            let mover = peer.mover(dmb.token()).unwrap();
            scope.spawn(move || {
                for i in 0..300u64 {
                    mover.write(i * 8, &i.to_le_bytes()).unwrap();
                    assert_eq!(dmb.memory().slice(..).read_u64(i as usize * 8), i);
                }
            });
        }
    });
}

#[test]
fn a_descriptor_tells_of_signals_and_of_moves() {
    let daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    let remote = peer.attach(dmb.token()).unwrap();
    let mover = peer.mover(dmb.token()).unwrap();
    let readable = |fd, timeout| poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout).unwrap() == 1;
    let long = PollTimeout::from(30_000u16);
    for round in 0..50u64 {
        dmb.arm().unwrap();
        assert!(!readable(dmb.as_fd().unwrap(), PollTimeout::ZERO));
        if round % 2 == 0 {
            remote.signal(1).unwrap()
        } else {
            mover.signal(1).unwrap()
        }
        assert!(readable(dmb.as_fd().unwrap(), long));
        assert_eq!(dmb.take_signals(), 1);

        let ticket = mover.post(0, &round.to_le_bytes(), None).unwrap();
        while !mover.is_done(ticket).unwrap() {
            mover.arm().unwrap();
            if !mover.is_done(ticket).unwrap() {
                assert!(readable(mover.as_fd().unwrap(), long));
            }
        }
    }
    let stats = peer.stats();
    assert_eq!(stats.rings, 25, "{stats:?}");
}

#[test]
fn programs_find_each_other_by_software_events() {
    let daemon = TestDaemon::start();
    let (a, b) = two(&daemon);
    a.signal_event(b.gid(), 7, 42).unwrap();
    assert_eq!(next(&b), Event::Software { from: a.gid(), code: 7, info: 42 });
    assert_eq!(a.query("1".parse().unwrap()).unwrap(), None);
    refused(a.signal_event("1".parse().unwrap(), 0, 0), Status::NoEntry);
    assert_eq!(b.events().try_next().unwrap(), None);
}

#[test]
fn dropping_a_handle_tells_the_other_side_and_frees_all() {
    let daemon = TestDaemon::start();
    let before = daemon.holdings();
    let (owner, peer) = two(&daemon);
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    let token = dmb.token();
    let remote = peer.attach(token).unwrap();
    refused(peer.attach(token), Status::Already);
    drop(remote);
    assert_eq!(next(&owner), Event::DmbDetached { token, peer: peer.gid() });
    assert!(dmb.is_detached());
    let remote = peer.attach(token).unwrap();
    assert!(remote.is_registered());
    drop(dmb);
    assert_eq!(next(&peer), Event::DmbUnregistered { token, owner: owner.gid() });
    assert!(!remote.is_registered());
    remote.write(0, b"late").unwrap();
    drop(remote);
    assert_eq!(owner.register(peer.gid(), SIZE).unwrap().index(), 0, "the lowest number that is free");
    drop((owner, peer));
    until_good("what the daemon holds", || daemon.holdings(), |after| after.is_within(&before));
}

#[test]
fn a_peer_that_leaves_ends_waits_and_its_last_words_are_heard() {
    let daemon = TestDaemon::start();
    for futex in [true, false] {
        let (owner, peer) =
            (connect(&daemon, Device::builder().futex(futex)), connect(&daemon, Device::builder()));
        let gid = peer.gid();
        let dmb = owner.register(gid, SIZE).unwrap();
        dmb.set_spin(Duration::ZERO);
        let back = peer.register(owner.gid(), SIZE).unwrap();
        let remote = owner.attach(back.token()).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                let first = dmb.wait(Some(DEADLINE)).unwrap();
                (first, dmb.wait(Some(DEADLINE)))
            });
            let sender = peer.attach(dmb.token()).unwrap();
            sender.signal(8).unwrap();
            drop((sender, back, peer));
            let (first, second) = waiter.join().unwrap();
            assert_eq!(first, 8);
            assert!(matches!(second, Err(Error::PeerGone)), "{second:?}");
        });
        until("the end of the remote DMB", || (!remote.is_registered()).then_some(()));
        let gone = Event::DeviceGone { gid, reason: GoneReason::Left };
        until("the event", || (next(&owner) == gone).then_some(()));
        refused(owner.register(gid, SIZE), Status::NoEntry);
        // Mapped no longer, but nothing breaks.
        remote.write(0, b"late").unwrap();
        remote.signal(1).unwrap();
    }
}

#[test]
fn when_the_daemon_dies_processes_go_on_with_what_they_have() {
    let mut daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let without_futex = connect(&daemon, Device::builder().futex(false));
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    let remote = peer.attach(dmb.token()).unwrap();
    let mover = peer.mover(dmb.token()).unwrap();
    let other = without_futex.register(peer.gid(), SIZE).unwrap();
    dmb.set_spin(Duration::ZERO);
    other.set_spin(Duration::ZERO);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| other.wait(None));
        daemon.kill();
        assert!(matches!(waiter.join().unwrap(), Err(Error::Disconnected)));
        let waiter = scope.spawn(|| dmb.wait(None));
        remote.write(0, b"still").unwrap();
        remote.signal(1).unwrap();
        assert_eq!(waiter.join().unwrap().unwrap(), 1);
    });
    assert_eq!(content(&dmb, 0, 5), b"still");
    until("the end is noticed", || (!owner.is_connected() && !peer.is_connected()).then_some(()));
    assert!(matches!(owner.register(peer.gid(), SIZE), Err(Error::Disconnected)));
    assert!(matches!(mover.write(0, b"lost"), Err(Error::Disconnected)));
    assert!(matches!(owner.events().next(None), Err(Error::Disconnected)));
}

#[test]
fn what_the_device_refuses_is_said() {
    let daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let other = connect(&daemon, Device::builder());
    refused(owner.register("1".parse().unwrap(), SIZE), Status::NoEntry);
    refused(owner.register(peer.gid(), 0), Status::Invalid);
    refused(owner.register(peer.gid(), 4097), Status::Invalid);
    refused(owner.register(peer.gid(), 1 << 40), Status::TooBig);
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    refused(other.attach(dmb.token()), Status::NoEntry);
    refused(other.mover(dmb.token()), Status::NoEntry);
    let ram = owner.register_ram(peer.gid(), SIZE).unwrap();
    refused(peer.attach(ram.token()), Status::NotSupported);
    let unmapping = connect(&daemon, Device::builder().map(false));
    let dmb = owner.register(unmapping.gid(), SIZE).unwrap();
    refused(unmapping.attach(dmb.token()), Status::NotSupported);
}

#[test]
fn a_fork_does_not_disturb_its_parent() {
    let daemon = TestDaemon::start();
    let (owner, peer) = two(&daemon);
    let dmb = owner.register(peer.gid(), SIZE).unwrap();
    let remote = peer.attach(dmb.token()).unwrap();
    // SAFETY: the child uses this library, whose locks nobody else holds now, and ends by _exit().
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let code = match owner.register(peer.gid(), SIZE) {
                Err(Error::Forked) => {
                    remote.write(0, b"from the child").unwrap();
                    remote.signal(1).unwrap();
                    drop((dmb, remote, owner, peer));
                    0
                }
                _ => 1,
            };
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    assert_eq!(dmb.wait(Some(DEADLINE)).unwrap(), 1);
    assert_eq!(content(&dmb, 0, 14), b"from the child");
    let another = owner.register(peer.gid(), SIZE).unwrap();
    assert_eq!(another.index(), 1, "the first one is still registered");
    assert!(remote.is_registered() && owner.is_connected() && peer.is_connected());
}
