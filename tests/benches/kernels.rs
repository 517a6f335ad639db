//! How fast every backend of this machine multiplies, one thread: `cargo bench -p bitnet-tests --bench kernels [-- WORDS]`.
//!
//! Words choose: formats (`t2`), shapes (`2560x6912`), backends (`avx2`; `portable` runs only if named). A figure is weights a
//! nanosecond; *hot* is the best of many runs over one matrix, which then lies in a cache, *by 64* the same in pieces of 64
//! rows, as the runtime shares work out, *cold* the 10th percentile over copies that fill 400 MB, in such pieces too. Beside
//! them a loop that only reads the same bytes, in the same run, and how much of its speed the kernel reached: other work on
//! the machine slows both, so ratios travel and single figures do not. `8 tokens` is `matmat`, in products a nanosecond.
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix, format, portable};
use std::hint::black_box;
use std::time::Instant;

const SHAPES: [(usize, usize); 2] = [(2560, 2560), (2560, 6912)];
/// Rows of a piece of work.
const PIECE: usize = 64;
const TOKENS: usize = 8;
const COLD_BYTES: usize = 400_000_000;
const HOT_RUNS: usize = 40;
const COLD_PASSES: usize = 2;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let chosen = |kind: &[String], word: &str| {
        let mut of_kind = words.iter().filter(|w| kind.contains(w)).peekable();
        of_kind.peek().is_none() || of_kind.any(|w| w == word)
    };
    let backends: Vec<&dyn Kernels> = [bitnet_kernels_x86::avx2(), bitnet_kernels_neon::dotprod(), portable::detect()]
        .into_iter()
        .flatten()
        .filter(|k| k.name() != "portable" || words.iter().any(|w| w == "portable"))
        .collect();
    let names: Vec<String> = backends.iter().map(|k| k.name().into()).collect();
    let formats = Format::INTEGER.map(|f| f.name().to_string());
    let shapes = SHAPES.map(|(rows, cols)| format!("{rows}x{cols}"));
    if let Some(word) = words.iter().find(|w| ![&names[..], &formats, &shapes].iter().any(|kind| kind.contains(w))) {
        eprintln!("{word}: choose among {formats:?}, {shapes:?}, {names:?} and \"portable\"");
        std::process::exit(2);
    }

    println!("weights a nanosecond, one thread; GB/s of stored bytes in brackets; read: a loop that only reads them");
    println!(
        "{:12} {:6} {:9} {:>14} {:>14} {:>14} {:>14} {:>14} {:>6} {:>9} {:>10}",
        "backend",
        "format",
        "shape",
        "hot",
        "hot by 64",
        "read hot",
        "cold",
        "read cold",
        "share",
        "8 tokens",
        "prepare us"
    );
    let mut memory = vec![Block::ZERO; COLD_BYTES / Block::BYTES + Format::I8.matrix_blocks(2560, 6912)];
    for ((rows, cols), shape) in SHAPES.into_iter().zip(&shapes) {
        for format in Format::INTEGER {
            if !chosen(&shapes, shape) || !chosen(&formats, format.name()) {
                continue;
            }
            let copies = fill(format, rows, cols, &mut memory);
            for k in backends.iter().filter(|k| chosen(&names, k.name())) {
                report(*k, format, (rows, cols), copies);
            }
        }
    }
}

/// Fills the memory with copies of one random matrix, and returns them.
fn fill(format: Format, rows: usize, cols: usize, memory: &mut [Block]) -> &[Block] {
    let n = format.matrix_blocks(rows, cols);
    let (low, high) = format.range();
    let levels = high as u32 + 1 + u32::from(low.unsigned_abs());
    format::encode(format, rows, cols, &mut memory[..n], |r, c| {
        let seed = ((r * cols + c) as u32).wrapping_mul(0x9e37_79b9);
        match format {
            Format::B1 => (seed >> 31) as i8 * 2 - 1,
            _ => (i32::from(low) + ((seed >> 8) % levels) as i32) as i8,
        }
    });
    let copies = (COLD_BYTES / Block::BYTES).div_ceil(n);
    (1..copies).for_each(|i| memory.copy_within(..n, i * n));
    &memory[..copies * n]
}

