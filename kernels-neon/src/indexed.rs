//! Batches of T2, I4 and I8 by `sdot` with an indexed operand: 4 columns of 4 rows, in one vector, times 4 columns of one token.
//!
//! The sums of 8 tokens and 4 rows (I8, which takes no registers to unpack: 8 rows) stay in registers for whole rows. Activations
//! are read where they lie. 16 bytes of 4 rows are brought into that order while they are codes of several planes still, by 8 `zip`.
//! 10.3 cycles for 256 products of T2 and 10.5 of I4 and I8 and 8 tokens; of 4 tokens 12.5, 12.9 and 13.8.
//!
//! The model dispatches three operations a cycle and counts a load as two, so loads stand between products: one after another they
//! cost a cycle more. What lost: bytes of 64 rows unpacked to memory, for a loop over them that took 8.0: 16.9 with what is around it.
use bitnet_kernel::{Activations, Block, Format, Kernels, Matrix};
use core::arch::aarch64::*;
use core::arch::asm;

/// Rows whose weights stay in a cache for all tokens.
const ROWS: usize = 64;

/// A tile of a format in planes: 4 blocks a step, one of each row.
type Planes<'a> = &'a [[Block; 4]];

/// The products of a matrix and several tokens; `k` multiplies single ones. The entrance checks were made.
#[target_feature(enable = "neon,dotprod")]
pub(crate) fn matmat(k: &dyn Kernels, w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    let rows = w.rows();
    if w.cols() == 0 || rows == 0 {
        return y.fill(0);
    }
    for first in (0..rows).step_by(ROWS) {
        let here = first..rows.min(first + ROWS);
        let w = w.slice(here.clone());
        let (mut tokens, mut y) = (tokens, &mut *y);
        while !tokens.is_empty() {
            // Two and three take as long one by one, five as long as four and one.
            let together = match tokens.len() {
                1..=3 => 1,
                4..=5 => 4,
                n => n.min(8),
            };
            let (these, sums);
            (these, tokens) = tokens.split_at(together);
            (sums, y) = y.split_at_mut(together * rows);
            match together {
                1 => k.matvec(w, these[0], &mut sums[here.clone()]),
                4 => match w.format() {
                    Format::T2 => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_t2_4_neon_dotprod(w, x)),
                    Format::I4 => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_i4_4_neon_dotprod(w, x)),
                    _ => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_i8_4_neon_dotprod(w, x)),
                },
                _ => match w.format() {
                    Format::T2 => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_t2_8_neon_dotprod(w, x)),
                    Format::I4 => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_i4_8_neon_dotprod(w, x)),
                    _ => each_tiles(w, these, &mut sums[first..], rows, |w, x| matmat_i8_8_neon_dotprod(w, x)),
                },
            }
        }
    }
}

