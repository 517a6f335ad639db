//! Ternary-binary hybrid attention: a model of ternary linears gets binary values, chosen by what its activations say.
//!
//! Queries and keys stay what they are: those of a BitNet are ternary with a threshold of half the mean magnitude, and the model was
//! trained with that. Of the values' rows every zero must become `-β` or `β`, one `β` a matrix. A row's error `e` costs `eᵀ H e` with
//! `H`, the mean of `x xᵀ` of what the linear reads, so column after column makes up for those before it
//! ([`compensate_by`]). `β` is the one of some tried that leaves least, after which the best factor for the signs found is its own:
//! `β = Σ bᵀHw / Σ bᵀHb` over the rows.
//!
//! For linears of floats there is nothing to do here: `bitnet-pack pack --plan` with `tlg128` for query and key and `b1g128` for value
//! chooses scales, which are twice the thresholds, by the same measure.
use super::{copy, free, open, rewrite};
use crate::calibrate::gptq::{Factor, compensate_by, output_errors};
use crate::calibrate::matmul::{View, product};
use crate::calibrate::{Linear, Moment, Reference, Wanted, windows};
use crate::checkpoint::sections::Source;
use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::report::{Progress, size};
use crate::{Error, quantize};
use bitnet_runtime::image::Kind;
use core::fmt;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Tokens in a window of the text.
const WINDOW: usize = 256;
/// Windows at most.
const WINDOWS: usize = 48;
/// Parts of the ternary magnitude that are tried for `β`: of numbers of which a third are zero, the best without making up
/// for errors is about two thirds.
const PARTS: [f32; 7] = [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0];

/// What the user chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hybrid {
    /// A text of the kind that the model will read, UTF-8.
    pub text: PathBuf,
    /// The tokenizer, if it is not the one in the directory.
    pub tokenizer: Option<PathBuf>,
}

/// What became of one layer's values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Values {
    /// The layer.
    pub layer: u32,
    /// Share of its weights that was zero.
    pub zeros: f64,
    /// `β` over the ternary magnitude.
    pub part: f64,
    /// The root of the energy of the outputs' errors over that of the outputs.
    pub error: f64,
    /// The same of the plain rule: signs, zeros positive, and the mean magnitude.
    pub plain: f64,
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Converted {
    /// Layer by layer.
    pub values: Vec<Values>,
    /// Length of the tensors' file.
    pub bytes: u64,
}

/// Writes the checkpoint `source` with binary values as the directory `output`: its linears as floats that are multiplied as they are.
///
/// # Errors
/// If `source` is no checkpoint that can be packed and calibrated, a value's linear is not ternary, the text cannot be read, or
/// something is there under the name `output`. Then nothing is there that was not before.
pub fn convert(source: &Path, output: &Path, new: &Hybrid, progress: &mut dyn Progress) -> Result<Converted, Error> {
    let checkpoint = open(source)?;
    let reference = Reference::new(&checkpoint, &*progress)?;
    reference.check_passes()?;
    let refuse = |what: &str| Err(Error::Options(format!("{}: {what}", source.display())));
    let c = *reference.config();
    if let Some(dense) = reference.linears().find(|&linear| reference.is_dense(linear)) {
        return refuse(&format!("{dense} is of floats; `bitnet-pack pack --plan` gives such linears any width"));
    }
    if let Some(grouped) = reference.linears().find(|l| matches!(reference.source_of(*l), Source::Grouped(..))) {
        return refuse(&format!(
            "{grouped} has a scale for every 128 columns of a row; one for the whole linear is expected"
        ));
    }
    free(output)?;
    let text = windows(&checkpoint, new.tokenizer.as_deref(), &new.text, WINDOW, WINDOWS)?;
    let mut config = checkpoint.json("config.json")?.unwrap_or_default();
    config["quantization_config"] = json!({"quant_method": "bitnet", "quantization_mode": "values"});
    let mut values = Vec::new();
    let bytes = rewrite(&checkpoint, output, &config, progress, |path, progress| {
        let mut file = Tensors::create(&checkpoint, &reference, path)?;
        file.all_but_values(&reference, progress)?;
        reference.moments(&text, Wanted::Full, progress, &mut |moment, progress| {
            let Some(layer) = moment.layer.filter(|_| moment.site == Linear::new(0, Kind::Value).site()) else {
                return Ok(());
            };
            progress.section(&format!("binary values of layer {layer}"));
            let linear = Linear::new(layer, Kind::Value);
            let (weights, found) = binary(layer, &reference.weights(linear)?, &moment);
            values.push(found);
            progress.advance(4 * weights.len() as u64);
            file.put_floats(linear, &weights)
        })?;
        file.file.sync_all().map_err(|e| Error::io(path, "write", e))?;
        Ok((file.end, move |written: &bitnet_runtime::Config| {
            // Other formats of the same shape.
            bitnet_runtime::Config { formats: c.formats, ..*written } == c
        }))
    })?;
    Ok(Converted { values, bytes })
}

