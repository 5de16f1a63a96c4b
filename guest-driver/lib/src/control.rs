//! The control queue: one command at a time, answered while the caller waits (`docs/device.md`, 6).

use crate::error::Error;
use crate::proto::CONTROL_QUEUE;
use crate::proto::control::{Command, HEADER_SIZE, MAX_REPLY_SIZE, Reply, Request};
use crate::ram::DmaBuffer;
use crate::sync::lock;
use crate::transport::{Transport, Woken, wait_for_interrupt};
use crate::virtqueue::{Piece, Virtqueue};
use std::sync::Mutex;

/// Descriptors of the queue: one command, of two pieces.
pub(crate) const QUEUE_SIZE: u16 = 4;
/// Room for a command: a registration with one segment is the longest.
const REQUEST: usize = 128;
/// Room for an answer.
const RESPONSE: usize = HEADER_SIZE + MAX_REPLY_SIZE;

/// The control queue and the memory of its command.
pub(crate) struct Control(Mutex<State>);

struct State {
    queue: Virtqueue,
    buffer: DmaBuffer,
}

impl Control {
    pub(crate) fn new(
        queue: Virtqueue,
        allocate: impl FnOnce(usize) -> Result<DmaBuffer, Error>,
    ) -> Result<Control, Error> {
        Ok(Control(Mutex::new(State { queue, buffer: allocate(REQUEST + RESPONSE)? })))
    }

    /// Calls `f` with the queue.
    pub(crate) fn with_queue<T>(&self, f: impl FnOnce(&Virtqueue) -> T) -> T {
        f(&lock(&self.0).queue)
    }

    /// Has the device do a command. Waits for its answer, and before that for those of other threads' commands.
    pub(crate) fn command(&self, transport: &dyn Transport, request: &Request<'_>) -> Result<Reply, Error> {
        let mut state = lock(&self.0);
        let State { queue, buffer } = &mut *state;
        let mut len = 0;
        let mut room = Ok(());
        request.emit(|piece| {
            room = room.and_then(|()| buffer.memory().write(len, piece));
            len += piece.len();
        });
        room?;
        let request_piece = Piece { address: buffer.address(), len: len as u32 };
        let response = Piece { address: buffer.address() + REQUEST as u64, len: RESPONSE as u32 };
        // No room: a command before was given up, because the device is gone.
        let head = queue.add(&[request_piece], &[response]).ok_or(Error::Disconnected)?;
        if queue.publish() {
            transport.kick(CONTROL_QUEUE);
        }
        let mut hung_up = false;
        let len = loop {
            match queue.pop()? {
                Some((answered, len)) if answered == head => break len,
                Some(_) => return Err(Error::Contract("a command was answered that was not the last")),
                None if hung_up => return Err(Error::Disconnected),
                None => {}
            }
            if !queue.arm() {
                hung_up = wait_for_interrupt(transport, CONTROL_QUEUE, None)? == Woken::HungUp;
            }
        };
        let mut bytes = [0; RESPONSE];
        let bytes = &mut bytes[..RESPONSE.min(len as usize)];
        buffer.memory().read(REQUEST, bytes)?;
        let command: Command = request.command();
        Reply::parse(command, bytes)?.map_err(|status| Error::Refused { command, status })
    }
}
