//! Which linear gets which width: the least sum of predicted losses within a number of bytes.
//!
//! Widths of a linear that are not on the lower convex hull of (bytes, loss) are never best for any price of a byte. With a
//! price, each linear takes its own best width (Lagrange); lowering the price from infinity takes the steps of all hulls in
//! the order of what they gain for a byte. Steps are taken while they fit, and where one does not, smaller ones that do are
//! looked for after it. The sum is within the gain of one step of the optimum.

/// One width of a linear: what it takes and what it is predicted to cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Bytes in the image.
    pub bytes: u64,
    /// Nats a token.
    pub loss: f64,
}

/// The index of the choice of each linear, or `None` if even the smallest do not fit.
///
/// # Panics
/// If a linear has no choices.
pub fn allocate(linears: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = linears.iter().map(|choices| hull(choices)).collect();
    let mut at = vec![0; linears.len()];
    let bytes = |i: usize, place: usize| linears[i][hulls[i][place]].bytes;
    let mut left = budget.checked_sub((0..linears.len()).map(|i| bytes(i, 0)).sum())?;
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (i, hull) in hulls.iter().enumerate() {
        for place in 1..hull.len() {
            let (from, to) = (linears[i][hull[place - 1]], linears[i][hull[place]]);
            steps.push(((from.loss - to.loss) / (to.bytes - from.bytes) as f64, i, place));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, i, place) in steps {
        // The steps of one hull come in its order; after one that did not fit, the next starts further down and is larger.
        let more = bytes(i, place) - bytes(i, at[i]);
        if more <= left {
            left -= more;
            at[i] = place;
        }
    }
    Some(at.iter().zip(&hulls).map(|(&place, hull)| hull[place]).collect())
}

/// The choices on the lower convex hull, from the smallest on.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    let key = |i: &usize| choices[*i];
    order.sort_by(|a, b| key(a).bytes.cmp(&key(b).bytes).then(key(a).loss.total_cmp(&key(b).loss)));
    let mut hull: Vec<usize> = Vec::new();
    for i in order {
        let new = choices[i];
        if hull.last().is_some_and(|&last| new.loss >= choices[last].loss || new.bytes == choices[last].bytes) {
            continue;
        }
        let slope = |a: Choice, b: Choice| (a.loss - b.loss) / (b.bytes - a.bytes) as f64;
        while let [.., a, b] = hull[..]
            && slope(choices[a], choices[b]) <= slope(choices[b], new)
        {
            hull.pop();
        }
        hull.push(i);
    }
    assert!(!hull.is_empty(), "a linear has a width");
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64) -> impl FnMut() -> f64 {
        let mut x = seed;
        move || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 40) as f64 / f64::from(1 << 24)
        }
    }

    fn sum(linears: &[Vec<Choice>], at: &[usize]) -> (u64, f64) {
        linears.iter().zip(at).fold((0, 0.0), |(b, l), (c, &i)| (b + c[i].bytes, l + c[i].loss))
    }

    /// Every combination: the allocation fits, and is within one step of the best.
    #[test]
    fn near_the_best_of_all_combinations() {
        for seed in 0..200 {
            let mut next = random(seed);
            let linears: Vec<Vec<Choice>> = (0..5)
                .map(|_| {
                    let size = 1.0 + 9.0 * next();
                    let hurt = next();
                    [2.0, 3.0, 4.0, 8.0]
                        .map(|bits| Choice {
                            bytes: (size * bits * 10.0) as u64,
                            loss: hurt * libm::exp2(-2.0 * bits) * (0.5 + next()),
                        })
                        .into()
                })
                .collect();
            let (low, high) = (sum(&linears, &[0; 5]).0, sum(&linears, &[3; 5]).0);
            let budget = low + ((high - low) as f64 * next()) as u64;
            let found = sum(&linears, &allocate(&linears, budget).unwrap());
            let all = (0..4usize.pow(5)).map(|n| core::array::from_fn::<_, 5, _>(|i| n / 4usize.pow(i as u32) % 4));
            let best = all.map(|at| sum(&linears, &at)).filter(|s| s.0 <= budget).map(|s| s.1).fold(f64::MAX, f64::min);
            let step =
                linears.iter().flat_map(|c| c.windows(2).map(|w| (w[0].loss - w[1].loss).abs())).fold(0.0, f64::max);
            assert!(found.0 <= budget, "seed {seed}");
            assert!(found.1 >= best && found.1 <= best + step, "seed {seed}: {found:?}, best {best}, step {step}");
        }
    }

    #[test]
    fn what_does_not_fit_is_no_plan() {
        let one = vec![vec![Choice { bytes: 10, loss: 1.0 }, Choice { bytes: 20, loss: 0.0 }]];
        assert_eq!(allocate(&one, 9), None);
        assert_eq!(allocate(&one, 10), Some(vec![0]));
        assert_eq!(allocate(&one, 19), Some(vec![0]));
        assert_eq!(allocate(&one, 20), Some(vec![1]));
    }

    /// A width that is larger and no better is never taken, and equal ones go to the first.
    #[test]
    fn widths_that_do_not_help_are_left() {
        let c = |bytes, loss| Choice { bytes, loss };
        assert_eq!(hull(&[c(1, 5.0), c(2, 6.0), c(3, 1.0), c(3, 1.0)]), [0, 2]);
        assert_eq!(hull(&[c(1, 3.0), c(2, 2.9), c(3, 0.0)]), [0, 2]);
    }
}
