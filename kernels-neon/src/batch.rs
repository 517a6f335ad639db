//! Several tokens at once by `smmla`, which multiplies two tokens by two rows, 8 columns of each.
//!
//! The sums of 16 tokens and 4 rows, or of up to 8 tokens and 8 rows, stay in registers over some thousand columns, whose
//! activations were brought into the order in which the loop takes them. T2, I4 and I8 are unpacked in registers; B1 and TL, whose
//! rows lie in lanes, are unpacked to bytes by [`crate::unpack`] first, 16 rows at a time. `smmla` of longer vectors, in SVE, is
//! no faster on the Neoverse V1, which has half as many of them a cycle.
//!
//! By `llvm-mca-22` the loops take 2.5 cycles for 256 products of T2 and 16 tokens, on the Neoverse V1 and V2, and 2.9 of 8 tokens;
//! with gathering and the sums of each panel, 3.2 and 3.3.
//!
//! What lost: all formats unpacked to panels of 64 rows by 256 columns and one loop in SVE over them, 4.3 to 6.9
//! cycles for 256 products of 8 tokens, half of them outside that loop (2.0 on the Neoverse V1, 2.4 on the V2).
use crate::unpack::{self, Panel};
use bitnet_kernel::{Activations, Format, Geometry, Matrix};
use core::arch::aarch64::*;
use core::arch::asm;
use core::ops::Range;

/// Tokens that are multiplied together, at most.
const TOKENS: usize = 16;

/// Activations: `[8 columns][pair of tokens]`, each 8 bytes of the first token and 8 of the second. 1024 columns of 16 tokens, or
/// more of fewer.
#[repr(C, align(64))]
struct Columns([[u8; 16]; 8 * 128]);

/// Sums of a loop: `[pair of tokens][pair of rows]`, each of the first token and then of the second. Of 8 pairs of tokens there are
/// 2 pairs of rows, of fewer 4.
type Sums = [int32x4_t; 16];

/// A loop: two places of weights, 4 rows each, activations, and how often it goes round.
type Dots = unsafe fn(w: [*const u8; 2], x: &[[u8; 16]], n: usize) -> Sums;

/// The fewest tokens that `neon-i8mm` multiplies together, for which no tables are read. From so many on it pays: a format in lanes
/// has to be unpacked first.
pub const fn tokens_min(format: Format) -> usize {
    match format.geometry() {
        _ if format.is_grouped() => 3,
        Geometry::Lanes => 4,
        _ => 2,
    }
}

/// `w` times every token. The entrance checks were made.
#[target_feature(enable = "neon,i8mm")]
pub(crate) fn products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    if w.rows() == 0 {
        return;
    }
    let (_, bias) = unpack::scale_and_bias(w.format());
    for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
        y.fill(-bias * x.sum());
    }
    let mut memory = (Columns([[0; 16]; 8 * 128]), Panel::ZERO);
    let (mut tokens, mut y) = (tokens, y);
    while !tokens.is_empty() {
        // 12 tokens are 8 and 4.
        let together = if tokens.len() > 12 { TOKENS.min(tokens.len()) } else { 8.min(tokens.len()) };
        let (these, others) = tokens.split_at(together);
        let (sums, other_sums) = y.split_at_mut(together * w.rows());
        add_products(w, these, sums, &mut memory);
        (tokens, y) = (others, other_sums);
    }
}

