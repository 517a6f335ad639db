//! What would be written, told without writing it; and linears that should be ternary and are not.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Options, Report, pack, plan};
use common::gguf::{Gguf, Q8_0};
use common::{Checkpoint, Place, SMALL, Storage, assert_says, named, stories};
use half::f16;
use std::process::Command;

/// What both reports say of sections, without what is known only once the weights are read.
fn sections(report: &Report) -> Vec<(bitnet_runtime::image::Kind, Option<u32>, u64)> {
    report.sections.iter().map(|s| (s.kind, s.layer, s.bytes)).collect()
}

#[test]
fn a_plan_is_what_packing_does() {
    for options in [
        named(),
        Options { format: Format::T2, head: Format::F16, context: Some(100), ..named() },
        Options { split_head: true, ..named() },
        Options { live_ffn: true, ..named() },
    ] {
        let place = Place::new();
        let planned = plan(&stories(), &options, &mut ()).unwrap();
        assert!(place.left().is_empty());
        let packed = pack(&stories(), &place.image(), &options, &mut ()).unwrap();
        assert_eq!(sections(&planned), sections(&packed));
        assert_eq!((planned.image_bytes, &planned.layers), (packed.image_bytes, &packed.layers));
        assert_eq!((planned.peak_bytes, planned.state_bytes()), (packed.peak_bytes, packed.state_bytes()));
        assert_eq!(planned.config, packed.config);
    }
    let report = plan(&stories(), &named(), &mut ()).unwrap();
    // The image but for its tokenizer, its header and the padding between them.
    let weights: u64 = report.sections.iter().skip(1).map(|s| s.bytes).sum();
    assert_eq!(report.token_bytes(), weights);
    let (first, last) = report.decode_rate(1e9);
    assert_eq!(first, 1e9 / weights as f64);
    // 512 positions of 4 layers, keys and values of 2 heads of 64 in half precision.
    assert!(report.state_bytes() >= 512 * 4 * 2 * 128 * 2 && last < first / 2.0, "{} {last}", report.state_bytes());
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = Place::new();
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet-pack"));
        let output = command.arg("pack").arg(stories()).args(arguments).current_dir(place.out()).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let (code, text, _) = run(&["--dry-run", "--bandwidth", "10", "-o", "never.bitnet"]);
    assert_eq!(code, Some(0));
    assert_says("pack", &text, &["linears: 2.4 M weights", "tokens/s at 10 GB/s", "running: ", "nothing was written"]);
    assert_eq!(run(&["--dry-run"]).0, Some(0));
    assert!(place.left().is_empty());
    for wrong in
        [&["--bandwidth", "10", "-o", "x"][..], &["--dry-run", "--bandwidth", "0"], &["--dry-run", "--bits", "i4"], &[]]
    {
        assert_eq!(run(wrong).0, Some(2), "{wrong:?}");
    }
}

/// Masters with nearly all energy in one weight of a thousand.
#[test]
fn masters_far_from_ternary_need_a_word() {
    let place = Place::new();
    let mut checkpoint = Checkpoint::new(SMALL, Storage::Online);
    let tensor = checkpoint.tensor("model.layers.1.mlp.up_proj.weight");
    for (i, pair) in tensor.data.chunks_exact_mut(2).enumerate() {
        let value = if i % 1000 == 7 { 100.0 } else { 0.01 * (i % 3) as f32 };
        pair.copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
    }
    checkpoint.write(&place.source());
    let error = pack(&place.source(), &place.image(), &named(), &mut ()).unwrap_err().to_string();
    assert_says("pack", &error, &["layers.1.mlp.up_proj", "not ternary, and 100% from it", "--lossy"]);
    assert!(place.left().is_empty());
    let report = pack(&place.source(), &place.image(), &Options { lossy: true, ..named() }, &mut ()).unwrap();
    let distance = report.sections.iter().filter_map(|s| s.distance).fold(0.0, f32::max);
    assert!(distance > 0.99, "{distance}");
}

/// A file of a BitNet architecture with numbers in blocks that are not ternary.
#[test]
fn a_bitnet_of_other_numbers_needs_a_word() {
    let mut gguf = Gguf::model("bitnet-b1.58");
    let tensor = gguf.tensor("blk.0.attn_v.weight");
    let values = tensor.dimensions.iter().product::<u64>() as usize;
    let blocks = (0..values / 32).flat_map(|b| {
        let scale = f16::from_f32(0.01 + b as f32 / 1e4).to_le_bytes();
        scale.into_iter().chain((0..32).map(|i| (i * 5 % 63) as u8))
    });
    (tensor.tag, tensor.data) = (Q8_0, blocks.collect());
    let place = Place::new();
    place.put("model.gguf", gguf.bytes());
    let source = place.source().join("model.gguf");
    let error = pack(&source, &place.image(), &named(), &mut ()).unwrap_err().to_string();
    assert_says("pack", &error, &["blk.0.attn_v.weight", "not ternary, and ", "--lossy keeps it as --dense i8"]);
    let options = Options { lossy: true, ..named() };
    let report = pack(&source, &place.image(), &options, &mut ()).unwrap();
    assert_says("pack", &report.to_string(), &["1 linears are not ternary and become i8"]);
}
