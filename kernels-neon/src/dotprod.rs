//! NEON with dot products (Armv8.2, Cortex-A76 and later): T2, I4 and I8 by `sdot`, batches of them by [`crate::indexed`], B1 and TL
//! by the tables of [`crate::lanes`], token by token.
//!
//! The loops are assembly, since the compiler joins loads to `ldp`, which the model of the N1 counts as four operations where an
//! `ld1` of two registers is three: T2 took 21.6 cycles from intrinsics and takes 16.0. An `ld1` of four registers is five, which
//! is what I4 (20.5, now 16.0) and I8 (16.0, now 13.5) load. Tried and lost:
//!
//! - T2 by one shift and four masks: 5 cycles more than three masks and one shift.
//! - I4 with 4 rows: 16.5, for the loads of activations serve half as many rows; I8 likewise: 15.0.
//! - Batches by `sdot` of 4 rows and 4 tokens, a sum of each pair: 12.9 for T2, 13.2 for I4, 15.2 for I8.
//! - B1 and TL unpacked to bytes and multiplied by 8 tokens by `sdot`: 28.9 and 34.8, where tables take 10.8 and 17.7.
//!
//! There is no software prefetch: it could not be measured, and the cores in question follow a sequential stream well.
use crate::apart::{self, SUMMED};
use crate::{float, indexed, lanes, panel};
use bitnet_kernel::float::Cache;
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix, blocks};
use core::arch::aarch64::*;
use core::arch::asm;

/// Invariant: a value exists only where the CPU has dot products. [`detect`] and [`Dotprod::assume`] make them.
#[derive(Debug)]
pub(crate) struct Dotprod(());

impl Dotprod {
    /// The proof, from one who has another.
    ///
    /// # Safety
    /// Nobody may use it where the CPU has no dot products.
    pub(crate) const unsafe fn assume() -> Self {
        Self(())
    }
}

/// See [`crate::dotprod`].
pub(crate) fn detect() -> Option<&'static Dotprod> {
    static DOTPROD: Dotprod = Dotprod(());
    #[cfg(feature = "std")]
    let present = std::arch::is_aarch64_feature_detected!("dotprod");
    #[cfg(all(not(feature = "std"), feature = "id-registers"))]
    let present = crate::registers::dotprod();
    #[cfg(not(any(feature = "std", feature = "id-registers")))]
    let present = cfg!(target_feature = "dotprod");
    present.then_some(&DOTPROD)
}

impl Kernels for Dotprod {
    fn name(&self) -> &'static str {
        "neon-dotprod"
    }
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        // SAFETY: every build for this architecture has NEON.
        unsafe { lanes::fill(format, values, int4, tables) }
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has dot products; the entrance checks were made.
        unsafe {
            match w.format() {
                Format::B1 | Format::TL => lanes::matmat(w, &[x], y),
                Format::T2 => each_tiles(w, y, |[tile]| [matvec_t2_neon_dotprod(tile, x)]),
                Format::I4 => each_tiles(w, y, |tiles| matvec_i4_neon_dotprod(tiles, x)),
                Format::I8 => each_tiles(w, y, |tiles| matvec_i8_neon_dotprod(tiles, x)),
                _ => panic!("{} is not multiplied by this method", w.format().name()),
            }
        }
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        // SAFETY: `self` exists, so the CPU has dot products; the entrance checks were made.
        unsafe {
            match w.format() {
                Format::B1 | Format::TL => lanes::matmat(w, x.tokens(), y),
                Format::T2 | Format::I4 | Format::I8 => indexed::matmat(self, w, x.tokens(), y),
                _ => panic!("{} is not multiplied by this method", w.format().name()),
            }
        }
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        y.fill(0.0);
        // SAFETY: every build for this architecture has NEON.
        unsafe { panel::grouped_without(self, w, x.tokens(), y) }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has dot products.
        apart::dot_rows(w, rows, x, y, |rows, x| unsafe { matvec_t2r_neon_dotprod(rows, x) });
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        // SAFETY: as above.
        apart::sum_rows(w, rows, x, y, |rows, at, x| unsafe { sum_t2r_neon_dotprod(rows, at, x) });
    }
    fn matvec_blocks(&self, w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
        // SAFETY: `self` exists, so the CPU has dot products.
        unsafe { matvec_blocks_neon_dotprod(w, x, y) }
    }
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        float::attend(q, keys, values, scale, out);
    }
}

