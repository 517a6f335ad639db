//! The sum of some rows of T2R, in which most of a matrix is not read.
//!
//! Columns lie in lanes. The bytes of four rows are interleaved, so that the four codes of a column are next to one another and
//! `sdot` multiplies them by the rows' four factors: 8 operations for 4 vectors, in place of a widening addition for each
//! weight. A plane keeps its weight (1, 4, 16) in sums of its own, as in [`crate::planes`].
//!
//! `z0` to `z15`: sums, four vectors of 32 bits a plane. `z16` to `z19`: rows, then their interleaved bytes, by way of `z20` to `z23`.
//! `z24` to `z27`: codes. `z28` to `z30`: masks. `z31`: factors.
use bitnet_kernel::{Block, Format, Matrix};
use core::arch::asm;

/// Rows that are added up in registers. Their number times 3 · 48 · 128 is far below `2^31`.
const ROWS: usize = 32;
/// Columns of a block.
const COLS: usize = Format::T2R.step_cols();

/// `y[c] += Σ_i x[i] · w[rows[i]][c]`. The entrance checks were made, but for the rows' numbers.
#[target_feature(enable = "sve")]
pub(crate) fn sum_rows(w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
    for (rows, x) in rows.chunks(ROWS).zip(x.chunks(ROWS)) {
        // Four rows at a time: the last ones may be the first one again, times zero.
        let fours = rows.len().div_ceil(4);
        let at: [&[Block]; ROWS] = core::array::from_fn(|i| w.row(rows.get(i).map_or(rows[0], |&row| row) as usize));
        let mut factors = [0; ROWS];
        factors[..x.len()].copy_from_slice(x);
        let sum = x.iter().map(|&x| i32::from(x)).sum();
        for (block, y) in y.chunks_mut(COLS).enumerate() {
            let at = at.map(|row| &raw const row[block]);
            if let Some(y) = y.as_mut_array::<COLS>() {
                sum_rows_t2r_sve(&at[..4 * fours], &factors, sum, y);
            } else {
                let mut whole = [0; COLS];
                whole[..y.len()].copy_from_slice(y);
                sum_rows_t2r_sve(&at[..4 * fours], &factors, sum, &mut whole);
                y.copy_from_slice(&whole[..y.len()]);
            }
        }
    }
}

/// The codes of a quarter of a chunk's columns, and their products, into the sums of the four planes.
#[rustfmt::skip]
macro_rules! quarter {
    ($z:literal, $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "and z24.d, z", $z, ".d, z28.d\n and z25.d, z", $z, ".d, z29.d\n and z26.d, z", $z, ".d, z30.d\n",
            "lsr z27.b, z", $z, ".b, #6\n",
            "sdot z", $a, ".s, z24.b, z31.b\n sdot z", $b, ".s, z25.b, z31.b\n",
            "sdot z", $c, ".s, z26.b, z31.b\n sdot z", $d, ".s, z27.b, z31.b\n",
        )
    };
}

/// Adds a plane's sums, divided by its weight, to `y`, less the sum of the factors (`z31`).
macro_rules! add_plane {
    ($y:literal $shift:tt, $($z:literal $p:literal $at:literal),+) => {
        concat!($(
            add_plane!(@$shift $z),
            "ld1w {{z24.s}}, p", $p, "/z, [", $y, ", #", $at, ", mul vl]\n",
            "sub z24.s, z24.s, z31.s\n add z24.s, z24.s, z", $z, ".s\n",
            "st1w {{z24.s}}, p", $p, ", [", $y, ", #", $at, ", mul vl]\n",
        )+)
    };
    (@0 $z:literal) => { "" };
    (@2 $z:literal) => { concat!("asr z", $z, ".s, z", $z, ".s, #2\n") };
    (@4 $z:literal) => { concat!("asr z", $z, ".s, z", $z, ".s, #4\n") };
}

