//! The harness itself: commands in a guest behave as they would here, and a reset guest can be used again.

use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Running, Vm, VmOptions};
use nix::sys::signal::Signal;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

const DEADLINE: Duration = Duration::from_secs(60);

fn vm() -> Lent<'static, Vm> {
    static VM: Shared<Vm> = Shared::new();
    VM.take(|| VmOptions::new("harness").boot())
}

#[test]
fn a_command_has_a_status_and_two_outputs() {
    let vm = vm();
    let output = vm.run(&["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(output.status.code(), Some(7));
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    assert_eq!(vm.shell("hostname; uname -r | cut -d. -f1,2"), "harness\n6.1\n");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let vm = vm();
    let error = vm.start_command(&["no-such-program"]).wait(DEADLINE).unwrap_err();
    assert!(error.contains("no-such-program") && error.contains("No such file"), "{error}");
}

#[test]
fn bytes_of_every_value_pass_through_a_guest() {
    let vm = vm();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vm.push(&bytes, "/tmp/bytes");
    assert!(vm.run(&["cat", "/tmp/bytes"]).stdout == bytes, "other bytes came back");
    vm.shell("rm /tmp/bytes");
}

#[test]
fn commands_run_side_by_side_and_are_talked_to() {
    let vm = vm();
    let mut first = vm.start_command(&["cat"]);
    let mut second = vm.start_command(&["cat"]);
    let say = |text: &str, command: &mut Running| {
        command.write(format!("{text}\n").as_bytes()).unwrap();
        assert_eq!(command.line(DEADLINE).unwrap(), text);
    };
    say("one", &mut first);
    say("two", &mut second);
    say("three", &mut first);
    first.end_input().unwrap();
    assert_eq!(first.wait(DEADLINE).unwrap().text(), "one\nthree\n");
    second.signal(Signal::SIGKILL).unwrap();
    assert_eq!(second.wait(DEADLINE).unwrap().status.signal(), Some(9));
}

#[test]
fn what_is_too_late_is_named() {
    let vm = vm();
    let command = vm.start_command(&["sh", "-c", "echo before; sleep 1000"]);
    let error = command.wait(Duration::from_millis(500)).unwrap_err();
    assert!(error.contains("sleep 1000") && error.contains("in time") && error.contains("before"), "{error}");
}

#[test]
fn a_reset_ends_commands_and_the_guest_can_be_used_again() {
    let mut vm = vm();
    let mut talker = vm.start_command(&["cat", "/dev/zero"]);
    vm.shell("touch /tmp/here");
    vm.reset();
    let error = talker.line(DEADLINE).unwrap_err();
    assert!(error.contains("reset") || error.contains("started again"), "{error}");
    assert_eq!(vm.shell("ls /tmp"), "");
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    let mut vm = vm();
    vm.pause();
    let mut command = vm.start_command(&["echo", "awake"]);
    assert!(command.line(Duration::from_millis(500)).is_err());
    vm.resume();
    assert_eq!(command.line(DEADLINE).unwrap(), "awake");
}
