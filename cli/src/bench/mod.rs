//! `dmbridge bench`: what it costs to send bytes from process to process, by this project, by what a process could
//! use instead, and by the machine itself at its limit; or from virtual machine to virtual machine.
//!
//! | module | subject |
//! | --- | --- |
//! | [`plan`] | cases, transports, and which pairs make sense |
//! | [`measurement`] | the two processes of one |
//! | [`vms`] | the two virtual machines in which they are, if asked for |
//! | [`case`] | what they do |
//! | [`transport`] | over what |
//! | [`apps`] | programs as they are, over TCP and by `dmbridge-run` |
//! | [`measure`] | clocks and samples |
//! | [`machine`], [`report`] | what it ran on, and how results are shown |

mod apps;
mod case;
mod copy;
mod machine;
mod measure;
mod measurement;
mod plan;
mod private;
mod report;
mod shared;
mod transport;
mod tune;
mod vms;

use anyhow::{Context, Result};
use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashSet;
use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use self::case::patterns;
use crate::daemon::{self, Daemon};
use crate::out;
use crate::process::find_program;
use crate::scratch::{self, Scratch};
use crate::usage::usage;
use machine::Machine;
use measure::Outcome;
use plan::{Case, Job, Line, Place, RingShape, Site, Transport, Work};
use report::{Measured, Run, html, json, table};
use vms::{Parts, Vms};

pub use apps::idle::{CLIENT, ClientArgs, work as work_as_idle_client};
pub use case::patterns::{MEMBER, MemberArgs, work as work_as_member};
pub use measurement::work;
pub use vms::AGENT;

/// Name of the hidden subcommand.
pub const WORKER: &str = "bench-worker";

/// What `dmbridge bench` is asked for.
#[derive(clap::Args)]
pub struct Args {
    /// Measure between two virtual machines, which are booted for it: map and move against TCP over virtio-net and AF_VSOCK
    #[arg(long)]
    vms: bool,
    /// Measure programs as they are, over TCP and by dmbridge-run: iperf3, sockperf, redis, nginx + wrk and more
    #[arg(long, conflicts_with_all = ["vms", "transports"])]
    apps: bool,
    /// Write the results as JSON ("-": to standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the results as one self-contained page with plots ("-": as for --json); without --vms, measures the sweep over
    /// sizes too
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Measure only these cases (repeat, or separate by commas)
    #[arg(long = "case", value_name = "CASE", value_delimiter = ',')]
    cases: Vec<Case>,
    /// Measure only these transports (repeat, or separate by commas)
    #[arg(long = "transport", value_name = "TRANSPORT", value_delimiter = ',')]
    transports: Vec<Transport>,
    /// How often each is measured; the result is the median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// See that everything works, in seconds: the figures mean little
    #[arg(long)]
    quick: bool,
}

/// Measures, and shows the results.
pub fn run(args: Args) -> Result<()> {
    if args.apps {
        return run_apps(&args);
    }
    if let Some(case) = args.cases.iter().find(|case| case.is_app()) {
        return Err(usage(format!("{} is measured only with --apps", case.name())));
    }
    let place = if args.vms { Place::Vms } else { Place::Host };
    let cases =
        if args.cases.is_empty() { default_cases(place, args.html.is_some()) } else { args.cases.clone() };
    let mut transports = choose_transports(&args.transports, place)?;
    if let Some(case) = cases.iter().find(|case| args.vms && !case.is_in_vms()) {
        return Err(usage(format!(
            "{} is not about two virtual machines; measure it without --vms",
            case.name()
        )));
    }
    let mut run = Run { machine: Machine::look()?, results: Vec::new() };
    let lines = plan::lines(&cases, &transports, run.machine.cpus);
    refuse_nonsense(&args, &lines)?;
    args.check_files()?;

    // It may take minutes, and whoever interrupts it ends it too: the folder's signals are not taken yet.
    let parts = args.vms.then(|| Parts::find(&transports)).transpose()?;
    let scratch = Scratch::new(transport::remove_leftovers)?;
    let vms = parts.map(|parts| Vms::boot(parts, &scratch)).transpose()?;
    if let Some(vms) = &vms {
        // Some transports may turn out not to be there.
        transports.retain(|transport| vms.have(*transport));
        run.machine.guests = Some(vms.guests().clone());
    }
    let lines = plan::lines(&cases, &transports, run.machine.cpus);

    let mut bench = Bench::new(&args, &run.machine, &lines, scratch, vms)?;
    bench.measure(&mut run, &lines)?;
    if cases.contains(&Case::Patterns) {
        bench.patterns(&mut run, &transports)?;
    }
    if cases.contains(&Case::Scale) && transports.iter().any(|t| t.is_ours()) {
        bench.scale(&mut run)?;
    }
    bench.progress.finish();

    show(&args, &run)
}

