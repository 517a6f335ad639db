//! Block-sparse ternary matrices: of blocks of 16 rows by 64 or by 16 columns, only those that are not all zero are stored.
//!
//! Such a matrix is cut into units of at most 64 rows, each by itself: bitmaps of its strips of 16 rows, padded to whole
//! blocks of storage, then the strips' live blocks. Bit `i % 64` of word `i / 64` (little-endian) is set if the block of columns
//! from `i` times the block's width on is live. Codes are those of [`crate::Format::T2`], `w + 1` in two bits, but a byte holds one
//! column of four rows, so that these share activations: plane `p`, bits `2p` and `2p + 1`, is row `p` of four.
//!
//! - [`BlockShape::Wide`], 16 by 64: a 64-byte block of storage is four rows; byte `j` is column `j`. A strip has those of its
//!   rows 0 to 3 of all live blocks, then rows 4 to 7 and so on: one pass over the list of live blocks for each four rows.
//! - [`BlockShape::Square`], 16 by 16: one block of storage; byte `16 q + j` is column `j` of rows `4 q` to `4 q + 3`.
//!
//! The sum of codes less that of the activations of all live blocks is the sum of weights; [`BlockActivations`] has the sum of
//! activations of each block of columns for that.
use crate::Block;
use zerocopy::IntoBytes;

/// Rows of a strip.
pub const STRIP_ROWS: usize = 16;
/// Most rows of a unit.
pub const UNIT_ROWS: usize = 64;

/// The size of blocks. The discriminant is what an image records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockShape {
    /// 16 rows by 64 columns.
    Wide = 13,
    /// 16 rows by 16 columns.
    Square = 14,
}

impl BlockShape {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Wide, Self::Square];

    /// The shape with this tag.
    pub const fn from_tag(tag: u8) -> Option<Self> {
        match tag {
            13 => Some(Self::Wide),
            14 => Some(Self::Square),
            _ => None,
        }
    }
    /// `"16x64"`, as reports spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Wide => "16x64",
            Self::Square => "16x16",
        }
    }
    /// Columns of a block.
    pub const fn cols(self) -> usize {
        match self {
            Self::Wide => 64,
            Self::Square => 16,
        }
    }
    /// 64-byte blocks that one of 16 rows takes.
    pub const fn storage(self) -> usize {
        self.cols() / 16
    }
    /// Blocks across `cols` columns.
    pub const fn across(self, cols: usize) -> usize {
        cols.div_ceil(self.cols())
    }
    /// Words of the bitmap of one strip.
    pub const fn words(self, cols: usize) -> usize {
        self.across(cols).div_ceil(64)
    }
    /// 64-byte blocks of the bitmaps of a unit of `rows` rows.
    pub const fn bitmap_blocks(self, rows: usize, cols: usize) -> usize {
        (rows.div_ceil(STRIP_ROWS) * self.words(cols)).div_ceil(8)
    }
    /// 64-byte blocks of a unit in which `live` blocks are live.
    pub const fn unit_blocks(self, rows: usize, cols: usize, live: usize) -> usize {
        self.bitmap_blocks(rows, cols) + live * self.storage()
    }
    /// Where the code of row `r` and column `c` of live block `i` of a strip's `n` lies: the 64-byte block, the byte, the bit.
    pub const fn place(self, n: usize, i: usize, r: usize, c: usize) -> (usize, usize, usize) {
        match self {
            Self::Wide => (r / 4 * n + i, c, 2 * (r % 4)),
            Self::Square => (i, r / 4 * 16 + c, 2 * (r % 4)),
        }
    }
}

/// One unit of a block-sparse matrix.
///
/// Invariant: the bitmaps have as many bits set as there are blocks after them, none of them past the last column.
#[derive(Clone, Copy, Debug)]
pub struct BlockMatrix<'a> {
    shape: BlockShape,
    rows: usize,
    cols: usize,
    words: &'a [[u8; 8]],
    blocks: &'a [Block],
}

/// One strip of a unit.
#[derive(Clone, Copy, Debug)]
pub struct Strip<'a> {
    words: &'a [[u8; 8]],
    blocks: &'a [Block],
}

