//! From the numbers of a checkpoint to the numbers of an image. Everything here works on rows that are in memory.
//!
//! Loops that see every weight are dispatched to the vectors of this CPU. Their sums have lanes of their own, so that no CPU changes a
//! result.
use bitnet_kernel::Format;
use half::f16;
use pulp::Arch;

/// Where a matrix has zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gaps {
    /// It has none.
    None,
    /// In rows and columns that hold nothing else, as structured pruning leaves them: without these it has none.
    Lines,
    /// Elsewhere too, or it holds nothing else.
    Anywhere,
}

/// What the numbers of a matrix say of themselves, as they come in.
#[derive(Clone, Debug)]
pub struct Evidence {
    /// The only magnitude other than zero so far, zero if there was none.
    magnitude: Option<f32>,
    /// Where zeros were so far.
    gaps: Gaps,
    /// Which columns hold something in the rows that do; empty before the first of these.
    columns: Vec<bool>,
    /// Whether no number was zero, if every group had one magnitude so far.
    grouped: Option<bool>,
}

impl Default for Evidence {
    fn default() -> Self {
        Self { magnitude: Some(0.0), gaps: Gaps::None, columns: Vec::new(), grouped: Some(true) }
    }
}

impl Evidence {
    /// Looks at whole rows of `cols` numbers.
    pub fn add(&mut self, values: &[f32], cols: usize) {
        if let Some(mut magnitude) = self.magnitude {
            if magnitude == 0.0 {
                magnitude = values.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
            }
            let same = has_magnitude(values, magnitude);
            self.magnitude = same.then_some(magnitude);
        }
        for row in values.chunks_exact(cols) {
            if self.gaps == Gaps::Anywhere {
                break;
            }
            self.gaps = self.gaps_with(row);
        }
        if let Some(binary) = self.grouped {
            let mut groups = values.chunks_exact(cols).flat_map(|row| row.chunks(Format::GROUP_COLS));
            let same = groups.all(|group| group_scale(group).is_some());
            self.grouped = same.then(|| binary && values.iter().all(|v| *v != 0.0));
        }
    }
    /// Where zeros are, with this row.
    fn gaps_with(&mut self, row: &[f32]) -> Gaps {
        if row.iter().all(|v| *v == 0.0) {
            return Gaps::Lines;
        }
        if self.columns.is_empty() {
            self.columns.extend(row.iter().map(|v| *v != 0.0));
            return if self.columns.contains(&false) { Gaps::Lines } else { self.gaps };
        }
        let same = row.iter().zip(&self.columns).fold(true, |same, (v, holds)| same & ((*v != 0.0) == *holds));
        if same { self.gaps } else { Gaps::Anywhere }
    }
    /// Whether more numbers can still say something.
    pub fn is_open(&self) -> bool {
        self.magnitude.is_some() || self.grouped.is_some()
    }
    /// The magnitude of all numbers that are not zero, bit for bit, if they have one in common; 1 for a matrix of zeros.
    pub fn magnitude(&self) -> Option<f32> {
        self.magnitude.map(|m| if m == 0.0 { 1.0 } else { m })
    }
    /// Where the zeros are.
    pub fn gaps(&self) -> Gaps {
        if self.columns.is_empty() { Gaps::Anywhere } else { self.gaps }
    }
    /// If every group of columns of a row has one magnitude beside zero, which half precision holds exactly: whether no
    /// number is zero.
    pub fn grouped(&self) -> Option<bool> {
        self.grouped
    }
}

/// Whether all numbers have this magnitude or are zero. Without a branch for each, so that it vectorizes.
fn has_magnitude(values: &[f32], magnitude: f32) -> bool {
    values.iter().fold(true, |same, v| same & (*v == 0.0 || v.abs() == magnitude))
}

/// The bits of the half-precision magnitude of all numbers of a group that are not zero, if they have one in common.
pub fn group_scale(group: &[f32]) -> Option<u16> {
    let magnitude = group.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
    let half = f16::from_f32(magnitude);
    let same = half.to_f32() == magnitude && has_magnitude(group, magnitude);
    same.then(|| half.to_bits())
}

/// The sum of magnitudes of a whole tensor, taken in f64 so that the number of elements does not matter.
#[derive(Clone, Copy, Debug, Default)]
pub struct MagnitudeSum {
    lanes: [f64; 8],
    count: u64,
}

