//! Floating point with one order of operations: the same bits on every machine.
//!
//! A sum is taken in 16 lanes (term `i` goes to lane `i mod 16`), then the lanes are added in a fixed tree. Vector units of
//! 128, 256 and 512 bits all do that at full width, so nothing is lost by it. Functions are `#[inline(always)]`: a backend
//! compiles them again inside a function with its own target features. Rust never contracts a multiplication and an
//! addition, so the features change the speed and not the result. Where the compiler alone does not find the instructions,
//! a body is written over [`Vectors`].
mod attend;
mod elementwise;
mod exp;
mod recurrence;
mod vectors;

pub use attend::{Cache, attend};
pub use elementwise::{rmsnorm, silu, squared_relu};
pub use exp::exp;
pub use recurrence::{TAPS, convolve, convolve_silu, delta_rule, recur};
pub use vectors::{Arrays, Vectors};

use crate::{Block, Format, Matrix};

/// Lanes of a sum.
pub const LANES: usize = 16;

/// Adds up the lanes: 16, 8, 4, 2, 1.
#[inline(always)]
fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES / 2;
    while n > 0 {
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
        n /= 2;
    }
    lanes[0]
}

/// The sum of `f(i)` for `i < n` in the defined order.
#[inline(always)]
fn sum_of(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = n / LANES * LANES;
    for first in (0..whole).step_by(LANES) {
        for (i, lane) in lanes.iter_mut().enumerate() {
            *lane += f(first + i);
        }
    }
    for i in whole..n {
        lanes[i - whole] += f(i);
    }
    tree(lanes)
}

/// `Σ a[i] · b[i]`.
///
/// # Panics
/// If the lengths differ.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    sum_of(a.len(), |i| a[i] * b[i])
}

/// `Σ x[i]²`.
#[inline(always)]
pub fn sum_of_squares(x: &[f32]) -> f32 {
    sum_of(x.len(), |i| x[i] * x[i])
}

/// The value of a half-precision float, exact for all finite ones.
///
/// Multiplying by 2^112 moves the exponent's bias, subnormals included; it vectorizes on machines without a conversion.
/// Infinities and NaN come out as large finite numbers: images and caches hold neither.
#[inline(always)]
pub fn f16_to_f32(bits: u16) -> f32 {
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * BIAS;
    f32::from_bits(magnitude.to_bits() | u32::from(bits & 0x8000) << 16)
}

/// `y[r] += sums[r] · scales[r]`: one group of [`crate::Kernels::matvec_grouped`]. The scales are the bytes of halves.
#[inline(always)]
pub fn add_scaled(y: &mut [f32], sums: &[i32], scales: &[[u8; 2]]) {
    for ((y, &sum), &scale) in y.iter_mut().zip(sums).zip(scales) {
        *y += sum as f32 * f16_to_f32(u16::from_le_bytes(scale));
    }
}

/// The half-precision float nearest to `x`, halves to even. Beyond the range it is the largest finite one; NaN stays one.
#[inline(always)]
pub fn f32_to_f16(x: f32) -> u16 {
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = x.to_bits() & 0x7fff_ffff;
    let bits = if magnitude > 0x7f80_0000 {
        0x7e00
    } else if magnitude >= 0x477f_f000 {
        0x7bff
    } else if magnitude >= 0x3880_0000 {
        // A normal number: round the 13 bits that are cut, carry into the exponent included.
        let rounded = magnitude + 0x0fff + (magnitude >> 13 & 1);
        ((rounded >> 13) - (112 << 10)) as u16
    } else {
        // A subnormal one: the addition of 0.5 rounds to multiples of 2^-24.
        (f32::from_bits(magnitude) + 0.5).to_bits() as u16
    };
    sign | bits
}

/// See [`crate::Kernels::matvec_f16`].
///
/// # Panics
/// If the lengths disagree or `w` is of another format.
#[inline(always)]
pub fn matvec_f16(w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
    assert!(w.format() == Format::F16 && y.len() == w.rows() && x.len() == w.cols());
    let tile_rows = Format::F16.tile_rows();
    for (y, tile) in y.chunks_mut(tile_rows).zip(w.tiles()) {
        for (r, y) in y.iter_mut().enumerate() {
            let mut lanes = [0.0; LANES];
            for (step, x) in tile.chunks_exact(tile_rows).zip(x.chunks(Format::F16.step_cols())) {
                add_block(&step[r], x, &mut lanes);
            }
            *y = tree(lanes);
        }
    }
}

/// Adds the products of one block of halves to the lanes.
#[inline(always)]
fn add_block(block: &Block, x: &[f32], lanes: &mut [f32; LANES]) {
    let half = |i: usize| f16_to_f32(u16::from_le_bytes([block.0[2 * i], block.0[2 * i + 1]]));
    if x.len() == Format::F16.step_cols() {
        for first in [0, LANES] {
            for (i, lane) in lanes.iter_mut().enumerate() {
                *lane += half(first + i) * x[first + i];
            }
        }
    } else {
        for (i, &x) in x.iter().enumerate() {
            lanes[i % LANES] += half(i) * x;
        }
    }
}

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
