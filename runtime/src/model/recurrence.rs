//! An elementwise recurrence in attention's place (HGRN-bit, of the MatMul-free language model, arXiv:2406.02528, as its published
//! models compute it).
//!
//! For a block's input `x`, normalized:
//!
//! ```text
//! f = bound + (1 - bound) · sigmoid(forget(x))
//! h = f · h + (1 - f) · silu(input(x))               the state
//! x += output(rmsnorm(gate(x)) · silu(h))
//! ```
use super::state::Recurrence;
use super::{Model, State, ops};
use crate::error::Error;
use crate::image::Kind;
use crate::memory::{attention_width, padded_rows};

impl Model<'_> {
    /// One layer's recurrence for `n` tokens of one conversation.
    pub(super) fn recur(&mut self, state: &mut State<'_>, layer: u32, n: usize) -> Result<(), Error> {
        let (c, weights) = (self.config, self.weights.layer(layer));
        let (hidden, width) = (c.hidden as usize, attention_width(&c));
        let (forget_at, gate_at) = (padded_rows(hidden), 2 * padded_rows(hidden));

        self.norm(weights.norm(Kind::AttentionNorm), n)?;
        let linears = [Kind::RecurrenceInput, Kind::RecurrenceForget, Kind::RecurrenceGate].map(|k| weights.linear(k));
        self.linears(layer, &linears, c.quantizers.attention, hidden, n, width, 0)?;
        let rows = &mut self.scratch.projected[..n * width];
        let is_finite = |row: &[f32]| [0, forget_at, gate_at].iter().all(|&at| ops::finite(&row[at..][..hidden]));
        if !rows.chunks_exact(width).all(is_finite) {
            return Err(Error::NotFinite { layer });
        }

        let kernels = self.machine.kernels;
        let bound = &ops::floats(self.machine.source.fetch(weights.vector(Kind::RecurrenceBound))?)[..hidden];
        let Recurrence { numbers: now, next_numbers: next, .. } = state.recurrent(layer as usize);
        next.copy_from_slice(now);
        for row in rows.chunks_exact_mut(width) {
            // The state after each token goes where its input was.
            let (input, forget) = row.split_at_mut(forget_at);
            kernels.recur(next, bound, &forget[..hidden], &input[..hidden]);
            input[..hidden].copy_from_slice(next);
        }
        let norm = &ops::floats(self.machine.source.fetch(weights.vector(Kind::RecurrenceNorm))?)[..hidden];
        for (row, out) in rows.chunks_exact_mut(width).zip(self.scratch.norm.chunks_exact_mut(hidden)) {
            let (state, rest) = row.split_at_mut(gate_at);
            let gate = &mut rest[..hidden];
            kernels.rmsnorm(gate, norm, c.norm_eps);
            kernels.silu(&state[..hidden], gate, out);
        }
        let output = [weights.linear(Kind::Output)];
        self.linears(layer, &output, c.quantizers.output, hidden, n, padded_rows(hidden), 0)?;
        self.add_projected(n);
        Ok(())
    }
}
