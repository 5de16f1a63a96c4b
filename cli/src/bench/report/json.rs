//! The results for programs. This form is an interface: it only grows.

use anyhow::Result;
use serde::Serialize;

use super::Run;
use crate::bench::machine::Machine;

#[derive(Serialize)]
struct Document<'a> {
    machine: &'a Machine,
    results: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    case: &'a str,
    transport: String,
    value: f64,
    unit: &'a str,
    p50: Option<f64>,
    p99: Option<f64>,
    min: f64,
    max: f64,
    rounds: usize,
}

/// The results.
pub fn text(run: &Run) -> Result<String> {
    let results = run.results.iter().map(|r| Entry {
        case: &r.case,
        transport: r.transport.name(),
        value: r.value(),
        unit: r.unit,
        p50: r.p50,
        p99: r.p99,
        min: r.min(),
        max: r.max(),
        rounds: r.rounds.len(),
    });
    let mut text =
        serde_json::to_string_pretty(&Document { machine: &run.machine, results: results.collect() })?;
    text.push('\n');
    Ok(text)
}