/// Adds the products of at most [`TOKENS`] tokens.
#[target_feature(enable = "neon,i8mm")]
fn add_products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32], memory: &mut (Columns, Panel)) {
    let (Columns(xs), panel) = memory;
    let pairs = match tokens.len() {
        1..=2 => 1,
        3..=4 => 2,
        5..=8 => 4,
        _ => 8,
    };
    let quads = if pairs == 8 { 1 } else { 2 };
    let format = w.format();
    let (scale, _) = unpack::scale_and_bias(format);
    let dots = dots(format, pairs);
    let lanes = format.geometry() == Geometry::Lanes;
    let cols = if lanes { unpack::COLS } else { 8 * xs.len() / pairs };
    let (panel_steps, blocks) = (cols / format.step_cols(), format.step_blocks());
    for first in (0..w.steps()).step_by(panel_steps) {
        let steps = first..w.steps().min(first + panel_steps);
        let x = gather(format, tokens, pairs, &steps, xs);
        let mut tiles = w.tiles().map(|tile| &tile[steps.start * blocks..steps.end * blocks]);
        let mut row = 0;
        while let Some(tile) = tiles.next() {
            if lanes {
                for first in (row..w.rows().min(row + 64)).step_by(unpack::ROWS) {
                    unpack::unpack(format, tile, (first - row) / unpack::ROWS, panel);
                    for quad in (0..4).step_by(quads).take_while(|quad| first + 4 * quad < w.rows()) {
                        let place = panel.quad(quad);
                        // SAFETY: a panel has 16 rows of as many columns as `x`, and `x` an even number of eights.
                        let sums = unsafe { dots([place, place.wrapping_add(32)], x, x.len() / (2 * pairs)) };
                        add(&sums, scale, tokens.len(), first + 4 * quad, y);
                    }
                }
                row += 64;
            } else {
                let second = if quads == 2 { tiles.next().unwrap_or(tile) } else { tile };
                // SAFETY: each tile is as many steps, which are as many columns as `x`, and four iterations.
                let sums = unsafe { dots([tile.as_ptr().cast(), second.as_ptr().cast()], x, 4 * steps.len()) };
                add(&sums, scale, tokens.len(), row, y);
                row += 4 * quads;
            }
        }
    }
}

/// Adds `scale` times the sums to the products of the rows from `row` on, 4 or 8 or what there is of them.
#[target_feature(enable = "neon")]
fn add(sums: &Sums, scale: i32, tokens: usize, row: usize, y: &mut [i32]) {
    let (height, quads) = (y.len() / tokens, if tokens > 8 { 1 } else { 2 });
    for (t, y) in y.chunks_exact_mut(height).enumerate() {
        let y = &mut y[row..height.min(row + 4 * quads)];
        let mut rows = [0; 8];
        let whole = y.len() == 4 * quads;
        let to = if whole { y.as_mut_ptr() } else { rows.as_mut_ptr() };
        for quad in 0..quads {
            let [a, b] = [0, 1].map(|i| vreinterpretq_s64_s32(sums[(t / 2 * quads + quad) * 2 + i]));
            let sum = vreinterpretq_s32_s64(if t % 2 == 0 { vzip1q_s64(a, b) } else { vzip2q_s64(a, b) });
            // SAFETY: so many rows are of `y`, or they are not and these are.
            unsafe {
                let to = to.add(4 * quad);
                vst1q_s32(to, vmlaq_n_s32(vld1q_s32(to), sum, scale));
            }
        }
        if !whole {
            y.iter_mut().zip(rows).for_each(|(y, sum)| *y += sum);
        }
    }
}

/// Brings the columns of some steps of the tokens into the order of the loop of this format, the last token in place of those
/// that are missing in `pairs`.
#[target_feature(enable = "neon")]
fn gather<'a>(
    format: Format,
    tokens: &[Activations<'_>],
    pairs: usize,
    steps: &Range<usize>,
    out: &'a mut [[u8; 16]],
) -> &'a [[u8; 16]] {
    let cols = steps.start * format.step_cols()..steps.end * format.step_cols();
    let eights = cols.len() / 8;
    let out = &mut out[..eights.next_multiple_of(2) * pairs];
    // The second half of an iteration that has one column of eight.
    out[eights * pairs..].fill([0; 16]);
    for pair in 0..pairs {
        let [a, b] = [0, 1].map(|i| {
            let values = tokens[(2 * pair + i).min(tokens.len() - 1)].values();
            &values[cols.start..cols.end.min(values.len())]
        });
        let out = &mut out[..eights * pairs];
        match format {
            Format::T2 => gather_planes::<4, 4>(a, b, pair, pairs, out),
            Format::I4 => gather_planes::<2, 4>(a, b, pair, pairs, out),
            Format::TL => gather_thirds(a, b, pair, pairs, out),
            _ => gather_planes::<1, 1>(a, b, pair, pairs, out),
        }
    }
    out
}

