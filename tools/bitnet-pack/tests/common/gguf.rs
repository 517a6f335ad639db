//! GGUF files, written here byte by byte so that the reader is not tested with its own writer.
use super::Codes;

/// A value of a key.
#[derive(Clone, Debug)]
pub(crate) enum Value {
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    /// A type's number and bytes as they are.
    Raw(u32, Vec<u8>),
}

pub(crate) fn text(text: &str) -> Value {
    Value::Text(text.into())
}

/// A string with its length.
pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl Value {
    fn bytes(&self) -> Vec<u8> {
        let array = |tag: u32, count: usize, elements: Vec<u8>| {
            [&tag.to_le_bytes()[..], &(count as u64).to_le_bytes(), &elements].concat()
        };
        let (tag, bytes): (u32, Vec<u8>) = match self {
            Self::U16(v) => (2, v.to_le_bytes().into()),
            Self::U32(v) => (4, v.to_le_bytes().into()),
            Self::I32(v) => (5, v.to_le_bytes().into()),
            Self::F32(v) => (6, v.to_le_bytes().into()),
            Self::Bool(v) => (7, vec![u8::from(*v)]),
            Self::Text(v) => (8, string(v)),
            Self::Texts(v) => (9, array(8, v.len(), v.iter().flat_map(|t| string(t)).collect())),
            Self::I32s(v) => (9, array(5, v.len(), v.iter().flat_map(|i| i.to_le_bytes()).collect())),
            Self::F32s(v) => (9, array(6, v.len(), v.iter().flat_map(|f| f.to_le_bytes()).collect())),
            Self::Raw(tag, bytes) => (*tag, bytes.clone()),
        };
        [&tag.to_le_bytes()[..], &bytes].concat()
    }
}

/// A tensor as the file holds it. Dimensions are as stored, the columns first.
#[derive(Clone, Debug)]
pub(crate) struct GgufTensor {
    pub(crate) name: String,
    pub(crate) dimensions: Vec<u64>,
    pub(crate) tag: u32,
    pub(crate) data: Vec<u8>,
    /// Where it starts among the tensors, if not after the one before.
    pub(crate) offset: Option<u64>,
}

/// A file.
#[derive(Clone, Debug)]
pub(crate) struct Gguf {
    pub(crate) version: u32,
    pub(crate) keys: Vec<(String, Value)>,
    pub(crate) tensors: Vec<GgufTensor>,
    pub(crate) alignment: u64,
}

pub(crate) const F32: u32 = 0;
pub(crate) const Q8_0: u32 = 8;
pub(crate) const TQ1_0: u32 = 34;
pub(crate) const TQ2_0: u32 = 35;
pub(crate) const I2_S: u32 = 36;
pub(crate) const Q1_0: u32 = 41;
pub(crate) const Q2_0: u32 = 42;

/// Width of the model, and of its feed-forward layer; a golden matrix is a key of it.
pub(crate) const WIDTH: u64 = 256;

impl Gguf {
    /// The smallest model whose key is a golden matrix of 4 rows and 256 columns: one layer, I2_S.
    pub(crate) fn model(architecture: &str) -> Self {
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str, v: u32| (key(name), Value::U32(v));
        let keys = vec![
            ("general.architecture".into(), text(architecture)),
            number("block_count", 1),
            number("context_length", 64),
            number("embedding_length", WIDTH as u32),
            number("feed_forward_length", WIDTH as u32),
            number("attention.head_count", 64),
            number("attention.head_count_kv", 1),
            number("attention.key_length", 4),
            number("attention.value_length", 4),
            number("rope.dimension_count", 4),
            number("vocab_size", 8),
            (key("attention.layer_norm_rms_epsilon"), Value::F32(1e-5)),
            (key("rope.freq_base"), Value::F32(10_000.0)),
        ];
        let mut gguf = Self { version: 3, keys, tensors: Vec::new(), alignment: 32 };
        let mut codes = Codes::new();
        for (name, rows) in [
            ("attn_q", WIDTH),
            ("attn_k", 4),
            ("attn_v", 4),
            ("attn_output", WIDTH),
            ("ffn_gate", WIDTH),
            ("ffn_up", WIDTH),
            ("ffn_down", WIDTH),
        ] {
            let weights = codes.rows(rows, WIDTH).concat();
            gguf.add(&format!("blk.0.{name}.weight"), &[WIDTH, rows], I2_S, i2_s(&weights, 128, 0.5));
        }
        let mut norms = vec![("blk.0.attn_norm", WIDTH), ("blk.0.ffn_norm", WIDTH), ("output_norm", WIDTH)];
        if architecture.starts_with("bitnet") {
            norms.extend([("blk.0.attn_sub_norm", WIDTH), ("blk.0.ffn_sub_norm", WIDTH)]);
        }
        if architecture == "qwen3" {
            norms.extend([("blk.0.attn_q_norm", 4), ("blk.0.attn_k_norm", 4)]);
        }
        for (name, n) in norms {
            gguf.add(&format!("{name}.weight"), &[n], F32, floats(&vec![1.0; n as usize]));
        }
        let table: Vec<f32> = (0..8 * WIDTH).map(|_| (codes.next() % 2001) as f32 / 2e4 - 0.05).collect();
        gguf.add("token_embd.weight", &[WIDTH, 8], F32, floats(&table));
        gguf
    }
    pub(crate) fn add(&mut self, name: &str, dimensions: &[u64], tag: u32, data: Vec<u8>) {
        self.tensors.push(GgufTensor { name: name.into(), dimensions: dimensions.into(), tag, data, offset: None });
    }
    /// Sets a key, in its place if it is there.
    pub(crate) fn set(&mut self, key: &str, value: Value) {
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.into(), value)),
        }
    }
    pub(crate) fn without(&mut self, key: &str) {
        self.keys.retain(|(k, _)| k != key);
    }
    pub(crate) fn tensor(&mut self, name: &str) -> &mut GgufTensor {
        self.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("{name}"))
    }
    /// The file, up to the tensors.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            file.extend(string(key));
            file.extend(value.bytes());
        }
        let mut end = 0;
        for t in &self.tensors {
            file.extend(string(&t.name));
            file.extend((t.dimensions.len() as u32).to_le_bytes());
            file.extend(t.dimensions.iter().flat_map(|d| d.to_le_bytes()));
            file.extend(t.tag.to_le_bytes());
            file.extend(t.offset.unwrap_or(end).to_le_bytes());
            end += (t.data.len() as u64).next_multiple_of(self.alignment);
        }
        file
    }
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut file = self.header();
        let pad = |file: &mut Vec<u8>| file.resize(file.len().next_multiple_of(self.alignment as usize), 0);
        pad(&mut file);
        for t in &self.tensors {
            file.extend(&t.data);
            pad(&mut file);
        }
        file
    }
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Two bits a weight, of `group` weights a quarter of them apart in a byte, the first highest; then the scale and padding.
pub(crate) fn i2_s(weights: &[i8], group: usize, scale: f32) -> Vec<u8> {
    let quarter = group / 4;
    let mut bytes = Vec::new();
    for weights in weights.chunks(group) {
        for p in 0..quarter {
            let code = |part: usize| (weights[p + part * quarter] + 1) as u8;
            bytes.push(code(0) << 6 | code(1) << 4 | code(2) << 2 | code(3));
        }
    }
    bytes.extend(scale.to_le_bytes());
    bytes.extend([0; 28]);
    bytes
}
