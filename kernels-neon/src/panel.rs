//! Grouped formats with a batch of tokens: weights are unpacked once for all of them.
//!
//! A group of 64 rows is unpacked to bytes, a *panel*, and multiplied by the tokens, 8 rows by 8 tokens at a time
//! in a loop that only loads and multiplies and is the same for every format. A panel and the activations of 8 tokens lie on the
//! stack, 10 KiB, and in the first-level cache.
//!
//! Unpacking costs 20 to 40 operations for 256 weights, as much as two to four tokens: fewer than [`FEW`] tokens are
//! multiplied one by one.
use crate::{batch, lanes};
use bitnet_kernel::tables::TL_WEIGHTS;
use bitnet_kernel::{Activations, Batch, Block, Format, Geometry, Kernels, Matrix, float};
use core::arch::aarch64::*;
use core::arch::asm;

/// 16 columns of 8 rows, or of 8 tokens. A block holds 4 of them: two pairs, of each pair the first 8 columns of both and then the
/// others.
type Unit = [Block; 2];

/// Sums of 8 rows and 8 tokens: for each token, two vectors of 4 rows.
type Sums = [int32x4_t; 16];

/// Rows of a panel.
const ROWS: usize = 64;
/// Tokens that are multiplied at a time.
const TOKENS: usize = 8;
/// Units of 8 rows of a panel: a group, and what the last step of TL has beyond it.
const UNITS: usize = Format::GROUP_COLS / 16 + 1;

/// Batches of fewer tokens are multiplied without a panel.
const FEW: usize = batch::tokens_min(Format::I4G);

/// See the module's description.
struct Panel {
    weights: [[Unit; UNITS]; ROWS / 8],
    x: [Unit; UNITS],
}

impl Panel {
    const ZERO: Self = Self { weights: [[[Block::ZERO; 2]; UNITS]; ROWS / 8], x: [[Block::ZERO; 2]; UNITS] };
}

