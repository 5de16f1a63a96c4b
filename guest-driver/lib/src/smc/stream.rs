//! A connection, whatever carries it.

use super::Reason;
use super::carried::Carried;
use super::contacts::{Contacts, Link};
use super::fallen::Fallen;
use crate::stream::Patience;
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A connection, from [`Smc::connect`](super::Smc::connect) or [`SmcListener::accept`](super::SmcListener::accept): what
/// [`TcpStream`] is, over DMBs if both ends could agree on that.
///
/// Reading and writing take `&SmcStream` as well, from any number of threads. Dropping the last clone closes the
/// connection; if data is left unread then, the other end is reset, as with TCP.
///
/// After `fork()`, a child may use a connection as far as its memory goes; it cannot close it, and its peer, if that is in a
/// virtual machine, cannot be woken.
pub struct SmcStream {
    inner: Arc<Inner>,
}

/// The order of the fields is that in which they are dropped: the TCP connection goes last, after the last word over DMBs.
struct Inner {
    carrier: Carrier,
    tcp: TcpStream,
    nonblocking: AtomicBool,
    /// In nanoseconds; 0: none.
    read_timeout: AtomicU64,
    write_timeout: AtomicU64,
}

enum Carrier {
    Dmbs(Box<Carried>),
    Tcp(Box<Fallen>, Reason, Option<Reason>),
}

impl SmcStream {
    fn new(tcp: TcpStream, carrier: Carrier) -> io::Result<SmcStream> {
        tcp.set_nonblocking(false)?;
        let (read_timeout, write_timeout) = Default::default();
        let nonblocking = AtomicBool::new(false);
        Ok(SmcStream { inner: Arc::new(Inner { carrier, tcp, nonblocking, read_timeout, write_timeout }) })
    }

    pub(super) fn carried(tcp: TcpStream, link: Link) -> io::Result<SmcStream> {
        let carried = Carried::new(&tcp, link)?;
        SmcStream::new(tcp, Carrier::Dmbs(Box::new(carried)))
    }

    /// `late`: a proposal may still come.
    pub(super) fn fallen(
        contacts: &Contacts,
        tcp: TcpStream,
        reason: Reason,
        theirs: Option<Reason>,
        late: bool,
    ) -> io::Result<SmcStream> {
        contacts.count_fallback();
        SmcStream::new(tcp, Carrier::Tcp(Box::new(Fallen::new(late)), reason, theirs))
    }

    pub(super) fn tcp(&self) -> &TcpStream {
        &self.inner.tcp
    }

    pub(super) fn as_carried(&self) -> Option<&Carried> {
        match &self.inner.carrier {
            Carrier::Dmbs(carried) => Some(carried),
            Carrier::Tcp(..) => None,
        }
    }

    /// To be called where there are no DMBs.
    pub(super) fn as_fallen(&self) -> &Fallen {
        match &self.inner.carrier {
            Carrier::Tcp(fallen, ..) => fallen,
            Carrier::Dmbs(_) => unreachable!("the connection goes over DMBs"),
        }
    }

    /// Whether it goes over DMBs.
    pub fn is_smc(&self) -> bool {
        self.as_carried().is_some()
    }

    /// Why it does not, as Linux's AF_SMC would say it.
    pub fn fallback_reason(&self) -> Option<Reason> {
        match self.inner.carrier {
            Carrier::Dmbs(_) => None,
            Carrier::Tcp(_, reason, _) => Some(reason),
        }
    }

    /// What the other end said, if it was the one that declined.
    pub fn peer_diagnosis(&self) -> Option<Reason> {
        match self.inner.carrier {
            Carrier::Tcp(_, _, theirs) => theirs,
            Carrier::Dmbs(_) => None,
        }
    }

