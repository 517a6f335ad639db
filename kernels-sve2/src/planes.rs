//! T2, I4 and I8, one token: columns in lanes, the four rows of a tile in registers, products by `sdot`.
//!
//! A *chunk* is as much of a block as a vector holds: 16, 32 or 64 bytes. Where a length is no power of two, or longer than a
//! block, a predicate turns the other lanes off; they are loaded as zeros. (A new predicate for each chunk, `whilelo`, uses
//! all lanes of 384 bits too, but takes two cycles on the Neoverse V1: 8.1 in place of 5.1 for 256 weights of I8.)
//!
//! `z0` to `z11`: sums, three a row. `z16` to `z19`: activations of up to four planes. `z20` to `z22`: masks. `z24`: weights, `z25`
//! to `z28`: their codes. `x0`, `x4` to `x6`: the rows; `x1`, `x7` to `x9`: the planes of activations; `x10`, `x11`: places in both.
//! `x14`: bytes of a chunk; `x12`, `x13`: see [`next!`].
//!
//! No lane overflows: a row has at most 65,536 columns, and codes at their weights are at most 48 (T2), 15 (I4) and 128 (I8),
//! where a lane holds at most a quarter of the columns: `16,384 · 128 · 128 < 2^31`.
use bitnet_kernel::Block;
use core::arch::asm;

/// `z = 0` for each register.
macro_rules! zero {
    ($($z:literal)+) => { concat!($("mov z", $z, ".d, #0\n"),+) };
}

/// Activations of one plane.
macro_rules! load_x {
    ($z:literal $from:literal $place:literal) => {
        concat!("ld1b {{z", $z, ".b}}, p0/z, [", $from, ", ", $place, "]\n")
    };
}

/// Sets masks, and loads a chunk's activations.
macro_rules! masks {
    (t2) => {
        "mov z20.b, #0x03\n mov z21.b, #0x0c\n mov z22.b, #0x30\n"
    };
    (i4) => {
        "mov z20.b, #0x0f\n"
    };
    (i8) => {
        ""
    };
}
macro_rules! activations {
    (t2 $place:literal) => {
        concat!(load_x!(16 "x1" $place), load_x!(17 "x7" $place), load_x!(18 "x8" $place), load_x!(19 "x9" $place))
    };
    (i4 $place:literal) => { concat!(load_x!(16 "x1" $place), load_x!(17 "x7" $place)) };
    (i8 $place:literal) => { load_x!(16 "x1" $place) };
}

/// Goes on to the next chunk while there is one. `start` sets what it needs.
///
/// `together`: the rows of a tile of T2 and the planes of its activations lie the same way, four times 64 bytes a step, so that
/// one place serves both and one loop takes all chunks, leaping where a block ends. By `llvm-mca-22` the loop alone takes 8.0 cycles
/// for 256 weights; `cargo xtask arm` counts 8.6 on the Neoverse V2 all the same, which is not explained.
macro_rules! next {
    (start together) => {
        "mov x13, #192\n"
    };
    (together $cols:literal $blocks:literal) => {
        concat!(
            "add x10, x10, x14\n tst x10, #63\n csel x12, x13, xzr, eq\n add x10, x10, x12\n cmp x10, x2\n b.lo 2b\n",
        )
    };
    (start apart) => {
        "mov x13, #0\n"
    };
    (apart $cols:literal $blocks:literal) => {
        concat!(
            "add x10, x10, x14\n add x11, x11, x14\n cmp x10, x12\n b.lo 2b\n",
            // The next step: its blocks end so many bytes after these.
            "add x13, x13, #",
            $cols,
            "\n mov x11, x13\n",
            "add x12, x12, #64*",
            $blocks,
            "\n sub x10, x12, #64\n cmp x10, x2\n b.lo 2b\n",
        )
    };
}

/// A chunk of one row, into its sums `a`, `b` and `c`.
///
/// T2: 3 masks and 1 shift; planes 1 and 2 keep their weights 4 and 16 in sums of their own. I4: 1 mask and 1 shift.
macro_rules! row {
    ($format:ident $from:literal $a:literal $b:literal $c:literal) => {
        concat!("ld1b {{z24.b}}, p0/z, [", $from, ", x10]\n", row!(@$format $a $b $c))
    };
    (@t2 $a:literal $b:literal $c:literal) => {
        concat!(
            "and z25.d, z24.d, z20.d\n and z26.d, z24.d, z21.d\n and z27.d, z24.d, z22.d\n lsr z28.b, z24.b, #6\n",
            "sdot z", $a, ".s, z25.b, z16.b\n sdot z", $b, ".s, z26.b, z17.b\n",
            "sdot z", $c, ".s, z27.b, z18.b\n sdot z", $a, ".s, z28.b, z19.b\n",
        )
    };
    (@i4 $a:literal $b:literal $c:literal) => {
        concat!(
            "and z25.d, z24.d, z20.d\n lsr z26.b, z24.b, #4\n",
            "sdot z", $a, ".s, z25.b, z16.b\n sdot z", $b, ".s, z26.b, z17.b\n",
        )
    };
    (@i8 $a:literal $b:literal $c:literal) => { concat!("sdot z", $a, ".s, z24.b, z16.b\n") };
}

