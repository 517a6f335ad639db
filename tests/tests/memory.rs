//! Memory is a number: what the plan says is what is used, and nothing is allocated per token.
//!
//! One test, alone in its file: the counting heap counts for the whole program.
use bitnet_kernel::Block;
use bitnet_pack::Options;
use bitnet_runtime::generate::{Session, Until};
use bitnet_runtime::parallel::Pool;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::source::Mapped;
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use bitnet_runtime::{Limits, Model, Plan, State, backend};
use bitnet_tests::alloc::{self, Counting};
use bitnet_tests::images::Packed;
use bitnet_tests::{golden, model};
use core::ops::ControlFlow;
use std::path::Path;

#[global_allocator]
static HEAP: Counting = alloc::counting();

/// What the program may need for itself: the tokenizer of a small model, threads, buffers.
const OWN: usize = 1 << 20;

#[test]
fn memory_is_what_the_plan_says_and_tokens_allocate_nothing() {
    let packed = Packed::pack(&model("stories-ternary"), &Options::default());
    let image = packed.image();
    let config = image.header().config;
    let limits = Limits { batch: 8, ..image.header().plan.limits };
    let plan = Plan::new(&config, &limits);
    for (threads, lookup) in [(1, false), (1, true), (2, false), (2, true)] {
        let before = HEAP.allocated();
        let pool = Pool::new(threads).unwrap();
        pool.enter(|| {
            let blocks = |n| vec![Block::ZERO; n];
            let (mut scratch, mut state, mut sampler) =
                (blocks(plan.scratch), blocks(plan.state), blocks(plan.sampler));
            let mut source = Mapped::new(packed.blocks());
            let tokenizer = Tokenizer::load(&image, &mut source).unwrap();
            let state = State::new(&config, &limits, &mut state).unwrap();
            let model = Model::new(&image, limits, backend::best(), &pool, &mut source, &mut scratch).unwrap();
            let sampling =
                Sampling { temperature: 0.9, top_k: 40, top_p: 0.9, repetition_penalty: 1.1, ..Sampling::GREEDY };
            let sampler = Sampler::new(config.vocab, sampling, &mut sampler).unwrap();
            let mut session = Session::new(model, state, sampler);
            if lookup {
                session = session.with_lookup();
            }
            let mut stream = TextStream::new(&tokenizer, Vec::new());
            session.prompt(&[1, 403, 407, 261, 378, 403, 407, 261]).unwrap();
            let mut generate = |max_tokens| {
                let calls = alloc::calls();
                let until = Until { max_tokens, stop_ids: &[] };
                session.generate(until, Some(&mut stream), &mut |_| ControlFlow::Continue(())).unwrap();
                alloc::calls() - calls
            };
            generate(2);
            let (few, many) = (generate(10), generate(100));
            println!("{threads} threads: {few} allocations for 10 tokens, {many} for 100");
            assert_eq!((few, many), (0, 0));
            let used = HEAP.allocated() - before;
            println!("{threads} threads: planned {} bytes, used {used}", plan.bytes());
            assert!(used as u64 <= plan.bytes() + OWN as u64);
            assert!(used as u64 >= plan.bytes());
        });
    }
    for checkpoint in [
        model("stories-stateful"),
        golden("bitrnn_m"),
        golden("bitrnn_v"),
        golden("bitrnn_m_late"),
        golden("shared"),
        golden("matmul_free"),
    ] {
        a_conversation_of_a_million_tokens_takes_what_one_of_a_thousand_does(&checkpoint);
    }
}

/// Where a conversation has one size: the same bytes after 1,000 tokens and after 1,000,000. It is brought there by the head of a
/// snapshot, since what a state holds does not say how many tokens made it.
fn a_conversation_of_a_million_tokens_takes_what_one_of_a_thousand_does(checkpoint: &Path) {
    let packed = Packed::pack(checkpoint, &Options::default());
    let image = packed.image();
    let config = image.header().config;
    let limits = Limits { context: 64, ..image.header().plan.limits };
    let plan = Plan::new(&config, &limits);
    let mut snapshot = Vec::new();
    let run = |tokens: usize, snapshot: &mut Vec<u8>| {
        let before = HEAP.allocated();
        let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
        let mut source = Mapped::new(packed.blocks());
        let mut state = State::new(&config, &limits, &mut state).unwrap();
        let mut model =
            Model::new(&image, limits, backend::best(), &bitnet_runtime::parallel::Serial, &mut source, &mut scratch)
                .unwrap();
        if snapshot.is_empty() {
            (0..tokens as u32).for_each(|t| assert!(model.step(&mut state, t % 128).is_ok()));
        } else {
            state.restore(&image, snapshot).unwrap();
        }
        assert_eq!(state.position(), tokens);
        let calls = alloc::calls();
        (0..50).for_each(|t| assert!(model.step(&mut state, t % 128).is_ok()));
        assert_eq!((alloc::calls() - calls, state.position()), (0, tokens + 50));
        let used = HEAP.allocated() - before;
        if snapshot.is_empty() {
            snapshot.resize(state.snapshot_len(), 0);
            state.save(&image, snapshot);
        }
        used
    };
    let short = run(1_000, &mut snapshot);
    // Where the numbers of positions stand, of a window the first one too: see the snapshot's form.
    for at in [24, 32].into_iter().take(1 + usize::from(config.window.is_some())) {
        let number = u64::from_le_bytes(snapshot[at..at + 8].try_into().unwrap()) + 1_000_000 - 1_050;
        snapshot[at..at + 8].copy_from_slice(&number.to_le_bytes());
    }
    let sum = bitnet_runtime::image::checksum(&snapshot[..48]);
    snapshot[48..56].copy_from_slice(&sum.to_le_bytes());
    let long = run(1_000_000, &mut snapshot);
    println!("{}: {short} bytes after 1,000 tokens, {long} after 1,000,000", checkpoint.display());
    assert_eq!(short, long);
}
