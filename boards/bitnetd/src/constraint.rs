//! Replies that are held to JSON: which tokens may come next.
//!
//! A schema becomes a grammar over bytes (llguidance), and a token may come if its bytes fit, or if it ends the reply and the
//! value is whole. White space is as Python writes JSON, a space after commas and colons, so that no model can go on with
//! spaces for ever. What of a schema is not understood is refused, and everything has a bound: nobody can make the grammar
//! large or a step slow.
use bitnet_runtime::tokenizer::Tokenizer;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Map, Value, json};
use std::fmt;
use std::sync::Arc;

/// Values within values that JSON mode can make.
const DEPTH: usize = 8;
/// Bounds of a schema: its text, and how deep it goes.
const SCHEMA_BYTES_MAX: usize = 32 << 10;
const SCHEMA_DEPTH_MAX: usize = 32;
/// Bytes of a token; longer ones never fit. A trie is walked to this depth.
const TOKEN_BYTES_MAX: usize = 256;

/// Bounds of a grammar and of a step. A lexer's state takes one or two kilobytes.
const LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 1_000,
    initial_lexer_fuel: 500_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 10_000,
    max_grammar_size: 50_000,
    precompute_large_lexemes: false,
    verbose_errors: false,
};

/// What a reply is held to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Format {
    /// Any object.
    Object,
    /// What fits a schema.
    Schema(Value),
}

/// The vocabulary by its bytes, made once.
pub(crate) struct Vocabulary(ParserFactory);

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Vocabulary")
    }
}

/// What may come next in one reply.
pub struct Constraint(Matcher);

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

impl Vocabulary {
    /// Of `vocab` tokens, of which `ends` end a reply.
    pub(crate) fn new(tokenizer: &Tokenizer, vocab: u32, ends: &[u32]) -> Result<Self, String> {
        // The byte 255 is in no text, and first in a word it would mark the library's own tokens.
        let fits = |word: &[u8]| word.len() <= TOKEN_BYTES_MAX && word.first() != Some(&255);
        let word = |id| Some(tokenizer.bytes(id)).filter(|word| fits(word)).unwrap_or_default().to_vec();
        let mut words: Vec<Vec<u8>> = (0..vocab).map(word).collect();
        for &end in ends {
            words[end as usize].clear();
        }
        // One token more, for vocabularies without any that ends a reply.
        words.push(Vec::new());
        let trie = TokTrie::from(&TokRxInfo::new(vocab + 1, vocab), &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(ends) };
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| e.to_string())?;
        *factory.limits_mut() = LIMITS;
        factory.quiet();
        Ok(Self(factory))
    }

    /// Begins a reply of some format.
    ///
    /// # Errors
    /// What of the schema is not understood, or that it is too large.
    pub(crate) fn constrain(&self, format: Format) -> Result<Constraint, String> {
        let mut schema = match format {
            Format::Object => any_object(),
            Format::Schema(schema) => {
                check(&schema)?;
                schema
            }
        };
        let mut options = JsonCompileOptions { whitespace_flexible: false, ..Default::default() };
        (options.item_separator, options.key_separator) = (", ".to_owned(), ": ".to_owned());
        // In place of what the schema itself may say of such options.
        options.apply_to(&mut schema);
        let mut matcher = Matcher::new(self.0.create_parser(TopLevelGrammar::from_json_schema(schema)));
        if let Some(e) = matcher.get_error() {
            return Err(first_line(&e));
        }
        // A schema that refers to itself alone, or is too large for a step, has no first token.
        matcher.compute_mask().map_err(|e| format!("nothing fits the schema ({})", first_line(&e.to_string())))?;
        Ok(Constraint(matcher))
    }
}

impl Constraint {
    /// Makes the logits of all tokens minus infinity that may not come next.
    ///
    /// # Errors
    /// If nothing may, or finding out takes too long.
    pub fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.0.compute_mask().map_err(|e| first_line(&e.to_string()))?;
        for (token, logit) in logits.iter_mut().enumerate() {
            if !mask.is_allowed(token as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }
    /// Takes the token that came; returns whether the value is whole and nothing can follow.
    ///
    /// # Errors
    /// If it may not come: there was a logit that is no number.
    pub fn push(&mut self, token: u32) -> Result<bool, String> {
        self.0.consume_token(token).map_err(|e| first_line(&e.to_string()))?;
        Ok(self.0.is_stopped())
    }
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn check(schema: &Value) -> Result<(), String> {
    if !schema.is_object() {
        return Err("a schema is an object".to_owned());
    }
    if schema.to_string().len() > SCHEMA_BYTES_MAX {
        return Err(format!("a schema has at most {SCHEMA_BYTES_MAX} bytes"));
    }
    if depth(schema) > SCHEMA_DEPTH_MAX {
        return Err(format!("a schema is at most {SCHEMA_DEPTH_MAX} levels deep"));
    }
    Ok(())
}

/// Values within values; the parser of JSON bounds the recursion.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(values) => 1 + values.iter().map(depth).max().unwrap_or(0),
        Value::Object(values) => 1 + values.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// The schema of an object with anything in it, so many levels deep.
fn any_object() -> Value {
    let inner = |level: usize| json!({ "$ref": format!("#/$defs/{level}") });
    let object = |level| json!({ "type": "object", "additionalProperties": inner(level) });
    let mut levels = Map::new();
    for level in 1..=DEPTH {
        let mut kinds = vec![json!({ "type": ["string", "number", "boolean", "null"] })];
        if level < DEPTH {
            kinds.extend([object(level + 1), json!({ "type": "array", "items": inner(level + 1) })]);
        }
        levels.insert(level.to_string(), json!({ "anyOf": kinds }));
    }
    let mut schema = object(1);
    schema["$defs"] = Value::Object(levels);
    schema
}
