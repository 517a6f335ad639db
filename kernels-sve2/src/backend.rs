//! The two backends: which loop serves what.
use crate::{grouped, lanes, planes, sparse};
use bitnet_kernel::float::Cache;
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix, kernels};

/// Invariant: a value exists only where the CPU has SVE and what its fields say. [`sve`] and [`sve2`] make the only ones.
#[derive(Debug)]
struct Sve {
    sve2: bool,
}

static SVE: Sve = Sve { sve2: false };
static SVE2: Sve = Sve { sve2: true };

/// Whether the CPU has a feature, asked at run time where that can be.
macro_rules! has {
    ($feature:tt, $register:ident) => {{
        #[cfg(feature = "std")]
        let present = std::arch::is_aarch64_feature_detected!($feature);
        #[cfg(all(not(feature = "std"), feature = "id-registers"))]
        let present = crate::registers::$register();
        #[cfg(not(any(feature = "std", feature = "id-registers")))]
        let present = cfg!(target_feature = $feature);
        present
    }};
}

/// See [`crate::sve`].
pub(crate) fn sve() -> Option<&'static dyn Kernels> {
    has!("sve", sve).then_some(&SVE as &dyn Kernels)
}

/// See [`crate::sve2`].
pub(crate) fn sve2() -> Option<&'static dyn Kernels> {
    has!("sve2", sve2).then_some(&SVE2 as &dyn Kernels)
}

impl Kernels for Sve {
    fn name(&self) -> &'static str {
        if self.sve2 { "sve2" } else { "sve" }
    }
    /// Tables as [`lanes`] wants them, not those of [`bitnet_kernel::tables`]; of int4 activations NEON's, whose loop has them.
    fn fill(&self, format: Format, values: &[i8], int4: bool, tables: &mut [Block]) {
        match bitnet_kernels_neon::neon() {
            Some(neon) if int4 => neon.fill(format, values, int4, tables),
            _ => lanes::prepare(format, values, tables),
        }
    }
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        match neon_of_short_vectors(w.format()) {
            Some(neon) => neon.matvec(w, x, y),
            None => self.products(w, &[x], y),
        }
    }
    fn matmat(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        x.assert_fit(&w);
        match neon_of_batches(w.format(), x) {
            Some(neon) => neon.matmat(w, x, y),
            None => self.products(w, x.tokens(), y),
        }
    }
    fn matvec_grouped(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        match (w.format(), self.sve2) {
            // SAFETY: `self` says that the CPU has these features.
            (Format::B1G | Format::TLG, false) => unsafe { grouped::products_sve(w, x, y) },
            // SAFETY: as above.
            (Format::B1G | Format::TLG, true) => unsafe { grouped::products_sve2(w, x, y) },
            _ => self.matmat_grouped(w, Batch::new(&[x]), y),
        }
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        match neon_of_batches(w.format(), x) {
            // Tables of one bit are the fastest way for several tokens too.
            _ if w.format() == Format::B1G => self.one_by_one_grouped(w, x, y),
            Some(neon) => neon.matmat_grouped(w, x, y),
            None => kernels::matmat_grouped(self, w, x, y),
        }
    }
    fn dot_rows(&self, w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), rows.len());
        assert_eq!(w.format(), Format::T2R);
        x.assert_fit(&w);
        if w.cols() == 0 {
            return y.fill(0);
        }
        for (rows, y) in rows.chunks(4).zip(y.chunks_mut(4)) {
            let rows = core::array::from_fn(|i| w.row(rows[i.min(rows.len() - 1)] as usize));
            // SAFETY: `self` says that the CPU has these features.
            let sums = unsafe { planes::rows_t2r_sve(rows, x.values()) };
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum - x.sum());
        }
    }
    fn sum_rows(&self, w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
        assert_eq!(y.len(), w.cols());
        assert_eq!(x.len(), rows.len());
        assert_eq!(w.format(), Format::T2R);
        // SAFETY: `self` says that the CPU has these features.
        unsafe { sparse::sum_rows(w, rows, x, y) }
    }
    // Blocks are the portable body, of which the compiler makes NEON: compiled with SVE it ends LLVM 22 with an error where
    // unaligned accesses are not allowed, as on boards. The floating-point methods are the bodies of `float` as they are: the
    // compiler makes NEON of them, and their order of sums is one of 16 lanes, which longer vectors would not serve better on
    // CPUs of 128 and 256 bits.
    fn attend(&self, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
        bitnet_kernels_neon::float::attend(q, keys, values, scale, out);
    }
}

