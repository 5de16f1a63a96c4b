//! A device that lies to the guests' kernel module: the guest neither crashes nor hangs, and an honest device works afterwards.
//!
//! The lies are the same in every run; set `SEED` to hear others.

use dmbridge_tests::liar::{GID, Liar, Mood};
use dmbridge_tests::vm::kernel::{MODULE, assert_kernel_is_content, module, set_up_smc};
use dmbridge_tests::vm::{Driven, Vm, VmOptions};
use serde_json::Value;
use std::fs;

const FILE: &str = "/dev/dmbridge0";
const DRIVER: &str = "/sys/bus/virtio/drivers/dmbridge";
const ROUNDS: u64 = 48;

/// The device's name on the guest's virtio bus.
fn device(vm: &Vm) -> String {
    vm.shell("grep -l '^0x0025' /sys/bus/virtio/devices/*/device | cut -d / -f 6").trim().into()
}

fn bind(vm: &Vm, device: &str) {
    vm.run(&["sh", "-c", &format!("echo {device} >{DRIVER}/bind")]);
}

/// Takes the device away from the module, if it has it.
fn unbind(vm: &Vm, device: &str) {
    vm.shell(&format!("test ! -e {DRIVER}/{device} || echo {device} >{DRIVER}/unbind"));
}

/// A program uses the device for all that there is, and has every answer, whatever it says.
fn use_it(vm: &Vm) {
    let Ok(mut program) = Driven::try_in_guest(vm, &["file", FILE]) else { return };
    let mut ask = |command: &str| {
        program.begin(command);
        program.try_answer()
    };
    let gid = GID.to_string();
    let mut tokens = Vec::new();
    for size in [8192, 4096, 1 << 20] {
        let _ = ask(&format!("query {gid}"));
        if let Ok(answer) = ask(&format!("register {gid} {size}")) {
            tokens.extend(answer["tokens"][0].as_str().map(String::from));
        }
    }
    for (token, how) in tokens.iter().zip(["attach", "move", "open"]) {
        if let Ok(answer) = ask(&format!("{how} {token}")) {
            let sender = answer["sender"].clone();
            let _ = ask(&format!("write {sender} 100 whatever"));
            let _ = ask(&format!("signal {sender} 3"));
        }
    }
    let _ = ask(&format!("tell {gid} 70000 1"));
    let _ = ask("read 0 100 8");
    let _ = ask("drop-sender 0");
    let _ = ask("drop-dmb 1");
    program.end();
}

/// Bytes go both ways between two AF_SMC sockets of the guest; what the first socket says.
fn exchange_by_smc(vm: &Vm, port: u64) -> Result<Value, String> {
    let port = port.to_string();
    let mut server = vm.start_command(&["vm-sockets", "smc", "listen", &port, "exchange", "1", "100000"]);
    assert_eq!(vm.expect(server.line(dmbridge_tests::vm::machine::COMMAND)), "listening");
    let client = vm.run(&["vm-sockets", "smc", "connect", "127.0.0.1", &port, "exchange", "1", "100000"]);
    drop(server);
    let said: Value = serde_json::from_str(client.text().trim()).map_err(|error| error.to_string())?;
    match said["error"].as_str() {
        Some(error) => Err(error.into()),
        None => Ok(said),
    }
}

#[test]
fn a_device_that_lies_does_the_guest_no_harm() {
    println!("SEED={}", std::env::var("SEED").unwrap_or_else(|_| "0".into()));
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("liar.sock");
    let liar = Liar::listen(&socket);
    let vm = VmOptions::new("victim").device(&socket).boot();
    vm.push(&fs::read(module()).expect("the module was built"), MODULE);
    // As it is by itself: SMC does not go on if it writes into DMBs itself and an attach is refused.
    vm.shell(&format!("modprobe smc; insmod {MODULE}"));
    set_up_smc(&vm);
    let device = device(&vm);
    exchange_by_smc(&vm, 7000).expect("an honest device works");
    for round in 0..ROUNDS {
        unbind(&vm, &device);
        let mood = match round % 4 {
            0 => Mood::Interrupts,
            1 => Mood::Anything(2),
            2 => Mood::Anything(8),
            _ => Mood::Anything(40),
        };
        println!("round {round}, {mood:?}");
        liar.begin(round, mood);
        bind(&vm, &device);
        use_it(&vm);
        if mood == Mood::Interrupts {
            exchange_by_smc(&vm, 7001 + round).expect("what it says of others does not matter");
        }
    }
    println!("{} lies", liar.lies());
    unbind(&vm, &device);
    liar.begin(0, Mood::Honest);
    bind(&vm, &device);
    use_it(&vm);
    exchange_by_smc(&vm, 7100).expect("an honest device works again");
    vm.shell("rmmod dmbridge");
    assert_kernel_is_content(&vm);
}
