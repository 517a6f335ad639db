//! B1 and TL, one token: rows in byte lanes, a table of partial sums for each group of columns.
//!
//! `tbl` takes its index from the whole vector and a nibble names 16 entries, so the tables fit at every length. A partial sum is
//! `base · hi + lo`, both kept as unsigned bytes with a bias, and 8 of either add up in a byte lane:
//!
//! - TL: both are symmetric, `-15..=15` and `-13..=13`, so that negating both negates the sum. A table of bias `b` holds
//!   `u = part + b`, and `|u - 2b|` is the same of the negated part: with the sign bit as `2b` (128 or 64) and 0 where it is
//!   clear, an absolute difference applies the sign, in SVE2 in one instruction with the addition (`uaba`). The biases of a
//!   step add up to `4·64 + 4·32`, which is 128 in a byte, and the parts to `-120..=120`.
//! - B1: `lo` is `0..=31` as it is, `hi` is `-16..=15` with a bias of 16: at most 248.
//!
//! What lost, by `llvm-mca-22` in cycles for 256 weights: signs by a mask of the whole byte (`asr`, `eor`) 13.0 for SVE on the
//! Neoverse V1 where the absolute difference takes 11.9; multiplying the parts by the sign (`mla`) 12.0 there and 14.7 on the V2;
//! inserting the sign into the index of 32 entries 12.2 and 13.2. NEON's `tbl` runs on one pipe of the V1's four and on two of
//! the V2's, SVE's on all.
use bitnet_kernel::tables::{B1_BASE, TL_BASE, TL_WEIGHTS};
use bitnet_kernel::{Block, Format};
use core::arch::aarch64::*;
use core::arch::asm;

/// Steps after which the 16-bit sums are emptied: 255 sums of a byte lane, each at most 255, fit them.
const FLUSH: usize = 255;

/// `[lo, hi][even rows, odd rows]`, each with its bias.
type Sums = [[[u16; 32]; 2]; 2];

/// A nibble of two vectors of rows: one group. `z28` and `z29` are its table, `mask` the register with its sign's bit.
///
/// Registers of a vector: nibbles, signs, and sums of bytes, low and high.
macro_rules! group {
    ($format:ident $isa:ident $place:ident, $nibble:ident, $lo:literal $hi:literal, $mask:literal) => {
        concat!(
            "ld1rqb {{z28.b}}, p2/z, [x2, #", $lo, "]\n ld1rqb {{z29.b}}, p2/z, [x2, #", $hi, "]\n",
            group!(@unpack $nibble 26), group!(@$format $isa $place $mask, 24 0 1),
            group!(@unpack $nibble 27), group!(@$format $isa $place $mask, 25 2 3),
        )
    };
    (@unpack low $n:literal) => { concat!("and z30.d, z", $n, ".d, z16.d\n") };
    (@unpack high $n:literal) => { concat!("lsr z30.b, z", $n, ".b, #4\n") };
    (@look_up $lo:literal $hi:literal) => {
        concat!("tbl z", $lo, ".b, {{z28.b}}, z30.b\n tbl z", $hi, ".b, {{z29.b}}, z30.b\n")
    };
    (@sign $mask:literal, $s:literal) => { concat!("and z30.d, z", $s, ".d, z", $mask, ".d\n") };
    (@negate $lo:literal $hi:literal) => {
        concat!("uabd z", $lo, ".b, p2/m, z", $lo, ".b, z30.b\n uabd z", $hi, ".b, p2/m, z", $hi, ".b, z30.b\n")
    };
    (@add $lo:literal $hi:literal) => {
        concat!("add z", $lo, ".b, z", $lo, ".b, z19.b\n add z", $hi, ".b, z", $hi, ".b, z31.b\n")
    };
    // The first group of a step is put where the others are added.
    (@b1 $isa:ident first $mask:literal, $s:literal $lo:literal $hi:literal) => { group!(@look_up $lo $hi) };
    (@b1 $isa:ident next $mask:literal, $s:literal $lo:literal $hi:literal) => {
        concat!(group!(@look_up 19 31), group!(@add $lo $hi))
    };
    (@tl $isa:ident first $mask:literal, $s:literal $lo:literal $hi:literal) => {
        concat!(group!(@look_up $lo $hi), group!(@sign $mask, $s), group!(@negate $lo $hi))
    };
    (@tl sve next $mask:literal, $s:literal $lo:literal $hi:literal) => {
        concat!(group!(@look_up 19 31), group!(@sign $mask, $s), group!(@negate 19 31), group!(@add $lo $hi))
    };
    (@tl sve2 next $mask:literal, $s:literal $lo:literal $hi:literal) => {
        concat!(
            group!(@look_up 19 31), group!(@sign $mask, $s),
            "uaba z", $lo, ".b, z19.b, z30.b\n uaba z", $hi, ".b, z31.b, z30.b\n",
        )
    };
}

