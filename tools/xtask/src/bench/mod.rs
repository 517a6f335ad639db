//! `cargo xtask bench`: how fast this machine's kernels are, beside a loop that only reads the same bytes.
//!
//! The program that measures is `tests/benches/kernels`; its rows become one table, a file of rows, and a drawing.

mod plot;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::report::{Options, commit, kernels, machine, table, write};
use crate::workspace::Workspace;

const CHOICE: [&str; 5] = ["--backend", "--op", "--format", "--shape", "--threads"];

/// One row, as the program prints it and `--json` writes it.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    backend: String,
    op: String,
    format: String,
    rows: u64,
    cols: u64,
    state: String,
    threads: u64,
    tokens: f64,
    weights_per_ns: f64,
    gb_per_s: f64,
    bandwidth_share: f64,
    read_gb_per_s: f64,
    prepare_us: f64,
}

impl Row {
    fn read(value: &Value) -> Result<Self> {
        let text = |key: &str| value[key].as_str().map(str::to_owned).with_context(|| format!("a row without `{key}`"));
        let whole = |key: &str| value[key].as_u64().with_context(|| format!("a row without a whole `{key}`"));
        let number = |key: &str| match value[key].as_f64() {
            Some(number) if number.is_finite() && number >= 0.0 => Ok(number),
            _ => bail!("a row without a number `{key}`"),
        };
        Ok(Self {
            backend: text("backend")?,
            op: text("op")?,
            format: text("format")?,
            rows: whole("rows")?,
            cols: whole("cols")?,
            state: text("state")?,
            threads: whole("threads")?,
            tokens: number("tokens")?,
            weights_per_ns: number("weights_per_ns")?,
            gb_per_s: number("gb_per_s")?,
            bandwidth_share: number("bandwidth_share")?,
            read_gb_per_s: number("read_gb_per_s")?,
            prepare_us: number("prepare_us")?,
        })
    }

    fn same_kernel(&self, other: &Self) -> bool {
        let key =
            |row: &Self| (row.backend.clone(), row.op.clone(), row.format.clone(), row.rows, row.cols, row.threads);
        key(self) == key(other)
    }
}

/// Runs the command.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let options = Options::read(arguments, &CHOICE, &["--json", "--plot", "--page"])?;
    let program = kernels(workspace, None)?;
    let (values, rows) = measured(&program, &options)?;
    let table = table(&HEAD, &lines(&rows)?);
    let about = machine();
    let note = format!(
        "{}, {} cores, Linux {}. Commit {}. weights/ns (of matmat: products/ns); GB/s of stored weights; share of what a \
         loop that only reads these bytes reached in the same state with as many threads in the same run.",
        about["cpu"].as_str().unwrap_or_default(),
        about["cores"],
        about["kernel"].as_str().unwrap_or_default(),
        commit(workspace)
    );
    say!("{note}\n\n{table}");
    options.write_rows(workspace, &values)?;
    if let Some(path) = &options.plot {
        write(path, &plot::roofline(&rows))?;
    }
    options.write_page("bench", &format!("{note}\n\n{table}"))?;
    Ok(true)
}

/// Runs the program; what it measured last is said while it goes on.
fn measured(program: &str, options: &Options) -> Result<(Vec<Value>, Vec<Row>)> {
    let words = options.choice.iter().flat_map(|(name, value)| [name, value]);
    let mut command = Command::new(program);
    let mut child =
        command.arg("measure").args(words).stdout(Stdio::piped()).spawn().context("starting the program")?;
    let (mut values, mut rows) = (Vec::new(), Vec::new());
    for line in BufReader::new(child.stdout.take().context("its output")?).lines() {
        let value: Value = serde_json::from_str(&line?).context("reading what was measured")?;
        let row = Row::read(&value)?;
        eprintln!(
            "{} {} {} {}x{} {}, {} threads: {:.1} weights/ns",
            row.backend, row.op, row.format, row.rows, row.cols, row.state, row.threads, row.weights_per_ns
        );
        values.push(value);
        rows.push(row);
    }
    if !child.wait()?.success() {
        bail!("nothing was measured");
    }
    if rows.is_empty() {
        bail!("no kernel was chosen: no chosen operation takes a chosen format, or this CPU has no fast backend");
    }
    Ok((values, rows))
}

const HEAD: [&str; 13] = [
    "backend",
    "op",
    "format",
    "shape",
    "threads",
    "hot w/ns",
    "GB/s",
    "share",
    "cold w/ns",
    "GB/s",
    "share",
    "read GB/s",
    "prepare us",
];

/// One line for each two rows, hot and cold. The bandwidth read is the cold one.
fn lines(rows: &[Row]) -> Result<Vec<Vec<String>>> {
    let (pairs, rest) = rows.as_chunks::<2>();
    if !rest.is_empty() {
        bail!("rows come in pairs, hot and cold; one is alone");
    }
    pairs.iter().map(line).collect()
}

fn line([hot, cold]: &[Row; 2]) -> Result<Vec<String>> {
    if hot.state != "hot" || cold.state != "cold" || !hot.same_kernel(cold) {
        bail!("rows come in pairs, hot and cold; these are none: {hot:?}, {cold:?}");
    }
    let mut cells = vec![hot.backend.clone(), hot.op.clone(), hot.format.clone()];
    cells.extend([format!("{}x{}", hot.rows, hot.cols), hot.threads.to_string()]);
    for row in [hot, cold] {
        let share = format!("{:.0} %", 100.0 * row.bandwidth_share);
        cells.extend([format!("{:.1}", row.weights_per_ns), format!("{:.1}", row.gb_per_s), share]);
    }
    cells.extend([format!("{:.1}", cold.read_gb_per_s), format!("{:.1}", cold.prepare_us)]);
    Ok(cells)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::json;

    fn value(state: &str) -> Value {
        json!({
            "backend": "avx2", "op": "matvec", "format": "t2", "rows": 2560, "cols": 6912, "state": state, "threads": 2,
            "tokens": 1, "weights_per_ns": 91.26, "gb_per_s": 22.8, "bandwidth_share": 0.875, "read_gb_per_s": 26.0,
            "prepare_us": 0.02,
        })
    }

    /// A row as if it had been measured.
    pub(in crate::bench) fn row(state: &str) -> Row {
        Row::read(&value(state)).unwrap()
    }

    #[test]
    fn a_row_lacks_nothing() {
        for key in value("hot").as_object().unwrap().keys() {
            let mut broken = value("hot");
            broken.as_object_mut().unwrap().remove(key);
            let error = Row::read(&broken).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let mut negative = value("hot");
        negative["gb_per_s"] = json!(-1);
        assert!(Row::read(&negative).is_err());
    }

    #[test]
    fn hot_and_cold_stand_in_one_line() {
        let lines = lines(&[row("hot"), Row { weights_per_ns: 60.0, ..row("cold") }]).unwrap();
        let expected =
            ["avx2", "matvec", "t2", "2560x6912", "2", "91.3", "22.8", "88 %", "60.0", "22.8", "88 %", "26.0", "0.0"];
        assert_eq!(lines, [expected]);
        assert_eq!(expected.len(), HEAD.len());
    }

    #[test]
    fn rows_that_do_not_belong_together_are_an_error() {
        assert!(lines(&[row("hot")]).is_err());
        assert!(lines(&[row("cold"), row("hot")]).is_err());
        assert!(lines(&[row("hot"), Row { threads: 1, ..row("cold") }]).is_err());
    }
}
