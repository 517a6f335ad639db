//! NEON with dot products (Armv8.2, Cortex-A76 and later): 32 registers of 16 bytes, byte products by `sdot`, tables of 16
//! entries by `tbl`.
//!
//! Cycles in the comments are those of a static model, `llvm-mca-22` with the Neoverse N1 (which stands for the Cortex-A76 of a
//! Raspberry Pi 5), for 256 products, as Rust 1.95 compiles these loops; no hardware was at hand. What was tried and lost:
//!
//! - T2 by one shift and four masks: 5 cycles more than three masks and one shift.
//! - TL with tables of 32 entries (`tbl` of two registers, the sign in the index): 29.4 against 23.3, both written by hand.
//! - B1 in planes (`cmtst` and `sdot`): 16.0 against 12.3 by tables, likewise.
//! - Loads of two registers by `ld1` in place of `ldp`, which the model counts as four operations: T2 20.6 in place of 21.6, but
//!   TL 27.7 in place of 25.0, by moves out of the registers that `asm!` must name. Of four registers it pays: see [`load4`].
//!
//! There is no software prefetch: it could not be measured, and the cores in question follow a sequential stream well.
//!
//! Loads go through [`load`] and friends, which take arrays: the loops hold no pointers and no `unsafe`.
#![allow(clippy::needless_range_loop, reason = "one index for several arrays of registers")]

use bitnet_kernel::tables::{B1_BASE, TL_BASE, TL_WEIGHTS};
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};
use core::arch::aarch64::*;

/// Invariant: a value exists only where the CPU has NEON and its dot products. [`detect`] makes the only one.
#[derive(Debug)]
pub(crate) struct Dotprod(());

static DOTPROD: Dotprod = Dotprod(());

/// See [`crate::dotprod`].
pub(crate) fn detect() -> Option<&'static dyn Kernels> {
    #[cfg(feature = "std")]
    let present = std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(not(feature = "std"))]
    let present = cfg!(target_feature = "dotprod");
    present.then_some(&DOTPROD as &dyn Kernels)
}

impl Kernels for Dotprod {
    fn name(&self) -> &'static str {
        "neon-dotprod"
    }
    /// The tables of [`bitnet_kernel::tables`], in the same places. A sum at the edge of two splits may take the other one.
    fn prepare<'a>(&self, format: Format, cols: usize, values: &'a [i8], tables: &'a mut [Block]) -> Activations<'a> {
        match format {
            // SAFETY: `self` exists, so the CPU has these features.
            Format::B1 => unsafe { prepare_b1_neon(values, tables) },
            // SAFETY: as above.
            Format::TL => unsafe { prepare_tl_neon(values, tables) },
            _ => {}
        }
        Activations::new(format, cols, values, tables)
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { products(w, &[x], y) }
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { products(w, x.tokens(), y) }
    }
    // The floating-point methods are the bodies of `float` as they are: NEON is part of every build for this architecture,
    // so that compiling them again would change nothing.
}

/// The 16 bytes of `bytes` from `at` on.
#[target_feature(enable = "neon")]
#[inline]
fn load<const N: usize>(bytes: &[u8; N], at: usize) -> uint8x16_t {
    assert!(at + 16 <= N);
    // SAFETY: the assertion: the 16 bytes lie within `bytes`. It folds away wherever `at` is a constant.
    unsafe { vld1q_u8(bytes.as_ptr().add(at)) }
}

/// The 32 bytes of `bytes` from `at` on.
#[target_feature(enable = "neon")]
#[inline]
fn load2<const N: usize>(bytes: &[u8; N], at: usize) -> [uint8x16_t; 2] {
    assert!(at + 32 <= N);
    // SAFETY: the assertion: the 32 bytes lie within `bytes`.
    let v = unsafe { vld1q_u8_x2(bytes.as_ptr().add(at)) };
    [v.0, v.1]
}

