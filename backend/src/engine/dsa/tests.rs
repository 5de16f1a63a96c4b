use super::queue::Limits;
use super::software::{Behaviour, Software};
use super::*;

const LIMITS: Limits = Limits { max_transfer: 64 << 10, max_batch: 4 };
const ROOM: usize = 16;

fn engine(limits: Limits, size: usize, behaviour: Behaviour) -> DsaEngine {
    let queue = Software::start(limits, size, behaviour);
    Accelerator::new(queue).engine(CpuEngine)
}

/// An accelerator at which things go wrong now and then, for tests of what stands on it.
pub(crate) fn faulty() -> Box<dyn Engine> {
    let (mut pages, mut moves) = (0, 0);
    let fault = Box::new(move |_, _| {
        pages += 1;
        pages % 11 == 0
    });
    let error = Box::new(move || {
        moves += 1;
        (moves % 5 == 0).then_some(0x16)
    });
    let limits = Limits { max_transfer: 8192, max_batch: 4 };
    Box::new(engine(limits, 4, Behaviour { fault, error, ..Behaviour::default() }))
}

/// Copies runs of these lengths to several offsets, and looks at every byte. The words of both ends are the same except in the
/// last round.
fn check(engine: &mut DsaEngine, lens: &[usize]) {
    for (round, apart) in [0, 8, 16, 3].into_iter().enumerate() {
        let total: usize = lens.iter().sum();
        let source: Vec<u8> = (0..total).map(|i| (i * 13 + i / 4096 + round) as u8).collect();
        let mut target = vec![0xaau8; total + 128];
        let word = |address: usize| address % WORD;
        let round = apart + (WORD + word(source.as_ptr().addr()) - word(target.as_ptr().addr())) % WORD;
        let to = target.as_mut_ptr();
        let mut at = 0;
        let run = |len: &usize| {
            let run = Run { src: source[at..].as_ptr(), dst: to.wrapping_add(round + at), len: *len };
            at += len;
            run
        };
        let runs: Vec<Run> = lens.iter().map(run).collect();
        // SAFETY: both buffers live until the engine is done.
        unsafe { engine.submit(&runs) };
        engine.finish();
        assert!(target[round..round + total] == source, "{lens:?}");
        assert!(target[..round].iter().chain(&target[round + total..]).all(|byte| *byte == 0xaa));
    }
}

const SHAPES: [&[usize]; 6] =
    [&[1], &[4095, 4096, 4224], &[1 << 20], &[100_000; 9], &[300_000, 1, 64, 70_000], &[]];

#[test]
fn every_byte_is_copied_whatever_the_shape_of_the_queue() {
    for limits in [LIMITS, Limits { max_batch: 1, ..LIMITS }, Limits { max_transfer: 1 << 31, max_batch: 32 }]
    {
        for size in [1, ROOM] {
            let mut engine = engine(limits, size, Behaviour::default());
            SHAPES.iter().for_each(|shape| check(&mut engine, shape));
            assert_eq!(engine.accelerator.counters.errors.load(Ordering::Relaxed), 0);
        }
    }
}