/// Seconds that `f` takes.
fn seconds(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}

/// The least time of many runs.
fn best(mut f: impl FnMut()) -> f64 {
    (0..HOT_RUNS).map(|_| seconds(&mut f)).fold(f64::INFINITY, f64::min)
}

/// The 10th percentile of the time that `f` takes for each of the copies.
fn cold<'a>(copies: &'a [Block], blocks: usize, mut f: impl FnMut(&'a [Block])) -> f64 {
    let mut times = vec![];
    for _ in 0..COLD_PASSES {
        times.extend(copies.chunks_exact(blocks).map(|copy| seconds(|| f(copy))));
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 10]
}

/// Adds up the bytes, eight at a time.
fn read(blocks: &[Block]) {
    let mut sums = [0u64; 8];
    for block in blocks {
        for (sum, bytes) in sums.iter_mut().zip(block.0.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*bytes));
        }
    }
    black_box(sums);
}

/// Measures one backend with one format and shape, and prints the line.
fn report(k: &dyn Kernels, format: Format, (rows, cols): (usize, usize), copies: &[Block]) {
    let n = format.matrix_blocks(rows, cols);
    let view = |blocks| Matrix::new(format, rows, cols, blocks).expect("whole copies");
    let w = view(&copies[..n]);
    // On a cache line, as a runtime places them: off by 16 bytes, every second load straddles two.
    let padded = format.padded_cols(cols);
    let mut values = vec![0; padded + Block::BYTES];
    let start = values.as_ptr().align_offset(Block::BYTES);
    let values = &mut values[start..][..padded];
    values[..cols].iter_mut().enumerate().for_each(|(i, v)| *v = (i * 89 % 255) as u8 as i8);
    let values = &*values;
    let mut tables = vec![Block::ZERO; format.table_blocks(cols)];
    let prepare = best(|| {
        black_box(k.prepare(format, cols, black_box(values), &mut tables));
    });
    let x = k.prepare(format, cols, values, &mut tables);
    let mut y = vec![0; rows * TOKENS];

    let mut by_pieces = |w: Matrix<'_>| {
        for (first, y) in (0..rows).step_by(PIECE).zip(y.chunks_mut(PIECE)) {
            k.matvec(w.slice(first..first + PIECE), x, y);
        }
        black_box(&y);
    };
    let hot_pieces = best(|| by_pieces(w));
    let cold_pieces = cold(copies, n, |blocks| by_pieces(view(blocks)));
    let cold_read = cold(copies, n, read);
    let hot_read = best(|| read(black_box(&copies[..n])));
    let hot = best(|| k.matvec(w, x, black_box(&mut y[..rows])));
    let tokens: [Activations<'_>; TOKENS] = [x; TOKENS];
    let batch = best(|| k.matmat(w, Batch::new(&tokens), black_box(&mut y)));

    let (weights, bytes) = ((rows * cols) as f64, (n * Block::BYTES) as f64);
    let rate = |s: f64| format!("{:6.1} ({:5.1})", weights / s / 1e9, bytes / s / 1e9);
    println!(
        "{:12} {:6} {:9} {:>14} {:>14} {:>14} {:>14} {:>14} {:>5.0}% {:>9.1} {:>10.2}",
        k.name(),
        format.name(),
        format!("{rows}x{cols}"),
        rate(hot),
        rate(hot_pieces),
        rate(hot_read),
        rate(cold_pieces),
        rate(cold_read),
        100.0 * cold_read / cold_pieces,
        TOKENS as f64 * weights / batch / 1e9,
        1e6 * prepare
    );
}
