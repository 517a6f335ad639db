//! AVX-512 with VNNI and VBMI (Ice Lake, Zen 4 and later): 32 registers of 64 bytes, one block each.
//!
//! `vpdpbusd` multiplies 64 unsigned bytes by signed ones and adds fours of products to 32-bit sums, which nothing here can
//! overflow: the sums wrap and the result fits. So planes need no shift for a single token (a plane's sum is as many times too
//! large as its codes, and divided once at the end), and no narrow sums that must be emptied. `vpermb` ignores the bits of an
//! index that its table has no use for: a nibble needs no mask where the 16 partial sums fill a table twice.
//!
//! Measured on a Zen 4 core:
//!
//! - Prefetch: T2 from memory gained 11 % from lines 1 KiB ahead and lost 20 % at 2 to 4 KiB; I4 and I8 read at 95 to 98 % of
//!   the speed of a plain loop without any, and at 75 % with lines 4 KiB ahead. TL and B1 need it, 8 KiB ahead: 97 and 174
//!   weights/ns, without 63 and 107.
//! - TL with the sign as the fifth bit of an index, into tables of 32 made of 16 by a masked negation: as fast as masked
//!   negations of what was looked up.
#![allow(clippy::needless_range_loop, reason = "one index for several arrays of registers")]

use crate::avx2;
use crate::avx2::{INT4_BASE, prepare_b1_avx2, prepare_tl_balanced_avx2};
use crate::avx512::{broadcast, by_tokens, lanes, load, load_twice, opaque, prefetch, sums_less};
use crate::blocks_vnni;
use crate::cpu::Features;
use crate::float;
use crate::grouped;
use crate::rows_vnni;
use crate::tiles::{self, Lanes, Planes};
use bitnet_kernel::float::Cache;
use bitnet_kernel::tables::{B1_BASE, TL_BASE, TL_WEIGHTS};
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix, kernels};
use core::arch::x86_64::*;

/// Invariant: a value exists only where the CPU has AVX-512 F, BW, DQ, VL, VNNI and VBMI. [`detect`] makes the only one.
#[derive(Debug)]
struct Vnni(());

static VNNI: Vnni = Vnni(());

/// See [`crate::avx512_vnni`].
pub(crate) fn detect() -> Option<&'static dyn Kernels> {
    let needed = Features::AVX2.and(Features::AVX512_BW).and(Features::AVX512_VNNI).and(Features::AVX512_VBMI);
    needed.present().then_some(&VNNI as &dyn Kernels)
}

impl Kernels for Vnni {
    fn name(&self) -> &'static str {
        "avx512-vnni"
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
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { rows_vnni::dot_rows(w, rows, x, y) }
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { rows_vnni::sum_rows(w, rows, x, y) }
    }
    fn matvec_blocks(&self, w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { blocks_vnni::matvec_vnni(w, x, y) }
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
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

// ---------------------------------------------------------------------------------------------------------------------
// Planes.

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn t2(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_codes::<256, 2, 1>(steps, x),
        _ => by_tokens!(x, y, matmat_codes::<256, 2, 1>(steps)),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn i4(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_codes::<128, 4, 8>(steps, x),
        _ => by_tokens!(x, y, matmat_codes::<128, 4, 8>(steps)),
    }
}

/// Signed weights become codes `w + 128` by one xor.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn i8(steps: Planes<'_>, x: &[Activations<'_>], y: &mut [[i32; 4]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_codes::<64, 8, 128>(steps, x),
        _ => by_tokens!(x, y, matmat_codes::<64, 8, 128>(steps)),
    }
}

const T2_PREFETCH: usize = 1024;

/// `Σ(c - LOW)x = Σcx - LOW · Σx` for 4 rows and one token, `COLS` columns a step in planes of `BITS` bits.
///
/// Two operations for 64 weights: plane `p`'s codes, `2^(BITS·p)` times too large, have sums of their own. With 4 planes: 16
/// sums, 4 vectors of activations, 4 masks.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline]
fn matvec_codes<const COLS: usize, const BITS: usize, const LOW: i32>(
    steps: Planes<'_>,
    x: Activations<'_>,
) -> [i32; 4] {
    let planes = COLS / 64;
    let mut acc = [[_mm512_setzero_si512(); 4]; 4];
    for (step, x) in steps.iter().zip(x.values().as_chunks::<COLS>().0) {
        for r in 0..4 {
            if BITS == 2 {
                prefetch(&step[r], T2_PREFETCH);
            }
            let v = load(&step[r].0, 0);
            for p in 0..planes {
                let codes = if BITS == 8 {
                    _mm512_xor_si512(v, _mm512_set1_epi8(-128))
                } else {
                    _mm512_and_si512(v, _mm512_set1_epi8((((1 << BITS) - 1) << (BITS * p)) as i8))
                };
                acc[p][r] = _mm512_dpbusd_epi32(acc[p][r], codes, load(x, 64 * p));
            }
        }
    }
    let mut total = acc[0];
    for p in 1..planes {
        for r in 0..4 {
            // All lanes are multiples: the shift is exact.
            total[r] = _mm512_add_epi32(total[r], _mm512_srav_epi32(acc[p][r], _mm512_set1_epi32((BITS * p) as i32)));
        }
    }
    sums_less(total, LOW * x.sum())
}

