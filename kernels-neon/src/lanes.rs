//! B1 and TL with plain NEON, for every backend of this crate: rows in byte lanes, a table of partial sums for each group of
//! columns. A sum is `base · hi + lo + 16`.
//!
//! The sum that a nibble names is looked up by `tbl`, for low and high parts. A sign costs nothing: `uaba` adds `|t - m|`, taken
//! as unsigned bytes, which for `m = 0` is `t` and for `m = 255` is `255 - t`, the complement that negates both parts (see
//! [`bitnet_kernel::tables`]). It took the place of an exclusive or and an addition: TL 17.7 cycles where it took 22.0.
//!
//! Two loops are assembly, [`LOOP_TL`] and [`LOOP_B1`], 32 rows and one step an iteration, since compiled from intrinsics
//! they load pairs of registers by `ldp`, which the model of the N1 counts as more operations than `ld1`. The order of their
//! instructions was searched for at random under their dependencies. It matters to the model of the V1 alone, which counts a
//! `tbl` as two operations: TL 13.7 in the order in which one would write it, B1 9.1.
//!
//! Lost: 16 rows a loop in place of 32 (26.7 against 25.0 for TL, both with the exclusive or); tables of 32 entries with the
//! sign in the index (29.4 against 23.3); B1 in planes (`cmtst` and `sdot`, 16.0 against 12.3); 4 tokens at a time with 16 rows in
//! registers (26.2 for TL against 25.0 for one token, 15.9 against 12.0 for B1), 2 tokens with 32 rows (26.8): what unpacking
//! saves goes into loads of tables and spilled sums.

use bitnet_kernel::tables::{B1_BASE, TL_BASE, TL_WEIGHTS};
use bitnet_kernel::{Activations, Block, Format, Matrix};
use core::arch::aarch64::*;
use core::arch::asm;

/// Steps after which the 16-bit sums of either part are emptied: within a step 8 groups add up in byte lanes to `-128..=120`,
/// 255 steps to at least -32640.
const FLUSH: usize = 255;

/// The base of tables of int4 activations, which have no high parts: see [`sums_of_half_int4`].
const INT4_BASE: i16 = 1;

/// A tile: 64 rows, `BLOCKS` blocks a step, the last 4 of nibbles and one of signs before them in TL.
type Steps<'a, const BLOCKS: usize> = &'a [[Block; BLOCKS]];

/// One step of 32 rows of TL: 5 blocks at `x0`, 4 of tables at `x1`, `x2` times. Raw text, hence registers by name.
macro_rules! loop_tl {
    () => {
        include_str!("lanes/tl.s")
    };
}

/// The same of B1: 4 blocks at `x0`.
macro_rules! loop_b1 {
    () => {
        include_str!("lanes/b1.s")
    };
}

/// [`bitnet_kernel::Kernels::fill`]: the tables of [`bitnet_kernel::tables`], in the same places. A sum at the edge of two splits may
/// take the other one. Of int4 activations a sum is its own low part.
#[target_feature(enable = "neon")]
pub(crate) fn fill(format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
    match format {
        Format::B1 => prepare_b1_neon(values, int4, tables),
        Format::TL => prepare_tl_neon(values, int4, tables),
        _ => {}
    }
}

/// `y[t][r] = Σ w x` of every token, tile by tile, so that the weights of a tile are in the first-level cache for all tokens but
/// the first.
#[target_feature(enable = "neon")]
pub(crate) fn matmat(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    for (first, tile) in (0..w.rows()).step_by(64).zip(w.tiles()) {
        let here = first..w.rows().min(first + 64);
        for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
            let dots = match (w.format(), x.int4()) {
                (Format::B1, false) => matvec_b1_neon(tile.as_chunks().0, *x),
                (Format::B1, true) => matvec_b1_int4_neon(tile.as_chunks().0, *x),
                (_, false) => matvec_tl_neon(tile.as_chunks().0, *x),
                (_, true) => matvec_tl_int4_neon(tile.as_chunks().0, *x),
            };
            y[here.clone()].copy_from_slice(&dots[..here.len()]);
        }
    }
}

