//! Runs in a guest what the host asks for. The guest image's first process starts a program `dmbridge-guest-agent`, which
//! does nothing but call [`serve`].

use super::frame::{self, Frame, Kind};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

/// Serves the host for as long as the guest lives; returns only with what made that impossible.
pub fn serve() -> io::Error {
    match try_serve() {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

enum Never {}

/// The host may have taken the first words for the rest of what the agent before a reset said.
const HELLO_AGAIN: Duration = Duration::from_secs(1);

/// A command that runs.
struct Entry {
    input: Option<Sender<Vec<u8>>>,
    group: i32,
}

type Port = Arc<Mutex<File>>;
type Entries = Arc<Mutex<HashMap<u32, Entry>>>;

fn try_serve() -> io::Result<Never> {
    let file = OpenOptions::new().read(true).write(true).open(port()?)?;
    let mut from_host = BufReader::new(file.try_clone()?);
    let mut number = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut number)?;
    let (welcome, waits) = channel::<()>();
    let hello = (file.try_clone()?, [frame::HELLO.as_slice(), &number].concat());
    thread::spawn(move || {
        let (mut file, hello) = hello;
        while file.write_all(&hello).is_ok()
            && waits.recv_timeout(HELLO_AGAIN) == Err(RecvTimeoutError::Timeout)
        {}
    });
    loop {
        frame::skip_to(&frame::WELCOME, &mut from_host)?;
        if frame::array::<8>(&mut from_host)? == number {
            break;
        }
    }
    drop(welcome);
    let port = Arc::new(Mutex::new(file));
    let entries = Entries::default();
    loop {
        let frame = Frame::read(&mut from_host)?;
        match frame.kind {
            Kind::Run => {
                if let Err(error) = run(&frame, &port, &entries) {
                    send(&port, Kind::Failed, frame.id, error.to_string().as_bytes())?;
                }
            }
            Kind::Input => {
                if let Some(entry) = lock(&entries).get_mut(&frame.id) {
                    if frame.content.is_empty() {
                        entry.input = None;
                    } else if let Some(input) = &entry.input {
                        // A command that has closed its standard input does not get the rest.
                        let _ = input.send(frame.content);
                    }
                }
            }
            Kind::Signal => {
                if let (Some(entry), Ok(signal)) = (lock(&entries).get(&frame.id), frame.content.try_into()) {
                    // SAFETY: sends a signal; the group is that of a child that has not been waited for.
                    unsafe { libc::kill(-entry.group, i32::from_le_bytes(signal)) };
                }
            }
            kind => return Err(io::Error::other(format!("{kind:?} is not for a guest"))),
        }
    }
}

/// The device file of the port with our name.
fn port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == frame::PORT) {
            return Ok(PathBuf::from("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::other(format!("there is no virtio serial port {}", frame::PORT)))
}

fn run(frame: &Frame, port: &Port, entries: &Entries) -> io::Result<()> {
    let mut words = frame.content.split(|byte| *byte == 0).map(OsStr::from_bytes);
    let program = words.next().unwrap_or_default();
    // The last argument ends with a zero byte, too.
    let arguments: Vec<_> = words.collect();
    let arguments = arguments.split_last().map_or(&[][..], |(_, all)| all);
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let (input, inputs) = channel();
    lock(entries).insert(frame.id, Entry { input: Some(input), group: child.id() as i32 });
    let (id, port, entries) = (frame.id, port.clone(), entries.clone());
    thread::spawn(move || attend(child, id, inputs, &port, &entries));
    Ok(())
}

/// Carries a command's streams until it has ended.
fn attend(mut child: Child, id: u32, inputs: Receiver<Vec<u8>>, port: &Port, entries: &Entries) {
    let stdin = child.stdin.take();
    thread::spawn(move || {
        let mut stdin = stdin;
        // Ends when the host has said that this was all, or the command reads no more.
        for bytes in inputs {
            if stdin.as_mut().is_none_or(|stdin| stdin.write_all(&bytes).is_err()) {
                break;
            }
        }
    });
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(|| forward(stdout, Kind::Output, id, port));
        scope.spawn(|| forward(stderr, Kind::Error, id, port));
    });
    let status = wait(&mut child, id, entries);
    let _ = match status {
        Ok(status) => send(port, Kind::Ended, id, &status.to_le_bytes()),
        Err(error) => send(port, Kind::Failed, id, error.to_string().as_bytes()),
    };
}

/// Waits for the child, and forgets it before its number can be another's.
fn wait(child: &mut Child, id: u32, entries: &Entries) -> io::Result<i32> {
    // SAFETY: a zeroed siginfo_t is a valid value of the C struct.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: waits for a child of this process and writes to `info`; WNOWAIT leaves it to be reaped.
    unsafe { libc::waitid(libc::P_PID, child.id(), &raw mut info, libc::WEXITED | libc::WNOWAIT) };
    lock(entries).remove(&id);
    Ok(child.wait()?.into_raw())
}

fn forward(from: Option<impl Read>, kind: Kind, id: u32, port: &Port) {
    let mut bytes = vec![0; frame::MAX_CONTENT];
    let Some(mut from) = from else { return };
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if send(port, kind, id, &bytes[..count]).is_err() {
            return;
        }
    }
}

fn send(port: &Port, kind: Kind, id: u32, content: &[u8]) -> io::Result<()> {
    Frame::write(kind, id, content, &mut *lock(port))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
