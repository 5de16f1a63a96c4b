//! DMBs at the owner, at the peer that maps, and at the peer that moves.

use crate::device::{dmbridge_device, dmbridge_gid, timeout};
use crate::error::{at, bytes, bytes_mut, call, free, object, put, status};
use library::{Dmb, Mover, RemoteDmb, Token};
use std::ffi::{c_int, c_void};
use std::os::fd::AsRawFd;

/// A DMB that this process owns: the peer writes, this process reads.
pub struct dmbridge_dmb {
    dmb: Dmb,
}

/// A DMB that this process has attached: this process writes, the owner reads.
pub struct dmbridge_remote_dmb {
    dmb: RemoteDmb,
}

/// A way to have the device copy into a DMB, where it cannot be attached.
pub struct dmbridge_mover {
    mover: Mover,
}

/// Registers a DMB of `size` bytes, a multiple of 4096, that the device `peer` may write. Its memory is zero.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_register(
    device: *const dmbridge_device,
    peer: dmbridge_gid,
    size: usize,
) -> *mut dmbridge_dmb {
    // SAFETY: the caller's promise.
    object(|| Ok(dmbridge_dmb { dmb: unsafe { at(device) }?.device.register(peer.into(), size)? }))
}

/// Unregisters a DMB.
///
/// # Safety
///
/// `dmb` is NULL or a DMB that nobody uses any more, nor its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_free(dmb: *mut dmbridge_dmb) {
    // SAFETY: the caller's promise.
    unsafe { free(dmb) }
}

/// The DMB's name, to be told to the peer; 0, with errno, on failure.
///
/// # Safety
///
/// `dmb` is a DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_token(dmb: *const dmbridge_dmb) -> u64 {
    // SAFETY: the caller's promise.
    call(0, || Ok(unsafe { at(dmb) }?.dmb.token().to_bits()))
}

/// The DMB's memory, of the size that was registered. The peer changes it at any time: read each value once, by volatile or atomic
/// accesses, check it, and use what was checked.
///
/// # Safety
///
/// `dmb` is a DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_memory(dmb: *const dmbridge_dmb) -> *mut c_void {
    // SAFETY: the caller's promise.
    call(std::ptr::null_mut(), || Ok(unsafe { at(dmb) }?.dmb.memory().as_ptr().cast()))
}

/// Copies `len` bytes from the DMB, from `offset` on.
///
/// # Safety
///
/// `dmb` is a DMB; `to` has room for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_read(
    dmb: *const dmbridge_dmb,
    offset: usize,
    to: *mut u8,
    len: usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let (dmb, to) = unsafe { (at(dmb)?, bytes_mut(to, len)?) };
        Ok(dmb.dmb.memory().read(offset, to).map_err(library::Error::from)?)
    })
}

/// Waits up to `timeout_ms` (negative: for ever) until the peer signals, and takes the bits into `bits`, 0 if it did not in time.
/// What the peer wrote before is there. ECONNRESET: the peer is gone and no signal is left.
///
/// # Safety
///
/// `dmb` is a DMB, `bits` a place for the result.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_wait(
    dmb: *const dmbridge_dmb,
    timeout_ms: c_int,
    bits: *mut u64,
) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let taken = unsafe { at(dmb) }?.dmb.wait(timeout(timeout_ms))?;
        // SAFETY: the caller's promise.
        unsafe { put(bits, taken) }
    })
}

/// For poll() and the like: asks that the descriptor of dmbridge_dmb_fd() become readable at the next signal. Look again after this,
/// by dmbridge_dmb_wait() with a timeout of 0, before you wait. Once per call.
///
/// # Safety
///
/// `dmb` is a DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_arm(dmb: *const dmbridge_dmb) -> c_int {
    // SAFETY: the caller's promise.
    status(|| Ok(unsafe { at(dmb) }?.dmb.arm()?))
}

