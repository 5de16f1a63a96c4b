//! The process as a vhost-user front-end of its own: it connects to the daemon as a VMM would, shares its memory,
//! and maps what the daemon asks for into its window.

use super::Transport;
use crate::error::Error;
use crate::proto::config::CONFIG_SIZE;
use crate::proto::features::Features;
use crate::proto::{MAX_QUEUE_SIZE, WINDOW_SHMID};
use crate::ram::{DmaBuffer, Ram, Region};
use crate::sync::lock;
use crate::virtqueue::Virtqueue;
use crate::window::Window;
use nix::sys::socket::{MsgFlags, recv};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserMMap, VhostUserMMapFlags, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Size of a vhost-user message's header, in bytes; its last four are the size of the body.
const HEADER: usize = 12;
/// The largest body of a request of the daemon that is waited for, in bytes: a map request's has 40.
const MAX_REQUEST: usize = 512;
/// If so many bytes of answers were not read by the daemon, it breaks the protocol.
const MAX_UNREAD: usize = 64 * 1024;

/// A connection to the daemon.
pub(crate) struct VhostUser {
    /// Blocking requests to the daemon, one at a time.
    frontend: Mutex<Frontend>,
    /// The same socket, to be watched.
    socket: UnixStream,
    ram: Ram,
    queues: Vec<QueueFds>,
    offered: u64,
    mapping: Option<MapServer>,
    window: Option<Arc<Window>>,
    started: bool,
}

struct QueueFds {
    kick: EventFd,
    call: EventFd,
}

/// The daemon's requests.
struct MapServer {
    handler: Mutex<FrontendReqHandler<Mapper>>,
    /// The descriptor of `handler`, which is open as long.
    fd: RawFd,
}

/// Maps for the daemon.
struct Mapper(Arc<Window>);

impl VhostUserFrontendReqHandler for Mapper {
    fn shmem_map(&self, request: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        let VhostUserMMap { shmid, fd_offset, shm_offset, len, flags, .. } = *request;
        if shmid != WINDOW_SHMID || flags != VhostUserMMapFlags::WRITABLE.bits() {
            return Err(nix::Error::EINVAL.into());
        }
        // SAFETY: the handler owns the descriptor for the time of this call.
        let file = unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) };
        self.0.map(shm_offset, len, file, fd_offset)?;
        Ok(0)
    }

    fn shmem_unmap(&self, request: &VhostUserMMap) -> HandlerResult<u64> {
        let VhostUserMMap { shmid, shm_offset, len, .. } = *request;
        if shmid != WINDOW_SHMID {
            return Err(nix::Error::EINVAL.into());
        }
        self.0.unmap(shm_offset, len)?;
        Ok(0)
    }
}

fn vhost(doing: &'static str) -> impl FnOnce(vhost::Error) -> Error {
    move |error| Error::Vhost { doing, error }
}

impl VhostUser {
    /// Connects to a daemon's hub or device socket. Without `map` it behaves as a front-end that cannot map.
    pub(crate) fn connect(path: &Path, map: bool) -> Result<VhostUser, Error> {
        let connect = || -> io::Result<_> {
            let socket = UnixStream::connect(path)?;
            Ok((socket.try_clone()?, socket))
        };
        let (socket, stream) = connect().map_err(|error| Error::Connect { path: path.into(), error })?;
        // The number of queues is the daemon's to say.
        let mut frontend = Frontend::from_stream(stream, u64::from(u16::MAX));
        frontend.set_owner().map_err(vhost("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(vhost("GET_FEATURES"))?;
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::Missing("VHOST_USER_F_PROTOCOL_FEATURES"));
        }
        let can_map = VhostUserProtocolFeatures::SHMEM
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD;
        let needed = VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let there = frontend.get_protocol_features().map_err(vhost("GET_PROTOCOL_FEATURES"))?;
        if !there.contains(needed) {
            return Err(Error::Missing("VHOST_USER_PROTOCOL_F_CONFIG, _REPLY_ACK and _CONFIGURE_MEM_SLOTS"));
        }
        let map = map && there.contains(can_map);
        let mut wanted = needed | (there & VhostUserProtocolFeatures::MQ);
        if map {
            wanted |= can_map;
        }
        frontend.set_protocol_features(wanted).map_err(vhost("SET_PROTOCOL_FEATURES"))?;
        // What the device offers depends on what the front-end can do.
        let offered = frontend.get_features().map_err(vhost("GET_FEATURES"))?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);

