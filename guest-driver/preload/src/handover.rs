//! Connections that go to another program: by `exec`, as an open descriptor, or in a message (`SCM_RIGHTS`).
//!
//! A program that is executed and loads this library gets the connections' states with the descriptors: it maps the
//! family's memory, whose descriptors the environment names. What has not moved may move there, once it alone has it.
//! What has moved cannot be used there, because the rings are in memory of the process that found the other end: it is a
//! *stranger's*. If the stranger never uses it, nothing happens. If it does, the connection is called back to TCP
//! (`conn/back.rs`).
//!
//! What is meant for the other program (standard input and output, what nobody else has) and what goes to a program that
//! does not load this library is called back before.

use crate::conn::{Conn, State};
use crate::elf::Loaded;
use crate::table::{self, Entry, Kind};
use crate::{arena, elf, errno, lock, real, service, stats, tcp};
use libc::{c_char, c_int, c_void, msghdr};
use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How the environment names what is inherited: the memory's and the eventfd's descriptors, then number and life of each
/// connection.
const ENVIRONMENT: &str = "DMBRIDGE_RUN_INHERITED";
/// How long a connection may take to come back. The other end's thread answers in less than a millisecond, unless it was
/// stopped.
pub const LIMIT: Duration = Duration::from_secs(5);

type List = *const *const c_char;

// ---- calling back ------------------------------------------------------------------------------------------------------

/// Has the connection be TCP, with everything in its order, and counts why. False: it could not be, and is broken off.
fn call_back(conn: &'static Conn, fd: c_int, why: &AtomicU64) -> bool {
    if conn.change(State::Asking, State::Over) || conn.state() != State::Linked {
        return true;
    }
    errno::keep(|| {
        conn.wanted.store(1, Ordering::SeqCst);
        arena::ring();
        let limit = Instant::now() + LIMIT + LIMIT / 5;
        while conn.wanted.load(Ordering::SeqCst) != 0 && conn.state() == State::Linked {
            let home = conn.home.load(Ordering::Acquire) as c_int;
            // SAFETY: signal 0 is none.
            let gone = home == 0 || (unsafe { libc::kill(home, 0) } != 0 && errno::get() == libc::ESRCH);
            if Instant::now() > limit || (gone && !service::call_back(conn, home as u32)) {
                break;
            }
            let _ = lock::wait(&conn.wanted, 1, Duration::from_millis(20));
        }
        if conn.state() == State::Linked {
            stats::count(&stats::get().broken);
            tcp::disconnect(fd);
            return false;
        }
        stats::count(why);
        true
    })
}

/// A stranger uses its connection.
#[cold]
pub fn claim(fd: c_int, entry: &Entry) {
    let Some(conn) = arena::conn(entry.conn_index()) else { return };
    let back = call_back(conn, fd, &stats::get().called_back);
    if entry.kind() == Kind::Stranger {
        conn.strangers.fetch_sub(1, Ordering::AcqRel);
        entry.set_kind(if back { Kind::Conn } else { Kind::Never });
    }
}

/// As `claim`, for calls that are about a descriptor in some other way.
#[inline]
pub fn claim_if_strange(fd: c_int) {
    if let Some(entry) = table::get(fd)
        && entry.kind() == Kind::Stranger
    {
        claim(fd, entry);
    }
}

/// The process that can call a connection back is about to close it. It does so first if strangers have it, and if the other
/// end is just leaving it waits until that has what it was sent.
pub fn before_leaving(conn: &'static Conn, fd: c_int) {
    if conn.home.load(Ordering::Acquire) != std::process::id() || conn.state() != State::Linked {
        return;
    }
    if conn.strangers.load(Ordering::Acquire) != 0 {
        call_back(conn, fd, &stats::get().called_back);
    }
    let limit = Instant::now() + LIMIT / 5;
    while conn.state() == State::Linked && conn.is_left() && Instant::now() < limit {
        let _ = lock::wait(&conn.wanted, 0, Duration::from_millis(5));
    }
}

