//! Packs rows of integers into blocks: what `bitnet_kernel::format::encode` defines, at the speed of memory.
//!
//! The definition asks a closure for each weight, which takes seconds for a large matrix. Here every format has a loop over
//! whole rows; a test compares the two over all formats and odd shapes.
use bitnet_kernel::{Block, Format, Geometry};
use pulp::Arch;

/// Encodes rows as the tiles of one unit (or of a whole matrix).
///
/// `weights` holds the rows one after another, each `format.padded_cols(cols)` long with zeros past the matrix. Values must
/// lie within `format.range()` (any value but zero counts as its sign in [`Format::B1`]).
///
/// # Panics
/// If lengths disagree, or for [`Format::F16`] and grouped formats.
pub fn encode(format: Format, rows: usize, cols: usize, weights: &[i8], blocks: &mut [Block]) {
    let stride = format.padded_cols(cols);
    assert!(!format.is_grouped());
    assert_eq!(weights.len(), rows * stride);
    assert_eq!(blocks.len(), format.matrix_blocks(rows, cols));
    if blocks.is_empty() {
        return;
    }
    let tiles = weights.chunks(format.tile_rows() * stride).zip(blocks.chunks_exact_mut(format.tile_blocks(cols)));
    for (weights, tile) in tiles {
        Arch::new().dispatch(
            #[inline(always)]
            || match format.geometry() {
                Geometry::Lanes => lanes(format, stride, weights, tile),
                Geometry::Planes => planes(format, stride, weights, tile),
            },
        );
    }
}

/// [`encode`] for a grouped format: `scales` holds the bits of half-precision floats, one a group, row after row.
///
/// # Panics
/// If lengths disagree, or the format is not grouped.
pub fn encode_grouped(format: Format, rows: usize, cols: usize, weights: &[i8], scales: &[u16], blocks: &mut [Block]) {
    let (stride, steps, base) = (format.padded_cols(cols), format.steps(cols), format.base());
    assert!(format.is_grouped());
    assert_eq!((weights.len(), scales.len()), (rows * stride, rows * steps));
    assert_eq!(blocks.len(), format.matrix_blocks(rows, cols));
    let padded = base.padded_cols(Format::GROUP_COLS);
    let mut panel = vec![0; format.plane_rows() * padded];
    for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
        let (first, group) = (i / steps * Format::PANEL_ROWS, i % steps);
        step.fill(Block::ZERO);
        panel.fill(0);
        for (r, row) in (first..rows.min(first + Format::PANEL_ROWS)).zip(panel.chunks_exact_mut(padded)) {
            let weights = &weights[r * stride + group * Format::GROUP_COLS..][..Format::GROUP_COLS];
            row[..Format::GROUP_COLS].copy_from_slice(weights);
            bitnet_kernel::format::set_scale(format, step, r - first, scales[r * steps + group]);
        }
        part_planes(format, &mut panel);
        encode(base, format.plane_rows(), Format::GROUP_COLS, &panel, &mut step[..format.panel_blocks()]);
    }
}

/// Makes signs of weights of several bits, those of each bit plane below the one before. The weights lie where the first goes.
fn part_planes(format: Format, panel: &mut [i8]) {
    if format.bit_planes() == 1 {
        return;
    }
    let (low, _) = format.range();
    let (weights, planes) = panel.split_at_mut(panel.len() / format.bit_planes());
    let sign = |w: i8, plane: usize| (((w - low) / format.distance()) >> plane & 1) * 2 - 1;
    for (i, plane) in planes.chunks_exact_mut(weights.len()).enumerate() {
        plane.iter_mut().zip(&*weights).for_each(|(sign_of, w)| *sign_of = sign(*w, i + 1));
    }
    weights.iter_mut().for_each(|w| *w = sign(*w, 0));
}

#[inline(always)]
fn lanes(format: Format, stride: usize, weights: &[i8], tile: &mut [Block]) {
    tile.fill(Block::ZERO);
    let cols = format.step_cols();
    for (s, step) in tile.chunks_exact_mut(format.step_blocks()).enumerate() {
        for (r, row) in weights.chunks_exact(stride).enumerate() {
            let row = &row[s * cols..][..cols];
            if format == Format::TL { tl_row(row, r, step) } else { b1_row(row, r, step) }
        }
    }
}

/// 24 ternary weights: a byte of signs and four of nibbles, in lane `r` of five blocks.
#[inline(always)]
fn tl_row(row: &[i8], r: usize, step: &mut [Block]) {
    let (groups, _) = row.as_chunks::<3>();
    let mut signs = 0;
    for (block, pair) in step[1..].iter_mut().zip(groups.chunks_exact(2)) {
        let sum = |g: [i8; 3]| 9 * g[0] + 3 * g[1] + g[2];
        let (low, high) = (sum(pair[0]), sum(pair[1]));
        signs = signs << 2 | u8::from(low < 0) << 1 | u8::from(high < 0);
        block.0[r] = low.unsigned_abs() | high.unsigned_abs() << 4;
    }
    step[0].0[r] = signs;
}

/// 32 signs: four bytes, in lane `r` of four blocks.
#[inline(always)]
fn b1_row(row: &[i8], r: usize, step: &mut [Block]) {
    for (block, eight) in step.iter_mut().zip(row.chunks_exact(8)) {
        block.0[r] = eight.iter().rev().fold(0, |byte, &w| byte << 1 | u8::from(w > 0));
    }
}

