//! The command as a person meets it: what it prints, how it ends, what it leaves.
//!
//! Tests that need the daemon build it beside the command, unless `DMBRIDGED` names one.

mod support;

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use support::build_daemon;

/// The command, with the daemon in its path and a folder for its temporary files.
fn dmbridge(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmbridge"));
    command.env("TMPDIR", folder);
    command
}

fn run(args: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let output = dmbridge(folder.path()).args(args).output().unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{args:?} left {left:?}");
    output
}

/// Whoever asks for something impossible is told what, without a backtrace, and gets this exit code.
fn refuses(args: &[&str], code: i32, sentence: &str) {
    let output = run(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
    assert!(said.contains(sentence), "{args:?}: {said}");
    assert!(!said.contains("panicked") && !said.contains("backtrace"), "{args:?}: {said}");
    assert!(output.stdout.is_empty(), "{args:?}");
}

fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_cannot_be_is_refused_with_a_sentence() {
    refuses(&[], 2, "Usage");
    refuses(&["frobnicate"], 2, "frobnicate");
    refuses(&["bench", "--case", "latency-15"], 2, "latency-14");
    refuses(&["bench", "--transport", "carrier-pigeon"], 2, "dmbridge-map");
    refuses(&["bench", "--rounds", "0"], 2, "0 is not in 1..");
    refuses(
        &["bench", "--case", "latency-14", "--transport", "memcpy"],
        2,
        "latency-14 says nothing over memcpy",
    );
    refuses(
        &["bench", "--case", "latency-14,move-1m", "--transport", "tcp,dmbridge-inplace"],
        2,
        "dmbridge-inplace says nothing in latency-14, move-1m",
    );
    refuses(&["bench", "--vms", "--transport", "uds"], 2, "uds is measured only without --vms");
    refuses(&["bench", "--transport", "vsock"], 2, "vsock is measured only with --vms");
    refuses(&["bench", "--vms", "--case", "scale"], 2, "measure it without --vms");
    refuses(&["demo", "--file", "/nowhere"], 2, "/nowhere cannot be read");
    refuses(&["demo", "--file", "/"], 2, "/ is not a regular file");
    refuses(
        &["devices", "--control", "/nowhere/control.sock"],
        1,
        "there is no socket /nowhere/control.sock",
    );
    refuses(
        &["topology", "--control", "/nowhere/control.sock"],
        1,
        "there is no socket /nowhere/control.sock",
    );
    refuses(&["engines", "--control", "/dev/null"], 1, "/dev/null is not a socket");
    refuses(&["bench-worker", "a", "{}"], 1, "not by hand");
    refuses(&["demo-worker", "b", "{}"], 1, "not by hand");
}

#[test]
fn the_topology_shows_the_host_and_a_daemon_in_it() {
    build_daemon();
    let folder = tempfile::tempdir().unwrap();
    let control = folder.path().join("control.sock");
    let daemon = Path::new(env!("CARGO_BIN_EXE_dmbridge")).with_file_name("dmbridged");
    let mut command = Command::new(daemon);
    command.arg("--hub").arg(folder.path().join("hub.sock")).arg("--control").arg(&control);
    let _daemon = Running(command.args(["--log", "off"]).spawn().unwrap());
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !control.exists() {
        assert!(std::time::Instant::now() < deadline, "the daemon does not start");
        std::thread::yield_now();
    }
    let control = control.to_str().unwrap();
    let document = json(&run(&["topology", "--json", "--control", control]));
    assert!(document["nodes"][0]["memory_bytes"].as_u64().unwrap() > 0, "{document}");
    assert!(document["work_queues"].is_array(), "{document}");
    assert!(
        document["daemon"]["devices"].is_array() && document["daemon"]["extents"].is_array(),
        "{document}"
    );
    let text = String::from_utf8(run(&["topology", "--control", control]).stdout).unwrap();
    assert!(text.contains("node 0: CPU") && text.contains("0 devices"), "{text}");
}

#[test]
fn a_result_that_cannot_be_written_is_refused_before_anything_is_measured() {
    refuses(&["bench", "--json", "/nowhere/x.json"], 2, "/nowhere/x.json cannot be written");
    refuses(&["bench", "--html", "/"], 2, "/ cannot be written");
    refuses(&["bench", "--apps", "--json", "/"], 2, "/ cannot be written");
    refuses(&["bench", "--json", "-", "--html", "-"], 2, "both name -");
}

#[test]
fn an_output_that_takes_nothing_is_an_error_and_no_panic() {
    for args in [
        &["topology"][..],
        &["bench", "--quick", "--rounds", "1", "--case", "latency-14", "--transport", "uds"],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_dmbridge")).args(args).stdout(full).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains("standard output cannot be written: No space left"), "{args:?}: {said}");
    }
}

#[test]
fn a_socket_that_is_no_daemons_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let server = std::thread::spawn(move || drop(listener.accept()));
    refuses(&["devices", "--control", path.to_str().unwrap()], 1, "is not a dmbridged's control socket");
    server.join().unwrap();
    let silent = folder.path().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&silent).unwrap();
    refuses(&["engines", "--control", silent.to_str().unwrap()], 1, "has not answered for 10 s");
}

