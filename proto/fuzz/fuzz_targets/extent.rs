//! Where a peer says that a DMB lies in an extent: believed only if it is wholly behind the control lines and inside.
#![no_main]

use dmbridge_proto::GRANULE;
use dmbridge_proto::extent::{Geometry, LINE_SIZE};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, u8, u64, u64, u16)| {
    let (bytes, shift, offset, size, line) = input;
    if let Some(geometry) = Geometry::with_room_for(bytes) {
        assert!(geometry.capacity() >= bytes);
        assert_eq!(Geometry::new(geometry.size()), Some(geometry));
    }
    assert!(!bytes.is_power_of_two() || Geometry::new(bytes).is_none_or(|g| g.size() == bytes));
    let Some(geometry) = Geometry::new(1 << (shift % 64)) else { return };
    assert!(geometry.header_size().is_multiple_of(GRANULE));
    assert_eq!(geometry.capacity() + geometry.header_size(), geometry.size());
    match geometry.line_offset(line) {
        Some(at) => assert!(at + LINE_SIZE <= geometry.header_size()),
        None => assert!(u64::from(line) >= geometry.lines()),
    }
    if geometry.holds(offset, size) {
        assert!(offset >= geometry.header_size() && size != 0);
        assert!(offset.checked_add(size).is_some_and(|end| end <= geometry.size()));
    }
});
