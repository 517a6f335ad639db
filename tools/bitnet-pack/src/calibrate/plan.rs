//! A plan: the format of every linear that is not ternary, as a file that a person can edit.
use super::Linear;
use crate::Error;
use crate::files::read_capped;
use bitnet_kernel::Format;
use core::fmt::Write as _;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// Longest plan file.
const BYTES_MAX: u64 = 1 << 22;

/// The format of each linear.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan(HashMap<Linear, Format>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    linears: BTreeMap<String, String>,
}

impl Plan {
    /// The formats that a plan can give a linear, from the fewest bits on.
    pub const FORMATS: [Format; 6] = [Format::B1G, Format::TLG, Format::I2G, Format::I3G, Format::I4G, Format::I8];

    /// A plan of these.
    pub fn new(formats: impl IntoIterator<Item = (Linear, Format)>) -> Self {
        Self(formats.into_iter().collect())
    }
    /// The format of a linear, if it has one here.
    pub fn format(&self, linear: Linear) -> Option<Format> {
        self.0.get(&linear).copied()
    }

    /// Reads a plan for `linears`: all of them and no others.
    ///
    /// # Errors
    /// If it is no plan, names what the model does not have, a format that linears cannot have, or not all linears.
    pub fn read(path: &Path, linears: &[Linear]) -> Result<Self, Error> {
        let wrong = |what: String| Error::not_readable(path, what);
        let bytes = read_capped(path, BYTES_MAX)?;
        let text = String::from_utf8(bytes).map_err(|_| wrong("not UTF-8, which a plan is".into()))?;
        let file: File = toml::from_str(&text).map_err(|e| wrong(format!("not a plan: {e}")))?;
        let by_name: HashMap<String, Linear> = linears.iter().map(|linear| (linear.to_string(), *linear)).collect();
        let mut plan = Self::default();
        for (name, format) in &file.linears {
            let Some(&linear) = by_name.get(name) else {
                let known = linears.first().map_or_else(String::new, |l| format!(", as {l} is"));
                return Err(wrong(format!("{name:?} is no linear of this model that can be chosen for{known}")));
            };
            let Some(format) = Self::FORMATS.into_iter().find(|f| f.name() == format) else {
                let names = Self::FORMATS.map(Format::name).join(", ");
                return Err(wrong(format!("{name}: {format:?} is none of {names}")));
            };
            plan.0.insert(linear, format);
        }
        match linears.iter().find(|linear| plan.format(**linear).is_none()) {
            Some(&Linear::HEAD) => Err(wrong("head has no format; --head gives it one, or a line here".into())),
            Some(linear) => Err(wrong(format!("{linear} has no format"))),
            None => Ok(plan),
        }
    }

    /// The file's text, in the order of `linears`, each with a remark.
    pub fn write(&self, linears: impl Iterator<Item = (Linear, String)>) -> String {
        let mut text = format!(
            "# The format of each linear: {}.\n# Edit it and pack with --plan.\n[linears]\n",
            Self::FORMATS.map(Format::name).join(", ")
        );
        for (linear, remark) in linears {
            if let Some(format) = self.format(linear) {
                let _ = writeln!(text, "\"{linear}\" = \"{}\" # {remark}", format.name());
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_runtime::image::Kind;

    const LINEARS: [Linear; 2] = [Linear::new(0, Kind::Query), Linear::new(11, Kind::Down)];

    fn read(text: &str) -> Result<Plan, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Plan::read(file.path(), &LINEARS)
    }

    #[test]
    fn what_is_written_is_read() {
        let plan = Plan::new(LINEARS.into_iter().zip([Format::I3G, Format::I8]));
        let text = plan.write(LINEARS.into_iter().map(|linear| (linear, format!("of \"{linear}\""))));
        assert_eq!(read(&text).unwrap(), plan, "{text}");
    }

    /// Everything that is not a plan for this model is refused, with what and where.
    #[test]
    fn hostile_plans_are_refused() {
        let both = "[linears]\n\"0.query\" = \"i8\"\n\"11.down\" = \"i3g128\"\n";
        assert!(read(both).is_ok());
        for (text, says) in [
            ("", "linears"),
            ("\u{0}", "not a plan"),
            ("[linears]\n", "0.query has no format"),
            ("[linears]\n\"0.query\" = \"i8\"\n", "11.down has no format"),
            ("[linears]\n\"0.query\" = \"i8\"\n\"0.query\" = \"i8\"\n", "duplicate"),
            ("[linears]\n\"0.query\" = 8\n", "integer"),
            ("[linears]\n\"0.query\" = \"i5\"\n", "i5"),
            ("[linears]\n\"0.query\" = \"f16\"\n", "f16"),
            ("[linears]\n\"1.query\" = \"i8\"\n", "1.query"),
            ("[linears]\n\"\\u001b[31m\" = \"i8\"\n", "\\u{1b}"),
            ("[linears]\n\"00.query\" = \"i8\"\n", "00.query"),
            (&format!("{both}[other]\n"), "other"),
            (&format!("{both}\"0.gate\" = \"i8\"\n"), "0.gate"),
            (&"[".repeat(100_000), "not a plan"),
            (&format!("linears = {}", "[".repeat(10_000)), "not a plan"),
        ] {
            let error = read(text).expect_err(text).to_string();
            assert!(error.contains(says), "{says:?} is not in {error:?}");
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [0xff, 0xfe]).unwrap();
        assert!(Plan::read(file.path(), &LINEARS).unwrap_err().to_string().contains("UTF-8"));
        file.as_file().set_len(BYTES_MAX + 1).unwrap();
        assert!(Plan::read(file.path(), &LINEARS).unwrap_err().to_string().contains("at most"));
    }
}