/// The dot products of 64 rows. 17.7 cycles.
#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_tl_neon(steps: Steps<'_, 5>, x: Activations<'_>) -> [i32; 64] {
    sums_of::<5, TL_BASE>(steps, x).map(|sum| sum + constant(steps.len()))
}

/// The dot products of 64 rows. 10.8 cycles.
#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_b1_neon(steps: Steps<'_, 4>, x: Activations<'_>) -> [i32; 64] {
    sums_of::<4, B1_BASE>(steps, x).map(|sum| 2 * (sum + constant(steps.len())) - x.sum())
}

/// [`matvec_tl_neon`] with int4 activations.
#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_tl_int4_neon(steps: Steps<'_, 5>, x: Activations<'_>) -> [i32; 64] {
    sums_of::<5, INT4_BASE>(steps, x)
}

/// [`matvec_b1_neon`] with int4 activations.
#[target_feature(enable = "neon")]
#[inline(never)]
fn matvec_b1_int4_neon(steps: Steps<'_, 4>, x: Activations<'_>) -> [i32; 64] {
    sums_of::<4, INT4_BASE>(steps, x).map(|sum| 2 * sum - x.sum())
}

/// What the tables leave out: 16 a group.
const fn constant(steps: usize) -> i32 {
    16 * 8 * steps as i32
}

/// `Σ base · hi + lo` over the groups of 64 rows, 32 rows at a time, which share the tables while these are in registers.
#[target_feature(enable = "neon")]
#[inline]
fn sums_of<const BLOCKS: usize, const BASE: i16>(steps: Steps<'_, BLOCKS>, x: Activations<'_>) -> [i32; 64] {
    let (tables, _) = x.tables().as_chunks::<4>();
    assert_eq!(tables.len(), steps.len());
    let mut y = [0; 64];
    for (steps, tables) in steps.chunks(FLUSH).zip(tables.chunks(FLUSH)) {
        for (half, y) in y.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let sums = match BASE {
                INT4_BASE => sums_of_half_int4(steps, tables, half),
                _ => sums_of_half(steps, tables, half),
            };
            for (sums, y) in sums.as_chunks::<4>().0.iter().zip(y.as_chunks_mut::<16>().0) {
                add_wide::<BASE>(sums, y);
            }
        }
    }
    y
}

/// No more than [`FLUSH`] steps of the first or the other 32 rows: the sums of 16 rows, low parts of 8 and 8 more, then high parts,
/// and those of the next 16.
#[target_feature(enable = "neon")]
#[inline]
fn sums_of_half<const BLOCKS: usize>(steps: Steps<'_, BLOCKS>, tables: &[[Block; 4]], half: usize) -> [int16x8_t; 8] {
    assert!(steps.len() == tables.len() && !steps.is_empty() && half < 2);
    let n = steps.len();
    let masks = [0x0f, 0x40, 0x20, 0x10].map(|byte| vdupq_n_u8(byte));
    let mut sums = [vdupq_n_s16(0); 8];
    // SAFETY: the assertion: `n` steps and as many fours of tables lie at the pointers, and not none; the loops read 32 bytes of
    // every block, from the start or from the middle. Their registers are all named.
    unsafe {
        let (w, tables) = (steps.as_ptr().cast::<u8>().add(32 * half), tables.as_ptr());
        if BLOCKS == 5 {
            asm!(loop_tl!(), inout("x0") w => _, inout("x1") tables => _, inout("x2") n => _, in("x5") 64,
                in("v27") masks[0], in("v8") masks[1], in("v9") masks[2], in("v10") masks[3],
                inout("v4") sums[0], inout("v5") sums[1], inout("v6") sums[2], inout("v7") sums[3],
                inout("v28") sums[4], inout("v29") sums[5], inout("v30") sums[6], inout("v31") sums[7],
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
                out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
                out("v22") _, out("v23") _, out("v24") _, out("v25") _, out("v26") _, options(raw, readonly, nostack));
        } else {
            asm!(loop_b1!(), inout("x0") w => _, inout("x1") tables => _, inout("x2") n => _, in("x5") 64,
                in("v27") masks[0],
                inout("v4") sums[0], inout("v5") sums[1], inout("v6") sums[2], inout("v7") sums[3],
                inout("v28") sums[4], inout("v29") sums[5], inout("v30") sums[6], inout("v31") sums[7],
                out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v8") _, out("v9") _, out("v10") _, out("v11") _,
                out("v12") _, out("v13") _, out("v14") _, out("v15") _, out("v16") _, out("v17") _, out("v18") _,
                out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _, out("v24") _, out("v25") _,
                out("v26") _, options(raw, readonly, nostack));
        }
    }
    sums
}

