//! AVX2: 16 registers of 32 bytes, byte products by `vpmaddubsw`, tables of 16 entries by `vpshufb`.
//!
//! The loops, and what was tried and lost, measured on a Zen 3 core unless another is named:
//!
//! - One software prefetch a cache line, 2 KiB ahead (planes) or 8 KiB (lanes), into the *second* level. Without any, 35 to
//!   50 % is lost where weights come from memory; it costs nothing where they come from a cache. Into the first level (T0)
//!   TL reached 77 and B1 115 weights/ns from memory on a Zen 4 core at 2 to 8 KiB, into the second (T1) 102 and 181. The
//!   likely reason: few requests fit in the first level's queue, and the tables need its room. [`Format::I8`] gained
//!   nothing: it reads a plain stream at the speed of memory.
//! - T2: tiles of 8 rows spill registers, 5 to 10 % slower than 4. One sum a row and three shifts in place of two sums and
//!   one shift: 30 operations for 256 weights against 26. Masks without any shift are no use: at weight 64 one lane of
//!   `vpmaddubsw` overflows.
//! - What multiplies several tokens by a tile asks for the weights of later tiles as well: without, 18 to 30 % were lost from memory
//!   (I8 41 against 55 products/ns, I4 60 against 85, T2 88 against 107). A tile ahead was as good as 8 KiB.
//! - TL and B1: both halves of 32 rows use a table while it is in registers; half by half, LLVM hoists 16 tables to the stack
//!   (87 against 96 weights/ns). Bits in planes and `vpmaddubsw` for B1 run at half the speed of tables.
//!
//! Loads go through [`load`] and friends, which take arrays: the loops hold no pointers and no `unsafe`.
#![allow(clippy::needless_range_loop, reason = "one index for several arrays of registers")]

use crate::blocks;
use crate::cpu::Features;
use crate::float;
use crate::grouped;
use crate::rows;
use crate::tiles::{self, Lanes, Planes};
use bitnet_kernel::float::Cache;
use bitnet_kernel::tables::{B1_BASE, TL_BASE, TL_WEIGHTS};
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix, kernels};
use core::arch::x86_64::*;

/// Invariant: a value exists only where the CPU has AVX2 and F16C. [`detect`] makes the only one.
#[derive(Debug)]
pub(crate) struct Avx2(());

static AVX2: Avx2 = Avx2(());

/// See [`crate::avx2`].
pub(crate) fn detect() -> Option<&'static dyn Kernels> {
    Features::AVX2.present().then_some(&AVX2 as &dyn Kernels)
}

impl Kernels for Avx2 {
    fn name(&self) -> &'static str {
        "avx2"
    }
    /// The tables of [`bitnet_kernel::tables`], in the same places. A sum at the edge of two splits may take the other one. Of int4
    /// activations a sum is its own low part.
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        match format {
            // SAFETY: `self` exists, so the CPU has AVX2.
            Format::B1 => unsafe { prepare_b1_avx2(values, int4, tables) },
            // SAFETY: as above.
            Format::TL => unsafe { prepare_tl_avx2(values, int4, tables) },
            _ => {}
        }
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { products(w, &[x], y) }
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has AVX2.
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
        // SAFETY: `self` exists, so the CPU has AVX2 and F16C.
        unsafe { float::matvec_f16(w, x, y) }
    }
    fn quantize(&self, x: &[f32], q: &mut [i8]) -> Option<f32> {
        // SAFETY: as above.
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
        // SAFETY: as above.
        unsafe { float::attend(q, keys, values, scale, out) }
    }
}

/// Bytes that a type is made of, for [`load`].
pub(crate) trait Bytes: Copy {}
impl Bytes for u8 {}
impl Bytes for i8 {}

/// The 32 bytes of `bytes` from `at` on.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn load<T: Bytes, const N: usize>(bytes: &[T; N], at: usize) -> __m256i {
    assert!(at + 32 <= N);
    // SAFETY: the assertion: the 32 bytes lie within `bytes`. It folds away wherever `at` is a constant.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().add(at).cast()) }
}

/// The 16 bytes of `bytes` from `at` on, twice.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn load_twice<T: Bytes, const N: usize>(bytes: &[T; N], at: usize) -> __m256i {
    assert!(at + 16 <= N);
    // SAFETY: the assertion: the 16 bytes lie within `bytes`.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(bytes.as_ptr().add(at).cast()) })
}

/// Asks for the cache line `bytes` after `block`, into the second level.
#[inline(always)]
pub(crate) fn prefetch(block: &Block, bytes: usize) {
    let p = block.0.as_ptr().wrapping_add(bytes).cast();
    // SAFETY: a prefetch reads nothing that the program sees and never faults; the address need not exist.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(p) }
}

/// The lanes.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn lanes(v: __m256i) -> [i32; 8] {
    let mut out = [0; 8];
    // SAFETY: `out` is 32 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), v) };
    out
}

