//! Plans: sizes that boards put into statics, and limits that keep them from overflowing.
use bitnet_kernel::{Block, Format};
use bitnet_runtime::error::ImageError;
use bitnet_runtime::memory::{KvFormat, read_bytes};
use bitnet_runtime::model::{Activation, Quantizers, Rope, Window};
use bitnet_runtime::{Config, Limits, Plan};

const CONFIG: Config = Config {
    vocab: 128_256,
    hidden: 2_560,
    ffn: 6_912,
    layers: 30,
    heads: 20,
    kv_heads: 5,
    head_dim: 128,
    context: 4_096,
    norm_eps: 1e-5,
    activation: Activation::SquaredRelu,
    rope: Rope::HalfSplit,
    sub_norms: true,
    qk_norms: false,
    linear_norm_eps: None,
    live_ffn: false,
    sparse: false,
    window: None,
    memory: None,
    delayed_writes: false,
    recurrence: false,
    quantizers: Quantizers::INT8,
    tied: true,
    linear_head: false,
    split_head: false,
    formats: 1 << Format::TL as u8,
};
/// The shape of MMfreeLM-2.7B.
const RECURRENT: Config = Config {
    vocab: 32_000,
    layers: 32,
    heads: 1,
    kv_heads: 1,
    head_dim: 2_560,
    sub_norms: false,
    linear_norm_eps: Some(1e-6),
    recurrence: true,
    tied: false,
    linear_head: true,
    ..CONFIG
};
const LIMITS: Limits = Limits { context: 64, batch: 1, kv: KvFormat::F16 };

/// As a board would: the plan sizes a static.
static STATE: [Block; Plan::new(&CONFIG, &LIMITS).state] = [Block::ZERO; Plan::new(&CONFIG, &LIMITS).state];

#[test]
fn a_plan_sizes_a_static() {
    // Keys and values, 30 layers, 5 heads of 128, 64 positions, two bytes each.
    assert_eq!(size_of_val(&STATE), 2 * 30 * 5 * 128 * 64 * 2);
}

#[test]
fn the_cache_has_the_size_of_its_format() {
    let state = |kv| Plan::new(&CONFIG, &Limits { kv, context: 4_096, ..LIMITS }).state * Block::BYTES;
    // 76.8 kB a position in half precision.
    assert_eq!(state(KvFormat::F16), 76_800 * 4_096);
    assert_eq!(state(KvFormat::F32), 2 * state(KvFormat::F16));
    // A byte an element, and four for each head and position.
    assert_eq!(state(KvFormat::I8), 76_800 / 2 * 4_096 + 2 * 30 * 5 * 4 * 4_096);
}

/// What a token reads of a conversation: all positions before it, or those of a window, or a state alone.
#[test]
fn a_token_reads_what_attention_sees() {
    let window = Config { window: Some(Window { positions: 60, sinks: 4 }), ..CONFIG };
    for (positions, seen) in [(0, 1), (63, 64), (64, 64), (1 << 40, 64)] {
        assert_eq!(read_bytes(&window, &LIMITS, positions), 76_800 * seen);
    }
    assert_eq!(read_bytes(&CONFIG, &LIMITS, 31_999), 76_800 * 32_000);
    let int8 = Limits { kv: KvFormat::I8, ..LIMITS };
    assert_eq!(read_bytes(&CONFIG, &int8, 9), 10 * (76_800 / 2 + 2 * 30 * 5 * 4));
    assert_eq!(read_bytes(&RECURRENT, &LIMITS, 1 << 40), 320 << 10);
}

/// Two copies of 320 KiB, whatever the context, the batch and the format of keys and values.
#[test]
fn a_recurrence_has_one_size() {
    for (context, batch, kv) in [(1, 1, KvFormat::F32), (4_096, 16, KvFormat::I8)] {
        let plan = Plan::new(&RECURRENT, &Limits { context, batch, kv });
        assert_eq!(plan.state * Block::BYTES, 2 * 320 * 1024);
    }
}

#[test]
fn memory_grows_with_the_batch_and_the_formats() {
    let plan = |batch, formats| Plan::new(&Config { formats, ..CONFIG }, &Limits { batch, ..LIMITS }).scratch;
    let (t2, tl, b1) = (1 << Format::T2 as u8, 1 << Format::TL as u8, 1 << Format::B1 as u8);
    assert!(plan(8, tl) > 2 * plan(1, tl));
    assert_eq!(plan(1, tl) - plan(1, t2), Format::TL.table_blocks(6_912));
    assert_eq!(plan(1, tl | b1), plan(1, tl), "one table serves one format at a time");
}

/// A sum, an estimate and a bound for each row, whole units.
#[test]
fn a_head_in_two_planes_needs_twelve_bytes_a_token() {
    let plan = |split_head, vocab| Plan::new(&Config { split_head, vocab, ..CONFIG }, &LIMITS).scratch * Block::BYTES;
    for (vocab, padded) in [(128_256, 128_256), (65, 128)] {
        assert_eq!(plan(true, vocab) - plan(false, vocab), 12 * padded);
    }
}

#[test]
fn every_field_has_its_limits() {
    CONFIG.check().unwrap();
    let wrong: [(&str, Config); 19] = [
        ("vocab", Config { vocab: 0, ..CONFIG }),
        ("vocab", Config { vocab: u32::MAX, ..CONFIG }),
        ("hidden", Config { hidden: 65_537, ..CONFIG }),
        ("ffn", Config { ffn: 0, ..CONFIG }),
        ("layers", Config { layers: 513, ..CONFIG }),
        ("kv_heads", Config { kv_heads: 3, ..CONFIG }),
        ("kv_heads", Config { kv_heads: 0, ..CONFIG }),
        ("head_dim", Config { head_dim: 127, ..CONFIG }),
        ("head_dim", Config { head_dim: 514, ..CONFIG }),
        ("heads * head_dim", Config { heads: 65_535, kv_heads: 1, ..CONFIG }),
        ("context", Config { context: u32::MAX, ..CONFIG }),
        ("norm_eps", Config { norm_eps: f32::NAN, ..CONFIG }),
        ("linear_norm_eps", Config { linear_norm_eps: Some(-1.0), ..CONFIG }),
        ("formats", Config { formats: 1 << 15, ..CONFIG }),
        ("heads", Config { heads: 20, ..RECURRENT }),
        ("head_dim", Config { head_dim: 128, ..RECURRENT }),
        ("recurrence", Config { sub_norms: true, ..RECURRENT }),
        ("recurrence", Config { window: Some(Window { positions: 8, sinks: 1 }), ..RECURRENT }),
        ("linear_head", Config { linear_head: true, ..CONFIG }),
    ];
    for (name, config) in wrong {
        match config.check() {
            Err(ImageError::Config { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// The largest sizes that pass the check overflow nothing.
#[test]
fn the_largest_model_has_a_plan() {
    let w = Config::WIDTH_MAX;
    let config = Config {
        vocab: Config::VOCAB_MAX,
        hidden: w,
        ffn: w,
        layers: Config::LAYERS_MAX,
        heads: w / 512,
        kv_heads: w / 512,
        head_dim: 512,
        context: Config::CONTEXT_MAX,
        ..CONFIG
    };
    config.check().unwrap();
    let limits = Limits { context: config.context, batch: Limits::BATCH_MAX, kv: KvFormat::F32 };
    limits.check(&config).unwrap();
    let plan = Plan::new(&config, &limits);
    assert_eq!(
        plan.state as u64 * 64,
        2 * 4 * u64::from(Config::LAYERS_MAX) * u64::from(w) * u64::from(Config::CONTEXT_MAX)
    );
}
