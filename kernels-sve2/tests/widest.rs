//! What the conformance suite has no memory for: the widest rows there may be, at the largest sums; more tokens than share a
//! panel of weights, and more rows; and tables, entry by entry.
use bitnet_kernel::portable::Portable;
use bitnet_kernel::tables::{self, B1_BASE, TL_BASE};
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix, format};

/// The backends of this crate that this CPU runs.
fn backends() -> impl Iterator<Item = &'static dyn Kernels> {
    let found: Vec<_> = [bitnet_kernels_sve2::sve(), bitnet_kernels_sve2::sve2()].into_iter().flatten().collect();
    if found.is_empty() {
        println!("not on this CPU");
    }
    found.into_iter()
}

/// Activations for matrices of format `f`, one vector a token.
fn prepare<'a>(
    k: &dyn Kernels,
    f: Format,
    cols: usize,
    values: &'a [Vec<i8>],
    tables: &'a mut [Block],
) -> Vec<Activations<'a>> {
    let mut parts = tables.chunks_mut(f.table_blocks(cols).max(1));
    values.iter().map(|values| k.prepare(f, cols, values, parts.next().unwrap_or_default())).collect()
}

/// Against the sum itself, `cols · w · x`: all weights and all activations of a token are alike.
#[test]
fn the_widest_rows_are_exact() {
    let (rows, cols) = (5, Format::COLS_MAX);
    for (k, f) in backends().flat_map(|k| Format::INTEGER.map(|f| (k, f))) {
        let (low, high) = f.range();
        // Those of four bits have tables of their own.
        let sets = &[[-128, 127, 0, -1], [-8, 7, 0, -1]][..if f.table_cols() > 0 { 2 } else { 1 }];
        for (weight, tokens) in [low, high].into_iter().flat_map(|w| sets.iter().map(move |set| (w, set))) {
            let mut blocks = vec![Block::ZERO; f.matrix_blocks(rows, cols)];
            format::encode(f, rows, cols, &mut blocks, |_, _| weight);
            let w = Matrix::new(f, rows, cols, &blocks).unwrap();
            let values = tokens.map(|x: i8| [vec![x; cols], vec![0; f.padded_cols(cols) - cols]].concat());
            let mut tables = vec![Block::ZERO; 4 * f.table_blocks(cols)];
            let x = prepare(k, f, cols, &values, &mut tables);
            let mut y = vec![0; 4 * rows];
            k.matmat(w, Batch::new(&x), &mut y);
            for (t, y) in y.chunks(rows).enumerate() {
                let want = cols as i32 * i32::from(weight) * i32::from(tokens[t]);
                assert_eq!(y, [want; 5], "{} matmat {} of {weight} with {}", k.name(), f.name(), tokens[t]);
                let mut y = [0; 5];
                k.matvec(w, x[t], &mut y);
                assert_eq!(y, [want; 5], "{} matvec {} of {weight} with {}", k.name(), f.name(), tokens[t]);
            }
        }
    }
}

/// Three panels of rows, several of columns, and tokens for two panels of activations and a part of a third; NEON's loops, which
/// these backends use, by themselves as well.
#[test]
fn every_panel_of_a_batch_is_right() {
    let (rows, cols, tokens) = (150, 700, 35);
    let mut seed = 1_u32;
    let mut random = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as i8
    };
    for f in Format::INTEGER {
        let (low, high) = f.range();
        let weights: Vec<i8> = (0..rows * cols).map(|_| random().clamp(low, high)).collect();
        let mut blocks = vec![Block::ZERO; f.matrix_blocks(rows, cols)];
        format::encode(f, rows, cols, &mut blocks, |r, c| weights[r * cols + c]);
        let w = Matrix::new(f, rows, cols, &blocks).unwrap();
        let mut values = vec![vec![0; f.padded_cols(cols)]; tokens];
        values.iter_mut().for_each(|values| values[..cols].fill_with(&mut random));
        let mut tables = vec![Block::ZERO; tokens * f.table_blocks(cols)];
        let mut want = vec![0; rows * tokens];
        Portable.matmat(w, Batch::new(&prepare(&Portable, f, cols, &values, &mut tables)), &mut want);
        let neon = [bitnet_kernels_neon::dotprod(), bitnet_kernels_neon::i8mm()];
        for k in backends().chain(neon.into_iter().flatten()) {
            let x = prepare(k, f, cols, &values, &mut tables);
            let mut got = vec![-1; rows * tokens];
            k.matmat(w, Batch::new(&x), &mut got);
            assert_eq!(got, want, "{} {}", k.name(), f.name());
        }
    }
}

/// The parts are in their ranges, which the sums of bytes rely on, and add up to what the shared tables hold.
#[test]
fn tables_hold_the_shared_sums() {
    // Every first activation with the ends and a middle of the others: all partial sums there are.
    let ends = [-128, -127, -1, 0, 1, 64, 127];
    for (k, f) in backends().flat_map(|k| [Format::TL, Format::B1].map(|f| (k, f))) {
        // The biases of both parts, which alternate in TL, and the ranges of the parts.
        let (base, biases, [lo_range, hi_range]) = match f {
            Format::TL => (TL_BASE, [[64, 64], [32, 32]], [-15..=15, -13..=13]),
            _ => (B1_BASE, [[0, 16], [0, 16]], [0..=31, -16..=15]),
        };
        for rest in 0..7usize.pow(3) {
            let group = [0, ends[rest % 7], ends[rest / 7 % 7], ends[rest / 49]];
            let mut values: Vec<i8> = (-128..=127).flat_map(|x| [&[x], &group[1..f.table_cols()]].concat()).collect();
            let cols = values.len();
            values.resize(f.padded_cols(cols), 0);
            let blocks = vec![Block::ZERO; f.table_blocks(cols)];
            let (mut own, mut shared) = (blocks.clone(), blocks);
            k.prepare(f, cols, &values, &mut own);
            tables::fill(f, &values, &mut shared);
            let own = own.iter().flat_map(|block| block.0.chunks(32)).enumerate();
            for ((i, own), shared) in own.zip(shared.iter().flat_map(|block| block.0.chunks(32))) {
                for n in 0..16 {
                    let [lo, hi] = [0, 1].map(|part| i16::from(own[16 * part + n]) - biases[i % 2][part]);
                    let want = base * i16::from(shared[16 + n] as i8) + i16::from(shared[n] as i8) + 16;
                    assert_eq!(base * hi + lo, want, "{} {group:?}", f.name());
                    assert!(lo_range.contains(&lo) && hi_range.contains(&hi), "{} {group:?}: {lo} {hi}", f.name());
                }
            }
        }
    }
}
