//! Waiting for something that has to happen, for as long as a slow machine may need, and naming what did not.

use std::time::{Duration, Instant};

/// How long anything may take. Not a promise about speed: what has not happened by then never does.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// Looks again and again until `look` finds something.
///
/// # Panics
///
/// When it has not found anything by the [`DEADLINE`].
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "still waiting after {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Looks again and again until what is there is as it has to be.
///
/// # Panics
///
/// When it is not by the [`DEADLINE`]: says what it is instead.
pub fn until_good<T: std::fmt::Debug>(
    what: &str,
    mut there: impl FnMut() -> T,
    good: impl Fn(&T) -> bool,
) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        let is = there();
        if good(&is) {
            return is;
        }
        assert!(Instant::now() < end, "{what}: after {DEADLINE:?} it is still {is:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Looks again and again until `there` is equal to `want`.
///
/// # Panics
///
/// As [`until_good`].
pub fn until_equal<T: PartialEq + std::fmt::Debug>(what: &str, want: &T, there: impl FnMut() -> T) {
    until_good(&format!("{what}, which has to be {want:?}"), there, |is| is == want);
}
