//! The floating-point half of the contract against other implementations: the `half` crate, and plain sums in f64.
mod common;

use bitnet_kernel::float::{self, Arrays, Cache, LANES};
use bitnet_kernel::{Block, Format, Matrix, format};
use common::Lcg;
use proptest::prelude::*;

/// The sign bit of a half, and the bits of the smallest infinity.
const SIGN: u16 = 0x8000;
const INFINITE: u16 = 0x7c00;

/// Uniform in -1 to 1.
fn uniform(lcg: &mut Lcg) -> f32 {
    lcg.next() as f32 / 16_384.0 - 1.0
}

fn vector(n: usize, lcg: &mut Lcg) -> Vec<f32> {
    (0..n).map(|_| uniform(lcg)).collect()
}

#[test]
fn every_finite_half_is_exact_and_comes_back() {
    for bits in (0..INFINITE).flat_map(|bits| [bits, bits | SIGN]) {
        let want = half::f16::from_bits(bits).to_f32();
        assert_eq!(float::f16_to_f32(bits).to_bits(), want.to_bits(), "{bits:#06x}");
        assert_eq!(float::f32_to_f16(want), bits, "{bits:#06x}");
    }
}

/// As documented: infinities and NaN become large finite numbers, so that no cache can hold what poisons a sum.
#[test]
fn other_halves_come_out_finite() {
    for bits in (INFINITE..SIGN).flat_map(|bits| [bits, bits | SIGN]) {
        let value = float::f16_to_f32(bits);
        assert!(value.is_finite() && value.abs() >= 65_536.0, "{bits:#06x} is {value}");
    }
}

/// The nearest half by the `half` crate, but for what `f32_to_f16` documents: it saturates where that gives infinity, and
/// NaN is always the same one.
fn check_f32_to_f16(x: f32) {
    let nearest = half::f16::from_f32(x);
    let sign = nearest.to_bits() & SIGN;
    let want = match nearest {
        n if n.is_nan() => sign | 0x7e00,
        n if n.is_infinite() => sign | 0x7bff,
        n => n.to_bits(),
    };
    assert_eq!(float::f32_to_f16(x), want, "{x:e}, bits {:#010x}", x.to_bits());
}

/// All halves, all numbers midway between two of them, and the neighbours of either.
#[test]
fn f32_to_f16_rounds_halves_to_even() {
    for bits in 0..INFINITE {
        let (here, next) = (float::f16_to_f32(bits), float::f16_to_f32(bits + 1));
        for x in [here, (here + next) / 2.0] {
            for x in [x.next_down(), x, x.next_up()] {
                check_f32_to_f16(x);
                check_f32_to_f16(-x);
            }
        }
    }
}

#[test]
fn f32_to_f16_at_the_edges() {
    for (x, bits) in [
        (0.0, 0),
        (-0.0, SIGN),
        (65_504.0, 0x7bff),
        (65_519.996, 0x7bff),
        // Halfway to a number that a half cannot hold, and beyond: the largest one.
        (65_520.0, 0x7bff),
        (-65_520.0, SIGN | 0x7bff),
        (f32::MAX, 0x7bff),
        (f32::INFINITY, 0x7bff),
        (f32::NEG_INFINITY, SIGN | 0x7bff),
        (f32::NAN, 0x7e00),
        // Half of the smallest subnormal half is a tie, and goes to the even zero.
        (2.0f32.powi(-25), 0),
        (2.0f32.powi(-25).next_up(), 1),
        (2.0f32.powi(-24), 1),
        (f32::MIN_POSITIVE, 0),
        (f32::from_bits(1), 0),
    ] {
        assert_eq!(float::f32_to_f16(x), bits, "{x:e}");
        check_f32_to_f16(x);
    }
    // A NaN whose bits beyond the half's are all zero must not become an infinity.
    for bits in [0x7f80_0001, 0x7fff_ffff, 0xff80_0001, 0xffff_ffff] {
        check_f32_to_f16(f32::from_bits(bits));
    }
}

#[test]
fn f32_to_f16_of_any_bits() {
    let mut lcg = Lcg(6);
    for _ in 0..400_000 {
        check_f32_to_f16(f32::from_bits(lcg.next() << 17 ^ lcg.next() << 8 ^ lcg.next()));
    }
}

