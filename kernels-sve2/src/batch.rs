//! Several tokens at once by `smmla`: weights are unpacked to bytes once for all of them.
//!
//! A *panel* is 64 rows by at most 256 columns, small enough for the first-level cache: weights by [`crate::unpack`], activations
//! in the same form. Then one loop serves every format: `smmla` multiplies, in each 128 bits, 2 tokens by 2 rows by 8 columns. The
//! two tokens are repeated along the vector and the pairs of rows follow one another in it, so that no length needs sums
//! across a vector.
//!
//! The loop takes 2.0 cycles for 256 products on the Neoverse V1 and 2.4 on the V2, by `llvm-mca-22`. A loop that unpacks T2 in
//! registers, 8 rows by 8 tokens, was counted at 2.9, and every format would need its own.
use crate::unpack::{self, COLS, Panel, ROWS};
use bitnet_kernel::{Activations, Format, Matrix};
use core::arch::asm;

/// Tokens that share a panel of weights.
const TOKENS: usize = 16;
/// Tokens whose sums lie in registers together.
const GROUP: usize = 8;

/// Activations of [`GROUP`] tokens: `[8 columns][pair of tokens]`, each as in [`Panel`].
type Tokens = [[[u8; 16]; GROUP / 2]; COLS / 8];

/// The fewest tokens for which unpacking pays. One token alone of a format in lanes takes 9 to 12 cycles for 256 weights, their
/// unpacking 24; in planes it is 8 and 8.
pub(crate) const fn tokens_min(format: Format) -> usize {
    match format {
        Format::B1 | Format::TL => 4,
        _ => 2,
    }
}

/// `w` times every token. The entrance checks were made.
#[target_feature(enable = "sve,i8mm")]
pub(crate) fn products(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    if w.rows() == 0 {
        return;
    }
    let bias = unpack::bias(w.format());
    for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
        y.fill(-bias * x.sum());
    }
    let (mut panel, mut xs) = (Panel::ZERO, [[[[0; 16]; GROUP / 2]; COLS / 8]; TOKENS / GROUP]);
    let panel_steps = COLS / w.format().step_cols();
    for (tokens, y) in tokens.chunks(TOKENS).zip(y.chunks_mut(TOKENS * w.rows())) {
        for first in (0..w.steps()).step_by(panel_steps) {
            let steps = first..w.steps().min(first + panel_steps);
            let cols = steps.start * w.format().step_cols()..steps.end * w.format().step_cols();
            for (tokens, xs) in tokens.chunks(GROUP).zip(&mut xs) {
                gather(tokens, cols.clone(), xs);
            }
            for row in (0..w.rows()).step_by(ROWS) {
                let rows = ROWS.min(w.rows() - row);
                unpack::unpack(w.slice(row..row + rows), steps.clone(), &mut panel);
                for (xs, y) in xs.iter().zip(y.chunks_mut(GROUP * w.rows())) {
                    add_panel(&panel, &xs[..cols.len() / 8], row..row + rows, w.rows(), y);
                }
            }
        }
    }
}

/// Puts the columns `cols` of at most [`GROUP`] tokens where `smmla` wants them: zeros past the values, which the panels of a
/// grouped format may have (see [`Activations::group`]). What is there of other tokens stays.
fn gather(tokens: &[Activations<'_>], cols: core::ops::Range<usize>, out: &mut Tokens) {
    let (columns, _) = out.split_at_mut(cols.len() / 8);
    for (t, x) in tokens.iter().enumerate() {
        let mut x = x.values()[cols.start..cols.end.min(x.values().len())].as_chunks::<8>().0.iter();
        for out in &mut *columns {
            let out = &mut out[t / 2].as_chunks_mut::<8>().0[t % 2];
            *out = x.next().map_or([0; 8], |x| x.map(|x| x as u8));
        }
    }
}

/// Adds the products of a panel's rows, `rows` of a matrix of `height`, to those of `y.len() / height` tokens.
#[target_feature(enable = "sve,i8mm")]
fn add_panel(w: &Panel, x: &[[[u8; 16]; GROUP / 2]], rows: core::ops::Range<usize>, height: usize, y: &mut [i32]) {
    let tokens = y.len() / height;
    // The second token of a pair that has none: its sums go nowhere.
    let mut nowhere = [0; ROWS];
    let mut at = [nowhere.as_mut_ptr(); GROUP];
    for (y, at) in y.chunks_exact_mut(height).zip(&mut at) {
        *at = y[rows.clone()].as_mut_ptr();
    }
    match tokens {
        1..=2 => matmat_1_sve_i8mm(w, x, rows.len(), &at),
        3..=4 => matmat_2_sve_i8mm(w, x, rows.len(), &at),
        5..=6 => matmat_3_sve_i8mm(w, x, rows.len(), &at),
        _ => matmat_4_sve_i8mm(w, x, rows.len(), &at),
    }
}

/// Four vectors of rows, `z16` to `z19`, times a pair of tokens, into four sums.
#[rustfmt::skip]
macro_rules! pair {
    ($x:literal $at:literal, $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "ld1rqb {{z", $x, ".b}}, p6/z, [x1, #", $at, "]\n",
            "smmla z", $a, ".s, z", $x, ".b, z16.b\n smmla z", $b, ".s, z", $x, ".b, z17.b\n",
            "smmla z", $c, ".s, z", $x, ".b, z18.b\n smmla z", $d, ".s, z", $x, ".b, z19.b\n",
        )
    };
}

