//! What reads and writes inside of the C library, where nobody would see it: `FILE`s, `dprintf`, asynchronous I/O; and calls of
//! the kernel by their number.

use crate::{epoll, errno, handover, io, life, poll, real, service, table};
use libc::{aiocb, c_char, c_int, c_long, c_void};

// ---- FILEs -------------------------------------------------------------------------------------------------------------

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fdopen(fd: c_int, mode: *const c_char) -> *mut libc::FILE {
    handover::leave_to_tcp(fd);
    // SAFETY: the program's call.
    unsafe { real::fdopen(fd, mode) }
}

/// The arguments of a function that takes any number of them: a `va_list`.
type Arguments = *mut c_void;

unsafe extern "C" {
    fn vasprintf(text: *mut *mut c_char, format: *const c_char, arguments: Arguments) -> c_int;
    fn __vasprintf_chk(
        text: *mut *mut c_char,
        flag: c_int,
        format: *const c_char,
        arguments: Arguments,
    ) -> c_int;
}

/// Prints to a descriptor by `make`, which makes the text and says how long it is.
fn print(fd: c_int, make: impl FnOnce(*mut *mut c_char) -> c_int) -> c_int {
    let mut text = std::ptr::null_mut();
    let len = make(&mut text);
    if len < 0 {
        return len;
    }
    let mut done = 0;
    while done < len {
        // SAFETY: so many bytes are left of the text.
        let n = unsafe { io::write(fd, text.add(done as usize).cast(), (len - done) as usize) };
        if n < 0 {
            break;
        }
        done += n as c_int;
    }
    // SAFETY: it was made for us.
    errno::keep(|| unsafe { libc::free(text.cast()) });
    if done < len { -1 } else { len }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn vdprintf(fd: c_int, format: *const c_char, arguments: Arguments) -> c_int {
    if !table::is_ours(fd) {
        // SAFETY: the program's call.
        return unsafe { real::vdprintf(fd, format, arguments) };
    }
    // SAFETY: the program's format and arguments.
    print(fd, |text| unsafe { vasprintf(text, format, arguments) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __vdprintf_chk(
    fd: c_int,
    flag: c_int,
    format: *const c_char,
    arguments: Arguments,
) -> c_int {
    if !table::is_ours(fd) {
        // SAFETY: the program's call.
        return unsafe { real::__vdprintf_chk(fd, flag, format, arguments) };
    }
    // SAFETY: as above.
    print(fd, |text| unsafe { __vasprintf_chk(text, flag, format, arguments) })
}

/// Defines a function that takes any number of arguments behind so many bytes of registers, for one that takes a `va_list` as
/// its argument in `register` (System V ABI, AMD64, 3.5.7).
macro_rules! variadic {
    ($name:ident, $to:ident, $named:literal, $register:literal) => {
        #[cfg(target_arch = "x86_64")]
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn $name() -> c_int {
            std::arch::naked_asm!(
                "sub rsp, 216",
                // What came in registers.
                "mov [rsp + 32], rdi",
                "mov [rsp + 40], rsi",
                "mov [rsp + 48], rdx",
                "mov [rsp + 56], rcx",
                "mov [rsp + 64], r8",
                "mov [rsp + 72], r9",
                "test al, al",
                "je 2f",
                "movaps [rsp + 80], xmm0",
                "movaps [rsp + 96], xmm1",
                "movaps [rsp + 112], xmm2",
                "movaps [rsp + 128], xmm3",
                "movaps [rsp + 144], xmm4",
                "movaps [rsp + 160], xmm5",
                "movaps [rsp + 176], xmm6",
                "movaps [rsp + 192], xmm7",
                "2:",
                // The va_list: where the next of each kind is, then what came on the stack, and the above.
                concat!("mov dword ptr [rsp], ", $named),
                "mov dword ptr [rsp + 4], 48",
                "lea rax, [rsp + 224]",
                "mov [rsp + 8], rax",
                "lea rax, [rsp + 32]",
                "mov [rsp + 16], rax",
                concat!("mov ", $register, ", rsp"),
                "call {to}",
                "add rsp, 216",
                "ret",
                to = sym $to,
            )
        }
    };
}

variadic!(dprintf, vdprintf, "16", "rdx");
variadic!(__dprintf_chk, __vdprintf_chk, "24", "rcx");

// ---- asynchronous I/O --------------------------------------------------------------------------------------------------

/// Defines calls of POSIX's asynchronous I/O, which another thread of the C library does.
macro_rules! asynchronous {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(control: *mut aiocb) -> c_int {
            // SAFETY: the program's.
            if let Some(control) = unsafe { control.as_ref() } {
                handover::leave_to_tcp(control.aio_fildes);
            }
            // SAFETY: the program's call.
            unsafe { real::$name(control) }
        }
    )*};
}

asynchronous!(aio_read aio_read64 aio_write aio_write64);

/// Defines calls that take a list of the above.
macro_rules! listed {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(mode: c_int, list: *const *mut aiocb, count: c_int, signal: *mut c_void) -> c_int {
            for i in 0..count.max(0) as usize {
                // SAFETY: the program's list.
                if let Some(control) = unsafe { (*list.add(i)).as_ref() } {
                    handover::leave_to_tcp(control.aio_fildes);
                }
            }
            // SAFETY: the program's call.
            unsafe { real::$name(mode, list, count, signal) }
        }
    )*};
}

