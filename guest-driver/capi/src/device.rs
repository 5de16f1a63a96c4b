//! Devices and their events.

use crate::error::{Failure, at, call, free, object, put, status, text};
use library::{Device, Event, Gid};
use std::ffi::{c_char, c_int};
use std::time::Duration;

/// A device of this process.
pub struct dmbridge_device {
    pub(crate) device: Device,
}

/// A device's name in the fabric.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct dmbridge_gid {
    /// As in docs/device.md, 6.1.
    pub bytes: [u8; 16],
}

impl From<Gid> for dmbridge_gid {
    fn from(gid: Gid) -> dmbridge_gid {
        dmbridge_gid { bytes: gid.to_bytes() }
    }
}

impl From<dmbridge_gid> for Gid {
    fn from(gid: dmbridge_gid) -> Gid {
        Gid::from_bytes(gid.bytes)
    }
}

/// The owner of a DMB ended it.
pub const DMBRIDGE_EVENT_DMB_UNREGISTERED: u32 = 2;
/// The peer of a DMB let it go.
pub const DMBRIDGE_EVENT_DMB_DETACHED: u32 = 3;
/// A device with which this one shared a DMB is gone.
pub const DMBRIDGE_EVENT_DEVICE_GONE: u32 = 4;
/// Somebody called dmbridge_signal_event().
pub const DMBRIDGE_EVENT_SOFTWARE: u32 = 5;
/// A device with which this one shared a DMB is paused; nothing is lost.
pub const DMBRIDGE_EVENT_DEVICE_PAUSED: u32 = 9;
/// It goes on.
pub const DMBRIDGE_EVENT_DEVICE_RESUMED: u32 = 10;

/// Something that happened.
#[repr(C)]
pub struct dmbridge_event {
    /// One of DMBRIDGE_EVENT_...
    pub kind: u32,
    /// DMBRIDGE_EVENT_SOFTWARE: the sender's code. DMBRIDGE_EVENT_DEVICE_GONE: the reason.
    pub code: u32,
    /// The other device.
    pub gid: dmbridge_gid,
    /// The DMB's token, where the event is about one.
    pub token: u64,
    /// DMBRIDGE_EVENT_SOFTWARE: the sender's info.
    pub info: u64,
}

/// A timeout in milliseconds as poll(2) has it: negative is none.
pub(crate) fn timeout(ms: c_int) -> Option<Duration> {
    u64::try_from(ms).ok().map(Duration::from_millis)
}

/// Connects a device to a daemon's socket: its hub, or that of a configured device.
///
/// # Safety
///
/// `path` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_device_connect(path: *const c_char) -> *mut dmbridge_device {
    object(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { text(path) }?;
        Ok(dmbridge_device { device: Device::connect(path)? })
    })
}

/// Lets go of a device. It leaves the fabric when everything that was made from it is freed, too.
///
/// # Safety
///
/// `device` is NULL or a device that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_device_free(device: *mut dmbridge_device) {
    // SAFETY: the caller's promise.
    unsafe { free(device) }
}

/// The device's name in the fabric; all zero, with errno, on failure.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_device_gid(device: *const dmbridge_device) -> dmbridge_gid {
    // SAFETY: the caller's promise.
    call(dmbridge_gid { bytes: [0; 16] }, || Ok(unsafe { at(device) }?.device.gid().into()))
}

/// Whether DMBs of this device can be mapped: 1 or 0.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_device_can_map(device: *const dmbridge_device) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(device) }?.device.can_map().into()))
}

/// Reads a GID from 1 to 16, or 32, hexadecimal digits.
///
/// # Safety
///
/// `digits` is a string, `gid` a place for the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_gid_parse(digits: *const c_char, gid: *mut dmbridge_gid) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let digits = unsafe { text(digits) }?;
        let parsed: Gid = digits.parse().map_err(|error| Failure::new(libc::EINVAL, format!("{error}")))?;
        // SAFETY: the caller's promise.
        unsafe { put(gid, parsed.into()) }
    })
}

/// Says something to another device's program, which gets DMBRIDGE_EVENT_SOFTWARE. EAGAIN: it has not taken 64 of them.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_signal_event(
    device: *const dmbridge_device,
    gid: dmbridge_gid,
    code: u32,
    info: u64,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| Ok(unsafe { at(device) }?.device.signal_event(gid.into(), code, info)?))
}

/// Waits up to `timeout_ms` (negative: for ever) for the next event of the device: 1, or 0 if none came in time.
///
/// # Safety
///
/// `device` is a device, `event` a place for the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_next_event(
    device: *const dmbridge_device,
    timeout_ms: c_int,
    event: *mut dmbridge_event,
) -> c_int {
    call(-1, || {
        // SAFETY: the caller's promise.
        let device = unsafe { at(device) }?;
        let next = loop {
            let Some(next) = device.device.events().next(timeout(timeout_ms))? else { return Ok(0) };
            if let Some(next) = wire(next) {
                break next;
            }
        };
        // SAFETY: the caller's promise.
        unsafe { put(event, next) }?;
        Ok(1)
    })
}

/// `None`: what only happens to those who use what C has no functions for.
fn wire(event: Event) -> Option<dmbridge_event> {
    let (kind, gid, code, token, info) = match event {
        Event::DmbUnregistered { token, owner } => {
            (DMBRIDGE_EVENT_DMB_UNREGISTERED, owner, 0, token.to_bits(), 0)
        }
        Event::DmbDetached { token, peer } => (DMBRIDGE_EVENT_DMB_DETACHED, peer, 0, token.to_bits(), 0),
        Event::DeviceGone { gid, reason } => (DMBRIDGE_EVENT_DEVICE_GONE, gid, reason as u32, 0, 0),
        Event::Software { from, code, info } => (DMBRIDGE_EVENT_SOFTWARE, from, code, 0, info),
        Event::DevicePaused { gid } => (DMBRIDGE_EVENT_DEVICE_PAUSED, gid, 0, 0, 0),
        Event::DeviceResumed { gid } => (DMBRIDGE_EVENT_DEVICE_RESUMED, gid, 0, 0, 0),
        Event::Rendezvous { .. } => return None,
    };
    Some(dmbridge_event { kind, code, gid: gid.into(), token, info })
}
