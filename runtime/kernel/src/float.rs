//! Floating point with one order of operations: the same bits on every machine.
//!
//! A sum is taken in 16 lanes (term `i` goes to lane `i mod 16`), then the lanes are added in a fixed tree. Vector units of
//! 128, 256 and 512 bits all do that at full width, so nothing is lost by it. Functions are `#[inline(always)]`: a backend
//! compiles them again inside a function with its own target features. Rust never contracts a multiplication and an
//! addition, so the features change the speed and not the result.
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
    // |x · s| <= 127 · (1 + 2^-22): it rounds to 127 at most.
    let s = 127.0 / max.max(1e-5);
    for (q, x) in q.iter_mut().zip(x) {
        *q = (x * s + ROUND).to_bits() as i8;
    }
    padding.fill(0);
    Some(s)
}

/// One head's keys or values, a row of `head_dim` a position, oldest first.
#[derive(Clone, Copy, Debug)]
pub enum Cache<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Bits of half-precision floats.
    F16(&'a [u16]),
    /// int8 codes and, for each position, the number they are multiplied by.
    I8 {
        /// `head_dim` codes a position.
        codes: &'a [i8],
        /// One a position.
        scales: &'a [f32],
    },
}

impl Cache<'_> {
    /// Positions held, for rows of `head_dim`.
    pub const fn positions(&self, head_dim: usize) -> usize {
        match self {
            Self::F32(rows) => rows.len() / head_dim,
            Self::F16(rows) => rows.len() / head_dim,
            Self::I8 { scales, .. } => scales.len(),
        }
    }
    /// `row(position) · q`.
    #[inline(always)]
    fn dot(&self, position: usize, q: &[f32]) -> f32 {
        let n = q.len();
        match self {
            Self::F32(rows) => dot(&rows[position * n..][..n], q),
            Self::F16(rows) => {
                let row = &rows[position * n..][..n];
                sum_of(n, |i| f16_to_f32(row[i]) * q[i])
            }
            Self::I8 { codes, scales } => {
                let row = &codes[position * n..][..n];
                sum_of(n, |i| f32::from(row[i]) * q[i]) * scales[position]
            }
        }
    }
    /// `out += weight · row(position)`.
    #[inline(always)]
    fn add_to(&self, position: usize, weight: f32, out: &mut [f32]) {
        let n = out.len();
        match self {
            Self::F32(rows) => {
                for (out, &v) in out.iter_mut().zip(&rows[position * n..][..n]) {
                    *out += weight * v;
                }
            }
            Self::F16(rows) => {
                for (out, &v) in out.iter_mut().zip(&rows[position * n..][..n]) {
                    *out += weight * f16_to_f32(v);
                }
            }
            Self::I8 { codes, scales } => {
                let weight = weight * scales[position];
                for (out, &v) in out.iter_mut().zip(&codes[position * n..][..n]) {
                    *out += weight * f32::from(v);
                }
            }
        }
    }
}

/// Positions whose scores are held at a time by [`attend`].
const SCORES: usize = 64;

/// One head's attention: `out = softmax(scale · K q)ᵀ V`, over all positions of the cache.
///
/// The softmax is taken in one pass over runs of 64 positions (the online form of Milakov and Gimelshein,
/// arXiv:1805.02867): memory does not grow with the context. Runs start at multiples of 64, so the order of operations
/// depends on the positions alone and not on how a prompt was cut into batches.
///
/// # Panics
/// If the lengths of `q`, `out` and the rows disagree, or the cache is empty.
#[inline(always)]
pub fn attend(q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
    let n = keys.positions(q.len());
    assert!(q.len() == out.len() && n > 0 && values.positions(q.len()) == n);
    out.fill(0.0);
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0);
    for first in (0..n).step_by(SCORES) {
        let mut scores = [0.0; SCORES];
        let scores = &mut scores[..SCORES.min(n - first)];
        let mut new_max = max;
        for (i, score) in scores.iter_mut().enumerate() {
            *score = keys.dot(first + i, q) * scale;
            new_max = new_max.max(*score);
        }
        if new_max > max {
            let shrink = libm::expf(max - new_max);
            total *= shrink;
            out.iter_mut().for_each(|out| *out *= shrink);
            max = new_max;
        }
        for (i, &score) in scores.iter().enumerate() {
            let weight = libm::expf(score - max);
            total += weight;
            values.add_to(first + i, weight, out);
        }
    }
    out.iter_mut().for_each(|out| *out /= total);
}
