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
use crate::avx2::{prepare_b1_avx2, prepare_tl_balanced_avx2};
use crate::avx512::{by_tokens, lanes, load, load_twice, opaque, prefetch, sums_less};
use crate::cpu::Features;
use crate::float;
use crate::rows;
use crate::tiles::{self, Lanes, Planes};
use bitnet_kernel::float::Cache;
use bitnet_kernel::tables::{B1_BASE, TL_BASE};
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};
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
    fn prepare<'a>(&self, format: Format, cols: usize, values: &'a [i8], tables: &'a mut [Block]) -> Activations<'a> {
        match format {
            // SAFETY: `self` exists, so the CPU has AVX2.
            Format::B1 => unsafe { prepare_b1_avx2(values, tables) },
            // SAFETY: as above.
            Format::TL => unsafe { prepare_tl_balanced_avx2(values, tables) },
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
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { rows::dot_rows(w, rows, x, y) }
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has AVX2.
        unsafe { rows::sum_rows(w, rows, x, y) }
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
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        // SAFETY: `self` exists, so the CPU has these features.
        unsafe { float::attend(q, keys, values, scale, out) }
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
// B1 and TL: rows in byte lanes, a table of partial sums for each group of columns. A sum is `base · hi + lo + 16`.

const LANES_PREFETCH: usize = 8192;

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn b1(steps: Lanes<'_, 4>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_lanes::<4, B1_BASE>(steps, x),
        _ => by_tokens!(x, y, matmat_lanes::<4, B1_BASE>(steps)),
    }
    let constant = 16 * 8 * steps.len() as i32;
    for (x, y) in x.iter().zip(y) {
        y.iter_mut().for_each(|y| *y = 2 * (*y + constant) - x.sum());
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
fn tl(steps: Lanes<'_, 5>, x: &[Activations<'_>], y: &mut [[i32; 64]; TOKENS]) {
    match *x {
        [x] => y[0] = matvec_lanes::<5, TL_BASE>(steps, x),
        _ => by_tokens!(x, y, matmat_lanes::<5, TL_BASE>(steps)),
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
                let (t_lo, t_hi) = (load_twice(table, 32 * $odd), load_twice(table, 32 * $odd + 16));
                for half in 0..2 {
                    let n = $v[half];
                    let (mut l, mut h) = (_mm256_permutexvar_epi8(n, t_lo), _mm256_permutexvar_epi8(n, t_hi));
                    if BLOCKS == 5 {
                        let negative = opaque(_mm256_test_epi8_mask(sign[half], bits[2 * $i + $odd]).into()) as u32;
                        l = _mm256_mask_sub_epi8(l, negative, zero, l);
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
/// For 64 rows and one group: 2.5 operations for two indices and 1 for the mask of signs, shared among tokens; 2 look-ups, 2
/// negations, 2 additions and 0.75 to widen for each.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
#[inline(never)]
fn matmat_lanes<const N: usize, const BLOCKS: usize, const BASE: i16>(
    steps: Lanes<'_, BLOCKS>,
    x: [Activations<'_>; N],
) -> [[i32; 64]; N] {
    let zero = _mm512_setzero_si512();
    let nibble = _mm512_set1_epi8(15);
    let parts = [_mm512_set1_epi32(FIRST * BASE as i32 + 1), _mm512_set1_epi32(SECOND * BASE as i32 + (1 << 16))];
    let tables = x.map(|x| &x.tables().as_chunks::<4>().0[..steps.len()]);
    let mut total = [[zero; 4]; N];
    for (s, step) in steps.iter().enumerate() {
        let (mut lo, mut hi) = ([zero; N], [zero; N]);
        let sign = load(&step[0].0, 0);
        macro_rules! group {
            ($v:expr, $i:expr, $odd:expr) => {
                // (n & 15) | which
                let index = |which| _mm512_ternarylogic_epi32::<0xea>($v, nibble, _mm512_set1_epi8(which));
                let (index_lo, index_hi) = (index(32 * $odd), index(32 * $odd + 16));
                let bit = _mm512_set1_epi8((0x80 >> (2 * $i + $odd)) as u8 as i8);
                let negative = if BLOCKS == 5 { opaque(_mm512_test_epi8_mask(sign, bit)) } else { 0 };
                for t in 0..N {
                    let table = load(&tables[t][s][$i].0, 0);
                    let mut l = _mm512_permutexvar_epi8(index_lo, table);
                    let mut h = _mm512_permutexvar_epi8(index_hi, table);
                    if BLOCKS == 5 {
                        l = _mm512_mask_sub_epi8(l, negative, zero, l);
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
    // 16 bytes `l` of fours[j] are rows 16 l + 4 j and the 3 after it.
    let fours = [
        _mm512_unpacklo_epi32(total[0], total[1]),
        _mm512_unpackhi_epi32(total[0], total[1]),
        _mm512_unpacklo_epi32(total[2], total[3]),
        _mm512_unpackhi_epi32(total[2], total[3]),
    ]
    .map(|fours| lanes(fours));
    let mut out = [0; 64];
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        out.copy_from_slice(&fours[i % 4][i / 4 * 4..][..4]);
    }
    out
}
