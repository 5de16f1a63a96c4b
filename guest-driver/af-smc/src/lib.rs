//! `LD_PRELOAD` library that makes the TCP sockets of an unchanged program AF_SMC ones, as `smc_run` of smc-tools does. The
//! kernel does the rest, and falls back to TCP by itself where the other side does not speak SMC.
//!
//! Where the kernel has no AF_SMC the socket is the one that was asked for.

use libc::c_int;

/// The address family, which the libc crate does not know.
const AF_SMC: c_int = 43;

/// AF_SMC's protocols: over IPv4, over IPv6.
const SMC_IPV4: c_int = 0;
const SMC_IPV6: c_int = 1;

/// The AF_SMC protocol that stands for these arguments of socket(2), if there is one.
fn protocol(domain: c_int, kind: c_int, protocol: c_int) -> Option<c_int> {
    let stream = kind & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) == libc::SOCK_STREAM;
    let tcp = protocol == 0 || protocol == libc::IPPROTO_TCP;
    match domain {
        libc::AF_INET if stream && tcp => Some(SMC_IPV4),
        libc::AF_INET6 if stream && tcp => Some(SMC_IPV6),
        _ => None,
    }
}

fn socket_call(domain: c_int, kind: c_int, protocol: c_int) -> c_int {
    // SAFETY: a system call that takes numbers and touches no memory of this process but errno.
    unsafe { libc::syscall(libc::SYS_socket, domain, kind, protocol) as c_int }
}

/// socket(2), for the whole program.
// SAFETY: the name and the signature are those of the C library's function, which it stands for.
#[unsafe(no_mangle)]
pub extern "C" fn socket(domain: c_int, kind: c_int, wanted: c_int) -> c_int {
    if let Some(smc) = protocol(domain, kind, wanted) {
        let fd = socket_call(AF_SMC, kind, smc);
        // SAFETY: errno is this thread's own.
        if fd >= 0 || unsafe { *libc::__errno_location() } != libc::EAFNOSUPPORT {
            return fd;
        }
    }
    socket_call(domain, kind, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tcp_sockets_are_taken_and_nothing_else() {
        let stream = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        assert_eq!(protocol(libc::AF_INET, stream, 0), Some(SMC_IPV4));
        assert_eq!(protocol(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP), Some(SMC_IPV6));
        for (domain, kind, wanted) in [
            (libc::AF_UNIX, libc::SOCK_STREAM, 0),
            (libc::AF_INET, libc::SOCK_DGRAM, 0),
            (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
            (AF_SMC, libc::SOCK_STREAM, 0),
        ] {
            assert_eq!(protocol(domain, kind, wanted), None);
        }
    }
}
