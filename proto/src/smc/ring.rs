//! The two ends of a ring of bytes in a DMB: who may write where, who may read what. Not the memory itself.
//!
//! Each end keeps its own cursor and believes of the peer's only what the protocol allows.

use super::cursor::Cursor;

/// The peer moved a cursor where it cannot be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the peer moved its cursor to {to:?}, where it cannot be: the connection is broken off")]
pub struct CursorViolation {
    /// Where to.
    pub to: Cursor,
}

/// A piece of the ring without a wrap in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Chunk {
    /// Where it starts in the ring, in bytes.
    pub offset: u32,
    /// How long it is, in bytes.
    pub len: u32,
}

/// The writing end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Producer {
    size: u32,
    prod: Cursor,
    used: u32,
}

impl Producer {
    /// An empty ring of `size` bytes, 1 to 2^31.
    pub const fn new(size: u32) -> Producer {
        assert!(size != 0 && size <= 1 << 31);
        Producer { size, prod: Cursor { wrap: 0, count: 0 }, used: 0 }
    }

    /// How far it has written: what it tells the peer.
    pub const fn cursor(&self) -> Cursor {
        self.prod
    }

    /// Bytes in the ring that the peer has not read, as far as it has said.
    pub const fn used(&self) -> u32 {
        self.used
    }

    /// Bytes that may be written.
    pub const fn free(&self) -> u32 {
        self.size - self.used
    }

    /// The first piece that may be written.
    #[inline]
    pub fn chunk(&self) -> Chunk {
        Chunk { offset: self.prod.count, len: self.free().min(self.size - self.prod.count) }
    }

    /// `len` bytes were written where [`chunk`](Self::chunk) said. At most [`free`](Self::free).
    #[inline]
    pub fn produce(&mut self, len: u32) {
        assert!(len <= self.free(), "{len} bytes produced where {} are free", self.free());
        self.prod = self.prod.advance(len, self.size);
        self.used += len;
    }

    /// Takes the peer's consumer cursor as it was read, once, from shared memory. Says how many bytes became free.
    #[inline]
    pub fn observe(&mut self, cons: Cursor) -> Result<u32, CursorViolation> {
        match cons.distance(self.prod, self.size) {
            Some(used) if used <= self.used => {
                let freed = self.used - used;
                self.used = used;
                Ok(freed)
            }
            _ => Err(CursorViolation { to: cons }),
        }
    }
}

/// The reading end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Consumer {
    size: u32,
    cons: Cursor,
    available: u32,
    unreported: u32,
}

impl Consumer {
    /// An empty ring of `size` bytes, 1 to 2^31.
    pub const fn new(size: u32) -> Consumer {
        assert!(size != 0 && size <= 1 << 31);
        Consumer { size, cons: Cursor { wrap: 0, count: 0 }, available: 0, unreported: 0 }
    }

    /// How far it has read: what it tells the peer, and then calls [`reported`](Self::reported).
    pub const fn cursor(&self) -> Cursor {
        self.cons
    }

    /// Size of the ring, in bytes.
    pub const fn size(&self) -> u32 {
        self.size
    }

    /// Bytes that may be read.
    pub const fn available(&self) -> u32 {
        self.available
    }

    /// Bytes that were read and that the peer has not been told of: it cannot write there yet.
    pub const fn unreported(&self) -> u32 {
        self.unreported
    }

    /// The peer was told [`cursor`](Self::cursor).
    #[inline]
    pub fn reported(&mut self) {
        self.unreported = 0;
    }

    /// The first piece that may be read.
    #[inline]
    pub fn chunk(&self) -> Chunk {
        Chunk { offset: self.cons.count, len: self.available.min(self.size - self.cons.count) }
    }

    /// `len` bytes were read where [`chunk`](Self::chunk) said. At most [`available`](Self::available).
    #[inline]
    pub fn consume(&mut self, len: u32) {
        assert!(len <= self.available, "{len} bytes consumed where {} are there", self.available);
        self.cons = self.cons.advance(len, self.size);
        self.available -= len;
        self.unreported += len;
    }

    /// Takes the peer's producer cursor as it was read, once, from shared memory. Says how many bytes arrived.
    #[inline]
    pub fn observe(&mut self, prod: Cursor) -> Result<u32, CursorViolation> {
        // The peer cannot have written over what it was not told that it may.
        match self.cons.distance(prod, self.size) {
            Some(there) if there >= self.available && there <= self.size - self.unreported => {
                let arrived = there - self.available;
                self.available = there;
                Ok(arrived)
            }
            _ => Err(CursorViolation { to: prod }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::vec;

    /// Every state that two ends of a ring can reach, by every step that either can take.
    #[test]
    fn two_ends_agree_in_every_state_of_a_small_ring() {
        const SIZE: u32 = 3;
        let start = (Producer::new(SIZE), Consumer::new(SIZE), Cursor::default());
        let mut seen = HashSet::new();
        let mut todo = vec![start];
        while let Some((producer, consumer, told)) = todo.pop() {
            // The wrap count would make the states endless: the first times around stand for all.
            if producer.cursor().wrap > 3
                || !seen.insert((
                    producer.cursor(),
                    producer.used(),
                    consumer.cursor(),
                    consumer.available(),
                    told,
                ))
            {
                continue;
            }
            assert!(producer.used() + producer.free() == SIZE);
            assert!(consumer.available() + consumer.unreported() <= SIZE);
            for len in 0..=producer.free() {
                let mut producer = producer;
                producer.produce(len);
                todo.push((producer, consumer, told));
            }
            for len in 0..=consumer.available() {
                let mut consumer = consumer;
                consumer.consume(len);
                todo.push((producer, consumer, told));
            }
            let mut c = consumer;
            c.observe(producer.cursor()).expect("an honest producer is believed");
            todo.push((producer, c, told));
            let mut c = consumer;
            c.reported();
            todo.push((producer, c, consumer.cursor()));
            let mut p = producer;
            p.observe(told).expect("an honest consumer is believed");
            todo.push((p, consumer, told));
        }
        assert!(seen.len() > 300, "{} states", seen.len());
    }

    #[test]
    fn a_peer_that_lies_is_not_believed() {
        let mut producer = Producer::new(100);
        producer.produce(60);
        assert_eq!(
            producer.observe(Cursor { wrap: 0, count: 61 }),
            Err(CursorViolation { to: Cursor { wrap: 0, count: 61 } })
        );
        assert_eq!(producer.observe(Cursor { wrap: 0, count: 20 }), Ok(20));
        assert!(producer.observe(Cursor { wrap: 0, count: 10 }).is_err(), "it cannot unread");
        let mut consumer = Consumer::new(100);
        assert_eq!(consumer.observe(Cursor { wrap: 0, count: 80 }), Ok(80));
        assert!(consumer.observe(Cursor { wrap: 0, count: 79 }).is_err(), "it cannot unwrite");
        consumer.consume(80);
        assert!(consumer.observe(Cursor { wrap: 1, count: 10 }).is_err(), "it was not told of the room");
        consumer.reported();
        assert_eq!(consumer.observe(Cursor { wrap: 1, count: 10 }), Ok(30));
        assert_eq!(consumer.chunk(), Chunk { offset: 80, len: 20 });
    }
}
