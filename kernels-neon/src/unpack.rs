//! B1 and TL as bytes, in the order in which `smmla` takes them. NEON, for it is done once for many tokens.
use bitnet_kernel::tables::TL_WEIGHTS;
use bitnet_kernel::{Block, Format};
use core::arch::aarch64::*;

/// Rows of a panel.
pub(crate) const ROWS: usize = 16;
/// Columns of a panel, at most.
pub(crate) const COLS: usize = 1024;

/// Codes of 16 rows: `[8 columns][pair of rows]`, each 8 bytes of the first row and 8 of the second.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct Panel([[[u8; 16]; ROWS / 2]; COLS / 8]);

impl Panel {
    /// All zeros.
    pub(crate) const ZERO: Self = Self([[[0; 16]; ROWS / 2]; COLS / 8]);

    /// Where four rows begin. Their next 8 columns are 128 bytes on.
    pub(crate) fn quad(&self, quad: usize) -> *const u8 {
        self.0.as_ptr().cast::<u8>().wrapping_add(32 * quad)
    }
}

/// What turns sums of codes into sums of weights, `scale · Σcx - bias · Σx`: of the bytes of a panel, where a bit of B1 is 0 or
/// -1, and of those that [`crate::batch`] unpacks itself.
pub(crate) const fn scale_and_bias(format: Format) -> (i32, i32) {
    match format {
        Format::B1 => (-2, 1),
        Format::T2 | Format::TL => (1, 1),
        Format::I4 => (1, 8),
        _ => (1, 0),
    }
}

/// Unpacks 16 rows of some steps of a tile, at most [`COLS`] columns. What is in `panel` of other columns stays.
pub(crate) fn unpack(format: Format, tile: &[Block], sixteen: usize, panel: &mut Panel) {
    // SAFETY: NEON is part of every CPU of this architecture.
    unsafe {
        match format {
            Format::B1 => unpack_b1_neon(tile.as_chunks().0, sixteen, panel),
            _ => unpack_tl_neon(tile.as_chunks().0, sixteen, panel),
        }
    }
}

/// The 16 bytes of a block that are of these rows.
#[target_feature(enable = "neon")]
#[inline]
fn load(block: &Block, sixteen: usize) -> uint8x16_t {
    let bytes = &block.0.as_chunks::<16>().0[sixteen];
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

/// TL: each of three columns is looked up by the nibble as `w + 1`, and reflected at 1 where the sign is set.
///
/// Nibbles are transposed and not the columns, which are three times as many: a pair of rows has the first columns of 8 groups,
/// then their second and third ones, and activations come in this order.
#[target_feature(enable = "neon")]
fn unpack_tl_neon(steps: &[[Block; 5]], sixteen: usize, panel: &mut Panel) {
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
    let top = vdupq_n_u8(0x80);
    for (step, [first, second, third]) in steps.iter().zip(panel.0.as_chunks_mut::<3>().0) {
        let signs = load(&step[0], sixteen);
        // Two groups, with their signs above the nibbles. Loops are written out, for the compiler leaves them as they are.
        macro_rules! groups {
            ($block:literal $bit:literal $next:literal) => {{
                let v = load(&step[$block], sixteen);
                let (low, high) = (vandq_u8(v, vdupq_n_u8(15)), vshrq_n_u8::<4>(v));
                (vbslq_u8(top, vshlq_n_u8::<$bit>(signs), low), vbslq_u8(top, vshlq_n_u8::<$next>(signs), high))
            }};
        }
        let ((a, b), (c, d), (e, f), (g, h)) = (groups!(1 0 1), groups!(2 2 3), groups!(3 4 5), groups!(4 6 7));
        let [a, b, c, d, e, f, g, h] = transpose([a, b, c, d, e, f, g, h]);
        macro_rules! put {
            ($($pair:literal $v:ident),+) => { $(
                let (nibbles, negative) = (vandq_u8($v, vdupq_n_u8(15)), vshrq_n_u8::<6>($v));
                store(&mut first[$pair], vabdq_u8(vqtbl1q_u8(tables[0], nibbles), negative));
                store(&mut second[$pair], vabdq_u8(vqtbl1q_u8(tables[1], nibbles), negative));
                store(&mut third[$pair], vabdq_u8(vqtbl1q_u8(tables[2], nibbles), negative));
            )+ };
        }
        put!(0 a, 1 b, 2 c, 3 d, 4 e, 5 f, 6 g, 7 h);
    }
}

/// 8 groups of 16 rows as 8 pairs of rows.
#[target_feature(enable = "neon")]
#[inline]
fn transpose([a, b, c, d, e, f, g, h]: [uint8x16_t; 8]) -> [uint8x16_t; 8] {
    let zip = |a, b| (vzip1q_u8(a, b), vzip2q_u8(a, b));
    // Even and odd groups, of the first and the second half of the rows: two of them, four, then all.
    let ((ae, ae2), (cg, cg2), (bf, bf2), (dh, dh2)) = (zip(a, e), zip(c, g), zip(b, f), zip(d, h));
    let ((even, even1), (odd, odd1)) = (zip(ae, cg), zip(bf, dh));
    let ((even2, even3), (odd2, odd3)) = (zip(ae2, cg2), zip(bf2, dh2));
    let ((a, b), (c, d), (e, f), (g, h)) = (zip(even, odd), zip(even1, odd1), zip(even2, odd2), zip(even3, odd3));
    [a, b, c, d, e, f, g, h]
}

/// B1: a byte is 8 columns of one row. It is repeated by `zip`, of which the Neoverse V1 does four a cycle, and one `tbl`.
#[target_feature(enable = "neon")]
fn unpack_b1_neon(steps: &[[Block; 4]], sixteen: usize, panel: &mut Panel) {
    let bits = constants(&[1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128]);
    for (block, out) in steps.as_flattened().iter().zip(&mut panel.0) {
        let v = load(block, sixteen);
        // Every byte twice, four times, eight times.
        let twice = (vreinterpretq_u16_u8(vzip1q_u8(v, v)), vreinterpretq_u16_u8(vzip2q_u8(v, v)));
        macro_rules! put {
            ($($pair:literal $next:literal = $four:ident $v:expr),+) => { $(
                let four = vreinterpretq_u32_u16($four($v, $v));
                store(&mut out[$pair], vtstq_u8(vreinterpretq_u8_u32(vzip1q_u32(four, four)), bits));
                store(&mut out[$next], vtstq_u8(vreinterpretq_u8_u32(vzip2q_u32(four, four)), bits));
            )+ };
        }
        put!(0 1 = vzip1q_u16 twice.0, 2 3 = vzip2q_u16 twice.0, 4 5 = vzip1q_u16 twice.1, 6 7 = vzip2q_u16 twice.1);
    }
}
