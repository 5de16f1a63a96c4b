//! The functions that stand behind those of this library: the next ones in the dynamic linker's order, usually glibc's.

use libc::{
    aiocb, c_char, c_int, c_long, c_uint, c_ulong, c_void, epoll_event, fd_set, iovec, loff_t, mmsghdr,
    msghdr, nfds_t, off_t, pid_t, pollfd, sigset_t, size_t, sockaddr, socklen_t, ssize_t, timespec, timeval,
};
use std::sync::atomic::{AtomicPtr, Ordering};

/// Finds a function once. Null if there is none.
fn find(at: &AtomicPtr<c_void>, name: &str) -> *mut c_void {
    let found = at.load(Ordering::Relaxed);
    if !found.is_null() {
        return found;
    }
    // SAFETY: the name ends with a zero byte.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr().cast::<c_char>()) };
    at.store(found, Ordering::Relaxed);
    found
}

macro_rules! real {
    ($(fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {$(
        /// The real function of this name; `ENOSYS` where there is none.
        ///
        /// # Safety
        ///
        /// That of the function.
        #[allow(non_snake_case, reason = "the C library's names")]
        pub unsafe fn $name($($arg: $ty),*) -> $ret {
            static AT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
            let found = find(&AT, concat!(stringify!($name), "\0"));
            if found.is_null() {
                crate::errno::set(libc::ENOSYS);
                return -1;
            }
            // SAFETY: the function of this name has this type; the rest is the caller's promise.
            unsafe {
                let function: unsafe extern "C-unwind" fn($($ty),*) -> $ret = std::mem::transmute(found);
                function($($arg),*)
            }
        }
    )*};
}

real! {
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(fd: c_int, address: *const sockaddr, len: socklen_t) -> c_int;
    fn accept(fd: c_int, address: *mut sockaddr, len: *mut socklen_t) -> c_int;
    fn accept4(fd: c_int, address: *mut sockaddr, len: *mut socklen_t, flags: c_int) -> c_int;
    fn shutdown(fd: c_int, how: c_int) -> c_int;
    fn close(fd: c_int) -> c_int;
    fn close_range(first: u32, last: u32, flags: c_int) -> c_int;
    fn dup(fd: c_int) -> c_int;
    fn dup2(from: c_int, to: c_int) -> c_int;
    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int;
    fn fcntl(fd: c_int, command: c_int, arg: c_ulong) -> c_int;
    fn fcntl64(fd: c_int, command: c_int, arg: c_ulong) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, arg: c_ulong) -> c_int;
    fn getsockopt(fd: c_int, level: c_int, name: c_int, value: *mut c_void, len: *mut socklen_t) -> c_int;
    fn setsockopt(fd: c_int, level: c_int, name: c_int, value: *const c_void, len: socklen_t) -> c_int;
    fn read(fd: c_int, to: *mut c_void, len: size_t) -> ssize_t;
    fn readv(fd: c_int, to: *const iovec, count: c_int) -> ssize_t;
    fn recv(fd: c_int, to: *mut c_void, len: size_t, flags: c_int) -> ssize_t;
    fn recvfrom(fd: c_int, to: *mut c_void, len: size_t, flags: c_int, address: *mut sockaddr, address_len: *mut socklen_t) -> ssize_t;
    fn recvmsg(fd: c_int, message: *mut msghdr, flags: c_int) -> ssize_t;
    fn recvmmsg(fd: c_int, messages: *mut mmsghdr, count: u32, flags: c_int, timeout: *mut timespec) -> c_int;
    fn write(fd: c_int, from: *const c_void, len: size_t) -> ssize_t;
    fn writev(fd: c_int, from: *const iovec, count: c_int) -> ssize_t;
    fn send(fd: c_int, from: *const c_void, len: size_t, flags: c_int) -> ssize_t;
    fn sendto(fd: c_int, from: *const c_void, len: size_t, flags: c_int, address: *const sockaddr, address_len: socklen_t) -> ssize_t;
    fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t;
    fn sendmmsg(fd: c_int, messages: *mut mmsghdr, count: u32, flags: c_int) -> c_int;
    fn sendfile(to: c_int, from: c_int, offset: *mut off_t, count: size_t) -> ssize_t;
    fn splice(from: c_int, from_offset: *mut loff_t, to: c_int, to_offset: *mut loff_t, len: size_t, flags: u32) -> ssize_t;
    fn pread(fd: c_int, to: *mut c_void, len: size_t, offset: off_t) -> ssize_t;
    fn poll(fds: *mut pollfd, count: nfds_t, timeout: c_int) -> c_int;
    fn ppoll(fds: *mut pollfd, count: nfds_t, timeout: *const timespec, mask: *const sigset_t) -> c_int;
    fn select(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set, timeout: *mut timeval) -> c_int;
    fn pselect(count: c_int, read: *mut fd_set, write: *mut fd_set, except: *mut fd_set, timeout: *const timespec, mask: *const sigset_t) -> c_int;
    fn epoll_create(size: c_int) -> c_int;
    fn epoll_create1(flags: c_int) -> c_int;
    fn epoll_ctl(epoll: c_int, operation: c_int, fd: c_int, event: *mut epoll_event) -> c_int;
    fn epoll_wait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int) -> c_int;
    fn epoll_pwait(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: c_int, mask: *const sigset_t) -> c_int;
    fn epoll_pwait2(epoll: c_int, events: *mut epoll_event, count: c_int, timeout: *const timespec, mask: *const sigset_t) -> c_int;
    fn execve(path: *const c_char, args: *const *const c_char, environment: *const *const c_char) -> c_int;
    fn execvpe(path: *const c_char, args: *const *const c_char, environment: *const *const c_char) -> c_int;
    fn posix_spawn(pid: *mut pid_t, path: *const c_char, actions: *const c_void, attributes: *const c_void, args: *const *const c_char, environment: *const *const c_char) -> c_int;
    fn posix_spawnp(pid: *mut pid_t, path: *const c_char, actions: *const c_void, attributes: *const c_void, args: *const *const c_char, environment: *const *const c_char) -> c_int;
    fn posix_spawn_file_actions_adddup2(actions: *mut c_void, from: c_int, to: c_int) -> c_int;
    fn eventfd(count: c_uint, flags: c_int) -> c_int;
    fn memfd_create(name: *const c_char, flags: c_uint) -> c_int;
    fn preadv2(fd: c_int, to: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t;
    fn pwritev2(fd: c_int, from: *const iovec, count: c_int, offset: off_t, flags: c_int) -> ssize_t;
    fn vdprintf(fd: c_int, format: *const c_char, arguments: *mut c_void) -> c_int;
    fn __vdprintf_chk(fd: c_int, flag: c_int, format: *const c_char, arguments: *mut c_void) -> c_int;
    fn aio_read(control: *mut aiocb) -> c_int;
    fn aio_read64(control: *mut aiocb) -> c_int;
    fn aio_write(control: *mut aiocb) -> c_int;
    fn aio_write64(control: *mut aiocb) -> c_int;
    fn lio_listio(mode: c_int, list: *const *mut aiocb, count: c_int, signal: *mut c_void) -> c_int;
    fn lio_listio64(mode: c_int, list: *const *mut aiocb, count: c_int, signal: *mut c_void) -> c_int;
    fn prctl(option: c_int, a: c_long, b: c_long, c: c_long, d: c_long) -> c_int;
    fn _Fork() -> pid_t;
    fn clone(function: unsafe extern "C-unwind" fn(*mut c_void) -> c_int, stack: *mut c_void, flags: c_int, argument: *mut c_void, parent: *mut c_void, storage: *mut c_void, child: *mut c_void) -> c_int;
    fn fexecve(fd: c_int, args: *const *const c_char, environment: *const *const c_char) -> c_int;
}

/// The real `fdopen`; null where there is none.
///
/// # Safety
///
/// That of the function.
pub unsafe fn fdopen(fd: c_int, mode: *const c_char) -> *mut libc::FILE {
    static AT: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
    let found = find(&AT, "fdopen\0");
    if found.is_null() {
        crate::errno::set(libc::ENOSYS);
        return std::ptr::null_mut();
    }
    // SAFETY: the function of this name has this type; the rest is the caller's promise.
    unsafe {
        let function: unsafe extern "C-unwind" fn(c_int, *const c_char) -> *mut libc::FILE =
            std::mem::transmute(found);
        function(fd, mode)
    }
}
