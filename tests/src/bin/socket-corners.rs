//! Calls by which few programs use a moved connection: those that go on inside of the C library or of the kernel, those that
//! only TCP can answer, and those that are about descriptors in a way of their own. A line is printed for each; under
//! `dmbridge-run` it has to be the same. The other end is `socket-scenes echo`, which sends back whatever comes.

use libc::{c_char, c_int, c_void};
use std::ffi::CString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Duration;

/// What a call came to.
fn result(n: isize) -> String {
    if n >= 0 { n.to_string() } else { format!("{:?}", std::io::Error::last_os_error().raw_os_error()) }
}

fn ping(mut stream: &TcpStream) {
    let mut back = [0; 100];
    stream.write_all(&[7; 100]).expect("sent");
    stream.read_exact(&mut back).expect("received");
    assert_eq!(back, [7; 100]);
}

/// A connection that has been used enough to be moved, with some time to do it.
fn connection(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_nodelay(true).expect("TCP_NODELAY");
    for requests in [50, 4, 4] {
        (0..requests).for_each(|_| ping(&stream));
        sleep(Duration::from_millis(100));
    }
    stream
}

/// What comes back, of what was sent.
fn back(mut stream: &TcpStream, len: usize) -> String {
    let mut text = vec![0; len];
    stream.read_exact(&mut text).expect("received");
    String::from_utf8_lossy(&text).into_owned()
}

/// Waits until something has come.
fn come(fd: c_int) {
    let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&mut wait, 1, 20_000) };
}

fn set(fd: c_int, level: c_int, name: c_int, value: c_int) -> String {
    // SAFETY: an int.
    result(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), 4) } as isize)
}

unsafe extern "C" {
    fn dprintf(fd: c_int, format: *const c_char, ...) -> c_int;
}

/// Text by the C library.
fn printed(stream: &TcpStream) -> String {
    let fd = stream.as_raw_fd();
    // SAFETY: a format and what it wants.
    let n = unsafe { dprintf(fd, c"%d %s %.3f\n".as_ptr(), 5 as c_int, c"words".as_ptr(), 2.5f64) };
    let short = back(stream, n as usize);
    let n = unsafe {
        // SAFETY: as above, with more than fits into registers.
        let one = 1 as c_int;
        dprintf(fd, c"%d %d %d %d %d %d %d %s\n".as_ptr(), one, 2, 3, 4, 5, 6, 7, c"end".as_ptr())
    };
    format!("{short:?} {:?}", back(stream, n as usize))
}

/// The connection as a FILE.
fn file(stream: &TcpStream) -> String {
    let mut line = [0u8; 10];
    // SAFETY: a stream of the C library, a line of at most as much as there is room for; the descriptor stays the program's.
    unsafe {
        let file = libc::fdopen(stream.as_raw_fd(), c"r+".as_ptr());
        libc::fputs(c"hello\n".as_ptr(), file);
        libc::fflush(file);
        libc::fgets(line.as_mut_ptr().cast(), 10, file);
        libc::fclose(libc::fdopen(libc::dup(libc::fileno(file)), c"r".as_ptr()));
    }
    format!("{:?}", String::from_utf8_lossy(&line))
}

/// The connection as standard output.
fn standard_output(stream: &TcpStream) -> String {
    // SAFETY: descriptors, and a text.
    unsafe {
        let keep = libc::dup(1);
        libc::dup2(stream.as_raw_fd(), 1);
        libc::puts(c"hello".as_ptr());
        libc::fflush(null_mut());
        libc::dup2(keep, 1);
        libc::close(keep);
    }
    ping_behind(stream, "hello\n".len())
}

fn ping_behind(stream: &TcpStream, len: usize) -> String {
    let text = back(stream, len);
    ping(stream);
    format!("{text:?}")
}

