//! Does the same things with TCP sockets whenever it is given the same seed, and prints everything that a program can
//! observe of them. What it prints under `dmbridge-run` has to be what it prints without.
//!
//! Two processes have an end each. One decides; the other does what it is told over a pipe, so that everything happens in
//! one order. Where TCP takes its time, the answer is waited for: what is printed does not depend on time.

use libc::{c_int, c_void, iovec, pollfd};
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, IntoRawFd};
use std::process::{Command, Stdio};

/// At most so much is under way in one direction, so that nothing depends on how large TCP's buffers are.
const MOST: usize = 24 << 10;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 11) as usize % n
    }
}

fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn result(n: isize) -> String {
    if n < 0 { format!("errno {}", errno()) } else { format!("{n}") }
}

fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

/// One process's end of the connection that is being looked at.
struct End {
    fd: c_int,
    epoll: c_int,
    /// Position in the stream that this end sends, for content that no other position has.
    sent: u64,
}

impl End {
    fn new(fd: c_int) -> End {
        // SAFETY: plain system calls on descriptors of our own.
        unsafe {
            let epoll = libc::epoll_create1(0);
            let mut event = libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLRDHUP) as u32, u64: 42 };
            libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event);
            End { fd, epoll, sent: 0 }
        }
    }

    fn data(&mut self, len: usize) -> Vec<u8> {
        let from = self.sent;
        (0..len as u64).map(|i| ((from + i) * 31 / 7 % 251) as u8).collect()
    }

    fn poll(&self, events: i16, timeout: c_int) -> (c_int, i16) {
        let mut fd = pollfd { fd: self.fd, events, revents: 0 };
        // SAFETY: one pollfd.
        let n = unsafe { libc::poll(&mut fd, 1, timeout) };
        (n, fd.revents)
    }

    fn readable(&self) -> usize {
        let mut n: c_int = 0;
        // SAFETY: an int.
        unsafe { libc::ioctl(self.fd, libc::FIONREAD, &mut n) };
        n as usize
    }

    /// Waits until so many bytes can be read.
    fn wait_for(&self, bytes: usize) {
        for _ in 0..50_000 {
            if self.readable() >= bytes {
                return;
            }
            // SAFETY: gives the CPU away.
            unsafe { libc::usleep(100) };
        }
    }

    /// Does one thing, and says what came of it.
    fn run(&mut self, words: &[&str]) -> String {
        let number = |i: usize| words[i].parse::<usize>().unwrap_or(0);
        let mut text = String::new();
        // SAFETY: system calls with buffers that are as long as they say.
        unsafe {
            match words[0] {
                "send" => {
                    let data = self.data(number(1));
                    let n = match words[2] {
                        "write" => libc::write(self.fd, data.as_ptr().cast(), data.len()),
                        "send" => libc::send(self.fd, data.as_ptr().cast(), data.len(), libc::MSG_NOSIGNAL),
                        _ => {
                            let (a, b) = data.split_at(data.len() / 3);
                            let list = [a, b]
                                .map(|p| iovec { iov_base: p.as_ptr() as *mut c_void, iov_len: p.len() });
                            if words[2] == "writev" {
                                libc::writev(self.fd, list.as_ptr(), 2)
                            } else {
                                let mut message: libc::msghdr = std::mem::zeroed();
                                message.msg_iov = list.as_ptr().cast_mut();
                                message.msg_iovlen = 2;
                                libc::sendmsg(self.fd, &message, libc::MSG_NOSIGNAL)
                            }
                        }
                    };
                    text = result(n);
                    self.sent += n.max(0) as u64;
                }
                "recv" => {
                    // How much, how, how much is there.
                    self.wait_for(number(3));
                    let mut data = vec![0u8; number(1)];
                    let flags = match words[2] {
                        "peek" => libc::MSG_PEEK,
                        "all" => libc::MSG_WAITALL,
                        "trunc" => libc::MSG_TRUNC,
                        _ => 0,
                    };
                    let n = match words[2] {
                        "read" => libc::read(self.fd, data.as_mut_ptr().cast(), data.len()),
                        "readv" | "recvmsg" => {
                            let half = data.len() / 2;
                            let (a, b) = data.split_at_mut(half);
                            let mut list =
                                [a, b].map(|p| iovec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() });
                            if words[2] == "readv" {
                                libc::readv(self.fd, list.as_ptr(), 2)
                            } else {
                                let mut message: libc::msghdr = std::mem::zeroed();
                                message.msg_iov = list.as_mut_ptr();
                                message.msg_iovlen = 2;
                                message.msg_flags = -1;
                                let n = libc::recvmsg(self.fd, &mut message, 0);
                                let _ = write!(
                                    text,
                                    "flags {} control {} ",
                                    message.msg_flags, message.msg_controllen
                                );
                                n
                            }
                        }
                        _ => libc::recv(self.fd, data.as_mut_ptr().cast(), data.len(), flags),
                    };
                    let got = &data[..(n.max(0) as usize).min(data.len())];
                    let _ =
                        write!(text, "{} {:x}", result(n), if words[2] == "trunc" { 0 } else { hash(got) });
                }
                "dontwait" => {
                    let mut byte = 0u8;
                    text = result(libc::recv(self.fd, (&raw mut byte).cast(), 1, libc::MSG_DONTWAIT));
                }
                "timeout" => {
                    let set = |ms: i64| {
                        let time = libc::timeval { tv_sec: 0, tv_usec: ms * 1000 };
                        let len = size_of::<libc::timeval>() as u32;
                        libc::setsockopt(
                            self.fd,
                            libc::SOL_SOCKET,
                            libc::SO_RCVTIMEO,
                            (&raw const time).cast(),
                            len,
                        );
                    };
                    set(3);
                    let mut byte = 0u8;
                    text = result(libc::recv(self.fd, (&raw mut byte).cast(), 1, 0));
                    set(0);
                }
                "nonblock" => {
                    let mut on: c_int = 1;
                    libc::ioctl(self.fd, libc::FIONBIO, &mut on);
                    let mut byte = 0u8;
                    text = result(libc::read(self.fd, (&raw mut byte).cast(), 1));
                    let flags = libc::fcntl(self.fd, libc::F_GETFL);
                    let _ = write!(text, " {}", flags & libc::O_NONBLOCK != 0);
                    libc::fcntl(self.fd, libc::F_SETFL, flags & !libc::O_NONBLOCK);
                }
                "state" => {
                    self.wait_for(number(1));
                    let (n, revents) = self.poll(libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP, 0);
                    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 2];
                    let e = libc::epoll_wait(self.epoll, events.as_mut_ptr(), 2, 0);
                    let (what, data) = if e > 0 { (events[0].events, events[0].u64) } else { (0, 0) };
                    let mut sets: [libc::fd_set; 2] = std::mem::zeroed();
                    sets.iter_mut().for_each(|set| libc::FD_SET(self.fd, set));
                    let mut time = libc::timeval { tv_sec: 0, tv_usec: 0 };
                    let [read, write] = &mut sets;
                    let s = libc::select(self.fd + 1, read, write, std::ptr::null_mut(), &mut time);
                    let is = |set: &libc::fd_set| libc::FD_ISSET(self.fd, set);
                    let (r, w) = (is(&sets[0]), is(&sets[1]));
                    let there = self.readable();
                    text = format!(
                        "poll {n} {revents:#x} epoll {e} {what:#x} {data} select {s} {r} {w} there {there}"
                    );
                }
                "options" => {
                    let mut value: c_int = 1;
                    let set = number(1) as c_int;
                    libc::setsockopt(
                        self.fd,
                        libc::IPPROTO_TCP,
                        libc::TCP_NODELAY,
                        (&raw const set).cast(),
                        4,
                    );
                    let mut len = 4;
                    libc::getsockopt(
                        self.fd,
                        libc::IPPROTO_TCP,
                        libc::TCP_NODELAY,
                        (&raw mut value).cast(),
                        &mut len,
                    );
                    text = format!("nodelay {}", value != 0);
                }
                "dup" => {
                    let copy = libc::dup(self.fd);
                    let data = self.data(10);
                    let n = libc::write(copy, data.as_ptr().cast(), 10);
                    self.sent += n.max(0) as u64;
                    text = format!("{} {}", result(n), result(libc::close(copy) as isize));
                }
                "fork" => {
                    // A child sends, and ends.
                    let data = self.data(10);
                    let child = libc::fork();
                    if child == 0 {
                        let n = libc::write(self.fd, data.as_ptr().cast(), 10);
                        libc::_exit(n as c_int);
                    }
                    let mut status = 0;
                    libc::waitpid(child, &mut status, 0);
                    text = format!("child sent {}", libc::WEXITSTATUS(status));
                    self.sent += 10;
                }
                "shutdown" => text = result(libc::shutdown(self.fd, number(1) as c_int) as isize),
                "end" => {
                    // Waits for the end of the peer's stream.
                    let (_, revents) = self.poll(libc::POLLIN, 5000);
                    let mut data = [0u8; 64];
                    let n = libc::recv(self.fd, data.as_mut_ptr().cast(), 64, 0);
                    text = format!("{} {}", revents & libc::POLLIN != 0, result(n));
                }
                "broken" => {
                    // Sends to who has closed, until it is noticed.
                    let mut count = 0;
                    for _ in 0..1000 {
                        if libc::send(self.fd, c"x".as_ptr().cast(), 1, libc::MSG_NOSIGNAL) < 0 {
                            break;
                        }
                        count += 1;
                        libc::usleep(1000);
                    }
                    let errno = errno();
                    let known = errno == libc::EPIPE || errno == libc::ECONNRESET;
                    text = format!("noticed {} soon {}", known, count < 50);
                }
                "close" => {
                    libc::close(self.epoll);
                    text = result(libc::close(self.fd) as isize);
                }
                other => text = format!("what is {other}?"),
            }
        }
        text
    }
}