/// Adds the products of `factors` with the blocks at `rows`, a multiple of 4 of them, to the sums of a block's columns. `sum` is
/// that of the factors.
#[target_feature(enable = "sve")]
#[inline(never)]
fn sum_rows_t2r_sve(rows: &[*const Block], factors: &[i8; ROWS], sum: i32, y: &mut [i32; COLS]) {
    assert!(!rows.is_empty() && rows.len() <= ROWS && rows.len().is_multiple_of(4));
    // SAFETY: the loops read the blocks at `rows`, which `sum_rows` took from slices, as many bytes of `factors` as rows, and
    // add to the 4 planes of `y`, 64 columns each. Every register that they change is named.
    unsafe {
        asm!(
            "mov z28.b, #0x03", "mov z29.b, #0x0c", "mov z30.b, #0x30",
            "mov x12, #64", "cntb x14, pow2", "cmp x14, x12", "csel x14, x14, x12, lo", "whilelo p0.b, xzr, x14", "ptrue p5.b",
            // The columns of a chunk are those of up to four vectors of 32 bits.
            "cntw x13", "whilelo p1.s, xzr, x14", "whilelo p2.s, x13, x14", "add x9, x13, x13", "whilelo p3.s, x9, x14",
            "add x9, x9, x13", "whilelo p4.s, x9, x14",
            "mov x10, #0",
            // A chunk of the block.
            "2:",
            "mov z0.d, #0", "mov z1.d, #0", "mov z2.d, #0", "mov z3.d, #0", "mov z4.d, #0", "mov z5.d, #0", "mov z6.d, #0",
            "mov z7.d, #0", "mov z8.d, #0", "mov z9.d, #0", "mov z10.d, #0", "mov z11.d, #0", "mov z12.d, #0", "mov z13.d, #0",
            "mov z14.d, #0", "mov z15.d, #0",
            "mov x9, x0", "mov x11, x2",
            // Four rows.
            "3:",
            "ldp x5, x6, [x9]", "ldp x7, x8, [x9, #16]", "ld1rw {{z31.s}}, p5/z, [x11]",
            "ld1b {{z16.b}}, p0/z, [x5, x10]", "ld1b {{z17.b}}, p0/z, [x6, x10]",
            "ld1b {{z18.b}}, p0/z, [x7, x10]", "ld1b {{z19.b}}, p0/z, [x8, x10]",
            "zip1 z20.b, z16.b, z17.b", "zip2 z21.b, z16.b, z17.b", "zip1 z22.b, z18.b, z19.b", "zip2 z23.b, z18.b, z19.b",
            "zip1 z16.h, z20.h, z22.h", "zip2 z17.h, z20.h, z22.h", "zip1 z18.h, z21.h, z23.h", "zip2 z19.h, z21.h, z23.h",
            quarter!(16, 0 4 8 12), quarter!(17, 1 5 9 13), quarter!(18, 2 6 10 14), quarter!(19, 3 7 11 15),
            "add x9, x9, #32", "add x11, x11, #4", "cmp x9, x1", "b.lo 3b",
            "mov z31.s, w4", "add x9, x3, x10, lsl #2", "add x11, x9, #256", "add x6, x9, #512", "add x7, x9, #768",
            add_plane!("x9" 0, 0 1 0, 1 2 1, 2 3 2, 3 4 3),
            add_plane!("x11" 2, 4 1 0, 5 2 1, 6 3 2, 7 4 3),
            add_plane!("x6" 4, 8 1 0, 9 2 1, 10 3 2, 11 4 3),
            add_plane!("x7" 0, 12 1 0, 13 2 1, 14 3 2, 15 4 3),
            "add x10, x10, x14", "cmp x10, x12", "b.lo 2b",
            in("x0") rows.as_ptr(), in("x1") rows.as_ptr().add(rows.len()), in("x2") factors, in("x3") y, in("x4") sum,
            out("x5") _, out("x6") _, out("x7") _, out("x8") _, out("x9") _, out("x10") _, out("x11") _, out("x12") _,
            out("x13") _, out("x14") _, out("p0") _, out("p1") _, out("p2") _, out("p3") _, out("p4") _, out("p5") _,
            out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
            out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v12") _, out("v13") _, out("v14") _, out("v15") _,
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _, out("v30") _, out("v31") _,
            options(nostack),
        );
    }
}
