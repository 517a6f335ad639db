//! Matrices beside attention, with queries, keys and values of their own (BitRNN-M; the gated delta rule of arXiv:2412.06464 with
//! 1-bit projections).
//!
//! For a block's input `x`, as int8:
//!
//! ```text
//! u, z = input(x)              a, b = gates(x)
//! q, k, v = silu(convolve(u))  q, k of each head divided by sqrt(Σ² + 1e-6)
//! alpha = exp(-exp(rate) · softplus(a + bias))      beta = 1 / (1 + exp(-(b + bias)))
//! o = delta_rule(S, k, q, alpha, beta, v)           of each head, row by row
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
        let [heads, key, value, keys, values] = [m.heads, m.key, m.value, m.keys(), m.values()].map(|n| n as usize);
        let channels = m.channels() as usize;
        let at = attention_width(&c);
        let gates_at = at + padded_rows(channels + values);
        let rows = &mut self.scratch.projected[..n * width];
        if !rows.chunks_exact(width).all(|row| ops::finite(&row[at..gates_at + 2 * heads])) {
            return Err(Error::NotFinite { layer });
        }

        let first = state.position();
        let Recurrence { numbers: matrices, past, next_numbers: next_matrices, next_past, waiting } =
            state.recurrent(layer as usize);
        let taps = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryTaps))?);
        let taps = &taps[..TAPS * channels];
        next_past.copy_from_slice(past);
        for row in rows.chunks_exact_mut(width) {
            let taken = &mut row[at..][..channels];
            self.machine.kernels.convolve_silu(next_past, taps, taken);
            for head in taken[..2 * keys].chunks_exact_mut(key) {
                let scale = 1.0 / libm::sqrtf(sum_of_squares(head) + UNIT_EPS);
                head.iter_mut().for_each(|x| *x *= scale);
            }
        }
        let decay = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryDecay))?);
        for row in rows.chunks_exact_mut(width) {
            let (alpha, beta) = row[gates_at..][..2 * heads].split_at_mut(heads);
            for (h, (alpha, beta)) in alpha.iter_mut().zip(beta).enumerate() {
                *alpha = libm::expf(-libm::expf(decay[h]) * softplus(*alpha + decay[heads + h]));
                *beta = 1.0 / (1.0 + libm::expf(-(*beta + decay[2 * heads + h])));
            }
        }

        if c.delayed_writes {
            for (position, row) in (first..).zip(rows.chunks_exact(width)) {
                let (kept, gates) = waiting.get_mut(layer as usize, position).split_at_mut(keys + values);
                kept.copy_from_slice(&row[at + keys..][..keys + values]);
                gates.copy_from_slice(&row[gates_at..][..2 * heads]);
            }
        }

        // Each row of the new state, then what it gives to each token.
        let kernels = self.machine.kernels;
        let (rows, len) = (&*rows, key + n);
        let cells = &mut self.scratch.units[..values * len];
        let work = n * values * key;
        let parallel: &dyn Parallel = if work < PARALLEL_WORK_MIN { &Serial } else { self.machine.parallel };
        parallel.for_each_chunk(cells, ROWS * len, &|i, cells| {
            for (r, cell) in (i * ROWS..).zip(cells.chunks_exact_mut(len)) {
                let (cell, out) = cell.split_at_mut(key);
                cell.copy_from_slice(&matrices[r * key..][..key]);
                let h = r / value;
                for ((row, out), position) in rows.chunks_exact(width).zip(out).zip(first..) {
                    let query = &row[at + h * key..][..key];
                    let (kept, gates) = match written_with(&c, position) {
                        Some(left) if c.delayed_writes => waiting.get(layer as usize, left).split_at(keys + values),
                        Some(_) => (&row[at + keys..], &row[gates_at..]),
                        // What neither forgets nor writes only reads.
                        None => {
                            *out = kernels.delta_rule(cell, query, query, 1.0, 0.0, 0.0);
                            continue;
                        }
                    };
                    let keyed = &kept[h * key..][..key];
                    *out = kernels.delta_rule(cell, keyed, query, gates[h], gates[heads + h], kept[keys + r]);
                }
            }
        });
        for (cell, next) in cells.chunks_exact(len).zip(next_matrices.chunks_exact_mut(key)) {
            next.copy_from_slice(&cell[..key]);
        }

        let norm = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryNorm))?);
        for (t, row) in rows.chunks_exact(width).enumerate() {
            let gate = &row[at + channels..][..values];
            for h in 0..heads {
                // One head's results for one token lie apart, each after its row of the state.
                let recalled = &mut self.scratch.recalled[..value];
                for (j, x) in recalled.iter_mut().enumerate() {
                    *x = cells[(h * value + j) * len + key + t];
                }
                kernels.rmsnorm(recalled, &norm[..value], NORM_EPS);
                let out = &mut self.scratch.norm[t * values + h * value..][..value];
                kernels.silu(&gate[h * value..][..value], recalled, out);
            }
        }
        Ok(())
    }
}

/// `ln(1 + eˣ)`.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { libm::log1pf(libm::expf(x)) }
}
