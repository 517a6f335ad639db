//! NEON with matrix products of bytes (Armv8.6: Graviton3 and later): batches by `smmla`, 2 tokens by 2 rows and 8 columns an
//! instruction, in [`crate::batch`], those of grouped formats by the panels of [`crate::panel`]. Single tokens are left to
//! [`crate::dotprod`]: an `smmla` of one token does half its work for nothing.
//!
//! The order of the operands is tokens, rows: a sum of two rows by two tokens then holds the rows of a token side by side.
use crate::dotprod::{self, Dotprod};
use crate::panel::{self, Sums, Tile, Unit};
use crate::{batch, float};
use bitnet_kernel::float::Cache;
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix};
use core::arch::aarch64::*;
use core::arch::asm;

/// Invariant: a value exists only where the CPU has matrix products of bytes. [`detect`] hands out the only one, and
/// only where the CPU has dot products too.
#[derive(Debug)]
pub(crate) struct I8mm(Dotprod);

/// See [`crate::i8mm`].
pub(crate) fn detect() -> Option<&'static I8mm> {
    // SAFETY: it is handed out below alone, where dot products were found.
    static I8MM: I8mm = I8mm(unsafe { Dotprod::assume() });
    #[cfg(feature = "std")]
    let present = std::arch::is_aarch64_feature_detected!("i8mm");
    #[cfg(all(not(feature = "std"), feature = "id-registers"))]
    let present = crate::registers::i8mm();
    #[cfg(not(any(feature = "std", feature = "id-registers")))]
    let present = cfg!(target_feature = "i8mm");
    (present && dotprod::detect().is_some()).then_some(&I8MM)
}

impl Kernels for I8mm {
    fn name(&self) -> &'static str {
        "neon-i8mm"
    }
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        self.0.fill(format, values, int4, tables);
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        self.0.matvec(w, x, y);
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        if x.tokens().len() < batch::tokens_min(w.format()) {
            return self.0.matmat(w, x, y);
        }
        // SAFETY: `self` exists, so the CPU has matrix products.
        unsafe { batch::products(w, x.tokens(), y) }
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        // SAFETY: every build for this architecture has NEON.
        unsafe { panel::matmat_grouped(self, w, x, y) }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        self.0.dot_rows(w, rows, x, y);
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        self.0.sum_rows(w, rows, x, y);
    }
    fn matvec_blocks(&self, w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
        self.0.matvec_blocks(w, x, y);
    }
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        float::attend(q, keys, values, scale, out);
    }
}

/// Half a unit holds 4 rows, or 4 tokens: two pairs of them, of each pair the first 8 columns of both and then the others.
impl Tile for I8mm {
    const FEW: usize = batch::tokens_min(Format::I4G);
    const PLACES: [[usize; 2]; 2] = [[0, 2], [1, 3]];

    fn rows(rows: [uint8x16_t; 4], out: &mut Block) {
        let (first, second) = out.0.split_at_mut(32);
        // SAFETY: every build for this architecture has NEON, and each half is 32 bytes.
        unsafe {
            let rows = rows.map(|row| vreinterpretq_u64_u8(row));
            vst2q_u64(first.as_mut_ptr().cast(), uint64x2x2_t(rows[0], rows[1]));
            vst2q_u64(second.as_mut_ptr().cast(), uint64x2x2_t(rows[2], rows[3]));
        }
    }
    fn columns(c: [uint8x16_t; 8]) -> [[uint8x16_t; 2]; 4] {
        let zip = |a: [uint8x16_t; 2], b: [uint8x16_t; 2]| {
            // SAFETY: every build for this architecture has NEON.
            [0, 1].map(|i| unsafe { panel::zip(a[i], b[i]) })
        };
        // Four columns of 4 rows a vector, rows 0 to 7 and 8 to 15; then 8 columns of 2 rows.
        let [even_low, even_high] = fours([c[0], c[2], c[4], c[6]]);
        let [odd_low, odd_high] = fours([c[1], c[3], c[5], c[7]]);
        let ([a, b], [c, d]) = (zip(even_low, odd_low), zip(even_high, odd_high));
        [a, b, c, d]
    }
    fn tokens(tokens: [uint8x16_t; 4], out: &mut Block) {
        Self::rows(tokens, out);
    }
    fn dots(&self, w: &[Unit], x: &[Unit], tokens: usize) -> Sums {
        // SAFETY: `self` exists, so the CPU has matrix products.
        unsafe { if tokens <= 4 { matmat_4_neon_i8mm(w, x) } else { matmat_8_neon_i8mm(w, x) } }
    }
}

/// Four columns of 16 rows by turns: rows 0 to 3 and 4 to 7, then rows 8 to 11 and 12 to 15.
fn fours(c: [uint8x16_t; 4]) -> [[uint8x16_t; 2]; 2] {
    // SAFETY: every build for this architecture has NEON.
    unsafe {
        let ([a, b], [c, d]) = (panel::zip(c[0], c[2]), panel::zip(c[1], c[3]));
        [panel::zip(a, c), panel::zip(b, d)]
    }
}

