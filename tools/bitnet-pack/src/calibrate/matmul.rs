//! Products of float matrices, with the same bits for any number of threads and on every CPU.
//!
//! An element is the sum of its products in the order of the columns, in runs of [`RUN`] that are added one after another.
//! Tiles and registers decide only which elements are computed together. The loops are written so that the compiler makes
//! vectors of them, once for each width of register; nothing is contracted into fused multiply-adds.
use core::sync::atomic::{AtomicUsize, Ordering};
use pulp::Arch;
use std::sync::mpsc;

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

/// Threads that there are.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Calls `each` for `0..count` on all threads, and `then` with the results, in any order, on this one.
pub(crate) fn parallel<T: Send>(count: usize, each: impl Fn(usize) -> T + Sync, then: impl FnMut(usize, T)) {
    on_threads(threads(), count, each, then);
}

fn on_threads<T: Send>(threads: usize, count: usize, each: impl Fn(usize) -> T + Sync, mut then: impl FnMut(usize, T)) {
    if threads.min(count) <= 1 {
        (0..count).for_each(|i| then(i, each(i)));
        return;
    }
    let next = AtomicUsize::new(0);
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads.min(count) {
            let (sender, next, each) = (sender.clone(), &next, &each);
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= count || sender.send((i, each(i))).is_err() {
                        break;
                    }
                }
            });
        }
        drop(sender);
        receiver.iter().for_each(|(i, result)| then(i, result));
    });
}

/// `a · b`, rows one after another, on all threads.
///
/// # Panics
/// If the shapes do not fit.
pub fn product(a: View<'_>, b: View<'_>) -> Vec<f32> {
    product_on(threads(), a, b)
}

/// [`product`] on this thread.
pub(crate) fn product_here(a: View<'_>, b: View<'_>) -> Vec<f32> {
    product_on(1, a, b)
}

fn product_on(threads: usize, a: View<'_>, b: View<'_>) -> Vec<f32> {
    assert_eq!(a.cols, b.rows, "a product of {:?} and {:?}", a.shape(), b.shape());
    let (m, n) = (a.rows, b.cols);
    let mut c = vec![0.0; m * n];
    let across = n.div_ceil(TILE.1);
    let place = |i: usize| (i / across * TILE.0, i % across * TILE.1);
    let arch = Arch::new();
    let each = |i: usize| {
        let (row, col) = place(i);
        tile(arch, a, b, (row, TILE.0.min(m - row)), (col, TILE.1.min(n - col)))
    };
    on_threads(threads, m.div_ceil(TILE.0) * across, each, |i, tile: Vec<f32>| {
        let (row, col) = place(i);
        let width = TILE.1.min(n - col);
        for (into, from) in c[row * n..].chunks_mut(n).zip(tile.chunks_exact(width)) {
            into[col..col + width].copy_from_slice(from);
        }
    });
    c
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
                for threads in [1, 3] {
                    assert_eq!(product_on(threads, a, b), expected, "{m}x{n}x{k} on {threads}");
                }
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
