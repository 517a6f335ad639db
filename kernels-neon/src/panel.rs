//! Grouped formats with a batch of tokens: weights are unpacked once for all of them.
//!
//! A group of 64 rows is unpacked to bytes, a *panel*, and multiplied by the tokens, 8 rows by 8 tokens at a time
//! in a loop that only loads and multiplies and is the same for every format. A panel and the activations of 8 tokens lie on the
//! stack, 10 KiB, and in the first-level cache. How bytes lie in them is the affair of the instructions that multiply: [`Tile`].
//!
//! Unpacking costs 20 to 40 operations for 256 weights, as much as two to four tokens: fewer than [`Tile::FEW`] tokens are
//! multiplied one by one.
use crate::lanes;
use bitnet_kernel::tables::TL_WEIGHTS;
use bitnet_kernel::{Activations, Batch, Block, Format, Geometry, Kernels, Matrix, float};
use core::arch::aarch64::*;

/// 16 columns of 8 rows, or of 8 tokens. The first block is of the first 4 of them.
pub(crate) type Unit = [Block; 2];

/// Sums of 8 rows and 8 tokens: for each token, two vectors of 4 rows.
pub(crate) type Sums = [int32x4_t; 16];

/// Rows of a panel.
const ROWS: usize = 64;
/// Tokens that are multiplied at a time.
const TOKENS: usize = 8;
/// Units of 8 rows of a panel: a group, and what the last step of TL has beyond it.
const UNITS: usize = Format::GROUP_COLS / 16 + 1;

/// How an instruction set multiplies a panel.
pub(crate) trait Tile: Kernels {
    /// Batches of fewer tokens are multiplied without a panel.
    const FEW: usize;
    /// The sixteenths of a block in which [`Tile::columns`] puts its vectors: for the first 8 columns of a unit, and for the others.
    const PLACES: [[usize; 2]; 2];
    /// Lays out 16 columns of 4 rows.
    fn rows(rows: [uint8x16_t; 4], out: &mut Block);
    /// The same from 8 columns of 16 rows: for each 4 rows, the vectors of their block.
    fn columns(columns: [uint8x16_t; 8]) -> [[uint8x16_t; 2]; 4];
    /// Lays out 16 columns of 4 tokens.
    fn tokens(tokens: [uint8x16_t; 4], out: &mut Block);
    /// The products of 8 rows and 8 tokens, of which the first `tokens` matter.
    fn dots(&self, w: &[Unit], x: &[Unit], tokens: usize) -> Sums;
}

/// See the module's description.
struct Panel {
    weights: [[Unit; UNITS]; ROWS / 8],
    x: [Unit; UNITS],
}

impl Panel {
    const ZERO: Self = Self { weights: [[[Block::ZERO; 2]; UNITS]; ROWS / 8], x: [[Block::ZERO; 2]; UNITS] };
}

/// [`Kernels::matmat_grouped`].
#[target_feature(enable = "neon")]
pub(crate) fn matmat_grouped<T: Tile>(k: &T, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
    assert_eq!(y.len(), w.rows() * x.tokens().len());
    x.assert_fit(&w);
    y.fill(0.0);
    if x.tokens().len() < T::FEW {
        return grouped_without(k, w, x.tokens(), y);
    }
    let mut panel = Panel::ZERO;
    let rows = w.rows();
    for (tile, first) in (0..rows).step_by(ROWS).enumerate() {
        let here = first..rows.min(first + ROWS);
        for (g, (planes, scales)) in w.panels(tile).enumerate() {
            match w.format() {
                Format::B1G => unpack_b1::<T, 1>(planes.blocks(), &mut panel),
                Format::I2G => unpack_b1::<T, 2>(planes.blocks(), &mut panel),
                Format::I3G => unpack_b1::<T, 3>(planes.blocks(), &mut panel),
                Format::TLG => unpack_tl::<T>(planes.blocks().as_chunks().0, &mut panel),
                _ => {
                    for (i, tile) in planes.tiles().enumerate() {
                        unpack_i4::<T>(tile.as_chunks().0, &mut panel.weights[i / 2], i % 2);
                    }
                }
            }
            let cols = g * Format::GROUP_COLS..(g + 1) * Format::GROUP_COLS;
            let add = |sums: [i32; 8], t: usize, r: usize| {
                float::add_scaled(&mut y[t * rows..][here.clone()][r..], &sums, &scales[r..]);
            };
            multiply(k, w.slice(here.clone()), &mut panel, x.tokens(), cols, add);
        }
    }
}

