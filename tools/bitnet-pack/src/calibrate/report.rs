//! What was chosen, as a table, as JSON and as a page.
use super::{Adapted, Linear, LinearReport, Plan, Score};
use bitnet_runtime::image::Kind;
use core::fmt::{self, Write as _};
use serde_json::{Value, json};

/// Trace, width, error and bytes of one layer's linears together.
#[derive(Clone, Copy, Debug, Default)]
struct LayerSum {
    trace: Option<f64>,
    bytes: u64,
    weights: u64,
    loss: Option<f64>,
    /// The largest.
    error: f64,
}

impl Adapted {
    /// Sums by layer, in their order; the head comes last and has none.
    fn layers(&self) -> Vec<(Option<u32>, LayerSum)> {
        let mut layers: Vec<(Option<u32>, LayerSum)> = Vec::new();
        for of in &self.linears {
            let layer = of.linear.layer;
            if layers.last().is_none_or(|(last, _)| *last != layer) {
                layers.push((layer, LayerSum::default()));
            }
            let sum = &mut layers.last_mut().expect("just pushed").1;
            sum.trace = of.trace.map(|trace| sum.trace.unwrap_or(0.0) + trace);
            sum.bytes += of.bytes;
            sum.weights += (of.shape.0 * of.shape.1) as u64;
            sum.loss = of.loss().map(|loss| sum.loss.unwrap_or(0.0) + loss);
            sum.error = sum.error.max(of.error);
        }
        layers
    }
    /// The plan's file, with each linear's figures beside it.
    pub fn plan(&self) -> String {
        let plan = Plan::new(self.linears.iter().map(|of| (of.linear, of.format)));
        plan.write(self.linears.iter().map(|of| {
            let losses = of.choices.iter().zip(Plan::FORMATS).map(|(c, f)| format!("{} {:.2e}", f.name(), c.loss));
            let losses = losses.collect::<Vec<_>>().join(", ");
            (
                of.linear,
                if losses.is_empty() { format!("{} bytes", of.bytes) } else { format!("predicted loss: {losses}") },
            )
        }))
    }
    /// Everything, as one object.
    pub fn to_json(&self) -> Value {
        let linear = |of: &LinearReport| {
            let choices = of.choices.iter().zip(Plan::FORMATS);
            json!({
                "linear": of.linear.to_string(),
                "layer": of.linear.layer,
                "kind": of.linear.kind.name(),
                "rows": of.shape.0,
                "cols": of.shape.1,
                "trace": of.trace,
                "format": of.format.name(),
                "bytes": of.bytes,
                "relative_error": of.error,
                "choices": choices.map(|(c, f)| json!({"format": f.name(), "bytes": c.bytes, "predicted_loss": c.loss}))
                    .collect::<Vec<_>>(),
            })
        };
        json!({
            "linears": self.linears.iter().map(linear).collect::<Vec<_>>(),
            "held_out": self.score.as_ref().map(score),
            "uniform": self.uniform.as_ref().map(|(format, s)| json!({"format": format.name(), "held_out": score(s)})),
            "notes": self.notes,
        })
    }
    /// A page with charts, which needs nothing beside it.
    pub fn to_html(&self, name: &str) -> String {
        let mut page = format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{0}</title>\n<style>{STYLE}</style>\n<h1>{0}</h1>\n",
            escape(name)
        );
        page.push_str("<pre>");
        page.push_str(&escape(&self.summary()));
        page.push_str("</pre>\n<h2>Bits a weight</h2>\n");
        page.push_str(&self.map());
        page.push_str("<h2>Layers</h2>\n");
        let layers = self.layers();
        page.push_str(&bars("bits a weight", &layers, |l| l.bytes as f64 * 8.0 / l.weights as f64));
        page.push_str(&bars("trace of the Hessian", &layers, |l| l.trace.unwrap_or(0.0)));
        page.push_str(&bars("predicted loss, nats a token", &layers, |l| l.loss.unwrap_or(0.0)));
        page.push_str("<h2>Linears</h2>\n<table><tr><th>linear<th>shape<th>trace<th>format<th>bytes<th>error");
        Plan::FORMATS.iter().for_each(|f| page.push_str(&format!("<th>loss as {}", f.name())));
        for of in &self.linears {
            let trace = of.trace.map_or_else(String::new, |t| format!("{t:.3e}"));
            let _ = write!(
                page,
                "\n<tr><td>{}<td>{}x{}<td>{trace}<td>{}<td>{}<td>{:.2}%",
                of.linear,
                of.shape.0,
                of.shape.1,
                of.format.name(),
                of.bytes,
                of.error * 100.0
            );
            of.choices.iter().for_each(|c| page.push_str(&format!("<td>{:.2e}", c.loss)));
        }
        page.push_str("\n</table></html>\n");
        page
    }

    /// The lines about all of it.
    fn summary(&self) -> String {
        let (bytes, weights) = self.layers().iter().fold((0, 0), |(b, w), (_, l)| (b + l.bytes, w + l.weights));
        let mut text = format!(
            "formats chosen for {} linears: {:.3} bits a weight;",
            self.linears.len(),
            bytes as f64 * 8.0 / weights as f64
        );
        for format in Plan::FORMATS {
            match self.linears.iter().filter(|of| of.format == format).count() {
                0 => {}
                n => text.push_str(&format!(" {n} {}", format.name())),
            }
        }
        text.push('\n');
        if let Some(s) = &self.score {
            text.push_str(&format!("end of the text: {}\n", sentence(s)));
        }
        if let Some((format, s)) = &self.uniform {
            text.push_str(&format!("all as {}: {}\n", format.name(), sentence(s)));
        }
        self.notes.iter().for_each(|note| text.push_str(&format!("note: {note}\n")));
        text
    }

    /// Linears by layer, coloured by their bits.
    fn map(&self) -> String {
        const CELL: usize = 22;
        let head = self.linears.iter().any(|of| of.linear == Linear::HEAD);
        let kinds: Vec<Kind> = Linear::KINDS.into_iter().chain(head.then_some(Kind::Head)).collect();
        let layers = self.layers();
        let (width, height) = (80 + layers.len() * CELL, 20 + kinds.len() * CELL);
        let mut svg = svg(width, height);
        for (row, kind) in kinds.iter().enumerate() {
            let _ = write!(svg, "<text x=\"0\" y=\"{}\">{}</text>", row * CELL + 15, kind.name());
        }
        for (column, (layer, _)) in layers.iter().enumerate() {
            let x = 80 + column * CELL;
            let label = layer.map_or_else(String::new, |layer| layer.to_string());
            let _ = write!(svg, "<text x=\"{x}\" y=\"{}\">{label}</text>", kinds.len() * CELL + 14);
            for of in self.linears.iter().filter(|of| of.linear.layer == *layer) {
                let row = kinds.iter().position(|k| *k == of.linear.kind).unwrap_or(0);
                let place = Plan::FORMATS.iter().position(|f| *f == of.format).unwrap_or(0);
                let bits = of.bytes as f64 * 8.0 / (of.shape.0 * of.shape.1) as f64;
                let _ = write!(
                    svg,
                    "<rect x=\"{x}\" y=\"{}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"{}\" stroke=\"white\"><title>{}: {}, {bits:.2} \
                     bits</title></rect><text x=\"{}\" y=\"{}\" fill=\"white\">{bits:.0}</text>",
                    row * CELL,
                    COLOURS[place],
                    of.linear,
                    of.format.name(),
                    x + 7,
                    row * CELL + 15
                );
            }
        }
        svg.push_str("</svg>\n");
        svg
    }
}

