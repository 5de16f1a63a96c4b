//! Cursors that a peer wrote: a distance is believed only if it is one that the peer could have gone.
#![no_main]

use dmbridge_proto::smc::cdc::CursorWord;
use dmbridge_proto::smc::cursor::Cursor;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u32, u16, u32, u64, u32)| {
    let (size, wrap, count, word, by) = input;
    let size = size % (1 << 31) + 1;
    let here = Cursor { wrap, count: count % size };

    let word = CursorWord::from_bits(word);
    assert_eq!(CursorWord::from_bits(word.to_bits()), word);

    // Any word of the peer: if there is a distance, going it leads exactly there.
    if let Some(distance) = here.distance(word.cursor, size) {
        assert!(distance <= size);
        assert_eq!(here.advance(distance, size), word.cursor);
    }
    // And if the word is the one that is behind.
    if let Some(distance) = word.cursor.distance(here, size) {
        assert!(distance <= size);
        assert_eq!(word.cursor.advance(distance, size), here);
    }
    // Every way that can be gone is believed.
    let by = by % (size + 1);
    let there = here.advance(by, size);
    assert!(there.count < size);
    assert_eq!(here.distance(there, size), Some(by));
});
