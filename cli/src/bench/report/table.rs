//! The results for a terminal: every figure, then what the project promises of them.

use std::fmt::Write;

use super::{Measured, Run};
use crate::bench::plan::Transport::{self, *};

/// A promise: a figure as a multiple of another one of the same run, the anchor.
pub struct Promise {
    what: &'static str,
    case: &'static str,
    ours: Transport,
    anchor: Transport,
    must: f64,
    aim: f64,
}

/// What the project promises of this benchmark.
const PROMISES: [Promise; 28] = [
    promise("14 bytes one way, both polling", "latency-14", DmbridgeMap, Cacheline, 3.0, 2.0),
    promise("14 bytes one way, receiver asleep", "latency-14-sleep", DmbridgeMap, Tcp, 0.7, 0.5),
    promise("stream of 64 KiB writes", "stream-64k", DmbridgeMap, Tcp, 2.0, 3.0),
    promise("stream of 64 KiB writes", "stream-64k", DmbridgeMap, Ring, 0.75, 0.95),
    promise("every byte made and read, in place", "produce-64k", DmbridgeInplace, DmbridgeMap, 1.3, 1.7),
    promise("100-byte request and response", "rate-100", DmbridgeMap, Tcp, 5.0, 20.0),
    promise("move of 1 MiB", "move-1m", DmbridgeMove, Memcpy, 0.8, 0.95),
    promise("1 MiB, buffer to buffer", "cma-large-1m", DmbridgeMessage, DmbridgeMap, 1.5, 2.0),
    promise("16 MiB, buffer to buffer", "cma-large-16m", DmbridgeMessage, DmbridgeMap, 1.5, 2.0),
    promise("1 MiB, buffer to buffer", "cma-large-1m", DmbridgeMessage, Tcp, 2.0, 3.0),
    promise("16 MiB, buffer to buffer", "cma-large-16m", DmbridgeMessage, Tcp, 2.0, 3.0),
    promise("unchanged iperf3", "iperf3", DmbridgeRun, Tcp, 1.9, 3.0),
    promise("unchanged sockperf ping-pong", "sockperf-pp", DmbridgeRun, Tcp, 0.5, 0.2),
    promise("unchanged sockperf throughput", "sockperf-tp", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged redis, GET", "redis-get", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged nginx + wrk", "nginx-wrk", DmbridgeRun, Tcp, 1.4, 2.0),
    promise("unchanged iperf3, four streams", "iperf3-4", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged iperf3, reverse", "iperf3-reverse", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged iperf3, both directions", "iperf3-bidir", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged nginx, files of 1 MiB", "nginx-large", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged nginx, TLS", "nginx-tls", DmbridgeRun, Tcp, 0.95, 1.2),
    promise("unchanged nginx, short connections", "nginx-short", DmbridgeRun, Tcp, 0.95, 1.0),
    promise("unchanged PostgreSQL, SELECT", "pgbench-select", DmbridgeRun, Tcp, 0.95, 1.2),
    promise("unchanged memcached, GET", "memcached-get", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("unchanged Python, short connections", "python-http", DmbridgeRun, Tcp, 0.95, 1.0),
    promise("unchanged Node", "node-http", DmbridgeRun, Tcp, 0.95, 1.2),
    promise("one redis connection beside 1,000 idle", "idle-1000", DmbridgeRun, Tcp, 0.95, 2.0),
    promise("1,000 idle connections, CPU time", "idle-1000-cpu", DmbridgeRun, Tcp, 1.1, 1.0),
];

/// Moves by the engine that the daemon chose, as a multiple of those by the best one, by case.
const CHOSEN: [(&str, &str, f64); 5] = [
    ("move of 64 bytes, chosen engine", "move-64", 0.97),
    ("move of 4 KiB, chosen engine", "move-4k", 0.95),
    ("move of 64 KiB, chosen engine", "move-64k", 0.95),
    ("move of 1 MiB, chosen engine", "move-1m", 0.95),
    ("move of 16 MiB, chosen engine", "move-16m", 0.95),
];

/// What it promises between two virtual machines: of the library what AF_SMC has to reach too.
const VM_PROMISES: [Promise; 7] = [
    promise("AF_SMC, 14 bytes one way", "latency-14-sleep", AfSmc, Tcp, 0.5, 0.2),
    promise("AF_SMC, stream of 64 KiB writes", "stream-64k", AfSmc, Tcp, 2.0, 5.0),
    promise("14 bytes one way, both polling", "latency-14", DmbridgeMap, Tcp, 0.5, 0.2),
    promise("14 bytes one way, receiver asleep", "latency-14-sleep", DmbridgeMap, Tcp, 0.5, 0.2),
    promise("stream of 64 KiB writes", "stream-64k", DmbridgeMap, Tcp, 2.0, 5.0),
    promise("100-byte request and response", "rate-100", DmbridgeMap, Tcp, 2.0, 5.0),
    promise("move of 1 MiB", "move-1m", DmbridgeMove, Tcp, 2.0, 5.0),
];

const fn promise(
    what: &'static str,
    case: &'static str,
    ours: Transport,
    anchor: Transport,
    must: f64,
    aim: f64,
) -> Promise {
    Promise { what, case, ours, anchor, must, aim }
}

/// A promise and what became of it.
pub struct Verdict {
    /// What was promised.
    pub what: &'static str,
    /// Whose figure, as a multiple of whose.
    pub of: String,
    /// The ratio.
    pub ratio: f64,
    /// What it has to be.
    pub must: String,
    /// What it is meant to become.
    pub aim: String,
    /// Whether it is.
    pub reached: bool,
}

/// The promises that the run can be held to.
pub fn verdicts(run: &Run) -> Vec<Verdict> {
    let verdict = |p: &Promise| {
        let ratio = run.value(p.case, p.ours)? / run.value(p.case, p.anchor)?;
        let less = p.aim < p.must;
        let sign = if less { "≤" } else { "≥" };
        Some(Verdict {
            what: p.what,
            of: format!("{} / {}", p.ours.name(), p.anchor.name()),
            ratio,
            must: format!("{sign} {}", p.must),
            aim: format!("{sign} {}", p.aim),
            reached: if less { ratio <= p.must } else { ratio >= p.must },
        })
    };
    let chosen = |(what, case, must): &(&'static str, &str, f64)| {
        let engines = [EngineCpu, EngineCpuNode].into_iter().filter_map(|engine| run.value(case, engine));
        let best =
            engines.fold(None, |best: Option<f64>, value| Some(best.map_or(value, |b| b.max(value))))?;
        let ratio = run.value(case, DmbridgeMove)? / best;
        Some(Verdict {
            what,
            of: format!("{} / best engine", DmbridgeMove.name()),
            ratio,
            must: format!("≥ {must}"),
            aim: "≥ 1".to_owned(),
            reached: ratio >= *must,
        })
    };
    let promises: &[Promise] = if run.machine.guests.is_some() { &VM_PROMISES } else { &PROMISES };
    promises.iter().filter_map(verdict).chain(CHOSEN.iter().filter_map(chosen)).collect()
}

/// The whole text. The sweep is left out: it is many figures, and a picture shows them better.
pub fn text(run: &Run) -> String {
    let mut out = guests(run);
    out += &cases(run);
    scale(run, &mut out);
    promises(run, &mut out);
    out
}

/// What the guests are, if there are some.
fn guests(run: &Run) -> String {
    let Some(guests) = &run.machine.guests else { return String::new() };
    let mut out = format!("{guests}\n");
    if guests.is_emulated() {
        out += "They are emulated (TCG): what takes how long says nothing about KVM, and ratios are not those of KVM.\n";
    }
    for sentence in &guests.not_measured {
        let _ = writeln!(out, "not measured: {sentence}");
    }
    out
}

fn cases(run: &Run) -> String {
    let mut out = String::new();
    let mut case = "";
    for r in run.results.iter().filter(|r| !r.case.starts_with("sweep-") && !r.case.starts_with("scale-")) {
        if r.case != case {
            case = &r.case;
            let _ = writeln!(
                out,
                "\n{case:<22}{:>12}{:>12}{:>12}{:>12}{:>12}  unit",
                "median", "min", "max", "p50", "p99"
            );
        }
        let _ = writeln!(out, "{}", row(r));
    }
    out
}

fn scale(run: &Run, out: &mut String) {
    let Some(table) = run.scale() else { return };
    let _ = write!(out, "\n{:<22}", "devices");
    for count in &table.devices {
        let _ = write!(out, "{count:>12}");
    }
    out.push('\n');
    for (what, cells) in &table.rows {
        let _ = write!(out, "  {:<20}", what.replace('-', " "));
        for cell in cells {
            let _ = write!(out, "{:>12}", cell.map_or_else(String::new, |r| figure(r.value())));
        }
        let _ = writeln!(out, "  {}", cells.iter().flatten().next().map_or("", |r| r.unit));
    }
}

fn promises(run: &Run, out: &mut String) {
    let verdicts = verdicts(run);
    if !verdicts.is_empty() {
        let _ = writeln!(out, "\n{:<38}{:<32}{:>8}{:>9}{:>9}", "promised", "ratio of", "is", "must", "aim");
        for v in verdicts {
            let reached = if v.reached { "reached" } else { "missed" };
            let _ = writeln!(
                out,
                "{:<38}{:<32}{:>8}{:>9}{:>9}  {reached}",
                v.what,
                v.of,
                figure(v.ratio),
                v.must,
                v.aim
            );
        }
    }
}

fn row(r: &Measured) -> String {
    let optional = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), figure);
    format!(
        "  {:<20}{:>12}{:>12}{:>12}{:>12}{:>12}  {}",
        r.transport.name(),
        figure(r.value()),
        figure(r.min()),
        figure(r.max()),
        optional(r.p50),
        optional(r.p99),
        r.unit
    )
}

/// A figure with three digits that mean something, and separated thousands.
pub fn figure(value: f64) -> String {
    let decimals = match value.abs() {
        v if v >= 100.0 || v == 0.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) && digit.is_ascii_digit() && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_separated_thousands() {
        let all = [1234567.0, 123.4, 56.78, 5.678, 0.5678, 0.0, 1000.0].map(figure);
        assert_eq!(all, ["1,234,567", "123", "56.8", "5.68", "0.568", "0", "1,000"]);
    }
}
