//! Copy engines: what moves bytes, behind one small seam. Not what may be moved where; that was checked before.
//!
//! An [`Engine`] takes batches of [`Run`]s and works on them while its caller does something else, until it is asked
//! whether it is done. Whatever does it, an aligned 8-byte word of the destination is never torn, and what was copied is
//! visible before whatever the caller writes, with release order, after the engine said that it is done. So a signal that
//! is set then is never seen before the last byte; and who holds the memory until then can give it away afterwards.
//!
//! | module | subject |
//! | --- | --- |
//! | [`cpu`] | the thread that asks copies by itself |
//! | [`cpu_node`] | workers of a NUMA node copy, each a share |
//! | [`dsa`] | Intel's Data Streaming Accelerator copies |
//! | [`calibrate`], [`cache`] | how fast each is here, by size and by node |
//! | [`table`] | which one is used, by size and by node |
//! | `trial` | whether it is still the best |
//! | [`set`] | the engines of a daemon, and of one of its movers |
//!
//! There is no engine for memory that the daemon has not mapped (`process_vm_writev`): whoever moves is a front-end, and a
//! front-end's memory is mapped. Between two processes' private buffers the library copies by itself (`dmbridge::message`).

pub mod cache;
pub mod calibrate;
pub mod cpu;
pub mod cpu_node;
pub mod dsa;
mod ranges;
pub mod set;
pub mod table;
mod trial;

/// The most bytes that an engine is given before it is waited for: so long is what they lie in held.
pub const STEP: usize = 1 << 20;

/// Bytes that are in one piece at both ends.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    /// Where they are.
    pub src: *const u8,
    /// Where they go.
    pub dst: *mut u8,
    /// How many.
    pub len: usize,
}

// SAFETY: two addresses and a number. Whoever follows the addresses promises that it may (`Engine::submit`).
unsafe impl Send for Run {}
// SAFETY: as above.
unsafe impl Sync for Run {}

/// Something that copies.
///
/// An engine is one mover's own: it does what it was given in no particular order, and is done when all of it is.
pub trait Engine: Send {
    /// Starts to copy. What was submitted before need not be done.
    ///
    /// # Safety
    ///
    /// Until [`poll`](Self::poll) returns true, the runs' bytes are mapped, readable and writable. Guests may access both
    /// ends meanwhile, and no Rust reference to either exists. The runs' destinations do not overlap each other.
    unsafe fn submit(&mut self, runs: &[Run]);

    /// Whether everything that was submitted is copied. It may do a part of the work itself, and never sleeps.
    fn poll(&mut self) -> bool;

    /// Waits until [`poll`](Self::poll) says yes.
    fn finish(&mut self) {
        while !self.poll() {
            std::hint::spin_loop();
        }
    }
}
