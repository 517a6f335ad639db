//! The prefix and the header: encoded by the packer, decoded in place by everyone.
use super::{CHAT_TEMPLATE_MAX, HEADER_BYTES_MAX, MAGIC, PREFIX_BYTES, VERSION, checksum};
use crate::memory::Limits;
use crate::model::Config;
use serde::{Deserialize, Serialize};

/// The header, as postcard encodes it: fields in this order, integers as variable-length ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header<'a> {
    /// The model.
    pub config: Config,
    /// The memory it needs.
    pub plan: MemoryPlan,
    /// Where it came from.
    #[serde(borrow)]
    pub provenance: Provenance<'a>,
    /// What turns text into tokens and back.
    pub text: Text<'a>,
    /// What chose the layouts of linears and by what figures, line by line, for people; may be empty. Nothing else reads it.
    pub tuning: &'a str,
    /// The section table: [`super::Record`]s of 32 bytes.
    pub sections: &'a [u8],
}

/// The memory that a model needs: what it is the plan for, and what the packer's version takes for that. A newer version may
/// take more or less, so a reader computes [`crate::Plan`] from the limits, and these sizes are for programs that do not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPlan {
    /// What it is the plan for.
    pub limits: Limits,
    /// Blocks of [`crate::Plan::state`].
    pub state: u64,
    /// Blocks of [`crate::Plan::scratch`].
    pub scratch: u64,
    /// Blocks of [`crate::Plan::sampler`].
    pub sampler: u64,
}

/// Where a model came from. Nothing in it depends on when or where it was packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Provenance<'a> {
    /// A name for people.
    pub name: &'a str,
    /// The checkpoint's class, `BitNetForCausalLM` for example.
    pub architecture: &'a str,
    /// The packer and its version.
    pub packer: &'a str,
}

/// What belongs to text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text<'a> {
    /// The token that starts a conversation, if the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a reply.
    pub stop: StopIds,
    /// The chat template (Jinja), empty if there is none.
    pub chat_template: &'a str,
}

/// At most eight tokens that end a reply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StopIds {
    ids: [u32; Self::MAX],
    len: u8,
}

impl StopIds {
    /// Most of them.
    pub const MAX: usize = 8;

    /// The set of `ids`, or `None` if there are too many.
    pub fn new(ids: &[u32]) -> Option<Self> {
        let mut stop = Self::default();
        stop.ids.get_mut(..ids.len())?.copy_from_slice(ids);
        stop.len = ids.len() as u8;
        Some(stop)
    }
    /// The tokens.
    pub fn ids(&self) -> &[u32] {
        self.ids.get(..self.len.into()).unwrap_or(&self.ids)
    }
    pub(super) fn is_sound(&self, vocab: u32) -> bool {
        usize::from(self.len) <= Self::MAX && self.ids().iter().all(|&id| id < vocab)
    }
}

/// Why a header could not be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// Longer than [`HEADER_BYTES_MAX`], or than the buffer.
    TooLong,
    /// The chat template is longer than [`CHAT_TEMPLATE_MAX`].
    ChatTemplate,
}

impl core::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::TooLong => write!(f, "the header is longer than {HEADER_BYTES_MAX} bytes"),
            Self::ChatTemplate => write!(f, "the chat template is longer than {CHAT_TEMPLATE_MAX} bytes"),
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header<'_> {
    /// Encodes the header into `buffer`; returns its length.
    ///
    /// # Errors
    /// If it is too long for the buffer or the format.
    pub fn encode(&self, buffer: &mut [u8]) -> Result<usize, HeaderError> {
        if self.text.chat_template.len() > CHAT_TEMPLATE_MAX {
            return Err(HeaderError::ChatTemplate);
        }
        let n = postcard::to_slice(self, buffer).map_err(|_| HeaderError::TooLong)?.len();
        if n > HEADER_BYTES_MAX as usize { Err(HeaderError::TooLong) } else { Ok(n) }
    }
}

/// The 64 bytes before the header.
///
/// | bytes | what |
/// |---|---|
/// | 0-7 | [`MAGIC`] |
/// | 8-11 | [`VERSION`] |
/// | 12-15 | length of the header |
/// | 16-23 | length of the file |
/// | 24-31 | checksum of these 64 bytes, with zeros here, and of the header |
/// | 32-63 | zeros |
pub fn encode_prefix(header: &[u8], file_bytes: u64) -> [u8; PREFIX_BYTES] {
    let mut prefix = [0; PREFIX_BYTES];
    prefix[..8].copy_from_slice(&MAGIC);
    prefix[8..12].copy_from_slice(&VERSION.to_le_bytes());
    prefix[12..16].copy_from_slice(&(header.len() as u32).to_le_bytes());
    prefix[16..24].copy_from_slice(&file_bytes.to_le_bytes());
    let sum = prefix_checksum(&prefix, header);
    prefix[24..32].copy_from_slice(&sum.to_le_bytes());
    prefix
}

/// The checksum of the prefix (bytes 24 to 31 taken as zeros) and the header, each by itself, then of both sums.
pub(super) fn prefix_checksum(prefix: &[u8; PREFIX_BYTES], header: &[u8]) -> u64 {
    let mut zeroed = *prefix;
    zeroed[24..32].fill(0);
    let mut sums = [0; 16];
    sums[..8].copy_from_slice(&checksum(&zeroed).to_le_bytes());
    sums[8..].copy_from_slice(&checksum(header).to_le_bytes());
    checksum(&sums)
}
