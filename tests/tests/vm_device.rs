//! The device as a guest under stock QEMU finds it, with no driver of ours: identification, configuration, features,
//! and what is left on the host when the guest or the device goes.

use dmbridge_proto::config::{CONFIG_SIZE, Config};
use dmbridge_proto::features::Features;
use dmbridge_tests::daemon::{Holdings, TestDaemon};
use dmbridge_tests::deadline::{until, until_good};
use dmbridge_tests::vm::shared::{Lent, Shared};
use dmbridge_tests::vm::{Vm, VmOptions};

/// Capability of virtio's PCI transport (VIRTIO 1.3, 4.1.4): a piece of a BAR.
#[derive(Debug, Clone, Copy)]
struct Capability {
    kind: u8,
    bar: u8,
    id: u8,
    offset: u64,
    len: u64,
}

const COMMON: u8 = 1;
const DEVICE: u8 = 4;
const SHARED_MEMORY: u8 = 8;
/// The folder of the guest's only device behind the first root port.
const FOLDER: &str = "/sys/bus/pci/devices/0000:01:00.0";

struct Setup {
    daemon: TestDaemon,
    /// The daemon before any front-end.
    before: Holdings,
    vm: Vm,
}

impl Setup {
    fn new() -> Setup {
        let daemon = TestDaemon::start_with(&["--socket-path", "@/a.sock", "--window-size", "256M"], "");
        let before = daemon.holdings();
        let vm = VmOptions::new("a").device(&daemon.path("a.sock")).boot();
        Setup { daemon, before, vm }
    }

    /// Whether a front-end is connected, as the daemon sees it.
    fn connected(&self) -> bool {
        self.daemon.report().devices[0].peer.is_some()
    }

    fn wait_until_nothing_is_left(&self) {
        until_good("what the daemon holds", || self.daemon.holdings(), |after| after.is_within(&self.before));
    }
}

fn setup() -> Lent<'static, Setup> {
    static SETUP: Shared<Setup> = Shared::new();
    SETUP.take(Setup::new)
}

fn capabilities(vm: &Vm) -> Vec<Capability> {
    let bytes = vm.run(&["cat", &format!("{FOLDER}/config")]).stdout;
    let word = |at: usize| u64::from(u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()));
    let mut found = Vec::new();
    let mut at = usize::from(bytes[0x34]);
    while at != 0 {
        // Vendor specific: all of virtio's are.
        if bytes[at] == 9 {
            let kind = bytes[at + 3];
            // Those of shared memory have 64 bits, in two places.
            let high = |at| if kind == SHARED_MEMORY { word(at) << 32 } else { 0 };
            found.push(Capability {
                kind,
                bar: bytes[at + 4],
                id: bytes[at + 5],
                offset: word(at + 8) | high(at + 16),
                len: word(at + 12) | high(at + 20),
            });
        }
        at = usize::from(bytes[at + 1]);
    }
    found
}

/// The one capability of this kind, and its physical address in the guest.
fn capability(vm: &Vm, kind: u8) -> (Capability, u64) {
    let found: Vec<_> = capabilities(vm).into_iter().filter(|c| c.kind == kind).collect();
    assert_eq!(found.len(), 1, "capabilities of kind {kind}: {found:?}");
    let line = vm.shell(&format!("sed -n {}p {FOLDER}/resource", found[0].bar + 1));
    let start = line.split(' ').next().and_then(|n| u64::from_str_radix(n.strip_prefix("0x")?, 16).ok());
    (found[0], start.expect("a BAR has an address") + found[0].offset)
}

/// Takes the device from the guest's own driver, so that its registers can be looked at.
fn unbind(vm: &Vm) {
    vm.shell(&format!(
        "if [ -e {FOLDER}/driver ]; then echo 0000:01:00.0 >{FOLDER}/driver/unbind; fi; echo 1 >{FOLDER}/enable"
    ));
}

