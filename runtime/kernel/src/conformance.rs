//! One suite for every backend: does it return what [`portable`](crate::portable) and [`float`] return, bit for bit?
//!
//! `no_std`, without a heap, and in a fraction of a second, so it runs on the board and at the start of a program too. The
//! sizes are chosen for a reason: one row and column, the edges of tiles and steps, more rows than one tile of lanes, widths
//! past every flush of narrow sums (6,300 columns is past 255 steps of [`Format::TL`]). The inputs: random ones, and those
//! with the largest sums, where every activation is -128 or 127 and all weights are alike.
use crate::float::{self, Arrays, Cache};
use crate::portable::Portable;
use crate::{
    Activations, Batch, Block, BlockActivations, BlockMatrix, BlockShape, Format, Kernels, Matrix, blocks, format,
};
use core::fmt;

const ROWS_MAX: usize = 130;
const COLS_MAX: usize = 6_300;
const TOKENS_MAX: usize = 9;
/// Weights that fit; every shape of [`SHAPES`] does, which `Matrix::new` asserts.
const BLOCKS_MAX: usize = 3_300;
const VALUES_MAX: usize = COLS_MAX.next_multiple_of(256) + 256;
const TABLE_BLOCKS_MAX: usize = 1_200;
/// Results of all tokens, or of all columns.
const RESULTS_MAX: usize = COLS_MAX;
/// Written past the end of every result; a kernel that writes there is caught.
const CANARY: i32 = 0x5a5a_5a5a;

/// Rows and columns of the products.
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (3, 23),
    (4, 24),
    (5, 25),
    (7, 64),
    (64, 96),
    (63, 127),
    (65, 129),
    (130, 168),
    (66, 257),
    (9, 576),
    (70, 1_030),
    (6, 2_561),
    (5, COLS_MAX),
];

/// Memory for [`check`]: about a megabyte, to be placed in a static on a board or boxed elsewhere.
#[derive(Debug)]
pub struct Workspace {
    blocks: [Block; BLOCKS_MAX],
    values: [[i8; VALUES_MAX]; TOKENS_MAX],
    tables: [[Block; TABLE_BLOCKS_MAX]; TOKENS_MAX],
    want: [i32; RESULTS_MAX],
    got: [i32; RESULTS_MAX + 1],
    floats: [f32; COLS_MAX],
}

impl Workspace {
    /// All zeros.
    pub const ZERO: Self = Self {
        blocks: [Block::ZERO; BLOCKS_MAX],
        values: [[0; VALUES_MAX]; TOKENS_MAX],
        tables: [[Block::ZERO; TABLE_BLOCKS_MAX]; TOKENS_MAX],
        want: [0; RESULTS_MAX],
        got: [0; RESULTS_MAX + 1],
        floats: [0.0; COLS_MAX],
    };
}

/// The first result of a backend that differs from the reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// [`Kernels::name`].
    pub backend: &'static str,
    /// The method.
    pub operation: &'static str,
    /// The format, where the operation has one.
    pub format: Option<Format>,
    /// Rows, or elements of a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Tokens.
    pub tokens: usize,
    /// What the inputs are.
    pub input: Input,
    /// Position in the result.
    pub index: usize,
    /// What the reference gives (the bits of a float).
    pub want: i32,
    /// What the backend gave.
    pub got: i32,
}

/// What a product is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Random weights and activations; the second token of a batch is all zero.
    Random,
    /// Every weight the smallest, every activation -128.
    Lowest,
    /// Every weight the largest, every activation -128; the second token of a batch is all zero, where the low parts of all
    /// partial sums are at their smallest, 8 of them -128, and sums of them overflow first.
    Mixed,
    /// Every weight the largest, every activation 127.
    Highest,
    /// Random weights and activations of four bits, for formats with tables, whose partial sums then are others. So are those of
    /// the next two.
    Int4,
    /// Every weight the smallest, every activation -8.
    Int4Lowest,
    /// Every weight the largest, every activation -8; the second token of a batch is 127, which is no int4.
    Int4Mixed,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { backend, operation, format, rows, cols, tokens, input, index, want, got } = self;
        write!(f, "{backend} differs from portable: {operation}")?;
        if let Some(format) = format {
            write!(f, " {}", format.name())?;
        }
        write!(f, " {rows}x{cols}, {tokens} tokens, {input:?} input: result {index} is {got}, should be {want}")
    }
}

