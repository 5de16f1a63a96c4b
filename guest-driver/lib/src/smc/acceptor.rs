//! The server's part of handshakes: one connection's steps, and the thread that takes them for all connections of a
//! listener, so that a client that says nothing holds up nobody.

use super::clc::{self, Word};
use super::contacts::{Accepted, Contacts};
use super::listener::Shared;
use super::{SmcStream, after};
use dmbridge_proto::smc::clc::{Decline, Message, Reason};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

/// Handshakes under way at once; beyond, the oldest client is taken for one that speaks plain TCP.
const MOST_PENDING: usize = 1024;

const LISTENER: u64 = 0;
const KICK: u64 = 1;
const FIRST: u64 = 2;

/// A connection whose handshake is under way.
pub(crate) struct Pending {
    contacts: Arc<Contacts>,
    tcp: TcpStream,
    accepted: Option<Accepted>,
    /// Whether the client has said anything.
    began: bool,
    /// Whether a part of a message is there.
    part: bool,
    deadline: Option<Instant>,
}

/// Where a handshake stands.
pub(crate) enum Progress {
    /// The client is to say something first.
    Waiting(Pending),
    /// It is over.
    Done(io::Result<SmcStream>),
}

impl Pending {
    pub(crate) fn new(contacts: Arc<Contacts>, tcp: TcpStream) -> Pending {
        let deadline = after(contacts.first_word());
        Pending { contacts, tcp, accepted: None, began: false, part: false, deadline }
    }

    /// Goes as far as it goes without waiting.
    pub(crate) fn advance(mut self) -> Progress {
        loop {
            let word = match clc::look(&self.tcp) {
                Ok(word) => word,
                Err(error) => return Progress::Done(Err(error)),
            };
            self.part = matches!(word, Word::Part);
            if !self.began && !matches!(word, Word::Nothing) {
                self.began = true;
                self.deadline = after(self.contacts.handshake_timeout());
            }
            self = match word {
                Word::Nothing | Word::Part => return self.wait(),
                Word::Message(message) => match self.message(message) {
                    Ok(Progress::Waiting(next)) => next,
                    Ok(done) => return done,
                    Err(error) => return Progress::Done(Err(error)),
                },
                Word::Other if self.accepted.is_some() => return Progress::Done(Err(clc::unexpected())),
                Word::Other => return self.fall_back(Reason::PEER_NO_SMC, None, false),
            };
        }
    }

    fn message(mut self, message: Message) -> io::Result<Progress> {
        match (message, self.accepted.take()) {
            (Message::Proposal(proposal), None) => match self.contacts.accept(&proposal) {
                Ok((accept, accepted)) => {
                    clc::say(&self.tcp, &Message::Accept(accept))?;
                    self.accepted = Some(accepted);
                    Ok(Progress::Waiting(self))
                }
                Err(reason) => {
                    clc::decline(&self.tcp, proposal.version, reason)?;
                    Ok(self.fall_back(reason, None, false))
                }
            },
            (Message::Confirm(confirm), Some(accepted)) => {
                match self.contacts.confirmed(accepted, &confirm) {
                    Ok(link) => Ok(Progress::Done(SmcStream::carried(self.tcp, link))),
                    // The client believes that all is well: only the end of the connection can tell it otherwise.
                    Err(reason) => Err(io::Error::new(io::ErrorKind::InvalidData, reason.to_string())),
                }
            }
            (Message::Decline(Decline { reason, out_of_sync, .. }), accepted) => {
                if let Some(accepted) = accepted {
                    self.contacts.declined(accepted, out_of_sync);
                }
                Ok(self.fall_back(Reason::PEER_DECLINED, Some(reason), false))
            }
            _ => Err(clc::unexpected()),
        }
    }

    fn wait(self) -> Progress {
        if self.deadline.is_none_or(|deadline| Instant::now() < deadline) {
            return Progress::Waiting(self);
        }
        if self.accepted.is_some() {
            let error = "the client began an SMC handshake and did not finish it";
            return Progress::Done(Err(io::Error::new(io::ErrorKind::TimedOut, error)));
        }
        if self.began {
            // What looked like the beginning of a message is data, and still there.
            return self.fall_back(Reason::PEER_NO_SMC, None, false);
        }
        self.give_up_waiting()
    }

    /// The client waits for the server to begin, or its proposal is late.
    fn give_up_waiting(self) -> Progress {
        self.fall_back(Reason::PEER_NO_SMC, None, true)
    }

    fn fall_back(self, reason: Reason, theirs: Option<Reason>, late: bool) -> Progress {
        Progress::Done(SmcStream::fallen(&self.contacts, self.tcp, reason, theirs, late))
    }
}

