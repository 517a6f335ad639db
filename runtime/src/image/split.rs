//! A head in two planes: what its sections mean, for those who write them and those who read them.
//!
//! Some columns of a head have weights much larger than the others, and the final norm makes the activations there the
//! largest too. They are taken *apart*: [`Columns`] names them, and a matrix of [`bitnet_kernel::Format::I8`] has the weights
//! there. The other columns then have a finer scale, and their weight is `w = 16 · high + 8 + low`, both parts from -8 to 7:
//! two matrices of [`bitnet_kernel::Format::I4`]. With `x'`, the int8 activations with zeros in the columns apart, a row's
//! sum is
//!
//! ```text
//! 16 (high · x') + 8 Σ x' + step (apart · x) + low · x'
//! ```
//!
//! All but the last term is known without the low plane, and the last is at most `|low| |x'|` by Cauchy's inequality. Both
//! norms are rounded up to integers, so there is nothing else to round.
//!
//! There are as many columns apart as a step of their format has. On the head of SmolLM2-135M (576 columns, 49,152 rows) and 150
//! tokens of a story, 2.3 % of the low plane is read for the best token, in tiles of four rows, and 31 % for the best 40. With
//! 24 columns the bound leaves 3 and 29 % of the rows, which are more tiles; with none 98 % and all.
use super::UNIT_ROWS;
use crate::source::Extent;
use bitnet_kernel::{Block, Format};
use zerocopy::{FromBytes, IntoBytes};

/// Columns apart: one step of their format.
pub const COLUMNS: usize = Format::I8.step_cols();
/// Blocks of the norms of a unit of 64 rows.
pub const NORM_BLOCKS: usize = UNIT_ROWS * size_of::<u16>() / Block::BYTES;

/// The high and the low part of an int8 weight.
pub const fn split(w: i8) -> (i8, i8) {
    (w >> 4, (w & 15) - 8)
}

/// The weight that [`split`] took apart.
pub const fn join(high: i8, low: i8) -> i32 {
    16 * high as i32 + 8 + low as i32
}

/// `|x|`, rounded up.
pub fn norm(x: &[i8]) -> u32 {
    let squares: u64 = x.iter().map(|&x| u64::from(x.unsigned_abs()).pow(2)).sum();
    let root = squares.isqrt();
    (root + u64::from(root * root != squares)) as u32
}

/// Bytes of the section of norms, for `rows` rows: whole units, zeros past the last row.
pub const fn norms_bytes(rows: u32) -> u32 {
    rows.div_ceil(UNIT_ROWS as u32) * (NORM_BLOCKS * Block::BYTES) as u32
}

/// The norms in blocks of their section, one a row.
pub fn norms(blocks: &[Block]) -> &[u16] {
    <[u16]>::ref_from_bytes(blocks.as_bytes()).expect("a block is 32 norms")
}

/// Where the norms of unit `u` lie in their section.
pub(crate) const fn norms_unit(section: Extent, u: u32) -> Extent {
    let blocks = NORM_BLOCKS as u32;
    Extent { start: section.start + u * blocks, blocks }
}

/// The step of a row, from the row scale of its weights apart, which is a whole number from 1 to 255.
#[inline]
pub const fn step(scale: f32) -> i32 {
    // Whatever it is: with a step of one byte a row's sum fits 32 bits.
    scale as u8 as i32
}

/// The columns apart, as their section's floats name them. A number that is no column stands for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Columns([u32; COLUMNS]);

impl Columns {
    /// These columns; what is past the last of `cols` columns is none.
    pub const fn new(columns: [u32; COLUMNS]) -> Self {
        Self(columns)
    }
    /// From the section's floats.
    pub fn from_floats(floats: &[f32]) -> Self {
        Self(core::array::from_fn(|i| floats.get(i).map_or(u32::MAX, |&f| f as u32)))
    }
    /// As the section's floats.
    pub fn to_floats(self) -> [f32; COLUMNS] {
        self.0.map(|c| c as f32)
    }
    /// The columns.
    pub const fn indices(&self) -> &[u32; COLUMNS] {
        &self.0
    }
    /// Moves what `x` has in these columns out of it, and leaves zeros.
    pub fn take(&self, x: &mut [i8]) -> [i8; COLUMNS] {
        self.0.map(|c| x.get_mut(c as usize).map_or(0, core::mem::take))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_weight_is_its_parts() {
        for w in i8::MIN..=i8::MAX {
            let (high, low) = split(w);
            assert!((-8..=7).contains(&high) && (-8..=7).contains(&low));
            assert_eq!(join(high, low), i32::from(w));
        }
    }

    #[test]
    fn norms_are_rounded_up() {
        assert_eq!([0, 1, 2, 3].map(|n| norm(&[1; 16][..n])), [0, 1, 2, 2]);
        assert_eq!(norm(&[3, -4]), 5);
        assert_eq!(norm(&[-127; 4]), 254);
    }

    #[test]
    fn hostile_steps_are_bytes() {
        assert_eq!([1.0, 255.0, 1e9, f32::INFINITY].map(step), [1, 255, 255, 255]);
        assert_eq!([-1.0, f32::NAN, f32::NEG_INFINITY].map(step), [0, 0, 0]);
    }

    /// Columns past the last, twice the same, and no numbers: no panic, and nothing is counted twice.
    #[test]
    fn hostile_columns_are_none() {
        let columns = Columns::from_floats(&[1.0, 1.0, 9.0, f32::NAN, f32::INFINITY, -3.0]);
        let mut x = [5, 6, 7];
        assert_eq!(columns.take(&mut x)[..6], [6, 0, 0, 5, 0, 0]);
        assert_eq!(x, [0, 0, 7]);
    }
}
