//! Two ends of a ring, one of which lies about its cursors: the other never reads or writes where it must not.
#![no_main]

use arbitrary::Arbitrary;
use dmbridge_proto::smc::cdc::CursorWord;
use dmbridge_proto::smc::ring::{Chunk, Consumer, Producer};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Step {
    Produce(u32),
    Consume(u32),
    TellProducer,
    TellConsumer,
    LieToProducer(u64),
    LieToConsumer(u64),
}

fuzz_target!(|input: (u32, Vec<Step>)| {
    let (size, steps) = input;
    let size = size % (1 << 31) + 1;
    let mut producer = Producer::new(size);
    let mut consumer = Consumer::new(size);
    let mut honest = true;
    for step in steps {
        match step {
            Step::Produce(len) => producer.produce(len % (producer.free() + 1)),
            Step::Consume(len) => consumer.consume(len % (consumer.available() + 1)),
            Step::TellConsumer => {
                let told = consumer.observe(producer.cursor());
                assert!(!honest || told.is_ok());
            }
            Step::TellProducer => {
                let told = producer.observe(consumer.cursor());
                assert!(!honest || told.is_ok());
                consumer.reported();
            }
            Step::LieToProducer(word) => {
                honest &= producer.observe(CursorWord::from_bits(word).cursor).is_err();
            }
            Step::LieToConsumer(word) => {
                honest &= consumer.observe(CursorWord::from_bits(word).cursor).is_err();
            }
        }
        assert_eq!(producer.used() + producer.free(), size);
        assert!(consumer.available() + consumer.unreported() <= size);
        for (Chunk { offset, len }, most) in
            [(producer.chunk(), producer.free()), (consumer.chunk(), consumer.available())]
        {
            assert!(offset < size && len <= size - offset && len <= most);
        }
        if honest {
            assert!(consumer.available() <= producer.used());
        }
    }
});
