//! Conversations of fixed size: attention to a window, a memory beside it, activations of four bits. What PyTorch computes of
//! small random models (`tools/train/golden.py`) is what the runtime computes, on every backend and in every way of running.
use bitnet_kernel::{Block, Format};
use bitnet_pack::{Options, Stateful};
use bitnet_runtime::error::SourceError;
use bitnet_runtime::generate::{Event, Finish, Session, Until};
use bitnet_runtime::image::Kind;
use bitnet_runtime::memory::KvFormat;
use bitnet_runtime::model::{Config, Difference, Matrices, Memory, Vector, Window};
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::sampler::Sampling;
use bitnet_runtime::source::{Mapped, Streamed};
use bitnet_runtime::{Error, Limits, Model, Plan, State, backend};
use bitnet_tests::goldens::{Golden, goldens, pack, prompt};
use bitnet_tests::images::{Disk, Failing, Packed, Way, fingerprint};
use bitnet_tests::{argmax, golden, json, max_difference, model, npy};
use core::ops::ControlFlow;
use std::cell::Cell;

/// The largest difference that was found is 1.7e-6, and it is the same on every CPU.
const TOLERANCE: f32 = 3e-6;
/// Of what the bundled stateful model tells.
const BUNDLED: u64 = 0x4e2c9dd708e07e41;

/// The next tokens of a conversation, which nothing else ends.
fn generate(session: &mut Session<'_>, max_tokens: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    let finish = session.generate(Until { max_tokens, stop_ids: &[] }, None, &mut |event| {
        if let Event::Token(token) = event {
            tokens.push(token);
        }
        ControlFlow::Continue(())
    });
    assert_eq!((finish.unwrap(), tokens.len()), (Finish::Length, max_tokens));
    tokens
}

#[test]
fn logits_are_those_of_pytorch() {
    for Golden { set, .. } in goldens() {
        let (packed, prompt) = (pack(&set), prompt(&set));
        let expected = npy::read::<f32>(golden(&set).join("logits_f32.npy"));
        let found = Way { kv: KvFormat::F32, ..Way::plain(backend::best()) }.logits(&packed, &prompt);
        let differences = found.iter().zip(expected.rows()).map(|(a, b)| max_difference(a, b));
        let differences: Vec<f32> = differences.collect();
        let largest = differences.iter().copied().fold(0.0, f32::max);
        println!("{set}: largest difference {largest}: {differences:?}");
        assert_eq!(found.len(), prompt.len());
        assert!(largest <= TOLERANCE, "{set}: {largest}");
    }
}

#[test]
fn every_way_of_running_gives_the_same_bits() {
    for Golden { set, fingerprints } in goldens() {
        let (packed, prompt) = (pack(&set), prompt(&set));
        for (kv, expected) in fingerprints {
            for kernels in backend::available() {
                for (threads, streamed, batch) in [(1, false, 1), (3, false, 7), (2, true, 16)] {
                    let way = Way { kernels, threads, streamed, batch, kv };
                    let found = fingerprint(&way.logits(&packed, &prompt));
                    assert_eq!(found, expected, "{found:#018x}: {set} by {way:?}");
                }
            }
        }
    }
}

/// The bundled model, far beyond its window: PyTorch's tokens, its logits where the memory matters, and one result on every backend.
#[test]
fn the_bundled_model_is_that_of_pytorch() {
    let packed = Packed::pack(&model("stories-stateful"), &Options { head: Format::F16, ..Options::default() });
    let told = prompt("stories-stateful");
    let expected = npy::read::<f32>(golden("stories-stateful").join("logits_f32.npy"));
    let found = Way { kv: KvFormat::F32, ..Way::plain(backend::best()) }.logits(&packed, &told);
    let last = &found[told.len() - expected.rows().count()..];
    let mut differences: Vec<f32> = last.iter().zip(expected.rows()).map(|(a, b)| max_difference(a, b)).collect();
    differences.sort_by(f32::total_cmp);
    // Roundings to int8 that flip are seen by all tokens after: the measure is how far PyTorch in f32 is from itself in f64.
    let itself = &json(golden("stories-stateful").join("ids.json"))["f32_from_f64"];
    for (what, found) in
        [("median", differences[differences.len() / 2]), ("largest", differences[differences.len() - 1])]
    {
        let itself = itself[what].as_f64().unwrap() as f32;
        println!("{what} difference {found}, of PyTorch from itself {itself}");
        assert!(found <= 2.0 * itself, "{what}: {found}, {itself}");
    }
    // So where two tokens are that close either may be the likeliest.
    let itself = itself["largest"].as_f64().unwrap();
    let margins = json(golden("stories-stateful").join("ids.json"));
    let margins = margins["margins"].as_array().unwrap().iter().map(|margin| margin.as_f64().unwrap());
    let clear = found.iter().zip(&told[1..]).zip(margins).filter(|(_, margin)| *margin > 2.0 * itself);
    let clear: Vec<_> = clear.map(|((logits, told), _)| (argmax(logits) as u32, *told)).collect();
    assert!(clear.len() > 120 && clear.iter().all(|(found, told)| found == told), "{clear:?}");
    for kernels in backend::available() {
        let found = fingerprint(&Way { batch: 7, ..Way::plain(kernels) }.logits(&packed, &told));
        assert_eq!(found, BUNDLED, "{found:#018x} by {}", kernels.name());
    }
}

