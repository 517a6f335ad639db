//! The weight image: one file that a packer writes, and that flash, a memory map or a block device serves.
//!
//! `docs/image-format.md` in the repository specifies it byte by byte. In short: a prefix of 64 bytes, a postcard header,
//! the tokenizer, zeros up to a multiple of 64 KiB, then the weights in execution order, each section on a boundary of 64
//! bytes. [`Image::check`] is the one validator: the packer, the runtime and `verify` all call it.
mod check;
mod header;
pub mod kept;
mod section;
pub mod split;

pub use check::Image;
pub use header::{Header, HeaderError, MemoryPlan, Provenance, StopIds, Text, encode_prefix};
pub use section::{BlockTensor, Encoding, Kind, Record, Section, Sections, Tensor, UNIT_ROWS, expected_sections};

use bitnet_kernel::Block;

/// First bytes of every image. The first is no text, the last is damaged by a transfer as text.
pub const MAGIC: [u8; 8] = *b"\x89BITNET\n";
/// The version this runtime reads and the packer writes.
pub const VERSION: u32 = 2;
/// Bytes before the header.
pub const PREFIX_BYTES: usize = Block::BYTES;
/// Longest header, prefix not counted.
pub const HEADER_BYTES_MAX: u32 = 1 << 20;
/// Longest chat template.
pub const CHAT_TEMPLATE_MAX: usize = 1 << 16;
/// Longest tokenizer.
pub const TOKENIZER_BYTES_MAX: u32 = 1 << 26;
/// The weight region starts on a multiple of this: the largest page of any CPU in use.
pub const WEIGHTS_ALIGN: u64 = 1 << 16;

/// The checksum of headers and sections: XXH3, 64 bits, seed 0.
pub fn checksum(bytes: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(bytes)
}
