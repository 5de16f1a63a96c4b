//! CLC messages on a TCP connection: reads exactly one, or finds that there is none and leaves everything as it was.

use super::contacts::Contacts;
use super::{SmcStream, after};
use dmbridge_proto::smc::clc::{Beginning, ClcError, Decline, MAX_SIZE, Message, Reason, Version, beginning};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a TCP connection has to say.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "it is looked at once and dropped")]
pub(crate) enum Word {
    /// A CLC message, which was taken out.
    Message(Message),
    /// Something else, or the end: still there.
    Other,
    /// Nothing, or too little to tell.
    Nothing,
    /// Too little to tell, but it begins as a message does.
    Part,
}

/// Looks at what is there, without waiting.
pub(crate) fn look(tcp: &TcpStream) -> io::Result<Word> {
    let mut bytes = [0; MAX_SIZE];
    let there = match recv(tcp.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(0) => return Ok(Word::Other),
        Ok(there) => there,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Word::Nothing),
        Err(errno) => return Err(errno.into()),
    };
    let len = match beginning(&bytes[..there]) {
        Beginning::Other => return Ok(Word::Other),
        Beginning::Message(len) if len <= there => len,
        Beginning::Message(_) | Beginning::Undecided => return Ok(Word::Part),
    };
    // What was peeked is there to be taken; nobody else reads this socket during the handshake.
    if recv(tcp.as_raw_fd(), &mut bytes[..len], MsgFlags::MSG_DONTWAIT)? != len {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Message::parse(&bytes[..len]).map(Word::Message).map_err(broken)
}

/// As [`look`], but waits until there is something to tell; [`Word::Nothing`] or [`Word::Part`] only at the deadline.
pub(crate) fn wait(tcp: &TcpStream, deadline: Option<Instant>) -> io::Result<Word> {
    loop {
        let word = look(tcp)?;
        if matches!(word, Word::Message(_) | Word::Other) {
            return Ok(word);
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            return Ok(word);
        }
        pause(tcp, matches!(word, Word::Part), deadline)?;
    }
}

/// Waits until there is more to look at, about, or until the deadline. While a `part` of a message is there the socket stays
/// readable, and its rest is a matter of moments.
pub(crate) fn pause(tcp: &TcpStream, part: bool, deadline: Option<Instant>) -> io::Result<()> {
    let (events, most) = if part {
        (PollFlags::empty(), Duration::from_millis(1))
    } else {
        (PollFlags::POLLIN, Duration::from_secs(60))
    };
    let left = deadline.map_or(most, |d| d.saturating_duration_since(Instant::now()).min(most));
    // Rounded up, so that it does not spin through the last millisecond.
    let timeout = PollTimeout::from(left.as_millis() as u16 + 1);
    match poll(&mut [PollFd::new(tcp.as_fd(), events)], timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Sends a message. It is small and the connection fresh, so it fits.
pub(crate) fn say(tcp: &TcpStream, message: &Message) -> io::Result<()> {
    let bytes = message.to_bytes();
    match send(tcp.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)? {
        sent if sent == bytes.len() => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::WriteZero, "a CLC message did not fit into the socket")),
    }
}

/// Declines, for this reason.
pub(crate) fn decline(tcp: &TcpStream, version: Version, reason: Reason) -> io::Result<()> {
    say(tcp, &Message::Decline(Decline::new(version, reason)))
}

/// The other end broke the rules.
pub(crate) fn broken(error: ClcError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A message that does not belong here.
pub(crate) fn unexpected() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the other end's CLC message does not belong here")
}

/// The client's part of the handshake.
pub(crate) fn initiate(contacts: &Arc<Contacts>, tcp: TcpStream) -> io::Result<SmcStream> {
    let fall_back = |tcp, reason, theirs| SmcStream::fallen(contacts, tcp, reason, theirs, false);
    if dmbridge_smc_option::heard(tcp.as_fd()) == Some(false) {
        return fall_back(tcp, Reason::PEER_NO_SMC, None);
    }
    let (proposal, unanswered) = match contacts.propose() {
        Ok(proposal) => proposal,
        // Nothing was said, so the server sees a plain client.
        Err(reason) => return fall_back(tcp, reason, None),
    };
    say(&tcp, &Message::Proposal(proposal))?;
    match wait(&tcp, after(contacts.handshake_timeout()))? {
        Word::Message(Message::Accept(accept)) => match contacts.confirm(&accept, unanswered) {
            Ok((confirm, link)) => {
                say(&tcp, &Message::Confirm(confirm))?;
                SmcStream::carried(tcp, link)
            }
            Err(reason) => {
                decline(&tcp, Version::V2, reason)?;
                fall_back(tcp, reason, None)
            }
        },
        Word::Message(Message::Decline(declined)) => {
            fall_back(tcp, Reason::PEER_DECLINED, Some(declined.reason))
        }
        Word::Message(_) => Err(unexpected()),
        // The server began to speak by itself: it took this client for a plain one, and will skip the proposal.
        Word::Other => fall_back(tcp, Reason::PEER_NO_SMC, None),
        Word::Nothing | Word::Part => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the server did not answer the SMC proposal; does it speak SMC?",
        )),
    }
}