/// The order of codes in `PLANES` planes of `QUARTERS` times 16 columns: 8 columns of each plane, then the next 8.
#[target_feature(enable = "neon")]
fn gather_planes<const PLANES: usize, const QUARTERS: usize>(
    a: &[i8],
    b: &[i8],
    pair: usize,
    pairs: usize,
    out: &mut [[u8; 16]],
) {
    let n = a.len() / (16 * PLANES * QUARTERS);
    assert!(a.len() == b.len() && pair < pairs && out.len() >= 2 * PLANES * QUARTERS * n * pairs);
    // SAFETY: of `a` and `b`, `n` times so many columns are read, which both have; of `out`, whose length was checked, one of
    // `pairs` places is written for 8 of them.
    unsafe {
        let (mut a, mut b, mut out) = (a.as_ptr(), b.as_ptr(), out.as_mut_ptr().add(pair));
        for _ in 0..n {
            for plane in 0..PLANES {
                let mut place = out.add(plane * pairs);
                for _ in 0..QUARTERS {
                    let (x, y) = (vld1q_s64(a.cast()), vld1q_s64(b.cast()));
                    vst1q_s64(place.cast(), vzip1q_s64(x, y));
                    vst1q_s64(place.add(PLANES * pairs).cast(), vzip2q_s64(x, y));
                    (a, b, place) = (a.add(16), b.add(16), place.add(2 * PLANES * pairs));
                }
            }
            out = out.add(2 * PLANES * QUARTERS * pairs);
        }
    }
}

/// The order of [`unpack`] for TL: the first columns of 8 groups, then their second and third ones. Zeros past the values, which
/// the last step of a group of a grouped format may have (see [`Activations::group`]).
#[target_feature(enable = "neon")]
fn gather_thirds(a: &[i8], b: &[i8], pair: usize, pairs: usize, out: &mut [[u8; 16]]) {
    let (whole, rest) = a.as_chunks::<24>();
    assert_eq!(a.len(), b.len());
    let put = |a: &[i8; 24], b: &[i8; 24], out: &mut [[u8; 16]]| {
        // SAFETY: 24 bytes.
        let (a, b) = unsafe { (vld3_s8(a.as_ptr()), vld3_s8(b.as_ptr())) };
        for (i, (a, b)) in [(a.0, b.0), (a.1, b.1), (a.2, b.2)].into_iter().enumerate() {
            let out = &mut out[i * pairs + pair];
            // SAFETY: 16 bytes.
            unsafe { vst1q_u8(out.as_mut_ptr(), vreinterpretq_u8_s8(vcombine_s8(a, b))) };
        }
    };
    let mut out = out.chunks_exact_mut(3 * pairs);
    for ((a, b), out) in whole.iter().zip(b.as_chunks::<24>().0).zip(&mut out) {
        put(a, b, out);
    }
    if let Some(out) = out.next() {
        let [a, b] = [rest, b.as_chunks::<24>().1].map(|rest| {
            let mut padded = [0; 24];
            padded[..rest.len()].copy_from_slice(rest);
            padded
        });
        put(&a, &b, out);
    }
}

