//! `dmbridge devices`: what a daemon serves, as a table or as the daemon's own JSON.

use anyhow::{Context, Result};
use serde::Deserialize;
use std::io::Write;
use std::path::PathBuf;

use crate::control;

/// What `dmbridge devices` is asked for.
#[derive(clap::Args)]
pub struct Args {
    /// The daemon's control socket
    #[arg(long, value_name = "SOCKET", default_value = "/run/dmbridge/control.sock")]
    control: PathBuf,
    /// Print the daemon's report as JSON
    #[arg(long)]
    json: bool,
}

/// What is shown of the daemon's report (`docs/dmbridged.md`). What an older daemon does not tell is 0.
#[derive(Deserialize)]
struct Report {
    devices: Vec<Device>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Device {
    name: String,
    gid: String,
    group: String,
    peer: Option<Peer>,
    started: bool,
    map: bool,
    dmbs: u64,
    attached: u64,
    extents: u64,
    mapped_bytes: u64,
    moves: u64,
    moved_bytes: u64,
    signals_sent: u64,
    signals_suppressed: u64,
}

#[derive(Deserialize)]
struct Peer {
    pid: i32,
}

/// Asks, and shows.
pub fn run(args: Args) -> Result<()> {
    let answer = control::get(&args.control, "/v1/report")?;
    let report: Report = serde_json::from_slice(&answer)
        .with_context(|| format!("{} is not a dmbridged's control socket", args.control.display()))?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let value: serde_json::Value = serde_json::from_slice(&answer)?;
        serde_json::to_writer_pretty(&mut out, &value)?;
        writeln!(out)?;
    } else {
        write!(out, "{}", table(&report.devices))?;
    }
    Ok(())
}

fn table(devices: &[Device]) -> String {
    if devices.is_empty() {
        return "no devices\n".to_owned();
    }
    let header = [
        "NAME",
        "GID",
        "GROUP",
        "PID",
        "STATE",
        "DMBS",
        "ATTACHED",
        "EXTENTS",
        "MAPPED",
        "MOVES",
        "MOVED",
        "SIGNALS",
        "SUPPRESSED",
    ]
    .map(str::to_owned);
    let row = |d: &Device| {
        let state = match (&d.peer, d.started, d.map) {
            (None, ..) => "absent",
            (_, false, _) => "connected",
            (_, true, true) => "maps",
            (_, true, false) => "moves only",
        };
        [
            d.name.clone(),
            d.gid.clone(),
            d.group.clone(),
            d.peer.as_ref().map_or_else(|| "-".to_owned(), |peer| peer.pid.to_string()),
            state.to_owned(),
            d.dmbs.to_string(),
            d.attached.to_string(),
            d.extents.to_string(),
            bytes(d.mapped_bytes),
            d.moves.to_string(),
            bytes(d.moved_bytes),
            d.signals_sent.to_string(),
            d.signals_suppressed.to_string(),
        ]
    };
    /// Columns of words, which start at the left; the others are numbers.
    const WORDS: usize = 5;
    let rows: Vec<_> = std::iter::once(header).chain(devices.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..rows[0].len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cell = |(i, cell): (usize, &String)| {
            let width = widths[i];
            if i < WORDS { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        };
        let line = row.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ");
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A size in the largest unit of which there is one, with a digit after the point.
fn bytes(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    if unit == 0 {
        return format!("{bytes} B");
    }
    format!("{:.1} {}", bytes as f64 / f64::from(1 << 10).powi(unit as i32), units[unit as usize])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_per_device_and_aligned_columns() {
        let json = r#"{"version": "1", "devices": [
            {"name": "web", "gid": "0000000000000042", "group": "default", "peer": {"pid": 77, "uid": 0},
             "started": true, "map": true, "dmbs": 2, "mapped_bytes": 4194304, "signals_sent": 12},
            {"name": "a-long-name", "gid": "1", "group": "g", "peer": null, "something": "new"}]}"#;
        let report: Report = serde_json::from_str(json).unwrap();
        let text = table(&report.devices);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].starts_with("web          0000000000000042  default  77   maps"), "{text}");
        assert!(lines[1].contains("4.0 MiB"), "{text}");
        assert!(lines[2].contains("absent"), "{text}");
        assert_eq!(lines[0].find("GROUP"), lines[1].find("default"));
        assert_eq!(table(&[]), "no devices\n");
    }

    #[test]
    fn sizes_are_written_for_people() {
        assert_eq!(
            [0, 1023, 1024, 1536 << 10, 3 << 40].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "3.0 TiB"]
        );
    }
}
