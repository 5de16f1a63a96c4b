//! A device in a guest, or of a process of the host, that a test drives: the program `vm-guest`, whose source lists the
//! commands. What is meant to succeed panics, with the guest's words, if it does not.

use super::machine::Vm;
use crate::daemon::end_with_this_thread;
use dmbridge_vm::Running;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

/// How long an answer may take: guests are slow without KVM.
const ANSWER: Duration = Duration::from_secs(300);

/// How long a program that was killed may take to end.
const KILLED: Duration = Duration::from_secs(10);

/// A device that does what it is told. Its process ends when this is dropped.
#[derive(Debug)]
pub struct Driven {
    name: String,
    gid: String,
    end: End,
}

#[derive(Debug)]
enum End {
    Guest(Running),
    Host { child: Child, input: ChildStdin, lines: Receiver<String> },
}

impl Driven {
    /// The PCI device of a guest.
    pub fn in_guest(vm: &Vm) -> Driven {
        Driven::in_guest_with(vm, &["pci"])
    }

    /// A device of a guest, opened as these words say.
    pub fn in_guest_with(vm: &Vm, arguments: &[&str]) -> Driven {
        Driven::try_in_guest(vm, arguments)
            .unwrap_or_else(|error| panic!("VM {}: {error}\n---- console ----\n{}", vm.name(), vm.console()))
    }

    /// A device of a guest, opened as these words say by a program of this user.
    pub fn in_guest_as(vm: &Vm, user: &str, arguments: &[&str]) -> Driven {
        let command = format!("exec vm-guest {}", arguments.join(" "));
        Driven::started(
            vm.name(),
            End::Guest(vm.start_command(&["su", "-s", "/bin/sh", user, "-c", &command])),
        )
        .unwrap_or_else(|error| panic!("VM {}: {error}\n---- console ----\n{}", vm.name(), vm.console()))
    }

    /// A device of a guest, opened as these words say, or why it could not be.
    pub fn try_in_guest(vm: &Vm, arguments: &[&str]) -> Result<Driven, String> {
        let command: Vec<&str> = ["vm-guest"].iter().chain(arguments).copied().collect();
        Driven::started(vm.name(), End::Guest(vm.start_command(&command)))
    }

    /// A process in a guest, on this CPU, that connects to the socket of a daemon in the same guest.
    pub fn inside(vm: &Vm, cpu: u32, socket: &str) -> Driven {
        let mask = format!("{:x}", 1u64 << cpu);
        let command = ["taskset", &mask, "vm-guest", "hub", socket];
        Driven::started(vm.name(), End::Guest(vm.start_command(&command)))
            .unwrap_or_else(|error| panic!("VM {}: {error}\n---- console ----\n{}", vm.name(), vm.console()))
    }

