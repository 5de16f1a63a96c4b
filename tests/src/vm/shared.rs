//! Things that take long to make, such as a pair of VMs, shared by the tests of one program, one test at a time.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// Something shared; a `static` of the test program.
pub struct Shared<T>(Mutex<Option<T>>);

/// The thing, for one test.
pub struct Lent<'a, T>(MutexGuard<'a, Option<T>>);

impl<T: Send + 'static> Shared<T> {
    /// Nothing yet.
    pub const fn new() -> Shared<T> {
        Shared(Mutex::new(None))
    }

    /// Takes it for a test. It is made by `make` for the first one, and again after a test that failed, so that a
    /// failure does not spread.
    pub fn take(&self, make: impl FnOnce() -> T + Send + 'static) -> Lent<'_, T> {
        let mut guard = self.0.lock().unwrap_or_else(|poisoned| {
            let mut guard = poisoned.into_inner();
            *guard = None;
            self.0.clear_poison();
            guard
        });
        if guard.is_none() {
            *guard = Some(in_lasting_thread(make));
        }
        Lent(guard)
    }
}

impl<T: Send + 'static> Default for Shared<T> {
    fn default() -> Shared<T> {
        Shared::new()
    }
}

impl<T> std::ops::Deref for Lent<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("it was made when it was lent")
    }
}

impl<T> std::ops::DerefMut for Lent<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("it was made when it was lent")
    }
}

/// Runs `make` in a thread that lasts as long as the program. A child that asked to end with its parent ends with the
/// *thread* that started it, and a test's own thread does not outlive the test.
pub fn in_lasting_thread<T: Send + 'static>(make: impl FnOnce() -> T + Send + 'static) -> T {
    type Job = Box<dyn FnOnce() + Send>;
    static JOBS: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, receiver) = channel::<Job>();
        thread::spawn(move || receiver.into_iter().for_each(|job| job()));
        Mutex::new(sender)
    });
    let (result, results) = channel();
    let job = move || {
        let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make));
        let _ = result.send(made);
    };
    jobs.lock().unwrap_or_else(PoisonError::into_inner).send(Box::new(job)).expect("the thread lasts");
    match results.recv().expect("the job answers") {
        Ok(made) => made,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Removes a file or folder when the program ends: what is shared is never dropped.
pub fn remove_at_exit(path: &Path) {
    static PATHS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
    extern "C" fn remove() {
        for path in PATHS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
        }
    }
    let mut paths = PATHS.lock().unwrap_or_else(PoisonError::into_inner);
    if paths.is_empty() {
        // SAFETY: registers a function that may run at any time: it takes no argument and does not unwind.
        unsafe { libc::atexit(remove) };
    }
    paths.push(path.into());
}