/// [`Kernels::matmat_grouped`].
#[target_feature(enable = "neon,i8mm")]
pub(crate) fn matmat_grouped(k: &dyn Kernels, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
    assert_eq!(y.len(), w.rows() * x.tokens().len());
    x.assert_fit(&w);
    y.fill(0.0);
    if x.tokens().len() < FEW {
        return grouped_without(k, w, x.tokens(), y);
    }
    let mut panel = Panel::ZERO;
    let rows = w.rows();
    for (tile, first) in (0..rows).step_by(ROWS).enumerate() {
        let here = first..rows.min(first + ROWS);
        for (g, (planes, scales)) in w.panels(tile).enumerate() {
            match w.format() {
                Format::B1G => unpack_b1::<1>(planes.blocks(), &mut panel),
                Format::I2G => unpack_b1::<2>(planes.blocks(), &mut panel),
                Format::I3G => unpack_b1::<3>(planes.blocks(), &mut panel),
                Format::TLG => unpack_tl(planes.blocks().as_chunks().0, &mut panel),
                _ => {
                    for (i, tile) in planes.tiles().enumerate() {
                        unpack_i4(tile.as_chunks().0, &mut panel.weights[i / 2], i % 2);
                    }
                }
            }
            let cols = g * Format::GROUP_COLS..(g + 1) * Format::GROUP_COLS;
            let add = |sums: [i32; 8], t: usize, r: usize| {
                float::add_scaled(&mut y[t * rows..][here.clone()][r..], &sums, &scales[r..]);
            };
            multiply(w.slice(here.clone()), &mut panel, x.tokens(), cols, add);
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
#[target_feature(enable = "neon,i8mm")]
fn multiply(
    w: Matrix<'_>,
    panel: &mut Panel,
    tokens: &[Activations<'_>],
    cols: core::ops::Range<usize>,
    mut add: impl FnMut([i32; 8], usize, usize),
) {
    let (scale, bias) = scale_and_bias(w.format());
    for (group, tokens) in tokens.chunks(TOKENS).enumerate() {
        let units = cols.len().div_ceil(16);
        let x_sums = pack(tokens, cols.clone(), &mut panel.x[..units]);
        for (r, weights) in (0..w.rows()).step_by(8).zip(&panel.weights) {
            let (w, x) = (&weights[..units], &panel.x[..units]);
            let sums = if tokens.len() <= 4 { matmat_4_neon_i8mm(w, x) } else { matmat_8_neon_i8mm(w, x) };
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
fn pack(tokens: &[Activations<'_>], cols: core::ops::Range<usize>, out: &mut [Unit]) -> [i32; TOKENS] {
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
            rows(x, block);
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
fn unpack_i4(steps: &[[Block; 4]], units: &mut [Unit; UNITS], half: usize) {
    for (step, units) in steps.iter().zip(units.chunks_exact_mut(8)) {
        for quarter in 0..4 {
            let v: [uint8x16_t; 4] = core::array::from_fn(|r| {
                // SAFETY: four times 16 bytes are a block.
                unsafe { vld1q_u8(step[r].0.as_ptr().add(16 * quarter)) }
            });
            rows(v.map(|v| vandq_u8(v, vdupq_n_u8(15))), &mut units[quarter][half]);
            rows(v.map(|v| vshrq_n_u8::<4>(v)), &mut units[4 + quarter][half]);
        }
    }
}

/// 64 rows of B1, or of a panel of so many bit planes: bit `i` of a byte of block `b` is column `8 b + i`.
#[target_feature(enable = "neon")]
fn unpack_b1<const PLANES: usize>(planes: &[Block], panel: &mut Panel) {
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
            put(columns, panel, 16 * q, i);
        }
    }
}

/// 64 rows of TL: the three weights of a group by look-ups in tables of 32 entries, the negative ones behind the others.
#[target_feature(enable = "neon")]
fn unpack_tl(steps: &[[Block; 5]], panel: &mut Panel) {
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
                put(*columns, panel, 16 * q, 3 * i + j);
            }
        }
    }
}

/// The sixteenths of a block for the vectors of [`quads`]: of the first 8 columns of a unit, and of the others.
const PLACES: [[usize; 2]; 2] = [[0, 2], [1, 3]];

/// Puts columns `8 i` to `8 i + 7` of 16 rows from `row` on into the panel.
#[target_feature(enable = "neon")]
fn put(columns: [uint8x16_t; 8], panel: &mut Panel, row: usize, i: usize) {
    for (quad, vectors) in quads(columns).into_iter().enumerate() {
        let block = &mut panel.weights[row / 8 + quad / 2][i / 2][quad % 2];
        for (vector, place) in vectors.into_iter().zip(PLACES[i % 2]) {
            // SAFETY: four times 16 bytes are a block.
            unsafe { vst1q_u8(block.0.as_chunks_mut::<16>().0[place].as_mut_ptr(), vector) };
        }
    }
}

/// Lays out 16 columns of 4 rows, or of 4 tokens.
#[target_feature(enable = "neon")]
fn rows(rows: [uint8x16_t; 4], out: &mut Block) {
    let (first, second) = out.0.split_at_mut(32);
    let rows = rows.map(|row| vreinterpretq_u64_u8(row));
    // SAFETY: each half is 32 bytes.
    unsafe {
        vst2q_u64(first.as_mut_ptr().cast(), uint64x2x2_t(rows[0], rows[1]));
        vst2q_u64(second.as_mut_ptr().cast(), uint64x2x2_t(rows[2], rows[3]));
    }
}

/// The same from 8 columns of 16 rows: for each 4 rows, the vectors of their block.
#[target_feature(enable = "neon")]
fn quads(c: [uint8x16_t; 8]) -> [[uint8x16_t; 2]; 4] {
    // Four columns of 4 rows a vector, rows 0 to 7 and 8 to 15; then 8 columns of 2 rows.
    let [even_low, even_high] = fours([c[0], c[2], c[4], c[6]]);
    let [odd_low, odd_high] = fours([c[1], c[3], c[5], c[7]]);
    let [low, high] = [[even_low, odd_low], [even_high, odd_high]];
    [zip(low[0][0], low[1][0]), zip(low[0][1], low[1][1]), zip(high[0][0], high[1][0]), zip(high[0][1], high[1][1])]
}

/// Four columns of 16 rows by turns: rows 0 to 3 and 4 to 7, then rows 8 to 11 and 12 to 15.
#[target_feature(enable = "neon")]
fn fours(c: [uint8x16_t; 4]) -> [[uint8x16_t; 2]; 2] {
    let ([a, b], [c, d]) = (zip(c[0], c[2]), zip(c[1], c[3]));
    [zip(a, c), zip(b, d)]
}

/// The bytes of `a` and `b` by turns.
#[target_feature(enable = "neon")]
#[inline]
fn zip(a: uint8x16_t, b: uint8x16_t) -> [uint8x16_t; 2] {
    [vzip1q_u8(a, b), vzip2q_u8(a, b)]
}

/// Two tokens with 8 rows, 8 columns: four sums.
macro_rules! smmla_tokens {
    ($x:literal, $w0:literal $w1:literal $w2:literal $w3:literal, $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "smmla ", $a, ".4s, ", $x, ".16b, ", $w0, ".16b\n", "smmla ", $b, ".4s, ", $x, ".16b, ", $w1, ".16b\n",
            "smmla ", $c, ".4s, ", $x, ".16b, ", $w2, ".16b\n", "smmla ", $d, ".4s, ", $x, ".16b, ", $w3, ".16b\n"
        )
    };
}

/// 8 columns of 8 rows with the first 4 tokens, which are in `$x0` and `$x1`.
macro_rules! smmla_low {
    ($x0:literal $x1:literal, $($w:literal)*) => {
        concat!(smmla_tokens!($x0, $($w)*, "v0" "v1" "v2" "v3"), smmla_tokens!($x1, $($w)*, "v4" "v5" "v6" "v7"))
    };
}

/// 8 columns of 8 rows with the other 4 tokens.
macro_rules! smmla_high {
    ($x0:literal $x1:literal, $($w:literal)*) => {
        concat!(smmla_tokens!($x0, $($w)*, "v8" "v9" "v10" "v11"), smmla_tokens!($x1, $($w)*, "v12" "v13" "v14" "v15"))
    };
}

/// 8 rows of a panel with 8 tokens, 16 columns an iteration.
#[target_feature(enable = "neon,i8mm")]
#[inline(never)]
fn matmat_8_neon_i8mm(w: &[Unit], x: &[Unit]) -> Sums {
    assert!(w.len() == x.len() && !w.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: the assertion: as many units of 128 bytes lie at either place, and not none. The registers are all named.
    unsafe {
        asm!("2:", "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], #64",
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{w}], #64",
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{w}], #64",
            "ld1 {{v20.16b, v21.16b, v22.16b, v23.16b}}, [{x}], #64",
            smmla_low!("v16" "v18", "v24" "v26" "v28" "v30"), smmla_high!("v20" "v22", "v24" "v26" "v28" "v30"),
            smmla_low!("v17" "v19", "v25" "v27" "v29" "v31"), smmla_high!("v21" "v23", "v25" "v27" "v29" "v31"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w = inout(reg) w.as_ptr() => _, x = inout(reg) x.as_ptr() => _, n = inout(reg) w.len() => _,
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7], inout("v8") acc[8], inout("v9") acc[9],
            inout("v10") acc[10], inout("v11") acc[11], inout("v12") acc[12], inout("v13") acc[13],
            inout("v14") acc[14], inout("v15") acc[15],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _, out("v30") _,
            out("v31") _, options(readonly, nostack));
    }
    by_token(acc)
}

/// 8 rows of a panel with the first 4 tokens of a unit: 2.0 cycles on the V1, 3.0 on the V2.
#[target_feature(enable = "neon,i8mm")]
#[inline(never)]
fn matmat_4_neon_i8mm(w: &[Unit], x: &[Unit]) -> Sums {
    assert!(w.len() == x.len() && !w.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: as above.
    unsafe {
        asm!("2:", "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], {unit}",
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{w}], #64",
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{w}], #64",
            smmla_low!("v16" "v18", "v24" "v26" "v28" "v30"), smmla_low!("v17" "v19", "v25" "v27" "v29" "v31"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w = inout(reg) w.as_ptr() => _, x = inout(reg) x.as_ptr() => _, n = inout(reg) w.len() => _,
            unit = in(reg) size_of::<Unit>(),
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _, options(readonly, nostack));
    }
    by_token(acc)
}

/// From sums of pairs of tokens, `[t][r], [t][r + 1], [t + 1][r], [t + 1][r + 1]`, to those of each.
#[target_feature(enable = "neon")]
#[inline]
fn by_token(acc: [int32x4_t; 16]) -> Sums {
    let acc = acc.map(|a| vreinterpretq_s64_s32(a));
    core::array::from_fn(|i| {
        let (token, quad) = (i / 2, i % 2);
        let pairs = &acc[token / 2 * 4 + 2 * quad..][..2];
        vreinterpretq_s32_s64(match token % 2 {
            0 => vzip1q_s64(pairs[0], pairs[1]),
            _ => vzip2q_s64(pairs[0], pairs[1]),
        })
    })
}