/// The 64 bytes of a block, by one `ld1`: the intrinsic becomes two `ldp`, and I8 takes 21.0 cycles in place of 16.0.
#[target_feature(enable = "neon")]
#[inline]
fn load4(block: &Block) -> [uint8x16_t; 4] {
    let (a, b, c, d);
    // SAFETY: a block is 64 bytes. Nothing is written.
    unsafe {
        let p = block.0.as_ptr();
        core::arch::asm!("ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{0}]", in(reg) p, out("v28") a, out("v29") b,
            out("v30") c, out("v31") d, options(pure, readonly, nostack, preserves_flags));
    }
    [a, b, c, d]
}

/// [`load`] of activations.
#[target_feature(enable = "neon")]
#[inline]
fn load_x<const N: usize>(x: &[i8; N], at: usize) -> int8x16_t {
    assert!(at + 16 <= N);
    // SAFETY: the assertion: the 16 bytes lie within `x`.
    unsafe { vld1q_s8(x.as_ptr().add(at)) }
}

/// [`load2`] of activations.
#[target_feature(enable = "neon")]
#[inline]
fn load2_x<const N: usize>(x: &[i8; N], at: usize) -> [int8x16_t; 2] {
    assert!(at + 32 <= N);
    // SAFETY: the assertion: the 32 bytes lie within `x`.
    let v = unsafe { vld1q_s8_x2(x.as_ptr().add(at)) };
    [v.0, v.1]
}

/// `acc + a · b`, four products a lane: `sdot`, whose intrinsic is not stable.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn sdot(mut acc: int32x4_t, a: uint8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: register operands only, and the features are enabled here.
    unsafe {
        core::arch::asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) acc, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

/// Tokens that are multiplied by a vector of weights while it lies unpacked in registers: as many as have room for their sums.
const TOKENS: usize = 4;

/// `w` times every token. The entrance checks were made.
#[target_feature(enable = "neon,dotprod")]
fn products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    match w.format() {
        Format::B1 => lanes_of(w, tokens, y, |w, x| matvec_b1_neon(w, x)),
        Format::TL => lanes_of(w, tokens, y, |w, x| matvec_tl_neon(w, x)),
        Format::T2 => planes_of(w, tokens, y, |w, x| matvec_t2_neon_dotprod(w, x), |w, x| matmat_t2_neon_dotprod(w, x)),
        Format::I4 => planes_of(w, tokens, y, |w, x| matvec_i4_neon_dotprod(w, x), |w, x| matmat_i4_neon_dotprod(w, x)),
        Format::I8 => planes_of(w, tokens, y, |w, x| matvec_i8_neon_dotprod(w, x), |w, x| matmat_i8_neon_dotprod(w, x)),
        _ => panic!("{} is not multiplied by this method", w.format().name()),
    }
}

/// A tile of a format in planes: 4 blocks a step, one of each row.
type Planes<'a> = &'a [[Block; 4]];