/// [`sums_of_half`] of int4 activations: in place of low parts the first four groups of every step, in place of high parts the
/// others. A byte lane holds four, at most 128 in magnitude, and [`FLUSH`] times as much is within 16 bits.
///
/// The sign costs nothing here, too, but bytes wrap: the complement of `t` is `-t - 1`. The ones are as many as the row has negative
/// signs in the step, and come back by a count of bits. For 32 rows of TL 76 operations on vectors in place of 104, of B1 56 in
/// place of 80.
#[target_feature(enable = "neon")]
#[inline]
fn sums_of_half_int4<const BLOCKS: usize>(
    steps: Steps<'_, BLOCKS>,
    tables: &[[Block; 4]],
    half: usize,
) -> [int16x8_t; 8] {
    let nibble = vdupq_n_u8(15);
    let bits: [uint8x16_t; 8] = core::array::from_fn(|g| vdupq_n_u8(0x80 >> g));
    let mut sums = [vdupq_n_s16(0); 8];
    for (step, tables) in steps.iter().zip(tables) {
        let two = |block: &Block| [load(block, 32 * half), load(block, 32 * half + 16)];
        let sign = two(&step[0]);
        let mut parts = [[vdupq_n_u8(0); 2]; 2];
        for i in 0..4 {
            let v = two(&step[i + BLOCKS - 4]);
            for odd in 0..2 {
                let table = load(&tables[i], 32 * odd);
                for r in 0..2 {
                    let n = if odd == 0 { vandq_u8(v[r], nibble) } else { vshrq_n_u8::<4>(v[r]) };
                    let sum = vqtbl1q_u8(table, n);
                    let part = &mut parts[r][i / 2];
                    *part = match BLOCKS {
                        5 => vabaq_u8(*part, sum, vtstq_u8(sign[r], bits[2 * i + odd])),
                        _ => vaddq_u8(*part, sum),
                    };
                }
            }
        }
        for r in 0..2 {
            if BLOCKS == 5 {
                parts[r][0] = vaddq_u8(parts[r][0], vcntq_u8(sign[r]));
            }
            for (i, part) in parts[r].into_iter().enumerate() {
                let (part, at) = (vreinterpretq_s8_u8(part), 4 * r + 2 * i);
                sums[at] = vaddw_s8(sums[at], vget_low_s8(part));
                sums[at + 1] = vaddw_high_s8(sums[at + 1], part);
            }
        }
    }
    sums
}

/// 16 bytes of a block.
#[target_feature(enable = "neon")]
#[inline]
fn load(block: &Block, at: usize) -> uint8x16_t {
    assert!(at + 16 <= Block::BYTES);
    // SAFETY: the assertion: the 16 bytes lie within the block.
    unsafe { vld1q_u8(block.0.as_ptr().add(at)) }
}

/// [`bitnet_kernel::Kernels::matvec_grouped`] of formats with tables: sums of a group become floats in registers.
#[target_feature(enable = "neon")]
pub(crate) fn matvec_grouped(w: Matrix<'_>, x: Activations<'_>, y: &mut [f32]) {
    for (tile, y) in y.chunks_mut(64).enumerate() {
        let mut sums = [vdupq_n_f32(0.0); 16];
        for (g, (panel, scales)) in w.panels(tile).enumerate() {
            match w.format() {
                Format::B1G => add_b1g_neon(panel.blocks().as_chunks().0, x.group(g), scales, &mut sums),
                Format::I2G => add_i2g_neon(panel.blocks().as_chunks().0, x.group(g), scales, &mut sums),
                Format::I3G => add_i3g_neon(panel.blocks().as_chunks().0, x.group(g), scales, &mut sums),
                _ => add_tlg_neon(panel.blocks().as_chunks().0, x.group(g), scales, &mut sums),
            }
        }
        let mut floats = [0.0; 64];
        for (floats, &sums) in floats.as_chunks_mut::<4>().0.iter_mut().zip(&sums) {
            // SAFETY: 4 floats are 16 bytes.
            unsafe { vst1q_f32(floats.as_mut_ptr(), sums) };
        }
        y.copy_from_slice(&floats[..y.len()]);
    }
}