/// The sums of four vectors' lanes: 3 horizontal additions in place of four trees.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn sums(v: [__m256i; 4]) -> [i32; 4] {
    let [a, b, c, d, e, f, g, h] = sums_of_halves(v);
    [a + e, b + f, c + g, d + h]
}

/// The sums of the lanes of four vectors' low halves, then of their high halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn sums_of_halves(v: [__m256i; 4]) -> [i32; 8] {
    lanes(_mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3])))
}

/// Adds the pairs of 16-bit lanes to 32-bit sums.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn add_pairs(total: __m256i, pairs: __m256i) -> __m256i {
    _mm256_add_epi32(total, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// `acc + codes · x`, in pairs: unsigned bytes times signed bytes.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn add_products(acc: __m256i, codes: __m256i, x: __m256i) -> __m256i {
    _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x))
}

/// Tokens that are multiplied by a vector of weights while it lies unpacked in registers: as many as have room for their sums.
const TOKENS: usize = 4;

/// `w` times every token. The entrance checks were made.
#[target_feature(enable = "avx2")]
fn products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    match w.format() {
        Format::B1 => tiles::lanes(w, tokens, y, |w, x, y| b1(w, x, y)),
        Format::TL => tiles::lanes(w, tokens, y, |w, x, y| tl(w, x, y)),
        Format::T2 => {
            tiles::planes(w, tokens, y, |w, x, y| by_count(x, y, 2, |x| matvec_t2_avx2(w, x), |x| matmat_t2_avx2(w, x)))
        }
        Format::I4 => {
            tiles::planes(w, tokens, y, |w, x, y| by_count(x, y, 2, |x| matvec_i4_avx2(w, x), |x| matmat_i4_avx2(w, x)))
        }
        Format::I8 => tiles::planes(w, tokens, y, |w, x, y: &mut [_; TOKENS]| {
            x.iter().zip(y).enumerate().for_each(|(t, (token, y))| *y = matvec_i8_avx2(w, *token, t, x.len()));
        }),
        _ => panic!("{} is not multiplied by this method", w.format().name()),
    }
}

