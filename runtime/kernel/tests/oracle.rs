//! The portable product against a plain sum over the weights that were packed, never over what `decode` returns; and the
//! views, which refuse what kernels must not be given.
mod common;

use bitnet_kernel::portable::Portable;
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix, format};
use common::Lcg;
use proptest::prelude::*;

/// One row and column, the edges of tiles and of every format's steps, more than one tile of lanes, and primes.
const SHAPES: [(usize, usize); 17] = [
    (1, 1),
    (2, 3),
    (3, 23),
    (4, 24),
    (5, 25),
    (4, 31),
    (8, 32),
    (9, 33),
    (64, 64),
    (63, 65),
    (65, 127),
    (128, 128),
    (129, 129),
    (67, 255),
    (4, 256),
    (7, 257),
    (131, 521),
];

/// Weights of a matrix, row after row.
fn weights(format: Format, n: usize, lcg: &mut Lcg) -> Vec<i8> {
    (0..n).map(|_| format.weight(lcg.next())).collect()
}

fn activations(n: usize, lcg: &mut Lcg) -> Vec<i8> {
    (0..n).map(|_| (lcg.next() >> 3) as u8 as i8).collect()
}

fn pack(format: Format, (rows, cols): (usize, usize), weights: &[i8]) -> Vec<Block> {
    let mut blocks = vec![Block::ZERO; format.matrix_blocks(rows, cols)];
    format::encode(format, rows, cols, &mut blocks, |r, c| weights[r * cols + c]);
    blocks
}

/// What the matrix is, from the weights as they were before packing.
fn plain(cols: usize, weights: &[i8], x: &[i8]) -> Vec<i64> {
    let product = |(&w, &x): (&i8, &i8)| i64::from(w) * i64::from(x);
    weights.chunks_exact(cols).map(|row| row.iter().zip(x).map(product).sum()).collect()
}

/// The portable product, with as many zeros behind the activations as the format asks for.
fn portable(format: Format, (rows, cols): (usize, usize), blocks: &[Block], x: &[i8]) -> Vec<i64> {
    let mut values = x.to_vec();
    values.resize(format.padded_cols(cols), 0);
    let mut tables = vec![Block::ZERO; format.table_blocks(cols)];
    let x = Portable.prepare(format, cols, &values, &mut tables);
    let w = Matrix::new(format, rows, cols, blocks).expect("the blocks of the shape");
    let mut y = vec![i32::MIN; rows];
    Portable.matvec(w, x, &mut y);
    y.into_iter().map(i64::from).collect()
}

fn check(format: Format, (rows, cols): (usize, usize), weights: &[i8], x: &[i8]) {
    let got = portable(format, (rows, cols), &pack(format, (rows, cols), weights), x);
    assert_eq!(got, plain(cols, weights, x), "{} {rows}x{cols}", format.name());
}

#[test]
fn random_products_are_the_plain_sums() {
    let mut lcg = Lcg(2);
    for format in Format::INTEGER {
        for (rows, cols) in SHAPES {
            let weights = weights(format, rows * cols, &mut lcg);
            check(format, (rows, cols), &weights, &activations(cols, &mut lcg));
        }
    }
}

/// Every weight and every activation at one end of its range, up to the widest matrix.
#[test]
fn extreme_products_are_the_plain_sums() {
    for format in Format::INTEGER {
        let (low, high) = format.range();
        for (rows, cols) in [(1, 1), (5, 257), (66, 1_025), (2, Format::COLS_MAX)] {
            for (w, x) in [(low, -128), (low, 127), (high, -128), (high, 127)] {
                check(format, (rows, cols), &vec![w; rows * cols], &vec![x; cols]);
            }
        }
    }
}

