//! Small checkpoints, written here byte by byte so that the packer is not tested with its own reader.
#![allow(dead_code, reason = "every test file uses a part of it")]
pub(crate) mod gguf;

use bitnet_kernel::{Block, format};
use bitnet_pack::{Error, Options, Progress, pack};
use bitnet_runtime::Image;
use bitnet_runtime::image::{Kind, Record, UNIT_ROWS};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The trained checkpoint of the repository.
pub(crate) fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/stories-ternary")
}

/// How linears are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    /// bf16 masters.
    Online,
    /// U8 codes, `weight_scale` multiplies.
    Multiply,
    /// U8 codes, `weight_scale` divides.
    Divide,
}

/// A tensor as the file holds it.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<u64>,
    pub(crate) data: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(name: &str, shape: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Self { name: name.into(), dtype: "F32", shape: shape.into(), data }
    }
    pub(crate) fn bf16(name: &str, shape: &[u64], values: &[f32]) -> Self {
        let data = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        Self { name: name.into(), dtype: "BF16", shape: shape.into(), data }
    }
    /// Codes of `rows`, four rows a byte, as transformers packs them.
    pub(crate) fn packed(name: &str, rows: &[Vec<i8>]) -> Self {
        let (quarter, cols) = (rows.len().div_ceil(4), rows[0].len());
        let data = pack_rows(rows);
        Self { name: name.into(), dtype: "U8", shape: vec![quarter as u64, cols as u64], data }
    }
}

/// Row `r` of `R · 4` is in byte row `r mod R`, at bit `2 · (r div R)`, as `weight + 1`.
pub(crate) fn pack_rows(rows: &[Vec<i8>]) -> Vec<u8> {
    let (quarter, cols) = (rows.len().div_ceil(4), rows[0].len());
    let mut data = vec![0; quarter * cols];
    for (r, row) in rows.iter().enumerate() {
        for (c, w) in row.iter().enumerate() {
            data[r % quarter * cols + c] |= ((w + 1) as u8) << (2 * (r / quarter));
        }
    }
    data
}

/// The generator of the fixture TINY: codes 0, 1, 2 without visible order.
pub(crate) struct Codes(u64);

impl Codes {
    pub(crate) const fn new() -> Self {
        Self(1)
    }
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = (1_103_515_245 * self.0 + 12_345) % (1 << 31);
        self.0 >> 16
    }
    pub(crate) fn rows(&mut self, rows: u64, cols: u64) -> Vec<Vec<i8>> {
        (0..rows).map(|_| (0..cols).map(|_| (self.next() % 3) as i8 - 1).collect()).collect()
    }
}

/// Sizes of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) vocab: u64,
    pub(crate) hidden: u64,
    pub(crate) ffn: u64,
    pub(crate) layers: u64,
    pub(crate) heads: u64,
    pub(crate) kv_heads: u64,
    pub(crate) head_dim: u64,
}

/// No size is a multiple of a tile, a step or a block: every tail occurs.
pub(crate) const SMALL: Shape =
    Shape { vocab: 41, hidden: 36, ffn: 70, layers: 2, heads: 2, kv_heads: 1, head_dim: 18 };

/// A checkpoint in memory.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) config: Map<String, Value>,
    pub(crate) tensors: Vec<Tensor>,
}

