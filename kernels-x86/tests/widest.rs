//! What the conformance suite has no memory for: the widest rows there may be, at the largest sums; and tables, entry by entry.
use bitnet_kernel::tables::{self, B1_BASE, TL_BASE};
use bitnet_kernel::{
    Activations, Batch, Block, BlockActivations, BlockMatrix, BlockShape, Format, Kernels, Matrix, blocks, format,
};

fn backends() -> impl Iterator<Item = &'static dyn Kernels> {
    use bitnet_kernels_x86::{avx2, avx512_bw, avx512_vnni};
    [avx2(), avx512_bw(), avx512_vnni()].into_iter().flatten()
}

/// Against the sum itself, `cols · w · x`: all weights and all activations of a token are alike.
#[test]
fn the_widest_rows_are_exact() {
    backends().for_each(widest_rows);
}

/// Alone and together, as int8, and as int4, which have tables of their own.
fn widest_rows(k: &dyn Kernels) {
    let name = k.name();
    let (rows, cols) = (5, Format::COLS_MAX);
    for f in Format::INTEGER {
        let (low, high) = f.range();
        let sets = &[[-128, 127, 0, -1], [-8, 7, 0, -1]][..if f.table_cols() > 0 { 2 } else { 1 }];
        for (weight, tokens) in [low, high].into_iter().flat_map(|w| sets.iter().map(move |set| (w, set))) {
            let mut blocks = vec![Block::ZERO; f.matrix_blocks(rows, cols)];
            format::encode(f, rows, cols, &mut blocks, |_, _| weight);
            let w = Matrix::new(f, rows, cols, &blocks).unwrap();
            let values = tokens.map(|x: i8| [vec![x; cols], vec![0; f.padded_cols(cols) - cols]].concat());
            let mut tables = vec![Block::ZERO; 4 * f.table_blocks(cols)];
            let mut parts = tables.chunks_mut(f.table_blocks(cols).max(1));
            let x: [Activations<'_>; 4] =
                core::array::from_fn(|t| k.prepare(f, cols, &values[t], parts.next().unwrap_or_default()));
            let mut y = vec![0; 4 * rows];
            k.matmat(w, Batch::new(&x), &mut y);
            for (t, y) in y.chunks(rows).enumerate() {
                let want = cols as i32 * i32::from(weight) * i32::from(tokens[t]);
                assert_eq!(y, [want; 5], "{name} matmat {} of {weight} with {}", f.name(), tokens[t]);
                let mut y = [0; 5];
                k.matvec(w, x[t], &mut y);
                assert_eq!(y, [want; 5], "{name} matvec {} of {weight} with {}", f.name(), tokens[t]);
            }
        }
    }
}

/// The parts are within `-16..=15`, which the sums rely on, and add up to what the shared tables hold.
#[test]
fn tables_hold_the_shared_sums() {
    backends().for_each(tables_of);
}

fn tables_of(k: &dyn Kernels) {
    // Those that negate both parts of a sum of TL have no constant in it.
    let balanced = k.name().starts_with("avx512");
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
            let sums = |blocks: &[Block], constant: i16| -> Vec<i16> {
                let tables = blocks.iter().flat_map(|b| b.0.chunks(32));
                let sum = |(&lo, &hi): (&u8, &u8)| base * i16::from(hi as i8) + i16::from(lo as i8) + constant;
                tables.flat_map(|t| t[..16].iter().zip(&t[16..]).map(sum)).collect()
            };
            let (low, constant) = if balanced && f == Format::TL { (-15, 0) } else { (-16, 16) };
            assert_eq!(sums(&own, constant), sums(&shared, 16), "{} {} {group:?}", k.name(), f.name());
            assert!(own.iter().flat_map(|b| b.0).all(|part| (low..=15).contains(&(part as i8))));
        }
    }
}

/// Blocks of the widest rows, whose bitmaps are longer than what a kernel lists at a time, against the definition: all, some,
/// or none live, and at the largest sums.
#[test]
fn blocks_of_the_widest_rows_are_exact() {
    let (rows, cols) = (37, Format::COLS_MAX);
    let number = |i: usize| (i as u32).wrapping_mul(0x9e37_79b9) >> 13;
    let weight = |r: usize, c: usize| (number(r * cols + c) % 3) as i8 - 1;
    let values: Vec<i8> = (0..cols).map(|c| number(c) as i8).collect();
    let (least, most, lowest) = (|_, _| -1, |_, _| 1, vec![-128; cols]);
    type Weight<'a> = &'a dyn Fn(usize, usize) -> i8;
    for shape in BlockShape::ALL {
        let across = shape.across(cols);
        let mut unit = vec![Block::ZERO; shape.unit_blocks(rows, cols, rows.div_ceil(16) * across)];
        for (one_of, weight, values) in [
            (1, &weight as Weight<'_>, &values),
            (3, &weight, &values),
            (97, &weight, &values),
            (usize::MAX, &weight, &values),
            (1, &least, &lowest),
            (1, &most, &lowest),
        ] {
            let live = |s: usize, b: usize| (s * across + b).is_multiple_of(one_of);
            let n = blocks::encode_unit(shape, rows, cols, live, weight, &mut unit);
            let w = BlockMatrix::new(shape, rows, cols, &unit[..n]).unwrap();
            let mut sums = vec![0; across];
            let x = BlockActivations::new(shape, cols, values, &mut sums);
            let mut want = vec![0; rows];
            blocks::matvec_blocks(w, x, &mut want);
            for k in backends() {
                let mut y = vec![1; rows];
                k.matvec_blocks(w, x, &mut y);
                assert_eq!(y, want, "{} {} one of {one_of}", k.name(), shape.name());
            }
        }
    }
}
