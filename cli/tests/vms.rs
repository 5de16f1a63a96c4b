//! `dmbridge bench --vms` boots two virtual machines and measures in them. That it works, not what comes out.

mod support;

use serde_json::Value;
use std::process::Command;
use support::build_daemon;

#[test]
fn two_virtual_machines_are_measured_and_shown() {
    build_daemon();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    // Without AF_VSOCK, which would have to be built first.
    let transports = "dmbridge-map,dmbridge-move,tcp,af-smc,chardev";
    let mut command = Command::new(env!("CARGO_BIN_EXE_dmbridge"));
    command.env("TMPDIR", folder.path());
    command.args([
        "bench",
        "--vms",
        "--quick",
        "--rounds",
        "1",
        "--transport",
        transports,
        "--json",
        "-",
        "--html",
    ]);
    let output = command.arg(&page).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let guests = &document["machine"]["guests"];
    assert!(["TCG", "KVM"].contains(&guests["accelerator"].as_str().unwrap()), "{guests}");
    assert!(guests["kernel"].as_str().unwrap().starts_with("Linux 6.1"), "{guests}");
    assert_eq!(guests["not_measured"].as_array().unwrap().len(), 0, "{guests}");
    let results = document["results"].as_array().unwrap();
    for case in ["latency-14", "latency-14-sleep", "rate-100", "stream-64k", "move-1m"] {
        for transport in transports.split(',') {
            // On two CPUs, two guests that poll leave none for the device.
            if (case, transport) == ("latency-14", "dmbridge-move") {
                continue;
            }
            let found = results.iter().find(|r| r["case"] == case && r["transport"] == transport);
            let value = found.and_then(|result| result["value"].as_f64());
            assert!(value.is_some_and(|value| value > 0.0), "{case} over {transport}: {found:?}");
        }
    }
    let page = std::fs::read_to_string(&page).unwrap();
    for what in ["Two virtual machines under QEMU", "<svg", "in each virtual machine"] {
        assert!(page.contains(what), "{what} is missing in the page");
    }
    std::fs::remove_file(folder.path().join("page.html")).unwrap();
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}
