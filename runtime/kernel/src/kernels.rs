//! What an instruction set must implement.
use crate::float::{self, Cache};
use crate::{Activations, Batch, Block, Format, Matrix, tables};

/// One instruction set's kernels. Every implementation returns exactly what [`crate::portable`] returns, bit for bit.
///
/// A value of an implementing type is proof that this CPU has the instructions, so the methods are safe to call. Only
/// [`Kernels::name`] and [`Kernels::matvec`] are required.
///
/// A backend that speeds up a floating-point method compiles the body of [`float`] again with its own target features and
/// never writes another: the order of operations is part of the result. No fused multiply-add, on any machine.
pub trait Kernels: Sync + core::fmt::Debug {
    /// `"neon-dotprod"`, as logs, benchmarks and `--backend` spell it.
    fn name(&self) -> &'static str;

    /// Makes `values` ready for the matrices of `format` with `cols` columns, once per vector and not once per row.
    ///
    /// What a backend writes into `tables` is its own business; the default are the partial sums of [`tables`]. `values` has
    /// at least `format.padded_cols(cols)` entries, zero from `cols` on.
    ///
    /// # Panics
    /// If `tables.len() != format.table_blocks(cols)`, or `values` is short or not zero past `cols`.
    fn prepare<'a>(&self, format: Format, cols: usize, values: &'a [i8], tables: &'a mut [Block]) -> Activations<'a> {
        tables::fill(format, values, tables);
        Activations::new(format, cols, values, tables)
    }

    /// `y[r] = Σ_c w[r][c] · x[c]`, exact in `i32`. Weights with invalid codes give unspecified sums, never a fault.
    ///
    /// # Panics
    /// If `y.len() != w.rows()`, `x` was prepared for another matrix, or `w` is [`Format::F16`].
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]);

    /// `y[t · w.rows() + r] = Σ_c w[r][c] · x[t][c]`: [`Kernels::matvec`] of every token, for prefill.
    ///
    /// # Panics
    /// If `y.len() != w.rows() · tokens`, or as [`Kernels::matvec`].
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        if w.rows() == 0 {
            return;
        }
        // Tile by tile, so that the weights of a tile are in the first-level cache for all tokens but the first.
        let tile_rows = w.format().tile_rows();
        for first in (0..w.rows()).step_by(tile_rows) {
            let rows = first..(first + tile_rows).min(w.rows());
            for (x, y) in x.tokens().iter().zip(y.chunks_exact_mut(w.rows())) {
                self.matvec(w.slice(rows.clone()), *x, &mut y[rows.clone()]);
            }
        }
    }

    /// `y[r] = Σ_c w[r][c] · x[c]` in f32 for [`Format::F16`], summed as [`float::dot`] does.
    ///
    /// # Panics
    /// If `y.len() != w.rows()`, `x.len() != w.cols()`, or `w` is of another format.
    fn matvec_f16(&self, w: Matrix<'_>, x: &[f32], y: &mut [f32]) {
        float::matvec_f16(w, x, y);
    }

    /// Quantizes `x` to int8: `q = round_half_even(x · s)`, `s = 127 / max(absmax, 1e-5)` (BitNet b1.58, eq. 4; the rounding of
    /// transformers' `ActQuant`), and fills the rest of `q` with zeros. Returns `s`, or `None` if a value is not finite.
    ///
    /// # Panics
    /// If `q` is shorter than `x`.
    fn quantize(&self, x: &[f32], q: &mut [i8]) -> Option<f32> {
        float::quantize(x, q)
    }

    /// One head's attention over a cache: `out = softmax(scale · K q)ᵀ V`. See [`float::attend`].
    ///
    /// # Panics
    /// If the lengths of `q`, `out` and the cache's rows disagree.
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        float::attend(q, keys, values, scale, out);
    }
}
