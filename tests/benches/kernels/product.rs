//! One product of a matrix, whatever its format and operation.
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};

/// Every format that is multiplied.
pub(crate) const FORMATS: [Format; Format::ALL.len()] = Format::ALL;

/// Tokens of [`Op::Matmat`].
pub(crate) const TOKENS: usize = 8;

/// Rows of a hundred that are read where only some are: what a trained squared-ReLU model leaves of its feed-forward part.
const LIVE_PERCENT: u32 = 15;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// One token, as in decoding.
    Matvec,
    /// [`TOKENS`] tokens at once, as in prefill.
    Matmat,
    /// One token whose activations have four bits.
    MatvecInt4,
    /// [`TOKENS`] such tokens.
    MatmatInt4,
    /// One token and [`LIVE_PERCENT`] of the rows.
    DotRows,
    /// The sum of [`LIVE_PERCENT`] of the rows: a product with a mostly zero vector, of a matrix stored by its columns.
    SumRows,
}

impl Op {
    pub(crate) const ALL: [Self; 6] =
        [Self::Matvec, Self::Matmat, Self::MatvecInt4, Self::MatmatInt4, Self::DotRows, Self::SumRows];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Matvec => "matvec",
            Self::Matmat => "matmat",
            Self::MatvecInt4 => "matvec_int4",
            Self::MatmatInt4 => "matmat_int4",
            Self::DotRows => "dot_rows",
            Self::SumRows => "sum_rows",
        }
    }
    /// Whether the kernel contract has this operation for the format.
    pub(crate) fn takes(self, format: Format) -> bool {
        let exact = Format::INTEGER.contains(&format) || format.is_grouped();
        match self {
            Self::Matvec => exact || format == Format::F16,
            Self::Matmat => exact,
            // Others read int4 activations as any.
            Self::MatvecInt4 | Self::MatmatInt4 => exact && !format.is_grouped() && format.table_cols() > 0,
            Self::DotRows | Self::SumRows => format == Format::T2R,
        }
    }
    /// Whether rows are read of which a caller names some.
    pub(crate) const fn is_sparse(self) -> bool {
        matches!(self, Self::DotRows | Self::SumRows)
    }
    /// Tokens of one call.
    pub(crate) const fn tokens(self) -> usize {
        match self {
            Self::Matmat | Self::MatmatInt4 => TOKENS,
            Self::Matvec | Self::MatvecInt4 | Self::DotRows | Self::SumRows => 1,
        }
    }
    /// How many of `rows` rows are read.
    pub(crate) fn rows_read(self, rows: usize) -> usize {
        if self.is_sparse() { live(rows).count() } else { rows }
    }
}

/// The rows that are read where only some are: scattered, the same ones every time.
fn live(rows: usize) -> impl Iterator<Item = u32> {
    (0..rows as u32).filter(|row| (row.wrapping_mul(0x9e37_79b9) >> 8) % 100 < LIVE_PERCENT)
}

/// Activations of every token, and memory for what a backend makes of them.
#[derive(Debug)]
pub(crate) struct Inputs {
    format: Format,
    cols: usize,
    /// On a cache line, as a runtime places them: off by 16 bytes, every second load straddles two.
    values: Vec<i8>,
    start: usize,
    tables: Vec<Block>,
    floats: Vec<f32>,
    /// Rows that are read where only some are, as far as any matrix may go, and what is multiplied with them.
    live: Vec<u32>,
    factors: Vec<i8>,
}

