//! Rules about the tree itself: what a reviewer would otherwise have to remember.
//!
//! Each rule is a function from the files and packages to what it found wrong, so that its test gives it a small tree
//! that breaks it. What a rule allows is a table at the top of its file.

mod arrows;
mod code;
mod modules;
mod readme;
mod words;

use anyhow::Result;

use crate::workspace::{File, Package, Workspace};

/// Something that breaks a rule, and where: a path, with the line if there is one.
#[derive(Debug, PartialEq, Eq)]
struct Finding {
    place: String,
    what: String,
}

impl Finding {
    fn new(place: impl Into<String>, what: impl Into<String>) -> Self {
        Self { place: place.into(), what: what.into() }
    }
}

/// The tree as the rules see it.
#[derive(Debug)]
struct Tree {
    files: Vec<File>,
    packages: Vec<Package>,
}

type Rule = fn(&Tree) -> Vec<Finding>;

const RULES: &[(&str, Rule)] = &[
    ("dependencies follow the arrows", arrows::check),
    ("unsafe stays in its places", words::unsafe_places),
    ("backends are named in one place", words::backend_names),
    ("no file is dead", modules::dead_files),
    ("nothing is left unfinished", words::unfinished),
    ("no path of one machine", words::machine_paths),
    ("README names the folders", readme::check),
];

/// Checks every rule and prints what breaks one. The answer is how many rules passed and failed.
pub(crate) fn report(workspace: &Workspace) -> Result<(usize, usize)> {
    let files = workspace.files()?;
    let packages = workspace.packages(&files)?;
    let tree = Tree { files, packages };
    let mut passed = 0;
    for (name, rule) in RULES {
        let findings = rule(&tree);
        say!("tidy: {name}: {}", if findings.is_empty() { "ok" } else { "FAILED" });
        for finding in &findings {
            say!("  {}: {}", finding.place, finding.what);
        }
        passed += usize::from(findings.is_empty());
    }
    Ok((passed, RULES.len() - passed))
}

#[cfg(test)]
impl Tree {
    /// A small tree of files alone, for the tests of the rules.
    fn of(files: &[(&str, &str)]) -> Self {
        let file = |&(path, text): &(&str, &str)| File { path: path.to_owned(), text: text.to_owned() };
        Self { files: files.iter().map(file).collect(), packages: Vec::new() }
    }
}

#[cfg(test)]
fn places(findings: &[Finding]) -> Vec<&str> {
    findings.iter().map(|finding| finding.place.as_str()).collect()
}
