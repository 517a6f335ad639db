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
mod quantize;
mod recurrence;
mod vectors;

pub use attend::{Cache, attend};
pub use elementwise::{rmsnorm, silu, squared_relu};
pub use exp::exp;
pub use quantize::{hadamard, keep_largest_half, quantize, quantize_fp4, quantize_int4, quantize_int4_absmax};
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
