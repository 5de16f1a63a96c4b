//! Sockets over the real daemon: what they carry, what they fall back to, and that nobody breaks them.

use dmbridge::smc::{Reason, Smc, SmcListener, SmcStream};
use dmbridge::{Device, Token};
use dmbridge_proto::smc::cdc::{CDC_SIZE, CursorWord, ProducerFlags, StateFlags};
use dmbridge_proto::smc::clc::{self, AcceptConfirm, Decline, Message, SmcdV2Ids, Version};
use dmbridge_proto::smc::cursor::Cursor;
use dmbridge_proto::smc::negotiation::{LocalDevice, Offer};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::{DEADLINE, until};
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

const ANY: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);

/// One end with a device of its own.
fn smc(daemon: &TestDaemon) -> Smc {
    smc_that(daemon, true)
}

/// One end with a device that can map, or not.
fn smc_that(daemon: &TestDaemon, maps: bool) -> Smc {
    Smc::new(Device::builder().map(maps).connect(daemon.hub()).unwrap())
}

/// What the two ends can do: map, that is. Where one cannot, both directions move.
const WAYS: [[bool; 2]; 4] = [[true, true], [true, false], [false, true], [false, false]];

/// Two connected ends.
fn pair(server: &Smc, client: &Smc) -> (SmcStream, SmcStream) {
    let listener = server.bind(ANY).unwrap();
    over(&listener, client)
}

fn over(listener: &SmcListener, client: &Smc) -> (SmcStream, SmcStream) {
    let there = client.connect(listener.local_addr().unwrap()).unwrap();
    let (here, from) = listener.accept().unwrap();
    assert_eq!(from, there.local_addr().unwrap());
    (here, there)
}

/// As [`pair`], certainly over DMBs.
fn carried(daemon: &TestDaemon) -> (SmcStream, SmcStream) {
    carried_by(daemon, [true, true])
}

/// As [`carried`], by these ways.
fn carried_by(daemon: &TestDaemon, maps: [bool; 2]) -> (SmcStream, SmcStream) {
    let (a, b) = pair(&smc_that(daemon, maps[0]), &smc_that(daemon, maps[1]));
    assert!(a.is_smc() && b.is_smc(), "{a:?} {b:?}");
    (a, b)
}

fn byte(i: usize) -> u8 {
    (i % 251) as u8 ^ (i / 251) as u8
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(byte).collect()
}

/// Sends and receives in both directions at once.
fn exchange(a: &SmcStream, b: &SmcStream, len: usize) {
    let data = pattern(len);
    thread::scope(|scope| {
        for (from, to) in [(a, b), (b, a)] {
            let data = &data;
            scope.spawn(move || {
                let mut from = from;
                let mut at = 0;
                for piece in (1..).map(|i| i * 7919 % 200_000 + 1) {
                    let end = (at + piece).min(len);
                    from.write_all(&data[at..end]).unwrap();
                    at = end;
                    if at == len {
                        break;
                    }
                }
            });
            scope.spawn(move || {
                let mut to = to;
                let mut got = vec![0; len];
                to.read_exact(&mut got).unwrap();
                assert!(got == *data);
            });
        }
    });
}

#[test]
fn bytes_go_both_ways_over_dmbs() {
    let daemon = TestDaemon::start();
    let (a, b) = carried(&daemon);
    exchange(&a, &b, 5_000_001);
    assert_eq!((a.fallback_reason(), a.peer_diagnosis()), (None, None));
    assert_eq!(a.peer_addr().unwrap(), b.local_addr().unwrap());
    let report = daemon.report();
    assert!(report.devices.iter().all(|d| d.dmbs == 1 && d.attached == 1), "{report:?}");
}

#[test]
fn bytes_go_both_ways_by_whatever_the_devices_can() {
    for maps in WAYS {
        let daemon = TestDaemon::start();
        let (a, b) = carried_by(&daemon, maps);
        exchange(&a, &b, 5_000_001);
        // Who sleeps at once is woken at each turn.
        a.set_spin(Duration::ZERO);
        b.set_spin(Duration::ZERO);
        exchange(&a, &b, 1_000_001);
        let moved: u64 = daemon.report().devices.iter().map(|d| d.moved_bytes).sum();
        assert_eq!(moved >= 12_000_000, maps != [true, true], "{maps:?}: {moved} bytes were moved");
    }
}

#[test]
fn a_ring_that_is_gone_around_often_loses_nothing_whoever_is_slow() {
    let daemon = TestDaemon::start();
    for maps in WAYS {
        let build = |maps| {
            let device = Device::builder().map(maps).connect(daemon.hub()).unwrap();
            Smc::builder().device(device, 0).buffer(16 << 10, 16 << 10, 16 << 10).build()
        };
        let (a, b) = pair(&build(maps[0]), &build(maps[1]));
        let data = pattern(300_000);
        thread::scope(|scope| {
            scope.spawn(|| (&a).write_all(&data).unwrap());
            let mut got = vec![0; data.len()];
            for part in got.chunks_mut(997) {
                (&b).read_exact(part).unwrap();
            }
            assert!(got == data);
        });
    }
}

#[test]
fn both_ends_may_have_one_device() {
    let daemon = TestDaemon::start();
    let smc = smc(&daemon);
    let (a, b) = pair(&smc, &smc);
    assert!(a.is_smc() && b.is_smc());
    exchange(&a, &b, 100_000);
}

