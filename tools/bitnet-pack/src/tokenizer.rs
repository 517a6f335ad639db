//! The tokenizer, the chat template, and the tokens that start and end things.
//!
//! Which tokenizer is told by the files that are there and by what is in them, never by the model's name. It is converted
//! once, here, into the form that the runtime loads.
use crate::Error;
use crate::checkpoint::{Checkpoint, Naming, Table, gguf, llama2c, table};
use crate::files::{Input, read_capped};
use bitnet_runtime::image::{CHAT_TEMPLATE_MAX, StopIds};
use bitnet_runtime::tokenizer::definition as sound;
use kitoken::{Definition, InsertionPosition, Kitoken, Processing, Token};
use minijinja::Environment;
use minijinja::syntax::SyntaxConfig;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Longest tokenizer file.
pub const FILE_BYTES_MAX: u64 = 1 << 26;

/// What turns text into tokens and back, ready for an image.
#[derive(Clone, Debug, Default)]
pub struct Text {
    /// kitoken's own form, if there is a tokenizer.
    pub tokenizer: Option<Vec<u8>>,
    /// The token that starts a conversation.
    pub bos: Option<u32>,
    /// Tokens that end a reply.
    pub stop: StopIds,
    /// Jinja, or empty.
    pub chat_template: String,
}

/// Tokens that end a turn wherever they are control tokens, whatever the configuration says.
const TURN_ENDS: [&str; 4] = ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>"];

/// The tokenizer files of a directory, the preferred kind first.
fn candidates(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found: Vec<PathBuf> = ["tokenizer.json", "tokenizer.model"].map(|name| directory.join(name)).into();
    let entries = directory.read_dir().map_err(|e| Error::io(directory, "read", e))?;
    let paths = entries.flatten().map(|e| e.path());
    let mut tiktoken: Vec<PathBuf> = paths.filter(|p| p.extension().is_some_and(|e| e == "tiktoken")).collect();
    tiktoken.sort();
    found.append(&mut tiktoken);
    found.retain(|path| path.exists());
    Ok(found)
}

/// The tokenizer beside a file of llama2.c.
fn beside(directory: &Path, vocab: u32) -> Option<PathBuf> {
    let names = [format!("tok{vocab}.bin"), "tokenizer.bin".into()];
    names.iter().map(|name| directory.join(name)).find(|path| path.exists())
}

/// Bytes of everything from which a tokenizer may be made.
///
/// # Errors
/// If a directory cannot be read.
pub fn source_bytes(checkpoint: &Checkpoint, chosen: Option<&Path>) -> Result<u64, Error> {
    let files = match (chosen, checkpoint.naming()) {
        (Some(path), _) => vec![path.to_path_buf()],
        (None, Naming::HuggingFace) => candidates(checkpoint.directory())?,
        // A few bytes a token, tens of kilobytes.
        (None, Naming::Llama2c) => Vec::new(),
        (None, Naming::Gguf) => return Ok(checkpoint.gguf().map_or(0, gguf::text_bytes)),
    };
    Ok(files.iter().filter_map(|path| path.metadata().ok()).map(|m| m.len()).sum())
}

