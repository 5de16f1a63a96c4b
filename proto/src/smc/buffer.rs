//! How large a connection's buffer is: the sizes that a CLC message can name, and which to ask for (Linux
//! `smc_compress_bufsize`, `smc_uncompress_bufsize`).

use super::cdc::CDC_SIZE;

/// Size of a DMB for a connection: 16 KiB times a power of two, up to 512 MiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Size(u8);

impl Size {
    /// 16 KiB.
    pub const SMALLEST: Size = Size(0);
    /// 512 MiB: what four bits can say.
    pub const LARGEST: Size = Size(15);
    /// 1 MiB: the largest that Linux 6.1 makes itself.
    pub const LINUX_LARGEST: Size = Size(6);

    /// What four bits of a CLC message say; higher bits are dropped.
    pub const fn from_compressed(bits: u8) -> Size {
        Size(bits & 15)
    }

    /// As in a CLC message: four bits.
    pub const fn compressed(self) -> u8 {
        self.0
    }

    /// The smallest size that is at least so many bytes, or the largest there is.
    pub const fn at_least(bytes: usize) -> Size {
        let mut size = Size::SMALLEST;
        while size.bytes() < bytes && size.0 < Size::LARGEST.0 {
            size = Size(size.0 + 1);
        }
        size
    }

    /// The size in bytes.
    pub const fn bytes(self) -> usize {
        1 << (self.0 + 14)
    }

    /// Size of the ring in it, in bytes: without the CDC message.
    pub const fn ring(self) -> u32 {
        (self.bytes() - CDC_SIZE) as u32
    }

    /// The next smaller one.
    pub const fn smaller(self) -> Option<Size> {
        match self.0.checked_sub(1) {
            Some(n) => Some(Size(n)),
            None => None,
        }
    }

    /// The next larger one.
    pub const fn larger(self) -> Option<Size> {
        if self.0 < Size::LARGEST.0 { Some(Size(self.0 + 1)) } else { None }
    }
}

/// Which size to ask for, learned from the connections before: as large as they needed, no larger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Advice {
    smallest: Size,
    largest: Size,
    next: Size,
}

/// What a connection did with its buffer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    /// How often the sender had to wait because the buffer was full.
    pub full: u64,
    /// The most bytes that waited in it to be read.
    pub most: u32,
}

impl Advice {
    /// Starts with `first`, and stays between the two others.
    pub fn new(smallest: Size, first: Size, largest: Size) -> Advice {
        let largest = largest.max(smallest);
        Advice { smallest, largest, next: first.clamp(smallest, largest) }
    }

    /// The size to ask for.
    pub const fn next(&self) -> Size {
        self.next
    }

    /// Learns from a connection that had a buffer of this size. One that was full often asks for twice as much; one that
    /// never filled an eighth gives half back.
    pub fn learn(&mut self, size: Size, usage: Usage) {
        let want = if usage.full >= 4 {
            size.larger().unwrap_or(size)
        } else if usage.full == 0 && usage.most < size.ring() / 8 {
            // A step at a time: the next connection may need it again.
            self.next.smaller().unwrap_or(self.next).max(Size::at_least(usage.most as usize * 4))
        } else {
            self.next
        };
        self.next = if usage.full >= 4 { self.next.max(want) } else { self.next.min(want) };
        self.next = self.next.clamp(self.smallest, self.largest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_the_kernels() {
        for (bytes, compressed, size) in [
            (0, 0, 16 << 10),
            (16 << 10, 0, 16 << 10),
            ((16 << 10) + 1, 1, 32 << 10),
            (65536, 2, 65536),
            (1 << 20, 6, 1 << 20),
            (usize::MAX, 15, 512 << 20),
        ] {
            let s = Size::at_least(bytes);
            assert_eq!((s.compressed(), s.bytes()), (compressed, size), "{bytes}");
            assert_eq!(s.ring() as usize, size - 32);
            assert_eq!(Size::from_compressed(compressed), s);
        }
        assert_eq!(Size::SMALLEST.smaller(), None);
        assert_eq!(Size::LARGEST.larger(), None);
    }

    #[test]
    fn what_is_too_small_grows_and_what_is_not_used_shrinks() {
        let mut advice = Advice::new(Size::SMALLEST, Size(4), Size(6));
        advice.learn(Size(4), Usage { full: 100, most: Size(4).ring() });
        assert_eq!(advice.next(), Size(5));
        for _ in 0..9 {
            advice.learn(advice.next(), Usage { full: 100, most: 0 });
        }
        assert_eq!(advice.next(), Size(6), "no more than it may");
        advice.learn(Size(6), Usage { full: 1, most: 1 });
        assert_eq!(advice.next(), Size(6));
        for _ in 0..9 {
            advice.learn(advice.next(), Usage { full: 0, most: 10_000 });
        }
        assert_eq!(advice.next(), Size::at_least(40_000), "four times what was there at once");
    }

    #[test]
    fn a_late_word_of_a_small_connection_does_not_shrink_a_large_one_by_much() {
        let mut advice = Advice::new(Size::SMALLEST, Size(6), Size(8));
        advice.learn(Size(0), Usage { full: 0, most: 10 });
        assert_eq!(advice.next(), Size(5));
    }
}
