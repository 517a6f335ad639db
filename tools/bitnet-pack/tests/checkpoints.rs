//! Checkpoints that must be packed, and into exactly what.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Error, Options, Progress, pack, verify};
use bitnet_runtime::Image;
use bitnet_runtime::image::Kind;
use common::{Checkpoint, Place, SMALL, Shape, Storage, Tensor, named, pack_rows, rows, section, stories};
use serde_json::json;

fn floats(image: &[u8], kind: Kind) -> Vec<f32> {
    let (record, bytes) = section(image, kind, None);
    let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    values.take(record.cols.get() as usize).collect()
}

/// A query of eight rows and four columns, as in the published example; six rows in gate and up, no multiple of four.
const EIGHT_BY_FOUR: Shape = Shape { vocab: 3, hidden: 4, ffn: 6, layers: 1, heads: 2, kv_heads: 1, head_dim: 4 };

/// the packing of transformers, given as bytes, and what they stand for. A converter that takes bytes as int8 weights
/// or planes along the input gets other rows.
#[test]
fn four_rows_a_byte() {
    let golden = [0x68, 0x99, 0x92, 0x62, 0x85, 0x09, 0x95, 0x12];
    let expected: Vec<Vec<i8>> = [
        [-1, 0, 1, 1],
        [0, 0, 0, 1],
        [1, 1, -1, -1],
        [0, 1, 0, -1],
        [1, 0, 0, 1],
        [-1, -1, 0, 0],
        [0, 1, 1, 0],
        [1, -1, 1, -1],
    ]
    .map(Vec::from)
    .into();
    assert_eq!(pack_rows(&expected), golden);
    for format in [Format::TL, Format::T2, Format::I8, Format::I4] {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(EIGHT_BY_FOUR, Storage::Multiply);
        checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").data = golden.into();
        checkpoint.write(&place.source());
        let image = place.pack(&Options { format, ..named() });
        assert_eq!(rows(&image, Kind::Query, Some(0)), expected, "{}", format.name());
    }
}

/// Six rows are packed as two byte rows of three planes; the fourth plane belongs to no row, and codes there, even invalid
/// ones, do not matter.
#[test]
fn rows_that_are_no_multiple_of_four() {
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(EIGHT_BY_FOUR, Storage::Divide);
    let gate = checkpoint.tensor("model.layers.0.mlp.gate_proj.weight");
    assert_eq!(gate.shape, [2, 4]);
    let codes = |r: usize, c: usize| (gate.data[r % 2 * 4 + c] >> (2 * (r / 2)) & 3) as i8 - 1;
    let expected: Vec<Vec<i8>> = (0..6).map(|r| (0..4).map(|c| codes(r, c)).collect()).collect();
    gate.data.iter_mut().for_each(|b| *b |= 0xc0);
    checkpoint.write(&place.source());
    assert_eq!(rows(&place.pack(&named()), Kind::Gate, Some(0)), expected);
}

/// `y = (x · T) · s` and `y = (x · T) / (1 / s)` are the same model: the images are equal to the byte.
#[test]
fn scales_that_multiply_and_divide() {
    let images = [Storage::Multiply, Storage::Divide].map(|storage| {
        let place = Place::new();
        Checkpoint::new(SMALL, storage).write(&place.source());
        place.pack(&named())
    });
    assert!(images[0] == images[1]);
    let (record, _) = section(&images[0], Kind::Down, Some(1));
    assert_eq!(record.scale.get(), 0.5);
}

/// Masters of -0.5, 0 and 0.5 ternarize to the codes they were made from, in every float type.
#[test]
fn masters_in_every_float_type() {
    let place = Place::new();
    Checkpoint::new(EIGHT_BY_FOUR, Storage::Multiply).write(&place.source());
    let expected = rows(&place.pack(&named()), Kind::Query, Some(0));
    for dtype in ["BF16", "F16", "F32"] {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(EIGHT_BY_FOUR, Storage::Online);
        for tensor in checkpoint.tensors.iter_mut().filter(|t| t.dtype == "BF16") {
            let values = tensor.data.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]));
            tensor.data = match dtype {
                "F16" => values.flat_map(|v| half::f16::from_f32(v.to_f32()).to_le_bytes()).collect(),
                "F32" => values.flat_map(|v| v.to_f32().to_le_bytes()).collect(),
                _ => continue,
            };
            tensor.dtype = dtype;
        }
        checkpoint.write(&place.source());
        assert_eq!(rows(&place.pack(&named()), Kind::Query, Some(0)), expected, "{dtype}");
    }
}