/// A block of nibbles: two groups, whose tables lie at these places.
macro_rules! block {
    ($format:ident $isa:ident $place:ident, $at:literal, $t0:literal $t1:literal $t2:literal $t3:literal) => {
        concat!(
            "ld1b {{z26.b}}, p0/z, [x0, ", $at, "]\n ld1b {{z27.b}}, p1/z, [x1, ", $at, "]\n",
            block!(@$format $place),
            group!($format $isa $place, low, $t0 $t1, 17), group!($format $isa next, high, $t2 $t3, 18),
        )
    };
    // The signs of these two groups move to the top.
    (@tl first) => { "ld1b {{z24.b}}, p0/z, [x0]\n ld1b {{z25.b}}, p1/z, [x1]\n" };
    (@tl next) => { "lsl z24.b, z24.b, #2\n lsl z25.b, z25.b, #2\n" };
    (@b1 $place:ident) => { "" };
}

/// Adds the sums of bytes of a step to 16-bit ones: those of even rows and those of odd rows.
///
/// SVE has no addition that widens. There the first register takes whole pairs, `odd · 256 + even`, and [`split!`] parts them.
#[rustfmt::skip]
macro_rules! widen {
    (sve $sum:literal $even:literal $odd:literal) => {
        concat!(
            "add z", $even, ".h, z", $even, ".h, z", $sum, ".h\n lsr z19.h, z", $sum, ".h, #8\n",
            "add z", $odd, ".h, z", $odd, ".h, z19.h\n",
        )
    };
    (sve2 $sum:literal $even:literal $odd:literal) => {
        concat!(
            "uaddwb z", $even, ".h, z", $even, ".h, z", $sum, ".b\n",
            "uaddwt z", $odd, ".h, z", $odd, ".h, z", $sum, ".b\n",
        )
    };
}
macro_rules! split {
    (sve $($even:literal $odd:literal),+) => {
        concat!($("lsl z19.h, z", $odd, ".h, #8\n sub z", $even, ".h, z", $even, ".h, z19.h\n"),+)
    };
    (sve2 $($even:literal $odd:literal),+) => { "" };
}

/// A step: `x0` and `x1` are two vectors of rows of its first block, `x4` to `x7` the places of its nibbles, `x2` is the middle of
/// its tables. The sums of rows in the first vector are in `z4` to `z7` (low even, low odd, high even, high odd), those of the
/// second in `z20` to `z23`.
macro_rules! step {
    ($format:ident $isa:ident $blocks:literal) => {
        concat!(
            block!($format $isa first, "x4", -128 -112 -96 -80), block!($format $isa next, "x5", -64 -48 -32 -16),
            block!($format $isa next, "x6", 0 16 32 48), block!($format $isa next, "x7", 64 80 96 112),
            widen!($isa 0 4 5), widen!($isa 1 6 7), widen!($isa 2 20 21), widen!($isa 3 22 23),
            "add x0, x0, #64*", $blocks, "\n add x1, x1, #64*", $blocks, "\n add x2, x2, #256\n",
        )
    };
}

