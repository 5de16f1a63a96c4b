//! How other threads reach the control thread.

use crate::core::Snapshot;
use crate::port::SessionId;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// What the control thread is told.
#[derive(Debug)]
pub enum Message {
    /// A front-end broke the contract.
    Expel(SessionId, &'static str),
    /// Somebody wants to know how things are.
    Report(SyncSender<Snapshot>),
    /// It is over.
    Stop,
}

/// The sending end.
#[derive(Debug, Clone)]
pub struct Doorbell {
    sender: Sender<Message>,
    wake: Arc<EventFd>,
}

/// The receiving end.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<Message>,
    wake: Arc<EventFd>,
}

/// A doorbell and its inbox.
pub fn pair() -> io::Result<(Doorbell, Inbox)> {
    let (sender, receiver) = channel();
    let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
    Ok((Doorbell { sender, wake: wake.clone() }, Inbox { receiver, wake }))
}

impl Doorbell {
    /// Leaves a message. False if nobody is there any more.
    pub fn ring(&self, message: Message) -> bool {
        let sent = self.sender.send(message).is_ok();
        // It fails only if the counter is full: then a wake-up is still to come.
        let _ = self.wake.write(1);
        sent
    }

    /// Asks for the end of a session.
    pub fn expel(&self, session: SessionId, why: &'static str) {
        self.ring(Message::Expel(session, why));
    }
}

impl Inbox {
    /// Takes the next message.
    pub fn take(&self) -> Option<Message> {
        self.receiver.try_recv().ok()
    }
}

impl AsRawFd for Inbox {
    /// To be watched edge-triggered.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}
