//! Text to tokens and back. The packer converted the checkpoint's tokenizer; this loads it, on bare metal too.
pub mod definition;

use crate::error::Error;
use crate::image::{Image, Text, checksum};
use crate::source::WeightSource;
use alloc::borrow::Cow;
use alloc::string::String;
use alloc::vec::Vec;
use bitnet_kernel::Block;
use core::str;
use kitoken::{Definition, Kitoken, SpecialTokenKind, Token};
use zerocopy::IntoBytes;

/// A model's tokenizer.
///
/// Encoding allocates (once a prompt), decoding does not: the bytes of every token are laid out when it is loaded.
#[derive(Debug)]
pub struct Tokenizer {
    kitoken: Kitoken,
    bos: Option<u32>,
    /// Control tokens and how templates spell them.
    control: Vec<(String, u32)>,
    /// The bytes of token `i` are `bytes[ends[i - 1]..ends[i]]`; control tokens have none.
    bytes: Vec<u8>,
    ends: Vec<u32>,
}

impl Tokenizer {
    /// Loads the tokenizer of an image.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if there is none or it cannot be read.
    pub fn load(image: &Image<'_>, source: &mut dyn WeightSource) -> Result<Self, Error> {
        let (extent, len) = image.tokenizer().ok_or(Error::Tokenizer)?;
        let mut bytes = Vec::with_capacity(extent.blocks as usize * Block::BYTES);
        let piece = source.piece_from(extent.start).clamp(1, 1 << 14);
        let mut start = extent.start;
        while start < extent.end() {
            let blocks = piece.min(extent.end() - start);
            bytes.extend_from_slice(source.fetch(crate::source::Extent { start, blocks })?.as_bytes());
            start += blocks;
        }
        // A tokenizer that was damaged gives wrong tokens, not an error: look before use, it is small.
        if checksum(&bytes) != image.sections().records()[0].checksum.get() {
            return Err(Error::Tokenizer);
        }
        Self::new(&bytes[..len], &image.header().text, image.header().config.vocab)
    }

    /// Loads a tokenizer that kitoken serialized.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it cannot be read or has tokens outside the vocabulary.
    pub fn new(serialized: &[u8], text: &Text<'_>, vocab: u32) -> Result<Self, Error> {
        let definition = Definition::from_slice(serialized).map_err(|_| Error::Tokenizer)?;
        let tokens = definition.model.vocab();
        let in_range = tokens.iter().all(|t| t.id < vocab) && definition.specials.iter().all(|s| s.id < vocab);
        if !in_range {
            return Err(Error::Tokenizer);
        }
        definition::check(&definition).map_err(|_| Error::Tokenizer)?;
        let control = definition.specials.iter().filter(|s| s.kind == SpecialTokenKind::Control && !s.bytes.is_empty());
        let control = control.filter_map(|s| Some((String::from_utf8(s.bytes.clone()).ok()?, s.id))).collect();
        let ids: Vec<u32> = tokens.iter().map(|t| t.id).collect();
        let first_byte = first_byte_token(tokens);
        let kitoken = Kitoken::from_definition(definition).map_err(|_| Error::Tokenizer)?;
        let decode = |ids: &[u32]| kitoken.decode(ids, false).ok();
        // What a token adds depends on whether it is the first: some tokenizers drop a space there. So the bytes of a token
        // are what it adds after another one, as in the middle of a text.
        let word = |bytes: &[u8]| bytes.last().is_some_and(u8::is_ascii_alphanumeric);
        let anchor = ids.iter().copied().filter_map(|id| Some((id, decode(&[id])?))).find(|(_, bytes)| word(bytes));
        let (anchor, anchor_bytes) = anchor.ok_or(Error::Tokenizer)?;
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(vocab as usize));
        for id in 0..vocab {
            match decode(&[anchor, id]) {
                Some(both) => bytes.extend_from_slice(both.strip_prefix(&*anchor_bytes).unwrap_or_default()),
                // kitoken drops a token whose bytes another one has too: that of a byte which is a character as well.
                None => bytes.extend(first_byte.and_then(|first| u8::try_from(id.checked_sub(first)?).ok())),
            }
            ends.push(bytes.len() as u32);
        }
        bytes.shrink_to_fit();
        Ok(Self { kitoken, bos: text.bos, control, bytes, ends })
    }

    /// The tokens of plain text: whatever it contains, no control tokens.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the vocabulary lacks something.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.kitoken.encode(text, false).map_err(|_| Error::Tokenizer)
    }
    /// The first control token that `text` spells: where, how long, and which. Of several in one place the longest.
    pub fn find_control(&self, text: &str) -> Option<(usize, usize, u32)> {
        let found = self.control.iter().filter_map(|(name, id)| Some((text.find(&**name)?, name.len(), *id)));
        found.min_by_key(|&(at, len, _)| (at, usize::MAX - len))
    }
    /// How a control token is spelled in templates.
    pub fn control_text(&self, id: u32) -> Option<&str> {
        self.control.iter().find(|c| c.1 == id).map(|c| &*c.0)
    }
    /// The token that starts a conversation, if the model has one.
    pub const fn bos(&self) -> Option<u32> {
        self.bos
    }
    /// The bytes that a token adds to a text; empty for control tokens and for tokens there are not.
    pub fn bytes(&self, token: u32) -> &[u8] {
        let Some(&end) = self.ends.get(token as usize) else { return &[] };
        let start = token.checked_sub(1).map_or(0, |before| self.ends[before as usize]);
        &self.bytes[start as usize..end as usize]
    }
    /// Bytes of the longest token.
    fn longest(&self) -> usize {
        (0..self.ends.len() as u32).map(|t| self.bytes(t).len()).max().unwrap_or(0)
    }
}

