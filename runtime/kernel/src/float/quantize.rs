//! From floats to the small integers that linears multiply, and the rotation before that.
use super::sum_of;

/// See [`crate::Kernels::quantize`].
///
/// # Panics
/// If `q` is shorter than `x`.
#[inline(always)]
pub fn quantize(x: &[f32], q: &mut [i8]) -> Option<f32> {
    quantize_absmax::<127>(x, q)
}

/// [`quantize`] to four bits, of which -8 is not used: `q = round_half_even(x · s)`, `s = 7 / max(max|x|, 1e-5)`.
///
/// # Panics
/// If `q` is shorter than `x`.
#[inline(always)]
pub fn quantize_int4_absmax(x: &[f32], q: &mut [i8]) -> Option<f32> {
    quantize_absmax::<7>(x, q)
}

/// To codes of which that of the largest magnitude is `MOST`.
#[inline(always)]
fn quantize_absmax<const MOST: i8>(x: &[f32], q: &mut [i8]) -> Option<f32> {
    /// Adding 1.5 · 2^23 rounds to an integer, halves to even, and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const SIGN: u32 = 0x8000_0000;
    let (q, padding) = q.split_at_mut(x.len());
    // The bits of non-negative floats are in their order, NaN above infinity: a maximum that loses nothing.
    let max = x.iter().fold(0, |max, v| (v.to_bits() & !SIGN).max(max));
    let max = f32::from_bits(max);
    if !max.is_finite() {
        return None;
    }
    // |x · s| <= MOST · (1 + 2^-22): it rounds to MOST at most.
    let s = f32::from(MOST) / max.max(1e-5);
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * s + ROUND).to_bits() as i8;
    }
    padding.fill(0);
    Some(s)
}

/// [`quantize`] to four bits by the mean magnitude: `q = clamp(round_half_even(x · s), -8, 7)`, `s = √7 / max(mean|x|, 1e-5)`
/// (BitNet a4.8, arXiv:2411.04965, eq. 3). That the largest values are cut off is intended.
///
/// # Panics
/// If `q` is shorter than `x`.
#[inline(always)]
pub fn quantize_int4(x: &[f32], q: &mut [i8]) -> Option<f32> {
    const SQRT_7: f32 = 2.645_751_3;
    let (q, padding) = q.split_at_mut(x.len());
    let mean = sum_of(x.len(), |i| x[i].abs()) / x.len() as f32;
    if !mean.is_finite() {
        return None;
    }
    let s = SQRT_7 / mean.max(1e-5);
    for (q, x) in q.iter_mut().zip(x) {
        *q = libm::rintf((x * s).clamp(-8.0, 7.0)) as i8;
    }
    padding.fill(0);
    Some(s)
}

/// Zeros all but the half of `q` that is largest by magnitude in `x`, of equal magnitudes the first (BitNet a4.8, eq. 4).
///
/// The magnitude that the half ends with is found by its bits, from the highest down: 31 times through `x`, and no memory.
#[inline(always)]
pub fn keep_largest_half(x: &[f32], q: &mut [i8]) {
    let magnitude = |x: &f32| x.to_bits() & !0x8000_0000;
    let keep = x.len().div_ceil(2);
    // The largest bits that at least `keep` magnitudes reach.
    let mut least = 0_u32;
    for bit in (0..31).rev() {
        let higher = least | 1 << bit;
        if x.iter().filter(|x| magnitude(x) >= higher).count() >= keep {
            least = higher;
        }
    }
    let above = x.iter().filter(|x| magnitude(x) > least).count();
    let mut equal = keep - above;
    for (x, q) in x.iter().zip(q) {
        let magnitude = magnitude(x);
        if magnitude < least || (magnitude == least && equal == 0) {
            *q = 0;
        } else if magnitude == least {
            equal -= 1;
        }
    }
}

/// [`quantize`] to the four-bit floats of one sign, two exponent and one mantissa bit (E2M1), doubled, so that they are integers: 0,
/// 1, 2, 3, 4, 6, 8 and 12, `s = 12 / max(max|x|, 1e-5)`, and halves between two of them to the even mantissa (BitNet a4.8,
/// arXiv:2411.04965, after LLM-FP4, arXiv:2310.16836).
///
/// # Panics
/// If `q` is shorter than `x`.
#[inline(always)]
pub fn quantize_fp4(x: &[f32], q: &mut [i8]) -> Option<f32> {
    let (q, padding) = q.split_at_mut(x.len());
    let max = x.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    // A maximum passes over what is no number.
    if !max.is_finite() || x.iter().any(|x| x.is_nan()) {
        return None;
    }
    let s = 12.0 / max.max(1e-5);
    for (q, x) in q.iter_mut().zip(x) {
        let y = x * s;
        let step = match y.abs() {
            ..4.0 => 1.0,
            4.0..8.0 => 2.0,
            _ => 4.0,
        };
        *q = (libm::rintf(y / step) * step) as i8;
    }
    padding.fill(0);
    Some(s)
}

/// The orthonormal Walsh-Hadamard transform in place, of each run of as many elements as the largest power of two that divides the
/// length (BitNet v2, arXiv:2504.18415): `(a, b) = (a + b, a - b)` at distance 1, 2, 4 and so on, then all by `2^(-m/2)`. It is its own
/// inverse.
#[inline(always)]
pub fn hadamard(x: &mut [f32]) {
    if x.is_empty() {
        return;
    }
    let levels = x.len().trailing_zeros();
    let scale = if levels.is_multiple_of(2) { 1.0 } else { core::f32::consts::FRAC_1_SQRT_2 };
    let scale = scale / (1_u64 << (levels / 2)) as f32;
    for run in x.chunks_exact_mut(1 << levels) {
        for level in 0..levels {
            let apart = 1 << level;
            for pair in run.chunks_exact_mut(2 * apart) {
                let (a, b) = pair.split_at_mut(apart);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
        run.iter_mut().for_each(|x| *x *= scale);
    }
}
