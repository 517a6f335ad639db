//! What an instruction set must implement.
use crate::float::{self, Arrays, Cache};
use crate::{
    Activations, Batch, Block, BlockActivations, BlockMatrix, Format, Matrix, blocks, format, portable, tables,
};

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

    /// Fills `tables` with what this backend multiplies by in place of `values`: by default the partial sums of [`tables`].
    ///
    /// What it writes is its own business. `int4` says that the values are all within -8 to 7 and that the product will be told
    /// so by [`Activations::int4`]: partial sums then fit in one byte.
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        let _ = int4;
        tables::fill(format, values, tables);
    }

    /// Makes `values` ready for the matrices of `format` with `cols` columns, once per vector and not once per row. `values` has
    /// at least `format.padded_cols(cols)` entries, zero from `cols` on.
    ///
    /// # Panics
    /// If `tables.len() != format.table_blocks(cols)`, or `values` is short or not zero past `cols`.
    fn prepare<'a>(&self, format: Format, cols: usize, values: &'a [i8], tables: &'a mut [Block]) -> Activations<'a> {
        let int4 = format.table_cols() > 0 && tables::are_int4(&values[..cols]);
        self.fill(format, values, int4, tables);
        Activations::new(format, cols, values, int4, tables)
    }

    /// [`Kernels::prepare`] for any format that multiplies int8 activations: group by group where it is a grouped one, all by tables
    /// of int8.
    ///
    /// # Panics
    /// As [`Kernels::prepare`].
    fn prepare_any<'a>(
        &self,
        format: Format,
        cols: usize,
        values: &'a [i8],
        tables: &'a mut [Block],
    ) -> Activations<'a> {
        if !format.is_grouped() {
            return self.prepare(format, cols, values, tables);
        }
        let group_blocks = format.base().table_blocks(Format::GROUP_COLS);
        if group_blocks > 0 {
            // A group ends inside a step of its base format: what follows must be zeros, and not the next group.
            let mut padded = [0; 2 * Format::GROUP_COLS];
            let groups = values.chunks_exact(Format::GROUP_COLS).zip(tables.chunks_exact_mut(group_blocks));
            for (values, tables) in groups {
                padded[..Format::GROUP_COLS].copy_from_slice(values);
                self.fill(format.base(), &padded, false, tables);
            }
        }
        Activations::new(format, cols, values, false, tables)
    }

    /// `y[r] = Σ_c w[r][c] · x[c]`, exact in `i32`. Weights with invalid codes give unspecified sums, never a fault.
    ///
    /// # Panics
    /// If `y.len() != w.rows()`, `x` was prepared for another matrix, or `w` is not of [`Format::INTEGER`].
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

    /// `y[r] = Σ_g s[g][r] · Σ_{c in g} w[r][c] · x[c]` for [`Format::GROUPED`]: the sum of a group is exact, becomes a float
    /// (rounded to nearest), is multiplied by its scale and added to `y[r]`, which starts at zero, group after group.
    ///
    /// `x` is from [`Kernels::prepare_any`].
    ///
    /// # Panics
    /// If `y.len() != w.rows()`, `x` was prepared for another matrix, or `w` is not of a grouped format.
    fn matvec_grouped(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [f32]) {
        self.matmat_grouped(w, Batch::new(&[x]), y);
    }

    /// [`Kernels::matvec_grouped`] of every token: `y[t · w.rows() + r]`.
    ///
    /// # Panics
    /// If `y.len() != w.rows() · tokens`, or as [`Kernels::matvec_grouped`].
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        matmat_grouped(self, w, x, y);
    }

    /// `y[i] = Σ_c w[rows[i]][c] · x[c]`, exact, for [`Format::T2R`]: the products of some rows, of which alone any is read.
    ///
    /// # Panics
    /// If `y.len() != rows.len()`, a row is outside `w`, `x` was prepared for another matrix, or `w` is of another format.
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        portable::dot_rows(w, rows, x, y);
    }

    /// `y[c] += Σ_i x[i] · w[rows[i]][c]`, exact, for [`Format::T2R`]: the sum of some rows, of which alone any is read. With
    /// a matrix stored by its columns this is a product with a vector that is zero elsewhere.
    ///
    /// # Panics
    /// If `y.len() != w.cols()`, `x.len() != rows.len()`, a row is outside `w`, or `w` is of another format. Sums beyond
    /// `i32` wrap: no more than [`Format::COLS_MAX`] rows are exact.
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        portable::sum_rows(w, rows, x, y);
    }

    /// `y[r] = Σ_c w[r][c] · x[c]`, exact, of a block-sparse matrix, of which only live blocks are stored and read.
    ///
    /// # Panics
    /// If `y.len() != w.rows()`, or `x` was made for another matrix.
    fn matvec_blocks(&self, w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
        blocks::matvec_blocks(w, x, y);
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

    /// Normalizes `x` in place. See [`float::rmsnorm`].
    fn rmsnorm(&self, x: &mut [f32], weight: &[f32], eps: f32) {
        float::rmsnorm(x, weight, eps);
    }

    /// `out = silu(gate) · up`, as far as all three go. See [`float::silu`].
    fn silu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        float::silu(gate, up, out);
    }

    /// `out = max(gate, 0)² · up`, as far as all three go. See [`float::squared_relu`].
    fn squared_relu(&self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        float::squared_relu(gate, up, out);
    }

    /// The short convolution before a memory, of one token. See [`float::convolve`].
    fn convolve(&self, past: &mut [f32], taps: &[f32], x: &mut [f32]) {
        float::convolve(past, taps, x);
    }

    /// That with an activation. See [`float::convolve_silu`].
    fn convolve_silu(&self, past: &mut [f32], taps: &[f32], x: &mut [f32]) {
        float::convolve_silu(past, taps, x);
    }

    /// One row of a memory's state. See [`float::delta_rule`].
    fn delta_rule(&self, state: &mut [f32], key: &[f32], alpha: f32, beta: f32, value: f32) {
        float::delta_rule(state, key, alpha, beta, value);
    }

    /// What `query` recalls of that row. See [`float::dot`].
    fn recall(&self, state: &[f32], query: &[f32]) -> f32 {
        float::dot(state, query)
    }

    /// One token of an elementwise recurrence. See [`float::recur`].
    fn recur(&self, state: &mut [f32], bound: &[f32], forget: &[f32], input: &[f32]) {
        float::recur(state, bound, forget, input);
    }

    /// One head's attention over a cache: `out = softmax(scale · K q)ᵀ V`. See [`float::attend`].
    ///
    /// # Panics
    /// If the lengths of `q`, `out` and the cache's rows disagree.
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        float::attend(Arrays, q, keys, values, scale, out);
    }
}

