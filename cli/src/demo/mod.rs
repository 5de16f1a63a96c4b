//! `dmbridge demo`.
use anyhow::Result;
pub const WORKER: &str = "demo-worker";
#[derive(clap::Args)]
pub struct Args {}
#[derive(clap::Args)]
pub struct WorkerArgs {}
pub fn run(_: Args) -> Result<()> {
    Ok(())
}
pub fn work(_: WorkerArgs) -> Result<()> {
    Ok(())
}