/// Calls that take an offset, which a socket has not.
fn offsets(stream: &TcpStream) -> String {
    let fd = stream.as_raw_fd();
    let mut text = *b"12345678";
    let list = libc::iovec { iov_base: text.as_mut_ptr().cast(), iov_len: 8 };
    // SAFETY: buffers as long as they say.
    unsafe {
        let sent = result(libc::pwritev2(fd, &list, 1, -1, 0));
        come(fd);
        let received = result(libc::preadv2(fd, &list, 1, -1, 0));
        let nothing = result(libc::preadv2(fd, &list, 1, -1, 8));
        format!("{sent} {received} {nothing} {}", result(libc::preadv2(fd, &list, 1, 0, 0)))
    }
}

/// Reads and writes of another thread of the C library.
fn asynchronous(stream: &TcpStream) -> String {
    let mut text = *b"abcd";
    let mut all = Vec::new();
    for call in [libc::aio_write, libc::aio_read] {
        // SAFETY: a control block and its buffer, which outlive the call.
        unsafe {
            let mut control: libc::aiocb = std::mem::zeroed();
            control.aio_fildes = stream.as_raw_fd();
            control.aio_buf = text.as_mut_ptr().cast();
            control.aio_nbytes = 4;
            call(&mut control);
            let list = [&raw const control];
            libc::aio_suspend(list.as_ptr(), 1, null());
            all.push(result(libc::aio_return(&mut control)));
        }
    }
    format!("{all:?} {text:?}")
}

/// Calls by their number.
fn by_number(stream: &TcpStream) -> String {
    let (fd, mut text) = (stream.as_raw_fd(), *b"abcd");
    // SAFETY: buffers as long as they say.
    unsafe {
        let sent = libc::syscall(libc::SYS_write, fd, text.as_ptr(), 4usize);
        let received = libc::syscall(
            libc::SYS_recvfrom,
            fd,
            text.as_mut_ptr(),
            4usize,
            libc::MSG_WAITALL,
            0usize,
            0usize,
        );
        format!(
            "{sent} {received} {}",
            result(libc::syscall(libc::SYS_read, -1, text.as_mut_ptr(), 4usize) as isize)
        )
    }
}

/// The other names of what is asked for.
fn names(stream: &TcpStream) -> String {
    let (fd, mut seen) = (stream.as_raw_fd(), Vec::new());
    let normal = libc::POLLRDNORM | libc::POLLWRNORM;
    let everything =
        libc::POLLIN | libc::POLLOUT | libc::POLLPRI | libc::POLLRDBAND | libc::POLLWRBAND | normal;
    let poll = |events| {
        let mut wait = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one pollfd.
        (unsafe { libc::poll(&mut wait, 1, 100) }, wait.revents)
    };
    for there in [false, true] {
        if there {
            let mut stream = stream;
            stream.write_all(b"x").expect("sent");
            come(fd);
        }
        seen.extend([libc::POLLRDNORM, libc::POLLWRNORM, everything].map(poll));
        // SAFETY: an instance, and one event.
        unsafe {
            let epoll = libc::epoll_create1(0);
            let mut event =
                libc::epoll_event { events: (libc::EPOLLRDNORM | libc::EPOLLWRNORM) as u32, u64: 0 };
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event);
            let n = libc::epoll_wait(epoll, &mut event, 1, 100);
            seen.push((n, event.events as i16));
            libc::close(epoll);
        }
    }
    back(stream, 1);
    format!("{seen:x?}")
}

/// No room for anything.
fn nothing(stream: &TcpStream) -> String {
    let (fd, mut byte) = (stream.as_raw_fd(), 0u8);
    let to: *mut c_void = (&raw mut byte).cast();
    // SAFETY: buffers of no length.
    unsafe {
        let none = [result(libc::recv(fd, to, 0, libc::MSG_DONTWAIT)), result(libc::read(fd, to, 0))];
        { stream }.write_all(b"x").expect("sent");
        come(fd);
        format!("{none:?} {} {}", result(libc::recv(fd, to, 0, 0)), ping_behind(stream, 1))
    }
}

