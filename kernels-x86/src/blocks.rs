//! Block-sparse ternary matrices ([`bitnet_kernel::blocks`]) with AVX2.
//!
//! Live blocks are listed first, byte by byte of the bitmap and without a branch: where a word's ones end nothing predicts, and
//! 16x16 blocks that were taken from it one by one took a third longer in cache.
use crate::avx2::{add_pairs, add_products, load, load_twice, prefetch, sums, sums_of_halves};
use bitnet_kernel::blocks::{STRIP_ROWS, Strip};
use bitnet_kernel::{Block, BlockActivations, BlockMatrix, BlockShape};
use core::arch::x86_64::*;

/// Bytes that the weights are fetched ahead, as T2's are.
const AHEAD: usize = 2048;
/// Blocks of 16 by 64 whose sums fit 16 bits: each adds two products of at most 1024, at weight 4, twice to a lane.
const WIDE_FLUSH: usize = 8;
/// The same of 16 by 16, each of which adds once.
const SQUARE_FLUSH: usize = 16;

/// Words of a bitmap that are listed at a time, so that a place among their blocks fits a byte.
pub(crate) const WORDS: usize = 4;

/// The places of live blocks, from left to right.
pub(crate) struct Live {
    /// Each byte of the bitmap writes eight, of which the next byte overwrites what is too much.
    places: [u8; 64 * WORDS + 8],
}

/// For each byte the places of its bits that are set, and their number.
const BITS: [([u8; 8], u8); 256] = {
    let mut table = [([0; 8], 0); 256];
    let mut byte = 0;
    while byte < 256 {
        let (places, count) = &mut table[byte];
        let mut bit = 0;
        while bit < 8 {
            if byte >> bit & 1 == 1 {
                places[*count as usize] = bit;
                *count += 1;
            }
            bit += 1;
        }
        byte += 1;
    }
    table
};

impl Live {
    /// Room for a list.
    pub(crate) const fn new() -> Self {
        Self { places: [0; _] }
    }
    /// The list of at most [`WORDS`] words.
    #[inline(always)]
    pub(crate) fn of(&mut self, words: &[[u8; 8]]) -> &[u8] {
        let mut count = 0;
        for (i, &byte) in words.as_flattened().iter().enumerate() {
            let (places, more) = BITS[usize::from(byte)];
            let first = u64::from_le_bytes([(8 * i) as u8; 8]);
            self.places[count..][..8].copy_from_slice(&(first + u64::from_le_bytes(places)).to_le_bytes());
            count += usize::from(more);
        }
        &self.places[..count]
    }
}

/// See [`bitnet_kernel::Kernels::matvec_blocks`].
#[target_feature(enable = "avx2")]
pub(crate) fn matvec_avx2(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), w.rows());
    x.assert_fit(&w);
    let mut list = Live::new();
    for (strip, y) in w.strips().zip(y.chunks_mut(STRIP_ROWS)) {
        let (sums, less) = match w.shape() {
            BlockShape::Wide => wide_avx2(&strip, &mut list, x),
            BlockShape::Square => square_avx2(&strip, &mut list, x),
        };
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum - less);
    }
}

/// The part of some blocks' activations, or of their sums, that [`WORDS`] words from the `at`-th chunk of them on are about.
pub(crate) fn part<T>(of: &[T], at: usize) -> &[T] {
    let of = of.get(at * 64 * WORDS..).unwrap_or_default();
    of.get(..64 * WORDS).unwrap_or(of)
}

/// The products with 64 bytes of codes of four rows, in pairs.
#[target_feature(enable = "avx2")]
#[inline]
fn add_block(acc: &mut [__m256i; 4], v: __m256i, x: __m256i) {
    let (m1, m4) = (_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c));
    let h = _mm256_srli_epi16::<4>(v);
    acc[0] = add_products(acc[0], _mm256_and_si256(v, m1), x);
    acc[1] = add_products(acc[1], _mm256_and_si256(v, m4), x);
    acc[2] = add_products(acc[2], _mm256_and_si256(h, m1), x);
    acc[3] = add_products(acc[3], _mm256_and_si256(h, m4), x);
}

