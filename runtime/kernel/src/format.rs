//! How weights sit in bytes.
//!
//! A matrix is cut into *tiles* of rows, a tile into *steps* of columns, and a step is a run of whole blocks. The steps of
//! a tile follow one another, then comes the next tile: one sequential stream feeds a kernel that holds several rows.
//! [`Format`] gives the numbers, [`encode_step`] and [`decode`] the meaning of the bytes within a step. They are plain on
//! purpose: every packer and every kernel is tested against them.
//!
//! Two geometries carry all formats:
//!
//! - **Planes**: a tile is 4 rows; a step is one block of each row. Byte `j` of a block holds columns `j, j + 64, j + 128, …`
//!   of that step, one per *plane*, so a vector of any length that divides 64 bytes unpacks to runs of consecutive columns.
//! - **Lanes**: a tile is 64 rows; byte `j` of every block is row `j`. A step is 8 groups of columns: one block of sign
//!   bits if the format has signs (bit `7 - g`: group `g`), then four blocks of nibbles (block `i`: group `2i` in the low
//!   nibble, `2i + 1` in the high one). A nibble names a partial sum, see [`crate::tables`].
//!
//! *Grouped* formats are one of these with a scale for every row and 128 columns: a tile is 64 rows, a step 128 columns, and
//! holds a *panel*, the blocks of a matrix of 64 by 128 in the [base format](Format::base), then 64 half-precision scales.
//! A code of 2 or 3 bits is stored as so many *bit planes*: its panel is 2 or 3 matrices of signs, one below the other, 1
//! where the code's bit is set. So every kernel of [`Format::B1`] multiplies these too, with one set of tables for all planes,
//! at the same number of bytes a second; [`join_planes`] adds up. (Bit planes that share tables are T-MAC's idea, arXiv
//! 2407.00088.)
//!
//! Rows and columns past the end of a matrix are encoded as zero weights (minus one where there is no zero). They are inert:
//! activations are zero there and sums of such rows are discarded, so any code in their place gives the same results.
use crate::Block;
use zerocopy::IntoBytes;

/// The encodings an image may hold. The discriminant is what the image records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Format {
    /// Signs: -1 or +1, 1 bit. Lanes; a nibble is 4 columns, the lowest bit first, a set bit is +1.
    B1 = 1,
    /// Ternary in 2-bit codes `w + 1`. Planes, plane `p` at bits `2p` and `2p + 1`. Code 3 is invalid.
    T2 = 2,
    /// Ternary, three weights in 5 bits. Lanes; a nibble is `|9a + 3b + c|`, the sign bit is set where that sum is
    /// negative. Nibbles 14 and 15 are invalid; all kernels take them for three zeros.
    TL = 3,
    /// -8 to 7, 4-bit codes `w + 8`. Planes, plane `p` at bits `4p` to `4p + 3`. One scale a row.
    I4 = 4,
    /// -127 to 127, one signed byte a weight. Planes (one). One scale a row. -128 is invalid.
    I8 = 5,
    /// Half-precision floats, little-endian, 32 consecutive columns a block. Multiplied in f32, without quantization.
    F16 = 6,
    /// [`Format::B1`] with a scale for every 128 columns of a row, 1.125 bits. (The 1-bit Bonsai models'.)
    B1G = 7,
    /// [`Format::TL`] with a scale for every 128 columns of a row, 2 bits. (The ternary Bonsai models'.)
    TLG = 8,
    /// [`Format::I4`] with a scale for every 128 columns of a row, 4.125 bits.
    I4G = 9,
    /// [`Format::T2`] with every row by itself, for matrices of which only some rows are read. Planes.
    T2R = 10,
    /// -3, -1, 1 and 3 with a scale for every 128 columns of a row, 2.125 bits: bit planes of `(w + 3) / 2`.
    ///
    /// Of the linears of SmolLM2 135M, packed from Q4_1, these levels leave an error of 0.352 of the weights' size, and -2 to
    /// 1, with scales of either sign, 0.370 (of the embedding 0.440 and 0.436).
    I2G = 11,
    /// -4 to 3 with a scale for every 128 columns of a row, 3.125 bits: bit planes of `w + 4`.
    ///
    /// With scales of either sign, the error is 0.192 there (of the embedding 0.261), that of -7, -5, … 7 0.195 (0.278): the
    /// largest weight of a group is often alone, and takes -4.
    I3G = 12,
}