/// A grouped product from the weights and scales as they were before packing, for the portable one and for the default that
/// others inherit.
#[test]
fn grouped_products_are_the_plain_sums() {
    /// Inherits everything.
    #[derive(Debug)]
    struct Inherits;
    impl Kernels for Inherits {
        fn name(&self) -> &'static str {
            "inherits"
        }
        fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
            let values = x.values();
            for (r, y) in y.iter_mut().enumerate() {
                *y = (0..w.cols()).map(|c| i32::from(w.weight(r, c)) * i32::from(values[c])).sum();
            }
        }
    }
    let mut lcg = Lcg(5);
    for format in Format::GROUPED {
        for (rows, cols) in SHAPES {
            let weights = weights(format, rows * cols, &mut lcg);
            let mut blocks = pack(format, (rows, cols), &weights);
            let (groups, tiles) = (cols.div_ceil(128), rows.div_ceil(64));
            // Powers of two, so that the plain sum is exact in f64 and f32 alike.
            let scales: Vec<i32> = (0..tiles * groups * 64).map(|_| (lcg.next() >> 8) as i32 % 3 - 1).collect();
            for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
                for r in 0..64 {
                    let half = bitnet_kernel::float::f32_to_f16(f32::powi(2.0, scales[i * 64 + r]));
                    format::set_scale(format, step, r, half);
                }
            }
            let w = Matrix::new(format, rows, cols, &blocks).expect("the blocks of the shape");
            let tokens: Vec<Vec<i8>> = (0..3).map(|_| activations(cols, &mut lcg)).collect();
            let want: Vec<f32> = (0..3 * rows)
                .map(|i| {
                    let (t, r) = (i / rows, i % rows);
                    let product = |c: usize| i64::from(weights[r * cols + c]) * i64::from(tokens[t][c]);
                    let group = |g: usize| (128 * g..cols.min(128 * g + 128)).map(product).sum::<i64>() as f64;
                    let scale = |g: usize| f64::powi(2.0, scales[(r / 64 * groups + g) * 64 + r % 64]);
                    (0..groups).map(|g| group(g) * scale(g)).sum::<f64>() as f32
                })
                .collect();
            for k in [&Portable as &dyn Kernels, &Inherits] {
                let mut padded = tokens.clone();
                padded.iter_mut().for_each(|values| values.resize(format.padded_cols(cols), 0));
                let mut tables = vec![vec![Block::ZERO; format.table_blocks(cols)]; 3];
                let x: Vec<Activations<'_>> =
                    padded.iter().zip(&mut tables).map(|(v, t)| k.prepare_any(format, cols, v, t)).collect();
                let mut got = vec![f32::NAN; 3 * rows];
                k.matmat_grouped(w, Batch::new(&x), &mut got);
                assert_eq!(got, want, "{} {rows}x{cols} {}", format.name(), k.name());
                k.matvec_grouped(w, x[1], &mut got[..rows]);
                assert_eq!(got[..rows], want[rows..2 * rows]);
            }
        }
    }
}

