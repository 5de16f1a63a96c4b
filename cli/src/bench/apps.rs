//! Programs as they are, over TCP and by `dmbridge-run`: iperf3, sockperf, redis, nginx with wrk. Each is started anew for every
//! measurement, server and client the same way, and what both used of the CPUs is counted too.

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::time::TimeValLike;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::plan::{Case, Transport};
use super::report::Measured;
use crate::process::{BoundChild, find_program};
use crate::usage::usage;

/// The cases, in the order of the results.
pub const CASES: [Case; 5] =
    [Case::Iperf3, Case::SockperfPp, Case::SockperfTp, Case::RedisGet, Case::NginxWrk];
/// The ways in which each is run.
pub const WAYS: [Transport; 2] = [Transport::Tcp, Transport::DmbridgeRun];

/// How long a server may take to start.
const START: Duration = Duration::from_secs(10);
/// Bytes of a message in `sockperf-tp`.
const MESSAGE: u64 = 1024;
/// Bytes of the file that nginx serves.
const FILE: usize = 600;

/// A figure, and what it took of the CPUs.
struct Figure {
    value: f64,
    /// Half of the messages were not slower (ns).
    p50: Option<f64>,
    p99: Option<f64>,
    /// Bytes that were moved, where that says something.
    bytes: Option<f64>,
}

/// Measures every case, its ways in turn, round by round.
pub fn measure(
    cases: &[Case],
    hub: &Path,
    folder: &Path,
    rounds: u32,
    seconds: u32,
    results: &mut Vec<Measured>,
) -> Result<()> {
    let cases: Vec<Case> = CASES.into_iter().filter(|case| cases.contains(case)).collect();
    let programs = cases.iter().flat_map(|case| needs(*case)).map(|(program, package)| {
        program_path(program).ok_or_else(|| {
            usage(format!(
                "{program} is not installed (Debian: {package}); install it, or choose other cases"
            ))
        })
    });
    programs.collect::<Result<Vec<_>>>()?;
    let runner = find_program("dmbridge-run").ok_or_else(|| {
        anyhow!("dmbridge-run was found neither next to this program nor in PATH; build the whole workspace, or install it")
    })?;
    for case in cases {
        let mut rates = [const { Vec::new() }; 2];
        let mut middles = [const { Vec::new() }; 2];
        let mut tails = [const { Vec::new() }; 2];
        let mut costs = [const { Vec::new() }; 2];
        for round in 0..rounds {
            for (i, way) in WAYS.into_iter().enumerate() {
                eprintln!("{} over {}, round {}", case.name(), way.name(), round + 1);
                let app = App { way, runner: &runner, hub, folder, seconds };
                let before = cpu_seconds()?;
                let figure = app.run(case).with_context(|| format!("{} over {}", case.name(), way.name()))?;
                let used = cpu_seconds()? - before;
                rates[i].push(figure.value);
                middles[i].extend(figure.p50);
                tails[i].extend(figure.p99);
                costs[i].extend(figure.bytes.map(|bytes| used / (bytes / 1e9)));
            }
        }
        let middle = |values: &[f64]| (!values.is_empty()).then(|| super::measure::median(values));
        let unit = match case {
            Case::Iperf3 => "GB/s",
            Case::SockperfPp => "ns",
            _ => "1/s",
        };
        for (i, way) in WAYS.into_iter().enumerate() {
            results.push(Measured {
                case: case.name(),
                transport: way,
                unit,
                rounds: rates[i].clone(),
                p50: middle(&middles[i]),
                p99: middle(&tails[i]),
                samples: None,
            });
        }
        for (i, way) in WAYS.into_iter().enumerate().filter(|(i, _)| !costs[*i].is_empty()) {
            results.push(Measured {
                case: format!("{}-cpu", case.name()),
                transport: way,
                unit: "s/GB",
                rounds: costs[i].clone(),
                p50: None,
                p99: None,
                samples: None,
            });
        }
    }
    Ok(())
}

