//! What stands between the matrices of a layer: normalization and the activation functions.
use super::{exp, sum_of_squares};

/// Root-mean-square normalization (arXiv:1910.07467), in place: `x = x · s · weight`, `s = 1 / sqrt(mean(x²) + eps)`, in this
/// order. All results are NaN if the mean is not finite: else an infinite mean would make zeros of everything, and nobody
/// would know.
#[inline(always)]
pub fn rmsnorm(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum_of_squares(x) / x.len() as f32;
    let scale = if mean.is_finite() { 1.0 / libm::sqrtf(mean + eps) } else { f32::NAN };
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

/// `out = silu(gate) · up`, `silu(v) = v / (1 + exp(-v))`.
#[inline(always)]
pub fn silu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for (out, (&gate, up)) in out.iter_mut().zip(gate.iter().zip(up)) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

/// `out = max(gate, 0)² · up`; what is not a number stays none.
#[inline(always)]
pub fn squared_relu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for (out, (&gate, up)) in out.iter_mut().zip(gate.iter().zip(up)) {
        let gate = if gate < 0.0 { 0.0 } else { gate };
        *out = gate * gate * up;
    }
}
