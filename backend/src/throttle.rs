//! A token bucket: how many control commands a device may have done per second. Says when, does not wait.

use std::time::{Duration, Instant};

/// Commands that may come at once after a pause: those of one second, at least this many.
const LEAST_BURST: u32 = 16;

/// Counts commands against a rate.
#[derive(Debug)]
pub struct Throttle {
    /// Time that one command costs; zero if there is no limit.
    cost: Duration,
    /// Time that may be saved up.
    burst: Duration,
    /// All commands so far are paid for by then. In the past if some may be done at once.
    paid_until: Option<Instant>,
}

impl Throttle {
    /// `per_second` commands; 0: no limit.
    pub fn new(per_second: u32) -> Throttle {
        let cost = if per_second == 0 { Duration::ZERO } else { Duration::from_secs(1) / per_second };
        Throttle { cost, burst: cost * per_second.max(LEAST_BURST), paid_until: None }
    }

    /// When the next command may be done, if not now.
    pub fn wait(&self, now: Instant) -> Option<Instant> {
        let next = self.from(now) + self.cost;
        (!self.cost.is_zero() && next > now).then_some(next)
    }

    /// Counts a command that is done now.
    pub fn count(&mut self, now: Instant) {
        self.paid_until = Some(self.from(now) + self.cost);
    }

    fn from(&self, now: Instant) -> Instant {
        let earliest = now.checked_sub(self.burst).unwrap_or(now);
        self.paid_until.unwrap_or(earliest).max(earliest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_a_burst_commands_come_at_the_rate() {
        let mut throttle = Throttle::new(100);
        let mut now = Instant::now() + Duration::from_secs(10);
        for _ in 0..100 {
            assert_eq!(throttle.wait(now), None);
            throttle.count(now);
        }
        for _ in 0..10 {
            let when = throttle.wait(now).unwrap();
            assert_eq!(when - now, Duration::from_millis(10));
            now = when;
            assert_eq!(throttle.wait(now), None);
            throttle.count(now);
        }
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let mut throttle = Throttle::new(0);
        let now = Instant::now();
        for _ in 0..1_000_000 {
            throttle.count(now);
            assert_eq!(throttle.wait(now), None);
        }
    }
}
