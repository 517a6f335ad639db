//! What layouts cost on this CPU: products as the runtime makes them, timed.
use super::{Candidate, Timer};
use crate::kept::{Found, Kept, Live};
use bitnet_kernel::blocks::{STRIP_ROWS, encode_unit};
use bitnet_kernel::{Block, BlockActivations, BlockMatrix, Format, Kernels, Matrix};
use bitnet_runtime::Config;
use bitnet_runtime::image::kept::kept;
use bitnet_runtime::image::{Encoding, UNIT_ROWS, expected_sections};
use bitnet_runtime::parallel::{Parallel as _, Pool};
use core::hint::black_box;
use std::collections::HashMap;
use std::io;
use std::time::Instant;

/// Most bytes of copies that are multiplied in turn, so that caches hold none of them.
const MOST: u64 = 256 << 20;
/// Each layout is timed over all its copies so many times, in turn with the others, so that other work slows all.
const ROUNDS: usize = 3;
/// Layouts whose bytes are the same share of the whole linear's, in so many parts, are taken to be as fast.
const SHARES: u64 = 32;

/// Times layouts on this CPU.
///
/// A product is measured as a pass makes it for one token: what the backend prepares, gathering activations and scattering results
/// included, units of 64 rows shared by all threads. Copies of a linear as large as all linears of the model, at most 256 MiB,
/// are multiplied in turn: a model that the caches hold is timed in the caches. The figure is the 10th percentile.
#[expect(missing_debug_implementations, reason = "kernels have none")]
pub struct Measured {
    kernels: &'static dyn Kernels,
    pool: Pool,
    bytes: u64,
    known: HashMap<Key, Vec<f64>>,
}