impl MagnitudeSum {
    /// Adds a run of elements. Runs other than the last must be a multiple of 8 for the sum not to depend on their length.
    pub fn add(&mut self, values: &[f32]) {
        let lanes = &mut self.lanes;
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let (eights, rest) = values.as_chunks::<8>();
                for part in eights.iter().map(|eight| &eight[..]).chain([rest]) {
                    lanes.iter_mut().zip(part).for_each(|(lane, v)| *lane += f64::from(v.abs()));
                }
            },
        );
        self.count += values.len() as u64;
    }
    /// The mean, or infinity or NaN if any element was not finite.
    pub fn mean(&self) -> f32 {
        (self.lanes.iter().sum::<f64>() / self.count as f64) as f32
    }
}

/// The rule by which a model of this kind was trained: `s = 1 / max(mean |w|, 1e-5)`, `T = clamp(round(w · s), -1, 1)`,
/// and the weight is `T / s`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Absmean {
    /// `s`.
    pub scale: f32,
    /// `1 / s`: what the image stores.
    pub multiplier: f32,
}

impl Absmean {
    /// The rule for a tensor of this mean magnitude.
    pub fn new(mean: f32) -> Self {
        let scale = 1.0 / mean.max(1e-5);
        Self { scale, multiplier: 1.0 / scale }
    }
    /// Ternarizes. Rounding half to even sends exactly 0.5 to zero, so two comparisons are the whole of it.
    pub fn ternarize(&self, weights: &[f32], into: &mut [i8]) {
        Arch::new().dispatch(
            #[inline(always)]
            || {
                for (t, w) in into.iter_mut().zip(weights) {
                    let v = w * self.scale;
                    *t = i8::from(v > 0.5) - i8::from(v < -0.5);
                }
            },
        );
    }
}

/// Sums of [`Distance`] side by side: as many as hide the time that an addition takes.
const LANES: usize = 32;

/// How far masters are from their ternary form: the square root of the error's energy over that of the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    error: f64,
    energy: f64,
}

impl Distance {
    /// Adds a run of weights and what became of them.
    pub fn add(&mut self, weights: &[f32], ternary: &[i8], multiplier: f32) {
        let (mut error, mut energy) = ([0.0f32; LANES], [0.0f32; LANES]);
        Arch::new().dispatch(
            #[inline(always)]
            || {
                let mut add = |weights: &[f32], ternary: &[i8]| {
                    for (((w, t), error), energy) in weights.iter().zip(ternary).zip(&mut error).zip(&mut energy) {
                        let e = w - f32::from(*t) * multiplier;
                        *error += e * e;
                        *energy += w * w;
                    }
                };
                let ((weights, last), (ternary, rest)) = (weights.as_chunks::<LANES>(), ternary.as_chunks::<LANES>());
                weights.iter().zip(ternary).for_each(|(weights, ternary)| add(weights, ternary));
                add(last, rest);
            },
        );
        self.error += error.iter().map(|&e| f64::from(e)).sum::<f64>();
        self.energy += energy.iter().map(|&e| f64::from(e)).sum::<f64>();
    }
    /// 0 for weights that are ternary already, about 0.5 for a normal distribution.
    pub fn relative(&self) -> f32 {
        if self.energy > 0.0 { (self.error / self.energy).sqrt() as f32 } else { 0.0 }
    }
}

/// Rounds half to even, `|x| < 2^22`: adding 1.5 · 2^23 leaves no bits for a fraction.
pub(crate) fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC) - MAGIC
}

/// The largest magnitude of a row; NaN if there is one.
pub(crate) fn magnitude(row: &[f32]) -> f32 {
    row.iter().fold(0.0f32, |max, v| if v.abs() <= max { max } else { v.abs() })
}

/// Rows whose largest weight is below this are zero: their scale's reciprocal would overflow.
pub(crate) const NOTHING: f32 = 1e-30;

/// int8 with one scale: `absmax / 127`. Returns the scale, which is zero for a row of zeros.
pub fn row_i8(row: &[f32], into: &mut [i8]) -> f32 {
    let max = magnitude(row);
    if max < NOTHING {
        into.fill(0);
        return 0.0;
    }
    let inverse = 127.0 / max;
    for (q, w) in into.iter_mut().zip(row) {
        *q = round(w * inverse).clamp(-127.0, 127.0) as i8;
    }
    max / 127.0
}

/// Parts of `absmax / 7` that [`row_i4`] tries. Cutting off the largest weights makes the others finer.
const I4_CUTS: [f32; 8] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65];

/// int4 with one scale: of eight scales from `absmax / 7` down, the first with the least squared error. Codes are -7 to 7.
pub fn row_i4(row: &[f32], into: &mut [i8]) -> f32 {
    let max = magnitude(row);
    if max < NOTHING {
        into.fill(0);
        return 0.0;
    }
    Arch::new().dispatch(
        #[inline(always)]
        || row_i4_below(row, into, max / 7.0),
    )
}

