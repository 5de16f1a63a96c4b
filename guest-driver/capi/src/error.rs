//! Errors: errno, and a sentence per thread. And the frame around every function: nothing unwinds into C.

use library::Error;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// What went wrong: an errno, and a sentence.
pub(crate) struct Failure {
    errno: c_int,
    sentence: String,
}

impl Failure {
    pub(crate) fn new(errno: c_int, sentence: impl Into<String>) -> Failure {
        Failure { errno, sentence: sentence.into() }
    }

    fn tell(self) {
        LAST.with(|last| {
            // A sentence has no zero byte in it; if it had, it would be no sentence.
            *last.borrow_mut() = CString::new(self.sentence).unwrap_or_default();
        });
        // SAFETY: errno is this thread's own.
        unsafe { *libc::__errno_location() = self.errno };
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { errno: errno(&error), sentence: error.to_string() }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        let sentence = error.to_string();
        let of_kind = match error.kind() {
            io::ErrorKind::WouldBlock => libc::EAGAIN,
            io::ErrorKind::TimedOut => libc::ETIMEDOUT,
            io::ErrorKind::ConnectionReset => libc::ECONNRESET,
            io::ErrorKind::BrokenPipe => libc::EPIPE,
            io::ErrorKind::InvalidData => libc::EPROTO,
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::NotConnected => libc::ENOTCONN,
            io::ErrorKind::AddrInUse => libc::EADDRINUSE,
            io::ErrorKind::Interrupted => libc::EINTR,
            _ => libc::EIO,
        };
        let own = error.raw_os_error();
        let inner = error.into_inner().and_then(|inner| inner.downcast::<Error>().ok());
        let errno = own.or(inner.map(|inner| errno(&inner))).unwrap_or(of_kind);
        Failure { errno, sentence }
    }
}

fn errno(error: &Error) -> c_int {
    if let Some(status) = error.status() {
        // They are Linux's numbers (docs/device.md, 6).
        return status as c_int;
    }
    match error {
        Error::Connect { error, .. } | Error::Os { error, .. } => error.raw_os_error().unwrap_or(libc::EIO),
        Error::PeerGone | Error::Disconnected | Error::Reset | Error::Protocol(_) => libc::ECONNRESET,
        Error::Closed => libc::EPIPE,
        Error::OutOfBounds(_) => libc::EINVAL,
        Error::Forked => libc::EPERM,
        Error::Config(_) | Error::Missing(_) | Error::Contract(_) | Error::Response(_) => libc::EPROTO,
        _ => libc::EIO,
    }
}

/// Runs a function of the library; tells C of its failure, and gives `failed`.
pub(crate) fn call<T>(failed: T, function: impl FnOnce() -> Result<T, Failure>) -> T {
    // What a panic leaves behind is consistent: the library's own locks see to that.
    match catch_unwind(AssertUnwindSafe(function)) {
        Ok(Ok(value)) => value,
        Ok(Err(failure)) => {
            failure.tell();
            failed
        }
        Err(_) => {
            Failure::new(libc::ENOTRECOVERABLE, "the library has a mistake; what it printed says where")
                .tell();
            failed
        }
    }
}

/// As [`call`], for functions that return 0 or -1.
pub(crate) fn status(function: impl FnOnce() -> Result<(), Failure>) -> c_int {
    call(-1, || function().map(|()| 0))
}

/// As [`call`], for functions that return a new object.
pub(crate) fn object<T>(function: impl FnOnce() -> Result<T, Failure>) -> *mut T {
    call(std::ptr::null_mut(), || function().map(|value| Box::into_raw(Box::new(value))))
}

fn null() -> Failure {
    Failure::new(libc::EINVAL, "an argument is NULL")
}

/// The object at a pointer.
///
/// # Safety
///
/// `pointer` is null or a live object of this type.
pub(crate) unsafe fn at<'a, T>(pointer: *const T) -> Result<&'a T, Failure> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }.ok_or_else(null)
}

/// Where a result goes.
///
/// # Safety
///
/// `pointer` is null, or points to writable memory for a `T` that nobody else uses meanwhile.
pub(crate) unsafe fn put<T>(pointer: *mut T, value: T) -> Result<(), Failure> {
    if pointer.is_null() {
        return Err(null());
    }
    // SAFETY: the caller's promise.
    unsafe { pointer.write(value) };
    Ok(())
}

/// Bytes to read.
///
/// # Safety
///
/// As for [`many`].
pub(crate) unsafe fn bytes<'a>(pointer: *const u8, len: usize) -> Result<&'a [u8], Failure> {
    // SAFETY: the caller's promise.
    unsafe { many(pointer, len) }
}

/// Values to read.
///
/// # Safety
///
/// `len` values at `pointer` are readable and do not change meanwhile; `pointer` may be null if `len` is 0.
pub(crate) unsafe fn many<'a, T>(pointer: *const T, len: usize) -> Result<&'a [T], Failure> {
    match pointer.is_null() {
        true if len == 0 => Ok(&[]),
        true => Err(null()),
        // SAFETY: the caller's promise.
        false => Ok(unsafe { std::slice::from_raw_parts(pointer, len) }),
    }
}

/// Bytes to fill.
///
/// # Safety
///
/// `len` bytes at `pointer` are writable and nobody else uses them meanwhile; `pointer` may be null if `len` is 0.
pub(crate) unsafe fn bytes_mut<'a>(pointer: *mut u8, len: usize) -> Result<&'a mut [u8], Failure> {
    match pointer.is_null() {
        true if len == 0 => Ok(&mut []),
        true => Err(null()),
        // SAFETY: the caller's promise. C may hand over memory that was never written; it is written here, not read.
        false => Ok(unsafe { std::slice::from_raw_parts_mut(pointer, len) }),
    }
}

/// A text.
///
/// # Safety
///
/// `pointer` is null or a string that ends with a zero byte and does not change meanwhile.
pub(crate) unsafe fn text<'a>(pointer: *const c_char) -> Result<&'a str, Failure> {
    if pointer.is_null() {
        return Err(null());
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map_err(|_| Failure::new(libc::EINVAL, "a text is not UTF-8"))
}

/// Frees an object.
///
/// # Safety
///
/// `pointer` is null or an object of this type that this library made, and that nobody uses any more.
pub(crate) unsafe fn free<T>(pointer: *mut T) {
    if !pointer.is_null() {
        // SAFETY: the caller's promise.
        let object = unsafe { Box::from_raw(pointer) };
        // What it does on the way out shall not unwind into C either.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(object)));
    }
}

/// A sentence about the last failure of a function of this library in this thread; "" if there was none. Valid until the
/// thread's next failure.
#[unsafe(no_mangle)]
pub extern "C" fn dmbridge_error() -> *const c_char {
    LAST.with(|last| last.borrow().as_ptr())
}
