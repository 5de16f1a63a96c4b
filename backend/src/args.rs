//! The command line, into [`Settings`]. Flags override the configuration file.

use crate::config_file::{self, FileError};
use crate::size::Size;
use clap::Parser;
use dmbridged::engine::table::{Kind, Rule};
use dmbridged::hub::HubSettings;
use dmbridged::placement::NumaSettings;
use dmbridged::settings::{DEFAULT_GROUP, DeviceSettings, Endpoint, Limits, Settings, SettingsError};
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getpeername, getsockopt, sockopt,
};
use std::collections::HashSet;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

/// Joins the virtual machines, containers and processes of one host by shared memory: a vhost-user back-end.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 110)]
pub struct Args {
    /// Configuration file (TOML); flags override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Serve a device on this vhost-user socket; repeat it for several devices
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Vec<PathBuf>,

    /// Serve a device on this file descriptor, a connected vhost-user socket
    #[arg(long, value_name = "FDNUM")]
    fd: Option<RawFd>,

    /// Group of the devices of --socket-path and --fd; devices of other groups do not see them [default: default]
    #[arg(long, value_name = "NAME")]
    group: Option<String>,

    /// Give every connection to this socket a fresh device
    #[arg(long, value_name = "PATH")]
    hub: Option<PathBuf>,

    /// Serve the control API on this socket
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// The most memory for DMBs, of all devices together, such as 8G [default: half of the host's memory]
    #[arg(long, value_name = "SIZE")]
    pool_size: Option<Size>,

    /// Take huge pages of this size for DMBs, such as 2M
    #[arg(long, value_name = "SIZE")]
    huge_pages: Option<Size>,

    /// Threads that serve move queues [default: 1]
    #[arg(long, value_name = "NUMBER")]
    movers: Option<usize>,

    /// Copy with this engine only: cpu, cpu-node or dsa [default: the fastest one, by size and NUMA nodes]
    #[arg(long, value_name = "ENGINE")]
    engine: Option<Kind>,

    /// Window of every device [default: 1G]
    #[arg(long, value_name = "SIZE")]
    window_size: Option<Size>,

    /// Move queues of every device [default: 1]
    #[arg(long, value_name = "NUMBER")]
    move_queues: Option<u16>,

    /// Start a worker and hold what must not be lost with it, so that it can be killed or replaced under its devices
    #[arg(long, conflicts_with = "fd")]
    pub keep: bool,

    /// Be the worker of the keeper at the other end of this descriptor
    #[arg(long, value_name = "FDNUM", hide = true)]
    pub kept_by: Option<RawFd>,

    /// Check the configuration and exit
    #[arg(long)]
    pub check: bool,

    /// What to log on standard error: error, warn, info, debug, trace, or off
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: tracing_subscriber::filter::LevelFilter,

    /// Print what this back-end can do as JSON and exit, whatever else is asked for
    #[arg(long)]
    print_capabilities: bool,
}

/// Something that was asked for and cannot be.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// In the configuration file.
    #[error(transparent)]
    File(#[from] FileError),
    /// A combination of file and flags.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// `--group` for none of the devices that it is for.
    #[error(
        "--group is for the devices of --socket-path and --fd, and there are none; groups of a hub's devices are in \
         the configuration file ([[hub.rule]])"
    )]
    Group,
    /// `--fd` names something else.
    #[error("--fd {0}: {1}; pass the number of an open, connected UNIX stream socket")]
    Fd(RawFd, &'static str),
    /// `--kept-by` names something else.
    #[error("--kept-by {0}: {1}; only a keeper (--keep) starts a worker")]
    Keeper(RawFd, &'static str),
}

impl Args {
    /// Whether the command line asks for the capabilities: then nothing else on it counts, not even its errors.
    pub fn wants_capabilities() -> bool {
        std::env::args_os().any(|arg| arg == "--print-capabilities")
    }

    /// What the daemon is told, checked.
    pub fn settings(self) -> Result<Settings, UsageError> {
        let mut settings = match &self.config {
            Some(path) => config_file::read(path)?,
            None => config_file::defaults(),
        };
        if self.group.is_some() && self.socket_path.is_empty() && self.fd.is_none() {
            return Err(UsageError::Group);
        }
        let group = self.group.unwrap_or_else(|| DEFAULT_GROUP.into());
        settings.movers = self.movers.unwrap_or(settings.movers);
        settings.pool.max_bytes = self.pool_size.map_or(settings.pool.max_bytes, |size| size.0);
        settings.pool.huge_pages = self.huge_pages.map_or(settings.pool.huge_pages, |size| Some(size.0));
        if let Some(kind) = self.engine {
            settings.engines.rules = vec![Rule { at_least: 0, kind }];
        }
        settings.control = self.control.or(settings.control);
        if let Some(socket) = self.hub {
            settings.hub = match settings.hub {
                Some(hub) => Some(HubSettings { socket, ..hub }),
                None => Some(HubSettings::new(socket)),
            };
        }
        let device = |name, endpoint| DeviceSettings {
            name,
            endpoint,
            group: group.clone(),
            gid: None,
            limits: Limits::default(),
            numa: NumaSettings::default(),
        };
        let names = names(&self.socket_path);
        for (path, name) in self.socket_path.into_iter().zip(names) {
            settings.devices.push(device(name, Endpoint::Path(path)));
        }
        if let Some(fd) = self.fd {
            settings.devices.push(device(format!("fd-{fd}"), Endpoint::Fd(take_socket(fd)?)));
        }
        let devices = settings.devices.iter_mut().map(|device| &mut device.limits);
        for limits in devices.chain(settings.hub.as_mut().map(|hub| &mut hub.limits)) {
            limits.move_queues = self.move_queues.unwrap_or(limits.move_queues);
            limits.window_size = self.window_size.map_or(limits.window_size, |size| size.0);
            if self.window_size.is_some() {
                // A window that was made smaller by a flag also makes the largest DMB smaller.
                limits.max_dmb_size = limits.max_dmb_size.min(limits.window_size / 2);
            }
        }
        settings.check()?;
        Ok(settings)
    }
}

/// Names of the devices at these sockets: the files' names, or their whole paths if those are not different.
fn names(paths: &[PathBuf]) -> Vec<String> {
    let short = |path: &Path| path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let different: HashSet<_> = paths.iter().map(|path| short(path)).collect();
    if different.len() == paths.len() {
        return paths.iter().map(|path| short(path)).collect();
    }
    paths.iter().map(|path| path.display().to_string()).collect()
}

/// Takes over the worker's end of the link to its keeper, which every worker inherits.
pub fn take_keeper(fd: RawFd) -> Result<OwnedFd, UsageError> {
    let wrong = |what| UsageError::Keeper(fd, what);
    // SAFETY: the descriptor is only asked questions; should it not be open, the first answer says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    if fd <= 2 || getsockopt(&borrowed, sockopt::SockType) != Ok(SockType::SeqPacket) {
        return Err(wrong("this is no keeper's socket"));
    }
    let flags = nix::fcntl::FdFlag::FD_CLOEXEC;
    nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(flags))
        .map_err(|_| wrong("it cannot be used"))?;
    // SAFETY: it is open, above the standard streams, and was passed to this process to be taken; nothing else here
    // knows its number, because this runs before anything was opened that stays open.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes over a descriptor that was inherited, if it is what it has to be.