/// The bundled models have one backbone, and the memory of one is given what leaves the window: until something does, both compute the
/// same, though that memory is trained.
#[test]
fn the_bundled_models_agree_within_the_window() {
    let [dense, stateful] = ["stories-ternary", "stories-stateful"]
        .map(|name| Packed::pack(&model(name), &Options { head: Format::F16, ..Options::default() }));
    let told = prompt("stories-stateful");
    let span = stateful.image().header().config.window.unwrap().span() as usize;
    let way = Way { kv: KvFormat::F32, batch: 5, ..Way::plain(backend::best()) };
    let [dense, stateful] = [&dense, &stateful].map(|packed| way.logits(packed, &told[..span + 1]));
    assert_eq!(fingerprint(&dense[..span]), fingerprint(&stateful[..span]));
    assert_ne!(dense[span], stateful[span], "the first token has left the window");
}

/// What a repository carries everybody downloads: 1.5 MB an image, as it is packed unless told otherwise.
#[test]
fn bundled_models_are_small() {
    for name in ["stories-ternary", "stories-stateful"] {
        let bytes = Packed::pack(&model(name), &Options::default()).blocks().len() * Block::BYTES;
        assert!(bytes < 1_500_000, "{name}: {bytes} bytes");
    }
}

/// A state that went back and read again is the state that read once; where it cannot go back it says so.
#[test]
fn a_conversation_goes_back_as_far_as_it_can() {
    let way = Way { batch: 4, ..Way::plain(backend::best()) };
    for set in ["bitrnn_m", "bitrnn_v", "bitrnn_m_late", "bitrnn_v_late", "shared"] {
        let (packed, prompt) = (pack(set), prompt(set));
        let expected = way.logits(&packed, &prompt);
        way.run(&packed, |model, state| {
            model.prefill(state, &prompt[..21]).unwrap();
            assert_eq!(state.position(), 21);
            assert_eq!(state.rewind(21), 21);
            // The last pass was that of token 20 alone: batches are 4, 4, 4, 4, 4, 1.
            assert_eq!(state.rewind(20), 20);
            assert_eq!(model.step(state, prompt[20]).unwrap(), expected[20]);
            model.prefill(state, &prompt[21..25]).unwrap();
            assert_eq!(state.rewind(21), 21, "where the last pass began");
            assert_eq!(state.rewind(20), 0, "nothing older is kept");
            assert_eq!(model.prefill(state, &prompt).unwrap(), expected[prompt.len() - 1]);
        });
    }
    // Without a memory a window goes back by a batch, and anywhere before something has left it.
    let (packed, prompt) = (pack("window"), prompt("window"));
    let expected = way.logits(&packed, &prompt);
    way.run(&packed, |model, state| {
        model.prefill(state, &prompt[..15]).unwrap();
        assert_eq!(state.rewind(5), 5);
        model.prefill(state, &prompt[5..40]).unwrap();
        assert_eq!(state.rewind(36), 36);
        assert_eq!(model.prefill(state, &prompt[36..40]).unwrap(), expected[39]);
        assert_eq!(state.rewind(30), 0);
    });
}

/// What is refused before it begins leaves a state as it was.
#[test]
fn a_refused_pass_leaves_the_state_as_it_was() {
    for set in ["bitrnn_m", "bitrnn_v", "bitrnn_m_late", "bitrnn_v_late", "shared", "matmul_free"] {
        let (packed, prompt) = (pack(set), prompt(set));
        let way = Way { batch: 4, ..Way::plain(backend::best()) };
        let expected = way.logits(&packed, &prompt);
        way.run(&packed, |model, state| {
            model.prefill(state, &prompt[..30]).unwrap();
            assert!(model.step(state, u32::MAX).is_err());
            assert_eq!(state.position(), 30);
            assert_eq!(model.step(state, prompt[30]).unwrap(), expected[30]);
            assert_eq!((state.rewind(30), state.rewind(7)), (30, 0));
            assert_eq!(model.prefill(state, &prompt[..31]).unwrap(), expected[30]);
        });
    }
}

