//! Streams of text: whole characters, and stop strings across tokens.
#![cfg(feature = "alloc")]
use bitnet_runtime::Error;
use bitnet_runtime::image::{StopIds, Text};
use bitnet_runtime::tokenizer::{TextStream, Tokenizer};
use kitoken::{Configuration, Definition, Fallback, Metadata, Model, SpecialToken, SpecialTokenKind, Token};
use proptest::prelude::*;

/// What the image says about text.
fn info() -> Text<'static> {
    Text { bos: Some(256), stop: StopIds::default(), chat_template: "" }
}
const VOCAB: u32 = 300;

/// A token a byte, and one control token.
fn definition() -> Definition {
    let vocab = (0..=255u8).map(|b| Token { id: b.into(), bytes: vec![b] }).collect();
    let begin = SpecialToken {
        id: 256,
        bytes: b"<begin>".to_vec(),
        kind: SpecialTokenKind::Control,
        ident: None,
        score: 0.0,
        extract: true,
    };
    let config = Configuration { fallback: vec![Fallback::Bytes], ..Configuration::default() };
    definition_of(vocab, vec![begin], config)
}

fn definition_of(vocab: Vec<Token>, specials: Vec<SpecialToken>, config: Configuration) -> Definition {
    Definition { meta: Metadata::default(), model: Model::BytePair { vocab, chars: false }, specials, config }
}

fn tokenizer() -> Tokenizer {
    Tokenizer::new(&definition().to_vec(), &info(), VOCAB).unwrap()
}

/// What a stream gives out for these bytes, piece by piece, and whether it stopped.
fn stream(bytes: &[u8], stops: &[&str]) -> (Vec<String>, bool) {
    let tokenizer = tokenizer();
    let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
    let mut stream = TextStream::new(&tokenizer, &stops);
    let mut pieces = Vec::new();
    for &b in bytes {
        stream.push(b.into(), &mut |text| pieces.push(text.to_owned()));
    }
    stream.finish(&mut |text| pieces.push(text.to_owned()));
    (pieces, stream.stopped())
}

fn text(bytes: &[u8], stops: &[&str]) -> (String, bool) {
    let (pieces, stopped) = stream(bytes, stops);
    (pieces.concat(), stopped)
}

#[test]
fn tokens_give_their_bytes_and_control_tokens_none() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.bytes(b'a'.into()), b"a");
    assert_eq!(tokenizer.bytes(0xf0), [0xf0]);
    assert_eq!(tokenizer.bytes(256), b"");
    assert_eq!(tokenizer.bytes(u32::MAX), b"");
    assert_eq!(tokenizer.bos(), Some(256));
}

#[test]
fn plain_text_never_makes_control_tokens() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.encode("<begin>").unwrap(), b"<begin>".map(u32::from));
    assert_eq!(tokenizer.find_control("a<begin>b"), Some((1, 7, 256)));
    assert_eq!(tokenizer.find_control("a<begin"), None);
    assert_eq!(tokenizer.control_text(256), Some("<begin>"));
}

/// Replay A-09: a limit in the middle of a character.
#[test]
fn characters_are_never_cut() {
    let emoji = "😀".as_bytes();
    for n in 1..4 {
        assert_eq!(stream(&emoji[..n], &[]).0, ["\u{fffd}"], "{n} bytes");
    }
    assert_eq!(stream(emoji, &[]).0, ["😀"]);
    assert_eq!(text(&[0x80], &[]).0, "\u{fffd}");
    assert_eq!(text(b"a\x80b", &[]).0, "a\u{fffd}b");
    assert_eq!(text(b"a\xf0\x9fb", &[]).0, "a\u{fffd}b");
}

/// Replay A-10: stop strings across tokens.
#[test]
fn nothing_of_a_stop_string_is_given_out() {
    assert_eq!(text(b"abENDcd", &["END"]), ("ab".into(), true));
    assert_eq!(text(b"abENx", &["END"]), ("abENx".into(), false));
    assert_eq!(text(b"aEEND", &["END"]), ("aE".into(), true));
    assert_eq!(text(b"abEND", &["END", "bE"]), ("a".into(), true));
    assert_eq!(text(b"ab", &["a stop string longer than the reply"]), ("ab".into(), false));
    assert_eq!(text("caf\u{e9}!".as_bytes(), &["\u{e9}"]), ("caf".into(), true));
    assert_eq!(text("caf\u{e8}!".as_bytes(), &["\u{e9}"]), ("caf\u{e8}!".into(), false));
    assert_eq!(text(b"aab", &["ab"]), ("a".into(), true));
    // What cannot be the start of a stop string any more is given out at once.
    assert_eq!(stream(b"abENx", &["END"]).0, ["a", "b", "ENx"]);
}

proptest! {
    /// Whatever the tokens and stop strings, the stream gives what splitting the whole text at once gives.
    #[test]
    fn streams_equal_the_whole(bytes in proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(0xc3), Just(0xa9), any::<u8>()], 0..24),
                               stops in proptest::collection::vec("[ab\u{e9}]{1,3}", 0..3)) {
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let find = |stop: &&str| bytes.windows(stop.len()).position(|w| w == stop.as_bytes());
        // The stream sees bytes one by one: of all matches the one that is complete first ends it, and cuts where the
        // earliest of those complete by then starts.
        let end = stops.iter().filter_map(|s| find(s).map(|at| at + s.len())).min();
        let cut = end.and_then(|end| {
            let seen = &bytes[..end];
            stops.iter().filter_map(|s| seen.windows(s.len()).position(|w| w == s.as_bytes())).min()
        });
        let expected = String::from_utf8_lossy(&bytes[..cut.unwrap_or(bytes.len())]).into_owned();
        let (found, stopped) = text(&bytes, &stops);
        prop_assert_eq!(stopped, cut.is_some());
        prop_assert_eq!(found, expected);
    }

    /// A damaged tokenizer is an error or a tokenizer, never a panic.
    #[test]
    fn damaged_tokenizers_do_not_panic(at in any::<prop::sample::Index>(), bit in 0..8u8, cut in any::<prop::sample::Index>()) {
        let mut bytes = definition().to_vec();
        let i = at.index(bytes.len());
        bytes[i] ^= 1 << bit;
        let _ = Tokenizer::new(&bytes, &info(), VOCAB).is_ok();
        let _ = Tokenizer::new(&bytes[..cut.index(bytes.len())], &info(), VOCAB).is_ok();
    }
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let refused = |definition: Definition, vocab| {
        assert_eq!(Tokenizer::new(&definition.to_vec(), &info(), vocab).unwrap_err(), Error::Tokenizer);
    };
    refused(definition(), 256);
    refused(definition_of(Vec::new(), Vec::new(), Configuration::default()), VOCAB);
    assert_eq!(Tokenizer::new(b"", &info(), VOCAB).unwrap_err(), Error::Tokenizer);
}
