//! Quantization in which each column makes up for the errors of those before it (GPTQ, Frantar et al. 2022,
//! arXiv:2210.17323), with a scale for every 128 columns of a row.
//!
//! GPTQ takes columns in their order and, after each, moves all that are left to where they make up best for its error, by the
//! inverse of `H`, the mean of `x xᵀ`. With `H = R Rᵀ`, `R` upper triangular, the error of a row `e` is `|Rᵀ e|²`, and its `j`-th
//! term holds the errors up to `j` alone; so the best place for a column is where its term vanishes:
//! `w_j + Σ_{k<j} R_kj e_k / R_jj`. That is the same step without an inverse (Babai's nearest plane), and the sums over earlier
//! groups of columns are one product of matrices.
use super::matmul::{View, parallel, product};
use crate::quantize::Levels;
use bitnet_kernel::Format;
use half::f16;
use pulp::Arch;

/// Rows that a thread takes together.
const ROWS: usize = 32;
/// What is added to the diagonal of `H`, as a part of its mean. As in the paper.
pub const DAMPING: f32 = 0.01;

/// `R` with `H = R Rᵀ`, upper triangular.
#[derive(Clone, Debug)]
pub struct Factor {
    n: usize,
    values: Vec<f32>,
}

impl Factor {
    /// Factors a damped `H`, `[n, n]`; `None` if it is zero, not finite or not positive.
    pub fn new(h: &[f32], n: usize) -> Option<Self> {
        assert_eq!(h.len(), n * n);
        let mean = h.iter().step_by(n + 1).map(|v| f64::from(*v)).sum::<f64>() / n as f64;
        let damp = (mean * f64::from(DAMPING)) as f32;
        if !(damp > 0.0 && damp.is_finite()) {
            return None;
        }
        let mut r = vec![0.0; n * n];
        let arch = Arch::new();
        for j in (0..n).rev() {
            let (above, from) = r.split_at_mut(j * n);
            let row = &mut from[..n];
            let pivot = f64::from(h[j * n + j]) + f64::from(damp) - arch.dispatch(|| dot(&row[j + 1..], &row[j + 1..]));
            if pivot.is_nan() || pivot <= 0.0 {
                return None;
            }
            let pivot = pivot.sqrt();
            row[j] = pivot as f32;
            let row = &from[..n];
            arch.dispatch(|| {
                for (i, above) in above.chunks_exact_mut(n).enumerate() {
                    let rest = f64::from(h[i * n + j]) - dot(&above[j + 1..], &row[j + 1..]);
                    above[j] = (rest / pivot) as f32;
                }
            });
        }
        r.iter().all(|v| v.is_finite()).then_some(Self { n, values: r })
    }
    /// The identity: every column for itself.
    pub fn identity(n: usize) -> Self {
        let mut values = vec![0.0; n * n];
        values.iter_mut().step_by(n + 1).for_each(|v| *v = 1.0);
        Self { n, values }
    }
}

/// In one order of summation: eight lanes.
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0f64; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
            *lane += f64::from(*a) * f64::from(*b);
        }
    }
    for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
        *lane += f64::from(*a) * f64::from(*b);
    }
    lanes.iter().sum()
}

/// Codes, `[rows, cols]`, and the bits of a half-precision scale for every group of a row, `[rows, groups]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quantized {
    /// Columns.
    pub cols: usize,
    /// Codes.
    pub codes: Vec<i8>,
    /// Scales.
    pub scales: Vec<u16>,
}

impl Quantized {
    /// What the codes stand for.
    pub fn weights(&self) -> Vec<f32> {
        let groups = self.cols.div_ceil(Format::GROUP_COLS);
        let rows = self.codes.chunks_exact(self.cols).zip(self.scales.chunks_exact(groups));
        let mut out = Vec::with_capacity(self.codes.len());
        for (codes, scales) in rows {
            for (codes, scale) in codes.chunks(Format::GROUP_COLS).zip(scales) {
                let scale = f16::from_bits(*scale).to_f32();
                out.extend(codes.iter().map(|&code| f32::from(code) * scale));
            }
        }
        out
    }
}

