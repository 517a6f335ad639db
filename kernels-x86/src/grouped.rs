//! B1 and bit planes with a scale for every 128 columns of a row, for every backend of this crate: the sums of a group stay in
//! registers until they are floats.
//!
//! Measured on a Zen 4 core, 2560 by 2560 weights in a cache: B1G 32, I2G 18 and I3G 12 weights/ns by
//! [`bitnet_kernel::kernels::matmat_grouped`], which has the sums of each group written down in the order of rows and adds them
//! up in code for any x86-64 CPU; so 147 to 178, 93 and 63. From memory, 94 % of the bandwidth of a loop that only reads, and more
//! (I2G and I3G; B1G 55 %, as B1).
use crate::avx2::{B1_PREFETCH, add_wide, lanes, load, narrow_sums_of_lanes, prefetch};
use bitnet_kernel::tables::B1_BASE;
use bitnet_kernel::{Activations, Batch, Block, Format, Matrix};
use core::arch::x86_64::*;

const ROWS: usize = Format::PANEL_ROWS;
/// Steps of a group, 4 blocks each, of weights or of tables.
const STEPS: usize = Format::B1.steps(Format::GROUP_COLS);

/// [`bitnet_kernel::Kernels::matmat_grouped`] for formats whose base is B1. Tables are those of [`crate::avx2::prepare_b1_avx2`].
#[target_feature(enable = "avx2,f16c")]
pub(crate) fn products(w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
    assert_eq!(y.len(), w.rows() * x.tokens().len());
    x.assert_fit(&w);
    y.fill(0.0);
    for (first, tile) in (0..w.rows()).step_by(ROWS).zip(w.tiles()) {
        let here = first..w.rows().min(first + ROWS);
        for (x, y) in x.tokens().iter().zip(y.chunks_exact_mut(w.rows())) {
            let sums = match w.format() {
                Format::B1G => tile_b1g_avx2(tile, *x),
                Format::I2G => tile_i2g_avx2(tile, *x),
                Format::I3G => tile_i3g_avx2(tile, *x),
                _ => panic!("{} is not multiplied by this method", w.format().name()),
            };
            y[here.clone()].copy_from_slice(&sums[..here.len()]);
        }
    }
}

#[target_feature(enable = "avx2,f16c")]
#[inline(never)]
fn tile_b1g_avx2(tile: &[Block], x: Activations<'_>) -> [f32; ROWS] {
    sums::<1, 2, -1>(tile, x)
}

#[target_feature(enable = "avx2,f16c")]
#[inline(never)]
fn tile_i2g_avx2(tile: &[Block], x: Activations<'_>) -> [f32; ROWS] {
    sums::<2, 2, -3>(tile, x)
}

#[target_feature(enable = "avx2,f16c")]
#[inline(never)]
fn tile_i3g_avx2(tile: &[Block], x: Activations<'_>) -> [f32; ROWS] {
    sums::<3, 1, -4>(tile, x)
}

/// The sums of a tile whose weights are `DISTANCE · c + LOW`, with codes `c` of so many bits.
///
/// With `S_p` the sum of the activations where bit `p` is set, a group is `DISTANCE · Σ_p 2^p S_p + LOW · Σx`.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn sums<const PLANES: usize, const DISTANCE: i32, const LOW: i32>(tile: &[Block], x: Activations<'_>) -> [f32; ROWS] {
    // What a table's sums are short of.
    let constant = DISTANCE * ((1 << PLANES) - 1) * 16 * 8 * STEPS as i32;
    let mut y = [_mm256_setzero_ps(); ROWS / 8];
    let steps = tile.chunks_exact(PLANES * STEPS * 4 + Format::SCALE_BLOCKS);
    let (tables, _) = x.tables().as_chunks::<4>();
    for ((step, x), tables) in steps.zip(x.values().as_chunks().0).zip(tables.chunks_exact(STEPS)) {
        let (panel, scales) = step.split_at(PLANES * STEPS * 4);
        let (panel, _) = panel.as_chunks::<4>();
        // Without these two cache lines a panel, I2G ran at 38 weights/ns from memory and not at 85.
        scales.iter().for_each(|block| prefetch(block, B1_PREFETCH));
        let mut total = [[_mm256_setzero_si256(); 4]; 2];
        // Each plane counts twice as much as the one below. A group is 4 steps, which 16 bits hold.
        for plane in panel.chunks_exact(STEPS).rev() {
            let narrow = narrow_sums_of_lanes::<4, B1_BASE, B1_PREFETCH>(plane, tables);
            for (total, narrow) in total.iter_mut().zip(narrow) {
                *total = add_wide(total.map(|total| _mm256_add_epi32(total, total)), narrow);
            }
        }
        let constant = _mm256_set1_epi32(constant + LOW * sum(x));
        for (half, total) in total.into_iter().enumerate() {
            // Rows 0 to 7, 16 to 23, 8 to 15 and 24 to 31.
            for (total, eight) in total.into_iter().zip([0, 2, 1, 3]) {
                let eight = 4 * half + eight;
                let total = if DISTANCE == 2 { _mm256_add_epi32(total, total) } else { total };
                let dots = _mm256_cvtepi32_ps(_mm256_add_epi32(total, constant));
                y[eight] = _mm256_add_ps(y[eight], _mm256_mul_ps(dots, scales_of(scales, eight)));
            }
        }
    }
    let mut out = [0.0; ROWS];
    for (out, y) in out.as_chunks_mut::<8>().0.iter_mut().zip(y) {
        // SAFETY: `out` is 8 floats.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), y) };
    }
    out
}

/// The sum of the activations of a group.
#[target_feature(enable = "avx2")]
#[inline]
fn sum(x: &[i8; Format::GROUP_COLS]) -> i32 {
    let sums = [0, 32, 64, 96].map(|at| {
        // `x + 128` as unsigned bytes, in sums of eight.
        _mm256_sad_epu8(_mm256_xor_si256(load(x, at), _mm256_set1_epi8(-128)), _mm256_setzero_si256())
    });
    let sum = _mm256_add_epi32(_mm256_add_epi32(sums[0], sums[1]), _mm256_add_epi32(sums[2], sums[3]));
    lanes(sum).into_iter().sum::<i32>() - 128 * Format::GROUP_COLS as i32
}

/// Scales `8 i` to `8 i + 7` of a panel. The conversion is exact for finite numbers, as the definition's is.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn scales_of(scales: &[Block], i: usize) -> __m256 {
    let eight = &scales[i / 4].0.as_chunks::<16>().0[i % 4];
    // SAFETY: `eight` is 16 bytes.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(eight.as_ptr().cast()) })
}
