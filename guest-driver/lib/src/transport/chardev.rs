//! A device of the kernel module's, through its character device (`guest-driver/kernel/uapi.h`).
//!
//! The kernel shares one device among many programs, so this one has no queues in it, but system calls. Here they are made
//! of the queues that the rest of the library knows: a kick is served by the thread that kicks. DMBs are mapped
//! one by one, at the place in the window that the kernel gave them.

use super::Transport;
use crate::error::Error;
use crate::fork::Process;
use crate::proto::features::Features;
use crate::proto::{CONTROL_QUEUE, EVENT_QUEUE, GRANULE, MAX_QUEUE_SIZE};
use crate::ram::{DmaBuffer, Ram};
use crate::shared::SharedMemory;
use crate::sync::lock;
use crate::virtqueue::device_side::DeviceSide;
use crate::virtqueue::{Piece, Virtqueue};
use crate::will::LastMove;
use crate::window::Window;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The version of the interface that is spoken here.
const VERSION: u32 = 1;
/// Size of an event, in bytes.
const EVENT: usize = 64;

/// `struct dmbridge_info`.
#[repr(C)]
struct Info {
    version: u32,
    max_slots: u32,
    features: u64,
    config: [u8; 128],
}

/// `struct dmbridge_request`.
#[repr(C)]
struct Request {
    command: u64,
    answer: u64,
    command_len: u32,
    answer_len: u32,
}

/// `struct dmbridge_move`.
#[repr(C)]
struct Move {
    header: [u8; 32],
    pieces: u64,
    num_pieces: u32,
    reserved: u32,
}

/// `struct dmbridge_will`.
#[repr(C)]
struct LeaveWill {
    token: u64,
    offset: u64,
    mask: u64,
    data: [u8; 8],
    len: u32,
    reserved: u32,
}

/// The number of an ioctl: its direction, the size of its argument, the module's letter and its own number.
const fn ioctl_number(direction: u32, size: usize, number: u32) -> libc::Ioctl {
    (direction << 30 | (size as u32) << 16 | 0xdb << 8 | number) as libc::Ioctl
}

const INFO: libc::Ioctl = ioctl_number(2, size_of::<Info>(), 0);
const COMMAND: libc::Ioctl = ioctl_number(1, size_of::<Request>(), 1);
const MOVE: libc::Ioctl = ioctl_number(1, size_of::<Move>(), 2);
const LEAVE_WILL: libc::Ioctl = ioctl_number(1, size_of::<LeaveWill>(), 3);
const WITHDRAW_WILL: libc::Ioctl = ioctl_number(0, 0, 4);

/// Commands that map or unmap, by class and number.
const REGISTER: (u8, u8) = (1, 0);
const UNREGISTER: (u8, u8) = (1, 1);
const ATTACH: (u8, u8) = (1, 2);
const DETACH: (u8, u8) = (1, 3);