/// Where the rows and columns of a tile lie. See the module's description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Geometry {
    /// Rows of a tile interleaved block by block, columns in planes.
    Planes,
    /// Rows in byte lanes, groups of columns in nibbles that name partial sums.
    Lanes,
}

impl Format {
    /// All formats, in the order of their tags.
    pub const ALL: [Self; 12] = [
        Self::B1,
        Self::T2,
        Self::TL,
        Self::I4,
        Self::I8,
        Self::F16,
        Self::B1G,
        Self::TLG,
        Self::I4G,
        Self::T2R,
        Self::I2G,
        Self::I3G,
    ];
    /// The formats of [`crate::Kernels::matvec`]: products with int8 activations, exact in `i32`.
    pub const INTEGER: [Self; 5] = [Self::B1, Self::T2, Self::TL, Self::I4, Self::I8];
    /// The formats of [`crate::Kernels::matvec_grouped`].
    pub const GROUPED: [Self; 5] = [Self::B1G, Self::TLG, Self::I4G, Self::I2G, Self::I3G];
    /// Columns that share a scale in a grouped format.
    pub const GROUP_COLS: usize = 128;
    /// Rows of a panel of a grouped format.
    pub const PANEL_ROWS: usize = 64;
    /// The widest matrix that every kernel multiplies exactly: `65,536 · 128 · 127 < 2^31`.
    pub const COLS_MAX: usize = 65_536;

