//! Waiting on an epoll instance: first for what lies in memory, then in the kernel.

use super::*;

/// The program's array, filled from its start.
pub(super) struct Out {
    events: *mut epoll_event,
    most: usize,
    count: usize,
    /// Where the kernel put what is being translated.
    from: usize,
}

impl Out {
    pub(super) fn is_full(&self) -> bool {
        self.count == self.most
    }

    pub(super) fn raw(&self, i: usize) -> epoll_event {
        // SAFETY: below `most`, which the program promised.
        unsafe { *self.events.add(self.from + i) }
    }

    pub(super) fn put(&mut self, events: u32, data: u64) {
        // SAFETY: below `most`; never beyond what was read already.
        unsafe { *self.events.add(self.count) = epoll_event { events, u64: data } };
        self.count += 1;
    }

    /// One event for each registration, as from the kernel.
    pub(super) fn merge(&mut self, events: u32, data: u64) {
        for i in 0..self.from.min(self.count) {
            // SAFETY: below `count`.
            let there = unsafe { &mut *self.events.add(i) };
            if there.u64 == data {
                there.events |= events;
                return;
            }
        }
        self.put(events, data);
    }

    pub(super) fn end(&mut self) {
        self.from = self.count;
    }
}

/// When a wait ends: at once, at some time, never.
#[derive(Clone, Copy)]
pub enum Until {
    Now,
    Then(Instant),
    Ever,
}

impl Until {
    pub fn from_ms(ms: c_int) -> Until {
        match ms {
            0 => Until::Now,
            1.. => Until::Then(Instant::now() + Duration::from_millis(ms as u64)),
            _ => Until::Ever,
        }
    }

    /// # Safety
    ///
    /// Null or a timespec.
    pub unsafe fn from_timespec(time: *const timespec) -> Until {
        if time.is_null() {
            return Until::Ever;
        }
        // SAFETY: the caller's promise.
        let time = unsafe { &*time };
        if time.tv_sec == 0 && time.tv_nsec == 0 {
            return Until::Now;
        }
        let left = Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32);
        Instant::now().checked_add(left).map_or(Until::Ever, Until::Then)
    }

    pub fn deadline(self) -> Option<Instant> {
        match self {
            Until::Then(at) => Some(at),
            _ => None,
        }
    }

    pub fn left(self) -> Option<Duration> {
        match self {
            Until::Now => Some(Duration::ZERO),
            Until::Then(at) => Some(at.saturating_duration_since(Instant::now())),
            Until::Ever => None,
        }
    }

    /// The same, but not after `longest`.
    pub fn at_most(self, longest: Duration) -> Until {
        match self.left() {
            Some(left) if left <= longest => self,
            _ => Until::Then(Instant::now() + longest),
        }
    }

    /// For the kernel, rounded up so that no wait ends early.
    pub fn ms(self) -> c_int {
        self.left()
            .map_or(-1, |left| c_int::try_from(left.as_nanos().div_ceil(1_000_000)).unwrap_or(c_int::MAX))
    }

    pub fn is_over(self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }
}

/// The wait. `kernel` is the program's call, to where, at most how many, until when.
fn wait(
    epoll: c_int,
    events: *mut epoll_event,
    most: c_int,
    until: Until,
    kernel: &dyn Fn(*mut epoll_event, c_int, Until) -> c_int,
) -> c_int {
    let Some(entry) = table::get(epoll) else { return kernel(events, most, until) };
    let Ok(room @ 1..) = usize::try_from(most) else { return kernel(events, most, until) };
    let mut to = Out { events, most: room, count: 0, from: 0 };
    loop {
        let set = match entry.set() {
            Some(set) if set.needs_us() => set,
            _ => {
                let count = kernel(events, most, until);
                match entry.set() {
                    Some(set) if count > 0 && set.has_moved() => {
                        set.translate(&mut to, count as usize);
                        if to.count != 0 || until.is_over() {
                            return to.count as c_int;
                        }
                        continue;
                    }
                    _ => return count,
                }
            }
        };
        let ask = |to: &mut Out, until: Until| {
            set.prepare_nested(NESTS);
            // SAFETY: behind what was put, which is below `most`.
            let count = kernel(unsafe { events.add(to.count) }, (room - to.count) as c_int, until);
            if count > 0 {
                to.from = to.count;
                set.translate(to, count as usize);
            } else {
                set.busy.store(false, Ordering::Relaxed);
            }
            count
        };
        set.collect(&mut to);
        if to.count != 0 {
            let turn = set.turn.fetch_add(1, Ordering::Relaxed) % TURNS == 0;
            if !to.is_full() && (turn || set.watched.load(Ordering::Relaxed)) {
                errno::keep(|| ask(&mut to, Until::Now));
            }
            return to.count as c_int;
        }
        // If the kernel has much to say, it comes before a wait for what it does not know.
        if set.busy.load(Ordering::Relaxed) || matches!(until, Until::Now) {
            let count = ask(&mut to, Until::Now);
            if count < 0 {
                return count;
            }
            if to.count != 0 || matches!(until, Until::Now) {
                return to.count as c_int;
            }
        }
        let start = if set.with_hot(|hot| hot.is_empty()) {
            None
        } else {
            match crowd::spin(set.spinner(), until.deadline(), || set.any_ready(), || false) {
                Ok(()) => continue,
                Err(start) => start,
            }
        };
        set.sleepers.fetch_add(1, Ordering::SeqCst);
        let asleep = Instant::now();
        let quiet = set.arm();
        let count = if quiet { ask(&mut to, until) } else { 0 };
        let alone = set.sleepers.fetch_sub(1, Ordering::SeqCst) == 1;
        if count == 0 && alone && asleep.elapsed() >= SILENCE {
            set.cool();
        } else {
            set.disarm();
        }
        crowd::slept(set.spinner(), start);
        if count < 0 {
            return count;
        }
        if to.count != 0 || (quiet && until.is_over()) {
            return to.count as c_int;
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn epoll_wait(
    epoll: c_int,
    events: *mut epoll_event,
    most: c_int,
    timeout: c_int,
) -> c_int {
    // SAFETY: the program's array, or a part of it.
    wait(epoll, events, most, Until::from_ms(timeout), &|at, most, until| unsafe {
        real::epoll_wait(epoll, at, most, until.ms())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn epoll_pwait(
    epoll: c_int,
    events: *mut epoll_event,
    most: c_int,
    timeout: c_int,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the program's array, or a part of it.
    wait(epoll, events, most, Until::from_ms(timeout), &|at, most, until| unsafe {
        real::epoll_pwait(epoll, at, most, until.ms(), mask)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn epoll_pwait2(
    epoll: c_int,
    events: *mut epoll_event,
    most: c_int,
    timeout: *const timespec,
    mask: *const sigset_t,
) -> c_int {
    // SAFETY: the program's array and timeout.
    unsafe {
        wait(epoll, events, most, Until::from_timespec(timeout), &|at, most, until| {
            let left = until
                .left()
                .map(|left| timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            real::epoll_pwait2(epoll, at, most, left.as_ref().map_or(null(), |left| left), mask)
        })
    }
}
