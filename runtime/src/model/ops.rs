//! What is small between the matrices. The rest is of the backends: see [`bitnet_kernel::float`].
use super::Rope;
use bitnet_kernel::Block;
use zerocopy::{FromBytes, IntoBytes};

/// The f32 elements of a vector section.
pub(super) fn floats(blocks: &[Block]) -> &[f32] {
    <[f32]>::ref_from_bytes(blocks.as_bytes()).expect("blocks are aligned and whole floats")
}

/// Whether all are finite. It looks at all of them, so that it vectorizes: they nearly always are.
pub(super) fn finite(x: &[f32]) -> bool {
    // Without the sign the bits are in the order of the numbers, infinity above all that are finite and NaN above it.
    let bits = x.iter().fold(0, |max, v| (v.abs().to_bits() as i32).max(max));
    bits < f32::INFINITY.to_bits() as i32
}

/// Turns one head by the angles of its position, `[cos, sin]`: pairs `(a, b)` become `(a cos - b sin, b cos + a sin)`.
pub(super) fn rotate(rope: Rope, head: &mut [f32], rotation: &[f32]) {
    let half = head.len() / 2;
    let (cos, sin) = rotation.split_at(half);
    let angles = cos.iter().zip(sin);
    let turn = |a: &mut f32, b: &mut f32, (cos, sin): (&f32, &f32)| {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    };
    match rope {
        Rope::HalfSplit => {
            let (a, b) = head.split_at_mut(half);
            a.iter_mut().zip(b).zip(angles).for_each(|((a, b), angle)| turn(a, b, angle));
        }
        Rope::Interleaved => {
            let pairs = head.as_chunks_mut().0;
            pairs.iter_mut().zip(angles).for_each(|([a, b], angle)| turn(a, b, angle));
        }
    }
}
