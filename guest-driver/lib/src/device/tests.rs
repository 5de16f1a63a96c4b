use super::*;
use crate::proto::control::Response;
use crate::proto::event::GoneReason;
use crate::transport::fake::{Answer, Fake, FakeDevice, WINDOW};
use std::time::Instant;

const PEER: Gid = Gid::from_u64(2);
const TOKEN: Token = Token::from_bits(0x1_0000_0001);

fn device() -> (Device, Arc<FakeDevice>) {
    let fake = FakeDevice::new();
    let transport = Box::new(Fake(fake.clone()));
    (Device { core: Core::start(transport, Device::builder()).unwrap() }, fake)
}

fn reply(reply: Reply) -> Answer {
    Response::from(Ok(reply)).as_bytes().to_vec().into()
}

fn registered() -> RegisterReply {
    RegisterReply {
        token: TOKEN,
        offset: 0x4000,
        line_offset: 64,
        size: 4096,
        index: 0,
        flags: PairFlags::empty(),
    }
}

fn attached() -> AttachReply {
    AttachReply { gid: PEER, offset: 0x4000, line_offset: 64, size: 4096, flags: PairFlags::empty() }
}

/// Whether the device was given up, and nothing can be asked any more.
#[track_caller]
fn assert_given_up(device: &Device, fake: &FakeDevice) {
    assert!(!device.is_connected());
    assert!(fake.is_given_up());
    assert!(matches!(device.query(PEER), Err(Error::Disconnected)));
    assert!(matches!(device.events().next(None), Err(Error::Disconnected)));
}

#[test]
fn a_dmb_that_is_not_where_it_can_be_is_not_touched() {
    let ok = registered();
    for bad in [
        RegisterReply { offset: WINDOW / 2, ..ok },
        RegisterReply { offset: WINDOW / 2 - 4095, ..ok },
        RegisterReply { offset: u64::MAX - 4095, ..ok },
        RegisterReply { line_offset: WINDOW / 2, ..ok },
        RegisterReply { line_offset: 63, ..ok },
        RegisterReply { line_offset: 32, ..ok },
        RegisterReply { line_offset: u64::MAX, ..ok },
        RegisterReply { size: 8192, ..ok },
        RegisterReply { size: 0, ..ok },
    ] {
        let (device, fake) = device();
        fake.answer(reply(Reply::Register(bad)));
        assert!(matches!(device.register(PEER, 4096), Err(Error::Contract(_))), "{bad:?}");
        assert_given_up(&device, &fake);
    }
    let ok = attached();
    for bad in [
        AttachReply { offset: WINDOW / 2, ..ok },
        AttachReply { line_offset: 8, ..ok },
        AttachReply { size: 0, ..ok },
        AttachReply { size: 100, ..ok },
        AttachReply { size: !4095, ..ok },
        AttachReply { size: WINDOW, ..ok },
    ] {
        let (device, fake) = device();
        fake.answer(reply(Reply::Attach(bad)));
        assert!(matches!(device.attach(TOKEN), Err(Error::Contract(_))), "{bad:?}");
        assert_given_up(&device, &fake);
    }
}

#[test]
fn two_dmbs_of_one_name_are_one_too_many() {
    let (device, fake) = device();
    fake.answer(reply(Reply::Register(registered())));
    let _dmb = device.register(PEER, 4096).unwrap();
    fake.answer(reply(Reply::Register(registered())));
    assert!(matches!(device.register(PEER, 4096), Err(Error::Contract(_))));
    assert_given_up(&device, &fake);
}

#[test]
fn an_answer_that_is_none_ends_the_connection() {
    let good = reply(Reply::QueryGid(PairFlags::MAP));
    for bad in [
        Answer { bytes: vec![0; 8], ..good.clone() },
        Answer { bytes: vec![1; 8], ..good.clone() },
        Answer { len: Some(0), ..good.clone() },
        Answer { len: Some(57), ..good.clone() },
        Answer { len: Some(u32::MAX), ..good.clone() },
        Answer { head: Some(3), ..good.clone() },
        Answer { head: Some(u32::MAX), ..good.clone() },
    ] {
        let (device, fake) = device();
        fake.answer(bad.clone());
        let error = device.query(PEER).unwrap_err();
        assert!(matches!(error, Error::Contract(_) | Error::Response(_)), "{bad:?}: {error}");
        assert_given_up(&device, &fake);
    }
}

