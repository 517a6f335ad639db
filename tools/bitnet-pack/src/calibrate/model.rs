//! The numbers of a checkpoint as floats, one matrix at a time.
use super::Change;
use crate::checkpoint::sections::{self, Bound, Source};
use crate::checkpoint::{Checkpoint, Table, TensorInfo};
use crate::quantize::{Absmean, MagnitudeSum};
use crate::{Error, Layouts, Options, Progress};
use bitnet_runtime::Config;
use bitnet_runtime::image::Kind;
use core::fmt;
use std::collections::BTreeMap;

/// One linear of a model, its head, or its embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Linear {
    /// Its layer; the head and the embedding have none.
    pub layer: Option<u32>,
    /// Which of the layer's it is: [`Kind::Query`] to [`Kind::Down`]; or [`Kind::Head`], or [`Kind::Embedding`].
    pub kind: Kind,
}

impl Linear {
    /// The linears of a layer, in the order in which activations meet them.
    pub const KINDS: [Kind; 7] = [Kind::Query, Kind::Key, Kind::Value, Kind::Output, Kind::Gate, Kind::Up, Kind::Down];
    /// A linear of a layer.
    pub const fn new(layer: u32, kind: Kind) -> Self {
        Self { layer: Some(layer), kind }
    }
    /// The head.
    pub const HEAD: Self = Self { layer: None, kind: Kind::Head };
    /// The embedding, of which a token reads one row. In some models it is the head too.
    pub const EMBEDDING: Self = Self { layer: None, kind: Kind::Embedding };
    /// What it reads.
    pub const fn site(self) -> Site {
        match self.kind {
            Kind::Query | Kind::Key | Kind::Value => Site::Attention,
            Kind::Output => Site::Output,
            Kind::Gate | Kind::Up => Site::Ffn,
            Kind::Down => Site::Down,
            _ => Site::Head,
        }
    }
}

impl fmt::Display for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "{layer}.{}", self.kind.name()),
            None => f.write_str(self.kind.name()),
        }
    }
}

/// Inputs of linears: some share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Of query, key and value: the normalized residual stream.
    Attention,
    /// Of output: what attention gives, normalized in models that do.
    Output,
    /// Of gate and up: the normalized residual stream.
    Ffn,
    /// Of down: `activation(gate) · up`, normalized in models that do.
    Down,
    /// Of the head: the normalized residual stream after the last layer.
    Head,
}

impl Site {
    /// The linears that read it.
    pub const fn kinds(self) -> &'static [Kind] {
        match self {
            Self::Attention => &[Kind::Query, Kind::Key, Kind::Value],
            Self::Output => &[Kind::Output],
            Self::Ffn => &[Kind::Gate, Kind::Up],
            Self::Down => &[Kind::Down],
            Self::Head => &[Kind::Head],
        }
    }
}

/// A checkpoint as a model in floats: weights that are ternary are what they stand for.
#[derive(Debug)]
pub struct Reference<'a> {
    checkpoint: &'a Checkpoint,
    config: Config,
    sources: BTreeMap<(Option<u32>, u8), Source>,
    frequencies: Vec<f32>,
}

fn unknown(what: &str) -> Error {
    Error::Options(format!("calibration by a text does not know {what}, which this model has"))
}

impl<'a> Reference<'a> {
    /// Finds all tensors. Nothing but their headers stays in memory.
    ///
    /// # Errors
    /// As [`sections::bind`], and if linears have norms of their own, which only ternary models have.
    pub fn new(checkpoint: &'a Checkpoint, progress: &dyn Progress) -> Result<Self, Error> {
        let mut table = checkpoint.table()?;
        // The whole linears are looked at, whatever zeros they have.
        let options = Options { layout: Layouts::Whole, ..Options::default() };
        let bound = sections::bind(checkpoint, &mut table, &options, None, progress)?;
        Self::of(checkpoint, &table, bound)
    }

    fn of(checkpoint: &'a Checkpoint, table: &Table, bound: Vec<Bound>) -> Result<Self, Error> {
        if table.config.linear_norm_eps.is_some() {
            return Err(unknown("linears with norms of their own"));
        }
        let mut sources: BTreeMap<_, _> =
            bound.into_iter().map(|b| ((b.section.layer, b.section.kind as u8), b.source)).collect();
        if let (true, Some(head)) = (table.config.tied, sources.get(&(None, Kind::Head as u8)).cloned()) {
            sources.insert((None, Kind::Embedding as u8), head);
        }
        Ok(Self { checkpoint, config: table.config, sources, frequencies: table.frequencies.clone() })
    }

