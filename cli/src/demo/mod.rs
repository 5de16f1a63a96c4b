//! `dmbridge demo`: real files cross between two isolated devices, by map and by move, and every byte is checked.
//!
//! | module | subject |
//! | --- | --- |
//! | [`content`] | what is sent |
//! | [`crossing`] | the two processes: sending, receiving, timing, checking |

mod content;
mod crossing;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::out;
use crate::pair::{self, Role};
use crate::report;
use crate::scratch::Scratch;
use crate::usage::usage;
use content::Content;
use crossing::{Job, Said};

pub use crossing::work;

/// Name of the hidden subcommand.
pub const WORKER: &str = "demo-worker";

/// How long the two processes may say nothing: a piece is read, sent and checked in far less.
const PATIENCE: Duration = Duration::from_secs(60);

/// What `dmbridge demo` is asked for.
#[derive(clap::Args)]
pub struct Args {
    /// Send this file instead of some of this machine's programs and libraries
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// Print the results as JSON
    #[arg(long)]
    json: bool,
}

/// How one way went, as in the JSON.
#[derive(Serialize)]
struct Crossed {
    /// Bytes sent.
    bytes: u64,
    /// Seconds in which they crossed, without reading and checking them.
    seconds: f64,
    /// Seconds in which they were read, crossed, and were checked.
    seconds_in_all: f64,
    /// Whether what arrived has the checksum of what was sent.
    verified: bool,
    /// SHA-256 of what was sent.
    sha256: String,
}

#[derive(Serialize)]
struct Results {
    map: Crossed,
    r#move: Crossed,
}

/// Sends by both ways, and shows how it went.
pub fn run(args: Args) -> Result<()> {
    let content = match &args.file {
        None => Content::of_this_machine()?,
        Some(path) => Content::of_file(path).map_err(|error| usage(format!("{error:#}")))?,
    };
    let scratch = Scratch::new(|_| {})?;
    let daemon = Daemon::start(&scratch)?;
    if !args.json {
        out::line(format!("{content}, between two processes, each with a device of its own:"))?;
    }
    let cross = |map: bool| -> Result<Crossed> {
        let job = Job { hub: daemon.hub().to_owned(), file: args.file.clone(), map };
        let way = if map { "map" } else { "move" };
        let crossed = cross(&job, content.bytes(), way).with_context(|| format!("the {way} failed"))?;
        if !args.json {
            out::line(line(way, &crossed))?;
        }
        Ok(crossed)
    };
    let results = Results { map: cross(true)?, r#move: cross(false)? };
    if args.json {
        out::json(&results)?;
    } else {
        out::line(
            "A rate is that of crossing; in brackets, with reading and SHA-256 at both ends, one after the other.",
        )?;
    }
    if !(results.map.verified && results.r#move.verified) {
        bail!("what arrived is not what was sent");
    }
    Ok(())
}

/// Sends all of the content one way.
fn cross(job: &Job, bytes: u64, way: &str) -> Result<Crossed> {
    let bar = ProgressBar::new(bytes);
    if let Ok(style) = ProgressStyle::with_template("{msg:<5} {bar:30} {bytes} of {total_bytes}") {
        bar.set_style(style);
    }
    bar.set_message(way.to_owned());
    let (mut sent, mut received) = (None, None);
    pair::run(WORKER, &serde_json::to_string(job)?, PATIENCE, |role, line| {
        match serde_json::from_str(line).context("a process of the demo said something unexpected")? {
            Said::Crossed(so_far) => bar.set_position(so_far),
            Said::Done(end) => *(if role == Role::A { &mut sent } else { &mut received }) = Some(end),
            Said::Failed(sentence) => bail!("{sentence}"),
        }
        Ok(())
    })?;
    bar.finish_and_clear();
    let sent = sent.context("the sender ended without a result")?;
    let received = received.context("the receiver ended without a result")?;
    Ok(Crossed {
        verified: sent.sha256 == received.sha256 && sent.bytes == received.bytes,
        bytes: sent.bytes,
        seconds: sent.seconds,
        seconds_in_all: sent.seconds_in_all,
        sha256: sent.sha256,
    })
}

fn line(way: &str, crossed: &Crossed) -> String {
    let rate = |seconds: f64| crossed.bytes as f64 / 1e9 / seconds.max(1e-9);
    let verdict = if crossed.verified { "verified" } else { "NOT WHAT WAS SENT" };
    format!(
        "  {way:<5} {:>9} in {:.3} s: {:.2} GB/s ({:.2} GB/s)   {verdict}, SHA-256 {}…",
        report::bytes(crossed.bytes),
        crossed.seconds,
        rate(crossed.seconds),
        rate(crossed.seconds_in_all),
        &crossed.sha256[..16]
    )
}
