//! What two images have in common, and where they differ.
use crate::report::{SectionReport, printable};
use crate::verify::Opened;
use crate::weights::{Unit, Whole, index, vector};
use crate::{Error, inspect, verify};
use bitnet_runtime::Image;
use bitnet_runtime::image::{Encoding, Record};
use core::fmt;
use serde_json::{Value, json};
use std::path::Path;

/// A field of the header that differs.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// Its place, with dots between levels.
    pub name: String,
    /// What the first image has.
    pub a: Value,
    /// What the second has.
    pub b: Value,
}

/// A section that differs, or that only one of them has.
#[derive(Clone, Debug, PartialEq)]
pub struct SectionDifference {
    /// What it holds.
    pub kind: &'static str,
    /// Its layer.
    pub layer: Option<u32>,
    /// Encoding and shape in each, `None` where it is missing.
    pub a: Option<String>,
    /// That of the second.
    pub b: Option<String>,
    /// Weights (or elements), if the shapes are the same.
    pub weights: Option<u64>,
    /// How many of them are other integers; of half-precision weights and vectors, other numbers.
    pub differing: u64,
    /// The largest difference of two scales, over the larger of the two.
    pub scale_difference: f32,
    /// The largest difference of what two weights stand for.
    pub value_difference: f32,
}

/// All differences.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// Those of the headers.
    pub fields: Vec<Field>,
    /// Those of the sections.
    pub sections: Vec<SectionDifference>,
    /// Sections that are the same, bit for bit.
    pub same: usize,
}

/// Compares two images. Both are verified first. A linear is compared as a whole, with the zeros that its layout leaves out:
/// the sections that say how it is laid out are compared by themselves.
///
/// # Errors
/// If one cannot be read or is no sound image.
pub fn diff(a: &Path, b: &Path) -> Result<Difference, Error> {
    for path in [a, b] {
        verify(path)?;
    }
    let mut fields = Vec::new();
    let headers = [inspect(a)?.to_json(), inspect(b)?.to_json()];
    compare("", &headers[0], &headers[1], &mut fields);
    let (opened_a, opened_b) = (Opened::open(a)?, Opened::open(b)?);
    let (image_a, image_b) = (opened_a.image()?, opened_b.image()?);
    let (mut sections, mut same) = (Vec::new(), 0);
    let key = |r: &Record| (r.kind, r.layer.get());
    let (left, right) = (image_a.sections().records(), image_b.sections().records());
    for record in left {
        let Some(other) = right.iter().find(|r| key(r) == key(record)) else {
            sections.extend(missing(Some(record), None));
            continue;
        };
        let table = |r: &Record| (r.encoding, r.rows.get(), r.cols.get(), r.checksum.get(), r.scale.get().to_bits());
        let indexes = (index(&image_a, record).map(table), index(&image_b, other).map(table));
        if table(record) == table(other) && indexes.0 == indexes.1 {
            same += 1;
        } else {
            sections.push(section((&opened_a, &image_a, record), (&opened_b, &image_b, other))?);
        }
    }
    let only_right = right.iter().filter(|r| !left.iter().any(|l| key(l) == key(r)));
    sections.extend(only_right.flat_map(|record| missing(None, Some(record))));
    Ok(Difference { fields, sections, same })
}

/// Walks two objects with the same keys. Sections, sums over them and lengths have their own comparison.
fn compare(name: &str, a: &Value, b: &Value, fields: &mut Vec<Field>) {
    if let (Value::Object(left), Value::Object(right)) = (a, b) {
        for (key, value) in left {
            if !matches!(key.as_str(), "sections" | "layers" if value.is_array()) {
                let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                compare(&name, value, &right[key], fields);
            }
        }
    } else if a != b {
        fields.push(Field { name: name.into(), a: a.clone(), b: b.clone() });
    }
}

fn shape(record: &Record) -> Option<(SectionReport, String)> {
    let report = SectionReport::of(record)?;
    let text = format!("{} {}x{}", report.format_name(), report.rows, report.cols);
    Some((report, text))
}

fn missing(a: Option<&Record>, b: Option<&Record>) -> Option<SectionDifference> {
    let (report, _) = shape(a.or(b)?)?;
    let text = |record: Option<&Record>| Some(shape(record?)?.1);
    Some(SectionDifference {
        kind: report.kind.name(),
        layer: report.layer,
        a: text(a),
        b: text(b),
        weights: None,
        differing: 0,
        scale_difference: 0.0,
        value_difference: 0.0,
    })
}

