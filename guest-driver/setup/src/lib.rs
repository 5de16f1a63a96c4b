//! Prepares a Linux guest for AF_SMC over dmbridge, and shows whether it is really used: Linux falls back to TCP without a
//! word, and without a user EID it always does.
//!
//! | file | subject |
//! | --- | --- |
//! | [`netlink`] | generic netlink, as far as it is needed |
//! | [`smc`] | what `smc.ko` says and can be told |
//! | [`reason`] | fallback reasons, in words |
//! | [`device`] | the guest's dmbridge devices |

pub mod device;
pub mod netlink;
pub mod reason;
pub mod smc;

use device::Device;
use serde::Serialize;
use smc::{Eid, Smc, Statistics};
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// What `dmbridge guest-setup` is asked for.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Change nothing, only show what is
    #[arg(long)]
    show: bool,
    /// The user EID, the same in all guests that shall meet: up to 32 of A-Z, 0-9, '-' and '.' [default: made from the
    /// device's, which all guests of a host have in common]
    #[arg(long, value_name = "EID", conflicts_with = "show")]
    eid: Option<Eid>,
    /// The kernel module, if it is not installed
    #[arg(long, value_name = "FILE", conflicts_with = "show")]
    module: Option<std::path::PathBuf>,
    /// Size of AF_SMC's buffers in KiB, up to 1024: one for each direction of each connection
    #[arg(long, value_name = "KIB", default_value_t = 1024, conflicts_with = "show",
        value_parser = clap::value_parser!(u32).range(16..=1024))]
    buffers: u32,
    /// Print what is as JSON
    #[arg(long)]
    json: bool,
}

/// What is in the way.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A module could not be loaded.
    #[error("the kernel module {module} cannot be loaded: {reason}{}", advice(module))]
    Module {
        /// Its name.
        module: String,
        /// What `modprobe` said.
        reason: String,
    },
    /// There is no device.
    #[error(
        "this guest has no dmbridge device; the VM needs one (docs/qemu.md), and `dmesg | grep dmbridge` says if it was refused"
    )]
    NoDevice,
    /// The kernel refused.
    #[error("{doing}: {error}")]
    System {
        /// What was tried.
        doing: String,
        /// Its reason.
        error: std::io::Error,
    },
    /// SMC is not there.
    #[error("AF_SMC is not in this kernel, or smc.ko is not loaded; `dmbridge guest-setup` loads it")]
    NoSmc,
}

fn advice(module: &str) -> &'static str {
    match module {
        "dmbridge" => "; install it (guest-driver/kernel: make install) or name the file with --module",
        _ => "",
    }
}

impl Error {
    fn system(doing: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        move |error| Error::System { doing: doing.into(), error }
    }
}

/// All that is shown.
#[derive(Debug, Serialize)]
pub struct State {
    /// The devices.
    pub devices: Vec<Device>,
    /// User EIDs.
    pub eids: Vec<String>,
    /// Whether programs can say that they speak SMC, so that AF_SMC talks to the library.
    pub programs: bool,
    /// What SMC counted since it was loaded.
    pub statistics: Statistics,
}

impl State {
    /// Looks.
    ///
    /// # Errors
    ///
    /// If SMC is not there.
    pub fn look() -> Result<State, Error> {
        let mut smc = Smc::open()?;
        let programs = dmbridge_smc_option::is_installed();
        Ok(State { devices: Device::all(), eids: smc.eids()?, programs, statistics: smc.statistics()? })
    }
}

/// Does it.
///
/// # Errors
///
/// What is in the way, and what to do about it.
pub fn run(args: &Args) -> Result<(), Error> {
    if !args.show {
        prepare(args)?;
    }
    let state = State::look()?;
    let mut out = std::io::stdout().lock();
    let written = if args.json {
        serde_json::to_writer(&mut out, &state).map_err(Into::into).and_then(|()| writeln!(out))
    } else {
        print(&state, &mut out)
    };
    written.map_err(Error::system("writing"))
}

