//! The event file descriptors of a ring: a front-end chose them, so they are checked before they are used.
//!
//! A kick descriptor is never read: it is watched edge-triggered, and each write to it is an edge.
//!
//! A call or error descriptor has to be an eventfd. Adding to one must not block, and neither its flags nor its counter
//! are ours alone: a front-end that fills the counter and clears `O_NONBLOCK` at the right moment would stop a thread that
//! writes. So the kernel is asked to add: it signals an eventfd when an asynchronous read of no bytes of `/dev/null` ends,
//! which it does at once, and that way never waits. It takes 0.2 µs longer than a write. Where a sandbox forbids
//! asynchronous I/O, the descriptor is written after all, and the daemon says so.

use crate::keep;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;

/// An eventfd of a front-end.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    number: u64,
}

impl EventFile {
    /// Takes what the front-end sent, if it is an eventfd.
    pub fn new(file: File) -> io::Result<EventFile> {
        EventFile::numbered(file, keep::number())
    }

    /// The one that a keeper has under this number.
    pub fn numbered(file: File, number: u64) -> io::Result<EventFile> {
        let link = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        if !link.as_os_str().as_encoded_bytes().starts_with(b"anon_inode:[eventfd]") {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the descriptor is not an eventfd"));
        }
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(EventFile { file, number })
    }

    /// The number under which a keeper has it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Adds 1, without waiting. A counter that is full says enough.
    pub fn signal(&self) {
        thread_local! {
            static SIGNALLER: RefCell<Option<Signaller>> = RefCell::new(Signaller::new());
        }
        let signalled = SIGNALLER.try_with(|signaller| match &mut *signaller.borrow_mut() {
            Some(signaller) => signaller.signal(&self.file),
            None => false,
        });
        if !signalled.unwrap_or(false) {
            let _ = (&self.file).write(&1u64.to_ne_bytes());
        }
    }
}

/// What the asynchronous reads read from; opened once, at the daemon's start.
static NULL: OnceLock<Option<File>> = OnceLock::new();

/// Opens what notifications need, so that none of them has to.
pub fn prepare() {
    NULL.get_or_init(|| File::open("/dev/null").ok());
}

/// Reads that may be under way at a time; each ends before the call that starts it does.
const READS: u32 = 32;

/// Makes the kernel add to eventfds. One per thread.
struct Signaller {
    context: libc::c_ulong,
    null: &'static File,
    /// Reads that have ended and were not collected.
    ended: u32,
}

/// `struct iocb` of `linux/aio_abi.h`; the second word is two, in an order that depends on the machine, and both 0 here.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key_and_rw_flags: u64,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event_fd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct IoEvent([u64; 4]);

const _: () = assert!(size_of::<Iocb>() == 64 && size_of::<IoEvent>() == 32);

impl Signaller {
    const READ: u16 = 0;
    const SIGNAL_EVENT_FD: u32 = 1;

    fn new() -> Option<Signaller> {
        prepare();
        let null = NULL.get()?.as_ref()?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word to a variable of that size, which was zero as it wants it.
        if unsafe { libc::syscall(libc::SYS_io_setup, READS, &raw mut context) } != 0 {
            let error = io::Error::last_os_error();
            tracing::warn!("asynchronous I/O is not possible here ({error}): a front-end could delay others");
            return None;
        }
        Some(Signaller { context, null, ended: 0 })
    }

    /// False if the kernel refuses.
    fn signal(&mut self, event: &File) -> bool {
        if self.ended == READS {
            self.collect();
        }
        let mut read = Iocb {
            opcode: Signaller::READ,
            fd: self.null.as_raw_fd() as u32,
            flags: Signaller::SIGNAL_EVENT_FD,
            event_fd: event.as_raw_fd() as u32,
            ..Iocb::default()
        };
        let mut list = [&raw mut read];
        // SAFETY: one request, which the kernel copies; it reads no bytes, so no buffer has to outlive it.
        let submitted =
            unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1, list.as_mut_ptr()) } == 1;
        self.ended += u32::from(submitted);
        submitted
    }

    fn collect(&mut self) {
        let mut events = [IoEvent::default(); READS as usize];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the kernel writes at most that many events, and reads a time that says not to wait.
        unsafe {
            libc::syscall(libc::SYS_io_getevents, self.context, 0, READS, events.as_mut_ptr(), &raw const now)
        };
        self.ended = 0;
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // SAFETY: the context is ours, and nothing uses it afterwards.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

impl AsRawFd for EventFile {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for EventFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use std::os::fd::AsFd;

    #[test]
    fn only_an_eventfd_is_taken() {
        assert!(EventFile::new(File::open("/dev/null").unwrap()).is_err());
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert!(EventFile::new(pipe.into()).is_err());
    }

    fn eventfd() -> (EventFd, EventFile) {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK).unwrap();
        let copy = event.as_fd().try_clone_to_owned().unwrap();
        let file = EventFile::new(copy.into()).unwrap();
        (event, file)
    }

    #[test]
    fn each_signal_counts() {
        let (event, file) = eventfd();
        for _ in 0..10 * READS {
            file.signal();
        }
        assert_eq!(event.read().unwrap(), u64::from(10 * READS));
    }

    #[test]
    fn a_full_counter_that_would_block_a_writer_does_not_block() {
        let (event, file) = eventfd();
        event.write(u64::MAX - 1).unwrap();
        fcntl(&event, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        for _ in 0..10 * READS {
            file.signal();
        }
    }
}