/// The definition in f64: the scale and each product are rounded to f32 once, then to an integer.
fn plain_quantize(x: &[f32]) -> (f32, Vec<i8>) {
    let absmax = x.iter().fold(0.0, |max: f64, &x| max.max(f64::from(x).abs()));
    let scale = (127.0 / absmax.max(f64::from(1e-5f32))) as f32;
    let code = |&x: &f32| f64::from((f64::from(x) * f64::from(scale)) as f32).round_ties_even() as i8;
    (scale, x.iter().map(code).collect())
}

/// Both results, and zeros in what is left of `q`.
fn check_quantize(x: &[f32]) {
    let mut q = vec![1; x.len() + 37];
    let scale = float::quantize(x, &mut q).expect("all are finite");
    let (want_scale, want) = plain_quantize(x);
    assert_eq!(scale.to_bits(), want_scale.to_bits(), "{scale} is not {want_scale}");
    assert_eq!(q[..x.len()], want);
    assert_eq!(q[x.len()..], [0; 37]);
}

#[test]
fn quantize_is_the_plain_one() {
    let mut lcg = Lcg(7);
    for n in [0, 1, 2, 15, 16, 17, 255, 1_000, 6_912] {
        for magnitude in [1.0, 1e-30, 9e-6, 1.1e-5, 127.0, 3e4, f32::MAX] {
            let x: Vec<f32> = (0..n).map(|_| uniform(&mut lcg) * magnitude).collect();
            check_quantize(&x);
        }
    }
}

#[test]
fn quantize_rounds_halves_to_even() {
    // The scale is one, so these are ties: -126.5, -125.5, …
    let ties: Vec<f32> = (-127..127).map(|i| i as f32 + 0.5).chain([127.0]).collect();
    check_quantize(&ties);
    let mut q = [0; 5];
    assert_eq!(float::quantize(&[0.5, 1.5, 2.5, -0.5, 127.0], &mut q), Some(1.0));
    assert_eq!(q, [0, 2, 2, 0, 127]);
}

#[test]
fn quantize_of_zeros_has_a_scale_and_no_codes() {
    let mut q = [1; 9];
    assert_eq!(float::quantize(&[0.0, -0.0, 0.0], &mut q), Some(127.0 / 1e-5));
    assert_eq!(q, [0; 9]);
    check_quantize(&[0.0; 70]);
    check_quantize(&[f32::from_bits(1), -f32::from_bits(1)]);
}

#[test]
fn quantize_refuses_what_is_not_finite() {
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7f80_0001)] {
        for at in [0, 15, 16, 39] {
            let mut x = [1.0; 40];
            x[at] = bad;
            assert_eq!(float::quantize(&x, &mut [0; 40]), None, "{bad} at {at}");
        }
    }
}

proptest! {
    #[test]
    fn quantize_of_any_finite_numbers(x in prop::collection::vec(prop::num::f32::NORMAL | prop::num::f32::SUBNORMAL, 1..80)) {
        check_quantize(&x);
    }
}

/// The sum of terms in `lanes` lanes, added by `fold`.
fn sum_in_lanes(terms: &[f32], lanes: usize, fold: impl Fn(&[f32]) -> f32) -> f32 {
    let mut sums = vec![0.0; lanes];
    for (i, term) in terms.iter().enumerate() {
        sums[i % lanes] += term;
    }
    fold(&sums)
}

/// The two halves on each other until one lane is left: the tree of the contract.
fn by_halves(sums: &[f32]) -> f32 {
    match sums {
        [sum] => *sum,
        _ => {
            let (low, high) = sums.split_at(sums.len() / 2);
            by_halves(&low.iter().zip(high).map(|(a, b)| a + b).collect::<Vec<_>>())
        }
    }
}

/// Neighbours on each other: another tree.
fn by_neighbours(sums: &[f32]) -> f32 {
    match sums {
        [sum] => *sum,
        _ => by_neighbours(&sums.chunks_exact(2).map(|pair| pair[0] + pair[1]).collect::<Vec<_>>()),
    }
}

