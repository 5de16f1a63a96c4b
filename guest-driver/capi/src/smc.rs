//! Sockets.

use crate::device::dmbridge_device;
use crate::error::{Failure, at, bytes, bytes_mut, call, free, many, object, put, status, text};
use library::smc::{Smc, SmcListener, SmcStream};
use std::ffi::{c_char, c_int};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

/// What sockets need: devices, and buffers that connections share.
pub struct dmbridge_smc {
    smc: Smc,
}

/// A socket that listens.
pub struct dmbridge_listener {
    listener: SmcListener,
}

/// A connection.
pub struct dmbridge_stream {
    stream: SmcStream,
}

/// For dmbridge_stream_arm(): reading.
pub const DMBRIDGE_READ: c_int = 1;
/// For dmbridge_stream_arm(): writing.
pub const DMBRIDGE_WRITE: c_int = 2;

/// Sockets over these devices, the favourite first. Without a device, every connection stays with TCP. The devices can be freed after this.
///
/// # Safety
///
/// `devices` has `count` devices; it may be NULL if `count` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_smc_new(
    devices: *const *const dmbridge_device,
    count: usize,
) -> *mut dmbridge_smc {
    object(|| {
        let mut builder = Smc::builder();
        // SAFETY: the caller's promise.
        for device in unsafe { many(devices, count) }? {
            // SAFETY: the caller's promise.
            builder = builder.device(unsafe { at(*device) }?.device.clone(), 0);
        }
        Ok(dmbridge_smc { smc: builder.build() })
    })
}

/// Sockets over a device of each hub that the environment variable DMBRIDGE_HUB names (paths with colons between), or of
/// /run/dmbridge/hub.sock. A hub that cannot be connected is left out.
#[unsafe(no_mangle)]
pub extern "C" fn dmbridge_smc_from_environment() -> *mut dmbridge_smc {
    object(|| Ok(dmbridge_smc { smc: Smc::from_environment() }))
}

/// Lets go. Listeners and connections stay.
///
/// # Safety
///
/// `smc` is NULL or what dmbridge_smc_new() made and nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_smc_free(smc: *mut dmbridge_smc) {
    // SAFETY: the caller's promise.
    unsafe { free(smc) }
}

/// Listens at an address such as "0.0.0.0:7000", "[::1]:7000" or "localhost:0".
///
/// # Safety
///
/// `smc` is what dmbridge_smc_new() made, `address` a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_listen(
    smc: *const dmbridge_smc,
    address: *const c_char,
) -> *mut dmbridge_listener {
    // SAFETY: the caller's promise.
    object(|| Ok(dmbridge_listener { listener: unsafe { at(smc)?.smc.bind(text(address)?) }? }))
}

/// Stops listening.
///
/// # Safety
///
/// `listener` is NULL or a listener that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_listener_free(listener: *mut dmbridge_listener) {
    // SAFETY: the caller's promise.
    unsafe { free(listener) }
}

/// The port that it listens at.
///
/// # Safety
///
/// `listener` is a listener.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_listener_port(listener: *const dmbridge_listener) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(listener) }?.listener.local_addr()?.port().into()))
}

/// A descriptor that is readable while there is something to accept. It belongs to the listener; watch it for reading only.
///
/// # Safety
///
/// `listener` is a listener.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_listener_fd(listener: *const dmbridge_listener) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(listener) }?.listener.as_fd().as_raw_fd()))
}

/// Whether dmbridge_accept() fails with EAGAIN instead of waiting.
///
/// # Safety
///
/// `listener` is a listener.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_listener_set_nonblocking(
    listener: *const dmbridge_listener,
    nonblocking: bool,
) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        unsafe { at(listener) }?.listener.set_nonblocking(nonblocking);
        Ok(())
    })
}

/// The next connection.
///
/// # Safety
///
/// `listener` is a listener.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_accept(listener: *const dmbridge_listener) -> *mut dmbridge_stream {
    // SAFETY: the caller's promise.
    object(|| Ok(dmbridge_stream { stream: unsafe { at(listener) }?.listener.accept()?.0 }))
}

/// Connects to an address such as "127.0.0.1:7000", where a program listens that speaks SMC.
///
/// # Safety
///
/// `smc` is what dmbridge_smc_new() made, `address` a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_connect(
    smc: *const dmbridge_smc,
    address: *const c_char,
) -> *mut dmbridge_stream {
    // SAFETY: the caller's promise.
    object(|| Ok(dmbridge_stream { stream: unsafe { at(smc)?.smc.connect(text(address)?) }? }))
}

/// Closes a connection.
///
/// # Safety
///
/// `stream` is NULL or a connection that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_free(stream: *mut dmbridge_stream) {
    // SAFETY: the caller's promise.
    unsafe { free(stream) }
}