/// A row's part in one group: `R`'s rows there, `[width, width]`.
struct Group<'a> {
    r: &'a [f32],
    width: usize,
}

/// Quantizes the rows of `weights`, `[rows, n]`, in a grouped format.
///
/// # Panics
/// If the length is not that of whole rows of the factor's width, or the format is not grouped.
pub fn compensate(weights: &[f32], factor: &Factor, format: Format) -> Quantized {
    assert!(format.is_grouped());
    let (n, levels) = (factor.n, Levels::of(format));
    let (rows, groups) = (weights.len() / n, n.div_ceil(Format::GROUP_COLS));
    let mut out = Quantized { cols: n, codes: vec![0; rows * n], scales: vec![0; rows * groups] };
    by_groups(
        weights,
        factor,
        #[inline(always)]
        |group, w, before| {
            let (codes, errors, scale) = group.row(levels, w, before);
            ((codes, scale), errors)
        },
        |row, first, width, (codes, scale): (Columns<i8>, u16)| {
            out.codes[row * n + first..][..width].copy_from_slice(&codes[..width]);
            out.scales[row * groups + first / Format::GROUP_COLS] = scale;
        },
    );
    out
}

/// What becomes of `weights`, `[rows, n]`, if each is rounded by `round` where it makes up for those before it.
///
/// # Panics
/// If the length is not that of whole rows of the factor's width.
pub fn compensate_by(weights: &[f32], factor: &Factor, round: impl Fn(f32) -> f32 + Sync + Send) -> Vec<f32> {
    let mut out = vec![0.0; weights.len()];
    by_groups(
        weights,
        factor,
        #[inline(always)]
        |group, w, before| group.walk(w, before, &round),
        |row, first, width, rounded: Columns<f32>| {
            out[row * factor.n + first..][..width].copy_from_slice(&rounded[..width]);
        },
    );
    out
}

