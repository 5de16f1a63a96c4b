//! From which size on messages are faster directly than through the DMBs: measured once per process, with its first direct
//! channel, in some tens of milliseconds.

use super::handshake::{KNOWN, hear_threshold, remember, tell_threshold};
use super::{Receiver, Sender};
use crate::error::Error;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Sizes that are tried, in bytes. Smaller messages than the first are never worth two system calls and a wait.
const SIZES: [usize; 4] = [32 << 10, 128 << 10, 512 << 10, 2 << 20];
/// Messages of a measurement, one after the other.
const MESSAGES: usize = 2;
/// Measurements of each way; the best counts, because everything else that runs can only disturb.
const ROUNDS: usize = 8;
/// A direct way has to take less than this share of the other one's time: it makes the sender wait for the receiver.
const WORTHWHILE: f64 = 0.9;

/// What the process knows; 0 if nothing.
pub(super) fn known() -> u64 {
    KNOWN.load(Ordering::Relaxed)
}

/// Measures, as the one that begins and decides or as the one that answers: messages there and back, one at a time, so that
/// what counts is how long it takes until a message is there.
pub(super) fn measure(sender: &mut Sender, receiver: &mut Receiver, begins: bool) -> Result<usize, Error> {
    let message = vec![1u8; SIZES[SIZES.len() - 1]];
    let mut buffer = vec![0u8; SIZES[SIZES.len() - 1]];
    let mut times = [[Duration::MAX; 2]; SIZES.len()];
    for (size, times) in SIZES.into_iter().zip(&mut times) {
        for _ in 0..ROUNDS {
            for (threshold, time) in [usize::MAX, 0].into_iter().zip(&mut *times) {
                sender.threshold = threshold;
                let start = Instant::now();
                for _ in 0..MESSAGES {
                    if begins {
                        sender.send(&message[..size])?;
                    }
                    if receiver.recv(&mut buffer)? != Some(size) {
                        return Err(Error::Peer("what is to be measured is not as long as it should be"));
                    }
                    if !begins {
                        sender.send(&message[..size])?;
                    }
                }
                *time = start.elapsed().min(*time);
            }
        }
    }
    let threshold = if begins {
        tracing::debug!(?times, "through DMBs, and directly");
        let threshold = decide(&times);
        tell_threshold(sender, threshold)?;
        threshold
    } else {
        hear_threshold(receiver)?
    };
    remember(threshold);
    Ok(threshold)
}

/// The smallest size from which on all are faster directly.
fn decide(times: &[[Duration; 2]; SIZES.len()]) -> usize {
    let worth = |times: &[Duration; 2]| times[1] < times[0].mul_f64(WORTHWHILE);
    let slow = times.iter().rposition(|times| !worth(times));
    let first = slow.map_or(0, |slow| slow + 1);
    SIZES.get(first).copied().unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_go_directly_from_the_size_on_from_which_all_are_faster() {
        let times =
            |direct: [u64; 4]| direct.map(|us| [Duration::from_micros(100), Duration::from_micros(us)]);
        assert_eq!(decide(&times([50, 50, 50, 50])), SIZES[0]);
        assert_eq!(decide(&times([50, 95, 50, 50])), SIZES[2]);
        assert_eq!(decide(&times([50, 50, 50, 200])), usize::MAX);
    }
}