/// Adds a pair's sums to where they belong. In each 128 bits are two rows of the first token, then of the second.
macro_rules! add_pair {
    ($x:literal $at:literal, $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "ldp x10, x11, [x4, #", $at, "]\n add x10, x10, x8, lsl #2\n add x11, x11, x8, lsl #2\n",
            "uzp1 z20.d, z", $a, ".d, z", $b, ".d\n uzp1 z21.d, z", $c, ".d, z", $d, ".d\n",
            "uzp2 z22.d, z", $a, ".d, z", $b, ".d\n uzp2 z23.d, z", $c, ".d, z", $d, ".d\n",
            add_pair!(@add 20 "p4" "[x10]"), add_pair!(@add 21 "p5" "[x10, #1, mul vl]"),
            add_pair!(@add 22 "p4" "[x11]"), add_pair!(@add 23 "p5" "[x11, #1, mul vl]"),
        )
    };
    (@add $z:literal $p:literal $at:literal) => {
        concat!(
            "ld1w {{z24.s}}, ", $p, "/z, ", $at, "\n add z", $z, ".s, z", $z, ".s, z24.s\n",
            "st1w {{z", $z, ".s}}, ", $p, ", ", $at, "\n",
        )
    };
}

macro_rules! matmat {
    ($(#[$attribute:meta])* $name:ident, $(($($pair:literal)+)),+) => {
        $(#[$attribute])*
        #[target_feature(enable = "sve,i8mm")]
        #[inline(never)]
        fn $name(w: &Panel, x: &[[[u8; 16]; GROUP / 2]], rows: usize, y: &[*mut i32; GROUP]) {
            assert!(!x.is_empty() && x.len() <= COLS / 8 && (1..=ROWS).contains(&rows));
            // SAFETY: the loop reads `x`, 64 bytes for 8 columns, and as many times the 512 bytes of `w` from `x8` rows on, no
            // more than predicates `p0` to `p3` say; it adds to `rows` numbers at each pointer of `y` that belongs to one of
            // these pairs, which `add_panel` took from slices of that length. Every register that it changes is named.
            unsafe {
                asm!(
                    "mov x8, #0", "ptrue p6.b",
                    // The vectors of rows from x8 on: what of them is in the panel, and what in the matrix.
                    "2:",
                    "mov x12, #512", "sub x12, x12, x8, lsl #3", "cntb x9", "whilelo p0.b, xzr, x12",
                    "whilelo p1.b, x9, x12", "addvl x9, x9, #1", "whilelo p2.b, x9, x12", "addvl x9, x9, #1",
                    "whilelo p3.b, x9, x12",
                    "sub x12, x3, x8", "cntw x9", "whilelo p4.s, xzr, x12", "whilelo p5.s, x9, x12",
                    $(matmat!(@zero $($pair)+),)+
                    "add x9, x0, x8, lsl #3", "mov x1, x5", "mov x12, x2",
                    "3:",
                    "ld1b {{z16.b}}, p0/z, [x9]", "ld1b {{z17.b}}, p1/z, [x9, #1, mul vl]",
                    "ld1b {{z18.b}}, p2/z, [x9, #2, mul vl]", "ld1b {{z19.b}}, p3/z, [x9, #3, mul vl]",
                    $(matmat!(@pair $($pair)+),)+
                    "add x9, x9, #512", "add x1, x1, #64", "subs x12, x12, #1", "b.ne 3b",
                    $(matmat!(@add $($pair)+),)+
                    "incw x8, all, mul #2", "cmp x8, x3", "b.lo 2b",
                    in("x0") w, out("x1") _, in("x2") x.len(), in("x3") rows, in("x4") y, in("x5") x.as_ptr(),
                    out("x8") _, out("x9") _, out("x10") _, out("x11") _, out("x12") _,
                    out("p0") _, out("p1") _, out("p2") _, out("p3") _, out("p4") _, out("p5") _, out("p6") _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _,
                    out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _,
                    out("v22") _, out("v23") _, out("v24") _, options(nostack),
                );
            }
        }
    };
    (@zero $x:literal $at:literal $($z:literal)+) => { concat!($("mov z", $z, ".d, #0\n"),+) };
    (@pair $x:literal $at:literal $a:literal $b:literal $c:literal $d:literal) => { pair!($x $at, $a $b $c $d) };
    (@add $x:literal $at:literal $a:literal $b:literal $c:literal $d:literal) => { add_pair!($x $at, $a $b $c $d) };
}

matmat!(
    /// One pair of tokens: the register of its activations, their place, and its sums.
    matmat_1_sve_i8mm, (20 0 0 1 2 3)
);
matmat!(
    /// Two pairs.
    matmat_2_sve_i8mm, (20 0 0 1 2 3), (21 16 4 5 6 7)
);
matmat!(
    /// Three pairs.
    matmat_3_sve_i8mm, (20 0 0 1 2 3), (21 16 4 5 6 7), (22 32 8 9 10 11)
);
matmat!(
    /// Four pairs: 16 products of a vector for 8 loads.
    matmat_4_sve_i8mm, (20 0 0 1 2 3), (21 16 4 5 6 7), (22 32 8 9 10 11), (23 48 12 13 14 15)
);
