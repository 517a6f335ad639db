//! B1 and TL with a scale for every 128 columns of a row: the sums of a group end in registers as floats, are scaled and added up.
//!
//! The loop over the steps of a group is that of [`crate::lanes`]. With the end of a group, `llvm-mca-22` counts 7.0 (SVE, Neoverse
//! V1) and 6.8 (SVE2, Neoverse V2) cycles for 256 weights of B1 in place of 5.5 and 5.3, and 14.8 and 11.8 of TL in place of 11.8
//! and 9.4; there an eighth is the padding of 128 columns to 6 steps of 24.
//!
//! A sum of 128 products is within `-16384..=16384`, so 16 bits hold it, whatever the biases did before they were taken off.
use bitnet_kernel::tables::{B1_BASE, TL_BASE};
use bitnet_kernel::{Activations, Block, Format, Matrix};
use core::arch::asm;

/// Groups of the widest row.
const GROUPS_MAX: usize = Format::COLS_MAX / Format::GROUP_COLS;
/// Rows of a tile.
const ROWS: usize = Format::PANEL_ROWS;

/// Adds the groups of a tile to the sums of its rows from one on: two vectors.
type Add = unsafe fn(tile: &[Block], tables: &[Block], less: &[i16], row: usize, y: &mut [f32; ROWS]);

/// `y[r] = Σ_g s[g][r] · Σ_{c in g} w[r][c] · x[c]` with SVE. The entrance checks were made.
#[target_feature(enable = "sve")]
pub(crate) fn products_sve(w: Matrix<'_>, x: Activations<'_>, y: &mut [f32]) {
    products(w, x, y, if w.format() == Format::B1G { grouped_b1_sve } else { grouped_tl_sve });
}

/// [`products_sve`] with SVE2.
#[target_feature(enable = "sve2")]
pub(crate) fn products_sve2(w: Matrix<'_>, x: Activations<'_>, y: &mut [f32]) {
    products(w, x, y, if w.format() == Format::B1G { grouped_b1_sve2 } else { grouped_tl_sve2 });
}

/// `add` is for the format of `w`.
#[target_feature(enable = "sve")]
fn products(w: Matrix<'_>, x: Activations<'_>, y: &mut [f32], add: Add) {
    if w.cols() == 0 {
        return y.fill(0.0);
    }
    // What the sums of a group exceed its products by.
    let mut less = [0_i16; GROUPS_MAX];
    for (g, less) in less[..w.steps()].iter_mut().enumerate() {
        let bias = match w.format() {
            // Both parts have 128 in each of 6 steps.
            Format::TLG => (i32::from(TL_BASE) + 1) * 128 * 6,
            // The high part alone, in 4 steps, and twice: `Σ(2b - 1)x`.
            _ => 2 * i32::from(B1_BASE) * 128 * 4 + x.group(g).sum(),
        };
        *less = bias as i16;
    }
    let rows = 2 * vector_rows();
    for (y, tile) in y.chunks_mut(ROWS).zip(w.tiles()) {
        let mut sums = [0.0; ROWS];
        for row in (0..ROWS).step_by(rows) {
            // SAFETY: the features of `add` are those of the function that named it; tile and tables are of a matrix of its
            // format and the activations for it.
            unsafe { add(tile, x.tables(), &less[..w.steps()], row, &mut sums) };
        }
        y.copy_from_slice(&sums[..y.len()]);
    }
}

/// Rows in a vector: as many as divide a tile.
#[target_feature(enable = "sve")]
fn vector_rows() -> usize {
    let bytes: usize;
    // SAFETY: reads a constant of the CPU.
    unsafe { asm!("cntb {}, pow2", out(reg) bytes, options(pure, nomem, nostack, preserves_flags)) };
    bytes.min(ROWS)
}

/// A quarter of a vector's rows: the 16-bit sums `$z`'s lower or upper half times scales, added to `y`.
///
/// A scale becomes a float as [`bitnet_kernel::float::f16_to_f32`] says.
#[rustfmt::skip]
macro_rules! add_scaled {
    ($half:literal $z:literal $scales:literal $y:literal $p:literal $at:literal) => {
        concat!(
            $half, " z26.s, z", $z, ".h\n scvtf z26.s, p2/m, z26.s\n",
            "ld1sh {{z27.s}}, ", $p, "/z, [", $scales, ", #", $at, ", mul vl]\n",
            "lsl z27.s, z27.s, #13\n and z27.d, z27.d, z10.d\n fmul z27.s, z27.s, z11.s\n fmul z26.s, z26.s, z27.s\n",
            "ld1w {{z28.s}}, ", $p, "/z, [", $y, ", #", $at, ", mul vl]\n fadd z28.s, z28.s, z26.s\n",
            "st1w {{z28.s}}, ", $p, ", [", $y, ", #", $at, ", mul vl]\n",
        )
    };
}