        let mut window = None;
        let mut mapping = None;
        if map {
            let regions = frontend.get_shmem_config().map_err(vhost("GET_SHMEM_CONFIG"))?;
            let sizes = regions.memory_sizes;
            let size = sizes[usize::from(WINDOW_SHMID)];
            let reserved =
                Arc::new(Window::reserve(size).map_err(Error::os("reserve the window's address range"))?);
            let mapper = Arc::new(Mapper(reserved.clone()));
            let mut handler = FrontendReqHandler::new(mapper).map_err(|e| {
                vhost("making the channel for the daemon's requests")(vhost::Error::VhostUserProtocol(e))
            })?;
            handler.set_reply_ack_flag(true);
            let theirs = handler.get_tx_raw_fd();
            frontend.set_backend_request_fd(&theirs).map_err(vhost("SET_BACKEND_REQ_FD"))?;
            mapping = Some(MapServer { fd: handler.as_raw_fd(), handler: Mutex::new(handler) });
            window = Some(reserved);
        }
        Ok(VhostUser {
            frontend: Mutex::new(frontend),
            socket,
            ram: Ram::default(),
            queues: Vec::new(),
            offered,
            mapping,
            window,
            started: false,
        })
    }

    fn describe(region: &Region) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: region.address(),
            memory_size: region.mapping().len() as u64,
            userspace_addr: region.mapping().base().as_ptr() as u64,
            mmap_offset: 0,
            mmap_handle: region.file().as_raw_fd(),
        }
    }

    fn start_queue(
        frontend: &mut Frontend,
        number: usize,
        queue: &Virtqueue,
        fds: &QueueFds,
    ) -> vhost::Result<()> {
        let layout = queue.layout();
        let base = queue.memory().memory().as_ptr() as u64;
        frontend.set_vring_num(number, layout.size)?;
        frontend.set_vring_addr(
            number,
            &VringConfigData {
                queue_max_size: layout.size,
                queue_size: layout.size,
                flags: 0,
                desc_table_addr: base,
                used_ring_addr: base + layout.used as u64,
                avail_ring_addr: base + layout.available as u64,
                log_addr: None,
            },
        )?;
        frontend.set_vring_base(number, 0)?;
        frontend.set_vring_call(number, &fds.call)?;
        frontend.set_vring_kick(number, &fds.kick)?;
        frontend.set_vring_enable(number, true)
    }
}

impl Transport for VhostUser {
    fn offered(&self) -> Features {
        Features::from_bits_truncate(self.offered)
    }

    fn accept(&mut self, features: Features) -> Result<Vec<u8>, Error> {
        let mut frontend = lock(&self.frontend);
        let bits = features.bits() | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        frontend.set_features(bits).map_err(vhost("SET_FEATURES"))?;
        let (_, config) = frontend
            .get_config(0, CONFIG_SIZE as u32, VhostUserConfigFlags::empty(), &[0; CONFIG_SIZE])
            .map_err(vhost("GET_CONFIG"))?;
        Ok(config)
    }