impl core::error::Error for Difference {}

/// Compares backends with the reference; the first difference is the error.
///
/// Several in one call are faster than one after another: the inputs and the reference's results, which take most of the time,
/// are made once for all.
///
/// # Errors
/// The first [`Difference`].
pub fn check(backends: &[&dyn Kernels], memory: &mut Workspace) -> Result<(), Difference> {
    check_up_to(backends, memory, usize::MAX)
}

/// [`check`] without the shapes of more than so many weights, for slow machines.
///
/// With 9,000 a sixth of the work is left, and still more rows than one tile of lanes, and widths of several steps of every
/// format.
///
/// # Errors
/// The first [`Difference`].
pub fn check_up_to(backends: &[&dyn Kernels], memory: &mut Workspace, weights: usize) -> Result<(), Difference> {
    const INPUTS: [Input; 4] = [Input::Random, Input::Lowest, Input::Mixed, Input::Highest];
    if backends.is_empty() {
        return Ok(());
    }
    let shapes = || SHAPES.into_iter().filter(|(rows, cols)| rows * cols <= weights);
    for (rows, cols) in shapes() {
        for input in INPUTS {
            for format in Format::INTEGER {
                check_products(backends, format, rows, cols, input, memory)?;
            }
            // Groups are summed one by one and rows as T2's: the largest shapes add nothing to the extremes.
            if input == Input::Random || rows * cols <= 20_000 {
                for format in Format::GROUPED {
                    check_grouped(backends, format, rows, cols, input, memory)?;
                }
                check_rows(backends, rows, cols, input, memory)?;
                check_blocks(backends, rows.min(blocks::UNIT_ROWS), cols, input, memory)?;
            }
        }
        for input in [Input::Int4, Input::Int4Lowest, Input::Int4Mixed] {
            for format in Format::INTEGER.into_iter().filter(|format| format.table_cols() > 0) {
                check_products(backends, format, rows, cols, input, memory)?;
            }
        }
        check_matvec_f16(backends, rows, cols, memory)?;
        for &k in backends {
            check_quantize(k, cols, memory)?;
            check_elementwise(k, cols.min(ELEMENTS_MAX), memory)?;
            check_recurrence(k, cols.min(RECURRENCE_MAX), memory)?;
        }
    }
    backends.iter().try_for_each(|&k| check_attend(k, memory))
}

/// `matvec`, and `matmat` with several numbers of tokens.
fn check_products(
    backends: &[&dyn Kernels],
    format: Format,
    rows: usize,
    cols: usize,
    input: Input,
    memory: &mut Workspace,
) -> Result<(), Difference> {
    fill(format, rows, cols, input, memory);
    let w = Matrix::new(format, rows, cols, &memory.blocks[..format.matrix_blocks(rows, cols)]);
    let w = w.expect("the blocks of the shape");
    let table_blocks = format.table_blocks(cols);

    // The reference: one token at a time, and once where all are alike.
    for (t, values) in memory.values.iter().enumerate() {
        let (before, want) = memory.want.split_at_mut(t * rows);
        let want = &mut want[..rows];
        if t > 0 && *values == memory.values[0] {
            want.copy_from_slice(&before[..rows]);
            continue;
        }
        let x = Portable.prepare(format, cols, values, &mut memory.tables[t][..table_blocks]);
        Portable.matvec(w, x, want);
    }
    for &k in backends {
        let mut prepared = memory.values.iter().zip(&mut memory.tables);
        let x: [Activations<'_>; TOKENS_MAX] = core::array::from_fn(|_| {
            let (values, tables) = prepared.next().expect("one a token");
            k.prepare(format, cols, values, &mut tables[..table_blocks])
        });
        for tokens in [0, 1, 2, 3, 8, 9] {
            let (operation, n) = if tokens == 0 { ("matvec", rows) } else { ("matmat", rows * tokens) };
            memory.got[..=n].fill(CANARY);
            match tokens {
                0 => k.matvec(w, x[0], &mut memory.got[..n]),
                _ => k.matmat(w, Batch::new(&x[..tokens]), &mut memory.got[..n]),
            }
            let place = Place { operation, format, rows, cols, tokens, input };
            place.compare(k, &memory.want[..n], &memory.got[..=n])?;
        }
    }
    Ok(())
}

