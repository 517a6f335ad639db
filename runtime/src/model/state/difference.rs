//! Where two conversations of one model part.
use super::State;
use crate::error::Error;
use core::fmt;

/// The first thing in which two conversations differ; numbers are compared by their bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Difference {
    /// How many tokens they have.
    Tokens(usize, usize),
    /// A key.
    Key {
        /// From 0.
        layer: usize,
        /// The key head.
        head: usize,
        /// Whose it is.
        position: usize,
    },
    /// A value.
    Value {
        /// From 0.
        layer: usize,
        /// The key head.
        head: usize,
        /// Whose it is.
        position: usize,
    },
    /// A number of a memory or a recurrence.
    Memory {
        /// From 0.
        layer: usize,
        /// Its place in `[head][value][key]`, in the vector or in the recurrence's state.
        number: usize,
    },
    /// One of the last inputs of a memory's convolution.
    Input {
        /// From 0.
        layer: usize,
        /// Its place in `[3][channels]`.
        number: usize,
    },
    /// What a memory is still to be given of a token.
    Waiting {
        /// From 0.
        layer: usize,
        /// Whose it is.
        position: usize,
    },
}

impl State<'_> {
    /// The first difference between two conversations, if there is one: in what they will say, not in what they leave unused, so that
    /// rings of different batches are equal if what is left in both is.
    ///
    /// # Errors
    /// [`Error::State`] if the other is of a model of another shape or keeps keys and values in another way.
    pub fn compare(&self, other: &State<'_>) -> Result<Option<Difference>, Error> {
        if self.config != other.config || self.limits.kv != other.limits.kv {
            return Err(Error::State);
        }
        if self.position != other.position {
            return Ok(Some(Difference::Tokens(self.position, other.position)));
        }
        Ok(self.key_or_value(other).or_else(|| self.remembered(other)))
    }

    fn key_or_value(&self, other: &State<'_>) -> Option<Difference> {
        let oldest = self.oldest.max(other.oldest);
        let kv_heads = self.config.kv_heads as usize;
        for (i, (ours, theirs)) in [(&self.keys, &other.keys), (&self.values, &other.values)].into_iter().enumerate() {
            for at in 0..ours.heads() {
                for position in self.kept(self.position, oldest) {
                    if ours.bytes(at, self.slot(position)) != theirs.bytes(at, other.slot(position)) {
                        let (layer, head) = (at / kv_heads, at % kv_heads);
                        return Some(match i {
                            0 => Difference::Key { layer, head, position },
                            _ => Difference::Value { layer, head, position },
                        });
                    }
                }
            }
        }
        None
    }

    fn remembered(&self, other: &State<'_>) -> Option<Difference> {
        let layers = self.config.layers as usize;
        let (ours, theirs) = (&self.memory[self.now], &other.memory[other.now]);
        let part = |ours: &[f32], theirs: &[f32]| {
            let place = ours.iter().zip(theirs).position(|(a, b)| a.to_bits() != b.to_bits())?;
            Some((place / (ours.len() / layers), place % (ours.len() / layers)))
        };
        if let Some((layer, number)) = part(ours.numbers, theirs.numbers) {
            return Some(Difference::Memory { layer, number });
        }
        if let Some((layer, number)) = part(ours.past, theirs.past) {
            return Some(Difference::Input { layer, number });
        }
        let waiting = self.waiting(self.position);
        let mut all = (0..layers).flat_map(|layer| waiting.clone().map(move |position| (layer, position)));
        let bits = |x: &f32| x.to_bits();
        all.find(|&(layer, at)| {
            !self.waiting.get(layer, at).iter().map(bits).eq(other.waiting.get(layer, at).iter().map(bits))
        })
        .map(|(layer, position)| Difference::Waiting { layer, position })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Tokens(a, b) => write!(f, "one conversation has {a} tokens, the other {b}"),
            Self::Key { layer, head, position } => {
                write!(f, "the key of position {position}, layer {layer}, head {head}")
            }
            Self::Value { layer, head, position } => {
                write!(f, "the value of position {position}, layer {layer}, head {head}")
            }
            Self::Memory { layer, number } => write!(f, "number {number} of the memory of layer {layer}"),
            Self::Input { layer, number } => write!(f, "number {number} of the last inputs of layer {layer}'s memory"),
            Self::Waiting { layer, position } => {
                write!(f, "what the memory of layer {layer} is still to be given of position {position}")
            }
        }
    }
}