fn take_socket(fd: RawFd) -> Result<OwnedFd, UsageError> {
    let wrong = |what| UsageError::Fd(fd, what);
    if fd <= 2 {
        return Err(wrong("descriptors 0 to 2 are the standard streams"));
    }
    // SAFETY: the descriptor is only asked questions; should it not be open, the first answer says so.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    match getsockopt(&borrowed, sockopt::SockType) {
        Ok(SockType::Stream) => {}
        Err(nix::Error::EBADF) => return Err(wrong("no such descriptor is open")),
        _ => return Err(wrong("this is not a stream socket")),
    }
    match getpeername::<SockaddrStorage>(fd) {
        Ok(peer) if peer.family() == Some(AddressFamily::Unix) => {}
        Ok(_) => return Err(wrong("this is not a UNIX socket")),
        Err(_) => return Err(wrong("this socket is not connected")),
    }
    let flags = nix::fcntl::FdFlag::FD_CLOEXEC;
    nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_SETFD(flags))
        .map_err(|_| wrong("it cannot be used"))?;
    // SAFETY: it is open, above the standard streams, and was passed to this process to be taken; nothing else here
    // knows its number, because this runs before anything was opened that stays open.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(args: &[&str]) -> Result<Settings, String> {
        let args = Args::try_parse_from([&["dmbridged"], args].concat()).map_err(|e| e.to_string())?;
        args.settings().map_err(|e| e.to_string())
    }

    #[test]
    fn a_socket_is_a_device_of_its_files_name() {
        let settings =
            settings(&["--socket-path", "/run/a.sock", "--socket-path=/run/b.sock", "--group", "g"]).unwrap();
        let names: Vec<_> = settings.devices.iter().map(|d| (d.name.as_str(), d.group.as_str())).collect();
        assert_eq!(names, [("a", "g"), ("b", "g")]);
    }

    #[test]
    fn sockets_of_one_name_in_two_folders_are_told_apart() {
        let settings = settings(&["--socket-path", "/x/a.sock", "--socket-path", "/y/a.sock"]).unwrap();
        assert_eq!(settings.devices[1].name, "/y/a.sock");
    }

    #[test]
    fn a_path_and_a_descriptor_exclude_one_another() {
        assert!(
            settings(&["--socket-path", "/run/a", "--fd", "3"]).unwrap_err().contains("cannot be used with")
        );
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_refused() {
        let error = settings(&["--fd", "1"]).unwrap_err();
        assert_eq!(
            error,
            "--fd 1: descriptors 0 to 2 are the standard streams; pass the number of an open, connected UNIX stream socket"
        );
        assert!(settings(&["--fd", "9999"]).unwrap_err().contains("no such descriptor"));
        let file = std::fs::File::open("/dev/null").unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&file).to_string();
        assert!(settings(&["--fd", &number]).unwrap_err().contains("not a stream socket"));
    }

    #[test]
    fn nothing_to_serve_is_an_error() {
        assert!(settings(&[]).unwrap_err().starts_with("there is nothing to serve"));
    }

    #[test]
    fn a_group_for_nobody_is_an_error() {
        assert!(settings(&["--hub", "/h", "--group", "g"]).unwrap_err().contains("[[hub.rule]]"));
    }

    #[test]
    fn flags_override_the_file() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/share/dmbridged.toml");
        let settings =
            settings(&["--config", file, "--hub", "/h", "--window-size", "64M", "--pool-size", "1G"])
                .unwrap();
        let hub = settings.hub.unwrap();
        assert_eq!((hub.socket.to_str(), hub.mode), (Some("/h"), 0o666));
        assert!(settings.devices.iter().all(|d| d.limits.window_size == 64 << 20));
        assert_eq!(settings.pool.max_bytes, 1 << 30);
    }
}
