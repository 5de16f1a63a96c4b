//! Whatever a device presents as its configuration space, a driver uses it only if it keeps the specification.
#![no_main]

use dmbridge_proto::config::{CONFIG_SIZE, Config, MAGIC, VERSION_MAJOR};
use dmbridge_proto::shm::CopyPlan;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Half of the time behind a good start, so that more than the magic is tried.
    let mut behind_magic = [&MAGIC[..], &VERSION_MAJOR.to_le_bytes(), bytes].concat();
    check(bytes);
    check(&behind_magic);
    behind_magic.resize(CONFIG_SIZE, 0);
    behind_magic[0x68..0x6c].copy_from_slice(&4096u32.to_le_bytes());
    check(&behind_magic);
});

fn check(bytes: &[u8]) {
    let Ok(config) = Config::parse(bytes) else { return };
    assert!(bytes.len() >= CONFIG_SIZE && bytes.starts_with(&MAGIC));
    assert!(config.move_queues.get() > 0 && !config.gid.is_none());
    let plan = CopyPlan::from_bytes(config.copy_plan);
    assert_eq!(CopyPlan::from_bytes(plan.to_bytes()), plan);
    for len in [0, 255, 256, 1 << 20, usize::MAX] {
        plan.method(len);
    }
}
