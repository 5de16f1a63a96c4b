//! What is measured: the cases, over which transports, and which pairs of them make sense.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::copy::CopyKernel;

/// A question that the benchmark answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, ValueEnum)]
pub enum Case {
    /// One-way latency of a 14-byte message while both sides poll
    #[value(name = "latency-14")]
    Latency14,
    /// Half a round trip of 14 bytes, asked after a silence in which the receiver has fallen asleep
    #[value(name = "latency-14-sleep")]
    Latency14Sleep,
    /// The same with no silence, both sides made to sleep at once whenever they wait
    #[value(name = "latency-14-both-sleep")]
    Latency14BothSleep,
    /// 100-byte requests answered by 100 bytes, one at a time
    #[value(name = "rate-100")]
    Rate100,
    /// A stream of 64 KiB writes, copied in by the sender and out by the receiver
    #[value(name = "stream-64k")]
    Stream64k,
    /// A stream whose every byte the sender generates and the receiver reads, in pieces of 64 KiB
    #[value(name = "produce-64k")]
    Produce64k,
    /// One-way transfers of 1 MiB, several at a time, into memory of the receiver
    #[value(name = "move-1m")]
    Move1m,
    /// One-way transfers of 64 bytes, several at a time, into memory of the receiver
    #[value(name = "move-64")]
    Move64,
    /// The same of 4 KiB
    #[value(name = "move-4k")]
    Move4k,
    /// The same of 64 KiB
    #[value(name = "move-64k")]
    Move64k,
    /// The same of 16 MiB
    #[value(name = "move-16m")]
    Move16m,
    /// Messages of 1 MiB there and back, one at a time, from several buffers of each side's own into several of the other's
    #[value(name = "cma-large-1m")]
    CmaLarge1m,
    /// The same of 16 MiB
    #[value(name = "cma-large-16m")]
    CmaLarge16m,
    /// The same of 1 MiB, as a stream in one direction
    #[value(name = "cma-stream-1m")]
    CmaStream1m,
    /// The same of 16 MiB
    #[value(name = "cma-stream-16m")]
    CmaStream16m,
    /// Ping-pong, ping-ping, and rings of two and of four processes, messages of 1 MiB
    #[value(name = "patterns")]
    Patterns,
    /// One daemon with 1, 10, 100 and 1,000 devices
    #[value(name = "scale")]
    Scale,
    /// Unchanged iperf3, one stream (with --apps, as all that follow)
    #[value(name = "iperf3")]
    Iperf3,
    /// The same, four streams
    #[value(name = "iperf3-4")]
    Iperf3Four,
    /// The same, one stream, the server sends
    #[value(name = "iperf3-reverse")]
    Iperf3Reverse,
    /// The same, one stream in each direction
    #[value(name = "iperf3-bidir")]
    Iperf3Bidir,
    /// Unchanged sockperf ping-pong, 14 bytes
    #[value(name = "sockperf-pp")]
    SockperfPp,
    /// Unchanged sockperf throughput, messages of 1 KiB
    #[value(name = "sockperf-tp")]
    SockperfTp,
    /// Unchanged redis-server and redis-benchmark, GET over 50 connections
    #[value(name = "redis-get")]
    RedisGet,
    /// Unchanged nginx and wrk, a file of 600 bytes over 16 connections
    #[value(name = "nginx-wrk")]
    NginxWrk,
    /// The same, a file of 1 MiB over 4 connections
    #[value(name = "nginx-large")]
    NginxLarge,
    /// The same, a file of 600 bytes over 16 connections with TLS
    #[value(name = "nginx-tls")]
    NginxTls,
    /// The same with no TLS and a new connection for each request
    #[value(name = "nginx-short")]
    NginxShort,
    /// Unchanged PostgreSQL and pgbench, SELECT over 4 connections
    #[value(name = "pgbench-select")]
    PgbenchSelect,
    /// Unchanged memcached and memcslap, GET over 4 connections
    #[value(name = "memcached-get")]
    Memcached,
    /// Unchanged http.server of Python and wrk, a new connection for each request
    #[value(name = "python-http")]
    PythonHttp,
    /// Unchanged HTTP server of Node and wrk, 600 bytes over 16 connections
    #[value(name = "node-http")]
    NodeHttp,
    /// Unchanged redis-server, a thousand connections silent after use: requests on one more, and what the silence costs
    #[value(name = "idle-1000")]
    Idle1000,
    /// Latency and throughput for sizes from 1 B to 16 MiB (always measured for --html)
    #[value(name = "sweep")]
    Sweep,
}