/// `matvec_grouped` and `matmat_grouped`. The sums are compared as bits of floats.
fn check_grouped(
    backends: &[&dyn Kernels],
    format: Format,
    rows: usize,
    cols: usize,
    input: Input,
    memory: &mut Workspace,
) -> Result<(), Difference> {
    fill(format, rows, cols, input, memory);
    let w = Matrix::new(format, rows, cols, &memory.blocks[..format.matrix_blocks(rows, cols)]);
    let w = w.expect("the blocks of the shape");
    let table_blocks = format.table_blocks(cols);
    let sums = |sums: &mut [i32], floats: &[f32]| {
        sums.iter_mut().zip(floats).for_each(|(sum, float)| *sum = float.to_bits() as i32);
    };
    for (t, values) in memory.values.iter().enumerate() {
        let (before, want) = memory.want.split_at_mut(t * rows);
        let want = &mut want[..rows];
        if t > 0 && *values == memory.values[0] {
            want.copy_from_slice(&before[..rows]);
            continue;
        }
        let x = Portable.prepare_any(format, cols, values, &mut memory.tables[t][..table_blocks]);
        Portable.matvec_grouped(w, x, &mut memory.floats[..rows]);
        sums(want, &memory.floats[..rows]);
    }
    for &k in backends {
        let mut prepared = memory.values.iter().zip(&mut memory.tables);
        let x: [Activations<'_>; TOKENS_MAX] = core::array::from_fn(|_| {
            let (values, tables) = prepared.next().expect("one a token");
            k.prepare_any(format, cols, values, &mut tables[..table_blocks])
        });
        for tokens in [0, 1, 2, 9] {
            let (operation, n) = if tokens == 0 { ("matvec_grouped", rows) } else { ("matmat_grouped", rows * tokens) };
            memory.floats[..=n].fill(f32::from_bits(CANARY as u32));
            match tokens {
                0 => k.matvec_grouped(w, x[0], &mut memory.floats[..n]),
                _ => k.matmat_grouped(w, Batch::new(&x[..tokens]), &mut memory.floats[..n]),
            }
            sums(&mut memory.got[..=n], &memory.floats[..=n]);
            let place = Place { operation, format, rows, cols, tokens, input };
            place.compare(k, &memory.want[..n], &memory.got[..=n])?;
        }
    }
    Ok(())
}

