//! Programs as they are, over TCP and by `dmbridge-run`. Each is started anew for every measurement, server and client the
//! same way, and what both used of the CPUs is counted too.

mod app;
pub mod idle;
mod programs;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use std::path::Path;

use self::app::{App, program_path};
pub use self::programs::CASES;
use self::programs::{Cpu, needs, unit};
use super::plan::{Case, Transport};
use super::report::Measured;
use crate::process::find_program;
use crate::usage::usage;

/// The ways in which each is run.
const WAYS: [Transport; 2] = [Transport::Tcp, Transport::DmbridgeRun];

/// The cases asked for, all of which can be measured here; or all that can, if none was asked for.
pub fn choose(asked: &[Case]) -> Result<Vec<Case>> {
    let missing = |case: &Case| {
        let (program, package) = needs(*case).iter().find(|(program, _)| program_path(program).is_none())?;
        Some(format!("{} needs {program}, which is not installed (Debian: {package})", case.name()))
    };
    if let Some(sentence) = asked.iter().find_map(missing) {
        return Err(usage(format!("{sentence}; install it, or choose other cases")));
    }
    let wanted = CASES.into_iter().filter(|case| asked.is_empty() || asked.contains(case));
    let there = wanted.filter(|case| missing(case).inspect(|sentence| eprintln!("{sentence}")).is_none());
    Ok(there.collect())
}

/// Measures every case, its ways in turn, round by round.
pub fn measure(
    cases: &[Case],
    hub: &Path,
    folder: &Path,
    rounds: u32,
    seconds: u32,
    results: &mut Vec<Measured>,
) -> Result<()> {
    ensure!(!cases.is_empty(), "none of the programs is installed");
    let runner = find_program("dmbridge-run").ok_or_else(|| {
        anyhow!("dmbridge-run was found neither next to this program nor in PATH; build the whole workspace, or install it")
    })?;
    for case in cases {
        let mut found = WAYS.map(Found::new);
        for round in 0..rounds {
            for found in &mut found {
                let way = found.way;
                eprintln!("{} over {}, round {}", case.name(), way.name(), round + 1);
                let app = App { way, runner: &runner, hub, folder, seconds };
                found.add(&app, *case).with_context(|| format!("{} over {}", case.name(), way.name()))?;
            }
        }
        results.extend(found.iter().map(|found| found.figure(*case)));
        results.extend(found.iter().filter_map(|found| found.cpu(*case)));
    }
    Ok(())
}

/// What the rounds of a case gave, one way.
struct Found {
    way: Transport,
    values: Vec<f64>,
    middles: Vec<f64>,
    tails: Vec<f64>,
    /// In `cpu_unit`.
    cpu: Vec<f64>,
    cpu_unit: &'static str,
}

impl Found {
    fn new(way: Transport) -> Found {
        Found {
            way,
            values: Vec::new(),
            middles: Vec::new(),
            tails: Vec::new(),
            cpu: Vec::new(),
            cpu_unit: "",
        }
    }

    /// Measures once more.
    fn add(&mut self, app: &App, case: Case) -> Result<()> {
        let before = cpu_seconds()?;
        let figure = app.run(case)?;
        let used = cpu_seconds()? - before;
        self.values.push(figure.value);
        self.middles.extend(figure.p50);
        self.tails.extend(figure.p99);
        match figure.cpu {
            Cpu::Nothing => {}
            Cpu::Bytes(bytes) => {
                self.cpu_unit = "s/GB";
                self.cpu.push(used / (bytes / 1e9));
            }
            Cpu::Silent(rate) => {
                self.cpu_unit = "ms/s";
                self.cpu.push(rate * 1e3);
            }
        }
        Ok(())
    }

    fn figure(&self, case: Case) -> Measured {
        let middle = |values: &[f64]| (!values.is_empty()).then(|| super::measure::median(values));
        Measured {
            case: case.name(),
            transport: self.way,
            unit: unit(case).name(),
            rounds: self.values.clone(),
            p50: middle(&self.middles),
            p99: middle(&self.tails),
            samples: None,
        }
    }

    fn cpu(&self, case: Case) -> Option<Measured> {
        (!self.cpu.is_empty()).then(|| Measured {
            case: format!("{}-cpu", case.name()),
            transport: self.way,
            unit: self.cpu_unit,
            rounds: self.cpu.clone(),
            p50: None,
            p99: None,
            samples: None,
        })
    }
}

/// What the CPUs did for children that have ended, in seconds.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    Ok((usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1e6)
}
