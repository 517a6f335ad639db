//! The tokenizer, the chat template, and the tokens that start and end things, from a file's keys.
//!
//! The tokenizer is rewritten as one of the files that its own library reads, tokenizer.json or a sentencepiece model, and
//! takes the way of these from there.
use super::Metadata;
use crate::Error;
use crate::checkpoint::pieces::{Piece, PieceKind, byte_of, sentencepiece};
use serde_json::{Map, Value, json};
use std::collections::HashMap;

/// Text in a file, before the tokenizer is converted.
#[derive(Debug, Default)]
pub(crate) struct Text {
    /// A tokenizer.json or a sentencepiece model, if the file has tokens.
    pub(crate) tokenizer: Option<Vec<u8>>,
    /// The token that starts a conversation.
    pub(crate) bos: Option<u32>,
    /// Tokens that end a reply.
    pub(crate) stop: Vec<u32>,
    /// Jinja, or empty.
    pub(crate) chat_template: String,
    /// What a person should know.
    pub(crate) notes: Vec<String>,
}

/// How a byte-level vocabulary's text is cut into words before it is merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Split {
    Gpt2,
    /// GPT-2's, after every digit was cut off.
    SmolLm,
    Llama3,
    Qwen2,
}

/// Names of it, of one kind together.
const SPLITS: [(Split, &[&str]); 4] = [
    (Split::Llama3, &["llama-bpe", "llama3", "llama-v3", "falcon3"]),
    (Split::Qwen2, &["qwen2", "deepseek-r1-qwen"]),
    (Split::SmolLm, &["smollm"]),
    (Split::Gpt2, &["gpt-2"]),
];

const GPT2: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The template of BitNet b1.58 2B4T's own tokenizer_config.json. The one in its GGUF files is another model's.
const BITNET_TEMPLATE: &str = "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | \
                               trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

const MODEL: &str = "tokenizer.ggml.model";
const PRE: &str = "tokenizer.ggml.pre";
const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const SCORES: &str = "tokenizer.ggml.scores";
const MERGES: &str = "tokenizer.ggml.merges";
const TEMPLATE: &str = "tokenizer.chat_template";

/// Bytes of a file's tokens and all that belongs to them.
pub(crate) fn text_bytes(metadata: &Metadata) -> u64 {
    [TOKENS, TYPES, SCORES, MERGES].iter().map(|key| metadata.array_bytes(key)).sum()
}

/// Reads what belongs to text in a model of this architecture; the tokenizer only if it is wanted.
///
/// # Errors
/// If a key is malformed, or says something that is not known.
pub(crate) fn text(metadata: &Metadata, architecture: &str, wanted: bool) -> Result<Text, Error> {
    let mut text = Text { chat_template: metadata.text(TEMPLATE)?.unwrap_or_default(), ..Text::default() };
    // Both names of the one model that is published so; its files have the wrong template and no word splitting.
    let bitnet = matches!(architecture, "bitnet-b1.58" | "bitnet-25");
    // Others of its kind, with pieces for a vocabulary, have not its special tokens.
    let of_pieces = metadata.text(MODEL)?.as_deref() == Some("llama");
    if bitnet && !of_pieces && (text.chat_template.is_empty() || text.chat_template.contains("BITNET")) {
        text.chat_template = BITNET_TEMPLATE.into();
        text.notes.push("chat template: the one of BitNet b1.58 2B4T, as the file's is missing or wrong".into());
    }
    let bos_by_default = match metadata.text(MODEL)?.as_deref() {
        None | Some("no_vocab") => false,
        Some(model) if !wanted => model == "llama" || bitnet,
        Some("gpt2") => {
            let tokens = Tokens::read(metadata)?;
            let split = split(metadata, &tokens, bitnet, &mut text.notes)?;
            text.tokenizer = Some(byte_level(metadata, &tokens, split)?);
            split == Split::Llama3
        }
        Some("llama") => {
            text.tokenizer = Some(pieces(metadata, &Tokens::read(metadata)?)?);
            true
        }
        Some(_) => {
            return metadata.refuse(MODEL, "\"gpt2\" and \"llama\" are supported; choose a file with --tokenizer FILE");
        }
    };
    let id = |name: &str| metadata.u32(&format!("tokenizer.ggml.{name}_token_id"));
    if metadata.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(bos_by_default) {
        text.bos = id("bos")?;
    }
    for name in ["eos", "eot", "eom"] {
        text.stop.extend(id(name)?);
    }
    Ok(text)
}

/// Tokens and what they are.
struct Tokens {
    texts: Vec<String>,
    kinds: Vec<PieceKind>,
}

impl Tokens {
    fn read(metadata: &Metadata) -> Result<Self, Error> {
        let Some(texts) = metadata.texts(TOKENS)? else { return metadata.refuse(TOKENS, "an array is expected") };
        let kinds = match metadata.integers(TYPES)? {
            None => vec![PieceKind::Normal; texts.len()],
            Some(tags) => {
                same_count(metadata, TYPES, tags.len(), texts.len())?;
                let kinds = tags.iter().map(|&tag| PieceKind::from_tag(tag));
                match kinds.collect::<Option<Vec<_>>>() {
                    Some(kinds) => kinds,
                    None => return metadata.refuse(TYPES, "types from 1 to 6 are expected"),
                }
            }
        };
        Ok(Self { texts, kinds })
    }
    fn iter(&self) -> impl Iterator<Item = (u32, &str, PieceKind)> {
        (0..).zip(&self.texts).zip(&self.kinds).map(|((id, text), &kind)| (id, text.as_str(), kind))
    }
    fn has(&self, name: &str) -> bool {
        let marked = |kind| matches!(kind, PieceKind::Control | PieceKind::UserDefined);
        self.iter().any(|(_, text, kind)| text == name && marked(kind))
    }
}