#[test]
fn the_second_connection_takes_the_buffers_of_the_first_and_asks_the_device_nothing() {
    let daemon = TestDaemon::start();
    let (server, client) = (smc(&daemon), smc(&daemon));
    let listener = server.bind(ANY).unwrap();
    let commands = || [&server, &client].map(|smc| smc.devices()[0].stats().commands);
    let mut after_first = None;
    for round in 0..20 {
        let (mut here, mut there) = over(&listener, &client);
        assert!(here.is_smc());
        there.write_all(b"ping").unwrap();
        let mut text = [0; 4];
        here.read_exact(&mut text).unwrap();
        here.write_all(b"pong").unwrap();
        there.read_exact(&mut text).unwrap();
        drop(there);
        assert_eq!(here.read(&mut text).unwrap(), 0, "round {round}");
        drop(here);
        assert_eq!(commands(), *after_first.get_or_insert_with(commands), "round {round}");
    }
    for smc in [&server, &client] {
        let stats = smc.stats();
        assert_eq!((stats.connections, stats.fallbacks), (20, 0));
        assert_eq!((stats.buffers_made, stats.buffers_reused), (1, 19));
    }
}

#[test]
fn buffers_grow_where_they_are_too_small_and_shrink_where_they_are_too_large() {
    let daemon = TestDaemon::start();
    let build = || {
        let device = Device::connect(daemon.hub()).unwrap();
        Smc::builder().device(device, 0).buffer(16 << 10, 64 << 10, 256 << 10).build()
    };
    let (server, client) = (build(), build());
    let listener = server.bind(ANY).unwrap();
    let bytes = || daemon.report().devices.iter().map(|d| d.dmb_bytes).max().unwrap();
    let round = |len: usize| {
        let (mut here, mut there) = over(&listener, &client);
        thread::scope(|scope| {
            scope.spawn(|| there.write_all(&vec![1; len]).unwrap());
            // The writer is to find its ring full.
            thread::sleep(Duration::from_millis(1));
            let mut got = vec![0; len];
            for part in got.chunks_mut(1000) {
                here.read_exact(part).unwrap();
                if len > 100 {
                    thread::yield_now();
                }
            }
        });
        // Both have read all, so both may close in any order.
        drop(here);
        assert_eq!(there.read(&mut [0]).unwrap(), 0);
    };
    round(3);
    assert_eq!(bytes(), 64 << 10);
    for _ in 0..4 {
        round(4 << 20);
    }
    let grown = bytes();
    assert!(grown > 64 << 10, "{grown}");
}

#[test]
fn a_plain_tcp_client_is_served_whoever_speaks_first() {
    let daemon = TestDaemon::start();
    let device = Device::connect(daemon.hub()).unwrap();
    let server = Smc::builder().device(device, 0).handshake_timeout(Duration::from_millis(50)).build();
    let listener = server.bind(ANY).unwrap();
    // A few bytes, one that a proposal could begin with, and none: nothing is lost.
    for text in [&b"GET / HTTP/1.0"[..], b"\xe2", b""] {
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(text).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!((stream.is_smc(), stream.fallback_reason()), (false, Some(Reason::PEER_NO_SMC)));
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        assert_eq!(got, text);
        stream.write_all(b"answer").unwrap();
        drop(stream);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
    }
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.write_all(b"220 ready").unwrap();
    let mut greeting = [0; 9];
    client.read_exact(&mut greeting).unwrap();
    client.write_all(b"HELO").unwrap();
    let mut text = [0; 4];
    assert_eq!(stream.peek(&mut text).unwrap(), 4);
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"HELO");
}

#[test]
fn a_proposal_that_comes_too_late_is_declined_and_no_byte_is_lost() {
    let daemon = TestDaemon::start();
    let device = Device::connect(daemon.hub()).unwrap();
    let server = Smc::builder().device(device, 0).first_word(Duration::ZERO).build();
    let client = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    for server_first in [true, false] {
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        // Only now that it is taken for a plain client does the client propose.
        let (mut here, _) = listener.accept().unwrap();
        assert!(!here.is_smc());
        thread::scope(|scope| {
            scope.spawn(|| {
                if server_first {
                    here.write_all(b"welcome").unwrap();
                }
                let mut text = [0; 5];
                here.read_exact(&mut text).unwrap();
                assert_eq!(&text, b"hello");
                here.write_all(b"bye").unwrap();
            });
            let mut there = client.initiate(tcp).unwrap();
            assert!(!there.is_smc());
            there.write_all(b"hello").unwrap();
            let mut text = String::new();
            let want = if server_first { "welcomebye" } else { "bye" };
            let mut got = vec![0; want.len()];
            there.read_exact(&mut got).unwrap();
            text.push_str(std::str::from_utf8(&got).unwrap());
            assert_eq!(text, want);
        });
    }
}

#[test]
fn without_a_daemon_everything_goes_over_tcp_and_says_why() {
    let none = Smc::builder().build();
    let (a, b) = pair(&none, &none);
    assert_eq!(b.fallback_reason(), Some(Reason::NO_SMCD_DEVICE));
    exchange(&a, &b, 300_000);
    let daemon = TestDaemon::start();
    // A client that could, and a server that cannot.
    let (a, b) = pair(&none, &smc(&daemon));
    assert_eq!(a.fallback_reason(), Some(Reason::NO_SMCD_V2_DEVICE));
    assert_eq!(b.fallback_reason(), Some(Reason::PEER_DECLINED));
    assert_eq!(b.peer_diagnosis(), Some(Reason::NO_SMCD_V2_DEVICE));
    exchange(&a, &b, 300_000);
    assert_eq!(none.stats().fallbacks, 3);
}

