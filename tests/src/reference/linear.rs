//! A ternary linear: codes of the input, and the product in two arithmetics.
use super::checkpoint::Checkpoint;
use super::config::{Config, Scaling};
use super::{Arithmetic, Quantised, rms_norm};
use safetensors::Dtype;

#[derive(Debug)]
pub(super) struct Linear {
    /// Row after row of the output.
    ternary: Vec<i8>,
    cols: usize,
    scaling: Scaling,
    scale: f32,
    /// The gains and the epsilon of the norm inside.
    norm: Option<(Vec<f32>, f32)>,
}

impl Linear {
    /// Reads the linear called `name`, of `rows` outputs and `cols` inputs.
    pub(super) fn read(checkpoint: &Checkpoint, config: &Config, name: &str, rows: usize, cols: usize) -> Self {
        let weight = format!("{name}.weight");
        let norm = config.linear_norm_eps;
        let norm = norm.map(|eps| (checkpoint.floats(&format!("{name}.rms_norm.weight"), &[cols]), eps));
        let (ternary, scale) = match config.scaling {
            Scaling::Online => make_ternary(&checkpoint.floats(&weight, &[rows, cols])),
            Scaling::Multiply | Scaling::Divide => {
                let tensor = checkpoint.get(&weight);
                assert!(tensor.dtype == Dtype::U8 && tensor.shape == [rows.div_ceil(4), cols], "packed {weight}");
                let scale = checkpoint.floats(&format!("{name}.weight_scale"), &[1])[0];
                (unpack(&tensor.bytes, rows, cols), scale)
            }
        };
        Self { ternary, cols, scaling: config.scaling, scale, norm }
    }

    /// The input's codes, after the norm inside, if there is one.
    pub(super) fn quantise(&self, x: &[f32]) -> Quantised {
        match &self.norm {
            Some((gains, eps)) => Quantised::new(&rms_norm(x, gains, *eps)),
            None => Quantised::new(x),
        }
    }

    /// The output for codes that were made with `s = 127 / max|x|`.
    pub(super) fn apply(&self, codes: &[i8], s: f32, arithmetic: Arithmetic) -> Vec<f32> {
        assert_eq!(codes.len(), self.cols);
        let integer = |row: &[i8]| -> i32 { row.iter().zip(codes).map(|(&t, &q)| i32::from(t) * i32::from(q)).sum() };
        let x: Vec<f64> = codes.iter().map(|&q| f64::from(f32::from(q) / s)).collect();
        let dequantised = |row: &[i8]| -> f64 { row.iter().zip(&x).map(|(&t, x)| f64::from(t) * x).sum() };
        let output = |row| match (self.scaling, arithmetic) {
            // A layer of this kind multiplies integers in transformers too.
            (Scaling::Divide, _) => integer(row) as f32 / (self.scale * s),
            (Scaling::Online, Arithmetic::Dequantised) => (dequantised(row) * f64::from(self.scale)) as f32,
            (Scaling::Multiply, Arithmetic::Dequantised) => dequantised(row) as f32 * self.scale,
            (_, Arithmetic::Integer) => (f64::from(integer(row)) * f64::from(self.scale) / f64::from(s)) as f32,
        };
        self.ternary.chunks_exact(self.cols).map(output).collect()
    }
}

/// Masters to ternary weights, and what to multiply these by: their mean magnitude.
fn make_ternary(masters: &[f32]) -> (Vec<i8>, f32) {
    let mean = masters.iter().map(|w| f64::from(w.abs())).sum::<f64>() / masters.len() as f64;
    let s = 1.0 / (mean as f32).max(1e-5);
    let ternary = masters.iter().map(|w| (w * s).round_ties_even().clamp(-1.0, 1.0) as i8).collect();
    // transformers divides by s: the reciprocal of the reciprocal.
    (ternary, 1.0 / s)
}

/// Four rows to a byte: row `r` lies in byte row `r mod R`, at bit `2 (r div R)`, where `R` is a quarter of the rows.
pub(super) fn unpack(packed: &[u8], rows: usize, cols: usize) -> Vec<i8> {
    let quarter = rows.div_ceil(4);
    assert_eq!(packed.len(), quarter * cols);
    let mut ternary = Vec::with_capacity(rows * cols);
    for r in 0..rows {
        for byte in &packed[r % quarter * cols..][..cols] {
            let code = byte >> (2 * (r / quarter)) & 3;
            assert!(code < 3, "code 3 in a packed weight");
            ternary.push(code as i8 - 1);
        }
    }
    ternary
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_is_that_of_transformers() {
        let example = crate::json(crate::golden("pack_example.json"));
        let rows: Vec<Vec<i8>> = serde_json::from_value(example["ternary_8x2"].clone()).unwrap();
        let packed: Vec<Vec<u8>> = serde_json::from_value(example["packed_2x2"].clone()).unwrap();
        assert_eq!(unpack(&packed.concat(), 8, 2), rows.concat());
    }

    #[test]
    fn masters_round_half_to_even_and_are_clamped() {
        // The mean is 1: a half goes to zero, one and a half to two, which is clamped.
        let (ternary, scale) = make_ternary(&[0.5, -0.5, 1.5, -1.5, 0.0, 2.0, 0.75, -1.25]);
        assert_eq!(ternary, [0, 0, 1, -1, 0, 1, 1, -1]);
        assert_eq!(scale, 1.0);
        assert_eq!(make_ternary(&[0.0; 8]), (vec![0; 8], 1.0 / (1.0 / 1e-5)));
    }
}
