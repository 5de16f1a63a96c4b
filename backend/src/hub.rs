//! The hub: one socket on which every connection gets a fresh device, and who gets into which group.
//!
//! Who a peer is, the kernel says (`SO_PEERCRED`, `SO_PEERGROUPS`); nothing that the peer sends has a say in it.

use crate::placement::NumaSettings;
use crate::settings::{Limits, SettingsError, check_group};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The hub socket and its rules.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Where the socket is made.
    pub socket: PathBuf,
    /// Permission bits of the socket.
    pub mode: u32,
    /// Who gets into which group; the first rule that matches decides. Who matches none is alone with its user.
    pub rules: Vec<HubRule>,
    /// What each device of the hub may use.
    pub limits: Limits,
    /// On which NUMA node each of them is, and its extents are to lie.
    pub numa: NumaSettings,
    /// The most devices that the hub serves at a time; further connections are closed.
    pub max_devices: usize,
    /// The most of them for one user id.
    pub max_devices_per_user: usize,
}

/// Permission bits of every socket that the daemon makes, unless told otherwise: the owner and its group.
pub const DEFAULT_SOCKET_MODE: u32 = 0o660;

impl HubSettings {
    /// A hub at this path with the defaults.
    pub fn new(socket: PathBuf) -> HubSettings {
        HubSettings {
            socket,
            mode: DEFAULT_SOCKET_MODE,
            rules: Vec::new(),
            limits: Limits::default(),
            numa: NumaSettings::default(),
            max_devices: 4096,
            max_devices_per_user: 2048,
        }
    }

    /// Checks everything that can be checked without opening anything.
    pub fn check(&self) -> Result<(), SettingsError> {
        for rule in &self.rules {
            if let Verdict::Group(group) = &rule.verdict {
                check_group(group)?;
            }
        }
        self.limits.check()
    }

    /// The group that a peer's device belongs to, or `None` if the peer is to be refused.
    ///
    /// Without a rule that matches, the group is `uid-<n>`: processes of one user find each other, and nobody else.
    pub fn group_for(&self, peer: &PeerCredentials) -> Option<String> {
        match self.rules.iter().find(|rule| rule.matches(peer)).map(|rule| &rule.verdict) {
            Some(Verdict::Group(group)) => Some(group.clone()),
            Some(Verdict::Refuse) => None,
            None => Some(format!("uid-{}", peer.uid)),
        }
    }
}

/// What happens to the peers that match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubRule {
    /// The peer's effective user id; any if none is given.
    pub uid: Option<u32>,
    /// One of the peer's group ids, its effective or a supplementary one; any if none is given.
    pub gid: Option<u32>,
    /// What happens.
    pub verdict: Verdict,
}

/// What a rule decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The device belongs to this group.
    Group(String),
    /// The connection is closed.
    Refuse,
}

impl HubRule {
    fn matches(&self, peer: &PeerCredentials) -> bool {
        self.uid.is_none_or(|uid| uid == peer.uid)
            && self.gid.is_none_or(|gid| gid == peer.gid || peer.groups.contains(&gid))
    }
}

/// Who connected, as the kernel saw it at `connect`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id, in the daemon's PID namespace; 0 if it is not visible there.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

impl PeerCredentials {
    /// Asks the kernel who is at the other end.
    pub fn of(stream: &UnixStream) -> std::io::Result<PeerCredentials> {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials as Peer};
        let peer = getsockopt(stream, Peer)?;
        Ok(PeerCredentials {
            pid: peer.pid(),
            uid: peer.uid(),
            gid: peer.gid(),
            groups: peer_groups(stream)?,
        })
    }
}

/// `SO_PEERGROUPS`.
fn peer_groups(stream: &UnixStream) -> std::io::Result<Vec<u32>> {
    // The kernel tells the size that it needs when this is too small; the list of a living socket does not change.
    let mut groups = vec![0u32; 64];
    loop {
        let mut len = std::mem::size_of_val(groups.as_slice()) as libc::socklen_t;
        // SAFETY: `groups` has `len` writable bytes, and the kernel writes at most that many.
        let result = unsafe {
            libc::getsockopt(
                stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let count = len as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(uid: u32, gid: u32, groups: &[u32]) -> PeerCredentials {
        PeerCredentials { pid: 1, uid, gid, groups: groups.to_vec() }
    }

    fn rule(uid: Option<u32>, gid: Option<u32>, group: Option<&str>) -> HubRule {
        HubRule { uid, gid, verdict: group.map_or(Verdict::Refuse, |g| Verdict::Group(g.into())) }
    }

    #[test]
    fn without_a_rule_every_user_is_its_own_group() {
        let hub = HubSettings::new("/run/hub".into());
        assert_eq!(hub.group_for(&peer(0, 0, &[])).as_deref(), Some("uid-0"));
        assert_eq!(hub.group_for(&peer(1000, 100, &[])).as_deref(), Some("uid-1000"));
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        let mut hub = HubSettings::new("/run/hub".into());
        hub.rules = vec![
            rule(Some(1000), Some(100), Some("both")),
            rule(Some(1000), None, None),
            rule(None, Some(100), Some("staff")),
        ];
        assert_eq!(hub.group_for(&peer(1000, 100, &[])).as_deref(), Some("both"));
        assert_eq!(hub.group_for(&peer(1000, 7, &[])), None);
        assert_eq!(hub.group_for(&peer(1001, 7, &[50, 100])).as_deref(), Some("staff"));
        assert_eq!(hub.group_for(&peer(1001, 7, &[50])).as_deref(), Some("uid-1001"));
    }

    #[test]
    fn the_kernel_says_who_the_other_end_is() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = PeerCredentials::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id() as i32);
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(peer.gid, nix::unistd::getegid().as_raw());
    }
}
