//! `dmbridge-run` between network namespaces of this host: connections move where both sides name the same network, and
//! networks with equal addresses are not taken for one.

use dmbridge::{Device, Event, Gid, Token};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::until;
use dmbridge_tests::namespaces::{Namespace, joined};
use dmbridge_tests::preload::{Ran, Way, daemon};
use sha2::{Digest, Sha256};
use std::panic::AssertUnwindSafe;
use std::time::Duration;

#[path = "../../guest-driver/preload/src/version.rs"]
mod version;

use version::VERSION;

const SERVER: &str = "10.99.0.1";
const CLIENT: &str = "10.99.0.2";
/// Of the server; the next one is the client's.
const PORT: u16 = 5300;
const UNTIL_MOVED: &str = "ask-until-moved";

/// A server that answers requests of all sizes with what it was asked and who it is, and a client that checks that: some
/// hundred times, until what it asks does not go over TCP any more, or until there is a file.
const SCRIPT: &str = r#"
import os, random, socket, struct, sys
who, role, server, port = sys.argv[1:5]
port = int(port)
def whole(s, n):
    data = b''
    while len(data) < n:
        part = s.recv(n - len(data))
        if not part: return None
        data += part
    return data
if role == 'serve':
    s = socket.create_server((server, port)).accept()[0]
    while head := whole(s, 4):
        s.sendall(who.encode() + head + whole(s, struct.unpack('>I', head)[0]))
else:
    s = socket.create_connection((server, port), source_address=('', port + 1))
    random.seed(who)
    def ask():
        data = random.randbytes(random.choice([1, 100, 5000, 60000]))
        asked = struct.pack('>I', len(data)) + data
        s.sendall(asked)
        want = who.encode() + asked
        if whole(s, len(want)) != want: sys.exit('a wrong answer')
        return len(asked)
    def acked():
        return struct.unpack_from('Q', s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128), 120)[0]
    for i in range(400): ask()
    done = role == 'ask'
    while not done:
        before = acked()
        asked = sum(ask() for i in range(50))
        done = os.path.exists(role) if '/' in role else (acked() - before) * 10 < asked
    print('all answers are right')
"#;

/// Has a client ask a server; what both say.
fn ask(who: &str, how: &str, address: &str, server: Way<'_>, client: Way<'_>) -> [Ran; 2] {
    let port = PORT.to_string();
    let mut serving = server.serve("python3", &["-c", SCRIPT, who, "serve", address, &port], PORT);
    let asked = client.run("python3", &["-c", SCRIPT, who, how, address, &port]);
    assert_eq!(asked.out, "all answers are right\n");
    [asked, serving.finish()]
}

/// As [`ask`], between the two of a pair.
fn ask_across(
    daemon: &TestDaemon,
    who: &str,
    how: &str,
    pair: &[Namespace; 2],
    networks: [&str; 2],
) -> [Ran; 2] {
    let [a, b] = pair;
    let way = |namespace, network| Way::Within(daemon, namespace, network);
    ask(who, how, SERVER, way(a, networks[0]), way(b, networks[1]))
}

fn both_moved(ran: &[Ran; 2]) {
    for ran in ran {
        assert!(ran.moved() > 100_000, "{}", ran.err);
    }
}

#[test]
fn connections_between_namespaces_of_one_network_move() {
    let daemon = daemon();
    let pair = joined([SERVER, CLIENT]);
    both_moved(&ask_across(&daemon, "one", UNTIL_MOVED, &pair, ["cables", "cables"]));
}

#[test]
fn connections_between_namespaces_stay_tcp_unless_both_name_the_same_network() {
    let daemon = daemon();
    let unnamed = "not in this network namespace, and no network was named";
    for networks in [["", ""], ["cables", ""], ["cables", "others"]] {
        // A program may be over before it was found out where its connection leads.
        until("the reason why a connection stayed TCP", || {
            let ran = ask_across(&daemon, "one", "ask", &joined([SERVER, CLIENT]), networks);
            ran.iter()
                .zip([networks[1], networks[0]])
                .all(|(ran, network)| {
                    assert_eq!(ran.moved(), 0, "{networks:?}: {}", ran.err);
                    let counted = ran.counter(unnamed) > 0;
                    assert!(network.is_empty() || !counted, "{networks:?}: {}", ran.err);
                    counted || !network.is_empty()
                })
                .then_some(())
        });
    }
}

#[test]
fn networks_with_equal_addresses_are_told_apart() {
    let daemon = daemon();
    let networks = [("one", joined([SERVER, CLIENT])), ("two", joined([SERVER, CLIENT]))];
    std::thread::scope(|scope| {
        let threads = networks
            .each_ref()
            .map(|(name, pair)| scope.spawn(|| ask_across(&daemon, name, UNTIL_MOVED, pair, [*name; 2])));
        for thread in threads {
            both_moved(&thread.join().expect("all answers are right"));
        }
    });
}

