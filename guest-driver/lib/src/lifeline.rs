//! A word in memory that the device can read, which says whether this process lives, however it ends (`docs/device.md`, 6.9).
//!
//! The kernel writes it: the word is a robust futex that the reactor's thread holds. When a thread ends, by SIGKILL or not,
//! the kernel marks all of them (`set_robust_list(2)`), and it does so before the process's files are closed, thus before
//! the VMM stops the device.

use crate::ram::DmaBuffer;
use crate::reactor::Reactor;
use crate::sync::lock;
use std::mem::offset_of;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

/// An element of the list that the kernel walks: its layout is the kernel's, but for where the word lies.
#[repr(C)]
struct Element {
    /// The next one, or the list's head after the last.
    next: AtomicPtr<Element>,
    /// Number of the thread that holds it.
    word: AtomicU32,
}

/// The kernel's `struct robust_list_head`.
#[repr(C)]
struct Head {
    list: AtomicPtr<Element>,
    word_offset: libc::c_long,
    pending: AtomicPtr<Element>,
}

/// All lifelines of a process.
pub(crate) struct Lifelines {
    /// Never moved nor freed: the kernel knows its address, for as long as the thread lives.
    head: &'static Head,
    /// Number of the thread whose end they tell.
    thread: AtomicU32,
    /// Addresses of the elements.
    elements: Mutex<Vec<*const Element>>,
}

// SAFETY: the pointers are to memory of lifelines, which are taken out before they go; all access is atomic.
unsafe impl Send for Lifelines {}
// SAFETY: as above.
unsafe impl Sync for Lifelines {}

impl Default for Lifelines {
    fn default() -> Lifelines {
        let head = Box::leak(Box::new(Head {
            list: AtomicPtr::new(null_mut()),
            word_offset: offset_of!(Element, word) as libc::c_long,
            pending: AtomicPtr::new(null_mut()),
        }));
        head.list.store(end(head), Ordering::Relaxed);
        Lifelines { head, thread: AtomicU32::new(0), elements: Mutex::default() }
    }
}

/// The end of the list is its head.
fn end(head: &'static Head) -> *mut Element {
    std::ptr::from_ref(head).cast_mut().cast()
}

impl Lifelines {
    /// They tell the end of the calling thread, which uses no robust mutex of the C library from now on.
    pub(crate) fn adopt(&self) {
        // SAFETY: the head is never freed, and the list in it always valid.
        let failed = unsafe {
            libc::syscall(libc::SYS_set_robust_list, std::ptr::from_ref(self.head), size_of::<Head>())
        };
        if failed != 0 {
            // Then the device takes every stop for the end of this process.
            tracing::debug!("no robust futexes: {}", std::io::Error::last_os_error());
            return;
        }
        self.thread.store(nix::unistd::gettid().as_raw() as u32, Ordering::Release);
    }

    /// Makes the list anew. Whenever the thread ends meanwhile, it finds a list that is whole.
    fn link(&self, elements: &[*const Element]) {
        let mut next = end(self.head);
        for element in elements {
            // SAFETY: elements are in the list as long as their memory is there.
            unsafe { &**element }.next.store(next, Ordering::Release);
            next = element.cast_mut();
        }
        self.head.list.store(next, Ordering::Release);
    }
}

/// One device's.
pub(crate) struct Lifeline {
    reactor: Arc<Reactor>,
    memory: DmaBuffer,
}

impl Lifeline {
    /// Bytes of memory that it takes, and their alignment.
    pub(crate) const SIZE: usize = 64;

    /// The process lives, as the device sees in this memory.
    pub(crate) fn new(reactor: Arc<Reactor>, memory: DmaBuffer) -> Lifeline {
        let lifeline = Lifeline { reactor, memory };
        let lifelines = lifeline.reactor.lifelines();
        lifeline.element().word.store(lifelines.thread.load(Ordering::Acquire), Ordering::Release);
        let mut elements = lock(&lifelines.elements);
        elements.push(lifeline.element());
        lifelines.link(&elements);
        drop(elements);
        lifeline
    }

    /// The device's address of the word.
    pub(crate) fn address(&self) -> u64 {
        self.memory.address() + offset_of!(Element, word) as u64
    }

    /// The device is not used any more.
    pub(crate) fn let_go(&self) {
        self.element().word.store(0, Ordering::Release);
    }

    fn element(&self) -> &Element {
        assert!(self.memory.memory().len() >= size_of::<Element>());
        let element = self.memory.memory().as_ptr().cast::<Element>();
        assert!(element.is_aligned());
        // SAFETY: aligned, as large, mapped as long as `self`; kernel and device access it too, so all of it is atomic.
        unsafe { &*element }
    }
}

impl Drop for Lifeline {
    fn drop(&mut self) {
        let lifelines = self.reactor.lifelines();
        let mut elements = lock(&lifelines.elements);
        elements.retain(|element| !std::ptr::eq(*element, self.element()));
        lifelines.link(&elements);
        self.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::lifeline::is_alive;
    use crate::ram::Ram;
    use nix::sys::signal::{Signal, kill};
    use nix::sys::wait::waitpid;
    use nix::unistd::{ForkResult, fork};

    #[test]
    fn a_process_that_is_killed_is_seen_to_be_dead() {
        let ram = Ram::default();
        let buffers = [(); 3].map(|()| ram.allocate(Lifeline::SIZE, Lifeline::SIZE, &|_| Ok(())).unwrap());
        let words = buffers.each_ref().map(|buffer| {
            let element = buffer.memory().as_ptr().cast::<Element>();
            // SAFETY: as in `element`; the memory is a file's, and both processes have it.
            move || unsafe { &*element }.word.load(Ordering::Acquire)
        });
        let (seen, tell) = std::io::pipe().unwrap();
        // SAFETY: the child of this test allocates and starts a thread, which works with the C library of Linux
        // systems, and ends by a signal.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                let reactor = Reactor::get().unwrap();
                let mut lifelines = buffers.map(|buffer| reactor.lifeline(buffer)).into_iter();
                drop(lifelines.next());
                let _ = std::io::Write::write(&mut &tell, &[1]);
                loop {
                    std::thread::park();
                }
            }
            ForkResult::Parent { child } => {
                std::io::Read::read_exact(&mut &seen, &mut [0]).unwrap();
                assert_eq!(words.each_ref().map(|word| is_alive(word())), [false, true, true]);
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
                assert_eq!(words.map(|word| is_alive(word())), [false; 3]);
            }
        }
    }
}