/// `dot_rows` and `sum_rows` with no row, every row, and some of them.
fn check_rows(
    backends: &[&dyn Kernels],
    rows: usize,
    cols: usize,
    input: Input,
    memory: &mut Workspace,
) -> Result<(), Difference> {
    let format = Format::T2R;
    fill(format, rows, cols, input, memory);
    let w = Matrix::new(format, rows, cols, &memory.blocks[..format.matrix_blocks(rows, cols)]);
    let w = w.expect("the blocks of the shape");
    // No row, each, half of them, a seventh.
    for share in [u32::MAX, 1, 2, 7] {
        let mut list = [0; ROWS_MAX];
        let mut n = 0;
        for r in (0..rows).filter(|&r| weight_seed(r, 0, 9).max(1).is_multiple_of(share)) {
            list[n] = r as u32;
            n += 1;
        }
        let list = &list[..n];
        let [x, each, ..] = &memory.values;
        let place = |operation| Place { operation, format, rows, cols, tokens: n, input };

        Portable.dot_rows(w, list, Portable.prepare(format, cols, x, &mut []), &mut memory.want[..n]);
        for &k in backends {
            memory.got[..=n].fill(CANARY);
            k.dot_rows(w, list, k.prepare(format, cols, x, &mut []), &mut memory.got[..n]);
            place("dot_rows").compare(k, &memory.want[..n], &memory.got[..=n])?;
        }

        // It adds to what is there.
        let each = if input == Input::Random { &x[..n] } else { &each[..n] };
        let (want, got) = (&mut memory.want[..cols], &mut memory.got[..=cols]);
        want.fill(-5);
        Portable.sum_rows(w, list, each, want);
        for &k in backends {
            got.fill(-5);
            got[cols] = CANARY;
            k.sum_rows(w, list, each, &mut got[..cols]);
            place("sum_rows").compare(k, want, got)?;
        }
    }
    Ok(())
}

/// Fills `memory` with the weights and activations of one case.
fn fill(format: Format, rows: usize, cols: usize, input: Input, memory: &mut Workspace) {
    let mut rng = Rng(0x9e37_79b9 ^ (rows * 7_919 + cols) as u32);
    let (low, high) = format.range();
    let blocks = &mut memory.blocks[..format.matrix_blocks(rows, cols)];
    let padding = rng.next();
    let steps = format.steps(cols);
    for (i, step) in blocks.chunks_exact_mut(format.step_blocks()).enumerate() {
        let (row, col) = (i / steps * format.tile_rows(), i % steps * format.step_cols());
        format::encode_step(format, step, |r, c| {
            let inside = row + r < rows && col + c < cols;
            let seed = weight_seed(row + r, col + c, padding);
            match input {
                // Padding is inert: it holds weights like any other here, and must not matter.
                Input::Random | Input::Int4 => format.weight(seed),
                Input::Lowest | Input::Int4Lowest if inside => low,
                Input::Mixed | Input::Highest | Input::Int4Mixed if inside => high,
                _ => 0,
            }
        });
        if format.is_grouped() {
            for r in 0..Format::PANEL_ROWS {
                // Some of them subnormal, some negative.
                let bits = weight_seed(row + r, i, padding) as u16 & 0xbfff;
                format::set_scale(format, step, r, bits);
            }
        }
    }
    for (t, values) in memory.values.iter_mut().enumerate() {
        values[..cols].fill_with(|| match (input, t) {
            (Input::Random | Input::Mixed, 1) => 0,
            (Input::Random, _) => rng.next() as i8,
            (Input::Highest, _) | (Input::Int4Mixed, 1) => 127,
            (Input::Lowest | Input::Mixed, _) => -128,
            (Input::Int4, _) => rng.next() as i8 >> 4,
            (Input::Int4Lowest | Input::Int4Mixed, _) => -8,
        });
        values[cols..].fill(0);
    }
}

/// Where results are compared.
#[derive(Clone, Copy)]
struct Place {
    operation: &'static str,
    format: Format,
    rows: usize,
    cols: usize,
    tokens: usize,
    input: Input,
}

impl Place {
    /// Compares `want` with the start of `got`, whose last element must still be the canary.
    fn compare(self, k: &dyn Kernels, want: &[i32], got: &[i32]) -> Result<(), Difference> {
        let n = want.len();
        let difference = (0..n).find(|&i| got[i] != want[i]);
        let difference = difference.map(|i| (i, want[i])).or((got[n] != CANARY).then_some((n, CANARY)));
        let Some((index, want)) = difference else { return Ok(()) };
        let Self { operation, format, rows, cols, tokens, input } = self;
        let (backend, format, got) = (k.name(), Some(format), got[index]);
        Err(Difference { backend, operation, format, rows, cols, tokens, input, index, want, got })
    }
}