/// Adds a group's products of 64 rows, scaled, to `y`.
#[target_feature(enable = "neon")]
#[inline(never)]
fn add_tlg_neon(steps: Steps<'_, 5>, x: Activations<'_>, scales: &[[u8; 2]], y: &mut [float32x4_t; 16]) {
    let constant = vdupq_n_s32(constant(steps.len()));
    add_group::<5, TL_BASE, 1>(steps, x, scales, y, |sum| vaddq_s32(sum, constant));
}

/// The same of signs.
#[target_feature(enable = "neon")]
#[inline(never)]
fn add_b1g_neon(steps: Steps<'_, 4>, x: Activations<'_>, scales: &[[u8; 2]], y: &mut [float32x4_t; 16]) {
    let constant = vdupq_n_s32(2 * constant(4) - x.sum());
    add_group::<4, B1_BASE, 1>(steps, x, scales, y, |sum| vaddq_s32(vaddq_s32(sum, sum), constant));
}

/// The same of two bit planes, `Σ(2c - 3)x`.
#[target_feature(enable = "neon")]
#[inline(never)]
fn add_i2g_neon(steps: Steps<'_, 4>, x: Activations<'_>, scales: &[[u8; 2]], y: &mut [float32x4_t; 16]) {
    let constant = vdupq_n_s32(3 * (2 * constant(4) - x.sum()));
    add_group::<4, B1_BASE, 2>(steps, x, scales, y, |sum| vaddq_s32(vaddq_s32(sum, sum), constant));
}

/// The same of three, `Σ(c - 4)x`.
#[target_feature(enable = "neon")]
#[inline(never)]
fn add_i3g_neon(steps: Steps<'_, 4>, x: Activations<'_>, scales: &[[u8; 2]], y: &mut [float32x4_t; 16]) {
    let constant = vdupq_n_s32(7 * constant(4) - 4 * x.sum());
    add_group::<4, B1_BASE, 3>(steps, x, scales, y, |sum| vaddq_s32(sum, constant));
}

/// `y += product(Σ_p 2^p Σ base · hi + lo) · scale`, in the order of [`bitnet_kernel::float::add_scaled`].
#[target_feature(enable = "neon")]
#[inline]
fn add_group<const BLOCKS: usize, const BASE: i16, const PLANES: usize>(
    steps: Steps<'_, BLOCKS>,
    x: Activations<'_>,
    scales: &[[u8; 2]],
    y: &mut [float32x4_t; 16],
    product: impl Fn(int32x4_t) -> int32x4_t,
) {
    let (scales, _) = scales.as_chunks::<8>();
    let plane_steps = steps.len() / PLANES;
    for half in 0..2 {
        let sums: [_; PLANES] = core::array::from_fn(|plane| {
            sums_of_half(&steps[plane * plane_steps..][..plane_steps], x.tables().as_chunks().0, half)
        });
        for i in 0..4 {
            // Rows 8 i to 8 i + 7 of this half.
            let (mut low, mut high) = (vdupq_n_s32(0), vdupq_n_s32(0));
            for sums in sums.iter().rev() {
                let (lo, hi) = (sums[i / 2 * 4 + i % 2], sums[i / 2 * 4 + 2 + i % 2]);
                (low, high) =
                    (vaddw_s16(vaddq_s32(low, low), vget_low_s16(lo)), vaddw_high_s16(vaddq_s32(high, high), lo));
                (low, high) = (vmlal_n_s16(low, vget_low_s16(hi), BASE), vmlal_high_n_s16(high, hi, BASE));
            }
            // SAFETY: 8 scales are 16 bytes.
            let bits = unsafe { vld1q_u16(scales[4 * half + i].as_ptr().cast()) };
            let y = &mut y[8 * half + 2 * i..][..2];
            y[0] = vaddq_f32(y[0], vmulq_f32(vcvtq_f32_s32(product(low)), f16_to_f32(vget_low_u16(bits))));
            y[1] = vaddq_f32(y[1], vmulq_f32(vcvtq_f32_s32(product(high)), f16_to_f32(vget_high_u16(bits))));
        }
    }
}