#[test]
fn devices_that_cannot_reach_each_other_fall_back() {
    let eid = |eid: &str| format!("[fabric]\nsystem_eid = \"{eid}\"\n");
    let one = TestDaemon::start_with(&[], &eid("DMBRIDGE-TEST-EID-00000000001234"));
    let other = TestDaemon::start_with(&[], &eid("DMBRIDGE-TEST-EID-00000000005678"));
    // Another host, as far as the EIDs say.
    let (a, b) = pair(&smc(&one), &smc(&other));
    assert_eq!(a.fallback_reason(), Some(Reason::NO_SMCD_DEVICE));
    exchange(&a, &b, 1000);
    // A user-defined EID in common does not make the fabrics one.
    let with = |daemon: &TestDaemon| {
        let device = Device::connect(daemon.hub()).unwrap();
        Smc::builder().device(device, 0).user_eid("LAB").unwrap().build()
    };
    let (a, b) = pair(&with(&one), &with(&other));
    assert_eq!(a.fallback_reason(), Some(Reason::NO_SMCD_V2_DEVICE));
    exchange(&a, &b, 1000);
}

#[test]
fn the_clients_favourite_fabric_is_used() {
    let config = |id: u32| format!("[fabric]\nid = {id}\n");
    let (one, two) = (TestDaemon::start_with(&[], &config(11)), TestDaemon::start_with(&[], &config(22)));
    let build = |first: i32, second: i32| {
        let device = |daemon: &TestDaemon| Device::connect(daemon.hub()).unwrap();
        Smc::builder().device(device(&one), first).device(device(&two), second).build()
    };
    for (first, second, used) in [(1, 2, &two), (2, 1, &one)] {
        let (a, b) = pair(&build(0, 0), &build(first, second));
        assert!(a.is_smc() && b.is_smc());
        let dmbs = |daemon: &TestDaemon| daemon.report().devices.iter().map(|d| d.dmbs).sum::<u32>();
        assert_eq!(dmbs(used), 2);
        assert_eq!(dmbs(&one) + dmbs(&two), 2);
        exchange(&a, &b, 1000);
    }
}

/// What a program sees of two connected streams, whatever carries them.
fn observe<S: Socket>(a: S, b: S) -> Vec<String> {
    let mut seen = Vec::new();
    let mut say = |what: &str, value: String| seen.push(format!("{what}: {value}"));
    let kind = |result: std::io::Result<usize>| format!("{:?}", result.map_err(|error| error.kind()));
    let mut buffer = [0; 100];

    a.set_nonblocking(true);
    say("nothing there", kind(a.read(&mut buffer)));
    say("nothing to peek", kind(a.peek(&mut buffer)));
    say("an empty read", kind(a.read(&mut [])));
    say("an empty write", kind(a.write(&[])));
    a.set_nonblocking(false);
    a.set_read_timeout(Some(Duration::from_millis(5)));
    say("nothing in time", kind(a.read(&mut buffer)));
    a.set_read_timeout(None);

    say(
        "vectored write",
        kind(b.write_vectored(&[IoSlice::new(b"one, "), IoSlice::new(b""), IoSlice::new(b"two")])),
    );
    a.settle(8, false);
    say("peek", kind(a.peek(&mut buffer)));
    let (mut first, mut second) = ([0; 4], [0; 10]);
    let parts = &mut [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)];
    say("vectored read", kind(a.read_vectored(parts)));
    say("contents", format!("{first:?} {second:?}"));

    say("a large write", kind(b.write(&[7; 20_000])));
    say("shut down", format!("{:?}", b.shutdown(Shutdown::Write).is_ok()));
    say("write after it", kind(b.write(b"x")));
    let mut rest = Vec::new();
    let mut piece = [0; 3000];
    loop {
        match a.read(&mut piece) {
            Ok(0) => break,
            Ok(len) => rest.extend_from_slice(&piece[..len]),
            Err(error) => panic!("{error}"),
        }
    }
    say("all of it", format!("{} {}", rest.len(), rest.iter().all(|b| *b == 7)));
    say("the end again", kind(a.read(&mut buffer)));
    say("the other way", kind(a.write(b"still open")));
    say("is read", kind(b.read(&mut buffer)));

    a.set_nonblocking(true);
    let mut total = 0;
    fill(&a, &b, &mut total);
    say("full", kind(a.write(&[1; 10])));
    a.set_nonblocking(false);
    a.set_write_timeout(Some(Duration::from_millis(5)));
    say("no room in time", kind(a.write(&[1; 10])));
    a.set_write_timeout(None);
    let mut got = 0;
    b.set_read_timeout(Some(DEADLINE));
    while got < total {
        got += b.read(&mut [0; 65_536][..]).unwrap();
    }
    say("it was all", (got == total).to_string());

    let clone = a.try_clone();
    drop(a);
    say("a clone keeps it open", kind(clone.write(b"!")));
    say("and is heard", kind(b.read(&mut buffer)));
    drop(clone);
    say("closed", kind(b.read(&mut buffer)));
    seen
}

/// Writes until nothing fits any more, without waiting: neither into the buffer, nor where moves start from.
fn fill<S: Socket>(from: &S, to: &S, total: &mut usize) {
    until("it is full", || {
        // In this order: what has arrived is in nobody's way.
        let arrived = to.has_all(*total);
        match from.write(&[1; 65_536]) {
            Ok(len) => {
                *total += len;
                None
            }
            Err(_) => arrived.then_some(()),
        }
    });
}