/// The end of a group for a vector of rows: its products, in the order of rows, then their sums.
#[rustfmt::skip]
macro_rules! end {
    ($format:ident $isa:ident $lo0:literal $lo1:literal $hi0:literal $hi1:literal, $scales:literal $y:literal) => {
        concat!(
            split!($isa $lo0 $lo1, $hi0 $hi1), end!(@$format $lo0 $lo1),
            "mla z", $lo0, ".h, p2/m, z", $hi0, ".h, z8.h\n mla z", $lo1, ".h, p2/m, z", $hi1, ".h, z8.h\n",
            "sub z", $lo0, ".h, z", $lo0, ".h, z9.h\n sub z", $lo1, ".h, z", $lo1, ".h, z9.h\n",
            "zip1 z24.h, z", $lo0, ".h, z", $lo1, ".h\n zip2 z25.h, z", $lo0, ".h, z", $lo1, ".h\n",
            add_scaled!("sunpklo" 24 $scales $y "p4" 0), add_scaled!("sunpkhi" 24 $scales $y "p5" 1),
            add_scaled!("sunpklo" 25 $scales $y "p6" 2), add_scaled!("sunpkhi" 25 $scales $y "p7" 3),
        )
    };
    // The products of B1 are twice the sums.
    (@b1 $lo0:literal $lo1:literal) => {
        concat!("add z", $lo0, ".h, z", $lo0, ".h, z", $lo0, ".h\n add z", $lo1, ".h, z", $lo1, ".h, z", $lo1, ".h\n")
    };
    (@tl $lo0:literal $lo1:literal) => { "" };
}

macro_rules! grouped {
    ($name:ident, $format:ident $isa:ident $feature:literal, $steps:literal steps of $blocks:literal blocks, nibbles at
        $at0:literal $at1:literal $at2:literal $at3:literal, high parts times $base:literal) => {
        #[target_feature(enable = $feature)]
        #[inline(never)]
        fn $name(tile: &[Block], tables: &[Block], less: &[i16], row: usize, y: &mut [f32; ROWS]) {
            assert!(!less.is_empty() && row < ROWS);
            assert_eq!(tile.len(), less.len() * ($steps * $blocks + Format::SCALE_BLOCKS));
            assert_eq!(tables.len(), less.len() * $steps * 4);
            // SAFETY: the loops read the rows of `tile` from `row` on, at most 64 - `row` as predicates say, for each group of
            // `less`, whose blocks were counted; its tables, counted too; and add to the same rows of `y`. Every register that
            // they change is named.
            unsafe {
                asm!(
                    "ptrue p2.b", "add x2, x2, #128",
                    concat!("mov x4, #", $at0), concat!("mov x5, #", $at1), concat!("mov x6, #", $at2), concat!("mov x7, #", $at3),
                    "mov z16.b, #0x0f", "mov z17.b, #0x80", "mov z18.b, #0x40", concat!("mov z8.h, #", $base),
                    "mov w3, #0xe000", "movk w3, #0x8fff, lsl #16", "mov z10.s, w3", "mov w3, #0x77800000", "mov z11.s, w3",
                    // Rows of the first vector, x13, and of the second, x12: as many or none.
                    "mov x9, #64", "cntb x13, pow2", "cmp x13, x9", "csel x13, x13, x9, lo",
                    "sub x12, x12, x13", "cmp x12, x13", "csel x12, x12, x13, lo",
                    "whilelo p0.b, xzr, x13", "whilelo p1.b, xzr, x12",
                    "cntw x9", "whilelo p4.s, xzr, x13", "whilelo p5.s, x9, x13", "add x10, x9, x9", "whilelo p6.s, x10, x13",
                    "add x10, x10, x9", "whilelo p7.s, x10, x13",
                    "add x1, x0, x13", "add x17, x8, x13, lsl #2",
                    // A group.
                    "2:",
                    "mov z4.d, #0", "mov z5.d, #0", "mov z6.d, #0", "mov z7.d, #0",
                    "mov z20.d, #0", "mov z21.d, #0", "mov z22.d, #0", "mov z23.d, #0",
                    concat!("mov x3, #", $steps), "ld1rh {{z9.h}}, p2/z, [x16]",
                    "3:",
                    step!($format $isa $blocks),
                    "subs x3, x3, #1", "b.ne 3b",
                    // Its scales take two bytes a row.
                    "add x10, x0, x14", "add x11, x10, x13, lsl #1",
                    end!($format $isa 4 5 6 7, "x10" "x8"),
                    "cbz x12, 4f",
                    end!($format $isa 20 21 22 23, "x11" "x17"),
                    "4:",
                    "add x0, x0, #128", "add x1, x1, #128", "add x16, x16, #2", "subs x15, x15, #1", "b.ne 2b",
                    inout("x0") tile.as_ptr().byte_add(row) => _, out("x1") _, inout("x2") tables.as_ptr() => _, out("x3") _,
                    out("x4") _, out("x5") _, out("x6") _, out("x7") _, in("x8") y.as_mut_ptr().add(row), out("x9") _,
                    out("x10") _, out("x11") _, inout("x12") ROWS - row => _, out("x13") _, in("x14") row,
                    inout("x15") less.len() => _, inout("x16") less.as_ptr() => _, out("x17") _,
                    out("p0") _, out("p1") _, out("p2") _, out("p4") _, out("p5") _, out("p6") _, out("p7") _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v16") _, out("v17") _, out("v18") _,
                    out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _, out("v24") _, out("v25") _,
                    out("v26") _, out("v27") _, out("v28") _, out("v29") _, out("v30") _, out("v31") _, options(nostack),
                );
            }
        }
    };
}

grouped!(grouped_b1_sve, b1 sve "sve", 4 steps of 4 blocks, nibbles at 0 64 128 192, high parts times 64);
grouped!(grouped_b1_sve2, b1 sve2 "sve2", 4 steps of 4 blocks, nibbles at 0 64 128 192, high parts times 64);
grouped!(grouped_tl_sve, tl sve "sve", 6 steps of 5 blocks, nibbles at 64 128 192 256, high parts times 31);
grouped!(grouped_tl_sve2, tl sve2 "sve2", 6 steps of 5 blocks, nibbles at 64 128 192 256, high parts times 31);
