//! The bundled model: the same logits and the same text, bit for bit, whatever computes them and wherever the weights lie.
use bitnet_kernel::format::decode;
use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Block, Format};
use bitnet_pack::Options;
use bitnet_runtime::error::SourceError;
use bitnet_runtime::generate::{Event, Finish, Session, Until};
use bitnet_runtime::image::Kind;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::model::{Activation, Quantizers, Rope};
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::sampler::Sampling;
use bitnet_runtime::source::{Extent, Mapped, Streamed};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use bitnet_runtime::{Config, Error, Limits, Model, Plan, State, backend};
use bitnet_tests::images::{Disk, Failing, Packed, Way, fingerprint};
use bitnet_tests::{golden, ids, json, max_difference, model};
use core::ops::ControlFlow;
use std::cell::Cell;
use std::sync::LazyLock;
use zerocopy::IntoBytes;

/// The bundled checkpoint as `cargo demo` packs it.
static STORIES: LazyLock<Packed> = LazyLock::new(|| Packed::pack(&model("stories-ternary"), &Options::default()));

/// The same with a head of half-precision floats: all that transformers computes in full precision is nearly so here.
static EXACT: LazyLock<Packed> =
    LazyLock::new(|| Packed::pack(&model("stories-ternary"), &Options { head: Format::F16, ..Options::default() }));

/// Fingerprints of the logits of `expected.json`'s prompt and first 40 tokens. Committed: they are the promise.
const FINGERPRINTS: [(KvFormat, u64); 3] =
    [(KvFormat::F32, 0x069a8e0e790514a4), (KvFormat::F16, 0x11c544c9ec1d52b4), (KvFormat::I8, 0xfc0355c4a74231fe)];

fn expected() -> serde_json::Value {
    json(golden("stories-ternary").join("expected.json"))
}

/// The prompt and the tokens that follow it.
fn story(tokens: usize) -> Vec<u32> {
    let expected = expected();
    let mut story = ids(&expected["prompt_ids"]);
    story.extend(&ids(&expected["greedy_ids"])[..tokens]);
    story
}

#[test]
fn logits_have_one_fingerprint() {
    let story = story(40);
    for (kv, expected) in FINGERPRINTS {
        let mut ways = Vec::new();
        for kernels in backend::available() {
            let way = Way { kv, ..Way::plain(kernels) };
            ways.push(way);
            ways.extend([2, 3].map(|threads| Way { threads, batch: 8, ..way }));
            ways.push(Way { streamed: true, batch: 3, ..way });
        }
        for way in ways {
            let found = fingerprint(&way.logits(&STORIES, &story));
            assert_eq!(found, expected, "{found:#018x} by {way:?}");
        }
    }
}

/// A part of the test above that is small enough for an emulated CPU without a fast backend.
#[test]
fn one_portable_pass_has_the_fingerprint() {
    let (kv, expected) = FINGERPRINTS[0];
    let found = fingerprint(&Way { kv, ..Way::plain(&Portable) }.logits(&STORIES, &story(40)));
    assert_eq!(found, expected, "{found:#018x}");
}

/// Every format that holds ternary linears, and every format of the head: one result on all backends.
#[test]
fn every_format_gives_one_result_on_every_backend() {
    let story = story(3);
    for format in [Format::TL, Format::T2, Format::I4, Format::I8] {
        for head in [Format::I8, Format::I4, Format::F16] {
            let packed = Packed::pack(&model("stories-ternary"), &Options { format, head, ..Options::default() });
            let expected = Way::plain(&Portable).logits(&packed, &story);
            for kernels in backend::available() {
                let found = Way { batch: 5, threads: 2, ..Way::plain(kernels) }.logits(&packed, &story);
                assert_eq!(fingerprint(&found), fingerprint(&expected), "{format:?} {head:?} {}", kernels.name());
            }
        }
    }
}

