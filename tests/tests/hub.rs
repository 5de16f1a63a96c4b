//! The hub decides by what the kernel says of the peer.

use dmbridge_proto::status::Status::NoEntry;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::pair::Pair;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

fn group_of(daemon: &TestDaemon, device: &RawFrontend) -> String {
    let gid = device.gid().to_string();
    daemon.report().devices.into_iter().find(|d| d.gid == gid).expect("the device").group
}

#[test]
fn without_a_rule_every_user_is_a_group_of_its_own() {
    let daemon = TestDaemon::start();
    let mut a = RawFrontend::connect(daemon.hub());
    let b = RawFrontend::connect(daemon.hub());
    assert_eq!(group_of(&daemon, &a), format!("uid-{}", me()));
    assert!(a.query(b.gid()).is_ok());
    assert_ne!(a.gid(), b.gid());
}

#[test]
fn a_rule_puts_a_user_into_the_group_of_a_configured_device() {
    let configuration = format!(
        "[[device]]\nname = \"vm\"\nsocket = \"@/vm.sock\"\ngroup = \"shop\"\n\
         [hub]\nsocket = \"@/hub.sock\"\n[[hub.rule]]\nuid = {}\ngroup = \"shop\"\n",
        me()
    );
    let daemon = TestDaemon::start_with(&[], &configuration);
    let mut client = RawFrontend::connect(daemon.hub());
    let vm = RawFrontend::connect(daemon.path("vm.sock"));
    assert_eq!(group_of(&daemon, &client), "shop");
    assert!(client.query(vm.gid()).is_ok());
}

#[test]
fn a_refused_peer_is_closed_and_gets_no_device() {
    let configuration = "[hub]\nsocket = \"@/hub.sock\"\n[[hub.rule]]\nrefuse = true\n";
    let daemon = TestDaemon::start_with(&[], configuration);
    assert!(RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).is_err());
    assert_eq!(daemon.report().devices.len(), 0);
    assert!(daemon.log().contains("refuse"), "the log says so");
}

#[test]
fn two_users_are_two_groups() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can be two users");
        return;
    }
    let daemon = TestDaemon::start_with(&[], "[hub]\nsocket = \"@/hub.sock\"\nmode = 0o666\n");
    let mut root = RawFrontend::connect(daemon.hub());
    let mut nobody =
        RawFrontend::on_stream(connect_as(65534, &daemon), &Options::default(), &mut |_| {}).expect("served");
    assert_eq!(group_of(&daemon, &nobody), "uid-65534");
    assert_eq!(nobody.query(root.gid()), Err(NoEntry));
    assert_eq!(root.query(nobody.gid()), Err(NoEntry));
}

#[test]
fn the_hub_serves_no_more_devices_than_it_may() {
    let configuration = "[hub]\nsocket = \"@/hub.sock\"\nmax_devices_per_user = 3\n";
    let daemon = TestDaemon::start_with(&[], configuration);
    let devices: Vec<_> = (0..3).map(|_| RawFrontend::connect(daemon.hub())).collect();
    assert!(RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).is_err());
    drop(devices);
    until("there is room again", || {
        RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).ok()
    });
}

#[test]
fn without_descriptors_the_hub_refuses_and_the_daemon_goes_on() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    let limit = |number: &str| {
        let pid = daemon.pid().to_string();
        let status = Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={number}:")]).status();
        assert!(status.expect("prlimit").success());
    };
    // The lowest number that is free is the first one that it may not have.
    let free = (0..).find(|fd| !Path::new(&format!("/proc/{}/fd/{fd}", daemon.pid())).exists());
    limit(&free.expect("a number").to_string());
    for _ in 0..3 {
        assert!(RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).is_err());
    }
    let asks = UnixStream::connect(daemon.path("control.sock")).expect("it listens");
    witness.check();
    limit("4096");
    drop(asks);
    let device = until("there is room again", || {
        RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).ok()
    });
    assert_eq!(group_of(&daemon, &device), format!("uid-{}", me()));
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

/// A connection that was made with another effective user id: this thread's alone is changed, by the system call.
fn connect_as(uid: libc::uid_t, daemon: &TestDaemon) -> UnixStream {
    use std::os::unix::fs::PermissionsExt;
    let folder = daemon.hub().parent().expect("a folder").to_path_buf();
    std::fs::set_permissions(&folder, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let hub = daemon.hub();
    let connect = move || {
        let keep = libc::uid_t::MAX;
        // SAFETY: changes the ids of this thread only, which ends right after.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, keep, uid, keep) };
        assert_eq!(result, 0, "setresuid: {}", std::io::Error::last_os_error());
        UnixStream::connect(hub).expect("connect")
    };
    std::thread::spawn(connect).join().expect("the thread")
}
