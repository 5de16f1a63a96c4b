//! The daemon may die at any moment: what is mapped goes on without it.

use dmbridge_proto::line::Wake;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::pair::Pair;
use nix::sys::signal::Signal;

#[test]
fn mapped_traffic_goes_on_without_the_daemon() {
    let mut daemon = TestDaemon::start();
    let mut pair = Pair::with_futex(&daemon.hub());
    pair.check();
    daemon.kill();
    let owners = pair.owner.window().line(pair.dmb.line_offset);
    let peers = pair.peer.window().line(pair.remote.line_offset);
    for round in 1..100u8 {
        let bytes = [round; 4096];
        pair.peer.window().write(pair.remote.offset, &bytes);
        owners.arm(Wake::Futex);
        assert_eq!(peers.signal(1), Some(Wake::Futex));
        assert_eq!(owners.take_pending(), 1);
        assert_eq!(pair.owner.window().read(pair.dmb.offset, 4096), bytes);
    }
    pair.owner.wait_closed();
}

#[test]
fn a_daemon_that_is_told_to_end_ends_well_and_removes_its_sockets() {
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut daemon = TestDaemon::start_with(&["--socket-path", "@/vm.sock"], "");
        let mut pair = Pair::new(&daemon.hub());
        pair.check();
        let status = daemon.stop(signal);
        assert_eq!(status.code(), Some(0), "{signal}");
        for socket in ["hub.sock", "control.sock", "vm.sock"] {
            assert!(!daemon.path(socket).exists(), "{socket} after {signal}");
        }
        pair.peer.wait_closed();
    }
}
