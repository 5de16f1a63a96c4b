//! Whether the engine that is used is still the best: the moves themselves tell. Not what is used until they do, which was
//! measured at start.
//!
//! Now and then a few moves of a row are timed, and as many by another engine. Who wins three times more often than not is
//! used from then on. So what was measured on a busy machine is put right, and so is what became wrong: a hypervisor moves
//! CPUs, tenants come and go. Trials that show that the other engine is slow become rare: all of them together take less
//! than a hundredth of the time of the copies between them.
//!
//! An engine that is mostly faster and now and then very late, because somebody else has its CPU, would win most trials and
//! lose by the few others. So what all trials took together has to bear a decision out, and decides alone if it is clear.
//!
//! Small moves are not tried: nothing but the CPU that asks was ever the best for them, and a clock would cost as much as
//! the copy.

use super::table::WORTHWHILE;
use std::time::Duration;

/// Moves below this size, in bytes, are not tried.
pub const LEAST: usize = 32 << 10;
/// Moves by each of the two in a trial: enough to be in its caches what is in them when it does all.
const RUN: u32 = 8;
/// So many more trials have to be won than lost.
const WINS: u8 = 3;
/// Moves before the first trial, and between two at least.
const PAUSE: u32 = 64;
/// Moves between two trials while the other one wins.
const SHORT_PAUSE: u32 = 16;
/// Moves between two trials at most.
const LONGEST_PAUSE: u32 = 1 << 16;
/// So many trials are remembered for what they took together.
const REMEMBERED: u32 = 128;
/// So many are enough for that to decide.
const ENOUGH: u32 = 8;
/// A mean that is larger than another by this factor is clearly worse.
const CLEARLY: f64 = 1.5;
/// What the loss by a trial is a smaller part of than this.
const SHARE: f64 = 100.0;

/// The trials of one mover, by row of the table.
#[derive(Debug)]
pub struct Trials {
    rows: Box<[Trial]>,
}

/// What is known of a row.
#[derive(Debug, Clone)]
struct Trial {
    stage: Stage,
    /// Moves until something happens.
    left: u32,
    /// The engine that is used, when the trial began.
    used: usize,
    /// The one that it is compared with.
    other: usize,
    /// Nanoseconds and bytes of both.
    taken: [(u64, u64); 2],
    /// By engine.
    known: Box<[Known]>,
}

/// What is known of an engine.
#[derive(Debug, Clone, Copy, Default)]
struct Known {
    /// How often it won more than it lost, against the one that is used.
    wins: u8,
    /// Trials that count.
    trials: u32,
    /// Their mean, in nanoseconds per byte.
    mean: f64,
}

impl Known {
    fn learn(&mut self, cost: f64) {
        self.trials = (self.trials + 1).min(REMEMBERED);
        self.mean += (cost - self.mean) / f64::from(self.trials);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Pause,
    Used,
    Other,
}

/// Who is to do a move, and whether it is to be timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// A place in the table's engines.
    pub engine: usize,
    /// Whether [`Trials::done`] is to be told how long it took.
    pub timed: bool,
}

impl Trials {
    /// For so many rows and engines.
    pub fn new(rows: usize, engines: usize) -> Trials {
        let trial = Trial {
            stage: Stage::Pause,
            left: PAUSE,
            used: 0,
            other: 0,
            taken: [(0, 0); 2],
            known: vec![Known::default(); engines].into(),
        };
        Trials { rows: vec![trial; rows].into() }
    }

    /// Who does the next move of a row for which `used` is used. There are two engines at least.
    #[inline]
    pub fn next(&mut self, row: usize, used: usize) -> Turn {
        let trial = &mut self.rows[row];
        if trial.stage == Stage::Pause && trial.left != 0 {
            trial.left -= 1;
            return Turn { engine: used, timed: false };
        }
        trial.next(used)
    }

    /// A move that was to be timed is done. Who is used for the row from now on, if that is somebody else.
    pub fn done(&mut self, row: usize, bytes: usize, took: Duration) -> Option<usize> {
        let trial = &mut self.rows[row];
        let taken = &mut trial.taken[usize::from(trial.stage == Stage::Other)];
        *taken = (taken.0 + took.as_nanos() as u64, taken.1 + bytes as u64);
        trial.left = trial.left.saturating_sub(1);
        match trial.stage {
            _ if trial.left != 0 => None,
            Stage::Pause => None,
            Stage::Used => {
                (trial.stage, trial.left) = (Stage::Other, RUN);
                None
            }
            Stage::Other => trial.end(),
        }
    }
}

impl Trial {
    #[cold]
    fn next(&mut self, used: usize) -> Turn {
        if self.stage == Stage::Pause {
            let after = (self.other + 1) % self.known.len();
            self.other = if after == used { (after + 1) % self.known.len() } else { after };
            (self.stage, self.left, self.used, self.taken) = (Stage::Used, RUN, used, [(0, 0); 2]);
        } else if used != self.used {
            // Another mover found a better one meanwhile.
            (self.stage, self.left) = (Stage::Pause, PAUSE);
            return Turn { engine: used, timed: false };
        }
        Turn { engine: if self.stage == Stage::Other { self.other } else { used }, timed: true }
    }