/// A number that depends on the place alone, so that steps can be encoded in any order.
fn weight_seed(row: usize, col: usize, salt: u32) -> u32 {
    let mut rng = Rng((row as u32).wrapping_mul(0x85eb_ca6b) ^ (col as u32).wrapping_mul(0xc2b2_ae35) ^ salt | 1);
    rng.next();
    rng.next() >> 8
}

/// `matvec_blocks` in both shapes: of random weights half of the blocks live, a seventh and none; of the extremes all.
fn check_blocks(
    backends: &[&dyn Kernels],
    rows: usize,
    cols: usize,
    input: Input,
    memory: &mut Workspace,
) -> Result<(), Difference> {
    for shape in BlockShape::ALL {
        let shares: &[u32] = if input == Input::Random { &[2, 7, u32::MAX] } else { &[1] };
        for &share in shares {
            let live = |s: usize, b: usize| weight_seed(s, b, 3).max(1).is_multiple_of(share);
            let weight = |r: usize, c: usize| match input {
                Input::Lowest | Input::Int4Lowest => -1,
                Input::Mixed | Input::Highest | Input::Int4Mixed => 1,
                Input::Random | Input::Int4 => (weight_seed(r, c, 5) % 3) as i8 - 1,
            };
            let n = blocks::encode_unit(shape, rows, cols, live, weight, &mut memory.blocks);
            let w = BlockMatrix::new(shape, rows, cols, &memory.blocks[..n]).expect("a unit just encoded");
            let values = &memory.values[0];
            let sums = &mut [0; COLS_MAX.div_ceil(16)];
            let x = BlockActivations::new(shape, cols, values, sums);
            for (r, want) in memory.want[..rows].iter_mut().enumerate() {
                let live = |c: &usize| live(r / blocks::STRIP_ROWS, c / shape.cols());
                *want = (0..cols).filter(live).map(|c| i32::from(weight(r, c)) * i32::from(values[c])).sum();
            }
            // Of the formats, T2 has the same codes.
            let place =
                Place { operation: "matvec_blocks", format: Format::T2, rows, cols, tokens: shape.cols(), input };
            for &k in backends {
                memory.got[..=rows].fill(CANARY);
                k.matvec_blocks(w, x, &mut memory.got[..rows]);
                place.compare(k, &memory.want[..rows], &memory.got[..=rows])?;
            }
        }
    }
    Ok(())
}

fn check_matvec_f16(
    backends: &[&dyn Kernels],
    rows: usize,
    cols: usize,
    memory: &mut Workspace,
) -> Result<(), Difference> {
    let format = Format::F16;
    let (rows, cols) = (rows.min(9), cols.min(1_030));
    let blocks = &mut memory.blocks[..format.matrix_blocks(rows, cols)];
    // Halves of every exponent, subnormals included, but no infinities and no NaN.
    format::encode_f16(rows, cols, blocks, |r, c| {
        let bits = weight_seed(r, c, 3) as u16;
        if bits & 0x7c00 == 0x7c00 { bits & 0x83ff } else { bits }
    });
    let mut rng = Rng(cols as u32 | 1);
    memory.floats[..cols].fill_with(|| rng.float());
    let w = Matrix::new(format, rows, cols, blocks).expect("the blocks of the shape");
    let (mut want, mut got) = ([0.0; 9], [0.0; 9]);
    float::matvec_f16(w, &memory.floats[..cols], &mut want[..rows]);
    for &k in backends {
        k.matvec_f16(w, &memory.floats[..cols], &mut got[..rows]);
        compare(k, "matvec_f16", Some(format), cols, &want[..rows], &got[..rows])?;
    }
    Ok(())
}

