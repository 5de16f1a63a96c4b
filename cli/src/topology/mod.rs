//! `dmbridge topology`: the host's NUMA nodes and accelerators, and where a daemon's devices and extents are in them, as a
//! picture in text or as JSON.
//!
//! | module | subject |
//! | --- | --- |
//! | [`host`] | nodes, CPUs, memory, distances, DSA work queues, as sysfs tells them |
//! | [`draw`] | the picture |

mod draw;
mod host;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::control;
use crate::report::{Device, Extent};
use host::Host;

/// What `dmbridge topology` is asked for.
#[derive(clap::Args)]
pub struct Args {
    /// The daemon's control socket [default: /run/dmbridge/control.sock, and without a daemon there the host alone]
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Print it as JSON
    #[arg(long)]
    json: bool,
}

/// Where a daemon that was told nothing else by its package listens.
const CONTROL: &str = "/run/dmbridge/control.sock";

/// What is taken of the daemon's report.
#[derive(Deserialize)]
struct Report {
    version: String,
    pid: u32,
    #[serde(default)]
    devices: Vec<Device>,
    #[serde(default)]
    extents: Vec<Extent>,
}

/// The JSON: the host, and the parts of the daemon's report that are about places, as the daemon tells them.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    host: &'a Host,
    daemon: Option<Value>,
}

/// Looks, asks, and shows.
pub fn run(args: Args) -> Result<()> {
    let host = Host::look();
    let socket = args.control.clone().unwrap_or_else(|| CONTROL.into());
    // Who names a daemon wants it; who names none may have none.
    let wanted = args.control.is_some() || socket.exists();
    let answer = wanted.then(|| ask(&socket)).transpose()?;
    let mut out = std::io::stdout().lock();
    if args.json {
        let daemon = answer.map(|(value, _)| about_places(&value));
        serde_json::to_writer_pretty(&mut out, &Document { host: &host, daemon })?;
        writeln!(out)?;
    } else {
        write!(out, "{}", draw::text(&host, answer.as_ref().map(|(_, report)| report)))?;
        if answer.is_none() {
            writeln!(out, "\nno daemon at {CONTROL}; name its control socket with --control")?;
        }
    }
    Ok(())
}

fn ask(socket: &Path) -> Result<(Value, Report)> {
    let answer = control::get(socket, "/v1/report")?;
    let not_ours = || format!("{} is not a dmbridged's control socket", socket.display());
    let value: Value = serde_json::from_slice(&answer).with_context(not_ours)?;
    let report = Report::deserialize(&value).with_context(not_ours)?;
    Ok((value, report))
}

fn about_places(report: &Value) -> Value {
    ["version", "pid", "pool", "devices", "extents"]
        .into_iter()
        .map(|part| (part.to_owned(), report[part].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