impl LinearReport {
    /// The predicted loss of its format.
    pub fn loss(&self) -> Option<f64> {
        let place = Plan::FORMATS.iter().position(|f| *f == self.format)?;
        self.choices.get(place).map(|c| c.loss)
    }
}

const STYLE: &str = "body{font:14px sans-serif;margin:2em;max-width:70em}table{border-collapse:collapse}\
                     td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ddd}svg{display:block;margin:1em 0}";
/// One for each of [`Plan::FORMATS`].
const COLOURS: [&str; 6] = ["#9e2a2b", "#c8553d", "#d98324", "#5b8e3e", "#2a7f9e", "#3a3f8f"];

fn svg(width: usize, height: usize) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"11\">"
    )
}

/// What is said of a layer, or of the head.
fn layer_name(layer: Option<u32>) -> String {
    layer.map_or_else(|| "head".into(), |layer| layer.to_string())
}

/// A bar for each layer.
fn bars(title: &str, layers: &[(Option<u32>, LayerSum)], value: impl Fn(&LayerSum) -> f64) -> String {
    const STEP: usize = 22;
    let max = layers.iter().map(|(_, layer)| value(layer)).fold(0.0, f64::max);
    if max <= 0.0 {
        return String::new();
    }
    // Room for the title, however few layers there are.
    let mut svg = svg((60 + layers.len() * STEP).max(320), 150);
    let _ = write!(svg, "<text x=\"0\" y=\"12\">{title}, at most {max:.3e}</text>");
    for (i, (layer, sum)) in layers.iter().enumerate() {
        let (value, name) = (value(sum), layer_name(*layer));
        let (x, height) = (40 + i * STEP, 110.0 * value / max);
        let title = if layer.is_some() { "layer " } else { "" };
        let _ = write!(
            svg,
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"{}\" height=\"{height:.1}\" fill=\"#2a7f9e\"><title>{title}{name}: {value:.4e}\
             </title></rect><text x=\"{x}\" y=\"146\">{name}</text>",
            132.0 - height,
            STEP - 4
        );
    }
    svg.push_str("</svg>\n");
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace(|c: char| c.is_control() && c != '\n', " ")
}

fn score(s: &Score) -> Value {
    json!({
        "tokens": s.tokens,
        "perplexity": s.perplexity(),
        "source_perplexity": s.source_perplexity(),
        "nats": s.nats,
        "source_nats": s.source_nats,
        "standard_error": s.error.is_finite().then_some(s.error),
        "kl": s.kl,
        "same_best": s.same_best,
    })
}

fn sentence(s: &Score) -> String {
    format!(
        "perplexity {:.2}, {:.2} before; divergence {:.4} nats a token; the same best token after {:.1} % of {}",
        s.perplexity(),
        s.source_perplexity(),
        s.kl,
        s.same_best * 100.0,
        s.tokens
    )
}

impl fmt::Display for Adapted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<6} {:>11} {:>7} {:>10} {:>10} {:>7}  formats",
            "layer", "trace", "bits", "bytes", "loss", "error"
        )?;
        for (layer, sum) in self.layers() {
            let formats = self.linears.iter().filter(|of| of.linear.layer == layer);
            let formats: Vec<String> =
                formats.map(|of| format!("{} {}", of.linear.kind.name(), of.format.name())).collect();
            let bits = sum.bytes as f64 * 8.0 / sum.weights as f64;
            let known = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2e}"));
            writeln!(
                f,
                "{:<6} {:>11} {bits:>7.3} {:>10} {:>10} {:>6.1}%  {}",
                layer_name(layer),
                known(sum.trace),
                sum.bytes,
                known(sum.loss),
                sum.error * 100.0,
                formats.join(", ")
            )?;
        }
        f.write_str(&self.summary())
    }
}
