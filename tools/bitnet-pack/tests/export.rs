//! Images as GGUF files: packed again they give the ternary weights, the scales and the text that they had; and `diff`, which
//! tells so.
mod common;

use bitnet_kernel::{BlockShape, Format};
use bitnet_pack::export::Ternary;
use bitnet_pack::{Layouts, Options, diff, export, pack};
use bitnet_runtime::Image;
use bitnet_runtime::image::Kind;
use common::{Checkpoint, Place, Shape, Storage, assert_says, named, section, stories};
use kitoken::Kitoken;
use std::path::Path;

/// Packs `source`, exports the image and packs that; returns both images' bytes and what differs.
fn round_trip(place: &Place, options: &Options, ternary: Ternary) -> (Vec<u8>, Vec<u8>, bitnet_pack::Difference) {
    let [a, b] = ["a.bitnet", "b.bitnet"].map(|name| place.out().join(name));
    let gguf = place.out().join("model.gguf");
    pack(&place.source(), &a, options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    let exported = export(&a, &gguf, ternary, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(exported.bytes, gguf.metadata().unwrap().len());
    pack(&gguf, &b, options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
    let difference = diff(&a, &b).unwrap();
    (std::fs::read(a).unwrap(), std::fs::read(b).unwrap(), difference)
}

/// Widths that are and are not whole blocks of 256 and of 32.
const SHAPES: [(Shape, bool); 3] = [
    (Shape { vocab: 40, hidden: 256, ffn: 512, layers: 2, heads: 4, kv_heads: 2, head_dim: 64 }, true),
    (Shape { vocab: 40, hidden: 96, ffn: 64, layers: 1, heads: 2, kv_heads: 1, head_dim: 48 }, true),
    (common::SMALL, false),
];

#[test]
fn ternary_weights_come_back_bit_for_bit() {
    for (shape, blocks) in SHAPES {
        for (ternary, format) in [(Ternary::Two, Format::TL), (Ternary::Five, Format::T2)] {
            let place = Place::new();
            let mut checkpoint = Checkpoint::new(shape, Storage::Divide);
            // No power of two: a scale that half precision does not hold.
            for t in checkpoint.tensors.iter_mut().filter(|t| t.name.ends_with("weight_scale")) {
                t.data = 2.7182817f32.to_le_bytes().into();
            }
            checkpoint.write(&place.source());
            let head = if blocks { Format::I8 } else { Format::F16 };
            let (a, b, difference) = round_trip(&place, &Options { format, head, ..named() }, ternary);
            let linears = [Kind::Query, Kind::Key, Kind::Value, Kind::Output, Kind::Gate, Kind::Up, Kind::Down];
            for kind in linears {
                let ((left, bytes), (right, again)) = (section(&a, kind, Some(0)), section(&b, kind, Some(0)));
                assert_eq!(left.scale, right.scale, "{kind:?}");
                assert_eq!(bytes, again, "{kind:?}");
            }
            // The head alone may differ, by its scales.
            let differing: Vec<&str> = difference.sections.iter().map(|s| s.kind).collect();
            assert!(differing == [""; 0] || differing == ["head"], "{difference}");
            for s in &difference.sections {
                assert_eq!(s.differing, 0, "{difference}");
                assert!(s.scale_difference > 0.0 && s.scale_difference < 1.0 / 2048.0, "{difference}");
            }
            let fields: Vec<&str> = difference.fields.iter().map(|f| &*f.name).collect();
            // GGUF files of this architecture get the template that it needs.
            assert_eq!(fields, ["architecture", "text.chat_template"], "{difference}");
        }
    }
}

/// A checkpoint in which neurons of the feed-forward layer are zero, and all but a few blocks of queries and keys.
fn pruned(place: &Place) {
    let shape = Shape { vocab: 40, hidden: 256, ffn: 320, layers: 2, heads: 4, kv_heads: 2, head_dim: 64 };
    let mut checkpoint = Checkpoint::new(shape, Storage::Multiply);
    let mut codes = common::Codes::new();
    for layer in 0..2 {
        let mut zero = |part: &str, rows: u64, cols: u64, keep: fn(usize, usize) -> bool| {
            let name = format!("model.layers.{layer}.{part}.weight");
            let mut weights = codes.rows(rows, cols);
            for (r, row) in weights.iter_mut().enumerate() {
                row.iter_mut().enumerate().filter(|(c, _)| !keep(r, *c)).for_each(|(_, w)| *w = 0);
            }
            *checkpoint.tensor(&name) = common::Tensor::packed(&name, &weights);
        };
        zero("mlp.gate_proj", 320, 256, |r, _| r % 3 == 0);
        zero("mlp.up_proj", 320, 256, |r, _| r % 3 == 0);
        zero("mlp.down_proj", 256, 320, |_, c| c % 3 == 0);
        zero("self_attn.q_proj", 256, 256, |r, c| (r / 16 + c / 64) % 4 == 1);
        zero("self_attn.k_proj", 128, 256, |r, c| (r / 16 + c / 16) % 5 == 2);
    }
    checkpoint.write(&place.source());
}

/// Whatever the layout, the file has the whole linears, and `diff` compares these.
#[test]
fn zeros_that_were_left_out_come_back() {
    let place = Place::new();
    pruned(&place);
    let whole = place.out().join("whole.bitnet");
    pack(&place.source(), &whole, &Options { layout: Layouts::Whole, ..named() }, &mut ()).unwrap();
    for (format, layout, expected) in [
        (Format::TL, Layouts::Auto, &["kept", "starts"][..]),
        (Format::I8, Layouts::Kept, &["kept"]),
        (Format::TL, Layouts::Blocks(BlockShape::Wide), &["starts"]),
        (Format::TL, Layouts::Blocks(BlockShape::Square), &["starts"]),
    ] {
        let (a, gguf, b) = (place.image(), place.out().join("model.gguf"), place.out().join("b.bitnet"));
        pack(&place.source(), &a, &Options { format, layout, ..named() }, &mut ()).unwrap();
        let difference = diff(&a, &whole).unwrap();
        for s in &difference.sections {
            assert!(s.differing == 0 && s.value_difference == 0.0, "{layout:?}: {difference}");
            let is_linear = s.weights.is_some();
            assert!(is_linear || s.kind.ends_with("_index"), "{layout:?}: {difference}");
        }
        for name in expected {
            let has = |s: &bitnet_pack::SectionDifference| s.a.as_ref().is_some_and(|a| a.starts_with(name));
            assert!(difference.sections.iter().any(has), "{layout:?}: no {name}: {difference}");
        }
        export(&a, &gguf, Ternary::Two, &mut ()).unwrap();
        pack(&gguf, &b, &Options { layout: Layouts::Whole, ..named() }, &mut ()).unwrap();
        let difference = diff(&whole, &b).unwrap();
        let differing: Vec<&str> = difference.sections.iter().map(|s| s.kind).collect();
        assert_eq!(differing, ["head"], "{layout:?}: {difference}");
        assert_eq!(difference.sections[0].differing, 0, "{layout:?}");
    }
    // Two images of one layout, of which one row more is zero.
    let (a, b) = (place.image(), place.out().join("b.bitnet"));
    let kept = Options { layout: Layouts::Kept, ..named() };
    pack(&place.source(), &a, &kept, &mut ()).unwrap();
    let other = Place::new();
    std::fs::copy(place.source().join("config.json"), other.source().join("config.json")).unwrap();
    let mut bytes = std::fs::read(place.source().join("model.safetensors")).unwrap();
    let name = b"layers.1.mlp.up_proj.weight\"";
    let header = bytes.windows(name.len()).position(|w| w == name).unwrap();
    let text = String::from_utf8_lossy(&bytes[header..header + 200]).into_owned();
    let offset = text.split("data_offsets\":[").nth(1).unwrap().split(',').next().unwrap().parse::<usize>().unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + offset;
    // Byte row 3 has the rows 3, 83, 163 and 243: the first and the last are kept.
    let changed: u64 = bytes[data + 3 * 256..data + 4 * 256].iter().map(|b| u64::from(b & 3 != 1)).sum();
    bytes[data + 3 * 256..data + 4 * 256].iter_mut().for_each(|b| *b = *b & !3 | 1);
    std::fs::write(other.source().join("model.safetensors"), bytes).unwrap();
    pack(&other.source(), &b, &kept, &mut ()).unwrap();
    let difference = diff(&a, &b).unwrap();
    let found: Vec<_> = difference.sections.iter().map(|s| (s.kind, s.layer, s.differing)).collect();
    assert_eq!(found, [("up_index", Some(1), 0), ("up", Some(1), changed)], "{difference}");
}

/// The bundled model, tokenizer included.
#[test]
fn the_bundled_model_comes_back() {
    let place = Place::new();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(stories().join(name), place.source().join(name)).unwrap();
    }
    let options = Options { head: Format::F16, ..named() };
    let (a, b, difference) = round_trip(&place, &options, Ternary::Two);
    let weights: Vec<_> = difference.sections.iter().filter(|s| s.kind != "tokenizer").collect();
    // The masters' scales are what the packer found; everything else is as it was.
    assert!(weights.iter().all(|s| s.differing == 0 && s.scale_difference == 0.0), "{difference}");
    let tokenizer = |image: &[u8]| {
        let (record, bytes) = section(image, Kind::Tokenizer, None);
        Kitoken::from_slice(&bytes[..record.cols.get() as usize]).unwrap()
    };
    // No template of another model's, whose tokens it has not.
    let template =
        |image: &[u8]| Image::check(image, image.len() as u64).unwrap().header().text.chat_template.to_owned();
    assert_eq!((template(&a), template(&b)), (String::new(), String::new()));
    let (before, after) = (tokenizer(&a), tokenizer(&b));
    for text in ["Once upon a time", "  two  spaces", "\u{e9}\u{1f600}\n\t3333+777", "", "Lily's \"dog\""] {
        let ids = before.encode(text, false).unwrap();
        assert_eq!(ids, after.encode(text, false).unwrap(), "{text:?}");
        assert_eq!(before.decode(&ids, false).unwrap(), after.decode(&ids, false).unwrap(), "{text:?}");
    }
}

#[test]
fn differences_are_counted() {
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(common::SMALL, Storage::Multiply);
    checkpoint.write(&place.source());
    let [a, b] = ["a", "b"].map(|name| place.out().join(name));
    pack(&place.source(), &a, &named(), &mut ()).unwrap();
    assert!(diff(&a, &a).unwrap().is_none());
    // One byte has four weights; 0 -> 0, 1, 2, 0 in its four rows.
    let key = checkpoint.tensor("model.layers.1.self_attn.k_proj.weight");
    let before = key.data[5];
    key.data[5] = 0b0101_0101;
    let changed = (0..4).filter(|i| before >> (2 * i) & 3 != 1).count() as u64;
    let scale = checkpoint.tensor("model.layers.0.mlp.down_proj.weight_scale");
    scale.data = 0.75f32.to_le_bytes().into();
    checkpoint.set("max_position_embeddings", 65.into());
    checkpoint.write(&place.source());
    pack(&place.source(), &b, &Options { head: Format::F16, ..named() }, &mut ()).unwrap();
    let difference = diff(&a, &b).unwrap();
    let find = |kind: &str| difference.sections.iter().find(|s| s.kind == kind).unwrap_or_else(|| panic!("{kind}"));
    assert_eq!((find("key").layer, find("key").differing), (Some(1), changed.min(find("key").weights.unwrap())));
    assert_eq!(find("down").differing, 0);
    assert!((find("down").scale_difference - 1.0 / 3.0).abs() < 1e-6);
    assert_eq!(find("down").value_difference, 0.25);
    let text = difference.to_string();
    assert_says("diff", &text, &["config.context: 64 | 65", "head: i8 41x36 | f16 41x36", "layer 1 key"]);
    assert_eq!(difference.to_json()["sections"].as_array().unwrap().len(), difference.sections.len());
}

#[test]
fn what_gguf_has_not_is_refused() {
    for (options, expected) in
        [(Options { split_head: true, ..named() }, "two planes"), (Options { live_ffn: true, ..named() }, "--live-ffn")]
    {
        let place = Place::new();
        Checkpoint::new(common::SMALL, Storage::Multiply).write(&place.source());
        pack(&place.source(), &place.image(), &options, &mut ()).unwrap();
        let output = place.out().join("model.gguf");
        let error = export(&place.image(), &output, Ternary::Two, &mut ()).unwrap_err().to_string();
        assert_says("export", &error, &[expected]);
        assert!(!output.exists());
    }
    // Models of blocks that GGUF's architectures have not.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let coarse = Place::new();
    let mut checkpoint = Checkpoint::new(common::SMALL, Storage::Multiply);
    checkpoint.set("activation_quantization", serde_json::json!({"attention": "int4"}));
    checkpoint.write(&coarse.source());
    for (source, expected) in
        [(golden.join("bitrnn_m"), "a memory"), (golden.join("window"), "a window"), (coarse.source(), "four bits")]
    {
        let place = Place::new();
        pack(&source, &place.image(), &named(), &mut ()).unwrap();
        let output = place.out().join("model.gguf");
        let error = export(&place.image(), &output, Ternary::Two, &mut ()).unwrap_err().to_string();
        assert_says("export", &error, &[expected]);
        assert!(!output.exists());
    }
    let place = Place::new();
    Checkpoint::new(common::SMALL, Storage::Multiply).write(&place.source());
    pack(&place.source(), &place.image(), &named(), &mut ()).unwrap();
    let error = export(&place.image(), &place.image(), Ternary::Two, &mut ()).unwrap_err().to_string();
    assert_says("export", &error, &["is not a GGUF file"]);
}