/// Linears that are timed once: shape, format, and each layout with its share of the bytes.
type Key = (u32, u32, Format, Vec<(&'static str, u64)>);

/// Bytes of all linears of a model if all had `format`.
pub fn linear_bytes(config: &Config, format: Format) -> u64 {
    let linears = expected_sections(config).filter(|s| s.kind.is_linear());
    linears.map(|s| Encoding::Matrix(format).blocks(s.rows, s.cols) * Block::BYTES as u64).sum()
}

impl Measured {
    /// A timer for a model with linears of so many `bytes`, that runs on so many `threads`.
    ///
    /// # Errors
    /// If the system has no such threads.
    pub fn new(kernels: &'static dyn Kernels, threads: usize, bytes: u64) -> io::Result<Self> {
        Ok(Self { kernels, pool: Pool::new(threads)?, bytes: bytes.min(MOST), known: HashMap::new() })
    }

    fn measure(&self, candidates: &[Candidate<'_>]) -> Vec<f64> {
        let mut runs: Vec<Run<'_>> = candidates.iter().map(|candidate| self.run(candidate)).collect();
        let mut times = vec![Vec::new(); runs.len()];
        let mut memory = Vec::new();
        for _ in 0..ROUNDS {
            for ((one, run), times) in runs.iter_mut().zip(&mut times) {
                let copies = (self.bytes as usize / (one.len() * Block::BYTES)).max(1);
                memory.clear();
                memory.extend(core::iter::repeat_n(&one[..], copies).flatten());
                run(&memory[..one.len()]);
                for copy in memory.chunks_exact(one.len()) {
                    let start = Instant::now();
                    run(copy);
                    times.push(start.elapsed().as_secs_f64() * 1e6);
                }
            }
        }
        let tenth = |mut times: Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 10]
        };
        times.into_iter().map(tenth).collect()
    }

    fn run(&self, candidate: &Candidate<'_>) -> Run<'_> {
        let (rows, cols) = (candidate.rows as usize, candidate.cols as usize);
        let every = |n: usize| vec![true; n];
        match candidate.layout {
            Found::Whole => self.matrix(candidate.format, &Kept { rows: every(rows), cols: every(cols) }),
            Found::Kept(kept) => self.matrix(candidate.format, kept),
            Found::Live(live) => self.blocks(rows, cols, live),
        }
    }

    /// Products with the rows and columns that are kept.
    fn matrix(&self, format: Format, whole: &Kept) -> Run<'_> {
        let (rows, cols, (n, m)) = (whole.rows.len(), whole.cols.len(), whole.shape());
        let (n, m) = (n as usize, m as usize);
        let masks = whole.masks();
        let row_blocks = bitnet_runtime::image::kept::mask_blocks(rows as u32) as usize;
        // Weights of every format, and not what the system gives for free.
        let blocks = vec![Block([0x11; Block::BYTES]); format.matrix_blocks(n, m)];
        let x = activations(cols);
        let mut gathered = vec![0; format.padded_cols(m)];
        let (mut tables, mut sums, mut y) = (vec![Block::ZERO; format.table_blocks(m)], vec![0.0; n], vec![0.0; rows]);
        let run = move |blocks: &[Block]| {
            let (row_mask, col_mask) = masks.split_at(row_blocks);
            let values = if m == cols {
                &x[..]
            } else {
                gathered.iter_mut().zip(kept(col_mask)).for_each(|(value, c)| *value = x[c]);
                &gathered
            };
            let w = Matrix::new(format, n, m, blocks).expect("a copy");
            let x = self.kernels.prepare(format, m, values, &mut tables);
            self.pool.for_each_chunk(&mut sums, UNIT_ROWS, &|u, y| {
                let mut sums = [0; UNIT_ROWS];
                let sums = &mut sums[..y.len()];
                self.kernels.matvec(w.slice(u * UNIT_ROWS..u * UNIT_ROWS + sums.len()), x, sums);
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = *sum as f32);
            });
            if n < rows {
                y.fill(0.0);
            }
            kept(row_mask).zip(&sums).for_each(|(row, sum)| y[row] = *sum);
            black_box(&y);
        };
        (blocks, Box::new(run))
    }

    /// Products with the blocks that are live.
    fn blocks(&self, rows: usize, cols: usize, live: &Live) -> Run<'_> {
        let shape = live.shape;
        let (mut blocks, mut ends) = (Vec::new(), Vec::new());
        for first in (0..rows).step_by(UNIT_ROWS) {
            let n = UNIT_ROWS.min(rows - first);
            let mut unit = vec![Block::ZERO; shape.unit_blocks(n, cols, n.div_ceil(STRIP_ROWS) * shape.across(cols))];
            let is_live = |s, b| live.is_live(first / STRIP_ROWS + s, b);
            let used = encode_unit(shape, n, cols, is_live, |_, _| 1, &mut unit);
            blocks.extend_from_slice(&unit[..used]);
            ends.push(blocks.len());
        }
        let x = activations(cols);
        let (mut sums, mut y) = (vec![0; shape.across(cols)], vec![0.0; rows]);
        let run = move |blocks: &[Block]| {
            let x = BlockActivations::new(shape, cols, &x, &mut sums);
            self.pool.for_each_chunk(&mut y, UNIT_ROWS, &|u, y| {
                let start = u.checked_sub(1).map_or(0, |before| ends[before]);
                let w = BlockMatrix::new(shape, y.len(), cols, &blocks[start..ends[u]]).expect("a unit");
                let mut sums = [0; UNIT_ROWS];
                self.kernels.matvec_blocks(w, x, &mut sums[..y.len()]);
                y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum as f32);
            });
            black_box(&y);
        };
        (blocks, Box::new(run))
    }
}

/// One copy of a matrix, and what multiplies a copy.
type Run<'a> = (Vec<Block>, Box<dyn FnMut(&[Block]) + 'a>);

/// Any int8 activations for so many columns; zeros past them, as far as any format goes.
fn activations(cols: usize) -> Vec<i8> {
    (0..cols.next_multiple_of(256) + 256).map(|i| if i < cols { (i * 89 % 255) as u8 as i8 } else { 0 }).collect()
}

impl Timer for Measured {
    fn costs(&mut self, candidates: &[Candidate<'_>]) -> Vec<f64> {
        let Some(first) = candidates.first() else { return Vec::new() };
        let whole = Encoding::Matrix(first.format).blocks(first.rows, first.cols) * Block::BYTES as u64;
        let share = |c: &Candidate<'_>| (c.layout.name(), (c.bytes() * SHARES).div_ceil(whole));
        let key = (first.rows, first.cols, first.format, candidates.iter().map(share).collect());
        if let Some(costs) = self.known.get(&key) {
            return costs.clone();
        }
        let costs = self.measure(candidates);
        self.known.insert(key, costs.clone());
        costs
    }
    fn name(&self) -> String {
        format!("microseconds on {}, {} threads", self.kernels.name(), self.pool.threads_max())
    }
}