/// [`Kernels::matmat_grouped`] without a panel: formats in lanes token by token, those in planes by `k`, group by group. `y` is zeros.
#[target_feature(enable = "neon")]
pub(crate) fn grouped_without(k: &dyn Kernels, w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [f32]) {
    let rows = w.rows();
    if w.format().base().geometry() == Geometry::Lanes {
        tokens.iter().zip(y.chunks_exact_mut(rows.max(1))).for_each(|(x, y)| lanes::matvec_grouped(w, *x, y));
        return;
    }
    let mut sums = [0; TOKENS * ROWS];
    for (tile, first) in (0..rows).step_by(ROWS).enumerate() {
        let here = first..rows.min(first + ROWS);
        for (g, (panel, scales)) in w.panels(tile).enumerate() {
            for (tokens, y) in tokens.chunks(TOKENS).zip(y.chunks_mut(TOKENS * rows)) {
                let x: [_; TOKENS] = core::array::from_fn(|t| tokens[t.min(tokens.len() - 1)].group(g));
                let sums = &mut sums[..tokens.len() * ROWS];
                k.matmat(panel, Batch::new(&x[..tokens.len()]), sums);
                for (sums, y) in sums.chunks_exact(ROWS).zip(y.chunks_exact_mut(rows)) {
                    float::add_scaled(&mut y[here.clone()], sums, scales);
                }
            }
        }
    }
}

