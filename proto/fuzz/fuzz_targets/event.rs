//! Events that a device wrote: what parses says the same again when it is emitted.
#![no_main]

use dmbridge_proto::event::{EVENT_SIZE, Event};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Event::parse(bytes) {
        Ok(event) => assert_eq!(Event::parse(&event.to_bytes()), Ok(event)),
        Err(_) if bytes.len() >= EVENT_SIZE => {}
        Err(error) => assert_eq!(error, dmbridge_proto::event::EventError::Short(bytes.len())),
    }
});
