//! Which tensor each section of the image is made from. All names, types and shapes are checked here, before anything is
//! written, and no tensor may be left over.
use super::{Checkpoint, Dtype, Storage, Table, TensorInfo};
use crate::Error;
use crate::quantize;
use bitnet_runtime::image::{Kind, Section, expected_sections};
use std::collections::BTreeSet;

/// Where a section's numbers come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Computed.
    Values(Vec<f32>),
    /// A float vector.
    Vector(TensorInfo),
    /// Ternary codes, four rows a byte, and what they are multiplied by.
    Packed(TensorInfo, f32),
    /// Float masters of a ternary matrix.
    Masters(TensorInfo),
    /// A float matrix that stays dense: the embedding or the head.
    Rows(TensorInfo),
}

impl Source {
    /// The tensor that is read, if one is.
    pub const fn tensor(&self) -> Option<&TensorInfo> {
        match self {
            Self::Values(_) => None,
            Self::Vector(t) | Self::Packed(t, _) | Self::Masters(t) | Self::Rows(t) => Some(t),
        }
    }
}

/// Scales outside this are no mean magnitude of anything: a checkpoint's is between 0.001 and 10.
const SCALE_RANGE: (f32, f32) = (1e-5, 1e3);
const SCALE_USUAL: (f32, f32) = (1e-3, 10.0);

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Finds the tensor of every section. Sets `tied`.
///
/// # Errors
/// If one is missing, left over, or of the wrong type or shape.
pub fn bind(checkpoint: &Checkpoint, table: &mut Table) -> Result<Vec<(Section, Source)>, Error> {
    let mut binder = Binder { checkpoint, storage: table.storage, used: BTreeSet::new(), notes: Vec::new() };
    table.config.tied = binder.tied(table)?;
    let mut sections = Vec::new();
    for section in expected_sections(&table.config) {
        let source = binder.source(&section, table)?;
        sections.push((section, source));
    }
    let left = |t: &&TensorInfo| !binder.used.contains(t.name.as_str()) && !t.name.ends_with(".rotary_emb.inv_freq");
    if let Some(tensor) = checkpoint.tensors().find(left) {
        let what = "unknown to this class of model; leaving it out would change what the model computes";
        return Err(Error::tensor(checkpoint.path_of(tensor), &tensor.name, what));
    }
    table.notes.append(&mut binder.notes);
    Ok(sections)
}

struct Binder<'a> {
    checkpoint: &'a Checkpoint,
    storage: Storage,
    used: BTreeSet<&'a str>,
    notes: Vec<String>,
}

impl<'a> Binder<'a> {
    fn wrong<T>(&self, tensor: &TensorInfo, what: impl Into<String>) -> Result<T, Error> {
        Err(Error::tensor(self.checkpoint.path_of(tensor), &tensor.name, what))
    }