fn check_quantize(k: &dyn Kernels, cols: usize, memory: &mut Workspace) -> Result<(), Difference> {
    let mut rng = Rng(cols as u32 | 1);
    let [want, got, ..] = &mut memory.values;
    let cases: [fn(&mut Rng) -> f32; 4] = [
        Rng::float,
        |_| 0.0,
        |rng| rng.float() * 1e-7,
        |rng| (rng.next() % 255) as f32 - 127.0 + 0.5 * (rng.next() % 2) as f32, // many halves
    ];
    for case in cases {
        memory.floats[..cols].fill_with(|| case(&mut rng));
        want.fill(1);
        got.fill(1);
        let scales = [float::quantize(&memory.floats[..cols], want), k.quantize(&memory.floats[..cols], got)];
        let [want_scale, got_scale] = scales.map(|s| s.unwrap_or(f32::NAN));
        compare(k, "quantize", None, cols, &[want_scale], &[got_scale])?;
        if let Some(index) = (0..want.len()).find(|&i| want[i] != got[i]) {
            let (want, got) = (i32::from(want[index]), i32::from(got[index]));
            return Err(Difference {
                backend: k.name(),
                operation: "quantize",
                format: None,
                rows: 1,
                cols,
                tokens: 1,
                input: Input::Random,
                index,
                want,
                got,
            });
        }
    }
    memory.floats[cols - 1] = f32::NAN;
    let nan = k.quantize(&memory.floats[..cols], got);
    compare(k, "quantize", None, cols, &[0.0], &[nan.unwrap_or(0.0)])
}

/// Elements of the longest vector of [`check_elementwise`].
const ELEMENTS_MAX: usize = 1_030;

/// `rmsnorm`, and the activation functions with gates from -130 to 130: beyond what their exponential holds.
fn check_elementwise(k: &dyn Kernels, n: usize, memory: &mut Workspace) -> Result<(), Difference> {
    let mut rng = Rng(n as u32 | 1);
    memory.floats[..3 * n].fill_with(|| rng.float() * 130.0);
    let (gate, rest) = memory.floats[..3 * n].split_at_mut(n);
    let (up, work) = rest.split_at_mut(n);
    let mut want = [0.0; ELEMENTS_MAX];
    float::silu(gate, up, &mut want[..n]);
    k.silu(gate, up, work);
    compare(k, "silu", None, n, &want[..n], work)?;
    float::squared_relu(gate, up, &mut want[..n]);
    k.squared_relu(gate, up, work);
    compare(k, "squared_relu", None, n, &want[..n], work)?;
    want[..n].copy_from_slice(gate);
    work.copy_from_slice(gate);
    float::rmsnorm(&mut want[..n], up, 1e-5);
    k.rmsnorm(work, up, 1e-5);
    compare(k, "rmsnorm", None, n, &want[..n], work)
}

