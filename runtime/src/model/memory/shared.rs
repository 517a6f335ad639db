//! Matrices beside attention that take attention's own queries, keys and values, those of a key head one (after Liger,
//! arXiv:2503.01496, and Infini-attention, arXiv:2404.07143; by the gated delta rule of arXiv:2412.06464).
//!
//! For queries, keys and values as they are before rotation, and a block's input `x`, as int8:
//!
//! ```text
//! a, b = gates(x)              q, k of each head divided by sqrt(Σ² + 1e-6)
//! alpha = exp(-exp(rate) · softplus(a + bias))      beta = 1 / (1 + exp(-(b + bias)))
//! S = delta_rule(S, k, alpha, beta, v)              of each key head, row by row
//! attention's results += share · rmsnorm(S q, 1e-5) of each query head
//! ```
use super::NORM_EPS;
use super::matrices::{Taken, recalled_of};
use crate::error::Error;
use crate::image::Kind;
use crate::memory::{attention_width, padded_rows};
use crate::model::{Memory, Model, State, ops};

impl Model<'_> {
    /// What is recalled for `n` tokens goes where `projected` has what [`Kind::MemoryGates`] made: `width` a token, after what query, key
    /// and value made, which stays as it is.
    pub(super) fn recall_by_attentions_key(
        &mut self,
        state: &mut State<'_>,
        layer: u32,
        n: usize,
        width: usize,
    ) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let m = Memory::Shared.matrices(&c).expect("a shared memory is one of matrices");
        let (query_width, kv_width, head_dim) = (c.query_width() as usize, c.kv_width() as usize, c.head_dim as usize);
        let (key_at, value_at) = (padded_rows(query_width), padded_rows(query_width) + padded_rows(kv_width));
        let gates_at = attention_width(&c);
        let at = gates_at + padded_rows(2 * m.heads as usize);
        for row in self.scratch.projected[..n * width].chunks_exact_mut(width) {
            let (theirs, ours) = row.split_at_mut(at);
            ours[..query_width].copy_from_slice(&theirs[..query_width]);
            ours[query_width..][..kv_width].copy_from_slice(&theirs[key_at..][..kv_width]);
            ours[query_width + kv_width..][..kv_width].copy_from_slice(&theirs[value_at..][..kv_width]);
            let gates = &theirs[gates_at..][..2 * m.heads as usize];
            if !ops::finite(&ours[..query_width + 2 * kv_width]) || !ops::finite(gates) {
                return Err(Error::NotFinite { layer });
            }
        }
        let group = (c.heads / c.kv_heads) as usize;
        self.recall(state, Taken { matrices: m, group, at, gates_at }, layer, n, width)?;

        let norm = &ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryNorm))?)[..head_dim];
        let (kernels, s) = (self.machine.kernels, &mut self.scratch);
        for (t, row) in s.projected.chunks_exact_mut(width).enumerate().take(n) {
            for (i, out) in row[gates_at..][..query_width].chunks_exact_mut(head_dim).enumerate() {
                recalled_of(s.units, m, n * group, i / group, t * group + i % group, out);
                kernels.rmsnorm(out, norm, NORM_EPS);
            }
        }
        Ok(())
    }
}