    /// A process of this host that connects to a daemon's socket.
    pub fn on_host(socket: &Path, map: bool) -> Driven {
        let test = std::env::current_exe().expect("the test's own path");
        let program = test.ancestors().nth(2).expect("target/profile/deps/test").join("vm-guest");
        let mut command = Command::new(program);
        command.arg("hub").arg(socket).args((!map).then_some("--no-map"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        end_with_this_thread(&mut command);
        let mut child = command.spawn().expect("vm-guest is built with this package's tests");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let (sender, lines) = channel();
        thread::spawn(move || {
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Driven::started("host", End::Host { child, input, lines }).unwrap_or_else(|error| panic!("{error}"))
    }

    fn started(name: &str, end: End) -> Result<Driven, String> {
        let mut driven = Driven { name: name.into(), gid: String::new(), end };
        let hello = driven.try_answer()?;
        driven.gid = hello["gid"].as_str().expect("the first answer has a GID").into();
        Ok(driven)
    }

    /// Its GID.
    pub fn gid(&self) -> &str {
        &self.gid
    }

    /// Has it begin something; [`answer`](Self::answer) waits until it is done.
    pub fn begin(&mut self, command: &str) {
        let line = format!("{command}\n");
        let written = match &mut self.end {
            End::Guest(running) => running.write(line.as_bytes()),
            End::Host { input, .. } => input.write_all(line.as_bytes()).map_err(|e| e.to_string()),
        };
        written.unwrap_or_else(|error| panic!("{}: `{command}`: {error}", self.name));
    }

    fn line(&mut self) -> Result<String, String> {
        match &mut self.end {
            End::Guest(running) => running.line(ANSWER),
            End::Host { lines, .. } => lines.recv_timeout(ANSWER).map_err(|error| error.to_string()),
        }
    }

    /// What it answers, or why not.
    pub fn try_answer(&mut self) -> Result<Value, String> {
        let line = self.line()?;
        let answer: Value = serde_json::from_str(&line).map_err(|error| format!("{error} in {line}"))?;
        match answer["error"].as_str() {
            Some(error) => Err(format!("{error} {}", answer["status"].as_str().unwrap_or_default())),
            None => Ok(answer),
        }
    }

    /// What it answers.
    pub fn answer(&mut self) -> Value {
        self.try_answer().unwrap_or_else(|error| panic!("{}: {error}", self.name))
    }

    /// Has it do something.
    pub fn ask(&mut self, command: &str) -> Value {
        self.begin(command);
        self.try_answer().unwrap_or_else(|error| panic!("{}: `{command}`: {error}", self.name))
    }

    /// Has it try something that has to fail; why it did.
    pub fn refused(&mut self, command: &str) -> String {
        self.begin(command);
        match self.try_answer() {
            Err(error) => error,
            Ok(answer) => panic!("{}: `{command}` was not refused: {answer}", self.name),
        }
    }

    /// The next event, which has to be of this kind; events of other kinds before it are passed over.
    pub fn event(&mut self, kind: &str) -> Value {
        loop {
            let event = self.ask("event");
            match event["event"].as_str() {
                Some(is) if is == kind => return event,
                Some(_) => {}
                None => panic!("{}: still waiting for the event {kind}", self.name),
            }
        }
    }

    /// Registers a DMB for a peer; its number and token.
    pub fn register(&mut self, peer: &Driven, size: u64) -> (u64, String) {
        let answer = self.ask(&format!("register {} {size}", peer.gid));
        (answer["dmb"].as_u64().expect("a number"), answer["tokens"][0].as_str().expect("a token").into())
    }

    /// Makes a sender into a DMB, by `attach` or `move`; its number.
    pub fn sender(&mut self, how: &str, token: &str) -> u64 {
        self.ask(&format!("{how} {token}"))["sender"].as_u64().expect("a number")
    }

    /// Registers a DMB of this size at each for the other and has both send at once, each by a sender of its own that this
    /// word makes, until they have sent so many bytes.
    pub fn begin_exchange(&mut self, other: &mut Driven, by: [&str; 2], size: u64, bytes: u64) {
        let (own, own_token) = self.register(other, size);
        let (others, others_token) = other.register(self, size);
        let (sender, others_sender) = (self.sender(by[0], &others_token), other.sender(by[1], &own_token));
        self.begin(&format!("exchange {own} {sender} {bytes} 1"));
        other.begin(&format!("exchange {others} {others_sender} {bytes} 2"));
    }

    /// Waits until both have sent all: each has received what the other sent.
    pub fn end_exchange(&mut self, other: &mut Driven) {
        let (of_this, of_other) = (self.answer(), other.answer());
        println!("exchanged in {} s", of_this["seconds"]);
        assert_eq!((&of_this["sent"], &of_other["sent"]), (&of_other["received"], &of_this["received"]));
        assert_ne!(of_this["sent"], of_other["sent"], "they are different bytes");
    }

    /// Sends both ways at once.
    pub fn exchange(&mut self, other: &mut Driven, by: [&str; 2], size: u64, bytes: u64) {
        self.begin_exchange(other, by, size, bytes);
        self.end_exchange(other);
    }

    /// Sleeps on a DMB of its own until the other, which writes by a sender that this word makes, signals; three times.
    pub fn is_woken_by(&mut self, other: &mut Driven, by: &str) {
        let (dmb, token) = self.register(other, 4096);
        let sender = other.sender(by, &token);
        for round in 0..3 {
            self.begin(&format!("wait {dmb}"));
            other.ask(&format!("write {sender} 100 round {round}"));
            other.ask(&format!("signal {sender} {}", 1u64 << round));
            assert_eq!(self.answer()["bits"], 1u64 << round);
            assert_eq!(self.ask(&format!("read {dmb} 100 7"))["text"], format!("round {round}"));
        }
    }

    /// Has a guest's process end, so that it lets go of the device in good order.
    pub fn end(mut self) {
        if let End::Guest(running) = &self.end {
            running.end_input().expect("there is an agent");
            while self.line().is_ok() {}
        }
    }

    /// Kills its process, as `kill -9` does.
    pub fn kill(mut self) {
        match &mut self.end {
            End::Guest(running) => running.signal(Signal::SIGKILL).expect("the agent sends signals"),
            End::Host { child, .. } => child.kill().expect("kill"),
        }
        // Its output ends when it has.
        while self.line().is_ok() {}
    }
}

impl Drop for Driven {
    fn drop(&mut self) {
        match &mut self.end {
            End::Host { child, .. } => {
                let _ = child.kill();
                let _ = child.wait();
            }
            // Until it has ended, nobody else gets its device.
            End::Guest(running) => {
                let killed = running.signal(Signal::SIGKILL).is_ok();
                while killed && running.line(KILLED).is_ok() {}
            }
        }
    }
}
