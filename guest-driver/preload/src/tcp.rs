//! What the kernel says of a TCP socket.

use crate::{errno, real};
use libc::{c_int, c_void, socklen_t, timeval};
use std::time::Duration;

/// The state of a connection that is open both ways (`TCP_ESTABLISHED`).
const ESTABLISHED: u8 = 1;
/// The peer has ended its direction.
const CLOSE_WAIT: u8 = 8;
/// States in which the peer's FIN has come: CLOSE_WAIT, LAST_ACK, CLOSING.
const FIN_CAME: [u8; 3] = [8, 9, 11];
/// How often to ask for two numbers that have to fit each other.
const TRIES: usize = 16;

/// Where the fields that are of interest lie in `struct tcp_info` (`include/uapi/linux/tcp.h`).
const STATE: usize = 0;
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;

/// `struct tcp_info`, as far as it is needed.
struct Info([u8; 136]);

impl Info {
    fn of(fd: c_int) -> Option<Info> {
        let mut bytes = [0u8; 136];
        let len = get(fd, libc::IPPROTO_TCP, libc::TCP_INFO, &mut bytes)?;
        (len == bytes.len()).then_some(Info(bytes))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(std::array::from_fn(|i| self.0[at + i]))
    }
}

fn get(fd: c_int, level: c_int, name: c_int, bytes: &mut [u8]) -> Option<usize> {
    let mut len = bytes.len() as socklen_t;
    errno::keep(|| {
        // SAFETY: `len` bytes are writable.
        let result =
            unsafe { real::getsockopt(fd, level, name, bytes.as_mut_ptr().cast::<c_void>(), &mut len) };
        (result == 0).then_some(len as usize)
    })
}

fn queued(fd: c_int, request: libc::c_ulong) -> Option<u64> {
    let mut bytes: c_int = 0;
    errno::keep(|| {
        // SAFETY: both requests write an int.
        let result = unsafe { real::ioctl(fd, request, (&raw mut bytes) as libc::c_ulong) };
        (result == 0).then_some(bytes.max(0) as u64)
    })
}

/// Bytes that have come and were not read.
pub fn queued_in(fd: c_int) -> Option<u64> {
    queued(fd, libc::FIONREAD)
}

/// How many bytes were written to the connection in all. No thread writes meanwhile. `None`: it is not open both ways.
pub fn written(fd: c_int, active: bool) -> Option<u64> {
    written_if(fd, active, |state| state == ESTABLISHED)
}

/// As `written`, of a connection that the peer may have ended.
pub fn written_half(fd: c_int, active: bool) -> Option<u64> {
    written_if(fd, active, |state| state == ESTABLISHED || state == CLOSE_WAIT)
}

fn written_if(fd: c_int, active: bool, suits: impl Fn(u8) -> bool) -> Option<u64> {
    for _ in 0..TRIES {
        let before = Info::of(fd)?;
        let waiting = queued(fd, libc::TIOCOUTQ)?;
        let after = Info::of(fd)?;
        let acked = after.u64(BYTES_ACKED);
        if !suits(after.0[STATE]) {
            return None;
        }
        if before.u64(BYTES_ACKED) == acked {
            // The SYN of who connected was acknowledged too.
            return (acked + waiting).checked_sub(active.into());
        }
    }
    None
}

/// How many bytes were read from the connection in all. No thread reads meanwhile.
pub fn read(fd: c_int) -> Option<u64> {
    for _ in 0..TRIES {
        let before = Info::of(fd)?;
        let waiting = queued_in(fd)?;
        let after = Info::of(fd)?;
        let received = after.u64(BYTES_RECEIVED);
        if before.u64(BYTES_RECEIVED) == received && before.0[STATE] == after.0[STATE] {
            let fin = u64::from(FIN_CAME.contains(&after.0[STATE]));
            return (received - fin.min(received)).checked_sub(waiting);
        }
    }
    None
}

/// As `read`, where urgent data may have come: the kernel counts nothing from there on as waiting, unless it is in line.
pub fn read_before_urgent(fd: c_int) -> Option<u64> {
    let in_line = |on: c_int| {
        // SAFETY: an int. If it fails the connection is gone.
        errno::keep(|| unsafe {
            real::setsockopt(fd, libc::SOL_SOCKET, libc::SO_OOBINLINE, (&raw const on).cast(), 4)
        });
    };
    let before = socket_option(fd, libc::SO_OOBINLINE)?;
    in_line(1);
    let bytes = read(fd);
    in_line(before);
    bytes
}

/// How many bytes of a connection are known to have gone where.
#[derive(Clone, Copy)]
pub struct Counts {
    /// Written here, and in the other end's kernel.
    pub acked: u64,
    /// Written here, at least when this was asked for.
    pub written: u64,
    /// In this end's kernel, or read from it.
    pub received: u64,
}

/// They are, while the connection is open both ways. Others may use it meanwhile.
pub fn counts(fd: c_int, active: bool) -> Option<Counts> {
    // In this order: what is acknowledged meanwhile is counted twice, and not left out.
    let waiting = queued(fd, libc::TIOCOUTQ)?;
    let info = Info::of(fd)?;
    if info.0[STATE] != ESTABLISHED {
        return None;
    }
    // The SYN of who connected was acknowledged too.
    let acked = info.u64(BYTES_ACKED).checked_sub(active.into())?;
    Some(Counts { acked, written: acked + waiting, received: info.u64(BYTES_RECEIVED) })
}