/// Programs that a case needs, and the Debian packages that bring them.
fn needs(case: Case) -> &'static [(&'static str, &'static str)] {
    match case {
        Case::Iperf3 => &[("iperf3", "iperf3")],
        Case::SockperfPp | Case::SockperfTp => &[("sockperf", "sockperf")],
        Case::RedisGet => &[("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")],
        Case::NginxWrk => &[("nginx", "nginx"), ("wrk", "wrk")],
        _ => &[],
    }
}

fn program_path(name: &str) -> Option<PathBuf> {
    let system = Path::new("/usr/sbin").join(name);
    find_program(name).or_else(|| system.is_file().then_some(system))
}

/// What the CPUs did for children that have ended, in seconds.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6)
}

/// One measurement.
struct App<'a> {
    way: Transport,
    runner: &'a Path,
    hub: &'a Path,
    folder: &'a Path,
    seconds: u32,
}

impl App<'_> {
    fn command(&self, program: &str, args: &[&str]) -> Result<Command> {
        let path = program_path(program).ok_or_else(|| anyhow!("{program} is gone"))?;
        let mut command = if self.way == Transport::DmbridgeRun {
            let mut command = Command::new(self.runner);
            command.arg("--hub").arg(self.hub).arg("--").arg(path);
            command
        } else {
            Command::new(path)
        };
        command.args(args).stdin(Stdio::null()).stderr(Stdio::null()).stdout(Stdio::null());
        // This process has blocked the signals by which servers are ended.
        // SAFETY: one system call, which is async-signal-safe.
        unsafe { command.pre_exec(|| Ok(SigSet::empty().thread_set_mask()?)) };
        Ok(command)
    }

    /// Starts a server, and waits until it listens. Not by connecting: iperf3 serves one connection.
    fn serve(&self, program: &str, args: &[&str], port: u16) -> Result<Server> {
        let mut child = BoundChild::spawn(&mut self.command(program, args)?)?;
        let end = Instant::now() + START;
        while !is_listening(port) {
            if let Some(status) = child.get_mut().try_wait()? {
                bail!("{program} ended at once: {status}");
            }
            ensure!(Instant::now() < end, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Server(child))
    }

    /// Runs a client to its end: what it printed.
    fn ask(&self, program: &str, args: &[&str]) -> Result<String> {
        let output = self.command(program, args)?.stdout(Stdio::piped()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{program}: {}\n{text}", output.status);
        Ok(text)
    }

    fn run(&self, case: Case) -> Result<Figure> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let at = port.to_string();
        let seconds = self.seconds.to_string();
        let plain = |value| Figure { value, p50: None, p99: None, bytes: None };
        match case {
            Case::Iperf3 => {
                let server = self.serve("iperf3", &["-s", "-1", "-p", &at], port)?;
                let text = self.ask("iperf3", &["-c", "127.0.0.1", "-p", &at, "-t", &seconds, "--json"])?;
                server.stop()?;
                let json: serde_json::Value = serde_json::from_str(&text)?;
                let sum = &json["end"]["sum_received"];
                let rate = sum["bits_per_second"].as_f64().context("iperf3 says no rate")?;
                Ok(Figure { bytes: sum["bytes"].as_f64(), ..plain(rate / 8e9) })
            }
            Case::SockperfPp => {
                let server =
                    self.serve("sockperf", &["server", "--tcp", "-i", "127.0.0.1", "-p", &at], port)?;
                let args = ["ping-pong", "--tcp", "-i", "127.0.0.1", "-p", &at, "-t", &seconds, "-m", "14"];
                // It ends at more than 600,000 round trips a second unless it is told to expect them.
                let text = self.ask("sockperf", &[&args[..], &["--mps", "20000000"]].concat())?;
                server.stop()?;
                let us = |before: &str| number_after(&text, before).map(|us| us * 1000.0);
                let value = us("Latency is ").context("sockperf says no latency")?;
                Ok(Figure { p50: us("percentile 50.000 ="), p99: us("percentile 99.000 ="), ..plain(value) })
            }
            Case::SockperfTp => {
                let server =
                    self.serve("sockperf", &["server", "--tcp", "-i", "127.0.0.1", "-p", &at], port)?;
                let size = MESSAGE.to_string();
                let args = ["throughput", "--tcp", "-i", "127.0.0.1", "-p", &at, "-t", &seconds, "-m", &size];
                let text = self.ask("sockperf", &args)?;
                server.stop()?;
                let rate = number_after(&text, "Message Rate is ").context("sockperf says no rate")?;
                Ok(Figure { bytes: Some(rate * f64::from(self.seconds) * MESSAGE as f64), ..plain(rate) })
            }
            Case::RedisGet => {
                let folder = self.folder.to_string_lossy();
                let args = ["--port", &at, "--save", "", "--appendonly", "no", "--dir", &folder];
                let server = self.serve("redis-server", &args, port)?;
                let requests = (u64::from(self.seconds) * 100_000).to_string();
                let text =
                    self.ask("redis-benchmark", &["-p", &at, "-t", "get", "-n", &requests, "--csv"])?;
                server.stop()?;
                let rate = text.lines().find_map(|line| number_after(line, "\"GET\",\""));
                Ok(plain(rate.context("redis-benchmark says no rate")?))
            }
            Case::NginxWrk => {
                let folder = self.folder.to_string_lossy();
                std::fs::write(self.folder.join("file"), "x".repeat(FILE))?;
                // Its workers keep this user, who may use the hub.
                let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
                let configuration = format!(
                    "daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/errors; \
                     events {{ worker_connections 1024; }} http {{ access_log off; sendfile on; tcp_nopush on; \
                     keepalive_requests 1000000000; server {{ listen 127.0.0.1:{port}; root {folder}; }} }}"
                );
                let file = self.folder.join("nginx.conf");
                std::fs::write(&file, configuration)?;
                let server = self.serve("nginx", &["-c", &file.to_string_lossy()], port)?;
                let url = format!("http://127.0.0.1:{port}/file");
                let text = self.ask("wrk", &["-t", "1", "-c", "16", "-d", &seconds, "--latency", &url])?;
                server.stop()?;
                let rate = number_after(&text, "Requests/sec:").context("wrk says no rate")?;
                Ok(Figure { bytes: Some(rate * f64::from(self.seconds) * FILE as f64), ..plain(rate) })
            }
            other => bail!("{} is no program", other.name()),
        }
    }
}

