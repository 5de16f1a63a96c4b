//! Commands that a guest wrote, and answers that a device wrote: what parses says the same again when it is emitted.
#![no_main]

use dmbridge_proto::control::{Command, HEADER_SIZE, Home, Reply, Request, Response};
use libfuzzer_sys::fuzz_target;

const COMMANDS: [Command; 8] = [
    Command::QueryGid,
    Command::Register,
    Command::Unregister,
    Command::Attach,
    Command::Detach,
    Command::SignalEvent,
    Command::Rendezvous,
    Command::CancelRendezvous,
];

fuzz_target!(|input: (u8, &[u8])| {
    let (choice, bytes) = input;
    let max_segments = u32::from(choice);
    check_request(bytes, max_segments);
    let command = COMMANDS[usize::from(choice) % COMMANDS.len()];
    check_request(&[&command.header(), bytes].concat(), max_segments);
    check_reply(command, bytes);
});

fn check_request(bytes: &[u8], max_segments: u32) {
    let Ok(request) = Request::parse(bytes, max_segments) else { return };
    if let Request::Register(register) = &request {
        assert!(register.size != 0 && register.size % dmbridge_proto::GRANULE == 0);
        if let Home::Ram { line_addr, segments } = register.home {
            assert!(line_addr % 64 == 0);
            assert!(segments.iter().len() <= max_segments as usize);
            assert_eq!(segments.iter().map(|s| s.len).sum::<u64>(), register.size);
        }
    }
    let mut emitted = Vec::new();
    request.emit(|piece| emitted.extend_from_slice(piece));
    assert!(emitted.len() >= HEADER_SIZE + request.command().body_size() && emitted.len() <= bytes.len());
    assert_eq!(Request::parse(&emitted, max_segments), Ok(request));
    // One byte less is not that command any more.
    assert!(Request::parse(&emitted[..emitted.len() - 1], max_segments).is_err());
}

fn check_reply(command: Command, bytes: &[u8]) {
    let Ok(result) = Reply::parse(command, bytes) else { return };
    let response = Response::from(result);
    assert!(response.as_bytes().len() <= bytes.len());
    assert_eq!(Reply::parse(command, response.as_bytes()), Ok(result));
}
