//! Whether a message goes directly or through the DMBs: the messages themselves tell, each sender for itself. The receiver
//! takes what comes.
//!
//! Now and then a few messages in a row are timed as they go, and as many the other way, from the first one's start until
//! the message after the last one starts: so what counts is how long the program takes, all waiting for the peer
//! and for a CPU included, and not how soon a call returns. (Nothing is measured when a channel opens. The processes of a
//! program open theirs all at once, so that would be a measurement of processes that start.)
//!
//! Such times differ by much else: by what the program does, and by a thousand times when somebody else has the CPU. So
//! the other way is used from then on if it is faster by more than chance explains: in most trials, or in their sum, and not
//! if the sum speaks against it, for one that is mostly faster and now and then very late is not. Otherwise what is used
//! stays. A program that does much between messages decides nothing, and loses little by it.
//!
//! The slower the other way was, the longer nobody tries it: once something is known, all trials of a sender together take
//! less than a hundredth of the time.

use std::time::Instant;

/// Messages below this size, in bytes, are never worth two system calls and a wait.
pub(super) const LEAST: usize = 32 << 10;
/// Sizes that are told apart: each is four times as large as the one before, the last one has no end.
const CLASSES: usize = 5;
/// From this one on messages go directly until more is known.
const DIRECT_AT_FIRST: usize = 1;
/// Messages of a turn at least. Otherwise as many as fill the ring, because those of another kind before them would.
const LEAST_TURN: usize = 2;
/// Turns between two trials while little is known, or the other way seems to be the faster one.
const SHORT_PAUSE: u32 = 4;
/// Turns between two trials otherwise, at least.
const PAUSE: u32 = 32;
/// Turns between two trials at most.
const LONGEST_PAUSE: u32 = 1 << 14;
/// So many trials are enough to decide.
const ENOUGH: u32 = 6;
/// What was longer ago than so many trials is forgotten by and by.
const REMEMBERED: u32 = 64;
/// A difference that is so many times its own standard error is not by chance.
const SURE: f64 = 3.0;
/// One that is so many times it may not be.
const PROMISING: f64 = 1.5;
/// The other way has to save more than this share of the time.
const WORTHWHILE: f64 = 0.03;
/// A trial counts as if the one way had taken e times as long as the other at most.
const MOST: f64 = 1.0;
/// What the loss by a trial is a smaller part of than this. It is that of everybody who waits for this sender, as others
/// do in theirs: a program of many processes has as many times that.
const SHARE: f64 = 400.0;
/// Nanoseconds per byte from which on a program does something else than to send messages: nothing counts for more, and a
/// trial in which both ways took so long does not count.
const IDLE: f64 = 10.0;

/// What one sender knows.
#[derive(Debug)]
pub(super) struct Chooser {
    classes: [Class; CLASSES],
    /// Size of the ring, in bytes.
    ring: usize,
    /// Of a row of random numbers.
    random: u64,
}

/// What is known of the messages of one size.
#[derive(Debug)]
struct Class {
    /// Whether they go directly, but for trials.
    direct: bool,
    stage: Stage,
    /// Messages of the stage that are still to come.
    left: u32,
    /// When the turn that is timed began, and what was sent since, in bytes.
    start: Option<Instant>,
    bytes: u64,
    /// What the way that is used took in this trial, in nanoseconds per byte.
    used: f64,
    /// Whether there was a trial. The first one shows what memory takes that is used for the first time.
    tried: bool,
    gain: Gain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Pause,
    /// As always, timed.
    Used,
    /// The other way, until the ring is as full or as empty as it then is.
    Settle,
    /// The other way, timed.
    Other,
}

/// A mean, and how far values are from it.
#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    count: u32,
    mean: f64,
    variance: f64,
}

impl Mean {
    fn learn(&mut self, value: f64) {
        self.count = (self.count + 1).min(REMEMBERED);
        let weight = 1.0 / f64::from(self.count);
        let distance = value - self.mean;
        self.mean += distance * weight;
        self.variance += (distance * (value - self.mean) - self.variance) * weight;
    }

