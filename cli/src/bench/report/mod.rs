//! What a run found out, and how it is shown: as JSON for programs, as a table and a page for people.

pub mod html;
pub mod json;
pub mod table;

use super::machine::Machine;
use super::measure::{Outcome, Samples, median};
use super::plan::{Transport, Unit, Work};

/// All of a run.
pub struct Run {
    /// What it ran on.
    pub machine: Machine,
    /// What was measured.
    pub results: Vec<Measured>,
}

/// A figure of a case over a transport.
pub struct Measured {
    /// The case's name.
    pub case: String,
    /// What carried the bytes; or, in `scale`, what was served.
    pub transport: Transport,
    /// The unit of all figures, as written.
    pub unit: &'static str,
    /// The figure of each round.
    pub rounds: Vec<f64>,
    /// The figure that half of the samples are not worse than.
    pub p50: Option<f64>,
    /// The figure that 99 of 100 samples are not worse than.
    pub p99: Option<f64>,
    /// For latencies: how often each was seen, in nanoseconds.
    pub samples: Option<Samples>,
}

impl Measured {
    /// The figure: the median of the rounds.
    pub fn value(&self) -> f64 {
        median(&self.rounds)
    }

    /// The least of the rounds.
    pub fn min(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The greatest of the rounds.
    pub fn max(&self) -> f64 {
        self.rounds.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }

    /// What the rounds of a measurement give.
    pub fn from_rounds(
        case: &str,
        transport: Transport,
        work: Work,
        unit: Unit,
        rounds: &[Outcome],
    ) -> Measured {
        let convert = |raw: f64| match (work, unit) {
            (Work::PingPong { .. }, Unit::Nanoseconds) => raw / 2.0,
            (Work::PingPong { .. }, _) => 1e9 / raw,
            (
                Work::Stream { bytes }
                | Work::Large { bytes }
                | Work::Exchange { bytes }
                | Work::Produce { bytes }
                | Work::Move { bytes },
                Unit::PerSecond,
            ) => raw / bytes as f64,
            _ => raw / 1e9,
        };
        let mut samples = Samples::new();
        rounds.iter().for_each(|outcome| samples.add(&outcome.samples));
        // Samples are nanoseconds, where less is better, or kilobytes per second, where more is.
        let timed = matches!(work, Work::PingPong { .. });
        let quantile = |fraction: f64| {
            if timed {
                samples.quantile(fraction).map(|ns| convert(ns as f64))
            } else {
                samples.quantile(1.0 - fraction).map(|kilobytes| convert(kilobytes as f64 * 1e3))
            }
        };
        let (p50, p99) = (quantile(0.5), quantile(0.99));
        Measured {
            case: case.to_owned(),
            transport,
            unit: unit.name(),
            rounds: rounds.iter().map(|outcome| convert(outcome.value)).collect(),
            p50,
            p99,
            samples: (timed && unit == Unit::Nanoseconds).then_some(samples),
        }
    }
}

/// The results of `scale`, by what was measured and by the number of devices.
pub struct ScaleTable<'a> {
    /// Numbers of devices.
    pub devices: Vec<u64>,
    /// What, and the result for each number of devices.
    pub rows: Vec<(String, Vec<Option<&'a Measured>>)>,
}

impl Run {
    /// The results of `scale`, if it was measured.
    pub fn scale(&self) -> Option<ScaleTable<'_>> {
        let mut table = ScaleTable { devices: Vec::new(), rows: Vec::new() };
        for result in &self.results {
            let Some((what, devices)) = result.case.strip_prefix("scale-").and_then(|c| c.rsplit_once('-'))
            else {
                continue;
            };
            let Ok(devices) = devices.parse() else { continue };
            let column = table.devices.iter().position(|d| *d == devices).unwrap_or_else(|| {
                table.devices.push(devices);
                table.devices.len() - 1
            });
            let row = table.rows.iter().position(|(name, _)| name == what).unwrap_or_else(|| {
                table.rows.push((what.to_owned(), Vec::new()));
                table.rows.len() - 1
            });
            let cells = &mut table.rows[row].1;
            cells.resize(cells.len().max(column + 1), None);
            cells[column] = Some(result);
        }
        (!table.rows.is_empty()).then_some(table)
    }

    /// The figure of a case over a transport, if it was measured.
    pub fn value(&self, case: &str, transport: Transport) -> Option<f64> {
        self.results.iter().find(|r| r.case == case && r.transport == transport).map(Measured::value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(work: Work, unit: Unit, values: &[f64], samples: &[(u64, u64)]) -> Measured {
        let rounds: Vec<_> =
            values.iter().map(|v| Outcome { value: *v, samples: samples.to_vec() }).collect();
        Measured::from_rounds("case", Transport::Tcp, work, unit, &rounds)
    }

    #[test]
    fn a_latency_is_half_a_round_trip() {
        let work = Work::PingPong { bytes: 14, wait: super::super::plan::Wait::Poll };
        let m = measured(work, Unit::Nanoseconds, &[300.0, 200.0, 220.0], &[(200, 99), (800, 1)]);
        assert_eq!((m.value(), m.min(), m.max()), (110.0, 100.0, 150.0));
        assert_eq!((m.p50, m.p99), (Some(100.0), Some(100.0)));
        let m = measured(work, Unit::PerSecond, &[500.0], &[]);
        assert_eq!((m.value(), m.p50), (2e6, None));
    }

    #[test]
    fn the_slow_tail_of_a_stream_is_its_p99() {
        let m = measured(
            Work::Stream { bytes: 65536 },
            Unit::GigabytesPerSecond,
            &[8e9],
            &[(2_000_000, 2), (8_000_000, 98)],
        );
        assert_eq!(m.value(), 8.0);
        assert!((m.p50.unwrap() - 8.0).abs() < 0.01);
        assert!((m.p99.unwrap() - 2.0).abs() < 0.01);
    }

    #[test]
    fn small_transfers_count_per_second() {
        let m = measured(Work::Move { bytes: 64 }, Unit::PerSecond, &[64e6], &[]);
        assert_eq!(m.value(), 1e6);
    }
}
