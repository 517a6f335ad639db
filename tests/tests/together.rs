//! Several conversations in one pass over the weights: of each the logits that it has alone, bit for bit.
use bitnet_kernel::{Block, Format};
use bitnet_pack::Options;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::model::Need;
use bitnet_runtime::parallel::Pool;
use bitnet_runtime::source::{Mapped, Streamed, WeightSource};
use bitnet_runtime::{Error, Limits, Model, Plan, State, backend};
use bitnet_tests::images::{Disk, Packed, Way, fingerprint};
use bitnet_tests::{golden, ids, json, model};
use std::path::Path;

/// Calls `f` with a model and `n` empty conversations.
fn with_states<R: Send>(
    packed: &Packed,
    n: usize,
    (threads, streamed): (usize, bool),
    f: impl FnOnce(&mut Model<'_>, Vec<State<'_>>) -> R + Send,
) -> R {
    let image = packed.image();
    let config = image.header().config;
    let limits = Limits { context: config.context.min(64), batch: 8, kv: KvFormat::F16 };
    let plan = Plan::new(&config, &limits);
    let pool = Pool::new(threads).unwrap();
    pool.enter(|| {
        let mut staging = vec![Block::ZERO; Streamed::<Disk<'_>>::staging_blocks_min(&image)];
        let (mut mapped, mut disk);
        let source: &mut dyn WeightSource = if streamed {
            disk = Streamed::new(Disk(packed.blocks()), &mut staging);
            &mut disk
        } else {
            mapped = Mapped::new(packed.blocks());
            &mut mapped
        };
        let mut scratch = vec![Block::ZERO; plan.scratch];
        let mut memory = vec![vec![Block::ZERO; plan.state]; n];
        let states = memory.iter_mut().map(|memory| State::new(&config, &limits, memory).unwrap()).collect();
        f(&mut Model::new(&image, limits, backend::best(), &pool, source, &mut scratch).unwrap(), states)
    })
}

/// A prompt of each conversation, of lengths that differ, and the tokens that follow.
fn texts(ids: &[u32], n: usize) -> Vec<(Vec<u32>, Vec<u32>)> {
    let text = |i: usize| {
        let from = |start: usize, len: usize| ids.iter().cycle().skip(start).take(len).copied().collect();
        (from(i, 3 + 2 * i), from(2 * i + 1, 6))
    };
    (0..n).map(text).collect()
}

fn check(name: &str, checkpoint: &Path, head: Format, ids: &[u32]) {
    let packed = Packed::pack(checkpoint, &Options { head, ..Options::default() });
    let vocab = packed.image().header().config.vocab as usize;
    for n in [1, 2, 5, 8] {
        let texts = texts(ids, n);
        let alone: Vec<Vec<Vec<f32>>> = texts
            .iter()
            .map(|(prompt, rest)| {
                let all = [&prompt[..], rest].concat();
                Way::plain(backend::best()).logits(&packed, &all).split_off(prompt.len())
            })
            .collect();
        for way in [(1, false), (2, false), (2, true)] {
            let mut together = vec![Vec::new(); n];
            with_states(&packed, n, way, |model, mut states| {
                for (state, (prompt, _)) in states.iter_mut().zip(&texts) {
                    model.prefill(state, prompt).unwrap();
                }
                let mut logits = vec![0.0; n * vocab];
                for i in 0..texts[0].1.len() {
                    let tokens: Vec<u32> = texts.iter().map(|(_, rest)| rest[i]).collect();
                    let mut states: Vec<&mut State<'_>> = states.iter_mut().collect();
                    model.step_each(&mut states, &tokens, &vec![Need::All; n], &mut logits).unwrap();
                    for (rows, row) in together.iter_mut().zip(logits.chunks_exact(vocab)) {
                        rows.push(row.to_vec());
                    }
                }
            });
            for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
                assert_eq!(fingerprint(together), fingerprint(alone), "{name} {head:?}: {i} of {n}, {way:?}");
            }
        }
    }
}

#[test]
fn each_has_the_logits_that_it_has_alone() {
    let story = ids(&json(golden("stories-ternary").join("expected.json"))["greedy_ids"]);
    for head in [Format::I8, Format::I4, Format::F16] {
        check("stories", &model("stories-ternary"), head, &story);
    }
}

/// A window moves in each by itself, and a memory is each one's own.
#[test]
fn windows_and_memories_are_each_ones_own() {
    for set in ["window", "bitrnn_m", "bitrnn_v_late", "shared", "matmul_free"] {
        check(set, &golden(set), Format::I8, &ids(&json(golden(set).join("ids.json"))["input_ids"][0]));
    }
}

/// What one of them cannot read no other has read either.
#[test]
fn after_an_error_all_are_where_they_were() {
    for checkpoint in [model("stories-ternary"), golden("bitrnn_m"), golden("bitrnn_v")] {
        let packed = Packed::pack(&checkpoint, &Options::default());
        let vocab = packed.image().header().config.vocab;
        with_states(&packed, 2, (1, false), |model, mut states| {
            for state in &mut states {
                model.prefill(state, &[1, 3, 5]).unwrap();
            }
            let mut logits = vec![0.0; 2 * vocab as usize];
            let mut both: Vec<&mut State<'_>> = states.iter_mut().collect();
            let done = model.step_each(&mut both, &[7, vocab], &[Need::All; 2], &mut logits);
            assert_eq!(done, Err(Error::Token { token: vocab, vocab }));
            assert_eq!(both.iter().map(|state| state.position()).collect::<Vec<_>>(), [3, 3]);
            model.step_each(&mut both, &[7, 9], &[Need::All; 2], &mut logits).unwrap();
            assert_eq!(both.iter().map(|state| state.position()).collect::<Vec<_>>(), [4, 4]);
        });
    }
}
