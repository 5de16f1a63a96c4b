//! A thousand devices in one process: one thread serves them, and all is given back.

use dmbridge::Device;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::{DEADLINE, until_equal, until_good};
use std::fs;
use std::thread;

const DEVICES: usize = 1000;

fn count(what: &str) -> usize {
    fs::read_dir(format!("/proc/self/{what}")).unwrap().count()
}

fn file_mappings() -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains("memfd:")).count()
}

#[test]
fn a_thousand_devices_share_one_thread_and_leave_nothing() {
    // A device takes about a dozen descriptors, here and in the daemon, which inherits the limit.
    let (_, most) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    assert!(most >= 20_000, "this test needs a limit of 20,000 open files, it is {most}");
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most.min(65_536), most)
        .unwrap();
    let daemon = TestDaemon::start();
    // The first device starts the thread, which stays.
    drop(Device::connect(daemon.hub()).unwrap());
    until_equal("devices of the daemon", &0, || daemon.report().devices.len());
    let (threads, descriptors, mappings) = (count("task"), count("fd"), file_mappings());
    let before = daemon.holdings();

    let devices: Vec<_> = (0..DEVICES).map(|_| Device::connect(daemon.hub()).unwrap()).collect();
    assert_eq!(count("task"), threads);
    let buffers: Vec<_> = devices
        .iter()
        .zip(devices.iter().cycle().skip(1))
        .map(|(owner, peer)| {
            let dmb = owner.register(peer.gid(), 4096).unwrap();
            let remote = peer.attach(dmb.token()).unwrap();
            (dmb, remote)
        })
        .collect();
    thread::scope(|scope| {
        scope.spawn(|| {
            for (i, (_, remote)) in buffers.iter().enumerate() {
                remote.memory().slice(..).write_u64(0, i as u64);
                remote.signal(1).unwrap();
            }
        });
        for (i, (dmb, _)) in buffers.iter().enumerate() {
            assert_eq!(dmb.wait(Some(DEADLINE)).unwrap(), 1);
            assert_eq!(dmb.memory().slice(..).read_u64(0), i as u64);
        }
    });
    drop(buffers);
    drop(devices);
    until_equal("this process's threads", &threads, || count("task"));
    until_equal("descriptors and mappings", &(descriptors, mappings), || (count("fd"), file_mappings()));
    until_good("what the daemon holds", || daemon.holdings(), |after| after.is_within(&before));
}
