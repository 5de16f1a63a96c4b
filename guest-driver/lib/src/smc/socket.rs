//! TCP sockets whose SYN or SYN-ACK says that this end speaks SMC, where root has allowed that (`dmbridge-smc-option`): Linux's AF_SMC
//! looks at nothing else. A socket has to be marked before it listens or connects, so the standard library's calls are made here
//! one by one.

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind, connect, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A socket that is marked; `None` if nothing here marks sockets.
fn marked(address: &SocketAddr, flags: SockFlag) -> io::Result<Option<OwnedFd>> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, flags | SockFlag::SOCK_CLOEXEC, None)?;
    Ok(dmbridge_smc_option::mark(socket.as_fd()).then_some(socket))
}

/// As [`TcpStream::connect`] with one address, or [`TcpStream::connect_timeout`].
pub(crate) fn tcp_connect(address: &SocketAddr, timeout: Option<Duration>) -> io::Result<TcpStream> {
    let Some(socket) = marked(address, SockFlag::SOCK_NONBLOCK)? else {
        return match timeout {
            None => TcpStream::connect(address),
            Some(timeout) => TcpStream::connect_timeout(address, timeout),
        };
    };
    if timeout == Some(Duration::ZERO) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "cannot set a 0 duration timeout"));
    }
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let fd = socket.as_raw_fd();
    let connected = match *address {
        SocketAddr::V4(address) => connect(fd, &SockaddrIn::from(address)),
        SocketAddr::V6(address) => connect(fd, &SockaddrIn6::from(address)),
    };
    match connected {
        Ok(()) => {}
        Err(Errno::EINPROGRESS) => wait_until_connected(&socket, deadline)?,
        Err(errno) => return Err(errno.into()),
    }
    let tcp = TcpStream::from(socket);
    tcp.set_nonblocking(false)?;
    Ok(tcp)
}

fn wait_until_connected(socket: &OwnedFd, deadline: Option<Instant>) -> io::Result<()> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Rounded up, and looked at again.
        let timeout = left.map_or(PollTimeout::NONE, |left| (left.as_millis().min(60_000) as u16 + 1).into());
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], timeout) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    match getsockopt(socket, sockopt::SocketError)? {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// As [`TcpListener::bind`] with one address.
pub(crate) fn tcp_bind(address: &SocketAddr) -> io::Result<TcpListener> {
    let Some(socket) = marked(address, SockFlag::empty())? else { return TcpListener::bind(address) };
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    let fd = socket.as_raw_fd();
    match *address {
        SocketAddr::V4(address) => bind(fd, &SockaddrIn::from(address))?,
        SocketAddr::V6(address) => bind(fd, &SockaddrIn6::from(address))?,
    }
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// Does it with each address until it works.
pub(crate) fn with_each<T>(
    addresses: impl Iterator<Item = SocketAddr>,
    mut attempt: impl FnMut(&SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut failure = None;
    for address in addresses {
        match attempt(&address) {
            Ok(done) => return Ok(done),
            Err(error) => failure = Some(error),
        }
    }
    Err(failure
        .unwrap_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "could not resolve to any addresses")))
}
