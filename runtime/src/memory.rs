//! The memory plan: every size follows from [`Config`] and [`Limits`], before anything runs.
use crate::error::Error;
use crate::model::{Config, Memory};
use bitnet_kernel::{Block, Format};
use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

/// What the user chooses, and memory depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Positions a conversation can have; at most the model's own.
    pub context: u32,
    /// Tokens of a prompt that share one pass over the weights, 1 to [`Limits::BATCH_MAX`].
    pub batch: u32,
    /// How keys and values are kept.
    pub kv: KvFormat,
}

/// How the keys and values of past positions are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvFormat {
    /// f32: for comparing with other implementations.
    F32,
    /// Half precision.
    F16,
    /// int8, one scale a head and position.
    I8,
}

impl KvFormat {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
            Self::I8 => 1,
        }
    }
}

impl Limits {
    /// Most tokens in a batch.
    pub const BATCH_MAX: u32 = 16;

    /// What an image's header plans for unless told otherwise: the model's own context but at most 4,096, batches of 8,
    /// half-precision keys and values.
    pub const fn default_for(c: &Config) -> Self {
        Self { context: if c.context < 4096 { c.context } else { 4096 }, batch: 8, kv: KvFormat::F16 }
    }
    /// Checks the limits against the model.
    ///
    /// # Errors
    /// [`Error::Limit`].
    pub const fn check(&self, c: &Config) -> Result<(), Error> {
        if self.context == 0 || self.context > c.context {
            return Err(Error::Limit { what: "context", given: self.context, max: c.context });
        }
        if self.batch == 0 || self.batch > Self::BATCH_MAX {
            return Err(Error::Limit { what: "batch", given: self.batch, max: Self::BATCH_MAX });
        }
        Ok(())
    }
}

/// Memory each part needs, in blocks of 64 bytes. `const`, so that a board can size a `static` with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One conversation: keys and values of every position.
    pub state: usize,
    /// Activations of one pass, shared by all conversations.
    pub scratch: usize,
    /// The sampler's scores and candidates.
    pub sampler: usize,
}

impl Plan {
    /// The plan for one model. `c` and `limits` have been checked.
    pub const fn new(c: &Config, limits: &Limits) -> Self {
        let (batch, hidden, widest) = (limits.batch as usize, c.hidden as usize, c.widest() as usize);
        let scratch = Sizes::new(c);
        Self {
            state: 2 * (kv_blocks(c, limits) + blocks::<f32>(kv_scales(c, limits)))
                + 2 * state_blocks(c)
                + blocks::<f32>(waiting_len(c, limits)),
            scratch: blocks::<f32>(batch * hidden)
                + blocks::<f32>(batch * widest)
                + if c.linear_norm_eps.is_some() { blocks::<f32>(batch * widest) } else { 0 }
                + blocks::<i8>(batch * scratch.quantized)
                + if c.sparse { blocks::<i8>(batch * scratch.quantized) + blocks::<u32>(scratch.starts) } else { 0 }
                + batch * scratch.tables
                + blocks::<f32>(batch * scratch.projected)
                + blocks::<f32>(scratch.units(batch))
                + blocks::<f32>(scratch.rotations(batch) * c.head_dim as usize)
                + blocks::<f32>(scratch.seen)
                + blocks::<f32>(recalled_len(c))
                + blocks::<f32>(coarse_len(c))
                + blocks::<f32>(padded_rows(c.vocab as usize)),
            sampler: sampler_blocks(c.vocab),
        }
    }
    /// All parts together, in blocks.
    pub const fn blocks(&self) -> usize {
        self.state + self.scratch + self.sampler
    }
    /// All parts together, in bytes.
    pub const fn bytes(&self) -> u64 {
        (self.blocks() * Block::BYTES) as u64
    }
}

/// Bytes of a conversation that its next token reads when it has `positions` tokens already: keys and values of what attention
/// sees, this token's own included, the state of a memory or a recurrence, and the token that a memory is given late.
pub const fn read_bytes(c: &Config, limits: &Limits, positions: u64) -> u64 {
    let seen = match c.window {
        Some(window) if positions + 1 > window.span() as u64 => window.span() as u64,
        _ if c.recurrence => 0,
        _ => positions + 1,
    };
    let scale = if matches!(limits.kv, KvFormat::I8) { size_of::<f32>() } else { 0 };
    let row = c.head_dim as usize * limits.kv.bytes() + scale;
    let (numbers, past) = state_lens(c);
    let written = if c.delayed_writes && written_with(c, positions as usize).is_some() { write_len(c) } else { 0 };
    let layer = seen * 2 * (c.kv_heads as usize * row) as u64 + (size_of::<f32>() * (numbers + past + written)) as u64;
    c.layers as u64 * layer
}

