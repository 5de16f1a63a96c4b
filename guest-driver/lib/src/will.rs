//! What is done on behalf of a program that could not do it any more: a kernel whose device goes on without the program tells the
//! peer. Other devices go with their program, which their peers are told of.

use crate::dmb::Port;
use crate::proto::ids::Token;
use std::sync::Arc;

/// A byte to be moved into a peer's DMB when this process ends, and the bits to be set there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LastMove {
    pub(crate) token: Token,
    pub(crate) offset: u64,
    pub(crate) byte: u8,
    pub(crate) mask: u64,
}

/// A [`LastMove`] that is made unless this is dropped before.
pub(crate) struct Will {
    port: Arc<dyn Port>,
    number: libc::c_ulong,
}

impl Will {
    /// Leaves it, where somebody can carry it out.
    pub(crate) fn leave(port: &Arc<dyn Port>, last: &LastMove) -> Option<Will> {
        let number = port.leave_will(last)?;
        Some(Will { port: port.clone(), number })
    }
}

impl Drop for Will {
    fn drop(&mut self) {
        self.port.withdraw_will(self.number);
    }
}