/// Does a whole handshake.
pub(crate) fn respond(contacts: &Arc<Contacts>, tcp: TcpStream) -> io::Result<SmcStream> {
    let mut pending = Pending::new(contacts.clone(), tcp);
    loop {
        match pending.advance() {
            Progress::Done(result) => return result,
            Progress::Waiting(next) => pending = next,
        }
        clc::pause(&pending.tcp, pending.part, pending.deadline)?;
    }
}

/// The thread of a listener.
pub(crate) struct Acceptor {
    shared: Arc<Shared>,
    epoll: Epoll,
    pending: HashMap<u64, (Pending, SocketAddr)>,
    next: u64,
    /// Whether new connections are taken.
    accepting: bool,
}

impl Acceptor {
    pub(crate) fn new(shared: Arc<Shared>) -> io::Result<Acceptor> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(shared.tcp(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        epoll.add(shared.kick(), EpollEvent::new(EpollFlags::EPOLLIN, KICK))?;
        Ok(Acceptor { shared, epoll, pending: HashMap::new(), next: FIRST, accepting: true })
    }

    pub(crate) fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        while !self.shared.is_closed() {
            let ready = match self.epoll.wait(&mut events, self.timeout()) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(errno) => return self.shared.put_error(errno.into()),
            };
            for event in &events[..ready] {
                match event.data() {
                    LISTENER => self.accept(),
                    KICK => self.shared.was_kicked(),
                    number => self.advance(number),
                }
            }
            self.look_at_the_clock();
            self.set_accepting(!self.shared.is_full());
        }
    }

    fn timeout(&self) -> EpollTimeout {
        let next = self.pending.values().filter_map(|(pending, _)| pending.deadline).min();
        let Some(next) = next else { return EpollTimeout::NONE };
        let left = next.saturating_duration_since(Instant::now()).as_millis().min(60_000);
        EpollTimeout::try_from(left as i32 + 1).unwrap_or(EpollTimeout::NONE)
    }

    /// A program that does not accept leaves connections where they wait with TCP.
    fn set_accepting(&mut self, accepting: bool) {
        if accepting != self.accepting {
            let flags = if accepting { EpollFlags::EPOLLIN } else { EpollFlags::empty() };
            let _ = self.epoll.modify(self.shared.tcp(), &mut EpollEvent::new(flags, LISTENER));
            self.accepting = accepting;
        }
    }

    fn accept(&mut self) {
        loop {
            match self.shared.tcp().accept() {
                Ok((tcp, address)) => self.begin(tcp, address),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The client went before it was accepted.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => {
                    // No descriptors, most likely. The program learns it, and nothing is accepted before it has.
                    self.shared.put_error(error);
                    return;
                }
            }
            if self.shared.is_full() {
                return;
            }
        }
    }

    fn begin(&mut self, tcp: TcpStream, address: SocketAddr) {
        if self.pending.len() >= MOST_PENDING
            && let Some(&oldest) = self.pending.keys().min()
        {
            self.finish_without(oldest);
        }
        let number = self.next;
        self.next += 1;
        // Edge-triggered: a part of a message says nothing until more comes.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET;
        if let Err(errno) = self.epoll.add(&tcp, EpollEvent::new(flags, number)) {
            return self.shared.put_error(errno.into());
        }
        let pending = Pending::new(self.shared.contacts().clone(), tcp);
        self.pending.insert(number, (pending, address));
        self.advance(number);
    }

    fn advance(&mut self, number: u64) {
        let Some((pending, address)) = self.pending.remove(&number) else { return };
        let fd = pending.tcp.as_raw_fd();
        match pending.advance() {
            Progress::Waiting(pending) => {
                self.pending.insert(number, (pending, address));
            }
            Progress::Done(Ok(stream)) => {
                self.forget(stream.tcp().as_fd());
                self.shared.put(stream, address);
            }
            // The descriptor is closed, and with that forgotten.
            Progress::Done(Err(error)) => tracing::debug!("{address} (descriptor {fd}): {error}"),
        }
    }

    /// Takes a client for one that speaks plain TCP.
    fn finish_without(&mut self, number: u64) {
        let Some((pending, address)) = self.pending.remove(&number) else { return };
        if pending.began {
            return;
        }
        if let Progress::Done(Ok(stream)) = pending.give_up_waiting() {
            self.forget(stream.tcp().as_fd());
            self.shared.put(stream, address);
        }
    }

    fn look_at_the_clock(&mut self) {
        let now = Instant::now();
        let due = |(pending, _): &(Pending, SocketAddr)| pending.deadline.is_some_and(|d| d <= now);
        let late: Vec<_> = self.pending.iter().filter(|(_, p)| due(p)).map(|(number, _)| *number).collect();
        late.into_iter().for_each(|number| self.advance(number));
    }

    fn forget(&self, fd: BorrowedFd<'_>) {
        let _ = self.epoll.delete(fd);
    }
}
