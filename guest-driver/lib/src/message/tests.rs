use super::*;
use crate::dmb::tests::pair;
use crate::proto::control::PairFlags;
use std::thread;

const PROCESSES: PairFlags = PairFlags::MAP.union(PairFlags::FUTEX);

/// Two ends of a channel with no device, opened by two threads.
fn channels(size: usize, flags: PairFlags, wishes: [Direct; 2]) -> (Channel, Channel) {
    let (here, to_here, _) = pair(size, flags);
    let (there, to_there, _) = pair(size, flags);
    thread::scope(|scope| {
        let other = scope.spawn(|| Channel::open_with(there, to_here, wishes[1]).unwrap());
        let one = Channel::open_with(here, to_there, wishes[0]).unwrap();
        (one, other.join().unwrap())
    })
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + seed) as u8).collect()
}

#[test]
fn every_message_arrives_as_a_whole_and_in_order_directly_or_not() {
    for wish in [Direct::Never, Direct::From(1), Direct::From(100_000), Direct::Measured] {
        let (mut a, mut b) = channels(64 << 10, PROCESSES, [wish; 2]);
        assert_eq!(a.direct().is_ok(), wish != Direct::Never);
        let lens = [0, 1, 14, 4096, 70_000, SMALL, SMALL + 1, 1_000_003];
        thread::scope(|scope| {
            scope.spawn(|| {
                for (seed, len) in lens.into_iter().enumerate() {
                    a.send(&pattern(len, seed)).unwrap();
                }
                a.sender().finish().unwrap();
            });
            let mut buffer = vec![0; 1 << 20];
            for (seed, len) in lens.into_iter().enumerate() {
                assert_eq!(b.recv(&mut buffer).unwrap(), Some(len), "{wish:?}");
                assert!(buffer[..len] == pattern(len, seed), "{wish:?} {len}");
            }
            assert_eq!(b.recv(&mut buffer).unwrap(), None);
        });
    }
}

#[test]
fn both_ways_are_tried_among_the_messages_and_all_of_them_arrive_in_order() {
    let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::Measured; 2]);
    assert_eq!(a.threshold(), chooser::LEAST);
    for len in [40_000, 200_000] {
        let before = a.sender.offers;
        thread::scope(|scope| {
            scope.spawn(|| (0..200).for_each(|seed| a.send(&pattern(len, seed)).unwrap()));
            let mut buffer = vec![0; len];
            for seed in 0..200 {
                assert_eq!(b.recv(&mut buffer).unwrap(), Some(len));
                assert!(buffer == pattern(len, seed), "{len} {seed}");
            }
        });
        let direct = a.sender.offers - before;
        assert!((1..200).contains(&direct), "{direct} of 200 went directly");
    }
}

#[test]
fn lists_of_pieces_go_into_other_lists_of_pieces() {
    for wish in [Direct::Never, Direct::From(1)] {
        let (mut a, mut b) = channels(64 << 10, PROCESSES, [wish; 2]);
        for (from, to) in [(7, 1 << 20), (100_000, 3000), (1 << 20, 1 << 20)] {
            let message = pattern(600_000, from);
            let mut buffer = vec![0; 700_000];
            thread::scope(|scope| {
                let pieces: Vec<IoSlice<'_>> = message.chunks(from).map(IoSlice::new).collect();
                let sender = a.sender();
                scope.spawn(move || sender.send_vectored(&pieces).unwrap());
                let mut pieces: Vec<IoSliceMut<'_>> = buffer.chunks_mut(to).map(IoSliceMut::new).collect();
                assert_eq!(b.receiver().recv_vectored(&mut pieces).unwrap(), Some(600_000));
            });
            assert!(buffer[..600_000] == message);
            assert!(buffer[600_000..].iter().all(|byte| *byte == 0));
        }
    }
}

#[test]
fn both_post_and_then_both_receive() {
    let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
    let exchange = |channel: &mut Channel, seed: usize| {
        for round in 0..20 {
            let message = pattern(500_000, seed + round);
            let mut buffer = vec![0; 500_000];
            let (sender, receiver) = channel.both();
            let pieces = [IoSlice::new(&message)];
            let posted = sender.post(&pieces).unwrap();
            assert_eq!(receiver.recv(&mut buffer).unwrap(), Some(500_000));
            posted.wait().unwrap();
            assert!(buffer == pattern(500_000, 1 - seed + round));
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| exchange(&mut a, 0));
        exchange(&mut b, 1);
    });
}

#[test]
fn a_message_that_does_not_fit_stays_the_next_one() {
    for wish in [Direct::Never, Direct::From(1)] {
        let (mut a, mut b) = channels(64 << 10, PROCESSES, [wish; 2]);
        thread::scope(|scope| {
            scope.spawn(|| a.send(&[7; 5000]).unwrap());
            let too_long = b.recv(&mut [0; 4999]).unwrap_err();
            assert!(matches!(too_long, Error::MessageTooLong { len: 5000, size: 4999 }), "{too_long}");
            assert_eq!(b.receiver().next_len().unwrap(), Some(5000));
            let mut buffer = [0; 5000];
            assert_eq!(b.recv(&mut buffer).unwrap(), Some(5000));
            assert_eq!(buffer, [7; 5000]);
        });
    }
}

