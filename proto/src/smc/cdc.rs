//! The CDC message at the start of a DMB (Linux `net/smc/smc_cdc.h`: `struct smcd_cdc_msg`).
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 1 | type, 0xFE |
//! | 1 | 1 | reserved; here 1 of a writer that goes on to read its own DMB when this side's device is gone. Linux does not, and writes 0 |
//! | 2 | 6 | reserved |
//! | 8 | 8 | the peer's producer cursor: how far it has written into this DMB |
//! | 16 | 8 | the peer's consumer cursor: how far it has read from its own DMB; and its flags, both kinds |
//! | 24 | 8 | reserved |
//! | 32 | | the ring |
//!
//! A cursor is one 64-bit word in the host's byte order: wrap (16 bits), count (32), producer flags (8), connection
//! state flags (8). Linux sets and reads the flags in the consumer cursor's word only (`smcd_cdc_msg_send`,
//! `smcd_cdc_msg_to_host`), whatever the producer's word says. Only the peer writes the message, each word by one store, after
//! the data that it announces: so a reader looks at the flags first, and a flag that says "this was all" comes after all.

use super::cursor::Cursor;
use crate::sync::{AtomicU64, Ordering};

/// Size of the message: the ring starts behind it.
pub const CDC_SIZE: usize = 32;
/// Type of a CDC message.
pub const CDC_TYPE: u8 = 0xfe;
/// The first word of a message: its type, and that its writer reads on.
pub const CDC_KIND: [u8; 8] = [CDC_TYPE, 1, 0, 0, 0, 0, 0, 0];
/// Where the producer cursor's word lies, for who writes it by a move.
pub const PROD_OFFSET: usize = core::mem::offset_of!(CdcMessage, prod);
/// Where the consumer cursor's word lies.
pub const CONS_OFFSET: usize = core::mem::offset_of!(CdcMessage, cons);
/// Where the connection state flags lie, a byte.
pub const STATE_OFFSET: usize = CONS_OFFSET + 7;

bitflags::bitflags! {
    /// `struct smc_cdc_producer_flags`, bit for bit as Linux's bit fields lie on a little-endian machine.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct ProducerFlags: u8 {
        /// The writer has more to say than there was room for.
        const WRITE_BLOCKED = 1 << 7;
        /// Urgent data is coming.
        const URG_DATA_PENDING = 1 << 6;
        /// Urgent data is here.
        const URG_DATA_PRESENT = 1 << 5;
        /// The consumer cursor shall be updated.
        const CONS_CURS_UPD_REQ = 1 << 4;
        /// The link failed over.
        const FAILOVER_VALIDATION = 1 << 3;
    }
}

bitflags::bitflags! {
    /// `struct smc_cdc_conn_state_flags`.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct StateFlags: u8 {
        /// The peer will write no more.
        const PEER_DONE_WRITING = 1 << 7;
        /// The peer closed the connection.
        const PEER_CONN_CLOSED = 1 << 6;
        /// The peer broke the connection off.
        const PEER_CONN_ABORT = 1 << 5;
    }
}

/// One of the two cursor words.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CursorWord {
    /// The position.
    pub cursor: Cursor,
    /// Meaningful in the consumer's word.
    pub producer: ProducerFlags,
    /// Meaningful in the consumer's word.
    pub state: StateFlags,
}

impl CursorWord {
    /// The word as it lies in memory.
    #[inline]
    pub const fn to_bits(self) -> u64 {
        self.cursor.wrap as u64
            | (self.cursor.count as u64) << 16
            | (self.producer.bits() as u64) << 48
            | (self.state.bits() as u64) << 56
    }

    /// What a word says; bits that have no name are dropped.
    #[inline]
    pub const fn from_bits(bits: u64) -> CursorWord {
        CursorWord {
            cursor: Cursor { wrap: bits as u16, count: (bits >> 16) as u32 },
            producer: ProducerFlags::from_bits_truncate((bits >> 48) as u8),
            state: StateFlags::from_bits_truncate((bits >> 56) as u8),
        }
    }
}

