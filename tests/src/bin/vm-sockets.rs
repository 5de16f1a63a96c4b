//! Stream sockets in a guest, Linux's AF_SMC or TCP, or the library's: the program with which tests exchange bytes between guests.
//!
//! `vm-sockets smc|tcp|library listen PORT WHAT …` says `listening` and serves; `vm-sockets smc|tcp|library connect ADDRESS PORT
//! WHAT …` uses it. Both end with one line of JSON, `{"error": …}` if it failed; the library's also if a connection is not SMC's.
//! The library uses what device there is.
//!
//! | what | |
//! | --- | --- |
//! | `exchange CONNECTIONS BYTES` | each side sends so many bytes on each connection while it receives as many, and checks every one |
//! | `hang` | one connection, which sends all the time and reads until it ends |
//! | `listen` | one connection, which only reads until it ends |
//! | `idle`, `finish` | one connection, which neither sends nor reads until the program is killed; after it has said that it will not |

use anyhow::{Context, Result, bail};
use dmbridge::Device;
use dmbridge::smc::{Smc, SmcListener, SmcStream};
use dmbridge_tests::bytes::{Hash, generate};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Instant;

const AF_SMC: i32 = 43;
/// Bytes that are generated, and checked, at once: a multiple of eight.
const CHUNK: usize = 64 * 1024;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let answer = run(&words).unwrap_or_else(|error| json!({ "error": format!("{error:#}") }));
    println!("{answer}");
}

/// A connection of any kind.
trait Stream: Read + Write + Send + Sized + 'static {
    fn another(&self) -> std::io::Result<Self>;
    fn finish(&self) -> std::io::Result<()>;
    /// What is wrong with it, as `SO_ERROR` says.
    fn error(&self) -> std::io::Result<Option<std::io::Error>>;
}

impl Stream for TcpStream {
    fn another(&self) -> std::io::Result<TcpStream> {
        self.try_clone()
    }

    fn error(&self) -> std::io::Result<Option<std::io::Error>> {
        self.take_error()
    }

    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Stream for SmcStream {
    fn another(&self) -> std::io::Result<SmcStream> {
        self.try_clone()
    }

    fn error(&self) -> std::io::Result<Option<std::io::Error>> {
        self.take_error()
    }

    fn finish(&self) -> std::io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

fn run(words: &[&str]) -> Result<Value> {
    let (family, words) = words.split_first().context("the family is missing")?;
    let smc = if *family == "library" { Some(Smc::new(Device::open()?)) } else { None };
    let family = if *family == "smc" { AF_SMC } else { libc::AF_INET };
    match words {
        ["listen", port, what @ ..] => {
            let port = port.parse()?;
            if let Some(smc) = smc {
                let listener = smc.bind((Ipv4Addr::UNSPECIFIED, port))?;
                println!("listening");
                return serve(&|| by_smc(accept_library(&listener)?), what);
            }
            let listener = listen(family, port)?;
            println!("listening");
            serve(&|| Ok(listener.accept().context("accept")?.0), what)
        }
        ["connect", address, port, what @ ..] => {
            let address = SocketAddrV4::new(address.parse()?, port.parse()?);
            match smc {
                Some(smc) => use_it(&|| by_smc(smc.connect(address)?), what),
                None => use_it(&|| connect(family, address), what),
            }
        }
        _ => bail!("listen or connect?"),
    }
}

fn accept_library(listener: &SmcListener) -> Result<SmcStream> {
    Ok(listener.accept().context("accept")?.0)
}

fn by_smc(stream: SmcStream) -> Result<SmcStream> {
    match stream.fallback_reason() {
        None => Ok(stream),
        Some(reason) => bail!("it fell back: {reason}; the peer says {:?}", stream.peer_diagnosis()),
    }
}

/// A socket of either family; the standard library's types do the rest, as the addresses are the same.
fn socket(family: i32) -> Result<OwnedFd> {
    // SAFETY: makes a socket; the result is checked.
    let fd = unsafe { libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error()).context("socket");
    }
    // SAFETY: the descriptor is ours alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn raw(address: SocketAddrV4) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(*address.ip()).to_be() },
        sin_zero: [0; 8],
    }
}

fn checked(what: &'static str, result: i32) -> Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()).context(what) }
}

fn listen(family: i32, port: u16) -> Result<TcpListener> {
    let socket = socket(family)?;
    let address = raw(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
    let (fd, len, one) = (socket.as_raw_fd(), size_of_val(&address) as u32, 1i32);
    // SAFETY: the option, the address and their sizes are those of the call, and live until it has returned.
    unsafe {
        checked(
            "SO_REUSEADDR",
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, (&raw const one).cast(), 4),
        )?;
        checked("bind", libc::bind(fd, (&raw const address).cast(), len))?;
        checked("listen", libc::listen(fd, 1024))?;
    }
    Ok(socket.into())
}

