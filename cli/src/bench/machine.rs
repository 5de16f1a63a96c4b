//! What the figures were measured on. A figure without it says nothing.

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::read_to_string;
use std::time::SystemTime;

use super::plan::RingShape;
use super::transport;
use super::vms::Guests;

/// The machine, the system and the programs.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// When the run started, in UTC.
    pub date: String,
    /// The processor's name.
    pub cpu: String,
    /// Processors that this process may use.
    pub cpus: usize,
    /// NUMA nodes.
    pub numa_nodes: usize,
    /// Caches of the first CPU used, by level, in bytes, with the CPUs that share each.
    pub caches: Vec<Cache>,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// The kernel's name and version.
    pub kernel: String,
    /// How the frequency is chosen, if the system says it.
    pub governor: Option<String>,
    /// The hypervisor of this machine, if there is one. `TCG` emulates: its figures compare nothing.
    pub virtualised: Option<String>,
    /// The CPU of each of the two processes.
    pub cpus_used: [usize; 2],
    /// The two virtual machines, if the processes were in some.
    pub guests: Option<Guests>,
    /// The bare ring at its best.
    pub ring: Option<RingShape>,
    /// Versions of what was measured.
    pub versions: BTreeMap<&'static str, String>,
}

/// A cache.
#[derive(Clone, Debug, Serialize)]
pub struct Cache {
    /// 1 is nearest.
    pub level: u32,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Size in bytes.
    pub bytes: u64,
    /// CPUs that share it, as Linux lists them.
    pub shared_by: String,
}

impl Machine {
    /// Looks.
    pub fn look() -> Result<Machine> {
        let cpus = usable_cpus()?;
        let cpus_used = choose_two(&cpus)?;
        let system = nix::sys::utsname::uname()?;
        let mut versions = BTreeMap::from([("dmbridge", env!("CARGO_PKG_VERSION").to_owned())]);
        if let Some(version) = transport::ucx_version() {
            versions.insert("ucx", version);
        }
        if cfg!(feature = "iceoryx2") {
            versions.insert("iceoryx2", "0.10".to_owned());
        }
        Ok(Machine {
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            cpu: cpu_name(),
            cpus: cpus.len(),
            numa_nodes: count_nodes(),
            caches: caches(cpus_used[0]),
            memory_bytes: memory(),
            kernel: format!("{} {}", system.sysname().to_string_lossy(), system.release().to_string_lossy()),
            governor: line(&format!("/sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor", cpus_used[0])),
            virtualised: hypervisor(),
            cpus_used,
            guests: None,
            ring: None,
            versions,
        })
    }
}

fn line(path: &str) -> Option<String> {
    read_to_string(path).ok().map(|text| text.trim().to_owned())
}

fn cpu_name() -> String {
    let info = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

fn memory() -> u64 {
    let info = read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = info.lines().find(|l| l.starts_with("MemTotal:")).and_then(|l| l.split_whitespace().nth(1));
    kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn count_nodes() -> usize {
    let nodes = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
    let is_node = |name: &str| name.strip_prefix("node").is_some_and(|n| n.parse::<u32>().is_ok());
    nodes.filter(|entry| entry.file_name().to_str().is_some_and(is_node)).count().max(1)
}

fn caches(cpu: usize) -> Vec<Cache> {
    let cache = |index: usize| {
        let of = |file: &str| line(&format!("/sys/devices/system/cpu/cpu{cpu}/cache/index{index}/{file}"));
        let size = of("size")?;
        let (number, unit) = size.split_at(size.find(|c: char| !c.is_ascii_digit()).unwrap_or(size.len()));
        let unit = match unit {
            "K" => 1 << 10,
            "M" => 1 << 20,
            _ => 1,
        };
        Some(Cache {
            level: of("level")?.parse().ok()?,
            kind: of("type")?,
            bytes: number.parse::<u64>().ok()? * unit,
            shared_by: of("shared_cpu_list")?,
        })
    };
    (0..).map_while(cache).collect()
}

/// The name by which a hypervisor makes itself known to its guests.
#[cfg(target_arch = "x86_64")]
fn hypervisor() -> Option<String> {
    use std::arch::x86_64::__cpuid;
    const PRESENT: u32 = 1 << 31;
    if __cpuid(1).ecx & PRESENT == 0 {
        return None;
    }
    let leaf = __cpuid(0x4000_0000);
    let name: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx].into_iter().flat_map(u32::to_le_bytes).collect();
    Some(match name.as_slice() {
        b"KVMKVMKVM\0\0\0" => "KVM".to_owned(),
        b"TCGTCGTCGTCG" => "TCG".to_owned(),
        b"Microsoft Hv" => "Hyper-V".to_owned(),
        b"VMwareVMware" => "VMware".to_owned(),
        b"XenVMMXenVMM" => "Xen".to_owned(),
        other => String::from_utf8_lossy(other).trim_end_matches('\0').to_owned(),
    })
}

#[cfg(not(target_arch = "x86_64"))]
fn hypervisor() -> Option<String> {
    line("/sys/hypervisor/type")
}

fn usable_cpus() -> Result<Vec<usize>> {
    let set =
        sched_getaffinity(Pid::from_raw(0)).context("the system does not say which CPUs may be used")?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

/// Where a CPU is.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    node: Option<usize>,
    last_cache: Option<String>,
    siblings: Option<String>,
}

impl Place {
    fn of(cpu: usize) -> Place {
        let folder = format!("/sys/devices/system/cpu/cpu{cpu}");
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let node = |name: &str| name.strip_prefix("node").and_then(|n| n.parse().ok());
        Place {
            node: entries.filter_map(|e| node(e.file_name().to_str()?)).next(),
            last_cache: caches(cpu).into_iter().max_by_key(|c| c.level).map(|c| c.shared_by),
            siblings: line(&format!("{folder}/topology/thread_siblings_list")),
        }
    }

    /// How good a pair two CPUs are: different cores first, then the same node, then the same last cache.
    fn pairs_with(&self, other: &Place) -> (bool, bool, bool) {
        let two_cores = self.siblings.is_none() || self.siblings != other.siblings;
        (two_cores, self.node == other.node, self.last_cache == other.last_cache)
    }
}

/// Two CPUs for the two processes. The last ones of those equally good: the first serves most interrupts.
fn choose_two(cpus: &[usize]) -> Result<[usize; 2]> {
    let places: Vec<_> = cpus.iter().map(|cpu| (*cpu, Place::of(*cpu))).collect();
    let pairs = places.iter().enumerate().flat_map(|(i, a)| places[..i].iter().map(move |b| (b, a)));
    // Of equal ones, max_by_key takes the last.
    match pairs.max_by_key(|(a, b)| a.1.pairs_with(&b.1)) {
        Some((a, b)) => Ok([a.0, b.0]),
        None => bail!("the benchmark needs two CPUs, and this process may use only one"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cores_of_one_node_are_the_best_pair() {
        let place = |node, siblings: &str| Place {
            node: Some(node),
            last_cache: None,
            siblings: Some(siblings.to_owned()),
        };
        let a = place(0, "0,4");
        assert!(a.pairs_with(&place(0, "1,5")) > a.pairs_with(&place(1, "2,6")));
        assert!(a.pairs_with(&place(1, "2,6")) > a.pairs_with(&place(0, "0,4")));
    }

    #[test]
    fn one_cpu_is_refused_with_a_sentence() {
        assert!(choose_two(&[0]).unwrap_err().to_string().contains("two CPUs"));
    }
}
