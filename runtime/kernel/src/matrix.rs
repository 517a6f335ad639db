//! Views over packed weights and quantized activations, checked once and then trusted.
use crate::{Block, Format};
use core::ops::Range;

/// Rows of packed weights.
///
/// Invariant: `blocks.len() == format.matrix_blocks(rows, cols)` and `cols <= Format::COLS_MAX`. Kernels index on the
/// strength of it.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    blocks: &'a [Block],
}

impl<'a> Matrix<'a> {
    /// Views `blocks` as `rows` rows of `cols` weights, or `None` if the sizes disagree.
    pub const fn new(format: Format, rows: usize, cols: usize, blocks: &'a [Block]) -> Option<Self> {
        // Compared tile by tile: the product of hostile sizes could wrap.
        let (tiles, tile_blocks) = (rows.div_ceil(format.tile_rows()), format.tile_blocks(cols));
        match tiles.checked_mul(tile_blocks) {
            Some(n) if n == blocks.len() && cols <= Format::COLS_MAX => Some(Self { format, rows, cols, blocks }),
            _ => None,
        }
    }
    /// How the weights are encoded.
    pub const fn format(&self) -> Format {
        self.format
    }
    /// Number of rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }
    /// Number of columns, padding left out.
    pub const fn cols(&self) -> usize {
        self.cols
    }
    /// Steps in a tile.
    pub const fn steps(&self) -> usize {
        self.format.steps(self.cols)
    }
    /// Columns rounded up to whole steps.
    pub const fn padded_cols(&self) -> usize {
        self.format.padded_cols(self.cols)
    }
    /// All the blocks, tile after tile.
    pub const fn blocks(&self) -> &'a [Block] {
        self.blocks
    }
    /// The tiles in order. Empty for a matrix without columns.
    pub fn tiles(&self) -> core::slice::ChunksExact<'a, Block> {
        self.blocks.chunks_exact(self.format.tile_blocks(self.cols).max(1))
    }
    /// The blocks of row `r` in [`Format::T2R`], which stores every row by itself.
    ///
    /// # Panics
    /// If the row is outside the matrix, or tiles have more rows than one.
    pub fn row(&self, r: usize) -> &'a [Block] {
        assert!(r < self.rows && self.format.tile_rows() == 1, "row {r} of {}", self.rows);
        let row_blocks = self.format.tile_blocks(self.cols);
        &self.blocks[r * row_blocks..][..row_blocks]
    }
    /// The panels of one tile of a grouped format, in the order of columns: weights in the base format, all
    /// [bit planes](Format::bit_planes) of them below each other, and the scales of the rows as bits of half-precision floats.
    pub fn panels(&self, tile: usize) -> impl Iterator<Item = (Self, &'a [[u8; 2]])> + use<'a> {
        let format = self.format;
        let tile_blocks = format.tile_blocks(self.cols);
        let steps = self.blocks[tile * tile_blocks..][..tile_blocks].chunks_exact(format.step_blocks());
        steps.map(move |step| {
            let (weights, scales) = (&step[..format.panel_blocks()], crate::format::scales(format, step));
            let (rows, cols) = (format.plane_rows(), Format::GROUP_COLS);
            (Self { format: format.base(), rows, cols, blocks: weights }, scales)
        })
    }
    /// The rows of `range`: how work is shared between cores.
    ///
    /// # Panics
    /// If the range is outside the matrix, or starts or ends (but for the last row) inside a tile.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let tile_rows = self.format.tile_rows();
        let whole_tiles = range.end.is_multiple_of(tile_rows) || range.end == self.rows;
        assert!(range.end <= self.rows && range.start.is_multiple_of(tile_rows) && whole_tiles);
        let tile_blocks = self.format.tile_blocks(self.cols);
        let blocks = &self.blocks[range.start / tile_rows * tile_blocks..range.end.div_ceil(tile_rows) * tile_blocks];
        Self { rows: range.len(), blocks, ..*self }
    }
    /// The integer weight of row `r` and column `c`.
    ///
    /// # Panics
    /// If either is outside the matrix, or the format is [`Format::F16`].
    pub fn weight(&self, r: usize, c: usize) -> i8 {
        let (step, r, c) = self.step_of(r, c);
        crate::format::decode(self.format, step, r, c)
    }
    /// The bits of the half-precision weight of row `r` and column `c`.
    ///
    /// # Panics
    /// If either is outside the matrix.
    pub fn weight_f16(&self, r: usize, c: usize) -> u16 {
        let (step, r, c) = self.step_of(r, c);
        crate::format::decode_f16(step, r, c)
    }
    /// The step that holds row `r` and column `c`, and their places in it.
    fn step_of(&self, r: usize, c: usize) -> (&'a [Block], usize, usize) {
        assert!(r < self.rows && c < self.cols);
        let f = self.format;
        let step = r / f.tile_rows() * self.steps() + c / f.step_cols();
        (&self.blocks[step * f.step_blocks()..][..f.step_blocks()], r % f.tile_rows(), c % f.step_cols())
    }
}

