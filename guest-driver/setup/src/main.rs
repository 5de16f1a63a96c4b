//! The program `dmbridge-guest-setup`, for guests that have nothing else of dmbridge; the same as `dmbridge guest-setup`.

use clap::Parser;
use dmbridge_guest_setup::Args;
use std::process::ExitCode;

#[derive(Parser)]
#[command(
    name = "dmbridge-guest-setup",
    version,
    about = "Prepare this guest for AF_SMC over dmbridge, and show whether it is used"
)]
struct Cli {
    #[command(flatten)]
    args: Args,
}

fn main() -> ExitCode {
    match dmbridge_guest_setup::run(&Cli::parse().args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dmbridge-guest-setup: {error}");
            ExitCode::FAILURE
        }
    }
}