/// Both ternary formats hold the same weights, so the sums are the same too.
#[test]
fn ternary_formats_agree() {
    let story = story(10);
    let t2 = Packed::pack(&model("stories-ternary"), &Options { format: Format::T2, ..Options::default() });
    let way = Way::plain(backend::best());
    assert_eq!(fingerprint(&way.logits(&t2, &story)), fingerprint(&way.logits(&STORIES, &story)));
}

/// Leaving out what is multiplied by zero changes nothing, in any way of running; and most is left out.
#[test]
fn only_the_live_part_is_read_and_nothing_changes() {
    let story = story(24);
    let dense = Packed::pack(&model("stories-ternary"), &Options::default());
    let live = Packed::pack(&model("stories-ternary"), &Options { live_ffn: true, ..Options::default() });
    let expected = fingerprint(&Way::plain(&Portable).logits(&dense, &story));
    for kernels in backend::available() {
        for (batch, threads, streamed) in [(1, 1, false), (1, 2, false), (1, 3, true), (5, 2, false), (16, 1, true)] {
            let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
            let (logits, rows) = way.run(&live, |model, state| {
                let mut logits = Vec::new();
                model.prefill_each(state, &story, &mut |_, row| logits.push(row.to_vec())).expect("a pass");
                (logits, model.live_rows())
            });
            assert_eq!(fingerprint(&logits), expected, "{way:?}");
            let share = |n: u64| n as f64 / rows.all as f64;
            assert!((0.2..0.5).contains(&share(rows.up)), "{rows:?}");
            assert!((0.1..0.3).contains(&share(rows.down)), "{rows:?}");
        }
    }
}

/// What the image holds of each neuron of a layer, in its order: rows of gate and up, the column of down, and the weight of the
/// norm before it.
fn neurons(packed: &Packed, layer: u32) -> Vec<(Vec<i8>, u32)> {
    let (image, blocks) = (packed.image(), packed.blocks());
    let find = |kind| image.sections().find(kind, Some(layer)).expect("the layer has it");
    let stored = |extent: Extent| &blocks[extent.start as usize..][..extent.blocks as usize];
    let row = |kind, r: usize| {
        let tensor = find(kind).tensor().expect("a matrix");
        let (format, (tile, r, _)) = (tensor.format, tensor.row(r as u32));
        let steps = stored(tile).chunks_exact(format.step_blocks());
        steps
            .flat_map(|step| (0..format.step_cols()).map(|c| decode(format, step, r, c)).collect::<Vec<_>>())
            .collect::<Vec<i8>>()
    };
    let norms = stored(find(Kind::FfnSubNorm).extent()).as_bytes().as_chunks::<4>().0;
    let ffn = image.header().config.ffn as usize;
    let kinds = [Kind::Gate, Kind::UpRows, Kind::DownColumns];
    (0..ffn).map(|n| (kinds.map(|kind| row(kind, n)).concat(), u32::from_le_bytes(norms[n]))).collect()
}

/// Neurons that fire together lie together: the same neurons in another order, one result in every way of running, and that
/// without the order but for rounding. What is read is the same, in fewer pieces.
#[test]
#[cfg_attr(not(target_arch = "x86_64"), ignore = "the packer's calibration takes a minute under emulation")]
fn neurons_in_another_order_are_the_same_neurons() {
    let pack = |reorder| {
        let options = Options { live_ffn: true, reorder, ..Options::default() };
        Packed::pack(&model("stories-ternary"), &options)
    };
    // A part of it is enough to tell neurons apart.
    let stories = include_str!("../../tools/bitnet-pack/tests/golden/stories.txt");
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, &stories[..3000]).unwrap();
    let (plain, ordered) = (pack(None), pack(Some(text)));
    for layer in 0..plain.image().header().config.layers {
        let (mut a, mut b) = (neurons(&plain, layer), neurons(&ordered, layer));
        assert_ne!(a, b, "layer {layer}");
        a.sort();
        b.sort();
        assert!(a == b, "layer {layer}: other neurons");
    }
    let story = story(24);
    let run = |way: Way, packed: &Packed| {
        way.run(packed, |model, state| {
            let mut logits = Vec::new();
            model.prefill_each(state, &story, &mut |_, row| logits.push(row.to_vec())).expect("a pass");
            (logits, model.live_rows())
        })
    };
    let (expected, rows) = run(Way::plain(&Portable), &plain);
    let (found, found_rows) = run(Way::plain(&Portable), &ordered);
    let difference = expected.iter().zip(&found).map(|(a, b)| max_difference(a, b)).fold(0.0, f32::max);
    println!("largest difference from the checkpoint's order: {difference}; {found_rows:?}, {rows:?}");
    assert!(difference < 0.2);
    assert_eq!(found_rows.up, rows.up);
    for kernels in backend::available() {
        for (batch, threads, streamed) in [(1, 3, false), (5, 2, true)] {
            let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
            assert_eq!(fingerprint(&run(way, &ordered).0), fingerprint(&found), "{way:?}");
        }
    }
}