/// Hands each row's part in each group of columns to `row`, which returns its result and its errors `w - q`, and the results to `put`,
/// with the row, the first column and the width.
fn by_groups<T: Send>(
    weights: &[f32],
    factor: &Factor,
    row: impl Fn(&Group<'_>, &[f32], &[f32]) -> (T, Columns<f32>) + Sync + Send,
    mut put: impl FnMut(usize, usize, usize, T),
) {
    let n = factor.n;
    assert!(weights.len().is_multiple_of(n));
    let rows = weights.len() / n;
    let mut errors = vec![0.0f32; rows * n];
    let arch = Arch::new();
    for first in (0..n).step_by(Format::GROUP_COLS) {
        let width = Format::GROUP_COLS.min(n - first);
        let before = match first {
            0 => vec![0.0; rows * width],
            _ => product(
                View::columns(&errors, n, 0, first),
                View::columns(&factor.values[..first * n], n, first, width),
            ),
        };
        let r: Vec<f32> =
            (first..first + width).flat_map(|j| factor.values[j * n + first..][..width].to_vec()).collect();
        let group = Group { r: &r, width };
        let each = |i: usize| {
            let range = i * ROWS..rows.min((i + 1) * ROWS);
            let of = |at: usize| {
                let (w, s) = (&weights[at * n + first..][..width], &before[at * width..][..width]);
                arch.dispatch(
                    #[inline(always)]
                    || row(&group, w, s),
                )
            };
            range.map(of).collect::<Vec<_>>()
        };
        parallel(rows.div_ceil(ROWS), each, |i, results| {
            for (row, (result, error)) in (i * ROWS..).zip(results) {
                errors[row * n + first..][..width].copy_from_slice(&error[..width]);
                put(row, first, width, result);
            }
        });
    }
}

type Columns<T> = [T; Format::GROUP_COLS];

impl Group<'_> {
    /// One row: its codes, its errors `w - q`, and the scale's bits. `before` is `Σ R_kj e_k` over the groups before.
    #[inline(always)]
    fn row(&self, levels: Levels, w: &[f32], before: &[f32]) -> (Columns<i8>, Columns<f32>, u16) {
        // Where the columns would be if nothing more were rounded: the scale is chosen for them.
        let moved = self.walk(w, before, |target| target).1;
        let mut errors = moved;
        let mut at = [0.0; Format::GROUP_COLS];
        at.iter_mut().zip(w).zip(&errors).for_each(|((at, w), e)| *at = w - e);
        let scale = best_scale(&at[..self.width], levels);
        let factor = scale.to_f32();
        let inverse = if factor == 0.0 { 0.0 } else { 1.0 / factor };
        let codes;
        (codes, errors) = self.walk(w, before, |target| levels.nearest(target * inverse) * factor);
        let mut bytes = [0; Format::GROUP_COLS];
        bytes.iter_mut().zip(&codes).for_each(|(byte, q)| *byte = crate::quantize::round(q * inverse) as i8);
        if factor == 0.0 {
            bytes.fill(levels.low() as i8);
        }
        (bytes, errors, scale.to_bits())
    }

    /// Takes column after column to where it makes up for those before it, and hands that to `round`. Returns what it gave, and the
    /// errors.
    #[inline(always)]
    fn walk(&self, w: &[f32], before: &[f32], round: impl Fn(f32) -> f32) -> (Columns<f32>, Columns<f32>) {
        let (mut sums, mut errors, mut rounded) =
            ([0.0; Format::GROUP_COLS], [0.0; Format::GROUP_COLS], [0.0; Format::GROUP_COLS]);
        sums[..self.width].copy_from_slice(before);
        for j in 0..self.width {
            let r = &self.r[j * self.width..][..self.width];
            rounded[j] = round(w[j] + sums[j] / r[j]);
            let e = w[j] - rounded[j];
            errors[j] = e;
            sums[j + 1..self.width].iter_mut().zip(&r[j + 1..]).for_each(|(sum, r)| *sum += r * e);
        }
        (rounded, errors)
    }
}

/// Scales that are tried, as parts of the one that makes the largest magnitude the lowest level.
const CUTS: (usize, f32) = (16, 0.05);

/// Of scales of both signs the one that leaves the least squared error.
#[inline(always)]
fn best_scale(values: &[f32], levels: Levels) -> f16 {
    let largest = values.iter().fold(0.0f32, |max, v| max.max(v.abs())) / -levels.low();
    let mut best = (f32::INFINITY, f16::ZERO);
    for sign in [1.0, -1.0] {
        for i in 0..CUTS.0 {
            let scale = f16::from_f32(sign * largest * (1.1 - CUTS.1 * i as f32));
            let factor = scale.to_f32();
            if factor == 0.0 || !factor.is_finite() {
                continue;
            }
            let inverse = 1.0 / factor;
            let mut lanes = [0.0f32; 16];
            for part in values.chunks(16) {
                for (lane, v) in lanes.iter_mut().zip(part) {
                    let e = v - levels.nearest(v * inverse) * factor;
                    *lane += e * e;
                }
            }
            let error = lanes.iter().sum::<f32>();
            if error < best.0 {
                best = (error, scale);
            }
        }
    }
    best.1
}

/// `(dW H dWᵀ)_oo` of every row `o`: the mean square of the error of an output.
pub fn output_errors(weights: &[f32], quantized: &[f32], h: &[f32], n: usize) -> Vec<f64> {
    let difference: Vec<f32> = weights.iter().zip(quantized).map(|(w, q)| w - q).collect();
    let by_h = product(View::new(&difference, n), View::new(h, n));
    let rows = difference.chunks_exact(n).zip(by_h.chunks_exact(n));
    rows.map(|(d, h)| d.iter().zip(h).map(|(d, h)| f64::from(*d) * f64::from(*h)).sum::<f64>().max(0.0)).collect()
}

