//! dmbridge itself.

use anyhow::{Result, bail};

use crate::bench::measure::Outcome;
use crate::bench::worker::Worker;

/// DMBs that both sides have mapped, through the copying calls.
pub fn map(_worker: &mut Worker) -> Result<Option<Outcome>> {
    bail!("not yet")
}

/// The same, in place.
pub fn in_place(_worker: &mut Worker) -> Result<Option<Outcome>> {
    bail!("not yet")
}

/// DMBs that the device copies into.
pub fn moved(_worker: &mut Worker) -> Result<Option<Outcome>> {
    bail!("not yet")
}