/// What the two kinds of sockets have in common.
trait Socket {
    /// Waits until what was sent has arrived: TCP takes its time.
    fn settle(&self, waits: usize, finished: bool);
    /// Whether so much has arrived, for what tells.
    fn has_all(&self, total: usize) -> bool;
    fn read(&self, to: &mut [u8]) -> std::io::Result<usize>;
    fn read_vectored(&self, to: &mut [IoSliceMut<'_>]) -> std::io::Result<usize>;
    fn write(&self, from: &[u8]) -> std::io::Result<usize>;
    fn write_vectored(&self, from: &[IoSlice<'_>]) -> std::io::Result<usize>;
    fn peek(&self, to: &mut [u8]) -> std::io::Result<usize>;
    fn shutdown(&self, how: Shutdown) -> std::io::Result<()>;
    fn set_nonblocking(&self, on: bool);
    fn set_read_timeout(&self, timeout: Option<Duration>);
    fn set_write_timeout(&self, timeout: Option<Duration>);
    fn try_clone(&self) -> Self;
}

macro_rules! socket {
    ($kind:ty, $settle:expr, $has_all:expr) => {
        impl Socket for $kind {
            fn has_all(&self, total: usize) -> bool {
                $has_all(self, total)
            }
            fn settle(&self, waits: usize, finished: bool) {
                $settle(self, waits, finished)
            }
            fn read(&self, to: &mut [u8]) -> std::io::Result<usize> {
                (&mut &*self as &mut dyn Read).read(to)
            }
            fn read_vectored(&self, to: &mut [IoSliceMut<'_>]) -> std::io::Result<usize> {
                (&mut &*self as &mut dyn Read).read_vectored(to)
            }
            fn write(&self, from: &[u8]) -> std::io::Result<usize> {
                (&mut &*self as &mut dyn Write).write(from)
            }
            fn write_vectored(&self, from: &[IoSlice<'_>]) -> std::io::Result<usize> {
                (&mut &*self as &mut dyn Write).write_vectored(from)
            }
            fn peek(&self, to: &mut [u8]) -> std::io::Result<usize> {
                <$kind>::peek(self, to)
            }
            fn shutdown(&self, how: Shutdown) -> std::io::Result<()> {
                <$kind>::shutdown(self, how)
            }
            fn set_nonblocking(&self, on: bool) {
                <$kind>::set_nonblocking(self, on).unwrap()
            }
            fn set_read_timeout(&self, timeout: Option<Duration>) {
                <$kind>::set_read_timeout(self, timeout).unwrap()
            }
            fn set_write_timeout(&self, timeout: Option<Duration>) {
                <$kind>::set_write_timeout(self, timeout).unwrap()
            }
            fn try_clone(&self) -> Self {
                <$kind>::try_clone(self).unwrap()
            }
        }
    };
}
socket!(TcpStream, settle_tcp, |_: &TcpStream, _| true);
socket!(SmcStream, settle_smc, |smc: &SmcStream, total| {
    total == 0 || !smc.is_smc() || smc.peek(&mut vec![0; total]).ok() == Some(total)
});

/// What is moved takes its time, too. The stream does not wait here.
fn settle_smc(smc: &SmcStream, waits: usize, finished: bool) {
    let mut buffer = [0; 1 << 16];
    until("what was moved is there", || match smc.peek(&mut buffer) {
        Ok(there) => (there >= waits).then_some(()),
        Err(_) => (waits == 0 && !finished).then_some(()),
    });
}

fn settle_tcp(tcp: &TcpStream, waits: usize, finished: bool) {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::{AsFd, AsRawFd};
    until("TCP has delivered", || {
        let mut there: nix::libc::c_int = 0;
        // SAFETY: the request writes one int.
        unsafe { nix::libc::ioctl(tcp.as_raw_fd(), nix::libc::FIONREAD, &mut there) };
        (there as usize >= waits).then_some(())
    });
    if finished {
        poll(
            &mut [PollFd::new(tcp.as_fd(), PollFlags::from_bits_retain(nix::libc::POLLRDHUP))],
            PollTimeout::NONE,
        )
        .unwrap();
    }
}

#[test]
fn a_program_sees_what_it_sees_with_tcp() {
    let listener = TcpListener::bind(ANY).unwrap();
    let there = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let with_tcp = observe(listener.accept().unwrap().0, there);
    let none = Smc::builder().build();
    let (a, b) = pair(&none, &none);
    assert_eq!(observe(a, b), with_tcp);
    let daemon = TestDaemon::start();
    for maps in WAYS {
        let (a, b) = carried_by(&daemon, maps);
        assert_eq!(observe(a, b), with_tcp, "{maps:?}");
    }
}

/// A script of operations on two connected ends, drawn from a seed, and everything that a program sees of it.
fn random<S: Socket>(a: S, b: S, seed: u64, moves: bool) -> Vec<String> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut draw = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % below
    };
    let ends = [a, b];
    ends.iter().for_each(|end| end.set_nonblocking(true));
    let mut seen = Vec::new();
    // How much waits to be read at each end: less than fits into any buffer, so that sizes of buffers do not matter.
    let mut waits = [0, 0];
    let (mut finished, mut deaf) = ([false, false], [false, false]);
    let mut next = 0;
    for step in 0..80 {
        let (me, len) = (draw(2), draw(3000));
        ends[me].settle(waits[me], finished[me]);
        let kind = draw(20);
        let mut buffer = vec![0; len];
        let result = match kind {
            0..=7 if waits[1 - me] < 40_000 => {
                let data: Vec<u8> = (next..next + len).map(byte).collect();
                let (one, two) = data.split_at(len / 3);
                let sent = if kind < 5 {
                    ends[me].write(&data)
                } else {
                    ends[me].write_vectored(&[IoSlice::new(one), IoSlice::new(&[]), IoSlice::new(two)])
                };
                waits[1 - me] += *sent.as_ref().unwrap_or(&0);
                next += len;
                sent
            }
            8..=12 => {
                let got = ends[me].read(&mut buffer);
                waits[me] -= *got.as_ref().unwrap_or(&0);
                got
            }
            13..=14 => {
                let (one, two) = buffer.split_at_mut(len / 2);
                let got = ends[me].read_vectored(&mut [IoSliceMut::new(one), IoSliceMut::new(two)]);
                waits[me] -= *got.as_ref().unwrap_or(&0);
                got
            }
            15..=17 => ends[me].peek(&mut buffer),
            // Both together make Linux's TCP reset who still sends; that is not copied.
            // Nothing tells that an end was moved that comes after data.
            18 if moves && finished[me] && waits[me] != 0 => continue,
            18 if step > 40 && !deaf[me] => {
                finished[1 - me] = true;
                ends[me].shutdown(Shutdown::Write).map(|()| 0)
            }
            19 if step > 60 && !finished[1 - me] => {
                deaf[me] = true;
                ends[me].shutdown(Shutdown::Read).map(|()| 0)
            }
            _ => continue,
        };
        let sum = buffer.iter().fold(0u32, |sum, byte| sum.wrapping_mul(31) + u32::from(*byte));
        seen.push(format!("{step}: {kind} by {me}, {len} bytes: {:?} {sum}", result.map_err(|e| e.kind())));
    }
    seen
}

#[test]
fn a_program_sees_what_it_sees_with_tcp_whatever_it_does() {
    let daemon = TestDaemon::start();
    let ends = WAYS.map(|maps| maps.map(|maps| smc_that(&daemon, maps)));
    let listeners = ends.each_ref().map(|[server, _]| server.bind(ANY).unwrap());
    let plain = TcpListener::bind(ANY).unwrap();
    for seed in 0..150 {
        let way = seed as usize % WAYS.len();
        let (listener, client) = (&listeners[way], &ends[way][1]);
        let there = TcpStream::connect(plain.local_addr().unwrap()).unwrap();
        let here = plain.accept().unwrap().0;
        here.set_nodelay(true).unwrap();
        there.set_nodelay(true).unwrap();
        let with_tcp = random(here, there, seed, WAYS[way] != [true, true]);
        let (a, b) = over(listener, client);
        assert!(a.is_smc() && b.is_smc());
        let with_smc = random(a, b, seed, WAYS[way] != [true, true]);
        for (smc, tcp) in with_smc.iter().zip(&with_tcp) {
            assert_eq!(smc, tcp, "seed {seed}");
        }
    }
}

#[test]
fn who_waits_is_woken_by_a_shutdown_of_its_own_side() {
    let daemon = TestDaemon::start();
    for maps in WAYS {
        let (a, b) = carried_by(&daemon, maps);
        a.set_spin(Duration::ZERO);
        thread::scope(|scope| {
            let reader = scope.spawn(|| a.read(&mut [0]));
            let writer = scope.spawn(|| {
                let mut error = None;
                while error.is_none() {
                    error = a.write(&[0; 1 << 20]).err();
                }
                error.map(|error| error.kind())
            });
            // Full, so that the writer waits.
            until("the ring is full", || b.peek(&mut [0; 1 << 16]).ok().filter(|len| *len == 1 << 16));
            a.shutdown(Shutdown::Both).unwrap();
            assert_eq!(reader.join().unwrap().unwrap(), 0);
            assert_eq!(writer.join().unwrap(), Some(ErrorKind::BrokenPipe));
        });
    }
}

#[test]
fn data_left_unread_resets_the_other_end() {
    let daemon = TestDaemon::start();
    for maps in WAYS {
        let (a, mut b) = carried_by(&daemon, maps);
        b.write_all(b"never read").unwrap();
        a.settle(10, false);
        drop(a);
        until("the other end is reset", || match b.read(&mut [0]) {
            Err(error) => (error.kind() == ErrorKind::ConnectionReset).then_some(()),
            Ok(_) => panic!("nothing was sent"),
        });
    }
}

#[test]
fn in_place_works_whatever_carries_the_connection() {
    let daemon = TestDaemon::start();
    let none = Smc::builder().build();
    let carried = WAYS.map(|maps| carried_by(&daemon, maps));
    for (a, b) in carried.into_iter().chain([pair(&none, &none)]) {
        const WORDS: u64 = 300_000;
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut next = 0;
                while next < WORDS {
                    let room = a.reserve(((WORDS - next) * 8) as usize).unwrap();
                    let slice = room.slice();
                    let len = slice.len() / 8 * 8;
                    slice.slice(..len).fill_u64_with(|| {
                        next += 1;
                        next
                    });
                    room.commit(len).unwrap();
                }
                // Nothing of what is dropped is sent.
                drop(a.reserve(10).unwrap());
                a.shutdown(Shutdown::Write).unwrap();
            });
            let mut want = 0;
            loop {
                let there = b.peek_in_place().unwrap();
                if there.slice().is_empty() {
                    break;
                }
                let len = there.slice().len() / 8 * 8;
                there.slice().slice(..len).for_each_u64(|word| {
                    want += 1;
                    assert_eq!(word, want);
                });
                there.consume(len).unwrap();
            }
            assert_eq!(want, WORDS);
        });
    }
}