/// [`matvec_codes`] for `N` tokens: codes are unpacked once, to their own size, so that all planes share a sum. A vector of
/// activations is loaded once for 4 rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline(never)]
fn matmat_codes<const N: usize, const COLS: usize, const BITS: u32, const LOW: i32>(
    steps: Planes<'_>,
    x: [Activations<'_>; N],
) -> [[i32; 4]; N] {
    let xs = x.map(|x| &x.values().as_chunks::<COLS>().0[..steps.len()]);
    let mut acc = [[_mm512_setzero_si512(); 4]; N];
    for (i, step) in steps.iter().enumerate() {
        let mut v = [0, 1, 2, 3].map(|r| load(&step[r].0, 0));
        for p in 0..COLS / 64 {
            let codes = v.map(|v| match BITS {
                8 => _mm512_xor_si512(v, _mm512_set1_epi8(-128)),
                _ => _mm512_and_si512(v, _mm512_set1_epi8((1 << BITS) - 1)),
            });
            for t in 0..N {
                let x = load(&xs[t][i], 64 * p);
                for r in 0..4 {
                    acc[t][r] = _mm512_dpbusd_epi32(acc[t][r], codes[r], x);
                }
            }
            v = v.map(|v| _mm512_srli_epi16::<BITS>(v));
        }
    }
    core::array::from_fn(|t| sums_less(acc[t], LOW * x[t].sum()))
}

// ---------------------------------------------------------------------------------------------------------------------
// B1, and TL for one token: rows in byte lanes, a table of partial sums for each group of columns. A sum is
// `base · hi + lo + 16`.

const LANES_PREFETCH: usize = 8192;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn b1(steps: Lanes<'_, 4>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    let Some(int4) = tiles::alike(x) else { return tiles::one_by_one(x, y, |x, y| b1(steps, x, y)) };
    match *x {
        [x] if int4 => y[0] = matvec_lanes::<4, INT4_BASE>(steps, x),
        [x] => y[0] = matvec_lanes::<4, B1_BASE>(steps, x),
        _ if int4 => by_tokens!(x, y, matmat_b1::<INT4_BASE>(steps)),
        _ => by_tokens!(x, y, matmat_b1::<B1_BASE>(steps)),
    }
    let constant = if int4 { 0 } else { 16 * 8 * steps.len() as i32 };
    for (x, y) in x.iter().zip(y) {
        y.iter_mut().for_each(|y| *y = 2 * (*y + constant) - x.sum());
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn tl(steps: Lanes<'_, 5>, x: &[Activations<'_>], y: &mut [[i32; 64]; 16]) {
    // In groups of even size: 4 and 4 tokens are 5 % faster than 5 and 3.
    let size = x.len().div_ceil(x.len().div_ceil(TL_TOKENS));
    for (x, y) in x.chunks(size).zip(y.chunks_mut(size)) {
        match *x {
            [x] if x.int4() => y[0] = matvec_lanes::<5, INT4_BASE>(steps, x),
            [x] => y[0] = matvec_lanes::<5, TL_BASE>(steps, x),
            [a, b] => matmat_tl(steps, [a, b], y),
            [a, b, c] => matmat_tl(steps, [a, b, c], y),
            [a, b, c, d] => matmat_tl(steps, [a, b, c, d], y),
            [a, b, c, d, e] => matmat_tl(steps, [a, b, c, d, e], y),
            _ => unreachable!("1 to {TL_TOKENS} tokens"),
        }
    }
}

/// `Σ base · hi + lo` over the groups of 64 rows, for one token, in vectors of 32 bytes.
///
/// For 32 rows and one group: half an operation to bring the nibble down, 1 for the mask of signs, 2 look-ups, 2 negations, 2
/// additions, 0.75 to widen. A table of 16 fills 32 bytes twice by a plain load, while filling 64 bytes four times costs as
/// much as a look-up on Zen 4 (its shuffle units do both): B1 192 weights/ns in 64 bytes, 231 so.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline(never)]
fn matvec_lanes<const BLOCKS: usize, const BASE: i16>(steps: Lanes<'_, BLOCKS>, x: Activations<'_>) -> [i32; 64] {
    let zero = _mm256_setzero_si256();
    let parts = [_mm256_set1_epi32(FIRST * BASE as i32 + 1), _mm256_set1_epi32(SECOND * BASE as i32 + (1 << 16))];
    // Opaque: for the highest bit LLVM would take the detour of `vpmovmskb` through a general register.
    let bits: [__m256i; 8] = core::array::from_fn(|g| avx2::opaque(_mm256_set1_epi8((0x80 >> g) as u8 as i8)));
    let mut total = [[zero; 4]; 2];
    for (step, tables) in steps.iter().zip(x.tables().as_chunks::<4>().0) {
        for block in step {
            prefetch(block, LANES_PREFETCH);
        }
        let (mut lo, mut hi) = ([zero; 2], [zero; 2]);
        let sign = [0, 32].map(|half| avx2::load(&step[0].0, half));
        macro_rules! group {
            ($v:expr, $i:expr, $odd:expr) => {
                let table = &tables[$i].0;
                let t_lo = load_twice(table, 32 * $odd);
                let t_hi = if BASE == INT4_BASE { t_lo } else { load_twice(table, 32 * $odd + 16) };
                for half in 0..2 {
                    let n = $v[half];
                    let mut l = _mm256_permutexvar_epi8(n, t_lo);
                    let negative = match BLOCKS {
                        5 => opaque(_mm256_test_epi8_mask(sign[half], bits[2 * $i + $odd]).into()) as u32,
                        _ => 0,
                    };
                    if BLOCKS == 5 {
                        l = _mm256_mask_sub_epi8(l, negative, zero, l);
                    }
                    if BASE == INT4_BASE {
                        let sum = if $i < 2 { &mut lo[half] } else { &mut hi[half] };
                        *sum = _mm256_add_epi8(*sum, l);
                        continue;
                    }
                    let mut h = _mm256_permutexvar_epi8(n, t_hi);
                    if BLOCKS == 5 {
                        h = _mm256_mask_sub_epi8(h, negative, zero, h);
                    }
                    lo[half] = _mm256_add_epi8(lo[half], l);
                    hi[half] = _mm256_add_epi8(hi[half], h);
                }
            };
        }
        macro_rules! block {
            ($i:expr) => {
                let v = [0, 32].map(|half| avx2::load(&step[$i + BLOCKS - 4].0, half));
                group!(v, $i, 0);
                let v = v.map(|v| _mm256_srli_epi16::<4>(v));
                group!(v, $i, 1);
            };
        }
        block!(0);
        block!(1);
        block!(2);
        block!(3);
        for half in 0..2 {
            let pairs = [_mm256_unpacklo_epi8(lo[half], hi[half]), _mm256_unpackhi_epi8(lo[half], hi[half])];
            for i in 0..4 {
                total[half][i] = _mm256_dpbusd_epi32(total[half][i], parts[i % 2], pairs[i / 2]);
            }
        }
    }
    let join = |i: usize| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(total[0][i]), total[1][i]);
    in_order([join(0), join(1), join(2), join(3)])
}

/// Bytes of a double word: `lo` and `hi` of two rows are interleaved, and the base multiplies the second or the fourth.
const FIRST: i32 = 1 << 8;
const SECOND: i32 = 1 << 24;

/// `Σ base · hi + lo` over the groups of 64 rows, for `N` tokens, in vectors of 64 bytes.
///
/// A block of tables is a table of 64 bytes as it is: two bits of an index choose among the low and high parts of two groups.
/// For 64 rows and one group: 2.5 operations for two indices, shared among tokens; 2 look-ups, 2 additions and 0.75 to widen
/// for each. At 265 to 290 weights/ns, more than the 237 that products of bytes could reach with nothing to unpack.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline(never)]
fn matmat_b1<const N: usize, const BASE: i16>(steps: Lanes<'_, 4>, x: [Activations<'_>; N]) -> [[i32; 64]; N] {
    let zero = _mm512_setzero_si512();
    let nibble = _mm512_set1_epi8(15);
    let parts = [_mm512_set1_epi32(FIRST * BASE as i32 + 1), _mm512_set1_epi32(SECOND * BASE as i32 + (1 << 16))];
    let tables = x.map(|x| &x.tables().as_chunks::<4>().0[..steps.len()]);
    let mut total = [[zero; 4]; N];
    for (s, step) in steps.iter().enumerate() {
        let (mut lo, mut hi) = ([zero; N], [zero; N]);
        macro_rules! group {
            ($v:expr, $i:expr, $odd:expr) => {
                // (n & 15) | which
                let index = |which| _mm512_ternarylogic_epi32::<0xea>($v, nibble, _mm512_set1_epi8(which));
                let (index_lo, index_hi) = (index(32 * $odd), index(32 * $odd + 16));
                for t in 0..N {
                    let table = load(&tables[t][s][$i].0, 0);
                    if BASE == INT4_BASE {
                        let sum = if $i < 2 { &mut lo[t] } else { &mut hi[t] };
                        *sum = _mm512_add_epi8(*sum, _mm512_permutexvar_epi8(index_lo, table));
                        continue;
                    }
                    lo[t] = _mm512_add_epi8(lo[t], _mm512_permutexvar_epi8(index_lo, table));
                    hi[t] = _mm512_add_epi8(hi[t], _mm512_permutexvar_epi8(index_hi, table));
                }
            };
        }
        macro_rules! block {
            ($i:expr) => {
                let v = load(&step[$i].0, 0);
                group!(v, $i, 0);
                group!(_mm512_srli_epi16::<4>(v), $i, 1);
            };
        }
        block!(0);
        block!(1);
        block!(2);
        block!(3);
        for t in 0..N {
            let pairs = [_mm512_unpacklo_epi8(lo[t], hi[t]), _mm512_unpackhi_epi8(lo[t], hi[t])];
            for i in 0..4 {
                total[t][i] = _mm512_dpbusd_epi32(total[t][i], parts[i % 2], pairs[i / 2]);
            }
        }
    }
    total.map(|total| in_order(total))
}