/// The end that does what it is told.
fn serve() {
    let stdin = std::io::stdin();
    let mut end = None;
    for line in stdin.lock().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split(' ').collect();
        let answer = if words[0] == "connect" {
            let stream = std::net::TcpStream::connect(("127.0.0.1", words[1].parse().unwrap_or(0)));
            end = stream.ok().map(|s| End::new(s.into_raw_fd()));
            "connected".to_string()
        } else {
            end.as_mut().map_or("no connection".into(), |end: &mut End| end.run(&words))
        };
        println!("{answer}");
    }
}

/// The end of the other process.
struct Other {
    to: std::process::ChildStdin,
    from: BufReader<std::process::ChildStdout>,
}

impl Other {
    fn tell(&mut self, line: &str) {
        writeln!(self.to, "{line}").expect("the other process listens");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.from.read_line(&mut line).expect("the other process answers");
        line.trim_end().to_string()
    }
}

/// Both ends of one connection, and how much is under way to each.
struct Pair<'a> {
    ends: (End, &'a mut Other),
    under_way: [usize; 2],
    lines: usize,
}

impl Pair<'_> {
    /// Has an end (0: ours) do something.
    fn run(&mut self, end: usize, line: &str) -> String {
        let answer = if end == 0 {
            self.ends.0.run(&line.split(' ').collect::<Vec<_>>())
        } else {
            self.ends.1.tell(line);
            self.ends.1.answer()
        };
        self.lines += 1;
        println!("{} {end} {line}: {answer}", self.lines);
        answer
    }

    fn send(&mut self, end: usize, len: usize, how: &str) {
        let answer = self.run(end, &format!("send {len} {how}"));
        self.under_way[1 - end] += answer.parse::<usize>().unwrap_or(0);
    }

    fn recv(&mut self, end: usize, len: usize, how: &str) {
        let there = self.under_way[end].min(len);
        self.run(end, &format!("recv {len} {how} {there}"));
        if how != "peek" {
            self.under_way[end] -= there;
        }
    }
}