/// What a memory does with a token, `n` channels or keys wide. Twice, so that what is kept counts.
fn check_recurrence(k: &dyn Kernels, n: usize, memory: &mut Workspace) -> Result<(), Difference> {
    let mut rng = Rng(n as u32 | 1);
    memory.floats[..8 * n].fill_with(|| rng.float());
    let (taps, x) = memory.floats[..8 * n].split_at(4 * n);
    let mut past = [[0.0; 3 * RECURRENCE_MAX]; 2];
    let mut state = [[0.0; RECURRENCE_MAX]; 2];
    for x in x.chunks_exact(2 * n) {
        let mut out = [[0.0; RECURRENCE_MAX]; 2];
        out.iter_mut().for_each(|out| out[..n].copy_from_slice(&x[..n]));
        let [(want, past_want), (got, past_got)] = {
            let [a, b] = &mut out;
            let [c, d] = &mut past;
            [(&mut a[..n], &mut c[..3 * n]), (&mut b[..n], &mut d[..3 * n])]
        };
        float::convolve(past_want, taps, want);
        k.convolve(past_got, taps, got);
        compare(k, "convolve", None, n, want, got)?;
        compare(k, "convolve", None, n, past_want, past_got)?;
        float::convolve_silu(past_want, taps, want);
        k.convolve_silu(past_got, taps, got);
        compare(k, "convolve_silu", None, n, want, got)?;
        compare(k, "convolve_silu", None, n, past_want, past_got)?;
        let [want, got] = &mut state;
        float::delta_rule(&mut want[..n], &x[..n], 0.9, 0.4, 0.7);
        k.delta_rule(&mut got[..n], &x[..n], 0.9, 0.4, 0.7);
        compare(k, "delta_rule", None, n, &want[..n], &got[..n])?;
        let recalled = [float::dot(&want[..n], &x[n..]), k.recall(&got[..n], &x[n..])];
        compare(k, "recall", None, n, &recalled[..1], &recalled[1..])?;
        // The bound is between 0 and 1.
        let bound = &mut [0.0; RECURRENCE_MAX][..n];
        bound.iter_mut().zip(taps).for_each(|(bound, x)| *bound = x.abs() / (1.0 + x.abs()));
        float::recur(&mut want[..n], bound, &x[..n], &x[n..]);
        k.recur(&mut got[..n], bound, &x[..n], &x[n..]);
        compare(k, "recur", None, n, &want[..n], &got[..n])?;
    }
    Ok(())
}

/// Channels of the widest [`check_recurrence`].
const RECURRENCE_MAX: usize = 100;

fn check_attend(k: &dyn Kernels, memory: &mut Workspace) -> Result<(), Difference> {
    let mut rng = Rng(77);
    memory.floats.fill_with(|| rng.float());
    memory.values[0].fill_with(|| rng.next() as i8);
    let mut halves = [0; 1_300];
    halves.fill_with(|| float::f32_to_f16(rng.float()));
    // Widths of 16 columns, 1, 2, 4 and 7 times, and of some more; whole runs of 64 positions and parts of one.
    for (head_dim, positions) in [(8, 1), (16, 63), (20, 64), (18, 65), (8, 130), (64, 20), (112, 9), (100, 11)] {
        let n = head_dim * positions;
        let caches = [
            Cache::F32(&memory.floats[..n]),
            Cache::F16(&halves[..n]),
            Cache::I8 { codes: &memory.values[0][..n], scales: &memory.floats[n..n + positions] },
        ];
        let q = &memory.floats[memory.floats.len() - head_dim..];
        for keys in caches {
            for values in caches {
                let (mut want, mut got) = ([0.0; 112], [0.0; 112]);
                float::attend(Arrays, q, keys, values, 0.3, &mut want[..head_dim]);
                k.attend(q, keys, values, 0.3, &mut got[..head_dim]);
                compare(k, "attend", None, positions, &want[..head_dim], &got[..head_dim])?;
            }
        }
    }
    Ok(())
}

/// Compares the bits of floats.
fn compare(
    k: &dyn Kernels,
    operation: &'static str,
    format: Option<Format>,
    cols: usize,
    want: &[f32],
    got: &[f32],
) -> Result<(), Difference> {
    let Some(index) = (0..want.len()).find(|&i| want[i].to_bits() != got[i].to_bits()) else { return Ok(()) };
    let (backend, want, got) = (k.name(), want[index].to_bits() as i32, got[index].to_bits() as i32);
    Err(Difference { backend, operation, format, rows: 1, cols, tokens: 1, input: Input::Random, index, want, got })
}

/// Xorshift: tests need no more.
struct Rng(u32);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 17;
        self.0 ^= self.0 << 5;
        self.0
    }
    /// Uniform in -1 to 1.
    fn float(&mut self) -> f32 {
        self.next() as f32 / 2_147_483_648.0 - 1.0
    }
}
