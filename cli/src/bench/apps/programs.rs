//! The programs: what each case starts, with which arguments, and where its figure stands in what the client prints.

use anyhow::{Context, Result, bail};
use std::time::Instant;

use super::app::{App, free_port, program_path};
use super::idle;
use crate::bench::plan::{Case, Transport, Unit};
use crate::scratch;

/// The cases, in the order of the results.
pub const CASES: [Case; 16] = [
    Case::Iperf3,
    Case::Iperf3Four,
    Case::Iperf3Reverse,
    Case::Iperf3Bidir,
    Case::SockperfPp,
    Case::SockperfTp,
    Case::RedisGet,
    Case::NginxWrk,
    Case::NginxLarge,
    Case::NginxTls,
    Case::NginxShort,
    Case::PgbenchSelect,
    Case::Memcached,
    Case::PythonHttp,
    Case::NodeHttp,
    Case::Idle1000,
];

/// Bytes of a message in `sockperf-tp`.
const MESSAGE: u64 = 1024;
/// Bytes of the files that are served.
const SMALL: usize = 600;
const LARGE: usize = 1 << 20;
/// Open connections in `idle-1000`.
const IDLE: usize = 1000;

/// A figure, and what it took of the CPUs.
pub struct Figure {
    /// In the case's unit.
    pub value: f64,
    /// Half of the messages were not slower (ns).
    pub p50: Option<f64>,
    /// Of 100 messages, 99 were not slower (ns).
    pub p99: Option<f64>,
    /// What to say of the CPUs.
    pub cpu: Cpu,
}

/// What there is to say of the CPUs.
pub enum Cpu {
    /// Nothing that could be compared.
    Nothing,
    /// The whole measurement moved so many bytes.
    Bytes(f64),
    /// Seconds per second while nothing happened.
    Silent(f64),
}

impl Figure {
    fn plain(value: f64) -> Figure {
        Figure { value, p50: None, p99: None, cpu: Cpu::Nothing }
    }
}

/// The unit of a case's figure.
pub fn unit(case: Case) -> Unit {
    match case {
        Case::Iperf3 | Case::Iperf3Four | Case::Iperf3Reverse | Case::Iperf3Bidir => Unit::GigabytesPerSecond,
        Case::SockperfPp => Unit::Nanoseconds,
        _ => Unit::PerSecond,
    }
}

/// Programs that a case needs, and the Debian packages that bring them.
pub fn needs(case: Case) -> &'static [(&'static str, &'static str)] {
    match case {
        Case::Iperf3 | Case::Iperf3Four | Case::Iperf3Reverse | Case::Iperf3Bidir => &[("iperf3", "iperf3")],
        Case::SockperfPp | Case::SockperfTp => &[("sockperf", "sockperf")],
        Case::RedisGet => &[("redis-server", "redis-server"), ("redis-benchmark", "redis-tools")],
        Case::NginxWrk | Case::NginxLarge | Case::NginxShort => &[("nginx", "nginx"), ("wrk", "wrk")],
        Case::NginxTls => &[("nginx", "nginx"), ("wrk", "wrk"), ("openssl", "openssl")],
        Case::PgbenchSelect => &[("postgres", "postgresql"), ("pgbench", "postgresql")],
        Case::Memcached => &[("memcached", "memcached"), ("memcslap", "libmemcached-tools")],
        Case::PythonHttp => &[("python3", "python3"), ("wrk", "wrk")],
        Case::NodeHttp => &[("node", "nodejs"), ("wrk", "wrk")],
        Case::Idle1000 => &[("redis-server", "redis-server")],
        _ => &[],
    }
}

