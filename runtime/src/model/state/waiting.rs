//! What a memory is given late: what it makes of the tokens that a window still has.
use crate::memory::{Arena, Limits, waiting_len, waiting_slots, write_len};
use crate::model::Config;
use core::ops::Range;

/// A ring a layer, `[layer][slot][keys, values, alphas, betas]` or `[layer][slot][input, forget]`, in which a token has its place by its position.
#[derive(Debug)]
pub(in crate::model) struct Waiting<'m> {
    floats: &'m mut [f32],
    /// Floats of a token and layer.
    len: usize,
    slots: usize,
}

impl<'m> Waiting<'m> {
    pub(super) fn new(c: &Config, limits: &Limits, arena: &mut Arena<'m>) -> Self {
        let (len, slots) = (write_len(c), waiting_slots(c, limits));
        let floats: &mut [f32] = arena.take(waiting_len(c, limits));
        floats.fill(0.0);
        Self { floats, len, slots }
    }
    /// What one layer has of the token at `position`.
    pub(in crate::model) fn get(&self, layer: usize, position: usize) -> &[f32] {
        &self.floats[self.place(layer, position)]
    }
    pub(in crate::model) fn get_mut(&mut self, layer: usize, position: usize) -> &mut [f32] {
        let place = self.place(layer, position);
        &mut self.floats[place]
    }
    const fn place(&self, layer: usize, position: usize) -> Range<usize> {
        let start = (layer * self.slots + position % self.slots) * self.len;
        start..start + self.len
    }
}
