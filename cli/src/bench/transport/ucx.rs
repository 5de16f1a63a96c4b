//! UCX over shared memory and CMA: what MPI programs use on one host. Its own `ucx_perftest` measures, with the same
//! sizes on the same CPUs; this only runs it and reads its answer.

use anyhow::{Context, Result, bail};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::{Job, Wait, Work};
use crate::pair::Role;
use crate::process::{BoundChild, find_program};

const PROGRAM: &str = "ucx_perftest";

/// How long its server may take to listen.
const START: Duration = Duration::from_secs(10);

/// The version that is installed, or nothing.
pub fn version() -> Option<String> {
    find_program(PROGRAM)?;
    let output = Command::new("ucx_info").arg("-v").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // "# Version 1.13.1", in later releases "# Library version: 1.17.0".
    let line = text.lines().find(|line| line.to_lowercase().contains("version"))?;
    Some(line.split_whitespace().next_back()?.to_owned())
}

/// Runs its server or its client.
pub fn run(worker: &mut Worker) -> Result<Option<Outcome>> {
    match worker.role {
        Role::B => {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let _server = BoundChild::spawn(command(port).stdout(Stdio::null()).stderr(Stdio::null()))?;
            worker.rendezvous.tell(&port)?;
            worker.rendezvous.meet()?;
            Ok(None)
        }
        Role::A => {
            let port: u16 = worker.rendezvous.hear()?;
            let outcome = ask(&worker.job, port)?;
            worker.rendezvous.meet()?;
            Ok(Some(outcome))
        }
    }
}

fn command(port: u16) -> Command {
    let mut command = Command::new(PROGRAM);
    command.env("UCX_TLS", "posix,cma,self").args(["-p", &port.to_string()]).stdin(Stdio::null());
    command
}

fn ask(job: &Job, port: u16) -> Result<Outcome> {
    // How long one iteration takes, roughly: only the length of the measurement depends on it.
    let (test, bytes, guess) = match job.work {
        Work::PingPong { bytes, wait: Wait::Sleep } => ("tag_lat", bytes, 20e-6),
        Work::PingPong { bytes, .. } | Work::Exchange { bytes } => {
            ("tag_lat", bytes, 0.4e-6 + bytes as f64 / 4e9)
        }
        Work::Stream { bytes } | Work::Large { bytes } => ("tag_bw", bytes, 0.1e-6 + bytes as f64 / 8e9),
        Work::Move { bytes } => ("ucp_put_bw", bytes, 0.05e-6 + bytes as f64 / 16e9),
        Work::Produce { .. } => bail!("ucx_perftest does not make the contents of messages"),
    };
    let count = (job.duration.as_secs_f64() / guess).max(10.0) as u64;
    let deadline = Instant::now() + START;
    let output = loop {
        let mut client = command(port);
        client.arg("127.0.0.1").args(["-v", "-f", "-t", test, "-s", &bytes.to_string()]);
        client.args(["-n", &count.to_string(), "-w", &(count / 5 + 1).to_string()]);
        if matches!(job.work, Work::PingPong { wait: Wait::Sleep, .. }) {
            client.args(["-E", "sleep"]);
        }
        let output = client.output().context("ucx_perftest could not be started")?;
        if output.status.success() {
            break output.stdout;
        }
        // Until the server listens, the client ends at once.
        let said = String::from_utf8_lossy(&output.stdout);
        if !said.contains("Connection refused") || Instant::now() > deadline {
            bail!("ucx_perftest failed: {} {}", said.trim(), String::from_utf8_lossy(&output.stderr).trim());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let rate =
        message_rate(&String::from_utf8_lossy(&output)).context("ucx_perftest's answer is not understood")?;
    let value = match job.work {
        // Its latencies are half a round trip.
        Work::PingPong { .. } => 2e9 / rate,
        _ => rate * bytes as f64,
    };
    Ok(Outcome { value, samples: Vec::new() })
}

/// Messages per second, overall: the last column of the table's last line.
fn message_rate(output: &str) -> Option<f64> {
    let mut lines = output.lines().map(str::trim).filter(|line| line.contains(','));
    let header = lines.next()?;
    let column = header.split(',').position(|name| name == "overall_mr")?;
    let rate: f64 = lines.next_back()?.split(',').nth(column)?.parse().ok()?;
    (rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_read_from_the_last_line() {
        let output = "iterations,50.0_percentile_lat,avg_lat,overall_lat,avg_bw,overall_bw,avg_mr,overall_mr\n\
                      200000,0.092,0.096,0.096,138.74,138.74,10391522,10391522\n";
        assert_eq!(message_rate(output), Some(10391522.0));
        assert_eq!(message_rate("what?\n"), None);
        assert_eq!(message_rate(""), None);
    }
}