#[test]
fn nobody_goes_directly_who_may_be_a_virtual_machine_or_does_not_want_to() {
    let (a, b) = channels(64 << 10, PairFlags::MAP, [Direct::Measured; 2]);
    assert!(a.direct().is_err() && b.direct().is_err());
    let (a, b) = channels(64 << 10, PROCESSES, [Direct::Never, Direct::From(1)]);
    assert!(a.direct().is_err() && b.direct().is_err());
    assert_eq!((a.threshold(), b.threshold()), (usize::MAX, usize::MAX));
    let (a, b) = channels(64 << 10, PROCESSES, [Direct::From(5), Direct::From(7)]);
    assert_eq!((a.threshold(), b.threshold()), (7, 7));
}

#[test]
fn a_message_that_cannot_be_read_is_sent_and_later_ones_too() {
    let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
    let message = pattern(400_000, 3);
    thread::scope(|scope| {
        scope.spawn(|| {
            // As if the pages of the buffer were such that the kernel does not let anybody at them.
            let frame = Frame::Offer { number: 1, len: message.len() as u64, pieces: 1 };
            let mut bytes = frame.to_bytes().to_vec();
            bytes.extend(8u64.to_le_bytes());
            bytes.extend((message.len() as u64).to_le_bytes());
            a.sender.stream.send(&bytes).unwrap();
            (a.sender.offers, a.sender.open) = (1, true);
            let pieces = [IoSlice::new(&message)];
            // It does not help either: it would put things right.
            assert_eq!(a.sender.wait_taken(1, &[]).unwrap(), Taken::Refused);
            a.sender.peer = None;
            a.sender.send_pieces(&pieces).unwrap();
            a.send(&message).unwrap();
        });
        let mut buffer = vec![0; 400_000];
        for _ in 0..2 {
            assert_eq!(b.recv(&mut buffer).unwrap(), Some(400_000));
            assert!(buffer == message);
            buffer.fill(0);
        }
    });
}

#[test]
fn an_offer_whose_handle_is_forgotten_is_waited_for_by_the_next() {
    let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
    let message = pattern(300_000, 1);
    let pieces = [IoSlice::new(&message)];
    std::mem::forget(a.sender().post(&pieces).unwrap());
    let mut buffer = vec![0; 300_000];
    thread::scope(|scope| {
        scope.spawn(|| a.send(b"next").unwrap());
        assert_eq!(b.recv(&mut buffer).unwrap(), Some(300_000));
        assert!(buffer == message);
        assert_eq!(b.recv(&mut buffer).unwrap(), Some(4));
    });
}

#[test]
fn a_receiver_that_closes_ends_the_senders_wait() {
    let (mut a, b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
    thread::scope(|scope| {
        let sender = scope.spawn(|| a.send(&[1; 200_000]));
        drop(b);
        assert!(matches!(sender.join().unwrap(), Err(Error::Closed)));
    });
}

#[test]
fn a_peer_that_talks_nonsense_costs_its_own_channel() {
    let nonsense: [&[u8]; 5] = [
        &[0xff; 32],
        &Frame::Proof { address: 0 }.to_bytes(),
        &Frame::Offer { number: 1, len: u64::MAX, pieces: 1 }.to_bytes(),
        &Frame::Offer { number: 1, len: 5, pieces: 5000 }.to_bytes(),
        // Pieces that are longer together than the message, and than anything.
        &[&Frame::Offer { number: 1, len: 5, pieces: 2 }.to_bytes()[..], &[0xff; 32]].concat(),
    ];
    for bytes in nonsense {
        let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
        a.sender.stream.send(bytes).unwrap();
        let error = b.recv(&mut [0; 100]).unwrap_err();
        assert!(matches!(error, Error::Peer(_)), "{error}");
    }
}

#[test]
fn after_a_fork_nobody_is_told_addresses_of_the_parents_memory() {
    let (mut a, mut b) = channels(64 << 10, PROCESSES, [Direct::From(1); 2]);
    let message = pattern(1_000_000, 5);
    let mut buffer = vec![0; 1_000_000];
    // A child that receives: it reads by itself, and is not written to.
    b.receiver.process = Process::other();
    thread::scope(|scope| {
        scope.spawn(|| a.send(&message).unwrap());
        assert_eq!(b.recv(&mut buffer).unwrap(), Some(1_000_000));
    });
    assert!(buffer == message);
    assert_eq!(Joint::of(a.sender.stream.remote().memory()).helped(1), 0);
    // A child that sends: through the DMB.
    a.sender.process = Process::other();
    thread::scope(|scope| {
        scope.spawn(|| a.send(&message).unwrap());
        assert!(matches!(b.receiver.next_len(), Ok(Some(1_000_000))));
        assert!(matches!(b.receiver.next, Some(Next::Inline { .. })));
        assert_eq!(b.recv(&mut buffer).unwrap(), Some(1_000_000));
    });
    assert!(buffer == message);
}