/// Cuts a product into those of one tile with one token (`one`) or with [`TOKENS`] of them (`four`).
///
/// Tile by tile, so that the weights of a tile are in the first-level cache for all tokens but the first. Three tokens left
/// over cost as much as four, two are cheaper one by one.
fn planes_of(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    one: impl Fn(Planes<'_>, Activations<'_>) -> [i32; 4],
    four: impl Fn(Planes<'_>, [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS],
) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    for (first, tile) in (0..w.rows()).step_by(4).zip(w.tiles()) {
        let (tile, _) = tile.as_chunks();
        for (tokens, y) in tokens.chunks(TOKENS).zip(y.chunks_mut(w.rows() * TOKENS)) {
            let mut dots = [[0; 4]; TOKENS];
            match tokens.len() {
                1..=2 => tokens.iter().zip(&mut dots).for_each(|(x, dots)| *dots = one(tile, *x)),
                n => dots = four(tile, core::array::from_fn(|t| tokens[t.min(n - 1)])),
            }
            for (y, dots) in y.chunks_exact_mut(w.rows()).zip(dots) {
                y[first..].iter_mut().zip(dots).for_each(|(y, dot)| *y = dot);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// T2, I4, I8: planes. A lane of `sdot` is at most `2^31 / 4` in every sum below: the widest row has 65,536 columns, a quarter of
// them in one lane, and codes at their weights are at most 192 (T2, an invalid one), 15 (I4) and 128 (I8): 16,384·192·128 < 2^29.

/// The dot products of 4 rows: 3 masks, 1 shift and 4 `sdot` for 64 weights of 16 bytes, 21.6 cycles.
///
/// Planes 1 and 2 keep their weights 4 and 16 in sums of their own, divided once at the end. All sums are multiples of them, so
/// the shifts are exact.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_t2_neon_dotprod(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<256>();
    let masks = [vdupq_n_u8(0x03), vdupq_n_u8(0x0c), vdupq_n_u8(0x30)];
    let mut acc = [[vdupq_n_s32(0); 3]; 4];
    for (step, x) in steps.iter().zip(xs) {
        for half in [0, 32] {
            let [x0, x1, x2, x3] =
                [load2_x(x, half), load2_x(x, 64 + half), load2_x(x, 128 + half), load2_x(x, 192 + half)];
            for r in 0..4 {
                let v = load2(&step[r].0, half);
                for q in 0..2 {
                    acc[r][0] = sdot(acc[r][0], vandq_u8(v[q], masks[0]), x0[q]);
                    acc[r][1] = sdot(acc[r][1], vandq_u8(v[q], masks[1]), x1[q]);
                    acc[r][2] = sdot(acc[r][2], vandq_u8(v[q], masks[2]), x2[q]);
                    acc[r][0] = sdot(acc[r][0], vshrq_n_u8::<6>(v[q]), x3[q]);
                }
            }
        }
    }
    let mut dots = [0; 4];
    for r in 0..4 {
        let [a1, a4, a16] = acc[r];
        dots[r] = vaddvq_s32(a1) + (vaddvq_s32(a4) >> 2) + (vaddvq_s32(a16) >> 4) - x.sum();
    }
    dots
}

/// The dot products of 4 rows: 1 mask, 1 shift and 2 `sdot` for 32 weights, 20.5 cycles.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_i4_neon_dotprod(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<128>();
    let nibble = vdupq_n_u8(15);
    let mut acc = [[vdupq_n_s32(0); 2]; 4];
    for (step, x) in steps.iter().zip(xs) {
        for half in [0, 32] {
            let [x0, x1] = [load2_x(x, half), load2_x(x, 64 + half)];
            for r in 0..4 {
                let v = load2(&step[r].0, half);
                for q in 0..2 {
                    acc[r][0] = sdot(acc[r][0], vandq_u8(v[q], nibble), x0[q]);
                    acc[r][1] = sdot(acc[r][1], vshrq_n_u8::<4>(v[q]), x1[q]);
                }
            }
        }
    }
    acc.map(|[a, b]| vaddvq_s32(vaddq_s32(a, b)) - 8 * x.sum())
}

/// The dot products of 4 rows: `sdot` and nothing else, 16.0 cycles.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_i8_neon_dotprod(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<64>();
    let mut acc = [[vdupq_n_s32(0); 2]; 4];
    for (step, x) in steps.iter().zip(xs) {
        let [x01, x23] = [load2_x(x, 0), load2_x(x, 32)];
        for r in 0..4 {
            let v = load4(&step[r]);
            acc[r][0] = sdot(acc[r][0], v[0], x01[0]);
            acc[r][1] = sdot(acc[r][1], v[1], x01[1]);
            acc[r][0] = sdot(acc[r][0], v[2], x23[0]);
            acc[r][1] = sdot(acc[r][1], v[3], x23[1]);
        }
    }
    acc.map(|[a, b]| vaddvq_s32(vaddq_s32(a, b)))
}

#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matmat_t2_neon_dotprod(steps: Planes<'_>, x: [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS] {
    dots_of_codes_neon_dotprod::<256, 2>(steps, x, 1)
}

#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matmat_i4_neon_dotprod(steps: Planes<'_>, x: [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS] {
    dots_of_codes_neon_dotprod::<128, 4>(steps, x, 8)
}

