//! `poll` and `select`: as the kernel's, after a look at what is in memory.

use crate::conn::Conn;
use crate::epoll::Until;
use crate::table::{self, Kind};
use crate::{crowd, errno, handover, real};
use libc::{
    POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT, POLLPRI, POLLRDHUP, POLLRDNORM, POLLWRNORM, c_int, fd_set,
    nfds_t, pollfd, sigset_t, timespec, timeval,
};
use std::ptr::null;
use std::time::{Duration, Instant};

/// That there is data, and that there is room, have two names each.
pub const IN: i16 = POLLIN | POLLRDNORM;
pub const OUT: i16 = POLLOUT | POLLWRNORM;
/// Descriptors that need no memory from the heap.
const FEW: usize = 32;

/// How the kernel is asked: for which descriptors, until when.
type Kernel<'a> = &'a dyn Fn(&mut [pollfd], Until) -> c_int;

/// The connection that a descriptor has, if the kernel alone does not know of all that comes.
fn moved(fd: c_int) -> Option<&'static Conn> {
    table::conn(fd).filter(|conn| conn.is_moved())
}

fn needs_us(fd: c_int) -> bool {
    match table::get(fd) {
        Some(entry) => match entry.kind() {
            Kind::Conn => entry.conn().is_some_and(Conn::is_moved),
            Kind::Epoll => entry.set().is_some_and(|set| set.needs_us()),
            _ => false,
        },
        None => false,
    }
}

/// Fills in what is ready of moved connections. Says how many descriptors have something.
fn look(fds: &mut [pollfd]) -> c_int {
    let mut count = 0;
    for at in fds.iter_mut() {
        at.revents = 0;
        if let Some(conn) = moved(at.fd) {
            at.revents = conn.readiness(at.fd).0 & (at.events | POLLHUP | POLLERR);
            count += c_int::from(at.revents != 0);
        }
    }
    count
}

/// Polls. The array is the program's.
fn wait(fds: &mut [pollfd], until: Until, kernel: Kernel<'_>) -> c_int {
    fds.iter().for_each(|at| handover::claim_if_strange(at.fd));
    if !fds.iter().any(|at| needs_us(at.fd)) {
        let count = kernel(fds, until);
        // One that was TCP when we went to sleep may have been woken by a byte that means nothing to the program.
        if count <= 0 || !fds.iter().any(|at| at.revents != 0 && needs_us(at.fd)) {
            return count;
        }
    }
    let mut few = [pollfd { fd: -1, events: 0, revents: 0 }; FEW];
    let mut many = Vec::new();
    let kernel_fds = if fds.len() <= FEW {
        &mut few[..fds.len()]
    } else {
        many.resize(fds.len(), few[0]);
        &mut many[..]
    };
    let mut start = None;
    loop {
        // Whether the kernel has nothing to add.
        let only_moved = fds
            .iter()
            .all(|at| at.fd < 0 || moved(at.fd).is_some_and(|conn| conn.readiness(at.fd).1 & at.events == 0));
        let ready = look(fds);
        if ready != 0 && only_moved {
            return ready;
        }
        // The others are as ready now as after a wait.
        if ready != 0 || matches!(until, Until::Now) || start.is_none() && !only_moved {
            let count = ask(fds, kernel_fds, Until::Now, kernel);
            if count != 0 || matches!(until, Until::Now) {
                return count;
            }
        }
        if start.is_none()
            && let Some(conn) = fds.iter().find_map(|at| moved(at.fd))
        {
            let ready = || {
                fds.iter().any(|at| moved(at.fd).is_some_and(|conn| conn.readiness(at.fd).0 & at.events != 0))
            };
            match crowd::spin(conn.rx_spinner(), until.deadline(), ready, || false) {
                Ok(()) => continue,
                Err(began) => start = Some((began, conn)),
            }
        }
        for at in fds.iter() {
            if let Some(conn) = moved(at.fd) {
                let full = if conn.is_full() { at.events } else { at.events & !OUT };
                conn.arm(at.fd, full, false, 0);
            }
        }
        // An epoll instance that watches one of them may take the wake-up away.
        let longest = fds.iter().filter_map(|at| moved(at.fd)?.longest_sleep()).min();
        let sleep = longest.map_or(until, |longest| until.at_most(longest));
        let count = if look(fds) != 0 { 0 } else { ask(fds, kernel_fds, sleep, kernel) };
        if let Some((began, conn)) = start {
            crowd::slept(conn.rx_spinner(), began);
        }
        if count != 0 || (until.is_over() && look(fds) == 0) {
            return count;
        }
    }
}