/// Reads everything that belongs to text. `chosen` overrides the choice among several tokenizers.
///
/// # Errors
/// If files disagree with one another or with the configuration, or cannot be read.
pub fn read(checkpoint: &Checkpoint, table: &mut Table, chosen: Option<&Path>) -> Result<Text, Error> {
    let vocab = table.config.vocab;
    let (origin, definition, bos, mut stop, chat_template) = match checkpoint.gguf() {
        Some(metadata) => {
            let text = gguf::text(metadata, &table.architecture, chosen.is_none())?;
            table.notes.extend(text.notes);
            let path = checkpoint.config_path();
            let definition = match (chosen, &text.tokenizer) {
                (Some(path), _) => Some((path.to_path_buf(), convert(path, vocab)?)),
                (None, Some(bytes)) => Some((path.clone(), parse(&path, bytes)?)),
                (None, None) => None,
            };
            ("the file's keys", definition, text.bos, text.stop, text.chat_template)
        }
        None => {
            let definition = match chosen {
                Some(path) => Some((path.to_path_buf(), convert(path, vocab)?)),
                None if checkpoint.naming() == Naming::Llama2c => match beside(checkpoint.directory(), vocab) {
                    Some(path) => Some((path.clone(), convert(&path, vocab)?)),
                    None => None,
                },
                None => choose(&candidates(checkpoint.directory())?, vocab)?,
            };
            // A file of llama2.c has nothing else beside it.
            let json = |name: &str| match checkpoint.naming() {
                Naming::HuggingFace => checkpoint.json(name),
                _ => Ok(None),
            };
            let settings = json("tokenizer_config.json")?.unwrap_or(Value::Null);
            let (generation_bos, generation_eos) = match json("generation_config.json")? {
                Some(config) => table::generation_ids(&checkpoint.directory().join("generation_config.json"), &config)?,
                None => (None, Vec::new()),
            };
            let (configured, of) = (table.bos.or(generation_bos), definition.as_ref().map(|(_, d)| d));
            let bos = match checkpoint.naming() {
                Naming::Llama2c => configured,
                _ => bos(&settings, of, configured, &mut table.notes),
            };
            let mut stop = table.eos.clone();
            stop.extend(generation_eos);
            let template = match checkpoint.naming() {
                Naming::HuggingFace => chat_template(checkpoint, &settings)?,
                _ => String::new(),
            };
            ("bos_token_id or eos_token_id", definition, bos, stop, template)
        }
    };
    let mut tokenizer = None;
    if let Some((path, definition)) = &definition {
        let bytes = definition.to_vec();
        check(path, definition, &bytes, vocab)?;
        let (name, tokens) = (path.file_name().unwrap_or_default().to_string_lossy(), ids(definition).len());
        table.notes.push(format!("tokenizer: {name}, {tokens} tokens, {} bytes in the image", bytes.len()));
        tokenizer = Some(bytes);
    } else {
        table.notes.push("tokenizer: none found; the image takes and gives token ids only".into());
    }
    if let Some(e) = compile(&chat_template) {
        table.notes.push(format!("chat template: does not compile, so that there will be no chat: {e}"));
    }
    let definition = definition.map(|(_, definition)| definition);
    stop.extend(TURN_ENDS.iter().filter_map(|name| special(definition.as_ref()?, name)));
    let mut seen = BTreeSet::new();
    stop.retain(|&id| seen.insert(id));
    if let Some(id) = bos.iter().chain(&stop).find(|&&id| id >= vocab) {
        let (key, what) = (origin.into(), format!("the vocabulary has {vocab} tokens"));
        return Err(Error::Config { path: checkpoint.config_path(), key, value: id.to_string(), what });
    }
    let stop = StopIds::new(&stop)
        .ok_or_else(|| Error::Options(format!("{} tokens end a reply, at most {} fit", stop.len(), StopIds::MAX)))?;
    Ok(Text { tokenizer, bos, stop, chat_template })
}

/// The tokenizer among several: any, if they agree in the number of tokens.
fn choose(paths: &[PathBuf], vocab: u32) -> Result<Option<(PathBuf, Definition)>, Error> {
    let mut chosen: Option<(PathBuf, Definition)> = None;
    for path in paths {
        let definition = convert(path, vocab)?;
        let Some((first, chosen)) = &chosen else {
            chosen = Some((path.clone(), definition));
            continue;
        };
        let (a, b) = (ids(chosen).len(), ids(&definition).len());
        if a != b {
            let what = format!(
                "has {b} tokens, but {} has {a}; choose one of them with --tokenizer FILE",
                first.file_name().unwrap_or_default().to_string_lossy()
            );
            return Err(Error::tokenizer(path, what));
        }
    }
    Ok(chosen)
}

/// Reads a tokenizer of any kind that is known; the kind is told by the bytes.
fn convert(path: &Path, vocab: u32) -> Result<Definition, Error> {
    let input = Input::open(path)?;
    let start = input.start()?;
    if !start.trim_ascii_start().starts_with(b"{")
        && let Some(foreign) = input.foreign()?
    {
        return Err(Error::foreign(path, foreign));
    }
    let bytes = read_capped(path, FILE_BYTES_MAX)?;
    // No other kind has zeros in its first bytes.
    if start.first_chunk().is_some_and(|first: &[u8; 4]| first[2..] == [0, 0]) {
        return parse(path, &llama2c::tokenizer(path, &bytes, vocab)?);
    }
    parse(path, &bytes)
}

/// Reads a tokenizer in the form of one of three libraries.
fn parse(path: &Path, bytes: &[u8]) -> Result<Definition, Error> {
    let (kind, definition) = if bytes.trim_ascii_start().starts_with(b"{") {
        ("tokenizer.json", Definition::from_tokenizers_slice(bytes))
    } else if bytes.starts_with(b"\n") {
        // The first field of a sentencepiece model is a list of pieces: tag 1, a length-delimited value.
        ("sentencepiece", Definition::from_sentencepiece_slice(bytes))
    } else if bytes.iter().take(4096).any(|&b| b == b' ') {
        ("tiktoken", Definition::from_tiktoken_slice(bytes))
    } else {
        return Err(Error::tokenizer(path, "neither tokenizer.json nor a sentencepiece model nor a tiktoken file"));
    };
    let mut definition: Definition =
        definition.map_err(|e| Error::tokenizer(path, format!("cannot be read as {kind}: {e}")))?;
    sound::complete(&mut definition);
    // Sentencepiece models without padding have a padding token of number -1.
    definition.specials.retain(|special| special.id != Token::INVALID);
    // A training run's settings for batches: they would cut off or fill up every text.
    definition.config.processing.retain(|p| !matches!(p, Processing::Pad { .. } | Processing::Truncate { .. }));
    Ok(definition)
}

