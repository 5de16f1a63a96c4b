//! The kernel module's character device by its bare system calls, as no library would use it: a program that tests run in guests.
//!
//! `vm-file PATH` opens it. Each line of its standard input is a command, each answer a line: a number, or `error:` and why. It ends with
//! its input.
//!
//! | command | |
//! | --- | --- |
//! | `attach TOKEN`, `detach TOKEN` | |
//! | `move TOKEN OFFSET TEXT` | |
//! | `will TOKEN OFFSET TEXT MASK` | leaves one; its number |
//! | `withdraw NUMBER` | |
//! | `abuse GID SEED STEPS TOKEN …` | whatever a program can do to the file, sensible or not; how much of it succeeded |

use anyhow::{Context, Result, bail};
use dmbridge_tests::random::Random;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, Error, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

const COMMAND: libc::Ioctl = 0x4018_db01;
const MOVE: libc::Ioctl = 0x4030_db02;
const LEAVE_WILL: libc::Ioctl = 0x4028_db03;
const WITHDRAW_WILL: libc::Ioctl = 0xdb04;
/// Any room that a program offers is not longer.
const ROOM: usize = 256 << 10;
/// Addresses at which a program has nothing.
const NOWHERE: [u64; 4] = [0, 0x1000, 0x7fff_ffff_f000, 0xffff_8880_0000_0000];