    /// The format with this tag.
    pub const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            1..=12 => Some(Self::ALL[tag as usize - 1]),
            _ => None,
        }
    }
    /// `"tl"`, as options and reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::B1 => "b1",
            Self::T2 => "t2",
            Self::TL => "tl",
            Self::I4 => "i4",
            Self::I8 => "i8",
            Self::F16 => "f16",
            Self::B1G => "b1g128",
            Self::TLG => "tlg128",
            Self::I4G => "i4g128",
            Self::T2R => "t2r",
            Self::I2G => "i2g128",
            Self::I3G => "i3g128",
        }
    }
    /// How the weights of a panel are encoded in a grouped format; of any other format, itself.
    pub const fn base(self) -> Self {
        match self {
            Self::B1G | Self::I2G | Self::I3G => Self::B1,
            Self::TLG => Self::TL,
            Self::I4G => Self::I4,
            _ => self,
        }
    }
    /// Whether every 128 columns of a row have a scale of their own.
    pub const fn is_grouped(self) -> bool {
        matches!(self, Self::B1G | Self::TLG | Self::I4G | Self::I2G | Self::I3G)
    }
    /// Matrices in the base format that a panel is made of: one for each bit of a code, the lowest first.
    pub const fn bit_planes(self) -> usize {
        match self {
            Self::I2G => 2,
            Self::I3G => 3,
            _ => 1,
        }
    }
    /// Where rows and columns of a tile lie (of a panel's tile in a grouped format).
    pub const fn geometry(self) -> Geometry {
        match self.base() {
            Self::B1 | Self::TL => Geometry::Lanes,
            _ => Geometry::Planes,
        }
    }
    /// Rows in a tile.
    pub const fn tile_rows(self) -> usize {
        match self {
            Self::B1 | Self::TL => 64,
            Self::T2 | Self::I4 | Self::I8 | Self::F16 => 4,
            Self::B1G | Self::TLG | Self::I4G | Self::I2G | Self::I3G => Self::PANEL_ROWS,
            Self::T2R => 1,
        }
    }
    /// Columns in a step.
    pub const fn step_cols(self) -> usize {
        match self {
            Self::B1 => 32,
            Self::T2 | Self::T2R => 256,
            Self::TL => 24,
            Self::B1G | Self::TLG | Self::I4G | Self::I2G | Self::I3G => Self::GROUP_COLS,
            Self::I4 => 128,
            Self::I8 => 64,
            Self::F16 => 32,
        }
    }
    /// Blocks in a step of one tile.
    pub const fn step_blocks(self) -> usize {
        match self {
            Self::B1 | Self::T2 | Self::I4 | Self::I8 | Self::F16 => 4,
            Self::TL => 5,
            Self::B1G | Self::TLG | Self::I4G | Self::I2G | Self::I3G => self.panel_blocks() + Self::SCALE_BLOCKS,
            Self::T2R => 1,
        }
    }
    /// Blocks of scales in a step of a grouped format: 64 half-precision floats, little-endian, one a row.
    pub const SCALE_BLOCKS: usize = Self::PANEL_ROWS * 2 / Block::BYTES;
    /// Blocks of weights in a step of a grouped format.
    pub const fn panel_blocks(self) -> usize {
        self.base().matrix_blocks(self.plane_rows(), Self::GROUP_COLS)
    }
    /// Rows of all bit planes of a panel of a grouped format.
    pub const fn plane_rows(self) -> usize {
        Self::PANEL_ROWS * self.bit_planes()
    }
    /// Steps that hold `cols` columns.
    pub const fn steps(self, cols: usize) -> usize {
        cols.div_ceil(self.step_cols())
    }
    /// `cols` rounded up to whole steps.
    pub const fn padded_cols(self, cols: usize) -> usize {
        self.steps(cols) * self.step_cols()
    }
    /// Blocks in one tile of `cols` columns.
    pub const fn tile_blocks(self, cols: usize) -> usize {
        self.steps(cols) * self.step_blocks()
    }
    /// Blocks in a matrix of `rows` by `cols`.
    pub const fn matrix_blocks(self, rows: usize, cols: usize) -> usize {
        rows.div_ceil(self.tile_rows()) * self.tile_blocks(cols)
    }
    /// Stored bits a weight, padding left out.
    pub const fn bits(self) -> f32 {
        (self.step_blocks() * Block::BYTES * 8) as f32 / (self.step_cols() * self.tile_rows()) as f32
    }
    /// Whether every row has a scale of its own; otherwise the matrix has one.
    pub const fn has_row_scales(self) -> bool {
        matches!(self, Self::I4 | Self::I8)
    }
    /// Whether all weights of a matrix share one scale. Rows have theirs, or groups of columns; floats need none.
    pub const fn has_matrix_scale(self) -> bool {
        matches!(self, Self::B1 | Self::T2 | Self::TL | Self::T2R)
    }
    /// The formats that multiply int8 activations in any way.
    pub const fn is_integer(self) -> bool {
        !matches!(self, Self::F16)
    }
    /// The smallest and largest weight. `F16` has none of these: its weights are floats.
    pub const fn range(self) -> (i8, i8) {
        match self {
            Self::I4 | Self::I4G => (-8, 7),
            Self::I8 => (-127, 127),
            Self::F16 => (0, 0),
            Self::I2G => (-3, 3),
            Self::I3G => (-4, 3),
            _ => (-1, 1),
        }
    }
    /// Whether weights are the odd numbers of [`Format::range`] alone.
    pub const fn is_odd(self) -> bool {
        matches!(self, Self::B1 | Self::B1G | Self::I2G)
    }
    /// The distance from one weight to the next.
    pub const fn distance(self) -> i8 {
        if self.is_odd() { 2 } else { 1 }
    }
    /// The weight that is the `n`-th from the smallest on; after the largest comes the smallest again.
    pub const fn weight(self, n: u32) -> i8 {
        let ((low, high), distance) = (self.range(), self.distance() as i32);
        let levels = (high as i32 - low as i32) / distance + 1;
        (low as i32 + (n % levels as u32) as i32 * distance) as i8
    }
    /// Columns whose partial sums share a table, or 0 where the format is not multiplied by tables.
    pub const fn table_cols(self) -> usize {
        match self.base() {
            Self::B1 => 4,
            Self::TL => 3,
            _ => 0,
        }
    }
    /// Blocks that [`crate::Kernels::prepare`] may use for one vector of `cols` activations: two tables of 32 bytes fit one.
    pub const fn table_blocks(self, cols: usize) -> usize {
        match self.geometry() {
            Geometry::Planes => 0,
            Geometry::Lanes if self.is_grouped() => self.steps(cols) * self.base().table_blocks(Self::GROUP_COLS),
            Geometry::Lanes => self.steps(cols) * 4,
        }
    }
}

