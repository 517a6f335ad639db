//! From logits to a token. The same seed gives the same tokens on every machine.
use crate::error::Error;
use crate::memory::{Arena, sampler_blocks};
use crate::model::Need;
use bitnet_kernel::Block;
use libm::expf;

/// How the next token is chosen.
///
/// Applied in this order, as transformers does: repetition penalty, temperature, top-k, top-p, min-p.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the best token (the lowest of equals) and ignores all below but the penalty.
    pub temperature: f32,
    /// Keeps the best so many; 0 keeps all.
    pub top_k: u32,
    /// Keeps the fewest best tokens that together have this probability; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this fraction as probable as the best; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that occurred (arXiv:1909.05858); 1 does nothing.
    pub repetition_penalty: f32,
    /// Where the random numbers start.
    pub seed: u64,
}

impl Sampling {
    /// The best token, always.
    pub const GREEDY: Self =
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// The logits that decide: the same token is chosen if all others are minus infinity.
    ///
    /// One token without a temperature, `top_k` with one: top-p and min-p look at nothing but what top-k kept, and tokens that
    /// tie with the last of these are needed too. All without top-k, since every token then has its share of the
    /// probability, and with a penalty, which can put one of the best behind any other.
    pub fn need(&self) -> Need {
        match self {
            _ if self.repetition_penalty != 1.0 => Need::All,
            _ if self.temperature <= 0.0 => Need::Best(1),
            _ if self.top_k > 0 => Need::Best(self.top_k),
            _ => Need::All,
        }
    }
}

/// Chooses tokens in memory of [`crate::Plan::sampler`] blocks.
#[derive(Debug)]
pub struct Sampler<'m> {
    sampling: Sampling,
    random: u64,
    scores: &'m mut [f32],
    candidates: &'m mut [u32],
}

impl<'m> Sampler<'m> {
    /// A sampler for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// If the memory is too small.
    pub fn new(vocab: u32, sampling: Sampling, memory: &'m mut [Block]) -> Result<Self, Error> {
        let mut arena = Arena::new("the sampler", memory, sampler_blocks(vocab))?;
        let vocab = vocab as usize;
        let (scores, candidates) = (arena.take(vocab), arena.take(vocab));
        arena.finish();
        Ok(Self { sampling, random: sampling.seed, scores, candidates })
    }

    /// Begins anew with other settings, as a new sampler would.
    pub const fn restart(&mut self, sampling: Sampling) {
        (self.sampling, self.random) = (sampling, sampling.seed);
    }

    /// The logits that [`Sampler::sample`] needs.
    pub fn need(&self) -> Need {
        self.sampling.need()
    }

    /// Chooses one token. `history` are the tokens so far, for the repetition penalty.
    ///
    /// # Panics
    /// If `logits` has not the length of the vocabulary.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> u32 {
        if self.sampling.temperature <= 0.0 && self.sampling.repetition_penalty == 1.0 {
            assert_eq!(logits.len(), self.scores.len(), "the logits of another vocabulary");
            return best(logits);
        }
        self.scores.copy_from_slice(logits);
        self.penalize(history);
        if self.sampling.temperature <= 0.0 {
            return best(self.scores);
        }
        let kept = self.keep();
        self.draw(kept)
    }

    fn penalize(&mut self, history: &[u32]) {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let seen = &mut *self.candidates;
        seen.fill(0);
        for &token in history {
            let token = token as usize;
            if let (Some(seen @ 0), Some(score)) = (seen.get_mut(token), self.scores.get_mut(token)) {
                *seen = 1;
                *score = if *score > 0.0 { *score / penalty } else { *score * penalty };
            }
        }
    }

    /// Puts the candidates that stay first, with their relative probabilities as scores; returns how many.
    fn keep(&mut self) -> usize {
        let Sampling { temperature, top_k, top_p, min_p, .. } = self.sampling;
        let (scores, candidates) = (&mut *self.scores, &mut *self.candidates);
        for (i, candidate) in candidates.iter_mut().enumerate() {
            *candidate = i as u32;
        }
        let mut kept = candidates.len();
        // Best first, the lower token of equals: a total order, so the result does not depend on the sorting algorithm.
        let order = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        if top_k > 0 && (top_k as usize) < kept {
            kept = top_k as usize;
            candidates.select_nth_unstable_by(kept - 1, order);
        }
        if top_p < 1.0 || kept < candidates.len() {
            candidates[..kept].sort_unstable_by(order);
        }
        let max = scores[best(scores) as usize];
        scores.iter_mut().for_each(|s| *s = expf((*s - max) / temperature));
        if top_p < 1.0 {
            let total: f32 = candidates[..kept].iter().map(|&c| scores[c as usize]).sum();
            let mut sum = 0.0;
            let enough = candidates[..kept].iter().position(|&c| {
                sum += scores[c as usize];
                sum >= top_p * total
            });
            kept = enough.map_or(kept, |i| i + 1);
        }
        if min_p > 0.0 {
            for &candidate in &candidates[..kept] {
                let score = &mut scores[candidate as usize];
                *score = if *score < min_p { 0.0 } else { *score };
            }
        }
        kept
    }

    /// Draws one of the first `kept` candidates in proportion to its score.
    fn draw(&mut self, kept: usize) -> u32 {
        let candidates = &self.candidates[..kept];
        let total: f32 = candidates.iter().map(|&c| self.scores[c as usize]).sum();
        // 24 random bits are a float in 0 to 1 without rounding.
        let mut left = (next_random(&mut self.random) >> 40) as f32 / 16_777_216.0 * total;
        for &candidate in candidates {
            let score = self.scores[candidate as usize];
            if left < score {
                return candidate;
            }
            left -= score;
        }
        // Rounding can leave a little: then it is the last with any probability.
        let last = candidates.iter().rev().find(|&&c| self.scores[c as usize] > 0.0);
        *last.unwrap_or(&candidates[0])
    }
}

/// The token with the highest score, the lowest of equals; not-a-numbers never win, and if nothing does, the first.
fn best(scores: &[f32]) -> u32 {
    // The maximum in lanes, which vectorizes, and then where it is first.
    let mut lanes = [f32::NEG_INFINITY; 16];
    for scores in scores.chunks(lanes.len()) {
        for (lane, &score) in lanes.iter_mut().zip(scores) {
            *lane = if score > *lane { score } else { *lane };
        }
    }
    let max = lanes.into_iter().fold(f32::NEG_INFINITY, |max, lane| if lane > max { lane } else { max });
    let place = scores.iter().position(|&score| score == max && max > f32::NEG_INFINITY);
    place.unwrap_or(0) as u32
}

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): one addition and a hash, the same everywhere.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}