/// Adds up a row's sums, dividing those that keep a weight (all are multiples of it), and stores the total.
macro_rules! total {
    ($format:ident $at:literal $a:literal $b:literal $c:literal) => {
        concat!(total!(@$format $a $b $c), "saddv d", $a, ", p0, z", $a, ".s\n str s", $a, ", [x3, #", $at, "]\n")
    };
    (@t2 $a:literal $b:literal $c:literal) => {
        concat!(
            "asr z", $b, ".s, z", $b, ".s, #2\n asr z", $c, ".s, z", $c, ".s, #4\n",
            "add z", $a, ".s, z", $a, ".s, z", $b, ".s\n add z", $a, ".s, z", $a, ".s, z", $c, ".s\n",
        )
    };
    (@i4 $a:literal $b:literal $c:literal) => { concat!("add z", $a, ".s, z", $a, ".s, z", $b, ".s\n") };
    (@i8 $a:literal $b:literal $c:literal) => { "" };
}

macro_rules! matvec_planes {
    ($(#[$attribute:meta])* $name:ident, $format:ident, $cols:literal, $blocks:literal blocks, $next:ident at $place:literal) => {
        $(#[$attribute])*
        ///
        /// # Safety
        /// From each of `rows` on, every so many blocks lies one that may be read, `steps` in all.
        #[target_feature(enable = "sve")]
        #[inline(never)]
        unsafe fn $name(rows: [*const Block; 4], steps: usize, x: &[i8]) -> [i32; 4] {
            assert!(steps > 0 && x.len() >= steps * $cols);
            let mut y = [0; 4];
            // SAFETY: the loop reads these blocks of `rows` ("together" takes them for those of a tile), and a step's columns of `x` for each, whose length was checked; it
            // writes `y`. Every register that it changes is named.
            unsafe {
                asm!(
                    zero!(0 1 2 3 4 5 6 7 8 9 10 11), masks!($format),
                    "add x7, x1, #64", "add x8, x1, #128", "add x9, x1, #192",
                    "mov x10, #0", "mov x11, #0", "mov x12, #64",
                    "cntb x14, pow2", "cmp x14, x12", "csel x14, x14, x12, lo", "whilelo p0.b, xzr, x14",
                    next!(start $next),
                    "2:", activations!($format $place),
                    row!($format "x0" 0 1 2), row!($format "x4" 3 4 5), row!($format "x5" 6 7 8), row!($format "x6" 9 10 11),
                    next!($next $cols $blocks),
                    "ptrue p0.b",
                    total!($format 0 0 1 2), total!($format 4 3 4 5), total!($format 8 6 7 8), total!($format 12 9 10 11),
                    in("x0") rows[0], in("x4") rows[1], in("x5") rows[2], in("x6") rows[3],
                    in("x1") x.as_ptr(), in("x2") steps * $blocks * Block::BYTES, in("x3") &mut y,
                    out("x7") _, out("x8") _, out("x9") _, out("x10") _,
                    out("x11") _, out("x12") _, out("x13") _, out("x14") _, out("p0") _,
                    out("v0") _, out("v1") _, out("v2") _, out("v3") _, out("v4") _, out("v5") _, out("v6") _, out("v7") _,
                    out("v8") _, out("v9") _, out("v10") _, out("v11") _, out("v16") _, out("v17") _, out("v18") _,
                    out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v24") _, out("v25") _, out("v26") _,
                    out("v27") _, out("v28") _, options(nostack),
                );
            }
            y
        }
    };
}

matvec_planes!(
    /// `Σ c·x` of 4 rows, with the codes `c` of T2.
    matvec_t2_sve, t2, 256, 4 blocks, together at "x10"
);
matvec_planes!(
    /// `Σ c·x` of 4 rows, with the codes `c` of I4.
    matvec_i4_sve, i4, 128, 4 blocks, apart at "x11"
);
matvec_planes!(
    /// `Σ w·x` of 4 rows of I8.
    matvec_i8_sve, i8, 64, 4 blocks, apart at "x11"
);
matvec_planes!(
    /// `Σ c·x` of 4 rows that are stored by themselves, with the codes `c` of T2.
    dot_rows_t2r_sve, t2, 256, 1 blocks, apart at "x11"
);

macro_rules! tile {
    ($name:ident, $matvec:ident) => {
        /// The same of the rows of a tile.
        #[target_feature(enable = "sve")]
        pub(crate) fn $name(tile: &[[Block; 4]], x: &[i8]) -> [i32; 4] {
            let first = tile.as_ptr().cast::<Block>();
            // SAFETY: a step of the tile is a block of each row.
            unsafe { $matvec([0, 1, 2, 3].map(|row| first.wrapping_add(row)), tile.len(), x) }
        }
    };
}

tile!(tile_t2_sve, matvec_t2_sve);
tile!(tile_i4_sve, matvec_i4_sve);
tile!(tile_i8_sve, matvec_i8_sve);

/// `Σ c·x` of any 4 rows of T2R.
#[target_feature(enable = "sve")]
pub(crate) fn rows_t2r_sve(rows: [&[Block]; 4], x: &[i8]) -> [i32; 4] {
    let steps = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == steps));
    // SAFETY: the slices are as long as that.
    unsafe { dot_rows_t2r_sve(rows.map(|row| row.as_ptr()), steps, x) }
}