/// Asks the kernel, and translates what it says of moved connections. 0: nothing for the program.
fn ask(fds: &mut [pollfd], copy: &mut [pollfd], until: Until, kernel: Kernel<'_>) -> c_int {
    for (to, at) in copy.iter_mut().zip(&*fds) {
        *to = *at;
        if let Some(entry) = table::get(at.fd).filter(|entry| entry.kind() == Kind::Epoll)
            && let Some(set) = entry.set()
        {
            set.prepare();
        }
        if let Some(conn) = moved(at.fd)
            && at.events & OUT != 0
            && conn.is_full()
        {
            // TCP always has room; what wakes is a byte.
            to.events = at.events & !OUT | POLLIN;
        }
    }
    let count = kernel(copy, until);
    if count < 0 {
        return count;
    }
    let mut told = 0;
    for (said, at) in copy.iter().zip(fds.iter_mut()) {
        at.revents = said.revents;
        if let Some(conn) = moved(at.fd) {
            if said.revents & (IN | POLLRDHUP | POLLHUP | POLLERR) != 0 {
                conn.look(at.fd);
            }
            let (ready, ask) = conn.readiness(at.fd);
            let native = said.revents & (ask | POLLHUP | POLLERR | POLLRDHUP | POLLNVAL | POLLPRI);
            at.revents = (native | ready) & (at.events | POLLHUP | POLLERR | POLLNVAL);
        }
        told += c_int::from(at.revents != 0);
    }
    told
}

