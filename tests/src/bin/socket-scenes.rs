//! Scenes with TCP sockets that take several connections, threads or signals, each against a process that sends back what it
//! gets. A line per scene is printed, of what has to come out of it, whoever is scheduled when; under `dmbridge-run` it has
//! to be the same.

use libc::c_int;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Connections in the scene of many.
const MANY: usize = 2000;

/// One position's byte of a stream that no other stream has.
fn byte(stream: usize, position: usize) -> u8 {
    ((stream * 31 + position) ^ (position >> 8)) as u8
}

fn text(len: usize, stream: usize) -> Vec<u8> {
    (0..len).map(|position| byte(stream, position)).collect()
}

/// An epoll instance.
struct Epoll(OwnedFd);

impl Epoll {
    fn new() -> Epoll {
        // SAFETY: a new descriptor, owned by nobody else.
        Epoll(unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) })
    }

    fn control(&self, what: c_int, fd: c_int, events: c_int, data: usize) {
        let mut event = libc::epoll_event { events: events as u32, u64: data as u64 };
        // SAFETY: the event outlives the call.
        let done = unsafe { libc::epoll_ctl(self.0.as_raw_fd(), what, fd, &mut event) };
        assert_eq!(done, 0, "epoll_ctl: {}", std::io::Error::last_os_error());
    }

    fn add(&self, socket: &impl AsRawFd, events: c_int, data: usize) {
        self.control(libc::EPOLL_CTL_ADD, socket.as_raw_fd(), events, data);
    }

    /// What is ready: data and events.
    fn wait(&self, most: usize, timeout: c_int) -> Vec<(usize, c_int)> {
        let mut events = vec![libc::epoll_event { events: 0, u64: 0 }; most];
        // SAFETY: there is room for `most` events.
        let n = unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), most as c_int, timeout) };
        events.truncate(n.max(0) as usize);
        events.iter().map(|event| (event.u64 as usize, event.events as c_int)).collect()
    }
}

/// Allows as many descriptors as there may be.
fn raise_limit() {
    let mut most = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: one struct is written, then read.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut most);
        most.rlim_cur = most.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &most);
    }
}

/// Sends back whatever comes, on any number of connections, from one thread; says on standard output when one was reset.
fn echo() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    println!("{}", listener.local_addr().expect("an address").port());
    listener.set_nonblocking(true).expect("non-blocking");
    let epoll = Epoll::new();
    epoll.add(&listener, libc::EPOLLIN, usize::MAX);
    let mut all: HashMap<usize, (TcpStream, Vec<u8>)> = HashMap::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        for (number, _) in epoll.wait(64, -1) {
            if number == usize::MAX {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true).expect("non-blocking");
                    stream.set_nodelay(true).expect("TCP_NODELAY");
                    let number = stream.as_raw_fd() as usize;
                    epoll.add(&stream, libc::EPOLLIN, number);
                    all.insert(number, (stream, Vec::new()));
                }
                continue;
            }
            let Some((stream, pending)) = all.get_mut(&number) else { continue };
            let mut open = true;
            if pending.is_empty() {
                match stream.read(&mut buffer) {
                    Ok(0) => open = false,
                    Ok(n) => pending.extend(&buffer[..n]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    Err(error) => {
                        open = false;
                        println!("{:?}", error.kind());
                    }
                }
            }
            while open && !pending.is_empty() {
                match stream.write(pending) {
                    Ok(n) => drop(pending.drain(..n)),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(_) => open = false,
                }
            }
            if open {
                // What waits to be sent is sent before more is taken.
                let wanted = if pending.is_empty() { libc::EPOLLIN } else { libc::EPOLLOUT };
                epoll.control(libc::EPOLL_CTL_MOD, stream.as_raw_fd(), wanted, number);
            } else {
                all.remove(&number);
            }
        }
    }
}

/// The process that sends back.
struct Server {
    child: Child,
    says: BufReader<ChildStdout>,
    port: u16,
}