/// The loop for this format, and `pairs` of tokens.
fn dots(format: Format, pairs: usize) -> Dots {
    let [one, two, four, eight]: [Dots; 4] = match format {
        Format::T2 => [matmat_t2_1_i8mm, matmat_t2_2_i8mm, matmat_t2_4_i8mm, matmat_t2_8_i8mm],
        Format::I4 => [matmat_i4_1_i8mm, matmat_i4_2_i8mm, matmat_i4_4_i8mm, matmat_i4_8_i8mm],
        Format::I8 => [matmat_i8_1_i8mm, matmat_i8_2_i8mm, matmat_i8_4_i8mm, matmat_i8_8_i8mm],
        Format::B1 | Format::TL => [matmat_bytes_1_i8mm, matmat_bytes_2_i8mm, matmat_bytes_4_i8mm, matmat_bytes_8_i8mm],
        _ => panic!("{} is not multiplied by this method", format.name()),
    };
    match pairs {
        1 => one,
        2 => two,
        4 => four,
        _ => eight,
    }
}

/// The products of `$pairs` pairs of tokens, at the `$k`th place of an iteration, and the rows whose codes are in `v24` to `v27`, or in
/// others that are named: into `v0` to `v15`.
macro_rules! dots {
    ($pairs:tt $k:literal) => { dots!($pairs $k (24 25 26 27)) };
    (1 $k:literal $w:tt) => { dots!(@8 16, $k 16 0, $w 0 1 2 3) };
    (2 $k:literal $w:tt) => { concat!(dots!(@8 16, $k 32 0, $w 0 1 2 3), dots!(@8 17, $k 32 16, $w 4 5 6 7)) };
    (4 $k:literal $w:tt) => {
        concat!(
            dots!(@8 16, $k 64 0, $w 0 1 2 3), dots!(@8 17, $k 64 16, $w 4 5 6 7),
            dots!(@8 18, $k 64 32, $w 8 9 10 11), dots!(@8 19, $k 64 48, $w 12 13 14 15),
        )
    };
    (8 $k:literal $w:tt) => {
        concat!(
            dots!(@4 16, $k 128 0, $w 0 1), dots!(@4 17, $k 128 16, $w 2 3), dots!(@4 18, $k 128 32, $w 4 5),
            dots!(@4 19, $k 128 48, $w 6 7), dots!(@4 16, $k 128 64, $w 8 9), dots!(@4 17, $k 128 80, $w 10 11),
            dots!(@4 18, $k 128 96, $w 12 13), dots!(@4 19, $k 128 112, $w 14 15),
        )
    };
    (@8 $x:literal, $k:literal $bytes:literal $at:literal, ($w0:literal $w1:literal $w2:literal $w3:literal)
        $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            dots!(@4 $x, $k $bytes $at, ($w0 $w1 $w2 $w3) $a $b), "smmla v", $c, ".4s, v", $x, ".16b, v", $w2, ".16b\n",
            "smmla v", $d, ".4s, v", $x, ".16b, v", $w3, ".16b\n",
        )
    };
    (@4 $x:literal, $k:literal $bytes:literal $at:literal, ($w0:literal $w1:literal $w2:literal $w3:literal)
        $a:literal $b:literal) => {
        concat!(
            "ldr q", $x, ", [x1, #", $k, "*", $bytes, "+", $at, "]\n smmla v", $a, ".4s, v", $x, ".16b, v", $w0, ".16b\n",
            "smmla v", $b, ".4s, v", $x, ".16b, v", $w1, ".16b\n",
        )
    };
}

/// For so many pairs of tokens, the registers of as many pairs of rows: what is between the braces with each of the last
/// numbers, two or all four.
macro_rules! pairs_of_rows {
    (8 $what:ident $arguments:tt $a:tt $b:tt $c:tt $d:tt) => { concat!($what!($arguments $a), $what!($arguments $b)) };
    ($pairs:literal $what:ident $arguments:tt $a:tt $b:tt $c:tt $d:tt) => {
        concat!($what!($arguments $a), $what!($arguments $b), $what!($arguments $c), $what!($arguments $d))
    };
}

