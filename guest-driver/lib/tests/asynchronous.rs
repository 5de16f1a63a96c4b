//! The library in tokio's tasks, over the real daemon.
#![cfg(feature = "tokio")]

use dmbridge::asynchronous::{AsyncDmb, AsyncEvents, AsyncMover};
use dmbridge::{Device, Error, Event, Token};
use dmbridge_tests::daemon::TestDaemon;
use dmbridge_tests::deadline::DEADLINE;
use std::future::Future;

/// Everything below happens on one thread: nothing may block it.
async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("it hangs")
}

#[tokio::test]
async fn two_tasks_play_ping_pong_on_one_thread() {
    let daemon = TestDaemon::start();
    let a = Device::connect(daemon.hub()).unwrap();
    let b = Device::connect(daemon.hub()).unwrap();
    let (a_gid, b_gid) = (a.gid(), b.gid());
    let serve = |device: Device, peer, first: bool| async move {
        let mut events = AsyncEvents::new(device.events()).unwrap();
        let mut dmb = AsyncDmb::new(device.register(peer, 4096).unwrap()).unwrap();
        device.signal_event(peer, 0, dmb.token().to_bits()).unwrap();
        let Event::Software { info, .. } = events.next().await.unwrap() else { panic!("no token") };
        let remote = device.attach(Token::from_bits(info)).unwrap();
        for round in 0..200 {
            if first {
                remote.signal(1).unwrap();
            }
            assert_eq!(dmb.wait().await.unwrap(), 1, "round {round}");
            if !first {
                remote.signal(1).unwrap();
            }
        }
    };
    in_time(async { tokio::join!(serve(a, b_gid, true), serve(b, a_gid, false)) }).await;
}

#[tokio::test]
async fn moves_are_awaited_and_the_end_of_a_peer_too() {
    let daemon = TestDaemon::start();
    let owner = Device::connect(daemon.hub()).unwrap();
    let peer = Device::connect(daemon.hub()).unwrap();
    let mut dmb = AsyncDmb::new(owner.register(peer.gid(), 1 << 20).unwrap()).unwrap();
    let mut mover = AsyncMover::new(peer.mover(dmb.token()).unwrap()).unwrap();
    for round in 0..100u64 {
        mover.post(0, &[round as u8; 10_000], None).unwrap();
        let last = mover.post(10_000, &round.to_le_bytes(), None).unwrap();
        in_time(mover.wait(last)).await.unwrap();
        assert_eq!(dmb.memory().slice(10_000..).read_u64(0), round);
    }
    mover.post(1 << 20, b"outside", None).unwrap();
    assert!(matches!(in_time(mover.flush()).await, Err(Error::Move(_))));
    drop((mover, peer));
    assert!(matches!(in_time(dmb.wait()).await, Err(Error::PeerGone)));
}

mod sockets {
    use super::*;
    use dmbridge::smc::{AsyncSmcListener, AsyncSmcStream, Smc};
    use std::net::Ipv4Addr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn echo(smc: &Smc, client: &Smc, is_smc: bool) {
        const TOTAL: usize = 4_000_000;
        let listener = AsyncSmcListener::new(smc.bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
        let address = listener.get_ref().local_addr().unwrap();
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            let (mut reader, mut writer) = tokio::io::split(stream);
            assert_eq!(tokio::io::copy(&mut reader, &mut writer).await.unwrap(), TOTAL as u64);
            writer.shutdown().await.unwrap();
        };
        let client = async {
            let stream = AsyncSmcStream::connect(client, address).await.unwrap();
            assert_eq!(stream.get_ref().is_smc(), is_smc);
            let (mut reader, mut writer) = tokio::io::split(stream);
            let data: Vec<u8> = (0..TOTAL).map(|i| (i % 251) as u8).collect();
            let writing = async {
                for piece in data.chunks(70_001) {
                    writer.write_all(piece).await.unwrap();
                }
                writer.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let (_, read) = tokio::join!(writing, reader.read_to_end(&mut got));
            read.unwrap();
            assert!(got == data);
        };
        in_time(async { tokio::join!(server, client) }).await;
    }

    #[tokio::test]
    async fn tasks_on_one_thread_talk_over_sockets_whatever_carries_them() {
        let daemon = TestDaemon::start();
        let smc = || Smc::new(Device::connect(daemon.hub()).unwrap());
        echo(&smc(), &smc(), true).await;
        let none = Smc::builder().build();
        echo(&none, &none, false).await;
    }
}