/// Stands for standard output where a file is asked for.
const STDOUT: &str = "-";

/// Shows the results as they were asked for. The table first: what it took minutes to find out is not lost with a full disk.
fn show(args: &Args, run: &Run) -> Result<()> {
    if !args.files().any(|file| file == Path::new(STDOUT)) {
        out::text(table::text(run))?;
    }
    let write = |file: &Path, text: String| match file == Path::new(STDOUT) {
        true => out::text(text),
        false => scratch::write(file, text),
    };
    let json = args.json.as_ref().map_or(Ok(()), |file| write(file, json::text(run)?));
    let html = args.html.as_ref().map_or(Ok(()), |file| write(file, html::page(run)?));
    json.and(html)
}

impl Args {
    /// Where results are written.
    fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.json.iter().chain(&self.html)
    }

    /// Refuses files that cannot be written, before minutes are spent on results that then have nowhere to go.
    fn check_files(&self) -> Result<()> {
        if let (Some(json), Some(html)) = (&self.json, &self.html)
            && json == html
        {
            return Err(usage(format!("--json and --html both name {}; give each its own", json.display())));
        }
        for file in self.files().filter(|file| *file != Path::new(STDOUT)) {
            let opened = File::options().create(true).write(true).truncate(false).open(file);
            opened.map_err(|error| usage(format!("{} cannot be written: {error}", file.display())))?;
        }
        Ok(())
    }
}

/// Measures programs as they are.
fn run_apps(args: &Args) -> Result<()> {
    if let Some(case) = args.cases.iter().find(|case| !case.is_app()) {
        return Err(usage(format!("{} is not about programs; measure it without --apps", case.name())));
    }
    args.check_files()?;
    let mut run = Run { machine: Machine::look()?, results: Vec::new() };
    let cases = apps::choose(&args.cases)?;
    let scratch = Scratch::new(transport::remove_leftovers)?;
    let daemon = Daemon::start(&scratch)?;
    let seconds = if args.quick { 1 } else { 3 };
    apps::measure(&cases, daemon.hub(), scratch.path(), args.rounds, seconds, &mut run.results)?;
    show(args, &run)
}

/// On one host, all but the sweep, which only a picture shows. Between virtual machines, those that tell them from others.
fn default_cases(place: Place, picture: bool) -> Vec<Case> {
    match place {
        Place::Vms => {
            vec![Case::Latency14, Case::Latency14Sleep, Case::Rate100, Case::Stream64k, Case::Move1m]
        }
        Place::Host => {
            let all = Case::value_variants().iter().copied().filter(|case| !case.is_app());
            all.filter(|case| picture || *case != Case::Sweep).collect()
        }
    }
}

/// The transports asked for, or all that there are in this place on this machine.
fn choose_transports(asked: &[Transport], place: Place) -> Result<Vec<Transport>> {
    if let Some(elsewhere) = asked.iter().find(|transport| !transport.is_in(place)) {
        let (name, hint) = (elsewhere.name(), if place == Place::Vms { "without" } else { "with" });
        return Err(usage(format!("{name} is measured only {hint} --vms")));
    }
    let missing = |transport| match transport {
        Transport::Ucx if find_program("ucx_perftest").is_none() => {
            Some("ucx cannot be measured: ucx_perftest is not installed (Debian: ucx-utils)")
        }
        Transport::Iceoryx2 if cfg!(not(feature = "iceoryx2")) => Some(
            "iceoryx2 cannot be measured: this program was built without its feature `iceoryx2` (`cargo xtask \
                 bench` builds it with it)",
        ),
        _ => None,
    };
    if let Some(sentence) = asked.iter().find_map(|t| missing(*t)) {
        return Err(usage(sentence));
    }
    if !asked.is_empty() {
        return Ok(asked.to_vec());
    }
    let all = Transport::value_variants().iter().copied();
    let all = all.filter(|transport| transport.is_in(place) && *transport != Transport::DmbridgeRun);
    Ok(all.filter(|t| missing(*t).inspect(|sentence| eprintln!("{sentence}")).is_none()).collect())
}

