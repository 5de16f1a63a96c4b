//! Standard output. Who reads it may go away, and the disk behind it may be full: that is an error like others, and not the
//! panic that `println` makes of it.

use anyhow::{Context, Result};
use serde::Serialize;
use std::fmt::Display;
use std::io::Write;

/// Writes the text as it is.
pub fn text(text: impl AsRef<str>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let written = out.write_all(text.as_ref().as_bytes()).and_then(|()| out.flush());
    written.context("standard output cannot be written")
}

/// Writes a line.
pub fn line(line: impl Display) -> Result<()> {
    text(format!("{line}\n"))
}

/// Writes a value for programs that are read by people, too.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(serde_json::to_string_pretty(value)?)
}
