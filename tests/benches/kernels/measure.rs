//! Times of products, hot and cold, beside those of a loop that only reads the same bytes.
//!
//! Rows are multiplied in pieces of 64, as the runtime shares work out (where only some rows are read, in one piece a
//! thread); of several threads each has its own run of pieces.
//! *Hot* is the best of many runs over one matrix, which then lies in a cache if it fits one; *cold* the 10th percentile over
//! copies that fill at least 400 MB, taken in turn. A run lasts from the first thread's start to the last one's end. The
//! reading loop has every second run, by the same pieces and threads: other work on the machine slows both, so that the share
//! of the bandwidth travels and a single figure does not.
use crate::product::{FORMATS, Inputs, Op, Output};
use bitnet_kernel::{Block, Format, Kernels, Matrix, format};
use bitnet_runtime::backend;
use serde_json::json;
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

const SHAPES: [(usize, usize); 4] = [(2560, 2560), (6912, 2560), (2560, 6912), (14336, 4096)];
/// Rows of a piece of work.
const PIECE: usize = 64;
const COLD_BYTES: usize = 400_000_000;
/// Runs over all copies, fewer of what is so slow that they would take longer than this; then some copies are left out.
const COLD_PASSES: usize = 4;
const COLD_SECONDS: f64 = 2.0;
const COLD_RUNS_MIN: usize = 20;
/// Seconds of hot runs, of which there are between the two numbers.
const HOT_SECONDS: f64 = 0.15;
const HOT_RUNS: (usize, usize) = (10, 400);
/// Looks at whether the others are there before a waiting thread lets other programs run.
const SPINS: usize = 20_000;

/// What to measure.
#[derive(Debug)]
pub(crate) struct Choice {
    backends: Vec<&'static dyn Kernels>,
    ops: Vec<Op>,
    formats: Vec<Format>,
    shapes: Vec<(usize, usize)>,
    threads: Vec<usize>,
}

impl Choice {
    /// Reads options; what none of them names is chosen whole. The portable backend, which is a hundred times slower, runs
    /// only if it is named.
    pub(crate) fn read(options: &[&str]) -> Result<Self, String> {
        let (pairs, rest) = options.as_chunks::<2>();
        if let [odd] = rest {
            return Err(format!("`{odd}` has no value"));
        }
        let given = |name: &str| pairs.iter().filter(|[key, _]| *key == name).map(|[_, value]| *value).collect();
        let known = ["--backend", "--op", "--format", "--shape", "--threads"];
        if let Some([key, _]) = pairs.iter().find(|[key, _]| !known.contains(key)) {
            return Err(format!("there is no option `{key}`; there are {}", known.join(", ")));
        }
        let mut backends: Vec<_> = backend::available().collect();
        let names: Vec<&str> = given("--backend");
        if names.is_empty() {
            backends.retain(|k| k.name() != "portable");
        } else {
            backends = pick("backend of this CPU", &names, backends, |k| k.name().to_owned())?;
        }
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let mut threads = given("--threads").into_iter().map(count).collect::<Result<Vec<_>, _>>()?;
        if threads.is_empty() {
            threads = if cores == 1 { vec![1] } else { vec![1, cores] };
        }
        Ok(Self {
            backends,
            ops: pick("operation", &given("--op"), Op::ALL.to_vec(), |op| op.name().to_owned())?,
            formats: pick("format", &given("--format"), FORMATS.to_vec(), |f| f.name().to_owned())?,
            shapes: pick("shape", &given("--shape"), SHAPES.to_vec(), |(rows, cols)| format!("{rows}x{cols}"))?,
            threads,
        })
    }
}

fn count(word: &str) -> Result<usize, String> {
    match word.parse() {
        Ok(n @ 1..=1024) => Ok(n),
        _ => Err(format!("`{word}` is no number of threads from 1 to 1024")),
    }
}

/// Those of `all` whose names were given, all if none was.
fn pick<T>(kind: &str, given: &[&str], all: Vec<T>, name: impl Fn(&T) -> String) -> Result<Vec<T>, String> {
    let names: Vec<String> = all.iter().map(&name).collect();
    if let Some(unknown) = given.iter().find(|word| !names.iter().any(|name| name == *word)) {
        return Err(format!("`{unknown}` is no {kind}; there are {}", names.join(", ")));
    }
    let chosen = |item: &T| given.is_empty() || given.contains(&name(item).as_str());
    Ok(all.into_iter().filter(chosen).collect())
}

