//! A private folder for one run, gone at its end, also when somebody presses ^C.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Writes a file; the error names it.
pub fn write(file: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(file, text).with_context(|| format!("{} cannot be written", file.display()))
}

/// The folder. The signals that end a run are taken by a thread of its own from its creation on, so it has to be made
/// before any other thread.
pub struct Scratch {
    folder: TempDir,
    also: fn(&Path),
}

impl Scratch {
    /// A new folder; `also` removes what the run has elsewhere, and is given the folder before it goes.
    pub fn new(also: fn(&Path)) -> Result<Scratch> {
        let folder = tempfile::Builder::new()
            .prefix("dmbridge-")
            .permissions(std::fs::Permissions::from_mode(0o700))
            .tempdir()
            .context("no temporary folder could be made; TMPDIR names where")?;
        let ends = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        ends.thread_block()?;
        let path = folder.path().to_owned();
        std::thread::spawn(move || {
            let Ok(signal) = ends.wait() else { return };
            also(&path);
            let _ = std::fs::remove_dir_all(&path);
            // Children die with this process: see `process::BoundChild`.
            std::process::exit(128 + signal as i32);
        });
        Ok(Scratch { folder, also })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        (self.also)(self.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_leaves_no_folder() {
        let scratch = Scratch::new(|_| {}).unwrap();
        let path = scratch.path().to_owned();
        std::fs::write(scratch.file("x"), "y").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(scratch);
        assert!(!path.exists());
    }
}