impl App<'_> {
    /// One measurement.
    pub fn run(&self, case: Case) -> Result<Figure> {
        match case {
            Case::Iperf3 => self.iperf3(&[]),
            Case::Iperf3Four => self.iperf3(&["-P", "4"]),
            Case::Iperf3Reverse => self.iperf3(&["-R"]),
            Case::Iperf3Bidir => self.iperf3(&["--bidir"]),
            Case::SockperfPp => self.sockperf_ping_pong(),
            Case::SockperfTp => self.sockperf_throughput(),
            Case::RedisGet => self.redis(),
            Case::NginxWrk => self.nginx(SMALL, "http", &["-c", "16"]),
            Case::NginxLarge => self.nginx(LARGE, "http", &["-c", "4"]),
            Case::NginxTls => self.nginx(SMALL, "https", &["-c", "16"]),
            Case::NginxShort => self.nginx(SMALL, "http", &["-c", "16", "-H", "Connection: close"]),
            Case::PgbenchSelect => self.pgbench(),
            Case::Memcached => self.memcached(),
            Case::PythonHttp => self.python(),
            Case::NodeHttp => self.node(),
            Case::Idle1000 => self.idle(),
            other => bail!("{} is no program", other.name()),
        }
    }

    fn iperf3(&self, more: &[&str]) -> Result<Figure> {
        let port = free_port()?;
        let (at, seconds) = (port.to_string(), self.seconds.to_string());
        let server = self.serve("iperf3", &["-s", "-1", "-p", &at], port)?;
        let args = [&["-c", "127.0.0.1", "-p", &at, "-t", &seconds, "--json"], more].concat();
        let text = self.ask("iperf3", &args)?;
        server.stop()?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        // Both directions, where there are two.
        let sums = ["sum_received", "sum_received_bidir_reverse"].map(|sum| &json["end"][sum]);
        let total = |what: &str| sums.iter().filter_map(|sum| sum[what].as_f64()).sum::<f64>();
        let (rate, bytes) = (total("bits_per_second"), total("bytes"));
        anyhow::ensure!(rate > 0.0, "iperf3 says no rate");
        Ok(Figure { cpu: Cpu::Bytes(bytes), ..Figure::plain(rate / 8e9) })
    }

    fn sockperf(&self, what: &str, args: &[&str]) -> Result<String> {
        let port = free_port()?;
        let (at, seconds) = (port.to_string(), self.seconds.to_string());
        let server = self.serve("sockperf", &["server", "--tcp", "-i", "127.0.0.1", "-p", &at], port)?;
        let common = [what, "--tcp", "-i", "127.0.0.1", "-p", &at, "-t", &seconds];
        let text = self.ask("sockperf", &[&common[..], args].concat())?;
        server.stop()?;
        Ok(text)
    }

    fn sockperf_ping_pong(&self) -> Result<Figure> {
        // It ends at more than 600,000 round trips a second unless it is told to expect them.
        let text = self.sockperf("ping-pong", &["-m", "14", "--mps", "20000000"])?;
        let us = |before: &str| number_after(&text, before).map(|us| us * 1000.0);
        let value = us("Latency is ").context("sockperf says no latency")?;
        let (p50, p99) = (us("percentile 50.000 ="), us("percentile 99.000 ="));
        Ok(Figure { p50, p99, ..Figure::plain(value) })
    }

    fn sockperf_throughput(&self) -> Result<Figure> {
        let text = self.sockperf("throughput", &["-m", &MESSAGE.to_string()])?;
        let rate = number_after(&text, "Message Rate is ").context("sockperf says no rate")?;
        Ok(self.requests(rate, MESSAGE))
    }

    /// So many requests per second, each with so many bytes, for the whole measurement.
    fn requests(&self, rate: f64, bytes: u64) -> Figure {
        let bytes = rate * f64::from(self.seconds) * bytes as f64;
        Figure { cpu: Cpu::Bytes(bytes), ..Figure::plain(rate) }
    }

    fn redis(&self) -> Result<Figure> {
        let (server, at) = self.redis_server()?;
        let requests = (u64::from(self.seconds) * 100_000).to_string();
        let text = self.ask("redis-benchmark", &["-p", &at, "-t", "get", "-n", &requests, "--csv"])?;
        server.stop()?;
        let rate = text.lines().find_map(|line| number_after(line, "\"GET\",\""));
        Ok(Figure::plain(rate.context("redis-benchmark says no rate")?))
    }

    fn redis_server(&self) -> Result<(super::app::Server, String)> {
        let port = free_port()?;
        let at = port.to_string();
        let folder = self.folder.to_string_lossy();
        let args = ["--port", &at, "--save", "", "--appendonly", "no", "--dir", &folder];
        Ok((self.serve("redis-server", &args, port)?, at))
    }

    fn nginx(&self, bytes: usize, scheme: &str, args: &[&str]) -> Result<Figure> {
        let port = free_port()?;
        let folder = self.folder.to_string_lossy();
        scratch::write(&self.folder.join("file"), "x".repeat(bytes))?;
        // Its workers keep this user, who may use the hub.
        let user = if nix::unistd::geteuid().is_root() { "user root;" } else { "" };
        let tls = if scheme == "https" { self.certificate()? } else { String::new() };
        let ssl = if tls.is_empty() { "" } else { " ssl" };
        let configuration = format!(
            "daemon off; {user} worker_processes 1; pid {folder}/pid; error_log {folder}/errors; \
             events {{ worker_connections 1024; }} http {{ access_log off; sendfile on; tcp_nopush on; \
             keepalive_requests 1000000000; server {{ listen 127.0.0.1:{port}{ssl}; {tls} root {folder}; }} }}"
        );
        let file = self.folder.join("nginx.conf");
        scratch::write(&file, configuration)?;
        let server = self.serve("nginx", &["-c", &file.to_string_lossy()], port)?;
        let rate = self.wrk(&format!("{scheme}://127.0.0.1:{port}/file"), args)?;
        server.stop()?;
        Ok(self.requests(rate, bytes as u64))
    }

    /// Requests per second that wrk could make, from one thread.
    fn wrk(&self, url: &str, args: &[&str]) -> Result<f64> {
        let seconds = self.seconds.to_string();
        let text = self.ask("wrk", &[&["-t", "1", "-d", &seconds], args, &[url]].concat())?;
        number_after(&text, "Requests/sec:").context("wrk says no rate")
    }

    /// nginx' lines for a certificate, made at the first call.
    fn certificate(&self) -> Result<String> {
        let [key, certificate] = ["key.pem", "certificate.pem"].map(|name| self.folder.join(name));
        let (key, certificate) = (key.to_string_lossy(), certificate.to_string_lossy());
        if !self.folder.join("key.pem").exists() {
            let new =
                ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"];
            let plain = App { way: Transport::Tcp, ..*self };
            plain.ask("openssl", &[&new[..], &["-keyout", &key, "-out", &certificate]].concat())?;
        }
        Ok(format!("ssl_certificate {certificate}; ssl_certificate_key {key};"))
    }

    fn pgbench(&self) -> Result<Figure> {
        let port = free_port()?;
        let at = port.to_string();
        let data = self.folder.join("postgresql");
        let data = data.to_string_lossy();
        let program = |name: &str| -> Result<String> {
            Ok(program_path(name).with_context(|| format!("{name} is gone"))?.to_string_lossy().into_owned())
        };
        // PostgreSQL refuses to be root; in a user namespace of its own, root is nobody.
        let other_user: &[&str] =
            if nix::unistd::geteuid().is_root() { &["unshare", "--user"] } else { &["env"] };
        let (first, rest) = other_user.split_first().context("a command")?;
        let plain = App { way: Transport::Tcp, ..*self };
        if !self.folder.join("postgresql").exists() {
            let init = [&program("initdb")?, "-D", &data, "-A", "trust", "-U", "postgres", "--no-sync"];
            plain.ask(first, &[rest, &init].concat())?;
        }
        let postgres = program("postgres")?;
        let serve = [&postgres, "-D", &data, "-p", &at, "-c", "unix_socket_directories=", "-c", "fsync=off"];
        let server = self.serve(first, &[rest, &serve].concat(), port)?;
        let to = ["-h", "127.0.0.1", "-p", &at, "-U", "postgres"];
        let start = Instant::now();
        while let Err(error) = plain.ask("pg_isready", &to) {
            anyhow::ensure!(start.elapsed().as_secs() < 10, "PostgreSQL does not get ready: {error:#}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        plain.ask("pgbench", &[&to[..], &["-i", "-q", "postgres"]].concat())?;
        let seconds = self.seconds.to_string();
        let text =
            self.ask("pgbench", &[&to[..], &["-S", "-c", "4", "-T", &seconds, "postgres"]].concat())?;
        server.stop()?;
        Ok(Figure::plain(number_after(&text, "tps = ").context("pgbench says no rate")?))
    }

    fn memcached(&self) -> Result<Figure> {
        let port = free_port()?;
        let at = port.to_string();
        let user: &[&str] = if nix::unistd::geteuid().is_root() { &["-u", "root"] } else { &[] };
        let args = [&["-l", "127.0.0.1", "-p", &at, "-t", "1"], user].concat();
        let server = self.serve("memcached", &args, port)?;
        let (clients, requests) = (4, 20_000 * self.seconds);
        let to = format!("--servers=127.0.0.1:{port}");
        let (concurrency, number) =
            (format!("--concurrency={clients}"), format!("--execute-number={}", requests / clients));
        let text =
            self.ask("memcslap", &[&to, &concurrency, &number, "--test=get", "--initial-load=1000"])?;
        server.stop()?;
        // "Time to get 60000 keys by 4 threads: 2.263 seconds."
        let line = text.lines().find(|line| line.starts_with("Time to get"));
        let seconds = line.and_then(|line| number_after(line, "threads:"));
        Ok(Figure::plain(f64::from(requests) / seconds.context("memcslap says no time")?))
    }

    fn python(&self) -> Result<Figure> {
        let port = free_port()?;
        let folder = self.folder.to_string_lossy();
        scratch::write(&self.folder.join("file"), "x".repeat(SMALL))?;
        let args = ["-m", "http.server", &port.to_string(), "-b", "127.0.0.1", "-d", &folder];
        let server = self.serve("python3", &args, port)?;
        let rate = self.wrk(&format!("http://127.0.0.1:{port}/file"), &["-c", "1"])?;
        server.stop()?;
        Ok(Figure::plain(rate))
    }

    fn node(&self) -> Result<Figure> {
        let port = free_port()?;
        let script = format!(
            "const body = 'x'.repeat({SMALL}); \
             require('http').createServer((_, answer) => answer.end(body)).listen({port}, '127.0.0.1'); \
             process.on('SIGTERM', () => process.exit(0));"
        );
        let server = self.serve("node", &["-e", &script], port)?;
        let rate = self.wrk(&format!("http://127.0.0.1:{port}/"), &["-c", "16"])?;
        server.stop()?;
        Ok(self.requests(rate, SMALL as u64))
    }

    fn idle(&self) -> Result<Figure> {
        let (server, at) = self.redis_server()?;
        let own = std::env::current_exe().context("this program cannot find its own file")?;
        let (pid, count, seconds) = (server.pid().to_string(), IDLE.to_string(), self.seconds.to_string());
        let text = self.ask(&own.to_string_lossy(), &[idle::CLIENT, &at, &pid, &count, &seconds])?;
        server.stop()?;
        let found: idle::Found = serde_json::from_str(text.trim())?;
        Ok(Figure { cpu: Cpu::Silent(found.silent), ..Figure::plain(found.rate) })
    }
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