/// The tokenizer of a file alone, for a model of `vocab` tokens, in the form that the runtime loads.
///
/// # Errors
/// If the file is none, or has tokens that the model has not.
pub fn from_file(path: &Path, vocab: u32) -> Result<Vec<u8>, Error> {
    let definition = convert(path, vocab)?;
    let bytes = definition.to_vec();
    check(path, &definition, &bytes, vocab)?;
    Ok(bytes)
}

/// Every token that can come out.
fn ids(definition: &Definition) -> BTreeSet<u32> {
    let vocab = definition.model.vocab().iter().map(|t| t.id);
    vocab.chain(definition.specials.iter().map(|s| s.id)).collect()
}

/// Checks that the runtime can load the tokenizer, and that it makes no tokens beyond the vocabulary.
fn check(path: &Path, definition: &Definition, bytes: &[u8], vocab: u32) -> Result<(), Error> {
    let ids = ids(definition);
    if let Some(id) = ids.last().filter(|&&id| id >= vocab) {
        return Err(Error::tokenizer(path, format!("token {id} lies outside the model's vocabulary of {vocab}")));
    }
    sound::check(definition).map_err(|what| Error::tokenizer(path, what))?;
    Kitoken::from_slice(bytes).map_err(|e| Error::tokenizer(path, format!("not supported: {e}")))?;
    Ok(())
}

fn special(definition: &Definition, name: &str) -> Option<u32> {
    definition.specials.iter().find(|s| s.bytes == name.as_bytes()).map(|s| s.id)
}

/// The token that starts a conversation. A model's configuration often names one that its tokenizer never adds, so the
/// tokenizer decides where there is one.
fn bos(
    settings: &Value,
    definition: Option<&Definition>,
    configured: Option<u32>,
    notes: &mut Vec<String>,
) -> Option<u32> {
    let named = || {
        let token = &settings["bos_token"];
        let token = token.as_str().or_else(|| token["content"].as_str())?;
        special(definition?, token)
    };
    match settings["add_bos_token"].as_bool() {
        Some(false) => return None,
        Some(true) => return configured.or_else(named),
        None => {}
    }
    let Some(definition) = definition else { return configured };
    // kitoken calls it the start of a part where the tokenizer adds it to both parts of a pair.
    let starts = [InsertionPosition::SequenceStart, InsertionPosition::SubSequenceStart];
    let start = definition.config.templates.iter().find(|t| starts.contains(&t.position));
    let added = start.and_then(|template| special(definition, &template.content));
    if let (None, Some(id)) = (added, configured) {
        notes.push(format!("bos: none; the tokenizer does not add {id}, which config.json names"));
    }
    added
}

/// What is wrong with a template, by the compiler that programs use, in its first line.
fn compile(template: &str) -> Option<String> {
    let mut environment = Environment::new();
    // As transformers sets its own.
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().ok()?);
    environment.template_from_str(template).err().map(|e| e.to_string())
}

/// From `chat_template.jinja`, or from `tokenizer_config.json`: one template, or that called "default".
fn chat_template(checkpoint: &Checkpoint, settings: &Value) -> Result<String, Error> {
    let path = checkpoint.directory().join("chat_template.jinja");
    let template = if path.exists() {
        let bytes = read_capped(&path, CHAT_TEMPLATE_MAX as u64)?;
        String::from_utf8(bytes).map_err(|_| Error::not_readable(&path, "not UTF-8"))?
    } else {
        let template = &settings["chat_template"];
        let of_list = || template.as_array()?.iter().find(|t| t["name"] == "default")?["template"].as_str();
        template.as_str().or_else(of_list).unwrap_or_default().into()
    };
    Ok(template)
}

#[cfg(test)]
mod tests {
    use super::compile;

    #[test]
    fn templates_are_compiled() {
        for sound in ["", "plain", "{% for m in messages %}{{ m.role|capitalize + ': ' + m.content|trim }}{% endfor %}"]
        {
            assert_eq!(compile(sound), None, "{sound}");
        }
        // The second is for training alone, and no other program knows it.
        for (wrong, why) in
            [("{% for m in messages %}", "unexpected end"), ("{% generation %}a{% endgeneration %}", "generation")]
        {
            let error = compile(wrong).unwrap();
            assert!(error.contains(why), "{error}");
        }
    }
}