/// The loss that changed weights are predicted to add, in nats a token: `½ Σ_o E[g_o²] (dW H dWᵀ)_oo`.
pub fn predicted_loss(errors: &[f64], fisher: &[f32]) -> f64 {
    0.5 * errors.iter().zip(fisher).map(|(e, f)| e * f64::from(*f)).sum::<f64>()
}

/// The same of rows of an embedding, which tokens read one by one: `½ Σ_t p_t Σ_j E[g_j²] dW_tj²`, with the tokens' `shares` of a
/// text for `p` and squared gradients at what the embedding gives for `E[g²]`.
pub fn predicted_embedding_loss(weights: &[f32], quantized: &[f32], fisher: &[f32], shares: &[f64]) -> f64 {
    let rows = weights.chunks_exact(fisher.len()).zip(quantized.chunks_exact(fisher.len())).zip(shares);
    let row = |((w, q), share): ((&[f32], &[f32]), &f64)| {
        let squares = w.iter().zip(q).zip(fisher).map(|((w, q), f)| f64::from(w - q).powi(2) * f64::from(*f));
        share * squares.sum::<f64>()
    };
    0.5 * rows.map(row).sum::<f64>()
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

    /// The mean of `x xᵀ` of inputs whose columns depend on one another.
    fn moment(n: usize) -> Vec<f32> {
        let tokens = 3 * n;
        let (plain, mix) = (numbers(tokens * 8, 3), numbers(8 * n, 4));
        let mut x = product(View::new(&plain, 8), View::new(&mix, n));
        x.iter_mut().zip(numbers(tokens * n, 5)).for_each(|(x, v)| *x += 0.3 * v);
        let x = View::new(&x, n);
        product(x.t(), x).iter().map(|v| v / tokens as f32).collect()
    }

    #[test]
    fn the_factor_is_the_root_of_h() {
        let n = 70;
        let h = moment(n);
        let factor = Factor::new(&h, n).unwrap();
        let r = View::new(&factor.values, n);
        let damp = h.iter().step_by(n + 1).sum::<f32>() / n as f32 * DAMPING;
        for (i, (found, h)) in product(r, r.t()).iter().zip(&h).enumerate() {
            let expected = h + if i % n == i / n { damp } else { 0.0 };
            assert!((found - expected).abs() < 1e-4, "{i}: {found}, {expected}");
        }
        assert!((1..n).all(|i| factor.values[i * n..][..i].iter().all(|v| *v == 0.0)));
    }

    /// On its own objective it beats rounding, in every format, in whole groups and in one that is cut short; and with
    /// columns that do not depend on one another it is rounding.
    #[test]
    fn errors_are_made_up_for() {
        let (rows, n) = (7, 300);
        let (w, h) = (numbers(rows * n, 9), moment(n));
        let factor = Factor::new(&h, n).unwrap();
        for format in Format::GROUPED {
            let error = |factor: &Factor| {
                let q = compensate(&w, factor, format);
                let (low, high) = format.range();
                assert!(q.codes.iter().all(|c| (low..=high).contains(c)), "{}", format.name());
                output_errors(&w, &q.weights(), &h, n).iter().sum::<f64>()
            };
            let (made_up, rounded) = (error(&factor), error(&Factor::identity(n)));
            println!("{}: {made_up}, rounded {rounded}", format.name());
            assert!(made_up < 0.8 * rounded, "{}: {made_up}, rounded {rounded}", format.name());
        }
    }

    /// A row of zeros, and inputs that are zero or no numbers.
    #[test]
    fn holes() {
        assert!(Factor::new(&[0.0; 9], 3).is_none());
        assert!(Factor::new(&[1.0, f32::NAN, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], 3).is_none());
        // A column that is always zero is held by the damping.
        let factor = Factor::new(&[1.0, 0.0, 0.0, 0.0], 2).unwrap();
        for format in Format::GROUPED {
            let q = compensate(&[0.0, 0.0, 0.5, 0.25], &factor, format);
            assert!(q.weights()[..2].iter().all(|v| *v == 0.0), "{}", format.name());
        }
    }
}
