//! Dead files: Rust files that no target of any package reaches. Nothing compiles them, so nothing keeps them right.

use std::collections::{HashMap, HashSet};

use super::code::{blank, find_word, is_word};
use super::{Finding, Tree};

pub(super) fn dead_files(tree: &Tree) -> Vec<Finding> {
    let files: HashMap<&str, &str> = tree
        .files
        .iter()
        .filter(|file| file.path.ends_with(".rs"))
        .map(|file| (file.path.as_str(), file.text.as_str()))
        .collect();
    let roots = tree.packages.iter().flat_map(|package| &package.roots).cloned();
    // A root keeps the modules of its file beside it, as does a file named by `#[path]` and one named mod.rs.
    let mut open: Vec<(String, bool)> = roots.map(|path| (path, true)).collect();
    let mut reached: HashSet<String> = HashSet::new();
    while let Some((path, beside)) = open.pop() {
        let Some(text) = files.get(path.as_str()) else { continue };
        if reached.insert(path.clone()) {
            open.extend(
                named(&path, text, beside).into_iter().flatten().filter(|(p, _)| files.contains_key(p.as_str())),
            );
        }
    }
    let mut dead: Vec<&str> = files.into_keys().filter(|path| !reached.contains(*path)).collect();
    dead.sort_unstable();
    dead.into_iter().map(|path| Finding::new(path, "no module declaration and no target leads to this file")).collect()
}

/// The files that a file may lead to, with whether the modules of each lie beside it: for every declaration the places
/// where rustc would look.
fn named(path: &str, text: &str, beside: bool) -> Vec<Vec<(String, bool)>> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let stem = name.trim_end_matches(".rs");
    let own = if beside || stem == "mod" { folder.to_owned() } else { join(folder, stem) };
    let code = blank(text);
    let mut answer = Vec::new();
    for declaration in declarations(&code, text) {
        let inside = declaration.inside.iter().fold(own.clone(), |folder, module| join(&folder, module));
        answer.push(match declaration.file {
            Some(file) if declaration.inside.is_empty() => vec![(join(folder, &file), true)],
            Some(file) => vec![(join(&inside, &file), true)],
            None => {
                let module = join(&inside, &declaration.name);
                vec![(format!("{module}.rs"), false), (join(&module, "mod.rs"), true)]
            }
        });
    }
    for at in find_word(&code, "include") {
        if let Some(file) = code[at..].strip_prefix("include!(").and_then(|_| string_after(&code, text, at)) {
            answer.push(vec![(join(folder, &file), true)]);
        }
    }
    answer
}

/// `mod name;` with the modules written out around it, and the file that an attribute names.
struct Declaration {
    name: String,
    inside: Vec<String>,
    file: Option<String>,
}