#[inline(always)]
fn planes(format: Format, stride: usize, weights: &[i8], tile: &mut [Block]) {
    // The first block holds a row of zeros where a row is missing.
    let zeros = match format {
        Format::T2 | Format::T2R => 0x55,
        Format::I4 => 0x88,
        _ => 0,
    };
    let cols = format.step_cols();
    for (s, step) in tile.chunks_exact_mut(format.step_blocks()).enumerate() {
        let mut rows = weights.chunks_exact(stride);
        for block in step {
            match rows.next() {
                Some(row) => plane_row(format, &row[s * cols..][..cols], &mut block.0),
                None => block.0.fill(zeros),
            }
        }
    }
}

#[inline(always)]
fn plane_row(format: Format, row: &[i8], block: &mut [u8; 64]) {
    let (planes, _) = row.as_chunks::<64>();
    for (j, byte) in block.iter_mut().enumerate() {
        let code = |plane: usize, zero: i8| (planes[plane][j] + zero) as u8;
        *byte = match format {
            Format::T2 | Format::T2R => code(0, 1) | code(1, 1) << 2 | code(2, 1) << 4 | code(3, 1) << 6,
            Format::I4 => code(0, 8) | code(1, 8) << 4,
            Format::I8 => code(0, 0),
            _ => panic!("{} is not encoded here", format.name()),
        };
    }
}

/// [`encode`] for [`Format::F16`]: bits of half-precision floats, rows padded to multiples of 32.
///
/// # Panics
/// If lengths disagree.
pub fn encode_f16(rows: usize, cols: usize, weights: &[u16], blocks: &mut [Block]) {
    let stride = Format::F16.padded_cols(cols);
    assert_eq!(weights.len(), rows * stride);
    assert_eq!(blocks.len(), Format::F16.matrix_blocks(rows, cols));
    blocks.fill(Block::ZERO);
    for (r, row) in weights.chunks_exact(stride).enumerate() {
        let tile = &mut blocks[r / 4 * Format::F16.tile_blocks(cols)..][..Format::F16.tile_blocks(cols)];
        for (step, values) in tile.chunks_exact_mut(4).zip(row.chunks_exact(32)) {
            for (bytes, bits) in step[r % 4].0.chunks_exact_mut(2).zip(values) {
                bytes.copy_from_slice(&bits.to_le_bytes());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cheap sequence of numbers without visible order.
    fn noise(seed: u32) -> impl Iterator<Item = u32> {
        let mut x = seed;
        core::iter::from_fn(move || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            Some(x >> 16)
        })
    }

    /// Shapes: one weight, tails of rows and columns of every format, whole steps, several tiles.
    const SHAPES: [(usize, usize); 8] = [(1, 1), (3, 23), (4, 64), (5, 257), (63, 24), (64, 96), (65, 25), (130, 300)];

    #[test]
    fn all_formats_agree_with_the_definition() {
        for format in Format::ALL.into_iter().filter(|f| f.is_integer()) {
            for (rows, cols) in SHAPES {
                let stride = format.padded_cols(cols);
                let mut weights = vec![0; rows * stride];
                let mut random = noise(rows as u32 * 1000 + cols as u32);
                for row in weights.chunks_exact_mut(stride) {
                    row[..cols].iter_mut().for_each(|w| *w = format.weight(random.next().unwrap()));
                }
                let mut expected = vec![Block::ZERO; format.matrix_blocks(rows, cols)];
                let mut found = vec![Block([0xa5; 64]); expected.len()];
                bitnet_kernel::format::encode(format, rows, cols, &mut expected, |r, c| weights[r * stride + c]);
                if format.is_grouped() {
                    let steps = format.steps(cols);
                    let scales: Vec<u16> = random.by_ref().take(rows * steps).map(|n| n as u16).collect();
                    for (i, step) in expected.chunks_exact_mut(format.step_blocks()).enumerate() {
                        for r in i / steps * 64..rows.min(i / steps * 64 + 64) {
                            bitnet_kernel::format::set_scale(format, step, r % 64, scales[r * steps + i % steps]);
                        }
                    }
                    encode_grouped(format, rows, cols, &weights, &scales, &mut found);
                } else {
                    encode(format, rows, cols, &weights, &mut found);
                }
                assert!(expected == found, "{} {rows}x{cols}", format.name());
            }
        }
    }

    #[test]
    fn f16_agrees_with_the_definition() {
        for (rows, cols) in SHAPES {
            let stride = Format::F16.padded_cols(cols);
            let mut weights = vec![0; rows * stride];
            for (row, r) in weights.chunks_exact_mut(stride).zip(0..) {
                row[..cols].iter_mut().zip(noise(r)).for_each(|(w, n)| *w = n as u16);
            }
            let mut expected = vec![Block::ZERO; Format::F16.matrix_blocks(rows, cols)];
            let mut found = vec![Block([0xa5; 64]); expected.len()];
            bitnet_kernel::format::encode_f16(rows, cols, &mut expected, |r, c| weights[r * stride + c]);
            encode_f16(rows, cols, &weights, &mut found);
            assert!(expected == found, "{rows}x{cols}");
        }
    }
}
