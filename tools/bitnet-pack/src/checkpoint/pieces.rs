//! Writes a sentencepiece model, so that vocabularies of other containers are read by that format's own reader.

/// What a piece is, with the numbers of sentencepiece and of GGUF.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl PieceKind {
    pub(super) fn from_tag(tag: i64) -> Option<Self> {
        let all = [Self::Normal, Self::Unknown, Self::Control, Self::UserDefined, Self::Unused, Self::Byte];
        all.into_iter().find(|&kind| kind as i64 == tag)
    }
}

/// A piece; its token is its place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) text: &'a str,
    /// Pieces of higher scores are merged first.
    pub(super) score: f32,
    pub(super) kind: PieceKind,
}

/// The byte that a token like `<0x0A>` stands for.
pub(super) fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    // Parsing alone would take a sign.
    let hex = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if hex { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// A model that merges by score, falls back to bytes and leaves white space as it is. `named` are the tokens of what is
/// unknown, of the start and of the end; `prefix` is whether a space is put before a text.
pub(super) fn sentencepiece(pieces: &[Piece<'_>], named: [Option<u32>; 3], prefix: bool) -> Vec<u8> {
    let mut model = Vec::new();
    for piece in pieces {
        let mut message = Vec::new();
        bytes(&mut message, 1, piece.text.as_bytes());
        varint(&mut message, 2 << 3 | 5);
        message.extend_from_slice(&piece.score.to_le_bytes());
        number(&mut message, 3, piece.kind as u64);
        bytes(&mut model, 1, &message);
    }
    let mut trainer = Vec::new();
    const BPE: u64 = 2;
    number(&mut trainer, 3, BPE);
    number(&mut trainer, 35, u64::from(pieces.iter().any(|p| p.kind == PieceKind::Byte)));
    for (id, field) in named.into_iter().zip([40, 41, 42]) {
        // No such token is -1, and then its piece must not be that of another.
        number(&mut trainer, field, id.map_or(u64::MAX, u64::from));
        bytes(&mut trainer, field + 5, id.map_or("", |id| pieces[id as usize].text).as_bytes());
    }
    bytes(&mut model, 2, &trainer);
    let mut normalizer = Vec::new();
    bytes(&mut normalizer, 1, b"identity");
    number(&mut normalizer, 3, prefix.into());
    number(&mut normalizer, 4, 0);
    bytes(&mut model, 3, &normalizer);
    model
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}
