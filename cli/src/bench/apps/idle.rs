//! What open connections cost while nothing is said on them: a client of redis that uses a thousand, then falls silent on all
//! of them, then on all but one. It is an ordinary TCP program, and started as the others are.

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::{Duration, Instant};

use crate::out;

/// Name of the hidden subcommand.
pub const CLIENT: &str = "bench-idle";

/// Requests on each connection, and again after a while: at first more than it takes for `dmbridge-run` to take it seriously,
/// then enough for both directions to go over.
const REQUESTS: [usize; 3] = [100, 20, 20];
/// Time for `dmbridge-run` to find the other ends.
const SETTLE: Duration = Duration::from_secs(1);

/// What the client is told.
#[derive(clap::Args)]
pub struct ClientArgs {
    /// Where redis listens, on the loopback interface
    port: u16,
    /// Its process
    server: u32,
    /// Connections that fall silent
    count: usize,
    /// For how long to measure, in seconds, twice
    seconds: u32,
}

/// What the client found.
#[derive(Serialize, Deserialize)]
pub struct Found {
    /// Time on the CPU of client and server together while all are silent, in seconds per second.
    pub silent: f64,
    /// Requests per second on one more connection, while all others are silent.
    pub rate: f64,
}

/// Is the client.
pub fn work(args: ClientArgs) -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, args.port)).context("redis does not answer");
    let mut all = (0..args.count + 1).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    for requests in REQUESTS {
        for connection in &mut all {
            connection.set_nodelay(true)?;
            (0..requests).try_for_each(|_| ask(connection))?;
        }
        std::thread::sleep(SETTLE);
    }
    let length = Duration::from_secs(args.seconds.into());
    let used = || Ok::<_, anyhow::Error>(cpu_of(args.server)? + cpu_of(std::process::id())?);

    let before = used()?;
    std::thread::sleep(length);
    let silent = (used()? - before) / length.as_secs_f64();

    let busy = all.last_mut().context("there is one")?;
    let (start, mut requests) = (Instant::now(), 0);
    while start.elapsed() < length {
        ask(busy)?;
        requests += 1;
    }
    let rate = f64::from(requests) / start.elapsed().as_secs_f64();
    out::line(serde_json::to_string(&Found { silent, rate })?)
}

/// A request and its answer.
fn ask(connection: &mut TcpStream) -> Result<()> {
    connection.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    connection.read_exact(&mut answer)?;
    ensure!(&answer == b"+PONG\r\n", "redis says {}", String::from_utf8_lossy(&answer));
    Ok(())
}

/// Seconds that a process' threads were on a CPU: the first figure, in nanoseconds, of each one's `schedstat`
/// (Linux' Documentation/scheduler/sched-stats.rst). The ticks of `stat` are too coarse for silence.
fn cpu_of(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("redis has ended")? {
        // A thread that ends meanwhile has nothing to say.
        let Ok(text) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
        let first = text.split(' ').next().and_then(|figure| figure.parse::<u64>().ok());
        nanoseconds += first.with_context(|| format!("schedstat says {text}"))?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_process_is_counted() {
        let used = || cpu_of(std::process::id()).unwrap();
        let start = std::time::Instant::now();
        // Other tests' threads may end, and take their time with them.
        while used() <= 0.0 && start.elapsed().as_secs() < 10 {}
        assert!(used() > 0.0);
    }
}