/// Measures all that was chosen.
pub(crate) fn all(choice: &Choice) {
    let sizes = choice.formats.iter().flat_map(|f| choice.shapes.iter().map(|&(r, c)| f.matrix_blocks(r, c)));
    let largest = sizes.max().unwrap_or_default();
    let mut memory = vec![Block::ZERO; COLD_BYTES / Block::BYTES + largest];
    for &(rows, cols) in &choice.shapes {
        for &format in &choice.formats {
            let copies = Copies::fill(format, (rows, cols), &mut memory);
            for &k in &choice.backends {
                for &op in choice.ops.iter().filter(|op| op.takes(format)) {
                    choice.threads.iter().for_each(|&threads| report(k, op, &copies, threads));
                }
            }
        }
    }
}

/// Seconds of a run: of the product, and of the loop that only reads.
#[derive(Clone, Copy, Debug)]
struct Times {
    product: f64,
    read: f64,
}

/// Measures one product and prints two rows.
fn report(k: &dyn Kernels, op: Op, copies: &Copies<'_>, threads: usize) {
    let (format, rows, cols) = (copies.format, copies.rows, copies.cols);
    let mut inputs = Inputs::new(format, cols, op);
    let prepare = (0..HOT_RUNS.0).map(|_| seconds(|| inputs.prepare(k))).fold(f64::INFINITY, f64::min);
    let product = inputs.product(k, op);
    // The rows that are read are listed for each thread, not for each piece.
    let piece = if op.is_sparse() { rows.div_ceil(threads) } else { PIECE };
    let [hot, cold] = copies.times(Cut { threads, piece }, &|w, out| product.run(w, out));
    let (products, bytes) = ((rows * cols * op.tokens()) as f64, (copies.blocks_of_one() * Block::BYTES) as f64);
    let bytes_read = bytes * op.rows_read(rows) as f64 / rows as f64;
    for (state, Times { product: seconds, read }) in [("hot", hot), ("cold", cold)] {
        let row = json!({
            "backend": k.name(), "op": op.name(), "format": format.name(), "rows": rows, "cols": cols, "state": state,
            "threads": threads, "tokens": op.tokens(), "weights_per_ns": products / seconds / 1e9,
            "gb_per_s": bytes_read / seconds / 1e9, "bandwidth_share": bytes_read / seconds / (bytes / read),
            "read_gb_per_s": bytes / read / 1e9, "prepare_us": 1e6 * prepare,
        });
        println!("{row}");
    }
}

/// Adds up the bytes, eight at a time, which the compiler makes vectors of.
fn read(w: Matrix<'_>, _: &mut Output) {
    let mut sums = [0u64; 8];
    for block in w.blocks() {
        for (sum, bytes) in sums.iter_mut().zip(block.0.as_chunks().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*bytes));
        }
    }
    black_box(sums);
}

/// How work is cut.
#[derive(Clone, Copy, Debug)]
struct Cut {
    threads: usize,
    /// Rows of a piece.
    piece: usize,
}

impl Cut {
    /// The pieces of one thread: a run of them, so that each thread reads one stream.
    fn share(self, rows: usize, thread: usize) -> impl Iterator<Item = Range<usize>> {
        let pieces = rows.div_ceil(self.piece);
        let mine = pieces * thread / self.threads..pieces * (thread + 1) / self.threads;
        mine.map(move |piece| piece * self.piece..rows.min((piece + 1) * self.piece))
    }
}