/// A pass whose device fails, wherever that is: the conversation has as many tokens as it says, and goes on with the rest of them as
/// if nothing had failed. So does one that is then cut to where an earlier pass began, of which the pass that failed may have written
/// over what there was.
#[test]
fn a_failing_device_leaves_a_conversation_that_goes_on() {
    const BATCH: u32 = 4;
    for set in ["bitrnn_m", "bitrnn_v", "bitrnn_m_late", "bitrnn_v_late", "shared_late", "window", "matmul_free"] {
        let (packed, prompt) = (pack(set), prompt(set));
        let expected = Way { batch: BATCH, ..Way::plain(backend::best()) }.logits(&packed, &prompt);
        let image = packed.image();
        let config = image.header().config;
        let limits = Limits { context: image.header().plan.limits.context, batch: BATCH, kv: KvFormat::F16 };
        let plan = Plan::new(&config, &limits);
        let left = Cell::new(usize::MAX);
        let mut staging = vec![Block::ZERO; Streamed::<Failing<'_>>::staging_blocks_min(&image)];
        let mut scratch = vec![Block::ZERO; plan.scratch];
        let mut source = Streamed::new(Failing { disk: Disk(packed.blocks()), left: &left }, &mut staging);
        let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, &mut scratch).unwrap();
        let mut failed = 0;
        // Two batches and a half fail, from the start, after a prompt, or after a token of a reply.
        // It is cut as people do who try again, or as a server does that trusts nothing any more.
        for (prompted, replied, cut) in [(0, 0, 0), (20, 0, 20), (21, 0, 0), (20, 1, 21), (20, 1, 20), (0, 1, 0)] {
            let (begun, end) = (prompted + replied, prompted + replied + 10);
            let mut reads = 0;
            loop {
                let mut memory = vec![Block::ZERO; plan.state];
                let mut state = State::new(&config, &limits, &mut memory).unwrap();
                let mut read = |state: &mut State<'_>, tokens: core::ops::Range<usize>| -> Result<Vec<f32>, Error> {
                    if tokens.is_empty() { Ok(Vec::new()) } else { Ok(model.prefill(state, &prompt[tokens])?.to_vec()) }
                };
                read(&mut state, 0..prompted).unwrap();
                read(&mut state, prompted..begun).unwrap();
                left.set(reads);
                let done = read(&mut state, begun..end);
                left.set(usize::MAX);
                let Err(error) = done else { break };
                assert_eq!(error, Error::Source(SourceError::Device));
                let case = format!("{set}: {prompted} and {replied} tokens, then {reads} reads");
                let from = state.rewind(cut.min(state.position()));
                assert!(from <= cut, "{case}");
                assert_eq!(read(&mut state, from..end).unwrap(), expected[end - 1], "{case}, cut to {cut}");
                failed += 1;
                reads += 3;
            }
        }
        assert!(failed > 20, "{set}: {failed}");
    }
}

/// The MatMul-free language model in every format that holds ternary weights, with the feed-forward layer's live part alone, and
/// for several conversations at once: one result.
#[test]
fn a_recurrence_in_attentions_place_has_one_result() {
    let (source, prompt) = (golden("matmul_free"), prompt("matmul_free"));
    let way = Way { batch: 3, ..Way::plain(backend::best()) };
    let expected = way.logits(&pack("matmul_free"), &prompt);
    for (format, live_ffn) in [(Format::TL, true), (Format::T2, false), (Format::I8, false)] {
        let packed = Packed::pack(&source, &Options { format, live_ffn, head: Format::F16, ..Options::default() });
        assert_eq!(way.logits(&packed, &prompt), expected, "{format:?} {live_ffn}");
    }
    let (packed, limits) = (pack("matmul_free"), Limits { context: 64, batch: 3, kv: KvFormat::F16 });
    let image = packed.image();
    let config = image.header().config;
    assert_eq!(config.memory, None);
    let plan = Plan::new(&config, &limits);
    // Two copies of a float a channel and layer, and nothing for positions.
    assert_eq!(plan.state, 2 * (3 * 48 * 4 / Block::BYTES));
    let mut memory = vec![Block::ZERO; 2 * plan.state];
    let (first, second) = memory.split_at_mut(plan.state);
    let [mut first, mut second] = [first, second].map(|memory| State::new(&config, &limits, memory).unwrap());
    way.run(&packed, |model, _| {
        model.prefill(&mut first, &prompt[..20]).unwrap();
        model.prefill(&mut second, &prompt[..10]).unwrap();
        let mut logits = vec![0.0; 2 * config.vocab as usize];
        let need = [bitnet_runtime::model::Need::All; 2];
        model.step_each(&mut [&mut first, &mut second], &[prompt[20], prompt[10]], &need, &mut logits).unwrap();
        assert_eq!(logits, [&expected[20][..], &expected[10]].concat());
    });
}