/// Refuses a case or a transport that was asked for by name and can be combined with nothing else that was.
fn refuse_nonsense(args: &Args, lines: &[Line]) -> Result<()> {
    let names = |transports: &[Transport]| transports.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ");
    for case in args.cases.iter().filter(|case| case.work().is_some()) {
        if !lines.iter().any(|line| line.name == case.name()) {
            let asked = names(&args.transports);
            return Err(usage(format!(
                "{} says nothing over {asked}; choose another transport for it",
                case.name()
            )));
        }
    }
    for transport in &args.transports {
        let scale = transport.is_ours() && args.cases.contains(&Case::Scale);
        let pattern = patterns::WAYS.contains(transport) && args.cases.contains(&Case::Patterns);
        if !scale && !pattern && !lines.iter().any(|line| line.transports.contains(transport)) {
            let cases: Vec<_> = args.cases.iter().map(|case| case.name()).collect();
            return Err(usage(format!(
                "{} says nothing in {}; choose another case for it",
                transport.name(),
                cases.join(", ")
            )));
        }
    }
    Ok(())
}

/// A run in progress.
struct Bench {
    // Ends before the folder with its sockets goes.
    vms: Option<Vms>,
    scratch: Scratch,
    daemon: Option<Daemon>,
    rounds: u32,
    duration: Duration,
    cpus: [usize; 2],
    progress: Progress,
}

impl Bench {
    fn new(
        args: &Args,
        machine: &Machine,
        lines: &[Line],
        scratch: Scratch,
        vms: Option<Vms>,
    ) -> Result<Bench> {
        let used: HashSet<Transport> =
            lines.iter().flat_map(|line| line.transports.iter().copied()).collect();
        let ours = used.iter().any(|t| t.is_ours()) || args.cases.contains(&Case::Patterns);
        let engines: Vec<_> = used.iter().filter_map(|transport| transport.engine()).collect();
        let daemon = (ours && vms.is_none()).then(|| Daemon::with_engines(&scratch, &engines)).transpose()?;
        let [quick, thorough] = match &vms {
            Some(_) => [50, 1000],
            None => [20, 300],
        };
        Ok(Bench {
            vms,
            scratch,
            daemon,
            rounds: args.rounds,
            duration: Duration::from_millis(if args.quick { quick } else { thorough }),
            cpus: machine.cpus_used,
            progress: Progress::new(lines, args.rounds),
        })
    }

    /// Measures every line, its transports in turn, round by round.
    fn measure(&mut self, run: &mut Run, lines: &[Line]) -> Result<()> {
        let ring = self.tune(lines)?;
        run.machine.ring = ring;
        let mut failed: Vec<Transport> = Vec::new();
        for line in lines {
            let mut found: Vec<Vec<Outcome>> = line.transports.iter().map(|_| Vec::new()).collect();
            for round in 0..self.rounds {
                for (transport, outcomes) in line.transports.iter().zip(&mut found) {
                    if failed.contains(transport) {
                        continue;
                    }
                    self.progress.step(&line.name, *transport);
                    let duration = if line.point { self.duration / 6 } else { self.duration };
                    let job = self.job(line.work, *transport, duration, ring.unwrap_or(tune::START));
                    let what = || format!("{} over {}, round {}", line.name, transport.name(), round + 1);
                    match (measurement::run(&job, self.vms.as_ref()), &mut run.machine.guests) {
                        (Ok(outcome), _) => outcomes.push(outcome),
                        // What others put between guests is not worth the rest of a run that takes many minutes.
                        (Err(error), Some(guests)) if !transport.is_ours() => {
                            failed.push(*transport);
                            guests.not_measured.push(format!("{}: {}", what(), first_line(&error)));
                        }
                        (Err(error), _) => return Err(error.context(what())),
                    }
                }
            }
            for (transport, outcomes) in line.transports.iter().zip(&found).filter(|(_, f)| !f.is_empty()) {
                let measured = Measured::from_rounds(&line.name, *transport, line.work, line.unit, outcomes);
                run.results.push(measured);
            }
        }
        Ok(())
    }