    /// The other end's address.
    ///
    /// # Errors
    ///
    /// As for [`TcpStream::peer_addr`].
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.inner.tcp.peer_addr()
    }

    /// This end's address.
    ///
    /// # Errors
    ///
    /// As for [`TcpStream::local_addr`].
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.tcp.local_addr()
    }

    /// Another handle of the same connection, with the same settings.
    ///
    /// # Errors
    ///
    /// None.
    pub fn try_clone(&self) -> io::Result<SmcStream> {
        Ok(SmcStream { inner: self.inner.clone() })
    }

    /// Ends one direction or both, as [`TcpStream::shutdown`] does: the other end reads what was written, and then the end.
    ///
    /// # Errors
    ///
    /// `NotConnected` if both ends have finished already; and if the other end sleeps and cannot be woken.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        let Some(carried) = self.as_carried() else { return self.inner.tcp.shutdown(how) };
        if carried.is_over() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        if how != Shutdown::Write {
            carried.stop_reading();
        }
        if how != Shutdown::Read {
            carried.stop_writing()?;
        }
        Ok(())
    }

    /// Whether what would wait fails with `WouldBlock` instead.
    ///
    /// # Errors
    ///
    /// As for [`TcpStream::set_nonblocking`].
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.inner.nonblocking.store(nonblocking, Ordering::Relaxed);
        self.inner.tcp.set_nonblocking(nonblocking)
    }

    /// How long reading waits; it then fails with `WouldBlock`. `None`: for ever.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a zero duration.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.tcp.set_read_timeout(timeout)?;
        self.inner.read_timeout.store(nanoseconds(timeout), Ordering::Relaxed);
        Ok(())
    }

    /// How long writing waits; it then fails with `WouldBlock` if nothing was written. `None`: for ever.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for a zero duration.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.inner.tcp.set_write_timeout(timeout)?;
        self.inner.write_timeout.store(nanoseconds(timeout), Ordering::Relaxed);
        Ok(())
    }

    /// How long reading waits.
    ///
    /// # Errors
    ///
    /// None.
    pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
        Ok(duration(&self.inner.read_timeout))
    }

    /// How long writing waits.
    ///
    /// # Errors
    ///
    /// None.
    pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
        Ok(duration(&self.inner.write_timeout))
    }

    /// As [`TcpStream::set_nodelay`]. Over DMBs nothing is ever held back.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.inner.tcp.set_nodelay(nodelay)
    }

    /// As [`TcpStream::nodelay`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn nodelay(&self) -> io::Result<bool> {
        self.inner.tcp.nodelay()
    }

    /// As [`TcpStream::set_ttl`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.inner.tcp.set_ttl(ttl)
    }

    /// As [`TcpStream::ttl`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn ttl(&self) -> io::Result<u32> {
        self.inner.tcp.ttl()
    }

    /// As [`TcpStream::take_error`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.inner.tcp.take_error()
    }

    /// The longest that a wait spins before it sleeps, as [`Dmb::set_spin`](crate::Dmb::set_spin) says. Without effect over
    /// TCP.
    pub fn set_spin(&self, longest: Duration) {
        if let Some(carried) = self.as_carried() {
            carried.set_spin(longest);
        }
    }

    /// Reads as [`Read::read`] does, and leaves everything there.
    ///
    /// # Errors
    ///
    /// As for reading.
    pub fn peek(&self, to: &mut [u8]) -> io::Result<usize> {
        let patience = self.read_patience();
        match self.as_carried() {
            Some(carried) => in_time(carried.receiver(patience)?.look(to, patience)?),
            None => {
                self.as_fallen().before_read(self.tcp(), patience != Patience::None)?;
                self.inner.tcp.peek(to)
            }
        }
    }

    /// For epoll and the like: what can be done at once, of reading and writing, as far as it is asked for. If that is not what is wanted,
    /// wait until [`readiness_fd`](Self::readiness_fd) tells, and ask again. Over TCP nothing is ever said to be possible at once: the
    /// descriptor tells.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    pub fn arm(&self, read: bool, write: bool) -> io::Result<(bool, bool)> {
        match self.as_carried() {
            Some(carried) => Ok(carried.arm(read, write)?),
            None => Ok((false, false)),
        }
    }

    /// The descriptor that belongs to [`arm`](Self::arm). Over DMBs it becomes readable, whatever was asked for, once after each
    /// arming. Over TCP it is the socket, which is to be watched for reading and writing as one wants to do.
    ///
    /// # Errors
    ///
    /// If there is no descriptor to be had.
    pub fn readiness_fd(&self) -> io::Result<BorrowedFd<'_>> {
        match self.as_carried() {
            Some(carried) => Ok(carried.fd()?),
            None => Ok(self.inner.tcp.as_fd()),
        }
    }

    pub(super) fn read_patience(&self) -> Patience {
        self.patience(&self.inner.read_timeout)
    }

    pub(super) fn write_patience(&self) -> Patience {
        self.patience(&self.inner.write_timeout)
    }

    fn patience(&self, timeout: &AtomicU64) -> Patience {
        if self.inner.nonblocking.load(Ordering::Relaxed) {
            return Patience::None;
        }
        match duration(timeout).and_then(|timeout| Instant::now().checked_add(timeout)) {
            Some(deadline) => Patience::Until(deadline),
            None => Patience::Forever,
        }
    }

    pub(super) fn read_with(&self, to: &mut [u8], patience: Patience) -> io::Result<usize> {
        match self.as_carried() {
            Some(carried) => in_time(carried.receiver(patience)?.read_some(to, patience)?),
            None => {
                self.as_fallen().before_read(self.tcp(), patience != Patience::None)?;
                self.tcp().read(to)
            }
        }
    }

    /// Writes all of it, as TCP does, unless it may not wait or not that long.
    pub(super) fn write_with(&self, from: &[u8], patience: Patience) -> io::Result<usize> {
        let Some(carried) = self.as_carried() else {
            self.as_fallen().before_write(self.tcp())?;
            return self.tcp().write(from);
        };
        let mut sender = carried.sender(patience)?;
        if from.is_empty() {
            sender.check()?;
            return Ok(0);
        }
        let mut done = 0;
        while done < from.len() {
            match sender.write_some(&from[done..], patience) {
                Ok(0) => break,
                Ok(sent) => done += sent,
                // What was written is told first; the error comes again.
                Err(_) if done != 0 => break,
                Err(error) => return Err(error.into()),
            }
        }
        in_time((done != 0).then_some(done))
    }
}

