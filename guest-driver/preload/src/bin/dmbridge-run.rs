//! Runs an unchanged program; its TCP connections to other programs of this host, or of its virtual machines, that were started
//! so go over DMBs (`docs/run.md`).

#[path = "../elf.rs"]
mod elf;
#[path = "../stats.rs"]
#[allow(dead_code, reason = "the library counts")]
mod stats;

use clap::Parser;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpid, getppid};
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::atomic::Ordering;

/// The preloaded library's file.
const LIBRARY: &str = "libdmbridge_preload.so";
/// The file of the one that leaves the work to the kernel.
const AF_SMC_LIBRARY: &str = "libdmbridge_af_smc.so";

/// Run an unchanged program; its TCP connections to programs of this host that run like this go over shared memory. With
/// --network, so do those to programs in its virtual machines and containers.
#[derive(Parser)]
#[command(name = "dmbridge-run", version)]
struct Args {
    /// The daemon's socket [env: DMBRIDGE_HUB] [default: this machine's device, or /run/dmbridge/hub.sock]
    #[arg(long, value_name = "PATH")]
    hub: Option<PathBuf>,
    /// The kernel module's character device, such as /dev/dmbridge0 [env: DMBRIDGE_DEVICE]
    #[arg(long, value_name = "FILE", conflicts_with = "hub")]
    device: Option<PathBuf>,
    /// Connections with equal addresses are the same one wherever this name is given: on other virtual machines, and in
    /// other network namespaces [env: DMBRIDGE_NETWORK]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    network: Option<String>,
    /// Leave it to the kernel: make the program's TCP sockets AF_SMC ones (docs/smc-in-a-guest.md)
    #[arg(long, conflicts_with_all = ["hub", "device", "network", "verbose", "stats"])]
    af_smc: bool,
    /// Say on standard error why connections stay TCP
    #[arg(long)]
    verbose: bool,
    /// When the program has ended, say on standard error what happened
    #[arg(long)]
    stats: bool,
    /// The library to preload, if it is not where it was installed
    #[arg(long, env = "DMBRIDGE_PRELOAD", hide = true)]
    library: Option<PathBuf>,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, required = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    program: Vec<OsString>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("dmbridge-run: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<ExitCode, String> {
    let library = find_library(args)?;
    let [program, rest @ ..] = &args.program[..] else { return Err("which program?".into()) };
    let mut command = Command::new(program);
    command.args(rest);
    if args.hub.is_some() || args.device.is_some() {
        command.env_remove("DMBRIDGE_HUB").env_remove("DMBRIDGE_DEVICE");
    }
    // The program may change its folder.
    let path = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    command.envs(args.hub.as_ref().map(|hub| ("DMBRIDGE_HUB", path(hub))));
    command.envs(args.device.as_ref().map(|file| ("DMBRIDGE_DEVICE", path(file))));
    command.envs(args.network.as_ref().map(|name| ("DMBRIDGE_NETWORK", name)));
    let mut preload = library.into_os_string();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    // A loader that cannot load it would not start the program at all.
    if elf::find(program).is_some_and(|path| elf::loaded(&path) == elf::Loaded::Foreign) {
        if args.verbose {
            eprintln!("dmbridge-run: {} has another C library: its connections stay TCP", program.display());
        }
    } else {
        command.env("LD_PRELOAD", preload);
    }
    if args.verbose {
        command.env("DMBRIDGE_RUN_VERBOSE", "1");
    }
    if !args.stats {
        let error = command.exec();
        return Err(format!("cannot run {}: {error}", program.display()));
    }
    let file = Counters::new()?;
    command.env(stats::ENVIRONMENT, &file.path);
    let status =
        attend(&mut command).map_err(|error| format!("cannot run {}: {error}", program.display()))?;
    file.show();
    drop(file);
    if let Some(signal) = status.signal() {
        end_by(signal);
    }
    Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
}

/// Runs a program as a child, as if it ran in this process's place: signals go on to it, its stops and its end come back,
/// and it does not outlive this process.
fn attend(command: &mut Command) -> std::io::Result<ExitStatus> {
    let mut all = SigSet::all();
    // These are about what happens in a process itself.
    for own in
        [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGTRAP, Signal::SIGSYS]
    {
        all.remove(own);
    }
    let before = all.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
    let parent = getpid();
    // SAFETY: system calls only.
    unsafe {
        command.pre_exec(move || {
            set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                // It has ended before that.
                std::process::abort();
            }
            Ok(before.thread_set_mask()?)
        })
    };
    let mut child = command.spawn()?;
    let pid = Pid::from_raw(child.id() as i32);
    loop {
        // SAFETY: all-zero bytes are a siginfo; the set is one.
        let (signal, info) = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            (libc::sigwaitinfo(all.as_ref(), &mut info), info)
        };
        if signal == libc::SIGCHLD {
            let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
            match waitid(Id::Pid(pid), flags | WaitPidFlag::WEXITED)? {
                WaitStatus::Stopped(..) => {
                    waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG)?;
                    // Whoever started this process sees that the program has stopped, and lets both go on.
                    raise(Signal::SIGSTOP)?;
                }
                WaitStatus::StillAlive => {}
                _ => return child.wait(),
            }
        } else if signal > 0 && info.si_code <= 0 {
            // SAFETY: a signal. What the terminal sends has come to the whole process group.
            unsafe { libc::kill(pid.as_raw(), signal) };
        }
    }
}

