//! A vector beside attention (BitRNN-V; the gated recurrence of HGRN, arXiv:2311.04823, with 1-bit projections).
//!
//! For a block's input `x`, as int8:
//!
//! ```text
//! u, w, z = input(x)
//! u, w = convolve(u, w)
//! f = bound + (1 - bound) / (1 + exp(-(w + bias)))
//! h = f · h + silu(u) · (1 - f)                        the state
//! m = rmsnorm(h, 1e-5) · silu(z)
//! ```
//!
//! With delayed writes the state takes in `u` and `w` of the token that has just left the window.
use super::NORM_EPS;
use crate::error::Error;
use crate::image::Kind;
use crate::memory::{attention_width, written_with};
use crate::model::state::Recurrence;
use crate::model::{Model, State, Vector, ops};
use bitnet_kernel::float::TAPS;

impl Model<'_> {
    /// `norm = m` for `n` tokens, of which `projected` has what [`Kind::MemoryInput`] made: `width` a token, after what query, key and
    /// value made.
    pub(super) fn recall_vector(
        &mut self,
        state: &mut State<'_>,
        v: Vector,
        layer: u32,
        n: usize,
        width: usize,
    ) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (numbers, channels) = (v.width as usize, v.channels() as usize);
        let at = attention_width(&c);
        let rows = &mut self.scratch.projected[..n * width];
        if !rows.chunks_exact(width).all(|row| ops::finite(&row[at..][..channels + numbers])) {
            return Err(Error::NotFinite { layer });
        }

        let kernels = self.machine.kernels;
        let first = state.position();
        let Recurrence { numbers: now, past, next_numbers: next, next_past, waiting } = state.recurrent(layer as usize);
        let taps = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryTaps))?);
        let taps = &taps[..TAPS * channels];
        next_past.copy_from_slice(past);
        for row in rows.chunks_exact_mut(width) {
            kernels.convolve(next_past, taps, &mut row[at..][..channels]);
        }
        let forget = ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryForget))?);
        let (bound, bias) = forget[..2 * numbers].split_at(numbers);
        next.copy_from_slice(now);
        for (position, row) in (first..).zip(rows.chunks_exact_mut(width)) {
            let taken = &mut row[at..][..channels];
            let (_, forget) = taken.split_at_mut(numbers);
            forget.iter_mut().zip(bias).for_each(|(forget, bias)| *forget += bias);
            if c.delayed_writes {
                // It would be found when the token leaves the window, far from where it came from.
                if !ops::finite(taken) {
                    return Err(Error::NotFinite { layer });
                }
                waiting.get_mut(layer as usize, position).copy_from_slice(taken);
            }
            let written = match written_with(&c, position) {
                Some(left) if c.delayed_writes => Some(waiting.get(layer as usize, left)),
                Some(_) => Some(&*taken),
                None => None,
            };
            if let Some((input, forget)) = written.map(|written| written.split_at(numbers)) {
                kernels.recur(next, bound, forget, input);
            }
            // The state after each token goes where its input was.
            taken[..numbers].copy_from_slice(next);
        }
        let norm = &ops::floats(self.machine.source.fetch(weights.vector(Kind::MemoryNorm))?)[..numbers];
        for (row, out) in rows.chunks_exact_mut(width).zip(self.scratch.norm.chunks_exact_mut(numbers)) {
            let (recalled, gate) = row[at..][..channels + numbers].split_at_mut(channels);
            let recalled = &mut recalled[..numbers];
            kernels.rmsnorm(recalled, norm, NORM_EPS);
            kernels.silu(gate, recalled, out);
        }
        Ok(())
    }
}