#[test]
fn a_killed_peer_resets_the_connection_with_the_daemon_and_without_it() {
    for (daemon_lives, maps) in [(true, true), (true, false), (false, true)] {
        let mut daemon = TestDaemon::start();
        let server = smc_that(&daemon, maps);
        let listener = server.bind(ANY).unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "the_peer_that_is_killed", "--nocapture"])
            .env("SMC_TEST_HUB", daemon.hub())
            .env("SMC_TEST_ADDRESS", listener.local_addr().unwrap().to_string())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        assert!(stream.is_smc());
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut text = [0; 4];
        stream.read_exact(&mut text).unwrap();
        if !daemon_lives {
            daemon.kill();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it had sent is there, and then nothing.
        assert_eq!(stream.read(&mut text).unwrap(), 4);
        assert_eq!(stream.read(&mut text).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut result = Ok(());
        for _ in 0..100 {
            result = stream.write_all(&[0; 1 << 16]);
        }
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

/// Not a test by itself: the process that another test kills.
#[test]
fn the_peer_that_is_killed() {
    let Some(hub) = std::env::var_os("SMC_TEST_HUB") else { return };
    let smc = Smc::new(Device::connect(hub).unwrap());
    let mut stream = smc.connect(std::env::var("SMC_TEST_ADDRESS").unwrap()).unwrap();
    stream.write_all(b"now kill").unwrap();
    let _ = stream.read(&mut [0]);
}

#[test]
fn a_client_that_breaks_the_handshake_harms_only_itself() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let address = listener.local_addr().unwrap();
    let proposal = Message::Proposal(offer(&Device::connect(daemon.hub()).unwrap()).proposal().unwrap());
    let decline = Message::Decline(Decline::new(Version::V2, Reason::CONFIGURATION)).to_bytes();
    let mut wrong_kind = proposal.to_bytes();
    wrong_kind[4] = 3;
    let (whole, part) = (proposal.to_bytes(), &proposal.to_bytes()[..20]);
    let mut slow = Vec::new();
    for (i, words) in [&whole[..], part, &wrong_kind, &decline, &[0xe2, 0xd4, 0xc3]].into_iter().enumerate() {
        let mut client = TcpStream::connect(address).unwrap();
        client.write_all(words).unwrap();
        // One waits for the confirm, or for the rest; others are closed, or go on.
        slow.push((i, client));
    }
    // Nobody waits for them.
    let go_on = || {
        let (a, b) = over_skipping_fallen(&listener, &smc(&daemon));
        exchange(&a, &b, 10_000);
    };
    go_on();
    drop(slow);
    go_on();
    drop((server, listener));
    until("all is given back", || daemon.report().devices.is_empty().then_some(()));
}

fn over_skipping_fallen(listener: &SmcListener, client: &Smc) -> (SmcStream, SmcStream) {
    let there = client.connect(listener.local_addr().unwrap()).unwrap();
    loop {
        let (here, from) = listener.accept().unwrap();
        if from == there.local_addr().unwrap() {
            return (here, there);
        }
    }
}

fn offer(device: &Device) -> Offer {
    let config = device.config();
    let id = clc::GidChid { gid: device.gid().as_u64().unwrap(), chid: config.fabric_id.get() };
    let local = LocalDevice { id, system_eid: Some(clc::Eid(config.system_eid)) };
    Offer { devices: clc::List::first_of([local]), eids: clc::List::new() }
}

/// A peer as Linux's AF_SMC is one: it moves data and CDC messages, 32 bytes each with its flags in the consumer's word.
struct Mover {
    mover: dmbridge::Mover,
    local: dmbridge::Dmb,
    prod: Cursor,
    cons: Cursor,
}

impl Mover {
    const RING: u32 = (16 << 10) - CDC_SIZE as u32;

    fn connect(device: &Device, address: SocketAddr) -> (Mover, TcpStream) {
        let mut tcp = TcpStream::connect(address).unwrap();
        let offer = offer(device);
        tcp.write_all(&Message::Proposal(offer.proposal().unwrap()).to_bytes()).unwrap();
        let mut bytes = [0; 114];
        tcp.read_exact(&mut bytes).unwrap();
        let Ok(Message::Accept(accept)) = Message::parse(&bytes) else { panic!("{bytes:?}") };
        assert!(accept.first_contact);
        let peer = dmbridge::Gid::from_u64(accept.gid);
        let local = device.register(peer, 16 << 10).unwrap();
        let confirm = AcceptConfirm {
            gid: device.gid().as_u64().unwrap(),
            token: local.token().to_bits(),
            size: 0,
            v2: accept.v2.map(|ids| SmcdV2Ids { first_contact: None, ..ids }),
            ..accept
        };
        tcp.write_all(&Message::Confirm(confirm).to_bytes()).unwrap();
        let mover = device.mover(Token::from_bits(accept.token)).unwrap();
        (Mover { mover, local, prod: Cursor::default(), cons: Cursor::default() }, tcp)
    }

    fn say(&self, flags: ProducerFlags, state: StateFlags) {
        let mut cdc = [0; CDC_SIZE];
        cdc[0] = 0xfe;
        let prod = CursorWord { cursor: self.prod, ..Default::default() };
        let cons = CursorWord { cursor: self.cons, producer: flags, state };
        cdc[8..16].copy_from_slice(&prod.to_bits().to_ne_bytes());
        cdc[16..24].copy_from_slice(&cons.to_bits().to_ne_bytes());
        let ticket = self.mover.post(0, &cdc, Some(1)).unwrap();
        self.mover.wait(ticket, None).unwrap();
    }

    /// Sends into a ring of so many bytes that has room.
    fn send(&mut self, data: &[u8], ring: u32) {
        let first = data.len().min((ring - self.prod.count) as usize);
        self.mover.write(CDC_SIZE as u64 + u64::from(self.prod.count), &data[..first]).unwrap();
        self.mover.write(CDC_SIZE as u64, &data[first..]).unwrap();
        self.prod = self.prod.advance(data.len() as u32, ring);
        self.say(ProducerFlags::empty(), StateFlags::empty());
    }

    fn receive(&mut self, len: usize) -> Vec<u8> {
        let word = |at| CursorWord::from_bits(self.local.memory().slice(..).read_u64(at));
        let there = || self.cons.distance(word(8).cursor, Mover::RING).unwrap() as usize;
        self.local.wait_until(None, || there() >= len).unwrap();
        let mut data = vec![0; len];
        let first = len.min((Mover::RING - self.cons.count) as usize);
        self.local.memory().read(CDC_SIZE + self.cons.count as usize, &mut data[..first]).unwrap();
        self.local.memory().read(CDC_SIZE, &mut data[first..]).unwrap();
        self.cons = self.cons.advance(len as u32, Mover::RING);
        self.say(ProducerFlags::empty(), StateFlags::empty());
        data
    }

    fn state(&self) -> StateFlags {
        CursorWord::from_bits(self.local.memory().slice(..).read_u64(16)).state
    }
}

#[test]
fn a_peer_that_moves_as_linux_does_is_understood() {
    let daemon = TestDaemon::start();
    for maps in [true, false] {
        let server = Smc::builder()
            .device(Device::builder().map(maps).connect(daemon.hub()).unwrap(), 0)
            .buffer(32 << 10, 32 << 10, 32 << 10)
            .build();
        let ring = (32 << 10) - CDC_SIZE as u32;
        let listener = server.bind(ANY).unwrap();
        let device = Device::connect(daemon.hub()).unwrap();
        let (mut peer, tcp) = Mover::connect(&device, listener.local_addr().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        assert!(stream.is_smc());
        let data = pattern(10_001);
        for _ in 0..20 {
            peer.send(&data, ring);
            let mut got = vec![0; data.len()];
            stream.read_exact(&mut got).unwrap();
            assert!(got == data);
            stream.write_all(&data).unwrap();
            assert!(peer.receive(data.len()) == data);
        }
        // Linux ends half of the TCP connection as well, and that may arrive first.
        tcp.shutdown(Shutdown::Write).unwrap();
        peer.say(ProducerFlags::empty(), StateFlags::PEER_DONE_WRITING);
        assert_eq!(stream.read(&mut [0; 10]).unwrap(), 0);
        stream.write_all(b"last").unwrap();
        assert_eq!(peer.receive(4), b"last");
        peer.say(ProducerFlags::empty(), StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED);
        drop(stream);
        until("the last word is there", || (peer.state() == StateFlags::PEER_CONN_CLOSED).then_some(()));
    }
}

#[test]
fn every_word_comes_with_a_signal_because_a_kernel_looks_at_nothing_else() {
    let daemon = TestDaemon::start();
    for maps in [true, false] {
        let server = smc_that(&daemon, maps);
        let listener = server.bind(ANY).unwrap();
        let device = Device::connect(daemon.hub()).unwrap();
        let (mut peer, _tcp) = Mover::connect(&device, listener.local_addr().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"data").unwrap();
        assert_eq!(peer.local.wait(Some(DEADLINE)).unwrap(), 1);
        assert_eq!(peer.receive(4), b"data");
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(peer.local.wait(Some(DEADLINE)).unwrap(), 1);
        assert_eq!(peer.state(), StateFlags::PEER_DONE_WRITING);
    }
}

#[test]
fn a_peer_that_ends_its_buffer_resets_who_writes_there() {
    let daemon = TestDaemon::start();
    let server = smc_that(&daemon, false);
    let listener = server.bind(ANY).unwrap();
    let device = Device::connect(daemon.hub()).unwrap();
    let (peer, _tcp) = Mover::connect(&device, listener.local_addr().unwrap());
    let (stream, _) = listener.accept().unwrap();
    drop(peer.local);
    until("the writer is told", || match stream.write(b"x") {
        Ok(_) => None,
        Err(error) => (error.kind() == ErrorKind::ConnectionReset).then_some(()),
    });
    assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_peer_that_lies_about_its_cursor_costs_its_own_connection() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let device = Device::connect(daemon.hub()).unwrap();
    let (mut peer, _tcp) = Mover::connect(&device, listener.local_addr().unwrap());
    let (stream, _) = listener.accept().unwrap();
    peer.prod = Cursor { wrap: 7, count: 7 };
    peer.say(ProducerFlags::empty(), StateFlags::empty());
    until("the lie is noticed", || {
        let error = stream.read(&mut [0]).err()?;
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        Some(())
    });
    assert_eq!(peer.state(), StateFlags::PEER_CONN_ABORT);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn a_client_out_of_sync_declines_and_the_next_connection_is_a_first_contact() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let device = Device::connect(daemon.hub()).unwrap();
    let (_first, _tcp) = Mover::connect(&device, listener.local_addr().unwrap());
    let propose = || {
        let mut tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        tcp.write_all(&Message::Proposal(offer(&device).proposal().unwrap()).to_bytes()).unwrap();
        let mut bytes = [0; 8];
        tcp.peek(&mut bytes).unwrap();
        let mut bytes = vec![0; u16::from_be_bytes([bytes[5], bytes[6]]).into()];
        tcp.read_exact(&mut bytes).unwrap();
        let Ok(Message::Accept(accept)) = Message::parse(&bytes) else { panic!("{bytes:?}") };
        (tcp, accept)
    };
    let (mut tcp, accept) = propose();
    assert!(!accept.first_contact);
    let sorry = Decline::new(Version::V2, Reason::OUT_OF_SYNC);
    tcp.write_all(&Message::Decline(sorry).to_bytes()).unwrap();
    tcp.write_all(b"over TCP then").unwrap();
    let (_first, _) = listener.accept().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(stream.fallback_reason(), Some(Reason::PEER_DECLINED));
    assert_eq!(stream.peer_diagnosis(), Some(Reason::OUT_OF_SYNC));
    let mut text = [0; 13];
    stream.read_exact(&mut text).unwrap();
    assert!(propose().1.first_contact);
}

#[test]
fn a_descriptor_tells_when_there_is_something_to_do() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let daemon = TestDaemon::start();
    for maps in WAYS {
        let (a, mut b) = carried_by(&daemon, maps);
        a.set_nonblocking(true).unwrap();
        assert_eq!(a.arm(true, true).unwrap(), (false, true));
        let fds = || PollFd::new(a.readiness_fd().unwrap(), PollFlags::POLLIN);
        assert_eq!(poll(&mut [fds()], PollTimeout::ZERO).unwrap(), 0);
        b.write_all(b"x").unwrap();
        assert_eq!(poll(&mut [fds()], PollTimeout::NONE).unwrap(), 1);
        assert_eq!(a.arm(true, false).unwrap(), (true, false));
        assert_eq!(a.read(&mut [0; 2]).unwrap(), 1);
        fill(&a, &b, &mut 0);
        assert_eq!(a.arm(false, true).unwrap(), (false, false));
        let mut buffer = vec![0; 1 << 20];
        b.read_exact(&mut buffer[..1 << 17]).unwrap();
        let fds = || PollFd::new(a.readiness_fd().unwrap(), PollFlags::POLLIN);
        until("there is room", || {
            assert_eq!(poll(&mut [fds()], PollTimeout::NONE).unwrap(), 1);
            a.arm(false, true).unwrap().1.then_some(())
        });
        drop(b);
        until("the end is told", || a.arm(true, false).unwrap().0.then_some(()));
    }
}

#[test]
fn a_forks_child_goes_on_over_tcp() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let client = smc(&daemon);
    let address = listener.local_addr().unwrap();
    // SAFETY: the child uses what is not locked by threads that it has not inherited, and ends by _exit().
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let talk = || -> std::io::Result<bool> {
                let mut stream = client.connect(address)?;
                stream.write_all(b"from the child")?;
                Ok(!stream.is_smc())
            };
            let code = i32::from(!matches!(talk(), Ok(true)));
            // SAFETY: ends the process at once, without destructors.
            unsafe { nix::libc::_exit(code) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let (mut stream, _) = listener.accept().unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            assert_eq!(text, "from the child");
            let status = nix::sys::wait::waitpid(child, None).unwrap();
            assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
        }
    }
    let (a, b) = over(&listener, &client);
    assert!(a.is_smc() && b.is_smc(), "the parent's own go on as before");
    exchange(&a, &b, 1000);
}

