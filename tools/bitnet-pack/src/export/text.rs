//! The tokenizer, the chat template and the tokens that start and end things, as a GGUF file has them.
//!
//! Tokenizers of sentencepiece's kind are written: their order is their scores. Others are left out, and a note says so.
use super::Keys;
use crate::Error;
use crate::verify::Opened;
use crate::weights::bytes;
use bitnet_runtime::Image;
use bitnet_runtime::image::Kind;
use kitoken::{Definition, Model, Normalization, SpecialTokenKind};
use std::collections::BTreeMap;

/// What a piece is, with GGUF's numbers.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// How sentencepiece writes a space.
const SPACE: &str = "\u{2581}";

/// Writes all keys about text.
pub(super) fn keys(keys: &mut Keys, opened: &Opened, image: &Image<'_>, notes: &mut Vec<String>) -> Result<(), Error> {
    let text = &image.header().text;
    if !text.chat_template.is_empty() {
        keys.text("tokenizer.chat_template", text.chat_template);
    }
    if let Some(record) = image.sections().find(Kind::Tokenizer, None) {
        let serialized = bytes(opened, record, record.cols.get() as usize)?;
        let definition = Definition::from_slice(&serialized).map_err(|e| Error::Options(e.to_string()))?;
        match pieces(&definition, image.header().config.vocab) {
            Some(pieces) => pieces.write(keys),
            None => {
                let note = "tokenizer: left out, as it is not of sentencepiece's kind; take another file's";
                notes.push(note.into());
                keys.text("tokenizer.ggml.model", "no_vocab");
            }
        }
    } else {
        keys.text("tokenizer.ggml.model", "no_vocab");
    }
    keys.bool("tokenizer.ggml.add_bos_token", text.bos.is_some());
    if let Some(bos) = text.bos {
        keys.u32("tokenizer.ggml.bos_token_id", bos);
    }
    for (id, name) in text.stop.ids().iter().zip(["eos", "eot", "eom"]) {
        keys.u32(&format!("tokenizer.ggml.{name}_token_id"), *id);
    }
    Ok(())
}

struct Pieces {
    texts: Vec<String>,
    scores: Vec<f32>,
    kinds: Vec<i32>,
    unknown: Option<u32>,
    /// Whether a space is put before a text.
    prefix: bool,
}

impl Pieces {
    fn write(&self, keys: &mut Keys) {
        keys.text("tokenizer.ggml.model", "llama");
        keys.texts("tokenizer.ggml.tokens", &self.texts);
        keys.f32s("tokenizer.ggml.scores", &self.scores);
        keys.i32s("tokenizer.ggml.token_type", &self.kinds);
        keys.bool("tokenizer.ggml.add_space_prefix", self.prefix);
        if let Some(unknown) = self.unknown {
            keys.u32("tokenizer.ggml.unknown_token_id", unknown);
        }
    }
}

/// The pieces, if the tokenizer merges characters by their order and cuts nothing before that.
fn pieces(definition: &Definition, vocab: u32) -> Option<Pieces> {
    let Model::BytePair { vocab: tokens, chars: true } = &definition.model else { return None };
    if !definition.config.split.is_empty() {
        return None;
    }
    let mut found: BTreeMap<u32, (String, f32, i32)> = BTreeMap::new();
    // Of two tokens with the same bytes kitoken keeps one: a byte that is a character too. The other has its place in the
    // row of all bytes.
    let first = first_byte(definition)?;
    for byte in 0..=255u8 {
        found.insert(first + u32::from(byte), (format!("<0x{byte:02X}>"), 0.0, BYTE));
    }
    for (rank, token) in tokens.iter().enumerate() {
        if (first..first + 256).contains(&token.id) {
            continue;
        }
        let text = str::from_utf8(&token.bytes).ok()?.replace(' ', SPACE);
        found.insert(token.id, (text, -(rank as f32), NORMAL));
    }
    let mut unknown = None;
    for special in definition.specials.iter() {
        let text = str::from_utf8(&special.bytes).ok()?.to_owned();
        let kind = match special.kind {
            SpecialTokenKind::Unknown => {
                unknown = Some(special.id);
                UNKNOWN
            }
            _ => CONTROL,
        };
        found.insert(special.id, (text, 0.0, kind));
    }
    let mut pieces = Pieces { texts: Vec::new(), scores: Vec::new(), kinds: Vec::new(), unknown, prefix: false };
    for id in 0..vocab {
        let (text, score, kind) = found.remove(&id).unwrap_or_else(|| (format!("[unused {id}]"), 0.0, UNUSED));
        pieces.texts.push(text);
        pieces.scores.push(score);
        pieces.kinds.push(kind);
    }
    pieces.prefix = definition.config.normalization.iter().any(|step| match step {
        Normalization::Prepend { .. } => true,
        Normalization::Extend { left, .. } => *left > 0,
        _ => false,
    });
    Some(pieces)
}

/// The token of byte 0, if those of all bytes follow one another: bytes from 128 on are no characters, so they are all there.
fn first_byte(definition: &Definition) -> Option<u32> {
    let high = |token: &kitoken::Token| match *token.bytes {
        [byte @ 128..=255] => token.id.checked_sub(byte.into()),
        _ => None,
    };
    let mut firsts = definition.model.vocab().iter().filter_map(high);
    let first = firsts.next()?;
    (firsts.clone().count() == 127 && firsts.all(|f| f == first)).then_some(first)
}
