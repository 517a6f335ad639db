//! Compacted linears: matrices stored without their rows and columns of zeros.
//!
//! The index section before such a linear has two masks, of its rows and of its columns, each in whole blocks: bit `i % 8` of
//! byte `i / 8` is set if row (column) `i` is kept. The matrix itself has the rows and columns that are kept, in their order.
//! A product takes the activations of the columns that are kept and puts its results where the rows belong; all other
//! results are zero. What is left out is neither stored nor read, and results are those of the whole matrix, bit for bit.
use bitnet_kernel::Block;
use zerocopy::IntoBytes;

/// Blocks of the mask of `n` rows or columns.
pub const fn mask_blocks(n: u32) -> u32 {
    n.div_ceil(8 * Block::BYTES as u32)
}

/// The mask that keeps every `i < n` of which `keep(i)` is true.
pub fn set_mask(mask: &mut [Block], n: usize, keep: impl Fn(usize) -> bool) {
    mask.fill(Block::ZERO);
    for i in (0..n).filter(|&i| keep(i)) {
        mask[i / 512].0[i % 512 / 8] |= 1 << (i % 8);
    }
}

/// What a mask keeps, in rising order.
pub fn kept(mask: &[Block]) -> impl Iterator<Item = usize> + '_ {
    let (words, _) = mask.as_bytes().as_chunks::<8>();
    words.iter().enumerate().flat_map(|(i, word)| {
        let mut left = u64::from_le_bytes(*word);
        core::iter::from_fn(move || {
            let bit = left.checked_ilog2().map(|_| left.trailing_zeros())?;
            left &= left - 1;
            Some(64 * i + bit as usize)
        })
    })
}