/// A section, and the image that it is in.
type Place<'a> = (&'a Opened, &'a Image<'a>, &'a Record);

/// Compares two sections of one kind.
fn section(a: Place<'_>, b: Place<'_>) -> Result<SectionDifference, Error> {
    let mut found = missing(Some(a.2), Some(b.2)).expect("records of checked images");
    let both = [a.2, b.2].map(|record| Encoding::from_tag(record.encoding));
    match (Whole::of(a.0, a.1, a.2)?, Whole::of(b.0, b.1, b.2)?) {
        (Some(left), Some(right)) if (left.rows, left.cols) == (right.rows, right.cols) => {
            found.weights = Some(u64::from(left.rows) * u64::from(left.cols));
            for u in 0..left.units() {
                found.add(&left.unit(a.0, u)?, &right.unit(b.0, u)?);
            }
        }
        _ if both == [Some(Encoding::Vector); 2] && a.2.cols == b.2.cols => {
            let (left, right) = (vector(a.0, a.2)?, vector(b.0, b.2)?);
            found.weights = Some(left.len() as u64);
            found.values(&left, &right, |i| left[i].to_bits() != right[i].to_bits());
        }
        _ => {}
    }
    Ok(found)
}

impl SectionDifference {
    fn add(&mut self, a: &Unit, b: &Unit) {
        for r in 0..a.rows {
            let (left, right) = (a.values(r), b.values(r));
            if a.codes.is_empty() || b.codes.is_empty() {
                self.values(&left, &right, |i| left[i].to_bits() != right[i].to_bits());
                continue;
            }
            self.values(&left, &right, |i| a.row(r)[i] != b.row(r)[i]);
            let (a, b) = (a.row_scales(r), b.row_scales(r));
            for i in 0..a.len().max(b.len()) {
                let (a, b) = (a[i.min(a.len() - 1)], b[i.min(b.len() - 1)]);
                let relative = (a - b).abs() / a.abs().max(b.abs()).max(f32::MIN_POSITIVE);
                self.scale_difference = self.scale_difference.max(relative);
            }
        }
    }
    fn values(&mut self, a: &[f32], b: &[f32], differs: impl Fn(usize) -> bool) {
        self.differing += (0..a.len()).filter(|&i| differs(i)).count() as u64;
        let largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        self.value_difference = self.value_difference.max(largest);
    }
}

impl Difference {
    /// Whether the images are the same.
    pub const fn is_none(&self) -> bool {
        self.fields.is_empty() && self.sections.is_empty()
    }
    /// Everything, as one object.
    pub fn to_json(&self) -> Value {
        let fields = self.fields.iter().map(|f| json!({"field": f.name, "a": f.a, "b": f.b}));
        let sections = self.sections.iter().map(|s| {
            json!({
                "kind": s.kind, "layer": s.layer, "a": s.a, "b": s.b, "weights": s.weights, "differing": s.differing,
                "scale_difference": s.scale_difference, "value_difference": s.value_difference,
            })
        });
        json!({
            "fields": fields.collect::<Vec<_>>(),
            "sections": sections.collect::<Vec<_>>(),
            "same_sections": self.same,
        })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Field { name, a, b } in &self.fields {
            writeln!(f, "{name}: {} | {}", printable(&a.to_string()), printable(&b.to_string()))?;
        }
        for s in &self.sections {
            let layer = s.layer.map_or(String::new(), |layer| format!("layer {layer} "));
            let side = |side: &Option<String>| side.clone().unwrap_or_else(|| "(missing)".into());
            write!(f, "{layer}{}: ", s.kind)?;
            if s.a == s.b {
                write!(f, "{}", side(&s.a))?
            } else {
                write!(f, "{} | {}", side(&s.a), side(&s.b))?
            }
            if let Some(weights) = s.weights {
                let (scale, value) = (s.scale_difference, s.value_difference);
                write!(
                    f,
                    ", {} of {weights} weights differ, scales by {:.2e} of them, numbers by {value:.2e}",
                    s.differing, scale
                )?;
            }
            writeln!(f)?;
        }
        writeln!(f, "{} sections are the same, {} differ", self.same, self.sections.len())
    }
}
