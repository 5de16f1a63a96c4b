//! Sockets: what a program does with TCP, over DMBs (SMC-D; `docs/smc-sockets.md`).
//!
//! A connection begins as a TCP connection. Over it, the two ends agree by SMC's CLC handshake (RFC 7609, as Linux's
//! `net/smc` speaks it) to go on over two DMBs. If they cannot, the TCP connection goes on to be used, and
//! [`SmcStream::fallback_reason`] says why. A server also serves clients that know nothing of SMC. The other end may be a socket of
//! Linux's AF_SMC, if the machine lets programs say that they speak SMC ([`mark`]).
//!
//! ```no_run
//! # use std::io::{Read, Write};
//! use dmbridge::smc::Smc;
//!
//! # fn main() -> std::io::Result<()> {
//! let smc = Smc::from_environment();
//! let listener = smc.bind("0.0.0.0:7000")?;
//! let mut client = smc.connect("127.0.0.1:7000")?;
//! let (mut server, _) = listener.accept()?;
//! client.write_all(b"hello")?;
//! let mut text = [0; 5];
//! server.read_exact(&mut text)?;
//! println!("over SMC: {}", server.is_smc());
//! # Ok(())
//! # }
//! ```

mod acceptor;
#[cfg(feature = "tokio")]
mod asynchronous;
mod carried;
mod clc;
mod contacts;
mod fallen;
mod in_place;
mod listener;
mod socket;
mod stream;

#[cfg(feature = "tokio")]
pub use asynchronous::{AsyncSmcListener, AsyncSmcStream};
pub use in_place::{Peeked, Reserved};
pub use listener::{Incoming, SmcListener};
pub use stream::SmcStream;

pub use dmbridge_proto::smc::clc::{BadEid, Reason};

use crate::device::Device;
use contacts::Contacts;
use dmbridge_proto::smc::buffer::Size;
use dmbridge_proto::smc::clc::Eid;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Where a daemon's hub is unless the environment says otherwise.
const HUB: &str = "/run/dmbridge/hub.sock";

/// What this program has for SMC: devices, and the buffers that connections share. Cheap to clone.
#[derive(Clone)]
pub struct Smc {
    contacts: Arc<Contacts>,
}

/// What was done so far, by all clones of a [`Smc`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SmcStats {
    /// Connections over SMC.
    pub connections: u64,
    /// Connections that stayed with TCP.
    pub fallbacks: u64,
    /// Buffers that were registered.
    pub buffers_made: u64,
    /// Connections whose buffer had been another one's before.
    pub buffers_reused: u64,
}

/// Puts a [`Smc`] together.
#[derive(Debug)]
pub struct SmcBuilder {
    devices: Vec<(i32, Device)>,
    eids: Vec<Eid>,
    settings: Settings,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    smallest: Size,
    first: Size,
    largest: Size,
    handshake: Duration,
    first_word: Duration,
}

impl SmcBuilder {
    /// Adds a device. A client proposes those with the higher priority first, and the server takes the first that it can.
    /// At most eight are proposed.
    pub fn device(mut self, device: Device, priority: i32) -> SmcBuilder {
        self.devices.push((priority, device));
        self
    }

    /// Adds a user-defined EID: two ends whose hosts have different system EIDs, or do not use them (Linux's AF_SMC on
    /// x86), talk if they have one in common. At most eight are proposed.
    ///
    /// # Errors
    ///
    /// [`BadEid`] with the rules.
    pub fn user_eid(mut self, eid: &str) -> Result<SmcBuilder, BadEid> {
        self.eids.push(Eid::user(eid)?);
        Ok(self)
    }

    /// Sizes of the buffer that a connection reads from, in bytes, rounded up to 16 KiB times a power of two: connections
    /// start with `first`, and later ones get what earlier ones to the same device would have needed.
    pub fn buffer(mut self, smallest: usize, first: usize, largest: usize) -> SmcBuilder {
        let settings = &mut self.settings;
        settings.smallest = Size::at_least(smallest);
        settings.first = Size::at_least(first);
        settings.largest = Size::at_least(largest);
        self
    }

    /// How long to wait for the other end's part of a handshake that has begun; 6 s at first, as Linux does.
    pub fn handshake_timeout(mut self, timeout: Duration) -> SmcBuilder {
        self.settings.handshake = timeout;
        self
    }

    /// How long a listener waits for a client's first word before it takes the client for one that speaks plain TCP and
    /// waits for the server to begin; 100 ms at first.
    pub fn first_word(mut self, timeout: Duration) -> SmcBuilder {
        self.settings.first_word = timeout;
        self
    }

    /// Done. Without a device, every connection stays with TCP.
    pub fn build(mut self) -> Smc {
        // Stable: of equal priority, what was added first comes first.
        self.devices.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
        let devices = self.devices.into_iter().map(|(_, device)| device).collect();
        Smc { contacts: Arc::new(Contacts::new(devices, &self.eids, self.settings)) }
    }
}

