//! Rust source with its comments and strings blanked out, so that a word found in it is a word of the program.

/// The same text, with spaces in place of comments and of what strings and characters contain. Every byte keeps its
/// place and every line its number. Quotation marks stay.
pub(super) fn blank(text: &str) -> String {
    let mut scanner = Scanner { bytes: text.as_bytes(), at: 0, out: Vec::with_capacity(text.len()) };
    while let Some(byte) = scanner.peek(0) {
        match byte {
            b'/' if scanner.peek(1) == Some(b'/') => scanner.line_comment(),
            b'/' if scanner.peek(1) == Some(b'*') => scanner.block_comment(),
            b'"' => scanner.string(),
            b'\'' => scanner.character(),
            _ if is_word(byte) => scanner.word(),
            _ => scanner.keep(),
        }
    }
    // Only ASCII was put in place of anything, and what was kept was kept whole, so this is lossless.
    String::from_utf8_lossy(&scanner.out).into_owned()
}

/// The places where `word` stands in blanked text with no letter, digit or underscore at either side.
pub(super) fn find_word<'a>(text: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    let bytes = text.as_bytes();
    text.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let free = |index: Option<usize>| !index.and_then(|i| bytes.get(i)).is_some_and(|&byte| is_word(byte));
        free(at.checked_sub(1)) && free(Some(at + word.len()))
    })
}

/// The number of the line of a place in a text, from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes()[..at].iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Whether a byte belongs to a word. Those above ASCII do, as parts of letters.
pub(super) fn is_word(byte: u8) -> bool {
    byte == b'_' || byte.is_ascii_alphanumeric() || !byte.is_ascii()
}

struct Scanner<'a> {
    bytes: &'a [u8],
    at: usize,
    out: Vec<u8>,
}

impl Scanner<'_> {
    fn peek(&self, ahead: usize) -> Option<u8> {
        self.bytes.get(self.at + ahead).copied()
    }

    fn keep(&mut self) {
        self.out.extend(self.peek(0));
        self.at += 1;
    }

    fn blank(&mut self) {
        self.out.extend(self.peek(0).map(|byte| if byte == b'\n' { b'\n' } else { b' ' }));
        self.at += 1;
    }

    fn line_comment(&mut self) {
        while self.peek(0).is_some_and(|byte| byte != b'\n') {
            self.blank();
        }
    }

    /// Block comments nest.
    fn block_comment(&mut self) {
        let mut depth = 0;
        while let Some(byte) = self.peek(0) {
            let step = match (byte, self.peek(1)) {
                (b'/', Some(b'*')) => 1,
                (b'*', Some(b'/')) => -1,
                _ => 0,
            };
            depth += step;
            self.blank();
            if step != 0 {
                self.blank();
            }
            if depth == 0 {
                return;
            }
        }
    }

    fn string(&mut self) {
        self.keep();
        while let Some(byte) = self.peek(0) {
            match byte {
                b'"' => return self.keep(),
                b'\\' => {
                    self.blank();
                    self.blank();
                }
                _ => self.blank(),
            }
        }
    }

    /// A character, or the mark of a lifetime: only the former has a mark after one character.
    fn character(&mut self) {
        self.keep();
        if self.peek(0) == Some(b'\\') {
            self.blank();
            self.blank();
            while self.peek(0).is_some_and(|byte| byte != b'\'') {
                self.blank();
            }
            self.keep();
        } else {
            let length = 1 + (1..4).take_while(|&i| self.peek(i).is_some_and(|byte| byte & 0xc0 == 0x80)).count();
            if self.peek(length) == Some(b'\'') {
                (0..length).for_each(|_| self.blank());
                self.keep();
            }
        }
    }

    /// A word, and the raw string that begins where the word is `r`, `br` or `cr`.
    fn word(&mut self) {
        let start = self.at;
        while self.peek(0).is_some_and(is_word) {
            self.keep();
        }
        let hashes = (0..).take_while(|&i| self.peek(i) == Some(b'#')).count();
        let raw = matches!(&self.bytes[start..self.at], b"r" | b"br" | b"cr") && self.peek(hashes) == Some(b'"');
        if !raw {
            return;
        }
        (0..=hashes).for_each(|_| self.keep());
        let ends =
            |scanner: &Self| scanner.peek(0) == Some(b'"') && (1..=hashes).all(|i| scanner.peek(i) == Some(b'#'));
        while self.at < self.bytes.len() && !ends(self) {
            self.blank();
        }
        (0..=hashes).for_each(|_| self.keep());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blanked(text: &str) -> String {
        let out = blank(text);
        assert_eq!(out.len(), text.len(), "every byte keeps its place");
        assert_eq!(out.matches('\n').count(), text.matches('\n').count());
        out
    }

    #[test]
    fn comments_go_and_code_stays() {
        assert_eq!(blanked("a // b\nc"), "a     \nc");
        assert_eq!(blanked("a /* b /* c */ d */ e"), "a                   e");
        assert_eq!(blanked("a /* b"), "a     ");
        assert_eq!(blanked("a / b"), "a / b");
    }

    #[test]
    fn strings_are_emptied_and_their_ends_found() {
        assert_eq!(blanked(r#"f("a // b", c)"#), r#"f("      ", c)"#);
        assert_eq!(blanked(r#""\"" x"#), r#""  " x"#);
        assert_eq!(blanked(r#""\\" x"#), r#""  " x"#);
        assert_eq!(blanked("r\"a\\\" x"), "r\"  \" x");
        assert_eq!(blanked("r#\"a\"b\"# x"), "r#\"   \"# x");
        assert_eq!(blanked("br##\"a\"#b\"## x"), "br##\"    \"## x");
        assert_eq!(blanked("b\"a\" c\"d\""), "b\" \" c\" \"");
        assert_eq!(blanked("r#type = \"a\""), "r#type = \" \"");
        assert_eq!(blanked("\"never closed"), "\"            ");
        assert_eq!(blanked("r#\"never closed"), "r#\"            ");
    }

    #[test]
    fn characters_are_emptied_and_lifetimes_are_not_characters() {
        assert_eq!(blanked("'\"' x"), "' ' x");
        assert_eq!(blanked("'\\'' x"), "'  ' x");
        assert_eq!(blanked("'\\u{22}' x"), "'      ' x");
        assert_eq!(blanked("b'/' // y"), "b' '     ");
        assert_eq!(blanked("'ü' x"), "'  ' x");
        assert_eq!(blanked("fn f<'a>(x: &'a str)"), "fn f<'a>(x: &'a str)");
        assert_eq!(blanked("'outer: loop"), "'outer: loop");
    }

    #[test]
    fn words_are_whole_words() {
        let at = |text| find_word(text, "mod").collect::<Vec<_>>();
        assert_eq!(at("mod a; modify; a_mod mod"), [0, 21]);
        assert_eq!(at("mode"), Vec::<usize>::new());
        assert_eq!(line_of("a\nb\nc", 4), 3);
    }
}