/// What carries the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// DMBs that both sides have mapped; one copy in, one copy out
    DmbridgeMap,
    /// The same, written and read in place: no copy
    DmbridgeInplace,
    /// DMBs that the device copies into
    DmbridgeMove,
    /// The library's sockets (SMC-D) over DMBs
    DmbridgeSmc,
    /// Unchanged programs by dmbridge-run (with --apps)
    DmbridgeRun,
    /// Messages over DMBs, or directly from buffer to buffer, as the library chooses
    DmbridgeMessage,
    /// Messages directly from buffer to buffer (CMA), both processes copying
    DmbridgeDirect,
    /// As dmbridge-move, of a device whose moves the daemon's mover copies by itself
    EngineCpu,
    /// As dmbridge-move, of a device whose moves the daemon's workers copy
    EngineCpuNode,
    /// TCP with TCP_NODELAY: over the loopback interface; with --vms over virtio-net
    Tcp,
    /// UNIX stream sockets
    Uds,
    /// Pipes
    Pipe,
    /// iceoryx2: publish and subscribe over shared memory, zero copy
    Iceoryx2,
    /// UCX over shared memory and CMA, measured by ucx_perftest
    Ucx,
    /// AF_SMC sockets of two virtual machines' kernels, over dmbridge by its kernel module
    AfSmc,
    /// As dmbridge-map, between two virtual machines' unprivileged programs, by the kernel module's character device
    Chardev,
    /// AF_VSOCK stream sockets between two virtual machines, through vhost-device-vsock
    Vsock,
    /// Limit: one core copies the same bytes
    Memcpy,
    /// Limit: a bare ring between two cores, at its best size
    Ring,
    /// Limit: one cache line handed from core to core
    Cacheline,
}

/// Where the two processes of a measurement are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// On this host.
    Host,
    /// In two virtual machines.
    Vms,
}

/// Where the two processes of one measurement are, and how they find what they need there.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Site {
    /// On this host.
    Host {
        /// The CPU of each process.
        cpus: [usize; 2],
        /// A folder for this run's files.
        folder: PathBuf,
        /// The daemon's hub.
        hub: Option<PathBuf>,
        /// Where A's device comes from instead, if it has to be another one.
        sender: Option<PathBuf>,
    },
    /// In two virtual machines, each with a device on its PCI bus.
    Vms {
        /// Where B listens for TCP.
        address: Ipv4Addr,
        /// Where B listens for AF_VSOCK.
        cid: u32,
    },
}

impl Site {
    /// The address at which B listens for TCP.
    pub fn address(&self) -> Ipv4Addr {
        match self {
            Site::Host { .. } => Ipv4Addr::LOCALHOST,
            Site::Vms { address, .. } => *address,
        }
    }
}

/// How a side waits for the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Wait {
    /// It looks again and again and never sleeps.
    Poll,
    /// Both sleep at once.
    Sleep,
    /// Before each request there is silence until whoever waits for it sleeps; else as [`Normal`](Wait::Normal).
    Silence,
    /// As the transport does when nobody tells it otherwise.
    Normal,
}