#[test]
fn the_device_is_a_virtio_device_of_the_id_that_qemu_accepts() {
    let setup = setup();
    let id = setup.vm.shell(&format!("cat {FOLDER}/vendor {FOLDER}/device {FOLDER}/revision"));
    assert_eq!(id, "0x1af4\n0x1065\n0x01\n");
    assert!(setup.connected());
}

#[test]
fn the_configuration_space_is_the_daemons() {
    let setup = setup();
    unbind(&setup.vm);
    let (capability, address) = capability(&setup.vm, DEVICE);
    // QEMU always says a page.
    assert!(capability.len >= CONFIG_SIZE as u64, "{capability:?}");
    let words = (address..address + CONFIG_SIZE as u64).step_by(4).map(|at| format!("devmem {at:#x} 32;"));
    let text = setup.vm.shell(&words.collect::<String>());
    let bytes: Vec<u8> = text
        .lines()
        .flat_map(|word| u32::from_str_radix(word.trim_start_matches("0x"), 16).unwrap().to_le_bytes())
        .collect();
    let config = Config::parse(&bytes).unwrap();
    assert_eq!(config.gid.to_string(), setup.daemon.report().devices[0].gid);
    assert_eq!(config.window_size.get(), 256 << 20);
    assert_eq!(config.move_queues.get(), 1);
}

#[test]
fn the_window_is_shared_memory_region_1_and_reads_as_nothing() {
    let setup = setup();
    unbind(&setup.vm);
    let (capability, address) = capability(&setup.vm, SHARED_MEMORY);
    assert_eq!((capability.id, capability.len), (1, 256 << 20));
    // Nothing is mapped: what the guest reads and writes there is no memory of the host's.
    let text = setup.vm.shell(&format!("devmem {address:#x} 32 0x12345678; devmem {address:#x} 32"));
    assert!(text == "0x00000000\n" || text == "0xFFFFFFFF\n", "{text}");
}

#[test]
fn the_device_offers_to_map_because_qemu_can() {
    let setup = setup();
    unbind(&setup.vm);
    let (_, common) = capability(&setup.vm, COMMON);
    let read = |select: u32| {
        let text = setup.vm.shell(&format!("devmem {common:#x} 32 {select}; devmem {:#x} 32", common + 4));
        u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    let offered = Features::from_bits_retain(read(0) | read(1) << 32);
    assert!(offered.contains(Features::MAP | Features::RAM_DMB | Features::VERSION_1), "{offered:?}");
    assert!(offered.contains(Features::RING_INDIRECT_DESC | Features::RING_EVENT_IDX), "{offered:?}");
}

#[test]
fn a_guest_that_is_reset_finds_the_same_device() {
    let mut setup = setup();
    let gid = setup.daemon.report().devices[0].gid.clone();
    setup.vm.reset();
    assert!(setup.connected());
    assert_eq!(setup.daemon.report().devices[0].gid, gid);
}

#[test]
fn the_device_can_be_unplugged_and_plugged_in_again() {
    let mut setup = setup();
    let there = |vm: &Vm| vm.run(&["test", "-e", FOLDER]).status.success();
    setup.vm.unplug(0);
    until("the daemon sees the front-end leave", || (!setup.connected()).then_some(()));
    setup.wait_until_nothing_is_left();
    assert!(!there(&setup.vm));
    let socket = setup.daemon.path("a.sock");
    setup.vm.plug(0, &socket);
    until("the guest finds the device again", || there(&setup.vm).then_some(()));
    assert!(setup.connected());
}

#[test]
fn nothing_is_left_of_a_vm_that_was_killed() {
    let mut setup = setup();
    setup.vm.kill();
    setup.wait_until_nothing_is_left();
    let socket = setup.daemon.path("a.sock");
    setup.vm =
        dmbridge_tests::vm::shared::in_lasting_thread(move || VmOptions::new("a").device(&socket).boot());
    assert!(setup.connected());
}
