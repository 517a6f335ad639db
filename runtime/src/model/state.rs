//! One conversation: the keys and values of its past positions, in a fixed size.
use super::Config;
use crate::error::Error;
use crate::memory::{Arena, KvFormat, Limits, Plan, kv_blocks, kv_head_blocks, kv_scales};
use bitnet_kernel::Block;
use bitnet_kernel::float::{Cache, f32_to_f16};
use zerocopy::{FromBytes, IntoBytes};

/// One conversation in memory of [`Plan::state`] blocks.
///
/// After an error in the middle of a pass the state is what it was before the pass: positions count from the end of a pass,
/// and what was written past them is written again.
#[derive(Debug)]
pub struct State<'m> {
    keys: Store<'m>,
    values: Store<'m>,
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
        arena.finish();
        Ok(Self { keys, values, config: *config, limits: *limits, position: 0 })
    }
    /// Tokens in the conversation so far.
    pub const fn position(&self) -> usize {
        self.position
    }
    /// Positions that are left.
    pub const fn remaining(&self) -> usize {
        self.limits.context as usize - self.position
    }
    /// Forgets everything after the first `position` tokens.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn truncate(&mut self, position: usize) {
        assert!(position <= self.position, "a conversation of {} tokens cannot be cut to {position}", self.position);
        self.position = position;
    }
    /// Whether the state was made for this model and these limits.
    pub(super) fn fits(&self, config: &Config, limits: &Limits) -> bool {
        self.config == *config && self.limits.kv == limits.kv
    }
    pub(super) const fn context(&self) -> u32 {
        self.limits.context
    }
    /// Keeps the keys and values, `[kv_heads · head_dim]`, of one layer and position.
    pub(super) fn put(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        self.keys.put(layer, position, keys);
        self.values.put(layer, position, values);
    }
    /// One head's keys and values of the first `positions` positions.
    pub(super) fn head(&self, layer: usize, kv_head: usize, positions: usize) -> (Cache<'_>, Cache<'_>) {
        (self.keys.head(layer, kv_head, positions), self.values.head(layer, kv_head, positions))
    }
    /// Counts `tokens` more positions, whose keys and values are all there.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.position += tokens;
    }
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
            context: limits.context as usize,
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