impl Server {
    fn start() -> Server {
        let own = std::env::current_exe().expect("own path");
        let mut child = Command::new(own).arg("echo").stdout(Stdio::piped()).spawn().expect("a process");
        let mut server =
            Server { says: BufReader::new(child.stdout.take().expect("a pipe")), child, port: 0 };
        server.port = server.line().parse().expect("a port");
        server
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.says.read_line(&mut line).expect("a line");
        line.trim().to_string()
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(("127.0.0.1", self.port)).expect("a connection");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        stream
    }

    /// Connections that have been used enough to be moved, with some time to do it.
    fn connections(&self, count: usize) -> Vec<TcpStream> {
        let all: Vec<_> = (0..count).map(|_| self.connect()).collect();
        for requests in [50, 4, 4] {
            all.iter().for_each(|stream| (0..requests).for_each(|_| ping(stream)));
            thread::sleep(Duration::from_millis(100 + count as u64 / 2));
        }
        all
    }

    fn connection(&self) -> TcpStream {
        self.connections(1).remove(0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ping(mut stream: &TcpStream) {
    let data = text(100, 7);
    stream.write_all(&data).expect("sent");
    let mut back = vec![0; 100];
    stream.read_exact(&mut back).expect("received");
    assert_eq!(back, data);
}

/// Edge-triggered: nothing is said twice, so everything has to be taken when it is said.
fn edges(server: &Server) -> String {
    const BYTES: usize = 300_000;
    let all = server.connections(8);
    let epoll = Epoll::new();
    let mut progress = vec![(0, 0); all.len()];
    for (i, stream) in all.iter().enumerate() {
        stream.set_nonblocking(true).expect("non-blocking");
        epoll.add(stream, libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLET, i);
    }
    let mut buffer = vec![0; 10_000];
    while progress.iter().any(|(_, received)| *received < BYTES) {
        let ready = epoll.wait(3, 20_000);
        if ready.is_empty() {
            return format!("nothing is ready after 20 s: {progress:?}");
        }
        for (i, _) in ready {
            let (mut stream, (sent, received)) = (&all[i], &mut progress[i]);
            loop {
                let data: Vec<u8> = (*sent..BYTES.min(*sent + 7000)).map(|p| byte(i, p)).collect();
                match stream.write(&data) {
                    Ok(0) | Err(_) => break,
                    Ok(n) => *sent += n,
                }
            }
            while let Ok(n) = stream.read(&mut buffer) {
                let right = buffer[..n].iter().enumerate().all(|(k, b)| *b == byte(i, *received + k));
                assert!(right && n > 0, "connection {i} at {received}");
                *received += n;
            }
        }
    }
    format!("{progress:?}")
}

/// One-shot, and several threads at one epoll instance: each message is one thread's.
fn one_shots(server: &Server) -> String {
    const ROUNDS: u32 = 60;
    let all = server.connections(20);
    let epoll = Epoll::new();
    let events = libc::EPOLLIN | libc::EPOLLONESHOT;
    let rounds: Vec<_> = all.iter().map(|_| AtomicU32::new(0)).collect();
    let done = AtomicUsize::new(0);
    for (i, mut stream) in all.iter().enumerate() {
        epoll.add(stream, events, i);
        stream.write_all(&0u32.to_le_bytes()).expect("sent");
    }
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while done.load(Ordering::SeqCst) < all.len() {
                    for (i, _) in epoll.wait(1, 50) {
                        let mut stream = &all[i];
                        let mut message = [0; 4];
                        stream.read_exact(&mut message).expect("received");
                        let round = rounds[i].fetch_add(1, Ordering::SeqCst);
                        assert_eq!(u32::from_le_bytes(message), round, "connection {i}");
                        if round + 1 == ROUNDS {
                            done.fetch_add(1, Ordering::SeqCst);
                            continue;
                        }
                        stream.write_all(&(round + 1).to_le_bytes()).expect("sent");
                        epoll.control(libc::EPOLL_CTL_MOD, stream.as_raw_fd(), events, i);
                    }
                }
            });
        }
    });
    format!("{} connections, {rounds:?}", done.into_inner())
}