/// A server, ended when dropped.
struct Server(BoundChild);

impl Server {
    /// Ends it well, so that what it used is counted.
    fn stop(mut self) -> Result<()> {
        let _ = kill(self.0.pid(), Signal::SIGTERM);
        let end = Instant::now() + START;
        while self.0.get_mut().try_wait()?.is_none() {
            ensure!(Instant::now() < end, "a server does not end by SIGTERM");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

fn is_listening(port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|table| {
        std::fs::read_to_string(table).unwrap_or_default().lines().skip(1).any(|line| {
            let mut words = line.split_whitespace().skip(1);
            words.next().is_some_and(|own| own.ends_with(&port)) && words.nth(1) == Some("0A")
        })
    })
}

/// The number that follows some words, colours and spaces left aside.
fn number_after(text: &str, words: &str) -> Option<f64> {
    let rest = &text[text.find(words)? + words.len()..];
    let rest = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
    let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_in_what_programs_print() {
        assert_eq!(number_after("Summary: Latency is 4.537 usec", "Latency is "), Some(4.537));
        assert_eq!(
            number_after("Message Rate is \u{1b}m1065583 [msg/sec]", "Message Rate is "),
            Some(1065583.0)
        );
        assert_eq!(number_after("\"GET\",\"171428.58\",\"0.004\"", "\"GET\",\""), Some(171_428.58));
        assert_eq!(number_after("nothing", "Latency is "), None);
    }
}
