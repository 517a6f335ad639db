//! Unstructured zeros as lists of columns, beside the whole ternary linear in the same run: why the packer has no such layout.
//!
//! A row is the columns of its weights of 1 and those of its weights of -1, as numbers of 16 bits, or as differences of a byte
//! (255 and on where a difference is larger). One thread, 2560 by 2560, cold: copies that fill 400 MB, the 10th percentile.
use bitnet_kernel::{Block, Format, Matrix, format};
use bitnet_runtime::backend;
use serde_json::json;
use std::hint::black_box;
use std::time::Instant;

const ROWS: usize = 2560;
const COLS: usize = 2560;
const COLD_BYTES: usize = 400_000_000;
/// Weights of a thousand that are not zero.
const LEFT: [u32; 7] = [500, 350, 200, 100, 50, 20, 10];

/// Measures both kinds of lists and `tl` at every density.
pub(crate) fn all() {
    let k = backend::best();
    let x: Vec<i8> = (0..4096).map(|i| if i < COLS { (i * 89 % 255) as u8 as i8 } else { 0 }).collect();
    let x: &[i8; 4096] = x.as_slice().try_into().expect("4096");
    for left in LEFT {
        let weight = |r: usize, c: usize| {
            let n = ((r * COLS + c) as u32).wrapping_mul(0x9e37_79b9) ^ 0x5bd1_e995;
            let n = (n ^ n >> 15).wrapping_mul(0x85eb_ca6b);
            if n >> 8 & 0xffff >= left * 0x1_0000 / 1000 { 0 } else { (n >> 30 & 1) as i8 * 2 - 1 }
        };
        let (mut numbers, mut differences, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for r in 0..ROWS {
            for sign in [1, -1] {
                let mut before = 0;
                for c in (0..COLS).filter(|&c| weight(r, c) == sign) {
                    numbers.push(c as u16);
                    differences.extend(core::iter::repeat_n(255_u8, (c - before) / 255));
                    differences.push(((c - before) % 255) as u8);
                    before = c;
                }
                ends.push((numbers.len(), differences.len()));
            }
        }
        let mut y = vec![0; ROWS];
        let by_number = cold(&numbers, |numbers| {
            let mut start = 0;
            for (y, ends) in y.iter_mut().zip(ends.chunks_exact(2)) {
                let (plus, minus) = (&numbers[start..ends[0].0], &numbers[ends[0].0..ends[1].0]);
                *y = sum(plus, x) - sum(minus, x);
                start = ends[1].0;
            }
            black_box(&y);
        });
        let by_difference = cold(&differences, |differences| {
            let sum = |list: &[u8]| {
                let (mut at, mut sum) = (0, 0);
                for &step in list {
                    at += usize::from(step);
                    sum += if step == 255 { 0 } else { i32::from(x[at % 4096]) };
                }
                sum
            };
            let mut start = 0;
            for (y, ends) in y.iter_mut().zip(ends.chunks_exact(2)) {
                *y = sum(&differences[start..ends[0].1]) - sum(&differences[ends[0].1..ends[1].1]);
                start = ends[1].1;
            }
            black_box(&y);
        });
        let format = Format::TL;
        let mut blocks = vec![Block::ZERO; format.matrix_blocks(ROWS, COLS)];
        format::encode(format, ROWS, COLS, &mut blocks, weight);
        let mut tables = vec![Block::ZERO; format.table_blocks(COLS)];
        let whole = cold(&blocks, |blocks| {
            let x = k.prepare(format, COLS, x, &mut tables);
            k.matvec(Matrix::new(format, ROWS, COLS, blocks).expect("a copy"), x, &mut y);
            black_box(&y);
        });
        let bits = |bytes: usize| 8.0 * bytes as f64 / (ROWS * COLS) as f64;
        let cases = [
            ("16-bit columns", by_number, bits(2 * numbers.len())),
            ("differences of a byte", by_difference, bits(differences.len())),
            ("whole", whole, bits(blocks.len() * Block::BYTES)),
        ];
        for (name, us, bits) in cases {
            println!(
                "{}",
                json!({
                    "backend": k.name(), "layout": name, "density": f64::from(left) / 1000.0, "us": us,
                    "bits_per_weight": bits, "nonzero_per_ns": numbers.len() as f64 / us / 1e3, "speed_up": whole / us,
                })
            );
        }
    }
}

/// The sum of the activations of columns, eight at a time.
fn sum(columns: &[u16], x: &[i8; 4096]) -> i32 {
    let at = |c: &u16| i32::from(x[usize::from(*c) % 4096]);
    let (eights, rest) = columns.as_chunks::<8>();
    let mut sums = [0; 8];
    for eight in eights {
        sums.iter_mut().zip(eight).for_each(|(sum, c)| *sum += at(c));
    }
    sums.iter().sum::<i32>() + rest.iter().map(at).sum::<i32>()
}

/// Microseconds for one of many copies.
fn cold<T: Copy>(one: &[T], mut run: impl FnMut(&[T])) -> f64 {
    let copies = COLD_BYTES.div_ceil(size_of_val(one));
    let all: Vec<T> = core::iter::repeat_n(one, copies).flatten().copied().collect();
    let mut times: Vec<f64> = all
        .chunks_exact(one.len())
        .map(|copy| {
            let start = Instant::now();
            run(copy);
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 10]
}
