//! Status values of commands and moves: Linux's errno numbers, whatever the guest (`docs/device.md`, 6).

/// How a command or a move ended, when not well.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, thiserror::Error)]
#[repr(u8)]
pub enum Status {
    /// `ENOENT`
    #[error("no such device or DMB in this group")]
    NoEntry = 2,
    /// `EIO`
    #[error("the VMM refused to map the memory")]
    Io = 5,
    /// `E2BIG`
    #[error("larger than the device allows")]
    TooBig = 7,
    /// `EAGAIN`
    #[error("too much is waiting at the receiver; try again later")]
    Again = 11,
    /// `ENOMEM`
    #[error("the host's pool of DMB memory is used up")]
    NoMemory = 12,
    /// `EFAULT`
    #[error("an address is not guest memory")]
    Fault = 14,
    /// `EINVAL`
    #[error("a field is not valid")]
    Invalid = 22,
    /// `ENOSPC`
    #[error("the window has no room for another mapping")]
    NoSpace = 28,
    /// `EOPNOTSUPP`
    #[error("not supported by this device or this VMM")]
    NotSupported = 95,
    /// `ECONNRESET`
    #[error("the other device left")]
    Reset = 104,
    /// `EALREADY`
    #[error("already attached")]
    Already = 114,
    /// `EDQUOT`
    #[error("the device's quota is used up")]
    Quota = 122,
}

/// A status byte that the specification does not list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the device answered with status {0}, which version 1 does not know")]
pub struct UnknownStatus(pub u8);

impl Status {
    const ALL: [Status; 12] = [
        Status::NoEntry,
        Status::Io,
        Status::TooBig,
        Status::Again,
        Status::NoMemory,
        Status::Fault,
        Status::Invalid,
        Status::NoSpace,
        Status::NotSupported,
        Status::Reset,
        Status::Already,
        Status::Quota,
    ];

    /// The byte for a result.
    pub fn to_byte<T>(result: &Result<T, Status>) -> u8 {
        match result {
            Ok(_) => 0,
            Err(status) => *status as u8,
        }
    }

    /// The result for a byte.
    pub fn from_byte(byte: u8) -> Result<Result<(), Status>, UnknownStatus> {
        if byte == 0 {
            return Ok(Ok(()));
        }
        Status::ALL.into_iter().find(|s| *s as u8 == byte).map(Err).ok_or(UnknownStatus(byte))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_survives_the_wire() {
        for status in Status::ALL {
            let byte = Status::to_byte::<()>(&Err(status));
            assert_eq!(Status::from_byte(byte), Ok(Err(status)));
        }
        assert_eq!(Status::from_byte(Status::to_byte(&Ok(7))), Ok(Ok(())));
        assert_eq!(Status::from_byte(1), Err(UnknownStatus(1)));
    }
}
