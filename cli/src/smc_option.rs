//! `dmbridge smc-option`: lets programs say by TCP's option that they speak SMC, for sockets of Linux's AF_SMC.

use crate::out;

/// What `dmbridge smc-option` is asked for.
#[derive(clap::Args)]
pub struct Args {
    /// Take it out again
    #[arg(long, conflicts_with = "show")]
    remove: bool,
    /// Change nothing, only say whether it is there
    #[arg(long)]
    show: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    match (args.show, args.remove) {
        (true, _) => {}
        (_, true) => dmbridge_smc_option::remove()?,
        _ => dmbridge_smc_option::install()?,
    }
    out::line(match dmbridge_smc_option::is_installed() {
        true => "programs can say that they speak SMC",
        false => "programs are plain TCP ones to AF_SMC",
    })
}
