//! How descriptors come, are changed, copied, inherited and closed.

use crate::conn::{Conn, State};
use crate::table::{self, Entry, Kind};
use crate::{arena, epoll, errno, handover, real, service, tcp};
use libc::{
    AF_INET, AF_INET6, F_DUPFD, F_DUPFD_CLOEXEC, F_SETFL, FIOASYNC, FIONBIO, FIONREAD, IPPROTO_TCP, O_ASYNC,
    O_NONBLOCK, SO_RCVLOWAT, SO_ZEROCOPY, SOCK_STREAM, SOL_SOCKET, TCP_CORK, TCP_NODELAY, TCP_ULP, TIOCOUTQ,
    c_char, c_int, c_ulong, c_void, sockaddr, socklen_t,
};
use std::sync::atomic::Ordering;

// ---- coming ------------------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: the program's call.
    let fd = unsafe { real::socket(domain, kind, protocol) };
    if service::is_it() {
        return arena::own(fd);
    }
    let stream = kind & 0xf == SOCK_STREAM
        && matches!(domain, AF_INET | AF_INET6)
        && matches!(protocol, 0 | IPPROTO_TCP);
    if stream
        && !is_standard(fd)
        && !service::has_ended()
        && let Some(entry) = table::get(fd)
    {
        entry.start(fd, Kind::Socket, false);
    }
    fd
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn eventfd(count: libc::c_uint, flags: c_int) -> c_int {
    // SAFETY: the program's call.
    let fd = unsafe { real::eventfd(count, flags) };
    if service::is_it() { arena::own(fd) } else { fd }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn memfd_create(name: *const c_char, flags: libc::c_uint) -> c_int {
    // SAFETY: the program's call.
    let fd = unsafe { real::memfd_create(name, flags) };
    if service::is_it() { arena::own(fd) } else { fd }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn connect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int {
    if table::is_ours(fd) {
        // To no address: it is disconnected, and may be connected again.
        handover::leave_to_tcp(fd);
    }
    // SAFETY: the program's call.
    let result = unsafe { real::connect(fd, address, len) };
    if let Some(entry) = table::get(fd).filter(|entry| entry.kind() == Kind::Socket)
        && (result == 0 || errno::get() == libc::EINPROGRESS)
    {
        entry.connected();
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int {
    // SAFETY: the program's call.
    accepted(fd, unsafe { real::accept(fd, address, len) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn accept4(
    fd: c_int,
    address: *mut sockaddr,
    len: *mut socklen_t,
    flags: c_int,
) -> c_int {
    // SAFETY: the program's call.
    accepted(fd, unsafe { real::accept4(fd, address, len, flags) })
}

fn accepted(listener: c_int, fd: c_int) -> c_int {
    let (Some(listener), Some(entry)) = (table::get(listener), table::get(fd)) else { return fd };
    if listener.kind() == Kind::Other && !service::has_ended() {
        // One that was inherited: what it is has to be found out once.
        let tcp = tcp::socket_option(fd, libc::SO_PROTOCOL) == Some(IPPROTO_TCP)
            && matches!(tcp::socket_option(fd, libc::SO_DOMAIN), Some(AF_INET | AF_INET6));
        listener.set_kind(if tcp { Kind::Socket } else { Kind::Never });
    }
    if listener.kind() == Kind::Socket {
        let stays = is_standard(fd) || service::has_ended();
        entry.start(fd, if stays { Kind::Never } else { Kind::Open }, false);
    }
    fd
}

/// Whether the C library itself reads and writes there, where nobody sees it.
fn is_standard(fd: c_int) -> bool {
    table::STANDARD.contains(&fd)
}

// ---- copies ------------------------------------------------------------------------------------------------------------

/// `to` is a copy of `from` from now on.
fn copied(from: c_int, to: c_int) {
    let (Some(source), Some(entry)) = (table::get(from), table::get(to)) else { return };
    if from == to || service::is_borrowed() {
        return;
    }
    // One that is TCP waits until it is nobody's standard input or output any more.
    if is_standard(to) && source.kind() != Kind::Open && !source.conn().is_some_and(Conn::is_plain) {
        handover::leave_to_tcp(from);
    }
    match source.kind() {
        Kind::Open | Kind::Conn => match service::conn_of(from, source) {
            Some((index, conn)) => {
                arena::add_descriptor(index);
                if let Some(registrations) = entry.registrations() {
                    registrations.clear();
                }
                entry.set_conn(to, index, conn.is_active());
            }
            None => {
                source.set_kind(Kind::Never);
                entry.start(to, Kind::Never, false);
            }
        },
        Kind::Stranger => {
            let Some(conn) = arena::conn(source.conn_index()) else { return };
            arena::add_descriptor(source.conn_index());
            conn.strangers.fetch_add(1, Ordering::AcqRel);
            entry.set_conn(to, source.conn_index(), conn.is_active());
            entry.set_kind(Kind::Stranger);
        }
        // What a copy of a listener or an unconnected socket becomes is not followed; accept finds out.
        Kind::Socket | Kind::Never => entry.start(to, Kind::Never, false),
        Kind::Epoll => epoll::copied((from, source), (to, entry)),
        Kind::Ours | Kind::Other => {}
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup(fd: c_int) -> c_int {
    // SAFETY: the program's call.
    let to = unsafe { real::dup(fd) };
    if to >= 0 {
        copied(fd, to);
    }
    to
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup2(from: c_int, to: c_int) -> c_int {
    if from != to && is_open(from) {
        closing(to);
    }
    // SAFETY: the program's call.
    let result = unsafe { real::dup2(from, to) };
    if result >= 0 {
        copied(from, to);
    }
    result
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
    if from != to && is_open(from) {
        closing(to);
    }
    // SAFETY: the program's call.
    let result = unsafe { real::dup3(from, to, flags) };
    if result >= 0 {
        copied(from, to);
    }
    result
}

fn is_open(fd: c_int) -> bool {
    // SAFETY: F_GETFD takes no argument.
    errno::keep(|| unsafe { real::fcntl(fd, libc::F_GETFD, 0) } >= 0)
}

// ---- going -------------------------------------------------------------------------------------------------------------

/// A descriptor is about to be closed.
fn closing(fd: c_int) {
    leaving(fd, false);
}

/// As `closing`. `ends`: so is the process, maybe in a signal's handler, which may have interrupted anything. So nothing is
/// freed and nobody called who ends too.
fn leaving(fd: c_int, ends: bool) {
    let Some(entry) = table::get(fd) else { return };
    let kind = entry.kind();
    if kind == Kind::Other || service::is_borrowed() {
        return;
    }
    if kind == Kind::Ours {
        return arena::make_way(fd);
    }
    errno::keep(|| {
        if let (Kind::Epoll, Some(set)) = (kind, entry.set())
            && set.close(fd)
        {
            entry.forget_set();
        }
        let conn = entry.conn().map(|conn| (entry.conn_index(), conn));
        if kind == Kind::Stranger
            && let Some(conn) = arena::conn(entry.conn_index())
        {
            conn.strangers.fetch_sub(1, Ordering::AcqRel);
            if arena::remove_descriptor(entry.conn_index()) {
                conn.remove_ref();
            }
        }
        if let Some((_, conn)) = conn.filter(|(index, _)| arena::descriptors(*index) == 1) {
            handover::before_leaving(conn, fd);
        }
        if let Some(registrations) = entry.registrations().filter(|_| !ends) {
            registrations.clear();
        }
        entry.set_kind(Kind::Other);
        let Some((index, conn)) = conn.filter(|(index, _)| arena::remove_descriptor(*index)) else { return };
        if conn.remove_ref() {
            if conn.close(fd) {
                tcp::reset_at_close(fd);
            }
            service::closed(index, conn, ends);
        } else {
            // Other processes go on, or have ended without a word.
            let own = std::process::id();
            let _ = conn.home.compare_exchange(own, 0, Ordering::AcqRel, Ordering::Relaxed);
            conn.leave(fd);
            if !ends {
                service::left(index);
            }
        }
    });
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close(fd: c_int) -> c_int {
    if let Some(entry) = table::get(fd)
        && entry.kind() == Kind::Ours
    {
        if !service::is_it() {
            // A program that closes all numbers there are.
            errno::set(libc::EBADF);
            return -1;
        }
        entry.set_kind(Kind::Other);
    }
    closing(fd);
    // SAFETY: the program's call.
    unsafe { real::close(fd) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn close_range(first: u32, last: u32, flags: c_int) -> c_int {
    const CLOEXEC: c_int = 4;
    if flags & CLOEXEC == 0 {
        all_closing(first, last);
    }
    // SAFETY: the program's call, in pieces.
    around_ours(first, last, |first, last| unsafe { real::close_range(first, last, flags) })
}

/// Does `call` for a range of descriptors without ours.
fn around_ours(mut first: u32, last: u32, mut call: impl FnMut(u32, u32) -> c_int) -> c_int {
    let ours = table::all().filter(|(_, entry)| entry.kind() == Kind::Ours);
    for own in ours.map(|(fd, _)| fd as u32) {
        if !(first..=last).contains(&own) {
            continue;
        }
        if own > first {
            call(first, own - 1);
        }
        if own == last {
            return 0;
        }
        first = own + 1;
    }
    call(first, last)
}

fn all_closing(first: u32, last: u32) {
    for (fd, _) in table::all().filter(|(fd, entry)| {
        (first..=last).contains(&(*fd as u32)) && !matches!(entry.kind(), Kind::Other | Kind::Ours)
    }) {
        closing(fd);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn closefrom(first: c_int) {
    let first = first.max(0) as u32;
    all_closing(first, u32::MAX);
    // SAFETY: the program's call.
    if around_ours(first, u32::MAX, |first, last| unsafe { real::close_range(first, last, 0) }) != 0 {
        for fd in (first..table::limit()).filter(|fd| !table::is_kind(*fd as c_int, Kind::Ours)) {
            // SAFETY: as above.
            unsafe { real::close(fd as c_int) };
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn shutdown(fd: c_int, how: c_int) -> c_int {
    handover::claim_if_strange(fd);
    let rest = match table::conn(fd) {
        Some(conn) if (0..=2).contains(&how) => conn.shutdown(fd, how),
        _ => Some(how),
    };
    match rest {
        // SAFETY: the program's call.
        Some(how) => unsafe { real::shutdown(fd, how) },
        None => 0,
    }
}

// ---- settings ----------------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fcntl(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
    before_change(fd, command, arg);
    // SAFETY: the program's call.
    changed(fd, command, arg, unsafe { real::fcntl(fd, command, arg) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fcntl64(fd: c_int, command: c_int, arg: c_ulong) -> c_int {
    before_change(fd, command, arg);
    // SAFETY: the program's call.
    changed(fd, command, arg, unsafe { real::fcntl64(fd, command, arg) })
}

fn before_change(fd: c_int, command: c_int, arg: c_ulong) {
    // A signal says that the kernel has something.
    if command == F_SETFL && arg as c_int & O_ASYNC != 0 {
        handover::leave_to_tcp(fd);
    }
}

fn changed(fd: c_int, command: c_int, arg: c_ulong, result: c_int) -> c_int {
    if result < 0 || !table::is_interesting(fd) {
        return result;
    }
    match command {
        F_DUPFD | F_DUPFD_CLOEXEC => copied(fd, result),
        F_SETFL => {
            if let Some(conn) = table::conn(fd) {
                conn.set_nonblocking(arg as c_int & O_NONBLOCK != 0);
            }
        }
        _ => {}
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int {
    handover::claim_if_strange(fd);
    if request == FIOASYNC {
        handover::leave_to_tcp(fd);
    }
    if let Some(conn) = table::conn(fd) {
        let answer = match request {
            FIONREAD => conn.readable(fd),
            TIOCOUTQ => conn.unread(),
            _ => None,
        };
        if let Some(bytes) = answer {
            // SAFETY: both requests write an int.
            unsafe { *(arg as *mut c_int) = bytes as c_int };
            return 0;
        }
    }
    // SAFETY: the program's call.
    let result = unsafe { real::ioctl(fd, request, arg) };
    if result == 0
        && request == FIONBIO
        && let Some(conn) = table::conn(fd)
    {
        // SAFETY: the request has read an int.
        conn.set_nonblocking(unsafe { *(arg as *const c_int) } != 0);
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn setsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *const c_void,
    len: socklen_t,
) -> c_int {
    if table::is_ours(fd) {
        handover::claim_if_strange(fd);
        let moved = table::conn(fd).filter(|conn| conn.state() == State::Linked);
        let int = || {
            // SAFETY: the program's value, of `len` bytes.
            (len >= 4 && !value.is_null()).then(|| unsafe { value.cast::<c_int>().read_unaligned() })
        };
        match (level, name, moved) {
            (IPPROTO_TCP, TCP_NODELAY | TCP_CORK, Some(conn)) => {
                if let Some(on) = int() {
                    let kept = if name == TCP_CORK { &conn.cork } else { &conn.nodelay };
                    kept.store((on != 0).into(), Ordering::Relaxed);
                    return 0;
                }
            }
            (SOL_SOCKET, SO_RCVLOWAT, _) if int().is_some_and(|bytes| bytes > 1) => {
                handover::leave_to_tcp(fd)
            }
            (SOL_SOCKET, SO_ZEROCOPY, _) | (IPPROTO_TCP, TCP_ULP, _) => handover::leave_to_tcp(fd),
            _ => {}
        }
    }
    // SAFETY: the program's call.
    unsafe { real::setsockopt(fd, level, name, value, len) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn getsockopt(
    fd: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    len: *mut socklen_t,
) -> c_int {
    // SAFETY: the program's call.
    let result = unsafe { real::getsockopt(fd, level, name, value, len) };
    if result == 0
        && level == IPPROTO_TCP
        && let TCP_NODELAY | TCP_CORK = name
        && let Some(conn) = table::conn(fd).filter(|conn| conn.state() == State::Linked)
    {
        let kept = if name == TCP_CORK { &conn.cork } else { &conn.nodelay };
        // SAFETY: the kernel has just written `len` bytes there.
        unsafe {
            if *len >= 4 {
                value.cast::<c_int>().write_unaligned(kept.load(Ordering::Relaxed) as c_int);
            }
        }
    }
    result
}

// ---- processes ---------------------------------------------------------------------------------------------------------

/// Before a fork: what the child inherits gets a state that both see.
pub extern "C" fn before_fork() {
    errno::keep(|| {
        for (fd, entry) in table::all() {
            if entry.kind() == Kind::Open && service::conn_of(fd, entry).is_none() {
                entry.set_kind(Kind::Never);
            }
        }
        for (_, conn) in arena::of_this_process() {
            conn.add_ref();
        }
        for (_, entry) in table::all().filter(|(_, entry)| entry.kind() == Kind::Stranger) {
            if let Some(conn) = arena::conn(entry.conn_index()) {
                conn.strangers.fetch_add(1, Ordering::AcqRel);
            }
        }
        hold(true);
    });
}

pub extern "C" fn after_fork_in_parent() {
    hold(false);
}

pub extern "C" fn after_fork_in_child() {
    hold(false);
    service::after_fork();
}

/// So that no lock is held in the child by a thread that is not there.
fn hold(on: bool) {
    for (_, entry) in table::all() {
        if let Some(set) = entry.set() {
            if on { set.hold() } else { set.release() }
        }
    }
    for (_, entry) in table::all() {
        if let Some(registrations) = entry.registrations() {
            if on { registrations.hold() } else { registrations.release() }
        }
    }
}

impl Entry {
    /// This process has connected the socket.
    fn connected(&self) {
        // It keeps where it is registered already.
        self.weight.store(0, Ordering::Relaxed);
        self.set_active();
        self.set_kind(Kind::Open);
    }
}

/// The process ends by itself: the kernel closes for it what is open.
pub extern "C" fn at_exit() {
    if service::is_borrowed() {
        return;
    }
    for (fd, _) in table::all().filter(|(_, e)| matches!(e.kind(), Kind::Conn | Kind::Stranger)) {
        leaving(fd, true);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(code: c_int) -> ! {
    at_exit();
    // SAFETY: ends the process.
    unsafe {
        libc::syscall(libc::SYS_exit_group, code);
    }
    std::process::abort()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _Exit(code: c_int) -> ! {
    // SAFETY: as above.
    unsafe { _exit(code) }
}