/// An epoll instance in an epoll instance, in poll.
fn nested(server: &Server) -> String {
    let mut stream = server.connection();
    let (inner, outer) = (Epoll::new(), Epoll::new());
    inner.add(&stream, libc::EPOLLIN, 1);
    outer.add(&inner.0, libc::EPOLLIN, 2);
    // What is there without a meaning, the outer one alone could take for something.
    let mut seen = vec![inner.wait(4, 0)];
    for _ in 0..20 {
        stream.write_all(b"x").expect("sent");
        let mut polled = libc::pollfd { fd: outer.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one descriptor.
        let n = unsafe { libc::poll(&mut polled, 1, 20_000) };
        seen.push(vec![(n as usize, polled.revents.into())]);
        seen.push(outer.wait(4, 20_000));
        seen.push(inner.wait(4, 20_000));
        stream.read_exact(&mut [0]).expect("received");
        seen.push(inner.wait(4, 0));
    }
    format!("{seen:?}")
}

/// Several threads write to one socket while one reads: small writes stay whole, and in each thread's order.
fn many_writers(server: &Server) -> String {
    const WRITES: u32 = 400;
    let stream = server.connection();
    let mut next = [0; 4];
    thread::scope(|scope| {
        for writer in 0..next.len() as u32 {
            let mut stream = &stream;
            scope.spawn(move || {
                for i in 0..WRITES {
                    let record = (u64::from(writer) << 32 | u64::from(i)).to_le_bytes();
                    stream.write_all(&record).expect("sent");
                }
            });
        }
        let mut record = [0; 8];
        for _ in 0..next.len() as u32 * WRITES {
            (&stream).read_exact(&mut record).expect("received");
            let record = u64::from_le_bytes(record);
            let (writer, i) = ((record >> 32) as usize, record as u32);
            assert_eq!(next[writer], i, "writer {writer}");
            next[writer] += 1;
        }
    });
    format!("{next:?}")
}

/// Several threads read from one socket: every byte is one thread's.
fn many_readers(server: &Server) -> String {
    const BYTES: usize = 400_000;
    let stream = server.connection();
    let (count, sum) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let mut buffer = [0; 1000];
                loop {
                    let n = (&stream).read(&mut buffer).expect("received");
                    if n == 0 {
                        break;
                    }
                    sum.fetch_add(buffer[..n].iter().map(|b| usize::from(*b)).sum(), Ordering::SeqCst);
                    if count.fetch_add(n, Ordering::SeqCst) + n == BYTES {
                        // The others wait for more, and are told that there is none.
                        stream.shutdown(Shutdown::Read).expect("shut down");
                    }
                }
            });
        }
        (&stream).write_all(&text(BYTES, 3)).expect("sent");
    });
    format!("{} bytes, {}", count.into_inner(), sum.into_inner())
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);

extern "C" fn count_signal(_: c_int) {
    SIGNALS.fetch_add(1, Ordering::SeqCst);
}

fn handle(signal: c_int, flags: c_int) {
    // SAFETY: an all-zero sigaction is one; the handler only counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count_signal as extern "C" fn(c_int) as usize;
        action.sa_flags = flags;
        libc::sigaction(signal, &action, std::ptr::null_mut());
    }
}

