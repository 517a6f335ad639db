//! What kitoken takes for granted of a tokenizer, looked at before it gets one: a hostile file must not end a program.
use alloc::vec;
use alloc::vec::Vec;
use kitoken::{
    CharsMap, Decoding, DecodingReplacePattern, Definition, InsertionPosition, Model, Normalization,
    NormalizationReplacePattern, Processing, Split, SplitBehavior, SplitPattern,
};

/// Most characters that a step may add to a text: a hostile one could add gigabytes to each.
const ADDED_MAX: u32 = 16;

/// Checks a tokenizer before kitoken is made of it, which would panic over some of what is refused here.
///
/// # Errors
/// What is wrong.
pub fn check(definition: &Definition) -> Result<(), &'static str> {
    let vocab = definition.model.vocab();
    if vocab.is_empty() {
        return Err("it has no tokens but control tokens");
    }
    match &definition.model {
        Model::Unigram { scores, .. } if scores.iter().any(|s| !s.is_finite()) => {
            return Err("a score is not a finite number");
        }
        Model::WordPiece { .. } => {
            let mut templates = definition.config.templates.iter();
            let prefix = templates.find(|t| t.position == InsertionPosition::WordContinuation);
            let continues = |bytes: &[u8]| prefix.is_some_and(|p| bytes.starts_with(p.content.as_bytes()));
            if vocab.iter().all(|token| continues(&token.bytes)) {
                return Err("it has no token that starts a word");
            }
        }
        _ => {}
    }
    // No converter makes another but padding and truncating, which the packer leaves out. kitoken strips more tokens than there
    // are, and pads a text to four billion.
    if !definition.config.processing.iter().all(|step| matches!(step, Processing::Collapse { .. })) {
        return Err("it pads, strips or cuts the tokens of a text");
    }
    let long = |left: u32, right: u32| left > ADDED_MAX || right > ADDED_MAX;
    for step in &definition.config.decoding {
        if matches!(step, Decoding::Extend { left, right, .. } if long(*left, *right)) {
            return Err("it adds too much to a text");
        }
    }
    for step in &definition.config.normalization {
        // Conditions can stand in conditions.
        let mut step = step;
        while let Normalization::Conditional { normalization, .. } = step {
            step = normalization;
        }
        match step {
            Normalization::Extend { left, right, .. } if long(*left, *right) => {
                return Err("it adds too much to a text");
            }
            Normalization::CharsMap { map } if !is_closed(map) => {
                return Err("its map of characters leads out of itself");
            }
            Normalization::Replace { pattern: NormalizationReplacePattern::Regex(pattern), .. } => {
                check_pattern(pattern)?;
            }
            _ => {}
        }
    }
    for step in &definition.config.decoding {
        if let Decoding::Replace { pattern: DecodingReplacePattern::Regex(pattern), .. } = step {
            check_pattern(pattern)?;
        }
    }
    for split in &definition.config.split {
        let Split::Pattern { pattern, behavior } = split else { continue };
        match pattern {
            SplitPattern::Regex(pattern) => check_pattern(pattern)?,
            SplitPattern::String(text) if text.is_empty() => return Err("it splits a text by nothing"),
            // kitoken takes it for one byte, and cuts it in two unless it is joined with what comes after it.
            SplitPattern::Character(c) if c.len_utf8() > 1 && *behavior != SplitBehavior::MergeRight => {
                return Err("it splits a text by a character of several bytes");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Refuses patterns over which the engine of regular expressions, or kitoken with its errors, panics in some text.
///
/// - Word boundaries: they need tables that kitoken's engine is built without.
/// - Repeated groups in which something can match in several ways, `(?:a|aa)+`: before what does not match, the engine tries as
///   many ways as powers of two of the text's length, gives up after a million, and kitoken takes it for a bug. Patterns that
///   reach the limit with repetitions side by side, which takes a long text, are not found here.
fn check_pattern(pattern: &str) -> Result<(), &'static str> {
    /// Most times that such a group may be repeated.
    const TIMES: u32 = 8;
    // Whether each open group, and the whole, can match in several ways; and whether what was just read is such a group.
    let (mut open, mut group) = (vec![false], false);
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        // The innermost; the whole is never closed.
        let inner = open.len() - 1;
        let times = match c {
            '\\' => {
                match chars.next() {
                    Some('b' | 'B' | '<' | '>') => {
                        return Err("a pattern asks for word boundaries, which are not supported");
                    }
                    Some('p' | 'P' | 'x' | 'u') if chars.peek() == Some(&'{') => {
                        while chars.next().is_some_and(|c| c != '}') {}
                    }
                    _ => {}
                }
                None
            }
            '[' => {
                let mut depth = 1;
                // A bracket that closes at once, or after a negation, is a member.
                chars.next_if_eq(&'^');
                chars.next_if_eq(&']');
                while depth > 0 {
                    match chars.next() {
                        Some('[') => depth += 1,
                        Some(']') => depth -= 1,
                        Some('\\') => drop(chars.next()),
                        Some(_) => {}
                        None => break,
                    }
                }
                None
            }
            '(' => {
                chars.next_if_eq(&'?');
                open.push(false);
                None
            }
            ')' if inner > 0 => {
                group = open.pop().expect("more than one");
                open[inner - 1] |= group;
                continue;
            }
            '|' => {
                open[inner] = true;
                None
            }
            '*' | '+' => Some((0, u32::MAX)),
            '?' => Some((0, 1)),
            '{' => {
                let mut range = [0; 2];
                let mut at = 0;
                let mut digits = [false; 2];
                while let Some(c) = chars.next_if(|&c| c != '}') {
                    match c.to_digit(10) {
                        Some(digit) => {
                            range[at] = range[at].min(u32::MAX / 16) * 10 + digit;
                            digits[at] = true;
                        }
                        None if c == ',' && at == 0 => at = 1,
                        // No repetition, but text.
                        None => {}
                    }
                }
                let most = if at == 1 && digits[1] {
                    range[1]
                } else if at == 1 {
                    u32::MAX
                } else {
                    range[0]
                };
                Some((range[0], most))
            }
            _ => None,
        };
        if let Some((least, most)) = times {
            if group && most > TIMES {
                return Err("a pattern repeats a group that can match in several ways");
            }
            open[inner] |= least != most;
            // Lazy or possessive.
            chars.next_if(|&c| matches!(c, '?' | '+'));
        }
        group = false;
    }
    Ok(())
}

/// Gives a map of characters the unit that kitoken's converter leaves off at its end: such arrays are whole blocks of 256, and a
/// text that asks for the last one would panic. It is hardly ever in use, and then one sequence stays as it is.
pub fn complete(definition: &mut Definition) {
    for step in &mut definition.config.normalization {
        if let Normalization::CharsMap { map } = step
            && let Some((mut units, texts)) = parts(map)
            && units.len() % 256 == 255
        {
            units.push(0);
            let whole = postcard::to_allocvec(&(units, texts)).ok();
            *map = whole.and_then(|bytes| postcard::from_bytes(&bytes).ok()).unwrap_or_default();
        }
    }
}

/// Units and texts of a map, which are private, by its serialized form, which is not.
fn parts(map: &CharsMap) -> Option<(Vec<u32>, Vec<u8>)> {
    postcard::from_bytes(&postcard::to_allocvec(map).ok()?).ok()
}

/// Whether no text leads out of a map of characters: a double-array trie, whose units say where their children lie, as
/// sentencepiece has it, and the texts that its leaves point to.
fn is_closed(map: &CharsMap) -> bool {
    let Some((units, texts)) = parts(map) else { return false };
    let offset = |unit: u32| (unit >> 10 << (unit >> 6 & 8)) as usize;
    let Some(&root) = units.first() else { return false };
    let (mut seen, mut open) = (vec![false; units.len()], vec![offset(root)]);
    while let Some(children) = open.pop() {
        for label in 1..=255 {
            let Some(&unit) = units.get(children ^ label) else { return false };
            // Bit 31 marks a leaf, which has no label.
            if unit & (1 << 31 | 0xff) != label as u32 || core::mem::replace(&mut seen[children ^ label], true) {
                continue;
            }
            let next = children ^ label ^ offset(unit);
            let leaf = || units.get(next).is_some_and(|leaf| (leaf & !(1 << 31)) as usize <= texts.len());
            if unit >> 8 & 1 == 1 && !leaf() {
                return false;
            }
            open.push(next);
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_that_panic_are_refused_and_those_of_models_are_not() {
        for pattern in [
            r" ?+|\B+",
            r"a\b",
            r"\\\b",
            r"\<a",
            r"a\b{start}",
            r"(?:a|aa)+(?!b)c",
            r"(a*)*b",
            r"((a|b)c)+",
            r"(?:a?){20}",
            r"(?:[)]|a)*",
            r"(?:a+){2,}x",
        ] {
            assert!(check_pattern(pattern).is_err(), "{pattern}");
        }
        for pattern in [
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+(?!\S)",
            r"(?=(?:\d{3})+(?!\d))",
            r" ?[^(\s|[.,!?])]+",
            r"'(?i:[sdmt]|ll)|[^\r\n]?+\p{L}+| ?[^\s]++[\r\n]*",
            r"[\]b]+\\b",
            r"(a|b)?c",
            "",
            r"(?:a|b){2}",
            ")",
            r"[^]a]*",
            r"[[:alpha:]--[b]]+",
        ] {
            assert_eq!(check_pattern(pattern), Ok(()), "{pattern}");
        }
    }

    fn map(units: &[u32], texts: &[u8]) -> CharsMap {
        let bytes = postcard::to_allocvec(&(units, texts)).unwrap();
        postcard::from_bytes(&bytes).unwrap()
    }

    /// Units of a trie of one key, "a": the root's children lie at 256, and the key's own at 512.
    fn trie(leaf: u32) -> Vec<u32> {
        let mut units = vec![0; 768];
        units[0] = 256 << 10;
        units[256 ^ 0x61] = (0x61 ^ 256 ^ 512) << 10 | 1 << 8 | 0x61;
        units[512] = 1 << 31 | leaf;
        units
    }

    #[test]
    fn maps_that_lead_out_of_themselves_are_found() {
        let texts = b"b\0";
        let sound = trie(0);
        assert!(is_closed(&map(&sound, texts)));
        assert_eq!(map(&sound, texts).normalize("ab"), "bb");
        assert!(!is_closed(&map(&[], texts)), "no root");
        assert!(!is_closed(&map(&sound[..400], texts)), "children past the end");
        assert!(!is_closed(&map(&trie(3), texts)), "a text past the end");
        let mut far = sound.clone();
        far[0] = 1 << 20 << 10;
        assert!(!is_closed(&map(&far, texts)), "children nowhere");
        // A key whose children are its own parent's: every text ends, and so does the search.
        let mut circle = sound;
        circle[256 ^ 0x61] = 0x61 << 10 | 0x61;
        assert!(is_closed(&map(&circle, texts)));
    }
}