    fn window(&self) -> Option<&Window> {
        self.window.as_deref()
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), Error> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"));
        for _ in queues {
            self.queues.push(QueueFds { kick: eventfd()?, call: eventfd()? });
        }
        let mut frontend = lock(&self.frontend);
        let regions: Vec<_> = self.ram.regions().iter().map(|region| VhostUser::describe(region)).collect();
        frontend.set_mem_table(&regions).map_err(vhost("SET_MEM_TABLE"))?;
        // The control queue comes last: it starts the device.
        for (number, (queue, fds)) in queues.iter().zip(&self.queues).enumerate().rev() {
            VhostUser::start_queue(&mut frontend, number, queue, fds).map_err(vhost("starting a queue"))?;
        }
        self.started = true;
        Ok(())
    }

    fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error> {
        self.ram.allocate(len, align, &|region| {
            // Before the start, the table of all regions tells.
            if !self.started {
                return Ok(());
            }
            lock(&self.frontend)
                .add_mem_region(&VhostUser::describe(region))
                .map_err(vhost("ADD_MEM_REG"))?;
            Ok(())
        })
    }

    fn kick(&self, queue: u16) {
        // It fails only if 2^64 - 2 kicks were not read.
        let _ = self.queues[usize::from(queue)].kick.write(1);
    }

    fn interrupt(&self, queue: u16) -> BorrowedFd<'_> {
        let fd = self.queues[usize::from(queue)].call.as_raw_fd();
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn hangup(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn give_up(&self) {
        // It is gone already if this fails.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn requests(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor is open as long as `self`.
        self.mapping.as_ref().map(|m| unsafe { BorrowedFd::borrow_raw(m.fd) })
    }

    fn serve(&self) -> Result<(), Error> {
        let Some(server) = &self.mapping else { return Ok(()) };
        let mut handler = lock(&server.handler);
        while whole_request(server.fd)? {
            match handler.handle_request() {
                // A refused request was answered; the daemon draws its conclusions.
                Ok(_) | Err(vhost::vhost_user::Error::ReqHandlerError(_)) => {}
                Err(e) => {
                    return Err(vhost("serving the daemon's request")(vhost::Error::VhostUserProtocol(e)));
                }
            }
        }
        Ok(())
    }
}

/// Whether a whole request waits, so that handling it does not block: not for the rest of it, nor for room for the
/// answer.
fn whole_request(fd: RawFd) -> Result<bool, Error> {
    let mut header = [0; HEADER];
    let there = match recv(fd, &mut header, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT) {
        Ok(there) => there,
        Err(nix::Error::EAGAIN | nix::Error::EINTR) => 0,
        Err(errno) => return Err(Error::errno("read the daemon's requests")(errno)),
    };
    if there < HEADER {
        return Ok(false);
    }
    let size = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]) as usize;
    if size > MAX_REQUEST {
        return Err(Error::Contract("a request on the back-end channel is too large"));
    }
    if bytes(fd, libc::TIOCOUTQ) > MAX_UNREAD {
        return Err(Error::Contract("the daemon does not read the answers to its requests"));
    }
    Ok(bytes(fd, libc::FIONREAD) >= HEADER + size)
}

/// Bytes in a socket's queue: to be read (`FIONREAD`), or not yet read by the other side (`TIOCOUTQ`).
fn bytes(fd: RawFd, queue: libc::Ioctl) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one int.
    unsafe { libc::ioctl(fd, queue, &mut bytes) };
    usize::try_from(bytes).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn request(size: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER + size as usize];
        bytes[8..12].copy_from_slice(&size.to_ne_bytes());
        bytes
    }

    #[test]
    fn part_of_a_request_is_waited_for() {
        let (here, mut there) = UnixStream::pair().unwrap();
        assert!(!whole_request(here.as_raw_fd()).unwrap());
        let request = request(40);
        for part in request.chunks(20) {
            assert!(!whole_request(here.as_raw_fd()).unwrap());
            there.write_all(part).unwrap();
        }
        assert!(whole_request(here.as_raw_fd()).unwrap());
    }

    #[test]
    fn an_endless_request_ends_the_connection() {
        let (here, mut there) = UnixStream::pair().unwrap();
        there.write_all(&request(4096)).unwrap();
        assert!(matches!(whole_request(here.as_raw_fd()), Err(Error::Contract(_))));
    }

    #[test]
    fn nobody_there_is_said_with_the_path() {
        let Err(error) = VhostUser::connect(Path::new("/nonexistent/hub"), true) else { panic!("connected") };
        assert!(error.to_string().contains("/nonexistent/hub"), "{error}");
    }
}