    /// The first of `names` that the checkpoint has.
    fn find(&mut self, names: &[String]) -> Result<&'a TensorInfo, Error> {
        match names.iter().find_map(|name| self.checkpoint.tensor(name)) {
            Some(tensor) => {
                self.used.insert(&tensor.name);
                Ok(tensor)
            }
            None => Err(Error::tensor(self.checkpoint.directory(), &names.join(" or "), "missing")),
        }
    }

    fn expect_shape(&self, tensor: &TensorInfo, shape: &[u64]) -> Result<(), Error> {
        if tensor.shape == shape {
            return Ok(());
        }
        self.wrong(tensor, format!("shape {:?}, the configuration needs {shape:?}", tensor.shape))
    }

    fn expect_float(&self, tensor: &TensorInfo) -> Result<(), Error> {
        if tensor.dtype.is_float() {
            return Ok(());
        }
        self.wrong(tensor, format!("dtype {}, where F32, F16 or BF16 is expected", tensor.dtype.name()))
    }

    /// Whether the head is the embedding: the configuration and the tensors have a say.
    fn tied(&mut self, table: &Table) -> Result<bool, Error> {
        let head = self.checkpoint.tensor(HEAD);
        let (tied, note) = match (table.tie, head) {
            (Some(true), None) => (true, "head: the embedding, by tie_word_embeddings".into()),
            (Some(true), Some(head)) => {
                self.used.insert(&head.name);
                let embedding = self.find(&[EMBEDDING.into()])?;
                let same = if same_bytes(self.checkpoint, head, embedding)? { "equal" } else { "DIFFERENT" };
                (true, format!("head: the embedding, by tie_word_embeddings; {HEAD} is there too and is {same}"))
            }
            (Some(false), None) => {
                let what = "missing, and config.json has tie_word_embeddings = false";
                return Err(Error::tensor(self.checkpoint.directory(), HEAD, what));
            }
            (None, None) => (true, format!("head: the embedding; there is no {HEAD} and no tie_word_embeddings")),
            (Some(false), Some(_)) => (false, format!("head: {HEAD}")),
            (None, Some(_)) => (false, format!("head: {HEAD}; there is no tie_word_embeddings")),
        };
        self.notes.push(note);
        Ok(tied)
    }

    fn source(&mut self, section: &Section, table: &Table) -> Result<Source, Error> {
        let (rows, cols) = (u64::from(section.rows), u64::from(section.cols));
        let names = names(section, table.config.tied);
        match section.kind {
            Kind::RopeFrequencies => Ok(Source::Values(table.frequencies.clone())),
            Kind::Embedding | Kind::Head => {
                let tensor = self.find(&names)?;
                self.expect_float(tensor)?;
                self.expect_shape(tensor, &[rows, cols])?;
                Ok(Source::Rows(tensor.clone()))
            }
            Kind::Query | Kind::Key | Kind::Value | Kind::Output | Kind::Gate | Kind::Up | Kind::Down => {
                self.linear(&names, rows, cols)
            }
            _ => {
                let tensor = self.find(&names)?;
                self.expect_float(tensor)?;
                self.expect_shape(tensor, &[cols])?;
                Ok(Source::Vector(tensor.clone()))
            }
        }
    }

    fn linear(&mut self, names: &[String], rows: u64, cols: u64) -> Result<Source, Error> {
        let tensor = self.find(names)?;
        if tensor.dtype != Dtype::U8 {
            self.expect_float(tensor)?;
            self.expect_shape(tensor, &[rows, cols])?;
            if self.storage == Storage::Multiply {
                return self.wrong(tensor, "float masters, but config.json says that weights are packed (offline)");
            }
            return Ok(Source::Masters(tensor.clone()));
        }
        self.expect_shape(tensor, &[rows.div_ceil(4), cols])?;
        let multiply = match self.storage {
            Storage::Multiply => true,
            Storage::Divide => false,
            Storage::Online => {
                return self.wrong(tensor, "packed, but config.json says that weights are masters (online)");
            }
            Storage::Masters => {
                let what = "packed, but config.json has no quantization_config: \
                            whether its weight_scale multiplies or divides is unknown";
                return self.wrong(tensor, what);
            }
        };
        let scale = self.find(&[tensor.name.replace(".weight", ".weight_scale")])?;
        Ok(Source::Packed(tensor.clone(), self.multiplier(scale, multiply)?))
    }

    /// Reads a `weight_scale` and turns it into what the image stores.
    fn multiplier(&mut self, tensor: &TensorInfo, multiply: bool) -> Result<f32, Error> {
        self.expect_float(tensor)?;
        if !matches!(tensor.shape[..], [] | [1]) {
            return self.wrong(tensor, format!("shape {:?}, where one number is expected", tensor.shape));
        }
        let mut raw = vec![0; tensor.bytes as usize];
        self.checkpoint.read(tensor, 0, &mut raw)?;
        let mut value = [0.0];
        quantize::widen(tensor.dtype, &raw, &mut value);
        let [value] = value;
        if !(value.is_finite() && value > 0.0) {
            return self.wrong(tensor, format!("{value} is no scale"));
        }
        let multiplier = if multiply { value } else { 1.0 / value };
        let (word, inverse) = if multiply { ("multiplies", 1.0 / value) } else { ("divides", value) };
        let within = |x: f32, (low, high): (f32, f32)| low <= x && x <= high;
        if !within(multiplier, SCALE_RANGE) {
            let (low, high) = SCALE_RANGE;
            let what = format!("{value} {word} by the configuration: weights of {multiplier}, outside {low} to {high}");
            return self.wrong(tensor, what);
        }
        if !within(multiplier, SCALE_USUAL) && within(inverse, SCALE_USUAL) {
            let what = format!("{value} {word} by the configuration: weights of {multiplier}, which is unusual");
            self.notes.push(format!("{}: {what}", tensor.name));
        }
        Ok(multiplier)
    }
}

