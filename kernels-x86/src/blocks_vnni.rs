//! Block-sparse ternary matrices ([`bitnet_kernel::blocks`]) with AVX-512 VNNI, as [`crate::blocks`] has them with AVX2.
use crate::avx512::{lanes, load, load_four_times, prefetch, sums_less};
use bitnet_kernel::blocks::{STRIP_ROWS, Strip};
use bitnet_kernel::{BlockActivations, BlockMatrix, BlockShape};
use core::arch::x86_64::*;

/// Bytes that the weights are fetched ahead, as T2's are.
const AHEAD: usize = 1024;

/// See [`bitnet_kernel::Kernels::matvec_blocks`]. Codes keep the weights of their planes, 1, 4, 16 and 64, and sums are divided.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
pub(crate) fn matvec_vnni(w: BlockMatrix<'_>, x: BlockActivations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), w.rows());
    x.assert_fit(&w);
    for (strip, y) in w.strips().zip(y.chunks_mut(STRIP_ROWS)) {
        let sums = match w.shape() {
            BlockShape::Wide => wide_vnni(&strip, x),
            BlockShape::Square => square_vnni(&strip, x),
        };
        let less: i32 = strip.live().map(|at| x.sums()[at]).sum();
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

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
fn wide_vnni(strip: &Strip<'_>, x: BlockActivations<'_>) -> [i32; STRIP_ROWS] {
    let xs = x.values().as_chunks::<64>().0;
    let mut out = [0; STRIP_ROWS];
    let quarter = strip.blocks().len() / 4;
    for (q, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut acc = [_mm512_setzero_si512(); 4];
        for (block, at) in strip.blocks()[q * quarter..][..quarter].iter().zip(strip.live()) {
            prefetch(block, AHEAD);
            add_planes(&mut acc, load(&block.0, 0), load(&xs[at], 0));
        }
        *out = sums_less(acc, 0);
        out.iter_mut().enumerate().for_each(|(p, sum)| *sum >>= 2 * p);
    }
    out
}

/// A quarter of a register is four rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2")]
#[inline]
fn square_vnni(strip: &Strip<'_>, x: BlockActivations<'_>) -> [i32; STRIP_ROWS] {
    let xs = x.values().as_chunks::<16>().0;
    let mut acc = [_mm512_setzero_si512(); 4];
    for (block, at) in strip.blocks().iter().zip(strip.live()) {
        prefetch(block, AHEAD);
        add_planes(&mut acc, load(&block.0, 0), load_four_times(&xs[at], 0));
    }
    let mut out = [0; STRIP_ROWS];
    for (p, acc) in acc.into_iter().enumerate() {
        for (quad, four) in lanes(acc).as_chunks::<4>().0.iter().enumerate() {
            out[4 * quad + p] = four.iter().sum::<i32>() >> (2 * p);
        }
    }
    out
}
