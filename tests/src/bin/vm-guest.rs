//! One device, in a guest or on the host, that does what it is told, line by line: the program that tests with virtual
//! machines drive at both ends. Not for people: see the command line `dmbridge` for that.
//!
//! `vm-guest pci [ADDRESS]` opens a PCI device, `vm-guest file PATH` a character device, `vm-guest hub SOCKET` connects to a daemon; with `--no-map` after it, as
//! a front-end that cannot map. Each line of its standard input is a command, each answer one line of JSON, `{"error": …}`
//! if it failed. The first line says what device it is. It ends with its input.
//!
//! | command | |
//! | --- | --- |
//! | `query GID` | |
//! | `register GID SIZE [COUNT]` | DMBs; they are numbered from 0 on |
//! | `register-private GID SIZE` | one whose control line is alone in its page |
//! | `register-ram GID SIZE` | a DMB in this process's memory |
//! | `attach TOKEN …`, `move TOKEN …`, `open TOKEN …` | senders by mapping, by moves, or by what works, numbered from 0 on |
//! | `write SENDER OFFSET TEXT`, `signal SENDER MASK` | |
//! | `read DMB OFFSET LEN`, `wait DMB` | |
//! | `drop-dmb DMB`, `drop-sender SENDER` | |
//! | `exchange DMB SENDER BYTES SEED` | sends so many bytes while it receives as many; answers their hashes |
//! | `meet KEY TAG TEXT`, `cancel KEY TAG` | |
//! | `tell GID CODE INFO`, `event [SECONDS]` | software events, and whatever else happens |
//! | `stats` | |
//! | `get SOCKET PATH` | what the control API of a daemon answers |

use anyhow::{Context, Result, bail};
use dmbridge::pci::{self, PciAddress};
use dmbridge::{Device, Dmb, DmbSender, Error, Event, Gid, Token};
use dmbridge_tests::bytes::{Hash, generate};
use serde_json::{Value, json};
use std::io::{BufRead, Read, Write};
use std::os::unix::net::UnixStream;
use std::str::FromStr;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

/// An exchange's buffers start with two counters of the writer's: chunks that it has sent, chunks that it has received.
const SENT: usize = 0;
const RECEIVED: usize = 64;
const CHUNKS: usize = 4096;
/// Chunks that may be under way in each direction.
const DEPTH: u64 = 2;
/// How long anything may take on a slow machine.
const DEADLINE: Duration = Duration::from_secs(300);

fn main() {
    let mut device = match open() {
        Ok(device) => device,
        Err(error) => {
            say(&json!({ "error": format!("{error:#}") }));
            std::process::exit(1);
        }
    };
    say(&json!({
        "gid": device.device.gid().to_string(),
        "map": device.device.can_map(),
        "window_size": device.device.config().window_size.get(),
        "address": device.address.map(|address| address.to_string()),
    }));
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = device.command(&words).unwrap_or_else(|error| {
            let status = error.downcast_ref::<Error>().and_then(Error::status);
            json!({ "error": format!("{error:#}"), "status": status.map(|status| format!("{status:?}")) })
        });
        say(&answer);
    }
}

fn say(answer: &Value) {
    let mut out = std::io::stdout().lock();
    // Who does not listen any more needs no answer.
    let _ = writeln!(out, "{answer}").and_then(|()| out.flush());
}

fn open() -> Result<Driven> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let map = !arguments.contains(&"--no-map");
    arguments.retain(|word| *word != "--no-map");
    let builder = Device::builder().map(map);
    let (device, address) = match arguments[..] {
        ["pci", address] => {
            let address = address.parse()?;
            (builder.open_pci(address)?, Some(address))
        }
        ["pci"] => {
            let address = *pci::find().first().context("there is no PCI device with the right IDs")?;
            (builder.open_pci(address)?, Some(address))
        }
        ["file", path] => (builder.open_file(path)?, None),
        ["hub", socket] => (builder.connect(socket)?, None),
        _ => bail!(
            "usage: vm-guest pci [ADDRESS] [--no-map] | vm-guest file PATH | vm-guest hub SOCKET [--no-map]"
        ),
    };
    Ok(Driven { device, address, dmbs: Vec::new(), senders: Vec::new() })
}

/// The device and what it was told to make.
struct Driven {
    device: Device,
    address: Option<PciAddress>,
    dmbs: Vec<Option<Dmb>>,
    senders: Vec<Option<DmbSender>>,
}

/// A word as a number or a name.
fn word<T: FromStr>(words: &[&str], at: usize, what: &str) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    words
        .get(at)
        .with_context(|| format!("{what} is missing"))?
        .parse()
        .with_context(|| format!("{what} is wrong"))
}

/// A word as 32 bytes.
fn padded(words: &[&str], at: usize, what: &str) -> Result<[u8; 32]> {
    let text: String = word(words, at, what)?;
    let mut bytes = [0; 32];
    bytes
        .get_mut(..text.len())
        .with_context(|| format!("{what} is too long"))?
        .copy_from_slice(text.as_bytes());
    Ok(bytes)
}

