//! Plain NEON (Armv8.0: Cortex-A53 and A72): T2, I4 and I8 by products of 16 bits, B1 and TL by the tables of [`crate::lanes`].
//!
//! A lane of 16 bits takes the products of one vector of weights, which is as many as there are planes, times two, and is then
//! added to 32 bits. That is the most for I8, `2·127·128 = 32512`; for the others it keeps sums out of registers, and the
//! additions run beside the multiplications, of which there is one a cycle: 33 cycles for all three on the A72.
//!
//! The model of the Cortex-A53 has in-order issue; nothing here was scheduled for it.
#![allow(clippy::needless_range_loop, reason = "one index for several arrays of registers")]

use crate::apart::{self, SUMMED};
use crate::{float, lanes, panel};
use bitnet_kernel::float::Cache;
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};
use core::arch::aarch64::*;

/// NEON is part of every build for this architecture.
#[derive(Debug)]
pub(crate) struct Neon;

/// See [`crate::neon`].
pub(crate) fn detect() -> Option<&'static Neon> {
    Some(&Neon)
}

impl Kernels for Neon {
    fn name(&self) -> &'static str {
        "neon"
    }
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        // SAFETY: every build for this architecture has NEON.
        unsafe { lanes::fill(format, values, int4, tables) }
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        self.matmat(w, Batch::new(&[x]), y);
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        let x = x.tokens();
        // SAFETY: as above.
        unsafe {
            match w.format() {
                Format::B1 | Format::TL => lanes::matmat(w, x, y),
                Format::T2 => planes(w, x, y, |w, x| matvec_t2_neon(w, x)),
                Format::I4 => planes(w, x, y, |w, x| matvec_i4_neon(w, x)),
                Format::I8 => planes(w, x, y, |w, x| matvec_i8_neon(w, x)),
                _ => panic!("{} is not multiplied by this method", w.format().name()),
            }
        }
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        y.fill(0.0);
        // SAFETY: as above.
        unsafe { panel::grouped_without(self, w, x.tokens(), y) }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        // SAFETY: as above.
        apart::dot_rows(w, rows, x, y, |rows, x| unsafe { matvec_t2r_neon(rows, x) });
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        // SAFETY: as above.
        apart::sum_rows(w, rows, x, y, |rows, at, x| unsafe { sum_t2r_neon(rows, at, x) });
    }
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        float::attend(q, keys, values, scale, out);
    }
}

/// A tile of a format in planes: 4 blocks a step, one of each row.
type Planes<'a> = &'a [[Block; 4]];

/// Cuts a product into those of one tile with one token, tile by tile, so that the weights of a tile are in the first-level cache
/// for all tokens but the first. Four tokens at a time gain nothing where multiplications are the limit.
fn planes(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    dots: impl Fn(Planes<'_>, Activations<'_>) -> [i32; 4],
) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    for (first, tile) in (0..w.rows()).step_by(4).zip(w.tiles()) {
        for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
            y[first..].iter_mut().zip(dots(tile.as_chunks().0, *x)).for_each(|(y, dot)| *y = dot);
        }
    }
}

/// The products of 4 rows, `COLS` columns a block in planes of `BITS` bits with codes `w + bias`.
///
/// `block(i, r)` is block `i` of row `r`, of `n` each.
#[target_feature(enable = "neon")]
#[inline]
fn dots<'a, const COLS: usize, const BITS: i32>(
    n: usize,
    block: impl Fn(usize, usize) -> &'a Block,
    x: Activations<'_>,
    bias: i32,
) -> [i32; 4] {
    let mask = vdupq_n_u8(u8::MAX >> (8 - BITS));
    let mut acc = [vdupq_n_s32(0); 4];
    for (i, xs) in x.values().as_chunks::<COLS>().0[..n].iter().enumerate() {
        for quarter in [0, 16, 32, 48] {
            for r in 0..4 {
                // SAFETY: a block is 64 bytes.
                let mut v = unsafe { vld1q_u8(block(i, r).0.as_ptr().add(quarter)) };
                let mut sum = vdupq_n_s16(0);
                for plane in 0..COLS / 64 {
                    let codes = vreinterpretq_s8_u8(if BITS == 8 { v } else { vandq_u8(v, mask) });
                    v = vshrq_n_u8::<BITS>(v);
                    // SAFETY: a block has `COLS` activations, 64 a plane.
                    let x = unsafe { vld1q_s8(xs.as_ptr().add(64 * plane + quarter)) };
                    sum = vmlal_high_s8(vmlal_s8(sum, vget_low_s8(codes), vget_low_s8(x)), codes, x);
                }
                acc[r] = vpadalq_s16(acc[r], sum);
            }
        }
    }
    acc.map(|acc| vaddvq_s32(acc) - bias * x.sum())
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_t2_neon(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    dots::<256, 2>(steps.len(), |i, r| &steps[i][r], x, 1)
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_i4_neon(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    dots::<128, 4>(steps.len(), |i, r| &steps[i][r], x, 8)
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_i8_neon(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    dots::<64, 8>(steps.len(), |i, r| &steps[i][r], x, 0)
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_t2r_neon(rows: [&[Block]; 4], x: Activations<'_>) -> [i32; 4] {
    let n = rows[0].len();
    let rows = rows.map(|row| &row[..n]);
    dots::<256, 2>(n, |i, r| &rows[r][i], x, 1)
}

/// See [`apart::sum_rows`]. Sums of 16 bits, which [`SUMMED`] rows cannot overflow.
#[target_feature(enable = "neon")]
#[inline(never)]
fn sum_t2r_neon(rows: &[&[Block]], at: usize, x: &[i8; SUMMED]) -> [[i32; 16]; 4] {
    let mask = vdupq_n_u8(3);
    let mut acc = [[vdupq_n_s16(0); 2]; 4];
    for (row, &x) in rows.iter().zip(x) {
        assert!(at + 16 <= size_of_val(*row));
        // SAFETY: the assertion: the 16 bytes lie within the row.
        let v = unsafe { vld1q_u8(row.as_ptr().cast::<u8>().add(at)) };
        let (x, [c1, c2]) = (vdup_n_s8(x), [vshrq_n_u8::<2>(v), vshrq_n_u8::<4>(v)]);
        let codes = [vandq_u8(v, mask), vandq_u8(c1, mask), vandq_u8(c2, mask), vshrq_n_u8::<6>(v)];
        for (acc, codes) in acc.iter_mut().zip(codes) {
            let codes = vreinterpretq_s8_u8(codes);
            acc[0] = vmlal_s8(acc[0], vget_low_s8(codes), x);
            acc[1] = vmlal_s8(acc[1], vget_high_s8(codes), x);
        }
    }
    acc.map(|acc| {
        let mut sums = [0i16; 16];
        // SAFETY: 16 sums are two vectors of 8.
        unsafe { vst1q_s16_x2(sums.as_mut_ptr(), int16x8x2_t(acc[0], acc[1])) };
        sums.map(i32::from)
    })
}
