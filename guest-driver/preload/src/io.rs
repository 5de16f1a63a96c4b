//! Reading and writing: `read`, `recv`, `write`, `send` and all their forms.

use crate::conn::{self, Conn};
use crate::epoll::Until;
use crate::errno::{Finally, Outcome, give, outcome};
use crate::iov;
use crate::table::{self, Entry, Kind};
use crate::{errno, handover, real, service, tcp};
use libc::{
    EINVAL, MSG_DONTWAIT, MSG_ERRQUEUE, MSG_OOB, RWF_NOWAIT, c_int, c_void, iovec, loff_t, mmsghdr, msghdr,
    off_t, size_t, sockaddr, socklen_t, ssize_t, timespec,
};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A call for a connection that has to prove itself: the kernel's, counted.
#[inline]
fn proving(fd: c_int, entry: &Entry, result: Outcome) -> Outcome {
    if let Ok(n) = result {
        let weight = entry.weight.load(Ordering::Relaxed) + table::weight(n);
        entry.weight.store(weight, Ordering::Relaxed);
        if weight >= table::PROVEN {
            service::consider(fd);
        }
    }
    result
}

/// As above, of a connection that has a state already.
#[inline]
fn counted(fd: c_int, conn: &Conn, result: Outcome) -> Outcome {
    if let Ok(n) = result
        && conn.is_plain()
    {
        let weight = conn.weight.load(Ordering::Relaxed).saturating_add(table::weight(n));
        conn.weight.store(weight, Ordering::Relaxed);
        if weight >= conn.threshold.load(Ordering::Relaxed) {
            service::consider(fd);
        }
    }
    result
}

/// Does `call` where the connection is the kernel's, and what `carried` makes of it where it may be ours.
#[inline]
fn carry<C: FnOnce() -> Outcome>(fd: c_int, call: C, carried: impl FnOnce(&Conn, C) -> Outcome) -> Outcome {
    let Some(entry) = table::get(fd) else { return call() };
    match entry.kind() {
        Kind::Open => {
            entry.inside.fetch_add(1, Ordering::SeqCst);
            if entry.kind() != Kind::Open {
                entry.inside.fetch_sub(1, Ordering::SeqCst);
                return carry(fd, call, carried);
            }
            let inside = Finally(|| {
                entry.inside.fetch_sub(1, Ordering::SeqCst);
            });
            let result = call();
            drop(inside);
            proving(fd, entry, result)
        }
        Kind::Conn => match entry.conn() {
            Some(conn) if !conn.is_over() => {
                let result = carried(conn, call);
                counted(fd, conn, result)
            }
            _ => call(),
        },
        Kind::Stranger => {
            handover::claim(fd, entry);
            carry(fd, call, carried)
        }
        _ => call(),
    }
}

/// Receives by the connection's way.
#[inline]
fn receive<'a>(
    fd: c_int,
    flags: c_int,
    buffers: impl FnOnce() -> Result<&'a [iovec], c_int>,
    call: impl FnOnce() -> Outcome,
) -> Outcome {
    carry(fd, call, |conn, call| conn.recv(fd, buffers, flags, call))
}

/// Sends by the connection's way.
#[inline]
fn transmit<'a>(
    fd: c_int,
    flags: c_int,
    buffers: impl FnOnce() -> Result<&'a [iovec], c_int>,
    call: impl FnOnce() -> Outcome,
) -> Outcome {
    let result = carry(fd, call, |conn, call| conn.send(fd, buffers, flags, call));
    conn::write_put_off();
    result
}