#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matmat_i8_neon_dotprod(steps: Planes<'_>, x: [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS] {
    dots_of_codes_neon_dotprod::<64, 8>(steps, x, 0)
}

/// The dot products of 4 rows and 4 tokens, `COLS` columns a step in planes of `BITS` bits, with codes `w + bias`.
///
/// A tile of 4 by 4 sums, 4 vectors of weights, 4 of activations, a mask and a temporary; every load serves four
/// multiplications: 12.9 cycles for T2, 13.2 for I4, 15.2 for I8.
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dots_of_codes_neon_dotprod<const COLS: usize, const BITS: i32>(
    steps: Planes<'_>,
    x: [Activations<'_>; TOKENS],
    bias: i32,
) -> [[i32; 4]; TOKENS] {
    let mask = vdupq_n_u8(u8::MAX >> (8 - BITS));
    let xs = x.map(|x| &x.values().as_chunks::<COLS>().0[..steps.len()]);
    let mut acc = [[vdupq_n_s32(0); 4]; TOKENS];
    for (i, step) in steps.iter().enumerate() {
        let xs = [&xs[0][i], &xs[1][i], &xs[2][i], &xs[3][i]];
        for quarter in [0, 16, 32, 48] {
            let mut v = [vdupq_n_u8(0); 4];
            for r in 0..4 {
                v[r] = load(&step[r].0, quarter);
            }
            for plane in 0..COLS / 64 {
                let mut x = [vdupq_n_s8(0); TOKENS];
                for t in 0..TOKENS {
                    x[t] = load_x(xs[t], 64 * plane + quarter);
                }
                for r in 0..4 {
                    let codes = if BITS == 8 { v[r] } else { vandq_u8(v[r], mask) };
                    for t in 0..TOKENS {
                        acc[t][r] = sdot(acc[t][r], codes, x[t]);
                    }
                    v[r] = vshrq_n_u8::<BITS>(v[r]);
                }
            }
        }
    }
    let mut dots = [[0; 4]; TOKENS];
    for t in 0..TOKENS {
        for r in 0..4 {
            dots[t][r] = vaddvq_s32(acc[t][r]) - bias * x[t].sum();
        }
    }
    dots
}

// ---------------------------------------------------------------------------------------------------------------------
// B1 and TL: rows in byte lanes, a table of partial sums for each group of columns. A sum is `base · hi + lo + 16`.

/// Steps after which the 16-bit sums of either part are emptied: within a step 8 groups add up in byte lanes to `-128..=120`,
/// 255 steps to at least -32640.
const LANES_FLUSH: usize = 255;

/// A tile of a format in lanes: 64 rows, `BLOCKS` blocks a step, the last 4 of nibbles and one of signs before them in TL.
type Lanes<'a, const BLOCKS: usize> = &'a [[Block; BLOCKS]];

/// Cuts a product into those of one tile with one token, tile by tile as in [`planes_of`].
///
/// Sharing nibbles and signs between tokens, as AVX2 does, was tried: 4 tokens with 16 rows in registers took 26.2 cycles for TL
/// where one token takes 25.0, and 15.9 against 12.0 for B1; 2 tokens with 32 rows took 26.8. What unpacking saves goes into
/// loads of tables and spilled sums.
fn lanes_of<const BLOCKS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    one: impl Fn(Lanes<'_, BLOCKS>, Activations<'_>) -> [i32; 64],
) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    for (first, tile) in (0..w.rows()).step_by(64).zip(w.tiles()) {
        let here = first..w.rows().min(first + 64);
        for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
            y[here.clone()].copy_from_slice(&one(tile.as_chunks().0, *x)[..here.len()]);
        }
    }
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_b1_neon(steps: Lanes<'_, 4>, x: Activations<'_>) -> [i32; 64] {
    let constant = 16 * 8 * steps.len() as i32;
    sums_of_lanes_neon::<4, B1_BASE>(steps, x).map(|sum| 2 * (sum + constant) - x.sum())
}

