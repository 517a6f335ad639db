//! NEON with matrix products of bytes (Armv8.6: Graviton3 and later): batches by `smmla`, 2 tokens by 2 rows and 8 columns an
//! instruction, in [`crate::batch`], those of grouped formats by the panels of [`crate::panel`]. Single tokens are left to
//! [`crate::dotprod`]: an `smmla` of one token does half its work for nothing.
//!
//! The order of the operands is tokens, rows: a sum of two rows by two tokens then holds the rows of a token side by side.
use crate::dotprod::{self, Dotprod};
use crate::{batch, float, panel};
use bitnet_kernel::float::Cache;
use bitnet_kernel::{Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix};

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
        // SAFETY: `self` exists, so the CPU has matrix products.
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
