//! The tree: where it is, which packages it has, and which files belong to it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A file of the tree that can be read as text.
#[derive(Debug)]
pub(crate) struct File {
    /// Relative to the root, with forward slashes.
    pub(crate) path: String,
    pub(crate) text: String,
}

/// A package, as cargo itself reads its manifest.
#[derive(Debug, Default)]
pub(crate) struct Package {
    pub(crate) name: String,
    /// Relative to the root, with forward slashes.
    pub(crate) folder: String,
    /// Folders of the packages of this tree that it depends on: normal, build and dev-dependencies alike.
    pub(crate) depends_on: Vec<String>,
    /// The root file of every target: library, programs, tests, benches, examples, build script.
    pub(crate) roots: Vec<String>,
}

/// The whole tree.
#[derive(Debug)]
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

/// Text files above this are data, such as a checkpoint, and no rule is about them.
const TEXT_BYTES_MAX: u64 = 1 << 20;

impl Workspace {
    /// Asks cargo where the tree is. Cargo says to a program it runs where the program's own manifest lies, which makes
    /// the commands work from any folder.
    pub(crate) fn load() -> Result<Self> {
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR").map(|folder| Path::new(&folder).join("Cargo.toml"));
        let metadata = metadata(manifest.as_deref())?;
        let path =
            |key: &str| metadata[key].as_str().map(PathBuf::from).with_context(|| format!("cargo says no {key}"));
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// Every package of the tree, also those that stand outside the workspace, as a bare-metal image or a fuzzer may.
    pub(crate) fn packages(&self, files: &[File]) -> Result<Vec<Package>> {
        let mut packages: Vec<Package> = Vec::new();
        let mut known = HashSet::new();
        for file in files.iter().filter(|file| file.path == "Cargo.toml" || file.path.ends_with("/Cargo.toml")) {
            let folder = file.path.trim_end_matches("Cargo.toml").trim_end_matches('/');
            if known.contains(folder) {
                continue;
            }
            let metadata = metadata(Some(&self.root.join(&file.path)))?;
            for package in metadata["packages"].as_array().into_iter().flatten() {
                let package = self.package(package)?;
                if known.insert(package.folder.clone()) {
                    packages.push(package);
                }
            }
        }
        Ok(packages)
    }

    fn package(&self, package: &Value) -> Result<Package> {
        let string = |value: &Value| value.as_str().map(str::to_owned).context("cargo metadata lacks a string");
        let manifest = PathBuf::from(string(&package["manifest_path"])?);
        let mut answer = Package {
            name: string(&package["name"])?,
            folder: self.relative(manifest.parent().context("a manifest lies in a folder")?),
            ..Package::default()
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if let Some(path) = dependency["path"].as_str() {
                answer.depends_on.push(self.relative(Path::new(path)));
            }
        }
        for target in package["targets"].as_array().into_iter().flatten() {
            answer.roots.push(self.relative(Path::new(&string(&target["src_path"])?)));
        }
        Ok(answer)
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).to_string_lossy().replace('\\', "/")
    }

    /// The text files that git has or would take. Without git (a source archive) it is every file outside `target`.
    pub(crate) fn files(&self) -> Result<Vec<File>> {
        let listed = Command::new("git")
            .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(&self.root)
            .output();
        let mut paths = match listed {
            Ok(output) if output.status.success() => {
                String::from_utf8_lossy(&output.stdout).split_terminator('\0').map(str::to_owned).collect::<Vec<_>>()
            }
            _ => {
                let mut paths = Vec::new();
                self.walk(&self.root, &mut paths)?;
                paths
            }
        };
        paths.sort();
        paths.dedup();
        let mut files = Vec::new();
        for path in paths {
            let full = self.root.join(&path);
            // A path that git has and the disk has not was deleted and is not yet committed.
            let Ok(about) = full.metadata() else { continue };
            if about.is_file() && about.len() <= TEXT_BYTES_MAX {
                let bytes = std::fs::read(&full).with_context(|| format!("reading {path}"))?;
                if let Ok(text) = String::from_utf8(bytes) {
                    files.push(File { path, text });
                }
            }
        }
        if files.is_empty() {
            bail!("found no files below {}", self.root.display());
        }
        Ok(files)
    }

    fn walk(&self, folder: &Path, paths: &mut Vec<String>) -> Result<()> {
        for entry in std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                if !path.ends_with("target") && !path.ends_with(".git") {
                    self.walk(&path, paths)?;
                }
            } else {
                paths.push(self.relative(&path));
            }
        }
        Ok(())
    }
}

/// The cargo that started this program, or the one on the path.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

fn metadata(manifest: Option<&Path>) -> Result<Value> {
    let mut command = cargo();
    command.args(["metadata", "--no-deps", "--format-version", "1"]);
    if let Some(manifest) = manifest {
        command.arg("--manifest-path").arg(manifest);
    }
    let output = command.output().context("starting cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).context("reading what cargo metadata says")
}
