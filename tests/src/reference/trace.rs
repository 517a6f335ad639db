//! What a forward pass went through, and how two passes that differ by a rounding are explained.
use super::{Arithmetic, Reference};
use core::fmt;
use std::collections::BTreeMap;

/// The seven linears of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it all")]
pub enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    /// All of them, in the order in which they are computed.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Its name in a checkpoint, within a layer.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// A linear of a model, for one token of the input. Where linears share their codes (Q, K and V; Gate and Up; unless each has
/// a norm of its own) the first stands for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Site {
    /// The layer, from 0.
    pub layer: usize,
    /// The linear.
    pub projection: Projection,
    /// The token's position, from 0.
    pub position: usize,
}

/// A linear's input, made int8.
#[derive(Clone, Debug)]
pub struct Quantised {
    /// 127 over the largest magnitude.
    pub s: f32,
    /// The input times `s`, not yet rounded.
    pub scaled: Vec<f32>,
    /// The codes.
    pub codes: Vec<i8>,
}

impl Quantised {
    pub(super) fn new(x: &[f32]) -> Self {
        let max = x.iter().fold(0.0, |max: f32, v| max.max(v.abs()));
        let s = 127.0 / max.max(1e-5);
        let scaled: Vec<f32> = x.iter().map(|v| v * s).collect();
        let codes = scaled.iter().map(|v| v.round_ties_even().clamp(-128.0, 127.0) as i8).collect();
        Self { s, scaled, codes }
    }

    /// How far value `i` is from the boundary at which its code changes, in codes: 0 to 0.5.
    pub fn distance(&self, i: usize) -> f32 {
        let magnitude = self.scaled[i].abs();
        (magnitude - magnitude.floor() - 0.5).abs()
    }

    /// The code on the other side of the nearest boundary.
    pub fn other_code(&self, i: usize) -> i8 {
        let (value, code) = (self.scaled[i], self.codes[i]);
        if value > f32::from(code) { code.saturating_add(1) } else { code.saturating_sub(1) }
    }
}

/// A code that another implementation has rounded otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flip {
    /// Where.
    pub site: Site,
    /// Which of the input's values.
    pub index: usize,
    /// The reference's code.
    pub from: i8,
    /// The other one's.
    pub to: i8,
    /// How far the reference was from rounding as the other did, in codes.
    pub distance: f32,
}

impl fmt::Display for Flip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Site { layer, projection, position } = self.site;
        let Self { index, from, to, distance, .. } = self;
        write!(
            f,
            "layer {layer} {}, token {position}, input {index}: {from} became {to}, {distance:.1e} from the boundary",
            projection.name()
        )
    }
}

/// Codes to be used in place of those that the reference comes to.
#[derive(Clone, Debug, Default)]
pub struct Force {
    whole: BTreeMap<Site, Vec<i8>>,
    single: BTreeMap<Site, Vec<(usize, i8)>>,
}

impl Force {
    /// Forces nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forces all codes of a site.
    pub fn codes(mut self, site: Site, codes: &[i8]) -> Self {
        self.whole.insert(site, codes.to_vec());
        self
    }

    /// Forces one code.
    pub fn flip(mut self, flip: &Flip) -> Self {
        self.single.entry(flip.site).or_default().push((flip.index, flip.to));
        self
    }

    pub(super) fn apply(&self, site: Site, codes: &mut [i8]) {
        if let Some(whole) = self.whole.get(&site) {
            codes.copy_from_slice(whole);
        }
        for &(index, code) in self.single.get(&site).into_iter().flatten() {
            codes[index] = code;
        }
    }
}

/// What a forward pass went through.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// For each position.
    pub logits: Vec<Vec<f32>>,
    /// The codes that were used, forced ones included, and what the reference had before rounding.
    pub inputs: BTreeMap<Site, Quantised>,
    /// The outputs of the linears, each under its own name.
    pub outputs: BTreeMap<Site, Vec<f32>>,
    /// What a layer adds up to: for each layer and position.
    pub residual: BTreeMap<(usize, usize), Vec<f32>>,
}

impl Trace {
    /// The codes that almost became others, the nearest to the boundary first.
    pub fn doubtful(&self, within: f32) -> Vec<Flip> {
        let mut flips = Vec::new();
        for (&site, input) in &self.inputs {
            for (index, &from) in input.codes.iter().enumerate() {
                let distance = input.distance(index);
                if distance < within {
                    flips.push(Flip { site, index, from, to: input.other_code(index), distance });
                }
            }
        }
        flips.sort_by(|a, b| a.distance.total_cmp(&b.distance));
        flips
    }

    /// Where another implementation's codes of a site are not those of this pass.
    ///
    /// # Panics
    /// If there is no such site, or the lengths differ.
    pub fn flips(&self, site: Site, codes: &[i8]) -> Vec<Flip> {
        let input = &self.inputs[&site];
        assert_eq!(input.codes.len(), codes.len());
        let mut flips = Vec::new();
        for (index, (&from, &to)) in input.codes.iter().zip(codes).enumerate() {
            if from != to {
                // The near side of the other code's interval.
                let edge = if to > from { f32::from(to) - 0.5 } else { f32::from(to) + 0.5 };
                let distance = (input.scaled[index] - edge).abs();
                flips.push(Flip { site, index, from, to, distance });
            }
        }
        flips
    }
}

/// How near to its boundary a value must be for a flip to be believed, in codes.
pub const FLIP_DISTANCE: f32 = 1e-3;
/// Flips that are tried at a position, and that are accepted in all.
const TRIED: usize = 256;
const ACCEPTED: usize = 16;

/// Looks for the rounding flips that turn the reference's logits into another implementation's: after these, all logits are
/// within `tolerance`. None are needed where they are so already.
///
/// A flip shows first in the logits of its own position, so the first position that differs is repaired again and again, by
/// whichever single flip of a value nearer than [`FLIP_DISTANCE`] to its boundary comes closest.
///
/// # Errors
/// If no such flips are found: the position, the difference that stays, and the flips found until then.
pub fn explain(
    reference: &Reference,
    ids: &[u32],
    expected: &[impl AsRef<[f32]>],
    tolerance: f32,
) -> Result<Vec<Flip>, String> {
    assert_eq!(ids.len(), expected.len(), "a row of logits for every id");
    let (mut flips, mut force) = (Vec::new(), Force::new());
    loop {
        let trace = reference.trace_with(ids, Arithmetic::Dequantised, &force);
        let difference = |trace: &Trace, p: usize| crate::max_difference(&trace.logits[p], expected[p].as_ref());
        // A difference that is no number is not within anything.
        let within = |p: &usize| difference(&trace, *p) <= tolerance;
        let Some(position) = (0..ids.len()).find(|p| !within(p)) else {
            return Ok(flips);
        };
        let now = difference(&trace, position);
        let mut best = (now, None);
        let doubtful = trace.doubtful(FLIP_DISTANCE);
        for flip in doubtful.iter().filter(|flip| flip.site.position == position).take(TRIED) {
            let forced = force.clone().flip(flip);
            let trace = reference.trace_with(&ids[..=position], Arithmetic::Dequantised, &forced);
            let then = difference(&trace, position);
            if then < best.0 {
                best = (then, Some(*flip));
            }
        }
        match best {
            (_, Some(flip)) if flips.len() < ACCEPTED => {
                force = force.flip(&flip);
                flips.push(flip);
            }
            _ => return Err(format!("position {position} differs by {now} and no flip explains it, after {flips:?}")),
        }
    }
}