impl Checkpoint {
    pub(crate) fn new(s: Shape, storage: Storage) -> Self {
        let (class, mode) = match storage {
            Storage::Online => ("autobitlinear", "online"),
            Storage::Multiply => ("autobitlinear", "offline"),
            Storage::Divide => ("bitlinear", "offline"),
        };
        let config = json!({
            "architectures": ["BitNetForCausalLM"], "model_type": "bitnet", "vocab_size": s.vocab,
            "hidden_size": s.hidden, "intermediate_size": s.ffn, "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim,
            "hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "rope_theta": 10000.0,
            "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2,
            "quantization_config": {"quant_method": "bitnet", "linear_class": class, "quantization_mode": mode},
        });
        let Value::Object(config) = config else { unreachable!() };
        let mut tensors = Vec::new();
        let mut codes = Codes::new();
        let (query, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        for layer in 0..s.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for (part, n) in [
                ("input_layernorm", s.hidden),
                ("post_attention_layernorm", s.hidden),
                ("self_attn.attn_sub_norm", query),
                ("mlp.ffn_sub_norm", s.ffn),
            ] {
                tensors.push(Tensor::f32(&name(part), &[n], &vec![1.0; n as usize]));
            }
            for (part, rows, cols) in [
                ("self_attn.q_proj", query, s.hidden),
                ("self_attn.k_proj", kv, s.hidden),
                ("self_attn.v_proj", kv, s.hidden),
                ("self_attn.o_proj", s.hidden, query),
                ("mlp.gate_proj", s.ffn, s.hidden),
                ("mlp.up_proj", s.ffn, s.hidden),
                ("mlp.down_proj", s.hidden, s.ffn),
            ] {
                let weights = codes.rows(rows, cols);
                if storage == Storage::Online {
                    let masters: Vec<f32> = weights.concat().iter().map(|&w| f32::from(w) * 0.5).collect();
                    tensors.push(Tensor::bf16(&name(part), &[rows, cols], &masters));
                } else {
                    tensors.push(Tensor::packed(&name(part), &weights));
                    let scale = if storage == Storage::Multiply { 0.5 } else { 2.0 };
                    tensors.push(Tensor::f32(&name(part).replace(".weight", ".weight_scale"), &[1], &[scale]));
                }
            }
        }
        tensors.push(Tensor::f32("model.norm.weight", &[s.hidden], &vec![1.0; s.hidden as usize]));
        let embedding: Vec<f32> = (0..s.vocab * s.hidden).map(|_| (codes.next() % 2001) as f32 / 2e4 - 0.05).collect();
        tensors.push(Tensor::bf16("model.embed_tokens.weight", &[s.vocab, s.hidden], &embedding));
        Self { config, tensors }
    }
    /// Sets a key of `config.json`, with a dot between levels.
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        match key.split_once('.') {
            Some((outer, inner)) => {
                let object = self.config.entry(outer).or_insert_with(|| json!({}));
                object.as_object_mut().expect("an object").insert(inner.into(), value);
            }
            None => {
                self.config.insert(key.into(), value);
            }
        }
    }
    pub(crate) fn tensor(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("{name}"))
    }
    pub(crate) fn remove(&mut self, name: &str) -> Tensor {
        let at = self.tensors.iter().position(|t| t.name == name).unwrap_or_else(|| panic!("{name}"));
        self.tensors.remove(at)
    }
    /// Writes `config.json` and one file.
    pub(crate) fn write(&self, directory: &Path) {
        self.write_config(directory);
        std::fs::write(directory.join("model.safetensors"), safetensors(&self.tensors)).unwrap();
    }
    /// Writes `config.json` and one shard for each of the ranges that `shards` equal parts give.
    pub(crate) fn write_sharded(&self, directory: &Path, shards: usize) {
        self.write_config(directory);
        let mut map = Map::new();
        for (i, part) in self.tensors.chunks(self.tensors.len().div_ceil(shards)).enumerate() {
            let name = format!("model-{:05}-of-{shards:05}.safetensors", i + 1);
            std::fs::write(directory.join(&name), safetensors(part)).unwrap();
            map.extend(part.iter().map(|t| (t.name.clone(), json!(name))));
        }
        write_index(directory, &map);
    }
    pub(crate) fn write_config(&self, directory: &Path) {
        std::fs::write(directory.join("config.json"), serde_json::to_vec_pretty(&self.config).unwrap()).unwrap();
    }
}