/// 8 rows at a time share the activations of a block. Returns sums of codes, and of activations.
#[target_feature(enable = "avx2")]
#[inline]
fn wide_avx2(strip: &Strip<'_>, list: &mut Live, x: BlockActivations<'_>) -> ([i32; STRIP_ROWS], i32) {
    let zero = _mm256_setzero_si256();
    let (mut totals, mut less) = ([[[zero; 4]; 2]; 2], 0);
    let [mut a, mut b] = halves(strip.blocks()).map(halves);
    for (i, words) in strip.words().chunks(WORDS).enumerate() {
        let live = list.of(words);
        let (xs, sums) = (part(x.values().as_chunks::<64>().0, i), part(x.sums(), i));
        less += live.iter().map(|&at| sums[usize::from(at)]).sum::<i32>();
        for (total, quarters) in totals.iter_mut().zip([&mut a, &mut b]) {
            let [these, those] = quarters.each_mut().map(|quarter| {
                let (these, rest) = quarter.split_at(live.len());
                *quarter = rest;
                these.chunks(WIDE_FLUSH)
            });
            let mut ahead = AHEAD;
            for ((these, those), live) in these.zip(those).zip(live.chunks(WIDE_FLUSH)) {
                let mut acc = [[zero; 4]; 2];
                for ((this, that), &at) in these.iter().zip(those).zip(live) {
                    prefetch(this, ahead);
                    prefetch(this, ahead + Block::BYTES);
                    ahead += Block::BYTES;
                    let xs = &xs[usize::from(at)];
                    for half in [0, 32] {
                        let x = load(xs, half);
                        add_block(&mut acc[0], load(&this.0, half), x);
                        add_block(&mut acc[1], load(&that.0, half), x);
                    }
                }
                add_all(total, acc);
            }
        }
    }
    let mut out = [0; STRIP_ROWS];
    for (out, total) in out.as_chunks_mut::<4>().0.iter_mut().zip(totals.as_flattened()) {
        *out = sums(*total);
        (out[1], out[3]) = (out[1] >> 2, out[3] >> 2);
    }
    (out, less)
}

/// 16 rows at a time; half a register is four rows. Returns sums of codes, and of activations.
#[target_feature(enable = "avx2")]
#[inline]
fn square_avx2(strip: &Strip<'_>, list: &mut Live, x: BlockActivations<'_>) -> ([i32; STRIP_ROWS], i32) {
    let zero = _mm256_setzero_si256();
    let (mut total, mut less, mut blocks) = ([[zero; 4]; 2], 0, strip.blocks());
    for (i, words) in strip.words().chunks(WORDS).enumerate() {
        let live = list.of(words);
        let xs = part(x.values().as_chunks::<16>().0, i);
        // As many, which one check for both relies on.
        let sums = &part(x.sums(), i)[..xs.len()];
        let (these, rest) = blocks.split_at(live.len());
        blocks = rest;
        for (blocks, live) in these.chunks(SQUARE_FLUSH).zip(live.chunks(SQUARE_FLUSH)) {
            let mut acc = [[zero; 4]; 2];
            for (block, &at) in blocks.iter().zip(live) {
                prefetch(block, AHEAD);
                let at = usize::from(at);
                let x = load_twice(&xs[at], 0);
                less += sums[at];
                add_block(&mut acc[0], load(&block.0, 0), x);
                add_block(&mut acc[1], load(&block.0, 32), x);
            }
            add_all(&mut total, acc);
        }
    }
    let mut out = [0; STRIP_ROWS];
    for (out, total) in out.as_chunks_mut::<8>().0.iter_mut().zip(total) {
        *out = sums_of_halves(total);
        out.iter_mut().skip(1).step_by(2).for_each(|sum| *sum >>= 2);
    }
    (out, less)
}

/// Adds pairs of 16 bits to what they are the next part of.
#[target_feature(enable = "avx2")]
#[inline]
fn add_all(total: &mut [[__m256i; 4]; 2], acc: [[__m256i; 4]; 2]) {
    for (total, acc) in total.iter_mut().zip(acc) {
        for p in 0..4 {
            total[p] = add_pairs(total[p], acc[p]);
        }
    }
}

fn halves(blocks: &[Block]) -> [&[Block]; 2] {
    let (a, b) = blocks.split_at(blocks.len() / 2);
    [a, b]
}