/// Some rows of a matrix, and the sum of some, from the weights as they were before packing.
#[test]
fn products_of_some_rows_are_the_plain_sums() {
    let mut lcg = Lcg(6);
    for (rows, cols) in SHAPES {
        let weights = weights(Format::T2R, rows * cols, &mut lcg);
        let blocks = pack(Format::T2R, (rows, cols), &weights);
        let w = Matrix::new(Format::T2R, rows, cols, &blocks).expect("the blocks of the shape");
        let list: Vec<u32> = (0..rows as u32).filter(|_| lcg.next() >> 8 & 1 == 1).collect();
        let x = activations(cols, &mut lcg);
        let all = plain(cols, &weights, &x);
        let mut values = x;
        values.resize(Format::T2R.padded_cols(cols), 0);
        let mut got = vec![i32::MIN; list.len()];
        Portable.dot_rows(w, &list, Portable.prepare(Format::T2R, cols, &values, &mut []), &mut got);
        assert!(list.iter().zip(&got).all(|(&r, &y)| i64::from(y) == all[r as usize]), "{rows}x{cols}");

        let each = activations(list.len(), &mut lcg);
        let mut got = vec![3; cols];
        Portable.sum_rows(w, &list, &each, &mut got);
        for (c, &y) in got.iter().enumerate() {
            let product = |(&r, &x): (&u32, &i8)| i64::from(weights[r as usize * cols + c]) * i64::from(x);
            assert_eq!(i64::from(y), 3 + list.iter().zip(&each).map(product).sum::<i64>(), "{rows}x{cols}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn products_of_any_shape(i in 0..5usize, rows in 1..140usize, cols in 1..400usize, seed in 1..u32::MAX) {
        let (format, mut lcg) = (Format::INTEGER[i], Lcg(seed));
        let weights = weights(format, rows * cols, &mut lcg);
        check(format, (rows, cols), &weights, &activations(cols, &mut lcg));
    }
}

/// Rows and columns past the end hold other weights in place of zeros, and nothing changes.
#[test]
fn padding_is_inert() {
    let mut lcg = Lcg(3);
    for format in Format::INTEGER {
        for (rows, cols) in SHAPES {
            let weights = weights(format, rows * cols, &mut lcg);
            let x = activations(cols, &mut lcg);
            let (low, high) = format.range();
            for (odd, even) in [(low, low), (high, high), (low, high)] {
                let mut blocks = pack(format, (rows, cols), &weights);
                let clean = blocks.clone();
                let steps = format.steps(cols);
                for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
                    let (row, col) = (i / steps * format.tile_rows(), i % steps * format.step_cols());
                    format::encode_step(format, step, |r, c| match (row + r, col + c) {
                        (r, c) if r < rows && c < cols => weights[r * cols + c],
                        (r, c) => [even, odd][(r + c) % 2],
                    });
                }
                let padded = rows % format.tile_rows() != 0 || cols % format.step_cols() != 0;
                // A set bit is the highest weight of B1, and no bit at all the lowest.
                assert!(!padded || blocks != clean || (format == Format::B1 && even == low && odd == low));
                let got = portable(format, (rows, cols), &blocks, &x);
                assert_eq!(got, plain(cols, &weights, &x), "{} {rows}x{cols}", format.name());
            }
        }
    }
}

/// `matmat` as the contract writes it, which cuts by tiles, against one token at a time.
#[test]
fn a_batch_is_its_tokens() {
    let mut lcg = Lcg(4);
    for format in Format::INTEGER {
        let (rows, cols) = (131, 77);
        let weights = weights(format, rows * cols, &mut lcg);
        let blocks = pack(format, (rows, cols), &weights);
        let tokens: Vec<Vec<i8>> = (0..3).map(|_| activations(cols, &mut lcg)).collect();
        let mut padded = tokens.clone();
        padded.iter_mut().for_each(|values| values.resize(format.padded_cols(cols), 0));
        let mut tables = vec![vec![Block::ZERO; format.table_blocks(cols)]; 3];
        let x: Vec<_> =
            padded.iter().zip(&mut tables).map(|(v, tables)| Portable.prepare(format, cols, v, tables)).collect();
        let mut y = vec![i32::MIN; 3 * rows];
        let w = Matrix::new(format, rows, cols, &blocks).expect("the blocks of the shape");
        Portable.matmat(w, Batch::new(&x), &mut y);
        let want: Vec<i64> = tokens.iter().flat_map(|x| plain(cols, &weights, x)).collect();
        assert_eq!(y.into_iter().map(i64::from).collect::<Vec<_>>(), want, "{}", format.name());
    }
}

#[test]
fn nothing_times_something_is_zero() {
    for format in Format::INTEGER {
        assert_eq!(portable(format, (5, 0), &[], &[]), [0; 5]);
        assert_eq!(portable(format, (0, 7), &[], &[1; 7]), [0; 0]);
    }
}

#[test]
fn a_matrix_refuses_sizes_that_disagree() {
    for format in Format::ALL {
        let n = format.matrix_blocks(70, 300);
        let blocks = vec![Block::ZERO; n + 1];
        assert!(Matrix::new(format, 70, 300, &blocks[..n]).is_some());
        assert!(Matrix::new(format, 70, 300, &blocks[..n - 1]).is_none());
        assert!(Matrix::new(format, 70, 300, &blocks).is_none());
        assert!(Matrix::new(format, 70 + format.tile_rows(), 300, &blocks[..n]).is_none());
        assert!(Matrix::new(format, 70, 300 + format.step_cols(), &blocks[..n]).is_none());
        // Products of these wrap around, to zero or to anything.
        for rows in [usize::MAX, usize::MAX / 2, 1 << (usize::BITS - 1), 1 << (usize::BITS - 2)] {
            assert!(Matrix::new(format, rows, 300, &[]).is_none());
            assert!(Matrix::new(format, rows, 300, &blocks).is_none());
        }
        let widest = vec![Block::ZERO; format.tile_blocks(Format::COLS_MAX + 1)];
        let n = format.tile_blocks(Format::COLS_MAX);
        assert!(Matrix::new(format, 1, Format::COLS_MAX, &widest[..n]).is_some());
        assert!(Matrix::new(format, 1, Format::COLS_MAX + 1, &widest).is_none());
        assert!(Matrix::new(format, 1, usize::MAX, &[]).is_none());
    }
}

#[test]
fn slices_are_the_rows() {
    let mut lcg = Lcg(5);
    for format in Format::INTEGER {
        let (rows, cols, tile) = (200, 45, format.tile_rows());
        let weights = weights(format, rows * cols, &mut lcg);
        let blocks = pack(format, (rows, cols), &weights);
        let w = Matrix::new(format, rows, cols, &blocks).expect("the blocks of the shape");
        for range in [0..rows, 0..tile, tile..2 * tile, tile..rows, rows / tile * tile..rows, tile..tile] {
            let slice = w.slice(range.clone());
            assert_eq!((slice.rows(), slice.cols(), slice.format()), (range.len(), cols, format));
            assert_eq!(slice.blocks().len(), format.matrix_blocks(range.len(), cols));
            for (r, row) in range.enumerate() {
                for c in 0..cols {
                    assert_eq!(slice.weight(r, c), weights[row * cols + c]);
                }
            }
        }
    }
}

/// Whether `f` panics. The message that goes with it is shown, as for any panic in a test.
fn panics(f: impl FnOnce()) -> bool {
    std::panic::catch_unwind(core::panic::AssertUnwindSafe(f)).is_err()
}

#[test]
fn slices_inside_a_tile_and_weights_outside_the_matrix_are_refused() {
    for format in Format::INTEGER {
        let (rows, cols, tile) = (150, 30, format.tile_rows());
        let blocks = vec![Block::ZERO; format.matrix_blocks(rows, cols)];
        let w = Matrix::new(format, rows, cols, &blocks).expect("the blocks of the shape");
        for range in [1..tile, 0..tile - 1, tile..2 * tile + 1, 0..rows + 1, tile..rows.next_multiple_of(tile)] {
            assert!(panics(|| _ = w.slice(range.clone())), "{} {range:?}", format.name());
        }
        assert!(panics(|| _ = w.weight(rows, 0)));
        assert!(panics(|| _ = w.weight(0, cols)));
    }
}

#[test]
fn activations_refuse_wrong_sizes_and_padding() {
    for format in Format::INTEGER {
        let cols = 300;
        let padded = format.padded_cols(cols);
        let tables = vec![Block::ZERO; format.table_blocks(cols) + 1];
        let (own, other) = (&tables[1..], &tables[..]);
        let mut values = vec![0; padded + 1];
        values[cols - 1] = -128;
        let x = Activations::new(format, cols, &values, false, own);
        assert_eq!((x.values().len(), x.sum(), x.cols(), x.format()), (padded, -128, cols, format));

        assert!(panics(|| _ = Activations::new(format, cols, &values, false, other)), "tables of another size");
        assert!(panics(|| _ = Activations::new(format, cols, &values[..padded - 1], false, own)), "too few values");
        for at in [cols, padded - 1] {
            values[at] = 1;
            assert!(panics(|| _ = Activations::new(format, cols, &values, false, own)), "padding that is not zero");
            values[at] = 0;
        }
        values[padded] = 1;
        assert_eq!(
            Activations::new(format, cols, &values, false, own).sum(),
            -128,
            "what lies behind is not looked at"
        );
    }
}

#[test]
fn products_refuse_what_does_not_fit() {
    let values = [0; 256];
    let blocks = [Block::ZERO; 4];
    let w = Matrix::new(Format::T2, 4, 100, &blocks).expect("one step");
    let fits = Activations::new(Format::T2, 100, &values, false, &[]);
    let wider = Activations::new(Format::T2, 101, &values, false, &[]);
    let other = Activations::new(Format::I4, 100, &values, false, &[]);
    assert!(!panics(|| Portable.matvec(w, fits, &mut [0; 4])));
    assert!(panics(|| Portable.matvec(w, fits, &mut [0; 3])));
    assert!(panics(|| Portable.matvec(w, wider, &mut [0; 4])));
    assert!(panics(|| Portable.matvec(w, other, &mut [0; 4])));
    assert!(panics(|| Portable.matmat(w, Batch::new(&[fits]), &mut [0; 8])));
    assert!(panics(|| _ = Batch::new(&[])));
    assert!(panics(|| _ = Batch::new(&[fits, wider])));
    assert!(panics(|| _ = Batch::new(&[fits, other])));
}
