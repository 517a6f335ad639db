//! From the numbers of a checkpoint to the numbers of an image. Everything here works on rows that are in memory.
use bitnet_kernel::Format;
use half::f16;

/// What the numbers of a matrix say of themselves, as they come in.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// The only magnitude other than zero so far, zero if there was none.
    magnitude: Option<f32>,
    /// Whether no number was zero, if every group had one magnitude so far.
    grouped: Option<bool>,
}

impl Default for Evidence {
    fn default() -> Self {
        Self { magnitude: Some(0.0), grouped: Some(true) }
    }
}

impl Evidence {
    /// Looks at whole rows of `cols` numbers.
    pub fn add(&mut self, values: &[f32], cols: usize) {
        if let Some(mut magnitude) = self.magnitude {
            if magnitude == 0.0 {
                magnitude = values.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
            }
            let same = values.iter().all(|v| *v == 0.0 || v.abs() == magnitude);
            self.magnitude = same.then_some(magnitude);
        }
        if let Some(binary) = self.grouped {
            let mut groups = values.chunks_exact(cols).flat_map(|row| row.chunks(Format::GROUP_COLS));
            let same = groups.all(|group| group_scale(group).is_some());
            self.grouped = same.then(|| binary && values.iter().all(|v| *v != 0.0));
        }
    }
    /// Whether more numbers can still say something.
    pub fn is_open(&self) -> bool {
        self.magnitude.is_some() || self.grouped.is_some()
    }
    /// The magnitude of all numbers that are not zero, bit for bit, if they have one in common; 1 for a matrix of zeros.
    pub fn magnitude(&self) -> Option<f32> {
        self.magnitude.map(|m| if m == 0.0 { 1.0 } else { m })
    }
    /// If every group of columns of a row has one magnitude beside zero, which half precision holds exactly: whether no
    /// number is zero.
    pub fn grouped(&self) -> Option<bool> {
        self.grouped
    }
}

/// The bits of the half-precision magnitude of all numbers of a group that are not zero, if they have one in common.
pub fn group_scale(group: &[f32]) -> Option<u16> {
    let magnitude = group.iter().map(|v| v.abs()).find(|&v| v != 0.0).unwrap_or(0.0);
    let half = f16::from_f32(magnitude);
    let same = half.to_f32() == magnitude && group.iter().all(|v| *v == 0.0 || v.abs() == magnitude);
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
        let (eights, rest) = values.as_chunks::<8>();
        for eight in eights {
            for (lane, v) in self.lanes.iter_mut().zip(eight) {
                *lane += f64::from(v.abs());
            }
        }
        for (lane, v) in self.lanes.iter_mut().zip(rest) {
            *lane += f64::from(v.abs());
        }
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
        for (t, w) in into.iter_mut().zip(weights) {
            let v = w * self.scale;
            *t = i8::from(v > 0.5) - i8::from(v < -0.5);
        }
    }
}

/// How far masters are from their ternary form: the square root of the error's energy over that of the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Distance {
    error: f64,
    energy: f64,
}

impl Distance {
    /// Adds a run of weights and what became of them.
    pub fn add(&mut self, weights: &[f32], ternary: &[i8], multiplier: f32) {
        let (mut error, mut energy) = ([0.0f32; 8], [0.0f32; 8]);
        for (weights, ternary) in weights.chunks(8).zip(ternary.chunks(8)) {
            for (i, (w, t)) in weights.iter().zip(ternary).enumerate() {
                let e = w - f32::from(*t) * multiplier;
                error[i] += e * e;
                energy[i] += w * w;
            }
        }
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
    let code = |w: f32, inverse: f32| round(w * inverse).clamp(-7.0, 7.0);
    let error = |scale: f32| {
        let inverse = 1.0 / scale;
        let mut lanes = [0.0f32; 8];
        for eight in row.chunks(8) {
            for (lane, w) in lanes.iter_mut().zip(eight) {
                let e = w - code(*w, inverse) * scale;
                *lane += e * e;
            }
        }
        lanes.iter().sum::<f32>()
    };
    let mut best = (f32::INFINITY, max / 7.0);
    for cut in I4_CUTS {
        let scale = max / 7.0 * cut;
        let e = error(scale);
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

/// [`row_i4`] of one group of columns with a half-precision scale, of which this returns the bits; `None` if the scale is
/// beyond 65,504.
pub fn group_i4(group: &[f32], into: &mut [i8]) -> Option<u16> {
    let scale = f16::from_f32(row_i4(group, into));
    scale.is_finite().then(|| scale.to_bits())
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
