//! The kernel module's character device: unprivileged programs of guests have DMBs of their own, by the library.

use dmbridge_tests::deadline::until;
use dmbridge_tests::vm::kernel::{MODULE, assert_kernel_is_content, module};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Driven, Running, Vm, VmOptions, VmPair};
use nix::sys::signal::Signal;
use std::fs;
use std::time::Duration;

const FILE: &str = "/dev/dmbridge0";
/// How long anything may take: guests are slow without KVM.
const DEADLINE: Duration = Duration::from_secs(300);
/// Things that each program does which does whatever it can.
const STEPS: u64 = 4000;
/// More than any exchange here gets done.
const ENDLESS: u64 = 1 << 40;

fn setup() -> Lent<'static, VmPair> {
    static SETUP: Shared<VmPair> = Shared::new();
    SETUP.take(|| {
        let pair = VmPair::boot_with(|_, _, name| VmOptions::new(name));
        for vm in [&pair.a, &pair.b] {
            vm.push(&fs::read(module()).expect("the module was built"), MODULE);
            // What the udev rule does for a group is done for all here.
            vm.shell(&format!("modprobe smc; insmod {MODULE}; chmod 666 {FILE}"));
        }
        pair
    })
}

/// Loads the module anew. A virtual machine has few mappings, and what other tests have left takes some.
fn reload(vm: &Vm) {
    reload_with(vm, "");
}

fn reload_with(vm: &Vm, parameters: &str) {
    vm.shell(&format!(
        "until rmmod dmbridge 2>/dev/null; do sleep 0.1; done; insmod {MODULE} {parameters}; chmod 666 {FILE}"
    ));
}

/// A program of a user without privileges.
fn program(vm: &Vm) -> Driven {
    Driven::in_guest_as(vm, "nobody", &["file", FILE])
}

fn dmbs(setup: &VmPair) -> u64 {
    setup
        .daemon
        .report()
        .devices
        .iter()
        .map(|device| u64::from(device.dmbs) + u64::from(device.attached))
        .sum()
}

#[test]
fn programs_of_two_guests_exchange_by_map_and_by_moves() {
    let setup = setup();
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    let before = setup.moved_bytes();
    a.exchange(&mut b, ["attach"; 2], 1 << 20, 64 << 20);
    assert_eq!(setup.moved_bytes(), before);
    a.exchange(&mut b, ["move"; 2], 1 << 20, 8 << 20);
    assert!(setup.moved_bytes() - before >= 16 << 20);
    assert_kernel_is_content(&setup.a);
}

#[test]
fn a_program_that_sleeps_is_woken() {
    let setup = setup();
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    for how in ["attach", "move"] {
        a.is_woken_by(&mut b, how);
    }
}

#[test]
fn what_is_one_programs_is_not_anothers() {
    let setup = setup();
    let (mut a, mut b, mut thief) = (program(&setup.a), program(&setup.b), program(&setup.b));
    let (_, token) = a.register(&b, 4096);
    let (_, moved_token) = a.register(&b, 4096);
    b.sender("attach", &token);
    b.sender("move", &moved_token);
    assert!(thief.refused(&format!("attach {token}")).contains("Already"));
    assert!(thief.refused(&format!("move {token}")).contains("NoEntry"));
    assert!(thief.refused(&format!("move {moved_token}")).contains("NoEntry"));
    assert!(thief.refused(&format!("attach {moved_token}")).contains("Already"));
    let mut neighbour = program(&setup.a);
    assert!(neighbour.refused(&format!("attach {token}")).contains("NoEntry"));
}

#[test]
fn programs_meet_by_keys_that_are_their_own() {
    let setup = setup();
    let (mut a, mut neighbour, mut b) = (program(&setup.a), program(&setup.a), program(&setup.b));
    assert!(a.ask("meet one 7 I-am-a")["gid"].is_null());
    // Two programs may give the same number.
    assert!(neighbour.ask("meet two 7 I-am-the-neighbour")["gid"].is_null());
    assert!(a.refused("meet one 7 again").contains("Already"));
    assert_eq!(neighbour.ask("cancel one 7")["was"], false);
    for (key, other, says) in [("two", &mut neighbour, "I-am-the-neighbour"), ("one", &mut a, "I-am-a")] {
        let met = b.ask(&format!("meet {key} 1 I-am-b"));
        assert_eq!((met["gid"].as_str(), met["says"].as_str()), (Some(other.gid()), Some(says)));
        let event = other.event("rendezvous");
        assert_eq!((event["gid"].as_str(), &event["tag"]), (Some(b.gid()), &7.into()));
        assert_eq!(event["says"], "I-am-b");
    }
    // Programs of one guest are one device, and meet all the same.
    assert!(a.ask("meet three 1 hello")["gid"].is_null());
    assert_eq!(neighbour.ask("meet three 1 hello-too")["gid"].as_str(), Some(a.gid()));
    assert_eq!(a.event("rendezvous")["says"], "hello-too");
    let (a_dmb, token) = a.register(&neighbour, 4096);
    let sender = neighbour.sender("attach", &token);
    neighbour.ask(&format!("write {sender} 0 inside"));
    assert_eq!(a.ask(&format!("read {a_dmb} 0 6"))["text"], "inside");
    // A key that was taken back is nobody's.
    assert!(a.ask("meet four 1 hello")["gid"].is_null());
    assert_eq!(a.ask("cancel four 1")["was"], true);
    assert!(b.ask("meet four 1 hello")["gid"].is_null());
    assert_kernel_is_content(&setup.a);
}