#[test]
fn a_device_that_breaks_its_moves_is_given_up_and_nobody_waits_for_ever() {
    let good = Answer::from(vec![0; 8]);
    for bad in [
        Answer { bytes: vec![255; 8], ..good.clone() },
        Answer { len: Some(0), ..good.clone() },
        Answer { len: Some(9), ..good.clone() },
        Answer { head: Some(200), ..good.clone() },
    ] {
        let (device, fake) = device();
        fake.answer(good.clone());
        let mover = device.mover(TOKEN).unwrap();
        fake.answer(bad.clone());
        let error = mover.write(0, b"x").unwrap_err();
        assert!(matches!(error, Error::Contract(_)), "{bad:?}: {error}");
        assert_given_up(&device, &fake);
        assert!(matches!(mover.write(0, b"x"), Err(Error::Disconnected)));
    }
}

#[test]
fn moves_that_come_back_out_of_order_are_noticed() {
    let (device, fake) = device();
    fake.answer(vec![0; 8]);
    let mover = device.mover(TOKEN).unwrap();
    let buffer = device.move_buffer(64).unwrap();
    let first = mover.post_parts(0, &[buffer.part(0..1)], None).unwrap();
    mover.post_parts(0, &[buffer.part(1..2)], None).unwrap();
    // The second one's head, three descriptors further: the first one had those that were free first.
    fake.answer(Answer { head: Some(3), ..vec![0; 8].into() });
    fake.serve(FIRST_MOVE_QUEUE);
    assert!(matches!(mover.wait(first, None), Err(Error::Contract(_))));
    assert_given_up(&device, &fake);
}

#[test]
fn events_that_mean_nothing_are_skipped() {
    let (device, fake) = device();
    fake.event(vec![0; 64]);
    fake.event(vec![0xff; 64]);
    fake.event(vec![]);
    let signal = proto::event::Event::Signal { index: 9, token: TOKEN, gid: PEER };
    fake.event(signal.to_bytes().to_vec());
    let gone = proto::event::Event::DeviceGone { gid: PEER, reason: GoneReason::Expelled };
    fake.event(gone.to_bytes().to_vec());
    let event = device.events().next(None).unwrap();
    assert_eq!(event, Some(Event::DeviceGone { gid: PEER, reason: GoneReason::Expelled }));
    assert!(device.is_connected());
}

#[test]
fn an_event_queue_that_breaks_ends_the_connection_and_every_wait() {
    for (head, len) in [(Some(4000), None), (None, Some(65))] {
        let (device, fake) = device();
        fake.answer(reply(Reply::Register(registered())));
        let dmb = device.register(PEER, 4096).unwrap();
        fake.event(Answer { bytes: vec![0; 64], head, len });
        assert!(matches!(dmb.wait(None), Err(Error::Disconnected)));
        assert!(matches!(device.events().next(None), Err(Error::Disconnected)));
    }
}

#[test]
fn what_ends_while_it_is_asked_for_is_handed_out_as_ended() {
    let (device, fake) = device();
    let core = device.core.clone();
    // As if another thread's command were under way, and these events came in before its answer.
    lock(&core.registry).pending = 1;
    core.handle(proto::event::Event::DeviceGone { gid: PEER, reason: GoneReason::Left });
    core.handle(proto::event::Event::DmbUnregistered { token: TOKEN, gid: PEER });
    for (pending, gone) in [(1, true), (0, true), (0, false)] {
        lock(&core.registry).pending = pending;
        fake.answer(reply(Reply::Register(registered())));
        let dmb = device.register(PEER, 4096).unwrap();
        assert_eq!(dmb.is_peer_gone(), gone);
        fake.answer(reply(Reply::Done));
    }
    lock(&core.registry).pending = 1;
    core.handle(proto::event::Event::DmbUnregistered { token: TOKEN, gid: PEER });
    fake.answer(reply(Reply::Attach(attached())));
    let remote = device.attach(TOKEN).unwrap();
    assert!(!remote.is_registered());
    fake.answer(reply(Reply::Done));
}

#[test]
fn a_device_that_allows_next_to_nothing_is_used_as_far_as_it_goes() {
    let (device, fake) = device();
    for _ in 0..4 {
        fake.answer(vec![0; 8]);
    }
    let mover = device.mover(TOKEN).unwrap();
    mover.write(0, b"abc").unwrap();
    let moved = lock(&fake.asked)[1..].iter().map(|asked| asked[32..].to_vec()).collect::<Vec<_>>();
    assert_eq!(moved, [b"a", b"b", b"c"]);
}

#[test]
fn a_deadline_ends_a_wait_for_a_move() {
    let (device, fake) = device();
    fake.answer(vec![0; 8]);
    let mover = device.mover(TOKEN).unwrap();
    let ticket = mover.post(0, b"x", None).unwrap();
    let start = Instant::now();
    assert!(!mover.wait(ticket, Some(Duration::from_millis(2))).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(2));
    fake.answer(vec![0; 8]);
    fake.serve(FIRST_MOVE_QUEUE);
    mover.flush().unwrap();
}
