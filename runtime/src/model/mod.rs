//! The model: fixed configuration, fixed memory, one pass for each batch of tokens.
//!
//! [`config`](Config) says what the model is, [`state`](State) is one conversation, `weights` finds the matrices of a
//! layer, `linear` multiplies them, `sparse` those without their zeros, `head` does so in two stages where the head is in two
//! planes, `forward` is the whole pass, `memory` the state of fixed size beside attention, `recurrence` that in its place, and
//! `ops` are the floats between the matrices.
mod config;
mod forward;
mod head;
mod linear;
mod live;
mod memory;
mod ops;
mod recurrence;
mod sparse;
mod state;
mod weights;

pub use config::{Activation, Config, Matrices, Memory, Quantizer, Quantizers, Rope, Vector, Window};
pub use head::{HeadStats, Need};
pub use state::{Difference, State};

use crate::error::Error;
use crate::image::Image;
use crate::memory::{Arena, Limits, Plan, Sizes, coarse_len, padded_rows, recalled_len};
use crate::parallel::Parallel;
use crate::source::WeightSource;
use bitnet_kernel::{Block, Kernels};
use core::fmt;
pub use live::LiveRows;
use weights::Weights;

const BATCH_MAX: usize = Limits::BATCH_MAX as usize;

/// A model ready to run. No type parameters: the backend, the threads and the source are trait objects.
pub struct Model<'m> {
    config: Config,
    limits: Limits,
    weights: Weights<'m>,
    machine: Machine<'m>,
    scratch: Scratch<'m>,
    head_stats: HeadStats,
    live: LiveRows,
    /// Tokens whose results of all layers the scratch memory has: those of the last pass, none if it failed.
    read: usize,
}

/// What computes, and what it reads.
struct Machine<'m> {
    kernels: &'m dyn Kernels,
    parallel: &'m dyn Parallel,
    source: &'m mut dyn WeightSource,
}

/// The activations of one pass; `[batch]` rows of each, but for the logits.
struct Scratch<'m> {
    /// The residual stream, `[hidden]`.
    x: &'m mut [f32],
    /// What the next linears read: a normalized vector, or results of attention or of the gate, `[widest]`.
    norm: &'m mut [f32],
    /// The input of a linear that normalizes it, `[widest]`; empty in models without such linears.
    input: &'m mut [f32],
    /// Activations in int8, padded.
    quantized: &'m mut [i8],
    /// Those of the columns that a compacted linear keeps; empty in models without an index.
    gathered: &'m mut [i8],
    /// Starts of the units of a block-sparse linear; empty in models without an index.
    starts: &'m mut [u32],
    /// What the backend prepared for it.
    tables: &'m mut [Block],
    /// Results of the linears that share an input, each padded to whole units.
    projected: &'m mut [f32],
    /// The same, ordered by unit and then by token, as the threads write them.
    units: &'m mut [f32],
    /// Cosines and sines of a position's angles, `[head_dim / 2]` each; with a window of all positions in it.
    rotation: &'m mut [f32],
    /// Whether they are there: those of a window never change.
    rotation_is_set: bool,
    /// What one query sees through a window: for each key head rotated keys, values, and the results of its queries.
    seen: &'m mut [f32],
    /// What one matrix of a memory recalls, `[value]`; empty in models without matrices.
    recalled: &'m mut [f32],
    /// What the first stage of a head in two planes says of every row; empty for other heads.
    coarse: &'m mut [f32],
    /// `[vocab]`, of one token, padded to whole units.
    logits: &'m mut [f32],
}

impl<'m> Model<'m> {
    /// Prepares to run the model of `image`, whose weights `source` lends. `memory` has [`Plan::scratch`] blocks; nothing is
    /// allocated afterwards.
    ///
    /// # Errors
    /// If the limits are beyond the model's or the memory is too small.
    pub fn new(
        image: &Image<'m>,
        limits: Limits,
        kernels: &'m dyn Kernels,
        parallel: &'m dyn Parallel,
        source: &'m mut dyn WeightSource,
        memory: &'m mut [Block],
    ) -> Result<Self, Error> {
        let config = image.header().config;
        limits.check(&config)?;
        let mut arena = Arena::new("activations", memory, Plan::new(&config, &limits).scratch)?;
        let (batch, sizes) = (limits.batch as usize, Sizes::new(&config));
        let scratch = Scratch {
            x: arena.take(batch * config.hidden as usize),
            norm: arena.take(batch * config.widest() as usize),
            input: arena.take(if config.linear_norm_eps.is_some() { batch * config.widest() as usize } else { 0 }),
            quantized: arena.take(batch * sizes.quantized),
            gathered: arena.take(if config.sparse { batch * sizes.quantized } else { 0 }),
            starts: arena.take(if config.sparse { sizes.starts } else { 0 }),
            tables: arena.take_blocks(batch * sizes.tables),
            projected: arena.take(batch * sizes.projected),
            units: arena.take(sizes.units(batch)),
            rotation: arena.take(sizes.rotations(batch) * config.head_dim as usize),
            rotation_is_set: false,
            seen: arena.take(sizes.seen),
            recalled: arena.take(recalled_len(&config)),
            coarse: arena.take(coarse_len(&config)),
            logits: arena.take(padded_rows(config.vocab as usize)),
        };
        arena.finish();
        let machine = Machine { kernels, parallel, source };
        let (head_stats, live) = (HeadStats::default(), LiveRows::default());
        Ok(Self { config, limits, weights: Weights::new(image), machine, scratch, head_stats, live, read: 0 })
    }

    /// The model's shape.
    pub const fn config(&self) -> &Config {
        &self.config
    }
    /// The limits it was made with.
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }
    /// What the two stages of the head have read since the model was made.
    pub const fn head_stats(&self) -> HeadStats {
        self.head_stats
    }
    /// The logits of the last position that was computed, `[vocab]`.
    pub fn logits(&self) -> &[f32] {
        &self.scratch.logits[..self.config.vocab as usize]
    }
}

impl fmt::Debug for Model<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = f.debug_struct("Model");
        f.field("config", &self.config).field("limits", &self.limits).field("kernels", &self.machine.kernels);
        f.finish_non_exhaustive()
    }
}