/// Ends as the program has ended.
fn end_by(signal: i32) {
    // SAFETY: system calls on this process, whose only thread this is. It leaves no second core file.
    unsafe {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Where the library is: named, next to this program, or in the `lib` folder next to its folder.
fn find_library(args: &Args) -> Result<PathBuf, String> {
    let name = if args.af_smc { AF_SMC_LIBRARY } else { LIBRARY };
    let own =
        std::env::current_exe().map_err(|error| format!("cannot find out where this program is: {error}"))?;
    let folder = own.parent().unwrap_or(Path::new("/"));
    let places = match &args.library {
        Some(named) => vec![named.clone()],
        None => [".", "../lib", "../lib/dmbridge"].map(|place| folder.join(place).join(name)).to_vec(),
    };
    let found = places.iter().find_map(|place| place.canonicalize().ok().filter(|place| place.is_file()));
    found.ok_or_else(|| format!("{name} was not found in {}; install it there", folder.display()))
}

/// The counters of all processes that the program becomes.
struct Counters {
    path: PathBuf,
    /// Locked as long as this process lives.
    _file: Flock<File>,
}

/// Where the counters' files are, and how they begin.
const FOLDER: &str = "/dev/shm";
const NAME: &str = "dmbridge-run.";

impl Counters {
    fn new() -> Result<Counters, String> {
        remove_left();
        let mut attempt = 0;
        let (path, file) = loop {
            let path = Path::new(FOLDER).join(format!("{NAME}{}.{attempt}", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let file = Flock::lock(file, FlockArg::LockExclusive);
                    let file =
                        file.map_err(|(_, error)| format!("cannot lock {}: {error}", path.display()))?;
                    // Another one may have taken it for one that was left, just before.
                    if path.exists() {
                        break (path, file);
                    }
                }
                // Of another PID namespace.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => attempt += 1,
                Err(error) => return Err(format!("cannot make {}: {error}", path.display())),
            }
        };
        let say = |error| format!("cannot make {}: {error}", path.display());
        file.set_len(size_of::<stats::Stats>() as u64).map_err(say)?;
        // Its processes may become other users.
        let everybody = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        file.set_permissions(everybody).map_err(say)?;
        Ok(Counters { path, _file: file })
    }

    fn show(&self) {
        // SAFETY: set before any thread of this program exists.
        unsafe { std::env::set_var(stats::ENVIRONMENT, &self.path) };
        let counters = std::ptr::from_ref(stats::get()).cast::<std::sync::atomic::AtomicU64>();
        for (i, text) in stats::TEXTS.iter().enumerate() {
            // SAFETY: as many counters as texts.
            let value = unsafe { (*counters.add(i)).load(Ordering::Relaxed) };
            if value != 0 {
                eprintln!("dmbridge-run: {value:>12} {text}");
            }
        }
    }
}

/// Removes what those have left that were killed.
fn remove_left() {
    for file in std::fs::read_dir(FOLDER).into_iter().flatten().flatten() {
        let name = file.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(NAME)?.split('.').next());
        if let Some(pid) = pid
            && !Path::new(&format!("/proc/{pid}")).exists()
            // It may be alive in another PID namespace.
            && let Ok(left) = OpenOptions::new().write(true).open(file.path())
            && let Ok(_locked) = Flock::lock(left, FlockArg::LockExclusiveNonblock)
        {
            // Who may not leaves it to its owner.
            let _ = std::fs::remove_file(file.path());
        }
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
