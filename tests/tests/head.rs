//! A head in two planes: the tokens are those of the full head, whatever chooses them, and most of the second plane is not
//! read.
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Block, Format};
use bitnet_pack::Options;
use bitnet_runtime::model::Need;
use bitnet_runtime::sampler::{Sampler, Sampling};
use bitnet_runtime::{Config, Plan, backend};
use bitnet_tests::images::{Packed, Way, fingerprint};
use bitnet_tests::{argmax, golden, ids, json, max_difference, model};
use std::sync::LazyLock;

static SPLIT: LazyLock<Packed> =
    LazyLock::new(|| Packed::pack(&model("stories-ternary"), &Options { split_head: true, ..Options::default() }));

fn story(tokens: usize) -> Vec<u32> {
    let expected = json(golden("stories-ternary").join("expected.json"));
    let mut story = ids(&expected["prompt_ids"]);
    story.extend(&ids(&expected["greedy_ids"])[..tokens]);
    story
}

/// The logits after every token, those that are needed.
fn best(way: Way, packed: &Packed, tokens: &[u32], need: Need) -> Vec<Vec<f32>> {
    way.run(packed, |model, state| {
        tokens.iter().map(|&token| model.step_for(state, token, need).unwrap().to_vec()).collect()
    })
}

fn ways() -> Vec<Way> {
    let ways = backend::available().flat_map(|kernels| {
        let way = Way::plain(kernels);
        [way, Way { threads: 2, ..way }, Way { streamed: true, ..way }]
    });
    ways.collect()
}

#[test]
fn the_best_have_the_logits_of_the_full_head_in_every_way() {
    let story = story(3);
    let all = Way::plain(&Portable).logits(&SPLIT, &story);
    for way in ways() {
        assert_eq!(fingerprint(&way.logits(&SPLIT, &story)), fingerprint(&all), "{way:?}");
        let mut one = None;
        for k in [1, 5, 40, 100] {
            let found = best(way, &SPLIT, &story, Need::Best(k));
            for (found, all) in found.iter().zip(&all) {
                let mut order = all.clone();
                order.sort_by(|a, b| b.total_cmp(a));
                for (found, all) in found.iter().zip(all) {
                    let needed = *all >= order[k as usize - 1];
                    let same = found.to_bits() == all.to_bits();
                    assert!(same || !needed && *found == f32::NEG_INFINITY, "{way:?}, {k}");
                }
            }
            let read: usize = found.iter().flatten().filter(|&&y| y > f32::NEG_INFINITY).count();
            if k == 1 {
                // In whole tiles 9.0 of 512 rows are read for a token; those that are no candidates have no logit.
                assert!(read < 10 * story.len(), "{read} rows");
            }
            // Neither what is computed nor what is left out depends on the way.
            one.get_or_insert_with(Vec::new).push(fingerprint(&found));
        }
        let plain = [1, 5, 40, 100].map(|k| fingerprint(&best(Way::plain(&Portable), &SPLIT, &story, Need::Best(k))));
        assert_eq!(one.unwrap(), plain, "{way:?}");
    }
}

/// As exact as an int8 head in one plane, and a little more.
#[test]
fn logits_are_near_those_of_a_head_of_floats() {
    let story = story(40);
    let way = Way::plain(backend::best());
    let exact =
        Packed::pack(&model("stories-ternary"), &Options { embedding: None, head: Format::F16, ..Options::default() });
    let plain = Packed::pack(&model("stories-ternary"), &Options::default());
    let exact = way.logits(&exact, &story);
    let distance = |packed: &Packed| {
        let rows = way.logits(packed, &story);
        rows.iter().zip(&exact).map(|(a, b)| max_difference(a, b)).sum::<f32>() / rows.len() as f32
    };
    let (two, one) = (distance(&SPLIT), distance(&plain));
    println!("mean largest difference from f16: {two} in two planes, {one} in one");
    assert!(two < 1.1 * one);
}