#[test]
fn keys_of_a_program_that_is_killed_go_and_one_program_cannot_use_up_all() {
    let setup = setup();
    let (mut victim, mut b) = (program(&setup.a), program(&setup.b));
    let before = dmbs(&setup);
    // Its DMBs end after its keys.
    victim.register(&b, 4096);
    let mut waiting = 0;
    let refused = loop {
        victim.begin(&format!("meet key-{waiting} 1 hello"));
        match victim.try_answer() {
            Ok(answer) => assert!(answer["gid"].is_null(), "{answer}"),
            Err(error) => break error,
        }
        waiting += 1;
    };
    assert!(refused.contains("Quota") && waiting == 256, "{waiting}: {refused}");
    assert!(program(&setup.a).ask("meet another 1 hello")["gid"].is_null());
    victim.kill();
    until("the daemon has no DMB of it", || (dmbs(&setup) <= before).then_some(()));
    for number in [0, 255] {
        assert!(b.ask(&format!("meet key-{number} 1 hello"))["gid"].is_null());
    }
    assert_kernel_is_content(&setup.a);
}

#[test]
fn a_program_that_is_killed_leaves_nothing_and_others_go_on() {
    let setup = setup();
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    let before = dmbs(&setup);
    let (mut victim, mut other) = (program(&setup.a), program(&setup.b));
    victim.begin_exchange(&mut other, ["attach"; 2], 1 << 20, ENDLESS);
    a.exchange(&mut b, ["attach"; 2], 1 << 20, 16 << 20);
    victim.kill();
    a.exchange(&mut b, ["attach"; 2], 1 << 20, 16 << 20);
    other.kill();
    a.kill();
    b.kill();
    until("the daemon has no DMB of theirs", || (dmbs(&setup) <= before).then_some(()));
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

/// A program that uses the file without the library.
struct Bare<'a>(&'a Vm, Running);

impl Bare<'_> {
    fn start(vm: &Vm) -> Bare<'_> {
        let command = ["su", "-s", "/bin/sh", "nobody", "-c", &format!("exec vm-file {FILE}")];
        let mut bare = Bare(vm, vm.start_command(&command));
        bare.answer().expect("it opens the file");
        bare
    }

    fn begin(&mut self, command: &str) {
        self.0.expect(self.1.write(format!("{command}\n").as_bytes()));
    }

    fn answer(&mut self) -> Result<u64, String> {
        let line = self.0.expect(self.1.line(DEADLINE));
        line.parse().map_err(|_| line)
    }

    fn ask(&mut self, command: &str) -> Result<u64, String> {
        self.begin(command);
        self.answer()
    }

    fn kill(self) {
        self.0.expect(self.1.signal(Signal::SIGKILL));
        self.0.expect(self.1.wait(DEADLINE));
    }
}

