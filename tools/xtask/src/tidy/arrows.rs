//! The arrows: which package may depend on which.
//!
//! ```text
//! bitnet-kernel <- kernels-* <- bitnet-runtime <- bitnet-host <- boards/*, tools/* <- tests
//! ```
//!
//! The place of a package in the tree decides its layer, and dev-dependencies count as much as others: a kernel crate
//! whose tests need the runtime cannot be used or tested alone. Crates from outside are no matter of this rule.

use super::{Finding, Tree};

/// A layer: the folders it holds, and those that they may depend on. A pattern ends with `*` or names one folder; the
/// first that fits counts.
struct Layer {
    folders: &'static str,
    may_use: &'static [&'static str],
}

const LAYERS: &[Layer] = &[
    Layer { folders: "runtime/kernel", may_use: &[] },
    // A CPU with SVE has NEON too.
    Layer { folders: "kernels-sve2", may_use: &["runtime/kernel", "kernels-neon"] },
    Layer { folders: "kernels-*", may_use: &["runtime/kernel"] },
    Layer { folders: "runtime/host", may_use: &["runtime/kernel", "runtime"] },
    Layer { folders: "runtime", may_use: &["runtime/kernel", "kernels-*"] },
    Layer { folders: "boards/support", may_use: &["runtime/kernel", "runtime"] },
    Layer { folders: "boards/*", may_use: &["runtime/kernel", "runtime", "runtime/host", "boards/support"] },
    Layer { folders: "tools/xtask", may_use: &[] },
    Layer { folders: "tools/bitnet-pack", may_use: &["runtime/kernel", "runtime", "runtime/host"] },
    Layer { folders: "tools/*", may_use: &["runtime/kernel", "runtime", "runtime/host", "tools/bitnet-pack"] },
    Layer {
        folders: "tests",
        may_use: &[
            "runtime/kernel",
            "kernels-*",
            "runtime",
            "runtime/host",
            "boards/*",
            "tools/bitnet",
            "tools/bitnet-pack",
        ],
    },
    // Fuzzers and the like stand beside the tests and may use what they use, and them.
    Layer { folders: "tests/*", may_use: &["runtime/kernel", "kernels-*", "runtime", "tools/bitnet-pack", "tests"] },
];

pub(super) fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for package in &tree.packages {
        let place = format!("{}/Cargo.toml", package.folder);
        let Some(layer) = LAYERS.iter().find(|layer| fits(layer.folders, &package.folder)) else {
            findings.push(Finding::new(place, format!("`{}` stands in no layer of the architecture", package.name)));
            continue;
        };
        for used in &package.depends_on {
            if !layer.may_use.iter().any(|pattern| fits(pattern, used)) {
                let allowed = if layer.may_use.is_empty() { "nothing".to_owned() } else { layer.may_use.join(", ") };
                let what = format!("`{}` depends on {used}; here it may be {allowed}", package.name);
                findings.push(Finding::new(&place, what));
            }
        }
    }
    findings
}

fn fits(pattern: &str, folder: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => folder.len() > start.len() && folder.starts_with(start),
        None => pattern == folder,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workspace::Package;

    fn found(folder: &str, depends_on: &[&str]) -> usize {
        let depends_on = depends_on.iter().map(|&folder| folder.to_owned()).collect();
        let package = Package { name: "x".to_owned(), folder: folder.to_owned(), depends_on, roots: Vec::new() };
        check(&Tree { files: Vec::new(), packages: vec![package] }).len()
    }

    #[test]
    fn arrows_point_down() {
        assert_eq!(found("runtime/kernel", &[]), 0);
        assert_eq!(found("kernels-neon", &["runtime/kernel"]), 0);
        assert_eq!(found("runtime", &["runtime/kernel", "kernels-neon", "kernels-x86"]), 0);
        assert_eq!(found("tools/bitnet", &["runtime", "runtime/kernel", "tools/bitnet-pack"]), 0);
        assert_eq!(found("boards/rpi5", &["runtime", "boards/support"]), 0);
        assert_eq!(found("tests", &["runtime", "kernels-x86", "tools/bitnet-pack"]), 0);
    }

    #[test]
    fn every_arrow_up_or_sideways_is_found() {
        assert_eq!(found("runtime/kernel", &["runtime"]), 1);
        assert_eq!(found("kernels-neon", &["kernels-sve2"]), 1, "a kernel crate is usable alone");
        assert_eq!(found("kernels-neon", &["runtime", "tests"]), 2);
        assert_eq!(found("runtime", &["tools/bitnet-pack"]), 1);
        assert_eq!(found("tools/bitnet", &["kernels-x86"]), 1, "backends are the runtime's matter");
        assert_eq!(found("tools/bitnet-pack", &["tools/bitnet"]), 1);
        assert_eq!(found("tools/bitnet", &["tests"]), 1);
        assert_eq!(found("boards/support", &["boards/rpi5"]), 1);
        assert_eq!(found("tools/xtask", &["runtime"]), 1, "the demonstration would wait for it");
    }

    #[test]
    fn a_package_outside_the_architecture_is_found() {
        assert_eq!(found("helpers", &[]), 1);
        assert_eq!(found("boards", &[]), 1);
    }
}