/// The binary weights that stand for ternary ones best by what they read.
fn binary(layer: u32, weights: &[f32], moment: &Moment) -> (Vec<f32>, Values) {
    let (n, h) = (moment.cols, &moment.values);
    let factor = Factor::new(h, n).unwrap_or_else(|| Factor::identity(n));
    let magnitude = quantize::magnitude(weights);
    let energy: f64 = output_errors(weights, &vec![0.0; weights.len()], h, n).iter().sum();
    let relative = |candidate: &[f32]| {
        let error: f64 = output_errors(weights, candidate, h, n).iter().sum();
        if energy > 0.0 { (error / energy).sqrt() } else { 0.0 }
    };
    let mean = weights.iter().map(|w| f64::from(w.abs())).sum::<f64>() / weights.len() as f64;
    let plain: Vec<f32> = weights.iter().map(|w| if *w < 0.0 { -mean as f32 } else { mean as f32 }).collect();
    let mut best = (relative(&plain), plain.clone());
    for part in PARTS {
        let beta = part * magnitude;
        let signs = compensate_by(weights, &factor, |w| if w < 0.0 { -beta } else { beta });
        // The best factor for these signs, in place of the one that they were found with.
        let by_h = product(View::new(&signs, n), View::new(h, n));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let refit = (dot(&by_h, weights) / dot(&by_h, &signs)) as f32;
        let candidate: Vec<f32> = match refit.is_finite() && refit > 0.0 {
            true => signs.iter().map(|v| v * refit).collect(),
            false => signs,
        };
        let error = relative(&candidate);
        if error < best.0 {
            best = (error, candidate);
        }
    }
    let zeros = weights.iter().filter(|w| **w == 0.0).count() as f64 / weights.len() as f64;
    // A matrix of zeros has no sign to give.
    let part = if magnitude > 0.0 { f64::from(best.1[0].abs() / magnitude) } else { 0.0 };
    (best.1, Values { layer, zeros, part, error: best.0, plain: relative(&plain) })
}

/// A file of tensors that is written in any order.
struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    path: &'a Path,
    file: File,
    /// Where the numbers of each linear lie.
    linears: HashMap<Linear, u64>,
    /// What is copied, and where it goes.
    copied: Vec<(&'a TensorInfo, u64)>,
    end: u64,
}