/// A vector, as it is and before a pass: its numbers and three inputs of what it takes in and of what decides how much it keeps.
#[test]
fn a_vector_takes_seven_floats_a_number_twice() {
    let packed = pack("bitrnn_v");
    let config = packed.image().header().config;
    assert_eq!(config.memory, Some(Memory::Vector(Vector { width: 44 })));
    let limits = Limits { context: 16, batch: 4, kv: KvFormat::F16 };
    let [with, without] =
        [config, bitnet_runtime::model::Config { memory: None, ..config }].map(|c| Plan::new(&c, &limits).state);
    assert_eq!(with - without, 2 * (2_usize * 7 * 44 * 4).div_ceil(Block::BYTES));
    // What waits is two floats a number of each of twelve tokens in the window, and of a batch.
    let late = Plan::new(&pack("bitrnn_v_late").image().header().config, &limits).state;
    assert_eq!(late - with, (2 * (12 + 4) * 2 * 44 * 4_usize).div_ceil(Block::BYTES));
}

/// A share of one would never let anything in, and more would let the state grow.
#[test]
fn a_vector_that_keeps_everything_is_refused() {
    let (place, source) = (tempfile::tempdir().unwrap(), golden("bitrnn_v"));
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let ones = [1.0_f32; 44].map(f32::to_le_bytes).concat();
    let views = tensors.tensors().into_iter().map(|(name, view)| {
        let data = if name.ends_with("layers.1.self_attn.memory.bound") { &ones[..] } else { view.data() };
        (name, safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap())
    });
    std::fs::write(place.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::copy(source.join("config.json"), place.path().join("config.json")).unwrap();
    let error = bitnet_pack::pack(place.path(), &place.path().join("image"), &Options::default(), &mut ()).unwrap_err();
    assert!(error.to_string().contains("layers.1.self_attn.memory.bound: 1 is"), "{error}");
}

/// Memory does not depend on the length of a conversation, and a conversation has no end.
#[test]
fn a_conversation_of_any_length_has_one_size() {
    for set in ["bitrnn_m", "bitrnn_v", "bitrnn_m_late", "bitrnn_v_late", "shared_late", "matmul_free"] {
        has_one_size(&pack(set));
    }
}

fn has_one_size(packed: &Packed) {
    let image = packed.image();
    let config = image.header().config;
    let plans = [16, 512].map(|context| Plan::new(&config, &Limits { context, batch: 4, kv: KvFormat::F16 }));
    assert_eq!(plans[0], plans[1]);
    let limits = Limits { context: 16, batch: 4, kv: KvFormat::F16 };
    let mut memory = vec![Block::ZERO; plans[0].state + plans[0].scratch];
    let (for_state, for_model) = memory.split_at_mut(plans[0].state);
    let mut source = Mapped::new(packed.blocks());
    let mut state = State::new(&config, &limits, for_state).unwrap();
    let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, for_model).unwrap();
    for t in 0..600 {
        model.step(&mut state, t % 128).unwrap();
    }
    assert_eq!(state.position(), 600);
    // A session keeps the last tokens only, and a prompt after that is read from its start.
    packed.converse(backend::best(), limits, Sampling::GREEDY, |mut session| {
        for _ in 0..2 {
            session.prompt(&[1, 2, 3]).unwrap();
            generate(&mut session, 100);
            assert!(session.history().len() <= 16);
        }
    });
}

/// Within the window a model with a window and a memory whose share is zero computes what it did without either, bit for bit.
#[test]
fn a_window_and_an_idle_memory_change_nothing_within_the_window() {
    // One checkpoint three times: as it is, without a memory, and with a memory of which nothing is added.
    let place = tempfile::tempdir().unwrap();
    let source = golden("bitrnn_m");
    let config = json(source.join("config.json"));
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let variant = |name: &str, with_memory: bool, with_window: bool| {
        let dir = place.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let mut config = config.clone();
        let object = config.as_object_mut().unwrap();
        if !with_memory {
            object.remove("memory");
        }
        if !with_window {
            object.remove("sliding_window");
            object.remove("sink_tokens");
        }
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        let zeros = vec![0; 64 * 4];
        let views: Vec<_> = tensors
            .tensors()
            .into_iter()
            .filter(|(name, _)| with_memory || !name.contains(".memory."))
            .map(|(name, view)| {
                let data = if name.ends_with(".rho") { &zeros[..] } else { view.data() };
                let view = safetensors::tensor::TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap();
                (name, view)
            })
            .collect();
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        Packed::pack(&dir, &Options { head: Format::F16, ..Options::default() })
    };
    let [plain, window, idle] =
        [variant("plain", false, false), variant("window", false, true), variant("idle", true, true)];
    let prompt = prompt("bitrnn_m");
    let within = &prompt[..14];
    for batch in [1, 4] {
        let way = Way { kv: KvFormat::F32, batch, ..Way::plain(backend::best()) };
        let expected = fingerprint(&way.logits(&plain, within));
        assert_eq!(fingerprint(&way.logits(&window, within)), expected);
        assert_eq!(fingerprint(&way.logits(&idle, within)), expected);
        let longer = [&plain, &window].map(|packed| fingerprint(&way.logits(packed, &prompt)));
        assert_ne!(longer[0], longer[1], "what has left the window is not seen");
    }
}