/// The program has the kernel do something with it that only TCP can do: the connection is TCP from now on, in every program
/// that has it.
pub fn leave_to_tcp(fd: c_int) {
    make_tcp(fd, &stats::get().left);
}

/// The connection is TCP from now on. `why` is counted if it was not.
fn make_tcp(fd: c_int, why: &AtomicU64) {
    let Some(entry) = table::get(fd) else { return };
    match entry.kind() {
        Kind::Open => entry.set_kind(Kind::Never),
        Kind::Stranger => claim(fd, entry),
        Kind::Conn => {
            if let Some(conn) = entry.conn()
                && !conn.change(State::Plain, State::Over)
            {
                call_back(conn, fd, why);
            }
        }
        _ => {}
    }
}

// ---- messages ----------------------------------------------------------------------------------------------------------

/// Before a message is sent, on whatever socket: the connections in it are given away.
///
/// # Safety
///
/// The message is the program's.
pub unsafe fn before_message(message: *const msghdr) {
    // SAFETY: the caller's promise; the walk is that of the C library's macros.
    unsafe {
        if message.is_null() || (*message).msg_control.is_null() {
            return;
        }
        let mut at = libc::CMSG_FIRSTHDR(message);
        while let Some(control) = at.as_ref() {
            let start = libc::CMSG_LEN(0) as usize;
            if control.cmsg_level == libc::SOL_SOCKET
                && control.cmsg_type == libc::SCM_RIGHTS
                && control.cmsg_len >= start
            {
                let data = libc::CMSG_DATA(at).cast::<c_int>();
                for i in 0..(control.cmsg_len - start) / size_of::<c_int>() {
                    make_tcp(data.add(i).read_unaligned(), &stats::get().called_back);
                }
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
}

// ---- being executed ----------------------------------------------------------------------------------------------------

/// Takes over what this program was executed with.
pub fn inherit() {
    let Some(text) = std::env::var_os(ENVIRONMENT) else { return };
    // SAFETY: before the program's main(), there is one thread. Its children are told of what they inherit, not of this.
    unsafe { std::env::remove_var(ENVIRONMENT) };
    let mut numbers = text.to_str().unwrap_or("").split(' ').map_while(|word| word.parse::<u32>().ok());
    let (Some(memory), Some(bell)) = (numbers.next(), numbers.next()) else { return };
    if !arena::inherit([memory as c_int, bell as c_int]) {
        return;
    }
    for fd in arena::files() {
        // SAFETY: descriptors that are ours.
        unsafe { real::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC as libc::c_ulong) };
    }
    let sockets: Vec<(c_int, u64)> = std::fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .filter_map(|file| file.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|fd| Some((fd, tcp::cookie(fd)?)))
        .collect();
    while let (Some(index), Some(life)) = (numbers.next(), numbers.next()) {
        let Some(conn) = arena::conn(index).filter(|conn| conn.life.load(Ordering::Relaxed) == life) else {
            continue;
        };
        let cookie = conn.cookie.load(Ordering::Relaxed);
        let mut has = false;
        for (fd, _) in sockets.iter().filter(|(_, of)| *of == cookie) {
            let Some(entry) = table::get(*fd) else { continue };
            has = true;
            arena::add_descriptor(index);
            entry.set_conn(*fd, index, conn.is_active());
            if matches!(conn.state(), State::Linked | State::Asking) {
                conn.strangers.fetch_add(1, Ordering::AcqRel);
                entry.set_kind(Kind::Stranger);
            }
        }
        if !has {
            conn.remove_ref();
        }
    }
}

// ---- executing ---------------------------------------------------------------------------------------------------------

/// What a program is executed with. A child that borrows its parent's memory never gives back what is allocated here, so nothing
/// is where there is nothing to inherit.
struct Inheritance {
    environment: List,
    /// Where that is, and what of it is ours, if it is not the program's own.
    _made: Option<(Vec<*const c_char>, CString)>,
    /// Connections that are counted for it.
    counted: Vec<&'static Conn>,
    /// Connections of which it has none although this process has.
    gone: Vec<&'static Conn>,
}

/// The descriptors of connections that a program executed by this process gets.
fn inherited() -> Vec<(c_int, u32, &'static Conn)> {
    let stays = |fd: c_int| {
        // SAFETY: F_GETFD takes no argument.
        let flags = unsafe { real::fcntl(fd, libc::F_GETFD, 0) };
        flags >= 0 && flags & libc::FD_CLOEXEC == 0
    };
    let borrowed = service::is_borrowed();
    let mut found = Vec::new();
    for (fd, entry) in table::all() {
        if entry.kind() == Kind::Open && !borrowed && stays(fd) && service::conn_of(fd, entry).is_none() {
            entry.set_kind(Kind::Never);
        }
        if matches!(entry.kind(), Kind::Conn | Kind::Stranger)
            && let Some(conn) = arena::conn(entry.conn_index())
            && stays(fd)
            && (!borrowed || tcp::cookie(fd) == Some(conn.cookie.load(Ordering::Relaxed)))
        {
            found.push((fd, entry.conn_index(), conn));
        }
    }
    // A child that borrows its parent's memory has made its standard input of one without a note of it.
    for fd in (0..=2).filter(|_| borrowed) {
        let cookie = tcp::cookie(fd).filter(|_| stays(fd));
        let known = |fd| found.iter().any(|(at, ..)| *at == fd);
        if let Some(cookie) = cookie
            && !known(fd)
            && let Some((index, conn)) =
                arena::of_this_process().find(|(_, conn)| conn.cookie.load(Ordering::Relaxed) == cookie)
        {
            found.push((fd, index, conn));
        }
    }
    found
}

impl Inheritance {
    /// Before a program is executed. `own`: in this process, not in a child of it that is about to be made.
    fn new(program: Option<PathBuf>, environment: List, own: bool) -> Inheritance {
        let borrowed = service::is_borrowed();
        let loaded = program.map_or(Loaded::Without, |path| elf::loaded(&path));
        let found = inherited();
        let adopts =
            !found.is_empty() && arena::files()[0] >= 0 && loads_us(environment) && loaded == Loaded::With;
        let mut all: Vec<(u32, &'static Conn)> = Vec::new();
        for (fd, index, conn) in found {
            // With this process's end there would be nobody left who uses it, or who calls it back.
            let home = conn.home.load(Ordering::Acquire) == std::process::id();
            let last = own && !borrowed && (home || conn.refs() == 1);
            if conn.state() == State::Linked && (!adopts || fd <= 2 || last) {
                call_back(conn, fd, &stats::get().called_back);
            }
            if own && !borrowed && conn.refs() == 1 {
                conn.change(State::Asking, State::Plain);
            }
            if !adopts {
                conn.change(State::Plain, State::Over);
            } else if !all.iter().any(|(i, _)| *i == index) {
                all.push((index, conn));
            }
        }
        let counted = if own && !borrowed { Vec::new() } else { all.iter().map(|(_, conn)| *conn).collect() };
        let gone: Vec<_> = arena::of_this_process()
            .filter(|(i, conn)| own && !borrowed && conn.refs() > 1 && !all.iter().any(|(of, _)| of == i))
            .map(|(_, conn)| conn)
            .collect();
        for conn in &counted {
            conn.add_ref();
        }
        for conn in &gone {
            conn.remove_ref();
        }
        let made = if loaded == Loaded::Foreign && loads_us(environment) {
            Some(without_us(environment))
        } else if all.is_empty() {
            None
        } else {
            let [memory, bell] = arena::files();
            let lives = all.iter().map(|(i, conn)| format!(" {i} {}", conn.life.load(Ordering::Relaxed)));
            let text = format!("{ENVIRONMENT}={memory} {bell}{}", lives.collect::<String>());
            let text = CString::new(text).unwrap_or_default();
            let mut list = strings(environment);
            list.extend([text.as_ptr(), std::ptr::null()]);
            set_inheritable(true);
            Some((list, text))
        };
        let environment = made.as_ref().map_or(environment, |(list, _)| list.as_ptr());
        Inheritance { environment, _made: made, counted, gone }
    }

    /// There is no such program.
    fn failed(self) {
        for conn in &self.counted {
            conn.remove_ref();
        }
        for conn in &self.gone {
            conn.add_ref();
        }
    }
}

fn set_inheritable(on: bool) {
    let flags = if on { 0 } else { libc::FD_CLOEXEC };
    for fd in arena::files() {
        // SAFETY: a descriptor of ours.
        unsafe { real::fcntl(fd, libc::F_SETFD, flags as libc::c_ulong) };
    }
}

/// The strings of a list that ends with null.
fn strings(list: List) -> Vec<*const c_char> {
    let mut all = Vec::new();
    if !list.is_null() {
        // SAFETY: the program's list, which ends with null.
        unsafe {
            while !(*list.add(all.len())).is_null() {
                all.push(*list.add(all.len()));
            }
        }
    }
    all
}

/// What the loader reads in the environment.
const PRELOAD: &[u8] = b"LD_PRELOAD=";

fn is_us(name: &[u8]) -> bool {
    name.windows(19).any(|at| at == b"libdmbridge_preload")
}

/// Whether an environment has this library loaded.
fn loads_us(environment: List) -> bool {
    strings(environment).iter().any(|text| {
        // SAFETY: the program's string.
        let text = unsafe { CStr::from_ptr(*text) }.to_bytes();
        text.starts_with(PRELOAD) && is_us(text)
    })
}

/// An environment in which this library is not preloaded.
fn without_us(environment: List) -> (Vec<*const c_char>, CString) {
    let mut list = strings(environment);
    let mut text = CString::default();
    list.retain(|at| {
        // SAFETY: the program's string.
        let all = unsafe { CStr::from_ptr(*at) }.to_bytes();
        let Some(names) = all.strip_prefix(PRELOAD) else { return true };
        let is_separator = |byte: &u8| matches!(*byte, b':' | b' ');
        let others = names.split(is_separator).filter(|name| !name.is_empty() && !is_us(name));
        let others = others.collect::<Vec<_>>().join(&b':');
        if !others.is_empty() {
            text = CString::new([PRELOAD, &others].concat()).unwrap_or_default();
        }
        false
    });
    if !text.is_empty() {
        list.push(text.as_ptr());
    }
    list.push(std::ptr::null());
    (list, text)
}

/// Where a program is, as `execvp` finds it.
fn find(name: *const c_char, search: bool) -> Option<PathBuf> {
    if name.is_null() {
        return None;
    }
    // SAFETY: the program's string.
    let name = OsStr::from_bytes(unsafe { CStr::from_ptr(name) }.to_bytes());
    if search { elf::find(name) } else { Some(name.into()) }
}

/// Executes a program by `call`, which is told the environment.
fn exec(program: Option<PathBuf>, environment: List, call: impl FnOnce(List) -> c_int) -> c_int {
    let inheritance = errno::keep(|| Inheritance::new(program, environment, true));
    let result = call(inheritance.environment);
    errno::keep(|| {
        inheritance.failed();
        set_inheritable(false);
    });
    result
}

unsafe extern "C" {
    static environ: List;
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execve(path: *const c_char, args: List, environment: List) -> c_int {
    // SAFETY: the program's call, here and below.
    exec(find(path, false), environment, |environment| unsafe { real::execve(path, args, environment) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execv(path: *const c_char, args: List) -> c_int {
    // SAFETY: as above.
    unsafe { execve(path, args, environ) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execvpe(path: *const c_char, args: List, environment: List) -> c_int {
    // SAFETY: as above.
    exec(find(path, true), environment, |environment| unsafe { real::execvpe(path, args, environment) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn execvp(path: *const c_char, args: List) -> c_int {
    // SAFETY: as above.
    unsafe { execvpe(path, args, environ) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fexecve(fd: c_int, args: List, environment: List) -> c_int {
    let program = Some(PathBuf::from(format!("/proc/self/fd/{fd}")));
    // SAFETY: as above.
    exec(program, environment, |environment| unsafe { real::fexecve(fd, args, environment) })
}

/// Defines a function that takes its arguments one by one: makes them a list where they lie, behind those that came in
/// registers, for a function that takes a list.
macro_rules! listed {
    ($name:ident, $to:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn $name(path: *const c_char, first: *const c_char) -> c_int {
            std::arch::naked_asm!(
                "pop rax", // where to return to
                "push r9",
                "push r8",
                "push rcx",
                "push rdx",
                "push rsi",
                "mov rsi, rsp", // the arguments, one behind the other
                "push rax",
                "call {to}",
                "pop rcx",
                "add rsp, 40",
                "jmp rcx",
                to = sym $to,
            )
        }
    };
}

listed!(execl, listed);
listed!(execlp, listed_and_searched);
listed!(execle, listed_with_environment);

unsafe extern "C" fn listed(path: *const c_char, args: List) -> c_int {
    // SAFETY: the program's call, here and below.
    unsafe { execve(path, args, environ) }
}

unsafe extern "C" fn listed_and_searched(path: *const c_char, args: List) -> c_int {
    // SAFETY: as above.
    unsafe { execvpe(path, args, environ) }
}

unsafe extern "C" fn listed_with_environment(path: *const c_char, args: List) -> c_int {
    // SAFETY: as above: the environment comes behind the null that ends the arguments.
    unsafe { execve(path, args, (*args.add(strings(args).len() + 1)).cast()) }
}

type Spawn = unsafe fn(*mut libc::pid_t, *const c_char, *const c_void, *const c_void, List, List) -> c_int;

/// Spawns a program by `call`.
unsafe fn spawn(
    call: Spawn,
    search: bool,
    (pid, path, actions, attributes): (*mut libc::pid_t, *const c_char, *const c_void, *const c_void),
    (args, environment): (List, List),
) -> c_int {
    let inheritance = errno::keep(|| Inheritance::new(find(path, search), environment, false));
    // SAFETY: the program's call.
    let result = unsafe { call(pid, path, actions, attributes, args, inheritance.environment) };
    if result != 0 {
        errno::keep(|| inheritance.failed());
    }
    set_inheritable(false);
    result
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn posix_spawn(
    pid: *mut libc::pid_t,
    path: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    args: List,
    environment: List,
) -> c_int {
    // SAFETY: the program's call.
    unsafe { spawn(real::posix_spawn, false, (pid, path, actions, attributes), (args, environment)) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn posix_spawnp(
    pid: *mut libc::pid_t,
    path: *const c_char,
    actions: *const c_void,
    attributes: *const c_void,
    args: List,
    environment: List,
) -> c_int {
    // SAFETY: the program's call.
    unsafe { spawn(real::posix_spawnp, true, (pid, path, actions, attributes), (args, environment)) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn posix_spawn_file_actions_adddup2(
    actions: *mut c_void,
    from: c_int,
    to: c_int,
) -> c_int {
    // It is meant for a program that will be spawned.
    claim_if_strange(from);
    if let Some(conn) = table::conn(from) {
        call_back(conn, from, &stats::get().called_back);
    }
    // SAFETY: the program's call.
    unsafe { real::posix_spawn_file_actions_adddup2(actions, from, to) }
}
