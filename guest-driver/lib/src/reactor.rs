//! One thread for all devices of the process: it waits for what devices say without being asked (map requests,
//! events, the end), so that no user of the library has to. It runs no code of users, and waits for nothing but its
//! epoll instance.
//!
//! It starts with the first device and stays: a process that used one device is likely to use another.

use crate::error::Error;
use crate::fork::Process;
use crate::lifeline::{Lifeline, Lifelines};
use crate::ram::DmaBuffer;
use crate::sync::lock;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::collections::{BTreeSet, HashMap};
use std::os::fd::BorrowedFd;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

/// Somebody who has descriptors watched.
pub(crate) trait Source: Send + Sync {
    /// One of the descriptors became readable or was hung up. Called on the reactor's thread; must not block.
    fn ready(&self, what: u8);
}

/// The thread and what it watches.
pub(crate) struct Reactor {
    epoll: Epoll,
    lifelines: Lifelines,
    sources: Mutex<Sources>,
}

#[derive(Default)]
struct Sources {
    last: u64,
    /// By number. A number is never used again, so an event that comes late meets nobody.
    all: HashMap<u64, Weak<dyn Source>>,
    /// When to call whom, and with what.
    alarms: BTreeSet<(Instant, u64, u8)>,
}

/// What a source wants to know of a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interest {
    /// That there is something to read.
    Readable,
    /// That the other end has closed it.
    HangUp,
}

/// A source's name; the source is forgotten when this is dropped.
pub(crate) struct Registration {
    reactor: Arc<Reactor>,
    number: u64,
}

/// The reactor of this process. A fork's child makes its own, because it has not inherited the thread.
static REACTOR: Mutex<Option<(Process, Arc<Reactor>)>> = Mutex::new(None);

impl Reactor {
    /// This process's reactor.
    pub(crate) fn get() -> Result<Arc<Reactor>, Error> {
        let mut current = lock(&REACTOR);
        if let Some((process, reactor)) = &*current
            && process.is_current()
        {
            return Ok(reactor.clone());
        }
        let process = Process::current();
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(Error::errno("make an epoll instance"))?;
        let (tell, told) = channel();
        let reactor = Arc::new(Reactor { epoll, lifelines: Lifelines::default(), sources: Mutex::default() });
        let thread = reactor.clone();
        std::thread::Builder::new()
            .name("dmbridge".into())
            .spawn(move || {
                thread.lifelines.adopt();
                let _ = tell.send(());
                thread.run();
            })
            .map_err(Error::os("start a thread"))?;
        let _ = told.recv();
        if let Some((_, inherited)) = current.replace((process, reactor.clone())) {
            // A lock in it may be held by a thread that is not here.
            std::mem::forget(inherited);
        }
        Ok(reactor)
    }

    /// A word in this memory that says as long as it is kept whether this process lives.
    pub(crate) fn lifeline(self: &Arc<Reactor>, memory: DmaBuffer) -> Lifeline {
        Lifeline::new(self.clone(), memory)
    }

    /// Whose end the lifelines tell.
    pub(crate) fn lifelines(&self) -> &Lifelines {
        &self.lifelines
    }

    /// Adds a source, with nothing to watch yet.
    pub(crate) fn register(self: &Arc<Reactor>, source: Weak<dyn Source>) -> Registration {
        let mut sources = lock(&self.sources);
        sources.last += 1;
        let number = sources.last;
        sources.all.insert(number, source);
        Registration { reactor: self.clone(), number }
    }