#[test]
fn a_benchmark_without_a_daemon_gives_the_documented_json() {
    let args = [
        "bench",
        "--quick",
        "--rounds",
        "2",
        "--case",
        "latency-14,stream-64k",
        "--transport",
        "uds",
        "--json",
        "-",
    ];
    let document = json(&run(&args));
    assert!(document["machine"]["kernel"].as_str().unwrap().starts_with("Linux"));
    assert_eq!(document["machine"]["cpus_used"].as_array().unwrap().len(), 2);
    let results = document["results"].as_array().unwrap();
    let names: Vec<_> = results.iter().map(|r| (r["case"].as_str(), r["transport"].as_str())).collect();
    assert_eq!(names, [(Some("latency-14"), Some("uds")), (Some("stream-64k"), Some("uds"))]);
    for result in results {
        let number = |field: &str| result[field].as_f64().unwrap();
        assert!(number("min") <= number("value") && number("value") <= number("max"), "{result}");
        assert!(number("value") > 0.0 && number("p50") > 0.0 && number("p99") > 0.0, "{result}");
        assert_eq!(result["rounds"], 2);
    }
    assert_eq!((&results[0]["unit"], &results[1]["unit"]), (&"ns".into(), &"GB/s".into()));
}

#[test]
fn every_transport_of_the_project_is_measured_and_shown() {
    build_daemon();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let ours = "dmbridge-map,dmbridge-inplace,dmbridge-move,cacheline,ring,memcpy";
    let args = ["bench", "--quick", "--rounds", "1", "--transport", ours, "--html", page.to_str().unwrap()];
    let output = run(&args);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for what in ["latency-14-sleep", "produce-64k", "dmbridge-inplace", "registrations", "promised"] {
        assert!(text.contains(what), "{what} is missing in {text}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    for what in ["<svg", "Latency by size", "Throughput by size", "How latency is distributed", "16 MiB"] {
        assert!(page.contains(what), "{what} is missing in the page");
    }
    for outside in ["<script", "<link", "src=", "@import"] {
        assert!(!page.contains(outside), "the page needs {outside}");
    }
}

#[test]
fn a_file_crosses_by_map_and_by_move() {
    build_daemon();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    // More than one piece, and not a whole number of anything.
    let content: Vec<u8> = (0..40_000_001u32).map(|i| (i * 7 / 3) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let document = json(&run(&["demo", "--json", "--file", path.to_str().unwrap()]));
    for way in ["map", "move"] {
        let crossed = &document[way];
        assert_eq!(crossed["bytes"], content.len());
        assert_eq!(crossed["verified"], true);
        assert!(crossed["seconds"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(document["map"]["sha256"], document["move"]["sha256"]);
}

#[test]
fn an_empty_file_crosses_too() {
    build_daemon();
    let file = tempfile::NamedTempFile::new().unwrap();
    let document = json(&run(&["demo", "--json", "--file", file.path().to_str().unwrap()]));
    assert_eq!((&document["map"]["bytes"], &document["move"]["verified"]), (&0.into(), &true.into()));
}

/// A running command, killed if the test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The processes that a process has started, and those that they have.
fn descendants(of: u32) -> Vec<u32> {
    let children = std::fs::read_to_string(format!("/proc/{of}/task/{of}/children")).unwrap_or_default();
    let children: Vec<u32> = children.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    children.iter().flat_map(|child| [vec![*child], descendants(*child)].concat()).collect()
}

#[test]
fn an_interrupted_run_leaves_no_process_and_no_folder() {
    build_daemon();
    let folder = tempfile::tempdir().unwrap();
    let mut command = dmbridge(folder.path());
    command.args(["bench", "--case", "stream-64k", "--transport", "dmbridge-map", "--rounds", "1000"]);
    command.stderr(Stdio::piped()).stdout(Stdio::null());
    let mut running = Running(command.spawn().unwrap());
    // It says which case it measures once everything has been started.
    let mut line = String::new();
    BufReader::new(running.0.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "stream-64k\n");
    let started = descendants(running.0.id());
    assert!(!started.is_empty());
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(running.0.id() as i32),
        nix::sys::signal::Signal::SIGINT,
    )
    .unwrap();
    assert_eq!(running.0.wait().unwrap().code(), Some(130));
    let left: Vec<PathBuf> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    for pid in started {
        // The kernel kills them when their parent ends; a zombie is dead.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with('Z'))
        };
        while alive() {
            assert!(std::time::Instant::now() < deadline, "process {pid} goes on");
            std::thread::yield_now();
        }
    }
}
