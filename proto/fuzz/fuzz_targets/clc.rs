//! The first bytes of a TCP stream, and CLC messages: what is understood is written back as it was.
#![no_main]

use dmbridge_proto::smc::clc::{
    Beginning, EYECATCHER, EYECATCHER_D, HEADER_SIZE, MAX_SIZE, Message, beginning,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    check(bytes);
    // And as a message that begins, ends and is as long as it says, so that more than its frame is tried.
    if (HEADER_SIZE + 4..=MAX_SIZE).contains(&bytes.len()) {
        let (mut framed, len) = (bytes.to_vec(), bytes.len());
        let eyecatcher = if bytes[0] & 1 == 0 { EYECATCHER } else { EYECATCHER_D };
        framed[..4].copy_from_slice(&eyecatcher);
        framed[4] = bytes[4] % 4 + 1;
        framed[5..7].copy_from_slice(&(len as u16).to_be_bytes());
        framed[len - 4..].copy_from_slice(&eyecatcher);
        check(&framed);
    }
});

fn check(bytes: &[u8]) {
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
        assert_eq!(Message::parse(&again), Ok(message));
    }
}