/// A queue of errors that the kernel has.
fn errors(stream: &TcpStream) -> String {
    { stream }.write_all(b"x").expect("sent");
    come(stream.as_raw_fd());
    // SAFETY: an empty message.
    let n = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_ERRQUEUE)
    };
    format!("{} {}", result(n), ping_behind(stream, 1))
}

/// Urgent data, to who does not look for it.
fn urgent(stream: &TcpStream) -> String {
    // SAFETY: one byte.
    let n = unsafe { libc::send(stream.as_raw_fd(), c"u".as_ptr().cast(), 1, libc::MSG_OOB) };
    ping(stream);
    result(n)
}

/// So many bytes at least.
fn low_water(stream: &TcpStream) -> String {
    let fd = stream.as_raw_fd();
    let done = set(fd, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 10);
    let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    { stream }.write_all(b"123456789").expect("sent");
    sleep(Duration::from_millis(100));
    // SAFETY: one pollfd.
    let before = unsafe { libc::poll(&mut wait, 1, 0) };
    { stream }.write_all(b"0").expect("sent");
    // SAFETY: as above.
    let after = unsafe { libc::poll(&mut wait, 1, 20_000) };
    format!("{done} {before} {after} {}", ping_behind(stream, 10))
}

/// A signal for what comes.
fn signal(stream: &TcpStream) -> String {
    let fd = stream.as_raw_fd();
    // SAFETY: a set of one signal, which is blocked and taken.
    unsafe {
        let mut wanted: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut wanted, libc::SIGIO);
        libc::pthread_sigmask(libc::SIG_BLOCK, &wanted, null_mut());
        libc::fcntl(fd, libc::F_SETOWN, libc::getpid());
        let mut on: c_int = 1;
        libc::ioctl(fd, libc::FIOASYNC, &mut on);
        let time = libc::timespec { tv_sec: 20, tv_nsec: 0 };
        let mut seen = Vec::new();
        for _ in 0..3 {
            { stream }.write_all(b"x").expect("sent");
            seen.push(libc::sigtimedwait(&wanted, null_mut(), &time));
            seen.push(ping_behind(stream, 1).len() as c_int);
            // What else has come by then.
            let none = libc::timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            while libc::sigtimedwait(&wanted, null_mut(), &none) > 0 {}
        }
        on = 0;
        libc::ioctl(fd, libc::FIOASYNC, &mut on);
        format!("{seen:?}")
    }
}

/// A pipe that holds less than is asked for, on either side.
fn pipes(stream: &TcpStream) -> String {
    let (fd, none) = (stream.as_raw_fd(), null_mut());
    let mut seen = Vec::new();
    let mut ends = [0; 2];
    let mut data = vec![0u8; 200_000];
    // SAFETY: descriptors, no offsets, and a buffer as long as it says.
    unsafe {
        libc::pipe(ends.as_mut_ptr());
        let [from, to] = ends;
        for _ in 0..3 {
            libc::write(to, data.as_ptr().cast(), 10);
            seen.push(result(libc::splice(from, none, fd, none, 65_536, 0)));
            back(stream, 10);
        }
        let nonblocking = libc::SPLICE_F_NONBLOCK;
        seen.push(result(libc::splice(from, none, fd, none, 100, nonblocking)));
        seen.push(result(libc::splice(fd, null_mut(), fd, null_mut(), 100, 0)));
        // Whoever has one thread only has to get back what there is room for in the pipe.
        { stream }.write_all(&data[..100_000]).expect("sent");
        let (mut left, mut whole) = (100_000, true);
        while left > 0 {
            let n = libc::splice(fd, none, to, none, 1 << 20, 0);
            whole &= n > 0 && libc::read(from, data.as_mut_ptr().cast(), data.len()) == n;
            left -= n.max(1);
        }
        seen.push(format!("{whole} {left}"));
        libc::close(to);
        seen.push(result(libc::splice(from, none, fd, none, 100, 0)));
        libc::close(from);
    }
    ping(stream);
    format!("{seen:?}")
}

