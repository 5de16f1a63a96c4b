//! `dmbridge engines`: what copies in a daemon, as tables or as the daemon's own JSON.

use anyhow::Result;
use serde::Deserialize;
use std::fmt::Write;

use crate::control;

/// What is shown of the daemon's answer (`docs/numa.md`).
#[derive(Deserialize)]
struct Engines {
    origin: String,
    took_microseconds: u64,
    engines: Vec<Engine>,
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Engine {
    name: String,
    workers: u32,
    copies: u64,
    bytes: u64,
    #[serde(default)]
    faults: u64,
    #[serde(default)]
    errors: u64,
    #[serde(default)]
    busy: u64,
    #[serde(default)]
    lost: bool,
}

#[derive(Deserialize)]
struct Row {
    source_node: u32,
    destination_node: u32,
    bytes: u64,
    engine: String,
    chosen_by: String,
    uses: u64,
    costs: Vec<Cost>,
}

#[derive(Deserialize)]
struct Cost {
    engine: String,
    nanoseconds: u64,
}

/// Asks, and shows.
pub fn run(args: control::Args) -> Result<()> {
    args.show("/v1/engines", text)
}

fn text(all: &Engines) -> String {
    let mut out = String::new();
    let how = match all.origin.as_str() {
        "cached" => "measured at an earlier start, tried again at this one",
        _ => "measured when the daemon started",
    };
    let _ = writeln!(out, "{how}, in {:.1} ms\n", all.took_microseconds as f64 / 1e3);
    let _ = writeln!(out, "{:<14}{:>8}{:>14}{:>18}", "ENGINE", "WORKERS", "COPIES", "BYTES");
    for engine in &all.engines {
        let _ = writeln!(
            out,
            "{:<14}{:>8}{:>14}{:>18}",
            engine.name, engine.workers, engine.copies, engine.bytes
        );
    }
    for engine in
        all.engines.iter().filter(|engine| engine.faults + engine.errors + engine.busy != 0 || engine.lost)
    {
        let Engine { name, faults, errors, busy, lost, .. } = engine;
        let lost = if *lost { "; it did not answer and is not used any more" } else { "" };
        let _ = writeln!(
            out,
            "{name}: a CPU finished {faults} copies at missing pages, and did {errors} that failed and {busy} for which \
             the queue had no room{lost}"
        );
    }
    let mut route = None;
    for row in &all.rows {
        if route != Some((row.source_node, row.destination_node)) {
            route = Some((row.source_node, row.destination_node));
            let _ = writeln!(out, "\nfrom node {} to node {}", row.source_node, row.destination_node);
            let _ = write!(out, "{:>8}", "SIZE");
            for engine in &all.engines {
                let _ = write!(out, "{:>22}", engine.name);
            }
            let _ = writeln!(out, "  {:<14}{:<10}{:>12}", "USED", "BY", "TIMES");
        }
        let _ = write!(out, "{:>8}", size(row.bytes));
        for engine in &all.engines {
            let cost = row.costs.iter().find(|cost| cost.engine == engine.name);
            let cell = cost.map_or_else(|| "-".to_owned(), |cost| figures(row.bytes, cost.nanoseconds));
            let _ = write!(out, "{cell:>22}");
        }
        let by = match row.chosen_by.as_str() {
            "configuration" => "setting",
            "trial" => "trial",
            _ => "speed",
        };
        let _ = writeln!(out, "  {:<14}{:<10}{:>12}", row.engine, by, row.uses);
    }
    out
}

/// Time and throughput of a copy.
fn figures(bytes: u64, nanoseconds: u64) -> String {
    let time = match nanoseconds {
        0..10_000 => format!("{nanoseconds} ns"),
        _ => format!("{:.1} µs", nanoseconds as f64 / 1e3),
    };
    format!("{time} {:>6.2} GB/s", bytes as f64 / nanoseconds.max(1) as f64)
}

fn size(bytes: u64) -> String {
    match bytes.max(1).ilog2() {
        0..10 => format!("{bytes} B"),
        10..20 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_have_a_line_per_engine_and_per_size() {
        let json = r#"{"origin": "measured", "took_microseconds": 23500,
            "engines": [{"name": "cpu", "node": null, "workers": 0, "copies": 7, "bytes": 448},
                        {"name": "cpu-node.0", "node": 0, "workers": 3, "copies": 0, "bytes": 0}],
            "rows": [{"source_node": 0, "destination_node": 0, "bytes": 64, "engine": "cpu",
                      "chosen_by": "measurement", "uses": 7,
                      "costs": [{"engine": "cpu", "nanoseconds": 16}]},
                     {"source_node": 0, "destination_node": 0, "bytes": 1048576, "engine": "cpu-node.0",
                      "chosen_by": "configuration", "uses": 0,
                      "costs": [{"engine": "cpu", "nanoseconds": 104858},
                                {"engine": "cpu-node.0", "nanoseconds": 52429}]}]}"#;
        let text = text(&serde_json::from_str(json).unwrap());
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 10, "{text}");
        assert!(lines[0].ends_with("in 23.5 ms"));
        assert!(lines[8].contains("16 ns   4.00 GB/s") && lines[8].contains('-'), "{text}");
        assert!(lines[9].contains("1 MiB") && lines[9].contains("52.4 µs  20.00 GB/s"), "{text}");
        assert!(lines[9].contains("setting"), "{text}");
    }
}
