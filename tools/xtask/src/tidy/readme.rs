//! The README's section "Navigating" says what each folder is for; it must not lie and must not leave one out.

use std::collections::BTreeSet;

use super::{Finding, Tree};

const FILE: &str = "README.md";
const SECTION: &str = "Navigating";

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let Some(readme) = tree.files.iter().find(|file| file.path == FILE) else {
        return vec![Finding::new(FILE, "there is none")];
    };
    let Some(section) = section(&readme.text) else {
        return vec![Finding::new(FILE, format!("it has no section \"{SECTION}\""))];
    };
    let folders = folders(tree);
    let named: BTreeSet<String> =
        code_spans(section).filter_map(|span| span.strip_suffix('/')).map(str::to_owned).collect();
    let mut findings = Vec::new();
    for folder in named.iter().filter(|folder| !folders.contains(*folder)) {
        findings.push(Finding::new(FILE, format!("it names `{folder}/`, which does not exist")));
    }
    // Folders that begin with a dot hold settings of tools, which look for them there.
    for folder in folders.iter().filter(|folder| !folder.contains('/') && !folder.starts_with('.')) {
        let inside = format!("{folder}/");
        if !named.iter().any(|name| name == folder || name.starts_with(&inside)) {
            findings.push(Finding::new(FILE, format!("\"{SECTION}\" does not name `{folder}/`")));
        }
    }
    findings
}

/// What follows the heading, up to the next heading of the same rank or a higher one.
fn section(text: &str) -> Option<&str> {
    let heading = format!("## {SECTION}");
    let start = text.lines().find(|line| line.trim_end() == heading)?;
    let start = start.as_ptr() as usize - text.as_ptr() as usize + start.len();
    let rest = &text[start..];
    let end = ["\n## ", "\n# "].iter().filter_map(|next| rest.find(next)).min().unwrap_or(rest.len());
    Some(&rest[..end])
}

/// What stands between single backticks, line by line.
fn code_spans(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split('`').skip(1).step_by(2))
}

/// Every folder that holds a file, at any depth.
fn folders(tree: &Tree) -> BTreeSet<String> {
    let mut folders = BTreeSet::new();
    for file in &tree.files {
        for (at, _) in file.path.match_indices('/') {
            folders.insert(file.path[..at].to_owned());
        }
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(readme: &str) -> Vec<String> {
        let files =
            [("README.md", readme), ("runtime/kernel/Cargo.toml", ""), ("tools/xtask/Cargo.toml", ""), (".ci/run", "")];
        check(&Tree::of(&files)).into_iter().map(|finding| finding.what).collect()
    }

    #[test]
    fn a_section_that_names_every_folder_passes() {
        let readme = "# X\n\n## Navigating\n\n- `runtime/` runs.\n- `tools/xtask/` checks.\n\n## More\n`gone/`\n";
        assert_eq!(found(readme), Vec::<String>::new());
    }

    #[test]
    fn a_folder_left_out_or_made_up_is_found() {
        let readme = "## Navigating\n`runtime/kernel/` and `gone/` and `cargo test`\n";
        assert_eq!(found(readme), ["it names `gone/`, which does not exist", "\"Navigating\" does not name `tools/`"]);
    }

    #[test]
    fn a_missing_section_or_file_is_found() {
        assert_eq!(found("# X\n"), ["it has no section \"Navigating\""]);
        assert_eq!(check(&Tree::of(&[("a/b", "")])).len(), 1);
    }
}