/// Each sum in the defined order, and the bits of one of them as a number.
#[test]
fn sums_are_taken_in_sixteen_lanes() {
    let mut lcg = Lcg(8);
    for n in [0, 1, 15, 16, 17, 31, 32, 33, 100, 1_000] {
        let (a, b) = (vector(n, &mut lcg), vector(n, &mut lcg));
        let terms: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a * b).collect();
        assert_eq!(float::dot(&a, &b).to_bits(), sum_in_lanes(&terms, LANES, by_halves).to_bits(), "{n} terms");
        let squares: Vec<f32> = a.iter().map(|a| a * a).collect();
        assert_eq!(float::sum_of_squares(&a).to_bits(), sum_in_lanes(&squares, LANES, by_halves).to_bits());
    }
}

/// A vector for which every other order gives other bits, so that the test above cannot pass by accident.
#[test]
fn another_order_gives_other_bits() {
    let mut lcg = Lcg(9);
    let (a, b) = (vector(1_000, &mut lcg), vector(1_000, &mut lcg));
    let terms: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a * b).collect();
    let dot = float::dot(&a, &b);
    assert_eq!(dot.to_bits(), 0x3fbdc82c, "the bits of the defined order");
    for (other, order) in [
        (terms.iter().sum(), "one after the other"),
        (terms.iter().rev().sum(), "from the end"),
        (sum_in_lanes(&terms, 4, by_halves), "4 lanes"),
        (sum_in_lanes(&terms, 8, by_halves), "8 lanes"),
        (sum_in_lanes(&terms, 32, by_halves), "32 lanes"),
        (sum_in_lanes(&terms, LANES, by_neighbours), "neighbours"),
        (sum_in_lanes(&terms, LANES, |sums| sums.iter().sum()), "lanes one after the other"),
        (a.iter().zip(&b).fold(0.0, |sum, (a, b)| a.mul_add(*b, sum)), "fused"),
    ] {
        let other: f32 = other;
        assert!((other - dot).abs() < 1e-4, "{order}: {other} is far from {dot}");
        assert_ne!(other.to_bits(), dot.to_bits(), "{order}");
    }
}

#[test]
fn halves_are_multiplied_as_their_values_are() {
    let mut lcg = Lcg(10);
    for (rows, cols) in [(1, 1), (4, 32), (5, 33), (7, 47), (3, 48), (9, 300)] {
        let halves: Vec<u16> = (0..rows * cols).map(|_| float::f32_to_f16(uniform(&mut lcg))).collect();
        let mut blocks = vec![Block::ZERO; Format::F16.matrix_blocks(rows, cols)];
        format::encode_f16(rows, cols, &mut blocks, |r, c| halves[r * cols + c]);
        let x = vector(cols, &mut lcg);
        let mut y = vec![0.0; rows];
        let w = Matrix::new(Format::F16, rows, cols, &blocks).expect("the blocks of the shape");
        float::matvec_f16(w, &x, &mut y);
        for (row, y) in halves.chunks_exact(cols).zip(y) {
            let row: Vec<f32> = row.iter().map(|&bits| half::f16::from_bits(bits).to_f32()).collect();
            assert_eq!(y.to_bits(), float::dot(&row, &x).to_bits(), "{rows}x{cols}");
        }
    }
}

/// How far `float::exp` is from `eˣ`, in units in the last place of the result.
fn error_of_exp(x: f32) -> f64 {
    let (got, want) = (f64::from(float::exp(x)), libm::exp(f64::from(x)));
    let exponent = want.log2().floor().max(-126.0);
    (got - want).abs() / (exponent - 23.0).exp2()
}

