//! Products of float matrices, with the same bits for any number of threads and on every CPU.
//!
//! An element is the sum of its products in the order of the columns, in runs of `RUN` that are added one after another.
//! Tiles and registers decide only which elements are computed together. The loops are written so that the compiler makes
//! vectors of them, once for each width of register; nothing is contracted into fused multiply-adds.
use pulp::Arch;
use rayon::iter::{IntoParallelIterator as _, ParallelIterator as _};

/// Products that are summed in registers before they are added to the result.
const RUN: usize = 256;
/// Rows and columns of a tile, the unit of work of a thread. Its columns of one run fit in the second cache.
const TILE: (usize, usize) = (192, 512);

/// A matrix in memory: element `(i, j)` is `data[i * row + j * col]`.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row: usize,
    col: usize,
}

impl<'a> View<'a> {
    /// Rows one after another.
    ///
    /// # Panics
    /// If the length is not that of whole rows.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        assert!(cols > 0 && data.len().is_multiple_of(cols), "{} elements in rows of {cols}", data.len());
        Self { data, rows: data.len() / cols, cols, row: cols, col: 1 }
    }
    /// Some columns of a matrix whose rows lie `stride` apart, from `first` on.
    ///
    /// # Panics
    /// If they are not in it.
    pub fn columns(data: &'a [f32], stride: usize, first: usize, cols: usize) -> Self {
        assert!(first + cols <= stride && data.len().is_multiple_of(stride));
        Self { data: &data[first.min(data.len())..], rows: data.len() / stride, cols, row: stride, col: 1 }
    }
    /// The transpose.
    #[must_use]
    pub const fn t(self) -> Self {
        Self { data: self.data, rows: self.cols, cols: self.rows, row: self.col, col: self.row }
    }
    /// Its shape.
    pub const fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

/// Calls `each` for `0..count` on all threads, then `then` with the results, in order, on this one.
pub(crate) fn parallel<T: Send>(count: usize, each: impl Fn(usize) -> T + Sync + Send, mut then: impl FnMut(usize, T)) {
    let results: Vec<T> = (0..count).into_par_iter().map(each).collect();
    results.into_iter().enumerate().for_each(|(i, result)| then(i, result));
}

/// `a · b`, rows one after another, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub fn product(a: View<'_>, b: View<'_>) -> Vec<f32> {
    let tiles = Tiles::new(a, b);
    let mut c = vec![0.0; tiles.m * tiles.n];
    parallel(tiles.count(), |i| tiles.compute(i), |i, tile| tiles.put(i, &tile, &mut c));
    c
}

/// [`product`] on this thread.
pub(crate) fn product_here(a: View<'_>, b: View<'_>) -> Vec<f32> {
    let tiles = Tiles::new(a, b);
    let mut c = vec![0.0; tiles.m * tiles.n];
    (0..tiles.count()).for_each(|i| tiles.put(i, &tiles.compute(i), &mut c));
    c
}

/// A product in pieces.
struct Tiles<'a> {
    arch: Arch,
    a: View<'a>,
    b: View<'a>,
    m: usize,
    n: usize,
}

impl<'a> Tiles<'a> {
    fn new(a: View<'a>, b: View<'a>) -> Self {
        assert_eq!(a.cols, b.rows, "a product of {:?} and {:?}", a.shape(), b.shape());
        Self { arch: Arch::new(), a, b, m: a.rows, n: b.cols }
    }
    const fn count(&self) -> usize {
        self.m.div_ceil(TILE.0) * self.n.div_ceil(TILE.1)
    }
    /// First row and column of a tile, and their numbers.
    fn place(&self, i: usize) -> [(usize, usize); 2] {
        let across = self.n.div_ceil(TILE.1);
        let (row, col) = (i / across * TILE.0, i % across * TILE.1);
        [(row, TILE.0.min(self.m - row)), (col, TILE.1.min(self.n - col))]
    }
    fn compute(&self, i: usize) -> Vec<f32> {
        let [rows, cols] = self.place(i);
        tile(self.arch, self.a, self.b, rows, cols)
    }
    fn put(&self, i: usize, tile: &[f32], c: &mut [f32]) {
        let [(row, _), (col, width)] = self.place(i);
        for (into, from) in c[row * self.n..].chunks_mut(self.n).zip(tile.chunks_exact(width)) {
            into[col..col + width].copy_from_slice(from);
        }
    }
}

