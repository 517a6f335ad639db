//! Rows that are stored apart: lists of them are cut here into what the loops of a backend take.
use bitnet_kernel::{Activations, Block, Format, Matrix};

/// Rows of which a part of the columns is added up before the next part, so that sums stay in registers and the rows' blocks in the
/// first-level cache. In 16 bits a product with a code is at most `3·128` (an invalid one): `64·384 < 2^15`.
pub(crate) const SUMMED: usize = 64;

/// [`bitnet_kernel::Kernels::dot_rows`]: four rows at a time; the last four may hold one several times.
pub(crate) fn dot_rows(
    w: Matrix<'_>,
    rows: &[u32],
    x: Activations<'_>,
    y: &mut [i32],
    dots: impl Fn([&[Block]; 4], Activations<'_>) -> [i32; 4],
) {
    assert!(y.len() == rows.len() && w.format() == Format::T2R);
    x.assert_fit(&w);
    if w.cols() == 0 {
        return y.fill(0);
    }
    for (rows, y) in rows.chunks(4).zip(y.chunks_mut(4)) {
        let dots = dots(core::array::from_fn(|r| w.row(rows[r.min(rows.len() - 1)] as usize)), x);
        y.iter_mut().zip(dots).for_each(|(y, dot)| *y = dot);
    }
}

/// [`bitnet_kernel::Kernels::sum_rows`]: `sums(rows, at, x)` gives the sums of the codes in the 16 bytes at `at` of up to
/// [`SUMMED`] rows, a multiple of four, times their `x`: 16 columns of every plane.
pub(crate) fn sum_rows(
    w: Matrix<'_>,
    rows: &[u32],
    x: &[i8],
    y: &mut [i32],
    sums: impl Fn(&[&[Block]], usize, &[i8; SUMMED]) -> [[i32; 16]; 4],
) {
    assert!(y.len() == w.cols() && x.len() == rows.len() && w.format() == Format::T2R);
    for (rows, x) in rows.chunks(SUMMED).zip(x.chunks(SUMMED)) {
        // Whole fours: what is missing is another row times zero.
        let list: [&[Block]; SUMMED] = core::array::from_fn(|i| w.row(rows[i.min(rows.len() - 1)] as usize));
        let list = &list[..rows.len().next_multiple_of(4)];
        let mut xs = [0; SUMMED];
        xs[..x.len()].copy_from_slice(x);
        let x_sum: i32 = x.iter().map(|&x| i32::from(x)).sum();
        for (b, y) in y.chunks_mut(256).enumerate() {
            for quarter in [0, 16, 32, 48] {
                for (plane, sums) in sums(list, 64 * b + quarter, &xs).into_iter().enumerate() {
                    let y = y.get_mut(64 * plane + quarter..).unwrap_or_default();
                    y.iter_mut().zip(sums).for_each(|(y, sum)| *y = y.wrapping_add(sum - x_sum));
                }
            }
        }
    }
}