#[test]
fn exp_is_within_a_unit_in_the_last_place() {
    // Every 997th number from the smallest to those whose results are too small or too large, and all around the places where
    // `n` changes and the result becomes subnormal, zero or infinite.
    let grid = (0..103.9f32.to_bits()).step_by(997).map(f32::from_bits).flat_map(|x| [x, -x]);
    let changes = (-150..=128).map(|n| (f64::from(n) + 0.5) * core::f64::consts::LN_2);
    let edges = [-103.28, -87.336_55, -87.0, 0.0, 88.0, 88.722_84];
    let near = changes.chain(edges).flat_map(|x| {
        let bits = (x as f32).to_bits();
        (bits.saturating_sub(200)..bits + 200).map(f32::from_bits)
    });
    let worst = grid.chain(near).filter(|x| *x <= 88.722_83).map(|x| (error_of_exp(x), x));
    let (error, x) = worst.max_by(|a, b| a.0.total_cmp(&b.0)).unwrap();
    println!("exp: at most {error} units in the last place, at {x}");
    assert!(error < 1.1, "{error} at {x}");
}

#[test]
fn exp_at_the_extremes() {
    for (x, want) in [
        (0.0, 1.0),
        (-0.0, 1.0),
        (f32::MIN_POSITIVE, 1.0),
        (-f32::from_bits(1), 1.0),
        (88.722_84, f32::INFINITY),
        (100.0, f32::INFINITY),
        (f32::MAX, f32::INFINITY),
        (f32::INFINITY, f32::INFINITY),
        (-103.98, 0.0),
        (-200.0, 0.0),
        (f32::MIN, 0.0),
        (f32::NEG_INFINITY, 0.0),
    ] {
        assert_eq!(float::exp(x).to_bits(), f32::to_bits(want), "exp({x:e}) is {:e}", float::exp(x));
    }
    for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001), f32::from_bits(0xffff_ffff)] {
        assert!(float::exp(nan).is_nan());
    }
    assert_eq!(float::exp(-103.0).to_bits(), 1, "the smallest subnormal number");
}

#[test]
fn activations_are_those_of_their_definitions() {
    let gate: Vec<f32> = (-2_000..=2_000).map(|i| i as f32 / 20.0).chain([f32::MAX, f32::MIN, -0.0]).collect();
    let up: Vec<f32> = (0..gate.len()).map(|i| 1.0 - i as f32 / 1_000.0).collect();
    let mut out = vec![f32::NAN; gate.len()];
    float::silu(&gate, &up, &mut out);
    for ((&gate, &up), &got) in gate.iter().zip(&up).zip(&out).filter(|((gate, _), _)| gate.abs() < 1e3) {
        let want = f64::from(gate) / (1.0 + (-f64::from(gate)).exp()) * f64::from(up);
        // Where the exponential is infinite the result is zero.
        assert!((f64::from(got) - want).abs() <= 4e-7 * want.abs() + 1e-30, "silu({gate}) · {up} is {got}, not {want}");
    }
    float::squared_relu(&gate, &up, &mut out);
    for ((gate, up), got) in gate.iter().zip(&up).zip(&out) {
        let positive = gate.max(0.0);
        assert_eq!(*got, positive * positive * up, "{gate}");
    }
    // What is not a number must stay none: the pass finds it at the next quantization.
    for f in [float::silu, float::squared_relu] {
        f(&[f32::NAN, 1.0], &[1.0, f32::NAN], &mut out);
        assert!(out[0].is_nan() && out[1].is_nan());
    }
}

#[test]
fn rmsnorm_is_the_plain_one() {
    let mut lcg = Lcg(12);
    for n in [1, 15, 16, 17, 768, 6_912] {
        for magnitude in [1e-8, 1.0, 1e12] {
            let x: Vec<f32> = (0..n).map(|_| uniform(&mut lcg) * magnitude).collect();
            let weight = vector(n, &mut lcg);
            let mean = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / n as f64;
            let mut got = x.clone();
            float::rmsnorm(&mut got, &weight, 1e-5);
            for ((x, w), got) in x.iter().zip(&weight).zip(got) {
                let want = f64::from(*x) / (mean + 1e-5).sqrt() * f64::from(*w);
                assert!((f64::from(got) - want).abs() <= 2e-6 * want.abs(), "{got} is not {want}");
            }
        }
    }
    let mut x = [1.0, f32::MAX];
    float::rmsnorm(&mut x, &[1.0; 2], 1e-5);
    assert!(x.iter().all(|x| x.is_nan()), "a mean beyond the range of f32");
}