/// [`row_i4`] with scales from `largest` down. All of them at once, of which each has sums of its own.
#[inline(always)]
fn row_i4_below(row: &[f32], into: &mut [i8], largest: f32) -> f32 {
    let code = |w: f32, inverse: f32| round(w * inverse).clamp(-7.0, 7.0);
    let scales = I4_CUTS.map(|cut| largest * cut);
    let inverses = scales.map(|scale| 1.0 / scale);
    let mut errors = [[0.0f32; 8]; I4_CUTS.len()];
    let (eights, rest) = row.as_chunks::<8>();
    for part in eights.iter().map(|eight| &eight[..]).chain([rest]) {
        for ((lanes, scale), inverse) in errors.iter_mut().zip(scales).zip(inverses) {
            for (lane, w) in lanes.iter_mut().zip(part) {
                let e = w - code(*w, inverse) * scale;
                *lane += e * e;
            }
        }
    }
    let mut best = (f32::INFINITY, largest);
    for (lanes, scale) in errors.iter().zip(scales) {
        let e = lanes.iter().sum::<f32>();
        if e < best.0 {
            best = (e, scale);
        }
    }
    let inverse = 1.0 / best.1;
    for (q, w) in into.iter_mut().zip(row) {
        *q = code(*w, inverse) as i8;
    }
    best.1
}

/// One group of columns with a half-precision scale, of which this returns the bits; `None` if the scale is beyond 65,504.
///
/// In [`Format::I4G`] it is [`row_i4`], in [`Format::I2G`] and [`Format::I3G`] the weights nearest to [`few_bit_scale`]'s.
///
/// # Panics
/// If the format is none of these.
pub fn group(format: Format, group: &[f32], into: &mut [i8]) -> Option<u16> {
    if format == Format::I4G {
        let scale = f16::from_f32(row_i4(group, into));
        return scale.is_finite().then(|| scale.to_bits());
    }
    let scale = few_bit_scale(format, group)?;
    let (levels, inverse) = (Levels::of(format), 1.0 / scale.to_f32());
    for (q, w) in into.iter_mut().zip(group) {
        *q = if scale == f16::ZERO { format.range().0 } else { levels.nearest(w * inverse) as i8 };
    }
    Some(scale.to_bits())
}

/// The weights that a format has.
#[derive(Clone, Copy, Debug)]
pub struct Levels {
    low: f32,
    distance: f32,
    last: f32,
}

impl Levels {
    /// Those of an integer format.
    pub fn of(format: Format) -> Self {
        let ((low, high), distance) = (format.range(), f32::from(format.distance()));
        Self { low: low.into(), distance, last: (f32::from(high) - f32::from(low)) / distance }
    }
    /// The smallest.
    pub const fn low(&self) -> f32 {
        self.low
    }
    /// The weight nearest to `x`, whose magnitude is below 2^22.
    #[inline]
    pub fn nearest(&self, x: f32) -> f32 {
        self.low + self.distance * round((x - self.low) * (1.0 / self.distance)).clamp(0.0, self.last)
    }
}

/// Scales that [`few_bit_scale`] starts from, and how far each is from the one before: parts of the scale that makes the largest
/// magnitude the smallest weight.
const FEW_BIT_CUTS: (usize, f32) = (12, 0.075);

/// The scale of a group of columns in [`Format::I2G`] or [`Format::I3G`] that leaves the least squared error of those tried,
/// `None` if it is beyond 65,504. Only a group too small for half precision has 0.
///
/// Tried are 12 scales, from 1.1 to 0.275 times the one that makes the largest magnitude the smallest weight, and after each
/// the best one for the weights that it gave (least squares). They are rounded to half precision first. [`Format::I3G`] has -4
/// but not 4, so its scale may have either sign, and both are tried. On sampled rows of SmolLM2 135M a search of
/// 190 scales with four steps of least squares after each left less than 0.1 % less of the error (tried with odd levels alone);
/// scales from 1 down to 0.65 alone, which suit 4 bits, left 12 % more in I2G.
///
/// # Panics
/// If the format is another.
pub fn few_bit_scale(format: Format, group: &[f32]) -> Option<f16> {
    assert!(matches!(format, Format::I2G | Format::I3G), "{}", format.name());
    let levels = Levels::of(format);
    let largest = magnitude(group) / -levels.low;
    let mut best = (f32::INFINITY, None);
    let mut attempt = |scale: f32| {
        let scale = f16::from_f32(scale);
        if scale == f16::ZERO || !scale.is_finite() {
            return None;
        }
        let (error, next) = error_and_scale(levels, group, scale.to_f32());
        if error < best.0 {
            best = (error, Some(scale));
        }
        Some(next)
    };
    let (count, distance) = FEW_BIT_CUTS;
    for sign in if format == Format::I3G { &[1.0, -1.0][..] } else { &[1.0] } {
        for i in 0..count {
            if let Some(next) = attempt(sign * largest * (1.1 - distance * i as f32)) {
                attempt(next);
            }
        }
    }
    // Without one, the group is too large, or so small that it is zeros.
    best.1.or((largest < 1.0).then_some(f16::ZERO))
}