/// The portable body, of which the compiler makes `sdot`.
#[target_feature(enable = "neon,dotprod")]
fn matvec_blocks_neon_dotprod(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    blocks::matvec_blocks(w, x, y);
}

/// A tile of a format in planes: 4 blocks a step, one of each row.
type Planes<'a> = &'a [[Block; 4]];

/// Cuts a product into those of `N` tiles; of the last ones some may be the same.
fn each_tiles<const N: usize>(w: Matrix<'_>, y: &mut [i32], dots: impl Fn([Planes<'_>; N]) -> [[i32; 4]; N]) {
    if w.cols() == 0 {
        return y.fill(0);
    }
    let tile_blocks = w.format().tile_blocks(w.cols());
    for (y, blocks) in y.chunks_mut(4 * N).zip(w.blocks().chunks(N * tile_blocks)) {
        let last = blocks.len() / tile_blocks - 1;
        let tiles = core::array::from_fn(|i| blocks[i.min(last) * tile_blocks..][..tile_blocks].as_chunks().0);
        y.iter_mut().zip(dots(tiles).as_flattened()).for_each(|(y, &dot)| *y = dot);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// A lane of `sdot` is at most `2^31 / 4` in every sum below: the widest row has 65,536 columns, a quarter of them in one lane, and
// codes at their weights are at most 192 (T2, an invalid one), 15 (I4) and 128 (I8): 16,384 · 192 · 128 < 2^29.

/// 16 bytes `$v` of a row of T2: 3 masks, 1 shift and 4 `sdot` for 64 weights. Planes 1 and 2 keep their weights 4 and 16.
macro_rules! t2_vector {
    ($v:literal, $x0:literal $x1:literal $x2:literal $x3:literal, $a1:literal $a4:literal $a16:literal) => {
        concat!(
            "and v25.16b, ",
            $v,
            ".16b, v20.16b\n",
            "and v26.16b, ",
            $v,
            ".16b, v21.16b\n",
            "and v27.16b, ",
            $v,
            ".16b, v22.16b\n",
            "ushr v28.16b, ",
            $v,
            ".16b, #6\n",
            "sdot ",
            $a1,
            ".4s, v25.16b, ",
            $x0,
            ".16b\n",
            "sdot ",
            $a4,
            ".4s, v26.16b, ",
            $x1,
            ".16b\n",
            "sdot ",
            $a16,
            ".4s, v27.16b, ",
            $x2,
            ".16b\n",
            "sdot ",
            $a1,
            ".4s, v28.16b, ",
            $x3,
            ".16b\n"
        )
    };
}

/// 32 bytes of a row of T2 at pointer `$w`, which moves on by `$by`.
macro_rules! t2_row {
    ($w:literal, $by:literal, $($acc:literal)*) => {
        concat!("ld1 {{v23.16b, v24.16b}}, [", $w, "], ", $by, "\n",
            t2_vector!("v23", "v12" "v14" "v16" "v18", $($acc)*), t2_vector!("v24", "v13" "v15" "v17" "v19", $($acc)*))
    };
}

/// 32 bytes of 4 rows of T2, each at its pointer, with the activations of the 4 planes from `$x` on.
macro_rules! t2_half {
    ($x:literal, $w0:literal $w1:literal $w2:literal $w3:literal, $by:literal) => {
        concat!("ld1 {{v12.16b, v13.16b}}, [", $x, "], {block}\n", "ld1 {{v14.16b, v15.16b}}, [", $x, "], {block}\n",
            "ld1 {{v16.16b, v17.16b}}, [", $x, "], {block}\n", "ld1 {{v18.16b, v19.16b}}, [", $x, "], {block}\n",
            t2_row!($w0, $by, "v0" "v1" "v2"), t2_row!($w1, $by, "v3" "v4" "v5"),
            t2_row!($w2, $by, "v6" "v7" "v8"), t2_row!($w3, $by, "v9" "v10" "v11"))
    };
}

/// The dot products of 4 rows: 16.0 cycles.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_t2_neon_dotprod(steps: Planes<'_>, x: Activations<'_>) -> [i32; 4] {
    let xs = &x.values().as_chunks::<256>().0[..steps.len()];
    assert!(!steps.is_empty());
    let mut acc = [vdupq_n_s32(0); 12];
    // SAFETY: as many steps of 4 blocks lie at `steps` as of 256 activations at `xs`, and not none. The loop reads both halves of
    // all of them by a pair of pointers each, and its registers are all named.
    unsafe {
        asm!("2:",
            t2_half!("{x0}", "{w0}" "{w0}" "{w0}" "{w0}", "{block}"), t2_half!("{x1}", "{w1}" "{w1}" "{w1}" "{w1}", "{block}"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w0 = inout(reg) steps.as_ptr() => _, w1 = inout(reg) steps.as_ptr().cast::<u8>().add(32) => _,
            x0 = inout(reg) xs.as_ptr() => _, x1 = inout(reg) xs.as_ptr().cast::<u8>().add(32) => _,
            n = inout(reg) steps.len() => _, block = in(reg) Block::BYTES,
            in("v20") vdupq_n_u8(0x03), in("v21") vdupq_n_u8(0x0c), in("v22") vdupq_n_u8(0x30),
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7], inout("v8") acc[8], inout("v9") acc[9],
            inout("v10") acc[10], inout("v11") acc[11],
            out("v12") _, out("v13") _, out("v14") _, out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, options(readonly, nostack));
    }
    t2_dots(acc, x)
}

/// The planes together: all sums are multiples of their weights, so the shifts are exact.
#[target_feature(enable = "neon")]
#[inline]
fn t2_dots(acc: [int32x4_t; 12], x: Activations<'_>) -> [i32; 4] {
    core::array::from_fn(|r| {
        let [a1, a4, a16] = [acc[3 * r], acc[3 * r + 1], acc[3 * r + 2]].map(|a| vaddvq_s32(a));
        a1 + (a4 >> 2) + (a16 >> 4) - x.sum()
    })
}

/// [`matvec_t2_neon_dotprod`] of rows that are stored apart.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_t2r_neon_dotprod(rows: [&[Block]; 4], x: Activations<'_>) -> [i32; 4] {
    let xs = x.values().as_chunks::<256>().0;
    assert!(!xs.is_empty() && rows.iter().all(|row| row.len() == xs.len()));
    let mut acc = [vdupq_n_s32(0); 12];
    // SAFETY: the assertion: every row holds as many blocks as `xs` steps of 256 activations, and not none. The loop reads one half
    // of a block of every row and then the other. The registers are all named.
    unsafe {
        asm!("2:",
            t2_half!("{x0}", "{w0}" "{w1}" "{w2}" "{w3}", "#32"), t2_half!("{x1}", "{w0}" "{w1}" "{w2}" "{w3}", "#32"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w0 = inout(reg) rows[0].as_ptr() => _, w1 = inout(reg) rows[1].as_ptr() => _,
            w2 = inout(reg) rows[2].as_ptr() => _, w3 = inout(reg) rows[3].as_ptr() => _,
            x0 = inout(reg) xs.as_ptr() => _, x1 = inout(reg) xs.as_ptr().cast::<u8>().add(32) => _,
            n = inout(reg) xs.len() => _, block = in(reg) Block::BYTES,
            in("v20") vdupq_n_u8(0x03), in("v21") vdupq_n_u8(0x0c), in("v22") vdupq_n_u8(0x30),
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7], inout("v8") acc[8], inout("v9") acc[9],
            inout("v10") acc[10], inout("v11") acc[11],
            out("v12") _, out("v13") _, out("v14") _, out("v15") _, out("v16") _, out("v17") _, out("v18") _, out("v19") _,
            out("v23") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, options(readonly, nostack));
    }
    t2_dots(acc, x)
}

