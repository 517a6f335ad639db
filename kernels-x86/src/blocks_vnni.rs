//! Block-sparse ternary matrices ([`bitnet_kernel::blocks`]) with AVX-512 VNNI, as [`crate::blocks`] has them with AVX2.
use crate::avx512::{lanes, load, load_four_times, prefetch, sums_less};
use crate::blocks::{Live, WORDS, part};
use bitnet_kernel::blocks::{STRIP_ROWS, Strip};
use bitnet_kernel::{Block, BlockActivations, BlockMatrix, BlockShape};
use core::arch::x86_64::*;

/// Bytes that the weights are fetched ahead, as T2's are.
const AHEAD: usize = 1024;

/// See [`bitnet_kernel::Kernels::matvec_blocks`]. Codes keep the weights of their planes, 1, 4, 16 and 64, and sums are divided.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
pub(crate) fn matvec_vnni(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), w.rows());
    x.assert_fit(&w);
    let mut list = Live::new();
    for (strip, y) in w.strips().zip(y.chunks_mut(STRIP_ROWS)) {
        let (sums, less) = match w.shape() {
            BlockShape::Wide => wide_vnni(&strip, &mut list, x),
            BlockShape::Square => square_vnni(&strip, &mut list, x),
        };
        y.iter_mut().zip(sums).for_each(|(y, sum)| *y = sum - less);
    }
}

/// The four planes of a block, where they are.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
fn add_planes(acc: &mut [__m512i; 4], v: __m512i, x: __m512i) {
    for (p, acc) in acc.iter_mut().enumerate() {
        *acc = _mm512_dpbusd_epi32(*acc, _mm512_and_si512(v, _mm512_set1_epi8((3u8 << (2 * p)) as i8)), x);
    }
}

/// 4 rows at a time. Returns sums of codes, and of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
fn wide_vnni(strip: &Strip<'_>, list: &mut Live, x: BlockActivations<'_>) -> ([i32; STRIP_ROWS], i32) {
    let (mut acc, mut less) = ([[_mm512_setzero_si512(); 4]; 4], 0);
    let (first, second) = strip.blocks().split_at(strip.blocks().len() / 2);
    let ((a, b), (c, d)) = (first.split_at(first.len() / 2), second.split_at(second.len() / 2));
    let mut quarters: [&[Block]; 4] = [a, b, c, d];
    for (i, words) in strip.words().chunks(WORDS).enumerate() {
        let live = list.of(words);
        let xs = part(x.values().as_chunks::<64>().0, i);
        let sums = part(x.sums(), i);
        less += live.iter().map(|&at| sums[usize::from(at)]).sum::<i32>();
        // One stream after another: all four at once were a sixth slower in cache.
        for (acc, quarter) in acc.iter_mut().zip(&mut quarters) {
            let (these, rest) = quarter.split_at(live.len());
            *quarter = rest;
            for (block, &at) in these.iter().zip(live) {
                prefetch(block, AHEAD);
                add_planes(acc, load(&block.0, 0), load(&xs[usize::from(at)], 0));
            }
        }
    }
    let mut out = [0; STRIP_ROWS];
    for (out, acc) in out.as_chunks_mut::<4>().0.iter_mut().zip(acc) {
        *out = sums_less(acc, 0);
        out.iter_mut().enumerate().for_each(|(p, sum)| *sum >>= 2 * p);
    }
    (out, less)
}

/// A quarter of a register is four rows. Returns sums of codes, and of activations.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
fn square_vnni(strip: &Strip<'_>, list: &mut Live, x: BlockActivations<'_>) -> ([i32; STRIP_ROWS], i32) {
    let (mut acc, mut less, mut blocks) = ([_mm512_setzero_si512(); 4], 0, strip.blocks());
    for (i, words) in strip.words().chunks(WORDS).enumerate() {
        let live = list.of(words);
        let xs = part(x.values().as_chunks::<16>().0, i);
        // As many, which one check for both relies on.
        let sums = &part(x.sums(), i)[..xs.len()];
        let (these, rest) = blocks.split_at(live.len());
        blocks = rest;
        for (block, &at) in these.iter().zip(live) {
            prefetch(block, AHEAD);
            let at = usize::from(at);
            less += sums[at];
            add_planes(&mut acc, load(&block.0, 0), load_four_times(&xs[at], 0));
        }
    }
    let mut out = [0; STRIP_ROWS];
    for (p, acc) in acc.into_iter().enumerate() {
        for (quad, four) in lanes(acc).as_chunks::<4>().0.iter().enumerate() {
            out[4 * quad + p] = four.iter().sum::<i32>() >> (2 * p);
        }
    }
    (out, less)
}