impl<'a> Tensors<'a> {
    /// Writes what lies where: linears as floats of 32 bits without scales beside them, all else as it is.
    fn create(checkpoint: &'a Checkpoint, reference: &Reference<'_>, path: &'a Path) -> Result<Self, Error> {
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut at = 0;
        let mut enter = |name: &str, dtype: &str, shape: Vec<u64>, bytes: u64| {
            header.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, at + bytes]}));
            at += bytes;
            at - bytes
        };
        let mut linears = HashMap::new();
        let mut replaced = Vec::new();
        for linear in reference.linears() {
            let (Source::Masters(tensor) | Source::Ternary(tensor, ..) | Source::Packed(tensor, _)) =
                reference.source_of(linear)
            else {
                unreachable!("{linear} is ternary, whole and not grouped, or its model was refused")
            };
            let (rows, cols) = reference.shape(linear);
            let shape = vec![rows as u64, cols as u64];
            linears.insert(linear, enter(&tensor.name, "F32", shape, 4 * (rows * cols) as u64));
            // What multiplies the weights elsewhere is in them now.
            let stem = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
            replaced.extend([tensor.name.clone(), format!("{}_scale", tensor.name), format!("{stem}.scale")]);
        }
        let kept = checkpoint.tensors().filter(|tensor| !replaced.contains(&tensor.name));
        let mut copied: Vec<_> = kept.map(|t| (t, enter(&t.name, t.dtype.name(), t.shape.clone(), t.bytes))).collect();
        let mut header = Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');

        let start = 8 + header.len() as u64;
        linears.values_mut().for_each(|offset| *offset += start);
        copied.iter_mut().for_each(|(_, offset)| *offset += start);
        let end = start + at;
        let file = File::create(path).map_err(|e| Error::io(path, "create", e))?;
        let written = file.set_len(end).and_then(|()| file.write_all_at(&(start - 8).to_le_bytes(), 0));
        written.and_then(|()| file.write_all_at(&header, 8)).map_err(|e| Error::io(path, "write", e))?;
        Ok(Self { checkpoint, path, file, linears, copied, end })
    }

    fn all_but_values(&mut self, reference: &Reference<'_>, progress: &mut dyn Progress) -> Result<(), Error> {
        progress.start(self.end);
        let mut buffer = Vec::new();
        for &(tensor, offset) in &self.copied {
            progress.section(&tensor.name);
            copy(self.checkpoint, tensor, &mut buffer, progress, |at, part| {
                self.file.write_all_at(part, offset + at).map_err(|e| Error::io(self.path, "write", e))
            })?;
        }
        for linear in reference.linears().filter(|linear| linear.kind != Kind::Value) {
            if progress.cancelled() {
                return Err(Error::Interrupted);
            }
            progress.section(&linear.to_string());
            let weights = reference.weights(linear)?;
            self.put_floats(linear, &weights)?;
            progress.advance(4 * weights.len() as u64);
        }
        Ok(())
    }

    fn put_floats(&self, linear: Linear, weights: &[f32]) -> Result<(), Error> {
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.file.write_all_at(&bytes, self.linears[&linear]).map_err(|e| Error::io(self.path, "write", e))
    }
}

impl fmt::Display for Converted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "layer  zeros  magnitude  error of the outputs, of signs and mean magnitude")?;
        for v in &self.values {
            let (zeros, error, plain) = (100.0 * v.zeros, 100.0 * v.error, 100.0 * v.plain);
            writeln!(f, "{:5} {zeros:4.0} % {:10.2} {error:8.1} % {plain:16.1} %", v.layer, v.part)?;
        }
        writeln!(f, "queries and keys are as they were; {} of tensors", size(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibrate::Site;

    /// Ternary weights, and inputs of which neighbours are alike: what is left of the error is less than that of signs alone, every
    /// weight has one magnitude, and without an input nothing is no number.
    #[test]
    fn columns_make_up_for_each_other() {
        let (rows, n) = (24, 160);
        let mut x = 1u32;
        let mut random = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            x >> 16
        };
        let weights: Vec<f32> = (0..rows * n).map(|_| 0.25 * (random() % 3) as f32 - 0.25).collect();
        let near = |i: usize, j: usize| 0.9f32.powi(i.abs_diff(j) as i32);
        let values: Vec<f32> = (0..n * n).map(|at| near(at / n, at % n)).collect();
        let moment = Moment { layer: Some(3), site: Site::Attention, cols: n, values };
        let (found, said) = binary(3, &weights, &moment);
        println!("{said:?}");
        assert!(said.error < 0.6 * said.plain, "{said:?}");
        assert!(found.iter().all(|w| w.abs() == found[0].abs() && *w != 0.0));
        assert_eq!(said.layer, 3);
        assert!((0.2..0.5).contains(&said.zeros) && (0.3..=1.2).contains(&said.part), "{said:?}");
        let nothing = Moment { values: vec![0.0; n * n], ..moment };
        assert!(binary(3, &weights, &nothing).0.iter().all(|w| w.is_finite() && *w != 0.0));
    }
}
