//! Sockets that the daemon makes in the file system: no stale one in the way, none left behind, never anybody else's.

use crate::keep;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use std::fs::{self, Permissions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket whose path goes away with it.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    number: u64,
}

/// Why there is no socket, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error("{0}: a process already listens on this socket; stop it or choose another path")]
    InUse(PathBuf),
    /// A file, a folder, anything that is not a socket.
    #[error("{0}: exists and is not a socket; remove it or choose another path")]
    NotSocket(PathBuf),
    /// More than a socket address has room for.
    #[error("{0}: a socket's path has at most 107 bytes; choose a shorter one")]
    TooLong(PathBuf),
    /// The operating system refused.
    #[error("{path}: cannot make the socket: {error}{}", advice(error))]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// What to do about it, if that is known.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            "; make its folder first, or choose another path"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose a folder that this user may write to"
        }
        _ => "",
    }
}

impl Socket {
    /// Listens at `path`, with these permission bits from the first moment on. A socket that nobody listens on is
    /// replaced.
    pub fn bind(path: &Path, mode: u32) -> Result<Socket, SocketError> {
        let failed = |error| SocketError::Io { path: path.into(), error };
        if path.as_os_str().len() > 107 {
            return Err(SocketError::TooLong(path.into()));
        }
        remove_stale(path)?;
        let listener = listen_at(path, mode).map_err(failed)?;
        let inode = fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).map_err(failed)?;
        Ok(Socket { listener, path: path.into(), inode, number: keep::number() })
    }

    /// The one that another worker made at `path`, and that a keeper has under this number; `None` if something else is
    /// there now.
    pub fn adopt(path: &Path, listener: UnixListener, inode: (u64, u64), number: u64) -> Option<Socket> {
        let is_there = fs::symlink_metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == inode);
        is_there.then(|| Socket { listener, path: path.into(), inode, number })
    }

    /// Device and inode of the path.
    pub fn inode(&self) -> (u64, u64) {
        self.inode
    }

    /// The number under which a keeper has it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Deref for Socket {
    type Target = UnixListener;

    fn deref(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Somebody may have put another socket there meanwhile: that one stays.
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Linux gives the file the socket's own permission bits, less the umask's: so nobody gets in before the last line.
    fchmod(&fd, Mode::from_bits_truncate(mode))?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, Permissions::from_mode(mode))?;
    listen(&fd, Backlog::MAXALLOWABLE)?;
    Ok(fd.into())
}

/// Removes a socket at `path` that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let failed = |error| SocketError::Io { path: path.into(), error };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotSocket(path.into())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
        Ok(_) => Err(SocketError::InUse(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_has_its_mode_and_goes_away_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = Socket::bind(&path, 0o640).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path, 0o660).unwrap();
        assert!(matches!(Socket::bind(&path, 0o660), Err(SocketError::InUse(_))));
        drop(socket);
    }

    #[test]
    fn a_file_in_the_way_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::bind(&path, 0o660), Err(SocketError::NotSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let long = folder.path().join("x".repeat(108));
        assert!(matches!(Socket::bind(&long, 0o660), Err(SocketError::TooLong(_))));
        let error = Socket::bind(&folder.path().join("none/s"), 0o660).unwrap_err();
        assert!(error.to_string().ends_with("make its folder first, or choose another path"), "{error}");
    }

    #[test]
    fn a_socket_that_took_its_place_is_not_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let socket = Socket::bind(&path, 0o660).unwrap();
        fs::remove_file(&path).unwrap();
        let other = UnixListener::bind(&path).unwrap();
        drop(socket);
        assert!(path.exists());
        drop(other);
    }
}
