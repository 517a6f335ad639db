//! Linears in half precision: floats by floats, nothing is quantized, the same bits in every way of running. That the numbers are
//! right is seen on a model that others trained: `smollm2` in `tools/bitnet-pack/tests/real.rs`.
use bitnet_kernel::{Block, Format};
use bitnet_pack::Options;
use bitnet_runtime::error::SourceError;
use bitnet_runtime::image::Kind;
use bitnet_runtime::parallel::Serial;
use bitnet_runtime::source::{Extent, Mapped, WeightSource};
use bitnet_runtime::{Limits, Model, Plan, State, backend};
use bitnet_tests::images::{Packed, Way, fingerprint};
use bitnet_tests::tiny::{Dtype, Tensor, Tiny, write_safetensors};
use half::bf16;
use serde_json::Value;

/// TINY-L with numbers that are not ternary in all matrices but those of queries.
fn packed(dense: Format) -> Packed {
    let dir = tempfile::tempdir().unwrap();
    let tiny = Tiny::l().masters().dtype(Dtype::BF16);
    tiny.write(dir.path());
    let mut tensors = tiny.tensors();
    for (name, Tensor { bytes, .. }) in &mut tensors {
        if name.ends_with("proj.weight") && !name.contains("q_proj") {
            for (i, pair) in bytes.chunks_exact_mut(2).enumerate() {
                let value = bf16::from_le_bytes([pair[0], pair[1]]).to_f32() * (1.0 + (i % 97) as f32 / 64.0);
                pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        }
    }
    write_safetensors(&dir.path().join("model.safetensors"), &tensors);
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config");
    std::fs::write(&path, config.to_string()).unwrap();
    Packed::pack(dir.path(), &Options { dense, head: Format::F16, ..Options::default() })
}

#[test]
fn every_way_of_running_gives_the_same_bits() {
    let ids: Vec<u32> = (0..21).map(|i| i * 7 % 256).collect();
    let floats = packed(Format::F16);
    let format = |kind| floats.image().sections().find(kind, Some(1)).unwrap().tensor().unwrap().format;
    let (query, rest) = (format(Kind::Query), [Kind::Key, Kind::Value, Kind::Output, Kind::Up, Kind::Down].map(format));
    assert_eq!((query, rest), (Format::TL, [Format::F16; 5]));
    let logits = Way::plain(backend::best()).logits(&floats, &ids);
    for kernels in backend::available() {
        for (batch, threads, streamed) in [(1, 3, true), (5, 2, false), (16, 1, true)] {
            let way = Way { batch, threads, streamed, ..Way::plain(kernels) };
            assert_eq!(fingerprint(&way.logits(&floats, &ids)), fingerprint(&logits), "{way:?}");
        }
    }
    // Quantizing to eight bits moves them, but not far.
    let quantized = Way::plain(backend::best()).logits(&packed(Format::I8), &ids);
    let (mut error, mut energy) = (0.0, 0.0);
    for (a, b) in logits.iter().flatten().zip(quantized.iter().flatten()) {
        error += f64::from(a - b).powi(2);
        energy += f64::from(*a).powi(2);
    }
    let relative = (error / energy).sqrt();
    println!("eight bits move the logits by {relative} of their size");
    assert!(relative > 1e-4 && relative < 0.1, "{relative}");
}

/// Weights in memory, and how many blocks of them were fetched in order.
struct Counted<'a> {
    source: Mapped<'a>,
    blocks: &'a mut u64,
}

impl WeightSource for Counted<'_> {
    fn fetch(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        *self.blocks += u64::from(extent.blocks);
        self.source.fetch(extent)
    }
    fn fetch_row(&mut self, extent: Extent) -> Result<&[Block], SourceError> {
        self.source.fetch(extent)
    }
    fn piece_blocks(&self) -> u32 {
        self.source.piece_blocks()
    }
}

/// Weights that are streamed cost most: a batch reads them once.
#[test]
fn a_batch_fetches_the_weights_once() {
    let packed = packed(Format::F16);
    let image = packed.image();
    let config = image.header().config;
    let limits = Limits { batch: 8, ..image.header().plan.limits };
    let plan = Plan::new(&config, &limits);
    let fetched = |ids: &[u32]| {
        let (mut scratch, mut state) = (vec![Block::ZERO; plan.scratch], vec![Block::ZERO; plan.state]);
        let mut state = State::new(&config, &limits, &mut state).unwrap();
        let mut blocks = 0;
        let mut source = Counted { source: Mapped::new(packed.blocks()), blocks: &mut blocks };
        let mut model = Model::new(&image, limits, backend::best(), &Serial, &mut source, &mut scratch).unwrap();
        model.prefill(&mut state, ids).unwrap();
        blocks
    };
    assert_eq!(fetched(&[1, 2, 3, 4, 5, 6, 7, 8]), fetched(&[9]));
}
