//! The hub decides by what the kernel says of the peer.

use dmbridge_proto::status::Status::NoEntry;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::frontend::{Options, RawFrontend};
use std::os::unix::net::UnixStream;

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
    dmbridge_tests::deadline::until("there is room again", || {
        RawFrontend::try_connect(daemon.hub(), &Options::default(), &mut |_| {}).ok()
    });
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
