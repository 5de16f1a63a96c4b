//! `dmbridge topology`: the host's NUMA nodes and accelerators, and where a daemon's devices and extents are in them, as a
//! picture in text or as JSON.
//!
//! | module | subject |
//! | --- | --- |
//! | [`host`] | nodes, CPUs, memory, distances, DSA work queues, as sysfs tells them |
//! | [`draw`] | the picture |

mod draw;
mod host;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

use crate::control;
use crate::out;
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
    let socket = args.control.clone().unwrap_or_else(|| control::SOCKET.into());
    // Who names a daemon wants it; who names none may have none.
    let wanted = args.control.is_some() || socket.exists();
    let answer = wanted.then(|| control::ask::<Report>(&socket, "/v1/report")).transpose()?;
    if args.json {
        let daemon = answer.map(|(value, _)| about_places(&value));
        return out::json(&Document { host: &host, daemon });
    }
    out::text(draw::text(&host, answer.as_ref().map(|(_, report)| report)))?;
    match answer {
        Some(_) => Ok(()),
        None => {
            out::line(format!("\nno daemon at {}; name its control socket with --control", control::SOCKET))
        }
    }
}

fn about_places(report: &Value) -> Value {
    ["version", "pid", "pool", "devices", "extents"]
        .into_iter()
        .map(|part| (part.to_owned(), report[part].clone()))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
