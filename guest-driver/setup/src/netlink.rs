//! Generic netlink: a request, and the messages that answer it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const HEADER: usize = 16;
const GENERIC_HEADER: usize = 4;
const CONTROL_FAMILY: u16 = libc::GENL_ID_CTRL as u16;
/// Answers are shorter.
const ROOM: usize = 64 * 1024;

/// An attribute: type and value.
pub type Attribute<'a> = (u16, &'a [u8]);

/// A socket that speaks to one family.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Netlink {
    /// To the family of this name; `NotFound` if the kernel has none.
    pub fn open(name: &str) -> io::Result<Netlink> {
        // SAFETY: makes a socket; the result is checked.
        let socket = unsafe {
            libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC)
        };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is ours alone.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let mut netlink = Netlink { socket, family: CONTROL_FAMILY, sequence: 0 };
        let name = [name.as_bytes(), b"\0"].concat();
        let answers = netlink.request(
            libc::CTRL_CMD_GETFAMILY as u8,
            false,
            &[(libc::CTRL_ATTR_FAMILY_NAME as u16, &name)],
        )?;
        let id = answers.iter().find_map(|answer| {
            let id = attributes(answer).find(|(kind, _)| *kind == libc::CTRL_ATTR_FAMILY_ID as u16)?.1;
            Some(u16::from_ne_bytes(id.try_into().ok()?))
        });
        netlink.family = id.ok_or(io::ErrorKind::NotFound)?;
        Ok(netlink)
    }

    /// Sends a command; the attributes of each message that answers it. With `dump`, there are any number.
    pub fn request(
        &mut self,
        command: u8,
        dump: bool,
        attributes: &[Attribute<'_>],
    ) -> io::Result<Vec<Vec<u8>>> {
        self.sequence += 1;
        let flags = libc::NLM_F_REQUEST | if dump { libc::NLM_F_DUMP } else { libc::NLM_F_ACK };
        let mut message = vec![0; HEADER];
        message.extend([command, 1, 0, 0]);
        for (kind, value) in attributes {
            message.extend((4 + value.len() as u16).to_ne_bytes());
            message.extend(kind.to_ne_bytes());
            message.extend(*value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let len = message.len() as u32;
        message[..4].copy_from_slice(&len.to_ne_bytes());
        message[4..6].copy_from_slice(&self.family.to_ne_bytes());
        message[6..8].copy_from_slice(&(flags as u16).to_ne_bytes());
        message[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        // SAFETY: sends bytes that live until the call has returned.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        self.answers()
    }

    fn answers(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut answers = Vec::new();
        let mut buffer = vec![0; ROOM];
        loop {
            // SAFETY: writes at most the buffer's length to it.
            let len =
                unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            if len < 0 {
                return Err(io::Error::last_os_error());
            }
            let mut rest = &buffer[..len as usize];
            while rest.len() >= HEADER {
                let len = (u32::from_ne_bytes(rest[..4].try_into().unwrap_or_default()) as usize)
                    .clamp(HEADER, rest.len());
                let kind = i32::from(u16::from_ne_bytes([rest[4], rest[5]]));
                let sequence = u32::from_ne_bytes(rest[8..12].try_into().unwrap_or_default());
                let body = &rest[HEADER..len];
                if sequence == self.sequence {
                    match kind {
                        libc::NLMSG_ERROR => {
                            let code = body
                                .get(..4)
                                .and_then(|code| code.try_into().ok())
                                .map_or(0, i32::from_ne_bytes);
                            return if code == 0 {
                                Ok(answers)
                            } else {
                                Err(io::Error::from_raw_os_error(-code))
                            };
                        }
                        libc::NLMSG_DONE => return Ok(answers),
                        _ => answers.push(body.get(GENERIC_HEADER..).unwrap_or_default().to_vec()),
                    }
                }
                rest = &rest[len.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

/// The attributes in a message, or in one that holds others.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = Attribute<'_>> {
    std::iter::from_fn(move || {
        let (len, kind) = (
            u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]),
            u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]),
        );
        let value = bytes.get(4..usize::from(len))?;
        bytes = bytes.get(usize::from(len).next_multiple_of(4)..).unwrap_or_default();
        // The upper two bits are flags.
        Some((kind & 0x3fff, value))
    })
}

/// The value of an attribute of this type.
pub fn get(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(of, _)| *of == kind).map(|(_, value)| value)
}

/// A number of up to eight bytes; 0 if it is not there.
pub fn number(bytes: &[u8], kind: u16) -> u64 {
    let value = get(bytes, kind).unwrap_or_default();
    let mut word = [0; 8];
    let len = value.len().min(8);
    word[..len].copy_from_slice(&value[..len]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_told_apart_and_what_is_cut_off_ends_them() {
        let bytes = [8, 0, 1, 0, 7, 0, 0, 0, 5, 0, 2, 0x80, 9, 0, 0, 0, 12, 0, 3, 0, 1];
        assert_eq!(attributes(&bytes).collect::<Vec<_>>(), [(1, &[7, 0, 0, 0][..]), (2, &[9][..])]);
        assert_eq!((number(&bytes, 1), number(&bytes, 2), number(&bytes, 3)), (7, 9, 0));
        assert_eq!(attributes(&[2, 0, 1, 0]).count(), 0);
    }
}