fn same_count(metadata: &Metadata, key: &str, found: usize, tokens: usize) -> Result<(), Error> {
    if found == tokens { Ok(()) } else { metadata.refuse(key, format!("{tokens} are expected, one a token")) }
}

/// How words are split: by the key, or by the vocabulary where the key is missing.
fn split(metadata: &Metadata, tokens: &Tokens, bitnet: bool, notes: &mut Vec<String>) -> Result<Split, Error> {
    let named = metadata.text(PRE)?;
    let known = named.as_ref().and_then(|name| SPLITS.into_iter().find(|(_, names)| names.contains(&name.as_str())));
    if let Some((split, _)) = known
        && !(bitnet && split != Split::Llama3)
    {
        return Ok(split);
    }
    // A model of BitNet b1.58 has the vocabulary of Llama 3, whatever its file says.
    let missing = named.is_none() || bitnet;
    let (split, name) = match () {
        () if !missing => {
            let known: Vec<&str> = SPLITS.iter().flat_map(|(_, names)| names.iter().copied()).collect();
            return metadata
                .refuse(PRE, format!("{} are supported; choose a file with --tokenizer FILE", known.join(", ")));
        }
        () if bitnet || tokens.has("<|begin_of_text|>") && tokens.has("<|start_header_id|>") => {
            (Split::Llama3, "Llama 3")
        }
        () if tokens.has("<|im_start|>") && tokens.has("<|fim_middle|>") => (Split::Qwen2, "Qwen 2"),
        () => {
            let what = "how words are split is unknown, and the vocabulary is not one that tells; choose a file with \
                        --tokenizer FILE";
            return metadata.refuse(PRE, what);
        }
    };
    let found = named.map_or("is missing".into(), |name| format!("is {name:?}"));
    notes.push(format!("tokenizer: {PRE} {found}; words are split as in {name}, whose vocabulary this is"));
    Ok(split)
}

/// A tokenizer.json of a byte-level vocabulary.
fn byte_level(metadata: &Metadata, tokens: &Tokens, split: Split) -> Result<Vec<u8>, Error> {
    let Some(merges) = metadata.texts(MERGES)? else { return metadata.refuse(MERGES, "an array is expected") };
    let (mut vocab, mut added) = (Map::new(), Vec::new());
    let mut seen = HashMap::new();
    for (id, text, kind) in tokens.iter() {
        if let Some(other) = seen.insert(text, id) {
            return metadata.refuse(TOKENS, format!("tokens {other} and {id} are both {text:?}"));
        }
        match kind {
            PieceKind::Unused => {}
            PieceKind::Control | PieceKind::UserDefined => {
                let special = kind == PieceKind::Control;
                added.push(json!({
                    "id": id, "content": text, "special": special, "normalized": false,
                    "single_word": false, "lstrip": false, "rstrip": false,
                }));
            }
            _ => {
                vocab.insert(text.into(), id.into());
            }
        }
    }
    if let Some(merge) = merges.iter().find(|m| m.split_once(' ').is_none()) {
        return metadata.refuse(MERGES, format!("{merge:?} is no pair"));
    }
    let regexes: &[&str] = match split {
        Split::Gpt2 => &[GPT2],
        Split::SmolLm => &[r"\p{N}", GPT2],
        Split::Llama3 => &[LLAMA3],
        Split::Qwen2 => &[QWEN2],
    };
    let isolate =
        |regex: &&str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let mut pretokenizers: Vec<Value> = regexes.iter().map(isolate).collect();
    pretokenizers.push(byte_level.clone());
    let normalizer = if split == Split::Qwen2 { json!({"type": "NFC"}) } else { Value::Null };
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers},
        "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": split == Split::Llama3, "vocab": vocab, "merges": merges,
        },
    });
    Ok(serde_json::to_vec(&file).expect("JSON of strings and numbers"))
}

/// A sentencepiece model.
fn pieces(metadata: &Metadata, tokens: &Tokens) -> Result<Vec<u8>, Error> {
    let Some(scores) = metadata.floats(SCORES)? else { return metadata.refuse(SCORES, "an array is expected") };
    same_count(metadata, SCORES, scores.len(), tokens.texts.len())?;
    if let Some(score) = scores.iter().find(|s| !s.is_finite()) {
        return metadata.refuse(SCORES, format!("{score} is no score"));
    }
    let mut seen = HashMap::new();
    for (id, text, kind) in tokens.iter() {
        if kind == PieceKind::Byte && byte_of(text).is_none() {
            return metadata.refuse(TOKENS, format!("token {id} stands for a byte, but {text:?} is none; <0x0A> is"));
        }
        if let Some(other) = seen.insert(text, id) {
            return metadata.refuse(TOKENS, format!("tokens {other} and {id} are both {text:?}"));
        }
    }
    let pieces: Vec<Piece<'_>> =
        tokens.iter().zip(&scores).map(|((_, text, kind), &score)| Piece { text, score, kind }).collect();
    let id = |name: &str| metadata.u32(&format!("tokenizer.ggml.{name}_token_id"));
    let named = [id("unknown")?, id("bos")?, id("eos")?];
    if let Some(id) = named.iter().flatten().find(|&&id| id as usize >= pieces.len()) {
        return metadata.refuse(TOKENS, format!("token {id} is named, but there are {}", pieces.len()));
    }
    let prefix = metadata.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    Ok(sentencepiece(&pieces, named, prefix))
}
