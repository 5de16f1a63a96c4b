//! Surviving memory that vanishes: a front-end may truncate the file behind its RAM while we read it.
//!
//! The kernel then raises SIGBUS at the access. The handler that is installed here puts zero pages in place of what is
//! gone, notes that it did, and lets the access go on; whoever accessed asks [`Guard::vanished`] afterwards and expels
//! the device. A SIGBUS at an address that nobody guards goes to whoever handled it before, and ends the process as it
//! would have without us.
//!
//! The handler may use only what a signal handler may: a table of atomics that is read without a lock, and `mmap`.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

/// Ranges in one block of the table. Blocks are never freed, so the handler can walk them at any time.
const BLOCK: usize = 256;

struct Slot {
    /// Odd while the slot is being changed. The handler skips a slot that is odd or that changed while it looked:
    /// nobody accesses a range whose slot is being written.
    sequence: AtomicUsize,
    /// 0 while the slot is free.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Size of the pages there.
    page: AtomicUsize,
    vanished: AtomicBool,
}

struct Block {
    slots: [Slot; BLOCK],
    next: AtomicPtr<Block>,
}

static HEAD: AtomicPtr<Block> = AtomicPtr::new(std::ptr::null_mut());
/// Slots that are free; the blocks behind them live for ever.
static FREE: Mutex<Vec<&'static Slot>> = Mutex::new(Vec::new());
static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

impl Block {
    fn grow(free: &mut Vec<&'static Slot>) {
        let block: &'static Block = Box::leak(Box::new(Block {
            slots: std::array::from_fn(|_| Slot {
                sequence: AtomicUsize::new(0),
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                page: AtomicUsize::new(0),
                vanished: AtomicBool::new(false),
            }),
            next: AtomicPtr::new(HEAD.load(Ordering::Relaxed)),
        }));
        free.extend(&block.slots);
        // Growing is serialised by the lock of the free list; the handler only reads.
        HEAD.store(std::ptr::from_ref(block).cast_mut(), Ordering::Release);
    }
}

/// A mapped range whose vanishing is survived. To be dropped before the range is unmapped.
#[derive(Debug)]
pub struct Guard {
    slot: &'static Slot,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed))
    }
}

impl Guard {
    /// Guards `len` bytes at `start`, which are mapped with pages of `page` bytes (a power of two), and stay so until
    /// the guard is dropped.
    pub fn new(start: *const u8, len: usize, page: usize) -> io::Result<Guard> {
        install()?;
        let mut free = FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if free.is_empty() {
            Block::grow(&mut free);
        }
        let slot = free.pop().ok_or(io::ErrorKind::OutOfMemory)?;
        slot.set(start.addr(), (start.addr() + len).next_multiple_of(page), page);
        Ok(Guard { slot })
    }

    /// Whether something in the range has vanished so far.
    pub fn vanished(&self) -> bool {
        self.slot.vanished.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.slot.set(0, 0, 1);
        FREE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(self.slot);
    }
}

impl Slot {
    fn set(&self, start: usize, end: usize, page: usize) {
        self.sequence.fetch_add(1, Ordering::AcqRel);
        self.start.store(start, Ordering::Release);
        self.end.store(end, Ordering::Release);
        self.page.store(page, Ordering::Release);
        self.vanished.store(false, Ordering::Release);
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// The page at `addr` and the end of the range, if it holds `addr`.
    fn holds(&self, addr: usize) -> Option<(usize, usize)> {
        let before = self.sequence.load(Ordering::Acquire);
        let (start, end) = (self.start.load(Ordering::Acquire), self.end.load(Ordering::Acquire));
        let page = self.page.load(Ordering::Acquire);
        let stable = before.is_multiple_of(2) && self.sequence.load(Ordering::Acquire) == before;
        (stable && start <= addr && addr < end).then(|| (addr & !(page - 1), end))
    }
}

/// Installs the handler, once for the process.
fn install() -> io::Result<()> {
    static RESULT: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = RESULT.get_or_init(|| {
        let error = || io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL);
        // SAFETY: sigaction with valid, zero-initialised structures that live through the calls.
        unsafe {
            let mut previous: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) != 0 {
                return Err(error());
            }
            // Known before the handler can run.
            let _ = PREVIOUS.set(previous);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            if libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0 {
                return Err(error());
            }
        }
        Ok(())
    });
    result.map_err(io::Error::from_raw_os_error)
}

extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid siginfo of a SIGBUS, which has an address.
    let addr = unsafe { (*info).si_addr() }.addr();
    // SAFETY: errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    let replaced = replace(addr);
    // SAFETY: as above; the interrupted code must not see ours.
    unsafe { *libc::__errno_location() = errno };
    if !replaced {
        pass_on(signal, info, context);
    }
}

/// Puts zero pages from `addr` to the end of the guarded range that holds it. False if there is none.
fn replace(addr: usize) -> bool {
    let mut block = HEAD.load(Ordering::Acquire);
    // SAFETY: blocks are leaked, so every pointer in the list is valid for ever.
    while let Some(b) = unsafe { block.as_ref() } {
        for slot in &b.slots {
            let Some((page, end)) = slot.holds(addr) else { continue };
            // SAFETY: the pages from `page` to `end` belong to the guarded range, which is mapped: whoever guards it
            // drops the guard first. Only these are replaced, by zero pages.
            let mapped = unsafe {
                libc::mmap(
                    std::ptr::without_provenance_mut(page),
                    end - page,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                    -1,
                    0,
                )
            };
            if mapped == libc::MAP_FAILED {
                return false;
            }
            slot.vanished.store(true, Ordering::Release);
            return true;
        }
        block = b.next.load(Ordering::Acquire);
    }
    false
}

/// What would have happened without this handler.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if let Some(previous) = PREVIOUS.get() {
        let handler = previous.sa_sigaction;
        if handler != libc::SIG_DFL && handler != libc::SIG_IGN {
            // SAFETY: the previous handler is a function of the type that its flags say.
            unsafe {
                if previous.sa_flags & libc::SA_SIGINFO != 0 {
                    let call: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                        std::mem::transmute(handler);
                    call(signal, info, context);
                } else {
                    let call: extern "C" fn(libc::c_int) = std::mem::transmute(handler);
                    call(signal);
                }
            }
            return;
        }
    }
    // SAFETY: resets the action; the access is tried again on return, faults again, and ends the process.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::{AsRawFd, FromRawFd};

    fn memfd(len: u64) -> File {
        // SAFETY: a valid name; the descriptor is ours alone.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(len).unwrap();
        file
    }

    fn map(file: &File, len: usize) -> *mut u8 {
        // SAFETY: a new shared mapping of a file that is that long.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(addr, libc::MAP_FAILED);
        addr.cast()
    }

    #[test]
    fn memory_that_vanishes_reads_as_zeroes_and_is_noticed() {
        let file = memfd(4 * 4096);
        let start = map(&file, 4 * 4096);
        let guard = Guard::new(start, 4 * 4096, 4096).unwrap();
        // SAFETY: mapped, and guarded against the truncation.
        unsafe {
            start.write_volatile(7);
            start.add(3 * 4096).write_volatile(9);
            assert!(!guard.vanished());
            file.set_len(4096).unwrap();
            assert_eq!(start.add(3 * 4096).read_volatile(), 0);
            assert!(guard.vanished());
            assert_eq!(start.read_volatile(), 7);
            // A store finds memory, too.
            start.add(4096).write_volatile(1);
            assert_eq!(start.add(4096).read_volatile(), 1);
        }
        drop(guard);
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(start.cast(), 4 * 4096) };
    }

    #[test]
    fn a_slot_is_used_again_with_a_clean_flag() {
        let file = memfd(4096);
        let start = map(&file, 4096);
        for _ in 0..2 * BLOCK {
            let guard = Guard::new(start, 4096, 4096).unwrap();
            assert!(!guard.vanished());
        }
        // SAFETY: mapped above, not used any more.
        unsafe { libc::munmap(start.cast(), 4096) };
    }
}
