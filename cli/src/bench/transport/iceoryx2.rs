//! iceoryx2: publish and subscribe over shared memory. It carries messages of any size without a copy; where the case
//! asks for copies in and out, they are made at its ends. A receiver that has to sleep waits for an event, as its
//! documentation does; all others poll, which is its fastest form.

use anyhow::{Context, Result, anyhow, bail};
use iceoryx2::port::listener::Listener;
use iceoryx2::port::notifier::Notifier;
use iceoryx2::port::publisher::Publisher;
use iceoryx2::port::subscriber::Subscriber;
use iceoryx2::port::update_connections::UpdateConnections;
use iceoryx2::prelude::*;
use iceoryx2::sample::Sample;
use std::fmt::Display;
use std::mem::MaybeUninit;
use std::path::Path;

use super::{Duplex, Produce, each_word};
use crate::bench::case::{pingpong, produce, stream};
use crate::bench::measure::Outcome;
use crate::bench::measurement::Worker;
use crate::bench::plan::{Job, Site, Wait, Work};
use crate::pair::Role;

/// Everything under way at once, in bytes: more leaves the caches, less makes the sender wait.
const UNDER_WAY: usize = 1 << 20;

/// One end: a service in each direction, with an event each if receivers sleep.
struct End {
    publisher: Publisher<ipc::Service, [u64], ()>,
    subscriber: Subscriber<ipc::Service, [u64], ()>,
    events: Option<(Notifier<ipc::Service>, Listener<ipc::Service>)>,
    _node: Node<ipc::Service>,
}

/// Does the worker's job.
pub fn run(worker: &mut Worker) -> Result<Option<Outcome>> {
    set_log_level(LogLevel::Error);
    let mut end = End::open(worker)?;
    match worker.job.work {
        Work::PingPong { bytes, .. } => pingpong::run(worker, &mut end, bytes),
        Work::Stream { bytes } => stream::run(worker, &mut end, bytes),
        Work::Exchange { .. } | Work::Large { .. } => bail!("large messages are not measured over iceoryx2"),
        Work::Produce { bytes } => produce::run(worker, &mut end, bytes),
        Work::Move { .. } => bail!("iceoryx2 has no transfers into the receiver's memory"),
    }
}

impl End {
    fn open(worker: &Worker) -> Result<End> {
        let job = &worker.job;
        let (Work::PingPong { bytes, .. }
        | Work::Stream { bytes }
        | Work::Exchange { bytes }
        | Work::Large { bytes }
        | Work::Produce { bytes }
        | Work::Move { bytes }) = job.work;
        let node = open_node(job)?;
        let slots = (UNDER_WAY / bytes).clamp(2, 256);
        let service = |direction: &str| {
            let name = format!("{}/{direction}", job.name).as_str().try_into().map_err(plain)?;
            node.service_builder(&name)
                .publish_subscribe::<[u64]>()
                .enable_safe_overflow(false)
                .history_size(0)
                .subscriber_max_buffer_size(slots)
                .subscriber_max_borrowed_samples(1)
                .max_publishers(1)
                .max_subscribers(1)
                .open_or_create()
                .map_err(plain)
        };
        let event = |direction: &str| {
            let name = format!("{}/{direction}", job.name).as_str().try_into().map_err(plain)?;
            node.service_builder(&name).event().open_or_create().map_err(plain)
        };
        let (out, inward) = match worker.role {
            Role::A => ("there", "back"),
            Role::B => ("back", "there"),
        };
        let publisher = service(out)?
            .publisher_builder()
            .initial_max_slice_len(bytes.div_ceil(8))
            .max_loaned_samples(1)
            .backpressure_strategy(BackpressureStrategy::RetryUntilDelivered)
            .create()
            .map_err(plain)?;
        let subscriber = service(inward)?.subscriber_builder().create().map_err(plain)?;
        let sleeps = matches!(job.work, Work::PingPong { wait: Wait::Sleep | Wait::Silence, .. });
        let events = sleeps
            .then(|| -> Result<_> {
                let notifier = event(out)?.notifier_builder().create().map_err(plain)?;
                Ok((notifier, event(inward)?.listener_builder().create().map_err(plain)?))
            })
            .transpose()?;
        // What is sent before the receiver has looked for senders once may be lost: both look when both are there.
        worker.rendezvous.meet()?;
        publisher.update_connections().map_err(plain)?;
        subscriber.has_samples().map_err(plain)?;
        worker.rendezvous.meet()?;
        Ok(End { publisher, subscriber, events, _node: node })
    }