impl Smc {
    /// To choose devices and settings.
    pub fn builder() -> SmcBuilder {
        let settings = Settings {
            smallest: Size::at_least(64 << 10),
            first: Size::at_least(1 << 20),
            largest: Size::at_least(4 << 20),
            handshake: Duration::from_secs(6),
            first_word: Duration::from_millis(100),
        };
        SmcBuilder { devices: Vec::new(), eids: Vec::new(), settings }
    }

    /// With one device.
    pub fn new(device: Device) -> Smc {
        Smc::builder().device(device, 0).build()
    }

    /// With a device of each hub that the environment variable `DMBRIDGE_HUB` names (paths with colons between, the favourite
    /// first), or of `/run/dmbridge/hub.sock`. A hub that cannot be connected is left out, so there may be none: then every
    /// connection stays with TCP. `DMBRIDGE_EID` adds a user-defined EID.
    pub fn from_environment() -> Smc {
        let hubs = std::env::var_os("DMBRIDGE_HUB").unwrap_or_else(|| HUB.into());
        let mut builder = Smc::builder();
        for (i, hub) in std::env::split_paths(&hubs).enumerate() {
            match Device::connect(&hub) {
                Ok(device) => builder = builder.device(device, -i32::try_from(i).unwrap_or(i32::MAX)),
                Err(error) => tracing::debug!("without {}: {error}", hub.display()),
            }
        }
        if let Ok(text) = std::env::var("DMBRIDGE_EID") {
            match Eid::user(&text) {
                Ok(eid) => builder.eids.push(eid),
                Err(error) => tracing::warn!("DMBRIDGE_EID={text:?} is left out: {error}"),
            }
        }
        builder.build()
    }

    /// Connects, as [`TcpStream::connect`] does, and proposes SMC. Where root has allowed programs to know by TCP's option who speaks it
    /// (`dmbridge smc-option`), only to such a server. Elsewhere it is to be used with servers that do: any other takes the
    /// proposal for data.
    ///
    /// # Errors
    ///
    /// As for [`TcpStream::connect`]; `TimedOut` if the server does not answer the proposal, `InvalidData` if its answer is
    /// against the rules.
    pub fn connect(&self, address: impl ToSocketAddrs) -> io::Result<SmcStream> {
        let connect = |address: &SocketAddr| socket::tcp_connect(address, None);
        self.initiate(socket::with_each(address.to_socket_addrs()?, connect)?)
    }

    /// As [`connect`](Self::connect), with at most so much time for the TCP connection.
    ///
    /// # Errors
    ///
    /// As for [`TcpStream::connect_timeout`] and [`connect`](Self::connect).
    pub fn connect_timeout(&self, address: &SocketAddr, timeout: Duration) -> io::Result<SmcStream> {
        self.initiate(socket::tcp_connect(address, Some(timeout))?)
    }

    /// Listens, as [`TcpListener::bind`] does.
    ///
    /// # Errors
    ///
    /// As for [`TcpListener::bind`].
    pub fn bind(&self, address: impl ToSocketAddrs) -> io::Result<SmcListener> {
        self.listen(socket::with_each(address.to_socket_addrs()?, socket::tcp_bind)?)
    }

    /// Listens on a socket that listens already. AF_SMC clients take it for one that speaks plain TCP, unless it was
    /// [marked](mark) before it listened.
    ///
    /// # Errors
    ///
    /// If there is no thread or descriptor to be had.
    pub fn listen(&self, listener: TcpListener) -> io::Result<SmcListener> {
        SmcListener::new(listener, self.contacts.clone())
    }

    /// The client's part of the handshake, over a fresh TCP connection. An AF_SMC server takes it for a plain one's, unless the
    /// socket was [marked](mark) before it connected.
    ///
    /// # Errors
    ///
    /// As for [`connect`](Self::connect).
    pub fn initiate(&self, tcp: TcpStream) -> io::Result<SmcStream> {
        clc::initiate(&self.contacts, tcp)
    }

    /// The server's part of the handshake, over a fresh TCP connection. Waits for the client's first word.
    ///
    /// # Errors
    ///
    /// If the client breaks the rules or goes away in the middle.
    pub fn respond(&self, tcp: TcpStream) -> io::Result<SmcStream> {
        acceptor::respond(&self.contacts, tcp)
    }

    /// The devices, the favourite first.
    pub fn devices(&self) -> &[Device] {
        self.contacts.devices()
    }

    /// What was done so far.
    pub fn stats(&self) -> SmcStats {
        self.contacts.stats()
    }
}

impl fmt::Debug for Smc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Smc").field("devices", &self.devices()).field("stats", &self.stats()).finish()
    }
}

/// Marks a TCP socket that neither listens nor is connected yet as one of an SMC user's, for [`Smc::listen`] and
/// [`Smc::initiate`]; [`Smc::bind`] and [`Smc::connect`] do so by themselves. Whether that worked: where root has
/// not run `dmbridge smc-option`, it does not.
pub fn mark(socket: &impl AsFd) -> bool {
    dmbridge_smc_option::mark(socket.as_fd())
}

/// The moment after so long, or never.
fn after(duration: Duration) -> Option<Instant> {
    Instant::now().checked_add(duration)
}