impl Inputs {
    /// Of each token other ones: tokens that share their tables would find them in a smaller cache than real ones do.
    pub(crate) fn new(format: Format, cols: usize, op: Op) -> Self {
        let bits_less = if matches!(op, Op::MatvecInt4 | Op::MatmatInt4) { 4 } else { 0 };
        let padded = format.padded_cols(cols).next_multiple_of(Block::BYTES);
        let mut values = vec![0i8; TOKENS * padded + Block::BYTES];
        let start = values.as_ptr().align_offset(Block::BYTES);
        for (t, values) in values[start..].chunks_exact_mut(padded).take(TOKENS).enumerate() {
            values[..cols]
                .iter_mut()
                .enumerate()
                .for_each(|(i, v)| *v = ((i + 7 * t) * 89 % 255) as u8 as i8 >> bits_less);
        }
        let tables = vec![Block::ZERO; TOKENS * format.table_blocks(cols)];
        let floats = (0..cols).map(|i| (i * 89 % 255) as f32 / 64.0 - 2.0).collect();
        let live: Vec<u32> = live(Format::COLS_MAX).collect();
        let factors = live.iter().map(|row| (row % 127 + 1) as i8).collect();
        Self { format, cols, values, start, tables, floats, live, factors }
    }

    /// The product by `k` with these activations.
    pub(crate) fn product<'a>(&'a mut self, k: &'a dyn Kernels, op: Op) -> Product<'a> {
        let (format, cols) = (self.format, self.cols);
        let padded = format.padded_cols(cols).next_multiple_of(Block::BYTES);
        let mut tables = self.tables.chunks_mut(format.table_blocks(cols).max(1));
        let values = &self.values[self.start..];
        let mut tokens = Vec::with_capacity(TOKENS);
        if format != Format::F16 {
            for values in values.chunks_exact(padded).take(TOKENS) {
                tokens.push(k.prepare_any(format, cols, values, tables.next().unwrap_or_default()));
            }
        }
        Product { k, op, tokens, floats: &self.floats, live: &self.live, factors: &self.factors }
    }

    /// One preparation of one token: what decoding pays once for all matrices that share an input.
    pub(crate) fn prepare(&mut self, k: &dyn Kernels) {
        if self.format != Format::F16 {
            let tables = &mut self.tables[..self.format.table_blocks(self.cols)];
            std::hint::black_box(k.prepare_any(self.format, self.cols, &self.values[self.start..], tables));
        }
    }
}

/// A product ready to be taken, of any rows.
#[derive(Debug)]
pub(crate) struct Product<'a> {
    k: &'a dyn Kernels,
    op: Op,
    tokens: Vec<Activations<'a>>,
    floats: &'a [f32],
    live: &'a [u32],
    factors: &'a [i8],
}

/// Where results go.
#[derive(Debug)]
pub(crate) struct Output {
    integers: Vec<i32>,
    floats: Vec<f32>,
}

impl Output {
    /// Room for up to `rows` rows, or for one of `cols`.
    pub(crate) fn new(rows: usize, cols: usize) -> Self {
        let n = (rows * TOKENS).max(cols);
        Self { integers: vec![0; n], floats: vec![0.0; n] }
    }
}

impl Product<'_> {
    /// Multiplies `w`.
    pub(crate) fn run(&self, w: Matrix<'_>, out: &mut Output) {
        let n = w.rows() * self.op.tokens();
        let Output { integers, floats } = out;
        match (self.op, w.format()) {
            (_, Format::F16) => self.k.matvec_f16(w, self.floats, &mut floats[..n]),
            (Op::Matvec, format) if format.is_grouped() => self.k.matvec_grouped(w, self.tokens[0], &mut floats[..n]),
            (Op::Matmat, format) if format.is_grouped() => {
                self.k.matmat_grouped(w, Batch::new(&self.tokens), &mut floats[..n]);
            }
            (Op::Matvec | Op::MatvecInt4, _) => self.k.matvec(w, self.tokens[0], &mut integers[..n]),
            (Op::Matmat | Op::MatmatInt4, _) => self.k.matmat(w, Batch::new(&self.tokens), &mut integers[..n]),
            (Op::DotRows | Op::SumRows, _) => {
                let live = &self.live[..self.live.partition_point(|&row| (row as usize) < w.rows())];
                if self.op == Op::DotRows {
                    self.k.dot_rows(w, live, self.tokens[0], &mut integers[..live.len()]);
                } else {
                    // Sums are added to what is there, which begins with zeros.
                    integers[..w.cols()].fill(0);
                    self.k.sum_rows(w, live, &self.factors[..live.len()], &mut integers[..w.cols()]);
                }
            }
        }
        std::hint::black_box(out);
    }
}