/// One by one up to `few` tokens, and otherwise as four, the last one again where there are three.
#[inline]
fn by_count<const ROWS: usize>(
    x: &[Activations<'_>],
    y: &mut [[i32; ROWS]; TOKENS],
    few: usize,
    one: impl Fn(Activations<'_>) -> [i32; ROWS],
    four: impl Fn([Activations<'_>; TOKENS]) -> [[i32; ROWS]; TOKENS],
) {
    if x.len() <= few {
        x.iter().zip(y).for_each(|(x, y)| *y = one(*x));
    } else {
        *y = four(core::array::from_fn(|t| x[t.min(x.len() - 1)]));
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// T2: four planes of codes 0 to 2 (3 is invalid).

/// Steps after which the 16-bit sums of T2 are emptied.
///
/// One lane of `vpmaddubsw` is two products: at weight 4 from `-2·8·128 = -2048` to `2·8·127 = 2032`. A step adds two planes
/// of two halves, so 4 steps stay within `-32768..=32512`. At weight 1 it is a quarter of that, and the sum of both after the
/// division by 4 at most 16384 in magnitude. All sums at weight 4 are multiples of 4, so the shift is exact.
pub(crate) const T2_FLUSH: usize = 4;
const T2_PREFETCH: usize = 2048;

/// The dot products of 4 rows.
///
/// 13 operations for 128 weights. 8 sums, 4 vectors of activations, 2 masks and 2 temporaries: 16 registers.
#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_t2_avx2(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<256>();
    let zero = _mm256_setzero_si256();
    let (m1, m4) = (_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c));
    let mut total = [zero; 4];
    for (steps, xs) in steps.chunks(T2_FLUSH).zip(xs.chunks(T2_FLUSH)) {
        let (mut a1, mut a4) = ([zero; 4], [zero; 4]);
        for (step, x) in steps.iter().zip(xs) {
            for half in [0, 32] {
                let (x0, x1, x2, x3) = (load(x, half), load(x, 64 + half), load(x, 128 + half), load(x, 192 + half));
                for r in 0..4 {
                    if half == 0 {
                        prefetch(&step[r], T2_PREFETCH);
                    }
                    let v = load(&step[r].0, half);
                    let h = _mm256_srli_epi16::<4>(v);
                    a1[r] = add_products(a1[r], _mm256_and_si256(v, m1), x0);
                    a4[r] = add_products(a4[r], _mm256_and_si256(v, m4), x1);
                    a1[r] = add_products(a1[r], _mm256_and_si256(h, m1), x2);
                    a4[r] = add_products(a4[r], _mm256_and_si256(h, m4), x3);
                }
            }
        }
        for r in 0..4 {
            total[r] = add_pairs(total[r], _mm256_add_epi16(a1[r], _mm256_srai_epi16::<2>(a4[r])));
        }
    }
    sums(total).map(|dot| dot - x.sum())
}

// ---------------------------------------------------------------------------------------------------------------------
// I4: two planes of codes 0 to 15.

/// Steps after which the 16-bit sums of I4 are emptied: a lane is at most `2·15·128 = 3840` in magnitude, 2 planes of 2
/// halves a step, so 2 steps give 30720.
const I4_FLUSH: usize = 2;
const I4_PREFETCH: usize = 8192;

/// The dot products of 4 rows. 7 operations for 64 weights.
#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_i4_avx2(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<128>();
    let nibble = _mm256_set1_epi8(15);
    let mut total = [_mm256_setzero_si256(); 4];
    for (steps, xs) in steps.chunks(I4_FLUSH).zip(xs.chunks(I4_FLUSH)) {
        let mut acc = [_mm256_setzero_si256(); 4];
        for (step, x) in steps.iter().zip(xs) {
            for half in [0, 32] {
                let (x0, x1) = (load(x, half), load(x, 64 + half));
                for r in 0..4 {
                    if half == 0 {
                        prefetch(&step[r], I4_PREFETCH);
                    }
                    let v = load(&step[r].0, half);
                    let h = _mm256_and_si256(_mm256_srli_epi16::<4>(v), nibble);
                    acc[r] = add_products(acc[r], _mm256_and_si256(v, nibble), x0);
                    acc[r] = add_products(acc[r], h, x1);
                }
            }
        }
        for r in 0..4 {
            total[r] = add_pairs(total[r], acc[r]);
        }
    }
    sums(total).map(|dot| dot - 8 * x.sum())
}

// ---------------------------------------------------------------------------------------------------------------------
// I8: one plane of signed bytes.

/// The dot products of 4 rows and token `t` of `tokens`: `|x| · (w · sgn x)` in `vpmaddubsw`.
///
/// Weights are at least -127, so the sign changes none into itself and a lane is at most `2·128·127 = 32512`. (The code -128
/// is invalid and may saturate: an unspecified sum, as the contract allows.)
///
/// Several tokens one by one. Nothing is unpacked, so there is nothing to share, and sums of several tokens left no room for 4
/// rows: with `w + 128 = 16 h + l` in nibbles, two multiplications of unsigned codes in place of three operations on the
/// multiply ports, 4 tokens ran at 56 to 61 products/ns, this at 62 to 67.
///
/// All but the first token find the tile in a cache, where memory would have nothing to do: each of several asks for its share of
/// the next tile.
#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_i8_avx2(steps: Planes<'_>, x: Activations<'_>, t: usize, tokens: usize) -> [i32; 4] {
    let (xs, _) = x.values().as_chunks::<64>();
    let ahead = size_of_val(steps);
    let mut total = [_mm256_setzero_si256(); 4];
    for (steps, xs) in steps.chunks(tokens).zip(xs.chunks(tokens)) {
        if tokens > 1
            && let Some(step) = steps.get(t)
        {
            step.iter().for_each(|block| prefetch(block, ahead));
        }
        for (step, x) in steps.iter().zip(xs) {
            for half in [0, 32] {
                let x = load(x, half);
                let magnitude = _mm256_abs_epi8(x);
                for r in 0..4 {
                    let w = _mm256_sign_epi8(load(&step[r].0, half), x);
                    total[r] = add_pairs(total[r], _mm256_maddubs_epi16(magnitude, w));
                }
            }
        }
    }
    sums(total)
}

// ---------------------------------------------------------------------------------------------------------------------
// Several tokens, planes.

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_t2_avx2(steps: Planes<'_>, x: [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS] {
    // A lane is at most `2·2·128 = 512` in magnitude, 8 a step: 8 steps give `-32768..=32512`.
    let mut dots = dots_of_codes_avx2::<256, 2, 8>(steps, x);
    for (dots, x) in dots.iter_mut().zip(x) {
        dots.iter_mut().for_each(|dot| *dot -= x.sum());
    }
    dots
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_i4_avx2(steps: Planes<'_>, x: [Activations<'_>; TOKENS]) -> [[i32; 4]; TOKENS] {
    let mut dots = dots_of_codes_avx2::<128, 4, I4_FLUSH>(steps, x);
    for (dots, x) in dots.iter_mut().zip(x) {
        dots.iter_mut().for_each(|dot| *dot -= 8 * x.sum());
    }
    dots
}

const MATMAT_PREFETCH: usize = 8192;

/// The sums of codes times activations of 4 rows and 4 tokens, `COLS` columns a step in planes of `BITS` bits.
///
/// Row by row: 4 sums of 16 bits, 4 of 32, 4 vectors of codes, a mask and temporaries fill the registers; activations are
/// operands in memory, as many loads as multiplications. Two rows at a time would halve the loads, but LLVM reorders the
/// additions until it spills: no faster for T2, 12 % slower for I4.
#[target_feature(enable = "avx2")]
#[inline]
fn dots_of_codes_avx2<const COLS: usize, const BITS: i32, const FLUSH: usize>(
    steps: Planes<'_>,
    x: [Activations<'_>; TOKENS],
) -> [[i32; 4]; TOKENS] {
    let zero = _mm256_setzero_si256();
    let mask = _mm256_set1_epi8((1 << BITS) - 1);
    let xs = x.map(|x| &x.values().as_chunks::<COLS>().0[..steps.len()]);
    let mut dots = [[0; 4]; TOKENS];
    for r in 0..4 {
        let mut total = [zero; TOKENS];
        for first in (0..steps.len()).step_by(FLUSH) {
            let mut acc = [zero; TOKENS];
            for i in first..steps.len().min(first + FLUSH) {
                let xs = [&xs[0][i], &xs[1][i], &xs[2][i], &xs[3][i]];
                prefetch(&steps[i][r], MATMAT_PREFETCH);
                for half in [0, 32] {
                    let mut v = load(&steps[i][r].0, half);
                    for plane in 0..COLS / 64 {
                        let codes = _mm256_and_si256(v, mask);
                        for t in 0..TOKENS {
                            acc[t] = add_products(acc[t], codes, load(xs[t], 64 * plane + half));
                        }
                        v = _mm256_srli_epi16::<BITS>(v);
                    }
                }
            }
            for t in 0..TOKENS {
                total[t] = add_pairs(total[t], acc[t]);
            }
        }
        let dot = sums(total);
        for t in 0..TOKENS {
            dots[t][r] = dot[t];
        }
    }
    dots
}

// ---------------------------------------------------------------------------------------------------------------------
// B1 and TL: rows in byte lanes, a table of partial sums for each group of columns. A sum is `base · hi + lo + 16`.

/// Steps after which the 16-bit sums of `base · hi + lo` are emptied.
///
/// Within a step 8 groups add up in byte lanes to `-128..=120` for either part. Widened, that is at most `31·128 + 128 = 4096`
/// a step in magnitude for TL, 7 steps 28672, and `32·128 + 128 = 4224` for B1, 7 steps 29568.
///
/// Of int4 activations 8 groups are at most 256 in magnitude, 100 steps 25600.
const fn lanes_flush(base: i16) -> usize {
    if base == INT4_BASE { 100 } else { 7 }
}
/// The base of tables of int4 activations, which have no high parts: what is added up in their place are the other four groups
/// of a step, so that a byte lane holds sums of 4, at most 128 in magnitude.
pub(crate) const INT4_BASE: i16 = 1;
const TL_PREFETCH: usize = 8192;
pub(crate) const B1_PREFETCH: usize = 8192;

#[target_feature(enable = "avx2")]
#[inline]
fn b1(steps: Lanes<'_, 4>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    match tiles::alike(x) {
        Some(true) => by_count(x, y, 1, |x| matvec_b1_int4_avx2(steps, x), |x| matmat_b1_int4_avx2(steps, x)),
        Some(false) => by_count(x, y, 1, |x| matvec_b1_avx2(steps, x), |x| matmat_b1_avx2(steps, x)),
        None => tiles::one_by_one(x, y, |x, y| b1(steps, x, y)),
    }
}

#[target_feature(enable = "avx2")]
#[inline]
fn tl(steps: Lanes<'_, 5>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    match tiles::alike(x) {
        Some(true) => by_count(x, y, 1, |x| matvec_tl_int4_avx2(steps, x), |x| matmat_tl_int4_avx2(steps, x)),
        Some(false) => by_count(x, y, 1, |x| matvec_tl_avx2(steps, x), |x| matmat_tl_avx2(steps, x)),
        None => tiles::one_by_one(x, y, |x, y| tl(steps, x, y)),
    }
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_b1_avx2(steps: Lanes<'_, 4>, x: Activations<'_>) -> [i32; 64] {
    let constant = 16 * 8 * steps.len() as i32;
    sums_of_lanes_avx2::<4, B1_BASE, B1_PREFETCH>(steps, x).map(|sum| 2 * (sum + constant) - x.sum())
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_b1_int4_avx2(steps: Lanes<'_, 4>, x: Activations<'_>) -> [i32; 64] {
    sums_of_lanes_avx2::<4, INT4_BASE, B1_PREFETCH>(steps, x).map(|sum| 2 * sum - x.sum())
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_tl_avx2(steps: Lanes<'_, 5>, x: Activations<'_>) -> [i32; 64] {
    let constant = 16 * 8 * steps.len() as i32;
    sums_of_lanes_avx2::<5, TL_BASE, TL_PREFETCH>(steps, x).map(|sum| sum + constant)
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matvec_tl_int4_avx2(steps: Lanes<'_, 5>, x: Activations<'_>) -> [i32; 64] {
    sums_of_lanes_avx2::<5, INT4_BASE, TL_PREFETCH>(steps, x)
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_b1_avx2(steps: Lanes<'_, 4>, x: [Activations<'_>; TOKENS]) -> [[i32; 64]; TOKENS] {
    let constant = 16 * 8 * steps.len() as i32;
    let mut dots = tokens_of_lanes_avx2::<4, B1_BASE, B1_PREFETCH>(steps, x);
    for (dots, x) in dots.iter_mut().zip(x) {
        dots.iter_mut().for_each(|sum| *sum = 2 * (*sum + constant) - x.sum());
    }
    dots
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_b1_int4_avx2(steps: Lanes<'_, 4>, x: [Activations<'_>; TOKENS]) -> [[i32; 64]; TOKENS] {
    let mut dots = tokens_of_lanes_avx2::<4, INT4_BASE, B1_PREFETCH>(steps, x);
    for (dots, x) in dots.iter_mut().zip(x) {
        dots.iter_mut().for_each(|sum| *sum = 2 * *sum - x.sum());
    }
    dots
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_tl_avx2(steps: Lanes<'_, 5>, x: [Activations<'_>; TOKENS]) -> [[i32; 64]; TOKENS] {
    let constant = 16 * 8 * steps.len() as i32;
    let mut dots = tokens_of_lanes_avx2::<5, TL_BASE, TL_PREFETCH>(steps, x);
    dots.iter_mut().flatten().for_each(|sum| *sum += constant);
    dots
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn matmat_tl_int4_avx2(steps: Lanes<'_, 5>, x: [Activations<'_>; TOKENS]) -> [[i32; 64]; TOKENS] {
    tokens_of_lanes_avx2::<5, INT4_BASE, TL_PREFETCH>(steps, x)
}

/// `Σ base · hi + lo` over the groups of 64 rows.
#[target_feature(enable = "avx2")]
#[inline]
fn sums_of_lanes_avx2<const BLOCKS: usize, const BASE: i16, const PREFETCH: usize>(
    steps: Lanes<'_, BLOCKS>,
    x: Activations<'_>,
) -> [i32; 64] {
    let (tables, _) = x.tables().as_chunks::<4>();
    let mut total = [[_mm256_setzero_si256(); 4]; 2];
    for (steps, tables) in steps.chunks(lanes_flush(BASE)).zip(tables.chunks(lanes_flush(BASE))) {
        let wide = narrow_sums_of_lanes::<BLOCKS, BASE, PREFETCH>(steps, tables);
        for half in 0..2 {
            total[half] = add_wide(total[half], wide[half]);
        }
    }
    in_order(total)
}

/// The same in 16 bits, of at most [`lanes_flush`] steps: for each 32 rows, what [`add_wide`] adds up.
///
/// For 32 rows and one group: 1.5 operations to part nibbles, 2 for the signs, 2 shuffles, 2 xors, 2 additions, 0.75 to
/// widen: 10.25 for 96 weights (TL), 6.25 for 128 (B1). Of int4 activations 7.25 and 4.25: one look-up, and a sign of a sum is
/// one operation (`vpsignb`) and one more to have no zero among the signs. Groups are written out by macro: in a loop, the `asm!` of [`opaque`] keeps
/// arrays of sums in memory.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn narrow_sums_of_lanes<const BLOCKS: usize, const BASE: i16, const PREFETCH: usize>(
    steps: Lanes<'_, BLOCKS>,
    tables: &[[Block; 4]],
) -> [[__m256i; 2]; 2] {
    let (nibble, zero, one) = (_mm256_set1_epi8(15), _mm256_setzero_si256(), _mm256_set1_epi8(1));
    let mut wide = [[zero; 2]; 2];
    for (step, tables) in steps.iter().zip(tables) {
        for block in step {
            prefetch(block, PREFETCH);
        }
        let (mut lo, mut hi) = ([zero; 2], [zero; 2]);
        let mut sign = [load(&step[0].0, 0), load(&step[0].0, 32)];
        macro_rules! group {
            ($v:expr, $i:expr, $odd:expr) => {
                let table = &tables[$i].0;
                let (t_lo, t_hi) = (load_twice(table, 32 * $odd), load_twice(table, 32 * $odd + 16));
                for half in 0..2 {
                    let n = _mm256_and_si256($v[half], nibble);
                    let mut l = _mm256_shuffle_epi8(t_lo, n);
                    if BASE == INT4_BASE {
                        if BLOCKS == 5 {
                            l = _mm256_sign_epi8(l, _mm256_or_si256(sign[half], one));
                            sign[half] = opaque(_mm256_add_epi8(sign[half], sign[half]));
                        }
                        let sum = if $i < 2 { &mut lo[half] } else { &mut hi[half] };
                        *sum = _mm256_add_epi8(*sum, l);
                        continue;
                    }
                    let mut h = _mm256_shuffle_epi8(t_hi, n);
                    if BLOCKS == 5 {
                        let negative = _mm256_cmpgt_epi8(zero, sign[half]);
                        sign[half] = opaque(_mm256_add_epi8(sign[half], sign[half]));
                        (l, h) = (_mm256_xor_si256(l, negative), _mm256_xor_si256(h, negative));
                    }
                    lo[half] = _mm256_add_epi8(lo[half], l);
                    hi[half] = _mm256_add_epi8(hi[half], h);
                }
            };
        }
        macro_rules! block {
            ($i:expr) => {
                let block = &step[$i + BLOCKS - 4].0;
                let v = [load(block, 0), load(block, 32)];
                group!(v, $i, 0);
                let v = [_mm256_srli_epi16::<4>(v[0]), _mm256_srli_epi16::<4>(v[1])];
                group!(v, $i, 1);
            };
        }
        block!(0);
        block!(1);
        block!(2);
        block!(3);
        for half in 0..2 {
            wide[half] = widen::<BASE>(wide[half], lo[half], hi[half]);
        }
    }
    wide
}

/// [`sums_of_lanes_avx2`] for 4 tokens: nibbles and signs are taken apart once.
///
/// 27.5 operations for 4 times 96 weights in place of 42 (TL), 21.5 for 4 times 128 in place of 26 (B1). The 16-bit sums of a
/// token live in memory: they are touched once a step. Of int4 activations 16.5 and 12.5. (Decoding TL to bytes of weights for `vpmaddubsw` with pairs of columns
/// was counted, not written: 30 operations and more for the same work, since every pair of activations must be broadcast.)
#[target_feature(enable = "avx2")]
#[inline]
fn tokens_of_lanes_avx2<const BLOCKS: usize, const BASE: i16, const PREFETCH: usize>(
    steps: Lanes<'_, BLOCKS>,
    x: [Activations<'_>; TOKENS],
) -> [[i32; 64]; TOKENS] {
    let zero = _mm256_setzero_si256();
    let tables = x.map(|x| &x.tables().as_chunks::<4>().0[..steps.len()]);
    let mut total = [[[zero; 4]; 2]; TOKENS];
    for first in (0..steps.len()).step_by(lanes_flush(BASE)) {
        let mut wide = [[[zero; 2]; TOKENS]; 2];
        for s in first..steps.len().min(first + lanes_flush(BASE)) {
            for block in &steps[s] {
                prefetch(block, PREFETCH);
            }
            let tables = [&tables[0][s], &tables[1][s], &tables[2][s], &tables[3][s]];
            for (half, wide) in wide.iter_mut().enumerate() {
                add_step_of_lanes_avx2::<BLOCKS, BASE>(&steps[s], 32 * half, tables, wide);
            }
        }
        for t in 0..TOKENS {
            for half in 0..2 {
                total[t][half] = add_wide(total[t][half], wide[half][t]);
            }
        }
    }
    total.map(|total| in_order(total))
}

/// Adds one step of 32 rows, from byte `half` of the blocks on, to the 16-bit sums of 4 tokens.
///
/// A function of its own, so that `wide` stays in memory: inlined, LLVM juggles all 64 vectors of sums through 16 registers,
/// and the whole was slower than one token at a time. One call for several steps was no faster.
#[target_feature(enable = "avx2")]
#[inline(never)]
#[allow(unused_assignments, reason = "the last group needs no further sign")]
fn add_step_of_lanes_avx2<const BLOCKS: usize, const BASE: i16>(
    step: &[Block; BLOCKS],
    half: usize,
    tables: [&[Block; 4]; TOKENS],
    wide: &mut [[__m256i; 2]; TOKENS],
) {
    let (nibble, zero, one) = (_mm256_set1_epi8(15), _mm256_setzero_si256(), _mm256_set1_epi8(1));
    let (mut lo, mut hi) = ([zero; TOKENS], [zero; TOKENS]);
    let mut sign = load(&step[0].0, half);
    macro_rules! group {
        ($v:expr, $i:expr, $odd:expr) => {
            let n = _mm256_and_si256($v, nibble);
            let negative = _mm256_cmpgt_epi8(zero, sign);
            let odd_sign = _mm256_or_si256(sign, one);
            for t in 0..TOKENS {
                let table = &tables[t][$i].0;
                let mut l = _mm256_shuffle_epi8(load_twice(table, 32 * $odd), n);
                if BASE == INT4_BASE {
                    if BLOCKS == 5 {
                        l = _mm256_sign_epi8(l, odd_sign);
                    }
                    let sum = if $i < 2 { &mut lo[t] } else { &mut hi[t] };
                    *sum = _mm256_add_epi8(*sum, l);
                    continue;
                }
                let mut h = _mm256_shuffle_epi8(load_twice(table, 32 * $odd + 16), n);
                if BLOCKS == 5 {
                    (l, h) = (_mm256_xor_si256(l, negative), _mm256_xor_si256(h, negative));
                }
                lo[t] = _mm256_add_epi8(lo[t], l);
                hi[t] = _mm256_add_epi8(hi[t], h);
            }
            if BLOCKS == 5 {
                sign = opaque(_mm256_add_epi8(sign, sign));
            }
        };
    }
    macro_rules! block {
        ($i:expr) => {
            let v = load(&step[$i + BLOCKS - 4].0, half);
            group!(v, $i, 0);
            group!(_mm256_srli_epi16::<4>(v), $i, 1);
        };
    }
    block!(0);
    block!(1);
    block!(2);
    block!(3);
    for t in 0..TOKENS {
        wide[t] = widen::<BASE>(wide[t], lo[t], hi[t]);
    }
}

/// Adds `base · hi + lo` of 32 rows to 16-bit sums: of rows 0 to 7 and 16 to 23, and of the others.
///
/// With the bytes of `lo` and `hi` beside each other, one `vpmaddubsw` has both: 6 operations. Multiplied apart, of the even rows
/// and of the odd ones, it took 8, and rows had to be put in order at the end of a tile.
#[target_feature(enable = "avx2")]
#[inline]
fn widen<const BASE: i16>(wide: [__m256i; 2], lo: __m256i, hi: __m256i) -> [__m256i; 2] {
    let factors = _mm256_set1_epi16(1 | BASE << 8);
    let pairs = [_mm256_unpacklo_epi8(lo, hi), _mm256_unpackhi_epi8(lo, hi)];
    core::array::from_fn(|i| _mm256_add_epi16(wide[i], _mm256_maddubs_epi16(factors, pairs[i])))
}

/// Empties the sums of [`widen`] into 32-bit ones: rows 0 to 7, 16 to 23, 8 to 15, and 24 to 31.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn add_wide(total: [__m256i; 4], wide: [__m256i; 2]) -> [__m256i; 4] {
    let low = |v| _mm256_cvtepi16_epi32(_mm256_castsi256_si128(v));
    let high = |v| _mm256_cvtepi16_epi32(_mm256_extracti128_si256::<1>(v));
    let parts = [low(wide[0]), high(wide[0]), low(wide[1]), high(wide[1])];
    core::array::from_fn(|i| _mm256_add_epi32(total[i], parts[i]))
}

/// The sums of [`add_wide`], of two times 32 rows, by row.
#[target_feature(enable = "avx2")]
#[inline]
fn in_order(total: [[__m256i; 4]; 2]) -> [i32; 64] {
    let mut out = [0; 64];
    for (out, total) in out.as_chunks_mut::<32>().0.iter_mut().zip(total) {
        for (out, i) in out.as_chunks_mut::<8>().0.iter_mut().zip([0, 2, 1, 3]) {
            *out = lanes(total[i]);
        }
    }
    out
}

/// A value that the optimiser cannot see through, at no cost.
///
/// LLVM turns a chain of doublings into shifts of the first value, each with a mask of its own: 3 % slower.
#[target_feature(enable = "avx2")]
#[inline]
pub(crate) fn opaque(mut v: __m256i) -> __m256i {
    // Miri knows no assembly.
    if cfg!(not(miri)) {
        // SAFETY: no instruction at all, and only a register named.
        unsafe { core::arch::asm!("/* {0} */", inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    }
    v
}

// ---------------------------------------------------------------------------------------------------------------------
// The tables of B1 and TL.

/// For each group of a step the places of its columns `first` and `first + 1`, 16 times, in a vector of 16 values that starts
/// at [`start`].
const fn places(format: Format, first: usize) -> [[u8; 32]; 8] {
    let mut places = [[0; 32]; 8];
    let mut i = 0;
    while i < 8 * 32 {
        let (group, second) = (i / 32, i % 2);
        places[group][i % 32] = (format.table_cols() * group + first + second - start(format, group)) as u8;
        i += 1;
    }
    places
}

/// Where in a step the 16 values are loaded that hold `group`: all of them lie within the step.
const fn start(format: Format, group: usize) -> usize {
    match format.table_cols() * (group + 1) {
        0..=16 => 0,
        _ => format.step_cols() - 16,
    }
}

/// The coefficients of columns `first` and `first + 1` in each of the 16 sums of TL; columns before `from` count as nothing.
const fn coefficients_tl(first: usize, from: usize) -> [i8; 32] {
    let mut out = [0; 32];
    let mut i = 0;
    while i < 32 {
        let column = first + i % 2;
        if column >= from {
            out[i] = TL_WEIGHTS[i / 2][column];
        }
        i += 1;
    }
    out
}

/// The tables of TL: `Σ w x = Σ w (x + 128) - 128 Σ w` with unsigned `x + 128`, as `vpmaddubsw` wants them: at most 510.
///
/// 14 operations a group, 1 us for 2,560 columns; 9 to 12 us left to the compiler. Broadcasting single activations by way of
/// general registers took 3 to 4.
#[target_feature(enable = "avx2")]
#[inline]
fn prepare_tl<const BALANCED: bool, const INT4: bool>(values: &[i8], tables: &mut [Block]) {
    const PLACES: [[[u8; 32]; 8]; 2] = [places(Format::TL, 0), places(Format::TL, 1)];
    const COEFFICIENTS: [[i8; 32]; 2] = [coefficients_tl(0, 0), coefficients_tl(1, 2)];
    let (c01, c2) = (load(&COEFFICIENTS[0], 0), load(&COEFFICIENTS[1], 0));
    let ones = _mm256_set1_epi8(-128);
    // -128 Σ w, once for each sum.
    let constant = _mm256_add_epi16(_mm256_maddubs_epi16(ones, c01), _mm256_maddubs_epi16(ones, c2));
    for (x, out) in values.as_chunks::<24>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for g in 0..8 {
            let x = _mm256_xor_si256(load_twice(x, start(Format::TL, g)), ones);
            let x01 = _mm256_shuffle_epi8(x, load(&PLACES[0][g], 0));
            let x2 = _mm256_shuffle_epi8(x, load(&PLACES[1][g], 0));
            let v = _mm256_add_epi16(_mm256_maddubs_epi16(x01, c01), _mm256_maddubs_epi16(x2, c2));
            let v = _mm256_sub_epi16(v, constant);
            if INT4 {
                store_table(&mut out[g / 2], g % 2, v, _mm256_setzero_si256());
                continue;
            }
            let hi = if BALANCED {
                // v / 31, rounded to the nearest: 2^15 / 31 is 1057 but for 3 in 100,000.
                _mm256_mulhrs_epi16(v, _mm256_set1_epi16(1057))
            } else {
                // v / 31, rounded down or, where 31 divides v, perhaps one less: `lo` is 15 then, in range as well.
                _mm256_mulhi_epi16(v, _mm256_set1_epi16(2115))
            };
            let lo = _mm256_sub_epi16(v, _mm256_mullo_epi16(hi, _mm256_set1_epi16(TL_BASE)));
            let lo = if BALANCED { lo } else { _mm256_sub_epi16(lo, _mm256_set1_epi16(16)) };
            store_table(&mut out[g / 2], g % 2, lo, hi);
        }
    }
}

/// See [`prepare_tl`].
#[target_feature(enable = "avx2")]
pub(crate) fn prepare_tl_avx2(values: &[i8], int4: bool, tables: &mut [Block]) {
    if int4 { prepare_tl::<false, true>(values, tables) } else { prepare_tl::<false, false>(values, tables) }
}

/// Tables for those who negate both parts: `v = 31·hi + lo` with `hi = round(v / 31)`, within `-12..=12`, and `lo` within
/// `-15..=15`, so that 8 of either add up in a byte lane, and no constant is left over.
#[cfg(feature = "avx512")]
#[target_feature(enable = "avx2")]
pub(crate) fn prepare_tl_balanced_avx2(values: &[i8], int4: bool, tables: &mut [Block]) {
    if int4 { prepare_tl::<true, true>(values, tables) } else { prepare_tl::<true, false>(values, tables) }
}

/// See [`prepare_b1`].
#[target_feature(enable = "avx2")]
pub(crate) fn prepare_b1_avx2(values: &[i8], int4: bool, tables: &mut [Block]) {
    if int4 { prepare_b1::<true>(values, tables) } else { prepare_b1::<false>(values, tables) }
}

/// The tables of B1: coefficients are 0 or 1, the unsigned ones of the product.
#[target_feature(enable = "avx2")]
#[inline]
fn prepare_b1<const INT4: bool>(values: &[i8], tables: &mut [Block]) {
    const PLACES: [[[u8; 32]; 8]; 2] = [places(Format::B1, 0), places(Format::B1, 2)];
    const COEFFICIENTS: [[u8; 32]; 2] = {
        let mut out = [[0; 32]; 2];
        let mut i = 0;
        while i < 64 {
            let (first, n) = (i / 32 * 2, i % 32 / 2);
            out[i / 32][i % 32] = (n >> (first + i % 2) & 1) as u8;
            i += 1;
        }
        out
    };
    let (c01, c23) = (load(&COEFFICIENTS[0], 0), load(&COEFFICIENTS[1], 0));
    for (x, out) in values.as_chunks::<32>().0.iter().zip(tables.as_chunks_mut::<4>().0) {
        for g in 0..8 {
            let x = load_twice(x, start(Format::B1, g));
            let x01 = _mm256_shuffle_epi8(x, load(&PLACES[0][g], 0));
            let x23 = _mm256_shuffle_epi8(x, load(&PLACES[1][g], 0));
            let v = _mm256_add_epi16(_mm256_maddubs_epi16(c01, x01), _mm256_maddubs_epi16(c23, x23));
            if INT4 {
                store_table(&mut out[g / 2], g % 2, v, _mm256_setzero_si256());
                continue;
            }
            let lo = _mm256_and_si256(v, _mm256_set1_epi16(B1_BASE - 1));
            let lo = _mm256_sub_epi16(lo, _mm256_set1_epi16(16));
            store_table(&mut out[g / 2], g % 2, lo, _mm256_srai_epi16::<5>(v));
        }
    }
}

/// Writes table `i` of the two in `block`: the bytes of `lo`, then those of `hi`.
#[target_feature(enable = "avx2")]
#[inline]
fn store_table(block: &mut Block, i: usize, lo: __m256i, hi: __m256i) {
    let table = _mm256_permute4x64_epi64::<0xd8>(_mm256_packs_epi16(lo, hi));
    let bytes = &mut block.0.as_chunks_mut::<32>().0[i];
    // SAFETY: `bytes` is 32 bytes.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), table) };
}