/// [`Kernels::matmat_grouped`] by a backend's own integer products, for all formats for which it has nothing better.
///
/// # Panics
/// As [`Kernels::matmat_grouped`].
pub fn matmat_grouped<K: Kernels + ?Sized>(k: &K, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
    const TOKENS: usize = 16;
    const PLANE_ROWS: usize = Format::I3G.plane_rows();
    assert_eq!(y.len(), w.rows() * x.tokens().len());
    x.assert_fit(&w);
    if w.rows() == 0 {
        return;
    }
    y.fill(0.0);
    let plane_rows = w.format().plane_rows();
    let mut sums = [0; TOKENS * PLANE_ROWS];
    for (x, y) in x.tokens().chunks(TOKENS).zip(y.chunks_mut(TOKENS * w.rows())) {
        let sums = &mut sums[..x.len() * plane_rows];
        for (tile, first) in (0..w.rows()).step_by(Format::PANEL_ROWS).enumerate() {
            let rows = Format::PANEL_ROWS.min(w.rows() - first);
            for (g, (panel, scales)) in w.panels(tile).enumerate() {
                match x {
                    [x] => k.matvec(panel, x.group(g), sums),
                    _ => {
                        let mut groups = [x[0]; TOKENS];
                        groups.iter_mut().zip(x).for_each(|(group, x)| *group = x.group(g));
                        k.matmat(panel, Batch::new(&groups[..x.len()]), sums);
                    }
                }
                let each = sums.chunks_exact_mut(plane_rows).zip(y.chunks_exact_mut(w.rows()));
                for ((sums, y), x) in each.zip(x) {
                    if plane_rows > Format::PANEL_ROWS {
                        format::join_planes(w.format(), sums, x.group(g).sum());
                    }
                    float::add_scaled(&mut y[first..first + rows], sums, scales);
                }
            }
        }
    }
}
