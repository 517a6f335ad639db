//! Everything that can go wrong at run time. Broken invariants panic instead.
use crate::image::Kind;
use core::fmt;

/// Flat, `Copy` and without text: cheap to return, to compare and to log.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Error {
    /// The bytes are not an image this runtime reads.
    Image(ImageError),
    /// The medium failed.
    Source(SourceError),
    /// The caller's memory is smaller than the plan.
    Memory {
        /// What the memory is for.
        what: &'static str,
        /// Blocks of 64 bytes that the plan needs.
        needed: usize,
        /// Blocks the caller gave.
        given: usize,
    },
    /// A limit outside what the image allows.
    Limit {
        /// Which limit.
        what: &'static str,
        /// The value asked for.
        given: u32,
        /// The largest allowed.
        max: u32,
    },
    /// A token outside the vocabulary.
    Token {
        /// The token.
        token: u32,
        /// Tokens in the vocabulary.
        vocab: u32,
    },
    /// The conversation is as long as its state holds.
    ContextFull {
        /// Positions the state holds.
        context: u32,
    },
    /// An activation became infinite or not a number: damaged weights, or a checkpoint that was broken before packing.
    NotFinite {
        /// The layer, from 0; the number of layers stands for the head.
        layer: u32,
    },
    /// The state was made for another model or other limits.
    State,
    /// A snapshot is damaged, or of another image or of other limits.
    Snapshot {
        /// What is wrong with it.
        what: &'static str,
        /// What it should be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// The tokenizer in the image cannot be read, or a text cannot be encoded with it.
    Tokenizer,
}

/// Why an image was refused. Offsets and sizes are in bytes unless a name says otherwise.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum ImageError {
    /// Shorter than any image.
    TooShort {
        /// Bytes there are.
        bytes: u64,
    },
    /// Not an image, but something known.
    Foreign(Foreign),
    /// Not an image at all.
    Magic,
    /// An image of another version.
    Version(u32),
    /// The header's length is beyond the limit or the file.
    HeaderLength {
        /// The length that the prefix names.
        bytes: u32,
        /// The largest accepted.
        max: u32,
    },
    /// The header's checksum disagrees: the file is damaged.
    HeaderChecksum,
    /// The header's bytes do not decode.
    HeaderEncoding,
    /// Bytes that must be zero are not.
    Reserved {
        /// Where.
        offset: u64,
    },
    /// The file is shorter or longer than its header says.
    Length {
        /// What the header says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// A number in the configuration is outside its limits.
    Config {
        /// The field.
        field: &'static str,
        /// Its value (floats rounded towards zero).
        value: u64,
    },
    /// The section table has not the sections that the configuration asks for.
    SectionCount {
        /// How many there should be.
        expected: u32,
        /// How many there are.
        found: u32,
    },
    /// A section is not what the configuration asks for at its place.
    Section {
        /// Its index in the table.
        index: u32,
        /// What should be there.
        expected: Kind,
        /// The field that disagrees.
        field: &'static str,
    },
    /// A section's checksum disagrees.
    SectionChecksum {
        /// Its index in the table.
        index: u32,
        /// What it holds.
        kind: Kind,
    },
    /// The memory that holds the image is not aligned to 64 bytes.
    Unaligned {
        /// The address modulo 64.
        offset: u32,
    },
}

/// Files that are often taken for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreign {
    /// Nothing in it.
    Empty,
    /// A git-LFS pointer in place of the file.
    LfsPointer,
    /// A web page, usually an error page saved by a download.
    Html,
    /// GGUF.
    Gguf,
    /// Containers of early llama.cpp.
    Ggml,
    /// A safetensors checkpoint.
    Safetensors,
    /// A zip archive, as PyTorch writes.
    Zip,
}

impl Foreign {
    /// Recognises a file by its first bytes (16 are enough).
    pub fn recognise(start: &[u8]) -> Option<Self> {
        let text = start.trim_ascii_start();
        match start {
            [] => Some(Self::Empty),
            [b'G', b'G', b'U', b'F', ..] => Some(Self::Gguf),
            [b't', b'j', b'g', b'g', ..] | [b'l', b'm', b'g', b'g', ..] | [b'f', b'm', b'g', b'g', ..] => {
                Some(Self::Ggml)
            }
            [b'P', b'K', 3, 4, ..] => Some(Self::Zip),
            [_, _, _, _, _, 0, 0, 0, b'{', ..] => Some(Self::Safetensors),
            _ if text.starts_with(b"version https://") => Some(Self::LfsPointer),
            _ if text.first() == Some(&b'<') => Some(Self::Html),
            _ => None,
        }
    }
    /// What the file is and what to do.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::Empty => "the file is empty",
            Self::LfsPointer => "a git-LFS pointer, not the file itself: fetch the real file (git lfs pull)",
            Self::Html => "an HTML page, probably an error page that a download saved",
            Self::Gguf => "a GGUF checkpoint",
            Self::Ggml => "a GGML or GGJT container of early llama.cpp, which is not supported",
            Self::Safetensors => "a safetensors checkpoint",
            Self::Zip => "a zip archive (a PyTorch checkpoint?)",
        }
    }
}