/// Encodes one step of one tile: the definition of each format's bytes.
///
/// `weight(r, c)` is the weight of row `r < tile_rows` and column `c < step_cols` of this step, and zero past the matrix.
/// Where weights are odd, any other counts as the next smaller one.
///
/// # Panics
/// If `step` is not one step, if a weight is outside [`Format::range`], or for [`Format::F16`] (see [`encode_step_f16`]).
/// The scales of a grouped format become zero (see [`set_scale`]).
pub fn encode_step(format: Format, step: &mut [Block], weight: impl Fn(usize, usize) -> i8) {
    assert_eq!(step.len(), format.step_blocks());
    let (low, high) = format.range();
    let weight = |r, c| {
        let w = weight(r, c);
        assert!(low <= w && w <= high, "{w} is not a weight of {}", format.name());
        w
    };
    if !format.is_grouped() {
        return encode_plain_step(format, step, weight);
    }
    let (panel, scales) = step.split_at_mut(format.panel_blocks());
    scales.fill(Block::ZERO);
    let (base, rows, cols) = (format.base(), format.plane_rows(), Format::GROUP_COLS);
    each_step(base, rows, cols, panel, |step, first_row, first_col| {
        encode_plain_step(base, step, |r, c| {
            let (r, c) = (first_row + r, first_col + c);
            if c >= cols {
                return 0;
            }
            let w = weight(r % Format::PANEL_ROWS, c);
            if base == Format::B1 { sign_of_plane(format, w, r / Format::PANEL_ROWS) } else { w }
        });
    });
}

/// What stands for a weight in a bit plane: 1 where the plane's bit of the code is set, else -1.
fn sign_of_plane(format: Format, weight: i8, plane: usize) -> i8 {
    let code = (weight - format.range().0) / format.distance();
    2 * (code >> plane & 1) - 1
}

/// [`encode_step`] of a format that is not grouped.
fn encode_plain_step(format: Format, step: &mut [Block], weight: impl Fn(usize, usize) -> i8) {
    let (low, _) = format.range();
    step.fill(Block::ZERO);
    match format {
        Format::B1 | Format::TL => {
            for row in 0..format.tile_rows() {
                for group in 0..8 {
                    let (nibble, negative) = encode_group(format, |i| weight(row, format.table_cols() * group + i));
                    let nibbles = step.len() - 4;
                    step[nibbles + group / 2].0[row] |= nibble << (4 * (group % 2));
                    step[0].0[row] |= u8::from(negative) << (7 - group);
                }
            }
        }
        Format::T2 | Format::T2R | Format::I4 | Format::I8 => {
            let bits = 8 * Block::BYTES / format.step_cols();
            for (row, block) in step.iter_mut().enumerate() {
                for c in 0..format.step_cols() {
                    let code = match format {
                        Format::I8 => weight(row, c) as u8,
                        _ => (weight(row, c) - low) as u8,
                    };
                    block.0[c % Block::BYTES] |= code << (c / Block::BYTES * bits);
                }
            }
        }
        Format::F16 => panic!("f16 weights are not integers"),
        Format::B1G | Format::TLG | Format::I4G | Format::I2G | Format::I3G => panic!("{} is grouped", format.name()),
    }
}

