//! `cargo demo`: from a checkpoint to text, with the programs that anyone would use.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::run;
use crate::workspace::Workspace;

const CHECKPOINT: &str = "models/stories-ternary";
const PROMPT: &str = "Once upon a time";

/// Builds the two programs, packs the bundled checkpoint unless its image is newer than all it was made from, and
/// generates a story.
pub(crate) fn run(workspace: &Workspace) -> Result<bool> {
    let [bitnet, packer] = &run::release_programs(workspace)?;
    let checkpoint = workspace.root.join(CHECKPOINT);
    let image = workspace.target.join("demo").join("stories-ternary.bitnet");
    let mut sources = files(&checkpoint)?;
    // A changed packer may write a changed image.
    sources.push(PathBuf::from(packer));
    if !newer(&image, &sources)? {
        let folder = image.parent().context("the image lies in a folder")?;
        std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut pack = Command::new(packer);
        pack.arg("pack").arg(&checkpoint).arg("-o").arg(&image);
        if !pack.status().with_context(|| format!("starting {packer}"))?.success() {
            return Ok(false);
        }
    }
    let mut generate = Command::new(bitnet);
    generate.arg("run").arg(&image).args([PROMPT, "--temperature", "0", "--max-tokens", "120", "--stats"]);
    let success = generate.status().with_context(|| format!("starting {bitnet}"))?.success();
    say!("image: {}", image.display());
    Ok(success)
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
