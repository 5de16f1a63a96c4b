//! One daemon with more and more devices: what one more costs it, and whether commands get slower by it.
//!
//! The devices are all of this process and stand in a circle: each owns DMBs for the next. The first DMB of each pair
//! makes the extent; what is timed are those after it, as in a system that has been running for a while.

use anyhow::{Context, Result};
use dmbridge::{Device, Dmb, RemoteDmb};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use std::fs::read_to_string;
use std::path::Path;
use std::time::Instant;

use crate::bench::plan::Transport;
use crate::bench::report::Measured;
use crate::daemon::Daemon;
use crate::scratch::Scratch;

/// How many devices.
pub const DEVICES: [usize; 4] = [1, 10, 100, 1000];
/// DMBs that are registered and attached per round, whatever the number of devices.
const DMBS: usize = 1000;
/// Size of each.
const SIZE: usize = 4096;

/// What the kernel says of the daemon.
struct Footprint {
    rss_kib: f64,
    pss_kib: f64,
    threads: f64,
}

impl Footprint {
    fn of(daemon: Pid) -> Result<Footprint> {
        let field = |file: &str, name: &str| -> Result<f64> {
            let path = format!("/proc/{daemon}/{file}");
            let text = read_to_string(&path).with_context(|| format!("{path} cannot be read"))?;
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.with_context(|| format!("{path} has no {name}"))
        };
        Ok(Footprint {
            rss_kib: field("smaps_rollup", "Rss")?,
            pss_kib: field("smaps_rollup", "Pss")?,
            threads: field("status", "Threads")?,
        })
    }
}

/// Seconds that a round's registrations and attaches took.
struct Round {
    registering: f64,
    attaching: f64,
}

/// Measures with `count` devices on a daemon of their own.
pub fn run(scratch: &Scratch, count: usize, rounds: u32) -> Result<Vec<Measured>> {
    // A device has a dozen descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;

    let daemon = Daemon::start(scratch)?;
    // A first device, so that what the daemon makes once is not counted as a device's.
    let first = [Device::connect(daemon.hub())?];
    let _first = Circle::of(&first, 1)?;
    let before = Footprint::of(daemon.pid())?;
    let start = Instant::now();
    let devices = connect(daemon.hub(), count)?;
    let connecting = start.elapsed().as_secs_f64();
    let extents = Circle::of(&devices, 1)?;
    let after = Footprint::of(daemon.pid())?;

    let mut timed = Vec::new();
    for _ in 0..rounds {
        timed.push(Circle::timed(&devices)?);
    }
    drop(extents);

    let each = count as f64;
    let done = (DMBS / count * count) as f64;
    let measured = |what: &str, unit, rounds| Measured {
        case: format!("scale-{what}-{count}"),
        transport: Transport::DmbridgeMap,
        unit,
        rounds,
        p50: None,
        p99: None,
        samples: None,
    };
    Ok(vec![
        measured("registrations", "1/s", timed.iter().map(|round| done / round.registering).collect()),
        measured("attaches", "1/s", timed.iter().map(|round| done / round.attaching).collect()),
        measured("connects", "1/s", vec![each / connecting]),
        measured("rss-per-device", "KiB", vec![(after.rss_kib - before.rss_kib) / each]),
        measured("pss-per-device", "KiB", vec![(after.pss_kib - before.pss_kib) / each]),
        measured("threads-per-device", "threads", vec![(after.threads - before.threads) / each]),
    ])
}

fn connect(hub: &Path, count: usize) -> Result<Vec<Device>> {
    let connect = |n| Device::connect(hub).with_context(|| format!("device {} of {count}", n + 1));
    (0..count).map(connect).collect()
}

/// DMBs of every device for the next, attached there.
struct Circle {
    _attached: Vec<RemoteDmb>,
    _owned: Vec<Dmb>,
}

impl Circle {
    /// So many for each device.
    fn of(devices: &[Device], each: usize) -> Result<Circle> {
        let owned = Circle::register(devices, each)?;
        Ok(Circle { _attached: Circle::attach(devices, &owned)?, _owned: owned })
    }

    /// Registers and attaches a round's DMBs, and lets go of them.
    fn timed(devices: &[Device]) -> Result<Round> {
        let start = Instant::now();
        let owned = Circle::register(devices, DMBS / devices.len())?;
        let registering = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let attached = Circle::attach(devices, &owned)?;
        let attaching = start.elapsed().as_secs_f64();
        drop(Circle { _attached: attached, _owned: owned });
        Ok(Round { registering, attaching })
    }

    fn register(devices: &[Device], each: usize) -> Result<Vec<Dmb>> {
        let next = devices.iter().cycle().skip(1);
        let pairs = devices.iter().zip(next);
        (0..each)
            .flat_map(|_| pairs.clone())
            .map(|(owner, peer)| Ok(owner.register(peer.gid(), SIZE)?))
            .collect()
    }

    fn attach(devices: &[Device], owned: &[Dmb]) -> Result<Vec<RemoteDmb>> {
        let peers = devices.iter().cycle().skip(1);
        owned.iter().zip(peers).map(|(dmb, peer)| Ok(peer.attach(dmb.token())?)).collect()
    }
}
