//! AVX-512 without VNNI and VBMI (Skylake-X, Cascade Lake): the loops of AVX2 in 32 registers of 64 bytes, one block each.
#![allow(clippy::needless_range_loop, reason = "one index for several arrays of registers")]

use crate::avx2::{INT4_BASE, prepare_b1_avx2, prepare_tl_balanced_avx2};
use crate::avx512::{by_tokens, lanes, load, load_four_times, opaque, prefetch, sums_less};
use crate::blocks;
use crate::cpu::Features;
use crate::float;
use crate::grouped;
use crate::rows;
use crate::tiles::{self, Lanes, Planes};
use bitnet_kernel::float::Cache;
use bitnet_kernel::tables::{B1_BASE, TL_BASE};
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix, kernels};
use core::arch::x86_64::*;

/// Invariant: a value exists only where the CPU has AVX-512 F, BW, DQ and VL. [`detect`] makes the only one.
#[derive(Debug)]
struct Bw(());

static BW: Bw = Bw(());

/// See [`crate::avx512_bw`].
pub(crate) fn detect() -> Option<&'static dyn Kernels> {
    Features::AVX2.and(Features::AVX512_BW).present().then_some(&BW as &dyn Kernels)
}

impl Kernels for Bw {
    fn name(&self) -> &'static str {
        "avx512-bw"
    }
    /// As AVX2: the tables of [`bitnet_kernel::tables`].
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        match format {
            // SAFETY: `self` exists, so the CPU has AVX2.
            Format::B1 => unsafe { prepare_b1_avx2(values, int4, tables) },
            // SAFETY: as above.
            Format::TL => unsafe { prepare_tl_balanced_avx2(values, int4, tables) },
            _ => {}
        }
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
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        match w.format().base() {
            // SAFETY: `self` exists, so the CPU has AVX2 and F16C.
            Format::B1 => unsafe { grouped::products(w, x, y) },
            _ => kernels::matmat_grouped(self, w, x, y),
        }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { rows::dot_rows(w, rows, x, y) }
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { rows::sum_rows(w, rows, x, y) }
    }
    fn matvec_blocks(&self, w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { blocks::matvec_avx2(w, x, y) }
    }
    fn matvec_f16(&self, w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { float::matvec_f16(w, x, y) }
    }
    fn quantize(&self, x: &[f32], q: &mut [i8]) -> Option<f32> {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { float::quantize(x, q) }
    }
    fn rmsnorm(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        // SAFETY: as above.
        unsafe { float::rmsnorm(x, weight, eps) }
    }
    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::silu(gate, up, out) }
    }
    fn squared_relu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::squared_relu(gate, up, out) }
    }
    fn convolve(&self, past: &mut [f32], taps: &[f32], x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::convolve(past, taps, x) }
    }
    fn convolve_silu(&self, past: &mut [f32], taps: &[f32], x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { float::convolve_silu(past, taps, x) }
    }
    fn delta_rule(&self, state: &mut [f32], key: &[f32], alpha: f32, beta: f32, value: f32) {
        // SAFETY: as above.
        unsafe { float::delta_rule(state, key, alpha, beta, value) }
    }
    fn recall(&self, state: &[f32], query: &[f32]) -> f32 {
        // SAFETY: as above.
        unsafe { float::recall(state, query) }
    }
    fn recur(&self, state: &mut [f32], bound: &[f32], forget: &[f32], input: &[f32]) {
        // SAFETY: as above.
        unsafe { float::recur(state, bound, forget, input) }
    }
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { float::attend_avx512(q, keys, values, scale, out) }
    }
}

/// Tokens that are multiplied by a vector of weights while it lies unpacked in registers.
const TOKENS: usize = 4;

/// `w` times every token. The entrance checks were made.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    match w.format() {
        Format::B1 => tiles::lanes(w, tokens, y, |w, x, y| b1(w, x, y)),
        Format::TL => tiles::lanes(w, tokens, y, |w, x, y| tl(w, x, y)),
        Format::T2 => tiles::planes(w, tokens, y, |w, x, y| t2(w, x, y)),
        Format::I4 => tiles::planes(w, tokens, y, |w, x, y| i4(w, x, y)),
        Format::I8 => tiles::planes(w, tokens, y, |w, x, y| i8(w, x, y)),
        _ => panic!("{} is not multiplied by this method", w.format().name()),
    }
}

/// Adds the pairs of 16-bit lanes to 32-bit sums.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn add_pairs(total: __m512i, pairs: __m512i) -> __m512i {
    _mm512_add_epi32(total, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
}

/// `acc + codes · x`, in pairs: unsigned bytes times signed bytes.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn add_products(acc: __m512i, codes: __m512i, x: __m512i) -> __m512i {
    _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x))
}