    /// Whether passes compute what the model does, but for how it quantizes activations.
    ///
    /// # Errors
    /// If they do not: what the model has that they do not know.
    pub(crate) fn check_passes(&self) -> Result<(), Error> {
        let c = &self.config;
        match (c.memory.is_some(), c.window.is_some(), c.quantizers.rotate()) {
            (true, ..) => Err(unknown("a memory beside attention")),
            (_, true, _) => Err(unknown("a window of attention")),
            (.., true) => Err(unknown("activations that are rotated before they are quantized")),
            _ => Ok(()),
        }
    }
    /// The model's shape.
    pub const fn config(&self) -> &Config {
        &self.config
    }
    /// The checkpoint.
    pub const fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }
    /// Angles a position.
    pub(super) fn frequencies(&self) -> &[f32] {
        &self.frequencies
    }
    /// Rows and columns of a linear.
    pub const fn shape(&self, linear: Linear) -> (usize, usize) {
        let c = &self.config;
        let (rows, cols) = match linear.kind {
            Kind::Query => (c.query_width(), c.hidden),
            Kind::Key | Kind::Value => (c.kv_width(), c.hidden),
            Kind::Output => (c.hidden, c.query_width()),
            Kind::Gate | Kind::Up => (c.ffn, c.hidden),
            Kind::Down => (c.hidden, c.ffn),
            _ => (c.vocab, c.hidden),
        };
        (rows as usize, cols as usize)
    }
    /// All linears in execution order, without the head.
    pub fn linears(&self) -> impl Iterator<Item = Linear> + use<> {
        let layers = self.config.layers;
        (0..layers).flat_map(|layer| Linear::KINDS.map(|kind| Linear::new(layer, kind)))
    }
    fn source(&self, layer: Option<u32>, kind: Kind) -> Option<&Source> {
        self.sources.get(&(layer, kind as u8))
    }
    /// What a linear is made from.
    pub(crate) fn source_of(&self, linear: Linear) -> &Source {
        self.source_in(linear).expect("every model has all linears")
    }
    /// What a linear or a norm of a layer is made from, in models that have it.
    pub(crate) fn source_in(&self, linear: Linear) -> Option<&Source> {
        self.source(linear.layer, linear.kind)
    }
    /// Whether a linear is of floats, and not binary or ternary already.
    pub fn is_dense(&self, linear: Linear) -> bool {
        matches!(self.source(linear.layer, linear.kind), Some(Source::Rows(_)))
    }

    /// The weights of a linear, row after row.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn weights(&self, linear: Linear) -> Result<Vec<f32>, Error> {
        let (rows, _) = self.shape(linear);
        self.rows(linear, 0, rows)
    }

    /// Some rows of a linear, or of the embedding.
    ///
    /// # Errors
    /// If they cannot be read.
    ///
    /// # Panics
    /// If there is no such linear.
    pub fn rows(&self, linear: Linear, first: usize, count: usize) -> Result<Vec<f32>, Error> {
        let source = self.source_of(linear);
        let (rows, cols) = self.shape(linear);
        let mut out = vec![0.0; count * cols];
        let read = |tensor, at: usize, out: &mut [f32]| {
            self.checkpoint.read_floats(tensor, (at * cols) as u64, &mut Vec::new(), out)
        };
        match source {
            Source::Rows(tensor) | Source::Grouped(tensor, _) => read(tensor, first, &mut out)?,
            Source::Ternary(tensor, magnitude, beside, _) => {
                read(tensor, first, &mut out)?;
                let weight = magnitude * beside;
                out.iter_mut().for_each(|v| *v = f32::from(i8::from(*v > 0.0) - i8::from(*v < 0.0)) * weight);
            }
            Source::Masters(tensor) => {
                let mut all = vec![0.0; rows * cols];
                read(tensor, 0, &mut all)?;
                let mut sum = MagnitudeSum::default();
                sum.add(&all);
                let (rule, mut codes) = (Absmean::new(sum.mean()), vec![0; count * cols]);
                rule.ternarize(&all[first * cols..][..count * cols], &mut codes);
                out.iter_mut().zip(codes).for_each(|(v, code)| *v = f32::from(code) * rule.multiplier);
            }
            Source::Packed(tensor, multiplier) => self.packed(tensor, *multiplier, (first, rows), &mut out)?,
            Source::Index | Source::Values(_) | Source::Vector(_) | Source::Part(..) => {
                unreachable!("{linear} is a whole matrix, or its model has linears with norms of their own")
            }
        }
        Ok(out)
    }

    /// Rows of a matrix whose bytes have four rows each, as transformers packs ternary weights.
    fn packed(
        &self,
        tensor: &TensorInfo,
        multiplier: f32,
        (first, rows): (usize, usize),
        out: &mut [f32],
    ) -> Result<(), Error> {
        let cols = tensor.shape[1] as usize;
        let quarter = rows.div_ceil(4);
        let mut raw = vec![0; cols];
        for (row, out) in (first..).zip(out.chunks_exact_mut(cols)) {
            self.checkpoint.read(tensor, (row % quarter * cols) as u64, &mut raw)?;
            for (v, byte) in out.iter_mut().zip(&raw) {
                *v = (f32::from(byte >> (2 * (row / quarter)) & 3) - 1.0) * multiplier;
            }
        }
        Ok(())
    }

    /// A vector of a layer, if the model has it.
    pub(super) fn vector(&self, layer: Option<u32>, kind: Kind, len: u32) -> Result<Option<Vec<f32>>, Error> {
        let Some(Source::Vector(tensor)) = self.source(layer, kind) else { return Ok(None) };
        let mut values = vec![0.0; len as usize];
        self.checkpoint.read_floats(tensor, 0, &mut Vec::new(), &mut values)?;
        Ok(Some(values))
    }

    /// The embedding of each token, row after row, of a model whose linears `change` changed: its head may be the embedding too.
    pub(super) fn embed_changed(&self, tokens: &[u32], change: &Change<'_>) -> Result<Vec<f32>, Error> {
        if !self.config.tied {
            return self.embed(tokens);
        }
        let mut head = self.weights(Linear::HEAD)?;
        change(Linear::HEAD, &mut head)?;
        let cols = self.config.hidden as usize;
        Ok(tokens.iter().flat_map(|&token| head[token as usize * cols..][..cols].iter().copied()).collect())
    }

    /// The embedding of each token, row after row.
    pub(super) fn embed(&self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let mut x = Vec::with_capacity(tokens.len() * self.config.hidden as usize);
        for &token in tokens {
            x.extend(self.rows(Linear::EMBEDDING, token as usize, 1)?);
        }
        Ok(x)
    }
}