/// With an exact head the logits are transformers', and so are 60 greedy tokens.
#[test]
fn the_story_is_that_of_transformers() {
    let expected = expected();
    let prompt = ids(&expected["prompt_ids"]);
    let way = Way { kv: KvFormat::F32, ..Way::plain(backend::best()) };
    let logits: Vec<f32> = serde_json::from_value(expected["last_prompt_logits"].clone()).unwrap();
    let found = way.logits(&EXACT, &prompt).pop().unwrap();
    let difference = max_difference(&found, &logits);
    println!("largest difference from transformers: {difference}");
    assert!(difference < 2e-3);
    assert_eq!(way.greedy(&EXACT, &prompt, 60).unwrap(), ids(&expected["greedy_ids"]));
}

/// Runs `f` with a session on the bundled model.
fn with_session<R>(
    packed: &Packed,
    limits: Limits,
    sampling: Sampling,
    f: impl FnOnce(&mut Session<'_>, &Tokenizer) -> R,
) -> R {
    let tokenizer = Tokenizer::load(&packed.image(), &mut Mapped::new(packed.blocks())).unwrap();
    packed.converse(backend::best(), limits, sampling, |mut session| f(&mut session, &tokenizer))
}

fn limits() -> Limits {
    STORIES.image().header().plan.limits
}

/// Continues a text.
fn continue_text(
    session: &mut Session<'_>,
    tokenizer: &Tokenizer,
    prompt: &str,
    max_tokens: usize,
) -> (String, Finish) {
    let tokens: Vec<u32> = tokenizer.bos().into_iter().chain(tokenizer.encode(prompt).unwrap()).collect();
    session.prompt(&tokens).unwrap();
    let mut stream = TextStream::new(tokenizer, Vec::new());
    let mut text = prompt.to_owned();
    let until = Until { max_tokens, stop_ids: &[2] };
    let finish = session.generate(until, Some(&mut stream), &mut |event| {
        if let Event::Text(piece) = event {
            text.push_str(piece);
        }
        ControlFlow::Continue(())
    });
    (text, finish.unwrap())
}

#[test]
fn the_text_is_that_of_transformers() {
    let expected = expected();
    let limits = Limits { kv: KvFormat::F32, ..limits() };
    with_session(&EXACT, limits, Sampling::GREEDY, |session, tokenizer| {
        let prompt = expected["prompt"].as_str().unwrap();
        let (text, finish) = continue_text(session, tokenizer, prompt, 60);
        assert_eq!(session.history()[..5], ids(&expected["prompt_ids"]));
        assert_eq!(session.history()[5..], ids(&expected["greedy_ids"])[..59]);
        assert_eq!(text, expected["text"].as_str().unwrap());
        assert_eq!(finish, Finish::Length);
    });
}

/// The int8 head that images have by default takes another of two words that are about as likely, later than this.
#[test]
fn with_an_int8_head_the_story_begins_the_same() {
    with_session(&STORIES, limits(), Sampling::GREEDY, |session, tokenizer| {
        let (text, _) = continue_text(session, tokenizer, "Once upon a time", 24);
        assert!(expected()["text"].as_str().unwrap().starts_with(&text), "{text}");
    });
}

/// Replay A-17: a session answers every request as a fresh one does.
#[test]
fn requests_do_not_see_each_other() {
    let prompts = ["Once upon a time", "Lily had a cat", "Once upon a time", "Lily", "The", "Once upon a time there"];
    let fresh = |prompt| with_session(&STORIES, limits(), Sampling::GREEDY, |s, t| continue_text(s, t, prompt, 20));
    with_session(&STORIES, limits(), Sampling::GREEDY, |session, tokenizer| {
        for prompt in prompts {
            assert_eq!(continue_text(session, tokenizer, prompt, 20), fresh(prompt), "{prompt}");
        }
    });
}

#[test]
fn a_full_context_ends_the_text() {
    let limits = Limits { context: 12, ..limits() };
    with_session(&STORIES, limits, Sampling::GREEDY, |session, tokenizer| {
        let (_, finish) = continue_text(session, tokenizer, "Once upon a time", 60);
        assert_eq!(finish, Finish::Context);
        assert_eq!(session.history().len(), 12);
        let error = session.prompt(&[1; 13]).unwrap_err();
        assert_eq!(error, Error::ContextFull { context: 12 });
        // The conversation goes on with what was common.
        assert_eq!(continue_text(session, tokenizer, "Once", 3).1, Finish::Length);
    });
}

/// After an error the state is what it was before.
#[test]
fn an_error_leaves_the_state_as_it_was() {
    let way = Way { batch: 2, ..Way::plain(backend::best()) };
    way.run(&STORIES, |model, state| {
        let tokens = story(4);
        let before = model.prefill(state, &tokens).unwrap().to_vec();
        let position = state.position();
        let error = model.prefill(state, &[3, 4, 512]).unwrap_err();
        assert_eq!(error, Error::Token { token: 512, vocab: 512 });
        assert_eq!(state.position(), position);
        state.rewind(position - 1);
        let again = model.step(state, tokens[position - 1]).unwrap();
        assert_eq!(again, before);
    });
}

/// A device that fails ends the pass with an error, the state is as before, and the next pass is right.
#[test]
fn a_failing_device_leaves_the_state_as_it_was() {
    let image = STORIES.image();
    let (config, limits) = (image.header().config, limits());
    let plan = Plan::new(&config, &limits);
    let tokens = story(9);
    let expected = Way::plain(backend::best()).logits(&STORIES, &tokens).pop().unwrap();
    let pass = |left, memory: &mut State<'_>| -> Result<Vec<f32>, Error> {
        let left = Cell::new(left);
        let mut staging = vec![Block::ZERO; Streamed::<Failing<'_>>::staging_blocks_min(&image)];
        let mut scratch = vec![Block::ZERO; plan.scratch];
        let mut source = Streamed::new(Failing { disk: Disk(STORIES.blocks()), left: &left }, &mut staging);
        let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, &mut scratch)?;
        Ok(model.prefill(memory, &tokens)?.to_vec())
    };
    let mut memory = vec![Block::ZERO; plan.state];
    let mut state = State::new(&config, &limits, &mut memory).unwrap();
    for left in [0, 1, 2, 10, 40, 100] {
        assert_eq!(pass(left, &mut state).unwrap_err(), Error::Source(SourceError::Device), "{left}");
        assert_eq!(state.position(), 0);
        assert_eq!(pass(usize::MAX, &mut state).unwrap(), expected, "{left}");
        state.rewind(0);
    }
}