/// [`bitnet_kernel::float::f16_to_f32`] of four.
#[target_feature(enable = "neon")]
#[inline]
fn f16_to_f32(bits: uint16x4_t) -> float32x4_t {
    let bias = vdupq_n_f32(f32::from_bits((127 + 112) << 23));
    let sign = vshll_n_u16::<16>(vand_u16(bits, vdup_n_u16(0x8000)));
    let magnitude = vshll_n_u16::<13>(vand_u16(bits, vdup_n_u16(0x7fff)));
    let magnitude = vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(magnitude), bias));
    vreinterpretq_f32_u32(vorrq_u32(magnitude, sign))
}

/// Empties 16-bit sums of 16 rows into `y`.
#[target_feature(enable = "neon")]
fn add_wide<const BASE: i16>(sums: &[int16x8_t; 4], y: &mut [i32; 16]) {
    let mut parts = [[0i16; 8]; 4];
    for (part, &sums) in parts.iter_mut().zip(sums) {
        // SAFETY: `part` is 16 bytes.
        unsafe { vst1q_s16(part.as_mut_ptr(), sums) };
    }
    let [lo, hi] = [parts[0..2].as_flattened(), parts[2..4].as_flattened()];
    for ((y, &lo), &hi) in y.iter_mut().zip(lo).zip(hi) {
        *y += i32::from(BASE) * i32::from(hi) + i32::from(lo);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The tables.

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
fn prepare_tl_neon(values: &[i8], int4: bool, tables: &mut [Block]) {
    const COEFFICIENTS: [[[i16; 8]; 2]; 3] =
        [coefficients(Format::TL, 0), coefficients(Format::TL, 1), coefficients(Format::TL, 2)];
    for (x, out) in values.as_chunks::<24>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for (g, x) in x.as_chunks::<3>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            if int4 {
                store_table(&mut out[g / 2], g % 2, v, [vdupq_n_s16(0); 2]);
                continue;
            }
            // v / 31, rounded down or, where 31 divides v, perhaps one less: `lo` is 15 then, in range as well.
            let hi = [0, 1].map(|h| vshrq_n_s16::<1>(vqdmulhq_n_s16(v[h], 2115)));
            let lo = [0, 1].map(|h| vsubq_s16(vmlsq_n_s16(v[h], hi[h], TL_BASE), vdupq_n_s16(16)));
            store_table(&mut out[g / 2], g % 2, lo, hi);
        }
    }
}

#[target_feature(enable = "neon")]
fn prepare_b1_neon(values: &[i8], int4: bool, tables: &mut [Block]) {
    const COEFFICIENTS: [[[i16; 8]; 2]; 4] = [
        coefficients(Format::B1, 0),
        coefficients(Format::B1, 1),
        coefficients(Format::B1, 2),
        coefficients(Format::B1, 3),
    ];
    for (x, out) in values.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for (g, x) in x.as_chunks::<4>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            if int4 {
                store_table(&mut out[g / 2], g % 2, v, [vdupq_n_s16(0); 2]);
                continue;
            }
            let hi = v.map(|v| vshrq_n_s16::<5>(v));
            let lo = v.map(|v| vsubq_s16(vandq_s16(v, vdupq_n_s16(B1_BASE - 1)), vdupq_n_s16(16)));
            store_table(&mut out[g / 2], g % 2, lo, hi);
        }
    }
}

/// Writes table `i` of the two in `block`: the bytes of `lo`, then those of `hi`.
#[target_feature(enable = "neon")]
#[inline]
fn store_table(block: &mut Block, i: usize, lo: [int16x8_t; 2], hi: [int16x8_t; 2]) {
    let bytes = |v: [int16x8_t; 2]| vmovn_high_s16(vmovn_s16(v[0]), v[1]);
    let out = &mut block.0.as_chunks_mut::<32>().0[i];
    // SAFETY: `out` is 32 bytes.
    unsafe {
        vst1q_s8(out.as_mut_ptr().cast(), bytes(lo));
        vst1q_s8(out.as_mut_ptr().add(16).cast(), bytes(hi));
    }
}
