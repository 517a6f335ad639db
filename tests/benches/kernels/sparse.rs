//! Linears of which 65 % are zeros, in every layout, beside the whole one in the same run.
//!
//! What a runtime does is measured: gathering activations and scattering results included, units of 64 rows, one thread. *Hot*
//! is the best of many runs over one matrix, *cold* the 10th percentile over copies that fill at least 400 MB. Layouts take
//! turns, so that other work on the machine slows all.
use bitnet_kernel::blocks::{STRIP_ROWS, UNIT_ROWS, encode_unit};
use bitnet_kernel::{Block, BlockActivations, BlockMatrix, BlockShape, Format, Kernels, Matrix, format};
use bitnet_runtime::backend;
use bitnet_runtime::image::kept::{kept, mask_blocks, set_mask};
use serde_json::json;
use std::hint::black_box;
use std::time::Instant;

const SHAPES: [(usize, usize); 3] = [(2560, 2560), (6912, 2560), (2560, 6912)];
const FORMATS: [Format; 2] = [Format::T2, Format::TL];
const COLD_BYTES: usize = 400_000_000;
const HOT_RUNS: usize = 200;
const COLD_PASSES: usize = 4;
/// Rows, columns or blocks of a thousand that are left.
const LEFT: usize = 350;

/// Measures every layout with the best backend, or the one that is named.
pub(crate) fn all(backend: Option<&str>) -> Result<(), String> {
    let k = match backend {
        None => backend::best(),
        Some(name) => backend::available().find(|k| k.name() == name).ok_or(format!("`{name}` is no backend"))?,
    };
    for shape in SHAPES {
        for format in FORMATS {
            measure(k, format, shape);
        }
    }
    Ok(())
}

/// Whether the `i`-th of some is left.
fn left(i: usize, salt: usize, of_thousand: usize) -> bool {
    ((i + salt) as u32).wrapping_mul(0x9e37_79b9) as usize >> 8 & 0xf_ffff < of_thousand * 0x10_0000 / 1000
}

fn weight(r: usize, c: usize) -> i8 {
    (((r * 8191 + c) as u32).wrapping_mul(0x85eb_ca6b) >> 8) as i8 % 2
}

/// Multiplies one copy of a matrix.
type Run<'a> = Box<dyn FnMut(&[Block]) + 'a>;

/// One layout of a matrix, ready to be multiplied.
struct Layout<'a> {
    name: String,
    blocks: Vec<Block>,
    run: Run<'a>,
}

fn measure(k: &dyn Kernels, format: Format, (rows, cols): (usize, usize)) {
    let x: Vec<i8> =
        (0..cols.next_multiple_of(256) + 256).map(|i| if i < cols { (i * 89 % 255) as u8 as i8 } else { 0 }).collect();
    let x = &x[..];
    // The square root of what is left for rows and columns together.
    let both = (LEFT as f64 / 1000.0).sqrt() * 1000.0;
    let mut layouts = vec![dense(k, format, "whole", x, (rows, cols), (1000, 1000))];
    for (name, r, c) in
        [("rows", LEFT, 1000), ("columns", 1000, LEFT), ("rows and columns", both as usize, both as usize)]
    {
        layouts.push(dense(k, format, name, x, (rows, cols), (r, c)));
    }
    if format == Format::T2 {
        layouts.extend(BlockShape::ALL.map(|shape| sparse(k, shape, x, (rows, cols))));
    }

    let mut times = vec![(f64::INFINITY, Vec::new()); layouts.len()];
    for _ in 0..HOT_RUNS {
        for (Layout { blocks, run, .. }, (hot, _)) in layouts.iter_mut().zip(&mut times) {
            // Twice, so that the second finds what the others took from the caches.
            run(blocks);
            let start = Instant::now();
            run(blocks);
            *hot = hot.min(start.elapsed().as_secs_f64());
        }
    }
    for (Layout { blocks, run, .. }, (_, cold)) in layouts.iter_mut().zip(&mut times) {
        let copies = COLD_BYTES.div_ceil(blocks.len() * Block::BYTES);
        let all: Vec<Block> = core::iter::repeat_n(blocks.as_slice(), copies).flatten().copied().collect();
        for copy in core::iter::repeat_n(&all, COLD_PASSES).flat_map(|all| all.chunks_exact(blocks.len())) {
            let start = Instant::now();
            run(copy);
            cold.push(start.elapsed().as_secs_f64());
        }
        cold.sort_by(f64::total_cmp);
    }
    let times: Vec<[f64; 2]> = times.into_iter().map(|(hot, cold)| [hot, cold[cold.len() / 10]]).collect();
    for (layout, time) in layouts.iter().zip(&times) {
        for (i, state) in ["hot", "cold"].into_iter().enumerate() {
            println!(
                "{}",
                json!({
                    "backend": k.name(), "format": format.name(), "rows": rows, "cols": cols, "layout": layout.name, "state": state,
                    "us": time[i] * 1e6, "speed_up": times[0][i] / time[i], "bytes": layout.blocks.len() * Block::BYTES,
                    "bytes_share": layout.blocks.len() as f64 / layouts[0].blocks.len() as f64,
                })
            );
        }
    }
}

