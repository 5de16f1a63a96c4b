//! Messages between two processes that copy out of each other's memory: what the kernel allows, what it forbids, and what
//! happens when one of them dies. The other process is this program again.

use dmbridge::message::{Channel, Direct};
use dmbridge::{Device, Error, Gid, Token};
use dmbridge_tests::daemon::{TestDaemon, end_with_this_thread};
use dmbridge_tests::deadline::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const DMB: usize = 1 << 20;
/// Tells the other process what to do; absent in this one.
const JOB: &str = "DMBRIDGE_TEST_TALKER";
const NOBODY: u32 = 65534;
const CONFIGURATION: &str = "[hub]\nsocket = \"@/hub.sock\"\nmode = 0o666\n[[hub.rule]]\ngroup = \"all\"\n";

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 4099 + seed) as u8).collect()
}

/// A channel with the process at the other end of these pipes.
fn channel(device: &Device, input: &mut dyn BufRead, output: &mut dyn Write) -> Channel {
    let mut exchange = |say: String| {
        writeln!(output, "{say}").expect("the other process listens");
        output.flush().expect("the other process listens");
        loop {
            let mut line = String::new();
            assert!(input.read_line(&mut line).expect("a line") > 0, "the other process has ended");
            // The test harness of the other process says something, too, and without an end of the line.
            if let Some((_, said)) = line.trim().split_once("talker: ") {
                return said.to_string();
            }
        }
    };
    let peer: Gid = exchange(format!("talker: {}", device.gid())).parse().expect("a GID");
    let local = device.register(peer, DMB).expect("a DMB");
    let token = exchange(format!("talker: {}", local.token().to_bits())).parse().expect("a token");
    let remote = device.attach(Token::from_bits(token)).expect("attached");
    Channel::open_with(local, remote, Direct::From(1)).expect("a channel")
}

/// The other process.
struct Talker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talker {
    fn start(daemon: &TestDaemon, job: &str, uid: Option<u32>) -> Talker {
        // The program lies where not everybody may look.
        let program = daemon.path("talker");
        // Copied by another process: while this one had it open to write, a program that another test starts would have it
        // open as well, and nobody could run it.
        let copied =
            Command::new("cp").args([&std::env::current_exe().expect("this program"), &program]).status();
        assert!(copied.expect("cp").success(), "a copy of this program");
        for (path, mode) in [(daemon.path(""), 0o755), (program.clone(), 0o755)] {
            fs::set_permissions(path, Permissions::from_mode(mode)).expect("permissions");
        }
        let mut command = Command::new(program);
        command.args(["--exact", "talker", "--nocapture"]).env(JOB, job).env("HUB", daemon.hub());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        end_with_this_thread(&mut command);
        let mut child = command.spawn().expect("the other process starts");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        Talker { child, input, output: BufReader::new(output) }
    }

    fn channel(&mut self, device: &Device) -> Channel {
        channel(device, &mut self.output, &mut self.input)
    }

    fn ends_well(mut self) {
        assert!(self.child.wait().expect("wait").success());
    }
}

/// What the other process does.
#[test]
fn talker() {
    let Ok(job) = std::env::var(JOB) else { return };
    let hub = std::env::var("HUB").expect("a hub");
    let device = Device::connect(Path::new(&hub)).expect("a device");
    let mut channel = channel(&device, &mut std::io::stdin().lock(), &mut std::io::stdout());
    let mut buffer = vec![0; 16 << 20];
    match job.as_str() {
        "echo" => {
            while let Some(len) = channel.recv(&mut buffer).expect("a message") {
                channel.send(&buffer[..len]).expect("sent");
            }
        }
        // Somebody kills it.
        "offer" => {
            let _ = channel.send(&buffer);
        }
        "sleep" => std::thread::sleep(std::time::Duration::from_secs(1000)),
        other => panic!("{other} is no job"),
    }
}

fn echo(daemon: &TestDaemon, uid: Option<u32>, direct: bool) {
    let device = Device::connect(daemon.hub()).expect("a device");
    let mut talker = Talker::start(daemon, "echo", uid);
    let mut channel = talker.channel(&device);
    assert_eq!(channel.direct().is_ok(), direct, "{:?}", channel.direct());
    let mut buffer = vec![0; 16 << 20];
    for (seed, len) in [1, 5000, 1 << 20, 16 << 20].into_iter().enumerate() {
        let message = pattern(len, seed);
        channel.send(&message).expect("sent");
        assert_eq!(channel.recv(&mut buffer).expect("a message"), Some(len));
        assert!(buffer[..len] == message, "{len} bytes");
    }
    drop(channel);
    talker.ends_well();
}

#[test]
fn processes_of_one_user_copy_out_of_each_others_memory() {
    let daemon = TestDaemon::start();
    // A test may run where the kernel lets nobody do that.
    let yama = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    echo(&daemon, None, matches!(yama.trim(), "" | "0") || Uid::effective().is_root());
}

#[test]
fn what_the_kernel_forbids_goes_through_the_dmbs() {
    if !Uid::effective().is_root() {
        eprintln!("skipped: only root can start a process of another user");
        return;
    }
    let daemon = TestDaemon::start_with(&[], CONFIGURATION);
    echo(&daemon, Some(NOBODY), false);
}

#[test]
fn a_sender_that_dies_ends_the_wait_for_its_message() {
    let daemon = TestDaemon::start();
    let device = Device::connect(daemon.hub()).expect("a device");
    let mut talker = Talker::start(&daemon, "offer", None);
    let mut channel = talker.channel(&device);
    // The offer is there, and nobody has taken it.
    assert_eq!(channel.receiver().next_len().expect("an offer"), Some(16 << 20));
    kill(Pid::from_raw(talker.child.id() as i32), Signal::SIGKILL).expect("kill");
    talker.child.wait().expect("wait");
    let error = channel.recv(&mut vec![0; 16 << 20]).expect_err("its memory is gone");
    assert!(matches!(error, Error::PeerGone | Error::Closed), "{error}");
}

#[test]
fn a_receiver_that_dies_ends_the_wait_of_its_sender() {
    let daemon = TestDaemon::start();
    let device = Device::connect(daemon.hub()).expect("a device");
    let mut talker = Talker::start(&daemon, "sleep", None);
    let mut channel = talker.channel(&device);
    let pid = Pid::from_raw(talker.child.id() as i32);
    let message = pattern(1 << 20, 0);
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| channel.send(&message));
        kill(pid, Signal::SIGKILL).expect("kill");
        let error = sender.join().expect("no panic").expect_err("nobody takes it");
        assert!(matches!(error, Error::PeerGone | Error::Closed), "{error}");
    });
    until("it has ended", || talker.child.try_wait().expect("wait"));
}
