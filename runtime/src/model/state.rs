//! One conversation in a fixed size: the keys and values of its past positions, or of those in a window, and a memory of the others.
mod difference;
mod snapshot;
mod waiting;

use super::Config;
use crate::error::Error;
use crate::memory::{Arena, KvFormat, Limits, Plan, kv_blocks, kv_head_blocks, kv_positions, kv_scales, state_lens};
use bitnet_kernel::Block;
use bitnet_kernel::float::{Cache, f16_to_f32, f32_to_f16};
use core::ops::Range;
pub use difference::Difference;
use waiting::Waiting;
use zerocopy::{FromBytes, IntoBytes};

/// One conversation in memory of [`Plan::state`] blocks.
///
/// After an error in the middle of a pass the state is what it was before the pass: positions count from the end of a pass,
/// and what was written past them is written again. Of a memory there are two copies for that: a pass reads one and writes the
/// other, and until the next one begins there is a way back.
#[derive(Debug)]
pub struct State<'m> {
    keys: Store<'m>,
    values: Store<'m>,
    /// Two copies; that of the conversation is number `now`.
    memory: [Recurrent<'m>; 2],
    now: usize,
    waiting: Waiting<'m>,
    /// Where the last pass began, if the copy from before it is still there.
    before: Option<usize>,
    /// The first position, with a window after the sinks, whose keys and values are there.
    oldest: usize,
    config: Config,
    limits: Limits,
    position: usize,
}