#[test]
fn what_stops_at_a_page_that_is_not_there_is_finished() {
    for every in [2, 7, 40] {
        let mut page = 0;
        let fault = Box::new(move |_, _| {
            page += 1;
            page % every == 0
        });
        let mut engine = engine(LIMITS, ROOM, Behaviour { fault, ..Behaviour::default() });
        SHAPES.iter().for_each(|shape| check(&mut engine, shape));
        assert!(engine.accelerator.counters.faults.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn what_ends_in_an_error_is_copied_again() {
    for status in [0x10, 0x13, 0x16, 0x1a, 0x20, 0x22, 0x7f] {
        let mut count = 0;
        let error = Box::new(move || {
            count += 1;
            (count % 3 == 0).then_some(status)
        });
        let mut engine = engine(LIMITS, ROOM, Behaviour { error, ..Behaviour::default() });
        SHAPES.iter().for_each(|shape| check(&mut engine, shape));
        assert!(engine.accelerator.counters.errors.load(Ordering::Relaxed) > 0);
    }
}

#[test]
fn a_queue_that_hangs_is_given_up_and_never_writes_again() {
    for hang_after in [0, 2] {
        let mut engine = engine(LIMITS, ROOM, Behaviour { hang_after, ..Behaviour::default() });
        check(&mut engine, &[1 << 20]);
        assert_eq!(engine.accelerator.counters.lost.load(Ordering::Relaxed), 1);
        check(&mut engine, &[1 << 20, 100_000]);
        assert_eq!(engine.accelerator.counters.busy.load(Ordering::Relaxed), 0, "it is asked no more");
    }
}

/// A queue that has no room so many times before each descriptor that it takes.
#[derive(Debug)]
struct Full {
    queue: Arc<Software>,
    times: u64,
    asked: AtomicU64,
}

impl WorkQueue for Full {
    fn limits(&self) -> Limits {
        self.queue.limits()
    }

    unsafe fn submit(&self, descriptor: &Descriptor) -> Result<(), NotTaken> {
        if self.asked.fetch_add(1, Ordering::Relaxed) % (self.times + 1) < self.times {
            return Err(NotTaken::Busy);
        }
        // SAFETY: the caller's promise.
        unsafe { self.queue.submit(descriptor) }
    }

    fn completed(&self) {
        self.queue.completed();
    }

    fn abandon(&self) {
        self.queue.abandon();
    }
}

#[test]
fn a_full_queue_is_asked_again_and_what_it_never_takes_is_copied() {
    for (times, refused) in [(100, false), (u64::MAX - 1, true)] {
        let queue = Software::start(LIMITS, ROOM, Behaviour::default());
        let queue = Arc::new(Full { queue, times, asked: AtomicU64::new(0) });
        let mut engine = Accelerator::new(queue.clone()).engine(CpuEngine);
        check(&mut engine, &[1 << 20]);
        assert!(queue.asked.load(Ordering::Relaxed) > 100);
        let counters = &engine.accelerator.counters;
        assert_eq!(counters.busy.load(Ordering::Relaxed) != 0, refused);
        assert_eq!(counters.lost.load(Ordering::Relaxed), 0, "it is asked again for the next one");
    }
}

#[test]
fn what_could_tear_a_word_is_not_given_to_it() {
    // It errs at everything that it is given.
    let always = || Behaviour { error: Box::new(|| Some(0x16)), ..Behaviour::default() };
    let source = vec![1u64; 2048];
    let mut target = vec![0u64; 2048];
    for (src, dst, given) in [(0, 0, true), (8, 64, true), (5, 13, true), (1, 0, false), (0, 68, false)] {
        let mut engine = engine(LIMITS, ROOM, always());
        let run = Run {
            src: source.as_ptr().cast::<u8>().wrapping_add(src),
            dst: target.as_mut_ptr().cast::<u8>().wrapping_add(dst),
            len: 12 << 10,
        };
        // SAFETY: both buffers live until the engine is done.
        unsafe { engine.submit(&[run]) };
        engine.finish();
        let errors = engine.accelerator.counters.errors.load(Ordering::Relaxed);
        assert_eq!(errors != 0, given, "from {src} to {dst}");
    }
}

#[test]
fn nothing_is_seen_late() {
    // The target is read the moment that the engine says done, and again after it could have been written late.
    let mut engine = engine(LIMITS, ROOM, Behaviour::default());
    for round in 0..100u8 {
        let source = vec![round; 200_000];
        let mut target = vec![0u8; 200_000];
        let run = Run { src: source.as_ptr(), dst: target.as_mut_ptr(), len: target.len() };
        // SAFETY: both buffers live until the engine is done.
        unsafe { engine.submit(&[run]) };
        while !engine.poll() {}
        assert!(target.iter().all(|byte| *byte == round));
        target.fill(0xee);
        std::thread::yield_now();
        assert!(target.iter().all(|byte| *byte == 0xee));
    }
}
