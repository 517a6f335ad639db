//! The right answer, worked out a second time: a forward pass in plain Rust straight from `config.json` and the safetensors
//! file, as transformers computes it in single precision. It shares no code with the packer, the runtime or the kernels, and
//! takes no care of speed. Sums are taken in f64, values between operations are f32.
//!
//! What it can be asked for beyond logits is what happened at every rounding to int8 ([`Trace`]), and what would have come
//! out if a rounding had gone the other way ([`Force`], [`explain`]): the one difference that two right implementations have.

mod checkpoint;
mod config;
mod linear;
mod trace;

pub use trace::{FLIP_DISTANCE, Flip, Force, Projection, Quantised, Site, Trace, explain};

use checkpoint::Checkpoint;
use config::{Activation, Block, Config};
use linear::Linear;
use std::path::Path;

/// How a linear multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// As transformers: codes are turned back into floats, then multiplied by the weights.
    Dequantised,
    /// As an engine: an exact integer product, scaled at the end. It differs by rounding errors.
    Integer,
}

/// A checkpoint, ready to be computed.
#[derive(Debug)]
pub struct Reference {
    config: Config,
    /// `[vocabulary, hidden]`
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `[vocabulary, hidden]`, if it is not the embedding.
    head: Option<Vec<f32>>,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    /// The norms before `o_proj` and `down_proj`.
    sub_norms: Option<(Vec<f32>, Vec<f32>)>,
    /// The norms of query and key heads.
    head_norms: Option<[Vec<f32>; 2]>,
    ffn_norm: Vec<f32>,
    /// In the order of [`Projection::ALL`].
    linears: [Linear; 7],
}

/// The keys and values of one layer, position after position.
#[derive(Clone, Default)]
struct Cache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// One pass: what is changed in it and what is noted.
struct Pass<'a> {
    reference: &'a Reference,
    arithmetic: Arithmetic,
    force: &'a Force,
    caches: Vec<Cache>,
    trace: Trace,
}

impl Reference {
    /// Reads the checkpoint in a folder.
    ///
    /// # Panics
    /// If a file is missing, or says something that is not known.
    pub fn load(dir: impl AsRef<Path>) -> Self {
        let dir = dir.as_ref();
        let checkpoint = Checkpoint::read(dir);
        let config = Config::read(dir, &checkpoint);
        let table = [config.vocabulary, config.hidden];
        Self {
            embedding: checkpoint.floats("model.embed_tokens.weight", &table),
            layers: (0..config.layers).map(|i| Layer::read(&checkpoint, &config, i)).collect(),
            norm: checkpoint.floats("model.norm.weight", &[config.hidden]),
            head: (!config.tied).then(|| checkpoint.floats("lm_head.weight", &table)),
            config,
        }
    }

    /// The logits of every position, each a row of the vocabulary's length.
    pub fn logits(&self, ids: &[u32]) -> Vec<Vec<f32>> {
        self.trace(ids).logits
    }

    /// The logits and all that lies before them.
    pub fn trace(&self, ids: &[u32]) -> Trace {
        self.trace_with(ids, Arithmetic::Dequantised, &Force::new())
    }

    /// The same, in another arithmetic and with codes forced.
    ///
    /// # Panics
    /// If an id is not in the vocabulary, or forced codes are not as many as the site's.
    pub fn trace_with(&self, ids: &[u32], arithmetic: Arithmetic, force: &Force) -> Trace {
        let mut pass = Pass::new(self, arithmetic, force);
        for &id in ids {
            pass.step(id);
        }
        pass.trace
    }

    /// The ids that follow, `count` of them, each the most likely one.
    ///
    /// # Panics
    /// If `ids` is empty or one of them is not in the vocabulary.
    pub fn greedy(&self, ids: &[u32], count: usize) -> Vec<u32> {
        let force = Force::new();
        let mut pass = Pass::new(self, Arithmetic::Dequantised, &force);
        for &id in ids {
            pass.step(id);
        }
        let mut out = Vec::new();
        while out.len() < count {
            let id = crate::argmax(pass.trace.logits.last().expect("at least one id")) as u32;
            out.push(id);
            if out.len() < count {
                pass.step(id);
            }
        }
        out
    }

    /// The first of the linears that share their codes with this one.
    fn leader(&self, projection: Projection) -> Projection {
        match projection {
            Projection::K | Projection::V if self.config.linear_norm_eps.is_none() => Projection::Q,
            Projection::Up if self.config.linear_norm_eps.is_none() => Projection::Gate,
            own => own,
        }
    }
}

impl Layer {
    fn read(checkpoint: &Checkpoint, config: &Config, i: usize) -> Self {
        let prefix = format!("model.layers.{i}.");
        let (hidden, ffn) = (config.hidden, config.ffn);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let norm = |name: &str, n| checkpoint.floats(&format!("{prefix}{name}.weight"), &[n]);
        // The second name is that of the first published checkpoints.
        let either =
            |name, first, n| norm(if checkpoint.has(&format!("{prefix}{first}.weight")) { first } else { name }, n);
        Self {
            attention_norm: norm("input_layernorm", hidden),
            sub_norms: (config.block == Block::BitNet).then(|| {
                (
                    either("self_attn.attn_sub_norm", "self_attn.inner_attn_ln", q),
                    either("mlp.ffn_sub_norm", "mlp.ffn_layernorm", ffn),
                )
            }),
            head_norms: config
                .head_norms
                .then(|| ["self_attn.q_norm", "self_attn.k_norm"].map(|name| norm(name, config.head_dim))),
            ffn_norm: norm("post_attention_layernorm", hidden),
            linears: Projection::ALL.map(|projection| {
                let (rows, cols) = match projection {
                    Projection::Q => (q, hidden),
                    Projection::K | Projection::V => (kv, hidden),
                    Projection::O => (hidden, q),
                    Projection::Gate | Projection::Up => (ffn, hidden),
                    Projection::Down => (hidden, ffn),
                };
                Linear::read(checkpoint, config, &format!("{prefix}{}", projection.name()), rows, cols)
            }),
        }
    }
}

