//! Block-sparse ternary matrices ([`bitnet_kernel::blocks`]) with AVX2.
//!
//! Live blocks are taken from the bitmap by trailing zeros, block by block: a list of them is never made.
use crate::avx2::{self, add_pairs, add_products, load, load_twice, prefetch};
use bitnet_kernel::blocks::{STRIP_ROWS, Strip};
use bitnet_kernel::{BlockActivations, BlockMatrix, BlockShape};
use core::arch::x86_64::*;

/// Bytes that the weights are fetched ahead, as T2's are.
const AHEAD: usize = 2048;
/// Blocks of 16 by 64 whose sums fit 16 bits: each adds two products of at most 1024, at weight 4, twice to a lane.
const WIDE_FLUSH: usize = 8;
/// The same of 16 by 16, each of which adds once.
const SQUARE_FLUSH: usize = 16;

/// See [`bitnet_kernel::Kernels::matvec_blocks`].
#[target_feature(enable = "avx2")]
pub(crate) fn matvec_avx2(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), w.rows());
    x.assert_fit(&w);
    for (strip, y) in w.strips().zip(y.chunks_mut(STRIP_ROWS)) {
        let sums = match w.shape() {
            BlockShape::Wide => wide_avx2(&strip, x),
            BlockShape::Square => square_avx2(&strip, x),
        };
        let less: i32 = strip.live().map(|at| x.sums()[at]).sum();
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum - less);
    }
}

/// 4 rows at a time share the activations of a block: 14 operations for 128 weights.
#[target_feature(enable = "avx2")]
#[inline]
fn wide_avx2(strip: &Strip<'_>, x: BlockActivations<'_>) -> [i32; STRIP_ROWS] {
    let xs = x.values().as_chunks::<64>().0;
    let zero = _mm256_setzero_si256();
    let (m1, m4) = (_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c));
    let mut out = [0; STRIP_ROWS];
    let quarter = strip.blocks().len() / 4;
    for (q, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let blocks = &strip.blocks()[q * quarter..][..quarter];
        let mut total = [zero; 4];
        let mut live = strip.live();
        for blocks in blocks.chunks(WIDE_FLUSH) {
            let mut acc = [zero; 4];
            for (block, at) in blocks.iter().zip(&mut live) {
                prefetch(block, AHEAD);
                for half in [0, 32] {
                    let (v, x) = (load(&block.0, half), load(&xs[at], half));
                    let h = _mm256_srli_epi16::<4>(v);
                    acc[0] = add_products(acc[0], _mm256_and_si256(v, m1), x);
                    acc[1] = add_products(acc[1], _mm256_and_si256(v, m4), x);
                    acc[2] = add_products(acc[2], _mm256_and_si256(h, m1), x);
                    acc[3] = add_products(acc[3], _mm256_and_si256(h, m4), x);
                }
            }
            for p in 0..4 {
                total[p] = add_pairs(total[p], acc[p]);
            }
        }
        *out = avx2::sums(total);
        (out[1], out[3]) = (out[1] >> 2, out[3] >> 2);
    }
    out
}

/// 16 rows at a time; half a register is four rows.
#[target_feature(enable = "avx2")]
#[inline]
fn square_avx2(strip: &Strip<'_>, x: BlockActivations<'_>) -> [i32; STRIP_ROWS] {
    let xs = x.values().as_chunks::<16>().0;
    let zero = _mm256_setzero_si256();
    let (m1, m4) = (_mm256_set1_epi8(0x03), _mm256_set1_epi8(0x0c));
    let mut total = [[zero; 4]; 2];
    let mut live = strip.live();
    for blocks in strip.blocks().chunks(SQUARE_FLUSH) {
        let mut acc = [[zero; 4]; 2];
        for (block, at) in blocks.iter().zip(&mut live) {
            prefetch(block, AHEAD);
            let x = load_twice(&xs[at], 0);
            for (acc, half) in acc.iter_mut().zip([0, 32]) {
                let v = load(&block.0, half);
                let h = _mm256_srli_epi16::<4>(v);
                acc[0] = add_products(acc[0], _mm256_and_si256(v, m1), x);
                acc[1] = add_products(acc[1], _mm256_and_si256(v, m4), x);
                acc[2] = add_products(acc[2], _mm256_and_si256(h, m1), x);
                acc[3] = add_products(acc[3], _mm256_and_si256(h, m4), x);
            }
        }
        for (total, acc) in total.iter_mut().zip(acc) {
            for p in 0..4 {
                total[p] = add_pairs(total[p], acc[p]);
            }
        }
    }
    let mut out = [0; STRIP_ROWS];
    for (half, total) in total.into_iter().enumerate() {
        for (p, sum) in total.into_iter().enumerate() {
            let lanes = avx2::lanes(sum);
            for (quad, four) in lanes.as_chunks::<4>().0.iter().enumerate() {
                let sum: i32 = four.iter().sum();
                out[8 * half + 4 * quad + p] = if p % 2 == 1 { sum >> 2 } else { sum };
            }
        }
    }
    out
}