/// The squared error of a group with this scale, and the scale that is best for the weights it becomes.
fn error_and_scale(levels: Levels, group: &[f32], scale: f32) -> (f32, f32) {
    let inverse = 1.0 / scale;
    let (mut error, mut product, mut energy) = ([0.0f32; 8], [0.0f32; 8], [0.0f32; 8]);
    for eight in group.chunks(8) {
        for (i, w) in eight.iter().enumerate() {
            let level = levels.nearest(w * inverse);
            let e = w - level * scale;
            error[i] += e * e;
            product[i] += w * level;
            energy[i] += level * level;
        }
    }
    let energy = energy.iter().sum::<f32>();
    let next = if energy > 0.0 { product.iter().sum::<f32>() / energy } else { scale };
    (error.iter().sum(), next)
}

/// The bits of half-precision floats, or the first column whose value has none.
///
/// # Errors
/// The column of a value beyond 65,504, infinite or not a number.
pub fn row_f16(row: &[f32], into: &mut [u16]) -> Result<(), usize> {
    for (column, (bits, w)) in into.iter_mut().zip(row).enumerate() {
        let half = f16::from_f32(*w);
        if !half.is_finite() {
            return Err(column);
        }
        *bits = half.to_bits();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Zeros in lines, in whatever order rows come and however many at once; and what is not in lines.
    #[test]
    fn zeros_are_told_by_where_they_are() {
        let gaps = |rows: &[[f32; 3]]| {
            let (mut one, mut all) = (Evidence::default(), Evidence::default());
            rows.iter().for_each(|row| one.add(row, 3));
            all.add(rows.as_flattened(), 3);
            assert_eq!(one.gaps(), all.gaps(), "{rows:?}");
            all.gaps()
        };
        let (full, left, none) = ([1.0, -1.0, 1.0], [-1.0, 0.0, 1.0], [0.0, -0.0, 0.0]);
        assert_eq!(gaps(&[full, full]), Gaps::None);
        for lines in [[none, full, full], [full, none, full], [left, left, none], [none, left, left]] {
            assert_eq!(gaps(&lines), Gaps::Lines, "{lines:?}");
        }
        for anywhere in [[full, left, full], [left, full, left], [none, left, full], [none, none, none]] {
            assert_eq!(gaps(&anywhere), Gaps::Anywhere, "{anywhere:?}");
        }
    }

    /// Weights that a scale times levels gives come back as they are, whatever the sign of the scale.
    #[test]
    fn levels_keep_their_places() {
        for (format, levels) in [(Format::I2G, &[-3, -1, 1, 3][..]), (Format::I3G, &[-4, -3, -2, -1, 0, 1, 2, 3])] {
            for scale in [0.25f32, -0.25] {
                let weights: Vec<i8> = levels.iter().cycle().take(128).copied().collect();
                let values: Vec<f32> = weights.iter().map(|&w| f32::from(w) * scale).collect();
                let mut found = vec![0; 128];
                let bits = group(format, &values, &mut found).unwrap();
                let back: Vec<f32> = found.iter().map(|&w| f32::from(w) * f16::from_bits(bits).to_f32()).collect();
                assert_eq!(back, values, "{}", format.name());
            }
        }
    }

    #[test]
    fn groups_beyond_half_precision() {
        for format in [Format::I2G, Format::I3G, Format::I4G] {
            let mut found = [0; 3];
            for tiny in [0.0, 1e-30, 1e-10] {
                let bits = group(format, &[tiny, -tiny, tiny], &mut found).unwrap();
                assert_eq!(f16::from_bits(bits).to_f32(), 0.0);
                assert!(found.iter().all(|w| (format.range().0..=format.range().1).contains(w)));
            }
            assert_eq!(group(format, &[1e30, -1e20, 0.0], &mut found), None);
        }
    }
}
