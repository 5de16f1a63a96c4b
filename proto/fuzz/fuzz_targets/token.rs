//! Any 64 bits are a token, of something or of nothing; any text is a GID or is not.
#![no_main]

use dmbridge_proto::ids::{Gid, Place, Token};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &str)| {
    let (bits, text) = input;
    let token = Token::from_bits(bits);
    assert_eq!(token.to_bits(), bits);
    match token.place() {
        Place::Extent { extent, line, generation } => {
            assert_eq!(Token::in_extent(extent, line, generation), token);
        }
        Place::Ram => assert_eq!(Token::in_ram(bits), token),
        Place::Nothing => assert!(bits >> 32 == 0 || bits as u16 == 0),
    }
    if let Ok(gid) = text.parse::<Gid>() {
        assert!(!gid.is_none());
        assert_eq!(gid.to_string().parse(), Ok(gid));
        assert_eq!(gid.as_u64().map_or(gid, Gid::from_u64), gid);
    }
});