/// NEON's dot products where they serve one token better than vectors of this length do: those of 128 bits for all formats in
/// planes (cycles for 256 weights on the Neoverse V2, SVE's in brackets: T2 8.0 (8.6), I4 8.5 (9.3), I8 8.5 (9.2)), those of 256
/// bits for T2 and I4 (V1: 8.0 (8.7) both, but I8 6.0 (5.6)). These formats have no tables, so both read the same activations.
fn neon_of_short_vectors(format: Format) -> Option<&'static dyn Kernels> {
    let longest = match format {
        Format::T2 | Format::I4 => 32,
        Format::I8 => 16,
        _ => return None,
    };
    // SAFETY: whoever asks has SVE.
    let bytes = unsafe { lanes::vector_bytes() };
    if bytes <= longest { bitnet_kernels_neon::dotprod() } else { None }
}

/// NEON's `smmla` for so many tokens that it reads no tables, of which these activations have others.
fn neon_of_batches(format: Format, x: Batch<'_>) -> Option<&'static dyn Kernels> {
    bitnet_kernels_neon::i8mm().filter(|_| x.tokens().len() >= bitnet_kernels_neon::i8mm_tokens_min(format))
}

impl Sve {
    /// Every token by itself, 64 rows at a time, so that their weights are in the first-level cache for all tokens but the first.
    fn one_by_one_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        let rows = w.rows();
        assert_eq!(y.len(), rows * x.tokens().len());
        x.assert_fit(&w);
        for first in (0..rows).step_by(64) {
            let here = first..rows.min(first + 64);
            for (x, y) in x.tokens().iter().zip(y.chunks_exact_mut(rows)) {
                self.matvec_grouped(w.slice(here.clone()), *x, &mut y[here.clone()]);
            }
        }
    }
    /// `w` times every token, one by one. The entrance checks were made.
    fn products(&self, w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
        // These have NEON's tables.
        let int4 = tokens.iter().filter(|x| x.int4()).count();
        if let Some(neon) = bitnet_kernels_neon::neon().filter(|_| int4 > 0) {
            if int4 == tokens.len() {
                return neon.matmat(w, Batch::new(tokens), y);
            }
            return tokens.iter().zip(y.chunks_exact_mut(w.rows().max(1))).for_each(|(x, y)| self.matvec(w, *x, y));
        }
        // SAFETY: `self` says that the CPU has these features.
        unsafe {
            match self.sve2 {
                true => products_sve2(w, tokens, y),
                false => products_sve(w, tokens, y),
            }
        }
    }
}

#[target_feature(enable = "sve")]
fn products_sve(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    match w.format() {
        Format::B1 => {
            each_tile(w, tokens, y, |tile, x| lanes::tile_b1_sve(tile, x.tables()).map(|sum| 2 * sum - x.sum()));
        }
        Format::T2 => {
            each_tile(w, tokens, y, |tile, x| planes::tile_t2_sve(tile, x.values()).map(|sum| sum - x.sum()));
        }
        Format::TL => each_tile(w, tokens, y, |tile, x| lanes::tile_tl_sve(tile, x.tables())),
        Format::I4 => {
            each_tile(w, tokens, y, |tile, x| planes::tile_i4_sve(tile, x.values()).map(|sum| sum - 8 * x.sum()));
        }
        Format::I8 => each_tile(w, tokens, y, |tile, x| planes::tile_i8_sve(tile, x.values())),
        _ => panic!("{} is not multiplied by this method", w.format().name()),
    }
}

/// [`products_sve`] with what SVE2 has for formats in lanes.
#[target_feature(enable = "sve2")]
fn products_sve2(w: Matrix<'_>, tokens: &[Activations<'_>], y: &mut [i32]) {
    match w.format() {
        Format::B1 => {
            each_tile(w, tokens, y, |tile, x| lanes::tile_b1_sve2(tile, x.tables()).map(|sum| 2 * sum - x.sum()));
        }
        Format::TL => each_tile(w, tokens, y, |tile, x| lanes::tile_tl_sve2(tile, x.tables())),
        _ => products_sve(w, tokens, y),
    }
}

/// Cuts a product into those of one tile, `BLOCKS` blocks a step and `ROWS` rows, with one token.
///
/// Tile by tile, so that the weights of a tile are in the first-level cache for all tokens but the first.
fn each_tile<const BLOCKS: usize, const ROWS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    one: impl Fn(&[[Block; BLOCKS]], Activations<'_>) -> [i32; ROWS],
) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    for (first, tile) in (0..w.rows()).step_by(ROWS).zip(w.tiles()) {
        let here = first..w.rows().min(first + ROWS);
        for (x, y) in tokens.iter().zip(y.chunks_exact_mut(w.rows())) {
            y[here.clone()].copy_from_slice(&one(tile.as_chunks().0, *x)[..here.len()]);
        }
    }
}