listed!(lio_listio lio_listio64);

// ---- by number ---------------------------------------------------------------------------------------------------------

/// The process allows itself fewer calls of the kernel from now on, maybe none that connections need which are not TCP.
fn before_seccomp() {
    errno::keep(service::end);
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn prctl(option: c_int, a: c_long, b: c_long, c: c_long, d: c_long) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        before_seccomp();
    }
    // SAFETY: the program's call.
    unsafe { real::prctl(option, a, b, c, d) }
}

/// Of what `syscall` is told apart from others: a bit for each number.
static KNOWN: [u32; 16] = {
    let mut bits = [0; 16];
    let numbers = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_sendto,
        libc::SYS_recvmsg,
        libc::SYS_sendmsg,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_shutdown,
        libc::SYS_close,
        libc::SYS_close_range,
        libc::SYS_dup,
        libc::SYS_dup2,
        libc::SYS_dup3,
        libc::SYS_poll,
        libc::SYS_epoll_create1,
        libc::SYS_epoll_ctl,
        libc::SYS_epoll_wait,
        libc::SYS_sendfile,
        libc::SYS_splice,
        libc::SYS_seccomp,
        libc::SYS_io_uring_setup,
        libc::SYS_fork,
        libc::SYS_clone,
        libc::SYS_exit_group,
    ];
    let mut i = 0;
    while i < numbers.len() {
        bits[numbers[i] as usize / 32] |= 1 << (numbers[i] % 32);
        i += 1;
    }
    bits
};

/// `syscall` of the C library, which does what is known by the functions of this one. All else is left as it came: who comes
/// back may have another stack.
#[cfg(target_arch = "x86_64")]
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn syscall() -> c_long {
    std::arch::naked_asm!(
        "cmp rdi, 511",
        "ja 2f",
        "lea rax, [rip + {known}]",
        "bt dword ptr [rax], edi",
        "jc {by_number}",
        "2:",
        "mov rax, rdi",
        "mov rdi, rsi",
        "mov rsi, rdx",
        "mov rdx, rcx",
        "mov r10, r8",
        "mov r8, r9",
        "mov r9, [rsp + 8]",
        "syscall",
        "cmp rax, -4095",
        "jae 3f",
        "ret",
        "3:",
        "mov rdi, rax",
        "jmp {failed}",
        known = sym KNOWN,
        by_number = sym by_number,
        failed = sym failed,
    )
}

extern "C" fn failed(result: c_long) -> c_long {
    errno::set(-result as c_int);
    -1
}

/// The kernel's call.
unsafe fn kernel(number: c_long, [a, b, c, d, e, f]: [c_long; 6]) -> c_long {
    let result: c_long;
    // SAFETY: the program's call.
    unsafe {
        std::arch::asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c,
            in("r10") d, in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _);
    }
    if (-4095..0).contains(&result) { failed(result) } else { result }
}

