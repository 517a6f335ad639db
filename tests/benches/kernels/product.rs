//! One product of a matrix, whatever its format and operation.
use bitnet_kernel::{Activations, Batch, Block, Format, Kernels, Matrix};

/// Every format that is multiplied.
pub(crate) const FORMATS: [Format; Format::ALL.len()] = Format::ALL;

/// Tokens of [`Op::Matmat`].
pub(crate) const TOKENS: usize = 8;

/// What is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// One token, as in decoding.
    Matvec,
    /// [`TOKENS`] tokens at once, as in prefill.
    Matmat,
}

impl Op {
    pub(crate) const ALL: [Self; 2] = [Self::Matvec, Self::Matmat];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Matvec => "matvec",
            Self::Matmat => "matmat",
        }
    }
    /// Whether the kernel contract has this operation for the format.
    pub(crate) fn takes(self, format: Format) -> bool {
        self == Self::Matvec || format != Format::F16
    }
    /// Tokens of one call.
    pub(crate) const fn tokens(self) -> usize {
        match self {
            Self::Matvec => 1,
            Self::Matmat => TOKENS,
        }
    }
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
}

impl Inputs {
    /// Of each token other ones: tokens that share their tables would find them in a smaller cache than real ones do.
    pub(crate) fn new(format: Format, cols: usize) -> Self {
        let padded = format.padded_cols(cols).next_multiple_of(Block::BYTES);
        let mut values = vec![0i8; TOKENS * padded + Block::BYTES];
        let start = values.as_ptr().align_offset(Block::BYTES);
        for (t, values) in values[start..].chunks_exact_mut(padded).take(TOKENS).enumerate() {
            values[..cols].iter_mut().enumerate().for_each(|(i, v)| *v = ((i + 7 * t) * 89 % 255) as u8 as i8);
        }
        let tables = vec![Block::ZERO; TOKENS * format.table_blocks(cols)];
        let floats = (0..cols).map(|i| (i * 89 % 255) as f32 / 64.0 - 2.0).collect();
        Self { format, cols, values, start, tables, floats }
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
                tokens.push(k.prepare(format, cols, values, tables.next().unwrap_or_default()));
            }
        }
        Product { k, op, tokens, floats: &self.floats }
    }

    /// One preparation of one token: what decoding pays once for all matrices that share an input.
    pub(crate) fn prepare(&mut self, k: &dyn Kernels) {
        if self.format != Format::F16 {
            let tables = &mut self.tables[..self.format.table_blocks(self.cols)];
            std::hint::black_box(k.prepare(self.format, self.cols, &self.values[self.start..], tables));
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
}

/// Where results go.
#[derive(Debug)]
pub(crate) struct Output {
    integers: Vec<i32>,
    floats: Vec<f32>,
}

impl Output {
    /// Room for up to `rows` rows.
    pub(crate) fn new(rows: usize) -> Self {
        Self { integers: vec![0; rows * TOKENS], floats: vec![0.0; rows * TOKENS] }
    }
}

impl Product<'_> {
    /// Multiplies `w`.
    pub(crate) fn run(&self, w: Matrix<'_>, out: &mut Output) {
        let n = w.rows() * self.op.tokens();
        match (w.format(), self.op) {
            (Format::F16, _) => self.k.matvec_f16(w, self.floats, &mut out.floats[..n]),
            (_, Op::Matvec) => self.k.matvec(w, self.tokens[0], &mut out.integers[..n]),
            (_, Op::Matmat) => self.k.matmat(w, Batch::new(&self.tokens), &mut out.integers[..n]),
        }
        std::hint::black_box(out);
    }
}