impl<'a> Strip<'a> {
    /// The live blocks' places from left to right.
    pub fn live(&self) -> impl Iterator<Item = usize> + use<'a> {
        self.words.iter().enumerate().flat_map(|(i, word)| {
            let mut left = u64::from_le_bytes(*word);
            core::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(64 * i + bit)
            })
        })
    }
    /// The words of its bitmap, little-endian.
    pub const fn words(&self) -> &'a [[u8; 8]] {
        self.words
    }
    /// Their storage.
    pub const fn blocks(&self) -> &'a [Block] {
        self.blocks
    }
}

impl<'a> BlockMatrix<'a> {
    /// Views a unit, or `None` if its bitmaps disagree with its size or shape.
    pub fn new(shape: BlockShape, rows: usize, cols: usize, unit: &'a [Block]) -> Option<Self> {
        let (bitmaps, blocks) = unit.split_at_checked(shape.bitmap_blocks(rows, cols))?;
        let words = bitmaps.as_bytes().as_chunks::<8>().0.get(..rows.div_ceil(STRIP_ROWS) * shape.words(cols))?;
        let past = shape.across(cols) % 64;
        let tail = if past == 0 { 0 } else { u64::MAX << past };
        let mut live = 0;
        for strip in words.chunks_exact(shape.words(cols).max(1)) {
            live += strip.iter().map(|word| u64::from_le_bytes(*word).count_ones() as usize).sum::<usize>();
            if strip.last().is_some_and(|last| u64::from_le_bytes(*last) & tail != 0) {
                return None;
            }
        }
        let sound = rows <= UNIT_ROWS && cols <= crate::Format::COLS_MAX && live * shape.storage() == blocks.len();
        sound.then_some(Self { shape, rows, cols, words, blocks })
    }
    /// The size of its blocks.
    pub const fn shape(&self) -> BlockShape {
        self.shape
    }
    /// Rows, at most [`UNIT_ROWS`].
    pub const fn rows(&self) -> usize {
        self.rows
    }
    /// Columns.
    pub const fn cols(&self) -> usize {
        self.cols
    }
    /// Its strips in order.
    pub fn strips(&self) -> impl Iterator<Item = Strip<'a>> + use<'a> {
        let (mut blocks, storage) = (self.blocks, self.shape.storage());
        self.words.chunks_exact(self.shape.words(self.cols).max(1)).map(move |words| {
            let live: u32 = words.iter().map(|word| u64::from_le_bytes(*word).count_ones()).sum();
            let (strip, rest) = blocks.split_at(live as usize * storage);
            blocks = rest;
            Strip { words, blocks: strip }
        })
    }
}

/// Encodes one unit: the definition of its bytes. Returns how many blocks of `unit` it takes.
///
/// Block `b` of strip `s` is stored if `live(s, b)`. `weight(r, c)` is asked for what lies inside the matrix; what lies outside is
/// zero.
///
/// # Panics
/// If `unit` is too short, there are more than [`UNIT_ROWS`] rows, or a weight is not -1, 0 or 1.
pub fn encode_unit(
    shape: BlockShape,
    rows: usize,
    cols: usize,
    live: impl Fn(usize, usize) -> bool,
    weight: impl Fn(usize, usize) -> i8,
    unit: &mut [Block],
) -> usize {
    assert!(rows <= UNIT_ROWS);
    let (bitmaps, blocks) = unit.split_at_mut(shape.bitmap_blocks(rows, cols));
    bitmaps.fill(Block::ZERO);
    let mut end = 0;
    for s in 0..rows.div_ceil(STRIP_ROWS) {
        let is_live = |b: &usize| live(s, *b);
        let n = (0..shape.across(cols)).filter(is_live).count();
        let strip = &mut blocks[end..end + n * shape.storage()];
        strip.fill(Block::ZERO);
        for (i, b) in (0..shape.across(cols)).filter(is_live).enumerate() {
            let bit = 64 * s * shape.words(cols) + b;
            bitmaps[bit / 512].0[bit % 512 / 8] |= 1 << (bit % 8);
            for r in 0..STRIP_ROWS {
                for c in 0..shape.cols() {
                    let (row, col) = (STRIP_ROWS * s + r, shape.cols() * b + c);
                    let w = if row < rows && col < cols { weight(row, col) } else { 0 };
                    assert!((-1..=1).contains(&w), "{w} is not ternary");
                    let (block, byte, bit) = shape.place(n, i, r, c);
                    strip[block].0[byte] |= ((w + 1) as u8) << bit;
                }
            }
        }
        end += strip.len();
    }
    bitmaps.len() + end
}