impl<'a> Pass<'a> {
    fn new(reference: &'a Reference, arithmetic: Arithmetic, force: &'a Force) -> Self {
        let caches = vec![Cache::default(); reference.layers.len()];
        Self { reference, arithmetic, force, caches, trace: Trace::default() }
    }

    /// One token through the whole model.
    fn step(&mut self, id: u32) {
        let Reference { config, embedding, layers, norm, head } = self.reference;
        let position = self.trace.logits.len();
        assert!((id as usize) < config.vocabulary, "id {id} is not in the vocabulary");
        let mut x = embedding[id as usize * config.hidden..][..config.hidden].to_vec();
        for (i, layer) in layers.iter().enumerate() {
            let attended = self.attention(i, position, &rms_norm(&x, &layer.attention_norm, config.eps));
            add(&mut x, &attended);
            let mixed = self.feed_forward(i, position, &rms_norm(&x, &layer.ffn_norm, config.eps));
            add(&mut x, &mixed);
            self.trace.residual.insert((i, position), x.clone());
        }
        let x = rms_norm(&x, norm, config.eps);
        let head = head.as_ref().unwrap_or(embedding);
        self.trace.logits.push(head.chunks_exact(config.hidden).map(|row| dot(row, &x) as f32).collect());
    }

    fn linear(&mut self, layer: usize, projection: Projection, position: usize, x: &[f32]) -> Vec<f32> {
        let linear = &self.reference.layers[layer].linears[projection as usize];
        let mut input = linear.quantise(x);
        let site = Site { layer, projection: self.reference.leader(projection), position };
        self.force.apply(site, &mut input.codes);
        let output = linear.apply(&input.codes, input.s, self.arithmetic);
        self.trace.inputs.insert(site, input);
        self.trace.outputs.insert(Site { layer, projection, position }, output.clone());
        output
    }

    fn attention(&mut self, layer: usize, position: usize, x: &[f32]) -> Vec<f32> {
        let config = &self.reference.config;
        let mut q = self.linear(layer, Projection::Q, position, x);
        let mut k = self.linear(layer, Projection::K, position, x);
        let v = self.linear(layer, Projection::V, position, x);
        if let Some([query, key]) = &self.reference.layers[layer].head_norms {
            let heads = |x: &[f32], gains: &[f32]| -> Vec<f32> {
                x.chunks_exact(config.head_dim).flat_map(|head| rms_norm(head, gains, config.eps)).collect()
            };
            (q, k) = (heads(&q, query), heads(&k, key));
        }
        rotate(&mut q, &config.frequencies, position);
        rotate(&mut k, &config.frequencies, position);
        let cache = &mut self.caches[layer];
        cache.keys.extend(k);
        cache.values.extend(v);

        let (d, row) = (config.head_dim, config.kv_heads * config.head_dim);
        let mut out = Vec::new();
        for (h, q) in q.chunks_exact(d).enumerate() {
            let at = h / (config.heads / config.kv_heads) * d;
            let keys = cache.keys.chunks_exact(row).map(|k| &k[at..at + d]);
            let scores: Vec<f64> = keys.map(|k| dot(k, q) / (d as f64).sqrt()).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let mut sum = vec![0.0; d];
            for (score, v) in scores.iter().zip(cache.values.chunks_exact(row)) {
                let weight = (score - max).exp() / total;
                sum.iter_mut().zip(&v[at..at + d]).for_each(|(sum, v)| *sum += weight * f64::from(*v));
            }
            out.extend(sum.iter().map(|&v| v as f32));
        }
        if let Some((gains, _)) = &self.reference.layers[layer].sub_norms {
            out = rms_norm(&out, gains, config.eps);
        }
        self.linear(layer, Projection::O, position, &out)
    }

    fn feed_forward(&mut self, layer: usize, position: usize, x: &[f32]) -> Vec<f32> {
        let config = &self.reference.config;
        let gate = self.linear(layer, Projection::Gate, position, x);
        let up = self.linear(layer, Projection::Up, position, x);
        let activate = |x: f32| match config.activation {
            Activation::Relu2 => x.max(0.0) * x.max(0.0),
            Activation::Silu => (f64::from(x) / (1.0 + (-f64::from(x)).exp())) as f32,
        };
        let mut out: Vec<f32> = gate.iter().zip(&up).map(|(&gate, up)| activate(gate) * up).collect();
        if let Some((_, gains)) = &self.reference.layers[layer].sub_norms {
            out = rms_norm(&out, gains, config.eps);
        }
        self.linear(layer, Projection::Down, position, &out)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn rms_norm(x: &[f32], gains: &[f32], eps: f32) -> Vec<f32> {
    assert_eq!(x.len(), gains.len());
    let inverse = (1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt()) as f32;
    x.iter().zip(gains).map(|(x, gain)| gain * (x * inverse)).collect()
}

/// Turns the pairs `(i, i + d / 2)` of every head.
fn rotate(heads: &mut [f32], frequencies: &[f32], position: usize) {
    let half = frequencies.len();
    for head in heads.chunks_exact_mut(2 * half) {
        for (i, frequency) in frequencies.iter().enumerate() {
            let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            let (a, b) = (head[i], head[i + half]);
            (head[i], head[i + half]) = (a * cos - b * sin, b * cos + a * sin);
        }
    }
}
