//! What layouts cost on a CPU that is not at hand.
use super::{Candidate, Timer};
use crate::kept::Found;
use bitnet_kernel::BlockShape;

/// The CPU that an image is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of instruction sets")]
pub enum Target {
    Avx2,
    Avx512,
    Neon,
    Dotprod,
    Sve,
    Sve2,
    /// This one: layouts are timed here.
    Native,
}

impl Target {
    /// All, with the names that options have.
    pub const ALL: [(&'static str, Self); 7] = [
        ("avx2", Self::Avx2),
        ("avx512", Self::Avx512),
        ("neon", Self::Neon),
        ("dotprod", Self::Dotprod),
        ("sve", Self::Sve),
        ("sve2", Self::Sve2),
        ("native", Self::Native),
    ];
}

/// Bytes of a layout times how much longer than the whole linear it takes for a byte.
///
/// The factors follow from "Structured zeros" in `docs/benchmarks.md`: 65 % left out; 2.86, the speed-up that bytes alone allow, over the
/// median of what was measured for each layout with all shapes and formats: from memory by AVX-512; in cache and from memory by AVX2,
/// where the latter alone, beside other work, came out above 2.86. No ARM core was measured: there every layout counts with the worst
/// speed-up that any x86 row showed for it, so that only what saves much is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Costs(pub Target);

impl Costs {
    const fn factor(self, layout: &Found, kind: &str) -> f64 {
        let (avx2, avx512, worst) = match layout {
            Found::Whole => return 1.0,
            Found::Live(live) => match live.shape {
                BlockShape::Wide => (2.75, 2.4, 1.8),
                BlockShape::Square => (2.5, 1.85, 1.3),
            },
            Found::Kept(_) => match kind.len() {
                // "rows", "columns" or both.
                4 => (2.8, 2.8, 2.7),
                7 => (2.5, 2.3, 1.8),
                _ => (2.6, 2.6, 2.3),
            },
        };
        let speed_up = match self.0 {
            Target::Avx2 => avx2,
            Target::Avx512 | Target::Native => avx512,
            Target::Neon | Target::Dotprod | Target::Sve | Target::Sve2 => worst,
        };
        2.86 / speed_up
    }
}

impl Timer for Costs {
    fn costs(&mut self, candidates: &[Candidate<'_>]) -> Vec<f64> {
        let cost = |c: &Candidate<'_>| c.bytes() as f64 / 1024.0 * self.factor(c.layout, c.layout.name());
        candidates.iter().map(cost).collect()
    }
    fn name(&self) -> String {
        let name = Target::ALL.iter().find(|(_, target)| *target == self.0).map_or("", |(name, _)| name);
        format!("a model of costs for {name}, in KiB of a whole linear")
    }
}