/// The nibble of one group of columns, and its sign bit (never set for [`Format::B1`]).
fn encode_group(format: Format, weight: impl Fn(usize) -> i8) -> (u8, bool) {
    match format {
        Format::B1 => ((0..4).fold(0, |n, i| n | u8::from(weight(i) > 0) << i), false),
        _ => {
            let sum = 9 * weight(0) + 3 * weight(1) + weight(2);
            (sum.unsigned_abs(), sum < 0)
        }
    }
}

/// [`encode_step`] for [`Format::F16`]: `weight` gives the bits of a half-precision float.
///
/// # Panics
/// If `step` is not one step.
pub fn encode_step_f16(step: &mut [Block], weight: impl Fn(usize, usize) -> u16) {
    assert_eq!(step.len(), Format::F16.step_blocks());
    for (row, block) in step.iter_mut().enumerate() {
        for (c, bytes) in block.0.chunks_exact_mut(2).enumerate() {
            bytes.copy_from_slice(&weight(row, c).to_le_bytes());
        }
    }
}

/// The weight of `row` and column `col` of one step: the inverse of [`encode_step`].
///
/// # Panics
/// If `step` is not one step, if `row` or `col` lies outside it, or for [`Format::F16`] (see [`decode_f16`]).
pub fn decode(format: Format, step: &[Block], row: usize, col: usize) -> i8 {
    assert!(step.len() == format.step_blocks() && row < format.tile_rows() && col < format.step_cols());
    if !format.is_grouped() {
        return decode_plain(format, step, row, col);
    }
    let panel = &step[..format.panel_blocks()];
    let matrix = crate::Matrix::new(format.base(), format.plane_rows(), Format::GROUP_COLS, panel);
    let matrix = matrix.expect("a panel of whole tiles");
    if format.base() != Format::B1 {
        return matrix.weight(row, col);
    }
    let bit = |plane: usize| i8::from(matrix.weight(plane * Format::PANEL_ROWS + row, col) > 0) << plane;
    format.range().0 + format.distance() * (0..format.bit_planes()).map(bit).sum::<i8>()
}

/// [`decode`] for formats without groups. Always inlined, since little of it is left where the format is known: with calls the
/// conformance suite took three times as long.
///
/// # Panics
/// If `row` or `col` lies outside the step, and for formats with groups and [`Format::F16`].
#[inline(always)]
pub(crate) fn decode_plain(format: Format, step: &[Block], row: usize, col: usize) -> i8 {
    match format {
        Format::B1 => {
            let group = col / 4;
            let bit = step[group / 2].0[row] >> (4 * (group % 2) + col % 4) & 1;
            2 * bit as i8 - 1
        }
        Format::TL => {
            let group = col / 3;
            let nibble = step[1 + group / 2].0[row] >> (4 * (group % 2)) & 15;
            let sign = step[0].0[row] >> (7 - group) & 1;
            let weight = crate::tables::TL_WEIGHTS[nibble as usize][col % 3];
            if sign == 1 { -weight } else { weight }
        }
        Format::T2 | Format::T2R => (step[row].0[col % 64] >> (2 * (col / 64)) & 3) as i8 - 1,
        Format::I4 => (step[row].0[col % 64] >> (4 * (col / 64)) & 15) as i8 - 8,
        Format::I8 => step[row].0[col] as i8,
        Format::B1G | Format::TLG | Format::I4G | Format::I2G | Format::I3G => panic!("groups are decoded by panel"),
        Format::F16 => panic!("f16 weights are not integers"),
    }
}

