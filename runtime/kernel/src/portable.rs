//! The reference: the plainest sum, straight from the definition of the bytes.
use crate::float::f16_to_f32;
use crate::format::{decode_plain, join_planes};
use crate::{Activations, Batch, Block, Format, Kernels, Matrix};

/// Runs on anything.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Kernels for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }
    /// Needs no tables: it multiplies weights, so that it is an independent check of those who look sums up.
    fn fill(&self, _: Format, _: &[i8], _: bool, _: &mut [Block]) {}
    fn matvec(&self, w: Matrix<'_>, x: Activations<'_>, y: &mut [i32]) {
        assert_eq!(y.len(), w.rows());
        x.assert_fit(&w);
        let (format, tile_rows) = (w.format(), w.format().tile_rows());
        y.fill(0);
        for (y, tile) in y.chunks_mut(tile_rows).zip(w.tiles()) {
            let steps = tile.chunks_exact(format.step_blocks());
            for (step, x) in steps.zip(x.values().chunks_exact(format.step_cols())) {
                add_step(format, step, x, y);
            }
        }
    }
    fn matmat_grouped(&self, w: Matrix<'_>, x: Batch<'_>, y: &mut [f32]) {
        assert_eq!(y.len(), w.rows() * x.tokens().len());
        assert!(w.format().is_grouped());
        x.assert_fit(&w);
        y.fill(0.0);
        let base = w.format().base();
        for (x, y) in x.tokens().iter().zip(y.chunks_exact_mut(w.rows().max(1))) {
            for (tile, y) in y.chunks_mut(Format::PANEL_ROWS).enumerate() {
                for ((panel, scales), x) in w.panels(tile).zip(x.values().chunks_exact(Format::GROUP_COLS)) {
                    // A group may end inside a step of its base format.
                    let mut padded = [0; 2 * Format::GROUP_COLS];
                    padded[..Format::GROUP_COLS].copy_from_slice(x);
                    let mut sums = [0; Format::I3G.plane_rows()];
                    let sums = &mut sums[..panel.rows()];
                    for (sums, tile) in sums.chunks_mut(base.tile_rows()).zip(panel.tiles()) {
                        let steps = tile.chunks_exact(base.step_blocks());
                        for (step, x) in steps.zip(padded.chunks_exact(base.step_cols())) {
                            add_step(base, step, x, sums);
                        }
                    }
                    join_planes(w.format(), sums, x.iter().map(|&x| i32::from(x)).sum());
                    for ((y, &sum), &scale) in y.iter_mut().zip(&*sums).zip(scales) {
                        *y += sum as f32 * f16_to_f32(u16::from_le_bytes(scale));
                    }
                }
            }
        }
    }
}

/// [`Kernels::dot_rows`], for all who have none of their own.
pub fn dot_rows(w: Matrix<'_>, rows: &[u32], x: Activations<'_>, y: &mut [i32]) {
    assert_eq!(y.len(), rows.len());
    assert_eq!(w.format(), Format::T2R);
    x.assert_fit(&w);
    for (y, &r) in y.iter_mut().zip(rows) {
        let steps = w.row(r as usize).iter().zip(x.values().chunks_exact(Format::T2R.step_cols()));
        *y = steps
            .flat_map(|(block, x)| x.iter().enumerate().map(|(c, &x)| i32::from(t2r_weight(block, c)) * i32::from(x)))
            .sum();
    }
}

/// [`Kernels::sum_rows`], for all who have none of their own.
pub fn sum_rows(w: Matrix<'_>, rows: &[u32], x: &[i8], y: &mut [i32]) {
    assert_eq!(y.len(), w.cols());
    assert_eq!(x.len(), rows.len());
    assert_eq!(w.format(), Format::T2R);
    for (&x, &r) in x.iter().zip(rows) {
        for (block, y) in w.row(r as usize).iter().zip(y.chunks_mut(Format::T2R.step_cols())) {
            for (c, y) in y.iter_mut().enumerate() {
                *y = y.wrapping_add(i32::from(t2r_weight(block, c)) * i32::from(x));
            }
        }
    }
}

/// The weight in column `c` of one block of [`Format::T2R`].
#[inline(always)]
fn t2r_weight(block: &Block, c: usize) -> i8 {
    decode_plain(Format::T2R, core::slice::from_ref(block), 0, c)
}

/// `Some(&Portable)`, in the shape of every backend's `detect`.
pub fn detect() -> Option<&'static dyn Kernels> {
    Some(&Portable)
}

/// Adds one step's products to the sums of its rows.
fn add_step(format: Format, step: &[Block], x: &[i8], y: &mut [i32]) {
    // One arm a format, so that the compiler sees a constant and unrolls what `decode_plain` computes.
    match format {
        Format::B1 => add_step_of(Format::B1, step, x, y),
        Format::T2 => add_step_of(Format::T2, step, x, y),
        Format::TL => add_step_of(Format::TL, step, x, y),
        Format::I4 => add_step_of(Format::I4, step, x, y),
        Format::I8 => add_step_of(Format::I8, step, x, y),
        _ => panic!("{} is not multiplied by matvec", format.name()),
    }
}

#[inline(always)]
fn add_step_of(format: Format, step: &[Block], x: &[i8], y: &mut [i32]) {
    for (c, &x) in x.iter().enumerate() {
        for (r, y) in y.iter_mut().enumerate() {
            *y += i32::from(decode_plain(format, step, r, c)) * i32::from(x);
        }
    }
}
