//! the packer's memory, as promised before it starts, in a process of its own.
mod common;

use bitnet_kernel::Format;
use bitnet_pack::{Options, Progress, pack};
use cap::Cap;
use common::{Place, named, stories};
use serde_json::json;
use std::alloc::System;
use std::fs::File;
use std::io::Write;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, usize::MAX);

/// What the promise has for the program, its libraries and its stack, which this allocator does not see.
const PROGRAM: usize = 10 << 20;
/// More than this beside the program would mean that the promise is good for nothing.
const SLACK: usize = 4 << 20;

/// Keeps what is said.
#[derive(Default)]
struct Said(Vec<String>);

impl Progress for Said {
    fn say(&mut self, line: &str) {
        self.0.push(line.into());
    }
}

/// A checkpoint whose tensors are a hole in a file: 4 layers, hidden 1024, feed-forward 2816, 103 MB.
fn sparse(place: &Place) -> u64 {
    let (hidden, ffn, layers, vocab) = (1024u64, 2816u64, 4, 512u64);
    let config = json!({
        "architectures": ["BitNetForCausalLM"], "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_act": "relu2",
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": true,
    });
    place.put("config.json", config.to_string());
    let mut tensors = vec![
        ("model.norm.weight".into(), vec![hidden]),
        ("model.embed_tokens.weight".to_string(), vec![vocab, hidden]),
    ];
    for layer in 0..layers {
        for (name, shape) in [
            ("input_layernorm", vec![hidden]),
            ("post_attention_layernorm", vec![hidden]),
            ("self_attn.attn_sub_norm", vec![hidden]),
            ("mlp.ffn_sub_norm", vec![ffn]),
            ("self_attn.q_proj", vec![hidden, hidden]),
            ("self_attn.k_proj", vec![hidden, hidden]),
            ("self_attn.v_proj", vec![hidden, hidden]),
            ("self_attn.o_proj", vec![hidden, hidden]),
            ("mlp.gate_proj", vec![ffn, hidden]),
            ("mlp.up_proj", vec![ffn, hidden]),
            ("mlp.down_proj", vec![hidden, ffn]),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let (mut entries, mut end) = (Vec::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 2 * shape.iter().product::<u64>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]});
        entries.push(format!("{}:{entry}", json!(name)));
    }
    let header = common::container(&format!("{{{}}}", entries.join(",")), &[]);
    let mut file = File::create(place.source().join("model.safetensors")).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(header.len() as u64 + end).unwrap();
    end
}

/// The promise is kept, is told, is near the truth, and has nothing
/// to do with the size of the checkpoint. Formats: the default with an i8 head, and those with the largest units.
#[test]
fn the_promise_is_kept() {
    let place = Place::new();
    let bytes = sparse(&place);
    assert!(bytes > 100_000_000);
    // The trained model first: it is small and has a tokenizer, whose conversion takes many times its file.
    let cases = [
        (stories(), Format::TL, Format::I8),
        (place.source(), Format::TL, Format::I8),
        (place.source(), Format::I8, Format::F16),
    ];
    for (source, format, head) in cases {
        let options = Options { format, head, ..named() };
        let mut said = Said::default();
        let before = ALLOCATOR.allocated();
        let report = pack(&source, &place.image(), &options, &mut said).unwrap();
        let promised = report.peak_bytes as usize;
        let used = ALLOCATOR.max_allocated() - before;
        println!("{}, {}: {used} bytes of heap, {promised} promised", source.display(), format.name());
        assert!(used + PROGRAM <= promised, "{used} bytes and the program's {PROGRAM}, {promised} promised");
        assert!(used + PROGRAM + SLACK > promised, "{used} bytes and the program's {PROGRAM}, {promised} promised");
        assert!(promised < 20 << 20);
        let line = format!("peak memory: {} MiB", promised.div_ceil(1 << 20));
        assert!(said.0.contains(&line), "{:?}", said.0);
    }
}