/// A staging buffer that is too small for a unit is an error that says so.
#[test]
fn too_small_a_staging_buffer_is_an_error() {
    let image = STORIES.image();
    let limits = limits();
    let plan = Plan::new(&image.header().config, &limits);
    let (mut scratch, mut memory) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
    let enough = Streamed::<Disk<'_>>::staging_blocks_min(&image);
    let mut staging = vec![Block::ZERO; enough - 1];
    let mut source = Streamed::new(Disk(STORIES.blocks()), &mut staging);
    let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, &mut scratch).unwrap();
    let mut state = State::new(&image.header().config, &limits, &mut memory).unwrap();
    let error = model.step(&mut state, 1).unwrap_err();
    let (blocks, staging) = (enough as u32, enough as u32 - 1);
    assert_eq!(error, Error::Source(SourceError::TooLarge { blocks, staging }));
}

/// Weights that are no numbers, damaged after they were packed, are an error that names the layer.
#[test]
fn weights_that_are_no_numbers_are_an_error() {
    for (kind, layer, reported) in
        [(Kind::AttentionNorm, Some(0), 0), (Kind::FfnSubNorm, Some(2), 2), (Kind::FinalNorm, None, 4)]
    {
        let start = STORIES.image().sections().find(kind, layer).unwrap().start.get() as usize;
        let mut blocks = STORIES.blocks().to_vec();
        blocks[start].0[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let damaged = Packed::from_blocks(blocks);
        let error = Way::plain(backend::best()).run(&damaged, |model, state| model.step(state, 5).err());
        assert_eq!(error, Some(Error::NotFinite { layer: reported }), "{kind:?}");
    }
}

/// So are scales of rows: of keys, which the cache's formats could not hold, and of gates, which a maximum could hide.
#[test]
fn scales_that_are_no_numbers_are_an_error() {
    let packed = Packed::pack(&model("stories-ternary"), &Options { format: Format::I8, ..Options::default() });
    for kind in [Kind::Key, Kind::Gate] {
        for scale in [f32::NAN, f32::INFINITY] {
            let tensor = packed.image().sections().find(kind, Some(1)).unwrap().tensor().unwrap();
            let (_, _, scales) = tensor.row(0);
            let start = scales.unwrap().0.start as usize;
            let mut blocks = packed.blocks().to_vec();
            blocks[start].0[..4].copy_from_slice(&scale.to_le_bytes());
            let damaged = Packed::from_blocks(blocks);
            let error = Way::plain(backend::best()).run(&damaged, |model, state| model.step(state, 5).err());
            assert_eq!(error, Some(Error::NotFinite { layer: 1 }), "{kind:?} {scale}");
        }
    }
}

/// A generation that ended for its length goes on where it was.
#[test]
fn generations_continue() {
    let generate = |parts: &[usize]| {
        with_session(&STORIES, limits(), Sampling::GREEDY, |session, _| {
            session.prompt(&story(0)).unwrap();
            let mut tokens = Vec::new();
            for &max_tokens in parts {
                let until = Until { max_tokens, stop_ids: &[] };
                let finish = session.generate(until, None, &mut |event| {
                    if let Event::Token(token) = event {
                        tokens.push(token);
                    }
                    ControlFlow::Continue(())
                });
                assert_eq!(finish, Ok(Finish::Length));
            }
            tokens
        })
    };
    assert_eq!(generate(&[3, 1, 0, 8]), generate(&[12]));
}

/// Breaking off touches nothing but the reply.
#[test]
fn breaking_off_stops_within_a_token() {
    with_session(&STORIES, limits(), Sampling::GREEDY, |session, _| {
        session.prompt(&story(0)).unwrap();
        let mut tokens = 0;
        let finish = session.generate(Until { max_tokens: 100, stop_ids: &[] }, None, &mut |_| {
            tokens += 1;
            if tokens == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(finish, Ok(Finish::Cancelled));
        assert_eq!((tokens, session.history().len()), (3, 5 + 2));
    });
}

/// Replay A-04: a batch is its tokens, one by one. (The kernels' own suite has rows of zeros and extremes.)
#[test]
fn batches_of_any_size_give_the_same() {
    let story = story(30);
    let one = Way::plain(backend::best()).logits(&STORIES, &story);
    for batch in [2, 3, 7, 8, 9, 16] {
        let way = Way { batch, ..Way::plain(backend::best()) };
        assert_eq!(fingerprint(&way.logits(&STORIES, &story)), fingerprint(&one), "{batch}");
    }
}

#[test]
fn limits_beyond_the_model_are_refused() {
    let image = STORIES.image();
    let config = &image.header().config;
    let mut memory = [];
    for (context, batch) in [(0, 1), (513, 1), (1, 0), (1, 17)] {
        let limits = Limits { context, batch, kv: KvFormat::F16 };
        assert!(matches!(State::new(config, &limits, &mut memory), Err(Error::Limit { .. })), "{limits:?}");
    }
    let too_small = State::new(config, &limits(), &mut memory).unwrap_err();
    assert!(matches!(too_small, Error::Memory { given: 0, .. }), "{too_small}");
}

/// Every token gives the bytes that the checkpoint's own tokenizer.json says.
#[test]
fn every_token_has_its_bytes() {
    let json = json(model("stories-ternary").join("tokenizer.json"));
    with_session(&STORIES, limits(), Sampling::GREEDY, |_, tokenizer| {
        for (name, id) in json["model"]["vocab"].as_object().unwrap() {
            let id = id.as_u64().unwrap() as u32;
            let byte = name.strip_prefix("<0x").and_then(|hex| u8::from_str_radix(hex.strip_suffix('>')?, 16).ok());
            let expected = byte.map_or_else(|| name.replace('\u{2581}', " ").into_bytes(), |b| vec![b]);
            let control = ["<unk>", "<s>", "</s>"].contains(&name.as_str());
            let expected = if control { Vec::new() } else { expected };
            assert_eq!(tokenizer.bytes(id), expected, "{id} {name}");
        }
    });
}

/// Sizes that are multiples of nothing, every format of linears, both positions of the norms: one result in every way.
#[test]
fn odd_shapes_give_one_result_in_every_way() {
    let config = Config {
        vocab: 70,
        hidden: 72,
        ffn: 100,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 6,
        context: 64,
        norm_eps: 1e-5,
        activation: Activation::Silu,
        rope: Rope::Interleaved,
        sub_norms: true,
        qk_norms: false,
        linear_norm_eps: Some(1e-6),
        live_ffn: false,
        sparse: false,
        window: None,
        memory: None,
        delayed_writes: false,
        recurrence: false,
        quantizers: Quantizers::INT8,
        tied: false,
        linear_head: false,
        split_head: false,
        formats: 0,
    };
    let plain = Config {
        activation: Activation::SquaredRelu,
        rope: Rope::HalfSplit,
        sub_norms: false,
        qk_norms: true,
        linear_norm_eps: None,
        tied: true,
        split_head: false,
        ..config
    };
    let tokens: Vec<u32> = (0..20).map(|i| i * 13 % 70).collect();
    let dir = tempfile::tempdir().unwrap();
    let heads = [Format::I8, Format::I4, Format::F16];
    let formats = Format::INTEGER.into_iter().flat_map(|f| heads.map(|h| (f, h)));
    let formats = formats.chain(Format::GROUPED.map(|f| (f, f)));
    // More neurons than one list names where only the live ones are read.
    let live = [(Format::TL, Format::I8, true, 1_100)];
    for (format, head, live_ffn, ffn) in formats.map(|(f, h)| (f, h, false, 100)).chain(live) {
        for config in [Config { ffn, ..config }, Config { ffn, ..plain }] {
            let path = dir.path().join("odd");
            let shape = bitnet_pack::Shape { name: "odd".into(), config, theta: 1e4 };
            let options = Options { format, head, live_ffn, ..Options::default() };
            bitnet_pack::dummy(&path, &shape, &options, 7, &mut ()).unwrap();
            let packed = Packed::read(&path);
            let expected = fingerprint(&Way::plain(&Portable).logits(&packed, &tokens));
            for kernels in backend::available() {
                for (batch, threads, streamed) in [(1, 1, false), (7, 2, false), (16, 1, true)] {
                    let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
                    assert_eq!(fingerprint(&way.logits(&packed, &tokens)), expected, "{format:?} {head:?} {way:?}");
                }
            }
        }
    }
}
