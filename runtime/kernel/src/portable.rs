//! The reference: the plainest sum, straight from the definition of the bytes.
use crate::{Activations, Block, Format, Kernels, Matrix};

/// Runs on anything.
#[derive(Clone, Copy, Debug)]
pub struct Portable;

impl Kernels for Portable {
    fn name(&self) -> &'static str {
        "portable"
    }
    /// Needs no tables: it multiplies weights, so that it is an independent check of those who look sums up.
    fn prepare<'a>(&self, format: Format, cols: usize, values: &'a [i8], tables: &'a mut [Block]) -> Activations<'a> {
        Activations::new(format, cols, values, tables)
    }
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
}

/// `Some(&Portable)`, in the shape of every backend's `detect`.
pub fn detect() -> Option<&'static dyn Kernels> {
    Some(&Portable)
}

/// Adds one step's products to the sums of its rows.
fn add_step(format: Format, step: &[Block], x: &[i8], y: &mut [i32]) {
    // One arm a format, so that the compiler sees a constant and unrolls what `decode` computes.
    match format {
        Format::B1 => add_step_of(Format::B1, step, x, y),
        Format::T2 => add_step_of(Format::T2, step, x, y),
        Format::TL => add_step_of(Format::TL, step, x, y),
        Format::I4 => add_step_of(Format::I4, step, x, y),
        Format::I8 => add_step_of(Format::I8, step, x, y),
        Format::F16 => panic!("f16 weights are multiplied by matvec_f16"),
    }
}

#[inline(always)]
fn add_step_of(format: Format, step: &[Block], x: &[i8], y: &mut [i32]) {
    for (c, &x) in x.iter().enumerate() {
        for (r, y) in y.iter_mut().enumerate() {
            *y += i32::from(crate::format::decode(format, step, r, c)) * i32::from(x);
        }
    }
}