/// Does what is known by the functions of this library.
unsafe extern "C-unwind" fn by_number(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    let (fd, len) = (a as c_int, c as usize);
    // SAFETY: the program's call, here and below: its arguments are those of the function.
    unsafe {
        match number {
            libc::SYS_read => io::read(fd, b as _, len) as c_long,
            libc::SYS_write => io::write(fd, b as _, len) as c_long,
            libc::SYS_readv => io::readv(fd, b as _, c as c_int) as c_long,
            libc::SYS_writev => io::writev(fd, b as _, c as c_int) as c_long,
            libc::SYS_recvfrom => io::recvfrom(fd, b as _, len, d as c_int, e as _, f as _) as c_long,
            libc::SYS_sendto => io::sendto(fd, b as _, len, d as c_int, e as _, f as _) as c_long,
            libc::SYS_recvmsg => io::recvmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_sendmsg => io::sendmsg(fd, b as _, c as c_int) as c_long,
            libc::SYS_sendfile => io::sendfile(fd, b as c_int, c as _, d as usize) as c_long,
            libc::SYS_splice => io::splice(fd, b as _, c as c_int, d as _, e as usize, f as u32) as c_long,
            libc::SYS_socket => life::socket(fd, b as c_int, c as c_int).into(),
            libc::SYS_connect => life::connect(fd, b as _, c as _).into(),
            libc::SYS_accept => life::accept(fd, b as _, c as _).into(),
            libc::SYS_accept4 => life::accept4(fd, b as _, c as _, d as c_int).into(),
            libc::SYS_shutdown => life::shutdown(fd, b as c_int).into(),
            libc::SYS_close => life::close(fd).into(),
            libc::SYS_close_range => life::close_range(a as u32, b as u32, c as c_int).into(),
            libc::SYS_dup => life::dup(fd).into(),
            libc::SYS_dup2 => life::dup2(fd, b as c_int).into(),
            libc::SYS_dup3 => life::dup3(fd, b as c_int, c as c_int).into(),
            libc::SYS_poll => poll::poll(a as _, b as _, c as c_int).into(),
            libc::SYS_epoll_create1 => epoll::epoll_create1(fd).into(),
            libc::SYS_epoll_ctl => epoll::epoll_ctl(fd, b as c_int, c as c_int, d as _).into(),
            libc::SYS_epoll_wait => epoll::epoll_wait(fd, b as _, c as c_int, d as c_int).into(),
            libc::SYS_fork => forked(|| kernel(number, [a, b, c, d, e, f])),
            // A child with memory and a stack of its own.
            libc::SYS_clone if a & c_long::from(libc::CLONE_VM) == 0 && b == 0 => {
                forked(|| kernel(number, [a, b, c, d, e, f]))
            }
            libc::SYS_exit_group => {
                life::at_exit();
                kernel(number, [a, b, c, d, e, f])
            }
            _ => {
                if number == libc::SYS_seccomp || number == libc::SYS_io_uring_setup {
                    before_seccomp();
                }
                kernel(number, [a, b, c, d, e, f])
            }
        }
    }
}

/// Forks by `fork`, of which the C library's own handlers learn nothing.
fn forked(fork: impl FnOnce() -> c_long) -> c_long {
    life::before_fork();
    let child = fork();
    errno::keep(|| if child == 0 { life::after_fork_in_child() } else { life::after_fork_in_parent() });
    child
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn _Fork() -> libc::pid_t {
    // SAFETY: the program's call.
    forked(|| unsafe { real::_Fork() }.into()) as libc::pid_t
}

/// What a cloned child is to do.
struct Start {
    function: unsafe extern "C-unwind" fn(*mut c_void) -> c_int,
    argument: *mut c_void,
}

unsafe extern "C-unwind" fn start(of: *mut c_void) -> c_int {
    life::after_fork_in_child();
    // SAFETY: the parent's, in this process's copy of its memory.
    let Start { function, argument } = unsafe { std::ptr::read(of.cast()) };
    // SAFETY: the program's function.
    unsafe { function(argument) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn clone(
    function: unsafe extern "C-unwind" fn(*mut c_void) -> c_int,
    stack: *mut c_void,
    flags: c_int,
    argument: *mut c_void,
    parent: *mut c_void,
    storage: *mut c_void,
    child: *mut c_void,
) -> c_int {
    if flags & libc::CLONE_VM != 0 {
        // SAFETY: the program's call.
        return unsafe { real::clone(function, stack, flags, argument, parent, storage, child) };
    }
    life::before_fork();
    let mut of = Start { function, argument };
    // SAFETY: the program's call; the child has a copy of what `of` is.
    let result = unsafe { real::clone(start, stack, flags, (&raw mut of).cast(), parent, storage, child) };
    errno::keep(|| life::after_fork_in_parent());
    result
}