/// Why weights could not be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceError {
    /// Past the end of the medium.
    OutOfRange {
        /// First block asked for.
        start: u32,
        /// Number of blocks.
        blocks: u32,
    },
    /// Larger than the staging buffer.
    TooLarge {
        /// Blocks asked for.
        blocks: u32,
        /// Blocks the buffer holds.
        staging: u32,
    },
    /// The device reported a failure.
    Device,
    /// The device did not answer in time.
    Timeout,
    /// The file was written to while it was in use.
    Changed,
    /// What was read is not what was there when the image was opened.
    Checksum {
        /// First block of what was read.
        start: u32,
    },
}

impl From<ImageError> for Error {
    fn from(e: ImageError) -> Self {
        Self::Image(e)
    }
}
impl From<SourceError> for Error {
    fn from(e: SourceError) -> Self {
        Self::Source(e)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Image(e) => write!(f, "image refused: {e}"),
            Self::Source(e) => write!(f, "weights unavailable: {e}"),
            Self::Memory { what, needed, given } => {
                write!(f, "memory for {what}: {} bytes needed, {} given", needed * 64, given * 64)
            }
            Self::Limit { what, given, max } => write!(f, "{what} of {given} asked for, 1 to {max} possible"),
            Self::Token { token, vocab } => write!(f, "token {token} is outside the vocabulary of {vocab}"),
            Self::ContextFull { context } => write!(f, "the conversation fills its context of {context} tokens"),
            Self::NotFinite { layer } => write!(f, "an activation in layer {layer} is infinite or not a number"),
            Self::Snapshot { what, expected, found } => {
                write!(f, "the snapshot of a conversation: {what} is {found}, {expected} is expected")
            }
            Self::State => write!(f, "the state belongs to another model or other limits"),
            Self::Tokenizer => write!(f, "the image's tokenizer is missing, unreadable or cannot encode this text"),
        }
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TooShort { bytes } => write!(f, "the file has {bytes} bytes, an image has at least 64"),
            Self::Foreign(Foreign::Gguf | Foreign::Safetensors) => {
                write!(f, "this is a checkpoint, not an image: convert it with `bitnet-pack pack`")
            }
            Self::Foreign(kind) => write!(f, "{}", kind.advice()),
            Self::Magic => write!(f, "not an image (its first 8 bytes are not \\x89BITNET\\n)"),
            Self::Version(v) => write!(f, "image version {v}, this runtime reads version {}", crate::image::VERSION),
            Self::HeaderLength { bytes, max } => {
                write!(f, "the header should have {bytes} bytes, at most {max} are possible here (truncated file?)")
            }
            Self::HeaderChecksum => write!(f, "the header's checksum disagrees: the file is damaged"),
            Self::HeaderEncoding => write!(f, "the header does not decode"),
            Self::Reserved { offset } => write!(f, "byte {offset} must be zero and is not"),
            Self::Length { expected, found } if found < expected => {
                write!(f, "the file ends at byte {found} and should have {expected}: truncated")
            }
            Self::Length { expected, found } => write!(f, "the file has {found} bytes and should have {expected}"),
            Self::Config { field, value } => write!(f, "{field} = {value} is outside its limits"),
            Self::SectionCount { expected, found } => write!(f, "{found} sections, the configuration needs {expected}"),
            Self::Section { index, expected, field } => {
                write!(f, "section {index} should be {}: its {field} disagrees", expected.name())
            }
            Self::SectionChecksum { index, kind } => {
                write!(f, "the checksum of section {index} ({}) disagrees: the file is damaged", kind.name())
            }
            Self::Unaligned { offset } => {
                write!(f, "the image lies {offset} bytes past a multiple of 64; weights are used where they lie")
            }
        }
    }
}

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::OutOfRange { start, blocks } => write!(f, "blocks {start} to {} are past the end", start + blocks),
            Self::TooLarge { blocks, staging } => {
                write!(f, "a piece of {blocks} blocks does not fit the staging buffer of {staging}")
            }
            Self::Device => write!(f, "the device failed"),
            Self::Timeout => write!(f, "the device did not answer in time"),
            Self::Changed => write!(f, "the file was written to while it was in use"),
            Self::Checksum { start } => {
                write!(f, "what was read from block {start} on is not what its checksum says: the medium is failing")
            }
        }
    }
}

impl core::error::Error for Error {}
impl core::error::Error for ImageError {}
impl core::error::Error for SourceError {}
