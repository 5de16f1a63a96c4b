//! A device for tests, in this process, that answers as a test tells it to: correctly or not.

use super::Transport;
use crate::error::Error;
use crate::proto::config::{CONFIG_SIZE, Config, MAGIC, VERSION_MAJOR};
use crate::proto::features::Features;
use crate::proto::ids::Gid;
use crate::proto::{EVENT_QUEUE, GRANULE, MAX_QUEUE_SIZE};
use crate::ram::{DmaBuffer, Ram};
use crate::shared::SharedSlice;
use crate::sync::lock;
use crate::virtqueue::device_side::DeviceSide;
use crate::virtqueue::{Piece, Virtqueue};
use crate::window::Window;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::collections::VecDeque;
use std::io::Read;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes;

/// Size of the window; its first half is mapped.
pub(crate) const WINDOW: u64 = 2 << 20;

/// What the device does with a chain.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// Written into the writable part.
    pub(crate) bytes: Vec<u8>,
    /// Instead of the number of bytes.
    pub(crate) len: Option<u32>,
    /// Instead of the chain's head.
    pub(crate) head: Option<u32>,
}

impl From<Vec<u8>> for Answer {
    fn from(bytes: Vec<u8>) -> Answer {
        Answer { bytes, len: None, head: None }
    }
}

/// The device's side, for the test.
pub(crate) struct FakeDevice {
    ram: Ram,
    queues: Mutex<Vec<DeviceSide>>,
    calls: Vec<EventFd>,
    /// For the chains of the control and the move queues, in order. With none left, chains stay where they are.
    answers: Mutex<VecDeque<Answer>>,
    /// What was read of the chains.
    pub(crate) asked: Mutex<Vec<Vec<u8>>>,
    window: Window,
    config: Config,
    here: UnixStream,
    there: UnixStream,
}

/// The driver's side.
pub(crate) struct Fake(pub(crate) Arc<FakeDevice>);

impl FakeDevice {
    pub(crate) fn new() -> Arc<FakeDevice> {
        let file = memfd_create(c"extent", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, WINDOW as i64 / 2).unwrap();
        let window = Window::reserve(WINDOW).unwrap();
        window.map(0, WINDOW / 2, file.as_fd(), 0).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        Arc::new(FakeDevice {
            ram: Ram::default(),
            queues: Mutex::default(),
            calls: (0..3).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect(),
            answers: Mutex::default(),
            asked: Mutex::default(),
            window,
            config: Config {
                magic: MAGIC,
                version_major: VERSION_MAJOR.into(),
                version_minor: 0.into(),
                fabric_id: 1.into(),
                move_queues: 1.into(),
                gid: Gid::from_u64(1),
                system_eid: [b'0'; 32],
                window_size: WINDOW.into(),
                max_dmb_size: WINDOW.into(),
                max_dmb_bytes: WINDOW.into(),
                max_dmbs: 8.into(),
                // The least that a device can allow.
                max_segments: 0.into(),
                max_move_size: 0.into(),
                granule: (GRANULE as u32).into(),
                copy_plan: [0xff; 16],
                reserved: [0; 4],
            },
            here,
            there,
        })
    }

    /// The next chain of a control or move queue gets this answer.
    pub(crate) fn answer(&self, answer: impl Into<Answer>) {
        lock(&self.answers).push_back(answer.into());
    }

    /// Whether the driver has closed the connection.
    pub(crate) fn is_given_up(&self) -> bool {
        self.there.set_nonblocking(true).unwrap();
        matches!((&self.there).read(&mut [0]), Ok(0))
    }

    fn memory<T>(&self, piece: Piece, f: impl FnOnce(SharedSlice<'_>) -> T) -> T {
        f(self.ram.at(piece).expect("a descriptor names guest memory").as_slice())
    }

    fn write(&self, pieces: &[Piece], mut bytes: &[u8]) {
        for piece in pieces {
            let (now, later) = bytes.split_at(bytes.len().min(piece.len as usize));
            self.memory(*piece, |memory| memory.slice(..now.len()).copy_from_slice(now));
            bytes = later;
        }
    }

    /// Answers what waits in a queue, as far as there are answers.
    pub(crate) fn serve(&self, queue: u16) {
        let mut queues = lock(&self.queues);
        let side = &mut queues[usize::from(queue)];
        loop {
            side.want_kick();
            let mut answers = lock(&self.answers);
            let Some(answer) = answers.pop_front() else { return };
            let Some((head, readable, writable)) = side.take() else {
                answers.push_front(answer);
                return;
            };
            let mut asked = Vec::new();
            for piece in readable {
                let mut bytes = vec![0; piece.len as usize];
                self.memory(piece, |memory| memory.copy_to_slice(&mut bytes));
                asked.extend(bytes);
            }
            lock(&self.asked).push(asked);
            self.write(&writable, &answer.bytes);
            side.give(answer.head.unwrap_or(head.into()), answer.len.unwrap_or(answer.bytes.len() as u32));
            self.calls[usize::from(queue)].write(1).unwrap();
        }
    }

    /// Sends an event.
    pub(crate) fn event(&self, answer: impl Into<Answer>) {
        let answer = answer.into();
        let mut queues = lock(&self.queues);
        let side = &mut queues[usize::from(EVENT_QUEUE)];
        let (head, _, writable) = side.take().expect("buffers for events");
        self.write(&writable, &answer.bytes);
        side.give(answer.head.unwrap_or(head.into()), answer.len.unwrap_or(answer.bytes.len() as u32));
        self.calls[usize::from(EVENT_QUEUE)].write(1).unwrap();
    }
}

impl Transport for Fake {
    fn offered(&self) -> Features {
        Features::all()
    }

    fn accept(&mut self, _: Features) -> Result<Vec<u8>, Error> {
        assert_eq!(size_of::<Config>(), CONFIG_SIZE);
        Ok(self.0.config.as_bytes().to_vec())
    }

    fn window(&self) -> Option<&Window> {
        Some(&self.0.window)
    }

    fn max_queue_size(&self, _: u16) -> u16 {
        MAX_QUEUE_SIZE
    }

    fn start(&mut self, queues: &[&Virtqueue]) -> Result<(), Error> {
        *lock(&self.0.queues) = queues.iter().map(|queue| DeviceSide::new(queue)).collect();
        Ok(())
    }

    fn allocate(&self, len: usize, align: usize) -> Result<DmaBuffer, Error> {
        self.0.ram.allocate(len, align, &|_| Ok(()))
    }

    fn kick(&self, queue: u16) {
        if queue != EVENT_QUEUE {
            self.0.serve(queue);
        }
    }

    fn interrupt(&self, queue: u16) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as the device.
        unsafe { BorrowedFd::borrow_raw(self.0.calls[usize::from(queue)].as_raw_fd()) }
    }

    fn hangup(&self) -> BorrowedFd<'_> {
        self.0.here.as_fd()
    }

    fn give_up(&self) {
        let _ = self.0.here.shutdown(Shutdown::Both);
    }

    fn requests(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn serve(&self) -> Result<(), Error> {
        Ok(())
    }
}
