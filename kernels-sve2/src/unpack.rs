//! Weights as bytes, in the order in which `smmla` takes them. NEON, for it is done once for many tokens.
use bitnet_kernel::tables::TL_WEIGHTS;
use bitnet_kernel::{Block, Format, Matrix};
use core::arch::aarch64::*;
use core::ops::Range;

/// Rows of a panel.
pub(crate) const ROWS: usize = 64;
/// Columns of a panel, at most.
pub(crate) const COLS: usize = 256;

/// Codes of 64 rows: `[8 columns][pair of rows]`, each 8 bytes of the first row and 8 of the second.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Panel([[[u8; 16]; ROWS / 2]; COLS / 8]);

impl Panel {
    /// All zeros.
    pub(crate) const ZERO: Self = Self([[[0; 16]; ROWS / 2]; COLS / 8]);
}

/// What a code of a panel exceeds its weight by.
pub(crate) const fn bias(format: Format) -> i32 {
    match format {
        // A bit of B1 is 0 or 2 here.
        Format::B1 | Format::T2 | Format::TL => 1,
        Format::I4 => 8,
        _ => 0,
    }
}

/// Unpacks some steps of at most [`ROWS`] rows. What is in `panel` of other rows and columns stays.
pub(crate) fn unpack(w: Matrix<'_>, steps: Range<usize>, panel: &mut Panel) {
    let blocks = w.format().step_blocks();
    for (i, tile) in w.tiles().enumerate() {
        let tile = &tile[steps.start * blocks..steps.end * blocks];
        // SAFETY: NEON is part of every CPU of this architecture.
        unsafe {
            match w.format() {
                Format::B1 => unpack_b1_neon(tile.as_chunks().0, panel),
                Format::T2 => unpack_planes_neon::<2>(tile.as_chunks().0, 2 * i, panel),
                Format::TL => unpack_tl_neon(tile.as_chunks().0, panel),
                Format::I4 => unpack_planes_neon::<4>(tile.as_chunks().0, 2 * i, panel),
                Format::I8 => unpack_planes_neon::<8>(tile.as_chunks().0, 2 * i, panel),
                _ => panic!("{} is not multiplied by this method", w.format().name()),
            }
        }
    }
}