/// The message as it lies at the start of a DMB.
#[derive(Debug, Default)]
#[repr(C, align(8))]
pub struct CdcMessage {
    kind: AtomicU64,
    prod: AtomicU64,
    cons: AtomicU64,
    reserved: AtomicU64,
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<CdcMessage>() == CDC_SIZE);

impl CdcMessage {
    /// The message at an address.
    ///
    /// # Safety
    ///
    /// `ptr` is aligned to 8 bytes and 32 bytes of memory are mapped there, readable and writable, for all of `'a`.
    /// Others, in this process or not, access them by atomic operations only, or are guests.
    pub unsafe fn from_ptr<'a>(ptr: *mut u8) -> &'a CdcMessage {
        // SAFETY: all fields are atomics, which any bytes are valid for; the rest is the caller's promise.
        unsafe { &*ptr.cast::<CdcMessage>() }
    }

    /// Owner, before a new peer is told of the DMB: nothing was written or read.
    pub fn clear(&self) {
        for word in [&self.kind, &self.prod, &self.cons, &self.reserved] {
            word.store(0, Ordering::Relaxed);
        }
    }

    /// Writer, once: marks the message as one, and says nothing yet. What the DMB's last writer said may have come after the
    /// owner cleared it.
    pub fn init(&self) {
        self.kind.store(u64::from_ne_bytes(CDC_KIND), Ordering::Relaxed);
        self.prod.store(0, Ordering::Relaxed);
        self.cons.store(0, Ordering::Relaxed);
    }

    /// Reader: whether the peer says that it reads on when this side's device is gone.
    pub fn reads_on(&self) -> bool {
        self.kind.load(Ordering::Relaxed) == u64::from_ne_bytes(CDC_KIND)
    }

    /// Writer: what it has written into this DMB. Everything written before is visible to who reads the word.
    #[inline]
    pub fn store_prod(&self, word: CursorWord) {
        self.prod.store(word.to_bits(), Ordering::Release);
    }

    /// Writer: what it has read from its own DMB, so that the room may be written again; and its flags.
    #[inline]
    pub fn store_cons(&self, word: CursorWord) {
        self.cons.store(word.to_bits(), Ordering::Release);
    }

    /// Reader: what the peer has written into this DMB.
    #[inline]
    pub fn load_prod(&self) -> CursorWord {
        CursorWord::from_bits(self.prod.load(Ordering::Acquire))
    }

    /// Reader: what the peer has read from its own DMB.
    #[inline]
    pub fn load_cons(&self) -> CursorWord {
        CursorWord::from_bits(self.cons.load(Ordering::Acquire))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_literal_cdc_message() {
        let cdc = CdcMessage::default();
        cdc.init();
        cdc.store_prod(CursorWord {
            cursor: Cursor { wrap: 0x0102, count: 0x0304_0506 },
            ..CursorWord::default()
        });
        cdc.store_cons(CursorWord {
            cursor: Cursor { wrap: 1, count: 2 },
            producer: ProducerFlags::WRITE_BLOCKED,
            state: StateFlags::PEER_DONE_WRITING | StateFlags::PEER_CONN_CLOSED,
        });
        // SAFETY: CdcMessage is 32 bytes of integers.
        let bytes: [u8; 32] = unsafe { core::mem::transmute(cdc) };
        assert_eq!(
            bytes,
            *b"\xfe\x01\0\0\0\0\0\0\x02\x01\x06\x05\x04\x03\0\0\x01\0\x02\0\0\0\x80\xc0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(bytes[STATE_OFFSET], 0xc0);
    }

    #[test]
    fn every_word_keeps_its_named_bits() {
        for bits in [0, u64::MAX, 0x8040_1234_5678_9abc, 0x0102_0304_0506_0708] {
            let word = CursorWord::from_bits(bits);
            assert_eq!(CursorWord::from_bits(word.to_bits()), word);
            assert_eq!(word.to_bits() & 0x0000_ffff_ffff_ffff, bits & 0x0000_ffff_ffff_ffff);
        }
    }
}
