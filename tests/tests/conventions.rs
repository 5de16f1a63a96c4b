//! The program `dmbridged` as people and management software start it.

use dmbridge_tests::daemon::{TestDaemon, program};
use dmbridge_tests::deadline::until;
use dmbridge_tests::frontend::{Options, RawFrontend};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// Runs the program to its end: exit code, standard output, standard error.
fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(program()).args(args).stdin(Stdio::null()).output().expect("dmbridged runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_string();
    (output.status.code().expect("an exit code"), text(&output.stdout), text(&output.stderr))
}

#[test]
fn capabilities_are_printed_whatever_else_is_asked_for() {
    for args in [&["--print-capabilities"][..], &["--print-capabilities", "--fd", "77", "--nonsense"]] {
        let (code, out, err) = run(args);
        assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
        let json: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(json["type"], "rpmsg");
    }
}

#[test]
fn what_cannot_be_is_told_in_one_sentence_with_exit_code_2() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("c.toml");
    let file = file.to_str().expect("a plain name");
    std::fs::write(file, "[limits]\nmax_dmb = 7\n").expect("a file");
    for (args, want) in [
        (&[][..], "there is nothing to serve"),
        (&["--config", file], "c.toml, line 2: unknown field `max_dmb`"),
        (&["--config", "/nowhere"], "/nowhere: cannot read the configuration file"),
        (&["--fd", "55"], "--fd 55: no such descriptor is open"),
        (&["--hub", "/x", "--pool-size", "many"], "\"many\" is not a size"),
        (&["--hub", "/x", "--movers", "0"], "movers = 0 is not possible; choose 1 to 64"),
        (&["--hub", "/x", "--group", "g"], "--group is for the devices of --socket-path and --fd"),
        (&["--hub", "/x", "--control", "/x"], "the socket /x is there twice"),
        (&["--hub", "/x", "--huge-pages", "3M"], "huge_pages = 3M is not possible; this host has"),
        (&["--hub", "/x", "--pool-size", "1"], "choose 2M to 128T"),
        (&["--hub", "/x", "--window-size", "3M"], "window_size = 3M is not possible; choose a power of two"),
        (&["--socket-path", "/x", "--socket-path", "/x"], "is there twice"),
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(want), "{args:?}: {err}");
        assert!(!err.contains("panicked") && !err.contains("backtrace"), "{args:?}: {err}");
    }
    assert_eq!(run(&["--socket-path", "/x", "--fd", "3"]).0, 2);
    assert_eq!(run(&["--hub", "/x", "--check"]).0, 0);
}

#[test]
fn what_fails_is_told_in_one_sentence_with_exit_code_1() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("a plain name").to_string();
    let (used, file, missing) = (path("used"), path("file"), path("missing/hub"));
    let _listener = UnixListener::bind(&used).expect("a socket");
    std::fs::write(&file, "precious").expect("a file");
    for (socket, want) in [
        (&used, "a process already listens on this socket"),
        (&file, "exists and is not a socket"),
        (&missing, "cannot make the socket"),
    ] {
        for flag in ["--hub", "--socket-path"] {
            let (code, _, err) = run(&["--log", "off", flag, socket]);
            assert_eq!(code, 1, "{flag} {socket}: {err}");
            assert!(err.contains(want) && err.contains(socket.as_str()), "{flag}: {err}");
        }
    }
    assert_eq!(std::fs::read(&file).expect("the file is still there"), b"precious");
}

