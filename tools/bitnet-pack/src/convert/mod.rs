//! A checkpoint of a checkpoint: with states of fixed size ([`stateful`]), or with binary values in attention ([`tbha`]).
pub mod stateful;
pub mod tbha;

use crate::checkpoint::{Checkpoint, Dtype, Naming, TensorInfo, sections};
use crate::{Error, Options, Progress};
use bitnet_runtime::Config;
use serde_json::Value;
use std::path::Path;

/// Files about text, which go with the weights.
const TEXTS: [&str; 6] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
];
/// Bytes that are copied at a time.
const CHUNK: usize = 1 << 20;

/// A checkpoint that can be converted.
fn open(source: &Path) -> Result<Checkpoint, Error> {
    let checkpoint = Checkpoint::open(source, Dtype::I2_S)?;
    if checkpoint.naming() != Naming::HuggingFace {
        return Err(Error::not_readable(source, "only checkpoints in Hugging Face's layout are converted"));
    }
    Ok(checkpoint)
}

/// # Errors
/// If something is there under the name.
fn free(output: &Path) -> Result<(), Error> {
    if output.symlink_metadata().is_ok() {
        return Err(Error::not_readable(output, "is there already; name a directory that is not"));
    }
    Ok(())
}

/// Writes a directory with this configuration, the checkpoint's files about text, and the tensors that `tensors` writes: under a
/// temporary name until what was written can be packed and is what the second part of its result says. Returns the first part.
fn rewrite<Sound: Fn(&Config) -> bool>(
    checkpoint: &Checkpoint,
    output: &Path,
    configuration: &Value,
    progress: &mut dyn Progress,
    tensors: impl FnOnce(&Path, &mut dyn Progress) -> Result<(u64, Sound), Error>,
) -> Result<u64, Error> {
    let parent = output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = tempfile::tempdir_in(parent).map_err(|e| Error::io(output, "create", e))?;
    let place = temporary.path().join("checkpoint");
    let failed = |e| Error::io(output, "write", e);
    std::fs::create_dir(&place).map_err(failed)?;
    let (bytes, sound) = tensors(&place.join("model.safetensors"), progress)?;
    std::fs::write(place.join("config.json"), format!("{configuration:#}\n")).map_err(failed)?;
    for name in texts(checkpoint) {
        std::fs::copy(checkpoint.directory().join(&name), place.join(&name)).map_err(failed)?;
    }
    let written = Checkpoint::open(&place, Dtype::I2_S)?;
    let mut table = written.table()?;
    sections::bind(&written, &mut table, &Options::default(), None, progress)?;
    if !sound(&table.config) {
        return Err(Error::Planned("the checkpoint that was written is another than it should be".into()));
    }
    std::fs::rename(&place, output).map_err(|e| Error::io(output, "create", e))?;
    Ok(bytes)
}

/// Names of the files about text that the checkpoint has.
fn texts(checkpoint: &Checkpoint) -> Vec<String> {
    let entries = checkpoint.directory().read_dir().into_iter().flatten().flatten();
    let names = entries.filter(|e| e.path().is_file()).filter_map(|e| e.file_name().into_string().ok());
    names.filter(|name| TEXTS.contains(&name.as_str()) || name.ends_with(".tiktoken")).collect()
}

/// Hands the bytes of a tensor to `put`, some at a time, each with its place among them.
fn copy(
    checkpoint: &Checkpoint,
    tensor: &TensorInfo,
    buffer: &mut Vec<u8>,
    progress: &mut dyn Progress,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    buffer.resize(CHUNK, 0);
    let mut offset = 0;
    while offset < tensor.bytes {
        if progress.cancelled() {
            return Err(Error::Interrupted);
        }
        let part = &mut buffer[..CHUNK.min((tensor.bytes - offset) as usize)];
        checkpoint.read(tensor, offset, part)?;
        put(offset, part)?;
        offset += part.len() as u64;
        progress.advance(part.len() as u64);
    }
    Ok(())
}