/// A pair of rows, 8 bytes of each, in one register.
macro_rules! zip {
    (($zip:literal) ($z:literal $from:literal $first:literal $second:literal)) => {
        concat!(
            "ldr q28, [",
            $from,
            ", #",
            $first,
            "]\n ldr q29, [",
            $from,
            ", #",
            $second,
            "]\n",
            $zip,
            " v",
            $z,
            ".2d, v28.2d, v29.2d\n",
        )
    };
}
/// Both halves of 16 bytes of each.
macro_rules! zip_both {
    (() ($z:literal $y:literal $from:literal $first:literal $second:literal)) => {
        concat!(
            zip!(("zip1") ($z $from $first $second)), "zip2 v", $y, ".2d, v28.2d, v29.2d\n",
        )
    };
}
macro_rules! mask {
    (() ($z:literal $codes:literal)) => {
        concat!("and v", $codes, ".16b, v", $z, ".16b, v31.16b\n")
    };
}
macro_rules! shift {
    (($bits:literal) ($z:literal $to:literal)) => {
        concat!("ushr v", $to, ".16b, v", $z, ".16b, #", $bits, "\n")
    };
}

/// 8 columns of each plane, at places `$k` of the activations.
macro_rules! planes {
    (load $pairs:tt $zip:literal) => {
        pairs_of_rows!($pairs zip ($zip) (20 "x0" 0 64) (21 "x0" 128 192) (22 "x5" 0 64) (23 "x5" 128 192))
    };
    (mask $pairs:tt) => { pairs_of_rows!($pairs mask () (20 24) (21 25) (22 26) (23 27)) };
    (shift $pairs:tt $bits:literal) => { pairs_of_rows!($pairs shift ($bits) (20 20) (21 21) (22 22) (23 23)) };
    (last $pairs:tt $bits:literal) => { pairs_of_rows!($pairs shift ($bits) (20 24) (21 25) (22 26) (23 27)) };
    (t2 $pairs:tt $zip:literal $k0:literal $k1:literal $k2:literal $k3:literal) => {
        concat!(
            planes!(load $pairs $zip), planes!(mask $pairs), dots!($pairs $k0), planes!(shift $pairs 2), planes!(mask $pairs),
            dots!($pairs $k1), planes!(shift $pairs 2), planes!(mask $pairs), dots!($pairs $k2), planes!(last $pairs 2),
            dots!($pairs $k3),
        )
    };
    (i4 $pairs:tt $zip:literal $k0:literal $k1:literal) => {
        concat!(
            planes!(load $pairs $zip), planes!(mask $pairs), dots!($pairs $k0), planes!(last $pairs 4), dots!($pairs $k1),
        )
    };
}

/// What the loop does for 16 bytes of each row: registers as [`planes!`] has them.
macro_rules! iteration {
    (t2 $pairs:tt) => {
        concat!(
            planes!(t2 $pairs "zip1" 0 1 2 3), planes!(t2 $pairs "zip2" 4 5 6 7), "add x1, x1, #128*", $pairs, "\n",
            iteration!(@blocks),
        )
    };
    (i4 $pairs:tt) => {
        concat!(
            planes!(i4 $pairs "zip1" 0 1), planes!(i4 $pairs "zip2" 2 3), "add x1, x1, #64*", $pairs, "\n", iteration!(@blocks),
        )
    };
    (i8 $pairs:tt) => {
        concat!(
            pairs_of_rows!($pairs zip_both () (24 20 "x0" 0 64) (25 21 "x0" 128 192) (26 22 "x5" 0 64) (27 23 "x5" 128 192)),
            dots!($pairs 0), dots!($pairs 1 (20 21 22 23)), "add x1, x1, #32*", $pairs, "\n", iteration!(@blocks),
        )
    };
    // Rows as `smmla` wants them.
    (bytes $pairs:tt) => {
        concat!(
            pairs_of_rows!($pairs load () ("q24" "x0" 0) ("q25" "x0" 16) ("q26" "x5" 0) ("q27" "x5" 16)), dots!($pairs 0),
            pairs_of_rows!($pairs load () ("q24" "x0" 128) ("q25" "x0" 144) ("q26" "x5" 128) ("q27" "x5" 144)), dots!($pairs 1),
            "add x1, x1, #32*", $pairs, "\n add x0, x0, #256\n add x5, x5, #256\n sub x3, x3, #1\n",
        )
    };
    // After every four, what is left of a step are the blocks of the other rows.
    (@blocks) => {
        "sub x3, x3, #1\n add x0, x0, #16\n add x5, x5, #16\n tst x3, #3\n csel x9, x8, xzr, eq\n add x0, x0, x9\n add x5, x5, x9\n"
    };
}
macro_rules! load {
    (() ($z:literal $from:literal $at:literal)) => {
        concat!("ldr ", $z, ", [", $from, ", #", $at, "]\n")
    };
}