pub(crate) fn write_index(directory: &Path, map: &Map<String, Value>) {
    let index = json!({"metadata": {}, "weight_map": map});
    std::fs::write(directory.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A header's length and text.
pub(crate) fn container(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

pub(crate) fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let (mut entries, mut data) = (Vec::new(), Vec::new());
    for t in tensors {
        let range = [data.len(), data.len() + t.data.len()];
        entries.push(format!(
            "{}:{}",
            json!(t.name),
            json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": range})
        ));
        data.extend_from_slice(&t.data);
    }
    container(&format!("{{{}}}", entries.join(",")), &data)
}

/// A section's record and bytes.
pub(crate) fn section(image: &[u8], kind: Kind, layer: Option<u32>) -> (Record, &[u8]) {
    let checked = Image::check(image, image.len() as u64).unwrap();
    let record = *checked.sections().find(kind, layer).unwrap_or_else(|| panic!("{kind:?}"));
    let start = record.start.get() as usize * 64;
    (record, &image[start..start + record.blocks.get() as usize * 64])
}

/// A matrix of one unit, by the definition of its format.
pub(crate) fn rows(image: &[u8], kind: Kind, layer: Option<u32>) -> Vec<Vec<i8>> {
    let (record, bytes) = section(image, kind, layer);
    let tensor = record.tensor().unwrap();
    let (f, cols) = (tensor.format, tensor.cols as usize);
    assert!(tensor.rows as usize <= UNIT_ROWS);
    let blocks: Vec<Block> = bytes.chunks_exact(64).map(|b| Block(b.try_into().unwrap())).collect();
    let weight = |r: usize, c: usize| {
        let tile = &blocks[r / f.tile_rows() * f.tile_blocks(cols)..];
        let step = &tile[c / f.step_cols() * f.step_blocks()..][..f.step_blocks()];
        format::decode(f, step, r % f.tile_rows(), c % f.step_cols())
    };
    (0..tensor.rows as usize).map(|r| (0..cols).map(|c| weight(r, c)).collect()).collect()
}

/// Directories for a checkpoint and for what is made from it.
pub(crate) struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("source")).unwrap();
        std::fs::create_dir(directory.path().join("out")).unwrap();
        Self { directory }
    }
    pub(crate) fn source(&self) -> PathBuf {
        self.directory.path().join("source")
    }
    pub(crate) fn out(&self) -> PathBuf {
        self.directory.path().join("out")
    }
    pub(crate) fn image(&self) -> PathBuf {
        self.out().join("image.bitnet")
    }
    pub(crate) fn put(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.source().join(name), bytes).unwrap();
    }
    /// Packs what is there; returns the image.
    pub(crate) fn pack(&self, options: &Options) -> Vec<u8> {
        let report = pack(&self.source(), &self.image(), options, &mut ()).unwrap_or_else(|e| panic!("{e}"));
        let image = std::fs::read(self.image()).unwrap();
        assert_eq!(report.image_bytes, image.len() as u64);
        assert_eq!(self.left(), ["image.bitnet"], "only the image is left");
        image
    }
    /// Packs what is there, which must fail and leave nothing.
    pub(crate) fn refused(&self, case: &str, options: &Options, progress: &mut dyn Progress) -> Error {
        let packed = pack(&self.source(), &self.image(), options, progress);
        let error = packed.err().unwrap_or_else(|| panic!("{case}: it must be refused"));
        assert_eq!(self.left(), [""; 0], "{error}: nothing may be left");
        error
    }
    /// Names of the files beside the target, and of the target.
    pub(crate) fn left(&self) -> Vec<String> {
        self.out().read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }
}

/// A checkpoint whose tensors are a hole in a file: 4 layers, hidden 1024, feed-forward 2816, 103 MB.
pub(crate) fn sparse(place: &Place) -> u64 {
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
    let header = container(&format!("{{{}}}", entries.join(",")), &[]);
    let mut file = std::fs::File::create(place.source().join("model.safetensors")).unwrap();
    file.write_all(&header).unwrap();
    file.set_len(header.len() as u64 + end).unwrap();
    end
}

/// Options under which names of directories do not matter.
pub(crate) fn named() -> Options {
    Options { name: Some("test".into()), ..Options::default() }
}

/// Asserts that a message has all parts: what, where, and what is expected.
pub(crate) fn assert_says(case: &str, message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{case}: {part:?} is not in {message:?}");
    }
}