/// The sums by row: interleaving takes 8 rows of each 16, and of these `total` has the even ones, then the odd ones.
#[target_feature(enable = "avx512f")]
#[inline]
fn in_order(total: [__m512i; 4]) -> [i32; 64] {
    let fours = [
        _mm512_unpacklo_epi32(total[0], total[1]),
        _mm512_unpackhi_epi32(total[0], total[1]),
        _mm512_unpacklo_epi32(total[2], total[3]),
        _mm512_unpackhi_epi32(total[2], total[3]),
    ];
    by_row(fours)
}

/// The sums by row, of which 16 bytes `l` of `fours[j]` are those of row `16 l + 4 j` and the 3 after it.
#[target_feature(enable = "avx512f")]
#[inline]
fn by_row(fours: [__m512i; 4]) -> [i32; 64] {
    let fours = fours.map(|fours| lanes(fours));
    let mut out = [0; 64];
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        out.copy_from_slice(&fours[i % 4][i / 4 * 4..][..4]);
    }
    out
}

// ---------------------------------------------------------------------------------------------------------------------
// TL by multiplication, for several tokens.

/// Tokens that are multiplied by weights of TL while these lie unpacked: 20 sums, 4 vectors of indices, 4 of codes, 1 of
/// activations. With 6, 8 % faster for 6 tokens than 3 and 3, and 2 % slower for 12 and for 16 than fours.
const TL_TOKENS: usize = 5;

