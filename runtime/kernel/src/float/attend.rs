//! Attention of one head over the positions of a cache.
use super::vectors::Vectors;
use super::{LANES, exp, f16_to_f32, sum_of};
use core::ops::Range;

/// One head's keys or values, a row of `head_dim` a position, oldest first.
#[derive(Clone, Copy, Debug)]
pub enum Cache<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Bits of half-precision floats.
    F16(&'a [u16]),
    /// int8 codes and, for each position, the number they are multiplied by.
    I8 {
        /// `head_dim` codes a position.
        codes: &'a [i8],
        /// One a position.
        scales: &'a [f32],
    },
}

impl Cache<'_> {
    /// Positions held, for rows of `head_dim`.
    pub const fn positions(&self, head_dim: usize) -> usize {
        match self {
            Self::F32(rows) => rows.len() / head_dim,
            Self::F16(rows) => rows.len() / head_dim,
            Self::I8 { scales, .. } => scales.len(),
        }
    }
    /// `scores[i] = row(positions.start + i) · q · scale`, for every position.
    #[inline(always)]
    fn scores<V: Vectors>(&self, v: V, positions: Range<usize>, q: &[f32], scale: f32, scores: &mut [f32]) {
        let (rows, scores) = (positions.start * q.len()..positions.end * q.len(), &mut scores[..positions.len()]);
        match self {
            Self::F32(all) => dots(v, &all[rows], q, scores),
            Self::F16(all) => dots(v, &all[rows], q, scores),
            Self::I8 { codes, scales } => {
                dots(v, &codes[rows], q, scores);
                scores.iter_mut().zip(&scales[positions]).for_each(|(score, scale)| *score *= scale);
            }
        }
        scores.iter_mut().for_each(|score| *score *= scale);
    }
    /// `out = out · shrink + Σ weights[i] · row(positions.start + i)`, position after position.
    #[inline(always)]
    fn add_to<V: Vectors>(&self, v: V, positions: Range<usize>, weights: &mut [f32], shrink: f32, out: &mut [f32]) {
        let (rows, weights) = (positions.start * out.len()..positions.end * out.len(), &mut weights[..positions.len()]);
        match self {
            Self::F32(all) => add_rows(v, &all[rows], weights, shrink, out),
            Self::F16(all) => add_rows(v, &all[rows], weights, shrink, out),
            Self::I8 { codes, scales } => {
                weights.iter_mut().zip(&scales[positions]).for_each(|(weight, scale)| *weight *= scale);
                add_rows(v, &codes[rows], weights, shrink, out);
            }
        }
    }
}

/// What the elements of a cache are.
trait Element: Copy + Default {
    fn value(self) -> f32;
    fn load<V: Vectors>(v: V, x: &[Self; LANES]) -> V::Wide;
}

impl Element for f32 {
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    fn load<V: Vectors>(v: V, x: &[Self; LANES]) -> V::Wide {
        v.load(x)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f16_to_f32(self)
    }
    #[inline(always)]
    fn load<V: Vectors>(v: V, x: &[Self; LANES]) -> V::Wide {
        v.load_f16(x)
    }
}

impl Element for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from(self)
    }
    #[inline(always)]
    fn load<V: Vectors>(v: V, x: &[Self; LANES]) -> V::Wide {
        v.load_i8(x)
    }
}

/// `scores[i] = rows[i] · q`, each in the order of [`super::dot`].
#[inline(always)]
fn dots<V: Vectors, T: Element>(v: V, rows: &[T], q: &[f32], scores: &mut [f32]) {
    for (rows, scores) in rows.chunks(8 * q.len()).zip(scores.chunks_mut(8)) {
        // In place of rows past the last the last one again, whose results nobody takes.
        let last = scores.len() - 1;
        let row = |i: usize| &rows[i.min(last) * q.len()..][..q.len()];
        let [a, b, c, d] = four_dots(v, [row(0), row(1), row(2), row(3)], q);
        let [e, f, g, h] = four_dots(v, [row(4), row(5), row(6), row(7)], q);
        scores.copy_from_slice(&v.trees([a, b, c, d, e, f, g, h])[..=last]);
    }
}

/// Four at a time: enough additions that do not wait for one another, and one load of `q` for all.
#[inline(always)]
fn four_dots<V: Vectors, T: Element>(v: V, rows: [&[T]; 4], q: &[f32]) -> [V::Folded; 4] {
    let (wholes, tail) = q.as_chunks();
    let rows_of = rows.map(|row| &row.as_chunks().0[..wholes.len()]);
    let zero = v.splat(0.0);
    let mut sums = [zero; 4];
    for (i, q) in wholes.iter().enumerate() {
        let q = v.load(q);
        for (sum, row) in sums.iter_mut().zip(rows_of) {
            *sum = v.add(*sum, v.mul(T::load(v, &row[i]), q));
        }
    }
    if !tail.is_empty() {
        // No sum is ever -0, so adding the zero products of the padding changes nothing.
        let q = v.load(&padded(tail));
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum = v.add(*sum, v.mul(T::load(v, &padded(row.as_chunks::<LANES>().1)), q));
        }
    }
    let [a, b, c, d] = sums;
    [v.fold(a), v.fold(b), v.fold(c), v.fold(d)]
}

