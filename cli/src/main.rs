//! The `dmbridge` command: what a person types on the host.
//!
//! Here are the command line and the exit codes, nothing else: 0 when it worked, 1 when it failed, 2 when the command
//! line was wrong.

mod bench;
mod control;
mod daemon;
mod demo;
mod devices;
mod engines;
mod out;
mod pair;
mod process;
mod rendezvous;
mod report;
mod scratch;
mod smc_option;
mod topology;
mod usage;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// What to type first.
const FIRST_STEPS: &str = "First steps:
  dmbridge demo                     needs nothing else: starts a daemon of its own
  mkdir -p /run/dmbridge; dmbridged --hub /run/dmbridge/hub.sock --control /run/dmbridge/control.sock
  dmbridge devices                  once that daemon runs
  dmbridge bench --quick            see that everything is there before minutes are spent on measuring
  dmbridge bench --vms --quick      the same between two virtual machines";

/// Shared memory between isolated programs: show it, measure it, look at it.
#[derive(Parser)]
#[command(name = "dmbridge", version, after_help = FIRST_STEPS)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Send real files between two isolated devices, by map and by move, and check every byte
    Demo(demo::Args),
    /// Measure latency, rates and bandwidth against what a process could use instead, and against the machine's limits
    Bench(bench::Args),
    /// List the devices that a daemon serves, with what each has and did
    #[command(after_help = devices::COLUMNS)]
    Devices(control::Args),
    /// Show what copies in a daemon: how fast each engine is here, which is used for what, and how often
    Engines(control::Args),
    /// Draw the host's NUMA nodes and accelerators, with a daemon's devices and extents in them
    Topology(topology::Args),
    /// In a guest: prepare AF_SMC (modules, user EID, buffers), and show whether it is really used
    GuestSetup(dmbridge_guest_setup::Args),
    /// Let programs say by TCP's option that they speak SMC, so that Linux's AF_SMC talks to them (until the next boot; takes root)
    SmcOption(smc_option::Args),
    /// One of the two processes of a measurement
    #[command(hide = true, name = bench::WORKER)]
    BenchWorker(pair::PairArgs),
    /// One of the processes of a pattern
    #[command(hide = true, name = bench::MEMBER)]
    BenchMember(bench::MemberArgs),
    /// A client of redis with many silent connections
    #[command(hide = true, name = bench::CLIENT)]
    BenchIdle(bench::ClientArgs),
    /// Runs in a guest what the host asks for
    #[command(hide = true, name = bench::AGENT)]
    GuestAgent,
    /// One of the two processes of the demo
    #[command(hide = true, name = demo::WORKER)]
    DemoWorker(pair::PairArgs),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Engines(args) => engines::run(args),
        Command::Topology(args) => topology::run(args),
        Command::GuestSetup(args) => dmbridge_guest_setup::run(&args).map_err(Into::into),
        Command::SmcOption(args) => smc_option::run(args),
        Command::BenchWorker(args) => bench::work(args),
        Command::BenchMember(args) => bench::work_as_member(args),
        Command::BenchIdle(args) => bench::work_as_idle_client(args),
        Command::GuestAgent => Err(dmbridge_vm::guest_agent::serve().into()),
        Command::DemoWorker(args) => demo::work(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmbridge: {error:#}");
            if error.is::<usage::UsageError>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}