/// A signal ends what waits, or does not, as its handler was installed.
fn signals(server: &Server) -> String {
    let mut stream = server.connection();
    let mut seen = Vec::new();
    // SAFETY: this thread is there until the scopes below have ended; buffers are as long as they say.
    unsafe {
        let waiter = libc::pthread_self();
        // While `wait` waits: a signal after a tenth of a second, again and again until it has come back.
        let interrupted = |wait: &mut dyn FnMut() -> isize| {
            let back = AtomicU32::new(0);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while back.load(Ordering::SeqCst) == 0 {
                        thread::sleep(Duration::from_millis(100));
                        if back.load(Ordering::SeqCst) == 0 {
                            libc::pthread_kill(waiter, libc::SIGUSR1);
                        }
                    }
                });
                let n = wait();
                let error = std::io::Error::last_os_error().raw_os_error().filter(|_| n < 0);
                back.store(1, Ordering::SeqCst);
                (n, error)
            })
        };
        let mut data = [0u8; 100];
        let fd = stream.as_raw_fd();
        handle(libc::SIGUSR1, 0);
        seen.push(interrupted(&mut || libc::recv(fd, data.as_mut_ptr().cast(), 100, 0)));
        let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        handle(libc::SIGUSR1, libc::SA_RESTART);
        seen.push(interrupted(&mut || libc::poll(&mut polled, 1, 20_000) as isize));
        let epoll = Epoll::new();
        epoll.add(&stream, libc::EPOLLIN, 0);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        seen.push(interrupted(&mut || libc::epoll_wait(epoll.0.as_raw_fd(), &mut event, 1, 20_000) as isize));

        // Restarted: it comes back with data, which is sent after some signals.
        let before = SIGNALS.load(Ordering::SeqCst);
        let end = AtomicU32::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while SIGNALS.load(Ordering::SeqCst) < before + 3 {
                    thread::sleep(Duration::from_millis(30));
                    libc::pthread_kill(waiter, libc::SIGUSR1);
                }
                (&stream).write_all(b"here").expect("sent");
                end.store(1, Ordering::SeqCst);
            });
            seen.push((libc::recv(fd, data.as_mut_ptr().cast(), 4, libc::MSG_WAITALL), None));
        });
        // A signal that is blocked, and let through while ppoll waits.
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut blocked, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, std::ptr::null_mut());
        libc::pthread_kill(waiter, libc::SIGUSR1);
        let none: libc::sigset_t = std::mem::zeroed();
        let n = libc::ppoll(&mut polled, 1, std::ptr::null(), &none);
        seen.push((n as isize, std::io::Error::last_os_error().raw_os_error()));
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &blocked, std::ptr::null_mut());
    }
    stream.write_all(b"still").expect("sent");
    let mut back = [0; 5];
    stream.read_exact(&mut back).expect("received");
    format!("{seen:?} {}", String::from_utf8_lossy(&back))
}

/// A file into a socket, and a socket into a pipe, by calls of the kernel's own.
fn files(server: &Server) -> String {
    const BYTES: usize = 500_000;
    let stream = server.connection();
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(&text(BYTES, 5)).expect("written");
    let mut ends = [0; 2];
    // SAFETY: two descriptors are written, and then owned here alone.
    let [mut from, to] = unsafe {
        assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
        ends.map(|end| std::fs::File::from_raw_fd(end))
    };
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            let mut at: libc::off_t = 0;
            while (at as usize) < BYTES {
                // SAFETY: the offset outlives the call.
                let n = unsafe { libc::sendfile(stream.as_raw_fd(), file.as_raw_fd(), &mut at, 70_000) };
                assert!(n > 0, "sendfile: {}", std::io::Error::last_os_error());
            }
        });
        scope.spawn(|| {
            let (mut left, null) = (BYTES, std::ptr::null_mut());
            while left > 0 {
                let (socket, pipe) = (stream.as_raw_fd(), to.as_raw_fd());
                // SAFETY: no offsets.
                let n = unsafe { libc::splice(socket, null, pipe, null, left.min(30_000), 0) };
                assert!(n > 0, "splice: {}", std::io::Error::last_os_error());
                left -= n as usize;
            }
        });
        let mut received = vec![0; BYTES];
        from.read_exact(&mut received).expect("received");
        received
    });
    format!("{}", received == text(BYTES, 5))
}

