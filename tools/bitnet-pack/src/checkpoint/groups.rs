//! Whether I2_S tensors have groups of 128 weights or of 64, by what their numbers say.
//!
//! The file does not tell: on ARM bitnet.cpp once wrote groups of 64 under the same type. Read with the wrong groups the
//! weights of a row change places with others nearby, and the model talks nonsense. But a column whose
//! activations are large because the norm before the linear has a large gain is trained to other weights than one whose are
//! small, and with the right groups the share of weights in a column that are not zero follows that gain. In BitNet b1.58 2B-4T
//! the rank correlation of the two is 0.67 to 0.82 at the output of attention read rightly, and 0.11 to 0.21 read wrongly.
use super::{Checkpoint, Dtype};
use crate::Error;
use std::path::Path;

/// How much larger the correlation with groups of 64 must be for these to be believed: about half of what it is in the model
/// that was measured.
const CLEAR: f64 = 0.25;
/// Layers that are looked at.
const LAYERS: u32 = 8;
/// Rows that are read at once.
const ROWS: u64 = 64;

/// The groups of the I2_S tensors in `source`, and what a person should know; 128 where nothing speaks for 64.
///
/// # Errors
/// If it is no checkpoint.
pub(crate) fn found(source: &Path) -> Result<(Dtype, Option<String>), Error> {
    let usual = Checkpoint::open(source, Dtype::I2_S)?;
    if !usual.tensors().any(|t| t.dtype == Dtype::I2_S) {
        return Ok((Dtype::I2_S, None));
    }
    // Lengths that only one of the two allows decide.
    let other = Checkpoint::open(source, Dtype::I2_S_64);
    let (Some(by_128), Some(by_64)) = (correlation(&usual)?, other.ok().map_or(Ok(None), |c| correlation(&c))?) else {
        let note = "I2_S is read in groups of 128; nothing in the file speaks for or against (--i2s-group 64)";
        return Ok((Dtype::I2_S, Some(note.into())));
    };
    let figures =
        format!("rank correlation of zeros with gains {by_128:.2} in groups of 128, {by_64:.2} in groups of 64");
    Ok(if by_64 - by_128 >= CLEAR {
        (Dtype::I2_S_64, Some(format!("I2_S is read in groups of 64: {figures}")))
    } else if by_128 - by_64 >= CLEAR {
        (Dtype::I2_S, None)
    } else {
        (
            Dtype::I2_S,
            Some(format!("I2_S is read in groups of 128, but the weights do not say (--i2s-group 64): {figures}")),
        )
    })
}

/// The mean over the first layers, where there is a norm right before a linear in I2_S.
fn correlation(checkpoint: &Checkpoint) -> Result<Option<f64>, Error> {
    let (mut raw, mut sum, mut layers) = (Vec::new(), 0.0, 0);
    for layer in 0..LAYERS {
        let tensor = |part: &str| checkpoint.tensor(&format!("blk.{layer}.{part}.weight"));
        let (Some(linear), Some(norm)) = (tensor("attn_output"), tensor("attn_sub_norm")) else { break };
        let (&[rows, cols], &[gains_len]) = (&linear.shape[..], &norm.shape[..]) else { break };
        if cols != gains_len || !matches!(linear.dtype, Dtype::I2_S | Dtype::I2_S_64) {
            break;
        }
        let mut gains = vec![0.0; cols as usize];
        checkpoint.read_floats(norm, 0, &mut raw, &mut gains)?;
        let mut counts = vec![0_u32; cols as usize];
        let mut floats = Vec::new();
        for first in (0..rows).step_by(ROWS as usize) {
            floats.resize((cols * ROWS.min(rows - first)) as usize, 0.0);
            checkpoint.read_floats(linear, first * cols, &mut raw, &mut floats)?;
            for row in floats.chunks_exact(cols as usize) {
                counts.iter_mut().zip(row).for_each(|(count, w)| *count += u32::from(*w != 0.0));
            }
        }
        let counts: Vec<f32> = counts.into_iter().map(|n| n as f32).collect();
        let gains: Vec<f32> = gains.into_iter().map(f32::abs).collect();
        sum += spearman(&counts, &gains);
        layers += 1;
    }
    Ok((layers > 0).then(|| sum / f64::from(layers)))
}

/// The correlation of ranks; 0 where one side has but one value.
fn spearman(a: &[f32], b: &[f32]) -> f64 {
    let (a, b) = (ranks(a), ranks(b));
    let mean = (a.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum::<f64>();
    let norm = (product(&a, &a) * product(&b, &b)).sqrt();
    if norm > 0.0 { product(&a, &b) / norm } else { 0.0 }
}

/// Ranks from 0; equal values share the mean of theirs.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for same in order.chunk_by(|&i, &j| values[i] == values[j]) {
        let rank = first as f64 + (same.len() as f64 - 1.0) / 2.0;
        same.iter().for_each(|&i| ranks[i] = rank);
        first += same.len();
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlation_of_ranks() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0, 9.0], &[0.1, 0.2, 0.3, 0.4]), 1.0);
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0);
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[5.0, 5.0, 5.0]), 0.0);
        // Ranks 0.5 0.5 2 3 against 0 1 2 3: 4.5 over the root of 4.5 times 5.
        assert!((spearman(&[1.0, 1.0, 2.0, 3.0], &[1.0, 2.0, 3.0, 4.0]) - 4.5 / 22.5_f64.sqrt()).abs() < 1e-12);
    }
}