/// The 16 bytes of a block from `at` on.
#[target_feature(enable = "neon")]
#[inline]
fn load(block: &Block, at: usize) -> uint8x16_t {
    let bytes: &[u8; 16] = block.0[at..].first_chunk().expect("within the block");
    // SAFETY: 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Writes 8 columns of a pair of rows.
#[target_feature(enable = "neon")]
#[inline]
fn store(out: &mut [u8; 16], v: uint8x16_t) {
    // SAFETY: 16 bytes.
    unsafe { vst1q_u8(out.as_mut_ptr(), v) };
}

/// A vector of constants.
#[target_feature(enable = "neon")]
#[inline]
fn constants(bytes: &[u8; 16]) -> uint8x16_t {
    // SAFETY: 16 bytes.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Four rows with codes of `BITS` bits, to the pairs of rows from `pair` on.
#[target_feature(enable = "neon")]
fn unpack_planes_neon<const BITS: i32>(steps: &[[Block; 4]], pair: usize, panel: &mut Panel) {
    let planes = 8 / BITS as usize;
    let mask = vdupq_n_u8(u8::MAX >> (8 - BITS));
    for (step, out) in steps.iter().zip(panel.0.chunks_exact_mut(8 * planes)) {
        for (i, rows) in step.as_chunks::<2>().0.iter().enumerate() {
            for quarter in 0..4 {
                let rows = [0, 1].map(|r| vreinterpretq_u64_u8(load(&rows[r], 16 * quarter)));
                let mut v =
                    [vzip1q_u64(rows[0], rows[1]), vzip2q_u64(rows[0], rows[1])].map(|v| vreinterpretq_u8_u64(v));
                for plane in 0..planes {
                    for half in 0..2 {
                        let codes = if BITS == 8 { v[half] } else { vandq_u8(v[half], mask) };
                        store(&mut out[8 * plane + 2 * quarter + half][pair + i], codes);
                        v[half] = vshrq_n_u8::<BITS>(v[half]);
                    }
                }
            }
        }
    }
}

/// 64 rows of TL: each of three columns is looked up by the nibble as `w + 1`, and reflected at 1 where the sign is set.
#[target_feature(enable = "neon")]
fn unpack_tl_neon(steps: &[[Block; 5]], panel: &mut Panel) {
    const CODES: [[u8; 16]; 3] = {
        let mut codes = [[0; 16]; 3];
        let mut i = 0;
        while i < 48 {
            codes[i % 3][i / 3] = (TL_WEIGHTS[i / 3][i % 3] + 1) as u8;
            i += 1;
        }
        codes
    };
    let tables = [constants(&CODES[0]), constants(&CODES[1]), constants(&CODES[2])];
    for (step, out) in steps.iter().zip(panel.0.as_chunks_mut::<3>().0) {
        for quarter in 0..4 {
            let signs = load(&step[0], 16 * quarter);
            let mut columns = [vdupq_n_u8(0); 24];
            for group in 0..8 {
                let v = load(&step[1 + group / 2], 16 * quarter);
                let nibbles = if group % 2 == 0 { vandq_u8(v, vdupq_n_u8(15)) } else { vshrq_n_u8::<4>(v) };
                let negative = vandq_u8(vtstq_u8(signs, vdupq_n_u8(0x80 >> group)), vdupq_n_u8(2));
                for c in 0..3 {
                    columns[3 * group + c] = vabdq_u8(vqtbl1q_u8(tables[c], nibbles), negative);
                }
            }
            for (columns, out) in columns.as_chunks::<8>().0.iter().zip(&mut *out) {
                let pairs = &mut out.as_chunks_mut::<8>().0[quarter];
                transpose(columns).into_iter().zip(pairs).for_each(|(v, out)| store(out, v));
            }
        }
    }
}

/// 8 columns of 16 rows as 8 pairs of rows.
#[target_feature(enable = "neon")]
#[inline]
fn transpose(c: &[uint8x16_t; 8]) -> [uint8x16_t; 8] {
    // Columns 0 4, 2 6, 1 5, 3 7; then 0 2 4 6, 1 3 5 7; then all. The first half of the rows is that of each result.
    let zip = |a, b| [vzip1q_u8(a, b), vzip2q_u8(a, b)];
    let mut out = [vdupq_n_u8(0); 8];
    let pairs = [zip(c[0], c[4]), zip(c[2], c[6]), zip(c[1], c[5]), zip(c[3], c[7])];
    for i in 0..2 {
        let (even, odd) = (zip(pairs[0][i], pairs[1][i]), zip(pairs[2][i], pairs[3][i]));
        for j in 0..2 {
            let all = zip(even[j], odd[j]);
            out[4 * i + 2 * j] = all[0];
            out[4 * i + 2 * j + 1] = all[1];
        }
    }
    out
}

/// 64 rows of B1: a byte is 8 columns of one row.
#[target_feature(enable = "neon")]
fn unpack_b1_neon(steps: &[[Block; 4]], panel: &mut Panel) {
    let bits = constants(&[1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128]);
    let first_pair = constants(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]);
    let blocks = steps.as_flattened();
    for (block, out) in blocks.iter().zip(&mut panel.0) {
        for (quarter, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let v = load(block, 16 * quarter);
            for (pair, out) in out.iter_mut().enumerate() {
                let bytes = vqtbl1q_u8(v, vaddq_u8(first_pair, vdupq_n_u8(2 * pair as u8)));
                store(out, vandq_u8(vtstq_u8(bytes, bits), vdupq_n_u8(2)));
            }
        }
    }
}
