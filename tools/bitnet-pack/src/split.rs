//! A head in two planes: which columns are apart, and what becomes of a row. See [`bitnet_runtime::image::split`].
use crate::quantize::{NOTHING, magnitude, round};
use bitnet_kernel::Format;
use bitnet_runtime::image::split::{COLUMNS, Columns, norm, split};

/// The energy of each column of a head: the columns that have most of it are taken apart.
///
/// Of what was tried on the head of SmolLM2-135M this leaves the fewest rows to read: 24 columns by energy left 3.3 % of the
/// rows for the best token, by their largest weight 33 %, by energy times the final norm's weight 16 %.
#[derive(Clone, Debug)]
pub struct Energy(Vec<f64>);

impl Energy {
    /// Nothing yet, of `cols` columns.
    pub fn new(cols: usize) -> Self {
        Self(vec![0.0; cols])
    }
    /// Adds rows.
    pub fn add(&mut self, rows: &[f32]) {
        for row in rows.chunks_exact(self.0.len()) {
            self.0.iter_mut().zip(row).for_each(|(sum, w)| *sum += f64::from(w * w));
        }
    }
    /// The columns with most energy, the lower of equals first; all of them if there are not so many.
    pub fn columns(&self) -> Columns {
        let mut order: Vec<u32> = (0..self.0.len() as u32).collect();
        order.sort_by(|&a, &b| self.0[b as usize].total_cmp(&self.0[a as usize]));
        order.resize(COLUMNS, self.0.len() as u32);
        order.sort_unstable();
        Columns::new(order.try_into().expect("resized"))
    }
}

/// What a row has besides its planes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// What its sum is multiplied by.
    pub scale: f32,
    /// `|low|` of the columns that are not apart, rounded up.
    pub norm: u16,
    /// What the weights apart are multiplied by.
    pub step: u8,
    /// They.
    pub apart: [i8; COLUMNS],
}

/// Quantizes a row: its weights in the columns apart are in the result, `codes` has the others' and zeros there.
///
/// The scale is that of the other columns alone, `absmax / 127`, unless that would need a step beyond a byte.
pub fn row(values: &[f32], columns: &Columns, codes: &mut [i8]) -> Row {
    let value = |c: u32| values.get(c as usize).copied().unwrap_or(0.0);
    let apart = columns.indices().map(value);
    let outer = magnitude(&apart);
    let is_apart = |c: usize| columns.indices().contains(&(c as u32));
    let inner = values.iter().enumerate().filter(|&(c, _)| !is_apart(c)).fold(0.0f32, |max, (_, v)| max.max(v.abs()));
    codes.fill(0);
    let scale = (inner / 127.0).max(outer / (127.0 * 255.0));
    if scale < NOTHING {
        return Row { scale: 0.0, norm: norm_of(codes, columns), step: 1, apart: [0; COLUMNS] };
    }
    let step = (outer / (127.0 * scale)).ceil().clamp(1.0, 255.0);
    let code = |w: f32, scale: f32| round((w / scale).clamp(-127.0, 127.0)) as i8;
    for (code_of, &w) in codes.iter_mut().zip(values) {
        *code_of = code(w, scale);
    }
    let _ = columns.take(codes);
    let apart = apart.map(|w| code(w, scale * step));
    Row { scale, norm: norm_of(codes, columns), step: step as u8, apart }
}

/// The norm of the low parts of `codes` in the columns that are not apart.
fn norm_of(codes: &[i8], columns: &Columns) -> u16 {
    let mut low: Vec<i8> = codes.iter().map(|&w| split(w).1).collect();
    let _ = columns.take(&mut low);
    norm(&low) as u16
}

/// The high or the low parts of rows of int8 weights, in place.
pub fn plane(codes: &mut [i8], plane: Plane) {
    for code in codes {
        let (high, low) = split(*code);
        *code = if plane == Plane::High { high } else { low };
    }
}

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Read for every row.
    High,
    /// Read for some.
    Low,
}

/// What both planes are encoded as.
pub const FORMAT: Format = Format::I4;
/// What the columns apart are encoded as.
pub const APART: Format = Format::I8;

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_runtime::image::split::join;

    /// A row with a large column, a row of zeros, a row with nothing but the columns apart, and one that is far too large there.
    #[test]
    fn rows_are_near_what_they_were() {
        let cols = 80;
        let columns = Columns::new(core::array::from_fn(|i| 3 + i as u32));
        let plain: Vec<f32> = (0..cols).map(|c| (c as f32 * 0.7).sin()).collect();
        let mut rows = vec![plain.clone(), vec![0.0; cols], vec![0.0; cols], plain];
        rows[0][5] = 30.0;
        rows[2][7] = -2.0;
        rows[3][4] = 1e6;
        for values in rows {
            let mut codes = vec![1; cols];
            let row = row(&values, &columns, &mut codes);
            let mut found: Vec<f32> = codes.iter().map(|&w| f32::from(w) * row.scale).collect();
            for (&c, w) in columns.indices().iter().zip(row.apart) {
                assert_eq!(codes[c as usize], 0);
                found[c as usize] = f32::from(w) * f32::from(row.step) * row.scale;
            }
            for (c, (found, value)) in found.iter().zip(&values).enumerate() {
                let step = if columns.indices().contains(&(c as u32)) { f32::from(row.step) } else { 1.0 };
                assert!((found - value).abs() <= 0.5001 * step * row.scale, "{found} {value}");
            }
            let (mut high, mut low) = (codes.clone(), codes.clone());
            plane(&mut high, Plane::High);
            plane(&mut low, Plane::Low);
            assert!(codes.iter().zip(high.iter().zip(&low)).all(|(&w, (&h, &l))| join(h, l) == i32::from(w)));
            let _ = columns.take(&mut low);
            assert_eq!(u32::from(row.norm), norm(&low));
        }
    }

    #[test]
    fn columns_are_those_with_most_energy() {
        let mut energy = Energy::new(70);
        energy.add(&[1.0; 70]);
        let mut row = [0.0; 70];
        row[69] = -5.0;
        energy.add(&row);
        let mut expected: [u32; COLUMNS] = core::array::from_fn(|i| i as u32);
        expected[COLUMNS - 1] = 69;
        assert_eq!(energy.columns(), Columns::new(expected));
        let few = Energy::new(2).columns();
        assert_eq!(few.indices()[..4], [0, 1, 2, 2]);
    }
}