impl<'m> State<'m> {
    /// An empty conversation.
    ///
    /// # Errors
    /// If the limits are beyond the model's or the memory is too small.
    pub fn new(config: &Config, limits: &Limits, memory: &'m mut [Block]) -> Result<Self, Error> {
        limits.check(config)?;
        let mut arena = Arena::new("a conversation", memory, Plan::new(config, limits).state)?;
        let mut store = || Store {
            blocks: arena.take_blocks(kv_blocks(config, limits)),
            scales: arena.take(kv_scales(config, limits)),
            shape: Shape::new(config, limits),
        };
        let (keys, values) = (store(), store());
        let mut recurrent = || {
            let (numbers, past) = state_lens(config);
            let all: &mut [f32] = arena.take(config.layers as usize * (numbers + past));
            all.fill(0.0);
            let (all_numbers, all_past) = all.split_at_mut(config.layers as usize * numbers);
            Recurrent { numbers: all_numbers, past: all_past }
        };
        let memory = [recurrent(), recurrent()];
        let waiting = Waiting::new(config, limits, &mut arena);
        arena.finish();
        let mut state = Self {
            keys,
            values,
            memory,
            now: 0,
            waiting,
            before: None,
            oldest: 0,
            config: *config,
            limits: *limits,
            position: 0,
        };
        state.oldest = state.oldest_after(0);
        Ok(state)
    }
    /// Tokens in the conversation so far.
    pub const fn position(&self) -> usize {
        self.position
    }
    /// Positions that are left: with a window or a recurrence as many as can be counted.
    pub const fn remaining(&self) -> usize {
        let end = if self.config.is_bounded() { self.limits.context as usize } else { usize::MAX / 2 };
        end - self.position
    }
    /// Forgets everything after the first `position` tokens, and more where that cannot be undone alone: returns how many tokens
    /// the conversation still has, at most `position`, and what follows them must be read again.
    ///
    /// Keys and values can be cut anywhere; those of a window until something has left it, and then by no more than a batch. A
    /// memory and a recurrence go back to where the last pass began, or to nothing.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn rewind(&mut self, position: usize) -> usize {
        assert!(position <= self.position, "a conversation of {} tokens cannot be cut to {position}", self.position);
        let position = if self.first_seen(position) < self.oldest { 0 } else { position };
        if position == 0 {
            self.oldest = self.oldest_after(0);
        }
        if !self.config.is_stateful() || position == self.position {
            self.position = position;
        } else if self.before == Some(position) {
            self.now ^= 1;
            self.before = None;
            self.position = position;
        } else {
            let now = &mut self.memory[self.now];
            now.numbers.fill(0.0);
            now.past.fill(0.0);
            self.before = None;
            self.oldest = self.oldest_after(0);
            self.position = 0;
        }
        self.position
    }
    /// Makes this a conversation of `position` tokens, those after what has been read unknown: for them is kept what lies there, zeros
    /// or what was there before. For measuring what a token takes late in a conversation without reading up to there.
    ///
    /// # Errors
    /// If the context ends before.
    ///
    /// # Panics
    /// If more tokens have been read.
    pub fn skip_to(&mut self, position: usize) -> Result<(), Error> {
        assert!(position >= self.position, "a conversation of {} tokens does not skip to {position}", self.position);
        if position - self.position > self.remaining() {
            return Err(Error::ContextFull { context: self.limits.context });
        }
        (self.position, self.oldest, self.before) = (position, self.oldest_after(position), None);
        Ok(())
    }
    /// Whether the state was made for this model and these limits.
    pub(super) fn fits(&self, config: &Config, limits: &Limits) -> bool {
        let ring = config.window.is_none() || limits.batch <= self.limits.batch;
        self.config == *config && self.limits.kv == limits.kv && ring
    }
    pub(super) const fn context(&self) -> u32 {
        self.limits.context
    }
    /// Where the keys and values of a position lie.
    pub(super) const fn slot(&self, position: usize) -> usize {
        match self.config.window {
            Some(window) => {
                let sinks = window.sinks as usize;
                let ring = (window.positions + self.limits.batch - 1) as usize;
                if position < sinks { position } else { sinks + (position - sinks) % ring }
            }
            None => position,
        }
    }
    /// The first position, with a window after the sinks, that the token after `position` others sees.
    const fn first_seen(&self, position: usize) -> usize {
        match self.config.window {
            Some(window) => {
                let (sinks, first) = (window.sinks as usize, (position + 1).saturating_sub(window.positions as usize));
                if first > sinks { first } else { sinks }
            }
            None => 0,
        }
    }
    /// The first position that is still there when the first `positions` were written, one after another.
    const fn oldest_after(&self, positions: usize) -> usize {
        match self.config.window {
            Some(window) => {
                let ring = (window.positions + self.limits.batch - 1) as usize;
                let (sinks, first) = (window.sinks as usize, positions.saturating_sub(ring));
                if first > sinks { first } else { sinks }
            }
            None => 0,
        }
    }
    /// What one layer keeps: as it is, and where that after this pass goes, which is over what was before the last pass: if this one
    /// fails, there is no way back to that.
    pub(super) fn recurrent(&mut self, layer: usize) -> Recurrence<'_, 'm> {
        self.before = None;
        let (numbers, past) = state_lens(&self.config);
        let [first, second] = &mut self.memory;
        let (now, next) = if self.now == 0 { (first, second) } else { (second, first) };
        Recurrence {
            numbers: &now.numbers[layer * numbers..][..numbers],
            past: &now.past[layer * past..][..past],
            next_numbers: &mut next.numbers[layer * numbers..][..numbers],
            next_past: &mut next.past[layer * past..][..past],
            waiting: &mut self.waiting,
        }
    }
    /// One position's key and value of one head, as floats.
    pub(super) fn row(&self, layer: usize, kv_head: usize, position: usize, key: &mut [f32], value: &mut [f32]) {
        let slot = self.slot(position);
        self.keys.row(layer, kv_head, slot, key);
        self.values.row(layer, kv_head, slot, value);
    }
    /// Keeps the keys and values, `[kv_heads · head_dim]`, of one layer and position.
    pub(super) fn put(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let slot = self.slot(position);
        self.oldest = self.oldest.max(self.oldest_after(position + 1));
        self.keys.put(layer, slot, keys);
        self.values.put(layer, slot, values);
    }
    /// One head's keys and values of the first `positions` positions.
    pub(super) fn head(&self, layer: usize, kv_head: usize, positions: usize) -> (Cache<'_>, Cache<'_>) {
        (self.keys.head(layer, kv_head, positions), self.values.head(layer, kv_head, positions))
    }
    /// Counts `tokens` more positions, whose keys and values are all there.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.before = Some(self.position);
        self.now ^= 1;
        self.position += tokens;
    }
}

/// One layer's memory or recurrence in a pass, and what waits for it.
#[derive(Debug)]
pub(super) struct Recurrence<'s, 'm> {
    /// Its matrices, its vector or its state.
    pub numbers: &'s [f32],
    /// The last inputs of its convolution.
    pub past: &'s [f32],
    pub next_numbers: &'s mut [f32],
    pub next_past: &'s mut [f32],
    /// Of all layers.
    pub waiting: &'s mut Waiting<'m>,
}

/// What a memory or a recurrence keeps of all layers.
#[derive(Debug)]
struct Recurrent<'m> {
    /// `[layer][head][value][key]`; of a vector `[layer][width]`, of a recurrence `[layer][hidden]`.
    numbers: &'m mut [f32],
    /// `[layer][3][channels]`.
    past: &'m mut [f32],
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    kv: KvFormat,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    head_blocks: usize,
}