/// The word in 32 bytes.
fn said(bytes: &[u8; 32]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_string()
}

impl Driven {
    fn dmb(&self, words: &[&str], at: usize) -> Result<&Dmb> {
        let number: usize = word(words, at, "the DMB")?;
        self.dmbs.get(number).and_then(Option::as_ref).context("there is no such DMB")
    }

    fn sender(&self, words: &[&str], at: usize) -> Result<&DmbSender> {
        let number: usize = word(words, at, "the sender")?;
        self.senders.get(number).and_then(Option::as_ref).context("there is no such sender")
    }

    fn command(&mut self, words: &[&str]) -> Result<Value> {
        let &[command, ref words @ ..] = words else { bail!("there is no command") };
        match command {
            "query" => {
                let peer = self.device.query(word(words, 0, "the GID")?)?;
                Ok(
                    json!({ "there": peer.is_some(), "map": peer.is_some_and(|p| p.map), "futex": peer.is_some_and(|p| p.futex) }),
                )
            }
            "register" | "register-private" | "register-ram" => self.register(command, words),
            "attach" | "move" | "open" => self.open_senders(command, words),
            "write" => {
                let offset = word(words, 1, "the offset")?;
                self.sender(words, 0)?.write(offset, words[2..].join(" ").as_bytes())?;
                Ok(json!({}))
            }
            "signal" => {
                self.sender(words, 0)?.signal(word(words, 1, "the mask")?)?;
                self.sender(words, 0)?.flush()?;
                Ok(json!({}))
            }
            "read" => {
                let mut bytes = vec![0; word(words, 2, "the length")?];
                self.dmb(words, 0)?.memory().read(word(words, 1, "the offset")?, &mut bytes)?;
                Ok(json!({ "text": String::from_utf8_lossy(&bytes) }))
            }
            "wait" => {
                let dmb = self.dmb(words, 0)?;
                Ok(json!({ "bits": dmb.wait(Some(DEADLINE))?, "index": dmb.index() }))
            }
            "drop-dmb" => {
                self.dmb(words, 0)?;
                self.dmbs[word::<usize>(words, 0, "the DMB")?] = None;
                Ok(json!({}))
            }
            "drop-sender" => {
                self.sender(words, 0)?;
                self.senders[word::<usize>(words, 0, "the sender")?] = None;
                Ok(json!({}))
            }
            "exchange" => {
                let (dmb, sender) = (self.dmb(words, 0)?, self.sender(words, 1)?);
                exchange(dmb, sender, word(words, 2, "the number of bytes")?, word(words, 3, "the seed")?)
            }
            "meet" => {
                let (key, text) = (padded(words, 0, "the key")?, padded(words, 2, "the text")?);
                let met = self.device.rendezvous(key, word(words, 1, "the tag")?, text)?;
                Ok(met.map_or(
                    json!({ "gid": null }),
                    |(gid, says)| json!({ "gid": gid.to_string(), "says": said(&says) }),
                ))
            }
            "cancel" => {
                let was = self
                    .device
                    .cancel_rendezvous(padded(words, 0, "the key")?, word(words, 1, "the tag")?)?;
                Ok(json!({ "was": was }))
            }
            "tell" => {
                let (code, info) = (word(words, 1, "the code")?, word(words, 2, "the info")?);
                self.device.signal_event(word(words, 0, "the GID")?, code, info)?;
                Ok(json!({}))
            }
            "event" => {
                let timeout = if words.is_empty() {
                    DEADLINE
                } else {
                    Duration::from_secs(word(words, 0, "the time")?)
                };
                Ok(self
                    .device
                    .events()
                    .next(Some(timeout))?
                    .map_or(json!({ "event": null }), |event| describe(&event)))
            }
            "stats" => {
                let stats = self.device.stats();
                Ok(
                    json!({ "commands": stats.commands, "events": stats.events, "rings": stats.rings, "connected": self.device.is_connected() }),
                )
            }
            "get" => {
                let &[socket, path] = words else { bail!("a socket and a path are missing") };
                let mut stream = UnixStream::connect(socket)?;
                write!(stream, "GET {path} HTTP/1.1\r\nHost: dmbridged\r\nConnection: close\r\n\r\n")?;
                let mut answer = String::new();
                stream.read_to_string(&mut answer)?;
                let (_, body) = answer.split_once("\r\n\r\n").context("the answer has no body")?;
                Ok(serde_json::from_str(body)?)
            }
            other => bail!("there is no command {other}"),
        }
    }