    fn publish(&mut self, words: usize, fill: impl FnOnce(&mut [MaybeUninit<u64>])) -> Result<()> {
        let mut sample = self.publisher.loan_slice_uninit(words).map_err(plain)?;
        fill(sample.payload_mut());
        // SAFETY: every caller's `fill` writes all words.
        unsafe { sample.assume_init() }.send().map_err(plain)?;
        if let Some((notifier, _)) = &self.events {
            notifier.notify().map_err(plain)?;
        }
        Ok(())
    }

    fn next(&mut self) -> Result<Sample<ipc::Service, [u64], ()>> {
        loop {
            if let Some(sample) = self.subscriber.receive().map_err(plain)? {
                return Ok(sample);
            }
            if let Some((_, listener)) = &mut self.events {
                listener.blocking_wait(|_| {}).map_err(plain)?;
            }
        }
    }
}

impl Duplex for End {
    fn send(&mut self, message: &[u8]) -> Result<()> {
        self.publish(message.len().div_ceil(8), |words| {
            // SAFETY: the words have at least as many bytes as the message, and are nobody else's. Those of a last,
            // partial word that the message does not reach are zeroed.
            unsafe {
                if let Some(last) = words.last_mut() {
                    last.write(0);
                }
                std::ptr::copy_nonoverlapping(message.as_ptr(), words.as_mut_ptr().cast(), message.len());
            }
        })
    }

    fn receive(&mut self, into: &mut [u8]) -> Result<()> {
        let sample = self.next()?;
        let bytes = sample.payload().as_ptr().cast::<u8>();
        anyhow::ensure!(sample.payload().len() == into.len().div_ceil(8), "a message has another size");
        // SAFETY: the sample has as many bytes, by the line above.
        unsafe { std::ptr::copy_nonoverlapping(bytes, into.as_mut_ptr(), into.len()) };
        Ok(())
    }
}

impl Produce for End {
    fn produce(&mut self, words: usize, mut next: impl FnMut() -> u64) -> Result<()> {
        self.publish(words, |slots| {
            for slot in slots {
                slot.write(next());
            }
        })
    }

    fn consume(&mut self, _words: usize, word: impl FnMut(u64)) -> Result<u64> {
        let sample = self.next()?;
        each_word(sample.payload(), word);
        sample.payload().first().copied().context("a message is empty")
    }
}

fn open_node(job: &Job) -> Result<Node<ipc::Service>> {
    let mut config = Config::default();
    let Site::Host { folder, .. } = &job.site else { bail!("iceoryx2 does not leave a machine") };
    let prefix = prefix(folder).context("the run's folder has no name")?;
    config.global.prefix = FileName::new(prefix.as_bytes()).map_err(plain)?;
    let root = iceoryx2::prelude::Path::new(folder.as_os_str().as_encoded_bytes()).map_err(plain)?;
    config.global.set_root_path(&root);
    NodeBuilder::new().config(&config).create().map_err(plain)
}

/// What the names of its files start with: the run's folder, so that runs do not meet and leftovers can be found.
fn prefix(folder: &Path) -> Option<String> {
    Some(format!("{}_", folder.file_name()?.to_str()?))
}

/// Removes shared memory that a killed process left.
pub fn remove_leftovers(folder: &Path) {
    let Some(prefix) = prefix(folder) else { return };
    let files = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    for file in files.filter(|file| file.file_name().to_str().is_some_and(|name| name.starts_with(&prefix))) {
        let _ = std::fs::remove_file(file.path());
    }
}

/// Its errors as ours.
fn plain(error: impl Display) -> anyhow::Error {
    anyhow!("iceoryx2 failed: {error}")
}