/// Four columns of four rows, in `$v`, times the four `x` in `v24`, added to the sums of each plane.
macro_rules! sum_columns {
    ($v:literal, $a1:literal $a4:literal $a16:literal $a64:literal) => {
        concat!(
            "and v25.16b, ",
            $v,
            ".16b, v28.16b\n",
            "and v26.16b, ",
            $v,
            ".16b, v29.16b\n",
            "and v27.16b, ",
            $v,
            ".16b, v30.16b\n",
            "ushr v31.16b, ",
            $v,
            ".16b, #6\n",
            "sdot ",
            $a1,
            ".4s, v25.16b, v24.16b\n",
            "sdot ",
            $a4,
            ".4s, v26.16b, v24.16b\n",
            "sdot ",
            $a16,
            ".4s, v27.16b, v24.16b\n",
            "sdot ",
            $a64,
            ".4s, v31.16b, v24.16b\n"
        )
    };
}

/// See [`apart::sum_rows`]. Bytes of four rows by turns make a column a lane of `sdot`: 21 cycles for 256 weights, where products of 16 bits by one row's `x` take 32.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn sum_t2r_neon_dotprod(rows: &[&[Block]], at: usize, x: &[i8; SUMMED]) -> [[i32; 16]; 4] {
    assert!(!rows.is_empty() && rows.len() <= SUMMED && rows.len().is_multiple_of(4));
    assert!(rows.iter().all(|row| at + 16 <= size_of_val(*row)));
    let mut pointers = [core::ptr::null::<u8>(); SUMMED];
    // SAFETY: the assertion: the 16 bytes lie within the row.
    pointers.iter_mut().zip(rows).for_each(|(p, row)| *p = unsafe { row.as_ptr().cast::<u8>().add(at) });
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: four pointers and four `x` an iteration, of which there are as many as fours of rows, and not none. The registers are
    // all named.
    unsafe {
        asm!("2:", "ldp {a}, {b}, [{rows}], #16", "ldp {c}, {d}, [{rows}], #16",
            "ldr q16, [{a}]", "ldr q17, [{b}]", "ldr q18, [{c}]", "ldr q19, [{d}]", "ld1r {{v24.4s}}, [{x}], #4",
            "zip1 v20.16b, v16.16b, v18.16b", "zip2 v21.16b, v16.16b, v18.16b",
            "zip1 v22.16b, v17.16b, v19.16b", "zip2 v23.16b, v17.16b, v19.16b",
            "zip1 v16.16b, v20.16b, v22.16b", "zip2 v17.16b, v20.16b, v22.16b",
            "zip1 v18.16b, v21.16b, v23.16b", "zip2 v19.16b, v21.16b, v23.16b",
            sum_columns!("v16", "v0" "v4" "v8" "v12"), sum_columns!("v17", "v1" "v5" "v9" "v13"),
            sum_columns!("v18", "v2" "v6" "v10" "v14"), sum_columns!("v19", "v3" "v7" "v11" "v15"),
            "subs {n}, {n}, #1", "b.ne 2b",
            rows = inout(reg) pointers.as_ptr() => _, x = inout(reg) x.as_ptr() => _, n = inout(reg) rows.len() / 4 => _,
            a = out(reg) _, b = out(reg) _, c = out(reg) _, d = out(reg) _,
            in("v28") vdupq_n_u8(0x03), in("v29") vdupq_n_u8(0x0c), in("v30") vdupq_n_u8(0x30),
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7], inout("v8") acc[8], inout("v9") acc[9],
            inout("v10") acc[10], inout("v11") acc[11], inout("v12") acc[12], inout("v13") acc[13],
            inout("v14") acc[14], inout("v15") acc[15],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v31") _, options(readonly, nostack));
    }
    // Planes 1 and 2 kept their weights 4 and 16.
    let plane = |i: usize, shift: i32| {
        let mut sums = [0; 16];
        for (sums, &acc) in sums.as_chunks_mut::<4>().0.iter_mut().zip(&acc[4 * i..]) {
            // SAFETY: 4 sums are 16 bytes.
            unsafe { vst1q_s32(sums.as_mut_ptr(), acc) };
        }
        sums.map(|sum| sum >> shift)
    };
    [plane(0, 0), plane(1, 2), plane(2, 4), plane(3, 0)]
}

