//! The memory beside attention: what it takes from a block's input, a state of fixed size, and what is read from it.
//!
//! ```text
//! m = matrices or vector(x)
//! attention's results += share · output(m)
//! ```
//!
//! or, by attention's own queries, keys and values, `attention's results += share · shared(q, k, v)`.
//!
//! With delayed writes the state takes in a token when that leaves the window, by what was made of it when it came: so memory and
//! attention divide the past between them (LoLCATs, arXiv:2410.10254), and until then the state is zero and adds nothing.
mod matrices;
mod shared;
mod vector;

use super::{Memory, Model, Quantizer, State, ops};
use crate::error::Error;
use crate::image::Kind;
use crate::memory::attention_width;

const NORM_EPS: f32 = 1e-5;

impl Model<'_> {
    /// The results of the memory for `n` tokens, if there is one, go where `projected` has what its first linears made: `width` a
    /// token, after those of query, key and value.
    pub(super) fn remember(&mut self, state: &mut State<'_>, layer: u32, n: usize, width: usize) -> Result<(), Error> {
        let Some(memory) = self.config.memory else { return Ok(()) };
        match memory {
            Memory::Matrices(matrices) => self.recall_by_key(state, matrices, layer, n, width)?,
            Memory::Vector(vector) => self.recall_vector(state, vector, layer, n, width)?,
            Memory::Shared => return self.recall_by_attentions_key(state, layer, n, width),
        }
        let (output, at) = (self.weights.layer(layer).linear(Kind::MemoryOutput), attention_width(&self.config));
        self.linears(layer, &[output], Quantizer::Int8, memory.results() as usize, n, width, at)
    }

    /// `norm += share · what the memory gave`, for `n` tokens, if there is one.
    pub(super) fn add_remembered(&mut self, layer: u32, n: usize, width: usize) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        if c.memory.is_none() {
            return Ok(());
        }
        let query_width = c.query_width() as usize;
        let share = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryShare))?);
        let s = &mut self.scratch;
        let rows = s.projected.chunks_exact(width).map(|row| &row[attention_width(&c)..][..query_width]);
        for (x, row) in s.norm.chunks_exact_mut(query_width).zip(rows).take(n) {
            for ((x, y), share) in x.iter_mut().zip(row).zip(share) {
                *x += share * y;
            }
        }
        Ok(())
    }
}