/// The names that a section's tensor may have.
fn names(section: &Section, tied: bool) -> Vec<String> {
    let (layer, kind) = (section.layer.unwrap_or(0), section.kind);
    let names: &[&str] = match kind {
        Kind::Head if tied => return vec![EMBEDDING.into()],
        Kind::Head => return vec![HEAD.into()],
        Kind::Embedding => return vec![EMBEDDING.into()],
        Kind::FinalNorm => return vec!["model.norm.weight".into()],
        Kind::Tokenizer | Kind::RopeFrequencies => &[],
        Kind::AttentionNorm => &["input_layernorm"],
        Kind::FfnNorm => &["post_attention_layernorm"],
        Kind::AttentionSubNorm => &["self_attn.attn_sub_norm", "self_attn.inner_attn_ln"],
        Kind::FfnSubNorm => &["mlp.ffn_sub_norm", "mlp.ffn_layernorm"],
        Kind::Query => &["self_attn.q_proj"],
        Kind::Key => &["self_attn.k_proj"],
        Kind::Value => &["self_attn.v_proj"],
        Kind::Output => &["self_attn.o_proj"],
        Kind::Gate => &["mlp.gate_proj"],
        Kind::Up => &["mlp.up_proj"],
        Kind::Down => &["mlp.down_proj"],
        Kind::QueryNorm => &["self_attn.q_norm"],
        Kind::KeyNorm => &["self_attn.k_norm"],
        Kind::QueryInputNorm => &["self_attn.q_proj.rms_norm"],
        Kind::KeyInputNorm => &["self_attn.k_proj.rms_norm"],
        Kind::ValueInputNorm => &["self_attn.v_proj.rms_norm"],
        Kind::OutputInputNorm => &["self_attn.o_proj.rms_norm"],
        Kind::GateInputNorm => &["mlp.gate_proj.rms_norm"],
        Kind::UpInputNorm => &["mlp.up_proj.rms_norm"],
        Kind::DownInputNorm => &["mlp.down_proj.rms_norm"],
    };
    names.iter().map(|name| format!("model.layers.{layer}.{name}.weight")).collect()
}

/// Whether two tensors are the same, bit for bit.
fn same_bytes(checkpoint: &Checkpoint, a: &TensorInfo, b: &TensorInfo) -> Result<bool, Error> {
    const CHUNK: u64 = 1 << 18;
    if a.dtype != b.dtype || a.shape != b.shape {
        return Ok(false);
    }
    let (mut left, mut right) = (vec![0; CHUNK as usize], vec![0; CHUNK as usize]);
    let mut offset = 0;
    while offset < a.bytes {
        let n = CHUNK.min(a.bytes - offset) as usize;
        checkpoint.read(a, offset, &mut left[..n])?;
        checkpoint.read(b, offset, &mut right[..n])?;
        if left[..n] != right[..n] {
            return Ok(false);
        }
        offset += n as u64;
    }
    Ok(true)
}