/// The head is the embedding by the key, by the tensors, or is not.
#[test]
fn tied_and_untied() {
    let other = vec![0.25; (SMALL.vocab * SMALL.hidden) as usize];
    let shape = [SMALL.vocab, SMALL.hidden];
    // tie_word_embeddings, lm_head ("same", "other" or none), tied in the image, what the report says.
    let cases = [
        (Some(true), "", true, "by tie_word_embeddings"),
        (Some(true), "same", true, "is equal"),
        (Some(true), "other", true, "is DIFFERENT"),
        (None, "", true, "there is no lm_head.weight and no tie_word_embeddings"),
        (None, "other", false, "there is no tie_word_embeddings"),
        (Some(false), "other", false, "head: lm_head.weight"),
    ];
    for (tie, head, tied, note) in cases {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(SMALL, Storage::Multiply);
        checkpoint.set("tie_word_embeddings", json!(tie));
        let embedding = checkpoint.tensor("model.embed_tokens.weight").clone();
        match head {
            "same" => checkpoint.tensors.push(Tensor { name: "lm_head.weight".into(), ..embedding }),
            "other" => checkpoint.tensors.push(Tensor::f32("lm_head.weight", &shape, &other)),
            _ => {}
        }
        checkpoint.write(&place.source());
        let report = pack(&place.source(), &place.image(), &named(), &mut ()).unwrap();
        assert!(report.notes.iter().any(|n| n.contains(note)), "{tie:?} {head}: {:?}", report.notes);
        let image = std::fs::read(place.image()).unwrap();
        let checked = Image::check(&image, image.len() as u64).unwrap();
        assert_eq!(checked.header().config.tied, tied, "{tie:?} {head}");
        assert_eq!(checked.sections().find(Kind::Embedding, None).is_some(), !tied);
        let (_, bytes) = section(&image, Kind::Head, None);
        // 0.25 in every place is code 127; a tied head has the embedding's rows.
        assert_eq!(bytes[0] == 127 && bytes[1] == 127, !tied, "{tie:?} {head}");
    }
}

/// The same tensors in one file, in shards and in reverse order give the same image.
#[test]
fn shards_equal_one_file() {
    let checkpoint = Checkpoint::new(SMALL, Storage::Divide);
    let single = Place::new();
    checkpoint.write(&single.source());
    let expected = single.pack(&named());
    for shards in [1, 2, 5] {
        let place = Place::new();
        checkpoint.write_sharded(&place.source(), shards);
        assert!(place.pack(&named()) == expected, "{shards} shards");
    }
    let place = Place::new();
    let mut reversed = checkpoint;
    reversed.tensors.reverse();
    reversed.write(&place.source());
    assert!(place.pack(&named()) == expected, "reversed");
}

/// Nothing of when and where gets into an image.
#[test]
fn packing_twice_gives_the_same_bytes() {
    let images = [0, 1].map(|_| {
        let place = Place::new();
        let report = pack(&stories(), &place.image(), &Options::default(), &mut ()).unwrap();
        assert_eq!(report.name, "stories-ternary");
        std::fs::read(place.image()).unwrap()
    });
    assert!(images[0] == images[1]);
}

/// All formats pass `verify`, with shapes that are no multiple of anything.
#[test]
fn every_format_is_verified() {
    for format in [Format::TL, Format::T2, Format::I4, Format::I8] {
        for head in [Format::I8, Format::I4, Format::F16] {
            let place = Place::new();
            Checkpoint::new(SMALL, Storage::Online).write(&place.source());
            place.pack(&Options { format, head, ..named() });
            let verified = verify(&place.image()).unwrap();
            assert_eq!(verified.sections, 2 + 2 * 11 + 1);
        }
    }
}