fn life(random: &mut Random, listener: &std::net::TcpListener, other: &mut Other) {
    let port = listener.local_addr().expect("an address").port();
    other.tell(&format!("connect {port}"));
    let fd = listener.accept().expect("a connection").0.into_raw_fd();
    other.answer();
    let mut pair = Pair { ends: (End::new(fd), other), under_way: [0; 2], lines: 0 };
    // So that it moves, at some time from here on. What is printed must not say when.
    for _ in 0..60 {
        for end in 0..2 {
            pair.send(end, 100, "send");
            pair.recv(1 - end, 100, "recv");
        }
    }
    // SAFETY: lets other threads do what they have to do. If they have not done it by then it happens later, which is as
    // good, but for one thing: a read may then be cut short where the stream moves.
    unsafe { libc::usleep(100_000) };
    for end in [0, 1, 0, 1] {
        pair.send(end, 100, "send");
        pair.recv(1 - end, 100, "recv");
    }
    for _ in 0..150 {
        let end = random.below(2);
        match random.below(14) {
            0..=3 => {
                let room = MOST - pair.under_way[1 - end];
                let how = ["write", "send", "writev", "sendmsg"][random.below(4)];
                if room > 0 {
                    let len = if random.below(4) == 0 {
                        1 + random.below(room)
                    } else {
                        1 + random.below(room.min(300))
                    };
                    pair.send(end, len, how);
                }
            }
            4..=8 if pair.under_way[end] > 0 => {
                let how = ["read", "recv", "readv", "recvmsg", "peek", "all", "trunc"][random.below(7)];
                let there = pair.under_way[end];
                // No more than is there, for what would wait for more.
                let most = if how == "all" { there } else { there + 50 };
                let len = 1 + random.below(most);
                pair.recv(end, len, how);
            }
            9 => {
                let there = pair.under_way[end];
                pair.run(end, &format!("state {there}"));
            }
            10 if pair.under_way[end] == 0 => {
                let what = ["dontwait", "timeout", "nonblock"][random.below(3)];
                pair.run(end, what);
            }
            11 => {
                let on = random.below(2);
                pair.run(end, &format!("options {on}"));
            }
            12 if pair.under_way[1 - end] + 10 < MOST => {
                pair.run(end, "dup");
                pair.under_way[1 - end] += 10;
            }
            13 if random.below(8) == 0 && pair.under_way[1 - end] + 10 < MOST => {
                pair.run(end, "fork");
                pair.under_way[1 - end] += 10;
            }
            _ => {}
        }
    }
    let end = random.below(2);
    let drain = |pair: &mut Pair<'_>, end: usize| {
        while pair.under_way[end] > 0 {
            pair.recv(end, MOST, "recv");
        }
    };
    match random.below(3) {
        // Half a close: one direction ends, the other goes on.
        0 => {
            drain(&mut pair, end);
            pair.run(end, "shutdown 1");
            drain(&mut pair, 1 - end);
            pair.run(1 - end, "end");
            pair.send(1 - end, 500, "write");
            pair.recv(end, 500, "all");
            pair.run(end, "send 1 send");
            pair.run(1 - end, "close");
            pair.run(end, "end");
            pair.run(end, "close");
        }
        // A close after everything was read: the other one reads to the end.
        1 => {
            drain(&mut pair, end);
            pair.run(end, "close");
            drain(&mut pair, 1 - end);
            pair.run(1 - end, "end");
            pair.run(1 - end, "broken");
            pair.run(1 - end, "close");
        }
        // A close with something unread: the other one is told that it was broken off.
        _ => {
            drain(&mut pair, 1 - end);
            pair.send(1 - end, 10, "write");
            let there = pair.under_way[end];
            pair.run(end, &format!("state {there}"));
            pair.run(end, "close");
            pair.run(1 - end, "end");
            pair.run(1 - end, "close");
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if args.get(1).is_some_and(|arg| arg == "serve") {
        return serve();
    }
    let seed: u64 = args.get(1).and_then(|arg| arg.parse().ok()).expect("socket-script SEED LIVES");
    let lives: u64 = args.get(2).and_then(|arg| arg.parse().ok()).expect("socket-script SEED LIVES");
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .arg("serve")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the other process starts");
    let mut other = Other {
        to: child.stdin.take().expect("a pipe"),
        from: BufReader::new(child.stdout.take().expect("a pipe")),
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let _ = listener.as_raw_fd();
    for i in 0..lives {
        println!("life {i}");
        let mut random = Random((seed + i).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        life(&mut random, &listener, &mut other);
    }
    drop(other);
    let _ = child.wait();
}
