//! Bits against perplexity: formats chosen linear by linear against one for all, at the same size.
//!
//! ```text
//! cargo run --release -p bitnet-pack --example curve -- MODEL CALIBRATION HELD_OUT PLOT.svg
//! ```
//!
//! The protocol is that of docs/adaptive-bits.md: windows of 512 tokens, 16 for second moments and 6 others for gradients from the
//! first text, 8 from the second to measure on. The head stays as it is. Sizes are those of codes and scales, without the
//! padding of rows to whole groups.
use bitnet_kernel::Format;
use bitnet_pack::calibrate::allocate::{Choice, allocate};
use bitnet_pack::calibrate::gptq::{Factor, Quantized, compensate, output_errors, predicted_loss};
use bitnet_pack::calibrate::{HeldOut, Linear, Moment, Reference, Score, Wanted, windows};
use bitnet_pack::checkpoint::{Checkpoint, Dtype};
use bitnet_pack::{Error, quantize};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::Path;

/// Formats that compete. The last is rounded.
const FORMATS: [Format; 4] = [Format::I2G, Format::I3G, Format::I4G, Format::I8];
const WINDOW: usize = 512;

/// What a linear can become.
struct Candidates {
    quantized: Vec<Quantized>,
    choices: Vec<Choice>,
}

struct Curve<'a> {
    model: &'a Reference<'a>,
    held: HeldOut<'a>,
    linears: Vec<Linear>,
    candidates: HashMap<Linear, Candidates>,
    /// Bits a weight, name and score of each plan so far.
    points: Vec<(f64, &'static str, Score)>,
}

/// Rounds a linear as [`Format::I8`] does.
fn round_i8(weights: &mut [f32], cols: usize) {
    let mut codes = vec![0; cols];
    for row in weights.chunks_exact_mut(cols) {
        let scale = quantize::row_i8(row, &mut codes);
        row.iter_mut().zip(&codes).for_each(|(w, code)| *w = f32::from(*code) * scale);
    }
}