/// What a thread does with a piece.
type Task<'a> = &'a (dyn Fn(Matrix<'_>, &mut Output) + Sync);

/// Copies of one random matrix.
#[derive(Debug)]
struct Copies<'a> {
    format: Format,
    rows: usize,
    cols: usize,
    blocks: &'a [Block],
}

impl<'a> Copies<'a> {
    /// Fills `memory` with as many as make [`COLD_BYTES`] or more.
    fn fill(format: Format, (rows, cols): (usize, usize), memory: &'a mut [Block]) -> Self {
        let n = format.matrix_blocks(rows, cols);
        let random = |r: usize, c: usize| ((r * cols + c) as u32).wrapping_mul(0x9e37_79b9);
        if format == Format::F16 {
            // Signs and fractions at random, magnitudes from 1/16 to 1.
            let bits = |seed: u32| ((seed >> 16) as u16 & 0x83ff) | (0x2c00 + ((seed >> 14) as u16 & 3) * 0x400);
            format::encode_f16(rows, cols, &mut memory[..n], |r, c| bits(random(r, c)));
        } else {
            format::encode(format, rows, cols, &mut memory[..n], |r, c| format.weight(random(r, c) >> 16));
        }
        let copies = (COLD_BYTES / Block::BYTES).div_ceil(n);
        (1..copies).for_each(|i| memory.copy_within(..n, i * n));
        Self { format, rows, cols, blocks: &memory[..copies * n] }
    }

    fn blocks_of_one(&self) -> usize {
        self.format.matrix_blocks(self.rows, self.cols)
    }

    /// The copy that the `i`-th run takes when all are taken in turn.
    fn in_turn(&self, i: usize) -> Matrix<'a> {
        let n = self.blocks_of_one();
        let at = i % (self.blocks.len() / n) * n;
        Matrix::new(self.format, self.rows, self.cols, &self.blocks[at..at + n]).expect("a whole copy")
    }

    /// How long `product` takes for one copy, hot and cold. The reading loop has every second run, so that whatever else
    /// goes on befalls both.
    fn times(&self, cut: Cut, product: Task<'_>) -> [Times; 2] {
        let first = |_| self.in_turn(0);
        let about = together(cut, 3, &first, &[product]).into_iter().fold(f64::INFINITY, f64::min);
        let runs = ((HOT_SECONDS / about) as usize).clamp(HOT_RUNS.0, HOT_RUNS.1);
        let hot = together(cut, 2 * runs, &first, &[product, &read]);
        let copies = self.blocks.len() / self.blocks_of_one();
        let affordable = ((COLD_SECONDS / about) as usize).max(COLD_RUNS_MIN);
        let runs = (copies * COLD_PASSES).min(affordable);
        let cold = together(cut, runs, &|i| self.in_turn(i), &[product, &read]);
        [at_rank(&hot, 0.0), at_rank(&cold, 0.1)]
    }
}

/// The times at a rank from 0 (the least) to 1 among those of the products, which come first of every two, and of the reads.
fn at_rank(runs: &[f64], rank: f64) -> Times {
    let of = |which: usize| {
        let mut times: Vec<f64> = runs.iter().copied().skip(which).step_by(2).collect();
        times.sort_by(f64::total_cmp);
        times[(times.len() as f64 * rank) as usize]
    };
    Times { product: of(0), read: of(1) }
}

/// Seconds of each of `runs` runs, in which threads do one of the tasks, in turn, to all pieces of the matrix that
/// `which` names.
fn together<'m>(cut: Cut, runs: usize, which: &(dyn Fn(usize) -> Matrix<'m> + Sync), tasks: &[Task<'_>]) -> Vec<f64> {
    let arrived = AtomicUsize::new(0);
    let work = |thread: usize| {
        let mut out = Output::new(cut.piece, which(0).cols());
        let mut spans = Vec::with_capacity(runs);
        for run in 0..runs {
            let (w, task) = (which(run), tasks[run % tasks.len()]);
            meet(&arrived, (run + 1) * cut.threads);
            let start = Instant::now();
            cut.share(w.rows(), thread).for_each(|rows| task(w.slice(rows), &mut out));
            spans.push((start, Instant::now()));
        }
        spans
    };
    let work = &work;
    let spans: Vec<Vec<(Instant, Instant)>> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..cut.threads).map(|thread| scope.spawn(move || work(thread))).collect();
        let mut spans = vec![work(0)];
        spans.extend(others.into_iter().map(|other| other.join().expect("a thread that measures")));
        spans
    });
    let run = |i: usize| {
        let start = spans.iter().map(|of_thread| of_thread[i].0).min().expect("a thread");
        let end = spans.iter().map(|of_thread| of_thread[i].1).max().expect("a thread");
        (end - start).as_secs_f64()
    };
    (0..runs).map(run).collect()
}

/// Waits until `all` threads have come by, without giving up the core unless it takes long.
fn meet(arrived: &AtomicUsize, all: usize) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut looks = 0;
    while arrived.load(Ordering::Acquire) < all {
        looks += 1;
        if looks > SPINS {
            std::thread::yield_now();
        }
        std::hint::spin_loop();
    }
}

/// Seconds that `f` takes.
fn seconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64()
}
