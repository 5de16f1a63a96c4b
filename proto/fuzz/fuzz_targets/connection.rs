//! A connection whose peer writes any flags at any time: it ends closed, and never says anything after its last word.
#![no_main]

use arbitrary::Arbitrary;
use dmbridge_proto::smc::cdc::{CursorWord, StateFlags};
use dmbridge_proto::smc::connection::{Connection, State};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    Establish,
    ShutDown,
    Close(bool),
    Abort,
    Peer(u64),
}

fuzz_target!(|steps: Vec<Step>| {
    let any_close = StateFlags::PEER_CONN_CLOSED | StateFlags::PEER_CONN_ABORT;
    let mut connection = Connection::new();
    for step in steps {
        let before = connection;
        let tell = match step {
            Step::Establish => {
                connection.establish();
                false
            }
            Step::ShutDown => connection.shut_down(),
            Step::Close(unread) => connection.close(unread),
            Step::Abort => connection.abort(),
            Step::Peer(word) => {
                connection.observe(CursorWord::from_bits(word).state);
                false
            }
        };
        assert_eq!(tell, connection.flags() != before.flags());
        assert!(!tell || !before.flags().intersects(any_close));
        assert!(connection.received().contains(before.received()));
        assert!(!connection.may_send() || connection.flags().is_empty());
        assert!(before.state() != State::Closed || connection.state() == State::Closed);
    }
    let _ = connection.close(false);
    connection.observe(StateFlags::PEER_CONN_ABORT);
    let _ = connection.close(false);
    assert_eq!(connection.state(), State::Closed);
});