#[test]
fn a_will_is_done_when_its_program_is_killed_and_is_no_more_than_the_program_could_do() {
    let setup = setup();
    let (mut a, b, before) = (program(&setup.a), program(&setup.b), dmbs(&setup));
    for how in ["attach TOKEN", "move TOKEN 100 x"] {
        let [told, withdrawn, lost] = [(); 3].map(|()| a.register(&b, 4096));
        let (mut victim, mut thief) = (Bare::start(&setup.b), Bare::start(&setup.b));
        for (_, token) in [&told, &withdrawn, &lost] {
            assert!(victim.ask(&format!("will {token} 0 early 1")).unwrap_err().contains("os error 2"));
            assert_eq!(victim.ask(&how.replace("TOKEN", token)), Ok(0));
            assert!(thief.ask(&format!("will {token} 0 stolen 1")).unwrap_err().contains("os error 2"));
        }
        for wrong in ["0 text 0", "0 longer-than-eight 1"] {
            let refused = victim.ask(&format!("will {} {wrong}", told.1)).unwrap_err();
            assert!(refused.contains("os error 22"), "{refused}");
        }
        // Beyond the DMB's end is nothing.
        victim.ask(&format!("will {} 4092 too-far 2", told.1)).expect("it is left");
        let number = victim.ask(&format!("will {} 8 mistake 1", withdrawn.1)).expect("it is left");
        assert_eq!(victim.ask(&format!("withdraw {number}")), Ok(0));
        assert!(victim.ask(&format!("withdraw {number}")).unwrap_err().contains("os error 2"));
        victim.ask(&format!("will {} 8 mistake 1", lost.1)).expect("it is left");
        if how.starts_with("attach") {
            assert_eq!(victim.ask(&format!("detach {}", lost.1)), Ok(0));
        } else {
            // What it moves to has ended.
            a.ask(&format!("drop-dmb {}", lost.0));
        }
        victim.ask(&format!("will {} 8 farewell 5", told.1)).expect("it is left");
        a.begin(&format!("wait {}", told.0));
        victim.kill();
        assert_eq!(a.answer()["bits"], 5);
        assert_eq!(a.ask(&format!("read {} 8 8", told.0))["text"], "farewell");
        assert_eq!(a.ask(&format!("read {} 4092 4", told.0))["text"], "\0\0\0\0");
        // Of a program that has ended, nothing comes any more.
        until("what it attached is free", || (dmbs(&setup) <= before + 3).then_some(()));
        assert_eq!(a.ask(&format!("read {} 8 8", withdrawn.0))["text"], "\0\0\0\0\0\0\0\0");
        for (dmb, _) in [told, withdrawn].into_iter().chain(how.starts_with("attach").then_some(lost)) {
            assert_eq!(a.ask(&format!("read {dmb} 0 8"))["text"], "\0\0\0\0\0\0\0\0");
            a.ask(&format!("drop-dmb {dmb}"));
        }
        thief.kill();
    }
    assert_kernel_is_content(&setup.b);
}

#[test]
fn a_program_that_does_whatever_it_can_harms_nobody() {
    let setup = setup();
    let (mut a, mut b, before) = (program(&setup.a), program(&setup.b), dmbs(&setup));
    let tokens: Vec<_> = (0..4).map(|_| b.register(&a, 8192).1).collect();
    let gids = [b.gid(), a.gid(), b.gid()].map(String::from);
    let mut hostile = [Bare::start(&setup.a), Bare::start(&setup.a), Bare::start(&setup.b)];
    for (seed, (program, gid)) in hostile.iter_mut().zip(&gids).enumerate() {
        program.begin(&format!("abuse {gid} {seed} {STEPS} {}", tokens.join(" ")));
    }
    a.exchange(&mut b, ["open"; 2], 1 << 20, 4 << 20);
    for program in &mut hostile {
        let succeeded = program.answer().expect("it does what it can");
        println!("{succeeded} of {STEPS} things succeeded");
        assert!(succeeded > STEPS / 10 && program.ask("attach 0").is_err());
    }
    hostile.into_iter().for_each(Bare::kill);
    a.exchange(&mut b, ["open"; 2], 1 << 20, 1 << 20);
    a.kill();
    b.kill();
    until("the daemon has no DMB of theirs", || (dmbs(&setup) <= before).then_some(()));
    for vm in [&setup.a, &setup.b] {
        reload(vm);
        assert_kernel_is_content(vm);
    }
}

#[test]
fn a_device_can_be_taken_away_whatever_its_programs_do() {
    let setup = setup();
    let name = setup.a.shell("cd /sys/bus/virtio/drivers/dmbridge; echo virtio*");
    let tell = |what: &str| {
        setup.a.shell(&format!("echo {} >/sys/bus/virtio/drivers/dmbridge/{what}", name.trim()));
    };
    for round in 0..3 {
        let mut b = program(&setup.b);
        let mut hostile = [Bare::start(&setup.a), Bare::start(&setup.a)];
        let gid = program(&setup.a).gid().to_string();
        let tokens: Vec<_> =
            (0..4).map(|_| b.ask(&format!("register {gid} 8192"))["tokens"][0].to_string()).collect();
        for (seed, program) in hostile.iter_mut().enumerate() {
            let tokens = tokens.join(" ").replace('"', "");
            program.begin(&format!("abuse {} {} {} {tokens}", b.gid(), 2 * round + seed, 4 * STEPS));
        }
        setup.a.shell(&format!("sleep 0.{round}"));
        tell("unbind");
        for program in &mut hostile {
            program.answer().expect("it does what it can");
            assert!(program.ask("attach 0").unwrap_err().contains("os error 19"), "it is gone");
        }
        tell("bind");
        setup.a.shell(&format!("chmod 666 {FILE}"));
        let mut a = program(&setup.a);
        a.exchange(&mut b, ["open"; 2], 1 << 20, 1 << 20);
        // What they had open and mapped is let go of when the next device is long there.
        hostile.into_iter().for_each(Bare::kill);
        a.exchange(&mut b, ["open"; 2], 1 << 20, 1 << 20);
        a.kill();
        b.kill();
    }
    for vm in [&setup.a, &setup.b] {
        reload(vm);
        assert_kernel_is_content(vm);
    }
}

