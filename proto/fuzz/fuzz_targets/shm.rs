//! Every method copies exactly the bytes that it was told, at every alignment and length.
#![no_main]

use dmbridge_proto::shm::{CopyMethod, copy_from_shared, copy_to_shared};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, u8, &[u8])| {
    let (at, from, source) = input;
    let (at, from) = (usize::from(at), usize::from(from).min(source.len()));
    let source = &source[from..];
    for method in CopyMethod::ALL {
        let mut target = vec![0x5a; at + source.len() + 64];
        // SAFETY: the target has room for all of the source behind `at`.
        unsafe { copy_to_shared(method, source.as_ptr(), target.as_mut_ptr().add(at), source.len()) };
        let (before, rest) = target.split_at(at);
        let (copied, after) = rest.split_at(source.len());
        assert_eq!(copied, source);
        assert!(before.iter().chain(after).all(|byte| *byte == 0x5a));
        let mut back = vec![0; source.len()];
        // SAFETY: both have the source's length.
        unsafe { copy_from_shared(copied.as_ptr(), back.as_mut_ptr(), back.len()) };
        assert_eq!(back, source);
    }
});
