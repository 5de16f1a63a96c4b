//! A client that kills itself at a given point: for the test of violent ends, not for anything else.
//!
//! `victim HUB POINT WITNESS`: connects two devices to the hub and does everything that a client does, with each other
//! and with the device whose GID is WITNESS; at its POINTth step it dies by SIGKILL. With a POINT beyond the last it
//! prints the number of steps.

use dmbridge_proto::FIRST_MOVE_QUEUE;
use dmbridge_proto::control::{Home, Register, Request, Segment};
use dmbridge_proto::ids::Gid;
use dmbridge_proto::moves::{MoveFlags, MoveHeader};
use dmbridge_tests::frontend::{Options, RawFrontend};
use dmbridge_tests::ring::Descriptor;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::PathBuf;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let mut arg = || args.next().ok_or_else(|| anyhow::anyhow!("usage: victim HUB POINT WITNESS"));
    let hub = PathBuf::from(arg()?);
    let point: u64 = arg()?.parse()?;
    let witness: Gid = arg()?.parse()?;
    let mut steps = 0;
    let mut step = |_: &'static str| {
        if steps == point {
            kill(Pid::this(), Signal::SIGKILL).expect("it can kill itself");
        }
        steps += 1;
    };
    live(&hub, witness, &mut step)?;
    println!("{steps}");
    Ok(())
}

fn live(hub: &PathBuf, witness: Gid, step: &mut dyn FnMut(&'static str)) -> anyhow::Result<()> {
    // A device whose front-end never answers a map request: it dies with one unanswered.
    let silent = Options { answer: false, ..Options::default() };
    let mut mute = RawFrontend::try_connect(hub, &silent, step)?;
    step("REGISTER that nobody maps");
    let register = Register { rgid: mute.gid(), size: 4096, home: Home::Pool };
    mute.begin_request(&Request::Register(register));
    step("with a map request unanswered");
    drop(mute);

    let a = RawFrontend::try_connect(hub, &Options::default(), step)?;
    step("half a header");
    a.send_bytes(&[1, 0, 0]);
    step("half a header was sent");
    drop(a);

    let mut a = RawFrontend::try_connect(hub, &Options::default(), &mut |_| {})?;
    step("the second device");
    let mut b = RawFrontend::try_connect(hub, &Options::default(), &mut |_| {})?;
    step("QUERY");
    a.query(witness)?;
    step("REGISTER for the witness");
    a.register(witness, 1 << 20)?;
    step("REGISTER for the other");
    let own = a.register(b.gid(), 1 << 20)?;
    step("REGISTER in RAM");
    let pages = a.memory.allocate(1 << 20, 4096);
    let line = a.memory.allocate(64, 64);
    let ram = a.register_ram(b.gid(), line, &[Segment { addr: pages, len: 1 << 20 }])?;
    step("REGISTER for itself");
    let page = b.memory.allocate(4096, 4096);
    let own_line = b.memory.allocate(64, 64);
    b.register_ram(b.gid(), own_line, &[Segment { addr: page, len: 4096 }])?;
    b.register(b.gid(), 4096)?;
    step("ATTACH");
    b.attach(own.token)?;
    step("SIGNAL_EVENT");
    a.signal_event(witness, 1, 2)?;
    step("a move");
    b.move_bytes(own.token, 0, b"hello")?;
    step("a command whose answer nobody reads");
    a.begin_request(&Request::Register(Register { rgid: b.gid(), size: 1 << 20, home: Home::Pool }));
    step("many moves in flight");
    let data = b.memory.allocate(1 << 20, 4096);
    let header = b.memory.allocate(64, 64);
    let answer = b.memory.allocate(8, 8);
    for i in 0..80 {
        let token = if i % 2 == 0 { own.token } else { ram.token };
        b.memory
            .write(header, &MoveHeader { token, offset: 0, mask: 1, flags: MoveFlags::SIGNAL }.to_bytes());
        let pieces = [
            Descriptor::readable(header, 32),
            Descriptor::readable(data, 1 << 20),
            Descriptor::writable(answer, 8),
        ];
        b.offer(FIRST_MOVE_QUEUE, &pieces);
        if i % 20 == 0 {
            step("between two of them");
        }
    }
    step("all of them are in flight");
    a.reset();
    step("one device is reset");
    drop(a);
    step("one device is gone");
    Ok(())
}
