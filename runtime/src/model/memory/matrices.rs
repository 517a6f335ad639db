//! Matrices beside attention, with queries, keys and values of their own (BitRNN-M; the gated delta rule of arXiv:2412.06464 with
//! 1-bit projections).
//!
//! For a block's input `x`, as int8:
//!
//! ```text
//! u, z = input(x)              a, b = gates(x)
//! q, k, v = silu(convolve(u))  q, k of each head divided by sqrt(Σ² + 1e-6)
//! alpha = exp(-exp(rate) · softplus(a + bias))      beta = 1 / (1 + exp(-(b + bias)))
//! S = delta_rule(S, k, alpha, beta, v)              of each head, row by row
//! o = S q
//! m = rmsnorm(o, 1e-5) · silu(z)                    of each head
//! attention's results += share · output(m)
//! ```
//!
//! With delayed writes `k`, `v`, `alpha` and `beta` are those of the token that has just left the window.
use super::NORM_EPS;
use crate::error::Error;
use crate::image::Kind;
use crate::memory::{attention_width, padded_rows, written_with};
use crate::model::forward::PARALLEL_WORK_MIN;
use crate::model::state::Recurrence;
use crate::model::{Matrices, Model, State, ops};
use crate::parallel::{Parallel, Serial};
use bitnet_kernel::float::{TAPS, sum_of_squares};

const UNIT_EPS: f32 = 1e-6;
/// Rows of a state that one thread does at a time.
const ROWS: usize = 16;

/// Where a token's row of results has what matrices take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Taken {
    pub matrices: Matrices,
    /// Queries that read one matrix.
    pub group: usize,
    /// Of queries, then keys, then values, without gaps.
    pub at: usize,
    /// Of what becomes alphas, then betas.
    pub gates_at: usize,
}