/// Sends more than the other end sends back before anything of that is read.
fn unread(mut stream: &TcpStream) -> String {
    let data: Vec<u8> = (0..600_000usize).map(|i| (i ^ (i >> 8)) as u8).collect();
    stream.write_all(&data).expect("sent");
    let mut all = vec![0; data.len()];
    stream.read_exact(&mut all).expect("received");
    ping(stream);
    (all == data).to_string()
}

static SOCKET: AtomicI32 = AtomicI32::new(-1);
static WRITTEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn write_too(_: c_int) {
    // SAFETY: one byte.
    let n = unsafe { libc::write(SOCKET.load(Ordering::Relaxed), c"s".as_ptr().cast(), 1) };
    WRITTEN.fetch_add(n.max(0) as usize, Ordering::Relaxed);
}

extern "C" fn end(_: c_int) {
    // SAFETY: ends the process.
    unsafe { libc::_exit(7) }
}

/// Handles a signal as `flags` say, and has the timer ring every so many µs; 0: no more.
fn handle(signal: c_int, handler: extern "C" fn(c_int), flags: c_int, every: libc::suseconds_t) {
    let time = libc::timeval { tv_sec: 0, tv_usec: every };
    // SAFETY: an all-zero sigaction is one; the handlers make system calls only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = flags;
        libc::sigaction(signal, &action, null_mut());
        libc::setitimer(
            libc::ITIMER_REAL,
            &libc::itimerval { it_interval: time, it_value: time },
            null_mut(),
        );
    }
}

/// A signal's handler writes to the connection that it interrupts the use of, or ends the process.
fn handlers(mut stream: &TcpStream) -> String {
    const ROUNDS: usize = 20_000;
    SOCKET.store(stream.as_raw_fd(), Ordering::Relaxed);
    handle(libc::SIGALRM, write_too, libc::SA_RESTART, 200);
    let (mut received, mut buffer) = (0, vec![0; 1 << 16]);
    let mut receive = |until: &dyn Fn() -> usize| {
        while received < until() {
            received += { stream }.read(&mut buffer).expect("received");
        }
    };
    for round in 1..=ROUNDS {
        { stream }.write_all(&[7; 100]).expect("sent");
        receive(&|| round * 100);
    }
    handle(libc::SIGALRM, write_too, libc::SA_RESTART, 0);
    receive(&|| ROUNDS * 100 + WRITTEN.load(Ordering::Relaxed));
    let mut ended = 0;
    for round in 0..100 {
        // SAFETY: a copy of this process, which uses the connection until its timer ends it.
        unsafe {
            let pid = libc::fork();
            if pid == 0 {
                handle(libc::SIGALRM, end, 0, 500 + round * 13);
                loop {
                    let _ = stream.write(&[7; 5000]);
                    let _ = stream.read(&mut buffer);
                }
            }
            let mut status = 0;
            libc::waitpid(pid, &mut status, 0);
            ended += c_int::from(libc::WEXITSTATUS(status) == 7);
        }
    }
    ended.to_string()
}

extern "C" fn nothing_more(_: c_int) {}

