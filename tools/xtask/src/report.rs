//! What `bench` and `arm` have in common: options, the program that they run, rows for other programs, tables for people.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::workspace::{Workspace, cargo};

/// Options of either command.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// What to take of all that there is: pairs such as `--format`, `t2`.
    pub(crate) choice: Vec<(String, String)>,
    /// Where the rows go.
    pub(crate) json: Option<PathBuf>,
    /// Where the drawing goes.
    pub(crate) plot: Option<PathBuf>,
    /// The Markdown file whose part of this command is replaced by its tables.
    pub(crate) page: Option<PathBuf>,
}

impl Options {
    /// Reads `--NAME VALUE` or `--NAME=VALUE`. `choice` are the names that choose, `files` those of files to write.
    pub(crate) fn read(arguments: &[String], choice: &[&str], files: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (argument.as_str(), None),
            };
            if !choice.contains(&name) && !files.contains(&name) {
                bail!("there is no option `{name}`; there are {}", [choice, files].concat().join(", "));
            }
            let value = value.or_else(|| rest.next().cloned()).with_context(|| format!("`{name}` has no value"))?;
            match name {
                "--json" => options.json = Some(value.into()),
                "--plot" => options.plot = Some(value.into()),
                "--page" => options.page = Some(value.into()),
                _ => options.choice.push((name.to_owned(), value)),
            }
        }
        Ok(options)
    }

    /// Whether `value` was chosen by `name`: also if nothing was.
    pub(crate) fn chosen(&self, name: &str, value: &str) -> bool {
        let mut given = self.choice.iter().filter(|(key, _)| key == name).peekable();
        given.peek().is_none() || given.any(|(_, chosen)| chosen == value)
    }

    /// Writes the rows, with the machine and the commit.
    pub(crate) fn write_rows(&self, workspace: &Workspace, rows: &[Value]) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        let all = json!({"machine": machine(), "commit": commit(workspace), "rows": rows});
        write(path, &format!("{all:#}\n"))
    }

    /// Puts `text` into the page, between the marks of `name`.
    pub(crate) fn write_page(&self, name: &str, text: &str) -> Result<()> {
        let Some(path) = &self.page else { return Ok(()) };
        let old = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let new = replaced(&old, name, text)
            .with_context(|| format!("{} has no part marked `<!-- {name} -->`", path.display()))?;
        write(path, &new)
    }
}

/// Writes a file.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

/// `page` with `text` between `<!-- name -->` and `<!-- end of name -->`.
fn replaced(page: &str, name: &str, text: &str) -> Option<String> {
    let (before, rest) = page.split_once(&format!("<!-- {name} -->"))?;
    let end = format!("<!-- end of {name} -->");
    let (_, after) = rest.split_once(&end)?;
    Some(format!("{before}<!-- {name} -->\n\n{}\n\n{end}{after}", text.trim()))
}

/// The machine in words that matter for speed.
pub(crate) fn machine() -> Value {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = cpus.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    json!({
        "cpu": model.map_or(std::env::consts::ARCH, |(_, name)| name.trim()),
        "cores": std::thread::available_parallelism().map_or(1, |cores| cores.get()),
        "kernel": kernel.trim(),
    })
}

/// The commit of the tree, and whether files differ from it.
pub(crate) fn commit(workspace: &Workspace) -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).current_dir(&workspace.root).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    match (git(&["rev-parse", "--short=12", "HEAD"]), git(&["status", "--porcelain"])) {
        (Some(commit), Some(changes)) if changes.is_empty() => commit,
        (Some(commit), _) => format!("{commit} with changes"),
        (None, _) => "unknown".to_owned(),
    }
}

/// Builds the program that multiplies (`tests/benches/kernels`) as it is released, and answers where it lies.
pub(crate) fn kernels(workspace: &Workspace, target: Option<&str>) -> Result<String> {
    let mut command = cargo();
    command.args(["bench", "--package", "bitnet-tests", "--bench", "kernels", "--no-run"]);
    if let Some(target) = target {
        command.args(["--target", target]);
    }
    let output = command
        .args(["--message-format", "json-render-diagnostics"])
        .current_dir(&workspace.root)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo")?;
    if !output.status.success() {
        bail!("the program that measures does not build");
    }
    let messages = output.stdout.split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let built = messages.filter(|message: &Value| message["target"]["name"] == "kernels");
    let mut paths = built.filter_map(|message| message["executable"].as_str().map(str::to_owned));
    paths.next().context("cargo built no program `kernels`")
}

/// A table in Markdown that is also legible as it stands: columns of equal width, numbers to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].chars().count(), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let is_text = |column: usize| rows.iter().any(|row| row[column].starts_with(|c: char| c.is_ascii_lowercase()));
    let line = |cells: &[String]| {
        let padded: Vec<String> = (cells.iter().zip(&widths).enumerate())
            .map(|(i, (cell, &width))| if is_text(i) { format!("{cell:width$}") } else { format!("{cell:>width$}") })
            .collect();
        format!("| {} |\n", padded.join(" | "))
    };
    let mut text = line(&head.iter().map(|&name| name.to_owned()).collect::<Vec<_>>());
    let rule = |(i, &width): (usize, &usize)| {
        if is_text(i) { format!("{:-<1$}", "", width + 2) } else { format!("{:-<1$}:", "", width + 1) }
    };
    text.push_str(&format!("|{}|\n", widths.iter().enumerate().map(rule).collect::<Vec<_>>().join("|")));
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &[&str]) -> Result<Options> {
        let words: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        Options::read(&words, &["--format", "--op"], &["--json"])
    }

    #[test]
    fn options_choose_and_name_files() {
        let options = read(&["--format", "t2", "--json=a.json", "--format=tl"]).unwrap();
        assert_eq!(options.json, Some("a.json".into()));
        assert!(
            options.chosen("--format", "t2") && options.chosen("--format", "tl") && !options.chosen("--format", "i8")
        );
        assert!(options.chosen("--op", "matvec"), "what no option names is chosen whole");
        for (words, complaint) in [
            (&["--formats", "t2"][..], "no option `--formats`; there are --format, --op, --json"),
            (&["t2"], "no option `t2`"),
            (&["--plot", "a.svg"], "no option `--plot`"),
            (&["--json"], "`--json` has no value"),
        ] {
            let error = read(words).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn a_part_of_a_page_is_replaced_and_nothing_else() {
        let page = "a\n<!-- bench -->\nold\n<!-- end of bench -->\nb\n<!-- arm -->\nc\n<!-- end of arm -->\n";
        let new = replaced(page, "bench", "new\n").unwrap();
        let expected = "a\n<!-- bench -->\n\nnew\n\n<!-- end of bench -->\nb\n<!-- arm -->\nc\n<!-- end of arm -->\n";
        assert_eq!(new, expected);
        assert_eq!(replaced(&new, "bench", "new").unwrap(), expected, "again gives the same");
        assert_eq!(replaced(page, "board", "new"), None);
        assert_eq!(replaced("<!-- bench -->", "bench", "new"), None);
    }

    #[test]
    fn tables_are_aligned() {
        let rows = [vec!["t2".to_owned(), "16.0".to_owned()], vec!["tl128".to_owned(), "8.1".to_owned()]];
        let expected = "| format |   n1 |\n|--------|-----:|\n| t2     | 16.0 |\n| tl128  |  8.1 |\n";
        assert_eq!(table(&["format", "n1"], &rows), expected);
    }
}
