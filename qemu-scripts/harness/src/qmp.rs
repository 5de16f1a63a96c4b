//! QEMU's monitor: commands and their answers, and the events that come between.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long QEMU may take to answer.
const DEADLINE: Duration = Duration::from_secs(60);

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Takes QEMU's greeting.
    pub fn new(stream: UnixStream) -> Result<Qmp, String> {
        stream.set_read_timeout(Some(Duration::from_millis(200))).map_err(|e| e.to_string())?;
        let mut qmp = Qmp { stream: BufReader::new(stream), events: Vec::new() };
        qmp.read("its greeting", |value| value.get("QMP").is_some())?;
        qmp.command("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; the answer, or QEMU's error in its words.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        let line = json!({ "execute": name, "arguments": arguments }).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes()).map_err(|error| format!("{name}: {error}"))?;
        let answer =
            self.read(name, |value| value.get("return").is_some() || value.get("error").is_some())?;
        match answer.get("error") {
            Some(error) => Err(format!("{name}: {}", error["desc"].as_str().unwrap_or_default())),
            None => Ok(answer["return"].clone()),
        }
    }

    /// Waits for an event of this name that has not been waited for yet; its data.
    pub fn event(&mut self, name: &str) -> Result<Value, String> {
        let is = |value: &Value| value["event"] == name;
        let event = match self.events.iter().position(is) {
            Some(at) => self.events.remove(at),
            None => self.read(name, is)?,
        };
        Ok(event["data"].clone())
    }

    /// Forgets the events of this name that have come so far.
    pub fn forget(&mut self, name: &str) {
        self.events.retain(|event| event["event"] != name);
    }

    /// The next message that is `wanted`; events that come before it are kept.
    fn read(&mut self, what: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value, String> {
        let end = Instant::now() + DEADLINE;
        let mut line = String::new();
        loop {
            match self.stream.read_line(&mut line) {
                Ok(0) => return Err(format!("QEMU ended before {what}")),
                Ok(_) => {}
                // What has been read of a line stays in it.
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock && Instant::now() < end => {
                    continue;
                }
                Err(error) => return Err(format!("still waiting for {what} of QEMU's monitor: {error}")),
            }
            let value: Value = serde_json::from_str(&line).map_err(|error| format!("{error} in {line:?}"))?;
            line.clear();
            if wanted(&value) {
                return Ok(value);
            }
            if value.get("event").is_some() {
                self.events.push(value);
            }
        }
    }
}