    /// Measures patterns of several processes, all ways in turn, round by round.
    fn patterns(&mut self, run: &mut Run, transports: &[Transport]) -> Result<()> {
        let Some(hub) = self.daemon.as_ref().map(|daemon| daemon.hub().to_owned()) else { return Ok(()) };
        let ways: Vec<Transport> =
            patterns::WAYS.into_iter().filter(|way| transports.contains(way)).collect();
        for members in patterns::SIZES {
            for pattern in patterns::Pattern::value_variants() {
                let name = plan::name_of(pattern);
                let name = format!("pattern-{name}-{members}");
                self.progress.show(&name);
                let mut rounds = vec![Vec::new(); ways.len()];
                for _ in 0..self.rounds {
                    for (way, rounds) in ways.iter().zip(&mut rounds) {
                        let what = || format!("{name} by {}", way.name());
                        let speed = patterns::run(&hub, self.cpus, *pattern, members, *way, self.duration)
                            .with_context(what)?;
                        rounds.push(speed / 1e9);
                    }
                }
                run.results.extend(ways.iter().zip(rounds).map(|(way, rounds)| Measured {
                    case: name.clone(),
                    transport: *way,
                    unit: plan::Unit::GigabytesPerSecond.name(),
                    rounds,
                    p50: None,
                    p99: None,
                    samples: None,
                }));
            }
        }
        Ok(())
    }

    /// Measures one daemon with more and more devices.
    fn scale(&mut self, run: &mut Run) -> Result<()> {
        // Nothing else shall run beside them.
        self.daemon = None;
        for count in case::scale::DEVICES {
            self.progress.show(&format!("scale, {count} devices"));
            let what = || format!("scale with {count} devices");
            run.results.extend(case::scale::run(&self.scratch, count, self.rounds).with_context(what)?);
        }
        Ok(())
    }

    /// The best ring, if one is measured.
    fn tune(&mut self, lines: &[Line]) -> Result<Option<RingShape>> {
        if !lines.iter().any(|line| line.transports.contains(&Transport::Ring)) {
            return Ok(None);
        }
        let work = Work::Stream { bytes: 64 << 10 };
        let shape = tune::best_ring(|shape| {
            let job = self.job(work, Transport::Ring, self.duration / 3, shape);
            Ok(measurement::run(&job, None).context("search for the best ring")?.value)
        })?;
        Ok(Some(shape))
    }

    fn job(&self, work: Work, transport: Transport, duration: Duration, ring: RingShape) -> Job {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Job {
            work,
            transport,
            duration,
            site: match &self.vms {
                Some(vms) => vms.site(),
                None => Site::Host {
                    cpus: self.cpus,
                    folder: self.scratch.path().to_owned(),
                    hub: self.daemon.as_ref().map(|daemon| daemon.hub().to_owned()),
                    sender: transport.engine().map(|engine| daemon::engine_socket(&self.scratch, engine)),
                },
            },
            ring,
            name: format!("m{}", COUNT.fetch_add(1, Ordering::Relaxed)),
        }
    }
}

/// An error without the console that it may come with.
fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

/// Tells a person how far it is: a bar on a terminal, else a line per case.
struct Progress {
    bar: ProgressBar,
    case: String,
}

impl Progress {
    fn new(lines: &[Line], rounds: u32) -> Progress {
        let runs: usize = lines.iter().map(|line| line.transports.len()).sum();
        let bar = ProgressBar::new(runs as u64 * u64::from(rounds));
        if let Ok(style) =
            ProgressStyle::with_template("{bar:30} {percent:>3} %  {elapsed} of {duration}  {msg}")
        {
            bar.set_style(style);
        }
        Progress { bar, case: String::new() }
    }

    /// The next measurement starts.
    fn step(&mut self, case: &str, transport: Transport) {
        self.show(case);
        self.bar.inc(1);
        self.bar.set_message(format!("{case} over {}", transport.name()));
    }

    /// What is measured now.
    fn show(&mut self, case: &str) {
        if self.case != case {
            self.case = case.to_owned();
            self.bar.set_message(self.case.clone());
            if !std::io::stderr().is_terminal() {
                eprintln!("{case}");
            }
        }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
