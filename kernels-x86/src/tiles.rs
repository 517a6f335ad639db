//! A product cut into what a kernel multiplies at once: one tile of rows, a few tokens.
use bitnet_kernel::{Activations, Block, Matrix};

/// A tile of a format in planes: 4 blocks a step, one of each row.
pub(crate) type Planes<'a> = &'a [[Block; 4]];

/// A tile of a format in lanes: 64 rows, `BLOCKS` blocks a step, the last 4 of nibbles and one of signs before them in TL.
pub(crate) type Lanes<'a, const BLOCKS: usize> = &'a [[Block; BLOCKS]];

/// [`each_tile`] of a format in planes.
pub(crate) fn planes<const TOKENS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    dots: impl Fn(Planes<'_>, &[Activations<'_>], &mut [[i32; 4]; TOKENS]),
) {
    each_tile::<4, TOKENS>(w, tokens, y, |tile, x, y| dots(tile.as_chunks().0, x, y));
}

/// [`each_tile`] of a format in lanes.
pub(crate) fn lanes<const BLOCKS: usize, const TOKENS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    dots: impl Fn(Lanes<'_, BLOCKS>, &[Activations<'_>], &mut [[i32; 64]; TOKENS]),
) {
    each_tile::<64, TOKENS>(w, tokens, y, |tile, x, y| dots(tile.as_chunks().0, x, y));
}

/// Calls `dots(tile, x, y)` for every tile of `ROWS` rows and every group of up to `TOKENS` tokens; `y` has one entry for
/// each token.
///
/// Tile by tile, so that the weights of a tile are in the first-level cache for all tokens but the first group.
fn each_tile<const ROWS: usize, const TOKENS: usize>(
    w: Matrix<'_>,
    tokens: &[Activations<'_>],
    y: &mut [i32],
    dots: impl Fn(&[Block], &[Activations<'_>], &mut [[i32; ROWS]; TOKENS]),
) {
    if w.cols() == 0 || w.rows() == 0 {
        return y.fill(0);
    }
    // Written anew for every tile.
    let mut sums = [[0; ROWS]; TOKENS];
    for (first, tile) in (0..w.rows()).step_by(ROWS).zip(w.tiles()) {
        for (tokens, y) in tokens.chunks(TOKENS).zip(y.chunks_mut(w.rows() * TOKENS)) {
            dots(tile, tokens, &mut sums);
            for (y, sums) in y.chunks_exact_mut(w.rows()).zip(&sums) {
                let y = &mut y[first..];
                match y.first_chunk_mut() {
                    Some(y) => *y = *sums,
                    None => y.copy_from_slice(&sums[..y.len()]),
                }
            }
        }
    }
}

/// Whether all tokens have tables of int4 activations, or all have others; `None` if they differ.
pub(crate) fn alike(tokens: &[Activations<'_>]) -> Option<bool> {
    let int4 = tokens.first()?.int4();
    tokens.iter().all(|token| token.int4() == int4).then_some(int4)
}

/// Calls `dots` with each token alone.
pub(crate) fn one_by_one<const ROWS: usize, const TOKENS: usize>(
    tokens: &[Activations<'_>],
    y: &mut [[i32; ROWS]; TOKENS],
    dots: impl Fn(&[Activations<'_>], &mut [[i32; ROWS]; TOKENS]),
) {
    for t in 0..tokens.len() {
        // The results of one token come first.
        let mut one = [[0; ROWS]; TOKENS];
        dots(&tokens[t..=t], &mut one);
        y[t] = one[0];
    }
}
