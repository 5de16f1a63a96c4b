//! The words that two guests share, in every order in which a processor may let them be seen. Built with `--cfg loom` only.
#![cfg(loom)]

use dmbridge_proto::line::{ControlLine, Wake};
use dmbridge_proto::smc::cdc::{CdcMessage, CursorWord, ProducerFlags, StateFlags};
use dmbridge_proto::smc::cursor::Cursor;
use dmbridge_proto::smc::ring::{Consumer, Producer};
use loom::sync::Arc;
use loom::sync::atomic::{AtomicU8, Ordering};
use loom::thread;

const SIZE: u32 = 2;

/// A DMB: what the peer says, its control line, and the ring.
struct Dmb {
    cdc: CdcMessage,
    line: ControlLine,
    ring: [AtomicU8; SIZE as usize],
}

impl Dmb {
    fn new() -> Dmb {
        Dmb { cdc: CdcMessage::default(), line: ControlLine::default(), ring: Default::default() }
    }
}

fn word(cursor: Cursor) -> CursorWord {
    CursorWord { cursor, ..CursorWord::default() }
}

#[test]
fn what_a_cursor_announces_is_there() {
    loom::model(|| {
        let dmb = Arc::new(Dmb::new());
        let writer = dmb.clone();
        let sender = thread::spawn(move || {
            let mut ring = Producer::new(SIZE);
            for value in [7, 8] {
                writer.ring[ring.chunk().offset as usize].store(value, Ordering::Relaxed);
                ring.produce(1);
                writer.cdc.store_prod(word(ring.cursor()));
            }
        });
        let mut ring = Consumer::new(SIZE);
        ring.observe(dmb.cdc.load_prod().cursor).unwrap();
        for (i, value) in [7, 8].into_iter().take(ring.available() as usize).enumerate() {
            assert_eq!(dmb.ring[i].load(Ordering::Relaxed), value);
        }
        sender.join().unwrap();
    });
}

#[test]
fn who_is_told_that_it_was_all_has_all() {
    loom::model(|| {
        let dmb = Arc::new(Dmb::new());
        let writer = dmb.clone();
        let sender = thread::spawn(move || {
            let mut ring = Producer::new(SIZE);
            writer.ring[0].store(7, Ordering::Relaxed);
            ring.produce(1);
            writer.cdc.store_prod(word(ring.cursor()));
            writer
                .cdc
                .store_cons(CursorWord { state: StateFlags::PEER_DONE_WRITING, ..word(Cursor::default()) });
        });
        let mut ring = Consumer::new(SIZE);
        let flags = dmb.cdc.load_cons().state;
        ring.observe(dmb.cdc.load_prod().cursor).unwrap();
        if flags.contains(StateFlags::PEER_DONE_WRITING) {
            assert_eq!(ring.available(), 1);
            assert_eq!(dmb.ring[0].load(Ordering::Relaxed), 7);
        }
        sender.join().unwrap();
    });
}

#[test]
fn a_reader_that_sleeps_is_woken_or_has_seen_the_data() {
    loom::model(|| {
        let dmb = Arc::new(Dmb::new());
        let writer = dmb.clone();
        let sender = thread::spawn(move || {
            let mut ring = Producer::new(SIZE);
            ring.produce(1);
            writer.cdc.store_prod(word(ring.cursor()));
            writer.line.ring()
        });
        dmb.line.arm(Wake::Signal);
        let seen = dmb.cdc.load_prod().cursor != Cursor::default();
        let rung = sender.join().unwrap();
        assert!(seen || rung == Some(Wake::Signal), "it would sleep for ever");
    });
}

#[test]
fn room_is_not_written_before_its_bytes_were_read() {
    loom::model(|| {
        let (there, here) = (Arc::new(Dmb::new()), Arc::new(Dmb::new()));
        // The ring is full of 1s; the reader takes one and says so in the writer's DMB.
        there.ring.iter().for_each(|byte| byte.store(1, Ordering::Relaxed));
        let (reads, says) = (there.clone(), here.clone());
        let reader = thread::spawn(move || {
            let mut ring = Consumer::new(SIZE);
            ring.observe(Cursor { wrap: 1, count: 0 }).unwrap();
            assert_eq!(reads.ring[0].load(Ordering::Relaxed), 1);
            ring.consume(1);
            says.cdc.store_cons(word(ring.cursor()));
        });
        let mut ring = Producer::new(SIZE);
        ring.produce(SIZE);
        ring.observe(here.cdc.load_cons().cursor).unwrap();
        if ring.free() != 0 {
            there.ring[ring.chunk().offset as usize].store(2, Ordering::Relaxed);
        }
        reader.join().unwrap();
    });
}

#[test]
fn two_that_wait_for_each_other_do_not_both_sleep() {
    // The writer has filled the ring and says that it waits; the reader has read it all, told nobody, and goes to sleep.
    loom::model(|| {
        let (there, here) = (Arc::new(Dmb::new()), Arc::new(Dmb::new()));
        let (theirs, ours) = (there.clone(), here.clone());
        let writer = thread::spawn(move || {
            theirs
                .cdc
                .store_cons(CursorWord { producer: ProducerFlags::WRITE_BLOCKED, ..word(Cursor::default()) });
            let rang = theirs.line.ring().is_some();
            ours.line.arm(Wake::Signal);
            let room = ours.cdc.load_cons().cursor != Cursor::default();
            (rang, room)
        });
        there.line.arm(Wake::Signal);
        let blocked = there.cdc.load_cons().producer.contains(ProducerFlags::WRITE_BLOCKED);
        let mut woken = false;
        if blocked {
            here.cdc.store_cons(word(Cursor { wrap: 1, count: 0 }));
            woken = here.line.ring().is_some();
        }
        let (rang, room) = writer.join().unwrap();
        // The reader was rung, or saw the flag itself; and if it did, the writer saw the room, or was rung.
        assert!(blocked || rang);
        assert!(!blocked || room || woken);
    });
}