/// Multiplies the panel by the columns `cols` of all tokens: `add(sums, t, r)` is given the sums of rows `r` to `r + 7` of `w`, of
/// which the last ones may not exist, with token `t`.
#[target_feature(enable = "neon")]
fn multiply<T: Tile>(
    k: &T,
    w: Matrix<'_>,
    panel: &mut Panel,
    tokens: &[Activations<'_>],
    cols: core::ops::Range<usize>,
    mut add: impl FnMut([i32; 8], usize, usize),
) {
    let (scale, bias) = scale_and_bias(w.format());
    for (group, tokens) in tokens.chunks(TOKENS).enumerate() {
        let units = cols.len().div_ceil(16);
        let x_sums = pack::<T>(tokens, cols.clone(), &mut panel.x[..units]);
        for (r, weights) in (0..w.rows()).step_by(8).zip(&panel.weights) {
            let sums = k.dots(&weights[..units], &panel.x[..units], tokens.len());
            for (t, (sums, x_sum)) in sums.as_chunks::<2>().0.iter().zip(x_sums).take(tokens.len()).enumerate() {
                let mut dots = [0; 8];
                // SAFETY: 8 sums are two vectors of 4.
                unsafe { vst1q_s32_x2(dots.as_mut_ptr(), int32x4x2_t(sums[0], sums[1])) };
                add(dots.map(|dot| scale * dot - bias * x_sum), TOKENS * group + t, r);
            }
        }
    }
}

/// What turns sums of the bytes of a panel into sums of weights: `scale · dot - bias · Σx`. A byte is a code `w + bias`, a weight
/// (TL and I8), or the code times -1 in bit planes, of which B1 is one: `w = 2c - bias` where weights are odd, else `c - bias`.
const fn scale_and_bias(format: Format) -> (i32, i32) {
    match format.base() {
        Format::B1 => (-(format.distance() as i32), -(format.range().0 as i32)),
        Format::I4 => (1, 8),
        _ => (1, 0),
    }
}

/// Lays out the columns `cols` of up to 8 tokens, zeros after them, and returns the sums of each.
///
/// It is done for every 64 rows. Copies of any length and sums across lanes in each unit were a third of all instructions: 0.172
/// for a product of T2 and 8 tokens with them, 0.119 without.
#[target_feature(enable = "neon")]
fn pack<T: Tile>(tokens: &[Activations<'_>], cols: core::ops::Range<usize>, out: &mut [Unit]) -> [i32; TOKENS] {
    let values: [&[i8]; TOKENS] =
        core::array::from_fn(|t| tokens.get(t).map_or(&[][..], |x| &x.values()[cols.clone()]));
    let mut sums = [vdupq_n_s32(0); TOKENS];
    for (u, unit) in out.iter_mut().enumerate() {
        for (half, block) in unit.iter_mut().enumerate() {
            let x = core::array::from_fn(|i| {
                let t = 4 * half + i;
                let x = sixteen(values[t].get(16 * u..).unwrap_or_default());
                sums[t] = vpadalq_s16(sums[t], vpaddlq_s8(x));
                vreinterpretq_u8_s8(x)
            });
            T::tokens(x, block);
        }
    }
    sums.map(|sum| vaddvq_s32(sum))
}

/// The first 16 bytes, or zeros after fewer.
#[target_feature(enable = "neon")]
#[inline]
fn sixteen(values: &[i8]) -> int8x16_t {
    let mut padded = [0; 16];
    let whole = values.first_chunk().unwrap_or_else(|| {
        padded[..values.len()].copy_from_slice(values);
        &padded
    });
    // SAFETY: `whole` is 16 bytes.
    unsafe { vld1q_s8(whole.as_ptr()) }
}

/// 4 rows of I4, into half `half` of the units.
#[target_feature(enable = "neon")]
fn unpack_i4<T: Tile>(steps: &[[Block; 4]], units: &mut [Unit; UNITS], half: usize) {
    for (step, units) in steps.iter().zip(units.chunks_exact_mut(8)) {
        for quarter in 0..4 {
            let v: [uint8x16_t; 4] = core::array::from_fn(|r| {
                // SAFETY: four times 16 bytes are a block.
                unsafe { vld1q_u8(step[r].0.as_ptr().add(16 * quarter)) }
            });
            T::rows(v.map(|v| vandq_u8(v, vdupq_n_u8(15))), &mut units[quarter][half]);
            T::rows(v.map(|v| vshrq_n_u8::<4>(v)), &mut units[4 + quarter][half]);
        }
    }
}

/// 64 rows of B1, or of a panel of so many bit planes: bit `i` of a byte of block `b` is column `8 b + i`.
#[target_feature(enable = "neon")]
fn unpack_b1<T: Tile, const PLANES: usize>(planes: &[Block], panel: &mut Panel) {
    let masks = [1, 2, 4, 8, 16, 32, 64, 128].map(|mask| vdupq_n_u8(mask));
    let blocks = planes.len() / PLANES;
    for i in 0..blocks {
        for q in 0..4 {
            let mut columns = [vdupq_n_u8(0); 8];
            for plane in (0..PLANES).rev() {
                let rows = &planes[plane * blocks + i].0.as_chunks::<16>().0[q];
                // SAFETY: `rows` is 16 bytes.
                let v = unsafe { vld1q_u8(rows.as_ptr()) };
                for (column, mask) in columns.iter_mut().zip(masks) {
                    *column = vaddq_u8(vaddq_u8(*column, *column), vtstq_u8(v, mask));
                }
            }
            put::<T>(columns, panel, 16 * q, i);
        }
    }
}

/// 64 rows of TL: the three weights of a group by look-ups in tables of 32 entries, the negative ones behind the others.
#[target_feature(enable = "neon")]
fn unpack_tl<T: Tile>(steps: &[[Block; 5]], panel: &mut Panel) {
    const TABLES: [[u8; 32]; 3] = {
        let mut tables = [[0; 32]; 3];
        let mut n = 0;
        while n < 48 {
            let weight = TL_WEIGHTS[n / 3][n % 3];
            tables[n % 3][n / 3] = weight as u8;
            tables[n % 3][16 + n / 3] = -weight as u8;
            n += 1;
        }
        tables
    };
    // SAFETY: a table is 32 bytes.
    let tables = TABLES.map(|table| unsafe { vld1q_u8_x2(table.as_ptr()) });
    let load = |block: &Block, q: usize| {
        let rows = &block.0.as_chunks::<16>().0[q];
        // SAFETY: `rows` is 16 bytes.
        unsafe { vld1q_u8(rows.as_ptr()) }
    };
    for (i, step) in steps.iter().enumerate() {
        for q in 0..4 {
            let mut sign = load(&step[0], q);
            let mut columns = [vdupq_n_u8(0); 24];
            for (g, columns) in columns.as_chunks_mut::<3>().0.iter_mut().enumerate() {
                let v = load(&step[1 + g / 2], q);
                let n = if g % 2 == 0 { vandq_u8(v, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(v) };
                let negative = vcltzq_s8(vreinterpretq_s8_u8(sign));
                sign = vaddq_u8(sign, sign);
                let n = vorrq_u8(n, vandq_u8(negative, vdupq_n_u8(16)));
                *columns = tables.map(|table| vqtbl2q_u8(uint8x16x2_t(table.0, table.1), n));
            }
            for (j, columns) in columns.as_chunks::<8>().0.iter().enumerate() {
                put::<T>(*columns, panel, 16 * q, 3 * i + j);
            }
        }
    }
}

/// Puts columns `8 i` to `8 i + 7` of 16 rows from `row` on into the panel.
#[target_feature(enable = "neon")]
fn put<T: Tile>(columns: [uint8x16_t; 8], panel: &mut Panel, row: usize, i: usize) {
    for (quad, vectors) in T::columns(columns).into_iter().enumerate() {
        let block = &mut panel.weights[row / 8 + quad / 2][i / 2][quad % 2];
        for (vector, place) in vectors.into_iter().zip(T::PLACES[i % 2]) {
            // SAFETY: four times 16 bytes are a block.
            unsafe { vst1q_u8(block.0.as_chunks_mut::<16>().0[place].as_mut_ptr(), vector) };
        }
    }
}

/// The bytes of `a` and `b` by turns.
#[target_feature(enable = "neon")]
#[inline]
pub(crate) fn zip(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
    [vzip1q_u8(a, b), vzip2q_u8(a, b)]
}