/// Two tokens with 8 rows, 8 columns: four sums.
macro_rules! smmla_tokens {
    ($x:literal, $w0:literal $w1:literal $w2:literal $w3:literal, $a:literal $b:literal $c:literal $d:literal) => {
        concat!(
            "smmla ", $a, ".4s, ", $x, ".16b, ", $w0, ".16b\n", "smmla ", $b, ".4s, ", $x, ".16b, ", $w1, ".16b\n",
            "smmla ", $c, ".4s, ", $x, ".16b, ", $w2, ".16b\n", "smmla ", $d, ".4s, ", $x, ".16b, ", $w3, ".16b\n"
        )
    };
}

/// 8 columns of 8 rows with the first 4 tokens, which are in `$x0` and `$x1`.
macro_rules! smmla_low {
    ($x0:literal $x1:literal, $($w:literal)*) => {
        concat!(smmla_tokens!($x0, $($w)*, "v0" "v1" "v2" "v3"), smmla_tokens!($x1, $($w)*, "v4" "v5" "v6" "v7"))
    };
}

/// 8 columns of 8 rows with the other 4 tokens.
macro_rules! smmla_high {
    ($x0:literal $x1:literal, $($w:literal)*) => {
        concat!(smmla_tokens!($x0, $($w)*, "v8" "v9" "v10" "v11"), smmla_tokens!($x1, $($w)*, "v12" "v13" "v14" "v15"))
    };
}

/// 8 rows of a panel with 8 tokens, 16 columns an iteration.
#[target_feature(enable = "neon,i8mm")]
#[inline(never)]
fn matmat_8_neon_i8mm(w: &[Unit], x: &[Unit]) -> Sums {
    assert!(w.len() == x.len() && !w.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: the assertion: as many units of 128 bytes lie at either place, and not none. The registers are all named.
    unsafe {
        asm!("2:", "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], #64",
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{w}], #64",
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{w}], #64",
            "ld1 {{v20.16b, v21.16b, v22.16b, v23.16b}}, [{x}], #64",
            smmla_low!("v16" "v18", "v24" "v26" "v28" "v30"), smmla_high!("v20" "v22", "v24" "v26" "v28" "v30"),
            smmla_low!("v17" "v19", "v25" "v27" "v29" "v31"), smmla_high!("v21" "v23", "v25" "v27" "v29" "v31"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w = inout(reg) w.as_ptr() => _, x = inout(reg) x.as_ptr() => _, n = inout(reg) w.len() => _,
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7], inout("v8") acc[8], inout("v9") acc[9],
            inout("v10") acc[10], inout("v11") acc[11], inout("v12") acc[12], inout("v13") acc[13],
            inout("v14") acc[14], inout("v15") acc[15],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v20") _, out("v21") _, out("v22") _, out("v23") _,
            out("v24") _, out("v25") _, out("v26") _, out("v27") _, out("v28") _, out("v29") _, out("v30") _,
            out("v31") _, options(readonly, nostack));
    }
    by_token(acc)
}

/// 8 rows of a panel with the first 4 tokens of a unit: 2.0 cycles on the V1, 3.0 on the V2.
#[target_feature(enable = "neon,i8mm")]
#[inline(never)]
fn matmat_4_neon_i8mm(w: &[Unit], x: &[Unit]) -> Sums {
    assert!(w.len() == x.len() && !w.is_empty());
    let mut acc = [vdupq_n_s32(0); 16];
    // SAFETY: as above.
    unsafe {
        asm!("2:", "ld1 {{v16.16b, v17.16b, v18.16b, v19.16b}}, [{x}], {unit}",
            "ld1 {{v24.16b, v25.16b, v26.16b, v27.16b}}, [{w}], #64",
            "ld1 {{v28.16b, v29.16b, v30.16b, v31.16b}}, [{w}], #64",
            smmla_low!("v16" "v18", "v24" "v26" "v28" "v30"), smmla_low!("v17" "v19", "v25" "v27" "v29" "v31"),
            "subs {n}, {n}, #1", "b.ne 2b",
            w = inout(reg) w.as_ptr() => _, x = inout(reg) x.as_ptr() => _, n = inout(reg) w.len() => _,
            unit = in(reg) size_of::<Unit>(),
            inout("v0") acc[0], inout("v1") acc[1], inout("v2") acc[2], inout("v3") acc[3], inout("v4") acc[4],
            inout("v5") acc[5], inout("v6") acc[6], inout("v7") acc[7],
            out("v16") _, out("v17") _, out("v18") _, out("v19") _, out("v24") _, out("v25") _, out("v26") _, out("v27") _,
            out("v28") _, out("v29") _, out("v30") _, out("v31") _, options(readonly, nostack));
    }
    by_token(acc)
}

/// From sums of pairs of tokens, `[t][r], [t][r + 1], [t + 1][r], [t + 1][r + 1]`, to those of each.
#[target_feature(enable = "neon")]
#[inline]
fn by_token(acc: [int32x4_t; 16]) -> Sums {
    let acc = acc.map(|a| vreinterpretq_s64_s32(a));
    core::array::from_fn(|i| {
        let (token, quad) = (i / 2, i % 2);
        let pairs = &acc[token / 2 * 4 + 2 * quad..][..2];
        vreinterpretq_s32_s64(match token % 2 {
            0 => vzip1q_s64(pairs[0], pairs[1]),
            _ => vzip2q_s64(pairs[0], pairs[1]),
        })
    })
}
