//! `dmbridge devices`: what a daemon serves, as a table or as the daemon's own JSON.

use anyhow::Result;
use serde::Deserialize;

use crate::control;
use crate::report::{Device, bytes};

/// What the columns are.
pub const COLUMNS: &str = "Columns:
  PID         process of the front-end: a VMM, or a program that uses the library
  STATE       absent: nobody is connected · connected: no driver has started the device · maps · moves only · paused
  DMBS        buffers that it owns: it reads them, others write them
  ATTACHED    buffers of others that it has mapped
  EXTENTS     pieces of memory in its window, which hold the buffers of one pair of devices each
  MAPPED      their sizes together
  MOVES       copies that the daemon made for it; MOVED: bytes of these
  SIGNALS     how often it woke somebody; SUPPRESSED: how often that was not needed";

/// What is shown of the daemon's report (`docs/dmbridged.md`).
#[derive(Deserialize)]
struct Report {
    devices: Vec<Device>,
}

/// Asks, and shows.
pub fn run(args: control::Args) -> Result<()> {
    args.show("/v1/report", |report: &Report| table(&report.devices))
}

fn table(devices: &[Device]) -> String {
    if devices.is_empty() {
        return "no devices: none is configured, and no program has connected to the hub\n".to_owned();
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
        [
            d.name.clone(),
            d.gid.clone(),
            d.group.clone(),
            d.pid().map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
            d.state().to_owned(),
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
        assert!(table(&[]).starts_with("no devices"));
    }
}