/// A matrix of which so many rows and columns of a thousand are left.
fn dense<'a>(
    k: &'a dyn Kernels,
    format: Format,
    name: &str,
    x: &'a [i8],
    (rows, cols): (usize, usize),
    (rows_left, cols_left): (usize, usize),
) -> Layout<'a> {
    let mask = |n: usize, salt, share| {
        let mut mask = vec![Block::ZERO; mask_blocks(n as u32) as usize];
        set_mask(&mut mask, n, |i| share == 1000 || left(i, salt, share));
        mask
    };
    let (row_mask, col_mask) = (mask(rows, 1, rows_left), mask(cols, 2, cols_left));
    let (n, m) = (kept(&row_mask).count(), kept(&col_mask).count());
    let mut blocks = vec![Block::ZERO; format.matrix_blocks(n, m)];
    format::encode(format, n, m, &mut blocks, weight);
    let mut values = vec![Block::ZERO; format.padded_cols(m).div_ceil(Block::BYTES)];
    let (mut tables, mut sums) = (vec![Block::ZERO; format.table_blocks(m)], vec![0; n]);
    let mut y = vec![0.0; rows];
    let run = move |blocks: &[Block]| {
        let w = Matrix::new(format, n, m, blocks).expect("a copy");
        let values = zerocopy::FromBytes::mut_from_bytes(zerocopy::IntoBytes::as_mut_bytes(&mut values[..]));
        let values: &mut [i8] = values.expect("bytes");
        let values = if m == cols {
            x
        } else {
            values.iter_mut().zip(kept(&col_mask)).for_each(|(value, c)| *value = x[c]);
            &*values
        };
        let x = k.prepare(format, m, values, &mut tables);
        for (unit, sums) in sums.chunks_mut(UNIT_ROWS).enumerate() {
            let first = unit * UNIT_ROWS;
            k.matvec(w.slice(first..first + sums.len()), x, sums);
        }
        if n < rows {
            y.fill(0.0);
        }
        for (row, sum) in kept(&row_mask).zip(&sums) {
            y[row] = *sum as f32;
        }
        black_box(&y);
    };
    Layout { name: name.into(), blocks, run: Box::new(run) }
}

/// A matrix of which so many blocks of a thousand are left.
fn sparse<'a>(k: &'a dyn Kernels, shape: BlockShape, x: &'a [i8], (rows, cols): (usize, usize)) -> Layout<'a> {
    let across = shape.across(cols);
    let mut blocks = Vec::new();
    let mut ends = Vec::new();
    for first in (0..rows).step_by(UNIT_ROWS) {
        let n = UNIT_ROWS.min(rows - first);
        let strips = n.div_ceil(STRIP_ROWS);
        let mut unit = vec![Block::ZERO; shape.unit_blocks(n, cols, strips * across)];
        let live = |s: usize, b: usize| left((first / STRIP_ROWS + s) * across + b, 3, LEFT);
        let used = encode_unit(shape, n, cols, live, |r, c| weight(first + r, c), &mut unit);
        blocks.extend_from_slice(&unit[..used]);
        ends.push(blocks.len());
    }
    let (mut sums, mut y, mut totals) = (vec![0; across], vec![0.0; rows], [0; UNIT_ROWS]);
    let run = move |blocks: &[Block]| {
        let x = BlockActivations::new(shape, cols, x, &mut sums);
        let mut start = 0;
        for (y, &end) in y.chunks_mut(UNIT_ROWS).zip(&ends) {
            let w = BlockMatrix::new(shape, y.len(), cols, &blocks[start..end]).expect("a unit");
            let totals = &mut totals[..y.len()];
            k.matvec_blocks(w, x, totals);
            y.iter_mut().zip(totals).for_each(|(y, sum)| *y = *sum as f32);
            start = end;
        }
        black_box(&y);
    };
    Layout { name: shape.name().into(), blocks, run: Box::new(run) }
}