/// Int8 activations for [`BlockMatrix`]: the values, and the sum of each block of columns.
#[derive(Clone, Copy, Debug)]
pub struct BlockActivations<'a> {
    shape: BlockShape,
    values: &'a [i8],
    sums: &'a [i32],
}

impl<'a> BlockActivations<'a> {
    /// Sums up what each block of `cols` columns is multiplied by. `values` goes on with zeros to the end of the last block.
    ///
    /// # Panics
    /// If `values` or `sums`, one a block, are too short.
    pub fn new(shape: BlockShape, cols: usize, values: &'a [i8], sums: &'a mut [i32]) -> Self {
        let across = shape.across(cols);
        let (values, sums) = (&values[..across * shape.cols()], &mut sums[..across]);
        for (sum, values) in sums.iter_mut().zip(values.chunks_exact(shape.cols())) {
            *sum = values.iter().map(|&v| i32::from(v)).sum();
        }
        Self { shape, values, sums }
    }
    /// The values, whole blocks of them.
    pub const fn values(&self) -> &'a [i8] {
        self.values
    }
    /// The sums of values, one a block of columns.
    pub const fn sums(&self) -> &'a [i32] {
        self.sums
    }
    /// Panics unless these activations fit `w`: the entrance check of every kernel.
    #[track_caller]
    pub fn assert_fit(&self, w: &BlockMatrix<'_>) {
        assert!(self.shape == w.shape && self.sums.len() == w.shape.across(w.cols), "activations for another matrix");
    }
}

/// The definition of [`crate::Kernels::matvec_blocks`], for backends to compile again with their CPU's instructions: sums are
/// integers, so that their order is free.
#[inline(always)]
pub fn matvec_blocks(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), w.rows());
    x.assert_fit(&w);
    for (strip, y) in w.strips().zip(y.chunks_mut(STRIP_ROWS)) {
        let mut sums = [0; STRIP_ROWS];
        match w.shape() {
            BlockShape::Wide => wide(&strip, x, &mut sums),
            BlockShape::Square => square(&strip, x, &mut sums),
        }
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum);
    }
}

/// The sum of codes, and activations, of one plane.
#[inline(always)]
fn dot<const N: usize>(codes: &[u8], plane: usize, x: &[i8]) -> i32 {
    let (codes, x): (&[u8; N], &[i8; N]) = (codes.try_into().expect("N"), x.try_into().expect("N"));
    codes.iter().zip(x).map(|(code, x)| i32::from((code >> (2 * plane) & 3) as i8) * i32::from(*x)).sum()
}

#[inline(always)]
fn wide(strip: &Strip<'_>, x: BlockActivations<'_>, y: &mut [i32; STRIP_ROWS]) {
    let mut blocks = strip.blocks().iter();
    for y in y.as_chunks_mut::<4>().0 {
        for (at, block) in strip.live().zip(&mut blocks) {
            let values = &x.values()[64 * at..][..64];
            for (p, y) in y.iter_mut().enumerate() {
                *y += dot::<64>(&block.0, p, values) - x.sums()[at];
            }
        }
    }
}

#[inline(always)]
fn square(strip: &Strip<'_>, x: BlockActivations<'_>, y: &mut [i32; STRIP_ROWS]) {
    for (at, block) in strip.live().zip(strip.blocks()) {
        let values = &x.values()[16 * at..][..16];
        for (codes, y) in block.0.chunks_exact(16).zip(y.as_chunks_mut::<4>().0) {
            for (p, y) in y.iter_mut().enumerate() {
                *y += dot::<16>(codes, p, values) - x.sums()[at];
            }
        }
    }
}