/// Several messages by one call.
fn several_messages(server: &Server) -> String {
    let mut stream = server.connection();
    stream.write_all(&text(100, 9)).expect("sent");
    let mut there: c_int = 0;
    while there < 100 {
        // SAFETY: one int is written.
        unsafe { libc::ioctl(stream.as_raw_fd(), libc::FIONREAD, &mut there) };
        thread::sleep(Duration::from_millis(1));
    }
    let mut buffers = [[0u8; 40]; 3];
    // SAFETY: all-zero headers are valid, and name buffers that outlive the call.
    let (n, lens) = unsafe {
        let mut slices =
            buffers.each_mut().map(|b| libc::iovec { iov_base: b.as_mut_ptr().cast(), iov_len: b.len() });
        let mut headers: [libc::mmsghdr; 3] = std::mem::zeroed();
        for (header, slice) in headers.iter_mut().zip(&mut slices) {
            header.msg_hdr.msg_iov = slice;
            header.msg_hdr.msg_iovlen = 1;
        }
        let flags = libc::MSG_DONTWAIT;
        let n = libc::recvmmsg(stream.as_raw_fd(), headers.as_mut_ptr(), 3, flags, std::ptr::null_mut());
        (n, headers.map(|header| header.msg_len))
    };
    format!("{there} there, {n} messages {lens:?} {}", buffers.concat()[..100] == text(100, 9))
}

/// A close that does not wait and does not say good-bye.
fn aborted(server: &mut Server) -> String {
    let stream = server.connection();
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    // SAFETY: an option as long as it says.
    unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            (&raw const linger).cast(),
            size_of::<libc::linger>() as u32,
        )
    };
    drop(stream);
    server.line()
}

/// A thread that waits is told what another one does to the socket.
fn shut_from_elsewhere(server: &Server) -> String {
    let stream = server.connection();
    let n = thread::scope(|scope| {
        let waiter = scope.spawn(|| (&stream).read(&mut [0; 10]).map_err(|error| error.kind()));
        thread::sleep(Duration::from_millis(50));
        stream.shutdown(Shutdown::Both).expect("shut down");
        waiter.join().expect("no panic")
    });
    format!("{n:?} then {:?}", (&stream).write(b"x").map_err(|error| error.kind()))
}

/// Thousands of connections, used by turns, found by one epoll instance.
fn crowd(server: &Server) -> String {
    let all = server.connections(MANY);
    let epoll = Epoll::new();
    all.iter().enumerate().for_each(|(i, stream)| epoll.add(stream, libc::EPOLLIN, i));
    let mut seen = 0;
    for step in [1, 7, 501] {
        let chosen: Vec<usize> = (0..MANY).step_by(step).collect();
        for i in &chosen {
            (&all[*i]).write_all(&(*i as u32).to_le_bytes()).expect("sent");
        }
        let mut left = chosen.len();
        while left > 0 {
            let ready = epoll.wait(100, 20_000);
            if ready.is_empty() {
                return format!("nothing is ready after 20 s, {left} are left");
            }
            for (i, _) in ready {
                let mut message = [0; 4];
                (&all[i]).read_exact(&mut message).expect("received");
                assert_eq!(u32::from_le_bytes(message) as usize, i);
                left -= 1;
                seen += 1;
            }
        }
    }
    format!("{seen} answers, then {:?}", epoll.wait(1, 0))
}

fn main() {
    raise_limit();
    if std::env::args().nth(1).is_some_and(|arg| arg == "echo") {
        return echo();
    }
    let mut server = Server::start();
    println!("edges: {}", edges(&server));
    println!("one-shots: {}", one_shots(&server));
    println!("nested: {}", nested(&server));
    println!("many writers: {}", many_writers(&server));
    println!("many readers: {}", many_readers(&server));
    println!("signals: {}", signals(&server));
    println!("files: {}", files(&server));
    println!("several messages: {}", several_messages(&server));
    println!("aborted: {}", aborted(&mut server));
    println!("shut from elsewhere: {}", shut_from_elsewhere(&server));
    println!("crowd: {}", crowd(&server));
}