/// Zeros after `x`.
#[inline(always)]
fn padded<T: Element>(x: &[T]) -> [T; LANES] {
    let mut out = [T::default(); LANES];
    out[..x.len()].copy_from_slice(x);
    out
}

/// `out = out · shrink + Σ weights[i] · rows[i]`.
#[inline(always)]
fn add_rows<V: Vectors, T: Element>(v: V, rows: &[T], weights: &[f32], shrink: f32, out: &mut [f32]) {
    let (width, (wholes, tail)) = (out.len(), out.as_chunks_mut());
    let first_of_tail = width - tail.len();
    let (fours, rest) = wholes.as_chunks_mut::<4>();
    let first_of_rest = 4 * LANES * fours.len();
    for (first, out) in (0..).step_by(4 * LANES).zip(fours) {
        add_columns(v, rows, width, first, weights, shrink, out);
    }
    let (twos, rest) = rest.as_chunks_mut::<2>();
    for (first, out) in (first_of_rest..).step_by(2 * LANES).zip(&mut *twos) {
        add_columns(v, rows, width, first, weights, shrink, out);
    }
    let first_of_rest = first_of_rest + 2 * LANES * twos.len();
    for (first, out) in (first_of_rest..).step_by(LANES).zip(rest) {
        add_columns(v, rows, width, first, weights, shrink, core::array::from_mut(out));
    }
    for (i, out) in (first_of_tail..).zip(tail) {
        *out *= shrink;
        for (row, weight) in rows.chunks_exact(width).zip(weights) {
            *out += weight * row[i].value();
        }
    }
}

/// The same for `16 · N` columns from `first` on, whose sums stay in registers meanwhile.
#[inline(always)]
fn add_columns<V: Vectors, T: Element, const N: usize>(
    v: V,
    rows: &[T],
    width: usize,
    first: usize,
    weights: &[f32],
    shrink: f32,
    out: &mut [[f32; LANES]; N],
) {
    let shrink = v.splat(shrink);
    let mut sums = [shrink; N];
    for (sum, out) in sums.iter_mut().zip(&*out) {
        *sum = v.mul(v.load(out), shrink);
    }
    for (row, &weight) in rows.chunks_exact(width).zip(weights) {
        let row: &[[T; LANES]; N] = row[first..].as_chunks().0.first_chunk().expect("columns of the row");
        let weight = v.splat(weight);
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum = v.add(*sum, v.mul(weight, T::load(v, x)));
        }
    }
    for (sum, out) in sums.into_iter().zip(out) {
        v.store(sum, out);
    }
}

/// Positions whose scores are held at a time by [`attend`].
const RUN: usize = 64;

/// One head's attention: `out = softmax(scale · K q)ᵀ V`, over all positions of the cache.
///
/// The softmax is taken in one pass over runs of 64 positions (the online form of Milakov and Gimelshein,
/// arXiv:1805.02867): memory does not grow with the context. Runs start at multiples of 64, so the order of operations
/// depends on the positions alone and not on how a prompt was cut into batches. It is, for each run:
///
/// - a position's score is the [`dot`](super::dot) of its key and `q`, times the key's scale if it has one, times `scale`;
/// - its weight is the [`exp`] of the score less the largest score so far;
/// - what was summed up to here is multiplied by the [`exp`] of the largest score before less that of now;
/// - the weights are added up in 16 lanes and a tree and then to the total, and each column of `out` has its products of weight
///   (times the value's scale) and value added one position after the other.
///
/// At the end `out` is divided by the total.
///
/// # Panics
/// If the lengths of `q`, `out` and the rows disagree, or the cache is empty.
#[inline(always)]
pub fn attend<V: Vectors>(v: V, q: &[f32], keys: Cache<'_>, values: Cache<'_>, scale: f32, out: &mut [f32]) {
    let n = keys.positions(q.len());
    assert!(q.len() == out.len() && n > 0 && values.positions(q.len()) == n);
    out.fill(0.0);
    let (mut max, mut total) = (f32::NEG_INFINITY, 0.0);
    for first in (0..n).step_by(RUN) {
        let positions = first..n.min(first + RUN);
        // Past the last position the weight is zero, which changes no sum.
        let mut weights = [f32::NEG_INFINITY; RUN];
        keys.scores(v, positions.clone(), q, scale, &mut weights);
        let new_max = larger(max, largest(&weights));
        let shrink = exp(max - new_max);
        weights.iter_mut().for_each(|weight| *weight = exp(*weight - new_max));
        total = total * shrink + sum_of(RUN, |i| weights[i]);
        values.add_to(v, positions, &mut weights, shrink, out);
        max = new_max;
    }
    out.iter_mut().for_each(|out| *out /= total);
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The largest of numbers; if any is none, whatever.
#[inline(always)]
fn largest(x: &[f32; RUN]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in x.as_chunks::<LANES>().0 {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = larger(x, *lane);
        }
    }
    lanes.into_iter().fold(f32::NEG_INFINITY, larger)
}
