//! What a state of fixed size does with a token: a short convolution, the gated delta rule, and a gated recurrence.
use super::{dot, exp};

/// Taps of [`convolve`].
pub const TAPS: usize = 4;

/// [`convolve`], then `x = silu(x)`, `silu(v) = v / (1 + exp(-v))`.
///
/// # Panics
/// If the lengths disagree.
#[inline(always)]
pub fn convolve_silu(past: &mut [f32], taps: &[f32], x: &mut [f32]) {
    convolve_then(past, taps, x, |y| y / (1.0 + exp(-y)));
}

/// `x = ((w₀ x₋₃ + w₁ x₋₂) + w₂ x₋₁) + w₃ x`, channel by channel, in place; `past` then has the last three inputs.
///
/// `past` is `[3][channels]`, the oldest first, and zero before the first token; `taps` is `[4][channels]`.
///
/// # Panics
/// If the lengths disagree.
#[inline(always)]
pub fn convolve(past: &mut [f32], taps: &[f32], x: &mut [f32]) {
    convolve_then(past, taps, x, |y| y);
}

#[inline(always)]
fn convolve_then(past: &mut [f32], taps: &[f32], x: &mut [f32], activation: impl Fn(f32) -> f32) {
    let n = x.len();
    assert!(past.len() == (TAPS - 1) * n && taps.len() == TAPS * n);
    let (oldest, rest) = past.split_at_mut(n);
    let (older, last) = rest.split_at_mut(n);
    let (w0, w1, w2, w3) = (&taps[..n], &taps[n..2 * n], &taps[2 * n..3 * n], &taps[3 * n..]);
    for i in 0..n {
        let u = x[i];
        let y = ((w0[i] * oldest[i] + w1[i] * older[i]) + w2[i] * last[i]) + w3[i] * u;
        x[i] = activation(y);
        (oldest[i], older[i], last[i]) = (older[i], last[i], u);
    }
}

/// One row of a state, for one value `v`: forgets, and corrects what `key` recalls towards `v`. What a query recalls of it is their
/// [`dot`].
///
/// `r = alpha · s`, `e = beta · (v - r · key)`, `s = r + e · key`: row `j` of
/// `S = alpha (I - beta k kᵀ) S + beta k vᵀ` (Gated DeltaNet, arXiv:2412.06464, eq. 10), stored by values. Rows do not depend
/// on one another.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn delta_rule(state: &mut [f32], key: &[f32], alpha: f32, beta: f32, value: f32) {
    state.iter_mut().for_each(|s| *s *= alpha);
    let error = beta * (value - dot(state, key));
    state.iter_mut().zip(key).for_each(|(s, k)| *s += error * k);
}

/// One token of an elementwise recurrence (HGRN, arXiv:2311.04823), in place: `s = f s + silu(input) (1 - f)` with
/// `f = bound + (1 - bound) / (1 + exp(-forget))`, in the order in which it is written there.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn recur(state: &mut [f32], bound: &[f32], forget: &[f32], input: &[f32]) {
    let n = state.len();
    assert!(bound.len() == n && forget.len() == n && input.len() == n);
    for i in 0..n {
        let kept = bound[i] + (1.0 - bound[i]) * (1.0 / (1.0 + exp(-forget[i])));
        let taken = input[i] / (1.0 + exp(-input[i])) * (1.0 - kept);
        state[i] = kept * state[i] + taken;
    }
}
