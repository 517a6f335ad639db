//! The checkpoints of llama2.c, version 0: seven numbers, then f32 matrices in a fixed order. There is no magic, so a file is
//! one if its length is exactly what its numbers need.
use super::pieces::{Piece, PieceKind, byte_of, sentencepiece};
use super::{Dtype, Storage, Table, TensorInfo, rope};
use crate::Error;
use crate::files::Input;
use bitnet_kernel::Format;
use bitnet_runtime::model::{Activation, Config, Quantizers, Rope};
use std::path::Path;

/// The numbers at the start.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    pub(super) config: Config,
}

/// Numbers, seven of four bytes.
const HEADER_BYTES: u64 = 28;

/// Reads the numbers, if the file is one of these; a file that is not may be anything.
///
/// # Errors
/// If the system refuses.
pub(super) fn recognise(input: &Input) -> Result<Option<(Header, Vec<TensorInfo>)>, Error> {
    if input.bytes < HEADER_BYTES {
        return Ok(None);
    }
    let mut raw = [0; HEADER_BYTES as usize];
    input.read_at(0, &mut raw)?;
    let (words, _) = raw.as_chunks::<4>();
    let [hidden, ffn, layers, heads, kv_heads, vocab, context] = core::array::from_fn(|i| i32::from_le_bytes(words[i]));
    // A negative vocabulary says that the head is a matrix of its own.
    let tied = vocab > 0;
    let positive = |v: i32| u32::try_from(v).unwrap_or(0);
    let (hidden, heads) = (positive(hidden), positive(heads));
    let config = Config {
        vocab: vocab.unsigned_abs(),
        hidden,
        ffn: positive(ffn),
        layers: positive(layers),
        heads,
        kv_heads: positive(kv_heads),
        head_dim: hidden.checked_div(heads).unwrap_or(0),
        context: positive(context),
        norm_eps: 1e-5,
        activation: Activation::Silu,
        rope: Rope::Interleaved,
        sub_norms: false,
        qk_norms: false,
        linear_norm_eps: None,
        live_ffn: false,
        sparse: false,
        window: None,
        memory: None,
        delayed_writes: false,
        recurrence: false,
        quantizers: Quantizers::INT8,
        tied,
        linear_head: false,
        split_head: false,
        formats: 1 << Format::TL as u8,
    };
    if config.check().is_err() || config.query_width() != hidden {
        return Ok(None);
    }
    let tensors = tensors(&config);
    let end = tensors.last().map_or(0, |t| t.offset + t.bytes);
    Ok((end == input.bytes).then_some((Header { config }, tensors)))
}

/// Every tensor, by a name of its own and its layer. Those of one kind lie together. The last one ends the file.
fn tensors(c: &Config) -> Vec<TensorInfo> {
    let [vocab, hidden, ffn, kv, layers] = [c.vocab, c.hidden, c.ffn, c.kv_width(), c.layers].map(u64::from);
    let angles = u64::from(c.context) * u64::from(c.head_dim) / 2;
    let of_layers: [(&str, &[u64]); 9] = [
        ("rms_att", &[hidden]),
        ("wq", &[hidden, hidden]),
        ("wk", &[kv, hidden]),
        ("wv", &[kv, hidden]),
        ("wo", &[hidden, hidden]),
        ("rms_ffn", &[hidden]),
        ("w1", &[ffn, hidden]),
        ("w2", &[hidden, ffn]),
        ("w3", &[ffn, hidden]),
    ];
    let mut tensors = Vec::new();
    let mut offset = HEADER_BYTES;
    let mut add = |name: String, shape: &[u64]| {
        let bytes = 4 * shape.iter().product::<u64>();
        tensors.push(TensorInfo { name, dtype: Dtype::F32, shape: shape.into(), offset, bytes, scale: 1.0 });
        offset += bytes;
    };
    add("tok_emb".into(), &[vocab, hidden]);
    for (name, shape) in of_layers {
        (0..layers).for_each(|layer| add(format!("{name}.{layer}"), shape));
    }
    add("rms_final".into(), &[hidden]);
    // Cosines and sines of all positions, which are computed anew.
    add(ANGLES.into(), &[2, angles]);
    if !c.tied {
        add("wcls".into(), &[vocab, hidden]);
    }
    tensors
}

/// What no section is made from.
pub(super) const ANGLES: &str = "freq_cis";

/// The configuration: what the file leaves unsaid is the same in all of them.
pub(super) fn table(header: &Header) -> Table {
    Table {
        architecture: "llama2.c".into(),
        config: header.config,
        tie: None,
        storage: Storage::Found { masters: false },
        frequencies: rope::frequencies(10_000.0, header.config.head_dim, rope::Scaling::None),
        bos: Some(BOS),
        eos: vec![EOS],
        notes: Vec::new(),
    }
}

const BOS: u32 = 1;
const EOS: u32 = 2;

/// Longest token.
const TOKEN_BYTES_MAX: usize = 1024;

/// Rewrites a tokenizer of llama2.c as a sentencepiece model: `longest`, then for each token a score, a length and bytes.
///
/// # Errors
/// If it is malformed, or has not `vocab` tokens.
pub(crate) fn tokenizer(path: &Path, raw: &[u8], vocab: u32) -> Result<Vec<u8>, Error> {
    let wrong = |what: String| Error::tokenizer(path, what);
    let word = |rest: &mut &[u8], what: &str| -> Result<[u8; 4], Error> {
        let (word, after) =
            rest.split_first_chunk().ok_or_else(|| wrong(format!("it ends inside {what}: truncated")))?;
        *rest = after;
        Ok(*word)
    };
    let mut rest = raw;
    let longest = u32::from_le_bytes(word(&mut rest, "the first number")?) as usize;
    if longest > TOKEN_BYTES_MAX {
        return Err(wrong(format!("tokens of {longest} bytes; at most {TOKEN_BYTES_MAX} are accepted")));
    }
    let mut texts = Vec::new();
    while !rest.is_empty() {
        let what = format!("token {}", texts.len());
        let score = f32::from_le_bytes(word(&mut rest, &what)?);
        let length = u32::from_le_bytes(word(&mut rest, &what)?) as usize;
        if length > longest || length > rest.len() {
            return Err(wrong(format!(
                "{what} has {length} bytes: at most {longest} are expected, {} are left",
                rest.len()
            )));
        }
        let (text, after) = rest.split_at(length);
        let text = str::from_utf8(text).map_err(|_| wrong(format!("{what} is not UTF-8")))?;
        if !score.is_finite() {
            return Err(wrong(format!("{what}: {score} is no score")));
        }
        // A space is written as itself here, and as a mark in sentencepiece.
        texts.push((text.replace(' ', "\u{2581}"), score));
        rest = after;
    }
    if texts.len() != vocab as usize {
        return Err(wrong(format!("has {} tokens, the model has {vocab}", texts.len())));
    }
    let pieces: Vec<Piece<'_>> = texts
        .iter()
        .enumerate()
        .map(|(id, (text, score))| {
            let (text, kind) = match id {
                0 => ("<unk>", PieceKind::Unknown),
                // Its writer put line feeds around these two.
                1 => ("<s>", PieceKind::Control),
                2 => ("</s>", PieceKind::Control),
                3..259 if byte_of(text).is_some() => (text.as_str(), PieceKind::Byte),
                _ => (text.as_str(), PieceKind::Normal),
            };
            Piece { text, score: *score, kind }
        })
        .collect();
    if pieces.len() < 3 {
        return Err(wrong("has no tokens for the start and the end".into()));
    }
    Ok(sentencepiece(&pieces, [Some(0), Some(BOS), Some(EOS)], true))
}