#[test]
fn a_program_of_the_host_and_one_of_a_guest_meet() {
    let setup = setup();
    reload(&setup.a);
    let (mut guest, mut host) = (program(&setup.a), Driven::on_host(&setup.daemon.hub(), true));
    // Large DMBs have a control line of their own, so that they can be attached, if the window has room.
    guest.exchange(&mut host, ["open"; 2], 1 << 20, 16 << 20);
    let (_, token) = host.register(&guest, 4096);
    let refused = guest.refused(&format!("attach {token}"));
    assert!(refused.contains("NotSupported") || refused.contains("NoSpace"), "{refused}");
    let sender = guest.sender("open", &token);
    guest.ask(&format!("write {sender} 0 by a move"));
    let private = host.ask(&format!("register-private {} 4096", guest.gid()));
    let sender = guest.sender("attach", private["tokens"][0].as_str().expect("a token"));
    guest.ask(&format!("write {sender} 0 by a store"));
    assert_eq!(host.ask(&format!("read {} 0 10", private["dmb"]))["text"], "by a store");
}

#[test]
fn a_program_that_is_killed_while_it_moves_to_a_paused_guest_leaves_its_data_to_the_move() {
    let mut setup = setup();
    // So that DMBs lie in the guest's own memory.
    reload_with(&setup.b, "map=0");
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    let text = "0123456789abcdef".repeat(200);
    let (dmb, token) = b.register(&a, 65536);
    let sender = a.sender("move", &token);
    setup.b.pause();
    assert_eq!(a.event("paused")["gid"], b.gid());
    a.begin(&format!("write {sender} 0 {text}"));
    until("it waits in the kernel, and leaves the CPU to others", || {
        let stat = setup.a.shell("cat /proc/$(pidof vm-guest | tr ' ' '\\n' | sort -n | tail -n 1)/stat");
        let ticks: u64 = stat.split(' ').nth(14).expect("its time there").parse().expect("a number");
        (ticks > 20).then_some(())
    });
    a.kill();
    // What was its memory is others' now.
    setup.a.shell("dd if=/dev/zero of=/tmp/filled bs=1M count=32 2>/dev/null; rm /tmp/filled");
    setup.b.resume();
    let read = format!("read {dmb} 0 {}", text.len());
    until("the move is made", || (b.ask(&read)["text"] == text).then_some(()));
    let mut a = program(&setup.a);
    a.exchange(&mut b, ["open"; 2], 1 << 20, 1 << 20);
    a.kill();
    b.kill();
    reload(&setup.b);
    assert_kernel_is_content(&setup.a);
    assert_kernel_is_content(&setup.b);
}

#[test]
fn a_device_that_is_taken_away_ends_its_programs_connections() {
    let setup = setup();
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    a.begin_exchange(&mut b, ["attach"; 2], 1 << 20, ENDLESS);
    assert!(!setup.a.run(&["rmmod", "dmbridge"]).status.success(), "it is in use");
    let name = setup.a.shell("ls -d /sys/bus/virtio/drivers/dmbridge/virtio* | sed s,.*/,,");
    setup.a.shell(&format!("echo {} >/sys/bus/virtio/drivers/dmbridge/unbind", name.trim()));
    let error = a.try_answer().unwrap_err();
    assert!(error.contains("lost"), "{error}");
    let error = b.try_answer().unwrap_err();
    assert!(error.contains("gone"), "{error}");
    a.kill();
    setup.a.shell(&format!("echo {} >/sys/bus/virtio/drivers/dmbridge/bind; chmod 666 {FILE}", name.trim()));
    b.kill();
    let (mut a, mut b) = (program(&setup.a), program(&setup.b));
    a.exchange(&mut b, ["attach"; 2], 1 << 20, 1 << 20);
    assert_kernel_is_content(&setup.a);
}