#[test]
fn connections_inside_a_namespace_move_and_are_not_taken_for_those_of_another_one() {
    let daemon = daemon();
    let namespaces = joined([SERVER, CLIENT]);
    std::thread::scope(|scope| {
        let threads = namespaces.each_ref().map(|namespace| {
            let way = Way::Within(&daemon, namespace, "cables");
            let who = if std::ptr::eq(namespace, &namespaces[0]) { "one" } else { "two" };
            scope.spawn(move || ask(who, UNTIL_MOVED, "127.0.0.1", way, way))
        });
        for thread in threads {
            both_moved(&thread.join().expect("all answers are right"));
        }
    });
}

/// A device of the same group that knows the network's name and a connection's addresses, and says to be its server.
struct Liar(Device);

impl Liar {
    /// The key of the connection between the two addresses of a pair.
    fn key(network: &str) -> [u8; 32] {
        let end = |last: u8, port: u16| {
            let mut end = [0; 18];
            end[..4].copy_from_slice(&[10, 99, 0, last]);
            end[16..].copy_from_slice(&port.to_le_bytes());
            end
        };
        Sha256::new_with_prefix(b"dmbridge-run, by addresses\0")
            .chain_update((network.len() as u64).to_le_bytes())
            .chain_update(network)
            .chain_update([2, 6])
            .chain_update(end(1, PORT))
            .chain_update(end(2, PORT + 1))
            .finalize()
            .into()
    }

    /// The next event that fits, if one comes soon.
    fn event<T>(&self, fits: impl Fn(Event) -> Option<T>) -> Option<T> {
        loop {
            let event = self.0.events().next(Some(Duration::from_secs(5))).expect("a device")?;
            if let Some(found) = fits(event) {
                return Some(found);
            }
        }
    }

    /// What somebody says who has the key, or comes with it soon.
    fn meet(&self, key: [u8; 32], words: [u8; 32]) -> Option<(Gid, [u8; 32])> {
        let there = self.0.rendezvous(key, 1, words).expect("a device");
        let met = there.or_else(|| {
            self.event(|event| match event {
                Event::Rendezvous { gid, payload, .. } => Some((gid, payload)),
                _ => None,
            })
        });
        if met.is_none() {
            self.0.cancel_rendezvous(key, 1).expect("a device");
        }
        met
    }

    /// Says to be a server that has received so many bytes, and has sent as many. Whether somebody listened, and did not
    /// believe it: who is kept waiting goes, and comes again.
    fn lie(&self, key: [u8; 32], bytes: u64) -> Option<()> {
        let mut hello = [0; 32];
        hello[..2].copy_from_slice(&[VERSION, 1]);
        let (gid, theirs) = self.meet(key, hello)?;
        let offers = Sha256::new_with_prefix(b"dmbridge-run, offers\0").chain_update(key);
        let offers = offers.chain_update(&hello[8..16]).chain_update(&theirs[8..16]).finalize();
        let dmb = self.0.register(gid, 1 << 20).expect("a DMB");
        let mut offer = [0; 32];
        offer[..8].copy_from_slice(&dmb.token().to_bits().to_le_bytes());
        offer[8..16].copy_from_slice(&bytes.to_le_bytes());
        offer[16..24].copy_from_slice(&bytes.to_le_bytes());
        let (_, theirs) = self.meet(offers.into(), offer)?;
        let token = u64::from_le_bytes(theirs[..8].try_into().expect("eight bytes"));
        match self.0.attach(Token::from_bits(token)) {
            Ok(_attached) => self.event(|event| matches!(event, Event::DmbUnregistered { .. }).then_some(())),
            Err(error) => {
                assert_eq!(error.status().map(|s| format!("{s:?}")).as_deref(), Some("NoEntry"));
                Some(())
            }
        }
    }
}

#[test]
fn who_only_says_to_be_the_other_end_keeps_a_connection_tcp() {
    let daemon = daemon();
    for bytes in [0, 1 << 40] {
        let liar = Liar(Device::connect(daemon.hub()).expect("a device"));
        let [a, b] = joined([SERVER, CLIENT]);
        let was_not_believed = daemon.path(&format!("not-believed-{bytes}"));
        let file = was_not_believed.to_str().expect("a plain name");
        let [client, server] = std::thread::scope(|scope| {
            let lying = scope.spawn(|| {
                let lied = std::panic::catch_unwind(AssertUnwindSafe(|| {
                    (0..20).find_map(|_| liar.lie(Liar::key("cables"), bytes))
                }));
                std::fs::write(&was_not_believed, "").expect("a file");
                lied.expect("no panic").expect("somebody listens to lies");
            });
            let (server, client) = (Way::Within(&daemon, &a, ""), Way::Within(&daemon, &b, "cables"));
            let ran = ask("one", file, SERVER, server, client);
            lying.join().expect("the liar is not believed");
            ran
        });
        assert_eq!((client.moved(), server.moved()), (0, 0));
        assert_eq!(client.counter("who said to be the other end is not"), 1, "{}", client.err);
    }
}