/// The list of a message.
///
/// # Safety
///
/// The message is the program's.
unsafe fn buffers<'a>(message: *const msghdr) -> Result<&'a [iovec], c_int> {
    // SAFETY: the caller's promise.
    unsafe { iov::list((*message).msg_iov, (*message).msg_iovlen) }.ok_or(EINVAL)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn read(fd: c_int, to: *mut c_void, len: size_t) -> ssize_t {
    // The kernel does not even look at a socket for nothing; `recv` does.
    if !table::is_ours(fd) || len == 0 {
        // SAFETY: the program's call.
        return unsafe { real::read(fd, to, len) };
    }
    let one = iov::one(to, len);
    // SAFETY: the program's call.
    give(receive(fd, 0, || Ok(&one), || outcome(unsafe { real::read(fd, to, len) })))
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __read_chk(fd: c_int, to: *mut c_void, len: size_t, room: size_t) -> ssize_t {
    if len > room {
        std::process::abort();
    }
    // SAFETY: the program's call.
    unsafe { read(fd, to, len) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn readv(fd: c_int, to: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::readv(fd, to, count) });
    // SAFETY: as above.
    give(unsafe { receive_list(fd, to, count, 0, call) })
}

/// Reads into a list of buffers.
///
/// # Safety
///
/// `count` of them lie at `to`.
unsafe fn receive_list(
    fd: c_int,
    to: *const iovec,
    count: c_int,
    flags: c_int,
    call: impl FnOnce() -> Outcome,
) -> Outcome {
    // SAFETY: the caller's promise.
    let list = || unsafe { iov::list(to, usize::try_from(count).map_err(|_| EINVAL)?) }.ok_or(EINVAL);
    if table::is_ours(fd) && list().is_ok_and(|list| list.iter().all(|buffer| buffer.iov_len == 0)) {
        return call();
    }
    receive(fd, flags, list, call)
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn preadv2(
    fd: c_int,
    to: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::preadv2(fd, to, count, offset, flags) });
    // Only this can be asked of a socket.
    if offset != -1 || flags & !RWF_NOWAIT != 0 {
        return give(call());
    }
    let flags = if flags & RWF_NOWAIT != 0 { MSG_DONTWAIT } else { 0 };
    // SAFETY: as above.
    give(unsafe { receive_list(fd, to, count, flags, call) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn preadv64v2(
    fd: c_int,
    to: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the program's call.
    unsafe { preadv2(fd, to, count, offset, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pwritev2(
    fd: c_int,
    from: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::pwritev2(fd, from, count, offset, flags) });
    if offset != -1 || flags & !RWF_NOWAIT != 0 {
        return give(call());
    }
    // SAFETY: as above.
    let list = || unsafe { iov::list(from, usize::try_from(count).map_err(|_| EINVAL)?) }.ok_or(EINVAL);
    give(transmit(fd, if flags & RWF_NOWAIT != 0 { MSG_DONTWAIT } else { 0 }, list, call))
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pwritev64v2(
    fd: c_int,
    from: *const iovec,
    count: c_int,
    offset: off_t,
    flags: c_int,
) -> ssize_t {
    // SAFETY: the program's call.
    unsafe { pwritev2(fd, from, count, offset, flags) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn recv(fd: c_int, to: *mut c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::recv(fd, to, len, flags) });
    before_flags(fd, flags);
    if !table::is_ours(fd) || flags & MSG_ERRQUEUE != 0 {
        return give(call());
    }
    let one = iov::one(to, len);
    give(receive(fd, flags, || Ok(&one), call))
}

/// Urgent data does not exist in rings.
fn before_flags(fd: c_int, flags: c_int) {
    if flags & MSG_OOB != 0 {
        handover::leave_to_tcp(fd);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __recv_chk(
    fd: c_int,
    to: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
) -> ssize_t {
    if len > room {
        std::process::abort();
    }
    // SAFETY: the program's call.
    unsafe { recv(fd, to, len, flags) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn recvfrom(
    fd: c_int,
    to: *mut c_void,
    len: size_t,
    flags: c_int,
    address: *mut sockaddr,
    address_len: *mut socklen_t,
) -> ssize_t {
    before_flags(fd, flags);
    if !table::is_ours(fd) || table::conn(fd).is_none() {
        // SAFETY: the program's call.
        let call = || outcome(unsafe { real::recvfrom(fd, to, len, flags, address, address_len) });
        let one = iov::one(to, len);
        return give(receive(fd, flags, || Ok(&one), call));
    }
    // SAFETY: the program's call. TCP names no sender.
    let result = unsafe { recv(fd, to, len, flags) };
    if result >= 0 && !address.is_null() && !address_len.is_null() {
        // SAFETY: the program's pointer.
        unsafe { *address_len = 0 };
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __recvfrom_chk(
    fd: c_int,
    to: *mut c_void,
    len: size_t,
    room: size_t,
    flags: c_int,
    address: *mut sockaddr,
    address_len: *mut socklen_t,
) -> ssize_t {
    if len > room {
        std::process::abort();
    }
    // SAFETY: the program's call.
    unsafe { recvfrom(fd, to, len, flags, address, address_len) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::recvmsg(fd, message, flags) });
    before_flags(fd, flags);
    if !table::is_ours(fd) || flags & MSG_ERRQUEUE != 0 {
        return give(call());
    }
    let moved = table::conn(fd).is_some_and(|conn| conn.is_moved());
    // SAFETY: as above.
    let list = || unsafe { buffers(message) };
    let result = receive(fd, flags, list, call);
    if moved && result.is_ok() {
        // SAFETY: the program's message.
        unsafe {
            (*message).msg_namelen = 0;
            (*message).msg_controllen = 0;
            (*message).msg_flags = 0;
        }
    }
    give(result)
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn recvmmsg(
    fd: c_int,
    messages: *mut mmsghdr,
    count: u32,
    flags: c_int,
    timeout: *mut timespec,
) -> c_int {
    handover::claim_if_strange(fd);
    if table::conn(fd).is_none_or(|conn| conn.is_over()) {
        // SAFETY: the program's call.
        return unsafe { real::recvmmsg(fd, messages, count, flags, timeout) };
    }
    // As the kernel does: it looks at the time when a message has come.
    // SAFETY: the program's timeout.
    let deadline = if timeout.is_null() { None } else { unsafe { Until::from_timespec(timeout) }.left() };
    let deadline = deadline.map(|left| Instant::now() + left);
    let mut done = 0;
    for i in 0..count.min(1024) as usize {
        let first = done == 0;
        let wait = if first || flags & libc::MSG_WAITFORONE == 0 { 0 } else { MSG_DONTWAIT };
        // SAFETY: the program's array.
        let message = unsafe { &mut *messages.add(i) };
        // SAFETY: the program's message.
        let result = unsafe { recvmsg(fd, &mut message.msg_hdr, flags & !libc::MSG_WAITFORONE | wait) };
        if result < 0 {
            return if first { -1 } else { done };
        }
        message.msg_len = result as u32;
        done += 1;
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            break;
        }
    }
    done
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn write(fd: c_int, from: *const c_void, len: size_t) -> ssize_t {
    if !table::is_ours(fd) {
        // SAFETY: the program's call.
        return unsafe { real::write(fd, from, len) };
    }
    let one = iov::one(from, len);
    // SAFETY: the program's call.
    give(transmit(fd, 0, || Ok(&one), || outcome(unsafe { real::write(fd, from, len) })))
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn writev(fd: c_int, from: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::writev(fd, from, count) });
    // SAFETY: as above.
    let list = || unsafe { iov::list(from, usize::try_from(count).map_err(|_| EINVAL)?) }.ok_or(EINVAL);
    give(transmit(fd, 0, list, call))
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn send(fd: c_int, from: *const c_void, len: size_t, flags: c_int) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::send(fd, from, len, flags) });
    before_flags(fd, flags);
    if !table::is_ours(fd) {
        return give(call());
    }
    let one = iov::one(from, len);
    give(transmit(fd, flags, || Ok(&one), call))
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sendto(
    fd: c_int,
    from: *const c_void,
    len: size_t,
    flags: c_int,
    address: *const sockaddr,
    address_len: socklen_t,
) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::sendto(fd, from, len, flags, address, address_len) });
    before_flags(fd, flags);
    if !table::is_ours(fd) {
        return give(call());
    }
    let one = iov::one(from, len);
    give(transmit(fd, flags, || Ok(&one), call))
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the program's message.
    unsafe { handover::before_message(message) };
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::sendmsg(fd, message, flags) });
    before_flags(fd, flags);
    if !table::is_ours(fd) {
        return give(call());
    }
    // SAFETY: as above.
    let list = || unsafe { buffers(message) };
    give(transmit(fd, flags, list, call))
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sendmmsg(fd: c_int, messages: *mut mmsghdr, count: u32, flags: c_int) -> c_int {
    handover::claim_if_strange(fd);
    if table::conn(fd).is_none_or(|conn| conn.is_over()) {
        for i in 0..count.min(1024) as usize {
            // SAFETY: the program's array, of messages.
            unsafe { handover::before_message(&raw const (*messages.add(i)).msg_hdr) };
        }
        // SAFETY: the program's call.
        return unsafe { real::sendmmsg(fd, messages, count, flags) };
    }
    let mut done = 0;
    for i in 0..count.min(1024) as usize {
        // SAFETY: the program's array.
        let message = unsafe { &mut *messages.add(i) };
        // SAFETY: the program's message.
        let result = unsafe { sendmsg(fd, &message.msg_hdr, flags) };
        if result < 0 {
            return if done == 0 { -1 } else { done };
        }
        message.msg_len = result as u32;
        done += 1;
    }
    done
}

/// A file into a connection: read straight into the ring.
unsafe fn send_file(to: c_int, from: c_int, offset: *mut off_t, count: size_t) -> Option<Outcome> {
    let conn = table::conn(to).filter(|conn| conn.is_moved())?;
    // What the kernel does not take: a read might wait, and nothing waits with the direction's lock.
    // SAFETY: it tells a position.
    if errno::keep(|| unsafe { libc::lseek(from, 0, libc::SEEK_CUR) }) < 0 {
        return Some(Err(EINVAL));
    }
    // SAFETY: the program's pointer.
    let mut at = if offset.is_null() { None } else { Some(unsafe { *offset }) };
    let result = conn.send_from(to, count, &mut |to, len| {
        // SAFETY: `len` bytes of the ring are writable at `to`.
        let n = outcome(unsafe {
            match at {
                Some(at) => real::pread(from, to.cast(), len, at),
                None => real::read(from, to.cast(), len),
            }
        })?;
        at = at.map(|at| at + n as off_t);
        Ok(n)
    })?;
    if let Some(at) = at
        && result.is_ok()
    {
        // SAFETY: the program's pointer.
        unsafe { *offset = at };
    }
    Some(result)
}

/// What a call without buffers comes to if the connection has switched at this very moment: it is made again.
const AGAIN: c_int = libc::ESTALE;

/// Calls of the kernel that only say how much they moved.
fn through(fd: c_int, call: impl FnOnce() -> Outcome) -> Outcome {
    transmit(fd, 0, || Err(AGAIN), call)
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn sendfile(
    to: c_int,
    from: c_int,
    offset: *mut off_t,
    count: size_t,
) -> ssize_t {
    if !table::is_ours(to) {
        // SAFETY: the program's call.
        return unsafe { real::sendfile(to, from, offset, count) };
    }
    loop {
        // SAFETY: the program's call.
        let moved = unsafe { send_file(to, from, offset, count) };
        // SAFETY: the program's call.
        let call = || outcome(unsafe { real::sendfile(to, from, offset, count) });
        match moved.unwrap_or_else(|| through(to, call)) {
            Err(AGAIN) => {}
            result => return give(result),
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sendfile64(to: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t {
    // SAFETY: the program's call; both offsets have 64 bits.
    unsafe { sendfile(to, from, offset, count) }
}

fn is_pipe(fd: c_int) -> bool {
    // SAFETY: all-zero bytes are a stat, which is filled in.
    errno::keep(|| unsafe {
        let mut status: libc::stat = std::mem::zeroed();
        libc::fstat(fd, &mut status) == 0 && status.st_mode & libc::S_IFMT == libc::S_IFIFO
    })
}

/// Waits until a pipe is ready, if it may be waited for. Says what it is ready for.
fn pipe_ready(pipe: c_int, events: i16, nonblocking: bool) -> Result<i16, c_int> {
    let mut wait = libc::pollfd { fd: pipe, events, revents: 0 };
    // SAFETY: one pollfd.
    let ready = outcome(unsafe { real::poll(&mut wait, 1, if nonblocking { 0 } else { -1 }) } as ssize_t)?;
    if ready == 0 { Err(libc::EAGAIN) } else { Ok(wait.revents) }
}

/// Bytes that can be read from a pipe without waiting. 0: it has ended.
fn pipe_data(pipe: c_int, nonblocking: bool) -> Outcome {
    pipe_ready(pipe, libc::POLLIN, nonblocking)?;
    Ok(tcp::queued_in(pipe).unwrap_or(0) as usize)
}

/// Bytes that can be written to a pipe without waiting.
fn pipe_room(pipe: c_int, nonblocking: bool) -> Outcome {
    // SAFETY: F_GETFL takes no argument.
    let nonblocking = nonblocking || unsafe { real::fcntl(pipe, libc::F_GETFL, 0) } & libc::O_NONBLOCK != 0;
    pipe_ready(pipe, libc::POLLOUT, nonblocking)?;
    // SAFETY: nor does this.
    let size = || unsafe { real::fcntl(pipe, libc::F_GETPIPE_SZ, 0) } as usize;
    // As pages of it may be partly filled, one that has something has only room for what poll(2) promises.
    Ok(if tcp::queued_in(pipe) == Some(0) { size() } else { libc::PIPE_BUF })
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn splice(
    from: c_int,
    from_offset: *mut loff_t,
    to: c_int,
    to_offset: *mut loff_t,
    len: size_t,
    flags: u32,
) -> ssize_t {
    // SAFETY: the program's call.
    let call = || outcome(unsafe { real::splice(from, from_offset, to, to_offset, len, flags) });
    if !table::is_ours(from) && !table::is_ours(to) {
        return give(call());
    }
    let moved = |fd: c_int| table::conn(fd).filter(|conn| conn.is_moved());
    if moved(to).or_else(|| moved(from)).is_some()
        && (!from_offset.is_null() || !to_offset.is_null() || !(is_pipe(from) || is_pipe(to)))
    {
        // The kernel says what is wrong.
        return give(call());
    }
    let nonblocking = flags & libc::SPLICE_F_NONBLOCK != 0;
    if let Some(conn) = moved(to) {
        let len = match pipe_data(from, nonblocking) {
            Ok(there) => len.min(there),
            Err(errno) => return give(Err(errno)),
        };
        // SAFETY: `len` bytes of the ring are writable.
        let mut fill = |to: *mut u8, len: usize| outcome(unsafe { real::read(from, to.cast(), len) });
        if let Some(result) = conn.send_from(to, len, &mut fill) {
            return give(result);
        }
    }
    if let Some(conn) = moved(from) {
        let len = match pipe_room(to, nonblocking) {
            Ok(room) => len.min(room),
            Err(errno) => return give(Err(errno)),
        };
        // SAFETY: `len` bytes of the ring are readable.
        let mut take = |at: *const u8, len: usize| outcome(unsafe { real::write(to, at.cast(), len) });
        match conn.recv_into(from, len, &mut take) {
            Some(result) => return give(result),
            // TCP still has data, and maybe bytes that wake behind it: by way of a buffer.
            None => {
                let mut buffer = [0u8; 16384];
                let most = len.min(buffer.len());
                // SAFETY: the buffer is as long as that.
                let got = unsafe { recv(from, buffer.as_mut_ptr().cast(), most, 0) };
                if got <= 0 {
                    return got;
                }
                let mut done = 0;
                while done < got as usize {
                    // SAFETY: so many bytes are in the buffer.
                    let n = unsafe { real::write(to, buffer.as_ptr().add(done).cast(), got as usize - done) };
                    if n < 0 && errno::get() != libc::EAGAIN && errno::get() != libc::EINTR {
                        return if done == 0 { -1 } else { done as ssize_t };
                    }
                    done += n.max(0) as usize;
                }
                return got;
            }
        }
    }
    if table::is_ours(to) {
        return give(through(to, call));
    }
    give(receive(from, 0, || Err(AGAIN), call))
}