/// A cache of one kind, and what it stands for.
struct Rows {
    floats: Vec<f32>,
    halves: Vec<u16>,
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl Rows {
    fn new(positions: usize, head_dim: usize, lcg: &mut Lcg) -> Self {
        let floats = vector(positions * head_dim, lcg);
        let halves = floats.iter().map(|&x| float::f32_to_f16(x)).collect();
        let codes = (0..positions * head_dim).map(|_| (lcg.next() >> 3) as u8 as i8).collect();
        // As a cache holds them: what makes the largest code the largest value.
        let scales = (0..positions).map(|_| (1.0 + uniform(lcg) / 2.0) / 127.0).collect();
        Self { floats, halves, codes, scales }
    }
    fn caches(&self) -> [Cache<'_>; 3] {
        let Self { floats, halves, codes, scales } = self;
        [Cache::F32(floats), Cache::F16(halves), Cache::I8 { codes, scales }]
    }
}

fn values_of(cache: Cache<'_>, head_dim: usize) -> Vec<f64> {
    match cache {
        Cache::F32(rows) => rows.iter().map(|&x| f64::from(x)).collect(),
        Cache::F16(rows) => rows.iter().map(|&x| half::f16::from_bits(x).to_f64()).collect(),
        Cache::I8 { codes, scales } => {
            let rows = codes.chunks_exact(head_dim).zip(scales);
            rows.flat_map(|(row, &scale)| row.iter().map(move |&x| f64::from(x) * f64::from(scale))).collect()
        }
    }
}

/// Scores first, then weights, then the sum: in f64, over everything at once.
fn plain_attend(q: &[f32], keys: &[f64], values: &[f64], scale: f32) -> Vec<f64> {
    let dot = |row: &[f64]| row.iter().zip(q).map(|(k, &q)| k * f64::from(q)).sum::<f64>() * f64::from(scale);
    let scores: Vec<f64> = keys.chunks_exact(q.len()).map(dot).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let weighted = |i: usize| values.chunks_exact(q.len()).zip(&weights).map(|(row, w)| row[i] * w).sum::<f64>();
    (0..q.len()).map(|i| weighted(i) / total).collect()
}

#[test]
fn attention_is_the_plain_softmax() {
    let mut lcg = Lcg(11);
    for (head_dim, positions) in [(8, 1), (64, 2), (20, 63), (64, 64), (18, 65), (128, 128), (80, 300)] {
        let (keys, values) = (Rows::new(positions, head_dim, &mut lcg), Rows::new(positions, head_dim, &mut lcg));
        let q = vector(head_dim, &mut lcg);
        // From weights that are nearly alike to a few that take all.
        for scale in [0.0, 1.0 / (head_dim as f32).sqrt(), 2.0] {
            for keys in keys.caches() {
                for values in values.caches() {
                    let mut out = vec![f32::NAN; head_dim];
                    float::attend(Arrays, &q, keys, values, scale, &mut out);
                    let want = plain_attend(&q, &values_of(keys, head_dim), &values_of(values, head_dim), scale);
                    for (got, want) in out.iter().zip(want) {
                        let case = format!("{positions} positions of {head_dim}, scale {scale}");
                        assert!((f64::from(*got) - want).abs() < 1e-5, "{case}: {got} is not {want}");
                    }
                }
            }
        }
    }
}

/// The exponentials of such scores are beyond f32, their quotients are not. The largest score stands in the first run of
/// positions, in the middle or at the end, so that sums of earlier runs are made smaller or not.
#[test]
fn attention_survives_large_scores() {
    for best in [0, 70, 199] {
        let keys: Vec<f32> = (0..200).map(|i| if i == best { 1e4 } else { 1e4 - 200.0 - i as f32 }).collect();
        let values: Vec<f32> = (0..200).map(|i| i as f32).collect();
        let mut out = [0.0];
        float::attend(Arrays, &[1.0], Cache::F32(&keys), Cache::F32(&values), 1.0, &mut out);
        assert_eq!(out, [best as f32]);
    }
}

#[test]
#[should_panic(expected = "n > 0")]
fn attention_over_nothing_is_refused() {
    float::attend(Arrays, &[1.0], Cache::F32(&[]), Cache::F32(&[]), 1.0, &mut [0.0]);
}

/// Four steps of a short convolution, against the sum over what was put in.
#[test]
fn a_convolution_remembers_three_inputs() {
    let mut lcg = Lcg(31);
    for n in [1, 7, 16, 40] {
        let taps = vector(4 * n, &mut lcg);
        let inputs: Vec<Vec<f32>> = (0..6).map(|_| vector(n, &mut lcg)).collect();
        let mut past = vec![0.0; 3 * n];
        for t in 0..inputs.len() {
            let (mut x, mut linear) = (inputs[t].clone(), inputs[t].clone());
            float::convolve(&mut past.clone(), &taps, &mut linear);
            float::convolve_silu(&mut past, &taps, &mut x);
            for (i, (got, linear)) in x.iter().zip(linear).enumerate() {
                let y: f64 =
                    (0..4.min(t + 1)).map(|j| f64::from(taps[(3 - j) * n + i]) * f64::from(inputs[t - j][i])).sum();
                let want = y / (1.0 + (-y).exp());
                assert!((f64::from(linear) - y).abs() <= 1e-6, "{linear} is not {y}");
                assert!((f64::from(*got) - want).abs() <= 1e-6, "{got} is not {want}");
            }
        }
    }
}

/// Rows of a state, against the matrix equation in f64: `S = alpha (I - beta k kᵀ) S + beta k vᵀ`, `o = Sᵀ q`.
#[test]
fn the_delta_rule_is_its_matrix_equation() {
    let mut lcg = Lcg(41);
    for (keys, values) in [(5, 3), (16, 8), (64, 4)] {
        let mut rows = vec![vec![0.0f32; keys]; values];
        let mut matrix = vec![vec![0.0f64; values]; keys];
        for _ in 0..20 {
            let (key, query, value) = (vector(keys, &mut lcg), vector(keys, &mut lcg), vector(values, &mut lcg));
            let scale = 1.0 / key.iter().map(|k| k * k).sum::<f32>().sqrt();
            let key: Vec<f32> = key.iter().map(|k| k * scale).collect();
            let (alpha, beta) = (0.5 + 0.5 * uniform(&mut lcg).abs(), uniform(&mut lcg).abs());
            let [a, b] = [alpha, beta].map(f64::from);
            for j in 0..values {
                let recalled: f64 = (0..keys).map(|i| f64::from(key[i]) * matrix[i][j]).sum();
                for i in 0..keys {
                    let k = f64::from(key[i]);
                    matrix[i][j] = a * (matrix[i][j] - b * k * recalled) + b * k * f64::from(value[j]);
                }
                float::delta_rule(&mut rows[j], &key, alpha, beta, value[j]);
                let got = float::dot(&rows[j], &query);
                let want: f64 = (0..keys).map(|i| matrix[i][j] * f64::from(query[i])).sum();
                assert!((f64::from(got) - want).abs() <= 1e-5, "{got} is not {want}");
            }
        }
    }
}

proptest! {
    /// Four bits: each code is the nearest of -8 to 7, and the mean magnitude becomes the square root of seven.
    #[test]
    fn four_bits_are_nearest(x in prop::collection::vec(-1e3f32..1e3, 1..200)) {
        let mut q = vec![1; x.len() + 3];
        let s = float::quantize_int4(&x, &mut q).unwrap();
        let mean = x.iter().map(|x| f64::from(x.abs())).sum::<f64>() / x.len() as f64;
        prop_assert!((f64::from(s) * mean.max(1e-5) - 7f64.sqrt()).abs() < 1e-4);
        for (x, q) in x.iter().zip(&q) {
            prop_assert_eq!(f32::from(*q), (x * s).round_ties_even().clamp(-8.0, 7.0));
        }
        prop_assert_eq!(&q[x.len()..], &[0; 3]);
    }

    /// Four bits by the largest magnitude: each code is the nearest, and that of the largest is seven.
    #[test]
    fn four_bits_by_the_largest_are_nearest(x in prop::collection::vec(-1e3f32..1e3, 1..200)) {
        let mut q = vec![1; x.len() + 3];
        let s = float::quantize_int4_absmax(&x, &mut q).unwrap();
        let max = x.iter().fold(0.0f32, |max, x| x.abs().max(max));
        prop_assert_eq!(s, 7.0 / max.max(1e-5));
        for (x, q) in x.iter().zip(&q) {
            prop_assert_eq!(f32::from(*q), (x * s).round_ties_even());
            prop_assert!(q.abs() == 7 || x.abs() < max || max < 1e-5);
        }
        prop_assert_eq!(&q[x.len()..], &[0; 3]);
    }

    /// Floats of four bits: each is the nearest of those that there are, of two as near the one whose mantissa is even.
    #[test]
    fn floats_of_four_bits_are_nearest(x in prop::collection::vec(-1e3f32..1e3, 1..200)) {
        const FLOATS: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];
        let mut q = vec![1; x.len() + 3];
        let s = float::quantize_fp4(&x, &mut q).unwrap();
        prop_assert_eq!(s, 12.0 / x.iter().fold(0.0f32, |max, x| x.abs().max(max)).max(1e-5));
        for (x, q) in x.iter().zip(&q) {
            let y = x * s;
            let far = |i: &usize| (y.abs() - FLOATS[*i]).abs();
            let nearest = (0..8).min_by(|a, b| far(a).total_cmp(&far(b)).then((a % 2).cmp(&(b % 2)))).unwrap();
            prop_assert_eq!(f32::from(*q), FLOATS[nearest].copysign(y) + 0.0);
        }
        prop_assert_eq!(&q[x.len()..], &[0; 3]);
    }