fn main() -> Result<()> {
    let path = std::env::args().nth(1).context("usage: vm-file PATH")?;
    let mut program = Program::open(&path)?;
    println!("0");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match program.command(&words) {
            Ok(answer) => println!("{answer}"),
            Err(error) => println!("error: {error:#}"),
        }
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn number(words: &[&str], at: usize) -> Result<u64> {
    words.get(at).context("a number is missing")?.parse().context("a number is wrong")
}

/// A piece of the file that is mapped.
struct Mapped {
    at: *mut libc::c_void,
    len: usize,
}

struct Program {
    path: String,
    file: File,
    room: Vec<u8>,
    mapped: Vec<Mapped>,
    tokens: Vec<u64>,
}

impl Program {
    fn open(path: &str) -> Result<Program> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let (path, room) = (path.to_string(), vec![0; ROOM]);
        Ok(Program { path, file, room, mapped: Vec::new(), tokens: Vec::new() })
    }

    fn ioctl(&self, what: libc::Ioctl, argument: &[u64]) -> Result<u64> {
        // SAFETY: what the kernel writes goes to `room`, to nowhere, or to the file's own mappings, none of which Rust looks at
        // meanwhile; `argument` lives until the call has returned.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), what, argument.as_ptr()) };
        u64::try_from(result).map_err(|_| Error::last_os_error().into())
    }

    fn ask(&mut self, class: u8, command: u8, body: &[u8]) -> Result<u64> {
        let mut request = vec![class, command, 0, 0, 0, 0, 0, 0];
        request.extend_from_slice(body);
        let answer = self.room.as_mut_ptr() as u64;
        let words = [request.as_ptr() as u64, answer, request.len() as u64 | 64 << 32];
        self.ioctl(COMMAND, &words)?;
        match self.room[0] {
            0 => Ok(0),
            status => Err(Error::from_raw_os_error(status.into()).into()),
        }
    }

    fn command(&mut self, words: &[&str]) -> Result<u64> {
        match *words {
            ["attach", token] => self.ask(1, 2, &token.parse::<u64>()?.to_le_bytes()),
            ["detach", token] => self.ask(1, 3, &token.parse::<u64>()?.to_le_bytes()),
            ["move", _, _, text] => {
                let piece = [text.as_ptr() as u64, text.len() as u64];
                let header = [number(words, 1)?, number(words, 2)?, 0, 0];
                self.ioctl(MOVE, &[header[0], header[1], header[2], header[3], piece.as_ptr() as u64, 1])
            }
            ["will", _, _, text, _] => {
                let mut data = [0; 8];
                let len = text.len().min(8);
                data[..len].copy_from_slice(&text.as_bytes()[..len]);
                let (token, offset, mask) = (number(words, 1)?, number(words, 2)?, number(words, 4)?);
                self.ioctl(LEAVE_WILL, &[token, offset, mask, u64::from_le_bytes(data), text.len() as u64])
            }
            ["withdraw", number] => self.withdraw(number.parse()?),
            ["abuse", gid, _, _, ref tokens @ ..] => {
                let gid = u64::from_str_radix(gid, 16)?;
                self.tokens = tokens.iter().map(|token| token.parse()).collect::<Result<_, _>>()?;
                let mut random = Random::new(number(words, 2)?);
                Ok((0..number(words, 3)?).filter(|_| self.abuse(&mut random, gid)).count() as u64)
            }
            _ => bail!("there is no such command"),
        }
    }

    fn withdraw(&self, number: u64) -> Result<u64> {
        // SAFETY: the argument is a number.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), WITHDRAW_WILL, number) };
        u64::try_from(result).map_err(|_| Error::last_os_error().into())
    }

    /// A token that is somebody's, or none.
    fn token(&self, random: &mut Random) -> u64 {
        match self.tokens.len() as u64 {
            len if len != 0 && !random.one_in(8) => self.tokens[random.below(len) as usize],
            _ => random.number(),
        }
    }

    /// Where memory is, or is not, or is the device's.
    fn address(&self, random: &mut Random) -> u64 {
        match (random.below(8), self.mapped.len() as u64) {
            (0, _) => NOWHERE[random.below(4) as usize],
            (1 | 2, len) if len != 0 => self.mapped[random.below(len) as usize].at as u64,
            _ => self.room.as_ptr() as u64 + random.below(64),
        }
    }

    /// One thing to do; whether it succeeded.
    fn abuse(&mut self, random: &mut Random, gid: u64) -> bool {
        match random.below(16) {
            0..6 => self.any_command(random, gid),
            6..9 => self.any_move(random),
            9 => {
                let (token, offset) = (self.token(random), random.below(8192));
                let (mask, len) = (random.below(3), random.below(10));
                let reserved = if random.one_in(8) { 1 << 32 } else { 0 };
                self.ioctl(LEAVE_WILL, &[token, offset, mask, random.next(), len | reserved]).is_ok()
            }
            10 => self.withdraw(random.number() % 64).is_ok(),
            11 => {
                let (offset, len) = (random.number() & !4095, 4096 << random.below(8));
                self.map(offset, len, if random.one_in(4) { libc::MAP_PRIVATE } else { libc::MAP_SHARED })
            }
            12 | 13 => self.touch(random),
            14 if random.one_in(32) => self.be_two(random, gid),
            14 => self.unmap(random),
            _ => {
                let (at, len) = (self.address(random), random.below(256));
                // SAFETY: as for `ioctl`.
                unsafe { libc::read(self.file.as_raw_fd(), at as *mut libc::c_void, len as usize) >= 0 }
            }
        }
    }

    fn any_command(&mut self, random: &mut Random, gid: u64) -> bool {
        let kinds = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)];
        let (class, command) = match random.one_in(16) {
            true => (random.next() as u8, random.next() as u8),
            false => kinds[random.below(kinds.len() as u64) as usize],
        };
        let mut request = vec![class, command, 0, 0, 0, 0, 0, 0];
        let gid = if random.one_in(8) { random.number() } else { gid };
        match (class, command) {
            (1, 0) => {
                request.extend(gid.to_be_bytes().into_iter().chain([0; 8]));
                let size = [4096, 8192, 65536, 0, 4095, 1 << 63, u64::MAX][random.below(7) as usize];
                request.extend(size.to_le_bytes());
                request.extend(if random.one_in(8) { random.number() } else { 0 }.to_le_bytes());
                request.extend([0; 8]);
            }
            (1, _) => request.extend(self.token(random).to_le_bytes()),
            (0, 0) | (2, 0) => {
                request.extend(gid.to_be_bytes().into_iter().chain([0; 8]));
                request.extend((0x10000 + random.below(2)).to_le_bytes());
                request.extend(random.bytes(8));
            }
            _ => request.extend([random.below(4) as u8; 72]),
        }
        let whole = !random.one_in(8);
        let len = if whole { request.len() as u64 } else { random.number() & 0xffff_ffff };
        let room = if whole { 256 } else { random.number() & 0xffff_ffff };
        let (from, to) = match whole {
            true => (request.as_ptr() as u64, self.room.as_mut_ptr() as u64),
            false => (self.address(random), self.address(random)),
        };
        let done = self.ioctl(COMMAND, &[from, to, len | room << 32]).is_ok();
        if !done || !whole || self.room[0] != 0 {
            return false;
        }
        let word = |at: usize| u64::from_le_bytes(self.room[at..at + 8].try_into().unwrap_or_default());
        let (token, place) = match (class, command) {
            (1, 0) => (Some(word(8)), Some((word(16), word(32)))),
            (1, 2) => (None, Some((word(24), word(40)))),
            _ => (None, None),
        };
        self.tokens.extend(token);
        if let Some((offset, size)) = place {
            self.map(offset - 4096, size as usize + 4096, libc::MAP_SHARED);
        }
        true
    }

    fn any_move(&mut self, random: &mut Random) -> bool {
        let mut pieces = Vec::new();
        for _ in 0..random.below(4) {
            let len = if random.one_in(16) { random.number() } else { random.below(70_000) };
            pieces.extend([self.address(random), len]);
        }
        let count = if random.one_in(16) { random.number() & 0xffff_ffff } else { pieces.len() as u64 / 2 };
        let from = if random.one_in(16) { self.address(random) } else { pieces.as_ptr() as u64 };
        let flags = if random.one_in(16) { random.number() } else { random.below(4) };
        let offset = if random.one_in(4) { random.number() } else { random.below(4096) };
        self.ioctl(MOVE, &[self.token(random), offset, random.next(), flags, from, count]).is_ok()
    }

    fn map(&mut self, offset: u64, len: usize, how: i32) -> bool {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel finds room touches nothing that exists.
        let at = unsafe {
            libc::mmap(ptr::null_mut(), len, access, how, self.file.as_raw_fd(), offset as libc::off_t)
        };
        if at == libc::MAP_FAILED {
            return false;
        }
        self.mapped.push(Mapped { at, len });
        true
    }

    /// A mapping is memory whatever has become of what it is of.
    fn touch(&self, random: &mut Random) -> bool {
        let len = self.mapped.len() as u64;
        let Some(mapped) = self.mapped.get(random.below(len.max(1)) as usize) else { return false };
        let at = random.below(mapped.len as u64) as usize;
        // SAFETY: it is mapped, readable and writable, and no Rust reference to it exists.
        unsafe {
            let byte = mapped.at.cast::<u8>().add(at);
            byte.write_volatile(byte.read_volatile().wrapping_add(1));
        }
        true
    }

    fn unmap(&mut self, random: &mut Random) -> bool {
        if self.mapped.is_empty() {
            return false;
        }
        let mapped = self.mapped.swap_remove(random.below(self.mapped.len() as u64) as usize);
        // SAFETY: it was mapped by `map`, and nobody knows of it any more.
        unsafe { libc::munmap(mapped.at, mapped.len) == 0 }
    }

    /// A child uses the file, what is mapped of it, and the device a second time; its parent too.
    fn be_two(&mut self, random: &mut Random, gid: u64) -> bool {
        // SAFETY: this program has one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let mut other = Program::open(&self.path).ok();
            for _ in 0..20 {
                self.touch(random);
                self.abuse_a_little(random);
                if let Some(other) = &mut other {
                    other.tokens.clone_from(&self.tokens);
                    other.any_command(random, gid);
                }
            }
            // SAFETY: ends this process, and nothing of its parent's.
            unsafe { libc::_exit(0) };
        }
        for _ in 0..20 {
            self.any_command(random, gid);
        }
        // SAFETY: waits for the child that was just made.
        child > 0 && unsafe { libc::waitpid(child, ptr::null_mut(), 0) == child }
    }

    fn abuse_a_little(&mut self, random: &mut Random) {
        match random.below(3) {
            0 => self.any_move(random),
            1 => self.unmap(random),
            _ => self.withdraw(random.below(64)).is_ok(),
        };
    }
}