    fn run(&self) {
        let mut events = [EpollEvent::empty(); 64];
        loop {
            let ready = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(ready) => &events[..ready],
                Err(nix::Error::EINTR) => continue,
                Err(errno) => {
                    // Only a closed or foreign descriptor does this: somebody else closed it.
                    tracing::error!("the library's epoll instance failed: {errno}; no device works any more");
                    return;
                }
            };
            for event in ready {
                let source = lock(&self.sources).all.get(&(event.data() >> 8)).and_then(Weak::upgrade);
                if let Some(source) = source {
                    source.ready(event.data() as u8);
                }
            }
            self.alarm();
        }
    }

    /// Until the first alarm.
    fn timeout(&self) -> EpollTimeout {
        let Some(next) = lock(&self.sources).alarms.first().map(|(when, ..)| *when) else {
            return EpollTimeout::NONE;
        };
        let left = next.saturating_duration_since(Instant::now()).as_millis().min(60_000);
        EpollTimeout::try_from(left as i32 + 1).unwrap_or(EpollTimeout::NONE)
    }

    /// Calls those whose time has come.
    fn alarm(&self) {
        let mut sources = lock(&self.sources);
        if sources.alarms.is_empty() {
            return;
        }
        let Sources { all, alarms, .. } = &mut *sources;
        let later = alarms.split_off(&(Instant::now(), u64::MAX, u8::MAX));
        let due = std::mem::replace(alarms, later).into_iter();
        let due: Vec<_> =
            due.filter_map(|(_, number, what)| Some((all.get(&number)?.upgrade()?, what))).collect();
        drop(sources);
        due.into_iter().for_each(|(source, what)| source.ready(what));
    }
}

/// Lets a source that was called be called again after a while. From [`Registration::alarm`].
pub(crate) struct Alarm {
    reactor: Weak<Reactor>,
    number: u64,
}

impl Alarm {
    /// Calls the source with `what` after so long. To be used on the reactor's thread, which does not look here while it waits.
    pub(crate) fn set(&self, after: Duration, what: u8) {
        if let Some(reactor) = self.reactor.upgrade() {
            lock(&reactor.sources).alarms.insert((Instant::now() + after, self.number, what));
        }
    }
}

impl Registration {
    /// Calls the source with `what` each time that this happens to the descriptor (edge-triggered: once per write to an
    /// eventfd, whether or not it is read).
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, interest: Interest, what: u8) -> Result<(), Error> {
        let flags = EpollFlags::EPOLLET
            | match interest {
                Interest::Readable => EpollFlags::EPOLLIN,
                Interest::HangUp => EpollFlags::EPOLLRDHUP,
            };
        let event = EpollEvent::new(flags, self.number << 8 | u64::from(what));
        self.reactor.epoll.add(fd, event).map_err(Error::errno("watch a descriptor"))
    }

    /// For alarms of the source.
    pub(crate) fn alarm(&self) -> Alarm {
        Alarm { reactor: Arc::downgrade(&self.reactor), number: self.number }
    }

    /// No longer watches a descriptor that is about to be closed. Needed where a copy of it stays open elsewhere, in
    /// the daemon for instance: epoll watches the file, not the number.
    pub(crate) fn forget(&self, fd: BorrowedFd<'_>) {
        let _ = self.reactor.epoll.delete(fd);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.reactor.sources).all.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::sync::{OnceLock, mpsc};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    /// Tells what it is called with, and asks for an alarm if it was 7.
    struct Told(mpsc::Sender<u8>, OnceLock<Alarm>);

    impl Source for Told {
        fn ready(&self, what: u8) {
            if let (7, Some(alarm)) = (what, self.1.get()) {
                alarm.set(Duration::from_millis(1), 8);
            }
            let _ = self.0.send(what);
        }
    }

    #[test]
    fn a_source_is_told_once_per_write_and_by_its_alarms_until_it_is_dropped() {
        let (sender, told) = mpsc::channel();
        let source = Arc::new(Told(sender, OnceLock::new()));
        let weak: Weak<dyn Source> = Arc::downgrade(&(source.clone() as Arc<dyn Source>));
        let registration = Reactor::get().unwrap().register(weak);
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        // SAFETY: `fd` is open to the end of the test.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        registration.watch(borrowed, Interest::Readable, 7).unwrap();
        for _ in 0..3 {
            fd.write(1).unwrap();
            assert_eq!(told.recv(), Ok(7));
        }
        assert!(source.1.set(registration.alarm()).is_ok());
        fd.write(1).unwrap();
        assert_eq!((told.recv(), told.recv()), (Ok(7), Ok(8)));
        drop(registration);
        drop(source);
        assert!(told.recv().is_err());
    }
}
