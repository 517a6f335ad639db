//! `cargo demo`: from a checkpoint to text, with the programs that anyone would use.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::run;
use crate::workspace::Workspace;

const PROMPT: &str = "Once upon a time";

/// A bundled checkpoint, and how much it tells.
struct Told {
    checkpoint: &'static str,
    what: &'static str,
    /// Options of `bitnet run`, with which everyone sees the same.
    options: [&'static str; 4],
}

const MODELS: [Told; 2] = [
    Told {
        checkpoint: "models/stories-ternary",
        what: "Ternary weights; attention sees the whole story.",
        options: ["--temperature", "0", "--max-tokens", "120"],
    },
    Told {
        checkpoint: "models/stories-stateful",
        what: "The same weights and a memory of fixed size; attention sees 68 tokens, and a conversation has no end.",
        options: ["--temperature", "0.7", "--max-tokens", "700"],
    },
];

/// Builds the two programs, packs the bundled checkpoints unless their images are newer than all they were made from, and has each
/// tell a story.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let [bitnet, packer] = &run::release_programs(workspace)?;
    for told in MODELS {
        let Some(image) = packed(workspace, packer, told.checkpoint)? else { return Ok(false) };
        say!("{}: {}", told.checkpoint, told.what);
        let mut generate = Command::new(bitnet);
        generate.arg("run").arg(&image).args([PROMPT, "--stats"]).args(told.options);
        if !generate.status().with_context(|| format!("starting {bitnet}"))?.success() {
            return Ok(false);
        }
        say!("image: {}", image.display());
    }
    Ok(true)
}

/// The image of a checkpoint, if the packer makes one.
fn packed(workspace: &Workspace, packer: &str, checkpoint: &str) -> Result<Option<PathBuf>> {
    let checkpoint = workspace.root.join(checkpoint);
    let name = checkpoint.file_name().context("a checkpoint has a name")?;
    let image = workspace.target.join("demo").join(name).with_extension("bitnet");
    let mut sources = files(&checkpoint)?;
    // A changed packer may write a changed image.
    sources.push(PathBuf::from(packer));
    if !newer(&image, &sources)? {
        let folder = image.parent().context("the image lies in a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut pack = Command::new(packer);
        pack.arg("pack").arg(&checkpoint).arg("-o").arg(&image);
        if !pack.status().with_context(|| format!("starting {packer}"))?.success() {
            return Ok(None);
        }
    }
    Ok(Some(image))
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// Whether `product` is there and no source was changed after it.
fn newer(product: &Path, sources: &[PathBuf]) -> Result<bool> {
    let Ok(made) = changed(product) else { return Ok(false) };
    for source in sources {
        if changed(source).with_context(|| format!("reading {}", source.display()))? > made {
            return Ok(false);
        }
    }
    Ok(true)
}

fn changed(path: &Path) -> std::io::Result<SystemTime> {
    path.metadata()?.modified()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::time::Duration;

    #[test]
    fn an_image_is_made_anew_when_it_is_missing_or_older_than_a_source() {
        let folder = std::env::temp_dir().join(format!("xtask-demo-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (image, source) = (folder.join("image"), folder.join("source"));
        let at = |path: &Path, seconds| {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::create(path).unwrap().set_modified(time).unwrap();
        };
        let fresh = || newer(&image, std::slice::from_ref(&source)).unwrap();
        at(&source, 1_000);
        assert!(!fresh(), "there is no image");
        at(&image, 999);
        assert!(!fresh(), "the image is older");
        at(&image, 1_001);
        assert!(fresh());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