macro_rules! matmat {
    ($($name:ident: $format:ident $pairs:tt $eights:literal $mask:literal,)+) => { $(
        /// So many pairs of tokens, with 4 rows if 8 and 8 rows if fewer.
        ///
        /// # Safety
        /// At each place of `w` are the rows of `n` iterations: a quarter of the blocks of a step of a tile, or 16 columns
        /// of a quarter of a panel.
        #[target_feature(enable = "neon,i8mm")]
        #[inline(never)]
        unsafe fn $name(w: [*const u8; 2], x: &[[u8; 16]], n: usize) -> Sums {
            assert!(n > 0 && x.len() >= n * $eights * $pairs);
            let mut sums = [vdupq_n_s32(0); 16];
            // SAFETY: the loop reads what there is of `w` and so much of `x`, whose length was checked. Every register that it
            // changes is named.
            unsafe {
                asm!(
                    concat!("movi v31.16b, #", $mask), "2:", iteration!($format $pairs), "cbnz x3, 2b",
                    inout("x0") w[0] => _, inout("x5") w[1] => _, inout("x1") x.as_ptr() => _, inout("x3") n => _, in("x8") 192,
                    out("x9") _,
                    inout("v0") sums[0], inout("v1") sums[1], inout("v2") sums[2], inout("v3") sums[3],
                    inout("v4") sums[4], inout("v5") sums[5], inout("v6") sums[6], inout("v7") sums[7],
                    inout("v8") sums[8], inout("v9") sums[9], inout("v10") sums[10], inout("v11") sums[11],
                    inout("v12") sums[12], inout("v13") sums[13], inout("v14") sums[14], inout("v15") sums[15],
                    out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _,
                    out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                    out("v31") _, options(readonly, nostack),
                );
            }
            sums
        }
    )+ };
}

// Name, format, pairs of tokens; eights of columns an iteration; the mask of a plane.
matmat! {
    matmat_t2_1_i8mm: t2 1 8 3, matmat_t2_2_i8mm: t2 2 8 3, matmat_t2_4_i8mm: t2 4 8 3, matmat_t2_8_i8mm: t2 8 8 3,
    matmat_i4_1_i8mm: i4 1 4 15, matmat_i4_2_i8mm: i4 2 4 15, matmat_i4_4_i8mm: i4 4 4 15, matmat_i4_8_i8mm: i4 8 4 15,
    matmat_i8_1_i8mm: i8 1 2 0, matmat_i8_2_i8mm: i8 2 2 0, matmat_i8_4_i8mm: i8 4 2 0, matmat_i8_8_i8mm: i8 8 2 0,
    matmat_bytes_1_i8mm: bytes 1 2 0, matmat_bytes_2_i8mm: bytes 2 2 0, matmat_bytes_4_i8mm: bytes 4 2 0,
    matmat_bytes_8_i8mm: bytes 8 2 0,
}