fn declarations(code: &str, text: &str) -> Vec<Declaration> {
    let bytes = code.as_bytes();
    let mut answer = Vec::new();
    // The modules that are open, each with the depth of braces inside it.
    let mut inside: Vec<(String, usize)> = Vec::new();
    let (mut depth, mut file, mut at) = (0, None, 0);
    while at < bytes.len() {
        match bytes[at] {
            b'{' => depth += 1,
            b'}' => {
                if inside.last().is_some_and(|(_, opened)| *opened == depth) {
                    inside.pop();
                }
                depth = depth.saturating_sub(1);
                file = None;
            }
            b';' => file = None,
            b'#' if bytes.get(at + 1) == Some(&b'[') => {
                let end = attribute_end(bytes, at + 1);
                let named = find_word(&code[at..end], "path").next().map(|path| at + path);
                file = named.and_then(|path| string_after(code, text, path)).or(file);
                at = end;
                continue;
            }
            byte if is_word(byte) => {
                let (word, end) = word(code, at);
                at = end;
                if word == "mod" {
                    let (name, end) = word_after(code, at);
                    let next = end + code[end..].len() - code[end..].trim_start().len();
                    match bytes.get(next) {
                        Some(b';') if !name.is_empty() => {
                            let inside = inside.iter().map(|(name, _)| name.clone()).collect();
                            answer.push(Declaration { name: name.to_owned(), inside, file: file.take() });
                            at = next;
                        }
                        Some(b'{') if !name.is_empty() => {
                            // `#[path]` on a module that is written out names its folder.
                            inside.push((file.take().unwrap_or_else(|| name.to_owned()), depth + 1));
                            at = next;
                        }
                        _ => {}
                    }
                }
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    answer
}

/// The end of the bracket that opens at `at`.
fn attribute_end(bytes: &[u8], at: usize) -> usize {
    let mut depth = 0;
    for (index, byte) in bytes.iter().enumerate().skip(at) {
        match byte {
            b'[' => depth += 1,
            b']' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return index + 1;
        }
    }
    bytes.len()
}

/// The first string that begins at or after `at`: its place is found in the code, its content in the text.
fn string_after(code: &str, text: &str, at: usize) -> Option<String> {
    let start = at + code[at..].find('"')? + 1;
    let end = start + code[start..].find('"')?;
    Some(text[start..end].to_owned())
}

fn word(code: &str, at: usize) -> (&str, usize) {
    let length = code.as_bytes()[at..].iter().take_while(|&&byte| is_word(byte)).count();
    (&code[at..at + length], at + length)
}

fn word_after(code: &str, at: usize) -> (&str, usize) {
    let spaces = code[at..].len() - code[at..].trim_start().len();
    word(code, at + spaces)
}

/// Joins a folder and a relative path, taking out `.` and `..`.
fn join(folder: &str, path: &str) -> String {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;
    use crate::workspace::Package;

    fn dead(roots: &[&str], files: &[(&str, &str)]) -> Vec<String> {
        let mut tree = Tree::of(files);
        let roots = roots.iter().map(|&root| root.to_owned()).collect();
        tree.packages.push(Package { roots, ..Package::default() });
        places(&dead_files(&tree)).into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn modules_are_followed_in_both_spellings() {
        let files = [
            ("src/lib.rs", "pub mod a;\n#[cfg(unix)]\npub(crate) mod b;"),
            ("src/a.rs", "mod c;"),
            ("src/a/c.rs", ""),
            ("src/b/mod.rs", "mod d;"),
            ("src/b/d.rs", ""),
        ];
        assert_eq!(dead(&["src/lib.rs"], &files), Vec::<String>::new());
    }

    #[test]
    fn a_file_that_nothing_names_is_found() {
        let files = [
            ("src/lib.rs", "// mod comment;\nconst S: &str = \"mod string;\";\nmod a;"),
            ("src/a.rs", "fn modify() {}"),
            ("src/comment.rs", ""),
            ("src/string.rs", ""),
            ("src/a/orphan.rs", ""),
            ("src/bin/tool.rs", ""),
        ];
        let expected = ["src/a/orphan.rs", "src/bin/tool.rs", "src/comment.rs", "src/string.rs"];
        assert_eq!(dead(&["src/lib.rs"], &files), expected);
        assert_eq!(dead(&["src/lib.rs", "src/bin/tool.rs"], &files).len(), 3, "a target of its own is alive");
    }

    #[test]
    fn a_dead_file_does_not_keep_its_own_modules_alive() {
        let files = [("src/lib.rs", ""), ("src/a.rs", "mod b;"), ("src/a/b.rs", "")];
        assert_eq!(dead(&["src/lib.rs"], &files), ["src/a.rs", "src/a/b.rs"]);
    }

    #[test]
    fn modules_written_out_are_folders() {
        let files = [
            ("src/main.rs", "mod a { fn f() { if x { } } pub mod b { mod c; } mod d; } mod e;"),
            ("src/a/b/c.rs", ""),
            ("src/a/d.rs", ""),
            ("src/e.rs", ""),
            ("src/d.rs", ""),
        ];
        assert_eq!(dead(&["src/main.rs"], &files), ["src/d.rs"]);
    }

    #[test]
    fn a_named_path_counts_in_place_of_the_usual_one() {
        let files = [
            ("tests/all.rs", "#[path = \"../parts/common.rs\"] mod common;\n#[cfg_attr(x, path = \"y.rs\")]\nmod z;"),
            ("parts/common.rs", "mod beside;"),
            ("parts/beside.rs", ""),
            ("tests/y.rs", ""),
            ("tests/common.rs", ""),
            ("src/lib.rs", "include!(\"table.rs\");"),
            ("src/table.rs", ""),
        ];
        assert_eq!(dead(&["tests/all.rs", "src/lib.rs"], &files), ["tests/common.rs"]);
    }
}