/// Sizes of the scratch memory that the plan and the carving share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    /// int8 activations of one token, padded for every format.
    pub quantized: usize,
    /// Blocks of tables of one token.
    pub tables: usize,
    /// Results of one token of the linears that share an input, and beside attention's of the memory.
    pub projected: usize,
    /// Units of the highest linear that may be block-sparse.
    pub starts: usize,
    /// What one query sees through a window, of all heads.
    pub seen: usize,
    /// Positions in the window, or 0.
    span: usize,
    /// Whether queries and keys turn.
    rotates: bool,
    /// Of a memory's matrices, if there are some: rows of all, columns, and queries that read one.
    rows: usize,
    columns: usize,
    group: usize,
}

impl Sizes {
    pub(crate) const fn new(c: &Config) -> Self {
        let widest = c.widest() as usize;
        let (mut quantized, mut tables, mut i) = (0, 0, 0);
        while i < Format::ALL.len() {
            let format = Format::ALL[i];
            quantized = max(quantized, format.padded_cols(widest));
            if c.formats >> format as u8 & 1 == 1 {
                tables = max(tables, format.table_blocks(widest));
            }
            i += 1;
        }
        let attention = attention_width(c) + memory_width(c);
        let projected = max(attention, max(2 * padded_rows(c.ffn as usize), padded_rows(c.hidden as usize)));
        let (span, group) = match c.window {
            Some(window) => (window.span() as usize, (c.heads / c.kv_heads) as usize),
            None => (0, 0),
        };
        let seen = c.kv_heads as usize * seen_len(span, group, c.head_dim as usize);
        let quantized = quantized.next_multiple_of(Block::BYTES);
        let highest = max(padded_rows(c.widest() as usize), padded_rows(c.kv_width() as usize));
        let starts = highest / crate::image::UNIT_ROWS;
        let [rows, columns, group] = match c.memory {
            Some(memory) => match memory.matrices(c) {
                Some(m) => [m.values() as usize, m.key as usize, (memory.queries(c) / m.heads) as usize],
                None => [0; 3],
            },
            None => [0; 3],
        };
        Self { quantized, tables, projected, starts, seen, span, rotates: !c.recurrence, rows, columns, group }
    }
    /// Results in the order in which threads write them: those of linears of a batch, or the rows of a memory's matrices, each
    /// with a result a token and query.
    pub(crate) const fn units(&self, batch: usize) -> usize {
        max(batch * self.projected, self.rows * (self.columns + batch * self.group))
    }
    /// Positions whose angles are kept.
    pub(crate) const fn rotations(&self, batch: usize) -> usize {
        if self.span > 0 {
            self.span
        } else if self.rotates {
            batch
        } else {
            0
        }
    }
}

/// Keys and values that one key head's queries see, `span` of either, and what `group` queries make of them.
pub(crate) const fn seen_len(span: usize, group: usize, head_dim: usize) -> usize {
    (2 * span + group) * head_dim
}

/// Results of one token of query, key and value, or of the three linears of a recurrence, each padded to whole units.
pub(crate) const fn attention_width(c: &Config) -> usize {
    padded_rows(c.query_width() as usize) + 2 * padded_rows(c.kv_width() as usize)
}

/// What the memory has beside them: what its first linears made, or its gate and copies of theirs, and then, in the same place,
/// its results.
pub(crate) const fn memory_width(c: &Config) -> usize {
    match c.memory {
        Some(m) => {
            let copied = if let Memory::Shared = m { c.query_width() + 2 * c.kv_width() } else { 0 };
            let taken = padded_rows((m.inputs() + copied) as usize) + padded_rows(m.gates(c) as usize);
            max(taken, padded_rows(c.query_width() as usize))
        }
        None => 0,
    }
}

/// Floats of one result of a matrix of a memory, if there are matrices.
pub(crate) const fn recalled_len(c: &Config) -> usize {
    match c.memory {
        Some(memory) => match memory.matrices(c) {
            Some(m) => m.value as usize,
            None => 0,
        },
        None => 0,
    }
}

/// Floats of one layer that a memory keeps in its matrices or its vector, or a recurrence; and of the last inputs of a memory's
/// convolution.
pub(crate) const fn state_lens(c: &Config) -> (usize, usize) {
    match c.memory {
        Some(memory) => (memory.state_len(c), memory.past_len()),
        None if c.recurrence => (c.hidden as usize, 0),
        None => (0, 0),
    }
}

/// Blocks of one copy of that, of all layers.
pub(crate) const fn state_blocks(c: &Config) -> usize {
    let (numbers, past) = state_lens(c);
    blocks::<f32>(c.layers as usize * (numbers + past))
}