// ---------------------------------------------------------------------------------------------------------------------
// Planes.

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn t2(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_t2(steps, x),
        // A lane is at most `2·2·128 = 512` in magnitude, 4 a step: 16 steps give `-32768..=32512`.
        _ => by_tokens!(x, y, dots_of_codes::<256, 2, 1, 16>(steps)),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn i4(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    // A lane is at most `2·15·128 = 3840` in magnitude, 2 a step: 4 steps give 30720.
    by_tokens!(x, y, dots_of_codes::<128, 4, 8, 4>(steps));
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn i8(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    for (x, y) in x.iter().zip(y) {
        *y = matvec_i8(steps, *x);
    }
}

/// The sums of codes times activations of 4 rows, planes at weight 1 and 4 as AVX2 has them: 13 operations for 256 weights.
///
/// A lane of weight 4 is at most 2048 in magnitude, 2 a step: 8 steps give `-32768..=32512`, all multiples of 4.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline(never)]
fn matvec_t2(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    const FLUSH: usize = 8;
    let (xs, _) = x.values().as_chunks::<256>();
    let zero = _mm512_setzero_si512();
    let (m1, m4) = (_mm512_set1_epi8(0x03), _mm512_set1_epi8(0x0c));
    let mut total = [zero; 4];
    for (steps, xs) in steps.chunks(FLUSH).zip(xs.chunks(FLUSH)) {
        let (mut a1, mut a4) = ([zero; 4], [zero; 4]);
        for (step, x) in steps.iter().zip(xs) {
            let x = [0, 64, 128, 192].map(|at| load(x, at));
            for r in 0..4 {
                let v = load(&step[r].0, 0);
                let h = _mm512_srli_epi16::<4>(v);
                a1[r] = add_products(a1[r], _mm512_and_si512(v, m1), x[0]);
                a4[r] = add_products(a4[r], _mm512_and_si512(v, m4), x[1]);
                a1[r] = add_products(a1[r], _mm512_and_si512(h, m1), x[2]);
                a4[r] = add_products(a4[r], _mm512_and_si512(h, m4), x[3]);
            }
        }
        for r in 0..4 {
            total[r] = add_pairs(total[r], _mm512_add_epi16(a1[r], _mm512_srai_epi16::<2>(a4[r])));
        }
    }
    sums_less(total, x.sum())
}

/// `|x| · (w · sgn x)`, as AVX2: a lane is at most `2·128·127 = 32512`. The negation is masked, and the mask serves 4 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline(never)]
fn matvec_i8(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let mut total = [_mm512_setzero_si512(); 4];
    for (step, x) in steps.iter().zip(x.values().as_chunks::<64>().0) {
        let x = load(x, 0);
        let (magnitude, negative) = (_mm512_abs_epi8(x), _mm512_movepi8_mask(x));
        for r in 0..4 {
            let w = load(&step[r].0, 0);
            let w = _mm512_mask_sub_epi8(w, negative, _mm512_setzero_si512(), w);
            total[r] = add_pairs(total[r], _mm512_maddubs_epi16(magnitude, w));
        }
    }
    sums_less(total, 0)
}

/// The sums of codes times activations of 4 rows and `N` tokens, `COLS` columns a step in planes of `BITS` bits, 16-bit sums
/// emptied after `FLUSH` steps. Codes are unpacked once; a vector of activations is loaded once for 4 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline(never)]
fn dots_of_codes<const N: usize, const COLS: usize, const BITS: u32, const LOW: i32, const FLUSH: usize>(
    steps: Planes<'_>,
    x: [Activations<'_>; N],
) -> [[i32; 4]; N] {
    let zero = _mm512_setzero_si512();
    let xs = x.map(|x| &x.values().as_chunks::<COLS>().0[..steps.len()]);
    let mut total = [[zero; 4]; N];
    for first in (0..steps.len()).step_by(FLUSH) {
        let mut acc = [[zero; 4]; N];
        for i in first..steps.len().min(first + FLUSH) {
            let mut v = [0, 1, 2, 3].map(|r| load(&steps[i][r].0, 0));
            for p in 0..COLS / 64 {
                let codes = v.map(|v| _mm512_and_si512(v, _mm512_set1_epi8((1 << BITS) - 1)));
                for t in 0..N {
                    let x = load(&xs[t][i], 64 * p);
                    for r in 0..4 {
                        acc[t][r] = add_products(acc[t][r], codes[r], x);
                    }
                }
                v = v.map(|v| _mm512_srli_epi16::<BITS>(v));
            }
        }
        for t in 0..N {
            for r in 0..4 {
                total[t][r] = add_pairs(total[t][r], acc[t][r]);
            }
        }
    }
    core::array::from_fn(|t| sums_less(total[t], LOW * x[t].sum()))
}

// ---------------------------------------------------------------------------------------------------------------------
// B1 and TL: rows in byte lanes, a table of partial sums for each group of columns. A sum is `base · hi + lo + 16`.

const LANES_PREFETCH: usize = 8192;

/// Steps after which the 16-bit sums are emptied: one adds at most 4096 in magnitude (TL) or 4224 (B1), 7 at most 29568; of int4
/// activations at most 256, and 100 steps 25600.
const fn lanes_flush(base: i16) -> usize {
    if base == INT4_BASE { 100 } else { 7 }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn b1(steps: Lanes<'_, 4>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    let Some(int4) = tiles::alike(x) else { return tiles::one_by_one(x, y, |x, y| b1(steps, x, y)) };
    let constant = if int4 { 0 } else { 16 * 8 * steps.len() as i32 };
    if int4 {
        by_tokens!(x, y, sums_of_lanes::<4, INT4_BASE>(steps));
    } else {
        by_tokens!(x, y, sums_of_lanes::<4, B1_BASE>(steps));
    }
    for (x, y) in x.iter().zip(y) {
        y.iter_mut().for_each(|y| *y = 2 * (*y + constant) - x.sum());
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn tl(steps: Lanes<'_, 5>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    match tiles::alike(x) {
        Some(true) => by_tokens!(x, y, sums_of_lanes::<5, INT4_BASE>(steps)),
        Some(false) => by_tokens!(x, y, sums_of_lanes::<5, TL_BASE>(steps)),
        None => tiles::one_by_one(x, y, |x, y| tl(steps, x, y)),
    }
}

/// `Σ base · hi + lo` over the groups of 64 rows, for `N` tokens.
///
/// For 64 rows, one group and one token: 1.5 operations to part nibbles, 1 for the mask of signs, 2 look-ups, 2 complements, 2
/// additions, 0.75 to widen: 9.25 for 192 weights (TL), 6.25 for 256 (B1).
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
#[inline(never)]
fn sums_of_lanes<const N: usize, const BLOCKS: usize, const BASE: i16>(
    steps: Lanes<'_, BLOCKS>,
    x: [Activations<'_>; N],
) -> [[i32; 64]; N] {
    let zero = _mm512_setzero_si512();
    let (nibble, parts) = (_mm512_set1_epi8(15), _mm512_set1_epi16(BASE << 8 | 1));
    let tables = x.map(|x| &x.tables().as_chunks::<4>().0[..steps.len()]);
    let mut total = [[zero; 4]; N];
    for first in (0..steps.len()).step_by(lanes_flush(BASE)) {
        let mut wide = [[zero; 2]; N];
        for s in first..steps.len().min(first + lanes_flush(BASE)) {
            let step = &steps[s];
            for block in step {
                prefetch(block, LANES_PREFETCH);
            }
            let (mut lo, mut hi) = ([zero; N], [zero; N]);
            let sign = load(&step[0].0, 0);
            macro_rules! group {
                ($v:expr, $i:expr, $odd:expr) => {
                    let n = _mm512_and_si512($v, nibble);
                    let bit = _mm512_set1_epi8((0x80 >> (2 * $i + $odd)) as u8 as i8);
                    let negative = if BLOCKS == 5 { opaque(_mm512_test_epi8_mask(sign, bit)) } else { 0 };
                    for t in 0..N {
                        let table = &tables[t][s][$i].0;
                        let mut l = _mm512_shuffle_epi8(load_four_times(table, 32 * $odd), n);
                        if BLOCKS == 5 {
                            l = _mm512_mask_sub_epi8(l, negative, zero, l);
                        }
                        if BASE == INT4_BASE {
                            let sum = if $i < 2 { &mut lo[t] } else { &mut hi[t] };
                            *sum = _mm512_add_epi8(*sum, l);
                            continue;
                        }
                        let mut h = _mm512_shuffle_epi8(load_four_times(table, 32 * $odd + 16), n);
                        if BLOCKS == 5 {
                            h = _mm512_mask_sub_epi8(h, negative, zero, h);
                        }
                        lo[t] = _mm512_add_epi8(lo[t], l);
                        hi[t] = _mm512_add_epi8(hi[t], h);
                    }
                };
            }
            macro_rules! block {
                ($i:expr) => {
                    let v = load(&step[$i + BLOCKS - 4].0, 0);
                    group!(v, $i, 0);
                    group!(_mm512_srli_epi16::<4>(v), $i, 1);
                };
            }
            block!(0);
            block!(1);
            block!(2);
            block!(3);
            for t in 0..N {
                // `lo` and `hi` of a row side by side: one multiplication adds them.
                let (even, odd) = (_mm512_unpacklo_epi8(lo[t], hi[t]), _mm512_unpackhi_epi8(lo[t], hi[t]));
                wide[t][0] = _mm512_add_epi16(wide[t][0], _mm512_maddubs_epi16(parts, even));
                wide[t][1] = _mm512_add_epi16(wide[t][1], _mm512_maddubs_epi16(parts, odd));
            }
        }
        for t in 0..N {
            for half in 0..2 {
                let low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(wide[t][half]));
                let high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64::<1>(wide[t][half]));
                total[t][2 * half] = _mm512_add_epi32(total[t][2 * half], low);
                total[t][2 * half + 1] = _mm512_add_epi32(total[t][2 * half + 1], high);
            }
        }
    }
    total.map(|total| in_order(total))
}

/// The sums by row: interleaving takes 8 rows of each 16, and of these `total` has rows 0 to 7 and 16 to 23 and so on, then
/// the others.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_order(total: [__m512i; 4]) -> [i32; 64] {
    let total = total.map(|total| lanes(total));
    let mut out = [0; 64];
    for (i, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        out.copy_from_slice(&total[i % 2 * 2 + i / 4][i / 2 % 2 * 8..][..8]);
    }
    out
}