/// A thread reads from a connection that another one closes; by the time that it is interrupted others have come. And one is
/// cancelled where it reads.
fn closed_from_elsewhere(port: u16) -> String {
    extern "C" fn read(fd: *mut c_void) -> *mut c_void {
        let mut data = [0u8; 10];
        // SAFETY: a buffer as long as it says.
        unsafe { libc::recv(fd as usize as c_int, data.as_mut_ptr().cast(), 10, 0) as *mut c_void }
    }
    let connect = || {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        // A copy, so that there is more to know of it than that it is one.
        drop(stream.try_clone().expect("a copy"));
        stream
    };
    handle(libc::SIGUSR1, nothing_more, 0, 0);
    let mut seen = Vec::new();
    for cancels in [false, true, false] {
        let stream = connect();
        // SAFETY: a thread, which is waited for.
        unsafe {
            let mut thread = std::mem::zeroed();
            libc::pthread_create(&mut thread, null(), read, stream.as_raw_fd() as usize as *mut c_void);
            sleep(Duration::from_millis(50));
            drop(stream);
            let others: Vec<_> = (0..90).map(|_| connect()).collect();
            if cancels {
                libc::pthread_cancel(thread);
            } else {
                libc::pthread_kill(thread, libc::SIGUSR1);
            }
            let mut result = null_mut();
            libc::pthread_join(thread, &mut result);
            others.iter().for_each(ping);
            seen.push(result as isize);
        }
    }
    format!("{seen:?}")
}

/// It is disconnected, and connected again.
fn again(stream: &TcpStream) -> String {
    let fd = stream.as_raw_fd();
    // SAFETY: an address of no family, and that of the other end.
    unsafe {
        let mut peer: libc::sockaddr_storage = std::mem::zeroed();
        let mut len = size_of_val(&peer) as u32;
        libc::getpeername(fd, (&raw mut peer).cast(), &mut len);
        let none: libc::sockaddr = std::mem::zeroed();
        let off = libc::connect(fd, &none, size_of_val(&none) as u32);
        let error = stream.take_error().expect("an option").and_then(|error| error.raw_os_error());
        let on = libc::connect(fd, (&raw const peer).cast(), len);
        (0..100).for_each(|_| ping(stream));
        format!("{off} {error:?} {on}")
    }
}

/// Copies of an epoll instance's descriptor: one to register by, one to wait by.
fn copied_instance(stream: &TcpStream, port: u16) -> String {
    let late = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    let mut seen = 0;
    // SAFETY: descriptors of one instance, and events.
    unsafe {
        let first = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        let second = libc::fcntl(first, libc::F_DUPFD_CLOEXEC, 3);
        for (i, stream) in [stream, &late].into_iter().enumerate() {
            let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 70 + i as u64 };
            libc::epoll_ctl(second, libc::EPOLL_CTL_ADD, stream.as_raw_fd(), &mut event);
        }
        for round in 0..300 {
            let (mut stream, data) = if round % 2 == 0 { (stream, 70) } else { (&late, 71) };
            stream.write_all(b"x").expect("sent");
            let mut event = libc::epoll_event { events: 0, u64: 0 };
            let by = if round > 200 || round % 3 == 0 { second } else { first };
            let n = libc::epoll_wait(by, &mut event, 1, 20_000);
            seen += c_int::from(n == 1 && { event.u64 } == data && { event.events } == libc::EPOLLIN as u32);
            back(stream, 1);
            match round {
                // So that the late one moves.
                100..110 => sleep(Duration::from_millis(20)),
                200 => assert_eq!(libc::close(first), 0),
                _ => {}
            }
        }
        libc::close(second);
    }
    seen.to_string()
}

/// A child that the C library's handlers of a fork learn nothing of closes it, and opens something with its number.
fn raw_children(stream: &TcpStream) -> String {
    let own = std::env::current_exe().expect("own path");
    let own = CString::new(own.to_str().expect("a plain name")).expect("no zero");
    let child = |fd: c_int| {
        let mut head = [0u8; 4];
        // SAFETY: system calls, and a buffer as long as it says.
        unsafe {
            libc::close(fd);
            let file = libc::open(own.as_ptr(), libc::O_RDONLY);
            libc::read(file, head.as_mut_ptr().cast(), 4);
            libc::_exit(if file == fd && &head == b"\x7fELF" { 7 } else { 1 })
        }
    };
    let mut seen = Vec::new();
    // SAFETY: a copy of this process, which only does the above.
    unsafe {
        for flags in [libc::SIGCHLD, libc::SIGCHLD | libc::CLONE_FS] {
            let pid = libc::syscall(libc::SYS_clone, flags, 0usize, 0usize, 0usize, 0usize) as c_int;
            if pid == 0 {
                child(stream.as_raw_fd());
            }
            let mut status = 0;
            libc::waitpid(pid, &mut status, 0);
            seen.push(libc::WEXITSTATUS(status));
            ping(stream);
        }
    }
    format!("{seen:?}")
}