/// Nothing in time is an error.
fn in_time(done: Option<usize>) -> io::Result<usize> {
    done.ok_or_else(|| io::ErrorKind::WouldBlock.into())
}

fn nanoseconds(timeout: Option<Duration>) -> u64 {
    timeout.map_or(0, |timeout| u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX))
}

fn duration(timeout: &AtomicU64) -> Option<Duration> {
    Some(timeout.load(Ordering::Relaxed)).filter(|ns| *ns != 0).map(Duration::from_nanos)
}

impl Read for &SmcStream {
    #[inline]
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.read_with(to, self.read_patience())
    }

    fn read_vectored(&mut self, to: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if !self.is_smc() {
            self.as_fallen().before_read(self.tcp(), self.read_patience() != Patience::None)?;
            return self.tcp().read_vectored(to);
        }
        if to.iter().all(|part| part.is_empty()) {
            return self.read_with(&mut [], self.read_patience());
        }
        let mut done = 0;
        for part in to.iter_mut().filter(|part| !part.is_empty()) {
            let patience = if done == 0 { self.read_patience() } else { Patience::None };
            match self.read_with(part, patience) {
                Ok(len) => {
                    done += len;
                    if len < part.len() {
                        break;
                    }
                }
                Err(_) if done != 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }
}

impl Write for &SmcStream {
    #[inline]
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.write_with(from, self.write_patience())
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.is_smc() {
            self.as_fallen().before_write(self.tcp())?;
            return self.tcp().write_vectored(from);
        }
        let patience = self.write_patience();
        if from.iter().all(|part| part.is_empty()) {
            return self.write_with(&[], patience);
        }
        let mut done = 0;
        for part in from.iter().filter(|part| !part.is_empty()) {
            match self.write_with(part, patience) {
                Ok(len) => {
                    done += len;
                    if len < part.len() {
                        break;
                    }
                }
                Err(_) if done != 0 => break,
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    /// Nothing is held back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for SmcStream {
    #[inline]
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        (&*self).read(to)
    }

    fn read_vectored(&mut self, to: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(to)
    }
}

impl Write for SmcStream {
    #[inline]
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        (&*self).write(from)
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for SmcStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SmcStream")
            .field("local", &self.local_addr().ok())
            .field("peer", &self.peer_addr().ok())
            .field("fallback", &self.fallback_reason())
            .finish()
    }
}