/// What a nibble of TL says of its three weights, as codes `w + 1`: the negated ones where bit 4, the sign, is set.
static TL_CODES: [[u8; 64]; 3] = {
    let mut codes = [[0; 64]; 3];
    let mut n = 0;
    while n < 64 {
        let mut c = 0;
        while c < 3 {
            let weight = TL_WEIGHTS[n % 16][c];
            codes[c][n] = (1 + if n & 16 == 0 { weight } else { -weight }) as u8;
            c += 1;
        }
        n += 1;
    }
    codes
};

/// `Σ wx = Σ(w + 1)x - Σx` for 64 rows and `N` tokens. A double word has the codes of one row: the first weights of four
/// groups, their second ones, or their third.
///
/// For 64 rows and 8 groups of 3 columns: 19 operations for indices, 16 to interleave those of fours of groups, 24 look-ups,
/// shared among tokens; 24 products and 1 for the order of columns for each. To interleave indices rather than the codes
/// looked up, a third as many, is what the order of columns is for.
///
/// Activations of four bits are multiplied so too: the tables of the other backend had 190 to 199 products/ns of them in a cache where
/// this has 180, and no more from memory (Intel Xeon, Emerald Rapids).
///
/// By look-ups of partial sums as in [`matmat_b1`], with masked negations, TL ran at 130 to 150 weights/ns whatever the number
/// of tokens; so at 151 to 162 for 2, 190 to 202 for 3, 216 to 229 for 4, 5, 8 and 16. Codes of 8 steps stored in the
/// first-level cache for all tokens, rather than unpacked again for each group: 168 where this was at 187.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline(never)]
fn matmat_tl<const N: usize>(steps: Lanes<'_, 5>, x: [Activations<'_>; N], y: &mut [[i32; 64]]) {
    // The activations of one group of columns in a format with scales end inside a step.
    let values = x.map(|x| x.values().as_chunks::<24>());
    let last = values.map(|(_, rest)| {
        let mut last = [0; 24];
        last[..rest.len()].copy_from_slice(rest);
        last
    });
    let mut acc = x.map(|x| [_mm512_set1_epi32(-x.sum()); 4]);
    let mut columns = [[0; 8]; N];
    for (s, step) in steps.iter().enumerate() {
        for block in step {
            prefetch(block, LANES_PREFETCH);
        }
        for t in 0..N {
            columns[t] = in_fours(values[t].0.get(s).unwrap_or(&last[t]));
        }
        let sign = load(&step[0].0, 0);
        for (half, sign) in [sign, _mm512_slli_epi16::<4>(sign)].into_iter().enumerate() {
            let indices = indices_in_fours(sign, load(&step[1 + 2 * half].0, 0), load(&step[2 + 2 * half].0, 0));
            for c in 0..3 {
                let table = load(&TL_CODES[c], 0);
                let mut codes = indices;
                for j in 0..4 {
                    codes[j] = _mm512_permutexvar_epi8(indices[j], table);
                }
                for t in 0..N {
                    let x = broadcast(&columns[t], 3 * half + c);
                    for j in 0..4 {
                        acc[t][j] = _mm512_dpbusd_epi32(acc[t][j], codes[j], x);
                    }
                }
            }
        }
    }
    for t in 0..N {
        y[t] = by_row(acc[t]);
    }
}