/// Cuts a product of at most `TOKENS` tokens, whose sums lie `stride` apart, into those of `N` tiles. The last token and the last
/// tile stand for those that are missing.
#[target_feature(enable = "neon")]
fn each_tiles<const N: usize, const TOKENS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    stride: usize,
    dots: impl Fn([Planes<'_>; N], [&[i8]; TOKENS]) -> [[int32x4_t; TOKENS]; N],
) {
    let tile_blocks = w.format().tile_blocks(w.cols());
    let bias = match w.format() {
        Format::T2 => 1,
        Format::I4 => 8,
        _ => 0,
    };
    let x = core::array::from_fn(|t| tokens[t.min(tokens.len() - 1)].values());
    for (first, blocks) in (0..w.rows()).step_by(4 * N).zip(w.blocks().chunks(N * tile_blocks)) {
        let last = blocks.len() / tile_blocks - 1;
        let tiles = core::array::from_fn(|i| blocks[i.min(last) * tile_blocks..][..tile_blocks].as_chunks().0);
        let sums = dots(tiles, x);
        for (t, token) in tokens.iter().enumerate() {
            let y = &mut y[t * stride..][first..w.rows().min(first + 4 * N)];
            for (y, sums) in y.chunks_mut(4).zip(&sums) {
                let dots = vsubq_s32(sums[t], vdupq_n_s32(bias * token.sum()));
                match <&mut [i32; 4]>::try_from(&mut *y) {
                    // SAFETY: 4 sums are 16 bytes.
                    Ok(y) => unsafe { vst1q_s32(y.as_mut_ptr(), dots) },
                    Err(_) => {
                        let mut some = [0; 4];
                        // SAFETY: as above.
                        unsafe { vst1q_s32(some.as_mut_ptr(), dots) };
                        y.copy_from_slice(&some[..y.len()]);
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A lane of a sum is a row's: the widest has 65,536 columns, and codes are at most 3 (T2), 15 (I4) and 128 (I8): 2^16 · 2^7 · 2^7 = 2^30.
//
// Numbers are those of vector registers. Of 8 tokens, sums are in 0 to 7 and of I8's other four rows in 8 to 15; packed codes are in
// 16 to 19, those of one plane in 20 to 23. A quarter is 16 of the 64 bytes of a block.

/// 16 activations of a token.
macro_rules! load {
    ($x:literal $from:literal, $plane:literal $quarter:literal) => {
        concat!("ldr q", $x, ", [", $from, ", #64*", $plane, "+16*", $quarter, "]\n")
    };
}

/// 16 columns of 4 rows with one token, and a load that stands between.
macro_rules! sdot {
    ($sums:literal $x:literal, ($a:literal $b:literal $c:literal $d:literal), $between:expr) => {
        concat!(
            "sdot v", $sums, ".4s, v", $a, ".16b, v", $x, ".4b[0]\n", $between, "sdot v", $sums, ".4s, v", $b,
            ".16b, v", $x, ".4b[1]\n", "sdot v", $sums, ".4s, v", $c, ".16b, v", $x, ".4b[2]\n", "sdot v", $sums,
            ".4s, v", $d, ".16b, v", $x, ".4b[3]\n"
        )
    };
}

/// 16 bytes of 4 rows from `$from` on as 4 vectors `$a` to `$d` of 4 bytes of each row, by way of four others.
macro_rules! rows {
    ($from:literal $quarter:literal, $a:literal $b:literal $c:literal $d:literal, $e:literal $f:literal $g:literal $h:literal) => {
        concat!(
            "ldr q", $a, ", [", $from, ", #16*", $quarter, "]\n ldr q", $b, ", [", $from, ", #64+16*", $quarter, "]\n",
            "ldr q", $c, ", [", $from, ", #128+16*", $quarter, "]\n ldr q", $d, ", [", $from, ", #192+16*", $quarter, "]\n",
            zip!($e $f, $a $c), zip!($g $h, $b $d), zip!($a $b, $e $g), zip!($c $d, $f $h),
        )
    };
}
macro_rules! zip {
    ($low:literal $high:literal, $a:literal $b:literal) => {
        concat!("zip1 v", $low, ".4s, v", $a, ".4s, v", $b, ".4s\n zip2 v", $high, ".4s, v", $a, ".4s, v", $b, ".4s\n",)
    };
}

/// The codes of a plane: the first one, one between, the last one.
macro_rules! codes {
    (first $codes:literal $packed:literal $bits:literal) => {
        concat!("and v", $codes, ".16b, v", $packed, ".16b, v31.16b\n")
    };
    (next $codes:literal $packed:literal $bits:literal) => {
        concat!(
            "ushr v", $packed, ".16b, v", $packed, ".16b, #", $bits, "\n", codes!(first $codes $packed $bits)
        )
    };
    (last $codes:literal $packed:literal $bits:literal) => {
        concat!("ushr v", $codes, ".16b, v", $packed, ".16b, #", $bits, "\n")
    };
}

/// A plane of 4 rows with 4 or 8 tokens.
macro_rules! plane {
    ($tokens:tt $which:tt $bits:literal, $p:literal $q:literal) => {
        concat!(
            codes!($which 20 16 $bits), codes!($which 21 17 $bits), load!(24 "{x0}", $p $q), codes!($which 22 18 $bits),
            codes!($which 23 19 $bits), load!(25 "{x1}", $p $q), plane!(@$tokens $p $q (20 21 22 23))
        )
    };
    (@4 $p:literal $q:literal $codes:tt) => {
        concat!(
            sdot!(0 24, $codes, load!(26 "{x2}", $p $q)), sdot!(1 25, $codes, load!(27 "{x3}", $p $q)),
            sdot!(2 26, $codes, ""), sdot!(3 27, $codes, "")
        )
    };
    (@8 $p:literal $q:literal $codes:tt) => {
        concat!(
            sdot!(0 24, $codes, load!(26 "{x2}", $p $q)), sdot!(1 25, $codes, load!(27 "{x3}", $p $q)),
            sdot!(2 26, $codes, load!(28 "{x4}", $p $q)), sdot!(3 27, $codes, load!(29 "{x5}", $p $q)),
            sdot!(4 28, $codes, load!(30 "{x6}", $p $q)), sdot!(5 29, $codes, load!(24 "{x7}", $p $q)),
            sdot!(6 30, $codes, ""), sdot!(7 24, $codes, "")
        )
    };
}

/// A token of I8 with 8 rows.
macro_rules! eight_rows {
    ($low:literal $high:literal $x:literal, $between:expr) => {
        concat!(sdot!($low $x, (16 17 18 19), $between), sdot!($high $x, (20 21 22 23), ""))
    };
}

/// 16 bytes of each row.
macro_rules! quarter {
    (t2 $tokens:tt $q:literal) => {
        concat!(
            rows!("{w0}" $q, 16 17 18 19, 20 21 22 23), plane!($tokens first 2, 0 $q), plane!($tokens next 2, 1 $q),
            plane!($tokens next 2, 2 $q), plane!($tokens last 2, 3 $q)
        )
    };
    (i4 $tokens:tt $q:literal) => {
        concat!(
            rows!("{w0}" $q, 16 17 18 19, 20 21 22 23), plane!($tokens first 4, 0 $q), plane!($tokens last 4, 1 $q)
        )
    };
    (i8 $tokens:tt $q:literal) => {
        concat!(
            rows!("{w0}" $q, 16 17 18 19, 24 25 26 27), load!(28 "{x0}", 0 $q), load!(29 "{x1}", 0 $q),
            rows!("{w1}" $q, 20 21 22 23, 24 25 26 27), quarter!(@$tokens $q)
        )
    };
    (@4 $q:literal) => {
        concat!(
            eight_rows!(0 8 28, load!(30 "{x2}", 0 $q)), eight_rows!(1 9 29, load!(31 "{x3}", 0 $q)), eight_rows!(2 10 30, ""),
            eight_rows!(3 11 31, "")
        )
    };
    (@8 $q:literal) => {
        concat!(
            eight_rows!(0 8 28, load!(30 "{x2}", 0 $q)), eight_rows!(1 9 29, load!(31 "{x3}", 0 $q)),
            eight_rows!(2 10 30, load!(28 "{x4}", 0 $q)), eight_rows!(3 11 31, load!(29 "{x5}", 0 $q)),
            eight_rows!(4 12 28, load!(30 "{x6}", 0 $q)), eight_rows!(5 13 29, load!(31 "{x7}", 0 $q)), eight_rows!(6 14 30, ""),
            eight_rows!(7 15 31, "")
        )
    };
}

/// To the next step of `$cols` columns.
macro_rules! advance {
    (4 $cols:literal) => {
        concat!(
            "add {x0}, {x0}, #", $cols, "\n add {x1}, {x1}, #", $cols, "\n add {x2}, {x2}, #", $cols, "\n add {x3}, {x3}, #", $cols,
            "\n add {w0}, {w0}, #256\n add {w1}, {w1}, #256\n subs {n}, {n}, #1\n b.ne 2b"
        )
    };
    (8 $cols:literal) => {
        concat!(
            "add {x4}, {x4}, #", $cols, "\n add {x5}, {x5}, #", $cols, "\n add {x6}, {x6}, #", $cols, "\n add {x7}, {x7}, #", $cols,
            "\n", advance!(4 $cols)
        )
    };
}

macro_rules! matmat {
    ($($name:ident: $format:ident $tiles:literal $tokens:tt $cols:literal $mask:literal $($more:literal)*,)+) => { $(
        #[target_feature(enable = "neon,dotprod")]
        #[inline(never)]
        fn $name(w: [Planes<'_>; $tiles], x: [&[i8]; $tokens]) -> [[int32x4_t; $tokens]; $tiles] {
            let n = w[0].len();
            assert!(n > 0 && w.iter().all(|w| w.len() == n) && x.iter().all(|x| x.len() >= n * $cols));
            let mut sums = [vdupq_n_s32(0); 16];
            // SAFETY: the assertion: at each place of `w` are `n` steps of 4 blocks, at each of `x` their columns, and `n` is not
            // none. Every register that the loop changes is named.
            unsafe {
                asm!("2:", quarter!($format $tokens 0), quarter!($format $tokens 1), quarter!($format $tokens 2),
                    quarter!($format $tokens 3), advance!($tokens $cols),
                    w0 = inout(reg) w[0].as_ptr() => _, w1 = inout(reg) w[$tiles - 1].as_ptr() => _, n = inout(reg) n => _,
                    x0 = inout(reg) x[0].as_ptr() => _, x1 = inout(reg) x[1].as_ptr() => _,
                    x2 = inout(reg) x[2].as_ptr() => _, x3 = inout(reg) x[3].as_ptr() => _,
                    $(x4 = inout(reg) x[4 + $more].as_ptr() => _, x5 = inout(reg) x[5].as_ptr() => _,
                    x6 = inout(reg) x[6].as_ptr() => _, x7 = inout(reg) x[7].as_ptr() => _,)*
                    inout("v0") sums[0], inout("v1") sums[1], inout("v2") sums[2], inout("v3") sums[3], inout("v4") sums[4],
                    inout("v5") sums[5], inout("v6") sums[6], inout("v7") sums[7], inout("v8") sums[8], inout("v9") sums[9],
                    inout("v10") sums[10], inout("v11") sums[11], inout("v12") sums[12], inout("v13") sums[13],
                    inout("v14") sums[14], inout("v15") sums[15],
                    out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _,
                    out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _,
                    out("v30") _, inout("v31") vdupq_n_u8($mask) => _, options(readonly, nostack));
            }
            core::array::from_fn(|tile| core::array::from_fn(|t| sums[8 * tile + t]))
        }
    )+ };
}

// Name, format, tiles, tokens, columns of a step, the mask of a plane; and, with 8 tokens, that there are four more.
matmat! {
    matmat_t2_4_neon_dotprod: t2 1 4 256 3, matmat_t2_8_neon_dotprod: t2 1 8 256 3 0,
    matmat_i4_4_neon_dotprod: i4 1 4 128 15, matmat_i4_8_neon_dotprod: i4 1 8 128 15 0,
    matmat_i8_4_neon_dotprod: i8 2 4 64 0, matmat_i8_8_neon_dotprod: i8 2 8 64 0 0,
}