/// A memory that is given tokens late adds nothing within the window, whatever it was trained to be: until then its state is zero.
#[test]
fn delayed_writes_change_nothing_within_the_window() {
    for set in ["bitrnn_m_late", "bitrnn_v_late", "shared_late"] {
        let (place, source) = (tempfile::tempdir().unwrap(), golden(set));
        let mut config = json(source.join("config.json"));
        config.as_object_mut().unwrap().remove("memory");
        std::fs::write(place.path().join("config.json"), config.to_string()).unwrap();
        let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors();
        let views = tensors.into_iter().filter(|(name, _)| !name.contains(".memory."));
        std::fs::write(place.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        let without = Packed::pack(place.path(), &Options { head: Format::F16, ..Options::default() });
        let (with, prompt) = (pack(set), prompt(set));
        let span = with.image().header().config.window.unwrap().span() as usize;
        for batch in [1, 4, 16] {
            let way = Way { batch, ..Way::plain(backend::best()) };
            let [with, without] = [&with, &without].map(|packed| way.logits(packed, &prompt));
            assert_eq!(fingerprint(&with[..span]), fingerprint(&without[..span]), "{set}");
            assert!(
                with[span..].iter().zip(&without[span..]).all(|(a, b)| a != b),
                "{set}: what has left is remembered"
            );
        }
    }
}

/// `bitnet-pack convert --to-stateful`: within the window the packed model gives the original's logits, bit for bit, however its
/// linears are stored, and beyond it a conversation goes on.
#[test]
fn a_converted_model_computes_what_it_did_within_the_window() {
    convert_to(Memory::Matrices(Matrices { heads: 3, key: 8, value: 16 }), false);
    convert_to(Memory::Vector(Vector { width: 24 }), true);
    convert_to(Memory::Shared, false);
}

fn convert_to(memory: Memory, delayed_writes: bool) {
    let place = tempfile::tempdir().unwrap();
    let window = Window { positions: 12, sinks: 2 };
    let new = Stateful { window, memory, delayed_writes };
    // Masters; packed by either rule; values that are ternary already, with that window and without one; some of them binary.
    let plain = place.path().join("plain");
    std::fs::create_dir(&plain).unwrap();
    std::fs::copy(golden("window").join("model.safetensors"), plain.join("model.safetensors")).unwrap();
    let mut config = json(golden("window").join("config.json"));
    config.as_object_mut().unwrap().retain(|key, _| !matches!(&**key, "sliding_window" | "sink_tokens"));
    std::fs::write(plain.join("config.json"), config.to_string()).unwrap();
    let sets = ["bitnet_online_bf16", "bitnet_offline_packed", "llama_bitlinear_packed", "window", "tbha"];
    let sources = sets.map(golden).into_iter().chain([plain]);
    for (i, source) in sources.enumerate() {
        let output = place.path().join(i.to_string());
        bitnet_pack::convert(&source, &output, &new, &mut ()).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
        let options = Options { head: Format::F16, ..Options::default() };
        let [before, after] = [&source, &output].map(|path| Packed::pack(path, &options));
        let config = after.image().header().config;
        assert_eq!((config.memory, config.delayed_writes), (Some(new.memory), new.delayed_writes));
        let prompt: Vec<u32> = (0..40).map(|t| t * 7 % before.image().header().config.vocab).collect();
        for (kernels, batch) in backend::available().flat_map(|kernels| [(kernels, 1), (kernels, 5)]) {
            let way = Way { kv: KvFormat::F32, batch, ..Way::plain(kernels) };
            let [expected, found] = [&before, &after].map(|packed| fingerprint(&way.logits(packed, &prompt[..14])));
            assert_eq!(expected, found, "{}, {}", source.display(), kernels.name());
            assert_eq!(way.logits(&after, &prompt).len(), prompt.len());
        }
        let again = bitnet_pack::convert(&output, &place.path().join("again"), &new, &mut ()).unwrap_err();
        assert!(again.to_string().contains("memory already"), "{again}");
        let there = bitnet_pack::convert(&source, &output, &new, &mut ()).unwrap_err();
        assert!(there.to_string().contains("there already"), "{there}");
    }
    let other = Stateful { window: Window { positions: 11, sinks: 2 }, ..new };
    let error = bitnet_pack::convert(&golden("window"), &place.path().join("again"), &other, &mut ()).unwrap_err();
    assert!(error.to_string().contains("a window of 12 with 2 sinks"), "{error}");
    let wide = Stateful { window: Window { positions: 1 << 20, sinks: 2 }, ..new };
    let error = bitnet_pack::convert(&golden("bitnet_online_bf16"), &place.path().join("again"), &wide, &mut ());
    assert!(error.unwrap_err().to_string().contains("was made for"));
    // What failed left nothing, under any name.
    assert_eq!(place.path().read_dir().unwrap().count(), 7);
}

/// Ternary queries and keys and binary values in one model: what has no zeros takes one bit a weight, and the logits are those of
/// two bits each.
#[test]
fn binary_linears_take_one_bit_beside_ternary_ones() {
    let source = golden("bitrnn_m_a4");
    let [mixed, two] = [Format::TL, Format::T2]
        .map(|format| Packed::pack(&source, &Options { format, head: Format::F16, ..Options::default() }));
    let format = |packed: &Packed, kind| {
        packed.image().sections().find(kind, Some(0)).and_then(|r| r.tensor()).map(|tensor| tensor.format)
    };
    for (kind, expected) in [(Kind::Query, Format::TL), (Kind::Key, Format::TL), (Kind::Value, Format::B1)] {
        assert_eq!((format(&mixed, kind), format(&two, kind)), (Some(expected), Some(Format::T2)), "{kind:?}");
    }
    let prompt = prompt("bitrnn_m_a4");
    let way = Way::plain(backend::best());
    assert_eq!(fingerprint(&way.logits(&mixed, &prompt)), fingerprint(&way.logits(&two, &prompt)));
}

/// A conversation that was saved goes on as if it had not been interrupted, in another state, with another batch, in a fork.
#[test]
fn a_snapshot_goes_on_where_it_was_taken() {
    let sets = ["bitrnn_m", "bitrnn_v", "shared", "window", "matmul_free", "bitnet_online_bf16"];
    for set in sets.into_iter().chain(["bitrnn_m_late", "bitrnn_v_late", "shared_late"]) {
        let packed = pack(set);
        let prompt = prompt(set);
        let image = packed.image();
        for kv in [KvFormat::F32, KvFormat::F16, KvFormat::I8] {
            let way = Way { kv, batch: 5, ..Way::plain(backend::best()) };
            let expected = way.logits(&packed, &prompt);
            for at in [0, 1, 7, prompt.len() / 2, prompt.len() - 1] {
                let snapshot = way.run(&packed, |model, state| {
                    if at > 0 {
                        model.prefill(state, &prompt[..at]).unwrap();
                    }
                    let mut bytes = vec![0; state.snapshot_len()];
                    state.save(&image, &mut bytes);
                    bytes
                });
                for batch in [1, 5, 16] {
                    Way { batch, ..way }.run(&packed, |model, state| {
                        model.prefill(state, &[3, 1, 4]).unwrap();
                        state.restore(&image, &snapshot).unwrap();
                        assert_eq!(state.position(), at);
                        let mut rows = Vec::new();
                        model.prefill_each(state, &prompt[at..], &mut |_, logits| rows.push(logits.to_vec())).unwrap();
                        assert_eq!(fingerprint(&rows), fingerprint(&expected[at..]), "{set}, {kv:?}, {at}, {batch}");
                    });
                }
            }
        }
    }
}

/// What was read stays when a conversation skips ahead, and there is no skipping past an end.
#[test]
fn a_conversation_skips_ahead() {
    for set in ["bitrnn_m", "bitrnn_v", "bitrnn_m_late", "bitrnn_v_late", "shared", "matmul_free", "window", "tbha"] {
        Way::plain(backend::best()).run(&pack(set), |model, state| {
            model.prefill(state, &[1, 2, 3]).unwrap();
            let end = if model.config().is_bounded() { 511 } else { 1_000_000 };
            state.skip_to(end).unwrap();
            assert!(model.step(state, 4).unwrap().iter().all(|logit| logit.is_finite()));
            assert_eq!(state.position(), end + 1);
            assert_eq!(state.skip_to(end + 2).is_err(), model.config().is_bounded());
            assert_eq!(state.rewind(0), 0);
        });
    }
}

#[test]
fn a_fork_is_a_conversation_of_its_own() {
    for set in ["bitrnn_m", "bitrnn_m_late", "bitrnn_v_late", "shared_late"] {
        let (packed, prompt) = (pack(set), prompt(set));
        let way = Way::plain(backend::best());
        let expected = way.logits(&packed, &prompt);
        let image = packed.image();
        let limits = Limits { context: image.header().plan.limits.context, batch: 1, kv: KvFormat::F16 };
        let plan = Plan::new(&image.header().config, &limits);
        let mut memory = vec![Block::ZERO; plan.state];
        let mut fork = State::new(&image.header().config, &limits, &mut memory).unwrap();
        way.run(&packed, |model, state| {
            model.prefill(state, &prompt[..20]).unwrap();
            fork.fork_from(state).unwrap();
            model.prefill(state, &[9; 30]).unwrap();
            let found = model.prefill(&mut fork, &prompt[20..]).unwrap();
            assert_eq!(found, expected[prompt.len() - 1], "{set}");
            assert_eq!((state.position(), fork.position()), (50, prompt.len()));
        });
    }
}

/// Conversations are equal however they were read, and where they part is said: by tokens, then keys and values, then what is
/// remembered.
#[test]
fn two_conversations_are_compared() {
    let last = |config: &Config| match (config.memory, config.delayed_writes) {
        (Some(_), true) => Difference::Waiting { layer: 1, position: 29 },
        (Some(memory), false) if memory.channels() > 0 => {
            Difference::Input { layer: 1, number: 3 * memory.channels() as usize - 1 }
        }
        (Some(_), false) => Difference::Memory { layer: 1, number: 2 * 16 * 16 - 1 },
        (None, _) if config.recurrence => Difference::Memory { layer: 2, number: 47 },
        (None, _) => Difference::Value { layer: 1, head: 1, position: 29 },
    };
    for set in ["bitrnn_m", "bitrnn_m_late", "bitrnn_v", "shared", "window", "tbha", "matmul_free"] {
        let (packed, prompt) = (pack(set), prompt(set));
        let image = packed.image();
        let config = image.header().config;
        let way = Way { batch: 4, ..Way::plain(backend::best()) };
        let limits = Limits { context: image.header().plan.limits.context, batch: 16, kv: way.kv };
        let mut memory = vec![Block::ZERO; Plan::new(&config, &limits).state];
        let mut other = State::new(&config, &limits, &mut memory).unwrap();
        way.run(&packed, |model, state| {
            model.prefill(state, &prompt[..30]).unwrap();
            prompt[..29].iter().for_each(|&token| drop(model.step(&mut other, token).unwrap().to_vec()));
            assert_eq!(state.compare(&other).unwrap(), Some(Difference::Tokens(30, 29)));
            model.step(&mut other, prompt[29]).unwrap();
            assert_eq!(state.compare(&other).unwrap(), None, "{set}");

            // The last byte of a snapshot is that of the last number.
            let mut bytes = vec![0; other.snapshot_len()];
            other.save(&image, &mut bytes);
            other.restore(&image, &bytes).unwrap();
            assert_eq!(state.compare(&other).unwrap(), None, "{set}");
            *bytes.last_mut().unwrap() ^= 1;
            let sum = bitnet_runtime::image::checksum(&bytes[64..]);
            bytes[40..48].copy_from_slice(&sum.to_le_bytes());
            let sum = bitnet_runtime::image::checksum(&bytes[..48]);
            bytes[48..56].copy_from_slice(&sum.to_le_bytes());
            other.restore(&image, &bytes).unwrap();
            assert_eq!(state.compare(&other).unwrap(), Some(last(&config)), "{set}");

            assert_eq!((state.rewind(0), other.rewind(0)), (0, 0));
            model.step(state, 1).unwrap();
            model.step(&mut other, 2).unwrap();
            let first = if config.recurrence {
                Difference::Memory { layer: 0, number: 0 }
            } else {
                Difference::Key { layer: 0, head: 0, position: 0 }
            };
            assert_eq!(state.compare(&other).unwrap(), Some(first), "{set}");
        });
        let halves = Limits { kv: KvFormat::I8, ..limits };
        let mut memory = vec![Block::ZERO; Plan::new(&config, &halves).state];
        assert_eq!(State::new(&config, &halves, &mut memory).unwrap().compare(&other), Err(Error::State));
    }
}

/// Whatever byte of a snapshot is wrong, it is refused by name and the conversation is what it was.
#[test]
fn a_damaged_snapshot_is_refused() {
    let (packed, prompt) = (pack("window"), prompt("window"));
    let image = packed.image();
    let other = pack("bitrnn_m");
    let way = Way::plain(backend::best());
    let expected = way.logits(&packed, &prompt);
    way.run(&packed, |model, state| {
        model.prefill(state, &prompt[..20]).unwrap();
        let mut bytes = vec![0; state.snapshot_len()];
        state.save(&image, &mut bytes);
        for at in (0..64).chain((64..bytes.len()).step_by(97)) {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            let error = state.restore(&image, &wrong).unwrap_err();
            assert!(matches!(error, bitnet_runtime::Error::Snapshot { .. }), "byte {at}: {error}");
        }
        for length in [0, 1, 63, 64, bytes.len() - 1] {
            assert!(state.restore(&image, &bytes[..length]).is_err());
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(state.restore(&image, &longer).is_err());
        let error = state.restore(&other.image(), &bytes).unwrap_err().to_string();
        assert!(error.contains("image"), "{error}");
        // A head whose checksum is right may still say what cannot be.
        for (at, value) in [(24, u64::MAX), (24, 3), (32, 0), (32, 19), (32, u64::MAX)] {
            let mut wrong = bytes.clone();
            wrong[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let sum = bitnet_runtime::image::checksum(&wrong[..48]);
            wrong[48..56].copy_from_slice(&sum.to_le_bytes());
            assert!(state.restore(&image, &wrong).is_err(), "{at}: {value}");
        }
        assert_eq!(model.step(state, prompt[20]).unwrap(), expected[20]);
    });
}

/// Turns of a conversation of which a session no longer has the first tokens: each reads only what is new, also piece by piece, and
/// answers as a fresh process does; and so does one that begins in another way where nobody can see it any more.
#[test]
fn a_conversation_beyond_the_tokens_that_are_kept_goes_on() {
    let limits = Limits { context: 16, batch: 4, kv: KvFormat::F16 };
    let answer = |session: &mut Session<'_>| generate(session, 7);
    for set in ["bitrnn_m", "bitrnn_v_late", "shared_late", "window", "matmul_free"] {
        let packed = pack(set);
        let fresh = |ids: &[u32]| {
            packed.converse(backend::best(), limits, Sampling::GREEDY, |mut session| {
                assert_eq!(session.prompt(ids).unwrap(), ids.len());
                answer(&mut session)
            })
        };
        packed.converse(backend::best(), limits, Sampling::GREEDY, |mut session| {
            let mut ids: Vec<u32> = (1..40).collect();
            for turn in 0..6 {
                let before = ids.len();
                let mut read = 0;
                for end in [before.saturating_sub(3), before] {
                    read += session.prompt(&ids[..end]).unwrap();
                }
                let new = if turn == 0 { before } else { 6 };
                assert!(read == new || read == new + 1, "{set}: {read} of {before} tokens, {new} of them new");
                let reply = answer(&mut session);
                assert_eq!(reply, fresh(&ids), "{set}, turn {turn}");
                ids.extend(reply);
                ids.extend((0..5).map(|i| 50 + i + turn));
            }
            ids[2] += 1;
            assert_eq!(session.prompt(&ids).unwrap(), ids.len(), "{set}: another beginning");
            assert_eq!(answer(&mut session), fresh(&ids), "{set}: another beginning");
        });
    }
}

/// Replay A-17: the second request, a third with another prompt and one with a shorter prompt answer as a fresh process does.
#[test]
fn requests_one_after_another_answer_as_fresh_ones() {
    let limits = Limits { context: 64, batch: 4, kv: KvFormat::F16 };
    let answer = |session: &mut Session<'_>, prompt: &[u32]| {
        session.prompt(prompt).unwrap();
        generate(session, 20)
    };
    let prompts: [&[u32]; 5] =
        [&[1, 2, 3, 4, 5, 6, 7], &[1, 2, 9, 9], &[1, 2, 3, 4, 5, 6, 7], &[1], &[1, 2, 3, 4, 5, 6, 7]];
    for set in ["bitrnn_m", "bitrnn_v_late", "shared", "window", "matmul_free"] {
        let packed = pack(set);
        let fresh = prompts
            .map(|prompt| packed.converse(backend::best(), limits, Sampling::GREEDY, |mut s| answer(&mut s, prompt)));
        packed.converse(backend::best(), limits, Sampling::GREEDY, |mut session| {
            for (prompt, fresh) in prompts.iter().zip(&fresh) {
                assert_eq!(answer(&mut session, prompt), *fresh, "{set}: {prompt:?}");
            }
        });
        assert_ne!(fresh[0], fresh[1], "{set}");
    }
}
