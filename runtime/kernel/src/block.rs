//! The unit of storage: 64 bytes, aligned to 64.
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One cache line of packed weights, and the unit in which images and memory are measured.
///
/// The alignment is a type and not a comment: a `&[Block]` can be handed to any kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(64))]
pub struct Block(pub [u8; Block::BYTES]);

impl Block {
    /// Bytes in a block.
    pub const BYTES: usize = 64;
    /// A block of zero bytes.
    pub const ZERO: Self = Self([0; Self::BYTES]);
}
