//! The CPU that serves the move queue copies by itself.

use super::{Engine, Run};
use dmbridge_proto::shm::CopyPlan;
use std::sync::atomic::{Ordering, fence};

/// Copies in the way that was measured to be the fastest for the size.
#[derive(Debug, Clone, Copy)]
pub struct CpuEngine {
    plan: CopyPlan,
}

impl CpuEngine {
    /// An engine that follows this plan.
    pub fn new(plan: CopyPlan) -> CpuEngine {
        CpuEngine { plan }
    }

    /// The plan.
    pub fn plan(&self) -> CopyPlan {
        self.plan
    }

    /// Copies `len` bytes, now.
    ///
    /// # Safety
    ///
    /// `len` bytes are mapped readable at `src` and writable at `dst`, and stay so; guests may access both meanwhile,
    /// and no Rust reference to either exists.
    #[inline]
    pub unsafe fn copy(&self, src: *const u8, dst: *mut u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.plan.copy_to_shared(src, dst, len) };
        fence(Ordering::Release);
    }
}

impl Engine for CpuEngine {
    #[inline]
    unsafe fn submit(&mut self, runs: &[Run]) {
        for run in runs {
            // SAFETY: the caller's promise.
            unsafe { self.copy(run.src, run.dst, run.len) };
        }
    }

    fn poll(&mut self) -> bool {
        true
    }
}