impl Curve<'_> {
    /// Quantizes the linears that read what `moment` is of, in each format.
    fn quantize(&mut self, moment: &Moment, fisher: &HashMap<Linear, Vec<f32>>) -> Result<(), Error> {
        let Some(layer) = moment.layer else { return Ok(()) };
        let cols = moment.cols;
        let factor = Factor::new(&moment.values, cols).unwrap_or_else(|| Factor::identity(cols));
        for linear in moment.site.kinds().iter().map(|&kind| Linear::new(layer, kind)) {
            let weights = self.model.weights(linear)?;
            let rows = weights.len() / cols;
            let (mut quantized, mut choices) = (Vec::new(), Vec::new());
            for format in FORMATS {
                let mut changed = weights.clone();
                let scales = if format.is_grouped() { 2 * cols.div_ceil(Format::GROUP_COLS) } else { 4 };
                if format.is_grouped() {
                    quantized.push(compensate(&weights, &factor, format));
                    changed = quantized[quantized.len() - 1].weights();
                } else {
                    round_i8(&mut changed, cols);
                }
                let bits: usize = match format {
                    Format::I2G => 2,
                    Format::I3G => 3,
                    Format::I4G => 4,
                    _ => 8,
                };
                let loss = predicted_loss(&output_errors(&weights, &changed, &moment.values, cols), &fisher[&linear]);
                choices.push(Choice { bytes: (rows * cols * bits / 8 + rows * scales) as u64, loss });
            }
            self.candidates.insert(linear, Candidates { quantized, choices });
        }
        eprintln!("layer {layer}: {:?} quantized", moment.site);
        Ok(())
    }

    fn choices(&self) -> Vec<Vec<Choice>> {
        self.linears.iter().map(|linear| self.candidates[linear].choices.clone()).collect()
    }

    /// Measures a plan, an index into [`FORMATS`] for each linear, and prints it.
    fn measure(&mut self, name: &'static str, plan: &[usize]) -> Result<(), Error> {
        let of: HashMap<Linear, usize> = self.linears.iter().copied().zip(plan.iter().copied()).collect();
        let change = |linear: Linear, weights: &mut [f32]| {
            match of.get(&linear) {
                Some(&i) if FORMATS[i].is_grouped() => {
                    weights.copy_from_slice(&self.candidates[&linear].quantized[i].weights());
                }
                Some(_) => round_i8(weights, self.model.shape(linear).1),
                None => {}
            }
            Ok(())
        };
        let score = self.held.score(&change, &mut ())?;
        let weights: usize = self.linears.iter().map(|&l| self.model.shape(l).0 * self.model.shape(l).1).sum();
        let bytes: u64 = plan.iter().zip(self.choices()).map(|(&i, c)| c[i].bytes).sum();
        let bits = bytes as f64 * 8.0 / weights as f64;
        println!(
            "| {name} | {bits:.3} | {:.2} | {:+.4} ({:.4}) | {:.4} | {:.3} |",
            score.perplexity(),
            score.nats - score.source_nats,
            score.error,
            score.kl,
            score.same_best
        );
        self.points.push((bits, name, score));
        Ok(())
    }

    /// Perplexity over bits, both on plain axes.
    fn plot(&self) -> String {
        let source = self.points[0].2.source_perplexity();
        let high = self.points.iter().map(|p| p.2.perplexity()).fold(source, f64::max) * 1.05;
        let place = |bits: f64, perplexity: f64| {
            (60.0 + (bits - 2.9) / 1.4 * 520.0, 330.0 - (perplexity - source) / (high - source) * 280.0)
        };
        let mut svg = String::from(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 620 380\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"620\" height=\"380\" fill=\"white\"/>\n<text x=\"60\" y=\"24\">Perplexity over bits a weight; \
             the line below is the source</text>\n",
        );
        let (_, y) = place(3.0, source);
        let _ =
            writeln!(svg, "<path d=\"M60 {y:.1}H600\" stroke=\"#999\"/><text x=\"8\" y=\"{y:.1}\">{source:.1}</text>");
        for (name, colour) in [("uniform", "#d1495b"), ("auto", "#1b6ca8")] {
            let points = self.points.iter().filter(|p| p.1 == name && p.0 < 4.3);
            let places: Vec<_> = points.map(|p| (place(p.0, p.2.perplexity()), p.2.perplexity())).collect();
            let line: Vec<String> = places.iter().map(|((x, y), _)| format!("{x:.1},{y:.1}")).collect();
            let _ = writeln!(svg, "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\"/>", line.join(" "));
            for ((x, y), perplexity) in places {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{:.1}\" \
                     fill=\"{colour}\">{name} {perplexity:.1}</text>",
                    x + 6.0,
                    y - 6.0
                );
            }
        }
        for bits in [3.0, 3.5, 4.0] {
            let _ = writeln!(svg, "<text x=\"{:.1}\" y=\"360\">{bits}</text>", place(bits, source).0);
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn main() -> Result<(), Error> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, calibration, held_out, plot] = &args[..] else {
        return Err(Error::Options("MODEL CALIBRATION HELD_OUT PLOT.svg".into()));
    };
    let checkpoint = Checkpoint::open(Path::new(model), Dtype::I2_S)?;
    let model = Reference::new(&checkpoint, &())?;
    let text = |path: &str, most| windows(&checkpoint, None, Path::new(path), WINDOW, most);
    let (all, held) = (text(calibration, 22)?, text(held_out, 8)?);
    let fisher = model.fisher(&all.part(16, 6), 1, &mut ())?.into_iter().collect();
    eprintln!("gradients are done");
    let held = HeldOut::new(&model, held, &mut ())?;
    let linears = model.linears().collect();
    let mut curve = Curve { model: &model, held, linears, candidates: HashMap::new(), points: Vec::new() };
    model.moments(&all.part(0, 16), Wanted::Full, &mut (), &mut |moment, _| curve.quantize(&moment, &fisher))?;

    println!("| widths | bits | perplexity | change in nats (s.e.) | KL | same best |\n|---|---|---|---|---|---|");
    // Even layers one format, odd layers the other.
    let uniform = |even: usize, odd: usize, linears: &[Linear]| -> Vec<usize> {
        linears.iter().map(|l| if l.layer.unwrap_or(0) % 2 == 0 { even } else { odd }).collect()
    };
    curve.measure("uniform", &uniform(3, 3, &curve.linears))?;
    for (even, odd) in [(2, 2), (2, 1), (1, 1)] {
        let plan = uniform(even, odd, &curve.linears);
        let choices = curve.choices();
        let budget = plan.iter().zip(&choices).map(|(&i, c)| c[i].bytes).sum();
        curve.measure("uniform", &plan)?;
        let auto = allocate(&choices, budget).expect("as much as a plan that is there");
        curve.measure("auto", &auto)?;
    }
    println!("source: perplexity {:.2}", curve.points[0].2.source_perplexity());
    std::fs::write(plot, curve.plot()).map_err(|error| Error::Io { path: plot.into(), doing: "write", error })
}
