//! Headers of moves that a guest wrote: what parses says the same again, and only flags can make it wrong.
#![no_main]

use dmbridge_proto::moves::{HEADER_SIZE, MoveHeader};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: [u8; HEADER_SIZE]| {
    match MoveHeader::parse(&bytes) {
        Ok(header) => {
            let emitted = header.to_bytes();
            assert_eq!(emitted[..28], bytes[..28]);
            assert_eq!(MoveHeader::parse(&emitted), Ok(header));
        }
        Err(_) => assert!(bytes[24..28] > [0; 4][..]),
    }
});