impl Model<'_> {
    /// `norm = m` for `n` tokens, of which `projected` has what [`Kind::MemoryInput`] and [`Kind::MemoryGates`] made: `width` a token,
    /// after what query, key and value made.
    pub(super) fn recall_by_key(
        &mut self,
        state: &mut State<'_>,
        m: Matrices,
        layer: u32,
        n: usize,
        width: usize,
    ) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (heads, value, values) = (m.heads as usize, m.value as usize, m.values() as usize);
        let channels = m.channels() as usize;
        let at = attention_width(&c);
        let gates_at = at + padded_rows(channels + values);
        let rows = &mut self.scratch.projected[..n * width];
        if !rows.chunks_exact(width).all(|row| ops::finite(&row[at..gates_at + 2 * heads])) {
            return Err(Error::NotFinite { layer });
        }

        let Recurrence { past, next_past, .. } = state.recurrent(layer as usize);
        let taps = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryTaps))?);
        let taps = &taps[..TAPS * channels];
        next_past.copy_from_slice(past);
        for row in rows.chunks_exact_mut(width) {
            self.machine.kernels.convolve_silu(next_past, taps, &mut row[at..][..channels]);
        }
        self.recall(state, Taken { matrices: m, group: 1, at, gates_at }, layer, n, width)?;

        let norm = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryNorm))?);
        let (kernels, s) = (self.machine.kernels, &mut self.scratch);
        for (t, row) in s.projected.chunks_exact(width).enumerate().take(n) {
            let gate = &row[at + channels..][..values];
            for h in 0..heads {
                let recalled = &mut s.recalled[..value];
                recalled_of(s.units, m, n, h, t, recalled);
                kernels.rmsnorm(recalled, &norm[..value], NORM_EPS);
                let out = &mut s.norm[t * values + h * value..][..value];
                kernels.silu(&gate[h * value..][..value], recalled, out);
            }
        }
        Ok(())
    }

    /// Gives matrices `n` tokens: `units` then has each row of the new state, followed by what each query of each token recalls of it.
    pub(super) fn recall(
        &mut self,
        state: &mut State<'_>,
        taken: Taken,
        layer: u32,
        n: usize,
        width: usize,
    ) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let Taken { matrices: m, group, at, gates_at } = taken;
        let [heads, key, value, keys, values] = [m.heads, m.key, m.value, m.keys(), m.values()].map(|n| n as usize);
        let keys_at = at + group * keys;
        let rows = &mut self.scratch.projected[..n * width];
        let decay = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryDecay))?);
        for row in rows.chunks_exact_mut(width) {
            for head in row[at..keys_at + keys].chunks_exact_mut(key) {
                let scale = 1.0 / libm::sqrtf(sum_of_squares(head) + UNIT_EPS);
                head.iter_mut().for_each(|x| *x *= scale);
            }
            let (alpha, beta) = row[gates_at..][..2 * heads].split_at_mut(heads);
            for (h, (alpha, beta)) in alpha.iter_mut().zip(beta).enumerate() {
                *alpha = libm::expf(-libm::expf(decay[h]) * softplus(*alpha + decay[heads + h]));
                *beta = 1.0 / (1.0 + libm::expf(-(*beta + decay[2 * heads + h])));
            }
        }

        let first = state.position();
        let Recurrence { numbers: matrices, next_numbers: next_matrices, waiting, .. } =
            state.recurrent(layer as usize);
        if c.delayed_writes {
            for (position, row) in (first..).zip(rows.chunks_exact(width)) {
                let (kept, gates) = waiting.get_mut(layer as usize, position).split_at_mut(keys + values);
                kept.copy_from_slice(&row[keys_at..][..keys + values]);
                gates.copy_from_slice(&row[gates_at..][..2 * heads]);
                // It would be found when the token leaves the window, far from where it came from.
                if !(ops::finite(kept) && ops::finite(gates)) {
                    return Err(Error::NotFinite { layer });
                }
            }
        }

        // Each row of the new state, then what it gives to each token.
        let kernels = self.machine.kernels;
        let (rows, len) = (&*rows, key + n * group);
        let cells = &mut self.scratch.units[..values * len];
        let work = n * values * key;
        let parallel: &dyn Parallel = if work < PARALLEL_WORK_MIN { &Serial } else { self.machine.parallel };
        parallel.for_each_chunk(cells, ROWS * len, &|i, cells| {
            for (r, cell) in (i * ROWS..).zip(cells.chunks_exact_mut(len)) {
                let (cell, out) = cell.split_at_mut(key);
                cell.copy_from_slice(&matrices[r * key..][..key]);
                let h = r / value;
                for ((row, out), position) in rows.chunks_exact(width).zip(out.chunks_exact_mut(group)).zip(first..) {
                    let written = match written_with(&c, position) {
                        Some(left) if c.delayed_writes => {
                            Some(waiting.get(layer as usize, left).split_at(keys + values))
                        }
                        Some(_) => Some((&row[keys_at..], &row[gates_at..])),
                        None => None,
                    };
                    if let Some((kept, gates)) = written {
                        let keyed = &kept[h * key..][..key];
                        kernels.delta_rule(cell, keyed, gates[h], gates[heads + h], kept[keys + r]);
                    }
                    let queries = row[at + h * group * key..].chunks_exact(key);
                    out.iter_mut().zip(queries).for_each(|(out, query)| *out = kernels.recall(cell, query));
                }
            }
        });
        for (cell, next) in cells.chunks_exact(len).zip(next_matrices.chunks_exact_mut(key)) {
            next.copy_from_slice(&cell[..key]);
        }
        Ok(())
    }
}

/// What head `h` recalled for query `i` of all tokens: of [`Model::recall`]'s results, which lie apart, each after its row of the state.
pub(super) fn recalled_of(cells: &[f32], m: Matrices, queries: usize, h: usize, i: usize, out: &mut [f32]) {
    let (key, value) = (m.key as usize, m.value as usize);
    let rows = cells.chunks_exact(key + queries).skip(h * value);
    out.iter_mut().zip(rows).for_each(|(out, cell)| *out = cell[key + i]);
}

/// `ln(1 + eˣ)`.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { libm::log1pf(libm::expf(x)) }
}