/// Whether it goes over DMBs: 1 or 0.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_is_smc(stream: *const dmbridge_stream) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(stream) }?.stream.is_smc().into()))
}

/// Why it stayed with TCP, as one of Linux's SMC_CLC_DECL_ codes; 0 if it did not.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_fallback_reason(stream: *const dmbridge_stream) -> u32 {
    // SAFETY: the caller's promise.
    call(0, || Ok(unsafe { at(stream) }?.stream.fallback_reason().map_or(0, |reason| reason.0)))
}

/// Reads up to `len` bytes: how many; 0 at the end. As read(2).
///
/// # Safety
///
/// `stream` is a connection; `to` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_read(
    stream: *const dmbridge_stream,
    to: *mut u8,
    len: usize,
) -> isize {
    call(-1, || {
        // SAFETY: the caller's promise.
        let (stream, to) = unsafe { (at(stream)?, bytes_mut(to, len)?) };
        Ok((&stream.stream).read(to)? as isize)
    })
}

/// As dmbridge_stream_read(), and leaves the bytes there.
///
/// # Safety
///
/// `stream` is a connection; `to` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_peek(
    stream: *const dmbridge_stream,
    to: *mut u8,
    len: usize,
) -> isize {
    call(-1, || {
        // SAFETY: the caller's promise.
        let (stream, to) = unsafe { (at(stream)?, bytes_mut(to, len)?) };
        Ok(stream.stream.peek(to)? as isize)
    })
}

/// Writes: how many bytes; less than `len` only if it may not wait any longer. As write(2), without SIGPIPE.
///
/// # Safety
///
/// `stream` is a connection; `len` bytes are readable at `from`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_write(
    stream: *const dmbridge_stream,
    from: *const u8,
    len: usize,
) -> isize {
    call(-1, || {
        // SAFETY: the caller's promise.
        let (stream, from) = unsafe { (at(stream)?, bytes(from, len)?) };
        Ok((&stream.stream).write(from)? as isize)
    })
}

/// Ends directions: `how` is SHUT_RD, SHUT_WR or SHUT_RDWR.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_shutdown(stream: *const dmbridge_stream, how: c_int) -> c_int {
    status(|| {
        let how = match how {
            libc::SHUT_RD => Shutdown::Read,
            libc::SHUT_WR => Shutdown::Write,
            libc::SHUT_RDWR => Shutdown::Both,
            _ => return Err(Failure::new(libc::EINVAL, "how is SHUT_RD, SHUT_WR or SHUT_RDWR")),
        };
        // SAFETY: the caller's promise.
        Ok(unsafe { at(stream) }?.stream.shutdown(how)?)
    })
}

/// Whether what would wait fails with EAGAIN instead.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_set_nonblocking(
    stream: *const dmbridge_stream,
    nonblocking: bool,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| Ok(unsafe { at(stream) }?.stream.set_nonblocking(nonblocking)?))
}

/// How long reading and writing wait before they fail with EAGAIN, in milliseconds; 0: for ever.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_set_timeouts(
    stream: *const dmbridge_stream,
    read_ms: u32,
    write_ms: u32,
) -> c_int {
    status(|| {
        let duration = |ms: u32| (ms != 0).then(|| Duration::from_millis(ms.into()));
        // SAFETY: the caller's promise.
        let stream = unsafe { at(stream) }?;
        stream.stream.set_read_timeout(duration(read_ms))?;
        Ok(stream.stream.set_write_timeout(duration(write_ms))?)
    })
}

/// For poll() and the like: of DMBRIDGE_READ and DMBRIDGE_WRITE in `what`, those that can be done at once, in `ready`. If that is not
/// what is wanted, poll the descriptor of dmbridge_stream_fd() and ask again. Over DMBs the descriptor is to be polled for POLLIN in any
/// case; over TCP (dmbridge_stream_is_smc()) as a socket, and `ready` is always 0.
///
/// # Safety
///
/// `stream` is a connection, `ready` a place for the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_arm(
    stream: *const dmbridge_stream,
    what: c_int,
    ready: *mut c_int,
) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let stream = unsafe { at(stream) }?;
        let (read, write) = stream.stream.arm(what & DMBRIDGE_READ != 0, what & DMBRIDGE_WRITE != 0)?;
        let can = (c_int::from(read) * DMBRIDGE_READ) | (c_int::from(write) * DMBRIDGE_WRITE);
        // SAFETY: the caller's promise.
        unsafe { put(ready, can) }
    })
}

/// The descriptor for dmbridge_stream_arm(). It belongs to the connection.
///
/// # Safety
///
/// `stream` is a connection.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_stream_fd(stream: *const dmbridge_stream) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(stream) }?.stream.readiness_fd()?.as_raw_fd()))
}