    /// The rotation is by the Hadamard matrix of each run, in f64, and undoes itself.
    #[test]
    fn a_rotation_is_by_a_hadamard_matrix(runs in 1usize..4, levels in 0u32..7, seed in 0u32..1000) {
        let odd = 2 * runs - 1;
        let n = 1 << levels;
        let x = vector(odd * n, &mut Lcg(seed));
        let mut got = x.clone();
        float::hadamard(&mut got);
        for (run, got) in x.chunks(n).zip(got.chunks(n)) {
            for (i, got) in got.iter().enumerate() {
                let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
                let want: f64 = run.iter().enumerate().map(|(j, x)| sign(j) * f64::from(*x)).sum();
                prop_assert!((f64::from(*got) - want / (n as f64).sqrt()).abs() < 1e-5);
            }
        }
        float::hadamard(&mut got);
        prop_assert!(x.iter().zip(&got).all(|(x, got)| (x - got).abs() < 1e-5));
    }

    /// The half that is kept is that of a stable sort by magnitude. Few values, so that many are equal.
    #[test]
    fn the_largest_half_is_that_of_a_stable_sort(x in prop::collection::vec(-6i8..6, 1..120)) {
        let floats: Vec<f32> = x.iter().map(|&x| f32::from(x) / 4.0).collect();
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by_key(|&i| core::cmp::Reverse(x[i].abs()));
        let mut want = vec![0; x.len()];
        order[..x.len().div_ceil(2)].iter().for_each(|&i| want[i] = x[i]);
        let mut got = x.clone();
        float::keep_largest_half(&floats, &mut got);
        prop_assert_eq!(got, want);
    }
}

#[test]
fn four_bits_need_finite_numbers() {
    assert_eq!(float::quantize_int4(&[1.0, f32::NAN], &mut [0; 2]), None);
    assert_eq!(float::quantize_int4_absmax(&[1.0, f32::NAN], &mut [0; 2]), None);
    assert_eq!(float::quantize_fp4(&[1.0, f32::NAN], &mut [0; 2]), None);
    assert_eq!(float::quantize_fp4(&[1.0, f32::NEG_INFINITY], &mut [0; 2]), None);
    let mut q = [1; 5];
    assert_eq!(float::quantize_int4_absmax(&[f32::MAX, 0.5e38, -0.9e38, -f32::MAX], &mut q), Some(7.0 / f32::MAX));
    assert_eq!(q, [7, 1, -2, -7, 0]);
    assert_eq!(float::quantize_int4_absmax(&[0.0, 1e-9], &mut q[..2]), Some(7e5));
    assert_eq!(float::quantize_int4(&[f32::MAX, f32::MAX], &mut [0; 2]), None, "a mean beyond the range of f32");
}