/// Rows `r.0..r.0 + r.1` and columns `c.0..c.0 + c.1` of the product.
fn tile(arch: Arch, a: View<'_>, b: View<'_>, r: (usize, usize), c: (usize, usize)) -> Vec<f32> {
    match arch {
        // 16 of 32 registers are sums; with 16 registers, 12.
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => arch.dispatch(|| tile_of::<8, 32>(a, b, r, c)),
        _ => arch.dispatch(|| tile_of::<6, 16>(a, b, r, c)),
    }
}

#[inline(always)]
fn tile_of<const R: usize, const C: usize>(
    a: View<'_>,
    b: View<'_>,
    (row, rows): (usize, usize),
    (col, cols): (usize, usize),
) -> Vec<f32> {
    let mut out = vec![0.0; rows * cols];
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for first in (0..a.cols).step_by(RUN) {
        let run = RUN.min(a.cols - first);
        pack::<R>(View { data: &a.data[row * a.row + first * a.col..], rows, cols: run, ..a }, &mut left);
        pack::<C>(View { data: &b.data[first * b.row + col * b.col..], rows: run, cols, ..b }.t(), &mut right);
        for (j, right) in right.as_chunks::<C>().0.chunks_exact(run).enumerate() {
            for (i, left) in left.as_chunks::<R>().0.chunks_exact(run).enumerate() {
                let mut sums = [[0.0f32; C]; R];
                for (left, right) in left.iter().zip(right) {
                    for (sums, l) in sums.iter_mut().zip(left) {
                        for (sum, r) in sums.iter_mut().zip(right) {
                            *sum += l * r;
                        }
                    }
                }
                let width = C.min(cols - j * C);
                for (out, sums) in out[i * R * cols..].chunks_mut(cols).zip(&sums) {
                    for (out, sum) in out[j * C..][..width].iter_mut().zip(sums) {
                        *out += sum;
                    }
                }
            }
        }
    }
    out
}

/// The rows of a matrix in strips of `N`, each column by column; rows that are missing are zeros.
#[inline(always)]
fn pack<const N: usize>(view: View<'_>, into: &mut Vec<f32>) {
    let strips = view.rows.div_ceil(N);
    into.clear();
    into.resize(strips * N * view.cols, 0.0);
    for (s, strip) in into.chunks_exact_mut(N * view.cols).enumerate() {
        let rows = N.min(view.rows - s * N);
        let from = &view.data[s * N * view.row..];
        if view.row == 1 {
            for (k, column) in strip.as_chunks_mut::<N>().0.iter_mut().enumerate() {
                column[..rows].copy_from_slice(&from[k * view.col..][..rows]);
            }
        } else {
            for r in 0..rows {
                let row = from[r * view.row..].iter().step_by(view.col);
                strip.as_chunks_mut::<N>().0.iter_mut().zip(row).for_each(|(column, v)| column[r] = *v);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// The definition, in the order of summation that is promised.
    fn plain(a: View<'_>, b: View<'_>) -> Vec<f32> {
        let at = |v: View<'_>, i: usize, j: usize| v.data[i * v.row + j * v.col];
        let element = |i: usize, j: usize| {
            (0..a.cols).step_by(RUN).fold(0.0, |sum, first| {
                sum + (first..a.cols.min(first + RUN)).fold(0.0, |sum, k| sum + at(a, i, k) * at(b, k, j))
            })
        };
        (0..a.rows * b.cols).map(|i| element(i / b.cols, i % b.cols)).collect()
    }

    /// One element, tails of registers, of tiles and of runs, and both orders of memory: the same bits on every path.
    #[test]
    fn products_are_the_definition_on_any_number_of_threads() {
        for (m, n, k) in [(1, 1, 1), (7, 33, 5), (8, 32, 256), (193, 40, 300), (20, 513, 257)] {
            let (x, y) = (numbers(m * k, 1), numbers(k * n, 2));
            let (xt, yt) = (View::new(&x, m).t(), View::new(&y, k).t());
            for (a, b) in [(View::new(&x, k), View::new(&y, n)), (xt, yt), (View::new(&x, k), yt)] {
                let expected = plain(a, b);
                assert_eq!(product_here(a, b), expected, "{m}x{n}x{k} on one thread");
                let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
                assert_eq!(pool.install(|| product(a, b)), expected, "{m}x{n}x{k} on three");
                assert_eq!(tile_of::<6, 16>(a, b, (0, m), (0, n)), expected, "{m}x{n}x{k} in other registers");
            }
        }
    }

    #[test]
    fn columns_of_a_wider_matrix_are_a_matrix() {
        let x = numbers(4 * 10, 3);
        let part: Vec<f32> = x.chunks_exact(10).flat_map(|row| row[6..9].to_vec()).collect();
        let unit = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0];
        assert_eq!(product(View::columns(&x, 10, 6, 3), View::new(&unit, 3)), part);
    }
}