/// A block of a row of I4 at `{$w}`: 1 mask, 1 shift and 2 `sdot` for 32 weights of 16 bytes.
macro_rules! i4_row {
    ($w:literal, $a:literal $b:literal) => {
        concat!("ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [", $w, "], #64\n", i4_vector!("v24", "v16" "v20", $a $b),
            i4_vector!("v25", "v17" "v21", $a $b), i4_vector!("v26", "v18" "v22", $a $b),
            i4_vector!("v27", "v19" "v23", $a $b))
    };
}

/// 16 bytes of a row of I4.
macro_rules! i4_vector {
    ($v:literal, $x0:literal $x1:literal, $a:literal $b:literal) => {
        concat!(
            "and v28.16b, ",
            $v,
            ".16b, v30.16b\n",
            "ushr v29.16b, ",
            $v,
            ".16b, #4\n",
            "sdot ",
            $a,
            ".4s, v28.16b, ",
            $x0,
            ".16b\n",
            "sdot ",
            $b,
            ".4s, v29.16b, ",
            $x1,
            ".16b\n"
        )
    };
}

/// A block of a row of I8 at `{$w}`: 4 `sdot` and nothing else.
macro_rules! i8_row {
    ($w:literal, $a:literal $b:literal) => {
        concat!(
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [",
            $w,
            "], #64\n",
            "sdot ",
            $a,
            ".4s, v24.16b, v16.16b\n",
            "sdot ",
            $b,
            ".4s, v25.16b, v17.16b\n",
            "sdot ",
            $a,
            ".4s, v26.16b, v18.16b\n",
            "sdot ",
            $b,
            ".4s, v27.16b, v19.16b\n"
        )
    };
}

/// `$row` for 8 rows of two tiles, with two sums each.
macro_rules! eight_rows {
    ($row:ident) => {
        concat!($row!("{w0}", "v0" "v1"), $row!("{w0}", "v2" "v3"), $row!("{w0}", "v4" "v5"), $row!("{w0}", "v6" "v7"),
            $row!("{w1}", "v8" "v9"), $row!("{w1}", "v10" "v11"), $row!("{w1}", "v12" "v13"), $row!("{w1}", "v14" "v15"))
    };
}

/// The loop of [`matvec_i4_neon_dotprod`] and [`matvec_i8_neon_dotprod`] over tiles `$tiles` and activations `$xs`, of which
/// one step is loaded by `$loads`.
///
/// To be used where both tiles hold as many steps of 4 blocks as `$xs` of the activations that `$loads` and `$row` read, and at
/// least one.
macro_rules! eight_rows_loop {
    ($tiles:ident, $xs:ident, $acc:ident, $row:ident, $($loads:literal),*) => {
        asm!("2:", $($loads,)* eight_rows!($row), "subs {n}, {n}, #1", "b.ne 2b",
            w0 = inout(reg) $tiles[0].as_ptr() => _, w1 = inout(reg) $tiles[1].as_ptr() => _,
            x = inout(reg) $xs.as_ptr() => _, n = inout(reg) $xs.len() => _, in("v30") vdupq_n_u8(15),
            inout("v0") $acc[0], inout("v1") $acc[1], inout("v2") $acc[2], inout("v3") $acc[3], inout("v4") $acc[4],
            inout("v5") $acc[5], inout("v6") $acc[6], inout("v7") $acc[7], inout("v8") $acc[8], inout("v9") $acc[9],
            inout("v10") $acc[10], inout("v11") $acc[11], inout("v12") $acc[12], inout("v13") $acc[13],
            inout("v14") $acc[14], inout("v15") $acc[15],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _, options(readonly, nostack))
    };
}

/// The dot products of 8 rows: 16.0 cycles.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_i4_neon_dotprod(tiles: [Planes<'_>; 2], x: Activations<'_>) -> [[i32; 4]; 2] {
    let xs = &x.values().as_chunks::<128>().0[..tiles[0].len()];
    assert!(tiles[0].len() == tiles[1].len() && !xs.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: the assertion: both tiles hold as many steps as `xs`, and not none.
    unsafe {
        eight_rows_loop!(
            tiles,
            xs,
            acc,
            i4_row,
            "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], #64",
            "ld1 {{v20.16b, v21.16b, v22.16b, v23.16b}}, [{x}], #64"
        );
    }
    dots_of_pairs(acc, 8 * x.sum())
}

/// The dot products of 8 rows: 13.5 cycles.
#[target_feature(enable = "neon,dotprod")]
#[inline(never)]
fn matvec_i8_neon_dotprod(tiles: [Planes<'_>; 2], x: Activations<'_>) -> [[i32; 4]; 2] {
    let xs = &x.values().as_chunks::<64>().0[..tiles[0].len()];
    assert!(tiles[0].len() == tiles[1].len() && !xs.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: as above.
    unsafe {
        eight_rows_loop!(tiles, xs, acc, i8_row, "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], #64");
    }
    dots_of_pairs(acc, 0)
}

/// The sums of 8 rows, two vectors each, less `bias`.
#[target_feature(enable = "neon")]
#[inline]
fn dots_of_pairs(acc: [int32x4_t; 16], bias: i32) -> [[i32; 4]; 2] {
    let dot = |r: usize| vaddvq_s32(vaddq_s32(acc[2 * r], acc[2 * r + 1])) - bias;
    core::array::from_fn(|tile| core::array::from_fn(|r| dot(4 * tile + r)))
}