macro_rules! sums_of_lanes {
    ($(#[$attribute:meta])* $name:ident, $format:ident $isa:ident $feature:literal, $blocks:literal blocks, nibbles at
        $at0:literal $at1:literal $at2:literal $at3:literal) => {
        $(#[$attribute])*
        #[target_feature(enable = $feature)]
        #[inline(never)]
        fn $name(steps: &[[Block; $blocks]], tables: &[[Block; 4]], row: usize, sums: &mut Sums) {
            assert!(steps.len() == tables.len() && (1..=FLUSH).contains(&steps.len()) && row < 64);
            // SAFETY: the loop reads the bytes from `row` on of each block of `steps`, as many as predicates `p0` and `p1` say,
            // at most 64 - `row`, and a step's tables for each; it writes the sums of the same rows. Every register that it
            // changes is named.
            unsafe {
                asm!(
                    "ptrue p2.b", "cntb x13", "whilelo p0.b, xzr, x12", "whilelo p1.b, x13, x12",
                    "addvl x1, x0, #1", "add x2, x2, #128",
                    concat!("mov x4, #", $at0), concat!("mov x5, #", $at1), concat!("mov x6, #", $at2), concat!("mov x7, #", $at3),
                    "mov z16.b, #0x0f", "mov z17.b, #0x80", "mov z18.b, #0x40",
                    "mov z4.d, #0", "mov z5.d, #0", "mov z6.d, #0", "mov z7.d, #0",
                    "mov z20.d, #0", "mov z21.d, #0", "mov z22.d, #0", "mov z23.d, #0",
                    "2:",
                    step!($format $isa $blocks),
                    "subs x3, x3, #1", "b.ne 2b",
                    split!($isa 4 5, 6 7, 20 21, 22 23),
                    // A vector has half as many 16-bit lanes, and as many rows of either kind.
                    "lsr x12, x12, #1", "lsr x13, x13, #1", "whilelo p0.h, xzr, x12", "whilelo p1.h, x13, x12",
                    "mov x4, #32", "mov x5, #64", "mov x6, #96", "addvl x1, x8, #1",
                    "st1h {{z4.h}}, p0, [x8]", "st1h {{z5.h}}, p0, [x8, x4, lsl #1]",
                    "st1h {{z6.h}}, p0, [x8, x5, lsl #1]", "st1h {{z7.h}}, p0, [x8, x6, lsl #1]",
                    "st1h {{z20.h}}, p1, [x1]", "st1h {{z21.h}}, p1, [x1, x4, lsl #1]",
                    "st1h {{z22.h}}, p1, [x1, x5, lsl #1]", "st1h {{z23.h}}, p1, [x1, x6, lsl #1]",
                    inout("x0") steps.as_ptr().byte_add(row) => _, out("x1") _, inout("x2") tables.as_ptr() => _,
                    inout("x3") steps.len() => _, out("x4") _, out("x5") _, out("x6") _, out("x7") _,
                    in("x8") core::ptr::from_mut(sums).byte_add(row), inout("x12") 64 - row => _, out("x13") _,
                    out("p0") _, out("p1") _, out("p2") _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _,
                    out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                    out("v30") _, out("v31") _, options(nostack),
                );
            }
        }
    };
}

sums_of_lanes!(
    /// 72 operations for 24 columns: 11.9 cycles for 256 weights on the Neoverse V1.
    matvec_tl_sve, tl sve "sve", 5 blocks, nibbles at 64 128 192 256
);
sums_of_lanes!(
    /// 55 operations for 24 columns: 9.3 cycles for 256 weights on the Neoverse V2.
    matvec_tl_sve2, tl sve2 "sve2", 5 blocks, nibbles at 64 128 192 256
);
sums_of_lanes!(matvec_b1_sve, b1 sve "sve", 4 blocks, nibbles at 0 64 128 192);
sums_of_lanes!(matvec_b1_sve2, b1 sve2 "sve2", 4 blocks, nibbles at 0 64 128 192);

/// `Σ w·x` of the 64 rows of a tile of TL.
#[target_feature(enable = "sve")]
pub(crate) fn tile_tl_sve(steps: &[[Block; 5]], tables: &[Block]) -> [i32; 64] {
    tile::<5, TL_BASE>(steps, tables, [128, 128], |w, t, row, sums| matvec_tl_sve(w, t, row, sums))
}

/// [`tile_tl_sve`] with SVE2.
#[target_feature(enable = "sve2")]
pub(crate) fn tile_tl_sve2(steps: &[[Block; 5]], tables: &[Block]) -> [i32; 64] {
    tile::<5, TL_BASE>(steps, tables, [128, 128], |w, t, row, sums| matvec_tl_sve2(w, t, row, sums))
}

/// `Σ b·x` of the 64 rows of a tile of B1, with the bits `b`.
#[target_feature(enable = "sve")]
pub(crate) fn tile_b1_sve(steps: &[[Block; 4]], tables: &[Block]) -> [i32; 64] {
    tile::<4, B1_BASE>(steps, tables, [0, 128], |w, t, row, sums| matvec_b1_sve(w, t, row, sums))
}

/// [`tile_b1_sve`] with SVE2.
#[target_feature(enable = "sve2")]
pub(crate) fn tile_b1_sve2(steps: &[[Block; 4]], tables: &[Block]) -> [i32; 64] {
    tile::<4, B1_BASE>(steps, tables, [0, 128], |w, t, row, sums| matvec_b1_sve2(w, t, row, sums))
}

/// The sums of a tile, two vectors of rows at a time. `biases` are those of the parts, low and high, in every step.
#[target_feature(enable = "sve")]
#[inline]
fn tile<const BLOCKS: usize, const BASE: i16>(
    steps: &[[Block; BLOCKS]],
    tables: &[Block],
    biases: [i32; 2],
    add: impl Fn(&[[Block; BLOCKS]], &[[Block; 4]], usize, &mut Sums),
) -> [i32; 64] {
    let two_vectors = 2 * vector_bytes();
    let mut y = [0; 64];
    for (steps, tables) in steps.chunks(FLUSH).zip(tables.as_chunks().0.chunks(FLUSH)) {
        let mut sums = [[[0; 32]; 2]; 2];
        for row in (0..64).step_by(two_vectors) {
            add(steps, tables, row, &mut sums);
        }
        let bias = biases.map(|bias| bias * steps.len() as i32);
        let [lo, hi] = sums;
        for (i, y) in y.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            for odd in 0..2 {
                y[odd] += i32::from(BASE) * (i32::from(hi[odd][i]) - bias[1]) + i32::from(lo[odd][i]) - bias[0];
            }
        }
    }
    y
}

/// Bytes of a vector.
#[target_feature(enable = "sve")]
pub(crate) fn vector_bytes() -> usize {
    let bytes;
    // SAFETY: reads a constant of the CPU.
    unsafe { asm!("cntb {}", out(reg) bytes, options(pure, nomem, nostack, preserves_flags)) };
    bytes
}

// ---------------------------------------------------------------------------------------------------------------------
// The tables, in NEON.

/// Fills the tables of a vector of activations.
pub(crate) fn prepare(format: Format, values: &[i8], tables: &mut [Block]) {
    match format {
        // SAFETY: NEON is part of every CPU of this architecture.
        Format::TL => unsafe { prepare_tl_neon(values, tables) },
        // SAFETY: as above.
        Format::B1 => unsafe { prepare_b1_neon(values, tables) },
        _ => {}
    }
}

/// Where a group's sums have their biases: those of even groups of TL are signed by bit 7, the others by bit 6.
const TL_BIASES: [i16; 2] = [64, 32];

#[target_feature(enable = "neon")]
fn prepare_tl_neon(values: &[i8], tables: &mut [Block]) {
    const COEFFICIENTS: [[[i16; 8]; 2]; 3] =
        [coefficients(Format::TL, 0), coefficients(Format::TL, 1), coefficients(Format::TL, 2)];
    for (x, out) in values.as_chunks::<6>().0.iter().zip(tables) {
        for (i, x) in x.as_chunks::<3>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            // v / 31 rounded to the nearest: 1057 / 2^15 is close enough for |v| <= 384, and there are no halves.
            let hi = v.map(|v| vqrdmulhq_n_s16(v, 1057));
            let lo = [0, 1].map(|h| vmlsq_n_s16(v[h], hi[h], TL_BASE));
            let biased = |v: [int16x8_t; 2]| v.map(|v| vaddq_s16(v, vdupq_n_s16(TL_BIASES[i])));
            store_table(out, i, biased(lo), biased(hi));
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
    for (x, out) in values.as_chunks::<8>().0.iter().zip(tables) {
        for (i, x) in x.as_chunks::<4>().0.iter().enumerate() {
            let v = group_sums(&COEFFICIENTS, x);
            let hi = v.map(|v| vaddq_s16(vshrq_n_s16::<5>(v), vdupq_n_s16(16)));
            let lo = v.map(|v| vandq_s16(v, vdupq_n_s16(B1_BASE - 1)));
            store_table(out, i, lo, hi);
        }
    }
}

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