    fn register(&mut self, command: &str, words: &[&str]) -> Result<Value> {
        let (peer, size) = (word(words, 0, "the GID")?, word(words, 1, "the size")?);
        let count = if words.len() > 2 { word(words, 2, "the number of DMBs")? } else { 1 };
        let first = self.dmbs.len();
        for _ in 0..count {
            let dmb = match command {
                "register" => self.device.register(peer, size),
                "register-private" => self.device.register_with_private_line(peer, size),
                _ => self.device.register_ram(peer, size),
            };
            self.dmbs.push(Some(dmb?));
        }
        let tokens: Vec<_> =
            self.dmbs[first..].iter().flatten().map(|dmb| dmb.token().to_bits().to_string()).collect();
        Ok(json!({ "dmb": first, "tokens": tokens }))
    }

    fn open_senders(&mut self, command: &str, tokens: &[&str]) -> Result<Value> {
        let first = self.senders.len();
        for token in tokens {
            let token = Token::from_bits(token.parse().context("a token is wrong")?);
            let sender = match command {
                "attach" => DmbSender::Map(self.device.attach(token)?),
                "open" => self.device.sender(token)?,
                _ => DmbSender::Move(self.device.mover(token)?),
            };
            self.senders.push(Some(sender));
        }
        Ok(json!({ "sender": first }))
    }
}

fn describe(event: &Event) -> Value {
    let text = |gid: Gid| gid.to_string();
    match *event {
        Event::DmbUnregistered { token, owner } => {
            json!({ "event": "unregistered", "token": token.to_bits().to_string(), "gid": text(owner) })
        }
        Event::DmbDetached { token, peer } => {
            json!({ "event": "detached", "token": token.to_bits().to_string(), "gid": text(peer) })
        }
        Event::DeviceGone { gid, reason } => {
            json!({ "event": "gone", "gid": text(gid), "reason": format!("{reason:?}") })
        }
        Event::Rendezvous { gid, tag, payload } => {
            json!({ "event": "rendezvous", "gid": text(gid), "tag": tag, "says": said(&payload) })
        }
        Event::DevicePaused { gid } => json!({ "event": "paused", "gid": text(gid) }),
        Event::DeviceResumed { gid } => json!({ "event": "resumed", "gid": text(gid) }),
        Event::Software { from, code, info } => {
            json!({ "event": "software", "gid": text(from), "code": code, "info": info })
        }
    }
}

/// Sends and receives at the same time. Each buffer has room for chunks after its counters; a chunk is sent when the other
/// side's counter says that its place is free.
fn exchange(dmb: &Dmb, sender: &DmbSender, bytes: u64, seed: u64) -> Result<Value> {
    let chunk = (dmb.size() - CHUNKS) / DEPTH as usize / 8 * 8;
    let lens = |mut left: u64| {
        std::iter::from_fn(move || {
            let len = left.min(chunk as u64);
            left -= len;
            (len != 0).then_some(len as usize)
        })
    };
    let await_count = |counter: usize, count: u64| {
        let seen = || dmb.memory().atomic_u64(counter).load(Ordering::Acquire) >= count;
        match dmb.wait_until(Some(Instant::now() + DEADLINE), seen)? {
            true => Ok(()),
            false => Err(anyhow::anyhow!("the other side did nothing for {DEADLINE:?}")),
        }
    };
    let set_count = |counter: usize, count: u64| {
        // The chunk comes before its number.
        fence(Ordering::Release);
        sender.write(counter, &count.to_le_bytes())?;
        sender.notify()
    };
    let place = |number: u64| CHUNKS + (number % DEPTH) as usize * chunk;
    let start = Instant::now();
    let (sent, received) = std::thread::scope(|scope| {
        let send = scope.spawn(|| -> Result<u64> {
            let (mut hash, mut random) = (Hash::new(), seed);
            let mut data = vec![0; chunk];
            for (number, len) in (0..).zip(lens(bytes)) {
                generate(&mut random, &mut data[..len]);
                hash.add(&data[..len]);
                await_count(RECEIVED, (number + 1u64).saturating_sub(DEPTH))?;
                sender.write(place(number), &data[..len])?;
                set_count(SENT, number + 1)?;
            }
            sender.flush()?;
            Ok(hash.value())
        });
        let receive = scope.spawn(|| -> Result<u64> {
            let mut hash = Hash::new();
            let mut data = vec![0; chunk];
            for (number, len) in (0..).zip(lens(bytes)) {
                await_count(SENT, number + 1u64)?;
                dmb.memory().read(place(number), &mut data[..len])?;
                set_count(RECEIVED, number + 1)?;
                hash.add(&data[..len]);
            }
            Ok(hash.value())
        });
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<u64>>| {
            thread.join().unwrap_or_else(|_| bail!("a thread of the exchange panicked"))
        };
        (join(send), join(receive))
    });
    let (sent, received) = (sent.context("sending")?, received.context("receiving")?);
    Ok(
        json!({ "sent": format!("{sent:016x}"), "received": format!("{received:016x}"), "seconds": start.elapsed().as_secs_f64() }),
    )
}