/// All descriptors but this one are closed; others get their numbers.
fn everything_closed(stream: &TcpStream, port: u16) -> String {
    let own = std::env::current_exe().expect("own path");
    for fd in (3..1024).filter(|fd| *fd != stream.as_raw_fd()) {
        // SAFETY: whatever is open, nobody here uses it.
        unsafe { libc::close(fd) };
    }
    let mut files: Vec<_> = (0..50).map(|_| std::fs::File::open(&own).expect("own file")).collect();
    let mut heads = 0;
    for file in &mut files {
        ping(stream);
        let mut head = [0; 4];
        file.read_exact(&mut head).expect("read");
        heads += c_int::from(&head == b"\x7fELF");
    }
    ping(&connection(port));
    heads.to_string()
}

/// Only reads, writes and the process's end are allowed from now on.
fn restricted(stream: &TcpStream) -> String {
    let mut text = [7u8; 100];
    // SAFETY: system calls, and buffers as long as they say.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::prctl(libc::PR_SET_SECCOMP, 1, 0, 0, 0);
            for _ in 0..100 {
                libc::write(stream.as_raw_fd(), text.as_ptr().cast(), 100);
                let mut there = 0;
                while there < 100 {
                    there += libc::read(stream.as_raw_fd(), text[there..].as_mut_ptr().cast(), 100 - there)
                        as usize;
                }
            }
            libc::syscall(libc::SYS_exit, if text == [7; 100] { 7 } else { 1 });
        }
        let mut status = 0;
        libc::waitpid(pid, &mut status, 0);
        ping(stream);
        libc::WEXITSTATUS(status).to_string()
    }
}

fn main() {
    let own = std::env::current_exe().expect("own path");
    let mut server = Command::new(own.with_file_name("socket-scenes"))
        .arg("echo")
        .stdout(Stdio::piped())
        .spawn()
        .expect("the other end starts");
    let mut port = String::new();
    let mut says = BufReader::new(server.stdout.take().expect("a pipe"));
    says.read_line(&mut port).expect("a line");
    let port = port.trim().parse().expect("a port");
    println!("printed: {}", printed(&connection(port)));
    println!("file: {}", file(&connection(port)));
    println!("standard output: {}", standard_output(&connection(port)));
    println!("offsets: {}", offsets(&connection(port)));
    println!("asynchronous: {}", asynchronous(&connection(port)));
    println!("by number: {}", by_number(&connection(port)));
    println!("names: {}", names(&connection(port)));
    println!("nothing: {}", nothing(&connection(port)));
    println!("errors: {}", errors(&connection(port)));
    println!("urgent: {}", urgent(&connection(port)));
    println!("low water: {}", low_water(&connection(port)));
    println!("signal: {}", signal(&connection(port)));
    println!("pipes: {}", pipes(&connection(port)));
    println!("unread: {}", unread(&connection(port)));
    println!("handlers: {}", handlers(&connection(port)));
    println!("closed from elsewhere: {}", closed_from_elsewhere(port));
    println!("again: {}", again(&connection(port)));
    println!("copied instance: {}", copied_instance(&connection(port), port));
    println!("raw children: {}", raw_children(&connection(port)));
    println!("restricted: {}", restricted(&connection(port)));
    println!("everything closed: {}", everything_closed(&connection(port), port));
    let _ = server.kill();
    let _ = server.wait();
    // Nothing is dropped, whose descriptors are closed already.
    std::process::exit(0);
}
