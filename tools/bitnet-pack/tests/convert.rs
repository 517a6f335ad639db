//! `bitnet-pack convert --to-tbha`: what becomes of a checkpoint's values, that nothing else changes, and what is refused.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Hybrid, Options, convert_values, pack};
use bitnet_runtime::Image;
use bitnet_runtime::image::{Encoding, Kind, Section, expected_sections};
use common::{Checkpoint, Place, SMALL, Storage, Tensor, assert_says, section, stories};
use serde_json::json;
use std::path::Path;

fn hybrid() -> Hybrid {
    Hybrid { text: Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/stories.txt"), tokenizer: None }
}

fn image(place: &Place, source: &Path) -> Vec<u8> {
    pack(source, &place.image(), &Options::default(), &mut ()).unwrap_or_else(|e| panic!("{e}"));
    std::fs::read(place.image()).unwrap()
}

/// Values are stored in one bit, every other section is what it was, byte for byte, and less is lost than by signs alone.
#[test]
fn values_become_binary_and_nothing_else_changes() {
    let place = Place::new();
    let output = place.out().join("tbha");
    let converted = convert_values(&stories(), &output, &hybrid(), &mut ()).unwrap();
    println!("{converted}");
    assert_eq!(converted.values.iter().map(|v| v.layer).collect::<Vec<_>>(), [0, 1, 2, 3]);
    for v in &converted.values {
        assert!(v.error < 0.7 * v.plain && (0.2..0.5).contains(&v.zeros), "{v:?}");
    }
    assert_eq!(std::fs::metadata(output.join("model.safetensors")).unwrap().len(), converted.bytes);
    let [before, after] = [stories(), output].map(|source| image(&place, &source));
    let checked = Image::check(&after, after.len() as u64).unwrap();
    for Section { kind, layer, .. } in expected_sections(&checked.header().config) {
        let ((old, old_bytes), (new, new_bytes)) = (section(&before, kind, layer), section(&after, kind, layer));
        if kind == Kind::Value {
            assert_eq!(new.encoding, Encoding::Matrix(Format::B1).tag());
        } else {
            assert_eq!((old.encoding, old.scale), (new.encoding, new.scale), "{kind:?} {layer:?}");
            assert!(old_bytes == new_bytes, "{kind:?} {layer:?}");
        }
    }
}

/// What is no model for this, and what is in the way, is refused with the reason; nothing is left.
#[test]
fn what_cannot_be_converted_is_left_alone() {
    let place = Place::new();
    let stateful = stories().with_file_name("stories-stateful");
    let no_text = Hybrid { text: "missing.txt".into(), ..hybrid() };
    let mut dense = Checkpoint::new(SMALL, Storage::Online);
    dense.config.remove("quantization_config");
    dense.set("architectures", json!(["LlamaForCausalLM"]));
    dense.set("hidden_act", json!("silu"));
    dense.tensors.retain(|t| !t.name.contains("sub_norm"));
    let query = dense.tensor("model.layers.0.self_attn.q_proj.weight");
    let numbers: Vec<f32> = (0..query.shape.iter().product()).map(|i| (i * 37 % 97) as f32 - 48.0).collect();
    *query = Tensor::bf16(&query.name, &query.shape, &numbers);
    dense.write(&place.source());
    let refused = |source: &Path, new: &Hybrid, says: &str| {
        let error = convert_values(source, &place.out().join("tbha"), new, &mut ()).unwrap_err().to_string();
        assert_says(says, &error, &[says]);
        assert!(place.left().is_empty(), "{:?}", place.left());
    };
    refused(&stateful, &hybrid(), "does not know a memory beside attention");
    refused(&stories(), &no_text, "missing.txt");
    refused(&place.source(), &hybrid(), "0.query is of floats");
    for weights in dense.tensors.iter_mut().filter(|t| t.name.ends_with("_proj.weight")) {
        let cols = weights.shape[1];
        let of_row = |i: u64| if i.is_multiple_of(3) { -1.0 } else { 1.0 } * (1 + i / cols % 2) as f32;
        let numbers: Vec<f32> = (0..weights.shape.iter().product()).map(of_row).collect();
        *weights = Tensor::bf16(&weights.name, &weights.shape, &numbers);
    }
    dense.write(&place.source());
    refused(&place.source(), &hybrid(), "0.query has a scale for every 128 columns");
    std::fs::create_dir(place.out().join("tbha")).unwrap();
    let error = convert_values(&stories(), &place.out().join("tbha"), &hybrid(), &mut ()).unwrap_err().to_string();
    assert_says("there", &error, &["is there already"]);
}
