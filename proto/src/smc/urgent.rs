//! Urgent data: one byte in the ring that is not part of the stream, as TCP's out-of-band byte (Linux
//! `smc_cdc_handle_urg_data_arrival`, `smc_rx_recv_urg`).
//!
//! The sender marks it by [`ProducerFlags::URG_DATA_PRESENT`]: it is the last byte before the producer cursor that came with
//! the flag.

use super::cdc::ProducerFlags;
use super::cursor::Cursor;

/// Where the urgent byte is, at the reader.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Urgent {
    /// Behind the byte that has not been passed yet.
    end: Option<Cursor>,
}

impl Urgent {
    /// Data arrived up to `prod`, with these flags.
    #[inline]
    pub fn arrived(&mut self, prod: Cursor, flags: ProducerFlags) {
        if flags.contains(ProducerFlags::URG_DATA_PRESENT) {
            self.end = Some(prod);
        }
    }

    /// How many bytes of the stream come before the urgent byte, if one is among the `available` bytes from `cons` on in a
    /// ring of `size` bytes. 0: it is the next one, to be taken out of the stream by [`passed`](Self::passed).
    #[inline]
    pub fn before(&self, cons: Cursor, available: u32, size: u32) -> Option<u32> {
        let distance = cons.distance(self.end?, size)?;
        (1..=available).contains(&distance).then(|| distance - 1)
    }

    /// Whether an urgent byte is known of that was not passed.
    pub const fn is_known(&self) -> bool {
        self.end.is_some()
    }

    /// The byte is behind the reader.
    pub fn passed(&mut self) {
        self.end = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_before_the_marked_cursor_is_the_urgent_one() {
        let mut urgent = Urgent::default();
        let cons = Cursor { wrap: 0, count: 90 };
        urgent.arrived(Cursor { wrap: 0, count: 95 }, ProducerFlags::empty());
        assert_eq!(urgent.before(cons, 5, 100), None);
        urgent.arrived(Cursor { wrap: 1, count: 2 }, ProducerFlags::URG_DATA_PRESENT);
        assert_eq!(urgent.before(cons, 12, 100), Some(11));
        assert_eq!(urgent.before(cons, 11, 100), None, "it is not there yet");
        assert_eq!(urgent.before(Cursor { wrap: 1, count: 1 }, 1, 100), Some(0));
        urgent.passed();
        assert_eq!(urgent.before(cons, 12, 100), None);
    }

    #[test]
    fn a_mark_that_was_passed_marks_nothing() {
        let mut urgent = Urgent::default();
        urgent.arrived(Cursor { wrap: 0, count: 5 }, ProducerFlags::URG_DATA_PRESENT);
        assert_eq!(urgent.before(Cursor { wrap: 0, count: 5 }, 50, 100), None);
        assert_eq!(urgent.before(Cursor { wrap: 3, count: 7 }, 50, 100), None);
    }
}