#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_tl_neon(steps: Lanes<'_, 5>, x: Activations<'_>) -> [i32; 64] {
    let constant = 16 * 8 * steps.len() as i32;
    sums_of_lanes_neon::<5, TL_BASE>(steps, x).map(|sum| sum + constant)
}

/// `Σ base · hi + lo` over the groups of 64 rows, 32 rows at a time, which share the tables while these are in registers:
/// 25.0 cycles for TL (26.7 with 16 rows), 12.0 for B1.
#[target_feature(enable = "neon")]
#[inline]
fn sums_of_lanes_neon<const BLOCKS: usize, const BASE: i16>(steps: Lanes<'_, BLOCKS>, x: Activations<'_>) -> [i32; 64] {
    let (tables, _) = x.tables().as_chunks::<4>();
    let mut y = [0; 64];
    for (steps, tables) in steps.chunks(LANES_FLUSH).zip(tables.chunks(LANES_FLUSH)) {
        for (half, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let mut wide = [[vdupq_n_s16(0); 4]; 2];
            for (step, tables) in steps.iter().zip(tables) {
                let mut sign = load2(&step[0].0, 32 * half);
                let (mut lo, mut hi) = ([vdupq_n_s8(0); 2], [vdupq_n_s8(0); 2]);
                for i in 0..4 {
                    let v = load2(&step[i + BLOCKS - 4].0, 32 * half);
                    for odd in 0..2 {
                        let [t_lo, t_hi] = load2(&tables[i].0, 32 * odd);
                        for q in 0..2 {
                            let n = if odd == 0 { vandq_u8(v[q], vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(v[q]) };
                            (lo[q], hi[q]) = add_group::<BLOCKS>((lo[q], hi[q]), (t_lo, t_hi), n, negative(sign[q]));
                            sign[q] = vaddq_u8(sign[q], sign[q]);
                        }
                    }
                }
                for q in 0..2 {
                    wide[q] = widen(wide[q], lo[q], hi[q]);
                }
            }
            for (wide, y) in wide.into_iter().zip(y.as_chunks_mut::<16>().0) {
                add_wide::<BASE>(wide, y);
            }
        }
    }
    y
}

/// All ones where the top bit is set.
#[target_feature(enable = "neon")]
#[inline]
fn negative(sign: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(vcltzq_s8(vreinterpretq_s8_u8(sign)))
}

/// Adds the sums that the nibbles `n` name, negated where `negative` (in the format that has signs), to both parts.
#[target_feature(enable = "neon")]
#[inline]
fn add_group<const BLOCKS: usize>(
    sums: (int8x16_t, int8x16_t),
    table: (uint8x16_t, uint8x16_t),
    n: uint8x16_t,
    negative: int8x16_t,
) -> (int8x16_t, int8x16_t) {
    let mut lo = vreinterpretq_s8_u8(vqtbl1q_u8(table.0, n));
    let mut hi = vreinterpretq_s8_u8(vqtbl1q_u8(table.1, n));
    if BLOCKS == 5 {
        (lo, hi) = (veorq_s8(lo, negative), veorq_s8(hi, negative));
    }
    (vaddq_s8(sums.0, lo), vaddq_s8(sums.1, hi))
}

/// Adds the parts of 16 rows to 16-bit sums: `lo` of rows 0 to 7 and 8 to 15, then `hi`.
#[target_feature(enable = "neon")]
#[inline]
fn widen(wide: [int16x8_t; 4], lo: int8x16_t, hi: int8x16_t) -> [int16x8_t; 4] {
    [
        vaddw_s8(wide[0], vget_low_s8(lo)),
        vaddw_high_s8(wide[1], lo),
        vaddw_s8(wide[2], vget_low_s8(hi)),
        vaddw_high_s8(wide[3], hi),
    ]
}

/// Empties the sums of [`widen`] into `y`.
#[target_feature(enable = "neon")]
#[inline]
fn add_wide<const BASE: i16>(wide: [int16x8_t; 4], y: &mut [i32; 16]) {
    let mut parts = [[0i16; 8]; 4];
    for (part, wide) in parts.iter_mut().zip(wide) {
        // SAFETY: `part` is 16 bytes.
        unsafe { vst1q_s16(part.as_mut_ptr(), wide) };
    }
    let [lo, hi] = [parts[0..2].as_flattened(), parts[2..4].as_flattened()];
    for ((y, &lo), &hi) in y.iter_mut().zip(lo).zip(hi) {
        *y += i32::from(BASE) * i32::from(hi) + i32::from(lo);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The tables of B1 and TL.

/// The coefficient of `column` in each of the 16 sums of a group.
const fn coefficients(format: Format, column: usize) -> [[i16; 8]; 2] {
    let mut out = [[0; 8]; 2];
    let mut n = 0;
    while n < 16 {
        out[n / 8][n % 8] = match format {
            Format::TL => TL_WEIGHTS[n][column] as i16,
            _ => (n >> column & 1) as i16,
        };
        n += 1;
    }
    out
}

/// The sums of one group, in two vectors.
#[target_feature(enable = "neon")]
#[inline]
fn group_sums<const COLS: usize>(coefficients: &[[[i16; 8]; 2]; COLS], x: &[i8; COLS]) -> [int16x8_t; 2] {
    let mut v = [vdupq_n_s16(0); 2];
    for (coefficients, &x) in coefficients.iter().zip(x) {
        for h in 0..2 {
            // SAFETY: an array of 16 bytes.
            let c = unsafe { vld1q_s16(coefficients[h].as_ptr()) };
            v[h] = vmlaq_n_s16(v[h], c, i16::from(x));
        }
    }
    v
}

#[target_feature(enable = "neon")]
fn prepare_tl_neon(values: &[i8], tables: &mut [Block]) {
    const COEFFICIENTS: [[[i16; 8]; 2]; 3] =
        [coefficients(Format::TL, 0), coefficients(Format::TL, 1), coefficients(Format::TL, 2)];
    for (x, out) in values.as_chunks::<24>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for (g, x) in x.as_chunks::<3>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            // v / 31, rounded down or, where 31 divides v, perhaps one less: `lo` is 15 then, in range as well.
            let hi = [0, 1].map(|h| vshrq_n_s16::<1>(vqdmulhq_n_s16(v[h], 2115)));
            let lo = [0, 1].map(|h| vmlsq_n_s16(v[h], hi[h], TL_BASE));
            store_table(&mut out[g / 2], g % 2, lo, hi);
        }
    }
}

#[target_feature(enable = "neon")]
fn prepare_b1_neon(values: &[i8], tables: &mut [Block]) {
    const COEFFICIENTS: [[[i16; 8]; 2]; 4] = [
        coefficients(Format::B1, 0),
        coefficients(Format::B1, 1),
        coefficients(Format::B1, 2),
        coefficients(Format::B1, 3),
    ];
    for (x, out) in values.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for (g, x) in x.as_chunks::<4>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            let hi = v.map(|v| vshrq_n_s16::<5>(v));
            let lo = v.map(|v| vandq_s16(v, vdupq_n_s16(B1_BASE - 1)));
            store_table(&mut out[g / 2], g % 2, lo, hi);
        }
    }
}

/// Writes table `i` of the two in `block`: the bytes of `lo - 16`, then those of `hi`.
#[target_feature(enable = "neon")]
#[inline]
fn store_table(block: &mut Block, i: usize, lo: [int16x8_t; 2], hi: [int16x8_t; 2]) {
    let bytes = |v: [int16x8_t; 2]| vmovn_high_s16(vmovn_s16(v[0]), v[1]);
    let lo = vsubq_s8(bytes(lo), vdupq_n_s8(16));
    let out = &mut block.0.as_chunks_mut::<32>().0[i];
    // SAFETY: `out` is 32 bytes.
    unsafe {
        vst1q_s8(out.as_mut_ptr().cast(), lo);
        vst1q_s8(out.as_mut_ptr().add(16).cast(), bytes(hi));
    }
}
