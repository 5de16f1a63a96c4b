//! A client that dies, at any point, leaves nothing behind.

use dmbridge_proto::control::Segment;
use dmbridge_proto::event::{Event, GoneReason};
use dmbridge_tests::daemon::{TestDaemon, end_with_this_thread};
use dmbridge_tests::deadline::until_good;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

const ENDS: u64 = 1000;

fn victim(daemon: &TestDaemon, point: u64, witness: &Pair) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_victim"));
    command.arg(daemon.hub()).arg(point.to_string()).arg(witness.owner.gid().to_string());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    end_with_this_thread(&mut command);
    command.spawn().expect("the victim starts")
}

#[test]
fn a_thousand_clients_that_die_at_every_point_leave_nothing_behind() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    let before = daemon.holdings();
    let life = victim(&daemon, u64::MAX, &witness).wait_with_output().expect("wait");
    let said = String::from_utf8_lossy(&life.stdout).into_owned() + &String::from_utf8_lossy(&life.stderr);
    let steps: u64 = said.trim().parse().unwrap_or_else(|_| panic!("a whole life ends well, not so: {said}"));
    assert!(steps > 50, "{steps} points to die at");

    // Two at a time, each at its own point, so that one dies while the daemon is busy with the other.
    let mut last: Option<Child> = None;
    for end in 0..ENDS {
        let next = victim(&daemon, end * 7 % steps, &witness);
        if let Some(child) = last.replace(next) {
            expect_killed(child);
        }
        if end % 50 == 0 {
            witness.check();
        }
    }
    last.into_iter().for_each(expect_killed);

    until_good(
        &format!("what the daemon holds, which was {before:?}"),
        || daemon.holdings(),
        |after| after.is_within(&before),
    );
    let gone = witness.owner.wait_event("a client is gone", |event| match event {
        Event::DeviceGone { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(gone, GoneReason::Left);
    witness.check();
    assert_eq!(daemon.log().matches("panicked").count(), 0, "no thread of the daemon panicked");
}

fn expect_killed(child: Child) {
    let output = child.wait_with_output().expect("wait");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(libc::SIGKILL), "it was to die at its point: {said}");
}

#[test]
fn a_device_that_was_its_own_peer_leaves_nothing_behind() {
    let daemon = TestDaemon::start();
    // Threads open what they need once, when they first serve somebody.
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    let before = daemon.holdings();
    for options in [Options::default(), Options::without_map()] {
        let mut device = RawFrontend::connect_with(daemon.hub(), options);
        let gid = device.gid();
        let pages = device.memory.allocate(4096, 4096);
        let line = device.memory.allocate(64, 64);
        let dmb = device.register_ram(gid, line, &[Segment { addr: pages, len: 4096 }]).expect("a RAM DMB");
        assert_eq!(device.move_bytes(dmb.token, 0, b"to myself"), Ok(()));
        if let Ok(dmb) = device.register(gid, 4096) {
            device.attach(dmb.token).expect("attached");
        }
    }
    until_good(
        &format!("what the daemon holds, which was {before:?}"),
        || daemon.holdings(),
        |after| after.is_within(&before),
    );
}
