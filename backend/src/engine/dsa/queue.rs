//! A work queue of an accelerator: where descriptors go in.

use super::descriptor::Descriptor;
use std::fmt;

/// What a queue takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes of a descriptor.
    pub max_transfer: u32,
    /// The most descriptors of a batch; below 2 there are no batches.
    pub max_batch: u32,
}

/// Why a descriptor was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotTaken {
    /// The queue is full now.
    Busy,
    /// There is no queue any more.
    Lost,
}

/// A work queue.
pub trait WorkQueue: fmt::Debug + Send + Sync {
    /// What it takes.
    fn limits(&self) -> Limits;

    /// Hands over a descriptor. It is worked on until its completion record is written, or [`abandon`](Self::abandon)
    /// returns.
    ///
    /// # Safety
    ///
    /// Until then, all memory that the descriptor names is there, also the list of a batch and what that names, and the
    /// completion records of all of it are zero and used for nothing else.
    unsafe fn submit(&self, descriptor: &Descriptor) -> Result<(), NotTaken>;

    /// A descriptor that was submitted is completed, and was seen to be.
    fn completed(&self);

    /// Gives the queue up: nothing is worked on any more when this returns, and nothing is taken.
    fn abandon(&self);
}