/// The samplers that are served by the best logits alone, those that are not, and the tokens they choose.
#[test]
fn samplers_choose_the_same_tokens() {
    let warm = Sampling { temperature: 0.9, seed: 7, ..Sampling::GREEDY };
    let cases = [
        (Sampling::GREEDY, Need::Best(1)),
        (Sampling { top_k: 9, top_p: 0.2, ..Sampling::GREEDY }, Need::Best(1)),
        (Sampling { top_k: 1, ..warm }, Need::Best(1)),
        (Sampling { top_k: 5, ..warm }, Need::Best(5)),
        (Sampling { top_k: 40, top_p: 0.9, ..warm }, Need::Best(40)),
        (Sampling { top_k: 40, min_p: 0.1, ..warm }, Need::Best(40)),
        (Sampling { top_k: 400, ..warm }, Need::Best(400)),
        (warm, Need::All),
        (Sampling { top_p: 0.9, ..warm }, Need::All),
        (Sampling { min_p: 0.1, ..warm }, Need::All),
        (Sampling { top_k: 40, repetition_penalty: 1.2, ..warm }, Need::All),
        (Sampling { repetition_penalty: 0.8, ..Sampling::GREEDY }, Need::All),
    ];
    let config = SPLIT.image().header().config;
    let blocks = Plan::new(&config, &SPLIT.image().header().plan.limits).sampler;
    for (sampling, need) in cases {
        assert_eq!(sampling.need(), need, "{sampling:?}");
        let tokens = |need| {
            Way::plain(backend::best()).run(&SPLIT, |model, state| {
                let mut memory = vec![Block::ZERO; blocks];
                let mut sampler = Sampler::new(config.vocab, sampling, &mut memory).unwrap();
                let mut history = story(0);
                model.prefill(state, &history[..4]).unwrap();
                for _ in 0..100 {
                    let logits = model.step_for(state, history[history.len() - 1], need).unwrap();
                    let token = sampler.sample(logits, &history);
                    history.push(token);
                }
                (history, model.head_stats())
            })
        };
        let ((full, none), (found, stats)) = (tokens(Need::All), tokens(need));
        assert_eq!(found, full, "{sampling:?}");
        assert_eq!((none.tokens, none.rows), (0, 0));
        let staged = matches!(need, Need::Best(k) if k <= Need::BEST_MAX);
        assert_eq!(stats.tokens, if staged { 100 } else { 0 }, "{sampling:?}");
        println!("{need:?}: {:.1} rows a token", stats.rows as f64 / stats.tokens.max(1) as f64);
    }
}

/// Vocabularies and widths with tails, tied or not: embedding rows too come out of the two planes.
#[test]
fn odd_shapes_give_one_result_in_every_way() {
    let tiny = bitnet_pack::Preset::Tiny.shape();
    let odd =
        Config { vocab: 70, hidden: 72, ffn: 100, heads: 4, kv_heads: 2, head_dim: 6, context: 64, ..tiny.config };
    let small = Config { vocab: 3, hidden: 18, ..odd };
    let tokens: Vec<u32> = (0..12).map(|i| i * 13 % 3).collect();
    let dir = tempfile::tempdir().unwrap();
    for config in [odd, Config { tied: false, ..odd }, small] {
        let path = dir.path().join("odd");
        let shape = bitnet_pack::Shape { name: "odd".into(), config, theta: 1e4 };
        let options = Options { split_head: true, ..Options::default() };
        bitnet_pack::dummy(&path, &shape, &options, 7, &mut ()).unwrap();
        let packed = Packed::read(&path);
        let all = Way::plain(&Portable).logits(&packed, &tokens);
        for way in ways() {
            assert_eq!(fingerprint(&way.logits(&packed, &tokens)), fingerprint(&all), "{way:?}");
            for (found, all) in best(way, &packed, &tokens, Need::Best(1)).iter().zip(&all) {
                let at = argmax(all);
                assert_eq!((argmax(found), found[at].to_bits()), (at, all[at].to_bits()), "{way:?}");
            }
        }
    }
}
