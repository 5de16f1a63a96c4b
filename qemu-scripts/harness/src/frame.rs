//! What host and guest agent say to each other over a virtio serial port.
//!
//! A frame is the length of what follows (4 bytes, little-endian), a kind (1 byte), the number of the command that it
//! is about (4 bytes), and its content. A guest may be reset in the middle of a frame, in either direction. So both ends
//! skip what they read until the start of a new conversation: the guest says [`HELLO`] and a number that it made up,
//! again and again until the host answers with [`WELCOME`] and the same number, and only then do frames begin.

use std::io::{self, Read, Write};

/// The guest's start of a conversation; 8 bytes of its own choice follow.
pub const HELLO: [u8; 16] = *b"\0dmbridge hello\n";
/// The host's answer; the guest's 8 bytes follow.
pub const WELCOME: [u8; 16] = *b"\0dmbridge start\n";
/// The port's name.
pub const PORT: &str = "org.dmbridge.agent";
/// The most bytes in a frame's content.
pub const MAX_CONTENT: usize = 64 << 10;

/// What a frame is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the guest: run this; the arguments, each followed by a zero byte.
    Run,
    /// To the guest: bytes for standard input; none: its end.
    Input,
    /// To the guest: send a signal (4 bytes) to the command and its children.
    Signal,
    /// To the host: bytes of standard output.
    Output,
    /// To the host: bytes of standard error.
    Error,
    /// To the host: it ended; wait status (4 bytes).
    Ended,
    /// To the host: it could not be started; why.
    Failed,
}

const KINDS: [Kind; 7] =
    [Kind::Run, Kind::Input, Kind::Signal, Kind::Output, Kind::Error, Kind::Ended, Kind::Failed];

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is about.
    pub kind: Kind,
    /// The command.
    pub id: u32,
    /// At most [`MAX_CONTENT`] bytes.
    pub content: Vec<u8>,
}

impl Frame {
    /// Writes it, in one piece, so that writers which lock around this call do not mix.
    pub fn write(kind: Kind, id: u32, content: &[u8], to: &mut impl Write) -> io::Result<()> {
        assert!(content.len() <= MAX_CONTENT, "a frame of {} bytes", content.len());
        let mut bytes = Vec::with_capacity(9 + content.len());
        bytes.extend((5 + content.len() as u32).to_le_bytes());
        bytes.push(KINDS.iter().position(|k| *k == kind).unwrap_or_default() as u8);
        bytes.extend(id.to_le_bytes());
        bytes.extend(content);
        to.write_all(&bytes)?;
        to.flush()
    }

    /// Reads one.
    pub fn read(from: &mut impl Read) -> io::Result<Frame> {
        let len = u32::from_le_bytes(array(from)?) as usize;
        let [kind] = array(from)?;
        let id = u32::from_le_bytes(array(from)?);
        let wrong =
            || io::Error::new(io::ErrorKind::InvalidData, format!("no frame: {len} bytes of kind {kind}"));
        let kind = *KINDS.get(usize::from(kind)).ok_or_else(wrong)?;
        let content = len.checked_sub(5).filter(|content| *content <= MAX_CONTENT).ok_or_else(wrong)?;
        let mut frame = Frame { kind, id, content: vec![0; content] };
        from.read_exact(&mut frame.content)?;
        Ok(frame)
    }

    /// Takes one off the start of `bytes`, if it is there as a whole.
    pub fn take(bytes: &mut Vec<u8>) -> io::Result<Option<Frame>> {
        let mut rest = bytes.as_slice();
        match Frame::read(&mut rest) {
            Ok(frame) => {
                let used = bytes.len() - rest.len();
                bytes.drain(..used);
                Ok(Some(frame))
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Where the first [`HELLO`] ends in `bytes`, and the guest's number, if both are there as a whole.
pub fn find_hello(bytes: &[u8]) -> Option<(usize, [u8; 8])> {
    let at = bytes.windows(HELLO.len()).position(|window| window == HELLO)? + HELLO.len();
    let number = bytes.get(at..at + 8)?;
    Some((at + 8, number.try_into().ok()?))
}

/// The next bytes.
pub fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Skips everything up to and including `mark`.
pub fn skip_to(mark: &[u8; 16], from: &mut impl Read) -> io::Result<()> {
    let mut last: [u8; 16] = array(from)?;
    while last != *mark {
        last.rotate_left(1);
        [last[15]] = array(from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut bytes = Vec::new();
        Frame::write(Kind::Output, 7, b"abc", &mut bytes).unwrap();
        assert_eq!(bytes, b"\x08\0\0\0\x03\x07\0\0\0abc");
        let frame = Frame::read(&mut bytes.as_slice()).unwrap();
        assert_eq!(frame, Frame { kind: Kind::Output, id: 7, content: b"abc".to_vec() });
    }

    #[test]
    fn a_length_or_kind_that_cannot_be_is_refused() {
        for bytes in
            [b"\x04\0\0\0\x03\x07\0\0\0", b"\xff\xff\xff\xff\x03\x07\0\0\0", b"\x05\0\0\0\x09\x07\0\0\0"]
        {
            assert_eq!(Frame::read(&mut bytes.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_frame_is_taken_when_it_is_whole() {
        let mut bytes = b"\x08\0\0\0\x03\x07\0\0\0ab".to_vec();
        assert_eq!(Frame::take(&mut bytes).unwrap(), None);
        bytes.extend(b"c!");
        assert_eq!(Frame::take(&mut bytes).unwrap().unwrap().content, b"abc");
        assert_eq!(bytes, b"!");
    }

    #[test]
    fn a_conversation_starts_even_in_half_a_frame() {
        let bytes = [b"\x08\0\0\0\0dmb", HELLO.as_slice(), b"12345678!"].concat();
        assert_eq!(find_hello(&bytes), Some((32, *b"12345678")));
        assert_eq!(find_hello(&bytes[..31]), None);
        let bytes = [b"\x08\0\0\0\0dmb", WELCOME.as_slice(), b"12345678!"].concat();
        let mut rest = bytes.as_slice();
        skip_to(&WELCOME, &mut rest).unwrap();
        assert_eq!(rest, b"12345678!");
    }
}