fn prepare(args: &Args) -> Result<(), Error> {
    for module in ["smc", "smc_diag"] {
        load(module, &[module])?;
    }
    match &args.module {
        None => load("dmbridge", &["dmbridge"])?,
        Some(_) if Path::new("/sys/module/dmbridge").exists() => {}
        Some(file) => run_loader("dmbridge", "insmod", &[&file.display().to_string()])?,
    }
    let devices = Device::all();
    let device = devices.first().ok_or(Error::NoDevice)?;
    let eid = match &args.eid {
        Some(eid) => eid.clone(),
        None => Eid::from_device(&device.eid),
    };
    let mut smc = Smc::open()?;
    if !smc.eids()?.iter().any(|known| known.trim_end() == eid.as_str()) {
        smc.add_eid(&eid)?;
    }
    for name in ["wmem", "rmem"] {
        let path = format!("/proc/sys/net/smc/{name}");
        // Kernels before 6.1 take the sizes from TCP.
        if Path::new(&path).exists() {
            let bytes = (args.buffers * 1024).to_string();
            std::fs::write(&path, bytes).map_err(Error::system(format!("writing {path}")))?;
        }
    }
    // Nothing that AF_SMC needs among its own.
    if let Err(error) = dmbridge_smc_option::install() {
        eprintln!("programs that use dmbridge's library will be plain TCP ones to AF_SMC: {error}");
    }
    Ok(())
}

fn load(module: &str, arguments: &[&str]) -> Result<(), Error> {
    if Path::new("/sys/module").join(module).exists() {
        return Ok(());
    }
    run_loader(module, "modprobe", arguments)
}

fn run_loader(module: &str, loader: &str, arguments: &[&str]) -> Result<(), Error> {
    let failed = |reason: String| Error::Module { module: module.into(), reason };
    let output = Command::new(loader)
        .args(arguments)
        .output()
        .map_err(|error| failed(format!("{loader}: {error}")))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_string())),
    }
}

fn print(state: &State, out: &mut impl Write) -> std::io::Result<()> {
    for device in &state.devices {
        let how = match device.mode.as_str() {
            "map" => "maps DMBs of others",
            "move" => "cannot map, so the device copies",
            _ => "broke its contract; dmesg says how. Unbind it and bind it again",
        };
        writeln!(out, "device     {} {}: {how}", device.name, device.gid)?;
    }
    if state.devices.is_empty() {
        writeln!(out, "device     none: load the module dmbridge; dmesg says why a device was refused")?;
    }
    match state.eids.as_slice() {
        [] => writeln!(out, "user EID   none, so every connection falls back to TCP; run without --show")?,
        eids => eids.iter().try_for_each(|eid| writeln!(out, "user EID   {eid}"))?,
    }
    let programs =
        if state.programs { "can say that they speak SMC" } else { "are plain TCP ones to AF_SMC" };
    writeln!(out, "programs   {programs}")?;
    let Statistics { smcd, smcr, fallbacks, .. } = &state.statistics;
    let connections = smcd.client_v1 + smcd.client_v2 + smcd.server_v1 + smcd.server_v2;
    match connections {
        0 => writeln!(out, "SMC-D      no connection yet")?,
        count => writeln!(
            out,
            "SMC-D      {count} connections, {} bytes sent, {} received",
            smcd.sent, smcd.received
        )?,
    }
    if smcr.connections() != 0 {
        writeln!(out, "SMC-R      {} connections, over RDMA and not over dmbridge", smcr.connections())?;
    }
    if fallbacks.is_empty() {
        writeln!(out, "fallbacks  none")?;
    }
    for fallback in fallbacks {
        let side = if fallback.server { "accepted" } else { "connected" };
        writeln!(
            out,
            "fallbacks  {} {side}, {:#010x}: {}",
            fallback.count,
            fallback.code,
            reason::explain(fallback.code)
        )?;
    }
    Ok(())
}
