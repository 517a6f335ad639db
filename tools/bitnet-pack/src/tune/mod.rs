//! Which layout a linear with zeros gets: the one that is fastest on the CPU that will run it, by timing or by a model of costs.
//!
//! Layouts are those of [`crate::kept`]: whole, without rows or columns of zeros or both, without blocks of zeros of either
//! size. Results are the same with all of them, so only time and bytes decide.
mod cost;
mod image;
mod measure;

pub use cost::{Costs, Target};
pub use image::{Retuned, tune};
pub use measure::{Measured, linear_bytes};

use crate::kept::{Found, Zeros};
use bitnet_kernel::Format;
use bitnet_runtime::image::{Kind, Section};
use core::fmt;
use core::fmt::Write as _;

/// A way to store one linear.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Rows of the linear, those of zeros included.
    pub rows: u32,
    /// Its columns.
    pub cols: u32,
    /// The format of weights that are not in blocks.
    pub format: Format,
    /// What is stored.
    pub layout: &'a Found,
}

impl Candidate<'_> {
    /// Bytes that a product reads.
    pub fn bytes(&self) -> u64 {
        self.layout.blocks(self.format, self.rows, self.cols) * 64
    }
}

/// Says what layouts cost.
pub trait Timer {
    /// The cost of a product with each of several layouts of one linear, in one unit: less is better.
    fn costs(&mut self, candidates: &[Candidate<'_>]) -> Vec<f64>;
    /// What the costs are, and whose: "microseconds on avx2, 2 threads".
    fn name(&self) -> String;
}

/// Of layouts whose costs differ by so many hundredths at most, the smallest is chosen: a repeated measurement differs by as
/// much.
const SAME: f64 = 0.02;

/// What was chosen for one linear.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Its layer.
    pub layer: Option<u32>,
    /// Which linear.
    pub kind: Kind,
    /// Each layout's name, cost and bytes.
    pub costs: Vec<(&'static str, f64, u64)>,
    /// Which of them was chosen.
    pub chosen: usize,
}

impl Choice {
    /// The cheapest; of those that are about as cheap, the smallest.
    fn best(costs: &[(&'static str, f64, u64)]) -> usize {
        let least = costs.iter().map(|c| c.1).fold(f64::INFINITY, f64::min);
        let close = |&i: &usize| costs[i].1 <= least * (1.0 + SAME);
        (0..costs.len()).filter(close).min_by_key(|&i| costs[i].2).unwrap_or(0)
    }
}

impl fmt::Display for Choice {
    /// `layer 3 gate: 16x64 (11.0; whole 31.2, rows 20.1)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer} ")?;
        }
        let (name, cost, _) = self.costs[self.chosen];
        write!(f, "{}: {name} ({cost:.1}", self.kind.name())?;
        let mut before = ';';
        for (i, (name, cost, _)) in self.costs.iter().enumerate().filter(|(i, _)| *i != self.chosen) {
            write!(f, "{before} {name} {cost:.1}")?;
            before = ',';
            // Someone asks why the cheapest was not chosen.
            if *cost < self.costs[self.chosen].1 {
                write!(
                    f,
                    " but {:.0} % more bytes",
                    100.0 * (self.costs[i].2 as f64 / self.costs[self.chosen].2 as f64 - 1.0)
                )?;
            }
        }
        f.write_char(')')
    }
}

/// Chooses layouts, one linear after another, and keeps what decided.
#[expect(missing_debug_implementations, reason = "a timer is whatever measures")]
pub struct Tuner<'a> {
    timer: &'a mut dyn Timer,
    choices: Vec<Choice>,
}

impl<'a> Tuner<'a> {
    /// Nothing is chosen yet.
    pub fn new(timer: &'a mut dyn Timer) -> Self {
        Self { timer, choices: Vec::new() }
    }
    /// The layout for a linear of this shape.
    pub fn choose(&mut self, section: &Section, format: Format, zeros: Zeros) -> Found {
        let mut layouts = zeros.layouts(format);
        if layouts.len() == 1 {
            return layouts.remove(0);
        }
        let candidate = |layout| Candidate { rows: section.rows, cols: section.cols, format, layout };
        let candidates: Vec<_> = layouts.iter().map(candidate).collect();
        let costs = self.timer.costs(&candidates);
        let costs: Vec<_> = candidates.iter().zip(costs).map(|(c, cost)| (c.layout.name(), cost, c.bytes())).collect();
        let chosen = Choice::best(&costs);
        self.choices.push(Choice { layer: section.layer, kind: section.kind, costs, chosen });
        layouts.swap_remove(chosen)
    }
    /// All that was chosen.
    pub fn finish(self) -> Tuning {
        Tuning { by: self.timer.name(), choices: self.choices }
    }
}

/// What was chosen for all linears that have a choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tuning {
    /// Where costs come from.
    pub by: String,
    /// The choices.
    pub choices: Vec<Choice>,
}

impl fmt::Display for Tuning {
    /// What the image's header records: a line that says what costs are, and one for each linear.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.choices.is_empty() {
            return writeln!(f, "layouts by {}: no linear has zeros that another layout would leave out", self.by);
        }
        writeln!(f, "layouts by {}; of costs within {:.0} %, the fewest bytes", self.by, 100.0 * SAME)?;
        self.choices.iter().try_for_each(|choice| writeln!(f, "{choice}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cheapest_is_best_unless_a_smaller_one_is_as_cheap() {
        assert_eq!(Choice::best(&[("whole", 10.0, 100), ("rows", 9.0, 50), ("16x16", 9.5, 40)]), 1);
        assert_eq!(Choice::best(&[("whole", 10.0, 100), ("rows", 9.0, 50), ("16x16", 9.1, 40)]), 2);
        assert_eq!(Choice::best(&[("whole", 9.0, 100), ("rows", 9.1, 50)]), 1);
        assert_eq!(Choice::best(&[("whole", f64::NAN, 100)]), 0, "costs that are no numbers choose something");
    }
}
