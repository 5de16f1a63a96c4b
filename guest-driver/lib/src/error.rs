//! What can go wrong in this crate, in words for the person who reads the message.

use crate::proto::config::ConfigError;
use crate::proto::control::{Command, ResponseError};
use crate::proto::status::Status;
use crate::transport::pci::{PciAddress, PciError};
use std::io;
use std::path::PathBuf;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody listens at the path, or this user may not connect.
    #[error("cannot connect to {path}: {error}; is dmbridged running, and may this user use its socket?")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// The vhost-user conversation failed.
    #[error("vhost-user: {doing} failed: {error}")]
    Vhost {
        /// What was being done.
        doing: &'static str,
        /// The reason.
        error: vhost::Error,
    },
    /// The PCI device cannot be used.
    #[error("PCI device {address}: {error}")]
    Pci {
        /// The device.
        address: PciAddress,
        /// The reason.
        error: PciError,
    },
    /// The character device cannot be used.
    #[error("{path}: {error}; is the module dmbridge loaded, and is this user in the group of the file?")]
    File {
        /// Its file.
        path: PathBuf,
        /// The reason.
        error: io::Error,
    },
    /// What listens there is not a dmbridge device, or one of another version.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The device does not offer what this driver needs.
    #[error("the device does not offer {0}, without which this driver cannot use it")]
    Missing(&'static str),
    /// The device said no.
    #[error("{command:?}: {status}")]
    Refused {
        /// The command.
        command: Command,
        /// The device's answer (`docs/device.md`, 6).
        status: Status,
    },
    /// A move failed.
    #[error("move: {0}")]
    Move(Status),
    /// The device broke its contract; the connection is given up.
    #[error("the device broke its contract: {0}")]
    Contract(&'static str),
    /// The device answered a command with what is no answer.
    #[error("the device broke its contract: {0}")]
    Response(ResponseError),
    /// The peer's device was reset or left (`DEVICE_GONE`). What it wrote before can still be read.
    #[error("the peer's device is gone")]
    PeerGone,
    /// The other end of a stream closed it.
    #[error("the other end has closed the stream")]
    Closed,
    /// The other end of a stream broke it off: it closed without having read everything, or is gone.
    #[error("the other end has broken the stream off")]
    Reset,
    /// The other end of a stream broke SMC-D's protocol; the stream is of no use any more.
    #[error(transparent)]
    Protocol(#[from] crate::proto::smc::ring::CursorViolation),
    /// The other end of a channel broke the protocol of messages; the channel is of no use any more.
    #[error("the peer broke the protocol of messages: {0}")]
    Peer(&'static str),
    /// A message does not fit into the buffer.
    #[error("a message of {len} bytes does not fit into a buffer of {size} bytes")]
    MessageTooLong {
        /// The message's length, in bytes.
        len: usize,
        /// The buffer's size, in bytes.
        size: usize,
    },
    /// The daemon closed the connection or died. Mapped memory stays, nothing new can be asked.
    #[error("the connection to the daemon is lost")]
    Disconnected,
    /// A device of a parent process: it works only in the process that connected it.
    #[error("this device belongs to the parent process; connect one of your own after fork()")]
    Forked,
    /// Outside of a buffer.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// The operating system refused something.
    #[error("cannot {doing}: {error}")]
    Os {
        /// What was being done.
        doing: &'static str,
        /// The reason.
        error: io::Error,
    },
}

/// An access that does not lie in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at offset {offset} do not lie in a buffer of {size} bytes")]
pub struct OutOfBounds {
    /// Where the access would start, in bytes.
    pub offset: usize,
    /// Its length, in bytes.
    pub len: usize,
    /// The buffer's size, in bytes.
    pub size: usize,
}

impl From<ResponseError> for Error {
    fn from(error: ResponseError) -> Error {
        Error::Response(error)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Os { error, .. } | Error::Connect { error, .. } | Error::File { error, .. } => {
                error.kind()
            }
            Error::Closed => io::ErrorKind::BrokenPipe,
            Error::PeerGone | Error::Disconnected | Error::Protocol(_) | Error::Reset | Error::Peer(_) => {
                io::ErrorKind::ConnectionReset
            }
            Error::OutOfBounds(_) | Error::MessageTooLong { .. } => io::ErrorKind::InvalidInput,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl Error {
    /// For `map_err`: the operating system refused to do this.
    pub(crate) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |error| Error::Os { doing, error }
    }

    /// For `map_err`: nix's error instead of the standard library's.
    pub(crate) fn errno(doing: &'static str) -> impl FnOnce(nix::Error) -> Error {
        move |errno| Error::Os { doing, error: errno.into() }
    }

    /// The device's answer, if it was one.
    pub fn status(&self) -> Option<Status> {
        match self {
            Error::Refused { status, .. } | Error::Move(status) => Some(*status),
            _ => None,
        }
    }
}
