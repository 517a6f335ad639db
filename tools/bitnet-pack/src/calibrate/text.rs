//! A text as windows of tokens.
use crate::checkpoint::Checkpoint;
use crate::{Error, tokenizer};
use bitnet_runtime::image::Text;
use bitnet_runtime::tokenizer::Tokenizer;
use std::path::Path;

/// Tokens in windows of one length, which do not see each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Windows {
    tokens: Vec<u32>,
    length: usize,
}

impl Windows {
    /// The whole windows of a run of tokens; what is left at the end is dropped.
    ///
    /// # Panics
    /// If `length` is below 2, which leaves nothing to predict.
    pub fn new(mut tokens: Vec<u32>, length: usize) -> Self {
        assert!(length >= 2, "a window has tokens that predict and tokens that are predicted");
        tokens.truncate(tokens.len() / length * length);
        Self { tokens, length }
    }
    /// All tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
    /// Tokens in a window.
    pub const fn length(&self) -> usize {
        self.length
    }
    /// Windows.
    pub const fn count(&self) -> usize {
        self.tokens.len() / self.length
    }
    /// Some of the windows, fewer where there are not so many.
    #[must_use]
    pub fn part(&self, first: usize, count: usize) -> Self {
        let (from, to) = (first.min(self.count()), (first + count).min(self.count()));
        Self { tokens: self.tokens[from * self.length..to * self.length].to_vec(), length: self.length }
    }
}

/// The first windows of a text file by the checkpoint's own tokenizer, at most `most`. Each starts with the token that starts
/// a conversation, in models that have one.
///
/// # Errors
/// If the text or the tokenizer cannot be read, or the text has no whole window.
pub fn windows(
    checkpoint: &Checkpoint,
    chosen: Option<&Path>,
    text: &Path,
    length: usize,
    most: usize,
) -> Result<Windows, Error> {
    let string = std::fs::read(text).map_err(|e| Error::io(text, "read", e))?;
    let Ok(string) = String::from_utf8(string) else {
        return Err(Error::not_readable(text, "not UTF-8, which a text for calibration has to be"));
    };
    let mut table = checkpoint.table()?;
    let read = tokenizer::read(checkpoint, &mut table, chosen)?;
    let Some(serialized) = read.tokenizer else {
        return Err(Error::Options("the checkpoint has no tokenizer, without which a text says nothing".into()));
    };
    let about = Text { bos: read.bos, stop: read.stop, chat_template: "" };
    let tokenizer = |e: bitnet_runtime::Error| Error::Tokenizer { path: checkpoint.place(), what: e.to_string() };
    let loaded = Tokenizer::new(&serialized, &about, table.config.vocab).map_err(tokenizer)?;
    let ids = loaded.encode(&string).map_err(tokenizer)?;
    let bos: Vec<u32> = loaded.bos().into_iter().collect();
    let own = length - bos.len();
    let tokens: Vec<u32> = ids.chunks_exact(own).take(most).flat_map(|part| bos.iter().chain(part).copied()).collect();
    if tokens.is_empty() {
        let what = format!("{} tokens, a window has {own}", ids.len());
        return Err(Error::not_readable(text, what));
    }
    Ok(Windows::new(tokens, length))
}