/// Floats that decide what one layer's memory becomes with a token, if they wait.
pub(crate) const fn write_len(c: &Config) -> usize {
    match c.memory {
        Some(memory) if c.delayed_writes => memory.write_len(c),
        _ => 0,
    }
}

/// Tokens of which these are kept: those in the window, and a batch, since a pass that fails is made again.
pub(crate) const fn waiting_slots(c: &Config, limits: &Limits) -> usize {
    match c.window {
        Some(window) if c.delayed_writes => (window.positions + limits.batch) as usize,
        _ => 0,
    }
}

/// Floats of all these tokens and layers.
pub(crate) const fn waiting_len(c: &Config, limits: &Limits) -> usize {
    c.layers as usize * waiting_slots(c, limits) * write_len(c)
}

/// The token that a memory is given with the one at `position`: itself, or the one that leaves the window, if one does.
pub(crate) const fn written_with(c: &Config, position: usize) -> Option<usize> {
    match c.window {
        Some(window) if c.delayed_writes => match position.checked_sub(window.positions as usize) {
            Some(left) if left >= window.sinks as usize => Some(left),
            _ => None,
        },
        _ => Some(position),
    }
}

/// Positions whose keys and values are kept. Those of a window lie in a ring after the sinks, which has a batch less one more than
/// the window: what a batch's first token sees its last one must not overwrite.
pub(crate) const fn kv_positions(c: &Config, limits: &Limits) -> usize {
    match c.window {
        Some(window) => (window.span() + limits.batch - 1) as usize,
        None if c.recurrence => 0,
        None => limits.context as usize,
    }
}

/// Blocks of a sampler's scores and candidates.
pub(crate) const fn sampler_blocks(vocab: u32) -> usize {
    blocks::<f32>(vocab as usize) + blocks::<u32>(vocab as usize)
}

/// Values of each row that the first stage of a head in two planes keeps: a sum, an estimate and a bound.
pub(crate) const COARSE_VALUES: usize = 3;

/// Such values of all rows.
pub(crate) const fn coarse_len(c: &Config) -> usize {
    if c.split_head { COARSE_VALUES * padded_rows(c.vocab as usize) } else { 0 }
}

/// Rows rounded up to whole units of an image, so that every unit's results have a place of their own.
pub(crate) const fn padded_rows(rows: usize) -> usize {
    rows.next_multiple_of(crate::image::UNIT_ROWS)
}

/// Blocks of one layer's keys (or values) of one head.
pub(crate) const fn kv_head_blocks(c: &Config, limits: &Limits) -> usize {
    (kv_positions(c, limits) * c.head_dim as usize * limits.kv.bytes()).div_ceil(Block::BYTES)
}

/// Blocks of all keys (or values).
pub(crate) const fn kv_blocks(c: &Config, limits: &Limits) -> usize {
    c.layers as usize * c.kv_heads as usize * kv_head_blocks(c, limits)
}

/// Scales of all keys (or values).
pub(crate) const fn kv_scales(c: &Config, limits: &Limits) -> usize {
    match limits.kv {
        KvFormat::I8 => c.layers as usize * c.kv_heads as usize * kv_positions(c, limits),
        KvFormat::F32 | KvFormat::F16 => 0,
    }
}

const fn max(a: usize, b: usize) -> usize {
    if a > b { a } else { b }
}

pub(crate) const fn blocks<T>(n: usize) -> usize {
    (n * size_of::<T>()).div_ceil(Block::BYTES)
}

/// Hands out slices of one buffer; once the plan is carved nothing is left to allocate.
#[derive(Debug)]
pub(crate) struct Arena<'m>(&'m mut [Block]);

impl<'m> Arena<'m> {
    pub(crate) fn new(what: &'static str, memory: &'m mut [Block], needed: usize) -> Result<Self, Error> {
        let given = memory.len();
        memory.get_mut(..needed).map(Self).ok_or(Error::Memory { what, needed, given })
    }
    pub(crate) fn take<T: FromBytes + IntoBytes>(&mut self, n: usize) -> &'m mut [T] {
        let taken = self.take_blocks(blocks::<T>(n));
        let taken: &'m mut [T] = <[T]>::mut_from_bytes(taken.as_mut_bytes()).expect("64 % size == 0");
        &mut taken[..n]
    }
    pub(crate) fn take_blocks(&mut self, n: usize) -> &'m mut [Block] {
        let (taken, rest) = core::mem::take(&mut self.0).split_at_mut(n);
        self.0 = rest;
        taken
    }
    pub(crate) fn finish(self) {
        assert!(self.0.is_empty(), "the plan and the carving disagree");
    }
}