/// One vector of quantized activations, ready for the matrices of one format and width.
///
/// Made by [`crate::Kernels::prepare`]. Invariants: `values.len() == format.padded_cols(cols)`, zero from `cols` on; `sum`
/// is the sum of the values, which turns unsigned codes back into signed weights (`Σ(c-1)x = Σcx - Σx`);
/// `tables.len() == format.table_blocks(cols)`.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    format: Format,
    cols: usize,
    values: &'a [i8],
    sum: i32,
    int4: bool,
    tables: &'a [Block],
}

impl<'a> Activations<'a> {
    /// Wraps activations and whatever the backend keeps in `tables`, which were filled for values of four bits if `int4` is set.
    ///
    /// # Panics
    /// If `values` is shorter than the padded columns or not zero in the padding, or `tables` has not its exact length.
    pub fn new(format: Format, cols: usize, values: &'a [i8], int4: bool, tables: &'a [Block]) -> Self {
        let values = &values[..format.padded_cols(cols)];
        assert!(values[cols..].iter().all(|&v| v == 0), "activations past the last column must be zero");
        assert_eq!(tables.len(), format.table_blocks(cols));
        let sum = values.iter().map(|&v| i32::from(v)).sum();
        Self { format, cols, values, sum, int4, tables }
    }
    /// What the panels of group `g` of a grouped format are multiplied by: `128` columns in the base format.
    ///
    /// Of a format with tables, the values are the group's alone, without padding to the base format's steps.
    ///
    /// # Panics
    /// If there is no such group.
    pub fn group(&self, g: usize) -> Self {
        assert!(self.format.is_grouped());
        let format = self.format.base();
        let table_blocks = format.table_blocks(Format::GROUP_COLS);
        let values = &self.values[g * Format::GROUP_COLS..][..Format::GROUP_COLS];
        let sum = values.iter().map(|&v| i32::from(v)).sum();
        let tables = &self.tables[g * table_blocks..][..table_blocks];
        Self { format, cols: Format::GROUP_COLS, values, sum, int4: self.int4, tables }
    }
    /// The format of the matrices these are prepared for.
    pub const fn format(&self) -> Format {
        self.format
    }
    /// Columns, padding left out.
    pub const fn cols(&self) -> usize {
        self.cols
    }
    /// The values, padded with zeros to whole steps.
    pub const fn values(&self) -> &'a [i8] {
        self.values
    }
    /// Sum of the values.
    pub const fn sum(&self) -> i32 {
        self.sum
    }
    /// Whether the tables were filled for values that are all within -8 to 7.
    pub const fn int4(&self) -> bool {
        self.int4
    }
    /// What the backend prepared: opaque to all but itself.
    pub const fn tables(&self) -> &'a [Block] {
        self.tables
    }
    /// Panics unless these activations fit `w`: the entrance check of every kernel.
    #[track_caller]
    pub fn assert_fit(&self, w: &Matrix<'_>) {
        assert!(self.format == w.format() && self.cols == w.cols(), "activations prepared for another matrix");
    }
}

/// The activations of several tokens for one matrix, each as [`Activations`] describes.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    tokens: &'a [Activations<'a>],
}

impl<'a> Batch<'a> {
    /// Wraps one entry a token.
    ///
    /// # Panics
    /// If they are not all prepared for one format and width, or there is none.
    pub fn new(tokens: &'a [Activations<'a>]) -> Self {
        let first = tokens.first().expect("a batch has at least one token");
        assert!(tokens.iter().all(|t| t.format == first.format && t.cols == first.cols));
        Self { tokens }
    }
    /// The tokens in order; never empty.
    pub const fn tokens(&self) -> &'a [Activations<'a>] {
        self.tokens
    }
    /// Panics unless these activations fit `w`.
    #[track_caller]
    pub fn assert_fit(&self, w: &Matrix<'_>) {
        self.tokens[0].assert_fit(w);
    }
}