#[test]
fn a_client_that_never_confirms_does_not_take_all_buffers() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let device = Device::connect(daemon.hub()).unwrap();
    let proposal = Message::Proposal(offer(&device).proposal().unwrap()).to_bytes();
    let answers: Vec<_> = (0..200)
        .map(|_| {
            let mut tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            tcp.write_all(&proposal).unwrap();
            let mut answer = [0; 8];
            tcp.read_exact(&mut answer).unwrap();
            (tcp, answer[4])
        })
        .collect();
    // Some are accepted, the rest declined.
    assert!(answers.iter().filter(|(_, kind)| *kind == 2).count() <= 128);
    let (a, b) = over_skipping_fallen(&listener, &smc(&daemon));
    assert!(a.is_smc() && b.is_smc());
    drop(answers);
    // What they had is given back, and so they may try again.
    until("a place is free", || {
        let (_, there) = over_skipping_fallen(&listener, &Smc::new(device.clone()));
        there.is_smc().then_some(())
    });
}

#[test]
fn a_server_keeps_nothing_of_clients_that_are_gone() {
    let daemon = TestDaemon::start();
    let server = smc(&daemon);
    let listener = server.bind(ANY).unwrap();
    let mut kept = Vec::new();
    for _ in 0..30 {
        let (a, b) = over(&listener, &smc(&daemon));
        assert!(a.is_smc() && b.is_smc());
        exchange(&a, &b, 1000);
        // The program keeps its end of some, which must not be in anybody's way.
        kept.extend((kept.len() < 5).then_some(a));
        let gid = server.devices()[0].gid().to_string();
        let report = daemon.report();
        let mine = report.devices.iter().find(|d| d.gid == gid).unwrap();
        assert!(mine.dmbs as usize <= kept.len() + 3, "{mine:?}");
    }
    for mut stream in kept {
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        let _ = stream.write_all(b"to nobody");
    }
}

#[test]
fn many_connections_come_and_go_and_leave_nothing() {
    let daemon = TestDaemon::start();
    let (server, client) = (smc(&daemon), smc(&daemon));
    let listener = server.bind(ANY).unwrap();
    let address = listener.local_addr().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for stream in listener.incoming().take(200) {
                let mut stream = stream.unwrap();
                scope.spawn(move || {
                    let mut text = Vec::new();
                    stream.read_to_end(&mut text).unwrap();
                    stream.write_all(&text).unwrap();
                });
            }
        });
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..50 {
                    let mut stream = client.connect(address).unwrap();
                    let data = pattern(i * 997);
                    stream.write_all(&data).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let mut text = Vec::new();
                    stream.read_to_end(&mut text).unwrap();
                    assert!(text == data);
                }
            });
        }
    });
    let stats = client.stats();
    assert_eq!((stats.connections, stats.fallbacks), (200, 0));
    assert!(stats.buffers_made <= 40, "{stats:?}");
    drop((server, client, listener));
    until("all is given back", || daemon.report().devices.is_empty().then_some(()));
}