    fn end(&mut self) -> Option<usize> {
        let [used, other] = self.taken.map(|(took, bytes)| took.max(1) as f64 / bytes.max(1) as f64);
        // Engines are in the order of what they take away from others.
        let won = if self.other > self.used { other < used * WORTHWHILE } else { other * WORTHWHILE <= used };
        self.stage = Stage::Pause;
        self.known[self.used].learn(used);
        self.known[self.other].learn(other);
        let by_now = self.known[self.used].mean;
        let known = &mut self.known[self.other];
        if won {
            known.wins = (known.wins + 1).min(WINS);
            self.left = SHORT_PAUSE;
        } else {
            known.wins = known.wins.saturating_sub(1);
            let lost = f64::from(RUN) * (other / used - 1.0);
            self.left = ((lost * SHARE) as u32).clamp(PAUSE, LONGEST_PAUSE);
        }
        let mostly = known.wins == WINS && known.mean <= by_now * CLEARLY;
        let clearly = known.trials >= ENOUGH && known.mean * CLEARLY < by_now;
        (mostly || clearly).then(|| {
            self.known.iter_mut().for_each(|known| known.wins = 0);
            self.other
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Does so many moves of a row of two or more engines that take so long; who is used at the end, and how many moves
    /// the others did.
    fn run(trials: &mut Trials, mut used: usize, moves: u32, took: &[u64]) -> (usize, u32) {
        let mut others = 0;
        for _ in 0..moves {
            let turn = trials.next(0, used);
            others += u32::from(turn.engine != used);
            if turn.timed {
                let took = Duration::from_nanos(took[turn.engine]);
                used = trials.done(0, 1 << 20, took).unwrap_or(used);
            }
        }
        (used, others)
    }

    #[test]
    fn the_faster_engine_is_found_whichever_was_used() {
        for used in [0, 1, 2] {
            assert_eq!(run(&mut Trials::new(1, 3), used, 1000, &[300, 100, 200]).0, 1);
        }
        // One that takes more has to be worth it.
        for (took, best) in [([1000, 960], 1), ([1000, 980], 0), ([980, 1000], 0)] {
            for used in [0, 1] {
                assert_eq!(run(&mut Trials::new(1, 2), used, 2000, &took).0, best, "{took:?} from {used}");
            }
        }
    }

    #[test]
    fn what_becomes_wrong_is_put_right() {
        let mut trials = Trials::new(1, 2);
        assert_eq!(run(&mut trials, 0, 1000, &[100, 200]).0, 0);
        assert_eq!(run(&mut trials, 0, 5000, &[200, 100]).0, 1);
        assert_eq!(run(&mut trials, 1, 5000, &[100, 200]).0, 0);
    }

    #[test]
    fn a_slow_engine_is_tried_seldom_and_costs_a_hundredth_at_most() {
        for slow in [150, 1000, 100_000] {
            let (moves, took) = (1_000_000, [100, slow]);
            let (used, others) = run(&mut Trials::new(1, 2), 0, moves, &took);
            let lost = f64::from(others) * (slow - 100) as f64;
            assert_eq!(used, 0);
            // The first trial comes before anything is known.
            let first = f64::from(RUN) * (slow - 100) as f64;
            // Nor is the pause ever longer than the longest.
            let rare = f64::from(moves) / f64::from(LONGEST_PAUSE) * first;
            assert!(lost <= (f64::from(moves) * 100.0 / SHARE).max(rare) + first, "{lost}");
        }
    }

    /// Does moves until a trial is over; who is used then.
    fn one_trial(trials: &mut Trials, used: usize, took: &[u64]) -> usize {
        run(trials, used, trials.rows[0].left, took);
        run(trials, used, 2 * RUN, took).0
    }

    #[test]
    fn trials_that_are_disturbed_now_and_then_decide_nothing() {
        let mut trials = Trials::new(1, 2);
        for round in 0..100 {
            // One of the two is held up in two trials of three.
            let took = [[10_000, 200], [100, 20_000], [100, 200]][round % 3];
            assert_eq!(one_trial(&mut trials, 0, &took), 0);
            assert_eq!(trials.rows[0].stage, Stage::Pause);
        }
    }

    #[test]
    fn an_engine_that_is_mostly_faster_and_now_and_then_very_late_is_not_used() {
        for first in [0, 1] {
            let (mut trials, mut used, mut moves) = (Trials::new(1, 2), first, [0u64; 2]);
            let (mut time, mut late) = (0, 0);
            for _ in 0..200_000 {
                let turn = trials.next(0, used);
                moves[turn.engine] += 1;
                let is_late = turn.engine == 1 && moves[1] % 100 == 0;
                let took = if is_late { 10_000 } else { [100, 80][turn.engine] };
                time += took;
                late += u64::from(is_late);
                if turn.timed {
                    used = trials.done(0, 1 << 20, Duration::from_nanos(took)).unwrap_or(used);
                }
            }
            // By the late one alone it would be 36 million.
            assert!(late > 0 && time < 22_000_000, "{time} from {first}");
        }
    }

    #[test]
    fn a_choice_that_somebody_else_changed_ends_the_trial() {
        let mut trials = Trials::new(1, 3);
        run(&mut trials, 0, PAUSE + 3, &[100, 100, 100]);
        assert_eq!(trials.next(0, 2), Turn { engine: 2, timed: false });
        assert_eq!(trials.rows[0].stage, Stage::Pause);
    }
}