#[test]
fn a_descriptor_is_served_and_its_end_ends_the_daemon() {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let fd = theirs.as_raw_fd();
    let mut command = Command::new(program());
    command.args(["--fd", &fd.to_string(), "--log", "off"]).stdin(Stdio::null());
    dmbridge_tests::daemon::end_with_this_thread(&mut command);
    // SAFETY: between fork and exec, fcntl is one system call on a descriptor that is open.
    unsafe {
        command.pre_exec(move || match libc::fcntl(fd, libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let mut daemon = command.spawn().expect("dmbridged runs");
    drop(theirs);
    let mut device = RawFrontend::on_stream(ours, &Options::default(), &mut |_| {}).expect("a device");
    let gid = device.gid();
    let dmb = device.register(gid, 4096).expect("a DMB");
    assert_eq!(device.move_bytes(dmb.token, 0, b"to myself"), Ok(()));
    drop(device);
    let status = until("the daemon ends", || daemon.try_wait().expect("wait"));
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_configured_device_keeps_its_gid_and_can_be_connected_again() {
    let device = "[[device]]\nname = \"vm\"\nsocket = \"@/vm.sock\"\ngid = \"4242\"\n";
    let daemon = TestDaemon::start_with(&[], device);
    for _ in 0..3 {
        let mut device = RawFrontend::connect(daemon.path("vm.sock"));
        let gid = device.gid();
        assert_eq!(gid.to_string(), "0000000000004242");
        device.register(gid, 4096).expect("a DMB");
        let report: serde_json::Value =
            serde_json::from_str(&daemon.get("/v1/devices/4242").expect("an answer")).expect("JSON");
        assert_eq!(
            (&report["name"], &report["started"], &report["dmbs"]),
            (&"vm".into(), &true.into(), &1.into())
        );
    }
    until("the device is free again", || {
        let report = daemon.report();
        report.devices.iter().any(|d| d.name == "vm" && d.peer.is_none() && d.dmbs == 0).then_some(())
    });
}

#[test]
fn a_driver_may_reset_its_device_and_start_again() {
    let daemon = TestDaemon::start();
    let mut peer = RawFrontend::connect(daemon.hub());
    let mut device = RawFrontend::connect(daemon.hub());
    let dmb = device.register(peer.gid(), 4096).expect("a DMB");
    peer.attach(dmb.token).expect("attached");
    device.reset();
    let reason = peer.wait_event("the device is gone", |event| match event {
        dmbridge_proto::event::Event::DeviceGone { reason, .. } => Some(*reason),
        _ => None,
    });
    assert_eq!(reason, dmbridge_proto::event::GoneReason::Reset);
    assert_eq!(peer.query(device.gid()), Err(dmbridge_proto::status::Status::NoEntry), "it is not started");
    let gid = device.gid().to_string();
    let of_it = |what: &dyn Fn(&dmbridged::report::DeviceReport) -> u64| {
        daemon.report().devices.iter().find(|d| d.gid == gid).map(what).expect("the device")
    };
    assert_eq!(of_it(&|d| u64::from(d.started) + u64::from(d.dmbs) + d.mapped_bytes), 0);

    device.start(&mut |_| {}).expect("started again");
    device.post_event_buffers(16);
    let dmb = device.register(peer.gid(), 4096).expect("a DMB");
    let remote = peer.attach(dmb.token).expect("attached");
    peer.window().write(remote.offset, b"again");
    assert_eq!(device.window().read(dmb.offset, 5), b"again");
    assert_eq!(of_it(&|d| d.map_requests), 2);
}

#[test]
fn the_control_api_answers_what_it_documents() {
    let daemon = TestDaemon::start();
    let mut device = RawFrontend::connect(daemon.hub());
    let gid = device.gid();
    let dmb = device.register(gid, 8192).expect("a DMB");
    device.attach(dmb.token).expect("attached");
    device.move_bytes(dmb.token, 0, &[1; 5000]).expect("moved");
    let report = daemon.report();
    assert_eq!(report.pid, daemon.pid());
    assert_eq!(report.threads as usize, daemon.holdings().threads);
    let me = report.devices.iter().find(|d| d.gid == gid.to_string()).expect("this device");
    let peer = me.peer.expect("this process");
    assert_eq!((peer.pid, peer.uid), (std::process::id() as i32, nix::unistd::geteuid().as_raw()));
    assert_eq!((me.dmbs, me.dmb_bytes, me.attached), (1, 8192, 1));
    assert_eq!((me.moves, me.moved_bytes), (1, 5000));
    assert!(me.started && me.map && !me.futex);
    assert_eq!(me.group, format!("uid-{}", peer.uid));
    assert!(report.pool.extent_bytes >= me.mapped_bytes / 2 && report.pool.extents == 1);
    let missing: serde_json::Value =
        serde_json::from_str(&daemon.get("/v1/devices/1").expect("an answer")).expect("JSON");
    assert!(missing["error"].is_string());
}