    /// By how much the mean may be wrong: its standard error.
    fn error(&self) -> f64 {
        (self.variance / f64::from(self.count.max(2) - 1)).sqrt()
    }

    fn is_surely_above(&self, least: f64) -> bool {
        self.count >= ENOUGH && self.mean > least.max(SURE * self.error())
    }
}

/// What the other way would gain.
#[derive(Debug, Clone, Copy, Default)]
struct Gain {
    /// Mostly: the logarithm of the factor, in which no trial counts for more than [`MOST`].
    typical: Mean,
    /// In all: nanoseconds per byte, of so many that the way that is used takes.
    total: Mean,
    of: Mean,
}

impl Gain {
    fn learn(&mut self, used: f64, other: f64) {
        self.typical.learn((used / other).ln().clamp(-MOST, MOST));
        self.total.learn(used - other);
        self.of.learn(used);
    }

    /// Whether the other way takes longer in all, as far as that can be told.
    fn costs_more(&self) -> bool {
        self.total.mean < -self.total.error()
    }

    /// Whether the other way is faster, for all that is known.
    fn is_sure(&self) -> bool {
        (self.typical.is_surely_above(WORTHWHILE) && !self.costs_more())
            || self.total.is_surely_above(WORTHWHILE * self.of.mean)
    }

    /// What is known, seen from the other way.
    fn turn(&mut self) {
        self.typical.mean = -self.typical.mean;
        self.of.mean -= self.total.mean;
        self.total.mean = -self.total.mean;
    }

    /// Turns until the next trial.
    fn pause(&self) -> u32 {
        // The share of the time that the other way takes longer, of which one trial alone may tell anything.
        let enough = self.typical.count >= ENOUGH;
        let mut loss = (-self.typical.mean).exp() - 1.0;
        if enough && self.costs_more() {
            loss = loss.max(-self.total.mean / self.of.mean);
        }
        let promising = self.typical.mean > PROMISING * self.typical.error();
        let least = if !enough || promising { SHORT_PAUSE } else { PAUSE };
        // Two turns of a trial go the other way.
        ((2.0 * SHARE * loss) as u32).clamp(least, LONGEST_PAUSE)
    }
}

impl Chooser {
    /// For a sender into a ring of so many bytes. The seed is one that others do not have: those who wait for one another
    /// would otherwise have their trials at the same distance again and again, and take one's for the other's.
    pub(super) fn new(ring: usize, seed: u64) -> Chooser {
        let class = |class: usize| Class {
            direct: class >= DIRECT_AT_FIRST,
            stage: Stage::Pause,
            left: SHORT_PAUSE * turn(ring, LEAST << (2 * class)),
            start: None,
            bytes: 0,
            used: 0.0,
            tried: false,
            gain: Gain::default(),
        };
        Chooser { classes: std::array::from_fn(class), ring, random: seed }
    }

    /// Whether the next message, of `len` bytes, [`LEAST`] at least, goes directly. It starts now.
    #[inline]
    pub(super) fn next(&mut self, len: usize, now: impl FnOnce() -> Instant) -> bool {
        let doublings = (len / LEAST).max(1).ilog2() as usize;
        let class = &mut self.classes[(doublings / 2).min(CLASSES - 1)];
        if class.left == 0 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            class.next_stage(now(), turn(self.ring, len), (self.random >> 32) as u32);
        }
        class.left -= 1;
        class.bytes += len as u64;
        class.direct ^ matches!(class.stage, Stage::Settle | Stage::Other)
    }
}

/// Messages of a turn, if they are of this size.
fn turn(ring: usize, len: usize) -> u32 {
    (ring / len).clamp(LEAST_TURN, 1 << 16) as u32
}