/// 24 activations in double words of four: `x[0, 3, 6, 9]`, `x[1, 4, 7, 10]`, `x[2, 5, 8, 11]`, and so the other 12.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
#[inline]
fn in_fours(x: &[i8; 24]) -> [i32; 8] {
    static ORDER: [u8; 32] = {
        let mut order = [0; 32];
        let mut i = 0;
        while i < 24 {
            order[i] = (i / 12 * 12 + i % 4 * 3 + i / 4 % 3) as u8;
            i += 1;
        }
        order
    };
    // SAFETY: the 24 bytes that the mask names are `x`.
    let x = unsafe { _mm256_maskz_loadu_epi8((1 << 24) - 1, x.as_ptr()) };
    let mut out = [0; 8];
    // SAFETY: `out` is 32 bytes.
    unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permutexvar_epi8(avx2::load(&ORDER, 0), x)) };
    out
}

/// Indices into [`TL_CODES`] of four groups, of which `sign` has the signs from bit 7 downwards, `first` two and `second` two
/// nibbles. By double words of a row, in the order of [`by_row`]; the bits that vary above the fifth mean nothing.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn indices_in_fours(sign: __m512i, first: __m512i, second: __m512i) -> [__m512i; 4] {
    // (n & 15) | (sign & !15)
    let index = |n, sign| _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8(15), n, sign);
    let a = index(first, _mm512_srli_epi16::<3>(sign));
    let b = index(_mm512_srli_epi16::<4>(first), _mm512_srli_epi16::<2>(sign));
    let c = index(second, _mm512_srli_epi16::<1>(sign));
    let d = index(_mm512_srli_epi16::<4>(second), sign);
    let (ab, cd) = (_mm512_unpacklo_epi8(a, b), _mm512_unpacklo_epi8(c, d));
    let (ab_hi, cd_hi) = (_mm512_unpackhi_epi8(a, b), _mm512_unpackhi_epi8(c, d));
    [
        _mm512_unpacklo_epi16(ab, cd),
        _mm512_unpackhi_epi16(ab, cd),
        _mm512_unpacklo_epi16(ab_hi, cd_hi),
        _mm512_unpackhi_epi16(ab_hi, cd_hi),
    ]
}
