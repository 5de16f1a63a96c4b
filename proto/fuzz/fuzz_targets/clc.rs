//! The first bytes of a TCP stream, and CLC messages: what is understood is written back as it was.
#![no_main]

use dmbridge_proto::smc::clc::{Beginning, HEADER_SIZE, MAX_SIZE, Message, beginning};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match beginning(bytes) {
        Beginning::Undecided => assert!(bytes.len() < HEADER_SIZE),
        Beginning::Message(len) => assert!((HEADER_SIZE..=MAX_SIZE).contains(&len)),
        Beginning::Other => assert!(Message::parse(bytes).is_err()),
    }
    if let Ok(message) = Message::parse(bytes) {
        // Reserved bytes are dropped and offsets become canonical; what it means stays.
        let again = message.to_bytes();
        assert!(again.len() <= MAX_SIZE);
        assert_eq!(beginning(&again), Beginning::Message(again.len()));
        let meaning = Message::parse(&again).expect("what was written can be read");
        assert_eq!(meaning.to_bytes(), again);
    }
});