impl Shape {
    const fn new(c: &Config, limits: &Limits) -> Self {
        Self {
            kv: limits.kv,
            kv_heads: c.kv_heads as usize,
            head_dim: c.head_dim as usize,
            context: kv_positions(c, limits),
            head_blocks: kv_head_blocks(c, limits),
        }
    }
}

/// Keys (or values): `[layer][kv head][position][head_dim]`, so that a head reads one run of memory.
#[derive(Debug)]
struct Store<'m> {
    blocks: &'m mut [Block],
    /// `[layer][kv head][position]`; empty unless int8.
    scales: &'m mut [f32],
    shape: Shape,
}

impl Store<'_> {
    /// Heads of all layers.
    const fn heads(&self) -> usize {
        // Without attention there are none.
        match self.blocks.len().checked_div(self.shape.head_blocks) {
            Some(heads) => heads,
            None => 0,
        }
    }
    /// One row of head `head` of all layers', as it is kept, and its scale if it has one.
    fn bytes(&self, head: usize, slot: usize) -> (&[u8], &[f32]) {
        let (row, scale) = self.places(head, slot);
        (&self.blocks.as_bytes()[row], &self.scales[scale])
    }
    fn bytes_mut(&mut self, head: usize, slot: usize) -> (&mut [u8], &mut [f32]) {
        let (row, scale) = self.places(head, slot);
        (&mut self.blocks.as_mut_bytes()[row], &mut self.scales[scale])
    }
    fn places(&self, head: usize, slot: usize) -> (Range<usize>, Range<usize>) {
        let Shape { kv, head_dim, context, head_blocks, .. } = self.shape;
        let (row, scale) = (head * head_blocks * Block::BYTES + slot * head_dim * kv.bytes(), head * context + slot);
        let scales = if kv == KvFormat::I8 { scale..scale + 1 } else { 0..0 };
        (row..row + head_dim * kv.bytes(), scales)
    }
    fn put(&mut self, layer: usize, position: usize, x: &[f32]) {
        let Shape { kv, kv_heads, head_dim, context, head_blocks } = self.shape;
        for (h, x) in x.chunks_exact(head_dim).enumerate() {
            let head = layer * kv_heads + h;
            let bytes = self.blocks[head * head_blocks..][..head_blocks].as_mut_bytes();
            let row = &mut bytes[position * head_dim * kv.bytes()..][..head_dim * kv.bytes()];
            match kv {
                KvFormat::F32 => row.copy_from_slice(x.as_bytes()),
                KvFormat::F16 => {
                    for (row, &x) in row.chunks_exact_mut(2).zip(x) {
                        row.copy_from_slice(&f32_to_f16(x).to_le_bytes());
                    }
                }
                KvFormat::I8 => {
                    let row = <[i8]>::mut_from_bytes(row).expect("bytes");
                    let scale = bitnet_kernel::float::quantize(x, row).expect("the pass checked that all are finite");
                    let scale = 1.0 / scale;
                    self.scales[head * context + position] = scale;
                }
            }
        }
    }
    /// One row, in the numbers that [`Cache`] stands for.
    fn row(&self, layer: usize, kv_head: usize, slot: usize, out: &mut [f32]) {
        let (row, scale) = self.bytes(layer * self.shape.kv_heads + kv_head, slot);
        match self.shape.kv {
            KvFormat::F32 => out.copy_from_slice(<[f32]>::ref_from_bytes(row).expect("blocks are aligned")),
            KvFormat::F16 => {
                let halves = <[u16]>::ref_from_bytes(row).expect("blocks are aligned");
                out.iter_mut().zip(halves).for_each(|(out, &half)| *out = f16_to_f32(half));
            }
            KvFormat::I8 => {
                let (codes, scale) = (<[i8]>::ref_from_bytes(row).expect("bytes"), scale[0]);
                out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code) * scale);
            }
        }
    }
    fn head(&self, layer: usize, kv_head: usize, positions: usize) -> Cache<'_> {
        let Shape { kv, kv_heads, head_dim, context, head_blocks } = self.shape;
        let head = layer * kv_heads + kv_head;
        let bytes = self.blocks[head * head_blocks..][..head_blocks].as_bytes();
        let rows = &bytes[..positions * head_dim * kv.bytes()];
        match kv {
            KvFormat::F32 => Cache::F32(<[f32]>::ref_from_bytes(rows).expect("blocks are aligned")),
            KvFormat::F16 => Cache::F16(<[u16]>::ref_from_bytes(rows).expect("blocks are aligned")),
            KvFormat::I8 => Cache::I8 {
                codes: <[i8]>::ref_from_bytes(rows).expect("bytes"),
                scales: &self.scales[head * context..][..positions],
            },
        }
    }
}
