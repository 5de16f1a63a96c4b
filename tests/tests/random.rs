//! Guests and front-ends that do anything at all, by thousands: the daemon survives, forgets them, and serves others.
//!
//! The numbers are the same in every run; set `SEED` to try others.

use dmbridge_proto::control::Command;
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until_good;
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::memory::BASE;
use dmbridge_tests::pair::Pair;
use dmbridge_tests::random::Random;
use dmbridge_tests::ring::Descriptor;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// A guest-physical address, most of the time one of guest memory.
fn address(random: &mut Random, device: &RawFrontend) -> u64 {
    match random.below(8) {
        0 => random.number(),
        1 => device.memory.end() - random.below(64),
        2 => device.rings[random.below(3) as usize].table + random.below(64),
        _ => device.scratch() + random.below(1 << 19),
    }
}

fn descriptor(random: &mut Random, device: &RawFrontend) -> Descriptor {
    let flags = if random.one_in(10) { random.next() as u16 } else { random.below(8) as u16 };
    let len = if random.one_in(5) { random.number() } else { random.below(100) };
    let next = if random.one_in(5) { random.next() } else { random.below(256) };
    Descriptor { addr: address(random, device), len: len as u32, flags, next: next as u16 }
}

/// What a chain may start with: a command or a move that is nearly right.
fn plausible(random: &mut Random, device: &RawFrontend) -> Vec<u8> {
    let class = random.below(4) as u8;
    let command = random.below(5) as u8;
    let mut bytes = Command::from_numbers(class, command).map_or(random.bytes(8), |c| c.header().to_vec());
    if random.one_in(3) {
        bytes.clear();
    }
    match random.below(3) {
        0 => bytes.extend_from_slice(&device.gid().to_bytes()),
        1 => bytes.extend_from_slice(&random.number().to_le_bytes()),
        _ => {}
    }
    for _ in 0..random.below(12) {
        let word = if random.one_in(2) { random.number() } else { random.below(4) * 4096 };
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn act(random: &mut Random, device: &mut RawFrontend) {
    let queue = random.below(device.rings.len() as u64) as u16;
    let at = device.scratch() + random.below(1 << 19);
    match random.below(12) {
        0..=3 => {
            let bytes = plausible(random, device);
            device.memory.write(at, &bytes);
            let answer = Descriptor::writable(device.scratch() + (1 << 19), random.below(80) as u32);
            let data = Descriptor::readable(address(random, device), random.below(10000) as u32);
            let head = Descriptor::readable(at, bytes.len() as u32);
            let header = Descriptor::readable(at, 32);
            match random.below(3) {
                0 => device.offer(queue, &[head, answer]),
                1 => device.offer(queue, &[header, data, answer]),
                _ => device.offer(queue, &[head, data, data, answer]),
            };
        }
        4..=6 => {
            let pieces: Vec<_> = (0..1 + random.below(5)).map(|_| descriptor(random, device)).collect();
            device.offer(queue, &pieces);
        }
        7 => {
            let number = random.below(256) as u16;
            let descriptor = descriptor(random, device);
            device.rings[usize::from(queue)].set(&device.memory, number, descriptor);
        }
        8 => {
            for slot in 0..random.below(20) {
                let bytes = descriptor(random, device).to_bytes();
                device.memory.write(at + 16 * slot, &bytes);
            }
        }
        9 => {
            let head = if random.one_in(3) { random.next() as u16 } else { random.below(256) as u16 };
            let ring = &mut device.rings[usize::from(queue)];
            ring.offer(&device.memory, head);
            ring.ring();
        }
        10 => {
            let window = device.window();
            if let Some((offset, size)) = window.extents().first().copied() {
                let bytes = random.bytes(64);
                window.write(offset + random.below(size / 64) * 64, &bytes);
            }
        }
        _ => {
            if random.one_in(20) {
                let ring = &device.rings[usize::from(queue)];
                ring.set_avail_index(&device.memory, random.next() as u16);
                ring.ring();
            }
        }
    }
}

#[test]
fn guests_that_put_anything_into_their_rings_harm_nobody() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    let before = daemon.holdings();
    for round in 0..60 {
        let mut random = Random::new(round);
        let options = if random.one_in(4) { Options::without_map() } else { Options::default() };
        let mut device = RawFrontend::connect_with(daemon.hub(), options);
        assert!(BASE < device.scratch());
        for _ in 0..300 {
            act(&mut random, &mut device);
        }
        witness.check();
    }
    until_good(
        &format!("what the daemon holds, which was {before:?}"),
        || daemon.holdings(),
        |after| after.is_within(&before),
    );
    assert_eq!(daemon.log().matches("panicked").count(), 0, "no thread of the daemon panicked");
}

#[test]
fn front_ends_that_say_anything_harm_nobody() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    witness.check();
    let before = daemon.holdings();
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 20).expect("a file");
    let null = File::open("/dev/null").expect("/dev/null");
    for round in 0..300 {
        let mut random = Random::new(round);
        let options = Options { start: random.one_in(2), ..Options::default() };
        let device = RawFrontend::connect_with(daemon.hub(), options);
        for _ in 0..20 {
            let message = message(&mut random, &device);
            let files: &[RawFd] = match random.below(5) {
                0 => &[file.as_raw_fd()],
                1 => &[null.as_raw_fd()],
                2 => &[device.rings[0].kick.as_raw_fd()],
                3 => &[file.as_raw_fd(), file.as_raw_fd(), null.as_raw_fd()],
                _ => &[],
            };
            if device.socket().send_with_fds(&[&message[..]], files).is_err() {
                break;
            }
        }
        drop(device);
        if round % 10 == 0 {
            witness.check();
        }
    }
    until_good(
        &format!("what the daemon holds, which was {before:?}"),
        || daemon.holdings(),
        |after| after.is_within(&before),
    );
    witness.check();
    assert_eq!(daemon.log().matches("panicked").count(), 0, "no thread of the daemon panicked");
}

/// A vhost-user message whose header is right and whose body is not.
fn message(random: &mut Random, device: &RawFrontend) -> Vec<u8> {
    let request = random.below(48) as u32;
    let words = match random.below(4) {
        0 => 0,
        1 => 1,
        2 => 5,
        _ => random.below(12),
    };
    let mut body = Vec::new();
    for _ in 0..words {
        let word = match random.below(4) {
            0 => random.number(),
            1 => random.below(4),
            2 => device.memory.region().userspace_addr + random.below(1 << 16),
            _ => random.below(1 << 33),
        };
        body.extend_from_slice(&word.to_le_bytes());
    }
    let flags = if random.one_in(2) { 1 } else { 9 };
    [[request, flags, body.len() as u32].map(u32::to_le_bytes).concat(), body].concat()
}

#[test]
fn a_front_end_that_does_not_read_its_answers_is_expelled() {
    let daemon = TestDaemon::start();
    let mut witness = Pair::new(&daemon.hub());
    let device = RawFrontend::connect_with(daemon.hub(), Options { start: false, ..Options::default() });
    let question = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    let mut asked = 0u64;
    while std::io::Write::write_all(&mut device.socket(), &question).is_ok() {
        asked += 1;
        assert!(asked < 1_000_000, "the daemon keeps everything that nobody reads");
        if asked.is_multiple_of(1000) {
            witness.check();
        }
    }
    witness.check();
}
