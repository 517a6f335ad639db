//! Floats between the matrices, in one order on every machine. See [`bitnet_kernel::float`] for how sums are taken.
use bitnet_kernel::{Block, float};
use libm::{expf, sqrtf};
use zerocopy::{FromBytes, IntoBytes};

/// The f32 elements of a vector section.
pub(super) fn floats(blocks: &[Block]) -> &[f32] {
    <[f32]>::ref_from_bytes(blocks.as_bytes()).expect("blocks are aligned and whole floats")
}

/// Root-mean-square normalization (arXiv:1910.07467): `out = x / sqrt(mean(x²) + eps) · weight`.
pub(super) fn rmsnorm(out: &mut [f32], x: &[f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * w;
    }
}

/// [`rmsnorm`] in place.
pub(super) fn rmsnorm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

fn rms_scale(x: &[f32], eps: f32) -> f32 {
    let mean = float::sum_of_squares(x) / x.len() as f32;
    // Else an infinite mean would make zeros of everything, and nobody would know.
    if mean.is_finite() { 1.0 / sqrtf(mean + eps) } else { f32::NAN }
}

/// `max(v, 0)²`; what is not a number stays none.
pub(super) fn squared_relu(v: f32) -> f32 {
    let v = if v < 0.0 { 0.0 } else { v };
    v * v
}

/// `v · sigmoid(v)`.
pub(super) fn silu(v: f32) -> f32 {
    v / (1.0 + expf(-v))
}