/// The character devices of this machine, in the order of their numbers.
pub fn find() -> Vec<PathBuf> {
    let entries = fs::read_dir("/dev").into_iter().flatten().flatten();
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("dmbridge")?.parse::<u32>().ok();
    let mut found: Vec<_> =
        entries.map(|entry| entry.path()).filter_map(|path| Some((number(&path)?, path))).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// An open character device.
pub(crate) struct Chardev {
    file: File,
    offered: Features,
    config: Vec<u8>,
    window: Window,
    ram: Ram,
    queues: Vec<Mutex<DeviceSide>>,
    interrupts: Vec<EventFd>,
    /// Events that found no buffer.
    events: Mutex<VecDeque<[u8; EVENT]>>,
    /// What is mapped: whether this program owns it, and its token; place and length.
    mapped: Mutex<HashMap<(bool, u64), (u64, u64)>>,
    hangup: PipeReader,
    /// Closed: the device is gone.
    alive: Mutex<Option<PipeWriter>>,
    process: Process,
}

impl Chardev {
    /// Opens one.
    pub(crate) fn open(path: &Path) -> Result<Chardev, Error> {
        let failed = |error| Error::File { path: path.into(), error };
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(failed)?;
        let mut info = Info { version: 0, max_slots: 0, features: 0, config: [0; 128] };
        // SAFETY: the request writes one such structure.
        if unsafe { libc::ioctl(file.as_raw_fd(), INFO, &raw mut info) } < 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        if info.version != VERSION {
            let text =
                format!("it speaks version {} of the interface, and this program {VERSION}", info.version);
            return Err(failed(io::Error::new(io::ErrorKind::Unsupported, text)));
        }
        let config = crate::proto::config::Config::parse(&info.config)?;
        let window = Window::reserve(config.window_size.get())
            .map_err(Error::os("reserve the window's address range"))?;
        let (hangup, alive) = io::pipe().map_err(Error::os("make a pipe"))?;
        Ok(Chardev {
            file,
            // Who sleeps here sleeps in another kernel than its peer.
            offered: Features::from_bits_truncate(info.features) - Features::FUTEX,
            config: info.config.to_vec(),
            window,
            ram: Ram::default(),
            queues: Vec::new(),
            interrupts: Vec::new(),
            events: Mutex::default(),
            mapped: Mutex::default(),
            hangup,
            alive: Mutex::new(Some(alive)),
            process: Process::current(),
        })
    }

    fn memory(&self, piece: Piece) -> SharedMemory {
        self.ram.at(piece).expect("this library's own descriptors name its own memory")
    }

    /// Serves what waits in a queue.
    fn serve_queue(&self, queue: u16) {
        let mut side = lock(&self.queues[usize::from(queue)]);
        let mut served = false;
        while let Some((head, readable, writable)) = side.take() {
            let readable: Vec<_> = readable.into_iter().map(|piece| self.memory(piece)).collect();
            let answer = match queue {
                CONTROL_QUEUE => self.command(&readable, writable.iter().map(|piece| piece.len).sum()),
                _ => vec![self.post_move(&readable), 0, 0, 0, 0, 0, 0, 0],
            };
            let mut rest = answer.as_slice();
            for piece in writable {
                let (now, later) = rest.split_at(rest.len().min(piece.len as usize));
                self.memory(piece).slice(..now.len()).copy_from_slice(now);
                rest = later;
            }
            side.give(head.into(), answer.len() as u32);
            served = true;
        }
        if served {
            self.interrupt_queue(queue);
        }
    }

    fn interrupt_queue(&self, queue: u16) {
        // It fails only if 2^64 - 2 interrupts were not taken.
        let _ = self.interrupts[usize::from(queue)].write(1);
    }

    fn command(&self, readable: &[SharedMemory], room: u32) -> Vec<u8> {
        let mut command = Vec::new();
        for piece in readable {
            let at = command.len();
            command.resize(at + piece.len(), 0);
            piece.as_slice().copy_to_slice(&mut command[at..]);
        }
        let what = (command.first().copied().unwrap_or(u8::MAX), command.get(1).copied().unwrap_or(u8::MAX));
        let word = |bytes: &[u8], at: usize| {
            bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        // First, so that a handle that is still in use never meets a mapping without memory.
        if what == UNREGISTER || what == DETACH {
            self.unmap(what == UNREGISTER, word(&command, 8));
        }
        let mut answer = vec![0; room as usize];
        let Some(len) = self.ask(&command, &mut answer) else { return Vec::new() };
        answer.truncate(len);
        if answer.first() == Some(&0) {
            let (token, undo, mapped) = match what {
                REGISTER => {
                    let token = word(&answer, 8);
                    (token, UNREGISTER, self.map(true, token, word(&answer, 16), word(&answer, 32)))
                }
                ATTACH => {
                    let token = word(&command, 8);
                    (token, DETACH, self.map(false, token, word(&answer, 24), word(&answer, 40)))
                }
                _ => return answer,
            };
            if let Err(error) = mapped {
                // As a front-end that cannot map: the device answers that, and nothing was done.
                tracing::debug!("{:?}: a DMB cannot be mapped: {error}", self.file);
                let mut command = vec![undo.0, undo.1, 0, 0, 0, 0, 0, 0];
                command.extend(token.to_le_bytes());
                self.ask(&command, &mut [0; 8]);
                return vec![libc::EIO as u8, 0, 0, 0, 0, 0, 0, 0];
            }
        }
        answer
    }

    /// Has the kernel do a command; the length of its answer, or `None` if the device is gone.
    fn ask(&self, command: &[u8], answer: &mut [u8]) -> Option<usize> {
        let request = Request {
            command: command.as_ptr() as u64,
            answer: answer.as_mut_ptr() as u64,
            command_len: command.len() as u32,
            answer_len: answer.len() as u32,
        };
        // SAFETY: reads one such structure, and the command; writes at most `answer_len` bytes of the answer.
        let len = unsafe { libc::ioctl(self.file.as_raw_fd(), COMMAND, &raw const request) };
        if len < 0 {
            // Its descriptor says so too.
            self.give_up();
        }
        usize::try_from(len).ok()
    }

    /// Maps a DMB with its control line's page, which lies before it.
    fn map(&self, owned: bool, token: u64, offset: u64, size: u64) -> Result<(), nix::Error> {
        let place = offset.checked_sub(GRANULE).ok_or(nix::Error::EINVAL)?;
        let len = size.checked_add(GRANULE).ok_or(nix::Error::EINVAL)?;
        self.window.map(place, len, self.file.as_fd(), place)?;
        lock(&self.mapped).insert((owned, token), (place, len));
        Ok(())
    }

    fn unmap(&self, owned: bool, token: u64) {
        if let Some((place, len)) = lock(&self.mapped).remove(&(owned, token)) {
            let _ = self.window.unmap(place, len);
        }
    }

    /// Puts memory of this process in the place of all that is mapped.
    fn part(&self) {
        for (_, (place, len)) in lock(&self.mapped).drain() {
            let _ = self.window.unmap(place, len);
        }
    }

    /// Moves; the status.
    fn post_move(&self, readable: &[SharedMemory]) -> u8 {
        let Some((header, data)) = readable.split_first() else { return libc::EINVAL as u8 };
        let pieces: Vec<_> = data
            .iter()
            .map(|piece| libc::iovec { iov_base: piece.as_ptr().cast(), iov_len: piece.len() })
            .collect();
        let mut request = Move {
            header: [0; 32],
            pieces: pieces.as_ptr() as u64,
            num_pieces: pieces.len() as u32,
            reserved: 0,
        };
        if header.read(0, &mut request.header).is_err() {
            return libc::EINVAL as u8;
        }
        // SAFETY: reads one such structure, the array of pieces, and the pieces, which all live until it has returned.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), MOVE, &raw const request) } >= 0 {
            return 0;
        }
        match io::Error::last_os_error().raw_os_error() {
            // Another program's token, or SMC's: to this one there is no such DMB.
            Some(libc::EBUSY) => libc::ENOENT as u8,
            Some(code @ (libc::ENOENT | libc::EINVAL | libc::E2BIG | libc::EFAULT | libc::ECONNRESET)) => {
                code as u8
            }
            _ => libc::EIO as u8,
        }
    }

    /// Gives the events that wait to the buffers that are posted.
    fn deliver(&self) {
        let mut events = lock(&self.events);
        let Some(queue) = self.queues.get(usize::from(EVENT_QUEUE)) else { return };
        let mut side = lock(queue);
        let mut delivered = false;
        while let Some(event) = events.front() {
            let Some((head, _, writable)) = side.take() else { break };
            let len = match writable.first() {
                Some(piece) if piece.len as usize >= EVENT => {
                    self.memory(*piece).slice(..EVENT).copy_from_slice(event);
                    events.pop_front();
                    EVENT
                }
                _ => 0,
            };
            side.give(head.into(), len as u32);
            delivered = true;
        }
        drop((side, events));
        if delivered {
            self.interrupt_queue(EVENT_QUEUE);
        }
    }
}

impl Transport for Chardev {
    fn offered(&self) -> Features {
        self.offered
    }

    fn accept(&mut self, _: Features) -> Result<Vec<u8>, Error> {
        Ok(self.config.clone())
    }

    fn window(&self) -> Option<&Window> {
        Some(&self.window)
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), Error> {
        for queue in queues {
            self.queues.push(Mutex::new(DeviceSide::new(queue)));
            let interrupt = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::os("make an eventfd"))?;
            self.interrupts.push(interrupt);
        }
        Ok(())
    }

    fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error> {
        self.ram.allocate(len, align, &|_| Ok(()))
    }

    fn kick(&self, queue: u16) {
        match queue {
            EVENT_QUEUE => self.deliver(),
            queue => self.serve_queue(queue),
        }
    }

    fn interrupt(&self, queue: u16) -> BorrowedFd<'_> {
        let fd = self.interrupts[usize::from(queue)].as_raw_fd();
        // SAFETY: the descriptor is open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn hangup(&self) -> BorrowedFd<'_> {
        self.hangup.as_fd()
    }

    fn give_up(&self) {
        lock(&self.alive).take();
    }

    fn requests(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn leave_will(&self, last: &LastMove) -> Option<libc::c_ulong> {
        let LastMove { token, offset, byte, mask } = *last;
        let data = [byte, 0, 0, 0, 0, 0, 0, 0];
        let will = LeaveWill { token: token.to_bits(), offset, mask, data, len: 1, reserved: 0 };
        // SAFETY: reads one such structure.
        let number = unsafe { libc::ioctl(self.file.as_raw_fd(), LEAVE_WILL, &raw const will) };
        if number <= 0 {
            // A module of an earlier version knows of no wills: then the peer learns of an end later.
            tracing::debug!("no will for {token}: {}", io::Error::last_os_error());
        }
        libc::c_ulong::try_from(number).ok().filter(|number| *number != 0)
    }

    fn withdraw_will(&self, number: libc::c_ulong) {
        // SAFETY: its argument is a number.
        unsafe { libc::ioctl(self.file.as_raw_fd(), WITHDRAW_WILL, number) };
    }

    /// Reads events.
    fn serve(&self) -> Result<(), Error> {
        let mut bytes = [0; 32 * EVENT];
        loop {
            match (&self.file).read(&mut bytes) {
                Ok(len) => {
                    let events = bytes[..len]
                        .chunks_exact(EVENT)
                        .filter_map(|event| <[u8; EVENT]>::try_from(event).ok());
                    lock(&self.events).extend(events);
                    self.deliver();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What is mapped stays so: the kernel puts memory of this process in its place if it has to.
                Err(_) => return Err(Error::Disconnected),
            }
        }
    }
}

impl Drop for Chardev {
    fn drop(&mut self) {
        // In a child of fork() the mappings are the parent's too: they stay, as the file does until both have closed it.
        if self.process.is_current() {
            self.part();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_the_ioctls_are_those_of_the_header() {
        assert_eq!((INFO, COMMAND, MOVE), (0x8090_db00, 0x4018_db01, 0x4030_db02));
        assert_eq!((LEAVE_WILL, WITHDRAW_WILL), (0x4028_db03, 0xdb04));
    }

    #[test]
    fn a_file_that_is_no_device_of_ours_is_refused_by_its_name() {
        for path in ["/dev/null", "/nonexistent/dmbridge0"] {
            let Err(error) = Chardev::open(Path::new(path)) else { panic!("{path} was opened") };
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