fn connect(family: i32, address: SocketAddrV4) -> Result<TcpStream> {
    let socket = socket(family)?;
    let address = raw(address);
    // SAFETY: the address and its size are those of the call, and live until it has returned.
    let result = unsafe {
        libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
    };
    checked("connect", result)?;
    Ok(socket.into())
}

fn number(words: &[&str], at: usize) -> Result<u64> {
    words.get(at).context("a number is missing")?.parse().context("a number is wrong")
}

fn serve<S: Stream>(accept: &(dyn Fn() -> Result<S> + Sync), what: &[&str]) -> Result<Value> {
    match what {
        ["exchange", words @ ..] => exchange(accept, number(words, 0)?, number(words, 1)?, 1),
        [how] => hang(accept()?, how),
        _ => bail!("there is no such thing to do"),
    }
}

fn use_it<S: Stream>(connect: &(dyn Fn() -> Result<S> + Sync), what: &[&str]) -> Result<Value> {
    match what {
        ["exchange", words @ ..] => exchange(connect, number(words, 0)?, number(words, 1)?, 2),
        [how] => hang(connect()?, how),
        _ => bail!("there is no such thing to do"),
    }
}

/// Sends until it cannot, and reads until it ends: says how each ended. Or only one of the two, or nothing at all.
fn hang<S: Stream>(stream: S, how: &str) -> Result<Value> {
    let (sends, reads) = match how {
        "hang" => (true, true),
        "listen" => (false, true),
        "idle" => (false, false),
        "finish" => {
            stream.finish().context("shutting down")?;
            (false, false)
        }
        _ => bail!("there is no such thing to do"),
    };
    let mut sender = stream.another()?;
    let mut receiver = stream;
    let sending = thread::spawn(move || {
        let buffer = vec![1; CHUNK];
        if !sends {
            return String::new();
        }
        loop {
            if let Err(error) = sender.write_all(&buffer) {
                return error.to_string();
            }
        }
    });
    let (mut buffer, mut bytes) = (vec![0; CHUNK], 0);
    println!("hanging");
    if !reads {
        loop {
            thread::park();
        }
    }
    let received = loop {
        match receiver.read(&mut buffer) {
            Ok(0) => match receiver.error()? {
                None => break "end".to_string(),
                Some(error) => break format!("end, because {error}"),
            },
            Ok(count) => bytes += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break error.to_string(),
        }
    };
    Ok(json!({ "received": bytes, "reading": received, "writing": sending.join().unwrap_or_default() }))
}

/// Exchanges on many connections at once. A connection's bytes are made from its number and its side.
fn exchange<S: Stream>(
    make: &(dyn Fn() -> Result<S> + Sync),
    connections: u64,
    bytes: u64,
    side: u64,
) -> Result<Value> {
    let start = Instant::now();
    let mut threads = Vec::new();
    for _ in 0..connections {
        let mut stream = make()?;
        // Which connection is which is not known by the order of accepting.
        let number = match side {
            2 => {
                let number = threads.len() as u64;
                stream.write_all(&number.to_le_bytes())?;
                number
            }
            _ => {
                let mut number = [0; 8];
                stream.read_exact(&mut number)?;
                u64::from_le_bytes(number)
            }
        };
        threads.push(thread::spawn(move || one(stream, bytes, number * 2 + side, number * 2 + 3 - side)));
    }
    for thread in threads {
        thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    }
    Ok(json!({ "bytes": bytes * connections, "seconds": start.elapsed().as_secs_f64() }))
}

fn one<S: Stream>(stream: S, bytes: u64, mine: u64, theirs: u64) -> Result<()> {
    let mut sender = stream.another()?;
    let mut receiver = stream;
    let sending = thread::spawn(move || -> Result<()> {
        let (mut random, mut data, mut left) = (mine, vec![0; CHUNK], bytes);
        while left > 0 {
            let len = left.min(CHUNK as u64) as usize;
            generate(&mut random, &mut data[..len]);
            sender.write_all(&data[..len]).context("sending")?;
            left -= len as u64;
        }
        sender.finish().context("shutting down")
    });
    let (mut random, mut data, mut wanted, mut left) = (theirs, vec![0; CHUNK], vec![0; CHUNK], bytes);
    let mut at = 0;
    while left > 0 {
        let len = left.min(CHUNK as u64) as usize;
        generate(&mut random, &mut wanted[..len]);
        receiver.read_exact(&mut data[..len]).with_context(|| format!("receiving from byte {at} on"))?;
        if data[..len] != wanted[..len] {
            let wrong = data.iter().zip(&wanted).position(|(a, b)| a != b).unwrap_or_default();
            let mut hash = Hash::new();
            hash.add(&data[..len]);
            bail!("byte {} is wrong; the hash of its chunk is {:016x}", at + wrong as u64, hash.value());
        }
        (at, left) = (at + len as u64, left - len as u64);
    }
    if receiver.read(&mut data).context("reading the end")? != 0 {
        bail!("there is more than was sent");
    }
    sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?
}
