//! What a program can observe of its sockets under `dmbridge-run` is what it can observe without.

use dmbridge_tests::preload::{Way, daemon};

/// Lives of a connection in one run.
const LIVES: &str = "8";

#[test]
fn every_socket_call_says_the_same_with_and_without() {
    let daemon = daemon();
    let script = env!("CARGO_BIN_EXE_socket-script");
    for seed in ["1", "1000", "2000", "3000"] {
        let plain = Way::Plain.run(script, &[seed, LIVES]);
        let moved = Way::Dmbridge(&daemon).run(script, &[seed, LIVES]);
        assert!(moved.moved() > 100_000, "next to nothing was moved:\n{}", moved.err);
        for (number, (want, is)) in plain.out.lines().zip(moved.out.lines()).enumerate() {
            assert_eq!(is, want, "seed {seed}, line {}", number + 1);
        }
        assert_eq!(moved.out.len(), plain.out.len(), "seed {seed}");
    }
}

#[test]
fn several_connections_threads_and_signals_are_as_with_tcp() {
    let daemon = daemon();
    let scenes = env!("CARGO_BIN_EXE_socket-scenes");
    let plain = Way::Plain.run(scenes, &[]);
    let moved = Way::Dmbridge(&daemon).run(scenes, &[]);
    assert!(moved.counter("directions of connections that moved to DMBs") > 1000, "{}", moved.err);
    for (want, is) in plain.out.lines().zip(moved.out.lines()) {
        assert_eq!(is, want);
    }
    assert_eq!(moved.out.len(), plain.out.len());
}

#[test]
fn calls_that_few_programs_make_are_as_with_tcp() {
    let daemon = daemon();
    let corners = env!("CARGO_BIN_EXE_socket-corners");
    // It finds the other end's program next to itself.
    let _ = env!("CARGO_BIN_EXE_socket-scenes");
    let plain = Way::Plain.run(corners, &[]);
    let moved = Way::Dmbridge(&daemon).run(corners, &[]);
    assert!(moved.counter("directions of connections that moved to DMBs") > 30, "{}", moved.err);
    let stalled = "went back to TCP: the other end did not read, and TCP holds more";
    assert!(moved.counter(stalled) > 0, "{}", moved.err);
    for (want, is) in plain.out.lines().zip(moved.out.lines()) {
        assert_eq!(is, want);
    }
    assert_eq!(moved.out.len(), plain.out.len());
}

#[test]
fn without_a_daemon_everything_is_tcp() {
    let daemon = daemon();
    let hub = daemon.hub();
    let script = env!("CARGO_BIN_EXE_socket-script");
    let plain = Way::Plain.run(script, &["7", "2"]);
    let way = Way::Dmbridge(&daemon);
    std::fs::remove_file(hub).expect("the hub's socket");
    let alone = way.run(script, &["7", "2"]);
    assert_eq!(alone.out, plain.out);
    assert_eq!(alone.moved(), 0);
    assert!(alone.counter("stayed TCP: no device or daemon, or it refused") > 0, "{}", alone.err);
}

#[test]
fn a_peer_that_does_not_take_part_is_spoken_to_by_tcp() {
    use dmbridge_tests::preload::free_port;
    let daemon = daemon();
    let port = free_port();
    let text = port.to_string();
    let mut server = Way::Plain.serve("iperf3", &["-s", "-1", "-p", &text], port);
    let client = Way::Dmbridge(&daemon).run("iperf3", &["-c", "127.0.0.1", "-p", &text, "-n", "64M"]);
    assert_eq!(client.moved(), 0);
    server.finish();
}