/// Whether it is a TCP connection that is open both ways, with nothing set that only TCP can do.
pub fn is_suitable(fd: c_int) -> bool {
    let protocol = socket_option(fd, libc::SO_PROTOCOL);
    let low_water = socket_option(fd, libc::SO_RCVLOWAT);
    let zero_copy = socket_option(fd, libc::SO_ZEROCOPY);
    // A proxy's: it has the addresses of other machines, and may have two ends of different connections that look like one's.
    let transparent = [(libc::SOL_IP, libc::IP_TRANSPARENT), (libc::SOL_IPV6, libc::IPV6_TRANSPARENT)]
        .iter()
        .any(|&(level, name)| int_option(fd, level, name).unwrap_or(0) != 0);
    protocol == Some(libc::IPPROTO_TCP)
        && low_water == Some(1)
        && zero_copy.unwrap_or(0) == 0
        && !transparent
        && Info::of(fd).is_some_and(|info| info.0[STATE] == ESTABLISHED)
}

/// An integer option.
fn int_option(fd: c_int, level: c_int, name: c_int) -> Option<c_int> {
    let mut bytes = [0u8; 4];
    (get(fd, level, name, &mut bytes)? == 4).then(|| c_int::from_ne_bytes(bytes))
}

/// An integer option of the socket.
pub fn socket_option(fd: c_int, name: c_int) -> Option<c_int> {
    int_option(fd, libc::SOL_SOCKET, name)
}

/// An integer option of TCP.
pub fn option(fd: c_int, name: c_int) -> Option<u32> {
    int_option(fd, libc::IPPROTO_TCP, name).map(|value| value as u32)
}

/// Sets an integer option of TCP.
pub fn set_option(fd: c_int, name: c_int, value: c_int) {
    errno::keep(|| {
        // SAFETY: an int. If it fails the connection is gone.
        unsafe { real::setsockopt(fd, libc::IPPROTO_TCP, name, (&raw const value).cast(), 4) };
    });
}

/// Has bytes sent at once, as far as there is a window: others (BBR) pace them, and close the window now and then to see
/// what happens.
pub fn set_plain_congestion_control(fd: c_int) {
    errno::keep(|| {
        let name = c"reno";
        let len = name.count_bytes() as socklen_t;
        // SAFETY: a name of that length. Where it may not be chosen, wake-ups are late at times.
        unsafe { real::setsockopt(fd, libc::IPPROTO_TCP, libc::TCP_CONGESTION, name.as_ptr().cast(), len) };
    });
}

/// Has the kernel reset the connection when it is closed.
pub fn reset_at_close(fd: c_int) {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    errno::keep(|| {
        let len = size_of::<libc::linger>() as socklen_t;
        // SAFETY: a linger.
        unsafe { real::setsockopt(fd, libc::SOL_SOCKET, libc::SO_LINGER, (&raw const linger).cast(), len) };
    });
}

/// Whether it will be: `SO_LINGER` with no time.
pub fn resets_at_close(fd: c_int) -> bool {
    let mut bytes = [0u8; size_of::<libc::linger>()];
    if get(fd, libc::SOL_SOCKET, libc::SO_LINGER, &mut bytes).is_none() {
        return false;
    }
    // SAFETY: a linger is integers only.
    let linger: libc::linger = unsafe { std::mem::transmute(bytes) };
    linger.l_onoff != 0 && linger.l_linger == 0
}

/// What the kernel calls the socket, whatever descriptor it is asked by.
pub fn cookie(fd: c_int) -> Option<u64> {
    const SO_COOKIE: c_int = 57;
    let mut bytes = [0u8; 8];
    (get(fd, libc::SOL_SOCKET, SO_COOKIE, &mut bytes)? == 8).then(|| u64::from_ne_bytes(bytes))
}

/// Breaks the connection off: the peer is told, and who uses the socket gets an error.
pub fn disconnect(fd: c_int) {
    errno::keep(|| {
        // SAFETY: all-zero bytes are an address of no family, which connect() takes to disconnect.
        unsafe {
            let none: libc::sockaddr = std::mem::zeroed();
            real::connect(fd, &none, size_of::<libc::sockaddr>() as socklen_t);
        }
    });
}

/// `SO_SNDTIMEO` or `SO_RCVTIMEO`; `None`: for ever.
pub fn timeout(fd: c_int, name: c_int) -> Option<Duration> {
    let mut bytes = [0u8; size_of::<timeval>()];
    get(fd, libc::SOL_SOCKET, name, &mut bytes)?;
    // SAFETY: a timeval is integers only.
    let time: timeval = unsafe { std::mem::transmute(bytes) };
    let timeout = Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64);
    (!timeout.is_zero()).then_some(timeout)
}

/// Whether calls do not wait.
pub fn is_nonblocking(fd: c_int) -> bool {
    // SAFETY: F_GETFL takes no argument.
    errno::keep(|| unsafe { real::fcntl(fd, libc::F_GETFL, 0) } & libc::O_NONBLOCK != 0)
}

/// A clock that costs next to nothing, in ms.
pub fn milliseconds() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_COARSE, &mut now) };
    now.tv_sec as u64 * 1000 + now.tv_nsec as u64 / 1_000_000
}