/// What two processes do to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Work {
    /// One message there, one back, again and again.
    PingPong {
        /// Size of each message.
        bytes: usize,
        /// How both wait.
        wait: Wait,
    },
    /// Messages one way, as fast as they go.
    Stream {
        /// Size of each message.
        bytes: usize,
    },
    /// Large messages there and back, one at a time, from and into several buffers of each side's own.
    Exchange {
        /// Size of each message.
        bytes: usize,
    },
    /// As `Stream`, from and into several buffers of each side's own.
    Large {
        /// Size of each message.
        bytes: usize,
    },
    /// As `Stream`, with contents made for every message and read at the other end.
    Produce {
        /// Size of each message, a multiple of 8.
        bytes: usize,
    },
    /// Transfers into memory of the receiver, which does nothing.
    Move {
        /// Size of each transfer.
        bytes: usize,
    },
}

/// What a figure is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Nanoseconds one way: half a round trip.
    Nanoseconds,
    /// Round trips, or transfers, per second.
    PerSecond,
    /// 10⁹ bytes per second.
    GigabytesPerSecond,
}

impl Unit {
    /// As written in results.
    pub fn name(self) -> &'static str {
        match self {
            Unit::Nanoseconds => "ns",
            Unit::PerSecond => "1/s",
            Unit::GigabytesPerSecond => "GB/s",
        }
    }
}

/// How the bare ring is built when it is at its best on this machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RingShape {
    /// Size of the ring, a power of two.
    pub bytes: usize,
    /// The sender shows its progress after so many bytes.
    pub step: usize,
    /// What copies.
    pub copy: CopyKernel,
}

/// One measurement, as the two processes are told.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// What to do.
    pub work: Work,
    /// Over what.
    pub transport: Transport,
    /// For how long to measure, after the warm-up.
    pub duration: Duration,
    /// Where.
    pub site: Site,
    /// The ring.
    pub ring: RingShape,
    /// A name that no other measurement has.
    pub name: String,
}

/// A line of the results: work over every transport that makes sense.
#[derive(Clone, Debug)]
pub struct Line {
    /// The case's name in the results.
    pub name: String,
    /// What is done.
    pub work: Work,
    /// How the figure is expressed.
    pub unit: Unit,
    /// Over what.
    pub transports: Vec<Transport>,
    /// Whether it is one of many points of a curve, measured more briefly.
    pub point: bool,
}

impl Case {
    /// The name on the command line and in results.
    pub fn name(self) -> String {
        name_of(&self)
    }

    /// Whether it says something of two virtual machines.
    pub fn is_in_vms(self) -> bool {
        !matches!(self, Case::Patterns | Case::Scale) && !self.is_app()
    }

    /// Whether it is about programs as they are.
    pub fn is_app(self) -> bool {
        super::apps::CASES.contains(&self)
    }

    /// What the case measures; `None` for those that are not one measurement.
    pub fn work(self) -> Option<(Work, Unit)> {
        Some(match self {
            Case::Latency14 => (Work::PingPong { bytes: 14, wait: Wait::Poll }, Unit::Nanoseconds),
            Case::Latency14Sleep => (Work::PingPong { bytes: 14, wait: Wait::Silence }, Unit::Nanoseconds),
            Case::Latency14BothSleep => (Work::PingPong { bytes: 14, wait: Wait::Sleep }, Unit::Nanoseconds),
            Case::Rate100 => (Work::PingPong { bytes: 100, wait: Wait::Normal }, Unit::PerSecond),
            Case::Stream64k => (Work::Stream { bytes: 64 << 10 }, Unit::GigabytesPerSecond),
            Case::Produce64k => (Work::Produce { bytes: 64 << 10 }, Unit::GigabytesPerSecond),
            Case::Move1m => (Work::Move { bytes: 1 << 20 }, Unit::GigabytesPerSecond),
            Case::Move64 => (Work::Move { bytes: 64 }, Unit::PerSecond),
            Case::Move4k => (Work::Move { bytes: 4 << 10 }, Unit::GigabytesPerSecond),
            Case::Move64k => (Work::Move { bytes: 64 << 10 }, Unit::GigabytesPerSecond),
            Case::Move16m => (Work::Move { bytes: 16 << 20 }, Unit::GigabytesPerSecond),
            Case::CmaLarge1m => (Work::Exchange { bytes: 1 << 20 }, Unit::GigabytesPerSecond),
            Case::CmaLarge16m => (Work::Exchange { bytes: 16 << 20 }, Unit::GigabytesPerSecond),
            Case::CmaStream1m => (Work::Large { bytes: 1 << 20 }, Unit::GigabytesPerSecond),
            Case::CmaStream16m => (Work::Large { bytes: 16 << 20 }, Unit::GigabytesPerSecond),
            // Several measurements, or other people's programs.
            _ => return None,
        })
    }
}

