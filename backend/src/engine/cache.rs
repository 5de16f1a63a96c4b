//! What was measured at an earlier start, in a file: so that a daemon that is started again need not measure all of a
//! large host again. It is used only on the machine that it was measured on, and only after a part of it was measured
//! again and led to the same decisions.

use super::table::{CLASSES, Measured};
use crate::topology::Topology;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A choice of the past stands if what it takes now is at most so much more than what the best takes now.
const TOLERANCE: f64 = 1.1;

/// The file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct File {
    machine: String,
    measured: Vec<Measured>,
}

/// Where the file lies unless told otherwise: where systemd says, else where caches of the system or of this user lie.
pub fn default_path() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = folder("CACHE_DIRECTORY").or_else(|| {
        if nix::unistd::geteuid().is_root() {
            return Some("/var/cache/dmbridge".into());
        }
        let cache = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        cache.map(|cache| cache.join("dmbridge"))
    });
    folder.map(|folder| folder.join("engines.json"))
}

/// What tells this machine, and what of it may be used, from others: another answer, and everything is measured anew.
pub fn machine(topology: &Topology, engines: &str) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let info = read("/proc/cpuinfo");
    let cpu: Vec<&str> = ["model name", "microcode", "flags"]
        .iter()
        .filter_map(|name| info.lines().find(|line| line.starts_with(name)))
        .collect();
    let allowed = sched_getaffinity(Pid::from_raw(0));
    let cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_ok_and(|set| set.is_set(*cpu).unwrap_or(false)));
    let mut hash = Sha256::new();
    hash.update(env!("CARGO_PKG_VERSION"));
    hash.update(cpu.join("\n"));
    hash.update(read("/proc/sys/kernel/osrelease"));
    hash.update(read("/etc/machine-id"));
    hash.update(format!("{topology:?} {:?} {engines}", cpus.collect::<Vec<_>>()));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What was measured on this machine, if the file is there and makes sense; `rows` is how many there have to be.
pub fn load(path: &Path, machine: &str, rows: usize) -> Option<Vec<Measured>> {
    let text = std::fs::read(path).ok()?;
    let file: File = serde_json::from_slice(&text)
        .inspect_err(|error| tracing::warn!("{}: {error}; the engines are measured again", path.display()))
        .ok()?;
    (file.machine == machine && file.measured.len() == rows && rows >= CLASSES).then_some(file.measured)
}

/// Whether decisions of the past, of the first pair of nodes, are still right by what was measured now.
pub fn still_true(past: &[Measured], now: &[Measured]) -> bool {
    past.iter().zip(now).all(|(past, now)| {
        let of = |id| now.costs.iter().find(|cost| cost.engine == id).map(|cost| cost.nanoseconds as f64);
        let best = now.costs.iter().map(|cost| cost.nanoseconds).min();
        matches!((of(past.best()), best), (Some(chosen), Some(best)) if chosen <= best as f64 * TOLERANCE)
    })
}

/// Writes the file as a whole, or leaves the old one. A daemon that cannot is as good as one that need not.
pub fn store(path: &Path, machine: &str, measured: &[Measured]) {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().ok_or(std::io::ErrorKind::InvalidInput)?;
        std::fs::create_dir_all(folder)?;
        let file = File { machine: machine.into(), measured: measured.to_vec() };
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let mut out = std::fs::File::create(&temporary)?;
        out.write_all(&serde_json::to_vec(&file)?)?;
        std::fs::rename(&temporary, path).inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
    };
    if let Err(error) = write() {
        tracing::debug!("{}: {error}; the engines will be measured again", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::table::{Cost, Id, Kind};

    const OTHER: Id = Id { kind: Kind::CpuNode, node: Some(0) };

    fn rows(cpu: u64, other: u64) -> Vec<Measured> {
        let cost = |engine, nanoseconds| Cost { engine, nanoseconds };
        let costs = vec![cost(Id::CPU, cpu), cost(OTHER, other)];
        vec![Measured { source: 0, destination: 0, bytes: 64, costs }; CLASSES]
    }

    #[test]
    fn what_was_stored_is_loaded_on_the_same_machine_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/engines.json");
        assert_eq!(load(&path, "m", CLASSES), None);
        store(&path, "m", &rows(1, 2));
        assert_eq!(load(&path, "m", CLASSES), Some(rows(1, 2)));
        assert_eq!(load(&path, "another", CLASSES), None);
        assert_eq!(load(&path, "m", 4 * CLASSES), None);
        std::fs::write(&path, "{").unwrap();
        assert_eq!(load(&path, "m", CLASSES), None);
        assert_eq!(
            std::fs::read_dir(path.parent().unwrap()).unwrap().count(),
            1,
            "nothing temporary is left"
        );
    }

    #[test]
    fn a_decision_that_would_be_another_one_now_is_not_true_any_more() {
        assert!(still_true(&rows(10, 20), &rows(100, 200)));
        assert!(still_true(&rows(10, 20), &rows(105, 100)), "it makes no difference");
        assert!(!still_true(&rows(10, 20), &rows(200, 100)));
        let mut without = rows(1, 1);
        without.iter_mut().for_each(|row| row.costs.truncate(1));
        assert!(!still_true(&rows(20, 10), &without), "the engine is not there any more");
    }

    #[test]
    fn machines_with_other_engines_are_other_machines() {
        let host = Topology::of_host();
        assert_eq!(machine(&host, "cpu"), machine(&host, "cpu"));
        assert_ne!(machine(&host, "cpu"), machine(&host, "cpu dsa.0"));
    }
}