/// The scaling of Llama 3.1 as published: wavelengths above 8192 / 1 are stretched by 8, below 8192 / 4 kept, and blended
/// between. The three numbers written out were computed with 50 digits.
#[test]
fn llama3_frequencies() {
    let (theta, factor, low, high, original) = (500_000f64, 8f64, 1f64, 4f64, 8192f64);
    let place = Place::new();
    let shape = Shape { vocab: 3, hidden: 8, ffn: 8, layers: 1, heads: 1, kv_heads: 1, head_dim: 128 };
    let mut checkpoint = Checkpoint::new(shape, Storage::Multiply);
    checkpoint.set("rope_theta", json!(theta));
    checkpoint.set(
        "rope_scaling",
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
               "original_max_position_embeddings": original}),
    );
    checkpoint.write(&place.source());
    let image = place.pack(&named());
    let found = floats(&image, Kind::RopeFrequencies);
    assert_eq!(found.len(), 64);
    let (mut kept, mut blended, mut stretched) = (0, 0, 0);
    for (i, &found) in found.iter().enumerate() {
        let plain = theta.powf(-(i as f64) / 64.0);
        let turns = original * plain / std::f64::consts::TAU;
        let expected = if turns > high {
            kept += 1;
            plain
        } else if turns < low {
            stretched += 1;
            plain / factor
        } else {
            blended += 1;
            let smooth = (turns - low) / (high - low);
            plain * ((1.0 - smooth) / factor + smooth)
        };
        assert!((f64::from(found) / expected - 1.0).abs() < 2e-6, "{i}: {found} {expected}");
    }
    assert_eq!((kept, blended, stretched), (29, 6, 29));
    for (i, expected) in [(0, 1.0), (32, 0.000_524_846_160_992_954_7), (63, 3.068_925_988_914_511e-7)] {
        assert!((f64::from(found[i]) / expected - 1.0).abs() < 2e-6, "{i}: {}", found[i]);
    }
}

/// Without scaling, and with the linear kind.
#[test]
fn plain_and_linear_frequencies() {
    for (scaling, divisor) in [(json!(null), 1.0), (json!({"type": "linear", "factor": 4.0}), 4.0)] {
        let place = Place::new();
        let mut checkpoint = Checkpoint::new(SMALL, Storage::Multiply);
        checkpoint.set("rope_scaling", scaling);
        checkpoint.write(&place.source());
        for (i, found) in floats(&place.pack(&named()), Kind::RopeFrequencies).into_iter().enumerate() {
            let expected = 10_000f64.powf(-(i as f64) / 9.0) / divisor;
            assert!((f64::from(found) / expected - 1.0).abs() < 1e-6, "{i}: {found} {expected}");
        }
    }
}

/// Stops after some bytes.
struct Stop {
    after: u64,
    done: u64,
}

impl Progress for Stop {
    fn advance(&mut self, bytes: u64) {
        self.done += bytes;
    }
    fn cancelled(&self) -> bool {
        self.done >= self.after
    }
}

/// ended at the first section, in the middle, at the last one and while the result is verified, nothing is left, and
/// what was there before stays.
#[test]
fn interrupted_packing_leaves_nothing() {
    for after in [0, 1, 8_000, 15_000, 20_000, 25_000] {
        let place = Place::new();
        Checkpoint::new(SMALL, Storage::Multiply).write(&place.source());
        let error = place.refused(&format!("after {after}"), &named(), &mut Stop { after, done: 0 });
        assert!(matches!(error, Error::Interrupted), "{error}");
    }
    let place = Place::new();
    Checkpoint::new(SMALL, Storage::Multiply).write(&place.source());
    let before = place.pack(&named());
    let other = Options { format: Format::I8, ..named() };
    pack(&place.source(), &place.image(), &other, &mut Stop { after: 8_000, done: 0 }).unwrap_err();
    assert!(std::fs::read(place.image()).unwrap() == before, "the older image stays");
    assert_eq!(place.left(), ["image.bitnet"]);
}