impl Transport {
    /// The name on the command line and in results.
    pub fn name(self) -> String {
        name_of(&self)
    }

    /// Whether it needs the daemon.
    pub fn is_ours(self) -> bool {
        use Transport::*;
        matches!(
            self,
            DmbridgeMap
                | DmbridgeInplace
                | DmbridgeMove
                | DmbridgeSmc
                | DmbridgeRun
                | DmbridgeMessage
                | DmbridgeDirect
                | EngineCpu
                | EngineCpuNode
                | AfSmc
                | Chardev
        )
    }

    /// The engine of the daemon that it is about, if it is about one.
    pub fn engine(self) -> Option<&'static str> {
        match self {
            Transport::EngineCpu => Some("cpu"),
            Transport::EngineCpuNode => Some("cpu-node"),
            _ => None,
        }
    }

    /// Whether it is a limit of the machine rather than something that a program could use.
    pub fn is_limit(self) -> bool {
        matches!(self, Transport::Memcpy | Transport::Ring | Transport::Cacheline)
    }

    /// Whether it is measured there.
    pub fn is_in(self, place: Place) -> bool {
        use Transport::*;
        match self {
            DmbridgeMap | DmbridgeInplace | DmbridgeMove | Tcp => true,
            AfSmc | Chardev | Vsock => place == Place::Vms,
            DmbridgeSmc | DmbridgeRun | DmbridgeMessage | DmbridgeDirect | EngineCpu | EngineCpuNode => {
                place == Place::Host
            }
            Uds | Pipe | Iceoryx2 | Ucx | Memcpy | Ring | Cacheline => place == Place::Host,
        }
    }

    /// Whether the work can be done over the transport with so many CPUs, and says something.
    pub fn can_do(self, work: Work, cpus: usize) -> bool {
        use Transport::*;
        match work {
            // They are sockets as TCP's are.
            _ if matches!(self, AfSmc | Vsock) => Tcp.can_do(work, cpus),
            _ if self == Chardev => DmbridgeMap.can_do(work, cpus),
            Work::PingPong { wait: Wait::Poll, bytes } => match self {
                // The device has to run too, beside two processes that never sleep.
                DmbridgeMove => cpus > 2,
                DmbridgeMap | DmbridgeSmc | Tcp | Uds | Pipe | Iceoryx2 | Ucx | Ring => true,
                Cacheline => bytes <= 56,
                _ => false,
            },
            // Its own program knows no silence.
            Work::PingPong { wait: Wait::Silence, .. } if self == Ucx => false,
            Work::PingPong { .. } => {
                matches!(self, DmbridgeMap | DmbridgeSmc | DmbridgeMove | Tcp | Uds | Pipe | Iceoryx2 | Ucx)
            }
            Work::Stream { .. } => {
                matches!(
                    self,
                    DmbridgeMap
                        | DmbridgeSmc
                        | DmbridgeMove
                        | Tcp
                        | Uds
                        | Pipe
                        | Iceoryx2
                        | Ucx
                        | Ring
                        | Memcpy
                )
            }
            Work::Exchange { .. } => {
                matches!(self, DmbridgeMap | DmbridgeMessage | DmbridgeDirect | Tcp | Uds | Pipe | Ucx | Ring)
            }
            Work::Large { .. } => {
                matches!(
                    self,
                    DmbridgeMap | DmbridgeMessage | DmbridgeDirect | Tcp | Uds | Pipe | Ucx | Ring | Memcpy
                )
            }
            Work::Produce { .. } => {
                matches!(self, DmbridgeMap | DmbridgeInplace | Tcp | Uds | Pipe | Iceoryx2 | Ring)
            }
            Work::Move { .. } => {
                matches!(
                    self,
                    DmbridgeMap | DmbridgeMove | EngineCpu | EngineCpuNode | Tcp | Uds | Pipe | Ucx | Memcpy
                )
            }
        }
    }
}