/// The descriptor for dmbridge_dmb_arm(). It belongs to the DMB; watch it for reading only.
///
/// # Safety
///
/// `dmb` is a DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_dmb_fd(dmb: *const dmbridge_dmb) -> c_int {
    // SAFETY: the caller's promise.
    call(-1, || Ok(unsafe { at(dmb) }?.dmb.as_fd()?.as_raw_fd()))
}

/// Attaches a DMB whose peer this device is. EOPNOTSUPP: a mover is the way.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_attach(
    device: *const dmbridge_device,
    token: u64,
) -> *mut dmbridge_remote_dmb {
    object(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { at(device) }?;
        Ok(dmbridge_remote_dmb { dmb: device.device.attach(Token::from_bits(token))? })
    })
}

/// Detaches a DMB.
///
/// # Safety
///
/// `dmb` is NULL or an attached DMB that nobody uses any more, nor its memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_remote_dmb_free(dmb: *mut dmbridge_remote_dmb) {
    // SAFETY: the caller's promise.
    unsafe { free(dmb) }
}

/// The DMB's size in bytes; 0, with errno, on failure.
///
/// # Safety
///
/// `dmb` is an attached DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_remote_dmb_size(dmb: *const dmbridge_remote_dmb) -> usize {
    // SAFETY: the caller's promise.
    call(0, || Ok(unsafe { at(dmb) }?.dmb.size()))
}

/// The DMB's memory: what is stored here is what the owner reads.
///
/// # Safety
///
/// `dmb` is an attached DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_remote_dmb_memory(dmb: *const dmbridge_remote_dmb) -> *mut c_void {
    // SAFETY: the caller's promise.
    call(std::ptr::null_mut(), || Ok(unsafe { at(dmb) }?.dmb.memory().as_ptr().cast()))
}

/// Copies `len` bytes into the DMB, from `offset` on, the fastest way that this host has. Does not tell the owner.
///
/// # Safety
///
/// `dmb` is an attached DMB; `len` bytes are readable at `from`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_remote_dmb_write(
    dmb: *const dmbridge_remote_dmb,
    offset: usize,
    from: *const u8,
    len: usize,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| Ok(unsafe { at(dmb)?.dmb.write(offset, bytes(from, len)?) }?))
}

/// Sets bits in the owner's mask, and wakes the owner if it sleeps. What was stored before is visible before.
///
/// # Safety
///
/// `dmb` is an attached DMB.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_remote_dmb_signal(dmb: *const dmbridge_remote_dmb, bits: u64) -> c_int {
    // SAFETY: the caller's promise.
    status(|| Ok(unsafe { at(dmb) }?.dmb.signal(bits)?))
}

/// A mover into a DMB whose peer this device is.
///
/// # Safety
///
/// `device` is a device.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_mover_open(
    device: *const dmbridge_device,
    token: u64,
) -> *mut dmbridge_mover {
    object(|| {
        // SAFETY: the caller's promise.
        let device = unsafe { at(device) }?;
        Ok(dmbridge_mover { mover: device.device.mover(Token::from_bits(token))? })
    })
}

/// Lets go of a mover.
///
/// # Safety
///
/// `mover` is NULL or a mover that nobody uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_mover_free(mover: *mut dmbridge_mover) {
    // SAFETY: the caller's promise.
    unsafe { free(mover) }
}

/// Has the device copy `len` bytes into the DMB, from `offset` on, and then set `bits` in the owner's mask, if there are any, and wake it.
/// Returns when that is done.
///
/// # Safety
///
/// `mover` is a mover; `len` bytes are readable at `from`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmbridge_move(
    mover: *const dmbridge_mover,
    offset: u64,
    from: *const u8,
    len: usize,
    bits: u64,
) -> c_int {
    status(|| {
        // SAFETY: the caller's promise.
        let (mover, from) = unsafe { (at(mover)?, bytes(from, len)?) };
        let ticket = mover.mover.post(offset, from, (bits != 0).then_some(bits))?;
        mover.mover.wait(ticket, None)?;
        Ok(())
    })
}
