//! Words that may stand in some places only.
//!
//! The words are put together from parts here, so that this file does not break its own rules.

use super::code::{blank, find_word, line_of};
use super::{Finding, Tree};
use crate::workspace::File;

/// Where `unsafe` may stand: the kernels, what talks to a board or to Bochs, the memory map, and the thread pool, whose workers
/// outlive a job and yet work on what its caller borrows for it. The beginning of a path, or a whole one.
const UNSAFE_PLACES: &[&str] = &[
    "kernels-neon/",
    "kernels-sve2/",
    "kernels-x86/",
    "boards/support/",
    "tests/bochs/",
    "runtime/src/source/map.rs",
    "runtime/src/parallel/items.rs",
    "runtime/src/parallel/pool.rs",
];

/// The one file of the runtime that names the kernel crates, so that adding one is one line.
const BACKENDS: &str = "runtime/src/backend.rs";

/// Words that mark code as unfinished, in code, comments and settings.
const UNFINISHED_WORDS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];

/// The same as code: macros and an attribute.
const UNFINISHED_CODE: &[&str] = &[concat!("to", "do!"), concat!("unimple", "mented!"), concat!("#[ig", "nore")];

/// The beginnings of paths that exist on someone's machine and not on another's.
const MACHINE_PATHS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/Us", "ers/"),
    concat!("/wo", "rk/"),
    concat!("/tm", "p/"),
    concat!("C:", "\\"),
];

pub(super) fn unsafe_places(tree: &Tree) -> Vec<Finding> {
    let outside = |file: &&File| !UNSAFE_PLACES.iter().any(|place| file.path.starts_with(place));
    let what = "`unsafe` outside the places that may have it";
    rust(tree).filter(outside).flat_map(|file| in_code(file, "unsafe", what)).collect()
}

pub(super) fn backend_names(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in rust(tree).filter(|file| file.path.starts_with("runtime/src/") && file.path != BACKENDS) {
        let code = blank(&file.text);
        for (at, _) in code.match_indices("bitnet_kernels_") {
            findings.push(finding(file, at, &format!("names a kernel crate; {BACKENDS} is the place for that")));
        }
    }
    findings
}

pub(super) fn unfinished(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &tree.files {
        let program =
            ["rs", "toml", "py", "sh", "c", "s", "x"].iter().any(|kind| file.path.ends_with(&format!(".{kind}")));
        if program || file.path.starts_with(".ci/") {
            for word in UNFINISHED_WORDS {
                findings.extend(find_word(&file.text, word).map(|at| finding(file, at, &format!("`{word}`"))));
            }
        }
    }
    for file in rust(tree) {
        let code = blank(&file.text);
        for part in UNFINISHED_CODE {
            findings.extend(code.match_indices(part).map(|(at, _)| finding(file, at, &format!("`{part}`"))));
        }
    }
    findings
}

pub(super) fn machine_paths(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for file in &tree.files {
        for part in MACHINE_PATHS {
            for (at, _) in file.text.match_indices(part) {
                // Inside a longer path, such as one relative to the repository, the part means something else.
                let before = file.text[..at].chars().next_back();
                if !before.is_some_and(|before| before.is_alphanumeric() || "-_.}".contains(before)) {
                    findings.push(finding(file, at, &format!("`{part}` is a path of one machine")));
                }
            }
        }
    }
    findings
}

fn rust(tree: &Tree) -> impl Iterator<Item = &File> {
    tree.files.iter().filter(|file| file.path.ends_with(".rs"))
}

fn in_code(file: &File, word: &str, what: &str) -> Vec<Finding> {
    let code = blank(&file.text);
    find_word(&code, word).map(|at| finding(file, at, what)).collect()
}

fn finding(file: &File, at: usize, what: &str) -> Finding {
    Finding::new(format!("{}:{}", file.path, line_of(&file.text, at)), what)
}

#[cfg(test)]
mod tests {
    use super::super::places;
    use super::*;

    #[test]
    fn unsafe_is_found_outside_its_places_and_in_code_only() {
        // In two parts, for this is no such place.
        let code = concat!(
            "#![forbid(unsafe_code)]\n// un",
            "safe\nfn f() { g(\"un",
            "safe\") }\nfn h() { un",
            "safe { i() } }"
        );
        let tree = Tree::of(&[
            ("runtime/src/model/forward.rs", code),
            ("kernels-neon/src/dotprod.rs", code),
            ("kernels-neon-extra/src/lib.rs", code),
            ("boards/support/src/mmu.rs", code),
            ("boards/rpi5/src/main.rs", code),
            ("runtime/src/source/map.rs", code),
            ("runtime/src/source/mapped.rs", code),
        ]);
        let expected = [
            "runtime/src/model/forward.rs:4",
            "kernels-neon-extra/src/lib.rs:4",
            "boards/rpi5/src/main.rs:4",
            "runtime/src/source/mapped.rs:4",
        ];
        assert_eq!(places(&unsafe_places(&tree)), expected);
    }

    #[test]
    fn kernel_crates_are_named_in_one_file_of_the_runtime() {
        let code = "/// As bitnet_kernels_x86 does.\nuse bitnet_kernels_x86::avx2;";
        let tree = Tree::of(&[
            ("runtime/src/backend.rs", code),
            ("runtime/src/model/mod.rs", code),
            ("tests/src/lib.rs", code),
        ]);
        assert_eq!(places(&backend_names(&tree)), ["runtime/src/model/mod.rs:2"]);
    }

    #[test]
    fn what_is_unfinished_is_found() {
        let (word, macro_call, attribute) = (UNFINISHED_WORDS[0], UNFINISHED_CODE[0], UNFINISHED_CODE[2]);
        let rust = format!("// {word}: more\nfn f() {{ {macro_call}() }}\n{attribute} = \"slow\"]\nfn g() {{}}\n");
        let text = format!("A sentence about {word}.");
        let harmless = format!("// a{word}b\nconst S: &str = \"{macro_call}\";");
        let settings = format!("key = 1 # {word}");
        let tree =
            Tree::of(&[("src/a.rs", &rust), ("README.md", &text), ("src/b.rs", &harmless), ("x.toml", &settings)]);
        assert_eq!(places(&unfinished(&tree)), ["src/a.rs:1", "x.toml:1", "src/a.rs:2", "src/a.rs:3"]);
    }

    #[test]
    fn paths_of_a_machine_are_found_and_longer_paths_are_not() {
        let part = MACHINE_PATHS[0];
        let tree = Tree::of(&[
            ("a.md", &format!("see {part}me/notes")),
            ("b.rs", &format!("\n\"{part}me\"")),
            ("c.md", &format!("docs{part}page and ..{part}page")),
        ]);
        assert_eq!(places(&machine_paths(&tree)), ["a.md:1", "b.rs:2"]);
    }
}
