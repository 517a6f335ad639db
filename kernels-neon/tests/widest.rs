//! What the conformance suite has no memory for: the widest rows there may be, at the largest sums; and tables, entry by entry.
use bitnet_kernel::tables::{self, B1_BASE, TL_BASE};
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix, format};

/// Every backend that this CPU runs.
fn backends() -> impl Iterator<Item = &'static dyn Kernels> {
    [bitnet_kernels_neon::neon(), bitnet_kernels_neon::dotprod(), bitnet_kernels_neon::i8mm()].into_iter().flatten()
}

/// Against the sum itself, `cols · w · x`: all weights and all activations of a token are alike. There are as many tokens as
/// two loops of a batch take, one of 8 and one of 4; those of four bits have tables of their own.
#[test]
fn the_widest_rows_are_exact() {
    const TOKENS: [i8; 12] = [-128, -8, 127, 0, -1, 1, 7, -128, 127, 64, 0, -1];
    let (rows, cols) = (5, Format::COLS_MAX);
    for (k, f) in backends().flat_map(|k| Format::INTEGER.map(|f| (k, f))) {
        let (low, high) = f.range();
        for weight in [low, high] {
            let mut blocks = vec![Block::ZERO; f.matrix_blocks(rows, cols)];
            format::encode(f, rows, cols, &mut blocks, |_, _| weight);
            let w = Matrix::new(f, rows, cols, &blocks).unwrap();
            let values = TOKENS.map(|x| [vec![x; cols], vec![0; f.padded_cols(cols) - cols]].concat());
            let mut tables = vec![Block::ZERO; TOKENS.len() * f.table_blocks(cols)];
            let mut parts = tables.chunks_mut(f.table_blocks(cols).max(1));
            let x: [Activations<'_>; TOKENS.len()] =
                core::array::from_fn(|t| k.prepare(f, cols, &values[t], parts.next().unwrap_or_default()));
            let mut y = vec![0; TOKENS.len() * rows];
            k.matmat(w, Batch::new(&x), &mut y);
            for (t, y) in y.chunks(rows).enumerate() {
                let want = cols as i32 * i32::from(weight) * i32::from(TOKENS[t]);
                assert_eq!(y, [want; 5], "{} matmat {} of {weight} with {}", k.name(), f.name(), TOKENS[t]);
            }
            for t in 0..2 {
                let mut y = [0; 5];
                k.matvec(w, x[t], &mut y);
                let want = cols as i32 * i32::from(weight) * i32::from(TOKENS[t]);
                assert_eq!(y, [want; 5], "{} matvec {} of {weight} with {}", k.name(), f.name(), TOKENS[t]);
            }
        }
    }
}

/// The same for the longest list of rows stored apart, and its columns.
#[test]
fn the_longest_lists_of_rows_are_exact() {
    let (rows, cols) = (Format::COLS_MAX, 5);
    let list: Vec<u32> = (0..rows as u32).collect();
    for (k, weight) in backends().flat_map(|k| [(k, -1), (k, 1)]) {
        let mut blocks = vec![Block::ZERO; Format::T2R.matrix_blocks(rows, cols)];
        format::encode(Format::T2R, rows, cols, &mut blocks, |_, _| weight);
        let w = Matrix::new(Format::T2R, rows, cols, &blocks).unwrap();
        for x in [-128, 127] {
            let mut y = [0; 5];
            k.sum_rows(w, &list, &vec![x; rows], &mut y);
            assert_eq!(
                y,
                [rows as i32 * i32::from(weight) * i32::from(x); 5],
                "{} sum of {weight} times {x}",
                k.name()
            );
        }
    }
}

/// The parts are within `-16..=15`, which the sums rely on, and add up to what the shared tables hold.
#[test]
fn tables_hold_the_shared_sums() {
    // All backends share these tables.
    let Some(k) = bitnet_kernels_neon::neon() else { return println!("not on this CPU") };
    // Every first activation with the ends and a middle of the others: all partial sums there are.
    let ends = [-128, -127, -1, 0, 1, 64, 127];
    for (f, base) in [(Format::TL, TL_BASE), (Format::B1, B1_BASE)] {
        for rest in 0..7usize.pow(3) {
            let group = [0, ends[rest % 7], ends[rest / 7 % 7], ends[rest / 49]];
            let mut values: Vec<i8> = (-128..=127).flat_map(|x| [&[x], &group[1..f.table_cols()]].concat()).collect();
            let cols = values.len();
            values.resize(f.padded_cols(cols), 0);
            let (mut own, mut shared) =
                (vec![Block::ZERO; f.table_blocks(cols)], vec![Block::ZERO; f.table_blocks(cols)]);
            k.prepare(f, cols, &values, &mut own);
            tables::fill(f, &values, &mut shared);
            let sums = |blocks: &[Block]| -> Vec<i16> {
                let tables = blocks.iter().flat_map(|b| b.0.chunks(32));
                let sum = |(&lo, &hi): (&u8, &u8)| base * i16::from(hi as i8) + i16::from(lo as i8) + 16;
                tables.flat_map(|t| t[..16].iter().zip(&t[16..]).map(sum)).collect()
            };
            assert_eq!(sums(&own), sums(&shared), "{} {group:?}", f.name());
            assert!(own.iter().flat_map(|b| b.0).all(|part| (-16..=15).contains(&(part as i8))));
        }
    }
}