/// # Safety
///
/// Null, or `count` of them.
unsafe fn array<'a>(fds: *mut pollfd, count: nfds_t) -> &'a mut [pollfd] {
    if fds.is_null() || count == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(fds, count as usize) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn poll(fds: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int {
    // SAFETY: the program's array, here and below.
    let all = unsafe { array(fds, count) };
    if !all.iter().any(|at| table::is_interesting(at.fd)) {
        // SAFETY: the program's call.
        return unsafe { real::poll(fds, count, timeout) };
    }
    wait(all, Until::from_ms(timeout), &|fds, until| {
        // SAFETY: an array of pollfds.
        unsafe { real::poll(fds.as_mut_ptr(), fds.len() as nfds_t, until.ms()) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __poll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: c_int,
    room: usize,
) -> c_int {
    if room / size_of::<pollfd>() < count as usize {
        std::process::abort();
    }
    // SAFETY: the program's call.
    unsafe { poll(fds, count, timeout) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn ppoll(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the program's array, here and below.
    let all = unsafe { array(fds, count) };
    if !all.iter().any(|at| table::is_interesting(at.fd)) {
        // SAFETY: the program's call.
        return unsafe { real::ppoll(fds, count, timeout, mask) };
    }
    // SAFETY: the program's timeout.
    wait(all, unsafe { Until::from_timespec(timeout) }, &|fds, until| {
        let left = timespec_of(until);
        // SAFETY: an array of pollfds, the program's mask.
        unsafe {
            real::ppoll(fds.as_mut_ptr(), fds.len() as nfds_t, left.as_ref().map_or(null(), |t| t), mask)
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __ppoll_chk(
    fds: *mut pollfd,
    count: nfds_t,
    timeout: *const timespec,
    mask: *const sigset_t,
    room: usize,
) -> c_int {
    if room / size_of::<pollfd>() < count as usize {
        std::process::abort();
    }
    // SAFETY: the program's call.
    unsafe { ppoll(fds, count, timeout, mask) }
}

fn timespec_of(until: Until) -> Option<timespec> {
    until.left().map(|left| timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() })
}

/// The sets of a select.
struct Sets([*mut fd_set; 3]);

impl Sets {
    fn has(&self, which: usize, fd: c_int) -> bool {
        let set = self.0[which];
        // SAFETY: the program's set, which is as long as its count; `FD_ISSET` of libc would not look beyond 1024.
        !set.is_null() && unsafe { *set.cast::<u64>().add(fd as usize / 64) } >> (fd % 64) & 1 != 0
    }

    fn put(&self, which: usize, fd: c_int, on: bool) {
        let set = self.0[which];
        if !set.is_null() {
            // SAFETY: as above.
            let word = unsafe { &mut *set.cast::<u64>().add(fd as usize / 64) };
            *word = *word & !(1 << (fd % 64)) | u64::from(on) << (fd % 64);
        }
    }
}

/// What of a poll's answer each set of a select is about.
const MEANS: [i16; 3] = [POLLIN | POLLHUP | POLLERR, POLLOUT | POLLERR, POLLPRI];
const ASKS: [i16; 3] = [POLLIN, POLLOUT, POLLPRI];

/// Selects by polling. `None`: nothing of ours is in the sets.
fn select_by_poll(count: c_int, sets: &Sets, until: Until, kernel: Kernel<'_>) -> Option<c_int> {
    if !(0..count).any(|fd| table::is_interesting(fd) && (0..3).any(|s| sets.has(s, fd))) {
        return None;
    }
    let mut fds = Vec::with_capacity(8);
    for fd in 0..count {
        let events = (0..3).filter(|&s| sets.has(s, fd)).fold(0, |events, s| events | ASKS[s]);
        if events != 0 {
            fds.push(pollfd { fd, events, revents: 0 });
        }
    }
    let result = wait(&mut fds, until, kernel);
    if result < 0 {
        return Some(result);
    }
    if fds.iter().any(|at| at.revents & POLLNVAL != 0) {
        errno::set(libc::EBADF);
        return Some(-1);
    }
    let mut bits = 0;
    for at in &fds {
        for s in 0..3 {
            let on = at.events & ASKS[s] != 0 && at.revents & MEANS[s] != 0;
            sets.put(s, at.fd, on);
            bits += c_int::from(on);
        }
    }
    Some(bits)
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn select(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    timeout: *mut timeval,
) -> c_int {
    // SAFETY: the program's timeout.
    let time = unsafe { timeout.as_ref() };
    let until = match time {
        None => Until::Ever,
        Some(time) if time.tv_sec == 0 && time.tv_usec == 0 => Until::Now,
        Some(time) => {
            let left = Duration::from_secs(time.tv_sec.max(0) as u64)
                + Duration::from_micros(time.tv_usec.max(0) as u64);
            Instant::now().checked_add(left).map_or(Until::Ever, Until::Then)
        }
    };
    let sets = Sets([read, write, except]);
    let result = select_by_poll(count, &sets, until, &|fds, until| {
        let left = timespec_of(until);
        // SAFETY: an array of pollfds.
        unsafe {
            real::ppoll(fds.as_mut_ptr(), fds.len() as nfds_t, left.as_ref().map_or(null(), |t| t), null())
        }
    });
    let Some(result) = result else {
        // SAFETY: the program's call.
        return unsafe { real::select(count, read, write, except, timeout) };
    };
    // Linux says how much time is left.
    if !timeout.is_null()
        && let Some(left) = until.left()
    {
        // SAFETY: the program's timeout.
        unsafe { *timeout = timeval { tv_sec: left.as_secs() as i64, tv_usec: left.subsec_micros().into() } };
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pselect(
    count: c_int,
    read: *mut fd_set,
    write: *mut fd_set,
    except: *mut fd_set,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    let sets = Sets([read, write, except]);
    // SAFETY: the program's timeout.
    let until = unsafe { Until::from_timespec(timeout) };
    let result = select_by_poll(count, &sets, until, &|fds, until| {
        let left = timespec_of(until);
        // SAFETY: an array of pollfds, the program's mask.
        unsafe {
            real::ppoll(fds.as_mut_ptr(), fds.len() as nfds_t, left.as_ref().map_or(null(), |t| t), mask)
        }
    });
    // SAFETY: the program's call.
    result.unwrap_or_else(|| unsafe { real::pselect(count, read, write, except, timeout, mask) })
}