/// The token of byte 0, if there are tokens for all bytes in their order, as SentencePiece lays them out.
///
/// Bytes from 128 on are no characters by themselves, so their tokens cannot be taken for those of characters.
fn first_byte_token(tokens: &[Token]) -> Option<u32> {
    let mut first = None;
    let mut found = 0;
    for token in tokens {
        if let [byte @ 128..=255] = *token.bytes {
            let start = token.id.checked_sub(byte.into())?;
            if *first.get_or_insert(start) != start {
                return None;
            }
            found += 1;
        }
    }
    first.filter(|_| found == 128)
}

/// Turns tokens into text piece by piece: always whole characters, never a part of a stop string.
///
/// Allocates when it is made and not per token.
#[derive(Debug)]
pub struct TextStream<'t> {
    tokenizer: &'t Tokenizer,
    stops: Cow<'t, [String]>,
    /// Bytes not given out yet: the start of a character or of a stop string.
    pending: Vec<u8>,
    stopped: bool,
}

impl<'t> TextStream<'t> {
    /// A stream that ends before the first of `stops`.
    ///
    /// # Panics
    /// If one of them is empty.
    pub fn new(tokenizer: &'t Tokenizer, stops: impl Into<Cow<'t, [String]>>) -> Self {
        let stops = stops.into();
        assert!(stops.iter().all(|stop| !stop.is_empty()), "an empty stop string is everywhere");
        let longest_stop = stops.iter().map(String::len).max().unwrap_or(0);
        let pending = Vec::with_capacity(longest_stop + 4 + tokenizer.longest());
        Self { tokenizer, stops, pending, stopped: false }
    }
    /// Whether a stop string was found. Nothing is given out after it.
    pub const fn stopped(&self) -> bool {
        self.stopped
    }
    /// Adds a token, and gives out what is certain by now.
    pub fn push(&mut self, token: u32, emit: &mut dyn FnMut(&str)) {
        if self.stopped {
            return;
        }
        self.pending.extend_from_slice(self.tokenizer.bytes(token));
        let matches = self.stops.iter().filter_map(|stop| find(&self.pending, stop.as_bytes()));
        if let Some(at) = matches.min() {
            self.stopped = true;
            self.pending.truncate(at);
            self.finish(emit);
            return;
        }
        let held = self.stops.iter().map(|stop| overlap(&self.pending, stop.as_bytes())).max().unwrap_or(0);
        let certain = self.pending.len() - held;
        let given = emit_characters(&self.pending[..certain], emit);
        self.pending.drain(..given);
    }
    /// Gives out all that is left; bytes that are no character become one U+FFFD.
    pub fn finish(&mut self, emit: &mut dyn FnMut(&str)) {
        let given = emit_characters(&self.pending, emit);
        if given < self.pending.len() {
            emit("\u{fffd}");
        }
        self.pending.clear();
    }
}

/// Gives out the whole characters of `bytes`, invalid bytes as U+FFFD; returns how many bytes that were. What is left is the
/// start of a character.
fn emit_characters(bytes: &[u8], emit: &mut dyn FnMut(&str)) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match str::from_utf8(&bytes[done..]) {
            Ok(text) => {
                emit(text);
                return bytes.len();
            }
            Err(e) => {
                let valid = &bytes[done..][..e.valid_up_to()];
                if !valid.is_empty() {
                    emit(str::from_utf8(valid).expect("found valid just now"));
                }
                done += valid.len();
                match e.error_len() {
                    Some(n) => {
                        emit("\u{fffd}");
                        done += n;
                    }
                    None => return done,
                }
            }
        }
    }
    done
}

/// Where `needle` starts in `bytes`.
fn find(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|window| window == needle)
}

/// The longest end of `bytes` that `stop` starts with.
fn overlap(bytes: &[u8], stop: &[u8]) -> usize {
    let longest = bytes.len().min(stop.len().saturating_sub(1));
    (1..=longest).rev().find(|&n| bytes.ends_with(&stop[..n])).unwrap_or(0)
}