/// Sets the scale of `row` in one step of a grouped format to the half-precision float with these bits.
///
/// # Panics
/// If `step` is not one step, or `row` lies outside it.
pub fn set_scale(format: Format, step: &mut [Block], row: usize, bits: u16) {
    assert!(format.is_grouped() && step.len() == format.step_blocks() && row < Format::PANEL_ROWS);
    let scales = &mut step[format.panel_blocks()..];
    scales[row / 32].0[row % 32 * 2..][..2].copy_from_slice(&bits.to_le_bytes());
}

/// The scales of one step of a grouped format: the bits of half-precision floats, one a row.
///
/// # Panics
/// If `step` is not one step.
pub fn scales(format: Format, step: &[Block]) -> &[[u8; 2]] {
    assert!(format.is_grouped() && step.len() == format.step_blocks());
    step[format.panel_blocks()..].as_bytes().as_chunks().0
}

/// The products of a panel's rows from those of its bit planes, which lie one after another: the first are in their place then.
/// `x_sum` is the sum of the activations.
///
/// With bits `b` and signs `s = 2b - 1`, `Σ_p 2^p Σ s x` is the sum of `2c - (2^n - 1)` for codes `c` of `n` bits: that of the
/// weights where they are odd, and of twice the weights and one where they are `c - 2^(n - 1)`.
#[inline(always)]
pub fn join_planes(format: Format, sums: &mut [i32], x_sum: i32) {
    let (rows, planes) = sums.split_at_mut(Format::PANEL_ROWS);
    for (i, plane) in planes.chunks_exact(Format::PANEL_ROWS).enumerate() {
        rows.iter_mut().zip(plane).for_each(|(row, sum)| *row += sum << (i + 1));
    }
    if format == Format::I3G {
        rows.iter_mut().for_each(|row| *row = (*row - x_sum) >> 1);
    }
}

/// The bits of the half-precision weight of `row` and column `col` of one step of [`Format::F16`].
///
/// # Panics
/// If `row` or `col` lies outside the step.
pub fn decode_f16(step: &[Block], row: usize, col: usize) -> u16 {
    let bytes = &step[row].0[2 * col..][..2];
    u16::from_le_bytes([bytes[0], bytes[1]])
}

/// Encodes whole tiles: `rows` by `cols` weights given by `weight(r, c)`.
///
/// # Panics
/// As [`encode_step`], and if `blocks` is not exactly the matrix.
pub fn encode(format: Format, rows: usize, cols: usize, blocks: &mut [Block], weight: impl Fn(usize, usize) -> i8) {
    each_step(format, rows, cols, blocks, |step, first_row, first_col| {
        encode_step(format, step, |r, c| {
            let (r, c) = (first_row + r, first_col + c);
            if r < rows && c < cols { weight(r, c) } else { 0 }
        });
    });
}

/// [`encode`] for [`Format::F16`]: `weight` gives the bits of a half-precision float.
///
/// # Panics
/// If `blocks` is not exactly the matrix.
pub fn encode_f16(rows: usize, cols: usize, blocks: &mut [Block], weight: impl Fn(usize, usize) -> u16) {
    each_step(Format::F16, rows, cols, blocks, |step, first_row, first_col| {
        encode_step_f16(step, |r, c| {
            let (r, c) = (first_row + r, first_col + c);
            if r < rows && c < cols { weight(r, c) } else { 0 }
        });
    });
}

/// Calls `f` with each step of the matrix, its first row and its first column.
fn each_step(
    format: Format,
    rows: usize,
    cols: usize,
    blocks: &mut [Block],
    mut f: impl FnMut(&mut [Block], usize, usize),
) {
    assert_eq!(blocks.len(), format.matrix_blocks(rows, cols), "{} {rows}x{cols}", format.name());
    let steps = format.steps(cols);
    for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
        f(step, i / steps * format.tile_rows(), i % steps * format.step_cols());
    }
}
