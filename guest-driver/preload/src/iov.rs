//! The program's buffers, one or many, from where they are now.

use crate::errno::Outcome;
use libc::{iovec, msghdr};
use std::ptr::null_mut;

/// `iovec`s at most, as in the kernel.
const MOST: usize = 1024;

/// Where a walk through buffers is.
#[derive(Clone, Copy)]
struct Walk<'a> {
    all: &'a [iovec],
    /// Bytes of the first that are done.
    at: usize,
    left: usize,
}

impl<'a> Walk<'a> {
    fn new(all: &'a [iovec]) -> Walk<'a> {
        Walk { all, at: 0, left: all.iter().map(|v| v.iov_len).sum() }
    }

    /// The next `len` bytes, piece by piece: address and length.
    #[inline]
    fn step(&mut self, mut len: usize, mut each: impl FnMut(*mut u8, usize)) {
        while len != 0 {
            let Some(first) = self.all.first() else { return };
            let now = len.min(first.iov_len - self.at);
            if now != 0 {
                // The program promised that there are `iov_len` bytes.
                each(first.iov_base.cast::<u8>().wrapping_add(self.at), now);
            }
            self.at += now;
            self.left -= now;
            len -= now;
            if self.at == first.iov_len {
                self.all = &self.all[1..];
                self.at = 0;
            }
        }
    }
}

impl Walk<'_> {
    /// Hands at most `most` of what is left to a call of the kernel, without going on.
    fn call(mut self, most: usize, call: impl FnOnce(*mut msghdr) -> Outcome) -> Outcome {
        let mut pieces = [const { iovec { iov_base: null_mut(), iov_len: 0 } }; 16];
        let mut count = 0;
        self.step(most.min(self.left), |at, len| {
            if count < pieces.len() {
                pieces[count] = iovec { iov_base: at.cast(), iov_len: len };
                count += 1;
            }
        });
        // SAFETY: all-zero bytes are a msghdr.
        let mut message: msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = count as _;
        call(&mut message)
    }
}

/// What a program sends.
pub struct Reader<'a>(Walk<'a>);

/// Where a program receives.
pub struct Writer<'a>(Walk<'a>);

/// One buffer as a list of buffers.
pub fn one(base: *const libc::c_void, len: usize) -> [iovec; 1] {
    [iovec { iov_base: base.cast_mut(), iov_len: len }]
}

/// The list that a program gave. `None`: not one that the kernel would take.
///
/// # Safety
///
/// `count` of them lie at `list`.
pub unsafe fn list<'a>(list: *const iovec, count: usize) -> Option<&'a [iovec]> {
    if count == 0 {
        return Some(&[]);
    }
    if count > MOST || list.is_null() {
        return None;
    }
    // SAFETY: the caller's promise.
    let all = unsafe { std::slice::from_raw_parts(list, count) };
    let sum = all.iter().try_fold(0usize, |sum, v| sum.checked_add(v.iov_len))?;
    isize::try_from(sum).ok().map(|_| all)
}

impl<'a> Reader<'a> {
    pub fn new(all: &'a [iovec]) -> Reader<'a> {
        Reader(Walk::new(all))
    }

    pub fn left(&self) -> usize {
        self.0.left
    }

    /// Hands the next `len` bytes to `copy`: from where, to which offset, how many.
    ///
    /// # Safety
    ///
    /// The buffers are the program's, and readable.
    #[inline]
    pub unsafe fn copy_to(&mut self, len: usize, copy: impl Fn(*const u8, usize, usize)) {
        let mut at = 0;
        self.0.step(len, |from, len| {
            copy(from, at, len);
            at += len;
        });
    }
}

impl Reader<'_> {
    /// Has a call of the kernel send of what is left, without going on.
    pub fn call(&self, call: impl FnOnce(*mut msghdr) -> Outcome) -> Outcome {
        self.0.call(usize::MAX, call)
    }

    /// The next `len` bytes were sent.
    pub fn skip(&mut self, len: usize) {
        self.0.step(len, |_, _| {});
    }
}

impl<'a> Writer<'a> {
    pub fn new(all: &'a [iovec]) -> Writer<'a> {
        Writer(Walk::new(all))
    }

    pub fn left(&self) -> usize {
        self.0.left
    }

    /// The next `len` bytes were filled, or are not wanted.
    pub fn skip(&mut self, len: usize) {
        self.0.step(len, |_, _| {});
    }

    /// Has the next `len` bytes filled by `copy`: to where, from which offset, how many.
    ///
    /// # Safety
    ///
    /// The buffers are the program's, and writable.
    #[inline]
    pub unsafe fn copy_from(&mut self, len: usize, copy: impl Fn(*mut u8, usize, usize)) {
        let mut at = 0;
        self.0.step(len, |to, len| {
            copy(to, at, len);
            at += len;
        });
    }

    /// Has a call of the kernel fill at most `most` of what is left, without going on.
    pub fn call(&self, most: usize, call: impl FnOnce(*mut msghdr) -> Outcome) -> Outcome {
        self.0.call(most, call)
    }
}
