//! `dmbridge-run --stats` stays to count, and is otherwise as if the program ran in its place.

use dmbridge_tests::deadline::until;
use dmbridge_tests::preload::{Way, daemon, find};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Stdio};

/// A program that says its process id, and for each signal of these that it has come; it ends with SIGTERM.
const PROGRAM: &str = "import os, signal, sys\n\
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])\n\
    print(os.getpid(), flush=True)\n\
    while True:\n\
    \x20   signal.sigwait([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]) == signal.SIGTERM and sys.exit(7)\n\
    \x20   print('came', flush=True)\n";

fn start(way: Way<'_>, program: &str) -> (Child, impl FnMut() -> String) {
    let mut command = way.command("python3", &["-c", program]);
    let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
    let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
    let line = move || {
        let mut line = String::new();
        out.read_line(&mut line).expect("a line");
        line.trim().to_string()
    };
    (child, line)
}

fn pid(number: &str) -> Pid {
    Pid::from_raw(number.parse().expect("a process id"))
}

/// The state of a process, as `ps` shows it; `None`: it is not there.
fn state(pid: Pid) -> Option<char> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit(')').next()?.trim().chars().next()
}

#[test]
fn signals_and_the_exit_status_are_passed_on() {
    let daemon = daemon();
    let (mut runner, mut line) = start(Way::Dmbridge(&daemon), PROGRAM);
    line();
    let to = pid(&runner.id().to_string());
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        kill(to, signal).expect("it is there");
        assert_eq!(line(), "came", "{signal}");
    }
    kill(to, Signal::SIGTERM).expect("it is there");
    assert_eq!(runner.wait().expect("it ends").code(), Some(7));
}

#[test]
fn a_program_that_stops_stops_the_runner_until_both_go_on() {
    let daemon = daemon();
    let (mut runner, mut line) = start(Way::Dmbridge(&daemon), PROGRAM);
    let program = pid(&line());
    let to = pid(&runner.id().to_string());
    kill(program, Signal::SIGSTOP).expect("it is there");
    until("both stop", || (state(program) == Some('T') && state(to) == Some('T')).then_some(()));
    kill(to, Signal::SIGCONT).expect("it is there");
    until("the program goes on", || (state(program) == Some('S')).then_some(()));
    kill(to, Signal::SIGTERM).expect("it is there");
    assert_eq!(runner.wait().expect("it ends").code(), Some(7));
}

#[test]
fn a_program_that_a_signal_ends_ends_the_runner_the_same_way() {
    let daemon = daemon();
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGABRT] {
        let program = format!("import os; os.kill(os.getpid(), {})", signal as i32);
        let (mut runner, _) = start(Way::Dmbridge(&daemon), &program);
        assert_eq!(runner.wait().expect("it ends").signal(), Some(signal as i32));
    }
}

#[test]
fn a_runner_that_is_killed_leaves_nothing_behind() {
    let daemon = daemon();
    let (mut runner, mut line) = start(Way::Dmbridge(&daemon), PROGRAM);
    let program = pid(&line());
    runner.kill().expect("it is there");
    runner.wait().expect("it ends");
    until("the program ends", || matches!(state(program), None | Some('Z')).then_some(()));
    // Its counters are there until the next one comes.
    let left = |pid: u32| Path::new(&format!("/dev/shm/dmbridge-run.{pid}.0")).exists();
    let (other, mut line) = start(Way::Dmbridge(&daemon), PROGRAM);
    line();
    assert!(!left(runner.id()));
    assert!(left(other.id()));
    let (last, mut line) = start(Way::Dmbridge(&daemon), PROGRAM);
    line();
    assert!(left(other.id()) && left(last.id()), "those that are used stay");
    for mut child in [other, last] {
        kill(pid(&child.id().to_string()), Signal::SIGTERM).expect("it is there");
        child.wait().expect("it ends");
        assert!(!left(child.id()));
    }
}

#[test]
fn a_program_whose_loader_is_another_one_is_not_preloaded() {
    let daemon = daemon();
    let folder = tempfile::tempdir().expect("a folder");
    // `env`, with a loader of another name, which has to be as short as the old one.
    let loader = format!("/tmp/dmb-ld-{}", std::process::id());
    let name: &[u8] = b"/lib64/ld-linux-x86-64.so.2";
    std::os::unix::fs::symlink(String::from_utf8_lossy(name).as_ref(), &loader).expect("a link");
    let mut bytes = std::fs::read(find("env")).expect("a program");
    let at = bytes.windows(name.len()).position(|at| at == name).expect("its loader");
    bytes[at..at + name.len()].fill(0);
    bytes[at..at + loader.len()].copy_from_slice(loader.as_bytes());
    let program = folder.path().join("program");
    std::fs::write(&program, bytes).expect("a program");
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("permissions");
    let program = program.to_str().expect("a plain name");
    let way = Way::Dmbridge(&daemon);
    let preloads = |ran: dmbridge_tests::preload::Ran| ran.out.contains("LD_PRELOAD");
    assert!(preloads(way.run("env", &[])));
    assert!(!preloads(way.run(program, &[])));
    assert!(!preloads(way.run("sh", &["-c", program])));
    std::fs::remove_file(loader).expect("the link");
}
