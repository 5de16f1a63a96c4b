//! What Linux's SMC says of itself, and the user EIDs: its generic netlink family (`include/uapi/linux/smc.h`).

use crate::Error;
use crate::netlink::{Netlink, attributes, get, number};
use serde::Serialize;
use std::io;
use std::str::FromStr;

const GET_STATS: u8 = 7;
const GET_FALLBACK_STATS: u8 = 8;
const DUMP_UEID: u8 = 9;
const ADD_UEID: u8 = 10;

const STATS: u16 = 7;
const FALLBACK_STATS: u16 = 8;
const EID_ENTRY: u16 = 1;

const EID_LEN: usize = 32;

/// A user EID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eid(String);

/// Why it is none.
#[derive(Debug, thiserror::Error)]
#[error("an EID has 1 to 32 of A-Z, 0-9, '-' and '.', and starts with a letter or a digit")]
pub struct BadEid;

impl FromStr for Eid {
    type Err = BadEid;

    fn from_str(text: &str) -> Result<Eid, BadEid> {
        let plain = |c: u8| c.is_ascii_uppercase() || c.is_ascii_digit();
        let good = (1..=EID_LEN).contains(&text.len())
            && text.bytes().next().is_some_and(plain)
            && text.bytes().all(|c| plain(c) || b"-.".contains(&c));
        good.then(|| Eid(text.into())).ok_or(BadEid)
    }
}

impl Eid {
    /// Made from a host's system EID, which may have characters that a user EID may not.
    pub fn from_device(system_eid: &str) -> Eid {
        let plain = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit();
        let mut text: String =
            system_eid.chars().map(|c| if plain(c) || c == '.' { c } else { '-' }).take(EID_LEN).collect();
        if !text.starts_with(plain) {
            text = format!("D{}", text.get(1..).unwrap_or_default());
        }
        Eid(text)
    }

    /// Without the blanks that fill it up.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What SMC counted since it was loaded.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Statistics {
    /// Over devices such as dmbridge's.
    pub smcd: Technology,
    /// Over RDMA.
    pub smcr: Technology,
    /// Handshakes that failed, on both sides.
    pub handshake_errors: u64,
    /// Connections that fell back to TCP.
    pub fallbacks: Vec<Fallback>,
}

/// SMC-D or SMC-R.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Technology {
    /// Connections made, by protocol version.
    pub client_v1: u64,
    /// The same.
    pub client_v2: u64,
    /// Connections accepted.
    pub server_v1: u64,
    /// The same.
    pub server_v2: u64,
    /// Bytes.
    pub sent: u64,
    /// Bytes.
    pub received: u64,
}

impl Technology {
    /// Of both sides and versions.
    pub fn connections(&self) -> u64 {
        self.client_v1 + self.client_v2 + self.server_v1 + self.server_v2
    }

    fn parse(bytes: &[u8]) -> Technology {
        Technology {
            client_v1: number(bytes, 7),
            client_v2: number(bytes, 8),
            server_v1: number(bytes, 9),
            server_v2: number(bytes, 10),
            received: number(bytes, 16),
            sent: number(bytes, 17),
        }
    }
}

/// Connections that fell back to TCP for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fallback {
    /// On the accepting side.
    pub server: bool,
    /// See [`crate::reason`].
    pub code: u32,
    /// How many.
    pub count: u64,
}

/// The kernel's SMC.
#[derive(Debug)]
pub struct Smc(Netlink);

impl Smc {
    /// # Errors
    ///
    /// [`Error::NoSmc`].
    pub fn open() -> Result<Smc, Error> {
        match Netlink::open("SMC_GEN_NETLINK") {
            Ok(netlink) => Ok(Smc(netlink)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::NoSmc),
            Err(error) => Err(Error::system("asking the kernel for SMC")(error)),
        }
    }

    /// The user EIDs.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn eids(&mut self) -> Result<Vec<String>, Error> {
        let answers = self.0.request(DUMP_UEID, true, &[]).map_err(Error::system("reading the user EIDs"))?;
        let text = |value: &[u8]| String::from_utf8_lossy(value).trim_end_matches(['\0', ' ']).to_string();
        Ok(answers.iter().filter_map(|answer| get(answer, EID_ENTRY).map(text)).collect())
    }

    /// Adds one.
    ///
    /// # Errors
    ///
    /// The kernel's: it has room for four, and takes them from root.
    pub fn add_eid(&mut self, eid: &Eid) -> Result<(), Error> {
        // Filled up with blanks, and ended as a string of C.
        let padded = format!("{:EID_LEN$}\0", eid.0);
        let added = self.0.request(ADD_UEID, false, &[(EID_ENTRY, padded.as_bytes())]);
        added.map(|_| ()).map_err(Error::system(format!("adding the user EID {}", eid.0)))
    }

    /// What it counted.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn statistics(&mut self) -> Result<Statistics, Error> {
        let answers =
            self.0.request(GET_STATS, true, &[]).map_err(Error::system("reading SMC's statistics"))?;
        let mut statistics = Statistics::default();
        for stats in answers.iter().filter_map(|answer| get(answer, STATS)) {
            statistics.smcd = Technology::parse(get(stats, 1).unwrap_or_default());
            statistics.smcr = Technology::parse(get(stats, 2).unwrap_or_default());
            statistics.handshake_errors = number(stats, 3) + number(stats, 4);
        }
        let answers = self
            .0
            .request(GET_FALLBACK_STATS, true, &[])
            .map_err(Error::system("reading SMC's fallbacks"))?;
        for (_, stats) in
            answers.iter().flat_map(|answer| attributes(answer)).filter(|(kind, _)| *kind == FALLBACK_STATS)
        {
            let fallback = Fallback {
                server: number(stats, 1) != 0,
                code: number(stats, 4) as u32,
                count: number(stats, 5),
            };
            if fallback.code != 0 {
                statistics.fallbacks.push(fallback);
            }
        }
        Ok(statistics)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_eid_is_what_the_kernel_takes() {
        for good in ["A", "HOST-1.EXAMPLE", "01234567890123456789012345678901"] {
            assert!(good.parse::<Eid>().is_ok(), "{good}");
        }
        for bad in ["", "-A", "a", "A B", "A_B", "012345678901234567890123456789012"] {
            assert!(bad.parse::<Eid>().is_err(), "{bad}");
        }
        for system in ["DMBRIDGE-TEST_EID.00000000000001", "_a", ""] {
            let eid = Eid::from_device(system);
            assert!(eid.as_str().parse::<Eid>().is_ok(), "{eid:?}");
        }
    }
}