impl Class {
    #[cold]
    fn next_stage(&mut self, now: Instant, turn: u32, random: u32) {
        let took = self.start.map_or(0, |start| now.saturating_duration_since(start).as_nanos());
        let cost = took as f64 / self.bytes.max(1) as f64;
        let (stage, turns) = match self.stage {
            Stage::Pause => (Stage::Used, 1),
            Stage::Used => {
                self.used = cost;
                (Stage::Settle, 1)
            }
            Stage::Settle => (Stage::Other, 1),
            Stage::Other => (Stage::Pause, self.end(cost)),
        };
        (self.stage, self.left) = (stage, turns * turn);
        if stage == Stage::Pause {
            self.left += self.left / 8 * (random % 8);
        }
        (self.start, self.bytes) = (Some(now), 0);
    }

    /// Ends a trial; the turns until the next one.
    fn end(&mut self, other: f64) -> u32 {
        // Nor does what no time has passed in.
        if self.used.min(other) > IDLE || self.used.min(other) <= 0.0 {
            return PAUSE;
        }
        if !std::mem::replace(&mut self.tried, true) {
            return SHORT_PAUSE;
        }
        self.gain.learn(self.used.min(IDLE), other.min(IDLE));
        if self.gain.is_sure() {
            tracing::debug!(gain = ?self.gain, direct = !self.direct, "messages go another way from now on");
            self.direct = !self.direct;
            self.gain.turn();
        }
        // One that is won may be the first since something has changed.
        if other < self.used { self.gain.pause().min(PAUSE) } else { self.gain.pause() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const RING: usize = 4 << 20;
    const LEN: usize = 1 << 20;

    /// A program that sends messages of one size, and its clock.
    struct Program {
        chooser: Chooser,
        now: Instant,
        /// Messages so far, and how many of them went directly.
        sent: u64,
        direct: u64,
        seed: u64,
    }

    impl Program {
        fn new() -> Program {
            Program { chooser: Chooser::new(RING, 0), now: Instant::now(), sent: 0, direct: 0, seed: 1 }
        }

        /// Any number below `below`, the same ones in each run.
        fn random(&mut self, below: u64) -> u64 {
            self.seed =
                self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.seed >> 33) % below
        }

        /// Sends so many messages, each of which takes so many microseconds: through the DMBs, or directly. Of them,
        /// the share that went directly, and the mean time.
        fn send(
            &mut self,
            len: usize,
            count: u64,
            mut took: impl FnMut(&mut Program, bool) -> u64,
        ) -> (f64, f64) {
            let (start, before) = (self.now, self.direct);
            for _ in 0..count {
                let now = self.now;
                let direct = self.chooser.next(len, || now);
                self.sent += 1;
                self.direct += u64::from(direct);
                let took = took(self, direct);
                self.now += Duration::from_micros(took);
            }
            let micros = self.now.duration_since(start).as_micros() as f64;
            ((self.direct - before) as f64 / count as f64, micros / count as f64)
        }

        fn steady(&mut self, count: u64, took: [u64; 2]) -> (f64, f64) {
            self.send(LEN, count, |_, direct| took[usize::from(direct)])
        }
    }

    #[test]
    fn the_faster_way_is_found_and_found_again_when_it_changes() {
        for len in [LEAST, 128 << 10, LEN, 2 << 20, 64 << 20] {
            let mut program = Program::new();
            for took in [[100, 80], [80, 100], [100, 10], [10, 100], [100, 80]] {
                program.send(len, 1_000_000, |_, direct| took[usize::from(direct)]);
                let (direct, _) = program.send(len, 10_000, |_, direct| took[usize::from(direct)]);
                assert_eq!(direct > 0.5, took[1] < took[0], "{len} {took:?} {direct}");
            }
        }
    }

    #[test]
    fn trials_of_a_slow_way_cost_a_hundredth_at_most() {
        for slow in [110, 150, 1000, 10_000] {
            let mut program = Program::new();
            program.steady(50_000, [slow, 100]);
            let (_, mean) = program.steady(1_000_000, [slow, 100]);
            assert!(mean <= 101.5, "{slow}: {mean}");
        }
    }

    #[test]
    fn a_program_that_is_held_up_again_and_again_finds_the_faster_way_nevertheless() {
        // Four processes on two CPUs: one message in twenty waits for a time slice of another.
        let mut program = Program::new();
        let slices = |took: [u64; 2]| {
            move |program: &mut Program, direct: bool| {
                took[usize::from(direct)] + if program.random(20) == 0 { 1000 } else { 0 }
            }
        };
        for (took, best) in [([300, 100], true), ([100, 300], false), ([300, 100], true)] {
            program.send(LEN, 100_000, slices(took));
            let (direct, _) = program.send(LEN, 100_000, slices(took));
            assert!(if best { direct > 0.9 } else { direct < 0.1 }, "{took:?} {direct}");
        }
    }

    #[test]
    fn what_is_mostly_slower_is_not_used_however_busy_the_machine_is() {
        // Every tenth turn loses a time slice to somebody else, which is as long as a hundred messages.
        let busy = |took: [u64; 2]| {
            move |program: &mut Program, direct: bool| {
                took[usize::from(direct)] + if program.random(40) == 0 { 2500 } else { 0 }
            }
        };
        let mut program = Program::new();
        program.send(LEN, 20_000, busy([50, 22]));
        let (direct, _) = program.send(LEN, 100_000, busy([50, 22]));
        assert!(direct > 0.95, "{direct}");
        program.send(LEN, 500_000, busy([22, 50]));
        let (direct, _) = program.send(LEN, 100_000, busy([22, 50]));
        assert!(direct < 0.05, "{direct}");
    }

    #[test]
    fn what_is_mostly_faster_and_now_and_then_very_late_is_not_used() {
        let mut program = Program::new();
        let late = |program: &mut Program, direct: bool| match direct {
            true if program.random(20) == 0 => 5000,
            true => 80,
            false => 100,
        };
        program.send(LEN, 200_000, late);
        let (direct, mean) = program.send(LEN, 500_000, late);
        // Directly it would be 326.
        assert!(direct < 0.1 && mean < 120.0, "{direct} {mean}");
    }

    #[test]
    fn chance_changes_nothing() {
        // Between messages the program does other things, which take longer and differ.
        let mut program = Program::new();
        let (direct, _) = program.send(LEN, 1_000_000, |program, _| 100 + program.random(2000));
        assert!((0.5..1.0).contains(&direct), "{direct}");
        assert!(program.chooser.classes[2].direct);
    }

    #[test]
    fn a_way_that_hardly_gets_on_is_left_and_one_pause_of_a_program_changes_nothing() {
        let mut program = Program::new();
        program.steady(1000, [50, 50_000]);
        assert!(!program.chooser.classes[2].direct);
        let pauses = |program: &mut Program, direct: bool| {
            [50, 100][usize::from(direct)] + if program.sent.is_multiple_of(5000) { 10_000_000 } else { 0 }
        };
        program.send(LEN, 100_000, pauses);
        let (direct, _) = program.send(LEN, 100_000, pauses);
        assert!(direct < 0.05, "{direct}");
    }

    #[test]
    fn a_program_that_hardly_sends_decides_nothing() {
        let mut program = Program::new();
        program.steady(100_000, [20_000, 50_000]);
        assert!(program.chooser.classes.iter().skip(1).all(|class| class.direct));
        assert_eq!(program.chooser.classes[2].gain.total.count, 0);
    }

    #[test]
    fn a_trial_fills_the_ring_before_it_is_timed() {
        let mut chooser = Chooser::new(RING, 0);
        let now = Instant::now();
        let mut other = 0;
        while chooser.classes[1].stage != Stage::Other {
            other += usize::from(!chooser.next(128 << 10, || now));
        }
        // The last one is the first that is timed.
        assert!((other - 1) * (128 << 10) >= RING);
    }

    #[test]
    fn only_at_the_turns_of_a_trial_the_clock_is_read() {
        let mut program = Program::new();
        let mut reads = 0;
        for _ in 0..1_000_000 {
            let mut now = program.now;
            let direct = program.chooser.next(LEAST, || {
                reads += 1;
                now
            });
            now += Duration::from_micros(if direct { 10 } else { 5 });
            program.now = now;
        }
        assert!(reads < 1000, "{reads}");
    }
}