/// The sizes of the sweep: 1 B to 16 MiB.
pub fn sweep_sizes() -> impl Iterator<Item = usize> {
    (0..=12).map(|n| 1usize << (2 * n))
}

/// What has to be measured for these cases over these transports on so many CPUs.
pub fn lines(cases: &[Case], transports: &[Transport], cpus: usize) -> Vec<Line> {
    let line = |name: String, work: Work, unit: Unit, point: bool| Line {
        name,
        work,
        unit,
        transports: transports.iter().copied().filter(|t| t.can_do(work, cpus)).collect(),
        point,
    };
    let mut all = Vec::new();
    for case in cases {
        if let Some((work, unit)) = case.work() {
            all.push(line(case.name(), work, unit, false));
        } else if *case == Case::Sweep {
            for bytes in sweep_sizes() {
                let latency = Work::PingPong { bytes, wait: Wait::Poll };
                let mut point = line(format!("sweep-latency-{bytes}"), latency, Unit::Nanoseconds, true);
                // A cache line has one size: as a curve it would only be a line of noise.
                point.transports.retain(|t| *t != Transport::Cacheline);
                all.push(point);
                let stream = Work::Stream { bytes };
                all.push(line(format!("sweep-stream-{bytes}"), stream, Unit::GigabytesPerSecond, true));
            }
        }
    }
    all.retain(|line| !line.transports.is_empty());
    all
}

/// A value's name on the command line.
pub fn name_of<T: ValueEnum>(value: &T) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_are_those_of_the_results() {
        assert_eq!(Case::Latency14Sleep.name(), "latency-14-sleep");
        assert_eq!(Case::Move1m.name(), "move-1m");
        assert_eq!(Transport::DmbridgeInplace.name(), "dmbridge-inplace");
        assert_eq!(Transport::Iceoryx2.name(), "iceoryx2");
    }

    #[test]
    fn only_pairs_that_make_sense_are_planned() {
        let lines = lines(Case::value_variants(), &[Transport::Cacheline, Transport::Memcpy], 2);
        let pairs: Vec<_> =
            lines.iter().filter(|l| !l.point).map(|l| (l.name.as_str(), l.transports.as_slice())).collect();
        assert_eq!(
            pairs,
            [
                ("latency-14", [Transport::Cacheline].as_slice()),
                ("stream-64k", &[Transport::Memcpy]),
                ("move-1m", &[Transport::Memcpy]),
                ("move-64", &[Transport::Memcpy]),
                ("move-4k", &[Transport::Memcpy]),
                ("move-64k", &[Transport::Memcpy]),
                ("move-16m", &[Transport::Memcpy]),
                ("cma-stream-1m", &[Transport::Memcpy]),
                ("cma-stream-16m", &[Transport::Memcpy]),
            ]
        );
    }

    #[test]
    fn the_sweep_goes_from_one_byte_to_sixteen_mebibytes() {
        let sizes: Vec<_> = sweep_sizes().collect();
        assert_eq!((sizes.len(), sizes[0], sizes[12]), (13, 1, 16 << 20));
    }
}
